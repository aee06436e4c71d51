"""Edge attribution: the effect of patching each edge, estimated for all edges at once from gradients.

    scores = edge_attribution(model, base, source)                               # EAP (Syed et al. 2023)
    scores = edge_attribution(model, base, source, method="eap_ig_inputs")       # integrated gradients (Hanna et al. 2024)
    scores = edge_attribution(model, base, source, ablation="mean")              # of what mean ablation of an edge would do

The score of an edge estimates delta = M(base) - M(base, edge ablated) for a metric M: by default with what the sender adds on
source, whose prompts are paired with those of base by their order. The cost does not depend on the number of edges, apart from a
sum at the end. Products and sums are in float32 whatever the dtype of the model, which is restored afterwards, also after an
error.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, card_of, dimensions, n_heads, n_layers
from pyvene_ext.engine.measure import Metric, MetricLike, as_metric, check_metric
from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.engine.results import Shown, Summary, count, strongest_rows, table
from pyvene_ext.engine.sweep.plan import ActivationSizes, prompts_at_once
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.methods.attribution.gradients import ADDS, check_differentiable, metric_total
from pyvene_ext.methods.attribution.receivers import TOGETHER, Products, Receivers
from pyvene_ext.methods.attribution.senders import (
    AblationKind,
    Changes,
    Senders,
    Written,
    check_ablation,
)
from pyvene_ext.models.hooks import Where, hook_component, record_activations
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.graph import (
    Node,
    edge_exists,
    reaches,
    receivers,
    senders,
)
from pyvene_ext.stats.intervals import student_interval

if TYPE_CHECKING:
    import pandas as pd

EdgeMethod = Literal["eap", "eap_ig_inputs", "eap_ig_activations"]


@dataclass(frozen=True, repr=False)
class EdgeScores(Shown):
    """Estimates for every edge of a model.

    Attributes:
        senders: the nodes that write, in the order of `graph.senders`.
        receivers: the nodes that read, in the order of `graph.receivers`.
        per_prompt: estimates of delta = M(base) - M(base, with the sender's contribution to the receiver's input taken from
            source, or ablated otherwise); NaN where the sender does not reach the receiver.
        metric: its name.
        method: where gradients were taken.
    """

    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]
    per_prompt: Float32[np.ndarray, "sender receiver prompt"]
    metric: str
    method: EdgeMethod

    @cached_property
    def matrix(self) -> Float32[np.ndarray, "sender receiver"]:
        """The mean over prompts."""
        return self.per_prompt.mean(-1)

    @cached_property
    def exists(self) -> Bool[np.ndarray, "sender receiver"]:
        """Where there is an edge."""
        return edge_exists(self.senders, self.receivers)

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per edge and prompt.

        Returns:
            A table with the columns edge ("z.0.1->k.2.0"), sender, receiver, prompt and score (the estimate of delta).
        """
        rows, columns = np.nonzero(self.exists)
        sending, receiving = np.array([*map(str, self.senders)])[rows], np.array([*map(str, self.receivers)])[columns]
        n = self.per_prompt.shape[-1]
        edges = [f"{sender}->{receiver}" for sender, receiver in zip(sending, receiving, strict=True)]
        found = table({"edge": edges, "prompt": range(n)}, {"score": self.per_prompt[self.exists]})
        found.insert(1, "sender", sending.repeat(n))
        found.insert(2, "receiver", receiving.repeat(n))
        return found

    def summarise(self) -> Summary:
        """The edges with the largest mean estimates, with 95% intervals (Student's t over prompts)."""
        rows, columns = np.nonzero(self.exists)
        shown = strongest_rows(
            self.matrix[rows, columns],
            lambda i: f"{self.senders[rows[i]]}->{self.receivers[columns[i]]}",
            lambda some: student_interval(self.per_prompt[rows[some], columns[some]]),
        )
        size = f"{count(len(rows), 'edge')} x {count(self.per_prompt.shape[-1], 'prompt')}"
        title = f"EdgeScores ({self.method}) of {self.metric}: {size}"
        return Summary(title, ("strongest", "mean score", "95% interval"), shown)

    def edge(self, name: str) -> Float32[np.ndarray, " prompt"]:
        """Look up the estimates of one edge.

        Args:
            name: such as "z.0.1->k.2.0".

        Returns:
            One estimate per prompt.

        Raises:
            ValueError: the model has no edge of that name.
        """
        left, _, right = name.partition("->")
        sender, receiver = Node.parse(left), Node.parse(right)
        if sender not in self.senders or receiver not in self.receivers or not reaches(sender, receiver):
            raise ValueError(
                f"there is no edge {name!r}; name a sender of the model and a receiver that reads after it."
            )
        return self.per_prompt[self.senders.index(sender), self.receivers.index(receiver)]

    def ranked(self) -> list[tuple[str, float]]:
        """List every edge with its mean estimate, the largest in magnitude first."""
        places = np.argwhere(self.exists)
        values = self.matrix[self.exists]
        order = np.argsort(-np.abs(values), kind="stable")
        return [(f"{self.senders[places[i][0]]}->{self.receivers[places[i][1]]}", float(values[i])) for i in order]


def edge_attribution(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    method: EdgeMethod = "eap",
    *,
    ablation: AblationKind = "patching",
    steps: int = 5,
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Score every edge by edge attribution patching: -sum over positions of (u_ablated - u_base) . dM/d in_v for an edge u->v.

    u is what the sender adds to the residual stream (the embedding; a head's z W_O, after Gemma 2's post-norm with its scale
    frozen in each run; an MLP's output), in_v the stream that v reads, before its norm: one for each query head's q, each K/V
    head's k and v, each MLP, and the final stream for the logits. The gradient includes the norm.

    EAP takes a forward pass on source, and a forward and a backward pass on base, in which each head's gradient goes through its
    slice of a projection; then edges x tokens x d_model multiplications. Integrated gradients take as many pairs of passes on
    base as there are steps; `docs/howto/circuits.md` has figures. Projections that adapters or hooks change are differentiated
    once for each head, which takes several times as long.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        base: the prompts on which edges are ablated.
        source: what ablated edges are set to: for patching, prompts paired with `base` by order and of equal length; for mean,
            the prompts over whose tokens the mean is taken; for zero, None.
        metric: as for `run`, one differentiable number per prompt: logit_diff, probability, logit, or a function; for EAP-IG also
            kl, to the base run (with eap its gradient is 0).
        method: where gradients are taken.

            * eap (Syed et al. 2023): in the base run.
            * eap_ig_inputs (Hanna et al. 2024): the mean over k = 1 ... `steps` of runs whose embedding is
              ablated + k/steps (base - ablated).
            * eap_ig_activations (after Marks et al. 2024): the same, but one stage's contribution to the stream of the base run
              is interpolated, for the edges of its senders: the embedding, then layer by layer all heads together and the MLP.
              It takes 2L + 1 times as many passes; with many steps a stage's edges add up to the effect of patching it.

        ablation: what ablated edges carry, as `pyvene_ext.methods.attribution.senders` defines it.
        steps: of the two integrated gradients; 1 is eap.
        batch_size: prompts per forward and backward pass.
        memory: bytes besides the weights; fewer prompts are taken at once where `batch_size` of them need more. By default half
            of the weights, at least 512 MiB. Most is taken by the changes of all senders, senders x tokens x d_model in float32,
            and by the graph of the backward pass.
        progress: show a bar.

    Returns:
        One estimate per edge and prompt.

    Raises:
        ValueError: before the model runs, for a metric without a gradient, an unknown method or ablation, fewer than one step,
            prompts that are not pairs or of unequal lengths, output projections that cannot be split by heads, and too little
            memory for one prompt.
    """
    metric = as_metric(metric)
    check_edges(model, base, source, metric, method, steps, ablation)
    batch_size = edges_at_once(model, base, source, batch_size, memory)
    nodes = _nodes(model)
    exists = edge_exists(*nodes)
    scores = np.empty((*exists.shape, len(base)), np.float32)
    bar = progress_bar(len(base), "prompt", method, shown=progress)
    with bar, evaluating(model), torch.inference_mode(False):
        model.requires_grad_(False)
        sending, receiving = Senders(model), Receivers(model)
        constant = sending.constant(source, ablation, batch_size)
        # Pairs are of equal length, so that both sets are sorted alike.
        sources = repeat(None) if constant is not None else source.batches(batch_size, "right")  # type: ignore[union-attr]
        for batch, of_source in zip(base.batches(batch_size, "right"), sources, strict=False):
            ablated = _AblatedEdges(sending, batch, of_source, constant)
            found = _scores(ablated, receiving, batch, metric, _stages(model, method), steps)
            scores[:, :, batch.index] = found.permute(1, 2, 0).cpu().numpy()
            bar.update(len(batch.index))
    scores[~exists] = np.nan
    return EdgeScores(*nodes, scores, metric.label, method)


def edges_at_once(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    batch_size: int,
    memory: int | None,
) -> int:
    """Count the prompts that fit: the graph, changes of all senders, gradients of some receivers, and scores.

    Args:
        model: as for `edge_attribution`.
        base: as for `edge_attribution`.
        source: as for `edge_attribution`.
        batch_size: as for `edge_attribution`.
        memory: as for `edge_attribution`.

    Returns:
        The number of prompts.

    Raises:
        ValueError: a wrong size, and where not even one fits.
    """
    base.batches(batch_size)  # refuses a wrong size
    length = max(len(ids) for some in (base, source) if some is not None for ids in some.input_ids)
    n_senders, n_receivers = edge_exists(*_nodes(model)).shape
    heads = n_receivers // n_layers(model.config)  # receivers of a layer
    streams = 4 * length * dimensions(model.config)["d_model"] * (n_senders + TOGETHER + 2 * heads)
    each = ActivationSizes(model).graph(length) + streams + 4 * 4 * n_senders * n_receivers
    return prompts_at_once(model, len(base), each, batch_size, memory)


def _nodes(model: PreTrainedModel) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    return tuple(senders(model.config)), tuple(receivers(model.config))


class _Stage(NamedTuple):
    """A component where what some senders write can be changed, and the senders whose edges are scored with that."""

    where: Where
    changed: slice
    scored: slice


def _stages(model: PreTrainedModel, method: EdgeMethod) -> list[_Stage]:
    """The stages that are interpolated."""
    each, heads = n_heads(model.config) + 1, n_heads(model.config)
    embed, everything = slice(0, 1), slice(0, 1 + n_layers(model.config) * each)
    if method == "eap":
        return []
    if method == "eap_ig_inputs":
        return [_Stage(("block_input", 0), embed, everything)]
    stages = [_Stage(("block_input", 0), embed, embed)]
    for layer in range(n_layers(model.config)):
        first = 1 + layer * each
        for name, those in zip(ADDS, (slice(first, first + heads), slice(first + heads, first + each)), strict=True):
            stages.append(_Stage((name, layer), those, those))
    return stages


class _AblatedEdges:
    """What ablated edges carry in a batch."""

    def __init__(
        self,
        sending: Senders,
        base: Batch,
        source: Batch | None,
        constant: Float[Tensor, "sender d_model"] | None,
    ) -> None:
        """Run the source prompts, if values are taken from a run on them."""
        self.sending, self.constant = sending, constant
        self.source = None if source is None else sending.run(source)
        self.start = 0  # of the columns where anything changes
        if source is not None:
            # No sender differs before the first token that does, because no token sees later ones.
            differ = (base.input_ids != source.input_ids).any(0)
            self.start = int(differ.to(torch.uint8).argmax())  # 0 where all pairs of the batch are the same text twice

    @torch.no_grad()
    def changes(self, base: Written) -> Changes:
        """These values minus what senders add in the run on base; called once."""
        changes = self.sending.changes(base, self.source, self.start)
        self.source = None  # no longer needed
        return changes if self.constant is None else changes.add_(self.constant[:, None, None])


def _scores(
    ablated: _AblatedEdges, receiving: Receivers, base: Batch, metric: Metric, stages: list[_Stage], steps: int
) -> Float[Tensor, "batch sender receiver"]:
    """Score all edges on some prompts; anything where there is no edge.

    The last step of every stage is the untouched run on base, which is made once. It is all that EAP needs.
    """
    with torch.no_grad():
        clean = answer_logits(receiving.model, base) if stages and "clean" in metric.needs else None
    start = ablated.start
    run = _GradientRun(receiving, base, metric, clean, start, recorded=ablated.sending)
    changes = ablated.changes(run.written)
    found = -run.products(changes, slice(0, len(changes)))
    del run
    if not stages:
        return found
    found /= steps
    for stage in stages:
        change = changes[stage.changed].sum(0)
        for k in range(1, steps):
            shift = stage.where, (1 - k / steps) * change
            found -= _GradientRun(receiving, base, metric, clean, start, shift).products(changes, stage.scored) / steps
    return found


class _GradientRun:
    """A forward pass on base, maybe shifted at one place, and the metric's gradient at every receiver."""

    def __init__(
        self,
        receiving: Receivers,
        batch: Batch,
        metric: Metric,
        clean: Float[Tensor, "batch vocab"] | None,
        start: int,
        shifted: tuple[Where, Float[Tensor, "batch pos d_model"]] | None = None,
        recorded: Senders | None = None,
    ) -> None:
        model = receiving.model
        self.receiving = receiving
        # The graph refers to this list and not to this run, in a circle with which it would never be freed.
        self.found: list[Products] = []
        found = self.found
        places = [*receiving.watched, *(recorded.places if recorded else ()), *([shifted[0]] if shifted else ())]
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(Taps(model, card_of(model), places))
            if shifted is not None:
                hook_component(model, shifted[0], partial(_shift, shifted[1], start), hooks)
            if recorded is not None:
                self.written = recorded.record(hooks)
            self.seen = record_activations(model, receiving.streams, hooks, graph=True)
            receiving.separate(self.seen, start, lambda: found[0], hooks)
            self.total = metric_total(metric, model, batch, clean)

    def products(self, changes: Changes, scored: slice) -> Float[Tensor, "batch sender receiver"]:
        """Multiply the changes of senders by the gradient at every receiver; this frees the graph.

        Args:
            changes: source minus base of every sender's contribution.
            scored: the senders whose edges are scored.

        Returns:
            The products; 0 for other senders, and anything where there is no edge.
        """
        self.found.append(Products(self.receiving, changes, scored))
        torch.autograd.grad(self.total, self.seen["block_input", 0])
        return self.found[0].sums()


def _shift(by: Float[Tensor, "batch pos d_model"], start: int, x: Float[Tensor, "batch column d_model"]) -> Tensor:
    """Add to the columns from `start` on, in float32."""
    return torch.cat([x[:, :start], (x[:, start:].float() + by.to(x.device)).to(x.dtype)], 1)


def check_edges(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike,
    method: str,
    steps: int,
    ablation: str = "patching",
) -> None:
    """Check the arguments of `edge_attribution`; nothing is run.

    Args:
        model: as for `edge_attribution`.
        base: as for `edge_attribution`.
        source: as for `edge_attribution`.
        metric: as for `edge_attribution`.
        method: as for `edge_attribution`.
        steps: as for `edge_attribution`.
        ablation: as for `edge_attribution`.

    Raises:
        ValueError: for whatever `edge_attribution` refuses.
    """
    if method not in get_args(EdgeMethod):
        raise ValueError(f"unknown method {method!r}; choose among {', '.join(get_args(EdgeMethod))}.")
    whole_number("steps", steps, 1)
    check_ablation(model, base, source, ablation)
    check_differentiable(check_metric(model, base, metric), model.dtype, first_order=method == "eap" or steps == 1)
