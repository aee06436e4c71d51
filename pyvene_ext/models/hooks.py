"""What a model's places hold while it runs, read or changed as it goes by; and whether its weights can be taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from pyvene.models.constants import CONST_INPUT_HOOK
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelcards import card_of, dimensions, n_layers
from modelcards.attention_taps import output_weight

Where = tuple[str, int]  # a component and its layer
# Sites of heads, by the component that has all heads side by side: a part of a tensor would be no part of the graph.
SIDE_BY_SIDE = {"q": "query_output", "k": "key_output", "v": "value_output", "z": "attention_value_output"}
OWN_INPUT = ("attention_input", "mlp_input")
See = Callable[[Tensor], Tensor | None]  # what it returns goes on in place of what it was given


class StopForward(Exception):
    """Ends a forward pass from inside: everything that was wanted of it is there."""


@contextmanager
def on_input(module: nn.Module, see: See) -> Iterator[None]:
    """For a while, `see` is given what a module is given; whoever else holds a tensor that is replaced keeps it as it is."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        new = see(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, see: See) -> Iterator[None]:
    """For a while, `see` is given what a module gives, or the first of several."""

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        new = see(first)
        return new if new is None or not isinstance(output, tuple) else (new, *rest)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Call `function` in place of a module's forward, for a while; its hooks stay."""
    own = module.__dict__.get("forward")  # accelerate puts one there
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def visit(model: PreTrainedModel, where: Where, see: See, hooks: ExitStack) -> None:
    """`see` what a component's module gets or gives, as its card says, all heads side by side, until `hooks` are closed.

    Components inside attention are there within `modelcards.Taps` only.
    """
    component, layer = where
    card = card_of(model)
    card.component(model, component)  # raises for what a family lacks
    at_input = card.mapping(type(model))[component][1] == CONST_INPUT_HOOK
    hooks.enter_context((on_input if at_input else on_output)(card.module(model, component, layer), see))


def keep_places(
    model: PreTrainedModel, places: Iterable[Where], hooks: ExitStack, graph: bool = False
) -> dict[Where, Tensor]:
    """What a run will show at these places; with `graph` it can be asked for gradients there."""
    seen: dict[Where, Tensor] = {}
    card = card_of(model)

    def keep(where: Where) -> See:
        def kept(x: Tensor) -> Tensor | None:
            if graph and not x.requires_grad:
                x.requires_grad_()  # itself, no copy: the residual stream also goes on beside the module that is hooked
            if graph and (where[0] in OWN_INPUT or card.is_tap(model, where[0])):
                # A view for this module alone: in some families others are given the same tensor (the stream itself in OLMo 2);
                # and a tap's tensor is part of the graph only where it goes on as another one.
                seen[where] = x.view_as(x)
                return seen[where]
            seen[where] = x
            # Falcon adds attention's output to the MLP's in place.
            return x.clone() if where[0] == "mlp_contribution" else None

        return kept

    for where in places:
        visit(model, where, keep(where), hooks)
    return seen


def keep_call(model: PreTrainedModel, layer: int, calls: dict[int, tuple[tuple, dict]], hooks: ExitStack) -> None:
    """Remember how a layer's attention module is called."""

    def keep(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[layer] = args, kwargs

    attention = card_of(model).module(model, "attention_input", layer)
    hooks.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)


def split_heads(x: Tensor, component: str, model: PreTrainedModel) -> Tensor:
    """A component out of what its module gives: `batch head pos width`, or `batch pos width` without heads."""
    sizes = dimensions(model.config)
    for split, part in card_of(model).mapping(type(model))[component][2:]:
        x = split(x, sizes.get(part, part))
    return x


def entries_of_heads(model: PreTrainedModel, component: str, width: int) -> Int[Tensor, "head d_head"]:
    """Which entries of a module's last axis belong to each head; one row of all of them without heads."""
    found = split_heads(torch.arange(width)[None, None], component, model)
    return found[0, :, 0] if found.ndim == 4 else found[0]


def check_projections(model: PreTrainedModel) -> None:
    """Raise ValueError where an output projection cannot be taken apart by heads."""
    for layer in range(n_layers(model.config)):
        projection = card_of(model).module(model, "attention_value_output", layer)
        if output_weight(projection) is None:
            raise ValueError(
                f"the output projection of layer {layer} is a {type(projection).__name__} whose weights cannot be split by "
                "heads; merge adapters, and load the model without quantisation and offloading."
            )
