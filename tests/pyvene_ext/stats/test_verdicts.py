"""McNemar's test against the binomial by hand, and what a drop of accuracy is called."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from pyvene_ext.stats.controls import mcnemar_p, verdict
from pyvene_ext.stats.intervals import Interval


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (6, 1), (3, 3), (2, 9), (20, 4)])
def test_mcnemars_p_is_the_two_sided_binomial_of_those_that_changed(lost: int, won: int) -> None:
    before = np.array([True] * lost + [False] * won + [True] * 5 + [False] * 4)
    after = np.array([False] * lost + [True] * won + [True] * 5 + [False] * 4)
    n = lost + won
    tail = sum(comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar_p(before, after) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_takes_booleans_of_one_length() -> None:
    for before, after in (([True], [True, False]), ([1, 0], [True, False]), ([[True]], [[True]])):
        with pytest.raises(ValueError, match="two boolean vectors of the same length"):
            mcnemar_p(np.array(before), np.array(after))


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ((30, 12, 40), "causal"),
        ((30, 8, 40), "causal by its size, but the interval goes down to 8.0"),
        ((11, -1, 40), "causal by its size, but the interval holds 0: not established"),
        ((1, -1, 1.9), "redundant"),
        ((-5, -9, -1), "redundant"),
        ((1, -1, 12), "redundant by its size, but the interval goes up to 12.0: not established"),
        ((5, 3, 7), "neither causal nor redundant"),
        ((5, -3, 13), "neither causal nor redundant, and the interval holds 0"),
        ((10, 10, 10), "neither causal nor redundant"),
        ((2, 1, 3), "neither causal nor redundant"),
    ],
)
def test_a_verdict_goes_by_the_mean_and_the_whole_interval(drop: tuple[float, ...], said: str) -> None:
    assert verdict(Interval(*drop)) == said
