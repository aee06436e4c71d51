"""Named positions of tokenised prompts as token numbers."""

from __future__ import annotations

from pyvene_ext.prompts.tokenized import TokenizedPrompts

Positions = str | tuple[str | int, ...]


def token_indices(prompts: TokenizedPrompts, prompt: int, positions: Positions | int) -> list[int]:
    """The tokens of one prompt, counted from its first real token, that `positions` names.

    `positions` is "all", "last", a name of the prompt set, an integer (negative: from the last token) or a tuple of these.
    Raises ValueError where the prompt has no such name or token.
    """
    length = len(prompts.input_ids[prompt])
    if positions == "all":
        return list(range(length))
    if isinstance(positions, tuple):
        return [token for position in positions for token in token_indices(prompts, prompt, position)]
    named = prompts.positions[prompt]
    index = named.get(positions) if isinstance(positions, str) else positions
    if index is None:
        raise ValueError(f"prompt {prompt} has no position {positions!r}; choose among {', '.join(sorted(named))}.")
    if not -length <= index < length:
        raise ValueError(f"position {positions!r} lies outside prompt {prompt}, which has {length} tokens.")
    return [index % length]
