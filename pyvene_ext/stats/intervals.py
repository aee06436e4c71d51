"""Confidence intervals of means, frequencies, paired differences and ratios."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

AT_ONCE = 4_000_000  # resampled values in memory at a time: 32 MB an array


class Interval(NamedTuple):
    """A mean with its confidence interval: three numbers, or three arrays of the same shape.

    Attributes:
        mean: the estimate.
        low: lower end of the interval.
        high: upper end.
    """

    mean: Any
    low: Any
    high: Any


def _percentile_interval(resampled: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    defined = resampled[np.isfinite(resampled)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.clip(np.quantile(defined, (0.025, 0.975)), -1.0, 1.0)  # rounding can exceed 1 by an ulp
    return float(low), float(high)


def frequency_interval(
    active: np.ndarray, axis: int = -1, confidence: float = 0.95, counted: np.ndarray | None = None
) -> Interval:
    """The frequency of ones along an axis (of prompts) with its Wilson score interval (1927).

    The usual p +- 1.96 sd would have width 0 for a head that is active on no prompt, or on all.

    Args:
        active: booleans or 0/1, any shape.
        axis: axis to average over; the results have the other axes.
        confidence: level of the interval.
        counted: boolean mask of the values that count, of the same shape as `active`; by default all.

    Returns:
        Frequency and ends of the interval, nan where no value counts.

    Raises:
        ValueError: a value is neither 0 nor 1, or the axis is empty.
    """
    active = np.asarray(active)
    if not ((active == 0) | (active == 1)).all():
        raise ValueError("a frequency is a mean of zeros and ones; these values include other numbers.")
    if not -active.ndim <= axis < active.ndim or active.shape[axis] == 0:
        raise ValueError(f"no values along axis {axis} (shape {active.shape}); a frequency needs at least one.")
    counted = np.ones(active.shape, bool) if counted is None else counted
    n = counted.sum(axis=axis, dtype=np.float64)
    n = np.where(n, n, np.nan)
    ones = (active * counted).sum(axis=axis, dtype=np.float64)
    frequency = ones / n
    low, high = proportion_confint(ones, n, alpha=1 - confidence, method="wilson")
    # At frequencies of 0 and 1 the end is exactly 0 or 1; rounding would miss it slightly.
    return Interval(frequency, np.where(frequency == 0, 0.0, low), np.where(frequency == 1, 1.0, high))


def paired_bootstrap(
    x: Num[np.ndarray, " prompt"],
    y: Num[np.ndarray, " prompt"],
    rng: np.random.Generator,
    n_resamples: int = 10_000,
) -> Interval:
    """The mean of x - y over prompts with its percentile bootstrap 95% interval; a prompt's two values are resampled together.

    Args:
        x: one number per prompt.
        y: the same prompts in the same order.
        rng: generator of the resamples.
        n_resamples: number of resamples.

    Returns:
        Mean and ends of the interval.

    Raises:
        ValueError: x and y are not vectors of the same length of at least 2, or contain non-finite values.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ValueError(
            f"x and y must be vectors of the same length of at least 2, not of shapes {x.shape} and {y.shape}."
        )
    difference = x - y
    if not np.isfinite(difference).all():
        raise ValueError(
            "x or y contains NaN or infinite values; drop those prompts, and report how many, before comparing."
        )
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

    Args:
        values: one number per prompt.
        rng: generator of the resamples.
        n_resamples: number of resamples.

    Returns:
        Mean and ends of the interval.

    Raises:
        ValueError: fewer than two values, or non-finite ones.
    """
    return paired_bootstrap(values, np.zeros_like(values), rng, n_resamples)


def student_interval(values: Num[np.ndarray, "*item sample"]) -> Interval:
    """The mean over the last axis with Student's t 95% interval: cheap, so that it can be shown beside every mean.

    Args:
        values: independent samples along the last axis; values that are not finite are left out.

    Returns:
        Mean and ends of the interval, each "*item"; NaN where there is no value, ends NaN where there is one.
    """
    finite = np.isfinite(values)
    values = np.where(finite, values, 0).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        n = finite.sum(-1)
        mean = values.sum(-1) / n
        variance = (np.where(finite, values - mean[..., None], 0) ** 2).sum(-1) / (n - 1)
        half = stats.t.ppf(0.975, n - 1) * np.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def standard_error(values: Num[np.ndarray, "sample *rest"]) -> Float[np.ndarray, "*rest"]:  # noqa: UP037 (a shape)
    """Standard error of the mean over the first axis.

    Args:
        values: independent samples along the first axis; at least two.

    Returns:
        The standard error of each entry.
    """
    return values.std(0, ddof=1) / np.sqrt(len(values))


def ratio_of_means(
    above: Float[np.ndarray, "item prompt"],
    below: Float[np.ndarray, " prompt"],
    generator: np.random.Generator,
    resamples: int = 2000,
) -> Interval:
    """Ratio of two means over prompts, with its percentile bootstrap 95% interval.

    Each resample uses the same prompts in numerator and denominator, and for every item.

    Args:
        above: numerators.
        below: denominators.
        generator: generator of the resamples.
        resamples: number of resamples.

    Returns:
        Ratio and ends of the interval, each " item"; NaN where the mean denominator is 0. Resamples in which it is 0 are left
        out.
    """
    above, below = above.astype(np.float64), below.astype(np.float64)
    n = len(below)
    shares = generator.multinomial(n, np.full(n, 1 / n), resamples) / n
    defined = shares @ below != 0
    shares = shares[defined] if defined.any() else shares
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = above.mean(1) / below.mean()
        ends = np.array([np.quantile(shares @ row / (shares @ below), (0.025, 0.975)) for row in above])
    finite_mean = np.where(np.isfinite(mean), mean, math.nan)
    low, high = np.where(np.isfinite(ends), ends, math.nan).T
    return Interval(finite_mean, low, high)


def change_of_ratio(
    after: tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]],
    before: tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]],
    generator: np.random.Generator,
    resamples: int = 2000,
) -> Interval:
    """Change of a ratio of two means over prompts, with its percentile bootstrap 95% interval.

    Each resample uses the same prompts in all four means.

    Args:
        after: numerators and denominators.
        before: the same prompts' before.
        generator: generator of the resamples.
        resamples: number of resamples.

    Returns:
        The ratio after less that before, and ends of the interval; NaN where a mean denominator is 0.
    """
    n = len(before[0])
    all_once = np.ones((1, n))
    drawn = generator.multinomial(n, np.full(n, 1 / n), resamples).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        (mean,), changes = (
            (shares @ after[0]) / (shares @ after[1]) - (shares @ before[0]) / (shares @ before[1])
            for shares in (all_once, drawn)
        )
        low, high = np.quantile(changes, (0.025, 0.975))
    ends = (float(value) if np.isfinite(value) else math.nan for value in (mean, low, high))
    return Interval(*ends)
