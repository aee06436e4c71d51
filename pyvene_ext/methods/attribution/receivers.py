"""The gradient at the stream through each receiver alone, found while one backward pass goes through the model.

In the forward pass, queries, keys, values and the MLP's input are cut off from the stream that they are computed from. In the
backward pass each of them gets its gradient, which is taken back to the stream for every receiver by itself. Their sum is what
the model's own backward pass would have given, and it goes on with that, so that nothing is computed twice.

For a head that is a product with its slice of the projection, the norm's gain included, less what lies along the stream, whose
length the norm ignores. Where there is no such weight or norm (adapters, hooks, blocks without a norm before attention), torch
goes back through the model's own modules, once for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import dimensions
from pyvene_ext.models.devices import Workspace
from pyvene_ext.models.hooks import Where, hook_component, on_output
from pyvene_ext.models.norms import WrittenNorm
from pyvene_ext.models.replay import Replay, splittable
from pyvene_ext.specs.graph import edge_exists, receiver_slices, receivers, senders

ReceiverParts = Float[Tensor, "receiver batch pos d_model"]
TOGETHER = 64  # receivers whose gradients are multiplied at once, if there are that many: a thinner product is slower


class Products:
    """Products of what senders change with the gradients at receivers, which come layer by layer, the last first."""

    def __init__(self, receiving: Receivers, changes: Float[Tensor, "sender batch pos d_model"], scored: slice) -> None:
        """Take changes; no product is made yet.

        Args:
            receiving: the model's receivers.
            changes: of every sender.
            scored: the senders whose edges are scored.
        """
        self._groups, self._changes, self._scored = receiving.groups, changes, scored
        # Senders are ordered as they write, so that those that reach a receiver come first.
        self._reaching = receiving.exists.sum(0).tolist()
        self._sums = changes.new_zeros(changes.shape[1], *receiving.exists.shape)
        widest = max(group.stop - group.start for group in self._groups)
        self._buffer = receiving.gradients.take((widest, *changes.shape[1:]), changes.device).zero_()
        self._group = self._groups[0]

    def slots(self, those: slice) -> ReceiverParts:
        """Where to write gradients.

        Args:
            those: receivers of one layer.

        Returns:
            A tensor to be filled, before others are asked for.
        """
        if those.start < self._group.start:
            self._multiply()
            self._group = next(group for group in self._groups if group.start <= those.start < group.stop)
            self._buffer.zero_()
        return self._buffer[those.start - self._group.start : those.stop - self._group.start]

    def sums(self) -> Float[Tensor, "batch sender receiver"]:
        """The products, once all gradients are there; 0 for other senders, and anything where there is no edge."""
        self._multiply()
        return self._sums

    def _multiply(self) -> None:
        group, scored = self._group, self._scored
        some = slice(scored.start, min(scored.stop, self._reaching[group.stop - 1]))
        for row in range(len(self._sums)) if some.start < some.stop else ():
            changes, parts = (
                self._changes[some, row].flatten(1),
                self._buffer[: group.stop - group.start, row].flatten(1),
            )
            self._sums[row, some, group] = changes @ parts.T


class Receivers:
    """A model's receivers, and how each reads the stream."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model whose family has a card, and write out its norms."""
        self.model, self.replay = model, Replay(model)
        self.exists = edge_exists(senders(model.config), receivers(model.config))
        self.places = receiver_slices(model.config)
        layers, end = range(self.replay.n_layers), self.exists.shape[1]
        self.groups = [slice(end, end)]
        for layer in reversed(layers):
            if self.groups[-1].stop - self.groups[-1].start >= TOGETHER:
                self.groups.append(slice(self.groups[-1].start, self.groups[-1].start))
            self.groups[-1] = slice(self.places["q", layer].start, self.groups[-1].stop)
        self.streams: list[Where] = [(name, layer) for layer in layers for name in ("block_input", "resid_mid")]
        self.watched: list[Where] = [*self.streams, *(("mlp_input", layer) for layer in layers)]
        width = dimensions(model.config)["d_model"]
        self.changes, self.gradients = Workspace(), Workspace()
        self.norms = [WrittenNorm.of(self.replay.attention_norm(layer), width) for layer in layers]

    def separate(
        self, seen: dict[Where, Tensor], start: int, products: Callable[[], Products], hooks: ExitStack
    ) -> None:
        """Make the next forward pass one whose backward pass multiplies the gradient of every receiver.

        Args:
            seen: filled with `streams` in that pass, each part of the graph, before they are read.
            start: the first column whose gradients are wanted; those before it are taken to be 0.
            products: gives the products, which are asked for in the backward pass.
            hooks: closing it removes the hooks. `Taps` of `watched` are the caller's.
        """

        def cut(those: slice, pull: Callable[[Tensor, ReceiverParts], None], stream: Tensor, read: Tensor) -> Tensor:
            def back(gradient: Tensor) -> Tensor:
                parts = products().slots(those)
                pull(gradient, parts)
                total = torch.zeros_like(stream)
                total[:, start:] = parts.sum(0) if len(parts) > 1 else parts[0]
                return total

            return _Cut.apply(stream, read.detach(), back)

        def by_mlp(layer: int, read: Tensor) -> Tensor:
            stream = seen["resid_mid", layer]
            return cut(self.places["mlp_in", layer], partial(_through_graph, start, stream, read, None), stream, read)

        def by_heads(layer: int, weight: Tensor | None, sites: list[str], read: Tensor) -> Tensor:
            stream, norm = seen["block_input", layer], self.norms[layer]
            heads = [(site, self.places[site, layer]) for site in sites]
            those = slice(heads[0][1].start, heads[-1][1].stop)
            if norm is not None and weight is not None:
                pull = partial(self._through_weights, start, stream.detach(), norm, weight, heads)
            else:
                places = torch.arange(read.shape[-1], device=read.device)[None, None]
                entries = [
                    part
                    for site, own in heads
                    for part in self.replay.own_part(site, places)[0, 0].view(own.stop - own.start, -1)
                ]
                pull = partial(_through_graph, start, stream, read, entries)
            return cut(those, pull, stream, read)

        def by_logits(stream: Tensor) -> None:
            def back(gradient: Tensor) -> None:
                products().slots(self.places["logits", None])[0] = gradient[:, start:]

            stream.register_hook(back)

        card = self.replay.card
        for layer in range(self.replay.n_layers):
            for module, sites in self.replay.projections(layer).items():
                weight = splittable(module)  # asked before there is a hook of ours
                hooks.enter_context(on_output(module, partial(by_heads, layer, weight, sites)))
            hook_component(self.model, ("mlp_input", layer), partial(by_mlp, layer), hooks, card)
        hook_component(self.model, ("block_output", self.replay.n_layers - 1), by_logits, hooks, card)

    def _through_weights(
        self,
        start: int,
        stream: Float[Tensor, "batch pos d_model"],
        norm: WrittenNorm,
        weight: Float[Tensor, "d_in d_out"],
        heads: Sequence[tuple[str, slice]],
        gradient: Float[Tensor, "batch pos width"],
        parts: ReceiverParts,
    ) -> None:
        """Take each head's gradient back to the stream, through its slice of the weight and the norm."""
        centred = norm.centre(stream[:, start:].float())
        scale = norm.scale(centred)
        for site, own in heads:
            n, first = own.stop - own.start, own.start - heads[0][1].start
            of_heads = self.replay.own_part(site, gradient[:, start:]).float() * scale
            by_head = self.replay.own_part(site, weight[None])[0].T.unflatten(0, (n, -1))
            slices = norm.centre(by_head.float() * norm.gain)
            tokens = of_heads.flatten(0, 1).unflatten(-1, (n, -1)).transpose(0, 1)
            torch.bmm(tokens, slices, out=parts[first : first + n].flatten(1, 2))
        # The norm divides by the stream's length, along which nothing changes.
        along = centred * scale / centred.shape[-1] ** 0.5
        parts.addcmul_((parts * along).sum(-1, keepdim=True), along, value=-1)


def _through_graph(
    start: int,
    stream: Tensor,
    read: Tensor,
    entries: Sequence[Tensor] | None,
    gradient: Float[Tensor, "batch pos width"],
    parts: ReceiverParts,
) -> None:
    """Take some entries of a gradient after the other, or all, back to the stream by the graph between the two."""
    for number, part in enumerate([None] if entries is None else entries):
        own = gradient if part is None else torch.zeros_like(gradient).index_copy(-1, part, gradient[..., part])
        parts[number] = torch.autograd.grad(read, stream, own, retain_graph=True)[0][:, start:]


class _Cut(torch.autograd.Function):
    """What was read from the stream, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, read: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return read.view_as(read)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None
