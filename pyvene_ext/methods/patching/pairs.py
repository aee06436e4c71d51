"""Pairs of texts as tokens, and which of them a study can patch."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_positions
from pyvene_ext.methods.patching.patch import corresponding
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import Answers, TokenizedPrompts


def both_texts(
    prompts: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers = "first_token"
) -> tuple[TokenizedPrompts, TokenizedPrompts]:
    """The clean and the corrupt texts as tokens; ValueError for one that is too long for the model."""
    longest = n_positions(model.config)
    clean, corrupt = (prompts.tokenize(tokenizer, text, answers, longest) for text in ("clean", "corrupt"))
    return clean, corrupt


def patchable(
    clean: TokenizedPrompts, corrupt: TokenizedPrompts, names: Sequence[str], dataset: str, positions: str
) -> tuple[TokenizedPrompts, TokenizedPrompts, list[int], list[int]]:
    """The pairs that correspond at named positions (`patch.corresponding`).

    Args:
        clean: the clean text of every pair.
        corrupt: the corrupt one.
        names: the positions; none for every token.
        dataset: the flag that chose the pairs, for errors.
        positions: the flag that chose the names, for errors.

    Returns:
        The clean and the corrupt texts of these pairs, which pairs they are, and which are left out.

    Raises:
        ValueError: too few pairs for an interval.
    """
    n = len(clean)
    clean, corrupt, kept = corresponding(clean, corrupt, names)
    dropped = sorted(set(range(n)) - set(kept))
    if n < 2:
        raise ValueError(f"{dataset} gives {n} pair; an interval over pairs needs two or more.")
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {n} pairs of {dataset} can be patched at --positions {positions} and {len(dropped)} cannot, because "
            "their texts differ in number of tokens; an interval over pairs needs two: use --positions last, or texts of equal "
            "length."
        )
    return clean, corrupt, kept, dropped
