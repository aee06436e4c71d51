"""Tokenised pairs of clean and corrupt texts, and which of them can be patched."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_positions
from pyvene_ext.methods.patching.patch import corresponding
from pyvene_ext.prompts.encoding import Answers
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import TokenizedPrompts


def both_texts(
    prompts: PromptSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Answers = "first_token"
) -> tuple[TokenizedPrompts, TokenizedPrompts]:
    """Tokenise the clean and the corrupt texts.

    Args:
        prompts: the pairs.
        model: gives the longest text that fits.
        tokenizer: the model's.
        answers: how answers become tokens, as for `PromptSet.tokenize`.

    Returns:
        The clean and the corrupt texts.

    Raises:
        ValueError: a text is too long for the model, or cannot be tokenised.
    """
    longest = n_positions(model.config)
    clean, corrupt = (prompts.tokenize(tokenizer, text, answers, longest) for text in ("clean", "corrupt"))
    return clean, corrupt


def pairs_of_equal_length(clean: TokenizedPrompts, corrupt: TokenizedPrompts, dataset: str) -> list[int]:
    """Select the pairs whose texts correspond token by token, as edges need them.

    Args:
        clean: the clean text of every pair.
        corrupt: the corrupt text of every pair.
        dataset: the flag that chose the pairs, for errors.

    Returns:
        Their indices.

    Raises:
        ValueError: there is none.
    """
    kept = [pair for pair, ids in enumerate(clean.input_ids) if len(ids) == len(corrupt.input_ids[pair])]
    if not kept:
        raise ValueError(f"no pair of {dataset} has prompts of equal length in tokens; edges need such pairs.")
    return kept


def patchable(
    clean: TokenizedPrompts, corrupt: TokenizedPrompts, names: Sequence[str], dataset: str, positions: str
) -> tuple[TokenizedPrompts, TokenizedPrompts, list[int], list[int]]:
    """Select the pairs whose texts correspond at named positions (`patch.corresponding`).

    Args:
        clean: the clean text of every pair.
        corrupt: the corrupt text of every pair.
        names: the positions; none for every token.
        dataset: the flag that chose the pairs, for errors.
        positions: the flag that chose the positions, for errors.

    Returns:
        The clean and the corrupt texts of these pairs, the indices of these pairs, and of those that are dropped.

    Raises:
        ValueError: there are too few pairs for an interval.
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
