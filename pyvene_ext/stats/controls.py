"""Controls for an effect: random heads of the same layers, chance overlap, paired tests, verdicts."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num
from scipy import stats

from pyvene_ext.stats import intervals
from pyvene_ext.stats.intervals import Interval
from pyvene_ext.stats.thresholds import CAUSAL, REDUNDANT

Head = tuple[int, int]  # (layer, head)


def head_label(head: tuple[int, int]) -> str:
    """The label of a (layer, head) in flags, tables and figures: "2.5" is head 5 of layer 2."""
    return f"{head[0]}.{head[1]}"


class HeadOverlap(NamedTuple):
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


def head_overlap(a: Iterable[Head], b: Iterable[Head], n_heads: int) -> HeadOverlap:
    """Compare two sets of heads of one model with random sets of the same sizes (hypergeometric test).

    Args:
        a: (layer, head) pairs; duplicates count once.
        b: the other set.
        n_heads: number of heads in the whole model.

    Returns:
        The overlap, its expectation by chance, and p.
    """
    a, b = set(a), set(b)
    shared, total = len(a & b), len(a) + len(b)
    if total == 0:
        return HeadOverlap(0, math.nan, math.nan, 1.0)
    chance = stats.hypergeom(n_heads, len(a), len(b))
    possible = np.arange(min(len(a), len(b)) + 1)
    expected = float((chance.pmf(possible) * possible / (total - possible)).sum())
    return HeadOverlap(shared, shared / (total - shared), expected, float(chance.sf(shared - 1)))


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
        raise ValueError("McNemar's test takes two boolean vectors of the same length, one value per prompt.")
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


# An answer that cannot be read counts as wrong, whatever the model would have solved. Where most answers are such, most of a drop
# is that of the text (docs/studies/reasoning.md); up to a half of them, most of what is judged are answers.
BROKEN = 0.5  # share of unparsed answers


def verdict(drop: Interval, above: float = CAUSAL, below: float = REDUNDANT, *, unparsed: float = 0.0) -> str:
    """Say in words what a drop in accuracy shows: causal above 10 points, redundant below 2; nothing if the text broke.

    Args:
        drop: mean and 95% interval, in percentage points.
        above: the points above which a drop is causal.
        below: the points below which it is redundant.
        unparsed: the share of answers under the intervention that could not be read.

    Returns:
        That there is no verdict if more than half of the answers could not be read; else "causal" or "redundant" if the whole
        interval agrees with the mean; otherwise also how far the interval reaches.
    """
    if unparsed > BROKEN:
        return f"text broken, no verdict ({100 * unparsed:.0f}% of answers unparsed)"
    if drop.mean > above:
        if drop.low > above:
            return "causal"
        goes = "holds 0: not established" if drop.low <= 0 else f"goes down to {drop.low:.1f}"
        return f"causal by its size, but the interval {goes}"
    if drop.mean < below:
        if drop.high < below:
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
        values: one number per item.
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


@dataclass(frozen=True)
class RandomHeads:
    """Random sets of heads that some heads are compared with, all different, and how well they match.

    Attributes:
        heads: the (layer, head) pairs that they are controls for.
        sets: as many (layer, head) pairs each; there may be fewer sets than asked for, or none.
    """

    heads: tuple[Head, ...]
    sets: list[tuple[Head, ...]]

    @property
    def distance(self) -> float:
        """How many layers a head of the sets lies from the one that it stands for, on average; 0: the same layers."""
        here = sorted(layer for layer, _ in self.heads)
        # Both in the order of depth, which is the closest pairing.
        away = [abs(a - b) for chosen in self.sets for a, (b, _) in zip(here, sorted(chosen), strict=True)]
        return float(np.mean(away)) if away else math.nan

    @property
    def shared(self) -> float:
        """The share of the sets' heads that are themselves among those that they are controls for; 0: disjoint."""
        among = [head in self.heads for chosen in self.sets for head in chosen]
        return float(np.mean(among)) if among else math.nan

    @property
    def strength(self) -> str:
        """What a comparison with these sets can show, in words, for the line beside p."""
        if not self.sets:
            return "no control: the model has no other heads"
        number = "1 random set" if len(self.sets) == 1 else f"{len(self.sets)} random sets"
        where = "of the same layers" if not self.distance else f"{self.distance:.1f} layers away on average"
        held = f", {self.shared:.0%} of whose heads are among those tested" if self.shared else ""
        return f"{number} {where}{held}; least p {1 / (1 + len(self.sets)):.2g}"


def random_rankings(
    ranked: Sequence[Head], most: int, n_layers: int, n_heads: int, draws: int, rng: np.random.Generator
) -> list[tuple[Head, ...]]:
    """Draw random control rankings: the i-th head of a control is in the layer of the i-th ranked head, but is not ranked.

    So every prefix of a control has as many heads of each layer as the same prefix of `ranked`. Where layers have too few other
    heads, the control is weakened as in `random_heads`, and a head may be of the nearest layer that has one.

    Args:
        ranked: heads, highest first.
        most: length of the controls.
        n_layers: of the model.
        n_heads: of each layer.
        draws: how many controls.
        rng: source of randomness.

    Returns:
        The control rankings; where there are fewer sets of this size, some are of the same heads in another order.
    """
    matched = ranked[:most]
    sets = random_heads(matched, n_layers, n_heads, draws, rng, exclude=ranked[most:]).sets
    rankings = []
    # Of few sets each comes in several orders, whose beginnings differ.
    for chosen in itertools.islice(itertools.cycle(sets), draws):
        left = [chosen[i] for i in rng.permutation(len(chosen))]
        ranking: dict[int, Head] = {}
        for reach in (0, n_layers):  # first those of the same layer
            for place, (layer, _) in enumerate(matched):
                near = [head for head in reversed(left) if abs(head[0] - layer) <= reach]
                if near and place not in ranking:
                    ranking[place] = min(near, key=lambda head: abs(head[0] - layer))
                    left.remove(ranking[place])
        rankings.append(tuple(ranking[place] for place in range(len(matched))))
    return rankings


def first_of(rankings: Iterable[tuple[Head, ...]], ranked: Sequence[Head], n: int) -> RandomHeads:
    """The first heads of control rankings, as controls for as many ranked heads.

    Args:
        rankings: those of `random_rankings`.
        ranked: the heads that they are controls for, highest first.
        n: how many heads.

    Returns:
        The different sets, in the order of the rankings; few where layers are small.
    """
    own = frozenset(ranked[:n])
    sets = {frozenset(ranking[:n]): ranking[:n] for ranking in rankings}
    return RandomHeads(tuple(ranked[:n]), [chosen for key, chosen in sets.items() if key != own or not n])


def random_heads(
    heads: Iterable[Head],
    n_layers: int,
    n_heads: int,
    n_sets: int,
    rng: np.random.Generator,
    exclude: Iterable[Head] = (),
) -> RandomHeads:
    """Draw random control sets for `heads`: as many heads of the same layers, none of them in `heads` or `exclude`.

    A control drawn from other layers would differ from the given heads in depth as well as in identity. Every such set is equally
    likely, and none is drawn twice. Where a layer has too few other heads for any such set, the control is weakened
    rather than refused, as little as possible: what a layer lacks comes from the nearest layers; if that is not enough for
    `n_sets` sets, any head comes from them; and if the model has no others, from `heads` themselves. `RandomHeads.strength` says
    so, and how low p can be.

    Args:
        heads: (layer, head) pairs to match.
        n_layers: layers of the model.
        n_heads: query heads per layer.
        n_sets: number of sets to draw.
        rng: generator to draw from.
        exclude: further heads that a control must not contain.

    Returns:
        The sets; fewer than `n_sets` if the model has no more.

    Raises:
        ValueError: `heads` is empty or repeats a head, or a head is outside the model.
    """
    given, exclude = tuple(sorted(heads)), set(exclude)
    if not given or len(set(given)) < len(given):
        raise ValueError(f"heads to match must be at least one (layer, head), each named once, not {list(given)}.")
    for layer, head in [*given, *exclude]:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"head {layer}.{head} is outside a model of {n_layers} layers with {n_heads} heads.")
    everywhere = list(itertools.product(range(n_layers), range(n_heads)))
    others = [head for head in everywhere if head not in exclude.union(given)]
    wanted = Counter(layer for layer, _ in given)
    left = {layer: [head for head in others if head[0] == layer] for layer in wanted}
    n_possible = math.prod(math.comb(len(left[layer]), k) for layer, k in wanted.items())
    if n_possible:
        return RandomHeads(given, _of_same_layers(left, wanted, n_possible, n_sets, rng))
    found: set[tuple[Head, ...]] = set()
    for pool in (others, [head for head in everywhere if head not in exclude]):
        for reach, own_first in itertools.product(range(n_layers), (True, False)):
            drawn = (_of_near_layers(given, pool, reach, own_first, rng) for _ in range(20 * n_sets))
            found = set()
            for chosen in drawn:
                if chosen is not None and chosen != given:
                    found.add(chosen)
                if len(found) == n_sets:
                    return RandomHeads(given, sorted(found))
    return RandomHeads(given, sorted(found))


def _of_same_layers(
    left: dict[int, list[Head]], wanted: Counter[int], n_possible: int, n_sets: int, rng: np.random.Generator
) -> list[tuple[Head, ...]]:
    """Different sets with as many heads of each layer as wanted, each equally likely, given the heads that are left there."""
    if n_possible < 2 * n_sets:  # few enough to list, and rejection sampling of distinct sets would be slow
        by_layer = [list(itertools.combinations(left[layer], k)) for layer, k in wanted.items()]
        possible = [tuple(itertools.chain(*parts)) for parts in itertools.product(*by_layer)]
        return [possible[i] for i in rng.permutation(n_possible)[:n_sets]]  # all, if there are no more
    drawn: dict[tuple[Head, ...], None] = {}  # an ordered set
    while len(drawn) < n_sets:
        picked = [left[layer][i] for layer, k in wanted.items() for i in rng.choice(len(left[layer]), k, replace=False)]
        drawn[tuple(sorted(picked))] = None
    return list(drawn)


def _of_near_layers(
    given: tuple[Head, ...], pool: list[Head], reach: int, own_first: bool, rng: np.random.Generator
) -> tuple[Head, ...] | None:
    """One set in which every head lies within `reach` layers of the one that it stands for; None if a place stays empty."""
    chosen: list[Head] = []
    for place in rng.permutation(len(given)):
        layer = given[place][0]
        near = [head for head in pool if abs(head[0] - layer) <= reach and head not in chosen]
        if own_first:
            near = [head for head in near if head[0] == layer] or near
        if not near:
            return None
        chosen.append(near[rng.integers(len(near))])
    return tuple(sorted(chosen))


def random_heads_in_place(
    meant: Sequence[Head], n_heads: int, n_sets: int, rng: np.random.Generator
) -> list[tuple[Head, ...]]:
    """Draw random control sets for a transplant: heads of the same layers, each used once, none in its intended place.

    Args:
        meant: the (layer, head) intended for each place.
        n_heads: heads per layer.
        n_sets: number of sets to draw.
        rng: generator to draw from.

    Returns:
        `n_sets` tuples with the (layer, head) for each place.

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
