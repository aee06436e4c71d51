"""Taps: temporary modules, inside `with Taps(...)`, at places that no module of a transformers model outputs.

Rotated queries and keys, scores and pattern are local to one attention function; per-head contributions are summed inside one
matrix product; Granite multiplies what it adds to the residual, and Gemma 2 soft-caps its logits, in the model's own forward; one
projection may make queries, keys and values; experts receive tokens without their batch. For each such place that a config names,
`Taps` adds an `nn.Identity` child where the card says, so that an ordinary hook on an ordinary module reads and edits it.

    with Taps(model, card_of(model), [("attention_pattern", 3), ("head_contribution", 5)]):
        model.model.layers[3].self_attn.tap_pattern.register_forward_hook(...)

Meanwhile the attention of the named layers runs through `tapped_attention`, which is registered once with transformers'
AttentionInterface and selected by a copied config on that one attention module; the model's config, and so the masks it makes,
stay as they are. Afterwards no child, hook or config is left. Layers not named are never touched.

Every tap carries [batch pos heads*width], heads side by side as in a projection's output (scores and pattern: [batch n_query
n_head*n_key]), because that is the layout pyvene splits into heads, gathers and scatters exactly.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from modelcards.components import dimensions
from modelcards.template import PREFIX, at_layer

if TYPE_CHECKING:
    from modelcards.card import Card

IMPLEMENTATION = "pyvene_taps"
MASKS_UNDERSTOOD = ("eager", "sdpa")
FUSED = "tap_fused_"
INSIDE_ATTENTION = ("tap_query", "tap_key", "tap_scores", "tap_pattern")


def tapped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as transformers does, through the taps that `module` has at the moment.

    An edit cannot unmask a key: masked scores are -inf and masked pattern entries 0 whatever a hook returned. A row whose scores
    are all -inf (a padded query, or an ablated head) attends to nothing and its output is 0, never NaN.

    Args:
        module: the attention module.
        query: `batch n_head n_query d_head`, rotated.
        key: `batch n_kv_head n_key d_head`, rotated, with the cached positions first.
        value: as `key`, not rotated.
        attention_mask: what transformers made for the model's own implementation: None (plain causal), bool (True = visible) or
            additive float. It includes sliding windows and padding.
        scaling: of the scores; by default 1 / sqrt(d_head).
        dropout: probability, in training.
        softcap: of the scores, before the mask.
        is_causal: where there is no mask; by default as `module` says.

    Returns:
        `batch n_query n_head d_head`, and the pattern `batch n_head n_query n_key` where the model's own implementation returns
        it.
    """
    query = _through(module, "tap_query", query)
    key = _through(module, "tap_key", key)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)

    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible, bias = visible_keys(module, scores, attention_mask, is_causal)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, -torch.inf)
    scores = _through(module, "tap_scores", scores).masked_fill(~visible, -torch.inf)

    blind = (scores == -torch.inf).all(-1, keepdim=True)
    pattern = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1, dtype=torch.float32)
    pattern = pattern.masked_fill(blind, 0.0).to(value.dtype)
    pattern = _through(module, "tap_pattern", pattern).masked_fill(~visible, 0.0)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    output = (pattern @ value).transpose(1, 2).contiguous()
    # `output_attentions` collects what layers return: under sdpa none does, and a single one would be taken for layer 0's.
    return output, pattern if getattr(module.config, "tapped_from", IMPLEMENTATION) != "sdpa" else None


def _through(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Pass `batch heads pos d` through a tap, as `batch pos heads*d`."""
    tap = getattr(module, name, None)
    if tap is None:
        return x
    batch, heads, positions, width = x.shape
    side_by_side = x.transpose(1, 2).reshape(batch, positions, heads * width)
    return tap(side_by_side).view(batch, positions, heads, width).transpose(1, 2)


def visible_keys(
    module: nn.Module, scores: Tensor, mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor, Tensor | None]:
    """Read a mask.

    Args:
        module: the attention module.
        scores: `batch n_head n_query n_key`.
        mask: as `tapped_attention` gets it.
        is_causal: where there is no mask; by default as `module` says.

    Returns:
        Which keys each query may attend to (`1|batch 1|n_head n_query n_key`), and the finite part of a float mask.
    """
    n_query, n_key = scores.shape[-2:]
    if mask is None:
        everything = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device)
        causal = module.is_causal if is_causal is None else is_causal
        # The last query stands at the last key, also when earlier keys come from a cache.
        return (everything.tril(n_key - n_query) if causal else everything)[None, None], None
    mask = mask[..., :n_key]
    if mask.dtype == torch.bool:
        return mask, None
    visible = mask > torch.finfo(mask.dtype).min / 2
    return visible, mask.masked_fill(~visible, 0.0)


AttentionInterface.register(IMPLEMENTATION, tapped_attention)
# With the first registration alone, a model set to this implementation as a whole would get no mask and look ahead.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class Taps:
    """The taps that some (component, layer) pairs need, as a reusable context manager.

    Args:
        model: a transformers model of a class that `card` covers.
        card: the model's card (`modelcards.card_of(model)`).
        places: the (component, layer) pairs that a config names; those that are ordinary modules need no tap.

    Raises:
        ValueError: if a layer lacks the module that a tap belongs in, or, on entering, if the model's attention implementation or
            a projection cannot be tapped.
        RuntimeError: on entering, if the model has one of these taps already.
    """

    def __init__(self, model: Any, card: Card, places: Iterable[tuple[str, int]]) -> None:
        self.model = model
        self._post_norm_scale, self._split = card.post_norm_scale, card.fused
        self._multiplier = card.residual_scale(model.config)
        self._taps: dict[str, tuple[nn.Module, str, nn.Identity]] = {}
        self._contributions: list[tuple[nn.Identity, nn.Module, nn.Module]] = []
        self._rows: dict[str, _Rows] = {}
        self._undo: list[Callable[[], object]] = []
        mapping = card.mapping(type(model))
        for component, layer in places:
            path = at_layer(mapping[component][0], layer) if component in mapping else ""
            parent_path, _, name = path.rpartition(".")
            if not name.startswith(PREFIX) or path in self._taps:
                continue
            tap = nn.Identity()
            try:
                parent = model.get_submodule(parent_path)
            except AttributeError:
                raise ValueError(f"layer {layer} of this model has no {component}: it has no {parent_path}.") from None
            self._taps[path] = (parent, name, tap)
            if name in ("tap_router", "tap_experts", "tap_rows_in", "tap_rows_out"):
                block = model.get_submodule(at_layer(mapping["block_output"][0], layer))
                self._rows[path] = _Rows(parent, tap, block)
            if component == "head_contribution":
                projection = model.get_submodule(at_layer(mapping["attention_value_output"][0], layer))
                adder = projection
                if card.post_norm_scale is not None:
                    adder = model.get_submodule(at_layer(mapping["attention_contribution"][0], layer))
                self._contributions.append((tap, projection, adder))

    def __enter__(self) -> Taps:
        try:
            for path, (parent, name, tap) in self._taps.items():
                if hasattr(parent, name):
                    raise RuntimeError(
                        f"this model has {name} already: finish the other intervened run before starting one."
                    )
                setattr(parent, name, tap)
                self._undo.append(partial(delattr, parent, name))
                if name in INSIDE_ATTENTION:
                    self._redirect(parent)
                elif name == "tap_logits":
                    self._undo.append(parent.register_forward_hook(_logits_through_tap).remove)
                elif name == "tap_added":
                    self._undo.append(parent.register_forward_hook(partial(_added, tap, self._multiplier)).remove)
                elif name.startswith(FUSED):
                    self._undo.append(parent.register_forward_hook(partial(self._fused, tap, name)).remove)
                elif path in self._rows:
                    self._undo += self._rows[path].hook(name)
            for wires in self._contributions:
                self._wire_contribution(*wires)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _redirect(self, attention: Any) -> None:
        """Run this one attention module through `tapped_attention`."""
        if attention.config._attn_implementation != IMPLEMENTATION:
            self._undo.append(partial(setattr, attention, "config", redirect(attention, IMPLEMENTATION)))

    def _fused(self, tap: nn.Identity, name: str, _: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        """Pass queries, keys or values, heads side by side, from the fused output through a tap."""
        assert self._split is not None
        sizes = dimensions(self.model.config)
        index = ("query", "key", "value").index(name.removeprefix(FUSED))
        own = self._split(output, sizes)[index].flatten(2)
        edited = tap(own)
        if edited is own:
            return None
        entries = torch.arange(output.shape[-1], device=output.device)[None, None]
        return output.index_copy(-1, self._split(entries, sizes)[index].flatten(), edited)

    def _wire_contribution(self, tap: nn.Identity, projection: nn.Module, adder: nn.Module) -> None:
        """Pass what each head adds to the residual stream through `tap`, and add what an edit changes to the sum.

        Without a post-norm that is z_h W_O^h times the residual scale; an edit is added to the output projection's sum. With one
        (Gemma 2) each share is scaled as this very forward pass scaled the sum (the norm's scale frozen), and an edit is added
        after the norm.
        """
        post_norm_scale = self._post_norm_scale
        seen: dict[str, Tensor] = {}

        def add_what_changed(shares: Tensor, total: Tensor, multiplier: float = 1.0) -> Tensor | None:
            flat = shares.flatten(2) * multiplier
            edited = tap(flat)
            if edited is flat:  # no edit: keep the model's own sum, to the last bit
                return None
            return total + (edited - flat).view_as(shares).sum(2) / multiplier

        def at_projection(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            shares = head_shares(args[0], module, self.model.config.num_attention_heads)
            if post_norm_scale is None:
                return add_what_changed(shares, output, self._multiplier)
            seen["shares"] = shares
            return None

        def at_post_norm(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            assert post_norm_scale is not None
            scale = post_norm_scale(module, args[0])
            return add_what_changed(seen.pop("shares") * scale[:, :, None], output)

        self._undo.append(projection.register_forward_hook(at_projection).remove)
        if post_norm_scale is not None:
            self._undo.append(adder.register_forward_hook(at_post_norm).remove)


class _Rows:
    """A tap on a module that receives tokens as rows, without their batch: router, experts, and the MLP of some families.

    The tap gets `batch pos d`; the batch is that of the block around the module.
    """

    def __init__(self, module: nn.Module, tap: nn.Identity, block: nn.Module) -> None:
        self.module, self.tap, self.block = module, tap, block
        self.shape: torch.Size = torch.Size()

    def hook(self, name: str) -> list[Callable[[], None]]:
        """Register the hooks; returns what removes them."""

        def entering(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.shape = (args[0] if args else kwargs["hidden_states"]).shape[:-1]

        handles = [self.block.register_forward_pre_hook(entering, with_kwargs=True)]
        if name == "tap_rows_in":
            handles.append(self.module.register_forward_pre_hook(lambda _, args: self._through(args[0])))
        else:
            see: Any = {"tap_router": self._router, "tap_experts": self._experts}.get(name, self._out)
            handles.append(self.module.register_forward_hook(see))
        return [handle.remove for handle in handles]

    def _through(self, rows: Tensor) -> Tensor | None:
        """Pass rows, which may have their batch already, through the tap; None without an edit."""
        seen = rows if rows.ndim > 2 else rows.view(*self.shape, -1)
        edited = self.tap(seen)
        return None if edited is seen else edited.view_as(rows)

    def _out(self, _: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        return self._through(output)

    def _router(self, router: Any, _: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        edited = self._through(output[0])
        if edited is None:
            return None
        # The model's own softmax and choice on the edited logits: its router with the identity as weight.
        twin = copy.copy(router)
        twin._parameters = {"weight": torch.eye(edited.shape[-1], dtype=edited.dtype, device=edited.device)}
        twin.hidden_dim = edited.shape[-1]
        return twin.forward(edited)

    def _experts(self, experts: Any, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> Tensor | None:
        rows, chosen, weights = args
        no_expert = torch.full_like(chosen, experts.num_experts)
        one_by_one = inspect.unwrap(type(experts).forward)  # not the grouped product, which cannot skip a token
        parts = [
            one_by_one(experts, rows, torch.where(chosen == expert, chosen, no_expert), weights)
            for expert in range(experts.num_experts)
        ]
        flat = torch.stack(parts, 1).flatten(1)
        edited = self._through(flat)
        if edited is None:
            return None
        return output + (edited - flat).unflatten(1, (experts.num_experts, -1)).sum(1)


def _added(tap: nn.Identity, multiplier: float, _: nn.Module, __: tuple, output: Any) -> Any:
    """Pass what a block adds to the residual, a module's output times a multiplier, through a tap."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    seen = first * multiplier
    edited = tap(seen)
    if edited is seen:
        return None
    return (edited / multiplier, *rest) if isinstance(output, tuple) else edited / multiplier


def redirect(attention: Any, implementation: str) -> Any:
    """Switch one attention module to another attention implementation, by a config of its own.

    Args:
        attention: the module.
        implementation: a name in transformers' AttentionInterface.

    Returns:
        The config it had, to be put back.

    Raises:
        ValueError: if the model's own implementation makes masks of another form.
    """
    own = attention.config
    named = own._attn_implementation
    if named not in MASKS_UNDERSTOOD:
        raise ValueError(
            f"attention internals cannot be seen under the attention implementation {named!r}; "
            "load the model with attn_implementation='sdpa' or 'eager'."
        )
    redirected = copy.copy(own)  # shallow: `own` may be shared by every layer, and by other models
    redirected._attn_implementation_internal = implementation
    redirected.tapped_from = named
    attention.config = redirected
    return own


def output_weight(projection: Any) -> Tensor | None:
    """Return a plain projection's weight as `d_in d_out`; None if it is quantised, adapted or offloaded and cannot be sliced."""
    weight = projection.weight
    if type(projection) not in (nn.Linear, Conv1D, FalconLinear) or type(weight) not in (nn.Parameter, Tensor):
        return None  # torchao's weights are a Linear's, of another type
    if not weight.is_floating_point() or weight.is_meta:
        return None
    return weight if isinstance(projection, Conv1D) else weight.T


def head_shares(z: Tensor, projection: Any, heads: int) -> Tensor:
    """Compute z_h W_O^h for every head; the bias belongs to no head.

    Args:
        z: `batch pos n_head*d_head`, input of the output projection.
        projection: attention's output projection.
        heads: number of heads.

    Returns:
        `batch pos n_head d_model`.

    Raises:
        ValueError: if the projection's weight cannot be split by heads.
    """
    weight = output_weight(projection)
    if weight is None and not projection.weight.is_meta:
        raise ValueError(
            f"head_contribution needs a plain output projection to split by heads, not {type(projection).__name__} with "
            f"{projection.weight.dtype} weights; merge adapters, and load the model without quantisation."
        )
    if weight is None:
        raise ValueError(
            "head_contribution needs the output projection's weights, which are offloaded; load the model without offloading."
        )
    return torch.einsum("bphd,hdm->bphm", z.unflatten(-1, (heads, -1)), weight.unflatten(0, (heads, -1)).to(z.dtype))


def _logits_through_tap(model: Any, args: tuple, output: Any) -> Any:
    """Pass the logits of a forward pass through the model's tap; its loss, if any, is computed from those before."""
    if isinstance(output, tuple):
        place = next(index for index, value in enumerate(output) if value.ndim == 3)
        return (*output[:place], model.tap_logits(output[place]), *output[place + 1 :])
    output["logits"] = model.tap_logits(output["logits"])
    return output
