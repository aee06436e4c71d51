"""Slow, obvious versions of every component, to check cards against: plain hooks, and attention written out.

`Truth` shares no code with the cards, the taps or pyvene: it finds modules by their usual names in transformers, edits out of
place, runs eager attention, and recomputes attention's inner activations from the formula.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelcards import dimensions

Change = Callable[[Tensor], Tensor]  # [batch pos d], or [batch head pos d] where there is a head axis


class Truth:
    """Run a model with edits of its components, or read them, through independent hooks."""

    def __init__(self, model: Any) -> None:
        """Take a transformers model of a family that this module knows."""
        self.model = model
        self.decoder: Any = getattr(model.base_model, "decoder", model.base_model)
        self.blocks: Any = _first(self.decoder, "layers", "h")
        self.sizes = dimensions(model.config)

    def run(self, inputs: dict[str, Tensor], component: str = "", layer: int = 0, edit: Change | None = None) -> Tensor:
        """Run the model with one edit.

        Args:
            inputs: a tokenised batch, keyword arguments of the model's forward.
            component: pyvene's name of a component.
            layer: its layer.
            edit: takes the component's activation, `batch pos d` or `batch head pos d`, and returns an edited copy; None for
                none.

        Returns:
            Logits, or last hidden states of a model without head.
        """
        return self.run_with(inputs, [] if edit is None else [(component, layer, edit)])

    def run_with(self, inputs: dict[str, Tensor], edits: Iterable[tuple[str, int, Change]]) -> Tensor:
        """Run the model with several edits.

        Args:
            inputs: a tokenised batch, keyword arguments of the model's forward.
            edits: component, layer and edit of each; several at one place apply in order.

        Returns:
            Logits, or last hidden states of a model without head.
        """
        with _eager(self.model), torch.no_grad(), ExitStack() as stack:
            for component, layer, edit in edits:
                stack.enter_context(self._place(component, layer, edit, inputs["input_ids"].shape))
            return first_tensor(self.model(**inputs))

    def read(self, inputs: dict[str, Tensor], component: str, layer: int) -> Tensor:
        """Read a component in a run without edits.

        Args:
            inputs: a tokenised batch, keyword arguments of the model's forward.
            component: pyvene's name of a component.
            layer: its layer.

        Returns:
            `batch pos d`, or `batch head pos d` for a component with heads.
        """
        seen: list[Tensor] = []

        def look(x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x

        self.run(inputs, component, layer, look)
        return seen[-1]

    @contextmanager
    def _place(self, component: str, layer: int, edit: Change, shape: torch.Size) -> Iterator[None]:
        block: Any = self.blocks[layer]
        attention: Any = _first(block, "self_attn", "attn", "attention", "self_attention")
        mlp: Any = getattr(block, "mlp", block)  # OPT's blocks contain the MLP's layers directly
        projection: Any = _first(attention, "o_proj", "c_proj", "dense", "out_proj")
        down: Any = (
            None if hasattr(mlp, "experts") else _first(mlp, "down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2")
        )
        bloom = self.model.config.model_type == "bloom"  # BLOOM's attention and MLP add the residual themselves
        output, mlp_output = (projection, down) if bloom else (attention, down if mlp is block else mlp)
        post_norms = hasattr(block, "post_feedforward_layernorm")
        adds_attention = block.post_attention_layernorm if post_norms else output
        adds_mlp = block.post_feedforward_layernorm if post_norms else mlp_output
        scale = getattr(block, "residual_multiplier", 1.0)
        by_head = partial(_by_head, edit, self.sizes["n_head"])
        with ExitStack() as stack:

            def at(module: nn.Module, side: str, change: Change) -> None:
                def unflattened(x: Tensor) -> Tensor:  # some modules see the tokens of all examples as one axis
                    return change(x.view(*shape, -1)).view_as(x) if x.ndim == 2 else change(x)

                stack.callback(_hook(module, side, unflattened).remove)

            match component:
                case "embeddings":
                    at(self.blocks[0], "in", edit)
                case "block_input":
                    at(block, "in", edit)
                case "block_output":
                    at(block, "out", edit)
                case "resid_mid":
                    before: list[Tensor] = []
                    at(block, "in", lambda x: before.append(x) or x)  # type: ignore[func-returns-value]
                    if scale != 1.0:  # scaled here instead, so that the block's own sum reproduces the edit exactly
                        block.residual_multiplier = 1.0
                        stack.callback(setattr, block, "residual_multiplier", scale)
                        at(adds_mlp, "out", lambda x: scale * x)
                    at(adds_attention, "out", lambda x: edit(before[-1] + scale * x) - before[-1])
                case "attention_contribution":
                    at(adds_attention, "out", lambda x: edit(scale * x) / scale)
                case "mlp_contribution":
                    at(adds_mlp, "out", lambda x: edit(scale * x) / scale)
                case "head_contribution":
                    self._head_contribution(
                        at, projection, block.post_attention_layernorm if post_norms else None, edit, scale
                    )
                case "attention_input":
                    at(attention, "in", edit)
                case "query_output" | "key_output" | "value_output":
                    self._projected(at, attention, component.removesuffix("_output"), edit, by_head=False)
                case "head_query_output" | "head_key_output" | "head_value_output":
                    name = component.removeprefix("head_").removesuffix("_output")
                    self._projected(at, attention, name, edit, by_head=True)
                case "attention_value_output":
                    at(projection, "in", edit)
                case "head_attention_value_output":
                    at(projection, "in", by_head)
                case "attention_output":
                    at(output, "out", edit)
                case "mlp_input":
                    at(mlp.fc1 if mlp is block else mlp, "in", edit)
                case "mlp_gate" if hasattr(mlp, "gate_up_proj"):
                    at(
                        mlp.gate_up_proj,
                        "out",
                        lambda x: torch.cat([edit(x[..., : x.shape[-1] // 2]), x[..., x.shape[-1] // 2 :]], -1),
                    )
                case "mlp_up" if hasattr(mlp, "gate_up_proj"):
                    at(
                        mlp.gate_up_proj,
                        "out",
                        lambda x: torch.cat([x[..., : x.shape[-1] // 2], edit(x[..., x.shape[-1] // 2 :])], -1),
                    )
                case "mlp_gate":
                    at(mlp.gate_proj, "out", edit)
                case "mlp_up":
                    at(_first(mlp, "up_proj", "c_fc", "dense_h_to_4h", "fc_in", "fc1"), "out", edit)
                case "mlp_activation":
                    at(_first(mlp, "act_fn", "act", "activation_fn", "gelu_impl"), "out", edit)
                case "mlp_neurons":
                    at(down, "in", edit)
                case "mlp_output":
                    at(mlp_output, "out", edit)
                case "router_logits":
                    stack.callback(_route(mlp, edit, shape))
                case "expert_contribution":
                    stack.callback(_mix(mlp, edit, shape))
                case "final_norm":
                    at(_first(self.decoder, "norm", "ln_f", "final_layer_norm"), "out", edit)
                case "logits":
                    at(self.model if self.model.get_output_embeddings() is not None else self.model.score, "out", edit)
                case _:
                    stack.enter_context(_attention_written_out(attention, component, edit))
            yield

    def _projected(self, at: Callable[..., None], attention: Any, name: str, edit: Change, by_head: bool) -> None:
        """Edit queries, keys or values, wherever a projection puts the columns of each head."""
        heads, groups, width = self.sizes["n_head"], self.sizes["n_kv_head"], self.sizes["d_head"]
        index, count = ("query", "key", "value").index(name), heads if name == "query" else groups
        starts = [head * width for head in range(count)]
        if hasattr(attention, "query_key_value") and groups == heads:  # q, k and v of each head are adjacent
            fused, starts = attention.query_key_value, [(3 * head + index) * width for head in range(count)]
        elif (
            fused := getattr(attention, "c_attn", None)
            or getattr(attention, "qkv_proj", None)
            or getattr(attention, "query_key_value", None)
        ):
            first = (0, heads, heads + groups)[index] * width
            starts = [first + start for start in starts]
        else:
            fused = getattr(attention, f"{name[0]}_proj")

        def change(x: Tensor) -> Tensor:
            split = torch.stack([x[..., start : start + width] for start in starts], 1)
            joined = torch.cat(list(split.unbind(1)), -1)
            split = edit(split) if by_head else torch.stack(edit(joined).chunk(count, -1), 1)
            x = x.clone()
            for head, start in enumerate(starts):
                x[..., start : start + width] = split[:, head]
            return x

        at(fused, "out", change)

    def _head_contribution(
        self, at: Callable[..., None], projection: Any, post_norm: Any, edit: Change, residual_scale: float
    ) -> None:
        heads, width = self.sizes["n_head"], self.sizes["d_head"]
        shares: list[Tensor] = []

        def split(z: Tensor) -> Tensor:
            # transformers' Conv1D stores the transpose of nn.Linear's weight.
            rows = projection.weight if hasattr(projection, "nf") else projection.weight.T
            shares[:] = [z[..., h * width : (h + 1) * width] @ rows[h * width : (h + 1) * width] for h in range(heads)]
            return z

        def replace(total: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            parts = torch.stack([share * scale for share in shares], dim=1) * residual_scale  # batch head pos d_model
            return total - parts.sum(1) / residual_scale + edit(parts).sum(1) / residual_scale

        at(projection, "in", split)
        if post_norm is None:
            at(projection, "out", replace)
        else:
            entering: list[Tensor] = []
            at(post_norm, "in", lambda x: entering.append(x) or x)  # type: ignore[func-returns-value]
            at(post_norm, "out", lambda x: replace(x, x / entering[-1]))  # the norm's scale, frozen


def _route(mlp: Any, edit: Change, shape: torch.Size) -> Callable[[], None]:
    """Edit the router's logits, then recompute the choice: softmax, top-k experts, weights (normalised in some families)."""
    router = mlp.gate

    def routed(_: nn.Module, __: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = edit(output[0].view(*shape, -1)).flatten(0, 1)
        probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        weights, chosen = probabilities.topk(router.top_k)  # ties go to whichever topk takes
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen

    return router.register_forward_hook(routed).remove


def _mix(mlp: Any, edit: Change, shape: torch.Size) -> Callable[[], None]:
    """Edit each expert's contribution, `batch expert pos d_model`: its weight times down(act(gate) * up), 0 if not chosen."""
    experts = mlp.experts

    def mixed(_: nn.Module, args: tuple[Tensor, Tensor, Tensor], total: Tensor) -> Tensor:
        rows, chosen, weights = args
        parts = []
        for expert in range(len(experts.down_proj)):
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
            weight = (weights * (chosen == expert)).sum(-1, keepdim=True)
            parts.append(weight * ((experts.act_fn(gate) * up) @ experts.down_proj[expert].T))
        by_expert = torch.stack(parts, 1).view(*shape, len(parts), -1).transpose(1, 2)
        return total + (edit(by_expert) - by_expert).sum(1).flatten(0, 1)

    return experts.register_forward_hook(mixed).remove


def _by_head(edit: Change, heads: int, x: Tensor) -> Tensor:
    """Apply an edit of `batch head pos d` to `batch pos head*d`."""
    split = torch.stack(x.chunk(heads, dim=-1), dim=1)
    return torch.cat(list(edit(split).unbind(1)), dim=-1)


@contextmanager
def _attention_written_out(attention: Any, component: str, edit: Change) -> Iterator[None]:
    """Replace one module's eager attention by the formula, with an edit of one of its inner activations."""
    by_place: dict[str, Change] = {component.removeprefix("head_"): edit}
    if component in ("query_rotated", "key_rotated"):
        by_place = {component: lambda x: _flat_edit(edit, x)}
    inside: Any = sys.modules[type(attention).__module__]
    original = inside.eager_attention_forward

    def written_out(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if module is not attention:
            return original(module, query, key, value, mask, **options)
        query = by_place.get("query_rotated", _unchanged)(query)
        key = by_place.get("key_rotated", _unchanged)(key)
        group = query.shape[1] // key.shape[1]
        outputs = []
        all_scores = torch.stack(
            [query[:, h] @ key[:, h // group].transpose(1, 2) for h in range(query.shape[1])], dim=1
        )
        all_scores = all_scores * options["scaling"]
        if options.get("softcap"):
            all_scores = options["softcap"] * torch.tanh(all_scores / options["softcap"])
        assert mask is not None  # transformers always passes one to eager attention
        masked = (mask[..., : key.shape[2]] < torch.finfo(mask.dtype).min / 2).expand_as(all_scores)
        all_scores = all_scores.masked_fill(masked, -torch.inf)
        all_scores = by_place.get("attention_scores", _unchanged)(all_scores).masked_fill(masked, -torch.inf)
        exponential = torch.exp(all_scores - all_scores.amax(-1, keepdim=True).clamp(min=torch.finfo(mask.dtype).min))
        pattern = exponential / exponential.sum(-1, keepdim=True).clamp(min=torch.finfo(mask.dtype).tiny)
        for name in ("attention_pattern", "attention_weight"):
            pattern = by_place.get(name, _unchanged)(pattern).masked_fill(masked, 0.0)
        for h in range(query.shape[1]):
            outputs.append(pattern[:, h] @ value[:, h // group])
        return torch.stack(outputs, dim=2), pattern

    inside.eager_attention_forward = written_out
    try:
        yield
    finally:
        inside.eager_attention_forward = original


def _unchanged(x: Tensor) -> Tensor:
    return x


def _flat_edit(edit: Change, x: Tensor) -> Tensor:
    """Apply an edit of `batch pos head*d` to `batch head pos d`."""
    flat = torch.cat(list(x.unbind(1)), dim=-1)
    return torch.stack(edit(flat).chunk(x.shape[1], dim=-1), dim=1)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    own = model.config._attn_implementation
    model.config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation_internal = own


def _first(module: Any, *names: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(
        f"{type(module).__name__} has none of {', '.join(names)}: add this architecture's names to "
        "pyvene_ext.intervenable.truth."
    )


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output: logits or last hidden states.

    Args:
        output: a tensor, a tuple or a model output.

    Returns:
        The tensor.
    """
    return output if isinstance(output, Tensor) else output[0]


def _hook(module: nn.Module, side: str, change: Change) -> Any:
    if side == "in":

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        output["logits"] = change(output["logits"])
        return output

    return module.register_forward_hook(after)
