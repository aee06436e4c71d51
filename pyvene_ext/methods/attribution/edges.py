"""Edge attribution: the effect of patching each edge, estimated for all edges at once from gradients.

    scores = edge_attribution(model, base, source)                               # EAP (Syed et al. 2023)
    scores = edge_attribution(model, base, source, method="eap_ig_inputs")       # integrated gradients (Hanna et al. 2024)

Base and source are two prompt sets, paired by their order. The score of an edge estimates delta = M(base) - M(base, edge patched)
for a metric M. The cost does not depend on the number of edges, apart from a sum at the end. Products and sums are in float32
whatever the dtype of the model, which is restored afterwards, also after an error.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, card_of, n_heads, n_layers
from modelcards.attention_taps import output_weight
from pyvene_ext.engine.measure import Metric, MetricLike, as_metric, check_metric
from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.engine.resolve import check_pairs_differ
from pyvene_ext.engine.results import Shown, Summary, count, strongest_rows, table
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.methods.attribution.gradients import ADDS, check_differentiable, metric_total
from pyvene_ext.methods.attribution.receivers import Products, Receivers
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import (
    StopForward,
    Where,
    check_projections,
    hook_component,
    on_input,
    record_activations,
)
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized
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

# What receivers read, and the streams that it is computed from.
_NEEDED = ("block_input", "query_output", "key_output", "value_output", "resid_mid", "mlp_input", "block_output")


@dataclass(frozen=True, repr=False)
class EdgeScores(Shown):
    """Estimates for every edge of a model.

    Attributes:
        senders: the nodes that write, in the order of `graph.senders`.
        receivers: the nodes that read, in the order of `graph.receivers`.
        per_prompt: estimates of delta = M(base) - M(base, with the sender's contribution to the receiver's input taken from
            source); NaN where the sender does not reach the receiver.
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
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    method: EdgeMethod = "eap",
    *,
    steps: int = 5,
    batch_size: int = 8,
    progress: bool = True,
) -> EdgeScores:
    """Score every edge by edge attribution patching: -sum over positions of (u_source - u_base) . dM/d in_v for an edge u->v.

    u is what the sender adds to the residual stream (the embedding; a head's z W_O, after Gemma 2's post-norm with its scale
    frozen in each of the two runs; an MLP's output), in_v the stream that v reads, before its norm: one for each query head's q,
    each K/V head's k and v, each MLP, and the final stream for the logits. The gradient includes the norm.

    EAP takes a forward pass on source, and a forward and a backward pass on base, in which each head's gradient goes through its
    slice of a projection; then edges x tokens x d_model multiplications. Integrated gradients take as many pairs of passes on
    base as there are steps. `benchmarks/bench_attribution.py` gives, in forward passes, 2.8 for Gemma 3 270M (5,644 edges)
    and 3.8 for SmolLM2-135M (70,651). Memory: the changes of all senders, senders x tokens x d_model in
    float32 once per batch, and the gradients of 64 receivers or a layer's. What projections are computed by adapters or behind
    hooks is differentiated once for each head, which takes several times as long.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        base: the prompts that are patched.
        source: the prompts that contributions are taken from, paired with `base` by order and of equal length.
        metric: as for `run`, one differentiable number per prompt: logit_diff, probability, logit, or a function; for EAP-IG also
            kl, to the base run (with eap its gradient is 0).
        method: where gradients are taken.

            * eap (Syed et al. 2023): in the base run.
            * eap_ig_inputs (Hanna et al. 2024): the mean over k = 1 ... `steps` of runs whose embedding is
              source + k/steps (base - source).
            * eap_ig_activations (after Marks et al. 2024): the same, but one stage's contribution to the stream of the base run
              is interpolated, for the edges of its senders: the embedding, then layer by layer all heads together and the MLP.
              It takes 2L + 1 times as many passes; with many steps a stage's edges add up to the effect of patching it.

        steps: of the two integrated gradients; 1 is eap.
        batch_size: prompts per forward and backward pass.
        progress: show a bar.

    Returns:
        One estimate per edge and prompt.

    Raises:
        ValueError: before the model runs, for a metric without a gradient, an unknown method, fewer than one step, prompts that
            are not pairs or of unequal lengths, and output projections that cannot be split by heads.
    """
    metric = as_metric(metric)
    check_edges(model, base, source, metric, method, steps)
    nodes = tuple(senders(model.config)), tuple(receivers(model.config))
    exists = edge_exists(*nodes)
    scores = np.empty((*exists.shape, len(base)), np.float32)
    pairs = zip(base.batches(batch_size, "right"), source.batches(batch_size, "right"), strict=True)
    bar = progress_bar(len(base), "prompt", method, shown=progress)
    with bar, evaluating(model), torch.inference_mode(False):
        model.requires_grad_(False)
        receiving = Receivers(model)
        for batch, of_source in pairs:
            assert batch.index == of_source.index  # lengths are equal, so both are sorted alike
            found = _scores(receiving, batch, of_source, metric, _stages(model, method), steps)
            scores[:, :, batch.index] = found.permute(1, 2, 0).cpu().numpy()
            bar.update(len(batch.index))
    scores[~exists] = np.nan
    return EdgeScores(*nodes, scores, metric.label, method)


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


def _scores(
    receiving: Receivers, base: Batch, source: Batch, metric: Metric, stages: list[_Stage], steps: int
) -> Float[Tensor, "batch sender receiver"]:
    """Score all edges on some pairs; anything where there is no edge.

    The last step of every stage is the untouched run on base, which is made once. It is all that EAP needs.
    """
    model = receiving.model
    # No sender differs before the first token that does, because no token sees later ones.
    differ = (base.input_ids != source.input_ids).any(0)
    start = int(differ.to(torch.uint8).argmax())  # 0 where all pairs of the batch are the same text twice
    of_source = _run_source(model, source)
    with torch.no_grad():
        clean = answer_logits(model, base) if stages and "clean" in metric.needs else None
    run = _GradientRun(receiving, base, metric, clean, start, recorded=True)
    changes = _changes(receiving, run.written, of_source, start)
    del of_source
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


class _Written(NamedTuple):
    """What the contributions of a run's senders are computed from."""

    seen: dict[Where, Tensor]
    normed: dict[int, Tensor]  # what enters the norm behind attention's output projection, by layer, where there is one

    @classmethod
    def record(cls, model: PreTrainedModel, hooks: ExitStack) -> _Written:
        """Record them in the next forward pass; `Taps` of `_writes` are the caller's."""
        card = card_of(model)
        normed: dict[int, Tensor] = {}
        for layer in range(n_layers(model.config)) if card.post_norm_scale is not None else ():
            norm = card.module(model, "attention_contribution", layer)
            hooks.enter_context(on_input(norm, partial(normed.__setitem__, layer)))
        return cls(record_activations(model, _writes(model), hooks), normed)


def _writes(model: PreTrainedModel) -> list[Where]:
    """Where a model's senders write."""
    names = ("attention_value_output", "mlp_contribution")
    return [("block_input", 0), *((name, layer) for layer in range(n_layers(model.config)) for name in names)]


@torch.no_grad()
def _run_source(model: PreTrainedModel, batch: Batch) -> _Written:
    """Run source as far as its last sender writes."""

    def stop(_: Tensor) -> None:
        raise StopForward

    with ExitStack() as hooks, suppress(StopForward):
        hooks.enter_context(Taps(model, card_of(model), _writes(model)))
        written = _Written.record(model, hooks)
        hook_component(model, ("block_output", n_layers(model.config) - 1), stop, hooks)
        answer_logits(model, batch)
    return written


@torch.no_grad()
def _changes(
    receiving: Receivers, base: _Written, source: _Written, start: int
) -> Float[Tensor, "sender batch pos d_model"]:
    """Source minus base of what every sender adds to the stream from a column on, in float32.

    Padding comes after the real tokens and gets no gradient, so its values do not matter.
    """
    model = receiving.model
    card, heads, device = card_of(model), n_heads(model.config), input_device(model)

    def at(run: _Written, where: Where) -> Tensor:
        return run.seen[where].detach()[:, start:].float()

    embedded = at(source, ("block_input", 0)) - at(base, ("block_input", 0))
    changes = receiving.changes.take((len(receiving.exists), *embedded.shape), device)
    changes[0], first = embedded, 1
    for layer in range(n_layers(model.config)):
        of_heads = changes[first : first + heads]
        weight = output_weight(card.module(model, "attention_value_output", layer))
        assert weight is not None  # `check_projections` has checked it
        by_head = weight.detach().unflatten(0, (heads, -1)).float()
        z = [at(run, ("attention_value_output", layer)) for run in (source, base)]
        if card.post_norm_scale is None:
            # From the layer's device to the first one, as below.
            of_heads.flatten(1, 2).copy_(_by_head(z[0] - z[1], heads) @ by_head)
        else:
            norm = card.module(model, "attention_contribution", layer)
            scales = [
                card.post_norm_scale(norm, run.normed[layer].detach()[:, start:].float()) for run in (source, base)
            ]
            shares = [(_by_head(x, heads) @ by_head).view(of_heads.shape) for x in z]
            of_heads.copy_(shares[0].mul_(scales[0]).addcmul_(shares[1], scales[1], value=-1))
        if (multiplier := card.residual_scale(model.config)) != 1:
            of_heads *= multiplier
        mlp = "mlp_contribution", layer
        changes[first + heads].copy_(at(source, mlp) - at(base, mlp))
        first += heads + 1
    return changes


def _by_head(z: Float[Tensor, "batch pos width"], heads: int) -> Float[Tensor, "head token d_head"]:
    return z.unflatten(-1, (heads, -1)).flatten(0, 1).transpose(0, 1)


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
        recorded: bool = False,
    ) -> None:
        model = receiving.model
        self.receiving = receiving
        places = [*receiving.watched, *(_writes(model) if recorded else ()), *([shifted[0]] if shifted else ())]
        with ExitStack() as hooks, torch.enable_grad():
            hooks.enter_context(Taps(model, card_of(model), places))
            if shifted is not None:
                hook_component(model, shifted[0], partial(_shift, shifted[1], start), hooks)
            if recorded:
                self.written = _Written.record(model, hooks)
            self.seen = record_activations(model, receiving.streams, hooks, graph=True)
            receiving.separate(self.seen, start, lambda: self.found, hooks)
            self.total = metric_total(metric, model, batch, clean)

    def products(
        self, changes: Float[Tensor, "sender batch pos d_model"], scored: slice
    ) -> Float[Tensor, "batch sender receiver"]:
        """Multiply the changes of senders by the gradient at every receiver; this frees the graph.

        Args:
            changes: source minus base of every sender's contribution.
            scored: the senders whose edges are scored.

        Returns:
            The products; 0 for other senders, and anything where there is no edge.
        """
        self.found = Products(self.receiving, changes, scored)
        torch.autograd.grad(self.total, self.seen["block_input", 0])
        return self.found.sums()


def _shift(by: Float[Tensor, "batch pos d_model"], start: int, x: Float[Tensor, "batch column d_model"]) -> Tensor:
    """Add to the columns from `start` on, in float32."""
    return torch.cat([x[:, :start], (x[:, start:].float() + by.to(x.device)).to(x.dtype)], 1)


def check_edges(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike,
    method: str,
    steps: int,
) -> None:
    """Check the arguments of `edge_attribution`; nothing is run.

    Args:
        model: as for `edge_attribution`.
        base: as for `edge_attribution`.
        source: as for `edge_attribution`.
        metric: as for `edge_attribution`.
        method: as for `edge_attribution`.
        steps: as for `edge_attribution`.

    Raises:
        ValueError: for whatever `edge_attribution` refuses.
    """
    if method not in get_args(EdgeMethod):
        raise ValueError(f"unknown method {method!r}; choose among {', '.join(get_args(EdgeMethod))}.")
    whole_number("steps", steps, 1)
    check_pairs(model, base, source)
    check_differentiable(check_metric(model, base, metric), model.dtype, first_order=method == "eap" or steps == 1)


def check_edges_of(model: PreTrainedModel, *prompts: TokenizedPrompts) -> None:
    """Check that edges can be read in a model and on prompts.

    Args:
        model: as for `edge_attribution`.
        *prompts: tokenised prompt sets.

    Raises:
        ValueError: the model lacks a component that edges lead through, its output projections cannot be split by heads, or
            prompts are missing, not tokenised or not this model's.
    """
    card = card_of(model)
    for name in _NEEDED:
        card.component(model, name)
    check_tokenized(model, *prompts)
    for some in prompts:
        refuse_latent_steps(model, some.input_ids)
        if not len(some):
            raise ValueError("there are no prompts to read edges on; give one or more.")
    check_projections(model)


def check_pairs(model: PreTrainedModel, base: TokenizedPrompts, source: TokenizedPrompts) -> None:
    """Check that edges can be read in a model and on pairs of prompts.

    Args:
        model: as for `edge_attribution`.
        base: as for `edge_attribution`.
        source: as for `edge_attribution`.

    Raises:
        ValueError: for whatever `edge_attribution` refuses, except of metric and method.
    """
    check_edges_of(model, base, source)
    if len(base) != len(source):
        raise ValueError(
            f"there are {len(base)} base prompts and {len(source)} source prompts; give each base prompt its source."
        )
    for pair, (ids, of_source) in enumerate(zip(base.input_ids, source.input_ids, strict=True)):
        if len(ids) != len(of_source):
            raise ValueError(
                f"the base prompt of pair {pair} has {len(ids)} tokens and its source {len(of_source)}, so that their tokens do "
                "not correspond; leave the pair out."
            )
    check_pairs_differ(base, source)
