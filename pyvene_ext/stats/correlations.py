"""Correlations over heads with bootstrap intervals and within-layer permutation tests; cluster bootstrap weights and R^2."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from scipy import stats

from pyvene_ext.io.seeds import rng
from pyvene_ext.stats import intervals
from pyvene_ext.stats.intervals import _percentile_interval

FEW = 7  # pairs up to which every permutation is counted: 5040 at most


@dataclass(frozen=True)
class Coefficient:
    """One correlation coefficient.

    Attributes:
        r: its value.
        p: SciPy's p-value, which assumes independent heads; heads of one layer are not. Of up to seven pairs the exact one, over
            all permutations.
        low: lower end of the bootstrap 95% interval.
        high: upper end.
        p_within_layers: p-value of the within-layer permutation test, which does not assume that.
    """

    r: float = math.nan
    p: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_within_layers: float = math.nan


@dataclass(frozen=True)
class Correlation:
    """Correlation of two [layer head] matrices.

    Attributes:
        n: number of paired heads.
        dropped: pairs dropped because a value was not finite.
        pearson: Pearson's r.
        spearman: Spearman's rank correlation.
        note: why a number is nan or needs care; empty if neither is the case.
    """

    n: int
    dropped: int
    pearson: Coefficient
    spearman: Coefficient
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data for a JSON file, with None in place of nan."""
        record = asdict(self)
        for name in ("pearson", "spearman"):
            record[name] = {key: None if math.isnan(value) else value for key, value in record[name].items()}
        return record


def correlate_heads(
    a: Num[np.ndarray, "layer head"],
    b: Num[np.ndarray, "layer head"],
    seed: int = 0,
    n_resamples: int = 10_000,
) -> Correlation:
    """Pearson and Spearman correlation of two matrices, each head one paired observation.

    Pairs with a NaN or infinite value are dropped and counted. Fewer than three pairs, or a constant matrix, give nan and a note.

    The 95% interval is a percentile bootstrap over heads: it never leaves [-1, 1], and it exists where BCa does not (BCa's
    jackknife breaks down when one head carries all the variance, as is common for frequencies that are mostly 0). A resample in
    which one matrix is constant has no correlation; such resamples are dropped, and the note gives their number. Up to seven
    pairs have no interval, because resamples of so few are mostly the same pairs over again, and their p is exact: the share of
    all permutations whose |r| is as large, of four pairs 1/24 at the least, where SciPy's formula gives 0.

    `p_within_layers` permutes heads within each layer, never across layers. Its null hypothesis is that *within a layer* it does
    not matter which head of `a` is paired with which head of `b`. It thus tests for association beyond that due to layer alone:
    two matrices that merely both grow with depth are strongly correlated, yet get a large p here. It is two-sided: the share of
    permutations whose coefficient is at least as far from the null mean as the observed one, (1 + count) / (1 + n_resamples).
    The null mean is not 0 but the coefficient due to the layer means; the distance from it is the summed within-layer covariance,
    which is what the code compares.

    Args:
        a: one number per head, [layer head].
        b: the same heads in the same order, [layer head].
        seed: the run's seed; the same seed and data give the same numbers.
        n_resamples: number of bootstrap resamples, and of permutations.

    Returns:
        Both coefficients with their intervals and p-values.

    Raises:
        ValueError: the shapes differ or are not [layer head], or n_resamples is below 1.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must be [layer head] matrices of the same shape, not {a.shape} and {b.shape}.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; take at least 1 (10000 gives steady intervals).")

    kept = np.isfinite(a) & np.isfinite(b)
    layers = np.nonzero(kept)[0]
    x, y = a[kept], b[kept]
    n, dropped = int(kept.sum()), int((~kept).sum())

    constant = [name for name, values in (("a", x), ("b", y)) if n >= 3 and np.isnan(_unit(values)).any()]
    if n < 3 or constant:
        why = f"constant input: {' and '.join(constant)}" if constant else "fewer than 3 pairs"
        return Correlation(n, dropped, Coefficient(), Coefficient(), why)

    p_within = _p_within_layers(x, y, layers, n_resamples, rng(seed, "within-layer permutation"))
    if n <= FEW:
        exact = _exact_p(x, y), _exact_p(stats.rankdata(x), stats.rankdata(y))
        p_within = p_within if len(np.unique(layers)) > 1 else exact
        r = float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic)
        by_value, by_rank = (Coefficient(r[i], exact[i], p_within_layers=p_within[i]) for i in range(2))
        note = f"{n} pairs: exact p, {1 / math.factorial(n):.2g} at the least, no interval"
        return Correlation(n, dropped, by_value, by_rank, note)

    resampled = _bootstrap(x, y, n_resamples, rng(seed, "bootstrap over heads"))
    undefined = int(np.isnan(resampled[0]).sum())
    intervals = [_percentile_interval(values) for values in resampled]
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    return Correlation(
        n,
        dropped,
        Coefficient(float(pearson.statistic), float(pearson.pvalue), *intervals[0], p_within[0]),
        Coefficient(float(spearman.statistic), float(spearman.pvalue), *intervals[1], p_within[1]),
        f"{undefined} of {n_resamples} bootstrap resamples were constant and left out" if undefined else "",
    )


def correlate_layers(
    a: Num[np.ndarray, "layer head"],
    b: Num[np.ndarray, "layer head"],
    seed: int = 0,
    n_resamples: int = 10_000,
) -> list[Correlation]:
    """`correlate_heads` for each layer separately.

    A layer's numbers depend on that layer and the seed only, not on which other layers are given. Within one layer,
    `p_within_layers` is the ordinary permutation test. Testing every layer is multiple testing: see `q_values`.

    Args:
        a: one number per head, [layer head].
        b: the same heads in the same order, [layer head].
        seed: the run's seed.
        n_resamples: number of bootstrap resamples, and of permutations.

    Returns:
        One correlation a layer, in order.

    Raises:
        ValueError: the shapes differ or are not [layer head], or n_resamples is below 1.
    """
    if np.ndim(a) != 2 or np.shape(a) != np.shape(b):
        raise ValueError(
            f"a and b must be [layer head] matrices of the same shape, not {np.shape(a)} and {np.shape(b)}."
        )
    return [correlate_heads(a[i : i + 1], b[i : i + 1], seed, n_resamples) for i in range(len(a))]


def _unit(values: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows n"]:
    """Each row centred and scaled to norm 1, so that Pearson's r is a dot product; nan for a constant row."""
    mean = values.mean(axis=-1, keepdims=True)
    centred = values - mean
    norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    # SciPy's own threshold for "nearly constant", below which it warns: only rounding error is left.
    norm[norm <= 1e-13 * np.abs(mean)] = np.nan
    return centred / norm


def spearman(a: Num[np.ndarray, " pair"], b: Num[np.ndarray, " pair"]) -> tuple[float, float]:
    """Spearman's rank correlation with its p-value, exact for up to seven pairs (`correlate_heads`).

    Args:
        a: one number per pair, not all equal.
        b: the same pairs in the same order.

    Returns:
        The coefficient, and p.
    """
    rho, p = stats.spearmanr(a, b)
    return float(rho), _exact_p(stats.rankdata(a), stats.rankdata(b)) if len(a) <= FEW else float(p)


def _exact_p(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """The share of all permutations with as large an |r| (Pearson)."""
    # The largest numbers have no square, hence the scale.
    x_unit, y_unit = (_unit(values / np.abs(values).max()) for values in (x, y))
    # Rounded, because equal coefficients are sums of the same numbers in another order.
    r = np.round(np.abs((x_unit[_orders(len(x))] * y_unit).sum(-1)), 12)
    return float((r >= r[0]).mean())


@cache
def _orders(n: int) -> Int[np.ndarray, "permutation n"]:
    """All permutations, the first of which changes nothing."""
    return np.array([*permutations(range(n))])


def _bootstrap(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], n_resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "coefficient resample"]:
    """Pearson (row 0) and Spearman (row 1) of resampled pairs; nan where a resample is constant."""
    coefficients = np.empty((2, n_resamples))
    step = max(1, intervals.AT_ONCE // x.size)
    for start in range(0, n_resamples, step):
        stop = min(start + step, n_resamples)
        picked = rng.integers(x.size, size=(stop - start, x.size))
        x_new, y_new = x[picked], y[picked]
        coefficients[0, start:stop] = (_unit(x_new) * _unit(y_new)).sum(axis=1)
        x_new, y_new = stats.rankdata(x_new, axis=1), stats.rankdata(y_new, axis=1)
        coefficients[1, start:stop] = (_unit(x_new) * _unit(y_new)).sum(axis=1)
    # Values that differ by rounding error count as constant although their ranks differ: nan for both coefficients.
    coefficients[1, np.isnan(coefficients[0])] = np.nan
    return coefficients


def _p_within_layers(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    layers: Int[np.ndarray, " n"],
    n_resamples: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Two-sided p of Pearson and of Spearman under the same permutations within layers."""
    x_units = np.stack([_unit(x), _unit(stats.rankdata(x))])
    y_units = np.stack([_unit(y), _unit(stats.rankdata(y))])
    observed, permuted = np.zeros(2), np.zeros((2, n_resamples))
    for layer in np.unique(layers):
        here = layers == layer
        x_here = x_units[:, here] - x_units[:, here].mean(axis=1, keepdims=True)
        y_here = y_units[:, here] - y_units[:, here].mean(axis=1, keepdims=True)
        order = rng.permuted(np.tile(np.arange(here.sum()), (n_resamples, 1)), axis=1)
        observed += (x_here * y_here).sum(axis=1)
        permuted += np.einsum("krh,kh->kr", y_here[:, order], x_here)
    # The same numbers summed in another order differ by rounding error; without the tolerance, ties would be lost by chance.
    as_extreme = np.abs(permuted) >= np.abs(observed)[:, None] - 1e-12
    p_pearson, p_spearman = (1 + as_extreme.sum(axis=1)) / (1 + n_resamples)
    return float(p_pearson), float(p_spearman)


def q_values(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Benjamini-Hochberg adjusted p-values (1995; SciPy's `false_discovery_control`).

    Args:
        p: one p-value a test; nan stays nan and does not count as a test.

    Returns:
        One q-value a test.
    """
    p = np.asarray(p, dtype=np.float64)
    q = np.full_like(p, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q


def cluster_shares(
    groups: Int[np.ndarray, " item"], rng: np.random.Generator, n_resamples: int
) -> Float[np.ndarray, "resample item"]:
    """Bootstrap counts of items when whole groups are resampled (cluster bootstrap): items of a group are not independent.

    Args:
        groups: the group of each item.
        rng: generator to draw from.
        n_resamples: number of resamples.

    Returns:
        How often each item occurs in each resample.
    """
    _, group = np.unique(groups, return_inverse=True)
    n = int(group.max()) + 1
    return rng.multinomial(n, np.full(n, 1 / n), n_resamples)[:, group].astype(np.float64)


def r_squared(
    y: Float[np.ndarray, "item column"],
    predicted: Float[np.ndarray, "*model item column"],
    shares: Float[np.ndarray, "resample item"] | None = None,
) -> Float[np.ndarray, "*model"] | Float[np.ndarray, "*model resample"]:
    """Coefficient of determination over all columns together (variance-weighted), of all items or of each resample.

    Predicting the items' mean everywhere scores 0, anything worse is negative. Where all items are equal the score is NaN.
    Resamples are compared with the mean of all items, too. Each one's own mean would fit it better than what the predictions had
    to go by, so that with few items nearly all resamples would score below all items together.

    Args:
        y: targets.
        predicted: predictions of one or more models.
        shares: how often each item occurs in each resample (`cluster_shares`); by default each item once.

    Returns:
        R^2 of each model, or of each model on each resample.
    """
    # Of all items it equals scikit-learn's variance-weighted r2_score, which takes one set of items a call.
    weights = np.ones((1, len(y))) if shares is None else shares
    residual = ((y - predicted) ** 2).sum(-1) @ weights.T
    total = weights @ ((y - y.mean(0)) ** 2).sum(-1)
    # A sum of squares within rounding error of 0 is 0.
    total = np.where(total > 1e-12 * (weights @ y**2).sum(1), total, np.nan)
    scores = 1 - residual / total
    return scores[..., 0] if shares is None else scores
