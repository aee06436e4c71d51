"""Circuits: from edge scores to a pruned graph, and how much of the model's behaviour it explains on its own.

    scores = edge_attribution(model, clean, corrupt).matrix           # or any other [sender receiver]
    circuit = top_edges(scores, 100, model.config)
    faithfulness(model, circuit, base=clean, source=corrupt)          # 1: the circuit does what the model does
    curve = faithfulness_curve(model, scores, clean, corrupt)         # curve.sizes, curve.values, curve.area()
    chance = random_circuits(scores, 100, model.config, count=20)     # controls

The graph is that of `pyvene_ext.specs.graph`: every sender that writes before a receiver reads has an edge to it, into each query
head's q, each K/V head's k and v, each MLP and the logits. To run a circuit is to run the base prompts with every edge outside
of it ablated, that is, set to its value in the run on the source prompts (Conmy et al. 2023; Hanna et al. 2024):

    stream that a receiver reads = sum over senders that reach it of
        what the sender adds in this run                   if the edge is in the circuit
        what it adds in the run on the source prompts      if not

computed for each receiver in the order in which they read, so that an ablated edge affects everything downstream. The receiver's
own norm and projection, attention and MLPs are the model's code. Prompts are paired by their order, and so are a pair's tokens.

What a sender adds: for embed, what enters the first block; for a head, z_h W_O; for an MLP, its output with its bias. If a norm
follows attention's output projection or the MLP (Gemma 2), what comes out of that norm: a head's share is scaled as the norm
scales the whole attention output in the same run, be it the current one or the one on the source prompts. Biases of attention's
output projection belong to no sender and are those of the current run. With the empty circuit every receiver reads what it reads
in the run on the source prompts, with the full circuit what it reads in the run on the base prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, head_shares, n_heads
from pyvene_ext.engine.measure import MetricLike, as_array, check_metric
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.edges import check_pairs
from pyvene_ext.methods.attribution.faithfulness import CircuitRuns, Curve
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.hooks import hook_component
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.replay import Past, Replay
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.graph import (
    SENDERS,
    Node,
    query_heads,
    reaches,
    receivers,
    senders,
)

Edges = Bool[np.ndarray, "sender receiver"]
Within = Literal["layers", "anywhere"]


# -- circuits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circuit:
    """Some edges of a model's graph.

    Attributes:
        edges: their names, such as "z.0.1->k.2.0": a sender of `graph.senders` and a receiver of `graph.receivers`.

    Raises:
        ValueError: no edge has that name.
    """

    edges: frozenset[str]

    def __post_init__(self) -> None:
        named = [self.edges] if isinstance(self.edges, str) else self.edges
        object.__setattr__(self, "edges", frozenset(_name(*_parse(edge)) for edge in named))

    def __len__(self) -> int:
        return len(self.edges)

    @classmethod
    def of(cls, matrix: Edges, config: Any) -> Circuit:
        """Make a circuit from a boolean matrix.

        Args:
            matrix: True for the circuit's edges, by `graph.senders` and `graph.receivers`.
            config: the model's config.

        Returns:
            The circuit.

        Raises:
            ValueError: the matrix has another shape or dtype, or is True where there is no edge.
        """
        matrix = _checked_matrix(matrix, config)
        writing, reading = senders(config), receivers(config)
        return cls(frozenset(_name(writing[row], reading[column]) for row, column in np.argwhere(matrix)))

    @classmethod
    def full(cls, config: Any) -> Circuit:
        """Make the circuit of every edge, which is the model itself."""
        return cls.of(exists(config), config)

    def matrix(self, config: Any) -> Edges:
        """Convert to a boolean matrix by `graph.senders` and `graph.receivers`.

        Args:
            config: the model's config.

        Returns:
            True for the circuit's edges.

        Raises:
            ValueError: the model lacks one of the edges.
        """
        rows = {node: row for row, node in enumerate(senders(config))}
        columns = {node: column for column, node in enumerate(receivers(config))}
        matrix = np.zeros((len(rows), len(columns)), bool)
        for sender, receiver in map(_parse, sorted(self.edges)):
            sender.check(config)
            receiver.check(config)
            matrix[rows[sender], columns[receiver]] = True
        return matrix

    def complement(self, config: Any) -> Circuit:
        """Make the circuit of all other edges of the model."""
        return Circuit.of(exists(config) & ~self.matrix(config), config)

    def pruned(self, config: Any) -> Circuit:
        """Keep the edges that lie on some path of the circuit from the embedding to the logits.

        A path enters a head through its q, or through the k or v of its K/V head, and an MLP through its input. Edges that do
        not lead to the logits can be dropped without effect; so can those that do not come from the embedding, whose sender adds
        what it adds in the run on the source prompts (except that, through a post-norm over all heads, one head changes the
        shares of the others).

        Args:
            config: the model's config.

        Returns:
            The pruned circuit.
        """
        return Circuit.of(_on_paths(self.matrix(config), config), config)


def exists(config: Any) -> Edges:
    """Where a model has an edge, because the sender writes before the receiver reads.

    Args:
        config: the model's config.

    Returns:
        A boolean matrix by `graph.senders` and `graph.receivers`.
    """
    writing = senders(config)
    columns = []
    for _, nodes in groupby(receivers(config), lambda node: (node.site, node.layer)):
        first, *others = nodes  # all heads of a layer read the same stream
        columns += [[reaches(sender, first) for sender in writing]] * (1 + len(others))
    return np.array(columns).T


def top_edges(scores: Float[np.ndarray, "sender receiver"], n: int, config: Any) -> Circuit:
    """Make the circuit of the `n` edges with the scores of largest magnitude, pruned to paths from the embedding to the logits.

    Args:
        scores: by `graph.senders` and `graph.receivers`, as `EdgeScores.matrix`; entries where there is no edge are ignored. Of
            equal scores the first in this order is taken.
        n: number of edges before pruning.
        config: the model's config.

    Returns:
        The pruned circuit.

    Raises:
        ValueError: the scores have another shape or an edge whose score is NaN, or `n` is not between 0 and the number of edges.
    """
    return Circuit.of(_on_paths(_top(_checked_scores(scores, config), n, config), config), config)


def random_circuits(
    scores: Float[np.ndarray, "sender receiver"] | Circuit,
    n: int,
    config: Any,
    count: int,
    *,
    within: Within = "layers",
    seed: int = 0,
) -> list[Circuit]:
    """Make the circuits that `top_edges` would make of randomly permuted scores, as controls for the one that the scores chose.

    They are pruned too, and usually lose more edges than the chosen circuit does: compare `len`.

    Args:
        scores: as for `top_edges`; or the chosen circuit itself, however it was found.
        n: as for `top_edges`; of a circuit, its number of edges.
        config: the model's config.
        count: how many circuits.
        within: layers: keep the number of chosen edges from each kind of sender in each layer (all heads of layer 3, say) to each
            kind of receiver in each layer (all keys of layer 5), so that only the choice among these is random. anywhere: any `n`
            edges of the model.
        seed: of the draws; the first circuits of a larger `count` are those of a smaller one.

    Returns:
        The pruned circuits.

    Raises:
        ValueError: for what `top_edges` refuses, an unknown `within`, and a `count` below 1.
    """
    if within not in ("layers", "anywhere"):
        raise ValueError(f"within must be 'layers' or 'anywhere', not {within!r}.")
    count = whole_number("count", count, 1)
    if isinstance(scores, Circuit):
        if n != len(scores):
            raise ValueError(f"the circuit has {len(scores)} edges, so that random ones have as many, not {n!r}.")
        scores = scores.matrix(config)
    chosen, there = _top(_checked_scores(scores, config), n, config), exists(config)
    group = np.zeros(there.shape, int)
    if within == "layers":
        rows, columns = (
            np.unique([f"{node.site}.{node.layer}" for node in nodes], return_inverse=True)[1]
            for nodes in (senders(config), receivers(config))
        )
        group = rows[:, None] * (columns.max() + 1) + columns
    group, kept = group[there], chosen[there]
    by_group = np.argsort(group, kind="stable")
    found = []
    for number in range(count):
        permuted, matrix = np.zeros_like(kept), np.zeros_like(there)
        # Both orders go through the groups one after the other; this one is random within each group.
        permuted[np.lexsort((rng(seed, "random circuits", number).random(len(group)), group))] = kept[by_group]
        matrix[there] = permuted
        found.append(Circuit.of(_on_paths(matrix, config), config))
    return found


def _parse(edge: str) -> tuple[Node, Node]:
    """Sender and receiver of an edge; ValueError if there is no such edge."""
    first, arrow, second = str(edge).partition("->")
    if not arrow:
        raise ValueError(f'there is no edge {edge!r}; write it "SENDER->RECEIVER", as in "z.0.1->k.2.0".')
    try:
        sender, receiver = Node.parse(first), Node.parse(second)
    except ValueError as error:
        raise ValueError(f"there is no edge {edge!r}: {error}") from None
    if sender.site not in SENDERS or receiver.site not in ("q", "k", "v", "mlp_in", "logits"):
        raise ValueError(
            f"there is no edge {edge!r}: it leads from embed, z.LAYER.HEAD or mlp_out.LAYER to q, k, v, mlp_in or logits."
        )
    if not reaches(sender, receiver):
        raise ValueError(f"there is no edge {edge!r}: {receiver} reads before {sender} writes.")
    return sender, receiver


def _name(sender: Node, receiver: Node) -> str:
    return f"{sender}->{receiver}"


def _checked_matrix(matrix: Any, config: Any) -> Edges:
    matrix = np.asarray(matrix)
    there = exists(config)
    if matrix.shape != there.shape or matrix.dtype != bool:
        raise ValueError(
            f"a circuit is a boolean matrix of the model's {there.shape[0]} senders and {there.shape[1]} receivers, not one of "
            f"{matrix.dtype} and shape {matrix.shape}."
        )
    if (matrix & ~there).any():
        row, column = np.argwhere(matrix & ~there)[0]
        sender, receiver = senders(config)[row], receivers(config)[column]
        raise ValueError(f"there is no edge {_name(sender, receiver)}: {receiver} reads before {sender} writes.")
    return matrix


def _checked_scores(scores: Any, config: Any) -> Float[np.ndarray, "sender receiver"]:
    """The magnitude of every edge's score, -inf where there is no edge."""
    sizes, there = np.abs(np.asarray(scores, np.float64)), exists(config)
    if sizes.shape != there.shape:
        raise ValueError(
            f"scores must be a matrix of the model's {there.shape[0]} senders and {there.shape[1]} receivers, not of shape "
            f"{sizes.shape}; take the mean over prompts first."
        )
    if (missing := np.argwhere(there & np.isnan(sizes))).size:
        edge = _name(senders(config)[missing[0][0]], receivers(config)[missing[0][1]])
        raise ValueError(f"the score of {edge} is NaN; score every edge, or give 0 to those to leave out.")
    return np.where(there, sizes, -np.inf)


def _top(sizes: Float[np.ndarray, "sender receiver"], n: int, config: Any) -> Edges:
    """Select the `n` largest."""
    there = exists(config)
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 <= n <= there.sum():
        raise ValueError(f"a circuit of this model has 0 to {there.sum()} edges, not {n!r}.")
    kept = np.zeros(sizes.size, bool)
    kept[np.argsort(-sizes.ravel(), kind="stable")[:n]] = True
    return kept.reshape(sizes.shape)


def _on_paths(matrix: Edges, config: Any) -> Edges:
    """The edges on a path from the embedding to the logits."""
    writing, reading = senders(config), receivers(config)
    entries = _entry_receivers(config)
    from_embedding = np.zeros(len(writing), bool)  # from the embedding
    for row, sender in enumerate(writing):
        from_embedding[row] = sender.site == "embed" or matrix[np.ix_(from_embedding, entries[sender])].any()
    to_logits = np.array([receiver.site == "logits" for receiver in reading])  # to the logits
    for row in reversed(range(len(writing))):
        to_logits[entries[writing[row]]] |= (matrix[row] & to_logits).any()
    return matrix & from_embedding[:, None] & to_logits


def _entry_receivers(config: Any) -> dict[Node, Int[np.ndarray, " receiver"]]:
    """The receivers through which a path enters each sender."""
    entries: dict[Node, list[int]] = {sender: [] for sender in senders(config)}
    for column, node in enumerate(receivers(config)):
        if node.site == "mlp_in":
            entries[Node("mlp_out", node.layer)].append(column)
        for head in query_heads(node, config):
            entries[Node("z", node.layer, head)].append(column)
    return {sender: np.array(columns, int) for sender, columns in entries.items()}


# -- measures ----------------------------------------------------------------------------------------------------------


def run_circuit(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, " prompt"]:
    """Run one circuit, as `run_circuits` does.

    Args:
        model: as for `run_circuits`.
        circuit: a `Circuit` or a boolean matrix.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        batch_size: as for `run_circuits`.
        progress: as for `run_circuits`.

    Returns:
        The metric of every base prompt.
    """
    return run_circuits(model, [circuit], base, source, metric, batch_size=batch_size, progress=progress).circuits[0]


def run_circuits(
    model: PreTrainedModel,
    circuits: Iterable[Circuit | Edges],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> CircuitRuns:
    """Run the base prompts through circuits, as the module's docstring defines it.

    This takes one forward pass of base and of source, and one per circuit, in which receivers of a layer with different ablated
    edges pass through its norm and projections separately. Sums over senders are in float32 whatever the model's dtype; the
    contributions of all senders are held twice, senders x tokens x d_model per prompt.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        circuits: each a `Circuit` or a boolean matrix by `graph.senders` and `graph.receivers`; they are not pruned.
        base: the prompts that are run; the metric is read with their answers.
        source: the prompts that ablated edges are set to, paired with `base` by order and of equal length.
        metric: as for `run`, one number per prompt; kl is to the clean run.
        batch_size: prompts per forward pass, all of one length.
        progress: show a bar.

    Returns:
        The metric of base, source, and each circuit.

    Raises:
        ValueError: before the model runs, for an edge that the model lacks, an unknown metric, prompts that are not pairs, a pair
            of unequal lengths (naming it), answers outside of the vocabulary, or output projections that cannot be split by
            heads.
    """
    config = model.config
    matrices = [
        circuit.matrix(config) if isinstance(circuit, Circuit) else _checked_matrix(circuit, config)
        for circuit in circuits
    ]
    check_pairs(model, base, source)
    metric = check_metric(model, base, metric)
    base.batches(batch_size)  # refuses a wrong size
    if not matrices:
        raise ValueError("nothing to run: give at least one circuit.")
    clean, of_source = (np.empty(len(base), np.float32) for _ in range(2))
    found = np.empty((len(matrices), len(base)), np.float32)
    edgewise = _EdgewiseModel(model)
    bar = progress_bar(found.size, "prompt", "circuits", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        for index in _of_one_length(base, batch_size):
            batch, ids = base.batch(index), source.batch(index).input_ids
            clean_logits = edgewise(batch.input_ids)[0]
            batch = metric.with_clean(batch, clean_logits)
            source_logits, outputs = edgewise(ids)
            clean[index], of_source[index] = (as_array(metric(x, batch)) for x in (clean_logits, source_logits))
            for number, matrix in enumerate(matrices):
                logits, _ = edgewise(batch.input_ids, edgewise.exists & ~matrix, outputs)
                found[number, index] = as_array(metric(logits, batch))
                bar.update(len(index))
    return CircuitRuns(metric.label, clean, of_source, found)


def faithfulness(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    **options: Any,
) -> float:
    """Faithfulness of a circuit: the share of the difference between base and source that it recovers (Marks et al. 2024).

    Args:
        model: as for `run_circuits`.
        circuit: a `Circuit` or a boolean matrix.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        **options: further arguments of `run_circuits`.

    Returns:
        `CircuitRuns.faithfulness` of the circuit.
    """
    return float(run_circuits(model, [circuit], base, source, metric, **options).faithfulness[0])


def completeness(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    **options: Any,
) -> float:
    """Completeness of a circuit: the faithfulness of its complement, near 0 if the circuit misses nothing (Marks et al. 2024).

    Args:
        model: as for `run_circuits`.
        circuit: a `Circuit` or a boolean matrix.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        **options: further arguments of `run_circuits`.

    Returns:
        `CircuitRuns.faithfulness` of all edges outside of the circuit.
    """
    config = model.config
    matrix = circuit.matrix(config) if isinstance(circuit, Circuit) else _checked_matrix(circuit, config)
    return faithfulness(model, exists(config) & ~matrix, base, source, metric, **options)


def faithfulness_curve(
    model: PreTrainedModel,
    scores: Float[np.ndarray, "sender receiver"],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    sizes: Collection[int] | None = None,
    metric: MetricLike = "logit_diff",
    *,
    complement: bool = False,
    random: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Curve:
    """Measure the faithfulness of the circuits that `top_edges` makes, by their size.

    Args:
        model: as for `run_circuits`.
        scores: as for `top_edges`.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        sizes: numbers of edges before pruning; by default 1, 2, 4, ... and all.
        metric: as for `run_circuits`.
        complement: run each circuit's complement instead, so that the values are completeness.
        random: how many `random_circuits` of each size are run too, as controls.
        seed: of their draws.
        batch_size: as for `run_circuits`.
        progress: as for `run_circuits`.

    Returns:
        The curve.

    Raises:
        ValueError: for what `top_edges` and `run_circuits` refuse, for no size, and for a size given twice.
    """
    config, random = model.config, whole_number("random", random, 0)
    there = exists(config)
    if sizes is None:
        sizes = [*(2**power for power in range(int(there.sum() - 1).bit_length())), int(there.sum())]
    ascending = sorted(sizes)
    if not ascending or len(set(ascending)) < len(ascending):
        raise ValueError(f"give one or more sizes, each once, not {list(sizes)}.")
    magnitudes = _checked_scores(scores, config)
    kept = [_on_paths(_top(magnitudes, n, config), config) for n in ascending]
    n_edges = np.array([int(matrix.sum()) for matrix in kept])
    for n in ascending if random else ():
        kept += [one.matrix(config) for one in random_circuits(scores, n, config, random, seed=seed)]
    run = [there & ~matrix for matrix in kept] if complement else kept
    runs = run_circuits(model, run, base, source, metric, batch_size=batch_size, progress=progress)
    own, others = np.split(runs.circuits, [len(ascending)])
    return Curve(
        np.array(ascending), n_edges, replace(runs, circuits=own), others.reshape(len(ascending), random, len(base))
    )


# -- running -----------------------------------------------------------------------------------------------------------


class _SenderOutputs:
    """What senders add during a run, and the streams of receivers for which some senders are ablated.

    `added` is what each sender has added so far, `batch sender pos d_model`; in a run with ablated edges, minus what it adds in
    the run on the source prompts.
    """

    def __init__(
        self,
        ablated: Edges | None,
        source: Float[Tensor, "batch sender pos d_model"] | None,
        added: Float[Tensor, "batch sender pos d_model"],
    ) -> None:
        self.ablated, self.source, self.added = ablated, source, added
        self._count = 0

    def write(self, added: Float[Tensor, "batch some pos d_model"]) -> None:
        """Add what the next senders write."""
        those = slice(self._count, self._count + added.shape[1])
        added = added.to(self.added)
        self.added[:, those] = added if self.source is None else added - self.source[:, those]
        self._count = those.stop

    def ablated_senders(self, readers: slice) -> tuple[Bool[np.ndarray, "sender kind"], Int[np.ndarray, " receiver"]]:
        """The sets of senders that are ablated for some receivers, each set ("kind") once, and the kind of each receiver."""
        if self.ablated is None:
            return np.zeros((self._count, 1), bool), np.zeros(readers.stop - readers.start, int)
        kinds, which = np.unique(self.ablated[: self._count, readers], axis=1, return_inverse=True)
        return kinds, which.reshape(-1)

    def streams_of(
        self, stream: Float[Tensor, "batch pos d_model"], ablated_senders: Bool[np.ndarray, "sender kind"]
    ) -> Float[Tensor, "batch kind pos d_model"]:
        """The stream as each kind of receiver reads it, with these senders ablated."""
        if not ablated_senders.any():
            return stream[:, None].expand(-1, ablated_senders.shape[1], -1, -1)
        weights = torch.from_numpy(ablated_senders).to(self.added)
        change = torch.einsum("bspd,sk->bkpd", self.added[:, : self._count, -stream.shape[1] :], weights)
        return (stream[:, None].float() - change.to(stream.device)).to(stream.dtype)


class _EdgewiseModel:
    """Runs a model with a separate input stream for every receiver, on prompts of one length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.replay, self.config = Replay(model), model.config
        self.exists = exists(model.config)
        self._readers: dict[tuple[str, int | None], slice] = {}
        first = 0
        for key, nodes in groupby(receivers(model.config), lambda node: (node.site, node.layer)):
            self._readers[key] = slice(first, first := first + len(list(nodes)))

    def __call__(
        self,
        ids: Int[Tensor, "batch pos"],
        ablated: Edges | None = None,
        source: Float[Tensor, "batch sender pos d_model"] | None = None,
    ) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "batch sender pos d_model"]]:
        """Run prompts.

        Args:
            ids: the prompts.
            ablated: edges that carry their value in `source`; None: none.
            source: what each sender adds in the run on the source prompts.

        Returns:
            The logits at the last token; and what each sender adds (minus `source`, if it is given).
        """
        hidden = self.replay.embed(ids.to(self.replay.device))
        added = hidden.new_empty(len(hidden), len(self.exists), *hidden.shape[1:], dtype=torch.float32)
        outputs = _SenderOutputs(ablated, source, added)
        outputs.write(hidden[:, None])
        for layer in range(self.replay.n_layers):
            hidden = self._block(layer, hidden, outputs)
        ablated_senders, _ = outputs.ablated_senders(self._readers["logits", None])
        return self.replay.logits(outputs.streams_of(hidden[:, -1:], ablated_senders)[:, 0, 0]), outputs.added

    def _block(self, layer: int, hidden: Float[Tensor, "batch pos d_model"], outputs: _SenderOutputs) -> Tensor:
        """One block: queries, keys, values and the MLP's input from separate streams; the rest is the model's code."""
        seen: dict[str, Tensor] = {}
        edits = self._projections(layer, hidden, outputs)
        # An edit that only reads: what the MLP adds, after a post-norm if there is one.
        edits["mlp_out"] = lambda x: seen.__setitem__("mlp_out", x.clone())

        def read_by_mlp(stream: Tensor) -> Tensor:
            outputs.write(self._shares(layer, seen))
            ablated_senders, _ = outputs.ablated_senders(self._readers["mlp_in", layer])
            return outputs.streams_of(stream, ablated_senders)[:, 0]

        at, card = ("resid_mid", layer), self.replay.card
        with Taps(self.replay.model, card, [at]), ExitStack() as hooks:
            hook_component(self.replay.model, at, read_by_mlp, hooks)
            hidden = self.replay.block(layer, hidden, (0, hidden.shape[1]), Past(), edits=edits, seen=seen)
        outputs.write(seen["mlp_out"][:, None])
        return hidden

    def _projections(
        self, layer: int, hidden: Float[Tensor, "batch pos d_model"], outputs: _SenderOutputs
    ) -> dict[str, Callable[[Tensor], Any]]:
        """Edits that replace each head's q, k and v by those of its own stream; none if no edge into the heads is ablated."""
        groups = {site: self._readers[site, layer] for site in ("q", "k", "v")}
        first, last = groups["q"].start, groups["v"].stop
        ablated_senders, kind_of = outputs.ablated_senders(slice(first, last))
        if not ablated_senders.any():
            return {}
        streams = outputs.streams_of(hidden, ablated_senders)
        normed = self.replay.attention_input(layer, streams.flatten(0, 1), (0, hidden.shape[1]))
        by_kind = normed.unflatten(0, streams.shape[:2])
        edits: dict[str, Callable[[Tensor], Any]] = {}
        for site, readers in groups.items():
            kinds = kind_of[readers.start - first : readers.stop - first]
            edits[site] = partial(_put, self._projected(site, layer, by_kind, kinds))
        return edits

    def _projected(
        self, site: str, layer: int, by_kind: Float[Tensor, "batch kind pos d_model"], kinds: Int[np.ndarray, " head"]
    ) -> Float[Tensor, "batch pos width"]:
        """The q, k or v of every head, concatenated, each from the stream of its kind."""
        heads: dict[int, Tensor] = {}
        for kind in np.unique(kinds):
            x = self.replay.projected(site, layer, by_kind[:, kind].contiguous())
            by_head = x.unflatten(-1, (len(kinds), -1))
            heads |= {head: by_head[:, :, head] for head in np.flatnonzero(kinds == kind).tolist()}
        return torch.cat([heads[head] for head in range(len(kinds))], -1)

    def _shares(self, layer: int, seen: dict[str, Tensor]) -> Float[Tensor, "batch head pos d_model"]:
        """What each head adds to the stream, in float32."""
        projection = self.replay.module("attention_value_output", layer)
        shares = head_shares(seen["z"].float(), projection, n_heads(self.config))
        scale = self.replay.card.post_norm_scale
        if scale is not None:
            norm = self.replay.module("attention_contribution", layer)
            shares = shares * scale(norm, seen["attention"].float())[:, :, None]
        return self.replay.card.residual_scale(self.config) * shares.transpose(1, 2)


def _put(new: Tensor, x: Tensor) -> None:
    x.copy_(new)


def _of_one_length(prompts: TokenizedPrompts, batch_size: int) -> Iterator[list[int]]:
    """The prompts of each length, `batch_size` at a time."""
    lengths = [len(ids) for ids in prompts.input_ids]
    for length in sorted(set(lengths)):
        those = [prompt for prompt, own in enumerate(lengths) if own == length]
        yield from (those[start : start + batch_size] for start in range(0, len(those), batch_size))
