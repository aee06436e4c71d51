"""Copy scores: would a head that attends to a name write that name?

    ranks = copy_ranks(model, prompts, ("io", "s1"), ids)     # ids[asked, place, prompt]: the tokens whose ranks are asked for
    scores = copy_scores(ranks)                               # [input sign asked layer head], share of ranks of at most 5

Wang et al. 2022, section 3.1: the residual stream after block 0 at the name goes through the head's own norm, W_V (and b_V) and
W_O, then through the final norm and the unembedding; the name should be among the top five tokens. The negative copy score is
that of -W_O. Attention to the name is set to 1: a high score says that the head would copy what it attended to, not that it
attends there, nor that it matters.

The stream after block 0 is not what a head deep in a model reads. Where later blocks rotate the representation of the name, a
head that copies well from its own input seems to copy nothing from block 0, so that the score is also computed from the stream
that enters the head's own layer ("own", ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import card_of, n_heads, n_layers
from modelcards.attention_taps import output_weight
from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.hooks import check_projections
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.replay import Past, Replay
from pyvene_ext.prompts.tokenized import TokenizedPrompts

INPUTS = ("resid", "embed", "own")
SIGNS = ("positive", "negative")
TOP = 5
VOCABULARY_AT_ONCE = ROWS_AT_ONCE = 4096  # tokens whose logits are computed at once, and for how many heads and places
MOST = 100  # ranks beyond this one are not told apart: the rest of the vocabulary, most of the work, is left out


def copy_ranks(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    places: Sequence[str | int],
    ids: Int[np.ndarray, "asked place prompt"],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Int[np.ndarray, "input sign asked layer head place prompt"]:
    """Rank tokens by what each head would write if it attended only to one position of the prompt (Wang et al. 2022).

    A head's value is that of its K/V head, computed in the model's dtype; the rest is in float32. A post-norm (Gemma 2) scales
    the head's output separately, the output projection's bias belongs to no head, and a soft-cap changes no rank. Tokens with
    equal logits share the worse rank, so that a head that writes nothing copies nothing. Ranks beyond 100 are given as 101.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        prompts: the prompts.
        places: positions that every prompt has.
        ids: the tokens whose ranks are asked for, for each place and prompt.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        Ranks, 1 being the top, by input (`INPUTS`: resid, the stream after block 0; embed, what enters block 0 plus what its MLP
        adds to that without attention, W_E + MLP0; own, the stream that enters the head's layer) and sign (`SIGNS`).

    Raises:
        ValueError: `ids` do not fit, a place is missing, weights are not accessible, or a logit is not finite.
    """
    head: Any = model.get_output_embeddings()
    if head is None or output_weight(head) is None:
        raise ValueError(
            f"the unembedding of {type(model).__name__} has no accessible weights; load a causal language model without "
            "quantisation and offloading, and merge adapters."
        )
    check_projections(model)
    if ids.ndim != 3 or ids.shape[1:] != (len(places), len(prompts)):
        raise ValueError(f"ids must be [asked {len(places)} {len(prompts)}] for these places, not {ids.shape}.")
    if ids.size and not 0 <= ids.min() <= ids.max() < len(head.weight):
        raise ValueError(
            f"ids range from {ids.min()} to {ids.max()} but the vocabulary has {len(head.weight)} tokens; use the model's own "
            "tokenizer."
        )
    layers = range(n_layers(model.config))
    sources: list[Place] = [("embed", None), ("resid_post", 0), *(("resid_pre", layer) for layer in layers)]
    reference = Reference.compute(
        model, prompts, sources, bank=tuple(dict.fromkeys(places)), batch_size=batch_size, progress=progress
    )
    embed, resid, *own = (
        torch.stack([reference.rows(source, prompt, tuple(places)) for prompt in range(len(prompts))], 1).flatten(0, 1)
        for source in sources
    )  # place by place, the prompts in order
    asked = torch.from_numpy(ids.reshape(len(ids), -1)).long()
    shape = len(INPUTS), len(SIGNS), len(ids), len(layers), n_heads(model.config)
    found = np.empty((*shape, asked.shape[1]), np.int64)
    bar = progress_bar(len(INPUTS) * len(layers), "layer", "copy scores", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        writes = _HeadWrites(model)
        after_mlp = writes.after_first_mlp(embed)
        for layer in layers:
            for which, x in enumerate((resid, after_mlp, own[layer])):
                found[which, :, :, layer] = writes.ranks(layer, x, asked).cpu().numpy()
                bar.update()
    return found.reshape(*shape, *ids.shape[1:])


def copy_scores(ranks: Int[np.ndarray, "*kind place prompt"], top: int = TOP) -> Float64[np.ndarray, "*kind"]:
    """Compute copy scores from ranks (Wang et al. 2022, section 3.1).

    Args:
        ranks: as `copy_ranks` returns them.
        top: the lowest rank that counts.

    Returns:
        The share of places and prompts, pooled, whose token is among the first `top`.
    """
    return (ranks <= top).mean((-2, -1))


class _HeadWrites:
    """What the heads of a layer would write, and its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.replay, self.card, self.n_heads = Replay(model), card_of(model), n_heads(model.config)
        self.head: Any = model.get_output_embeddings()
        self.norm = self.replay.module("final_norm")
        self.norm_weights = {name: weight.detach().float() for name, weight in self.norm.named_parameters()}
        self.device = self.head.weight.device

    def after_first_mlp(self, embed: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The stream after block 0 with an attention that adds nothing."""
        hidden = embed[:, None].to(self.replay.device, self.replay.dtype)
        return self.replay.block(0, hidden, (0, 1), Past(), attention=torch.zeros_like(hidden))[:, 0]

    def ranks(
        self, layer: int, x: Float[Tensor, "row d_model"], ids: Int[Tensor, "asked row"]
    ) -> Int[Tensor, "sign asked head row"]:
        """Rank tokens in what the heads write at `x`, and in its negative.

        Args:
            layer: the heads' layer.
            x: the stream at the positions that the heads attend to.
            ids: the tokens whose ranks are asked for.

        Returns:
            Ranks, 1 being the top.
        """
        normed = self.normed(self.written(layer, x)).to(self.device)  # head row d_model
        nothing = self.normed(torch.zeros_like(normed[0, :1])).to(self.device)  # the norm's bias
        ids = ids.to(self.device)
        at_ids = self.head.weight[ids].float()
        own = torch.einsum("hrd,ard->ahr", normed, at_ids)
        without = (at_ids @ nothing[0])[:, None]  # the logit of writing nothing, at which signs are mirrored
        if self.head.bias is not None:
            of_ids = self.head.bias[ids].float()[:, None]
            own, without = own + of_ids, without + of_ids
        if not own.isfinite().all():
            raise ValueError(
                f"a logit of a head of layer {layer} is not finite; check the weights, or use float32 or bfloat16."
            )
        # From here on a row is a head at a place.
        shape, flat = own.shape, normed.flatten(0, 1)
        ids, without = (x[:, None].expand(shape).flatten(1) for x in (ids, without[:, 0]))
        own = own.flatten(1)
        ranks = torch.ones(len(SIGNS), *own.shape, dtype=torch.long, device=self.device)
        for rows in torch.arange(len(flat), device=self.device).split(ROWS_AT_ONCE):
            for start in range(0, len(self.head.weight), VOCABULARY_AT_ONCE):
                chunk = slice(start, start + VOCABULARY_AT_ONCE)
                weight = self.head.weight[chunk].float()
                bias = 0.0 if self.head.bias is None else self.head.bias[chunk].float()
                logits = flat[rows] @ weight.T + bias
                mirrored = 2 * (weight @ nothing[0] + bias) - logits
                higher = torch.empty_like(logits)  # numbers add up faster than booleans
                for asked, tokens in enumerate(ids[:, rows] - start):
                    mine, mirror = own[asked, rows, None], 2 * without[asked, rows, None]
                    inside = (tokens >= 0) & (tokens < len(weight))
                    for minus, (values, least) in enumerate(((logits, mine), (mirrored, mirror - mine))):
                        torch.ge(values, least, out=higher)
                        higher[inside, tokens[inside]] = 0  # the token itself
                        ranks[minus, asked, rows] += higher.sum(-1).long()
                rows = rows[(ranks[..., rows] <= MOST).any(0).any(0)]
                if not len(rows):
                    break
        return ranks.clamp(max=MOST + 1).unflatten(-1, shape[1:])

    def written(self, layer: int, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "head row d_model"]:
        """What the heads add to the residual stream if they attend to `x` alone."""
        hidden = x[:, None].to(self.replay.device, self.replay.dtype)
        normed = self.replay.attention_input(layer, hidden, (0, 1))
        weight = self.replay.projection(layer)
        assert weight is not None  # `check_projections` has checked it
        by_head = weight.unflatten(0, (self.n_heads, -1)).float()
        values = self.replay.projected("v", layer, normed)[:, 0].float().unflatten(-1, (-1, by_head.shape[1]))
        values = values.repeat_interleave(self.n_heads // values.shape[1], 1)  # those of its group for each query head
        written = torch.einsum("rhd,hdm->hrm", values.to(by_head.device), by_head)
        written = written * self.card.residual_scale(self.replay.model.config)
        if self.card.post_norm_scale is not None:
            written = written * self.card.post_norm_scale(self.replay.module("attention_contribution", layer), written)
        return written

    def normed(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """Apply the final norm in float32."""
        device = next(iter(self.norm_weights.values())).device
        return torch.func.functional_call(self.norm, self.norm_weights, x.to(device))
