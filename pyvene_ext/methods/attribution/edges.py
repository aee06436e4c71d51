"""Attribution of edges: what patching one edge would do, for all of them at once, from gradients.

    scores = edge_attribution(model, base, source)                               # EAP (Syed et al. 2023)
    scores = edge_attribution(model, base, source, method="eap_ig_inputs")       # integrated gradients (Hanna et al. 2024)

Base and source are two prompt sets, prompt i of one being the partner of prompt i of the other. An edge's number estimates
delta = M(base) - M(base, edge patched), M being the metric. The cost does not hang on the number of edges, but for a sum at the
end. Products and sums are float32 whatever the model's dtype. The model is left as it was, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import FIELD_NAMES, Taps, card_of, head_shares, n_heads, n_layers
from pyvene_ext.engine.plain import METRICS
from pyvene_ext.methods.attribution.gradients import ADDS, answer_logits, check_differentiable
from pyvene_ext.methods.attribution.screen import DIFFERENTIABLE, SIDE_BY_SIDE
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import (
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
    reaches,
    receivers,
    senders,
)

EdgeMethod = Literal["eap", "eap_ig_inputs", "eap_ig_activations"]

# A receiver's own input, and the residual stream that it is made of.
_READS = {"q": "query_output", "k": "key_output", "v": "value_output", "mlp_in": "mlp_input", "logits": "block_output"}
_STREAM = {"q": "block_input", "k": "block_input", "v": "block_input", "mlp_in": "resid_mid", "logits": "block_output"}


@dataclass(frozen=True)
class EdgeScores:
    """Estimates for every edge of a model.

    Attributes:
        senders, receivers: the nodes, in the order of `graph.senders` and `graph.receivers`.
        per_prompt: estimates of delta = M(base) - M(base, with what the sender adds to the receiver's input taken from source);
            NaN where the sender does not reach the receiver.
        metric, method: as given.
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
        return _reached(self.senders, self.receivers)

    def edge(self, name: str) -> Float32[np.ndarray, " prompt"]:
        """The estimates of one edge, "z.0.1->k.2.0". Raises ValueError if the model has none of that name."""
        left, _, right = name.partition("->")
        sender, receiver = Node.parse(left), Node.parse(right)
        if sender not in self.senders or receiver not in self.receivers or not reaches(sender, receiver):
            raise ValueError(
                f"there is no edge {name!r}; name a sender and a receiver of the model that reads behind it."
            )
        return self.per_prompt[self.senders.index(sender), self.receivers.index(receiver)]

    def ranked(self) -> list[tuple[str, float]]:
        """Every edge with its mean estimate, the largest by size first."""
        places = np.argwhere(self.exists)
        values = self.matrix[self.exists]
        order = np.argsort(-np.abs(values), kind="stable")
        return [(f"{self.senders[places[i][0]]}->{self.receivers[places[i][1]]}", float(values[i])) for i in order]


def edge_attribution(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    method: EdgeMethod = "eap",
    *,
    steps: int = 5,
    batch_size: int = 8,
    progress: bool = True,
) -> EdgeScores:
    """Edge attribution patching: the score of an edge from u into v is -sum over positions of (u_source - u_base) . dM/d in_v.

    u is what the sender adds to the residual stream (the embedding; a head's z W_O, behind Gemma 2's post-norm with its scale
    frozen in each of the two runs; an MLP's output), in_v the stream that v reads, before its norm: one for each query head's q,
    each K/V head's k and v, each MLP, and the final stream for the logits. The norm counts in the gradient.

    Args:
        base, source: pairs of prompts of equal length.
        metric: logit_diff or probability; for EAP-IG also kl, to the base run (with eap its gradient is 0).
        method: where gradients are taken.

            * eap (Syed et al. 2023): in the base run.
            * eap_ig_inputs (Hanna et al. 2024): the mean over k = 1 ... `steps` of runs whose embedding is
              source + k/steps (base - source).
            * eap_ig_activations (after Marks et al. 2024): the same, but what is interpolated is what one stage adds to the
              stream of the base run, for the edges of its senders: the embedding, then layer by layer all heads together
              and the MLP. 2L + 1 times as many passes; with many steps a stage's edges add up to the effect of patching it.

        steps: of the two integrated gradients; 1 is eap.

    Two forward passes without a graph, and one forward and backward pass a step; further, for every receiver, one backward pass
    through its own norm and projection. Memory: what all senders add, senders x tokens x d_model float32 twice a batch.

    Raises ValueError, before the model runs: a metric that has no gradient, an unknown method, less than one step, prompts that
    are no pairs or of unequal lengths, and output projections that cannot be split by heads.
    """
    check_edges(model, base, source, metric, method, steps)
    nodes = tuple(senders(model.config)), tuple(receivers(model.config))
    reached = torch.from_numpy(_reached(*nodes))
    scores = np.empty((*reached.shape, len(base)), np.float32)
    pairs = zip(base.batches(batch_size, "right"), source.batches(batch_size, "right"), strict=True)
    bar = tqdm(total=len(base), desc=method, unit="prompt", disable=not progress)
    with bar, evaluating(model), torch.inference_mode(False):
        model.requires_grad_(False)
        for batch, of_source in pairs:
            assert batch.index == of_source.index  # lengths are equal, so both are sorted alike
            changes, clean = _changes(model, batch, of_source)
            found = torch.zeros(len(batch.index), *reached.shape, device=changes.device)
            for stage, counted in _paths(model, method):
                count = steps if stage else 1
                for k in range(1, count + 1):
                    run = _Run(model, batch, metric, clean, stage, changes, 1 - k / count)
                    found -= run.products(changes, counted, reached) / count
            found.masked_fill_(~reached.to(found.device), torch.nan)
            scores[:, :, batch.index] = found.permute(1, 2, 0).cpu().numpy()
            bar.update(len(batch.index))
    return EdgeScores(*nodes, scores, metric, method)


class _Stage(NamedTuple):
    """Senders that write at once, and where what they write can be changed."""

    where: Where
    senders: slice


def _paths(model: PreTrainedModel, method: EdgeMethod) -> list[tuple[_Stage | None, slice]]:
    """What is interpolated, if anything, and the senders whose edges are scored by that."""
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


class _Inlet(NamedTuple):
    """Receivers that read by one module: all q of a layer, its MLP."""

    site: str
    layer: int
    receivers: slice
    reads: Where
    stream: Where


def _inlets(model: PreTrainedModel) -> Iterator[_Inlet]:
    first = 0
    for (site, layer), nodes in groupby(receivers(model.config), lambda node: (node.site, node.layer)):
        at = n_layers(model.config) - 1 if layer is None else layer
        group = slice(first, first := first + len(list(nodes)))
        yield _Inlet(site, at, group, (_READS[site], at), (_STREAM[site], at))


class _Run:
    """A forward pass on base, moved by `share` of the way to source at one stage, and the metric's gradient at every receiver."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        metric: str,
        clean: Float[Tensor, "batch vocab"],
        stage: _Stage | None,
        changes: Float[Tensor, "batch sender pos d_model"],
        share: float,
    ) -> None:
        self.model, self.inlets = model, list(_inlets(model))
        with ExitStack() as hooks, torch.enable_grad():
            places = {where for inlet in self.inlets for where in (inlet.reads, inlet.stream)}
            hooks.enter_context(Taps(model, card_of(model), [*places, *([stage.where] if stage else ())]))
            if stage is not None:
                shift = share * changes[:, stage.senders].sum(1)
                hook_component(model, stage.where, lambda x: (x.float() + shift.to(x.device)).to(x.dtype), hooks)
            self.seen = record_activations(model, places, hooks, graph=True)
            self.total = METRICS[metric](answer_logits(model, batch), batch, clean).sum()

    def products(
        self,
        changes: Float[Tensor, "batch sender pos d_model"],
        counted: slice,
        reached: Bool[Tensor, "sender receiver"],
    ) -> Float[Tensor, "batch sender receiver"]:
        """What the counted senders change times the gradient, for every receiver; 0 elsewhere."""
        products = changes.new_zeros(len(changes), *reached.shape)
        inlets = [inlet for inlet in self.inlets if reached[counted, inlet.receivers.start].any()]
        total_at = torch.autograd.grad(self.total, [self.seen[inlet.reads] for inlet in inlets], retain_graph=True)
        for inlet, gradient in zip(inlets, total_at, strict=True):
            # Senders are in the order in which they write, so that those that reach are the first ones.
            those = slice(counted.start, min(counted.stop, int(reached[:, inlet.receivers.start].sum())))
            in_stream = self._in_stream(inlet, gradient).to(changes.device)
            products[:, those, inlet.receivers] = changes[:, those].flatten(2) @ in_stream.flatten(2).transpose(1, 2)
        return products

    def _in_stream(
        self, inlet: _Inlet, gradient: Float[Tensor, "batch pos width"]
    ) -> Float[Tensor, "batch receiver pos d_model"]:
        """The gradient at each receiver's input in the stream, by way of this receiver alone: back through projection and norm.

        These two lie between tensors that the forward pass has kept, so that its own graph leads back from one to the other.
        """
        if inlet.reads == inlet.stream:
            return gradient[:, None].float()
        reads, stream = self.seen[inlet.reads], self.seen[inlet.stream]
        parts: Iterable[Any] = [slice(None)]
        if inlet.site in SIDE_BY_SIDE:
            parts = head_entries(self.model, FIELD_NAMES[inlet.site], reads.shape[-1])
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

    Padding stands behind the real tokens and no gradient comes to it, so that it does not matter what is there.
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


def _reached(writing: Iterable[Node], reading: Iterable[Node]) -> Bool[np.ndarray, "sender receiver"]:
    reading = tuple(reading)
    return np.array([[reaches(sender, receiver) for receiver in reading] for sender in writing])


def check_edges(
    model: PreTrainedModel, base: TokenizedPrompts, source: TokenizedPrompts, metric: str, method: str, steps: int
) -> None:
    """Raise ValueError for whatever `edge_attribution` refuses; nothing is run."""
    card = card_of(model)
    for name in (*_STREAM.values(), *_READS.values()):
        card.component(model, name)
    if method not in get_args(EdgeMethod):
        raise ValueError(f"unknown method {method!r}; choose among {', '.join(get_args(EdgeMethod))}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, not {steps!r}.")
    check_tokenized(model, base, source)
    refuse_latent_steps(model, (*base.input_ids, *source.input_ids))
    check_differentiable(
        metric, DIFFERENTIABLE if method == "eap" or steps == 1 else (*DIFFERENTIABLE, "kl"), model.dtype
    )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model."
        )
    if not len(base) or len(base) != len(source):
        raise ValueError(
            f"there are {len(base)} base prompts and {len(source)} source prompts; give each base prompt its source."
        )
    for pair, (ids, of_source) in enumerate(zip(base.input_ids, source.input_ids, strict=True)):
        if not ids or len(ids) != len(of_source):
            raise ValueError(
                f"the base prompt of pair {pair} has {len(ids)} tokens and its source {len(of_source)}, so that their tokens do "
                "not correspond; leave the pair out."
            )
    check_projections(model)
