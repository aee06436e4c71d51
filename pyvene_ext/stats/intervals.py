"""Confidence intervals: of means, frequencies, paired differences and ratios."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

AT_ONCE = 4_000_000  # resampled numbers held at once: 32 MB an array


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval: three numbers, or three arrays of one shape."""

    mean: Any
    low: Any
    high: Any


def _percentile_interval(resampled: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    defined = resampled[np.isfinite(resampled)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.clip(np.quantile(defined, (0.025, 0.975)), -1.0, 1.0)  # rounding can pass 1 by an ulp
    return float(low), float(high)


def frequency_interval(
    active: np.ndarray, axis: int = -1, confidence: float = 0.95, counted: np.ndarray | None = None
) -> Interval:
    """The share of ones along an axis (of prompts) with its Wilson score interval.

    Wilson's interval (1927), because the usual p +- 1.96 sd has width 0 for a head that is active on no prompt, or on all.

    Args:
        active: booleans or 0/1, any shape.
        axis: the axis averaged over; the results have the other axes.
        confidence: of the interval.
        counted: which values count, in the shape of `active`; all by default.

    Returns:
        The share and the interval's ends, nan where no value counts.

    Raises:
        ValueError: a value is neither 0 nor 1, or the axis is empty.
    """
    active = np.asarray(active)
    if not ((active == 0) | (active == 1)).all():
        raise ValueError("a frequency is a mean of zeros and ones; these values hold something else.")
    if not -active.ndim <= axis < active.ndim or active.shape[axis] == 0:
        raise ValueError(f"no values along axis {axis} (shape {active.shape}); a frequency needs at least one.")
    counted = np.ones(active.shape, bool) if counted is None else counted
    n = counted.sum(axis=axis, dtype=np.float64)
    n = np.where(n, n, np.nan)
    ones = (active * counted).sum(axis=axis, dtype=np.float64)
    frequency = ones / n
    low, high = proportion_confint(ones, n, alpha=1 - confidence, method="wilson")
    # At 0 and 1 the end is exactly 0 or 1; rounding would put it a hair beside.
    return Interval(frequency, np.where(frequency == 0, 0.0, low), np.where(frequency == 1, 1.0, high))


def paired_bootstrap(
    x: Num[np.ndarray, " prompt"],
    y: Num[np.ndarray, " prompt"],
    rng: np.random.Generator,
    n_resamples: int = 10_000,
) -> Interval:
    """The mean of x - y over prompts with its percentile bootstrap 95% interval; a prompt's two values stay together.

    Raises:
        ValueError: x and y are not two vectors of one length of at least 2, or hold non-finite values.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ValueError(f"two vectors of one length of at least 2 are needed, not shapes {x.shape} and {y.shape}.")
    difference = x - y
    if not np.isfinite(difference).all():
        raise ValueError("x or y holds NaN or infinite values; drop those prompts, and say how many, before comparing.")
    interval = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=n_resamples,
        batch=max(1, AT_ONCE // difference.size),
        method="percentile",
        rng=rng,
    ).confidence_interval
    return Interval(float(difference.mean()), float(interval.low), float(interval.high))


def bootstrap_mean(values: Num[np.ndarray, " prompt"], rng: np.random.Generator, n_resamples: int = 10_000) -> Interval:
    """The mean over prompts with its percentile bootstrap 95% interval.

    Raises:
        ValueError: fewer than two values, or non-finite ones.
    """
    return paired_bootstrap(values, np.zeros_like(values), rng, n_resamples)


def ratio_of_means(
    above: Float[np.ndarray, "item prompt"],
    below: Float[np.ndarray, " prompt"],
    generator: np.random.Generator,
    resamples: int = 2000,
) -> Interval:
    """Mean over prompts of `above` by the mean of `below`, with percentile bootstrap 95% intervals: arrays " item".

    A resample takes the same prompts of both, and for every item. Where a mean below is 0 there is no ratio: NaN.
    """
    above, below = above.astype(np.float64), below.astype(np.float64)
    n = len(below)
    shares = generator.multinomial(n, np.full(n, 1 / n), resamples) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = above.mean(1) / below.mean()
        ends = np.array([np.quantile(shares @ row / (shares @ below), (0.025, 0.975)) for row in above])
    finite_mean = np.where(np.isfinite(mean), mean, math.nan)
    low, high = np.where(np.isfinite(ends), ends, math.nan).T
    return Interval(finite_mean, low, high)
