"""Prompts of random tokens for the tiny random models."""

from __future__ import annotations

import torch

from pyvene_ext.prompts.tokenized import TokenizedPrompts, answer_pairs
from tests.tiny_random import PAD, VOCAB


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> TokenizedPrompts:
    """Prompts of these lengths; "s1" lies at another place in every other prompt."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    return TokenizedPrompts(
        input_ids=tuple(tuple(tokens(length)) for length in lengths),
        answers=answer_pairs((io, io - 1) for io in tokens(len(lengths))),
        positions=tuple({"end": -1, "last": -1, "s1": -4 - i % 2, "s2": -2} for i in range(len(lengths))),
        pad_id=PAD,
    )
