"""Intervals that may be looked at after every problem, against bets by hand; when a comparison stops; how often it is wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pyvene_ext.io.seeds import rng
from pyvene_ext.stats.accuracy import accuracy_drop
from pyvene_ext.stats.stopping import (
    FEWEST,
    STAKES,
    VALUES,
    WEIGHTS,
    Stopped,
    Stopping,
    _counts,
    _log_capital,
    anytime_interval,
)
from pyvene_ext.stats.thresholds import check_thresholds

DECIDE = Stopping(decide=(10, 2))


def capital(values: Any, m: float) -> float:
    """What bets against "the mean is at most m" have made of 1, bet by bet, with each stake."""
    owned = np.array(WEIGHTS)
    for value in values:
        owned *= 1 + STAKES * (value - m) / (1 + m)
    return owned.sum()


def lower_by_hand(values: Any) -> float:
    """The least mean against which the bets have not made 40 of 1, by trying many."""
    return next((m for m in np.arange(-1 + 1e-6, 1, 1e-3) if capital(values, m) < 40), 1.0)


@pytest.mark.parametrize("values", [[1] * 9, [0] * 20, [1, 0, -1, 0.5, 1, 1, 0.25], [-1] * 5, [1]])
def test_an_interval_ends_where_the_bets_stop_paying(values: list[float]) -> None:
    assert WEIGHTS.sum() == pytest.approx(1) and STAKES.max() < 1, "so that the bets gain nothing on average"
    interval = anytime_interval(np.array(values))
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.low == pytest.approx(lower_by_hand(values), abs=2e-3)
    assert interval.high == pytest.approx(-lower_by_hand([-value for value in values]), abs=2e-3)
    shuffled = anytime_interval(np.array(values[::-1]))
    assert shuffled == pytest.approx(interval)
    share = anytime_interval((np.array(values) + 1) / 2, low=0)
    assert [2 * end - 1 for end in share] == pytest.approx([*interval])


def stop_by_hand(rule: Stopping, clean: list[int], after: list[int]) -> tuple[str, int] | None:
    """One problem after the other; whether what is left can decide is tried with the best and the worst outcomes."""
    above, below = (points / 100 for points in rule.decide or (math.nan, math.nan))

    def verdict(drops: list[int]) -> str | None:
        if capital(drops, above) >= 40:
            return "above"
        if capital([-drop for drop in drops], -below) >= 40:
            return "below"
        interval = anytime_interval(np.array(drops))
        return "narrow" if rule.width and 100 * (interval.high - interval.low) <= rule.width else None

    def can_decide(drops: list[int]) -> bool:
        rest = clean[len(drops) :]
        outcomes = [drops + rest[:k] for k in range(1, len(rest) + 1)]
        outcomes += [drops + [value - 1 for value in rest[:k]] for k in range(1, len(rest) + 1)]
        return any(map(verdict, outcomes))

    drops: list[int] = []
    for n, (before, then) in enumerate(zip(clean, after, strict=False), 1):
        drops.append(before - then)
        if found := verdict(drops):
            return found, n
        if n >= FEWEST and rule.width is None and not can_decide(drops):
            return "undecided", n
    return ("undecided", len(after)) if len(after) == len(clean) else None


@pytest.mark.parametrize("rule", [Stopping(decide=(10, 2)), Stopping(decide=(90, 40)), Stopping((30, 30), width=60)])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.95])
def test_a_comparison_stops_at_the_first_problem_that_decides_it(rule: Stopping, kept: float) -> None:
    draw = rng(1, "outcomes")
    clean = (draw.random(28) < 0.9).astype(int)
    after = np.where(draw.random(28) < kept, clean, (draw.random(28) < 0.1).astype(int))
    expected = stop_by_hand(rule, clean.tolist(), after.tolist())
    assert expected is not None
    for known in (1, expected[1] - 1, expected[1], 27, 28):
        found = rule.judge(clean, after[:known])
        if known < expected[1]:
            assert found is None
            continue
        assert found is not None and (found.verdict, found.problems, found.of) == (*expected, 28)
        drop = clean[: found.problems] - after[: found.problems]
        assert found.drop.mean == pytest.approx(100 * drop.mean())
        assert Stopped.from_dict(found.as_dict()) == found


def test_a_comparison_continues_while_the_best_outcomes_would_decide_it() -> None:
    rule, clean, after = Stopping(decide=(99, 60)), [1] * 40, [0, 1] * 8 + [1] * 24
    expected = stop_by_hand(rule, clean, after)
    found = rule.judge(np.array(clean), np.array(after))
    assert found is not None and expected == ("below", found.problems) == (found.verdict, found.problems)
    assert found.problems > FEWEST and rule.judge(np.array(clean), np.array(after[:FEWEST])) is None


def test_what_the_thresholds_need_at_least() -> None:
    lost, same = DECIDE.least()
    assert (lost, same) == (8, 227)
    ones, zeros = np.ones(300, int), np.zeros(300, int)
    assert str(DECIDE.judge(ones, zeros)) == "above after 8 of 300 problems: 100.0 points [13.9, 100.0]"
    below = DECIDE.judge(ones, ones)
    assert below is not None and (below.verdict, below.problems) == ("below", 227) and below.drop.high < 2
    assert Stopping((10, 0)).least() == (8, math.inf)
    most = Stopping(most=5).judge(ones, zeros)
    assert most is not None and (most.verdict, most.problems, most.of) == ("undecided", 5, 5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "there is nothing by which to stop"),
        ({"decide": (2, 10)}, "decide takes an upper and a lower threshold in points, .* such as 10 2, not 2 10."),
        ({"decide": (10, -1)}, "not 10 -1."),
        ({"decide": (100, 2)}, "less than 100"),
        ({"decide": (10, math.nan)}, "not 10 nan."),
        ({"width": 0}, "width must be above 0 and at most 200 points, not 0."),
        ({"most": 1}, "most must be a whole number of 2 or more, not 1."),
        ({"width": 5, "confidence": 1}, "confidence must be between 0 and 1, not 1."),
    ],
)
def test_a_rule_that_is_none_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Stopping(**given)
    with pytest.raises(ValueError, match=r"from 0 to 1, not \[2.0\]"):
        anytime_interval(np.array([2]), low=0)
    assert check_thresholds((10, 10), "x") == (10, 10)


# -- how often it is wrong ---------------------------------------------------------------------------------------------

TIMES, PROBLEMS = 2000, 400


def outcomes(drop: float, name: str, *, without_replacement: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Correctness without and with an intervention that costs so many points: 90% are solved at first, a tenth changes sides."""
    draw, won = rng(0, "coverage", name), 0.02
    chances = [drop / 100 + won, won, 0.9 - drop / 100 - won, 0.1 - won]
    if without_replacement:
        kinds = np.repeat(range(4), np.round(np.array(chances) * PROBLEMS).astype(int))
        kind = draw.permuted(np.tile(kinds, (TIMES, 1)), axis=1)
    else:
        kind = draw.choice(4, (TIMES, PROBLEMS), p=chances)
    return np.isin(kind, (0, 2)), np.isin(kind, (1, 2))


def ever_refuted(drops: np.ndarray, m: float, sign: int) -> np.ndarray:
    """Whether the bets against "the mean is at most m" (sign 1) or "at least" (-1) pay after any number of problems."""
    return np.array(
        [(_log_capital(sign * VALUES, _counts(of_one), np.array(sign * m)) >= math.log(40)).any() for of_one in drops]
    )


@pytest.mark.slow
@pytest.mark.parametrize("without_replacement", [False, True])
@pytest.mark.parametrize("drop", [2.0, 10.0])
def test_verdicts_and_intervals_are_wrong_as_seldom_as_they_say(drop: float, without_replacement: bool) -> None:
    """At the thresholds themselves, where one of the verdicts is always wrong; the interval after any number of problems."""
    clean, after = outcomes(drop, "rule", without_replacement=without_replacement)
    drops = clean.astype(int) - after
    too_high, too_low = (ever_refuted(drops, drop / 100, sign) for sign in (1, -1))
    assert too_high.mean() <= 0.025 and too_low.mean() <= 0.025
    for number in range(40):
        found = DECIDE.judge(clean[number], after[number])
        assert found is not None
        wrong = {2.0: (too_low, "below"), 10.0: (too_high, "above")}[drop]
        assert (found.verdict == wrong[1]) == wrong[0][number]


@pytest.mark.slow
def test_an_interval_for_one_look_is_wrong_far_more_often_when_it_is_looked_at_until_it_decides() -> None:
    """The mean +- 1.96 standard errors, looked at from 16 problems on: what makes the other interval necessary."""
    clean, after = outcomes(10.0, "peeking")
    drops = clean.astype(int) - after
    n = np.arange(1, PROBLEMS + 1)
    mean = drops.cumsum(1) / n
    error = 1.96 * np.sqrt(((drops**2).cumsum(1) / n - mean**2) / n)
    peeking = ((mean - error > 0.10) & (n >= FEWEST)).any(1)
    assert peeking.mean() > 0.10 and ever_refuted(drops, 0.10, 1).mean() < 0.025


def test_the_interval_that_may_be_looked_at_is_wider_than_that_for_one_look() -> None:
    clean, after = (some[0] for some in outcomes(30.0, "width"))
    once, always = accuracy_drop(clean, after, 0, "x"), anytime_interval(clean.astype(int) - after)
    assert 1.3 * (once.high - once.low) < 100 * (always.high - always.low) < 3 * (once.high - once.low)
