"""Named, counted and joined positions, as one counts them by hand."""

from __future__ import annotations

import pytest

from pyvene_ext.prompts.positions import token_indices
from tests.random_prompts import random_prompts

PROMPTS = random_prompts((9, 6))


def test_positions_count_from_the_first_real_token_or_back_from_the_last() -> None:
    assert token_indices(PROMPTS, 1, ("s1", 0, -1, "last")) == [1, 0, 5, 5]
    assert token_indices(PROMPTS, 1, "all") == list(range(6))
    with pytest.raises(ValueError, match="prompt 1 has no position 'verb'; choose among end, last, s1, s2"):
        token_indices(PROMPTS, 1, "verb")
    with pytest.raises(ValueError, match="position -7 lies outside prompt 1, which has 6 tokens"):
        token_indices(PROMPTS, 1, (-7,))
    with pytest.raises(ValueError, match="not True; for every token give 'all'"):
        token_indices(PROMPTS, 1, True)
