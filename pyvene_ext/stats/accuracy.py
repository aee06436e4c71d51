"""Accuracy over problems, and what an intervention costs of it, in points of 100."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Num

from pyvene_ext.io.seeds import rng
from pyvene_ext.stats.intervals import Interval, frequency_interval, paired_bootstrap

RESAMPLES = 10_000
FEW = 5  # changed problems, below which their spread is hardly known


def percent_correct(correct: Bool[np.ndarray, " problem"]) -> Interval:
    """Percent correct with Wilson's 95% interval."""
    return Interval(*(100 * float(value) for value in frequency_interval(correct)))


def accuracy_drop(
    clean: Num[np.ndarray, " problem"], after: Num[np.ndarray, " problem"], seed: int, *names: str | int
) -> Interval:
    """Points of accuracy lost: mean and paired bootstrap 95% interval.

    Where next to no problem changes, or all do alike, a bootstrap knows next to no spread, however few the problems are. The ends
    are then at least as far from the mean as Wilson's interval goes for a share of 0.
    """
    drop = Interval(*(100 * value for value in paired_bootstrap(clean, after, rng(seed, *names), RESAMPLES)))
    if np.count_nonzero(clean != after) >= FEW and drop.low < drop.high:
        return drop
    reach = 100 * float(frequency_interval(np.zeros(len(clean))).high)
    low, high = min(drop.low, drop.mean - reach), max(drop.high, drop.mean + reach)
    return Interval(drop.mean, max(low, -100.0), min(high, 100.0))


def in_points(drop: Interval) -> str:
    """A drop for the terminal: "12.5 points [8.0, 17.0]"."""
    return f"{drop.mean:.1f} points [{drop.low:.1f}, {drop.high:.1f}]"
