"""Resolve named positions of tokenised prompts to token indices."""

from __future__ import annotations

from pyvene_ext.prompts.tokenized import TokenizedPrompts

Positions = str | tuple[str | int, ...]


def token_indices(prompts: TokenizedPrompts, prompt: int, positions: Positions | int) -> list[int]:
    """Find the tokens of one prompt that `positions` names.

    Args:
        prompts: the prompt set.
        prompt: the prompt's index in the set.
        positions: "all", "last", a name of the prompt set, an integer (negative: from the last token), or a tuple of these.

    Returns:
        Token indices, counted from the prompt's first real token.

    Raises:
        ValueError: the prompt has no such name or token.
    """
    length = len(prompts.input_ids[prompt])
    if positions == "all":
        return list(range(length))
    if isinstance(positions, bool):
        raise ValueError(f"positions are names and token indices, not {positions}; for every token give 'all'.")
    if isinstance(positions, tuple):
        return [token for position in positions for token in token_indices(prompts, prompt, position)]
    named = prompts.positions[prompt]
    index = named.get(positions) if isinstance(positions, str) else positions
    if index is None:
        raise ValueError(f"prompt {prompt} has no position {positions!r}; choose among {', '.join(sorted(named))}.")
    if not -length <= index < length:
        raise ValueError(f"position {positions!r} lies outside prompt {prompt}, which has {length} tokens.")
    return [index % length]
