"""What each sender adds to the residual stream, and how far that is from what an ablated edge carries.

What a sender adds: for embed, what enters the first block; for a head, z_h W_O; for an MLP, its output with its bias. If a norm
follows attention's output projection or the MLP (Gemma 2), what comes out of that norm: a head's share is scaled as the norm
scales the whole attention output in the same run.

What an ablated edge carries:

    patching   what the sender adds in the run on the source prompts, which are paired with the base prompts token by token
    mean       the mean of what the sender adds over all tokens of the source prompts, which may be any prompts
    zero       nothing
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, card_of, dimensions, n_heads, n_layers
from modelcards.attention_taps import output_weight
from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.engine.resolve import check_pairs_differ
from pyvene_ext.models.devices import Workspace, input_device
from pyvene_ext.models.hooks import (
    StopForward,
    Where,
    check_projections,
    hook_component,
    on_input,
    record_activations,
)
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized
from pyvene_ext.specs.graph import senders

AblationKind = Literal["patching", "mean", "zero"]
Changes = Float32[Tensor, "sender batch pos d_model"]

# What receivers read, and the streams that it is computed from.
_NEEDED = ("block_input", "query_output", "key_output", "value_output", "resid_mid", "mlp_input", "block_output")


class Written(NamedTuple):
    """What a run's senders write, from which what they add is computed."""

    seen: dict[Where, Tensor]
    normed: dict[int, Tensor]  # what enters the norm after attention's output projection, by layer, where there is one


class Senders:
    """A model's senders."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model whose family has a card; `evaluating` is the caller's."""
        self.model, self.card, self.heads = model, card_of(model), n_heads(model.config)
        self.layers, self.count = range(n_layers(model.config)), len(senders(model.config))
        names = ("attention_value_output", "mlp_contribution")
        self.places: list[Where] = [("block_input", 0), *((name, layer) for layer in self.layers for name in names)]
        self._changes = Workspace()

    def record(self, hooks: ExitStack) -> Written:
        """Record what senders write in the next forward pass.

        Args:
            hooks: closing it removes the hooks. `Taps` of `places` are the caller's.

        Returns:
            Filled by that pass.
        """
        normed: dict[int, Tensor] = {}
        for layer in self.layers if self.card.post_norm_scale is not None else ():
            norm = self.card.module(self.model, "attention_contribution", layer)
            hooks.enter_context(on_input(norm, partial(normed.__setitem__, layer)))
        return Written(record_activations(self.model, self.places, hooks), normed)

    @torch.no_grad()
    def run(self, batch: Batch) -> Written:
        """Run prompts as far as the last sender writes."""

        def stop(_: Tensor) -> None:
            raise StopForward

        with ExitStack() as hooks, suppress(StopForward):
            hooks.enter_context(Taps(self.model, self.card, self.places))
            written = self.record(hooks)
            hook_component(self.model, ("block_output", self.layers[-1]), stop, hooks)
            answer_logits(self.model, batch)
        return written

    @torch.no_grad()
    def changes(self, base: Written, source: Written | None, start: int = 0) -> Changes:
        """What every sender adds in the run on source, or nothing, minus what it adds in the run on base.

        Padding comes after the real tokens and gets no gradient, so its values do not matter.

        Args:
            base: one run.
            source: the other; None for zeros in its place.
            start: the first column that is wanted.

        Returns:
            The changes, which the next call overwrites.
        """

        def at(run: Written, where: Where) -> Tensor:
            return run.seen[where].detach()[:, start:].float()

        def change(where: Where) -> Tensor:
            return -at(base, where) if source is None else at(source, where) - at(base, where)

        embedded = change(("block_input", 0))
        found = self._changes.take((self.count, *embedded.shape), input_device(self.model))
        found[0], first = embedded, 1
        for layer in self.layers:
            of_heads, heads = found[first : first + self.heads], ("attention_value_output", layer)
            weight = output_weight(self.card.module(self.model, *heads))
            assert weight is not None  # `check_projections` has checked it
            by_head = weight.detach().unflatten(0, (self.heads, -1)).float()
            if self.card.post_norm_scale is None:
                z = self._by_head(change(heads))
                if z.device == of_heads.device:
                    torch.bmm(z, by_head, out=of_heads.flatten(1, 2))
                else:  # from the layer's device to the first one, as below
                    of_heads.flatten(1, 2).copy_(z @ by_head)
            else:
                norm = self.card.module(self.model, "attention_contribution", layer)
                of_heads.zero_()
                for run, sign in ((source, 1), (base, -1)):
                    if run is not None:
                        scale = self.card.post_norm_scale(norm, run.normed[layer].detach()[:, start:].float())
                        shares = (self._by_head(at(run, heads)) @ by_head).view(of_heads.shape)
                        of_heads.add_(shares.mul_(scale).to(of_heads.device), alpha=sign)
            if (multiplier := self.card.residual_scale(self.model.config)) != 1:
                of_heads *= multiplier
            found[first + self.heads].copy_(change(("mlp_contribution", layer)))
            first += self.heads + 1
        return found

    def _by_head(self, z: Float[Tensor, "batch pos width"]) -> Float[Tensor, "head token d_head"]:
        return z.unflatten(-1, (self.heads, -1)).flatten(0, 1).transpose(0, 1)

    def constant(
        self, source: TokenizedPrompts | None, ablation: AblationKind, batch_size: int
    ) -> Float32[Tensor, "sender d_model"] | None:
        """What ablated edges carry if it is the same everywhere; for mean ablation, source is run.

        Args:
            source: the prompts over whose tokens the mean is taken.
            ablation: the kind.
            batch_size: prompts per forward pass.

        Returns:
            The values; None for patching.
        """
        if ablation == "patching":
            return None
        device = input_device(self.model)
        total = torch.zeros((self.count, dimensions(self.model.config)["d_model"]), dtype=torch.float64, device=device)
        if ablation == "mean":
            assert source is not None
            for batch in source.batches(batch_size, "right"):
                taken = self.changes(self.run(batch), None)
                for row, length in enumerate(batch.lengths):  # in float64 one prompt at a time
                    total -= taken[:, row, :length].double().sum(1)
            total /= sum(map(len, source.input_ids))
        return total.float()


# -- checks ------------------------------------------------------------------------------------------------------------


def check_ablation(
    model: PreTrainedModel, base: TokenizedPrompts, source: TokenizedPrompts | None, ablation: str
) -> None:
    """Check that edges of a model can be ablated on these prompts; nothing is run.

    Args:
        model: a causal language model.
        base: the prompts that are run.
        source: what ablated edges take their values from; for zero, None.
        ablation: the kind.

    Raises:
        ValueError: an unknown kind, source prompts that are missing, for patching prompts that are not pairs of equal lengths
            that differ, and for whatever `check_edges_of` refuses.
    """
    if ablation not in get_args(AblationKind):
        raise ValueError(f"unknown ablation {ablation!r}; choose among {', '.join(get_args(AblationKind))}.")
    if ablation == "zero":
        check_edges_of(model, base)
    elif source is None:
        raise ValueError(f"ablation {ablation!r} takes its values from source prompts; give them.")
    elif ablation == "mean":
        check_edges_of(model, base, source)
    else:
        _check_pairs(model, base, source)


def check_edges_of(model: PreTrainedModel, *prompts: TokenizedPrompts) -> None:
    """Check that edges can be read in a model and on prompts.

    Args:
        model: a causal language model.
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


def _check_pairs(model: PreTrainedModel, base: TokenizedPrompts, source: TokenizedPrompts) -> None:
    """Check that edges can be patched between pairs of prompts."""
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
