"""What an effect is compared with: random heads of the same layers, chance overlap, paired tests, verdicts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num
from scipy import stats

from pyvene_ext.stats import intervals
from pyvene_ext.stats.intervals import (
    Interval,
)

Head = tuple[int, int]  # (layer, head)


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


class AgainstRandom(NamedTuple):
    """How low a value is beside those of random sets.

    Attributes:
        mean: of the random sets' values.
        lowest: the least of them.
        p: the share of sets, the one in question counted with the random ones, whose value is as low.
    """

    mean: float
    lowest: float
    p: float


def against_random(value: float, random: Sequence[float]) -> AgainstRandom:
    """Compare what one set of heads leaves of a metric with what random sets leave."""
    p = (1 + sum(other <= value for other in random)) / (1 + len(random))
    return AgainstRandom(float(np.mean(random)), min(random), p)


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
    step = max(1, intervals.AT_ONCE // values.size)
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
