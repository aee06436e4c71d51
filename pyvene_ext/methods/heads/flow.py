"""Information flow routes (Ferrando and Voita 2024): the parts that states of the residual stream are made of, in one pass.

Nodes are the states of the residual stream: resid_mid after attention, resid_post after the MLP. A node y is a sum of parts z_j
and, in places, a bias. The importance of a part is how much closer to y it brings the sum (in L1 norm), relative to the other
parts:

    proximity(z_j, y) = max(|y| - |y - z_j|, 0)        importance_j = proximity_j / sum of proximities

At resid_mid_i the parts are resid_pre_i and, for every head h and source j <= i, f^h_ij = A^h_ij v^h_j W_O^h, all normalised
together; v includes the value bias, and the output projection's bias is in the node and in no part. At resid_post_i they are
resid_mid_i and what the MLP adds. If a norm follows attention or MLP (Gemma 2), its scale is frozen and applied to every part.
Nothing is ablated: what a route carries is a different question from what ablating a head does (`pyvene_ext.engine.sweep`).

Importances of one node sum to 1, or are all 0 if every part leads away from it (large parts that cancel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Card, Taps, card_of, n_heads, n_layers
from modelcards.attention_taps import output_weight
from pyvene_ext.engine.results import Shown, Summary, count, strongest, table, three_digits
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import (
    check_projections,
    hook_component,
    on_input,
    on_output,
    split_heads,
)
from pyvene_ext.models.latent_steps import is_unrolling
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import (
    Batch,
    PaddingSide,
    TokenizedPrompts,
    check_tokenized,
)

if TYPE_CHECKING:
    import pandas as pd

TAU = 0.04  # the published tool's default
# Entries of f^h_ij held at once: on a CPU what stays in its cache (four times as fast as eight million), else 64 MiB.
CELLS = {"cpu": 2**18}
CELLS_ELSEWHERE = 2**24
SENT = 2**24  # entries of what heads send that are held at once
FEW = 16  # a part that may pass its node in less than 1/16 of the dimensions is looked at in those only
READ = ("block_input", "head_value_output", "attention_pattern", "resid_mid", "mlp_contribution", "block_output")


def proximity(
    parts: Float[Tensor, "*parts d_model"], node: Float[Tensor, "*#parts d_model"]
) -> Float[Tensor, "*parts"]:
    """Proximity of parts to their node (Ferrando and Voita 2024): max(|y| - |y - z|, 0) in L1 norm.

    Args:
        parts: z.
        node: y, broadcast over its parts.

    Returns:
        The proximities; 0 for parts that lead away from the node.
    """
    # Differenced before the sum: rounding is relative to the part, not to the node, and a part of 0 has exactly 0.
    return (node.abs() - (node - parts).abs()).sum(-1).clamp(min=0)


def importances(parts: Float[Tensor, "part d_model"], node: Float[Tensor, " d_model"]) -> Float[Tensor, " part"]:
    """Importances of the parts of one node: their proximities, divided by the sum.

    Args:
        parts: z, one row per part.
        node: y.

    Returns:
        The importances, which sum to 1; all 0 if no proximity is above 0.
    """
    found = proximity(parts, node)
    return _share(found, found.sum())


def renormalise(
    blocks: Float[np.ndarray, "*node part"], residual: Float[np.ndarray, "*node"], tau: float
) -> tuple[Float[np.ndarray, "*node part"], Float[np.ndarray, "*node"]]:
    """Divide the importances above `tau` by their sum, node by node, and set the others to 0.

    Args:
        blocks: importances of heads and sources, or of the MLP.
        residual: importances of the residual part of the same nodes.
        tau: the threshold.

    Returns:
        Both, renormalised; all 0 for a node without any importance above `tau`.

    Raises:
        ValueError: `tau` is not in [0, 1).
    """
    check_tau(tau)
    blocks, residual = _above(np.asarray(blocks), tau), _above(np.asarray(residual), tau)
    total = blocks.sum(-1) + residual
    total = np.where(total > 0, total, 1)
    return blocks / total[..., None], residual / total


class StreamState(NamedTuple):
    """A state of the residual stream.

    Attributes:
        site: resid_pre (of layer 0 only), resid_mid or resid_post.
        layer: its layer.
        pos: its token, 0 being the first.
    """

    site: str
    layer: int
    pos: int

    def __str__(self) -> str:
        return f"{self.site}.{self.layer}@{self.pos}"


class FlowEdge(NamedTuple):
    """One part of a node.

    Attributes:
        source: the state that the part comes from.
        target: the node.
        via: "residual", "mlp" or a head ("layer.head").
        importance: of the part, among those of the node.
    """

    source: StreamState
    target: StreamState
    via: str
    importance: float

    def as_dict(self) -> dict[str, str | float]:
        """Convert to plain data for a JSON file."""
        return {"source": str(self.source), "target": str(self.target), "via": self.via, "importance": self.importance}


class LayerFlow(NamedTuple):
    """Importances at one layer of one prompt, for its targets from some token on.

    Attributes:
        attention: f^h_ij at resid_mid.
        attn_residual: resid_pre at resid_mid.
        mlp: what the MLP adds, at resid_post.
        mlp_residual: resid_mid at resid_post.
        pattern: the attention probabilities, which have been read in any case.
    """

    attention: Float32[np.ndarray, "head target source"]
    attn_residual: Float32[np.ndarray, " target"]
    mlp: Float32[np.ndarray, " target"]
    mlp_residual: Float32[np.ndarray, " target"]
    pattern: Float32[np.ndarray, "head target source"]


OnFlow = Callable[[int, int, LayerFlow], None]


class _Importances(NamedTuple):
    """One prompt's importances, 0 where there is no part."""

    attention: Float32[np.ndarray, "layer head target source"]
    attn_residual: Float32[np.ndarray, "layer target"]
    mlp: Float32[np.ndarray, "layer target"]
    mlp_residual: Float32[np.ndarray, "layer target"]


class Widths(NamedTuple):
    """The widest route to a prompt's prediction through heads, edges and states: it is as wide as its least important edge.

    What has a width above some tau is in the graph at this tau. Only what has a width above 0 is listed of edges and states.

    Attributes:
        heads: of the widest of a head's edges.
        edges: of every edge, in no order.
        states: of every state but the prediction itself, in no order.
    """

    heads: Float32[np.ndarray, "layer head"]
    edges: Float32[np.ndarray, " edge"]
    states: Float32[np.ndarray, " state"]

    def above(self, tau: float) -> Widths:
        """Keep edges and states above a threshold, and all heads."""
        return Widths(self.heads, self.edges[self.edges > tau], self.states[self.states > tau])


@dataclass(frozen=True, repr=False)
class Flow(Shown):
    """Importances of every part of every node, one array per prompt, because prompts differ in length.

    Attributes:
        attention: f^h_ij at resid_mid.
        attn_residual: resid_pre at resid_mid.
        mlp: what the MLP adds, at resid_post.
        mlp_residual: resid_mid at resid_post.
    """

    attention: tuple[Float32[np.ndarray, "layer head target source"], ...]
    attn_residual: tuple[Float32[np.ndarray, "layer target"], ...]
    mlp: tuple[Float32[np.ndarray, "layer target"], ...]
    mlp_residual: tuple[Float32[np.ndarray, "layer target"], ...]

    def __len__(self) -> int:
        return len(self.attention)

    def graph(self, prompt: int, tau: float = TAU, renormalise: bool = False) -> tuple[FlowEdge, ...]:
        """Extract the edges above `tau` that lead to the final state of a prompt's last token.

        Args:
            prompt: which one, 0 being the first.
            tau: an edge is kept if its importance is larger.
            renormalise: divide the importances that are kept by their sum at the node. The same edges are kept.

        Returns:
            The edges, last layer first.

        Raises:
            ValueError: there is no such prompt, or `tau` is not in [0, 1).
        """
        if not 0 <= prompt < len(self):
            raise ValueError(f"there is no prompt {prompt}; the flow has {len(self)}, counted from 0.")
        kept = self._kept(prompt, tau)
        if renormalise:
            kept = _renormalised(kept, tau)
        edges: list[FlowEdge] = []
        for layer, post, mid in _reached(kept):
            below = ("resid_post", layer - 1) if layer else ("resid_pre", 0)
            for pos in np.flatnonzero(post).tolist():
                source, target = StreamState("resid_mid", layer, pos), StreamState("resid_post", layer, pos)
                edges += _present(source, target, "residual", kept.mlp_residual[layer, pos])
                edges += _present(source, target, "mlp", kept.mlp[layer, pos])
            for pos in np.flatnonzero(mid).tolist():
                target = StreamState("resid_mid", layer, pos)
                edges += _present(StreamState(*below, pos), target, "residual", kept.attn_residual[layer, pos])
                here = kept.attention[layer, :, pos]
                for head, source_pos in np.argwhere(here).tolist():
                    edges += _present(
                        StreamState(*below, source_pos), target, f"{layer}.{head}", here[head, source_pos]
                    )
        return tuple(edges)

    def active_heads(self, tau: float = TAU) -> Bool[np.ndarray, "prompt layer head"]:
        """Which heads are in `graph`: those with some f^h_ij above `tau` at a node that leads to the final state.

        Args:
            tau: the threshold.

        Returns:
            True for the heads of each prompt's graph.

        Raises:
            ValueError: `tau` is not in [0, 1).
        """
        check_tau(tau)
        return np.stack([self.widths(prompt).heads > tau for prompt in range(len(self))])

    def widths(self, prompt: int) -> Widths:
        """Find how wide the routes to the final state of a prompt's last token are: what `graph` has at every tau.

        Args:
            prompt: which one, 0 being the first.

        Returns:
            The widths of heads, edges and states.
        """
        attention, attn_residual, mlp, mlp_residual = (
            by_prompt[prompt] for by_prompt in (self.attention, self.attn_residual, self.mlp, self.mlp_residual)
        )
        heads = np.zeros(attention.shape[:2], np.float32)
        edges, states = [], []
        post = np.zeros(attention.shape[-1], np.float32)
        post[-1] = np.inf  # every route starts there
        for layer in reversed(range(len(heads))):
            to_mid = np.minimum(post, [mlp[layer], mlp_residual[layer]])  # part target
            mid = to_mid.max(0)
            of_heads = np.minimum(attention[layer], mid[:, None])  # head target source
            heads[layer] = of_heads.max((1, 2))
            residual = np.minimum(attn_residual[layer], mid)
            post = np.maximum(of_heads.max((0, 1)), residual)
            edges += [to_mid, of_heads, residual]
            states += [mid, post]
        flat = (np.concatenate([x.ravel() for x in found]) for found in (edges, states))
        return Widths(heads, *(x[x > 0] for x in flat))

    def head_importance(self, targets: Literal["all", "last"] = "all") -> Float32[np.ndarray, "prompt layer head"]:
        """Sum the importances of each head at resid_mid over sources.

        Args:
            targets: at the prompt's last token ("last"), or the mean over all its tokens ("all").

        Returns:
            A head's share of resid_mid.

        Raises:
            ValueError: `targets` is neither.
        """
        if targets not in ("all", "last"):
            raise ValueError(f"targets must be 'all' or 'last', not {targets!r}.")
        first = -1 if targets == "last" else 0
        return np.stack([attention[:, :, first:].sum(-1).mean(-1) for attention in self.attention])

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per head, or MLP, and prompt.

        Returns:
            A table with the columns prompt, site (z or mlp_out), layer, head, importance (its share of the stream that it adds
            to, summed over sources: the mean over the prompt's tokens) and importance_last (at its last token). `graph` gives
            the single edges.
        """
        import pandas as pd

        of_heads = {"importance": self.head_importance(), "importance_last": self.head_importance("last")}
        of_mlps = {
            "importance": np.stack([mlp.mean(-1) for mlp in self.mlp]),
            "importance_last": np.stack([mlp[:, -1] for mlp in self.mlp]),
        }
        found = []
        for site, names, values in (
            ("z", ("prompt", "layer", "head"), of_heads),
            ("mlp_out", ("prompt", "layer"), of_mlps),
        ):
            axes = dict(zip(names, map(range, values["importance"].shape), strict=True))
            found.append(table(axes, values).assign(site=site))
        columns = ["prompt", "site", "layer", "head", "importance", "importance_last"]
        return pd.concat(found, ignore_index=True)[columns].astype({"head": "Int64"})

    def summarise(self) -> Summary:
        """The heads with the largest mean importance."""
        mean = self.head_importance().mean(0)
        layers, heads = mean.shape
        rows = [(f"{i // heads}.{i % heads}", three_digits(mean.flat[i])) for i in strongest(mean.ravel()).tolist()]
        title = f"Flow: {count(len(self), 'prompt')}, {layers} layers x {heads} heads"
        return Summary(title, ("head", "mean importance"), rows)

    def _kept(self, prompt: int, tau: float) -> _Importances:
        check_tau(tau)
        arrays = (self.attention, self.attn_residual, self.mlp, self.mlp_residual)
        return _Importances(*(_above(by_prompt[prompt], tau) for by_prompt in arrays))


def flow_routes(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    *,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool = True,
) -> Flow:
    """Compute the importances of all parts of all nodes, from one forward pass per batch.

    All of them are held: layers x heads x tokens squared for each prompt. `read_flow` hands them on layer by layer.

    Args:
        model: as for `read_flow`.
        prompts: as for `read_flow`.
        batch_size: prompts per forward pass.
        padding_side: left or right; importances do not depend on it.
        progress: show a bar.

    Returns:
        The importances of every prompt.

    Raises:
        ValueError: for whatever `read_flow` refuses.
    """
    check_flow(model, prompts)
    arrays = [_Importances(*_empty(model, len(ids))) for ids in prompts.input_ids]

    def keep(layer: int, prompt: int, found: LayerFlow) -> None:
        for name, array in arrays[prompt]._asdict().items():
            array[layer] = getattr(found, name)

    read_flow(model, prompts, keep, batch_size=batch_size, padding_side=padding_side, progress=progress)
    return Flow(*zip(*arrays, strict=True))


def read_flow(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    on_flow: OnFlow,
    *,
    first: Sequence[int] | None = None,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool = True,
) -> None:
    """Call `on_flow(layer, prompt, importances)` for every layer and prompt while the model runs, one forward pass per batch.

    Importances are computed layer by layer and not kept, so that memory holds one layer's activations of a batch and the
    importances of one prompt at one layer. All sums are in float32 whatever the model's dtype. The unembedding is not run.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa); used in eval mode and restored afterwards,
            also after an error.
        prompts: of any lengths.
        on_flow: called with the layer, the number of the prompt and its importances.
        first: for each prompt the first token whose nodes are wanted; by default all of them. Few of them take less time.
        batch_size: prompts per forward pass.
        padding_side: left or right; importances do not depend on it.
        progress: show a bar.

    Raises:
        ValueError: before the model runs: a model without a card, whose attention patterns cannot be read or whose output
            projection cannot be split by heads; prompts that are missing or not tokenised. While it runs: the parts and the bias
            do not sum to the node within 1e-4 of its L1 norm (below float32: 8 rounding errors).
    """
    check_flow(model, prompts)
    card = card_of(model)
    batches = prompts.batches(batch_size, padding_side)
    places = [(name, layer) for name in READ for layer in range(n_layers(model.config))]
    bar = progress_bar(len(prompts), "prompt", "routes", shown=progress)
    with bar, evaluating(model), Taps(model, card, places), no_gradients(model):
        for batch in batches:
            with ExitStack() as hooks:
                for layer in range(n_layers(model.config)):
                    _watch(model, card, layer, batch, first or [0] * len(prompts), on_flow, hooks)
                model.base_model(**batch.inputs(input_device(model)), use_cache=False)
            bar.update(len(batch.index))


def check_tau(tau: float) -> None:
    """Check a threshold of importance.

    Args:
        tau: the threshold.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= tau < 1:
        raise ValueError(f"tau must be at least 0 and below 1, as importances are shares of a node, not {tau}.")


def check_model(model: PreTrainedModel) -> None:
    """Check that a model's routes can be computed; nothing is run.

    Args:
        model: a model with a card.

    Raises:
        ValueError: its attention patterns cannot be read, or an output projection cannot be split by heads.
    """
    for name in READ:
        card_of(model).component(model, name)
    check_projections(model)


def check_flow(model: PreTrainedModel, prompts: TokenizedPrompts) -> None:
    """Check the arguments of `read_flow`; nothing is run.

    Args:
        model: as for `read_flow`.
        prompts: as for `read_flow`.

    Raises:
        ValueError: see `read_flow`.
    """
    card_of(model)
    check_tokenized(model, prompts)
    if not len(prompts):
        raise ValueError("there are no prompts to trace; give at least one.")
    check_model(model)


def _empty(model: PreTrainedModel, length: int) -> Iterator[Float32[np.ndarray, "layer *"]]:
    layers = n_layers(model.config)
    yield np.zeros((layers, n_heads(model.config), length, length), np.float32)
    for _ in range(3):
        yield np.zeros((layers, length), np.float32)


def _watch(
    model: PreTrainedModel,
    card: Card,
    layer: int,
    batch: Batch,
    first: Sequence[int],
    on_flow: OnFlow,
    hooks: ExitStack,
) -> None:
    """Hook one block: once it has run, its importances are handed to `on_flow` and its activations are released."""
    seen: dict[str, Tensor] = {}

    def keep(component: str, x: Tensor) -> None:
        seen[component] = split_heads(x, component, model)

    def done(_: Tensor) -> None:
        if not is_unrolling(model):
            _measure(_Block(model, card, layer, seen), layer, batch, first, on_flow)
        seen.clear()

    for component in READ:
        hook_component(model, (component, layer), partial(keep, component), hooks)
    if card.post_norm_scale is not None:
        post_norm = card.module(model, "attention_contribution", layer)
        hooks.enter_context(on_input(post_norm, partial(seen.__setitem__, "attention_contribution")))
    hooks.enter_context(on_output(card.module(model, "block_output", layer), done))


class _Block:
    """One block's activations, `batch pos d_model` unless noted otherwise, and its output projection."""

    def __init__(self, model: PreTrainedModel, card: Card, layer: int, seen: dict[str, Tensor]) -> None:
        device = seen["resid_mid"].device  # the block's input may still be on the previous block's device
        self.resid_pre, self.resid_mid = seen["block_input"].to(device), seen["resid_mid"]
        self.mlp_out, self.resid_post = seen["mlp_contribution"], seen["block_output"]
        self.values = seen["head_value_output"]  # batch kv_head pos d_head
        self.pattern = seen["attention_pattern"]  # batch head target source
        projection: Any = card.module(model, "attention_value_output", layer)
        weight = output_weight(projection)
        assert weight is not None  # `check_model` has checked it
        self.weight = weight.float().unflatten(0, (self.pattern.shape[1], -1))  # head d_head d_model
        self.bias = projection.bias.float() if getattr(projection, "bias", None) is not None else None
        self.scale: Tensor | None = None
        if card.post_norm_scale is not None:
            norm = card.module(model, "attention_contribution", layer)
            self.scale = card.post_norm_scale(norm, seen["attention_contribution"].float())
        elif card.residual_multiplier is not None:
            self.scale = torch.full_like(self.resid_mid, card.residual_scale(model.config), dtype=torch.float32)


def _measure(block: _Block, layer: int, batch: Batch, first: Sequence[int], on_flow: OnFlow) -> None:
    """Compute one layer's importances of a batch, prompt by prompt without its padding."""
    width = batch.input_ids.shape[1]
    for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
        real = slice(width - length, width) if batch.padding_side == "left" else slice(length)
        mid, post, mlp = (x[row, real].float() for x in (block.resid_mid, block.resid_post, block.mlp_out))
        heads, residual = _attention_node(block, row, real, first[prompt], f"resid_mid.{layer} of prompt {prompt}")
        _check_sum(mid + mlp, post, block.resid_post.dtype, f"resid_post.{layer} of prompt {prompt}")
        mid, post, mlp = (x[first[prompt] :] for x in (mid, post, mlp))
        parts = proximity(torch.stack([mlp, mid]), post)
        pattern = block.pattern[row, :, real, real][:, first[prompt] :].float()
        found = (heads, residual, *_share(parts, parts.sum(0)), pattern)
        on_flow(layer, prompt, LayerFlow(*(values.cpu().numpy() for values in found)))


def _attention_node(
    block: _Block, row: int, real: slice, first: int, name: str
) -> tuple[Float[Tensor, "head target source"], Float[Tensor, " target"]]:
    """Importances at resid_mid of one prompt, from the target `first` on: of every f^h_ij, and of resid_pre."""
    node, pre = block.resid_mid[row, real].float(), block.resid_pre[row, real].float()
    pattern, values = block.pattern[row, :, real, real].float(), block.values[row, :, real].float()
    scale = None if block.scale is None else block.scale[row, real]
    heads, length = pattern.shape[:2]
    group = heads // len(values)
    near = torch.zeros_like(pattern[:, first:])
    total = torch.zeros_like(node) if block.bias is None else block.bias.expand_as(node)
    # As many heads at once as fit, and for each as many targets, so that what is held stays small.
    cells = CELLS.get(node.device.type, CELLS_ELSEWHERE)
    n_head = min(heads, max(1, SENT // node.numel()))
    n_target = max(1, 4 * cells // (n_head * length))
    for head in range(0, heads, n_head):
        these = torch.arange(head, min(head + n_head, heads), device=values.device)
        sent = values[these // group] @ block.weight[these]  # head source d_model: f without pattern and scale
        total = total + (pattern[these] @ sent).sum(0)
        for start in range(first, length, n_target):
            to, up_to = (
                slice(start, start + n_target),
                slice(min(start + n_target, length)),
            )  # later ones are not visible
            near[these, start - first : to.stop - first, up_to] = _proximity_of_heads(
                pattern[these, to, up_to], sent[:, up_to], node[to], None if scale is None else scale[to], cells
            )
    _check_sum(pre + (total if scale is None else scale * total), node, block.resid_mid.dtype, name)
    residual = proximity(pre[first:], node[first:])
    everything = near.sum((0, 2)) + residual
    return _share(near, everything[:, None]), _share(residual, everything)


def _proximity_of_heads(
    pattern: Float[Tensor, "head target source"],
    sent: Float[Tensor, "head source d_model"],
    node: Float[Tensor, "target d_model"],
    scale: Float[Tensor, "target d_model"] | None,
    cells: int,
) -> Float[Tensor, "head target source"]:
    """`proximity(pattern * sent * scale, node)`, without computing each part in full.

    With u = sign(y) z, what z adds towards y in a dimension, |y| - |y - z| = u - 2 max(u - |y|, 0). The sum of u over dimensions
    is a matrix product. The rest is not 0 only where a part passes its node: with many heads and sources, hardly anywhere.

    Args:
        pattern: attention probabilities.
        sent: what each head sends from each source.
        node: y.
        scale: of a norm after attention; None if there is none.
        cells: entries of parts that are held at once.

    Returns:
        The proximities.
    """
    (n_head, n_target, n_source), d_model = pattern.shape, node.shape[1]
    sign, size = torch.where(node < 0, -1.0, 1.0), node.abs()
    if scale is not None:
        sign = sign * scale
    # One row per target, with all its parts.
    amount = pattern.transpose(0, 1).reshape(n_target, -1)
    near = (pattern * (sign @ sent.mT)).transpose(0, 1).reshape(n_target, -1)
    sent = sent.flatten(0, 1)
    # The dimensions in which y is smallest come first, each in units of what is usually sent there. No part passes its node
    # beyond the first dimensions, up to where |y| exceeds the largest entry of the part.
    unit = sent.abs().mean(0).clamp(min=torch.finfo(sent.dtype).tiny)
    reach, order = (size / (sign.abs() * unit)).nan_to_num(nan=torch.inf).sort(-1)
    n_passed = torch.searchsorted(reach, amount * (sent.abs() / unit).amax(-1))
    many = n_passed > d_model // FEW
    n_rows = max(1, cells // d_model)
    for target, part in zip(*(x.split(n_rows) for x in many.nonzero(as_tuple=True)), strict=True):
        passed = (amount[target, part, None] * sent[part]).mul_(sign[target]).sub_(size[target]).clamp_(min=0)
        near[target, part] -= 2 * passed.sum(-1)
    # Of the other parts the first `n_passed` dimensions each, one after the other in one long row.
    sign, size, order, sent = (
        sign.gather(1, order).flatten(),
        size.gather(1, order).flatten(),
        order.flatten(),
        sent.flatten(),
    )
    for target, part in zip(
        *(x.split(4 * n_rows) for x in ((n_passed > 0) & ~many).nonzero(as_tuple=True)), strict=True
    ):
        n = n_passed[target, part]
        ends = n.cumsum(0)
        one = torch.arange(len(n), device=n.device).repeat_interleave(n)  # which part
        at = torch.arange(len(one), device=n.device) + (target * d_model - ends + n)[one]
        passed = amount[target, part][one] * sent[part[one] * d_model + order[at]] * sign[at] - size[at]
        near[target, part] -= 2 * torch.zeros_like(near[target, part]).index_add_(0, one, passed.clamp_(min=0))
    return near.clamp_(min=0).view(n_target, n_head, n_source).transpose(0, 1)


def _check_sum(
    total: Float[Tensor, "pos d_model"], node: Float[Tensor, "pos d_model"], dtype: torch.dtype, name: str
) -> None:
    """Raise ValueError unless the parts and the bias sum to the node."""
    allowed = max(1e-4, 8 * torch.finfo(dtype).eps)
    off, size = (total - node).abs().sum(-1), node.abs().sum(-1)
    fits = off <= allowed * size  # False for NaN
    if not fits.all():
        pos = int((~fits).nonzero()[0])
        raise ValueError(
            f"the parts of {name} at position {pos} miss it by {float(off[pos] / size[pos]):.2g} of its norm (allowed: "
            f"{allowed:.2g}), so their importances would mean nothing; remove hooks and adapters that write to the residual "
            "stream, or load the model in float32."
        )


def _share(near: Float[Tensor, "*part"], total: Float[Tensor, "*#part"]) -> Float[Tensor, "*part"]:
    return near / torch.where(total > 0, total, 1)


def _above(importance: Float[np.ndarray, "*part"], tau: float) -> Float[np.ndarray, "*part"]:
    return np.where(importance > tau, importance, 0)


def _renormalised(kept: _Importances, tau: float) -> _Importances:
    layers, heads, length, _ = kept.attention.shape
    by_node = kept.attention.transpose(0, 2, 1, 3).reshape(layers, length, heads * length)
    blocks, attn_residual = renormalise(by_node, kept.attn_residual, tau)
    attention = blocks.reshape(layers, length, heads, length).transpose(0, 2, 1, 3)
    mlp, mlp_residual = renormalise(kept.mlp[..., None], kept.mlp_residual, tau)
    return _Importances(attention, attn_residual, mlp[..., 0], mlp_residual)


def _reached(kept: _Importances) -> Iterator[tuple[int, Bool[np.ndarray, " pos"], Bool[np.ndarray, " pos"]]]:
    """Layers from the last, with the tokens whose resid_post and resid_mid lead to the last token's final state."""
    layers, _, length, _ = kept.attention.shape
    post = np.arange(length) == length - 1
    for layer in reversed(range(layers)):
        mid = post & ((kept.mlp[layer] > 0) | (kept.mlp_residual[layer] > 0))
        yield layer, post, mid
        post = (mid & (kept.attn_residual[layer] > 0)) | kept.attention[layer][:, mid].any((0, 1))


def _present(source: StreamState, target: StreamState, via: str, importance: float) -> list[FlowEdge]:
    """The edge as a list, empty if it was not kept."""
    return [FlowEdge(source, target, via, float(importance))] if importance > 0 else []
