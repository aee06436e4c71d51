"""Hooks on a model's components: read, replace or record activations during a forward pass; and split tensors by heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from pyvene.models.constants import CONST_INPUT_HOOK
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelcards import Card, card_of, dimensions, n_layers
from modelcards.attention_taps import MASKS_UNDERSTOOD, output_weight

Where = tuple[str, int]  # a component and its layer
# For each head-wise site, the component that holds all heads side by side: a slice of a tensor is not part of the graph.
SIDE_BY_SIDE = {"q": "query_output", "k": "key_output", "v": "value_output", "z": "attention_value_output"}
OWN_INPUT = ("attention_input", "mlp_input")
HookFn = Callable[[Tensor], Tensor | None]  # reads an activation; what it returns, unless None, replaces it


class StopForward(Exception):
    """Raised inside a forward pass to end it early, once everything needed has been recorded."""


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that is compiled, in whole or in part: hooks may be left out of compiled code without a sign.

    Args:
        model: the model.

    Raises:
        ValueError: names a module that torch.compile has compiled.
    """
    compiled = [
        name or "the model"
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
    ]
    if compiled or hasattr(vars(model).get("forward"), "_torchdynamo_orig_callable"):
        which = compiled[0] if compiled else "the forward of the model"
        raise ValueError(
            f"{which} is compiled by torch.compile, and hooks do not reach into compiled code; load the model again and leave it "
            "uncompiled (sweep(..., compile=True) compiles what it can)."
        )


@contextmanager
def on_input(module: nn.Module, fn: HookFn) -> Iterator[None]:
    """Call `fn` on a module's input inside the block.

    Args:
        module: the module; its input is the first argument, or `hidden_states`.
        fn: reads the input; what it returns, unless None, is passed to the module instead. Other users of the same tensor keep
            the original.
    """

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        new = fn(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, fn: HookFn) -> Iterator[None]:
    """Call `fn` on a module's output inside the block.

    Args:
        module: the module; of a tuple, its output is the first entry.
        fn: reads the output; what it returns, unless None, replaces it.
    """

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        new = fn(first)
        return new if new is None or not isinstance(output, tuple) else (new, *rest)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_forward(module: nn.Module, function: Callable[..., Any], *, loaded: bool = False) -> Iterator[None]:
    """Call `function` instead of a module's forward inside the block; the module's hooks still run.

    Args:
        module: the module.
        function: takes the arguments of the module's forward and returns its output.
        loaded: let accelerate load the module's weights before, if it has offloaded them.
    """
    # accelerate puts its own forward there, which loads the weights and calls the module's.
    name = "_old_forward" if loaded and "_old_forward" in vars(module) else "forward"
    own = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def hook_component(
    model: PreTrainedModel, where: Where, fn: HookFn, hooks: ExitStack, card: Card | None = None
) -> None:
    """Hook one component of a layer.

    Args:
        model: a model whose family has a card. Components inside attention need `modelcards.Taps` around the forward pass.
        where: the component and its layer.
        fn: reads the component's activation, all heads side by side; what it returns, unless None, replaces it.
        hooks: closing it removes the hook.
        card: the model's, for those who hook many components: looking it up goes through all modules.

    Raises:
        ValueError: the family has no such component.
    """
    component, layer = where
    card = card or card_of(model)
    card.component(model, component)  # raises for what a family lacks
    at_input = card.mapping(type(model))[component][1] == CONST_INPUT_HOOK
    hooks.enter_context((on_input if at_input else on_output)(card.module(model, component, layer), fn))


def record_activations(
    model: PreTrainedModel, places: Iterable[Where], hooks: ExitStack, graph: bool = False
) -> dict[Where, Tensor]:
    """Record activations of the next forward pass.

    Args:
        model: a model whose family has a card.
        places: components and their layers.
        hooks: closing it removes the hooks.
        graph: make every recorded tensor part of the autograd graph, so that it can have a gradient.

    Returns:
        A dict that the forward pass fills: the activation of each place, all heads side by side.
    """
    seen: dict[Where, Tensor] = {}
    card = card_of(model)

    def keep(where: Where) -> HookFn:
        def kept(x: Tensor) -> Tensor | None:
            if graph and not x.requires_grad:
                x.requires_grad_()  # the tensor itself, not a copy: the residual stream also bypasses the hooked module
            if graph and (where[0] in OWN_INPUT or card.is_tap(model, where[0])):
                # A view for this module alone: in some families other modules get the same tensor (OLMo 2's get the stream
                # itself), and a tap's tensor joins the graph only if a new tensor replaces it.
                seen[where] = x.view_as(x)
                return seen[where]
            seen[where] = x
            # Falcon adds attention's output to the MLP's in place.
            return x.clone() if where[0] == "mlp_contribution" else None

        return kept

    for where in places:
        hook_component(model, where, keep(where), hooks, card)
    return seen


def record_call(model: PreTrainedModel, layer: int, calls: dict[int, tuple[tuple, dict]], hooks: ExitStack) -> None:
    """Record the arguments of a layer's attention module in the next forward pass.

    Args:
        model: a model whose family has a card.
        layer: the layer.
        calls: filled with the positional and keyword arguments, by layer.
        hooks: closing it removes the hook.
    """

    def keep(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[layer] = args, kwargs

    attention = card_of(model).module(model, "attention_input", layer)
    hooks.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)


def attention_can_be_seen(model: PreTrainedModel) -> bool:
    """Whether a model's attention goes through transformers' AttentionInterface, so that its scores can be read and replaced.

    Args:
        model: a model with a card.

    Returns:
        True if the family's card exposes the scores and the implementation is eager or sdpa.
    """
    mapped = "attention_scores" in card_of(model).mapping(type(model))
    return mapped and model.config._attn_implementation in MASKS_UNDERSTOOD


def split_heads(x: Tensor, component: str, model: PreTrainedModel) -> Tensor:
    """Take one component out of the tensor that its module reads or writes.

    Args:
        x: the module's tensor, `batch pos width`, all heads side by side (and q, k and v, if they are fused).
        component: pyvene's name of the component.
        model: the model, whose card says how the tensor is laid out.

    Returns:
        `batch head pos d_head`, or `batch pos d` for a component without heads.
    """
    sizes = dimensions(model.config)
    for split, part in card_of(model).mapping(type(model))[component][2:]:
        x = split(x, sizes.get(part, part))
    return x


def head_entries(model: PreTrainedModel, component: str, width: int) -> Int[Tensor, "head d_head"]:
    """Which entries of a module's last axis belong to each head.

    Args:
        model: the model, whose card says how the tensor is laid out.
        component: pyvene's name of the component.
        width: the size of the last axis.

    Returns:
        Indices by head; a component without heads has one row.
    """
    found = split_heads(torch.arange(width)[None, None], component, model)
    return found[0, :, 0] if found.ndim == 4 else found[0]


def check_projections(model: PreTrainedModel) -> None:
    """Check that every layer's output projection can be split by heads.

    Args:
        model: a model whose family has a card.

    Raises:
        ValueError: a projection is quantised, offloaded or wrapped by an adapter; names its layer.
    """
    card = card_of(model)
    for layer in range(n_layers(model.config)):
        projection = card.module(model, "attention_value_output", layer)
        if output_weight(projection) is None:
            raise ValueError(
                f"the output projection of layer {layer} is a {type(projection).__name__} whose weights cannot be split by "
                "heads; merge adapters, and load the model without quantisation and offloading."
            )
