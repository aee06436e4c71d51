"""Accuracy over problems, and how much of it an intervention costs, in percentage points."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Num

from pyvene_ext.io.seeds import rng
from pyvene_ext.stats.intervals import Interval, frequency_interval, paired_bootstrap

RESAMPLES = 10_000
FEW = 5  # with fewer changed problems than this, a bootstrap cannot estimate their spread


def percent_correct(correct: Bool[np.ndarray, " problem"]) -> Interval:
    """Percent correct with its Wilson 95% interval.

    Args:
        correct: whether each problem was solved.

    Returns:
        Mean and ends of the interval, in percent.
    """
    return Interval(*(100 * float(value) for value in frequency_interval(correct)))


def accuracy_drop(
    clean: Num[np.ndarray, " problem"], after: Num[np.ndarray, " problem"], seed: int, *names: str | int
) -> Interval:
    """Loss of accuracy in percentage points: mean and paired bootstrap 95% interval.

    When hardly any problem changes, or all change alike, the bootstrap sees next to no spread, however few problems there are.
    Each end is then placed at least as far from the mean as the upper end of Wilson's interval for a frequency of 0.

    Args:
        clean: correctness of each problem in the clean run, 0 or 1, or a mean over several runs of the problem.
        after: the same under the intervention, problems in the same order.
        seed: the run's seed.
        *names: what this comparison is called; with `seed` they determine the resamples.

    Returns:
        Mean and ends of the interval, in points, clipped to [-100, 100].

    Raises:
        ValueError: fewer than two problems, or the two do not match in length.
    """
    drop = Interval(*(100 * value for value in paired_bootstrap(clean, after, rng(seed, *names), RESAMPLES)))
    if np.count_nonzero(clean != after) >= FEW and drop.low < drop.high:
        return drop
    reach = 100 * float(frequency_interval(np.zeros(len(clean))).high)
    low, high = min(drop.low, drop.mean - reach), max(drop.high, drop.mean + reach)
    return Interval(drop.mean, max(low, -100.0), min(high, 100.0))


def in_points(drop: Interval) -> str:
    """Format a drop for the terminal: "12.5 points [8.0, 17.0]"."""
    return f"{drop.mean:.1f} points [{drop.low:.1f}, {drop.high:.1f}]"
