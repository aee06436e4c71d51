"""Circuits: from scores of edges to a pruned graph, and how much of the model's behaviour it carries by itself.

    scores = edge_attribution(model, clean, corrupt).matrix           # or any other [sender receiver]
    circuit = top_edges(scores, 100, model.config)
    faithfulness(model, circuit, base=clean, source=corrupt)          # 1: the circuit does what the model does
    curve = faithfulness_curve(model, scores, clean, corrupt)         # curve.sizes, curve.values, curve.area()
    chance = random_circuits(scores, 100, model.config, count=20)     # to set beside it

The graph is that of `pyvene_ext.specs.graph`: every sender that writes before a receiver reads has an edge to it, into each query
head's q, each K/V head's k and v, each MLP and the logits. To run a circuit is to run the base prompts with every edge outside
of it ablated, that is, carrying what the source prompts' run has there (Conmy et al. 2023; Hanna et al. 2024):

    stream that a receiver reads = sum over senders that reach it of
        what the sender adds in this run            if the edge is in the circuit
        what it adds in the source prompts' run     if not

computed anew for each receiver in the order in which they read, so that an ablated edge is felt by all that follows. The
receiver's own norm and projection, attention and MLPs are the model's code. Prompts are paired by their order, a pair's tokens
by theirs.

What a sender adds: embed is what enters the first block; a head's is z_h W_O; an MLP's is its output with its bias. Where a norm
stands behind attention's output projection or the MLP (Gemma 2), it is what comes out of that norm: a head's share is
scaled as the norm scales the whole of attention's output in the same run, the current one or the source prompts'. Biases of
attention's output projection belong to no sender; they pass as they are in the current run. With the empty circuit every
receiver reads what it reads in the source prompts' run, with the full one what it reads in the base prompts'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import Taps, head_shares, n_heads
from pyvene_ext.engine.plain import METRICS
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.edges import check_edges
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.hooks import visit
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.replay import Past, Replay
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.graph import (
    SENDERS,
    Node,
    query_heads,
    reaches,
    receivers,
    senders,
)
from pyvene_ext.stats.intervals import Interval, ratio_of_means

Edges = Bool[np.ndarray, "sender receiver"]
Scale = Literal["log", "linear"]
Within = Literal["layers", "anywhere"]


# -- circuits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circuit:
    """Some edges of a model's graph.

    Attributes:
        edges: their names, "z.0.1->k.2.0": a sender of `graph.senders` and a receiver of `graph.receivers`.

    Raises ValueError for a name that no edge has.
    """

    edges: frozenset[str]

    def __post_init__(self) -> None:
        named = [self.edges] if isinstance(self.edges, str) else self.edges
        object.__setattr__(self, "edges", frozenset(_name(*_parse(edge)) for edge in named))

    def __len__(self) -> int:
        return len(self.edges)

    @classmethod
    def of(cls, matrix: Edges, config: Any) -> Circuit:
        """The edges that are True in a matrix by `graph.senders(config)` and `graph.receivers(config)`.

        Raises ValueError for another shape or dtype, and for True where there is no edge.
        """
        matrix = _checked_matrix(matrix, config)
        writing, reading = senders(config), receivers(config)
        return cls(frozenset(_name(writing[row], reading[column]) for row, column in np.argwhere(matrix)))

    @classmethod
    def full(cls, config: Any) -> Circuit:
        """Every edge: the model itself."""
        return cls.of(exists(config), config)

    def matrix(self, config: Any) -> Edges:
        """True for its edges. Raises ValueError for an edge that the model lacks."""
        rows = {node: row for row, node in enumerate(senders(config))}
        columns = {node: column for column, node in enumerate(receivers(config))}
        matrix = np.zeros((len(rows), len(columns)), bool)
        for sender, receiver in map(_parse, sorted(self.edges)):
            sender.check(config)
            receiver.check(config)
            matrix[rows[sender], columns[receiver]] = True
        return matrix

    def complement(self, config: Any) -> Circuit:
        """Every other edge of the model."""
        return Circuit.of(exists(config) & ~self.matrix(config), config)

    def pruned(self, config: Any) -> Circuit:
        """Its edges that lie on some path of its edges from the embedding to the logits.

        A head is entered by its q, and by the k or v of its K/V head; an MLP by its input. Edges that lead nowhere change nothing
        when they are left out; nor do those that come from nowhere, whose sender adds what it adds in the source prompts' run
        (but for a post-norm over all heads, by which one head changes the shares of the others).
        """
        return Circuit.of(_on_paths(self.matrix(config), config), config)


def exists(config: Any) -> Edges:
    """Where a model has an edge: the sender writes before the receiver reads."""
    writing = senders(config)
    columns = []
    for _, nodes in groupby(receivers(config), lambda node: (node.site, node.layer)):
        first, *others = nodes  # all heads of a layer read alike
        columns += [[reaches(sender, first) for sender in writing]] * (1 + len(others))
    return np.array(columns).T


def top_edges(scores: Float[np.ndarray, "sender receiver"], n: int, config: Any) -> Circuit:
    """The `n` edges whose scores are largest by size, less those on no path from the embedding to the logits (`pruned`).

    Args:
        scores: by `graph.senders(config)` and `graph.receivers(config)`, as `EdgeScores.matrix`; what stands where there is no
            edge does not count. Of equal ones the first in this order is taken.

    Raises ValueError for another shape, an edge whose score is NaN, and an `n` that is not between 0 and the number of edges.
    """
    return Circuit.of(_on_paths(_top(_checked_scores(scores, config), n, config), config), config)


def random_circuits(
    scores: Float[np.ndarray, "sender receiver"],
    n: int,
    config: Any,
    count: int,
    *,
    within: Within = "layers",
    seed: int = 0,
) -> list[Circuit]:
    """What `top_edges` would make of scores dealt out anew at random: circuits to set beside the one that the scores chose.

    Args:
        scores, n, config: as for `top_edges`.
        count: how many circuits.
        within: layers: as many edges as the scores chose lead from each kind of sender in each layer (all heads of layer 3, say)
            to each kind of receiver in each layer (all keys of layer 5), so that only the choice among them is random. anywhere:
            any `n` edges of the model.
        seed: of the draws; the first circuits of a larger `count` are those of a smaller one.

    They too lose the edges on no path from the embedding to the logits, and mostly more than the chosen one does: compare `len`.

    Raises ValueError for what `top_edges` refuses, another `within`, and a `count` below 1.
    """
    if within not in ("layers", "anywhere"):
        raise ValueError(f"within must be 'layers' or 'anywhere', not {within!r}.")
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"count must be a whole number of 1 or more, not {count!r}.")
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
        mixed, dealt = np.zeros_like(kept), np.zeros_like(there)
        # Both orders go through the groups one after the other, this one at random within each.
        mixed[np.lexsort((rng(seed, "random circuits", number).random(len(group)), group))] = kept[by_group]
        dealt[there] = mixed
        found.append(Circuit.of(_on_paths(dealt, config), config))
    return found


def _parse(edge: str) -> tuple[Node, Node]:
    """Sender and receiver of an edge; ValueError if they are none, or the receiver reads before the sender writes."""
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
            f"a circuit is a matrix of bool by the {there.shape[0]} senders and {there.shape[1]} receivers of the model, not of "
            f"{matrix.dtype} and shape {matrix.shape}."
        )
    if (matrix & ~there).any():
        row, column = np.argwhere(matrix & ~there)[0]
        sender, receiver = senders(config)[row], receivers(config)[column]
        raise ValueError(f"there is no edge {_name(sender, receiver)}: {receiver} reads before {sender} writes.")
    return matrix


def _checked_scores(scores: Any, config: Any) -> Float[np.ndarray, "sender receiver"]:
    """The size of every edge's score, -inf where there is no edge."""
    sizes, there = np.abs(np.asarray(scores, np.float64)), exists(config)
    if sizes.shape != there.shape:
        raise ValueError(
            f"scores must be a matrix of the model's {there.shape[0]} senders and {there.shape[1]} receivers, not of shape "
            f"{sizes.shape}; take the mean over prompts first."
        )
    if (missing := np.argwhere(there & np.isnan(sizes))).size:
        edge = _name(senders(config)[missing[0][0]], receivers(config)[missing[0][1]])
        raise ValueError(f"the score of {edge} is NaN; score every edge, or give 0 to those to be left out.")
    return np.where(there, sizes, -np.inf)


def _top(sizes: Float[np.ndarray, "sender receiver"], n: int, config: Any) -> Edges:
    """The `n` largest."""
    there = exists(config)
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 <= n <= there.sum():
        raise ValueError(f"a circuit of this model has 0 to {there.sum()} edges, not {n!r}.")
    kept = np.zeros(sizes.size, bool)
    kept[np.argsort(-sizes.ravel(), kind="stable")[:n]] = True
    return kept.reshape(sizes.shape)


def _on_paths(matrix: Edges, config: Any) -> Edges:
    """The edges on a path from the embedding to the logits."""
    writing, reading = senders(config), receivers(config)
    inlets = _inlets(config)
    fed = np.zeros(len(writing), bool)  # from the embedding
    for row, sender in enumerate(writing):
        fed[row] = sender.site == "embed" or matrix[np.ix_(fed, inlets[sender])].any()
    leads = np.array([receiver.site == "logits" for receiver in reading])  # to the logits
    for row in reversed(range(len(writing))):
        leads[inlets[writing[row]]] |= (matrix[row] & leads).any()
    return matrix & fed[:, None] & leads


def _inlets(config: Any) -> dict[Node, Int[np.ndarray, " receiver"]]:
    """By which receivers each sender is entered."""
    inlets: dict[Node, list[int]] = {sender: [] for sender in senders(config)}
    for column, node in enumerate(receivers(config)):
        if node.site == "mlp_in":
            inlets[Node("mlp_out", node.layer)].append(column)
        for head in query_heads(node, config):
            inlets[Node("z", node.layer, head)].append(column)
    return {sender: np.array(columns, int) for sender, columns in inlets.items()}


# -- measures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CircuitRuns:
    """What circuits do to every base prompt.

    Attributes:
        metric: which number was kept.
        clean: it, of the base prompts, the full circuit.
        source: it, of the source prompts, the empty circuit; read with the base prompts' answers.
        circuits: it, of each circuit.
    """

    metric: str
    clean: Float32[np.ndarray, " prompt"]
    source: Float32[np.ndarray, " prompt"]
    circuits: Float32[np.ndarray, "circuit prompt"]

    @property
    def faithfulness(self) -> Float[np.ndarray, " circuit"]:
        """(mean of circuit - mean of source) / (mean of clean - mean of source): 0 is the empty circuit, 1 the full one.

        Below 0 and above 1 are possible. NaN where clean and source have the same mean. Marks et al. 2024.
        """
        clean, source, circuits = (x.mean(-1, dtype=np.float64) for x in (self.clean, self.source, self.circuits))
        if clean == source:
            return np.full_like(circuits, np.nan)
        return (circuits - source) / (clean - source)

    def interval(self, seed: int = 0, n_resamples: int = 2000) -> Interval:
        """Faithfulness with percentile bootstrap 95% intervals over prompts: arrays " circuit".

        A resample takes the same prompts of all runs. The circuit stays the same: of prompts that chose it, these are not the
        intervals for new ones.
        """
        if self.clean.mean(dtype=np.float64) == self.source.mean(dtype=np.float64):
            return Interval(*np.full((3, len(self.circuits)), np.nan))
        clean, source, circuits = (x.astype(np.float64) for x in (self.clean, self.source, self.circuits))
        return ratio_of_means(circuits - source, clean - source, rng(seed, "faithfulness"), n_resamples)


@dataclass(frozen=True)
class Curve:
    """Faithfulness by size.

    Attributes:
        sizes: how many edges were allowed, ascending.
        n_edges: how many of them were on a path from the embedding to the logits, and were run.
        runs: what the circuit of each size did to every prompt.
    """

    sizes: Int[np.ndarray, " size"]
    n_edges: Int[np.ndarray, " size"]
    runs: CircuitRuns

    @property
    def values(self) -> Float[np.ndarray, " size"]:
        """Faithfulness of each size."""
        return self.runs.faithfulness

    def area(self, scale: Scale = "log") -> float:
        """Area under the values by the trapezoidal rule, over log(size) or over size, divided by the width of that range.

        It is the mean faithfulness along the axis: 1 for circuits as faithful as the model at every size. Over the linear axis
        large circuits make up nearly all of it (Mueller et al. 2025, CPR); over the logarithmic one each doubling counts alike.
        Raises ValueError for fewer than two sizes and, on the logarithmic scale, for size 0.
        """
        if scale not in ("log", "linear"):
            raise ValueError(f"scale must be 'log' or 'linear', not {scale!r}.")
        if len(self.sizes) < 2:
            raise ValueError("an area needs two sizes or more.")
        if scale == "log" and self.sizes[0] == 0:
            raise ValueError("size 0 has no place on a logarithmic scale; leave it out, or use scale='linear'.")
        x = np.log(self.sizes) if scale == "log" else self.sizes.astype(float)
        return float(np.trapezoid(self.values, x) / (x[-1] - x[0]))


def run_circuit(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, " prompt"]:
    """The metric of every base prompt with all edges outside of the circuit carrying what they carry in its source prompt.

    Arguments and what is raised: as for `run_circuits`.
    """
    return run_circuits(model, [circuit], base, source, metric, batch_size=batch_size, progress=progress).circuits[0]


def run_circuits(
    model: PreTrainedModel,
    circuits: Iterable[Circuit | Edges],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> CircuitRuns:
    """Run the base prompts through each of some circuits, as the module's first lines define it.

    Args:
        model: a causal language model with a card; used in eval mode and left as it was, also after an error.
        circuits: each a `Circuit` or a matrix of bool by `graph.senders` and `graph.receivers`; they are not pruned.
        base, source: pairs of prompts of equal length. Metrics are read with the answers of base.
        metric: logit_diff, probability, rank, accuracy or kl (to the clean run).
        batch_size: prompts a forward pass, all of one length.

    One forward pass of base and of source, and one of every circuit, in which a layer's receivers that miss different edges pass
    its norm and projections one by one. Sums over senders are float32 whatever the model's dtype; what all senders add is held
    twice, senders x tokens x d_model a prompt.

    Raises ValueError, before the model runs: an edge that the model lacks, an unknown metric, prompts that are no pairs, a pair
    of unequal lengths (naming it), answers outside of the vocabulary, output projections that cannot be split by heads.
    """
    config = model.config
    matrices = [
        circuit.matrix(config) if isinstance(circuit, Circuit) else _checked_matrix(circuit, config)
        for circuit in circuits
    ]
    _check(model, base, source, metric, batch_size)
    if not matrices:
        raise ValueError("nothing to run: give at least one circuit.")
    clean, of_source = (np.empty(len(base), np.float32) for _ in range(2))
    found = np.empty((len(matrices), len(base)), np.float32)
    by_edge = _ByEdge(model)
    bar = tqdm(total=found.size, desc="circuits", unit="prompt", disable=not progress)
    with bar, evaluating(model), no_gradients(model):
        for index in _of_one_length(base, batch_size):
            batch, ids = _rows(base, index), _rows(source, index).input_ids
            clean_logits = by_edge(batch.input_ids)[0]
            measured = partial(_measured, metric, batch, clean_logits)
            source_logits, carried = by_edge(ids)
            clean[index], of_source[index] = measured(clean_logits), measured(source_logits)
            for number, matrix in enumerate(matrices):
                logits, _ = by_edge(batch.input_ids, by_edge.exists & ~matrix, carried)
                found[number, index] = measured(logits)
                bar.update(len(index))
    return CircuitRuns(metric, clean, of_source, found)


def faithfulness(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    **options: Any,
) -> float:
    """How much of what sets base apart from source the circuit brings about by itself (`CircuitRuns.faithfulness`).

    Arguments and what is raised: as for `run_circuits`.
    """
    return float(run_circuits(model, [circuit], base, source, metric, **options).faithfulness[0])


def completeness(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    **options: Any,
) -> float:
    """The faithfulness of all edges outside of the circuit: near 0 if it misses nothing (Marks et al. 2024).

    Arguments and what is raised: as for `run_circuits`.
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
    metric: str = "logit_diff",
    *,
    complement: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Curve:
    """Faithfulness of the circuits that `top_edges` makes of the scores, by their size.

    Args:
        sizes: how many edges; by default 1, 2, 4, ... and all.
        complement: run what each circuit leaves out instead, so that the values are completeness.

    Other arguments and what is raised: as for `top_edges` and `run_circuits`; and ValueError for no size, or one given twice.
    """
    config = model.config
    there = exists(config)
    if sizes is None:
        sizes = [*(2**power for power in range(int(there.sum() - 1).bit_length())), int(there.sum())]
    ascending = sorted(sizes)
    if not ascending or len(set(ascending)) < len(ascending):
        raise ValueError(f"give one or more sizes, each once, not {list(sizes)}.")
    magnitudes = _checked_scores(scores, config)
    kept = [_on_paths(_top(magnitudes, n, config), config) for n in ascending]
    run = [there & ~matrix for matrix in kept] if complement else kept
    runs = run_circuits(model, run, base, source, metric, batch_size=batch_size, progress=progress)
    return Curve(np.array(ascending), np.array([int(matrix.sum()) for matrix in kept]), runs)


# -- running -----------------------------------------------------------------------------------------------------------


class _Carried:
    """What senders add in a run, as it comes, and what that changes in the streams of receivers that miss some of it.

    `held` is what each sender has added so far, `batch sender pos d_model`; in a run with edges outside, less what it adds in the
    source prompts' run.
    """

    def __init__(
        self,
        outside: Edges | None,
        source: Float[Tensor, "batch sender pos d_model"] | None,
        held: Float[Tensor, "batch sender pos d_model"],
    ) -> None:
        self.outside, self.source, self.held = outside, source, held
        self._count = 0

    def write(self, added: Float[Tensor, "batch some pos d_model"]) -> None:
        """The next senders write."""
        those = slice(self._count, self._count + added.shape[1])
        added = added.to(self.held)
        self.held[:, those] = added if self.source is None else added - self.source[:, those]
        self._count = those.stop

    def missed(self, readers: slice) -> tuple[Bool[np.ndarray, "sender kind"], Int[np.ndarray, " receiver"]]:
        """Which senders some receivers miss, each kind of them once, and the kind of each receiver."""
        if self.outside is None:
            return np.zeros((self._count, 1), bool), np.zeros(readers.stop - readers.start, int)
        kinds, which = np.unique(self.outside[: self._count, readers], axis=1, return_inverse=True)
        return kinds, which.reshape(-1)

    def moved(
        self, stream: Float[Tensor, "batch pos d_model"], missed: Bool[np.ndarray, "sender kind"]
    ) -> Float[Tensor, "batch kind pos d_model"]:
        """A stream as receivers find it that miss these senders."""
        if not missed.any():
            return stream[:, None].expand(-1, missed.shape[1], -1, -1)
        weights = torch.from_numpy(missed).to(self.held)
        change = torch.einsum("bspd,sk->bkpd", self.held[:, : self._count, -stream.shape[1] :], weights)
        return (stream[:, None].float() - change.to(stream.device)).to(stream.dtype)


class _ByEdge:
    """A model that runs with an input of its own for every receiver, on prompts of one length."""

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
        outside: Edges | None = None,
        source: Float[Tensor, "batch sender pos d_model"] | None = None,
    ) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "batch sender pos d_model"]]:
        """The last logits with the edges outside carrying what `source` holds; and, without these two, what each sender adds."""
        hidden = self.replay.embed(ids.to(self.replay.device))
        held = hidden.new_empty(len(hidden), len(self.exists), *hidden.shape[1:], dtype=torch.float32)
        carried = _Carried(outside, source, held)
        carried.write(hidden[:, None])
        for layer in range(self.replay.n_layers):
            hidden = self._block(layer, hidden, carried)
        missed, _ = carried.missed(self._readers["logits", None])
        return self.replay.logits(carried.moved(hidden[:, -1:], missed)[:, 0, 0]), carried.held

    def _block(self, layer: int, hidden: Float[Tensor, "batch pos d_model"], carried: _Carried) -> Tensor:
        """One block: queries, keys, values and the MLP's input from streams of their own, the rest the model's."""
        seen: dict[str, Tensor] = {}
        edits = self._projections(layer, hidden, carried)
        # An edit that only looks: what the MLP adds, behind a post-norm if there is one.
        edits["mlp_out"] = lambda x: seen.__setitem__("mlp_out", x.clone())

        def read_by_mlp(stream: Tensor) -> Tensor:
            carried.write(self._shares(layer, seen))
            missed, _ = carried.missed(self._readers["mlp_in", layer])
            return carried.moved(stream, missed)[:, 0]

        at, card = ("resid_mid", layer), self.replay.card
        with Taps(self.replay.model, card, [at]), ExitStack() as hooks:
            visit(self.replay.model, at, read_by_mlp, hooks)
            hidden = self.replay.block(layer, hidden, (0, hidden.shape[1]), Past(), edits=edits, seen=seen)
        carried.write(seen["mlp_out"][:, None])
        return hidden

    def _projections(
        self, layer: int, hidden: Float[Tensor, "batch pos d_model"], carried: _Carried
    ) -> dict[str, Callable[[Tensor], Any]]:
        """Edits that put in each head's q, k and v, made of its own stream; none where no head misses anything."""
        groups = {site: self._readers[site, layer] for site in ("q", "k", "v")}
        first, last = groups["q"].start, groups["v"].stop
        missed, kind_of = carried.missed(slice(first, last))
        if not missed.any():
            return {}
        streams = carried.moved(hidden, missed)
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
        """q, k or v of every head side by side, each from the stream of its kind."""
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


def _rows(prompts: TokenizedPrompts, index: Sequence[int]) -> Batch:
    """Some prompts of one length as a batch, in this order."""
    some = replace(
        prompts,
        input_ids=tuple(prompts.input_ids[i] for i in index),
        answer_ids=tuple(prompts.answer_ids[i] for i in index),
        positions=tuple(prompts.positions[i] for i in index),
    )
    return next(some.batches(len(index)))


def _measured(
    metric: str, batch: Batch, clean: Float[Tensor, "batch vocab"], logits: Float[Tensor, "batch vocab"]
) -> Float32[np.ndarray, " batch"]:
    return METRICS[metric](logits, batch, clean).float().cpu().numpy()


def _check(
    model: PreTrainedModel, base: TokenizedPrompts, source: TokenizedPrompts, metric: str, batch_size: int
) -> None:
    """Raise ValueError for what can be wrong with a run besides its circuits."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose among {', '.join(METRICS)}.")
    # Metrics need no gradient here, so that any will do for the checks of everything else.
    check_edges(model, base, source, "logit_diff", "eap", 1)
    base.batches(batch_size)
    n_vocab = model.get_output_embeddings().weight.shape[0]
    for pair, ids in enumerate(base.answer_ids):
        if not 0 <= min(ids) <= max(ids) < n_vocab:
            raise ValueError(
                f"the answers of pair {pair} have the ids {ids[0]} and {ids[1]} but the vocabulary has {n_vocab} tokens; use "
                "the model's own tokenizer."
            )
