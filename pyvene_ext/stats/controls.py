"""Controls for an effect: random heads of the same layers, chance overlap, paired tests, verdicts."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num
from scipy import stats

from pyvene_ext.stats import intervals
from pyvene_ext.stats.intervals import Interval

Head = tuple[int, int]  # (layer, head)


def head_label(head: tuple[int, int]) -> str:
    """The label of a (layer, head) in flags, tables and figures: "2.5" is head 5 of layer 2."""
    return f"{head[0]}.{head[1]}"


class Overlap(NamedTuple):
    """Overlap of two sets of heads.

    Attributes:
        shared: number of heads in both.
        jaccard: heads in both divided by heads in either; NaN if both sets are empty.
        chance: expected Jaccard index of two random sets of the same sizes.
        p: probability that two random sets of these sizes share at least as many heads.
    """

    shared: int
    jaccard: float
    chance: float
    p: float


def head_overlap(a: Iterable[Head], b: Iterable[Head], n_heads: int) -> Overlap:
    """Compare two sets of heads of one model with random sets of the same sizes (hypergeometric test).

    Args:
        a: (layer, head) pairs; duplicates count once.
        b: the other set.
        n_heads: number of heads in the whole model.

    Returns:
        Overlap, its expectation by chance, and p.
    """
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
    """McNemar's exact test, two-sided, of whether as many prompts became wrong as became right.

    Args:
        before: whether each prompt was right, booleans " prompt".
        after: the same after the intervention, prompts in the same order.

    Returns:
        The p-value; 1 if no prompt changed.

    Raises:
        ValueError: the two are not boolean vectors of the same length.
    """
    before, after = np.asarray(before), np.asarray(after)
    if before.ndim != 1 or before.shape != after.shape or {before.dtype, after.dtype} != {np.dtype(bool)}:
        raise ValueError("McNemar's test takes two boolean vectors of the same length, one value a prompt.")
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def share_as_large(value: float, random: Sequence[float] | np.ndarray) -> float:
    """p-value of a comparison with random draws: (1 + number of draws at least as large) / (1 + number of draws).

    Args:
        value: the observed value.
        random: the same statistic of each random draw.

    Returns:
        The p-value.
    """
    return (1 + int((np.asarray(random) >= value - 1e-9).sum())) / (1 + len(random))


CAUSAL, REDUNDANT = 10.0, 2.0  # points of accuracy


def verdict(drop: Interval) -> str:
    """Say in words what a drop in accuracy shows: causal above 10 points, redundant below 2.

    Args:
        drop: mean and 95% interval, in percentage points.

    Returns:
        "causal" or "redundant" if the whole interval agrees with the mean; otherwise also how far the interval reaches.
    """
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
        p: p-value over all strata together.
        each: two-sided p-value of each stratum's mean against the overall mean.
    """

    p: float
    each: dict[Any, float]


def strata_test(
    values: Num[np.ndarray, " item"], strata: Sequence[Any], rng: np.random.Generator, n_resamples: int = 10_000
) -> StrataTest:
    """Permutation test of differences between strata: stratum labels are permuted over items, so that sizes stay the same.

    The statistic over all strata is the between-strata sum of squares, the sum of n (stratum mean - overall mean)^2. p is the
    share of permutations at least as extreme, (1 + count) / (1 + n_resamples); with a single stratum it is 1. Testing several
    strata is multiple testing: see `q_values`.

    Args:
        values: one number an item.
        strata: the stratum of each item, any hashable label.
        rng: generator of the permutations.
        n_resamples: number of permutations.

    Returns:
        The p-value over all strata, and one a stratum.
    """
    values = np.asarray(values, np.float64)
    names = list(dict.fromkeys(strata))
    member = np.array([[name == stratum for stratum in strata] for name in names], np.float64)
    sizes, centred = member.sum(1), values - values.mean()
    observed, as_extreme, each = member @ centred / sizes, 0, np.zeros(len(names))
    step = max(1, intervals.AT_ONCE // values.size)
    for start in range(0, n_resamples, step):
        count = min(step, n_resamples - start)
        permuted = rng.permuted(np.tile(centred, (count, 1)), axis=1) @ member.T / sizes
        # The same numbers summed in another order differ by rounding error.
        each += (np.abs(permuted) >= np.abs(observed) - 1e-9 * np.abs(centred).max()).sum(0)
        as_extreme += int((permuted**2 @ sizes >= observed**2 @ sizes - 1e-9 * (centred**2).sum()).sum())
    p = (1 + each) / (1 + n_resamples)
    return StrataTest((1 + as_extreme) / (1 + n_resamples), dict(zip(names, p.tolist(), strict=True)))


def layer_matched_random_heads(
    heads: Iterable[Head],
    n_layers: int,
    n_heads: int,
    n_sets: int,
    rng: np.random.Generator,
    exclude: Iterable[Head] = (),
) -> list[tuple[Head, ...]]:
    """Draw random control sets for `heads`: as many heads in each layer, none of them in `heads` or `exclude`.

    A control drawn from other layers would differ from the given heads in depth as well as in identity. Every allowed set is
    equally likely. Sets repeat only when `n_sets` exceeds the number of possible ones, and then evenly (counts differ by at most
    one).

    Args:
        heads: (layer, head) pairs to match.
        n_layers: layers of the model.
        n_heads: query heads a layer.
        n_sets: number of sets to draw.
        rng: generator to draw from.
        exclude: further heads that a control must not contain.

    Returns:
        `n_sets` sorted tuples of (layer, head).

    Raises:
        ValueError: `heads` is empty or repeats a head, a head is outside the model, or a layer has too few other heads.
    """
    heads, exclude = sorted(heads), set(exclude)
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"heads to match must be at least one (layer, head), each named once, not {heads}.")
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
    if n_possible < 2 * n_sets:  # few enough to list, and rejection sampling of distinct sets would be slow
        by_layer = [list(itertools.combinations(others[layer], k)) for layer, k in wanted.items()]
        possible = [tuple(itertools.chain(*parts)) for parts in itertools.product(*by_layer)]
        rounds = (rng.permutation(n_possible) for _ in range(math.ceil(n_sets / n_possible)))
        return [possible[i] for i in itertools.islice(itertools.chain.from_iterable(rounds), n_sets)]
    drawn: dict[tuple[Head, ...], None] = {}  # an ordered set
    while len(drawn) < n_sets:
        picked = [
            others[layer][i] for layer, k in wanted.items() for i in rng.choice(len(others[layer]), k, replace=False)
        ]
        drawn[tuple(sorted(picked))] = None
    return list(drawn)


def random_heads_in_place(
    meant: Sequence[Head], n_heads: int, n_sets: int, rng: np.random.Generator
) -> list[tuple[Head, ...]]:
    """Draw random control sets for a transplant: heads of the same layers, each used once, none in its intended place.

    Args:
        meant: the (layer, head) intended for each place.
        n_heads: heads a layer.
        n_sets: number of sets to draw.
        rng: generator to draw from.

    Returns:
        `n_sets` tuples with the (layer, head) for each place.

    Returns:
        The sets, each with as many heads of every layer.

    Raises:
        ValueError: a layer has too few heads for such a set.
    """
    by_layer: dict[int, list[int]] = defaultdict(list)
    for place, (layer, _) in enumerate(meant):
        by_layer[layer].append(place)
    for layer, places in by_layer.items():
        if n_sets and (n_heads == 1 or len({meant[at] for at in places}) < len(places) or len(places) > n_heads):
            raise ValueError(
                f"there are no random heads to put in place of those of the donor's layer {layer}: it has {n_heads}, and "
                f"{len(places)} places take one from it; give each place another head."
            )
    sets: list[tuple[Head, ...]] = []
    while len(sets) < n_sets:
        chosen: dict[int, Head] = {}
        for layer, places in by_layer.items():
            while not all(at in chosen and chosen[at] != meant[at] for at in places):
                drawn = rng.choice(n_heads, len(places), replace=False)
                chosen |= {at: (layer, int(head)) for at, head in zip(places, drawn, strict=True)}
        sets.append(tuple(chosen[at] for at in range(len(meant))))
    return sets
