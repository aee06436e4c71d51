"""How many prompts are taken at once."""

from __future__ import annotations

import pytest

from pyvene_ext.engine.sweep.plan import MIB, prompts_at_once
from tests.tiny_random import random_model


@pytest.mark.parametrize(
    ("prompts", "batch_size", "each", "memory", "expected"),
    [
        (3, 8, 1, None, 3),
        (16, 8, 1, None, 8),
        (8, 8, MIB, 7 * MIB, 4),  # 4 + 4, and not 7 + 1
        (13, 8, MIB, 5 * MIB, 5),
        (8, 8, 128 * MIB, None, 4),  # 512 MiB besides a tiny model
        (8, 8, 1024 * MIB, None, 1),  # by default one prompt is run whatever it takes
    ],
)
def test_batches_fit_and_are_about_as_large(
    prompts: int, batch_size: int, each: int, memory: int | None, expected: int
) -> None:
    assert prompts_at_once(random_model("gpt2"), prompts, each, batch_size, memory) == expected
