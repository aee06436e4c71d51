"""Models without a card, as pyvene's two mappings, or a user's entries in them, describe them.

The mappings name modules and widths. How many positions and heads there are is known only when a module runs, so that locations
are checked against its activation (`check_activation`) and not before the run.
"""

from __future__ import annotations

from typing import Any

from pyvene import RepresentationConfig, type_to_dimension_mapping, type_to_module_mapping
from pyvene.models.modeling_utils import (
    get_dimension_by_component,
    get_module_hook,
    is_stateless,
    output_to_subcomponent,
)
from torch import Tensor, nn

SHAPES = {"pos": "batch pos d", "h": "batch head pos d", "h.pos": "batch head pos d", "t": "batch d"}


def is_mapped(item: RepresentationConfig, model: Any) -> bool:
    """Whether pyvene's module mapping has a component of this name for the model's class."""
    return item.component in type_to_module_mapping.get(type(model), {})


def check_mapped(item: RepresentationConfig, model: nn.Module) -> None:
    """Refuse a component that pyvene has no place for in this model, and a unit that it would misread there.

    Args:
        item: names a component of pyvene's mapping, or a module by its path.
        model: a model without a card.

    Raises:
        ValueError: says what there is instead.
    """
    name, places = type(model).__name__, type_to_module_mapping.get(type(model), {})
    units = [unit for unit in SHAPES if (unit == "t") != is_stateless(model)]
    if item.unit not in units:
        raise ValueError(
            f"unit {item.unit!r} of {item.component} is wrong for {name}; use {' or '.join(map(repr, units))}."
        )
    if not is_mapped(item, model):
        if "." in item.component:
            return
        known = f"only {', '.join(places)}" if places else "nothing"
        raise ValueError(
            f"no model card covers {name}, and pyvene's type_to_module_mapping has {known} for it, not {item.component!r}: name "
            "one of these, or a module by its path, such as encoder.layer[0].output."
        )
    try:
        get_module_hook(model, item)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(
            f"{name} has no {item.component} at layer {item.layer}: pyvene's type_to_module_mapping looks for it at "
            f"{places[item.component][0]}, which print(model) does not show."
        ) from None
    for _, param in places[item.component][2:]:
        if isinstance(param, str) and mapped_width(param, model) is None:
            raise ValueError(
                f"{item.component} of {name} is split by {param}, which pyvene's type_to_dimension_mapping does not give: set "
                f"pyvene.type_to_dimension_mapping[{name}][{param!r}] to a tuple with the name of a field of the config."
            )


def mapped_width(component: str, model: Any) -> int | None:
    """Return the width that pyvene's dimension mapping gives a component of a model.

    Args:
        component: its name.
        model: a model without a card.

    Returns:
        The width; None if there is none, or if its entry names no field of the config.
    """
    if component not in type_to_dimension_mapping.get(type(model), {}):
        return None
    try:
        return get_dimension_by_component(type(model), model.config, component)
    except (AssertionError, AttributeError, TypeError):
        return None


def check_activation(
    activation: Tensor, locations: Any, item: RepresentationConfig, model: Any, width: int | None
) -> None:
    """Refuse to read or edit an activation for which the locations, the unit or the width do not fit.

    Args:
        activation: what the module takes or gives.
        locations: lists by example of places in it; for the unit h.pos, of heads and of positions; None for all of it.
        item: what is read or edited.
        model: a model without a card.
        width: of the component, as pyvene's mapping has it; None if it has none.

    Raises:
        ValueError: says what the activation is like.
    """
    name = f"{item.component} of {type(model).__name__}"
    part = output_to_subcomponent(activation, item.component, type(model), model.config)
    if width is not None and part.shape[-1] != width:
        raise ValueError(
            f"{name} has width {part.shape[-1]}, and pyvene's type_to_dimension_mapping says {width}: correct that entry."
        )
    if locations is None:
        if part.shape != activation.shape:
            raise ValueError(f"{name} is a part of what its module gives: list its places in unit_locations.")
        return
    shape = SHAPES[item.unit]
    if part.ndim != len(shape.split()):
        raise ValueError(
            f"unit {item.unit!r} needs an activation [{shape}], and {name} has shape {list(part.shape)}: use another unit, or "
            "leave unit_locations out to take it whole."
        )
    levels = {"t": {}, "h.pos": dict(zip(("h", "pos"), locations, strict=False))}.get(item.unit, {item.unit: locations})
    for axis, (level, rows) in enumerate(levels.items(), start=1):
        there = part.shape[axis]
        wrong = next((number for row in rows for number in row if not 0 <= number < there), None)
        if wrong is not None or len(rows) != len(part):
            what = (
                f"{'head' if level == 'h' else 'position'} {wrong}" if wrong is not None else f"example {len(rows) - 1}"
            )
            raise ValueError(f"{what} of {name} is out of range: what is there has shape {list(part.shape)} [{shape}].")
