"""Edge attribution: the effect of patching each edge, estimated for all edges at once from gradients.

    scores = edge_attribution(model, base, source)                               # EAP (Syed et al. 2023)
    scores = edge_attribution(model, base, source, method="eap_ig_inputs")       # integrated gradients (Hanna et al. 2024)

Base and source are two prompt sets, paired by their order. The score of an edge estimates delta = M(base) - M(base, edge patched)
for a metric M. The cost does not depend on the number of edges, apart from a sum at the end. Products and sums are in float32
whatever the dtype of the model, which is restored afterwards, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import FIELD_NAMES, Taps, card_of, head_shares, n_heads, n_layers
from pyvene_ext.engine.measure import Metric, MetricLike, as_metric, check_metric
from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.engine.resolve import check_pairs_differ
from pyvene_ext.engine.results import Shown, Summary, count, strongest_rows, table
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.methods.attribution.gradients import ADDS, check_differentiable, metric_total
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import (
    SIDE_BY_SIDE,
    Where,
    check_projections,
    head_entries,
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

# A receiver's own input, and the residual stream that it is computed from.
_READS = {"q": "query_output", "k": "key_output", "v": "value_output", "mlp_in": "mlp_input", "logits": "block_output"}
_STREAM = {"q": "block_input", "k": "block_input", "v": "block_input", "mlp_in": "resid_mid", "logits": "block_output"}


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

    This takes two forward passes without a graph, one forward and backward pass per step, and for every receiver one backward
    pass through its own norm and projection. Memory: the contributions of all senders, senders x tokens x d_model in float32,
    twice per batch.

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
    exists = torch.from_numpy(edge_exists(*nodes))
    scores = np.empty((*exists.shape, len(base)), np.float32)
    pairs = zip(base.batches(batch_size, "right"), source.batches(batch_size, "right"), strict=True)
    bar = progress_bar(len(base), "prompt", method, shown=progress)
    with bar, evaluating(model), torch.inference_mode(False):
        model.requires_grad_(False)
        for batch, of_source in pairs:
            assert batch.index == of_source.index  # lengths are equal, so both are sorted alike
            changes, clean = _changes(model, batch, of_source)
            found = torch.zeros(len(batch.index), *exists.shape, device=changes.device)
            for stage, counted in _stages(model, method):
                count = steps if stage else 1
                for k in range(1, count + 1):
                    run = _GradientRun(model, batch, metric, clean, stage, changes, 1 - k / count)
                    found -= run.products(changes, counted, exists) / count
            found.masked_fill_(~exists.to(found.device), torch.nan)
            scores[:, :, batch.index] = found.permute(1, 2, 0).cpu().numpy()
            bar.update(len(batch.index))
    return EdgeScores(*nodes, scores, metric.label, method)


class _Stage(NamedTuple):
    """Senders that write at the same point, and the component where what they write can be changed."""

    where: Where
    senders: slice


def _stages(model: PreTrainedModel, method: EdgeMethod) -> list[tuple[_Stage | None, slice]]:
    """For each series of runs the stage that is interpolated, if any, and the senders whose edges it scores."""
    each, heads = n_heads(model.config) + 1, n_heads(model.config)
    embed = _Stage(("block_input", 0), slice(0, 1))
    everything = slice(0, 1 + n_layers(model.config) * each)
    if method == "eap":
        return [(None, everything)]
    if method == "eap_ig_inputs":
        return [(embed, everything)]
    stages = [embed]
    for layer in range(n_layers(model.config)):
        first = 1 + layer * each
        stages.append(_Stage((ADDS[0], layer), slice(first, first + heads)))
        stages.append(_Stage((ADDS[1], layer), slice(first + heads, first + each)))
    return [(stage, stage.senders) for stage in stages]


class _ReceiverGroup(NamedTuple):
    """Receivers that read through one module: all q of a layer, or its MLP."""

    site: str
    layer: int
    receivers: slice
    reads: Where
    stream: Where


def _receiver_groups(model: PreTrainedModel) -> Iterator[_ReceiverGroup]:
    first = 0
    for (site, layer), nodes in groupby(receivers(model.config), lambda node: (node.site, node.layer)):
        at = n_layers(model.config) - 1 if layer is None else layer
        group = slice(first, first := first + len(list(nodes)))
        yield _ReceiverGroup(site, at, group, (_READS[site], at), (_STREAM[site], at))


class _GradientRun:
    """A forward pass on base, shifted towards source by `share` at one stage, and the metric's gradient at every receiver."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        metric: Metric,
        clean: Float[Tensor, "batch vocab"],
        stage: _Stage | None,
        changes: Float[Tensor, "batch sender pos d_model"],
        share: float,
    ) -> None:
        self.model, self.groups = model, list(_receiver_groups(model))
        with ExitStack() as hooks, torch.enable_grad():
            places = {where for group in self.groups for where in (group.reads, group.stream)}
            hooks.enter_context(Taps(model, card_of(model), [*places, *([stage.where] if stage else ())]))
            if stage is not None:
                shift = share * changes[:, stage.senders].sum(1)
                hook_component(model, stage.where, lambda x: (x.float() + shift.to(x.device)).to(x.dtype), hooks)
            self.seen = record_activations(model, places, hooks, graph=True)
            self.total = metric_total(metric, model, batch, clean)

    def products(
        self,
        changes: Float[Tensor, "batch sender pos d_model"],
        counted: slice,
        exists: Bool[Tensor, "sender receiver"],
    ) -> Float[Tensor, "batch sender receiver"]:
        """Multiply the changes of some senders by the gradient at every receiver.

        Args:
            changes: source minus base of every sender's contribution.
            counted: the senders whose edges are scored.
            exists: where there is an edge.

        Returns:
            The products; 0 for other senders and where there is no edge.
        """
        products = changes.new_zeros(len(changes), *exists.shape)
        groups = [group for group in self.groups if exists[counted, group.receivers.start].any()]
        total_at = torch.autograd.grad(self.total, [self.seen[group.reads] for group in groups], retain_graph=True)
        for group, gradient in zip(groups, total_at, strict=True):
            # Senders are ordered as they write, so those that reach the receiver come first.
            those = slice(counted.start, min(counted.stop, int(exists[:, group.receivers.start].sum())))
            in_stream = self._in_stream(group, gradient).to(changes.device)
            products[:, those, group.receivers] = changes[:, those].flatten(2) @ in_stream.flatten(2).transpose(1, 2)
        return products

    def _in_stream(
        self, group: _ReceiverGroup, gradient: Float[Tensor, "batch pos width"]
    ) -> Float[Tensor, "batch receiver pos d_model"]:
        """The gradient at the stream through each receiver alone: back through its projection and norm.

        Both lie between tensors that the forward pass has kept, so that its own graph connects the two.
        """
        if group.reads == group.stream:
            return gradient[:, None].float()
        reads, stream = self.seen[group.reads], self.seen[group.stream]
        parts: Iterable[Any] = [slice(None)]
        if group.site in SIDE_BY_SIDE:
            parts = head_entries(self.model, FIELD_NAMES[group.site], reads.shape[-1])
        found: list[Tensor] = []
        for part in parts:
            own = torch.zeros_like(gradient)
            own[..., part] = gradient[..., part]
            found += torch.autograd.grad(reads, stream, own, retain_graph=True)
        return torch.stack(found, 1).float()


def _changes(
    model: PreTrainedModel, base: Batch, source: Batch
) -> tuple[Float[Tensor, "batch sender pos d_model"], Float[Tensor, "batch vocab"]]:
    """Source minus base of what every sender adds to the stream, and the base run's last logits.

    Padding comes after the real tokens and gets no gradient, so its values do not matter.
    """
    changes, _ = _contributions(model, source)
    of_base, clean = _contributions(model, base)
    changes -= of_base
    return changes, clean


@torch.no_grad()
def _contributions(
    model: PreTrainedModel, batch: Batch
) -> tuple[Float[Tensor, "batch sender pos d_model"], Float[Tensor, "batch vocab"]]:
    """What every sender adds to the residual stream, in float32, and the last logits."""
    card, layers, device = card_of(model), range(n_layers(model.config)), input_device(model)
    normed: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        places = {("block_input", 0)}
        for layer in layers:
            places |= {("attention_value_output", layer), ("mlp_contribution", layer)}
            if card.post_norm_scale is not None:
                norm = card.module(model, "attention_contribution", layer)
                hooks.enter_context(on_input(norm, partial(normed.__setitem__, layer)))
        hooks.enter_context(Taps(model, card, places))
        seen = record_activations(model, places, hooks)
        logits = answer_logits(model, batch)
    added = [seen["block_input", 0].float()[:, None]]
    for layer in layers:
        projection = card.module(model, "attention_value_output", layer)
        shares = head_shares(seen["attention_value_output", layer].float(), projection, n_heads(model.config))
        if card.post_norm_scale is not None:
            norm = card.module(model, "attention_contribution", layer)
            shares = shares * card.post_norm_scale(norm, normed[layer].float())[:, :, None]
        shares = shares * card.residual_scale(model.config)
        added += [shares.transpose(1, 2), seen["mlp_contribution", layer].float()[:, None]]
    return torch.cat([part.to(device) for part in added], 1), logits


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
    for name in (*_STREAM.values(), *_READS.values()):
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
