"""Numbers about numbers: correlations over heads, intervals, and the random heads a set of heads is compared with.

Everything is float64, whatever comes in: on float32 input SciPy's p-values underflow to exactly 0. Every random draw comes from
`runs.rng(seed, name)` or from a generator the caller hands in.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from scipy import stats

from pyvene_ext import runs

Head = tuple[int, int]  # (layer, head)

_BOOTSTRAP_CELLS = 4_000_000  # resampled numbers held at once: 32 MB an array


@dataclass(frozen=True)
class Coefficient:
    """One correlation coefficient: its value, SciPy's p, the bootstrap 95% interval, and the within-layer permutation p.

    `p` takes heads as independent draws, which heads of one layer are not; `p_within_layers` does not need that.
    """

    r: float = math.nan
    p: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_within_layers: float = math.nan


@dataclass(frozen=True)
class Correlation:
    """How two [layer head] matrices go together: `n` paired heads, `dropped` pairs with a non-finite side.

    `note` says in words why a number is nan or needs care; it is empty when all is well.
    """

    n: int
    dropped: int
    pearson: Coefficient
    spearman: Coefficient
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file, with None in place of nan."""
        record = asdict(self)
        for name in ("pearson", "spearman"):
            record[name] = {key: None if math.isnan(value) else value for key, value in record[name].items()}
        return record


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval: three numbers, or three arrays of one shape."""

    mean: Any
    low: Any
    high: Any


def correlate_heads(
    a: Num[np.ndarray, "layer head"],
    b: Num[np.ndarray, "layer head"],
    seed: int = 0,
    n_resamples: int = 10_000,
) -> Correlation:
    """Pearson and Spearman correlation of two matrices, every head one paired point.

    Pairs with a NaN or infinite side are dropped and counted. Fewer than three pairs, or a constant side, give nan with a note.

    The 95% interval is the percentile bootstrap over heads. Percentile, because it never leaves [-1, 1] and still exists where
    BCa does not (its jackknife breaks down when one head carries all the variance, common for frequencies that are mostly 0).
    A resample in which one side is constant has no correlation; it is left out, and the note says how many were.

    `p_within_layers` permutes heads within each layer, never across. Its null hypothesis is that *within a layer* it does not
    matter which head of `a` is paired with which head of `b`. So it tests for association beyond what layer alone gives: two
    matrices that merely both grow with depth are strongly correlated, yet get a large p here. Two-sided: the share of
    permutations whose coefficient is at least as far from the null's mean as the observed one, (1 + count) / (1 + n_resamples).
    That mean is not 0 but what the layer means give; the distance to it is the summed within-layer covariance, which is what
    gets compared.

    Args:
        a: one number a head, [layer head].
        b: the same heads in the same order, [layer head].
        seed: the run's seed; the same seed and data give the same numbers.
        n_resamples: bootstrap resamples, and permutations.

    Raises:
        ValueError: the shapes differ or are not [layer head], or n_resamples is below 1.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"two [layer head] matrices of one shape are needed, not {a.shape} and {b.shape}.")
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

    resampled = _bootstrap(x, y, n_resamples, runs.rng(seed, "bootstrap over heads"))
    p_pearson, p_spearman = _p_within_layers(x, y, layers, n_resamples, runs.rng(seed, "within-layer permutation"))
    undefined = int(np.isnan(resampled[0]).sum())
    intervals = [_percentile_interval(values) for values in resampled]
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    return Correlation(
        n,
        dropped,
        Coefficient(float(pearson.statistic), float(pearson.pvalue), *intervals[0], p_pearson),
        Coefficient(float(spearman.statistic), float(spearman.pvalue), *intervals[1], p_spearman),
        f"{undefined} of {n_resamples} bootstrap resamples were constant and left out" if undefined else "",
    )


def correlate_layers(
    a: Num[np.ndarray, "layer head"],
    b: Num[np.ndarray, "layer head"],
    seed: int = 0,
    n_resamples: int = 10_000,
) -> list[Correlation]:
    """`correlate_heads` for each layer on its own, in order.

    A layer's numbers depend on that layer and the seed only, so they are the same whichever other layers are there. With one
    layer, `p_within_layers` is the ordinary permutation test. Many layers are many tests: see `q_values`.
    """
    if np.ndim(a) != 2 or np.shape(a) != np.shape(b):
        raise ValueError(f"two [layer head] matrices of one shape are needed, not {np.shape(a)} and {np.shape(b)}.")
    return [correlate_heads(a[i : i + 1], b[i : i + 1], seed, n_resamples) for i in range(len(a))]


def _unit(values: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows n"]:
    """Each row centred and scaled to norm 1, so that Pearson's r is a dot product; nan for a constant row."""
    mean = values.mean(axis=-1, keepdims=True)
    centred = values - mean
    norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    # SciPy's own bound for "nearly constant", below which it warns: what is left is rounding.
    norm[norm <= 1e-13 * np.abs(mean)] = np.nan
    return centred / norm


def _bootstrap(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], n_resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "coefficient resample"]:
    """Pearson (row 0) and Spearman (row 1) of resampled pairs; nan where a resample is constant."""
    coefficients = np.empty((2, n_resamples))
    step = max(1, _BOOTSTRAP_CELLS // x.size)
    for start in range(0, n_resamples, step):
        stop = min(start + step, n_resamples)
        picked = rng.integers(x.size, size=(stop - start, x.size))
        x_new, y_new = x[picked], y[picked]
        coefficients[0, start:stop] = (_unit(x_new) * _unit(y_new)).sum(axis=1)
        x_new, y_new = stats.rankdata(x_new, axis=1), stats.rankdata(y_new, axis=1)
        coefficients[1, start:stop] = (_unit(x_new) * _unit(y_new)).sum(axis=1)
    # Values a rounding error apart are constant here and still have ranks: both coefficients go by the values.
    coefficients[1, np.isnan(coefficients[0])] = np.nan
    return coefficients


def _percentile_interval(resampled: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    defined = resampled[np.isfinite(resampled)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.clip(np.quantile(defined, (0.025, 0.975)), -1.0, 1.0)  # rounding can pass 1 by an ulp
    return float(low), float(high)


def _p_within_layers(
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    layers: Int[np.ndarray, " n"],
    n_resamples: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Two-sided p of Pearson and of Spearman, permuting within layers; both see the same permutations."""
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
    # Sums of one set of numbers in another order differ by rounding; without the slack, ties would be lost by chance.
    as_far = np.abs(permuted) >= np.abs(observed)[:, None] - 1e-12
    p_pearson, p_spearman = (1 + as_far.sum(axis=1)) / (1 + n_resamples)
    return float(p_pearson), float(p_spearman)


def q_values(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Benjamini-Hochberg adjusted p-values (SciPy's `false_discovery_control`); nan stays nan and is not counted as a test."""
    p = np.asarray(p, dtype=np.float64)
    q = np.full_like(p, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q


def frequency_interval(
    active: np.ndarray, axis: int = -1, confidence: float = 0.95, counted: np.ndarray | None = None
) -> Interval:
    """The share of ones along an axis (of prompts) with its Wilson score interval.

    Wilson's interval (1927), because the usual p +- 1.96 sd has width 0 for a head that is active on no prompt, or on all.

    Args:
        active: booleans or 0/1, any shape.
        axis: the axis averaged over; the results have the other axes.
        confidence: of the interval.
        counted: which values count, in the shape of `active`; all by default. Where none does, mean and interval are nan.

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
    frequency = (active * counted).sum(axis=axis, dtype=np.float64) / n
    z = stats.norm.ppf((1 + confidence) / 2)
    centre = frequency + z**2 / (2 * n)
    half = z * np.sqrt(frequency * (1 - frequency) / n + (z / (2 * n)) ** 2)
    scale = 1 + z**2 / n
    # At 0 and 1 the end is exactly 0 or 1; rounding would put it a hair beside.
    low = np.where(frequency == 0, 0.0, (centre - half) / scale)
    high = np.where(frequency == 1, 1.0, (centre + half) / scale)
    return Interval(frequency, low, high)


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
        batch=max(1, _BOOTSTRAP_CELLS // difference.size),
        method="percentile",
        rng=rng,
    ).confidence_interval
    return Interval(float(difference.mean()), float(interval.low), float(interval.high))


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


class Overlap(NamedTuple):
    """How much two sets of heads have in common.

    Attributes:
        shared: heads in both.
        jaccard: shared heads by heads in either; NaN where both sets are empty.
        chance: its mean for two random sets of the same sizes.
        p: the probability that two random sets share at least as many.
    """

    shared: int
    jaccard: float
    chance: float
    p: float


def head_overlap(a: Iterable[Head], b: Iterable[Head], n_heads: int) -> Overlap:
    """Two sets of heads of one model, against random sets of the same sizes among its `n_heads` heads (hypergeometric)."""
    a, b = set(a), set(b)
    shared, total = len(a & b), len(a) + len(b)
    if total == 0:
        return Overlap(0, math.nan, math.nan, 1.0)
    chance = stats.hypergeom(n_heads, len(a), len(b))
    possible = np.arange(min(len(a), len(b)) + 1)
    expected = float((chance.pmf(possible) * possible / (total - possible)).sum())
    return Overlap(shared, shared / (total - shared), expected, float(chance.sf(shared - 1)))


def mcnemar_p(before: np.ndarray, after: np.ndarray) -> float:
    """McNemar's exact p, two-sided: whether as many prompts became wrong as became right; 1 where none changed.

    Raises:
        ValueError: the two are not booleans of the same prompts.
    """
    before, after = np.asarray(before), np.asarray(after)
    if before.ndim != 1 or before.shape != after.shape or {before.dtype, after.dtype} != {np.dtype(bool)}:
        raise ValueError("McNemar's test takes two vectors of booleans of one length, one each prompt.")
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


CAUSAL, REDUNDANT = 10.0, 2.0  # points of accuracy


def verdict(drop: Interval) -> str:
    """What a drop of accuracy in points says: above 10 causal, below 2 redundant, by its mean and by its whole interval."""
    if drop.mean > CAUSAL:
        if drop.low > CAUSAL:
            return "causal"
        goes = "holds 0: not established" if drop.low <= 0 else f"goes down to {drop.low:.1f}"
        return f"causal by its size, but the interval {goes}"
    if drop.mean < REDUNDANT:
        if drop.high < REDUNDANT:
            return "redundant"
        return f"redundant by its size, but the interval goes up to {drop.high:.1f}: not established"
    return "neither causal nor redundant" + (", and the interval holds 0" if drop.low <= 0 else "")


def cluster_shares(
    groups: Int[np.ndarray, " item"], rng: np.random.Generator, n_resamples: int
) -> Float[np.ndarray, "resample item"]:
    """How often each item is in a bootstrap resample of whole groups: items of a group are not independent draws."""
    _, group = np.unique(groups, return_inverse=True)
    n = int(group.max()) + 1
    return rng.multinomial(n, np.full(n, 1 / n), n_resamples)[:, group].astype(np.float64)


def r_squared(
    y: Float[np.ndarray, "item column"],
    predicted: Float[np.ndarray, "*model item column"],
    shares: Float[np.ndarray, "resample item"] | None = None,
) -> Float[np.ndarray, "*model"] | Float[np.ndarray, "*model resample"]:
    """The share of the variance about the items' own mean that predictions explain, over all columns; or of each resample.

    It is 0 for one that is the mean everywhere and below 0 for a worse one; NaN where all items are alike.
    """
    weights = np.ones((1, len(y))) if shares is None else shares
    missed = ((y - predicted) ** 2).sum(-1) @ weights.T
    centred = y - y.mean(0)  # else the variance of numbers far from 0 is a small difference of large sums
    mean = weights @ centred / weights.sum(1, keepdims=True)
    there = (weights @ centred**2 - weights.sum(1, keepdims=True) * mean**2).sum(1)
    # A sum of squares that is rounding only is none.
    there = np.where(there > 1e-12 * (weights @ y**2).sum(1), there, np.nan)
    found = 1 - missed / there
    return found[..., 0] if shares is None else found


class StrataTest(NamedTuple):
    """Whether means differ between strata.

    Attributes:
        p: that of all strata together.
        each: by stratum, that of its mean against the mean of all, two-sided.
    """

    p: float
    each: dict[Any, float]


def strata_test(
    values: Num[np.ndarray, " item"], strata: Sequence[Any], rng: np.random.Generator, n_resamples: int = 10_000
) -> StrataTest:
    """Permutation test of strata: each item's stratum is given to another item, and the strata keep their sizes.

    What counts for all together is the variance between strata (the sum over strata of n (mean - mean of all)^2). p is the share
    of permutations that are as far apart, (1 + count) / (1 + n_resamples); of one stratum alone it is 1. Several strata are
    several tests: see `q_values`.
    """
    values = np.asarray(values, np.float64)
    names = list(dict.fromkeys(strata))
    member = np.array([[name == stratum for stratum in strata] for name in names], np.float64)
    sizes, centred = member.sum(1), values - values.mean()
    observed, as_far, each = member @ centred / sizes, 0, np.zeros(len(names))
    step = max(1, _BOOTSTRAP_CELLS // values.size)
    for start in range(0, n_resamples, step):
        count = min(step, n_resamples - start)
        permuted = rng.permuted(np.tile(centred, (count, 1)), axis=1) @ member.T / sizes
        # Sums of one set of numbers in another order differ by rounding.
        each += (np.abs(permuted) >= np.abs(observed) - 1e-9 * np.abs(centred).max()).sum(0)
        as_far += int((permuted**2 @ sizes >= observed**2 @ sizes - 1e-9 * (centred**2).sum()).sum())
    p = (1 + each) / (1 + n_resamples)
    return StrataTest((1 + as_far) / (1 + n_resamples), dict(zip(names, p.tolist(), strict=True)))


def layer_matched_random_heads(
    heads: Iterable[Head],
    n_layers: int,
    n_heads: int,
    n_sets: int,
    rng: np.random.Generator,
    exclude: Iterable[Head] = (),
) -> list[tuple[Head, ...]]:
    """Random control sets for `heads`: as many heads in each layer, none of them in `heads` or `exclude`.

    A control drawn from other layers would differ from the given heads in depth as well as in identity. Every allowed set is
    equally likely. No set comes twice as long as there are enough; then they come round again, each equally often (give or
    take one).

    Args:
        heads: the (layer, head) pairs to be matched.
        n_layers, n_heads: size of the model.
        n_sets: how many sets to draw.
        rng: the generator to draw from.
        exclude: further heads that a control must not hold.

    Returns:
        n_sets sorted tuples of (layer, head).

    Raises:
        ValueError: `heads` is empty or names a head twice, a head is outside the model, or a layer has too few other heads.
    """
    heads, exclude = sorted(heads), set(exclude)
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"the heads to match must be at least one, each named once, not {heads}.")
    for layer, head in [*heads, *exclude]:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"head {layer}.{head} is outside a model of {n_layers} layers with {n_heads} heads.")
    taken = exclude.union(heads)
    wanted = Counter(layer for layer, _ in heads)
    others = {layer: [(layer, h) for h in range(n_heads) if (layer, h) not in taken] for layer in wanted}
    for layer, k in wanted.items():
        if len(others[layer]) < k:
            raise ValueError(
                f"layer {layer} has {len(others[layer])} heads left for a control of {k}: "
                f"{n_heads - len(others[layer])} of its {n_heads} are given or excluded; give or exclude fewer."
            )

    n_possible = math.prod(math.comb(len(others[layer]), k) for layer, k in wanted.items())
    if n_possible < 2 * n_sets:  # few enough to list, and too few to draw at random until n_sets differ
        by_layer = [list(itertools.combinations(others[layer], k)) for layer, k in wanted.items()]
        possible = [tuple(itertools.chain(*parts)) for parts in itertools.product(*by_layer)]
        rounds = (rng.permutation(n_possible) for _ in range(math.ceil(n_sets / n_possible)))
        return [possible[i] for i in itertools.islice(itertools.chain.from_iterable(rounds), n_sets)]
    drawn: dict[tuple[Head, ...], None] = {}  # a set that remembers the order
    while len(drawn) < n_sets:
        picked = [
            others[layer][i] for layer, k in wanted.items() for i in rng.choice(len(others[layer]), k, replace=False)
        ]
        drawn[tuple(sorted(picked))] = None
    return list(drawn)
