"""A config, checked and completed before an intervenable model is built from it: places, layers, units, groups and widths.

A model's components are those of its card; without one, those of pyvene's two mappings, with a user's entries in them. These name
modules and widths only, so that the numbers of positions and heads are checked when a module runs (`checks.check_activation`).
"""

from __future__ import annotations

import itertools
import warnings
from copy import copy
from types import FunctionType
from typing import Any

import numpy as np
from pyvene import (
    CollectIntervention,
    IntervenableConfig,
    Intervention,
    LowRankRotatedSpaceIntervention,
    RepresentationConfig,
    SkipIntervention,
    TrainableIntervention,
    ZeroIntervention,
    type_to_dimension_mapping,
    type_to_module_mapping,
)
from pyvene.models.modeling_utils import (
    get_dimension_by_component,
    get_module_hook,
    getattr_for_torch_module,
    is_stateless,
)
from torch import Tensor, nn

from modelcards import FIELD_NAMES, Card, meant, n_layers
from pyvene_ext.intervenable.checks import SHAPES, SWAPS
from pyvene_ext.intervenable.locations import as_lists, is_flat
from pyvene_ext.io.errors import counted

# They edit the whole vector unless they are given a width.
TAKE_ALL = (*SWAPS, SkipIntervention, ZeroIntervention)


def as_config(config: Any) -> IntervenableConfig:
    """Turn what a user gives as a config into one.

    Args:
        config: an `IntervenableConfig`; or a representation, or a list of them, each a `RepresentationConfig`, a dict or a list.

    Returns:
        The config; itself if it is one already.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(config, IntervenableConfig):
        return config
    several = isinstance(config, list | tuple) and not isinstance(config, RepresentationConfig)
    for item in config if several else [config]:
        if not isinstance(item, RepresentationConfig | dict | list):
            raise ValueError(
                f"a config is an IntervenableConfig, a RepresentationConfig or a list of these, and {type(item).__name__} is "
                "none; ablations, patches and other specs are run by pyvene_ext.run."
            )
    return IntervenableConfig(representations=list(config) if several else config)


def check_config(config: IntervenableConfig, model: Any, card: Card | None) -> None:
    """Refuse components, layers, units and groups that this model does not have or that pyvene would misread.

    Args:
        config: the interventions.
        model: the model.
        card: its family's card, if there is one.

    Raises:
        ValueError: says which representation is wrong and what to use instead.
    """
    if not config.representations:
        raise ValueError("the config names no representation: give at least one RepresentationConfig.")
    if config.mode not in ("parallel", "serial"):
        raise ValueError(f"mode must be 'parallel' or 'serial', not {config.mode!r}.")
    kinds = config.intervention_types
    if isinstance(kinds, list) and len(kinds) != len(config.representations):
        raise ValueError(
            f"the config names {counted(len(kinds), 'intervention type')} for "
            f"{counted(len(config.representations), 'representation')}: give one each."
        )
    for number, item in enumerate(config.representations):
        if not isinstance(item.component, str):
            raise ValueError(f"a component is a name, not {item.component!r}.")
        width = _checked_place(item, model, card)
        _check_intervention(item, kinds[number] if isinstance(kinds, list) else kinds, width)
    groups = [representation.group_key for representation in config.representations]
    if any(group is not None for group in groups):
        if None in groups or sorted(set(groups)) != list(range(len(set(groups)))):
            raise ValueError(f"group keys must be 0 .. n-1 and given on every representation, not {groups}.")
        if config.mode == "serial" and len(set(groups)) < len(groups):
            raise ValueError("serial mode takes one representation per group; use mode='parallel' for several.")


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
    if item.component not in places:
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


def _checked_place(item: RepresentationConfig, model: Any, card: Card | None) -> int | None:
    """The width of what a representation names, if it is known. Raises ValueError for a place or unit that this model lacks."""
    if card is None:
        check_mapped(item, model)
    if "." in item.component and (card is not None or not is_mapped(item, model)):
        _check_path(model, item.component, {} if card is None else card.mapping(type(model)))
        return None  # the rest of a raw path is up to the user
    if card is None:
        return mapped_width(item.component, model)
    component, layers = card.component(model, item.component), n_layers(model.config)
    if type(item.layer) is not int and not isinstance(item.layer, np.integer):
        raise ValueError(f"the layer of {component.name} must be a whole number, not {item.layer!r}.")
    if component.per_layer and not 0 <= item.layer < layers:
        raise ValueError(
            f"layer {item.layer} of {component.name} is out of range: {type(model).__name__} has layers 0 to {layers - 1}."
        )
    if item.unit not in component.units:
        raise ValueError(
            f"unit {item.unit!r} is wrong for {component.name} ({component.shape}); "
            f"use {' or '.join(map(repr, component.units))}."
        )
    return card.width(model, component.name)


def _check_path(model: Any, path: str, places: dict[str, tuple[Any, ...]]) -> None:
    if path.rpartition(".")[2] not in ("input", "output"):
        close = meant(path, places=places)
        raise ValueError(
            f"the module path {path!r} must end in .input or .output"
            + (f"; or did you mean the component {close!r}?" if close else ".")
        )
    try:
        getattr_for_torch_module(model, path.rpartition(".")[0])
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(
            f"{type(model).__name__} has no module {path.rpartition('.')[0]!r}; print(model) shows its modules, and a layer is "
            "written as model.layers[3]."
        ) from None


def _check_intervention(item: RepresentationConfig, kind: Any, width: int | None) -> None:
    """Raise ValueError for what pyvene cannot make an intervention of, in a component of this width (None: unknown)."""
    units, rank = item.max_number_of_units, item.low_rank_dimension
    if item.intervention is not None:
        if not isinstance(item.intervention, Intervention | FunctionType):
            raise ValueError(
                f"the intervention on {item.component} is an instance of an intervention class or a function, not "
                f"{item.intervention!r}; a class is given as intervention_type."
            )
        rotation = getattr(getattr(item.intervention, "rotate_layer", None), "weight", None)
        if width is not None and rotation is not None and len(rotation) not in (width, width * int(units or 1)):
            raise ValueError(
                f"the {type(item.intervention).__name__} has width {len(rotation)}, and {item.component} of this model {width}; "
                "use the model that it was made for."
            )
        return
    if not isinstance(kind, type) or not issubclass(kind, Intervention):
        raise ValueError(
            f"the intervention_type on {item.component} is a class of interventions such as pyvene.VanillaIntervention, not "
            f"{kind!r}."
        )
    if type(units) is not int or units < 1:
        raise ValueError(f"max_number_of_units on {item.component} must be a whole number of 1 or more, not {units!r}.")
    full = None if width is None else width * units
    if issubclass(kind, LowRankRotatedSpaceIntervention) and (
        type(rank) is not int or rank < 1 or (full is not None and rank > full)
    ):
        most = "1 or more" if full is None else f"1 to {full}"
        raise ValueError(
            f"{kind.__name__} on {item.component} needs low_rank_dimension, a whole number of {most}, not {rank!r}."
        )
    if item.subspace_partition is not None:
        size = rank or full
        written = as_lists(item.subspace_partition, "a dimension of subspace_partition")
        parts = [range(*part) if len(part) == 2 else part for part in written] if all(map(is_flat, written)) else [[]]
        if not all(len(part) and min(part) >= 0 and (size is None or max(part) < size) for part in parts):
            raise ValueError(
                f"the subspace_partition on {item.component} lists its parts, each as [first, one past the last] or as a list of "
                f"dimensions{'' if size is None else f' from 0 to {size - 1}'}, unlike {item.subspace_partition!r}."
            )
        ranges = sorted((part.start, part.stop) for part in parts if isinstance(part, range))
        if any(stop != start for (_, stop), (start, _) in itertools.pairwise(ranges)):
            read = " and ".join(f"[{start}, {stop}] as {_dimensions(start, stop)}" for start, stop in ranges[:2])
            warnings.warn(
                f"the subspace_partition on {item.component} has parts of two numbers that do not adjoin, and pyvene reads two "
                f"numbers as a range: {read}; a set of dimensions is several parts of one each, [3, 4] for dimension 3, that are "
                "chosen together as subspaces.",
                stacklevel=4,
            )
    source = item.source_representation
    if source is not None and not isinstance(source, Tensor):
        raise ValueError(
            f"the source_representation on {item.component} must be a tensor, not {type(source).__name__}."
        )


def _dimensions(start: int, stop: int) -> str:
    return f"dimension {start}" if stop == start + 1 else f"dimensions {start} to {stop - 1}"


def in_pyvenes_names(config: IntervenableConfig) -> IntervenableConfig:
    """A config whose representations name components where the user's names sites."""
    named = copy(config)
    named.representations = [
        item._replace(component=FIELD_NAMES.get(str(item.component), item.component)) for item in config.representations
    ]
    return config if named.representations == config.representations else named


def width_of(component: str, model: nn.Module, card: Card | None) -> int | None:
    """The last axis of a component, where it is known; a module that is named by its path has none."""
    if card is None:
        return mapped_width(component, model)
    return None if "." in component else card.width(model, component)


def with_exact_widths(config: IntervenableConfig, model: nn.Module, card: Card | None) -> IntervenableConfig:
    """Build the interventions with exact widths, because pyvene can only pass widths that its dimension mapping can express.

    Collecting ones get none: pyvene would truncate what they collect to one unit's width. Without a card, none is given that is
    not needed, as a wrong one in pyvene's mapping would do the same.
    """
    types = config.intervention_types
    representations = []
    for index, item in enumerate(config.representations):
        kind = types[index] if isinstance(types, list) else types
        if item.intervention is None and isinstance(kind, type):
            whole = issubclass(kind, CollectIntervention) or (card is None and kind in TAKE_ALL)
            width = None if whole else width_of(item.component, model, card)
            settings = {**item._asdict(), "embed_dim": width * int(item.max_number_of_units) if width else None}
            if width is None and issubclass(kind, TrainableIntervention):
                known = "the card other than scores and pattern" if card else "pyvene's type_to_dimension_mapping"
                raise ValueError(
                    f"{kind.__name__} needs a component of known width, which {item.component} of {type(model).__name__} is not: "
                    f"use a component of {known}."
                )
            item = item._replace(intervention=kind(**settings), intervention_type=None)
        elif item.intervention is not None:
            item = item._replace(intervention_type=None)
        representations.append(RepresentationConfig(*item))
    return IntervenableConfig(representations=representations, mode=config.mode, sorted_keys=config.sorted_keys)
