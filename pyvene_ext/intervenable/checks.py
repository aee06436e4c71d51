"""Checks of places, subspaces and sources that pyvene would silently accept, or answer with an error from within torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyvene import (
    AdditionIntervention,
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    CollectIntervention,
    LocalistRepresentationIntervention,
    LowRankRotatedSpaceIntervention,
    NoiseIntervention,
    RepresentationConfig,
    SigmoidMaskIntervention,
    SubtractionIntervention,
    TrainableIntervention,
    VanillaIntervention,
)
from pyvene.models.modeling_utils import output_to_subcomponent
from torch import Tensor

from pyvene_ext.intervenable.locations import Locations, Representation, as_lists, is_flat
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
# What an activation is like for each unit.
SHAPES = {"pos": "batch pos d", "h": "batch head pos d", "h.pos": "batch head pos d", "t": "batch d"}


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
