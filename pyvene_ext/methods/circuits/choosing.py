"""Circuits from scores: the edges or nodes with the highest, and random ones of the same layers and kinds as controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from pyvene_ext.io.bounds import whole_number
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.circuits import Level
from pyvene_ext.methods.circuits.circuit import Circuit, Edges, edge_name, entry_receivers, exists, on_paths
from pyvene_ext.specs.graph import Node, receivers, senders

Within = Literal["layers", "anywhere"]
By = Literal["magnitude", "value"]
Scores = Float[np.ndarray, "sender *receiver"]  # of edges, or of nodes
Chosen = Bool[np.ndarray, "sender *receiver"]


def top_edges(scores: Float[np.ndarray, "sender receiver"], n: int, config: Any, by: By = "magnitude") -> Circuit:
    """Make the circuit of the `n` edges with the largest scores, pruned to paths from the embedding to the logits.

    Args:
        scores: by `graph.senders` and `graph.receivers`, as `EdgeScores.matrix`; entries where there is no edge are ignored. Of
            equal scores the first in this order is taken.
        n: number of edges before pruning.
        config: the model's config.
        by: magnitude: edges that hinder count as much as those that help, for a circuit that does what the model does. value: the
            highest scores, so that edges that help come first, for one that does the task as well as it can. Mueller et al.
            (2025) compute CMD from the first and CPR from the second.

    Returns:
        The pruned circuit.

    Raises:
        ValueError: the scores have another shape or an edge whose score is NaN, `n` is not between 0 and the number of edges, or
            `by` is unknown.
    """
    return Circuit.of(chosen_edges(_of_axes(scores, 2), n, config, by), config)


def top_nodes(scores: Float[np.ndarray, " sender"], n: int, config: Any, by: By = "magnitude") -> Circuit:
    """Make the circuit of the `n` heads and MLPs with the largest scores, pruned: all edges among them, embedding and logits.

    An edge into a K/V head is in if one of the query heads that it serves is.

    Args:
        scores: by `graph.senders`; that of the embedding, which is always in, is ignored.
        n: number of nodes before pruning, without embedding and logits.
        config: the model's config.
        by: as for `top_edges`.

    Returns:
        The pruned circuit.

    Raises:
        ValueError: as for `top_edges`.
    """
    return Circuit.of(chosen_edges(_of_axes(scores, 1), n, config, by), config)


def chosen_edges(scores: Scores, n: int, config: Any, by: By = "magnitude") -> Edges:
    """Choose as `top_edges` does or, if there is one score per sender, as `top_nodes` does.

    Args:
        scores: of edges or nodes.
        n: how many before pruning.
        config: the model's config.
        by: as for `top_edges`.

    Returns:
        The pruned circuit.
    """
    return _pruned(_chosen(checked_scores(scores, config, by), n), config)


def count_all(config: Any, level: Level = "edge") -> int:
    """Count the edges of a model, or the nodes that a circuit may have or lack: its heads and MLPs."""
    return int(exists(config).sum()) if level == "edge" else len(senders(config)) - 1


def left_out(kept: Edges, config: Any, level: Level = "edge") -> Edges:
    """Take what a circuit leaves out.

    Args:
        kept: the circuit; of nodes, one that `top_nodes` made.
        config: the model's config.
        level: edge: all other edges, also those of the circuit's nodes. node: all edges among the other nodes, the embedding and
            the logits.

    Returns:
        The complement.
    """
    return exists(config) & ~kept if level == "edge" else _pruned(~_nodes_in(kept), config)


def without_one(kept: Edges, config: Any, count: int, level: Level = "edge", seed: int = 0) -> Iterator[Edges]:
    """Remove single edges or nodes from a circuit, drawn at random.

    Args:
        kept: as for `left_out`.
        config: the model's config.
        count: how many are removed, one at a time; all, if there are fewer.
        level: whether edges or nodes are removed.
        seed: of the draw.

    Yields:
        The circuit without one edge, or without one head or MLP and all edges of it.
    """
    nodes = _nodes_in(kept)
    there = kept if level == "edge" else nodes & (np.arange(len(nodes)) > 0)  # the embedding stays
    for place in rng(seed, "removed").permutation(np.argwhere(there))[:count]:
        if level == "edge":
            rest = kept.copy()
            rest[tuple(place)] = False
            yield rest
        else:
            yield _pruned(nodes & (np.arange(len(nodes)) != place), config)


def random_circuits(
    scores: Scores | Circuit,
    n: int,
    config: Any,
    count: int,
    *,
    within: Within = "layers",
    by: By = "magnitude",
    seed: int = 0,
) -> list[Circuit]:
    """Make the circuits that `top_edges` or `top_nodes` would make of permuted scores, as controls for the one that they chose.

    They are pruned too, and usually lose more edges than the chosen circuit does: compare `len`.

    Args:
        scores: as for `top_edges` or `top_nodes`; or the chosen circuit itself, however it was found.
        n: as for `top_edges` or `top_nodes`; of a circuit, its number of edges.
        config: the model's config.
        count: how many circuits.
        within: layers: keep the number of chosen edges from each kind of sender in each layer (all heads of layer 3, say) to each
            kind of receiver in each layer (all keys of layer 5), so that only the choice among these is random; of nodes, the
            number of heads in each layer, and the MLPs. anywhere: any `n` edges or nodes of the model.
        by: as for `top_edges`.
        seed: of the draws; the first circuits of a larger `count` are those of a smaller one.

    Returns:
        The pruned circuits.

    Raises:
        ValueError: for what `top_edges` and `top_nodes` refuse, an unknown `within`, and a `count` below 1.
    """
    drawn = random_edges(scores, n, config, count, within=within, by=by, seed=seed)
    return [Circuit.of(matrix, config) for matrix in drawn]


def random_edges(
    scores: Scores | Circuit,
    n: int,
    config: Any,
    count: int,
    *,
    within: Within = "layers",
    by: By = "magnitude",
    seed: int = 0,
) -> Iterator[Edges]:
    """Make `random_circuits` as matrices.

    Args:
        scores: as for `random_circuits`.
        n: as for `random_circuits`.
        config: the model's config.
        count: how many circuits.
        within: as for `random_circuits`.
        by: as for `random_circuits`.
        seed: of the draws.

    Yields:
        The pruned circuits.

    Raises:
        ValueError: as for `random_circuits`.
    """
    if within not in ("layers", "anywhere"):
        raise ValueError(f"within must be 'layers' or 'anywhere', not {within!r}.")
    count = whole_number("count", count, 1)
    if isinstance(scores, Circuit):
        if n != len(scores):
            raise ValueError(f"the circuit has {len(scores)} edges, so that random ones have as many, not {n!r}.")
        scores = scores.matrix(config)
    sizes = checked_scores(scores, config, by)
    chosen, there = _chosen(sizes, n), sizes > -np.inf
    group = np.zeros(there.shape, int)
    if within == "layers":
        group = edge_groups(config) if there.ndim == 2 else _kinds(senders(config))
    for number in range(count):
        drawn = np.zeros_like(there)
        drawn[there] = shuffled_within(group[there], chosen[there], rng(seed, "random circuits", number))
        yield _pruned(drawn, config)


def shuffled_within(
    group: Int[np.ndarray, " item"], kept: Bool[np.ndarray, " item"], generator: np.random.Generator
) -> Bool[np.ndarray, " item"]:
    """Choose as many items of each group at random.

    Args:
        group: the number of each item's group.
        kept: the items whose numbers are kept to.
        generator: of the draw.

    Returns:
        True for the items that are drawn.
    """
    drawn = np.zeros_like(kept)
    # Both orders go through the groups one after the other; the first is random within each group.
    drawn[np.lexsort((generator.random(len(group)), group))] = kept[np.argsort(group, kind="stable")]
    return drawn


def edge_groups(config: Any) -> Int[np.ndarray, "sender receiver"]:
    """Number the edges by the layers and kinds that they connect: all heads of layer 3 to all keys of layer 5, say.

    Args:
        config: the model's config.

    Returns:
        The number of each edge's group, by `graph.senders` and `graph.receivers`.
    """
    rows, columns = (_kinds(nodes(config)) for nodes in (senders, receivers))
    return rows[:, None] * (columns.max() + 1) + columns


def _kinds(nodes: list[Node]) -> Int[np.ndarray, " node"]:
    return np.unique([f"{node.site}.{node.layer}" for node in nodes], return_inverse=True)[1]


def _of_axes(scores: Any, axes: int) -> Scores:
    """Refuse scores of edges where those of nodes belong, and the reverse."""
    scores = _numbers(scores)
    if scores.ndim != axes:
        raise ValueError(
            "top_edges takes a matrix of scores [sender, receiver] and top_nodes one score per sender, not shape "
            f"{scores.shape}; take the mean over prompts first."
        )
    return scores


def _numbers(scores: Any) -> Scores:
    """The scores as an array; what `edge_attribution` returns holds them as its matrix."""
    try:
        return np.asarray(scores, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            "scores must be an array of numbers: the matrix of what edge_attribution or learn_mask returns, .float() of a tensor."
        ) from None


def checked_scores(scores: Any, config: Any, by: By) -> Scores:
    """Check scores.

    Args:
        scores: of edges or nodes.
        config: the model's config.
        by: as for `top_edges`.

    Returns:
        What they are chosen by; -inf where there is nothing to choose.

    Raises:
        ValueError: they have another shape, one is missing, or `by` is unknown.
    """
    if by not in ("magnitude", "value"):
        raise ValueError(f"by must be 'magnitude' or 'value', not {by!r}.")
    values, there = _numbers(scores), exists(config)
    if of_nodes := values.ndim == 1:
        there = np.array([sender.site != "embed" for sender in senders(config)])
    if values.shape != there.shape:
        wanted = f"a matrix of the model's {there.shape[0]} senders and {there.shape[-1]} receivers"
        wanted = f"one for each of the model's {there.shape[0]} senders" if of_nodes else wanted
        raise ValueError(f"scores must be {wanted}, not of shape {values.shape}; take the mean over prompts first.")
    if (missing := np.argwhere(there & np.isnan(values))).size:
        nodes = senders(config)[missing[0][0]], receivers(config)[missing[0][-1]]
        what = f"node {nodes[0]}" if of_nodes else f"edge {edge_name(*nodes)}"
        raise ValueError(
            f"the score of {what} is NaN; score every {what.partition(' ')[0]}, or give 0 to those to leave out."
        )
    return np.where(there, np.abs(values) if by == "magnitude" else values, -np.inf)


def _chosen(sizes: Scores, n: int) -> Chosen:
    """Select the `n` largest."""
    n_all = int((sizes > -np.inf).sum())
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 <= n <= n_all:
        raise ValueError(
            f"a circuit of this model has 0 to {n_all} {'edges' if sizes.ndim == 2 else 'nodes'}, not {n!r}."
        )
    kept = np.zeros(sizes.size, bool)
    kept[np.argsort(-sizes.ravel(), kind="stable")[:n]] = True
    return kept.reshape(sizes.shape)


def _nodes_in(kept: Edges) -> Bool[np.ndarray, " sender"]:
    """The nodes of a pruned circuit, all of which send something."""
    return np.asarray(kept.any(1))


def _pruned(chosen: Chosen, config: Any) -> Edges:
    """The pruned circuit of the chosen edges, or of all edges among the chosen nodes."""
    if chosen.ndim == 1:
        entered = np.zeros(len(receivers(config)), bool)
        entered[-1] = True  # the logits
        for sender, columns in entry_receivers(config).items():
            if chosen[senders(config).index(sender)]:
                entered[columns] = True
        within = chosen.copy()
        within[0] = True  # the embedding
        chosen = exists(config) & within[:, None] & entered
    return on_paths(chosen, config)
