"""Checks of configs, subspaces and sources that pyvene would silently accept, or answer with an error from within torch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np
from pyvene import (
    AdditionIntervention,
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    CollectIntervention,
    IntervenableConfig,
    Intervention,
    LocalistRepresentationIntervention,
    LowRankRotatedSpaceIntervention,
    NoiseIntervention,
    RepresentationConfig,
    SigmoidMaskIntervention,
    SkipIntervention,
    SubtractionIntervention,
    TrainableIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from pyvene.models.modeling_utils import getattr_for_torch_module
from torch import Tensor

from modelcards import Card, meant, n_layers
from pyvene_ext.intervenable.locations import Locations, Representation, as_lists, is_flat
from pyvene_ext.intervenable.uncarded import check_mapped, is_mapped, mapped_width
from pyvene_ext.io.errors import counted

# They take none, and pyvene says nothing.
WITHOUT_SUBSPACES = (
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    NoiseIntervention,
    SigmoidMaskIntervention,
)
# They take a source of the shape of what they edit, or one vector.
SWAPS = (VanillaIntervention, AdditionIntervention, SubtractionIntervention)
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


def is_collect(representation: RepresentationConfig, kind: Any) -> bool:
    """Whether a representation only collects activations."""
    kind = type(representation.intervention) if representation.intervention is not None else kind
    return isinstance(kind, type) and issubclass(kind, CollectIntervention)


def check_unit_counts(
    keys: Sequence[str],
    places: Sequence[Representation],
    locations: Locations | None,
    interventions: Mapping[str, Any],
    representations: Mapping[str, RepresentationConfig],
) -> None:
    """Raise ValueError if a trainable intervention gets another number of units than its weights are for."""
    for key, place, rows in zip(keys, places, locations or [], strict=False):
        if not isinstance(interventions[key], TrainableIntervention) or rows is None:
            continue
        if isinstance(interventions[key], LocalistRepresentationIntervention) or interventions[key].keep_last_dim:
            continue
        given = 1 if place.unit == "t" else len((rows[0] if place.unit == "h.pos" else rows)[0])
        if given != (made_for := int(representations[key].max_number_of_units)):
            raise ValueError(
                f"{place} has {counted(given, 'unit')} for an intervention made for {made_for}: set "
                f"max_number_of_units={given} in its RepresentationConfig, or give as many places."
            )


def check_places_once(
    keys: Sequence[str], places: Sequence[Representation], locations: Locations | None, interventions: Mapping[str, Any]
) -> None:
    """Raise ValueError if places are listed twice that are edited once.

    Reading a place twice is fine, and so is filling up the shorter rows of a batch by listing a place again: then at least one
    row has none twice.
    """
    for key, place, rows in zip(keys, places, locations or [], strict=False):
        if rows is None or isinstance(interventions[key], CollectIntervention):
            continue
        for level, of_level in zip(place.unit.split("."), rows if place.unit == "h.pos" else [rows], strict=True):
            if all(len(set(row)) < len(row) for row in of_level):
                twice = next(number for number in of_level[0] if of_level[0].count(number) > 1)
                raise ValueError(
                    f"{'head' if level == 'h' else 'position'} {twice} of {place} is listed twice in example 0, and some "
                    "place in every other example, where the intervention would be applied once: list each place once."
                )


def check_steps(
    keys: Sequence[str],
    places: Sequence[Representation],
    sides: Sequence[Locations | None],
    interventions: Mapping[str, Any],
) -> None:
    """Raise ValueError if steps of a recurrent model are listed otherwise than they pass, in which order pyvene takes them."""
    for side in sides:
        for key, place, rows in zip(keys, places, side or [], strict=False):
            if rows is None or place.unit != "t":
                continue
            if unordered := next((row for row in rows if row != sorted(set(row))), None):
                raise ValueError(
                    f"the steps {unordered} of {place} must ascend: step by step they are read and edited."
                )
            if isinstance(interventions[key], CollectIntervention) and any(row != rows[0] for row in rows):
                raise ValueError(f"{place} is collected at other steps in other examples: give all of them the same.")


def check_subspaces(
    subspaces: Any,
    interventions: Mapping[str, Any],
    representations: Mapping[str, RepresentationConfig],
    batch: int,
    widths: Mapping[str, int | None],
) -> None:
    """Refuse subspaces that do not exist or that pyvene mixes up.

    Args:
        subspaces: a number or a list of them, for all; or for each intervention None or one list per example.
        interventions: by key.
        representations: their configs, by key.
        batch: the number of examples.
        widths: of the components, by key, where they are known.

    Raises:
        ValueError: says which intervention has wrong subspaces, and how to write them.
    """
    if subspaces is None:
        return
    subspaces = as_lists(subspaces, "a subspace")
    if isinstance(subspaces, int) or (is_flat(subspaces) and subspaces):
        subspaces = [[[subspaces] if isinstance(subspaces, int) else subspaces] * batch] * len(interventions)
    if not isinstance(subspaces, list) or len(subspaces) != len(interventions):
        raise ValueError(
            f"subspaces hold entries for {counted(len(subspaces), 'intervention')}, and there are {len(interventions)}: give "
            "each its own, one list per example, [intervention][example][subspace]."
        )
    for (key, intervention), rows in zip(interventions.items(), subspaces, strict=True):
        if rows is None:
            continue
        if not isinstance(rows, list) or not all(isinstance(row, list) and row and is_flat(row) for row in rows):
            raise ValueError(f"the subspaces of {key} must be one list of numbers per example, not {rows!r}.")
        if len(rows) != batch:
            raise ValueError(
                f"{key} has subspaces for {counted(len(rows), 'example')}, but base has {batch}: give one list per example."
            )
        parts, rank, size = (
            intervention.subspace_partition,
            representations[key].low_rank_dimension,
            widths.get(key) if intervention.embed_dim is None else intervention.embed_dim,
        )
        if isinstance(intervention, WITHOUT_SUBSPACES):
            raise ValueError(
                f"{key} ({intervention}) has no subspaces, and pyvene would ignore {rows[0]}: give it None."
            )
        count = len(parts) if parts is not None else rank or (None if size is None else int(size))
        for row in rows:
            if min(row) < 0 or (count is not None and max(row) >= count):
                there = "they count from 0" if count is None else f"there are subspaces 0 to {count - 1}"
                raise ValueError(f"subspaces {row} of {key} are out of range: {there}.")
        if isinstance(intervention, LocalistRepresentationIntervention) and any(row != rows[0] for row in rows):
            raise ValueError(
                f"{key} ({intervention}) has different subspaces per example, which pyvene mixes up across positions: give all "
                "examples of a call the same."
            )
        dimensions = [[d for part in row for d in ([part] if parts is None else parts[part])] for row in rows]
        if twice := next((row for row, own in zip(rows, dimensions, strict=True) if len(set(own)) < len(own)), None):
            raise ValueError(f"subspaces {twice} of {key} have a dimension twice: choose each once.")
        if all(row == rows[0] for row in rows):
            continue
        if isinstance(intervention, LowRankRotatedSpaceIntervention) and parts is None:
            raise ValueError(
                f"{key} ({intervention}) takes different subspaces per example only with a subspace_partition: give it one, "
                f"{[[d, d + 1] for d in range(min(int(count or 1), 3))]} and so on for single dimensions."
            )
        if len(numbers := sorted({len(own) for own in dimensions})) > 1:
            raise ValueError(
                f"the examples have subspaces of {' and '.join(map(str, numbers))} dimensions in {key}: choose as many for each, "
                "or run these examples in separate calls."
            )


def check_source_counts(
    keys: Sequence[str], sources: Locations | None, base: Locations | None, interventions: Mapping[str, Any]
) -> None:
    """Raise ValueError if pyvene's own interventions would get other numbers of places from the source than they edit."""
    for key, source_rows, base_rows in zip(keys, sources or [], base or [], strict=False):
        if source_rows is None or not type(interventions[key]).__module__.startswith("pyvene."):
            continue
        levels = (
            [(source_rows, base_rows)] if isinstance(base_rows[0][0], int) else zip(source_rows, base_rows, strict=True)
        )
        for of_source, of_base in levels:
            if len(of_source[0]) != len(of_base[0]) and len(of_source) * len(of_source[0]) > 1:
                raise ValueError(
                    f"{key} has {counted(len(of_source[0]), 'place')} in the source and {len(of_base[0])} in base: give as many "
                    "of each."
                )


def check_source_shapes(
    given: Mapping[str, Any],
    representations: Mapping[str, RepresentationConfig],
    interventions: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse source representations that pyvene's swaps and additions cannot take: they need one vector, or one for each place.

    Args:
        given: source representations by key.
        representations: by key.
        interventions: by key.
        shapes: axes of what each key edits but for the last; keys that are missing are checked for their width alone.

    Raises:
        ValueError: names the key, the shape and what it should be.
    """
    for key, source in given.items():
        if not isinstance(source, Tensor) or not source.ndim:
            raise ValueError(
                f"source_representations[{key!r}] must be a tensor with an axis, not {type(source).__name__}."
            )
        if type(interventions[key]) not in SWAPS or interventions[key].embed_dim is None:
            continue
        width, shape = (
            int(interventions[key].embed_dim) // int(representations[key].max_number_of_units),
            tuple(source.shape),
        )
        if shape[-1] != width or (source.numel() > width and shape[:-1] != shapes.get(key, shape[:-1])):
            or_each = f" or {(*shapes[key], width)}" if key in shapes else ""
            raise ValueError(
                f"source_representations[{key!r}] has shape {shape}, but {representations[key].component} needs {(width,)}"
                f"{or_each}."
            )
