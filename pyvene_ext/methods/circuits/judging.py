"""Tests of a circuit (beyond its layers' share, complete, minimal), and the overlap of two circuits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from pyvene_ext.engine.measure import MetricLike
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.io.errors import counted
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.senders import AblationKind
from pyvene_ext.methods.circuits import Level
from pyvene_ext.methods.circuits.choosing import (
    By,
    Scores,
    chosen_edges,
    edge_groups,
    left_out,
    random_edges,
    shuffled_within,
    without_one,
)
from pyvene_ext.methods.circuits.circuit import Circuit, exists
from pyvene_ext.methods.circuits.running import run_circuits
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.stats.controls import share_as_large
from pyvene_ext.stats.intervals import Interval, bootstrap_mean

CHANGED = 0.01  # of faithfulness, from which on an edge counts as needed


@dataclass(frozen=True)
class Halves:
    """Prompts that score edges, and others that judge the circuits that the scores choose.

    Attributes:
        base: the prompts that can be used.
        source: their partners; None without.
        scored: the numbers of those that score, in `base`.
        judged: the numbers of those that judge.
        left_out: the numbers of those that cannot be used, among the prompts that were given.
        why: why not; "" if there are none.
    """

    base: TokenizedPrompts
    source: TokenizedPrompts | None
    scored: list[int]
    judged: list[int]
    left_out: list[int]
    why: str

    def take(self, some: list[int]) -> tuple[TokenizedPrompts, TokenizedPrompts | None]:
        """Take some of the prompts, and their partners."""
        return self.base.take(some), None if self.source is None else self.source.take(some)


def halves(base: TokenizedPrompts, source: TokenizedPrompts | None, ablation: AblationKind, seed: int) -> Halves:
    """Draw which prompts score edges, and which judge the circuits that the scores choose.

    A prompt that is repeated is used once: it would be judged by what it has chosen. By patching, two texts of a pair must have
    equally many tokens and differ.

    Args:
        base: the prompts on which the model does its task.
        source: what ablated edges take their values from; None for zero ablation.
        ablation: what ablated edges carry.
        seed: of the draw.

    Returns:
        The prompts.

    Raises:
        ValueError: fewer than three can be used.
    """
    partners = source.input_ids if source is not None and ablation == "patching" else None
    reasons: dict[int, str] = {}
    seen = set()
    for number, ids in enumerate(base.input_ids):
        partner = partners and partners[number]
        if partner is not None and len(ids) != len(partner):
            reasons[number] = "whose texts differ in number of tokens"
        elif ids == partner:
            reasons[number] = "with the same text twice"
        elif (ids, partner) in seen:
            reasons[number] = "that repeat an earlier one"
        seen.add((ids, partner))
    kept = [number for number in range(len(base)) if number not in reasons]
    why = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons.values()).items())
    if len(kept) < 3:
        left_out = f" ({len(reasons)} of {len(base)} left out: {why})" if reasons else ""
        raise ValueError(
            f"{counted(len(kept), 'prompt')}: too few to score edges on some and judge on others{left_out}; give 3 or more."
        )
    order = rng(seed, "halves").permutation(len(kept)).tolist()
    middle = len(kept) // 2
    of_kept = None if source is None else source.take(kept)
    return Halves(base.take(kept), of_kept, sorted(order[:middle]), sorted(order[middle:]), sorted(reasons), why)


@dataclass(frozen=True)
class Judgement:
    """A circuit beside random ones, its complement, and itself without single edges, or nodes if it is made of nodes.

    Attributes:
        n_edges: its number of edges.
        faithfulness: with its 95% interval over prompts.
        random: faithfulness of random circuits of the same layers and kinds.
        completeness: faithfulness of all other edges together, or of all other nodes, near 0 if the circuit misses nothing (Marks
            et al. 2024).
        without: faithfulness without single edges or nodes, drawn at random.
    """

    n_edges: int
    faithfulness: Interval
    random: Float[np.ndarray, " circuit"]
    completeness: float
    without: Float[np.ndarray, " removed"]

    @property
    def p(self) -> float:
        """(1 + random circuits that are at least as faithful) / (1 + random circuits)."""
        return share_as_large(float(self.faithfulness.mean), self.random)

    @property
    def minimality(self) -> float:
        """The share of edges, or nodes, without which faithfulness changes by `CHANGED` or more; NaN if none was removed."""
        changes = np.abs(float(self.faithfulness.mean) - self.without)
        return float((changes >= CHANGED).mean()) if len(changes) else float("nan")

    def row(self) -> dict[str, float]:
        """The numbers as a row of a table."""
        mean, low, high = map(float, self.faithfulness)
        return {
            "n_edges": self.n_edges,
            "faithfulness": mean,
            "low": low,
            "high": high,
            "random_mean": float(self.random.mean()),
            "random_highest": float(self.random.max()),
            "p": self.p,
            "completeness": self.completeness,
            "minimality": self.minimality,
        }


def judge(
    model: PreTrainedModel,
    circuit: Circuit,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    *,
    scores: Scores | None = None,
    n: int | None = None,
    by: By = "magnitude",
    random: int = 20,
    removed: int = 20,
    seed: int = 0,
    **options: Any,
) -> Judgement:
    """Judge a circuit on prompts other than those that chose it.

    Args:
        model: as for `run_circuits`.
        circuit: the circuit.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        scores: what chose the circuit, so that random circuits are those of permuted scores; by default they have as many edges
            as the circuit between the same layers and kinds, and are then pruned. With scores of nodes the circuit is made of
            nodes: its complement is the other nodes, and nodes are removed.
        n: how many edges or nodes of the highest scores the circuit has, before it was pruned; needed with `scores`.
        by: how scores chose them, as for `top_edges`.
        random: number of random circuits.
        removed: number of its edges, or nodes, that are removed, one at a time.
        seed: of random circuits and of what is removed.
        **options: further arguments of `run_circuits`.

    Returns:
        The judgement.

    Raises:
        ValueError: for what `run_circuits` and `random_circuits` refuse, and scores that do not choose the circuit.
    """
    config, kept = model.config, circuit.matrix(model.config)
    level: Level = "node" if scores is not None and np.ndim(scores) == 1 else "edge"
    chosen_by, n = (circuit, len(circuit)) if scores is None or n is None else (scores, n)
    if chosen_by is scores and (chosen_edges(scores, n, config, by) != kept).any():
        raise ValueError(
            f"the {n} highest scores by {by} do not make this circuit, so that random circuits would have edges between other "
            "layers; give n and by as for top_edges, or leave out scores."
        )
    chance = list(random_edges(chosen_by, n, config, random, by=by, seed=seed))
    run = [kept, left_out(kept, config, level), *chance, *without_one(kept, config, removed, level, seed)]
    found = run_circuits(model, run, base, source, metric, **options)
    mean, low, high = found.interval(seed)
    first = 2 + len(chance)
    return Judgement(len(circuit), Interval(mean[0], low[0], high[0]), mean[2:first], float(mean[1]), mean[first:])


def check_defined(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[float, float]:
    """Check that a metric tells the model from the empty circuit, as faithfulness divides by the difference.

    Args:
        model: as for `run_circuits`.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        seed: of the bootstrap.
        **options: further arguments of `run_circuits`.

    Returns:
        The means of the metric over prompts, of the model and of the empty circuit.

    Raises:
        ValueError: the 95% interval of their mean difference includes 0, or there is one prompt only.
    """
    if len(base) < 2:
        raise ValueError("one pair of prompts has no interval; give two or more pairs.")
    found = run_circuits(model, [Circuit(frozenset())], base, source, metric, progress=False, **options)
    apart = bootstrap_mean(found.clean - found.empty, rng(seed, "apart"))
    clean, empty = float(found.clean.mean()), float(found.empty.mean())
    if not (apart.low > 0 or apart.high < 0):
        raise ValueError(
            f"{found.metric} does not tell the model (mean {clean:.3g}) from the empty circuit (mean {empty:.3g}): the 95% "
            f"interval of their difference, [{apart.low:.3g}, {apart.high:.3g}], includes 0, so that faithfulness, CPR and CMD "
            "are undefined; take another metric, more pairs, or a task that the model can do."
        )
    return clean, empty


@dataclass(frozen=True)
class Overlap:
    """What two circuits share.

    Attributes:
        jaccard: shared edges / edges of either.
        core: the shared edges.
        n_other: edges of the other circuit.
        chance: the Jaccard index where the edges of both circuits are redrawn, each keeping how many edges lead from each kind
            of sender in each layer to each kind of receiver in each layer.
        p: (1 + draws with at least the observed index) / (1 + draws); NaN, as the others, if both circuits are empty.
    """

    jaccard: float
    core: Circuit
    n_other: int
    chance: Float[np.ndarray, " draw"]
    p: float

    def row(self) -> dict[str, float]:
        """The numbers as a row of a table; of chance, its mean and the middle 95% of the draws."""
        low, high = np.quantile(self.chance, (0.025, 0.975))
        chance = {"chance": float(self.chance.mean()), "chance_low": float(low), "chance_high": float(high)}
        numbers = {"n_shared": len(self.core), "n_other": self.n_other, "jaccard": self.jaccard}
        return numbers | chance | {"p": self.p}


def jaccard(one: Circuit, other: Circuit) -> float:
    """Compute the Jaccard index of two circuits.

    Args:
        one: a circuit.
        other: another circuit of the same graph.

    Returns:
        Shared edges / edges of either; NaN if both are empty.
    """
    either = len(one.edges | other.edges)
    return len(one.edges & other.edges) / either if either else float("nan")


def overlap(one: Circuit, other: Circuit, config: Any, draws: int = 1000, seed: int = 0) -> Overlap:
    """Compare two circuits of one model, or of two with the same layers and heads, with chance.

    Chance keeps layers and kinds, so that two tasks which both use late heads do not overlap for that alone. It knows nothing of
    how often an edge is in any circuit: what every task uses counts as shared.

    Args:
        one: a circuit.
        other: another circuit.
        config: the model's config.
        draws: number of random pairs.
        seed: of the draws.

    Returns:
        The overlap.

    Raises:
        ValueError: the model lacks an edge, or there are no draws.
    """
    draws = whole_number("draws", draws, 1)
    there = exists(config)
    group = edge_groups(config)[there]
    matrices = [circuit.matrix(config)[there] for circuit in (one, other)]
    generator = rng(seed, "overlap")
    sizes = sum(int(x.sum()) for x in matrices)
    chance = np.empty(draws)
    for draw in range(draws):
        first, second = (shuffled_within(group, matrix, generator) for matrix in matrices)
        shared = int((first & second).sum())
        chance[draw] = shared / (sizes - shared) if sizes else np.nan
    found = jaccard(one, other)
    p = share_as_large(found, chance) if sizes else float("nan")
    return Overlap(found, Circuit(one.edges & other.edges), len(other), chance, p)


def compare(
    model: PreTrainedModel,
    own: Circuit,
    others: Mapping[str, Circuit],
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    *,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Compare a circuit with those of other prompts, languages or methods: what they share, and what they do on its prompts.

    Args:
        model: as for `run_circuits`.
        own: the circuit.
        others: the other circuits, by name.
        base: prompts of its task, which did not choose it.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        seed: of the random pairs of circuits, and of the bootstrap.
        **options: further arguments of `run_circuits`.

    Returns:
        A row for each other circuit: its name, `Overlap.row`, and its faithfulness on these prompts with its 95% interval.
    """
    if not others:
        return []
    runs = run_circuits(model, others.values(), base, source, metric, **options)
    rows = []
    for (name, other), *interval in zip(others.items(), *runs.interval(seed), strict=True):
        faithful = dict(zip(("faithfulness", "low", "high"), map(float, interval), strict=True))
        rows.append({"circuit": name, **overlap(own, other, model.config, seed=seed).row(), **faithful})
    return rows
