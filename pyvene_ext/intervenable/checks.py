"""Checks of configs and unit locations that pyvene would silently accept.

pyvene takes locations in many short forms, some of which mean different things to different interventions. `resolve_locations`
converts every form into one, nested lists of absolute columns, after checking each number against the model and the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from pyvene import (
    AdditionIntervention,
    CollectIntervention,
    IntervenableConfig,
    Intervention,
    LocalistRepresentationIntervention,
    LowRankRotatedSpaceIntervention,
    RepresentationConfig,
    SubtractionIntervention,
    TrainableIntervention,
    VanillaIntervention,
)
from pyvene.models.modeling_utils import getattr_for_torch_module
from torch import Tensor

from modelcards import COMPONENTS, Card, dimensions, meant, n_layers, n_positions
from pyvene_ext.io.errors import counted

Locations = list[Any]  # per key: [batch n] for one-level units, [[batch n_head], [batch n_pos]] for h.pos
# They take a source of the shape of what they edit, or one vector.
SWAPS = (VanillaIntervention, AdditionIntervention, SubtractionIntervention)


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


def check_config(config: IntervenableConfig, model: Any, card: Card) -> None:
    """Refuse components, layers, units and groups that this model does not have or that pyvene would misread.

    Args:
        config: the interventions.
        model: the model.
        card: its family's card.

    Raises:
        ValueError: says which representation is wrong and what to use instead.
    """
    if not config.representations:
        raise ValueError("the config names no representation: give at least one RepresentationConfig.")
    if config.mode not in ("parallel", "serial"):
        raise ValueError(f"mode must be 'parallel' or 'serial', not {config.mode!r}.")
    layers, kinds = n_layers(model.config), config.intervention_types
    if isinstance(kinds, list) and len(kinds) != len(config.representations):
        raise ValueError(
            f"the config names {counted(len(kinds), 'intervention type')} for "
            f"{counted(len(config.representations), 'representation')}: give one each."
        )
    for number, representation in enumerate(config.representations):
        kind = kinds[number] if isinstance(kinds, list) else kinds
        if not isinstance(representation.component, str):
            raise ValueError(f"a component is a name, not {representation.component!r}.")
        if "." in representation.component:
            if representation.component.rpartition(".")[2] not in ("input", "output"):
                close = meant(representation.component, places=card.mapping(type(model)))
                raise ValueError(
                    f"the module path {representation.component!r} must end in .input or .output"
                    + (f"; or did you mean the component {close!r}?" if close else ".")
                )
            _check_path(model, representation.component)
            _check_intervention(representation, kind, None)
            continue  # the rest of a raw path is up to the user
        component = card.component(model, representation.component)
        if type(representation.layer) is not int and not isinstance(representation.layer, np.integer):
            raise ValueError(f"the layer of {component.name} must be a whole number, not {representation.layer!r}.")
        if component.per_layer and not 0 <= representation.layer < layers:
            raise ValueError(
                f"layer {representation.layer} of {component.name} is out of range: "
                f"{type(model).__name__} has layers 0 to {layers - 1}."
            )
        if representation.unit not in component.units:
            raise ValueError(
                f"unit {representation.unit!r} is wrong for {component.name} ({component.shape}); "
                f"use {' or '.join(map(repr, component.units))}."
            )
        _check_intervention(representation, kind, card.width(model, component.name))
    groups = [representation.group_key for representation in config.representations]
    if any(group is not None for group in groups):
        if None in groups or sorted(set(groups)) != list(range(len(set(groups)))):
            raise ValueError(f"group keys must be 0 .. n-1 and given on every representation, not {groups}.")
        if config.mode == "serial" and len(set(groups)) < len(groups):
            raise ValueError("serial mode takes one representation per group; use mode='parallel' for several.")


def _check_path(model: Any, path: str) -> None:
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
        parts = _plain(item.subspace_partition, "a dimension of subspace_partition")
        parts = [range(*part) if len(part) == 2 else part for part in parts] if all(map(_is_flat, parts)) else [[]]
        if not all(len(part) and min(part) >= 0 and (size is None or max(part) < size) for part in parts):
            raise ValueError(
                f"the subspace_partition on {item.component} lists its parts, each as [first, one past the last] or as a list of "
                f"dimensions{'' if size is None else f' from 0 to {size - 1}'}, unlike {item.subspace_partition!r}."
            )
    source = item.source_representation
    if source is not None and not isinstance(source, Tensor):
        raise ValueError(
            f"the source_representation on {item.component} must be a tensor, not {type(source).__name__}."
        )


def is_collect(representation: RepresentationConfig, kind: Any) -> bool:
    """Whether a representation only collects activations."""
    kind = type(representation.intervention) if representation.intervention is not None else kind
    return isinstance(kind, type) and issubclass(kind, CollectIntervention)


@dataclass(frozen=True)
class Inputs:
    """The shape and padding of one tokenised batch, which locations are checked against.

    Attributes:
        name: what messages call it ("base", "source 0").
        batch: the number of examples.
        length: the number of columns, without cached ones.
        past: the number of cached columns.
        mask: 1 for real tokens, over this call's own columns; None without an attention mask.
    """

    name: str
    batch: int
    length: int
    past: int
    mask: list[list[int]] | None

    @classmethod
    def of(cls, inputs: Mapping[str, Any], name: str) -> Inputs:
        """Read the shape and padding of a batch.

        Args:
            inputs: keyword arguments of the model's forward.
            name: what messages call the batch.

        Returns:
            Its shape and padding.

        Raises:
            ValueError: not a tokenised batch, a mask of another shape, or a cache that is not a transformers Cache.
        """
        tensors: list[Any] = (
            [inputs.get(field) for field in ("input_ids", "inputs_embeds")] if isinstance(inputs, Mapping) else []
        )
        tensor: Any = next((tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim >= 2), None)
        if tensor is None:
            raise ValueError(
                f"{name} must be a tokenised batch with input_ids [batch pos] or inputs_embeds [batch pos d], such as "
                'tokenizer(texts, return_tensors="pt", padding=True).'
            )
        if all(tensor is not None for tensor in tensors):
            raise ValueError(f"{name} has both input_ids and inputs_embeds: give one of them.")
        batch, length = tensor.shape[:2]
        if not batch or not length:
            raise ValueError(
                f"{name} has no tokens: its {'input_ids' if tensor is tensors[0] else 'inputs_embeds'} are empty."
            )
        if tensor is tensors[0] and tensor.is_floating_point():
            raise ValueError(f"the input_ids of {name} are {tensor.dtype}; token ids are whole numbers.")
        cache = inputs.get("past_key_values")
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise ValueError(f"the past_key_values of {name} must be a transformers Cache, not {type(cache).__name__}.")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim < 2):
            raise ValueError(f"the attention_mask of {name} must be a tensor [batch pos].")
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape[-1] != length:
            raise ValueError(
                f"the position_ids of {name} are for {positions.shape[-1]} tokens, and there are {length}."
            )
        rows = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[0] != batch or mask.shape[1] < length:
                raise ValueError(
                    f"the attention_mask of {name} is {tuple(mask.shape)} for tokens {(batch, length)}; give one value per token."
                )
            rows = mask[:, mask.shape[1] - length :].bool().int().tolist()
        return cls(name, batch, length, past, rows)


def check_tokens(inputs: Mapping[str, Any], name: str, model: Any) -> None:
    """Check that a model can embed the tokens of a batch.

    Args:
        inputs: keyword arguments of the model's forward, which `Inputs.of` has read.
        name: what messages call the batch.
        model: the model.

    Raises:
        ValueError: ids that the model does not embed, embeddings of another width, or more tokens than it has positions for.
    """
    ids: Any = inputs.get("input_ids")
    embedded: Any = inputs.get("inputs_embeds")
    n_vocab, width = model.get_input_embeddings().weight.shape
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
        raise ValueError(
            f"the ids of {name} range from {int(ids.min())} to {int(ids.max())} but the model embeds {n_vocab} tokens; use its "
            "own tokenizer."
        )
    if embedded is not None and embedded.shape[-1] != width:
        raise ValueError(
            f"the inputs_embeds of {name} have {embedded.shape[-1]} dimensions, and the model's have {width}."
        )
    # Rotary positions go on beyond the context, learnt ones do not.
    length, context = (ids if embedded is None else embedded).shape[1], n_positions(model.config)
    if length > context and not getattr(model.config, "rope_parameters", None):
        raise ValueError(f"{name} has {length} tokens but the model takes {context}; shorten it.")


@dataclass(frozen=True)
class Representation:
    """What the locations of one of an intervenable model's keys depend on.

    Attributes:
        component: pyvene's name of the component, or a raw module path.
        unit: "pos", "h" or "h.pos".
        layer: the layer, or None for a component without layers.
        takes_source: whether the intervention needs a source.
    """

    component: str
    unit: str
    layer: int | None
    takes_source: bool

    def __str__(self) -> str:
        return self.component if self.layer is None else f"{self.component} at layer {self.layer}"


def everywhere(place: Representation, config: Any, inputs: Inputs) -> Any:
    """The locations of every position, and of every head if the component has heads; None for a raw module path."""
    component = COMPONENTS.get(place.component)
    if component is None:
        return None
    columns = [list(range(inputs.length + (inputs.past if _over_keys(place) else 0)))] * inputs.batch
    if component.heads is None:
        return columns
    heads = [list(range(dimensions(config)[component.heads]))] * inputs.batch
    return heads if place.unit == "h" else [heads, columns]


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
        given = len((rows[0] if place.unit == "h.pos" else rows)[0])
        if given != (made_for := int(representations[key].max_number_of_units)):
            raise ValueError(
                f"{place} has {counted(given, 'unit')} for an intervention made for {made_for}: set "
                f"max_number_of_units={given} in its RepresentationConfig, or give as many places."
            )


def check_subspaces(
    subspaces: Any, interventions: Mapping[str, Any], representations: Mapping[str, RepresentationConfig], batch: int
) -> None:
    """Refuse subspaces that do not exist or that pyvene mixes up.

    Args:
        subspaces: a number or a list of them, for all; or for each intervention None or one list per example.
        interventions: by key.
        representations: their configs, by key.
        batch: the number of examples.

    Raises:
        ValueError: says which intervention has wrong subspaces, and how to write them.
    """
    if subspaces is None:
        return
    subspaces = _plain(subspaces, "a subspace")
    if isinstance(subspaces, int) or (_is_flat(subspaces) and subspaces):
        subspaces = [[[subspaces] if isinstance(subspaces, int) else subspaces] * batch] * len(interventions)
    if not isinstance(subspaces, list) or len(subspaces) != len(interventions):
        raise ValueError(
            f"subspaces hold entries for {counted(len(subspaces), 'intervention')}, and there are {len(interventions)}: give "
            "each its own, one list per example, [intervention][example][subspace]."
        )
    for (key, intervention), rows in zip(interventions.items(), subspaces, strict=True):
        if rows is None:
            continue
        if not isinstance(rows, list) or not all(isinstance(row, list) and row and _is_flat(row) for row in rows):
            raise ValueError(f"the subspaces of {key} must be one list of numbers per example, not {rows!r}.")
        if len(rows) != batch:
            raise ValueError(
                f"{key} has subspaces for {counted(len(rows), 'example')}, but base has {batch}: give one list per example."
            )
        parts, rank, size = (
            intervention.subspace_partition,
            representations[key].low_rank_dimension,
            intervention.embed_dim,
        )
        count = len(parts) if parts is not None else rank or (None if size is None else int(size))
        for row in rows:
            if count is not None and not 0 <= min(row) <= max(row) < count:
                raise ValueError(f"subspaces {row} of {key} are out of range: there are subspaces 0 to {count - 1}.")
        if isinstance(intervention, LocalistRepresentationIntervention) and any(row != rows[0] for row in rows):
            raise ValueError(
                f"{key} ({intervention}) has different subspaces per example, which pyvene mixes up across positions: give all "
                "examples of a call the same."
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


def edited_shape(place: Representation, locations: Any, inputs: Inputs) -> tuple[int, ...]:
    """The axes of what an intervention edits in one call, but for the last."""
    if place.unit == "h.pos":
        return inputs.batch, len(locations[0][0]), len(locations[1][0])
    return (inputs.batch, len(locations[0]), *([inputs.length] if place.unit == "h" else []))


def resolve_locations(
    value: Any, key: str, places: Sequence[Representation], config: Any, base: Inputs, sources: Sequence[Inputs | None]
) -> tuple[Locations | None, Locations | None]:
    """Convert one entry of pyvene's `unit_locations` into nested lists of absolute columns.

    Args:
        value: an int, a flat list, a pair (source, base), or pyvene's nested lists.
        key: the entry's name: `base`, `sources->base`, or serial mode's `source_0->source_1` and so on.
        places: the representations that the entry is about.
        config: the model's config, for head counts.
        base: the base batch.
        sources: for each representation its source batch, or None.

    Returns:
        Source locations (None without sources) and base locations, one entry per representation.

    Raises:
        ValueError: says what is wrong, where, and how to write what was probably meant.
    """
    value = _plain(value)
    if value is None:
        raise ValueError(
            f"the locations under {key!r} are None: list places, or leave unit_locations out to intervene everywhere."
        )
    if _is_flat(value) and len(value) == 2 and not (isinstance(value, tuple) and key != "base"):
        raise ValueError(
            f"two numbers under {key!r} are ambiguous: pyvene reads {value} as source {value[0]} -> base {value[1]}. For two "
            f"places write {{{key!r}: [[{value}] * batch_size]}} (one such list per representation); for a source and a base "
            f"place write {{'sources->base': ({value[0]}, {value[1]})}} with a tuple."
        )
    if key == "base":
        return None, _side(value, places, config, [base] * len(places), key)
    if isinstance(value, (tuple, list)) and len(value) == 2 and not (isinstance(value, list) and _is_flat(value)):
        source_value, base_value = value
    else:
        source_value = base_value = value
    if base_value is None:
        raise ValueError(f"the base half of {key!r} is None: list the places to intervene on.")
    base_side = _side(base_value, places, config, [base] * len(places), key)
    if source_value is None or all(source is None for source in sources):
        return None, base_side
    return _side(source_value, places, config, sources, key), base_side


def _side(
    value: Any, places: Sequence[Representation], config: Any, inputs: Sequence[Inputs | None], key: str
) -> Locations:
    if isinstance(value, int):
        value = [value]
    if _is_flat(value):
        for place in places:
            if place.unit == "h.pos":
                raise ValueError(
                    f"{place} has unit 'h.pos' and needs heads and positions: write "
                    f"{{{key!r}: [[[[head]] * batch_size, [[position]] * batch_size]]}}."
                )
        per_place: list[Any] = [[list(value)] * (at.batch if at else 0) for at in inputs]
    else:
        per_place = list(value)
        if len(per_place) != len(places):
            raise ValueError(
                f"{key!r} lists locations for {counted(len(per_place), 'representation')}, but there are {len(places)}: give one "
                "list for each, [representation][example][place]."
            )
    resolved: Locations = []
    for place, locations, at in zip(places, per_place, inputs, strict=True):
        resolved.append(None if at is None else _one_place(place, locations, config, at))
    return resolved


def _one_place(place: Representation, locations: Any, config: Any, inputs: Inputs) -> Any:
    if locations is None:
        if inputs.name != "base" and not place.takes_source:
            return None
        raise ValueError(
            f"the location of {place} is None, which pyvene takes as 'skip' with a source and as 'everything' without; list the "
            f"places, range({inputs.length}) for all positions."
        )
    levels = place.unit.split(".")
    per_level = [locations] if len(levels) == 1 else locations
    if len(per_level) != len(levels):
        raise ValueError(
            f"{place} needs [heads, positions] for its unit 'h.pos', not {counted(len(per_level), 'list')}."
        )
    checked = []
    for level, rows in zip(levels, per_level, strict=True):
        if not isinstance(rows, list) or any(not _is_flat(row) or not isinstance(row, list) for row in rows):
            raise ValueError(
                f"the locations of {place} must be [example][{level}] lists of whole numbers, "
                f"such as [[3]] * batch_size, not {rows!r}."
            )
        if len(rows) != inputs.batch:
            raise ValueError(
                f"{place} has locations for {counted(len(rows), 'example')}, but {inputs.name} has {inputs.batch}: "
                "give one list per example."
            )
        if len({len(row) for row in rows}) > 1 or not rows[0]:
            raise ValueError(
                f"the examples of {inputs.name} have {sorted({len(row) for row in rows})} locations in {place}: give every "
                "example the same number (at least one), or run them in separate calls."
            )
        if level == "h":
            checked.append([[_head(head, place, config) for head in row] for row in rows])
        else:
            checked.append([_columns(row, example, place, inputs) for example, row in enumerate(rows)])
    return checked[0] if len(levels) == 1 else checked


def _head(head: int, place: Representation, config: Any) -> int:
    component = COMPONENTS.get(place.component)
    if component is None or component.heads is None:
        return head
    sizes = dimensions(config)
    count = sizes[component.heads]
    if 0 <= head < count:
        return head
    shared = ""
    if component.heads != "n_expert" and sizes["n_kv_head"] < sizes["n_head"]:
        group = sizes["n_head"] // sizes["n_kv_head"]
        shared = f" ({sizes['n_head']} query heads share {sizes['n_kv_head']} K/V heads, {group} each)"
    kind = {"n_head": "query head", "n_kv_head": "K/V head", "n_expert": "expert"}[component.heads]
    raise ValueError(
        f"{kind} {head} of {place} is out of range: there are {kind.split()[-1]}s 0 to {count - 1}{shared}."
    )


def _columns(row: list[int], example: int, place: Representation, inputs: Inputs) -> list[int]:
    """Absolute columns of one example; negative positions count back from its last real token."""
    over_keys = _over_keys(place)
    length = inputs.length + (inputs.past if over_keys else 0)
    mask = inputs.mask[example] if inputs.mask is not None and not (over_keys and inputs.past) else None
    real = [column for column, value in enumerate(mask) if value] if mask is not None else list(range(length))
    columns = []
    for position in row:
        if position >= length or -position > len(real):
            raise ValueError(
                f"position {position} of {place} is out of range: example {example} of {inputs.name} has {len(real)} tokens"
                + (f" in {length} columns." if len(real) < length else ".")
            )
        columns.append(real[position] if position < 0 else position)
    if mask is not None and not any(mask[column] for column in columns):
        raise ValueError(
            f"position {row} of {place} is padding in example {example} of {inputs.name}, where an intervention does nothing: "
            "use negative positions, which count back from the last real token."
        )
    return columns


def _over_keys(place: Representation) -> bool:
    """Whether this component's positions are those of keys, cached ones included."""
    return place.component in ("key_rotated", "head_key_rotated")


def _plain(value: Any, what: str = "a unit location") -> Any:
    """Convert tensors, arrays and ranges to lists."""
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, what) for item in value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{what} must be a whole number, not {value!r}.")


def _is_flat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
