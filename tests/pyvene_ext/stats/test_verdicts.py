"""McNemar's test against the binomial by hand, and what a drop of accuracy is called."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from pyvene_ext.stats.controls import mcnemar_p, random_heads_in_place, share_as_large, verdict
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


def test_where_most_answers_cannot_be_read_there_is_no_verdict() -> None:
    for drop in (Interval(56, 31, 81), Interval(0, -1, 1)):
        assert verdict(drop, unparsed=9 / 16) == "text broken, no verdict (56% of answers unparsed)"
        assert verdict(drop, unparsed=8 / 16) == verdict(drop)


def test_the_value_itself_counts_among_what_is_as_large() -> None:
    assert share_as_large(2.0, [1.0, 2.0, 3.0]) == 3 / 4
    assert share_as_large(9.0, [1.0, 2.0, 3.0]) == 1 / 4


def test_random_heads_in_place_are_others_of_the_layer_and_each_once() -> None:
    meant = [(1, 0), (0, 1), (1, 2)]
    sets = random_heads_in_place(meant, 3, 40, np.random.default_rng(0))
    assert len(sets) == 40 and len(set(sets)) > 3
    for heads in sets:
        assert [layer for layer, _ in heads] == [1, 0, 1] and len(set(heads)) == 3
        assert all(mine != theirs for mine, theirs in zip(heads, meant, strict=True))
    for impossible in ([(0, 0)] * 2, [(0, head) for head in range(4)]):
        with pytest.raises(ValueError, match="no random heads to put in place of those of the donor's layer 0"):
            random_heads_in_place(impossible, 3, 1, np.random.default_rng(0))
