"""ACDC: remove edges one at a time, from the logits backwards, wherever the output hardly changes (Conmy et al. 2023).

    found = acdc(model, clean, corrupt, tau=0.01)                        # KL from the model may rise by less than tau an edge
    found = acdc(model, clean, corrupt, "logit_diff", tau=0.1)           # the mean metric may move by less than tau
    found.circuit, found.to_frame()

    start = top_edges(scores, 2000, model.config)                        # EAP first, then ACDC on its edges
    print(acdc_passes(model.config, start))                              # what it will cost
    found = acdc(model, clean, corrupt, tau=0.01, start_from=start)

The circuit H is at first the whole model, or `start_from`. Receivers are visited in reverse of the order in which they read: the
logits, then, from the last layer to the first, the MLP's input and every v, k and q, the last head first. Of a receiver the edge
from the last sender is tried first (`order` turns it), as the authors' command line does. An edge e is removed for good if

    kl                         KL(model || H without e) - KL(model || H) < tau
    others, by "magnitude"     |m(H without e) - m(H)| < tau
    others, by "value"         m(H) - m(H without e) < tau, so that edges that hinder go whatever they do

where kl and the metric m are means over prompts at the last token. The first is the paper's algorithm 1; its code runs the others
as `--abs-value-threshold` and as the default for a metric to be maximised. Edges into what no longer reaches the logits are
removed without a run, as the output does not depend on them. (Where a norm follows attention's output projection, the heads of a
layer change each other's shares, so that all of them count as reaching the logits while one does.)

Receivers before the one that is visited read what they read in the first circuit, so that runs start at its layer. Several
removals are run side by side: row k is H without edge k and without those before it that are expected to go. Rows up to the first
whose decision is not the expected one are those that one edge at a time would have run; the others are discarded, and only tell
what to expect next. Decisions are therefore those of the sequential order, except where rounding, which depends on how many rows
run together, moves a change of tau itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from transformers import PreTrainedModel

from modelcards import dimensions, n_layers
from pyvene_ext.engine.measure import METRICS, Metric, MetricLike, as_array, check_metric
from pyvene_ext.engine.sweep.plan import METRIC_COPIES, MIB, check_memory, default_budget
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.methods.attribution.senders import AblationKind, check_ablation
from pyvene_ext.methods.circuits.acdc_run import AcdcRun
from pyvene_ext.methods.circuits.choosing import By
from pyvene_ext.methods.circuits.circuit import Circuit, Edges, edge_name, entry_receivers, exists, matrix_of
from pyvene_ext.methods.circuits.edgewise import Ablated, EdgewiseModel, PlainRun
from pyvene_ext.methods.circuits.running import AblatedValues, of_one_length
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.graph import receivers, senders

Order = Literal["latest", "earliest"]
Edge = tuple[int, int]  # row and column of the matrix
MEMORY = 0.98  # of how often edges went as expected, from one edge to the next
ROWS_MEMORY = 2 * 2**30  # bytes for circuits side by side, by default


class Passes(NamedTuple):
    """What ACDC costs, in forward passes over all prompts.

    Attributes:
        least: all edges into the logits go at once.
        one_by_one: every edge is run alone, and none is removed without a run.
        most: as many runs again are discarded.
    """

    least: float
    one_by_one: float
    most: float


def acdc_passes(config: Any, start_from: Circuit | Edges | None = None) -> Passes:
    """Bound the cost of ACDC before it runs.

    Args:
        config: the model's config.
        start_from: as for `acdc`.

    Returns:
        The bounds, for patching. A test of an edge into layer l of L costs 1 - l/L passes over the prompts.
    """
    layers = n_layers(config)
    plain = 2.0 if start_from is None else 3.0
    starts = np.array([layers if node.layer is None else node.layer for node in receivers(config)])
    at_first = exists(config) if start_from is None else matrix_of(start_from, config)
    tests = float((at_first.sum(0) * (1 - starts / layers)).sum())
    return Passes(plain, plain + tests, plain + 2 * tests)


def acdc(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "kl",
    *,
    tau: float,
    by: By | None = None,
    start_from: Circuit | Edges | None = None,
    order: Order = "latest",
    ablation: AblationKind = "patching",
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> AcdcRun:
    """Find a circuit by ACDC, as the module's docstring defines it.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        base: the prompts that are run; the metric is read with their answers.
        source: what removed edges are set to, as for `run_circuits`.
        metric: kl, or one number per prompt as for `run`.
        tau: the threshold, above 0; in nats for kl, else in units of the metric.
        by: magnitude (the default) or value, for metrics other than kl.
        start_from: only the edges of this circuit are tested, the others being removed from the start.
        order: the senders of a receiver that are tried first: those that write latest or earliest.
        ablation: what removed edges carry, as for `run_circuits`.
        batch_size: prompts per forward pass and circuit, all of one length.
        memory: of the working memory, in bytes besides the weights. By default what is kept of every prompt (the contributions
            of all senders, twice), and 2 GiB for circuits side by side. The results do not depend on it.
        progress: show a bar.

    Returns:
        The circuit, and what was tested in which order.

    Raises:
        ValueError: before the model runs, for whatever `run_circuits` refuses, a `tau` that is not above 0, a `by` for kl, an
            unknown `by` or `order`, a `start_from` without an edge into the logits, and prompts that do not fit `memory`.
    """
    config = model.config
    at_first = exists(config) if start_from is None else matrix_of(start_from, config)
    check_ablation(model, base, source, ablation)
    metric = check_metric(model, base, metric)
    by = _checked_rule(metric, tau, by, order)
    if not at_first[:, -1].any():
        raise ValueError("start_from has no edge into the logits, so that nothing can be tested; give one that has.")
    base.batches(batch_size)  # refuses a wrong size
    batch_size, side_by_side = batch_sizes(model, base, metric, batch_size, memory)
    with evaluating(model), no_gradients(model):
        runs = _Runs(EdgewiseModel(model), base, source, metric, ablation, batch_size, at_first)
        search = _Search(runs, at_first, tau, by, side_by_side)
        with progress_bar(int(at_first.sum()), "edge", "ACDC", shown=progress) as bar:
            for start, columns in _visits(runs.edgewise):
                before = search.kept.sum()
                edges = search.leading_on(columns, order)
                bar.update(int(before - search.kept.sum()))
                search.decide(edges, start, bar.update)
    nodes = tuple(senders(config)), tuple(receivers(config))
    unpruned = Circuit.of(search.kept, config)
    names, value, effect, kept = zip(*search.tested, strict=True)
    return AcdcRun(
        metric.label,
        float(tau),
        by,
        unpruned.pruned(config),
        unpruned,
        tuple(edge_name(nodes[0][row], nodes[1][column]) for row, column in names),
        np.array(value),
        np.array(effect),
        np.array(kept),
        search.at_first,
        search.value,
        len(base),
        runs.passes,
        search.discarded / runs.passes,
        *nodes,
    )


@dataclass(frozen=True)
class _Part:
    """Prompts of one length, and their run through the first circuit."""

    batch: Batch
    ablated: Ablated
    before: PlainRun


class _Runs:
    """The mean metric of circuits that differ from the first circuit from some layer on."""

    def __init__(
        self,
        edgewise: EdgewiseModel,
        base: TokenizedPrompts,
        source: TokenizedPrompts | None,
        metric: Metric,
        ablation: AblationKind,
        batch_size: int,
        first: Edges,
    ) -> None:
        self.edgewise, self.metric, self.n, self.parts = edgewise, metric, len(base), []
        values = AblatedValues(edgewise, source, ablation, batch_size)
        for index in of_one_length(base, batch_size):
            batch = base.batch(index)
            plain = edgewise.plain(batch.input_ids)
            ablated = values.of(index, plain)
            is_full = np.array_equal(first, edgewise.exists)
            before = plain if is_full else edgewise.one_circuit(batch.input_ids, first, ablated)
            self.parts.append(_Part(edgewise.with_clean(batch, plain, metric), ablated, before))

    @property
    def overhead(self) -> float:
        """What calls cost whatever the number of circuits, as a number of circuits."""
        tokens = sum(part.batch.input_ids.numel() for part in self.parts)
        return len(self.parts) * default_budget(self.edgewise.replay.model, None).call_tokens / 16 / tokens

    @property
    def passes(self) -> float:
        """What has been run so far, in forward passes over all prompts."""
        return self.edgewise.blocks_run / (self.n * self.edgewise.replay.n_layers)

    def means(self, kept: Bool[np.ndarray, "circuit sender receiver"], start: int) -> Float[np.ndarray, " circuit"]:
        """Average over prompts under each circuit; they are the first circuit at receivers before block `start`."""
        total = np.zeros(len(kept))
        for part in self.parts:
            lasts = self.edgewise.circuits(part.batch.input_ids, kept, part.ablated, part.before, start)
            values = [as_array(self.edgewise.read(last, part.batch, self.metric)) for last in lasts]
            total += np.sum(values, 1, dtype=np.float64)
        return total / self.n


class _Search:
    """The circuit so far, and the decisions that made it."""

    def __init__(self, runs: _Runs, first: Edges, tau: float, by: By | None, side_by_side: int) -> None:
        self.runs, self.kept, self.tau, self.by = runs, first.copy(), tau, by
        self.at_first = self.value = float(runs.means(first[None], runs.edgewise.replay.n_layers)[0])
        self.tested: list[tuple[Edge, float, float, bool]] = []
        self.side_by_side, self.discarded = side_by_side, 0.0
        self.spare = 0.0  # passes that may yet be discarded
        # How often edges went as expected, without and with a discarded run of theirs: [times, as expected].
        self.record = {False: [2.0, 1.0], True: [2.0, 1.0]}

    def leading_on(self, columns: list[int], order: Order) -> list[Edge]:
        """The edges into some receivers in the order of their tests; those that lead nowhere are removed."""
        config, edgewise = self.runs.edgewise.config, self.runs.edgewise
        writes: Any = self.kept.any(1)
        if edgewise.replay.card.post_norm_scale is not None:
            for layer in range(edgewise.replay.n_layers):
                heads, _ = edgewise.senders_of(layer)
                writes[heads] = writes[heads].any()
        live = {len(edgewise.exists[0]) - 1}  # the logits
        for row, entered in enumerate(entry_receivers(config).values()):
            live |= set(entered.tolist()) if writes[row] else set()
        self.kept[:, [column for column in columns if column not in live]] = False
        step = -1 if order == "latest" else 1
        return [(row, column) for column in columns for row in np.flatnonzero(self.kept[:, column])[::step].tolist()]

    def decide(self, edges: list[Edge], start: int, done: Callable[[int], Any]) -> None:
        """Test edges into receivers of one layer, in their order."""
        expected: dict[Edge, bool] = {}  # to be kept; others are expected to go
        while edges:
            some, rows, circuit = edges[: self._how_many(edges, expected, start)], [], self.kept
            for edge in some:
                rows.append(circuit.copy())
                rows[-1][edge] = False
                circuit = circuit if expected.get(edge) else rows[-1]
            before = self.runs.passes
            values = self.runs.means(np.stack(rows), start)
            cost = (self.runs.passes - before) / len(some)
            decided, value, as_expected = 0, self.value, True
            for edge, without in zip(some, values.tolist(), strict=True):
                effect = (without - value) if self.by is None else (value - without)
                keep = not (abs(effect) if self.by == "magnitude" else effect) < self.tau
                expectation = expected.get(edge, False)
                if as_expected:
                    self.tested.append((edge, without, effect, keep))
                    if not keep:
                        self.kept[edge], self.value = False, without
                    decided, as_expected = decided + 1, keep == expectation
                    record = self.record[edge in expected]
                    record[:] = MEMORY * record[0] + 1, MEMORY * record[1] + as_expected
                else:
                    expected[edge] = keep
                value = value if expectation else without
            self.discarded += cost * (len(some) - decided)
            self.spare += cost * (2 * decided - len(some))
            edges = edges[decided:]
            done(decided)

    def _how_many(self, edges: list[Edge], expected: Collection[Edge], start: int) -> int:
        """How many removals to run side by side: most decisions for the time, and never more discarded than used."""
        some = edges[: self.side_by_side]
        hits = [self.record[edge in expected][1] / self.record[edge in expected][0] for edge in some]
        decisions = np.cumsum(np.cumprod([1.0, *hits[:-1]]))
        best = 1 + int(np.argmax(decisions / (self.runs.overhead + np.arange(1, len(some) + 1))))
        each = 1 - start / self.runs.edgewise.replay.n_layers
        return min(best, 1 + int(self.spare / each)) if each else best


def _visits(edgewise: EdgewiseModel) -> list[tuple[int, list[int]]]:
    """The receivers in the order in which they are visited, those together whose edges lead on or nowhere at the same time.

    Returns:
        Of each group the block from which it makes a difference, and the receivers' columns.
    """
    found = [(edgewise.replay.n_layers, edgewise.readers["logits", None])]
    for layer in reversed(range(edgewise.replay.n_layers)):
        heads = slice(edgewise.readers["q", layer].start, edgewise.readers["v", layer].stop)
        found += [(layer, edgewise.readers["mlp_in", layer]), (layer, heads)]
    return [(start, list(range(columns.start, columns.stop))[::-1]) for start, columns in found]


def _checked_rule(metric: Metric, tau: float, by: By | None, order: str) -> By | None:
    if isinstance(tau, bool) or not isinstance(tau, int | float | np.number) or not (0 < tau < math.inf):
        raise ValueError(f"tau must be a finite number above 0, not {tau!r}.")
    if order not in ("latest", "earliest"):
        raise ValueError(f"order must be 'latest' or 'earliest', not {order!r}.")
    if metric == METRICS["kl"]:
        if by is not None:
            raise ValueError("kl is a distance from the model, whose rise is what tau bounds; leave out by.")
        return None
    if by not in (None, "magnitude", "value"):
        raise ValueError(f"by must be 'magnitude' or 'value', not {by!r}.")
    return by or "magnitude"


def batch_sizes(
    model: PreTrainedModel, prompts: TokenizedPrompts, metric: Metric, batch_size: int, memory: int | None
) -> tuple[int, int]:
    """Say how many prompts to run at once, and through how many circuits side by side.

    Args:
        model: as for `acdc`.
        prompts: all of them.
        metric: as for `acdc`.
        batch_size: the most prompts at once.
        memory: as for `acdc`.

    Returns:
        Both numbers.

    Raises:
        ValueError: what is kept of all prompts, and one circuit, do not fit.
    """
    check_memory(memory)
    there, layers, width = exists(model.config), n_layers(model.config), dimensions(model.config)["d_model"]
    per_layer = len(there) // layers
    lengths = list(map(len, prompts.input_ids))
    held = 4 * sum(lengths) * width * (2 * len(there) + 4 * layers)
    row = 4 * max(lengths) * width * (5 * len(there) + 12 * per_layer) + 16 * there.size
    head: Any = model.get_output_embeddings()
    row += 0 if metric.ids is not None else 4 * METRIC_COPIES * len(head.weight)
    free = ROWS_MEMORY if memory is None else memory - held
    if free < row:
        raise ValueError(
            f"{(memory or ROWS_MEMORY) / MIB:.0f} MiB do not hold the contributions of all senders to these prompts and one "
            f"circuit; give fewer or shorter prompts, or allow at least {(held + row) / MIB:.0f} MiB."
        )
    batch_size = min(batch_size, free // row, len(prompts))
    return batch_size, max(1, free // (row * batch_size))
