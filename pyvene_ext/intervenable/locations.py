"""Inputs and unit locations: read, checked and written in one form.

pyvene takes locations in many short forms, some of which mean different things to different interventions. `resolve_locations`
converts every form into one, nested lists of absolute columns, after checking each number against the model and the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modelcards import COMPONENTS, Card, Component, dimensions, n_positions
from pyvene_ext.io.errors import counted


class MissingLocations(ValueError, IndexError):
    """Locations for fewer representations than there are; an IndexError too, which pyvene raises there."""


Locations = list[Any]  # per key: [batch n] for one-level units, [[batch n_head], [batch n_pos]] for h.pos


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
    def of(cls, inputs: Mapping[str, Any], name: str, card: Card | None) -> Inputs:
        """Read the shape and padding of a batch.

        Args:
            inputs: keyword arguments of the model's forward.
            name: what messages call the batch.
            card: the model's card; without one the batch may be any tensors, of which only the sizes are read.

        Returns:
            Its shape and padding.

        Raises:
            ValueError: not a tokenised batch, a mask of another shape, or a cache that is not a transformers Cache.
        """
        if card is None:
            return cls._of_any(inputs, name)
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

    @classmethod
    def _of_any(cls, inputs: Mapping[str, Any], name: str) -> Inputs:
        """The sizes of a batch of a model without a card: those of its tokens if it has any, else of its first tensor."""
        fields = ["input_ids", "inputs_embeds", *inputs] if isinstance(inputs, Mapping) else []
        tensors = (inputs.get(field) for field in fields)
        first = next((value for value in tensors if isinstance(value, Tensor) and value.ndim and value.numel()), None)
        if first is None:
            raise ValueError(f"{name} must be a dict of the tensors that the model's forward takes, not {inputs!r}.")
        return cls(name, first.shape[0], first.shape[1] if first.ndim > 1 else 1, 0, None)


def with_position_ids(inputs: Any, card: Card | None) -> Any:
    """Add position ids to a batch whose padding the model would count, as transformers' `generate` does.

    Args:
        inputs: keyword arguments of the model's forward.
        card: the card of its family; None if there is none.

    Returns:
        The inputs, with positions counted from each example's first real token if the family needs them and they are not given.
    """
    if (
        card is None
        or not card.counts_padding
        or not isinstance(inputs, Mapping)
        or inputs.get("position_ids") is not None
    ):
        return inputs
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask[:, 0].all():
        return inputs
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # of cached tokens too
    return {**inputs, "position_ids": positions[:, -tokens.shape[1] :]}


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
        unit: "pos", "h" or "h.pos"; "t", a step in time, for pyvene's recurrent models.
        layer: the layer, or None for a component without layers.
        takes_source: whether the intervention needs a source.
        has_card: whether the model has a card, so that its components are known and positions are those of tokens.
    """

    component: str
    unit: str
    layer: int | None
    takes_source: bool
    has_card: bool

    @property
    def entry(self) -> Component | None:
        """The component in the vocabulary; None for a raw module path, and for a model without a card."""
        return COMPONENTS.get(self.component) if self.has_card else None

    def __str__(self) -> str:
        return self.component if self.layer is None else f"{self.component} at layer {self.layer}"


def everywhere(place: Representation, config: Any, inputs: Inputs) -> Any:
    """The locations of every position, and of every head if the component has heads; None for a raw module path."""
    component = place.entry
    if component is None and place.unit != "t":
        return None
    columns = [list(range(inputs.length + (inputs.past if _over_keys(place) else 0)))] * inputs.batch
    if component is None or component.heads is None:
        return columns
    heads = [list(range(dimensions(config)[component.heads]))] * inputs.batch
    return heads if place.unit == "h" else [heads, columns]


def edited_shape(place: Representation, locations: Any, inputs: Inputs) -> tuple[int, ...]:
    """The axes but for the last of what an intervention edits in one call."""
    if place.unit == "h.pos":
        return inputs.batch, len(locations[0][0]), len(locations[1][0])
    return (inputs.batch, len(locations[0]), *([inputs.length] if place.unit == "h" else []))


def resolve_locations(
    value: Any,
    key: str,
    places: Sequence[Representation],
    config: Any,
    base: Sequence[Inputs | None],
    sources: Sequence[Inputs | None],
) -> tuple[Locations | None, Locations | None]:
    """Convert one entry of pyvene's `unit_locations` into nested lists of absolute columns.

    Args:
        value: an int, a flat list, a pair (source, base), or pyvene's nested lists.
        key: the entry's name: `base`, `sources->base`, or serial mode's `source_0->source_1` and so on.
        places: the representations that the entry is about.
        config: the model's config, for head counts.
        base: for each representation the base batch, or None if it is left out.
        sources: for each representation its source batch, or None.

    Returns:
        Source locations (None without sources) and base locations, one entry per representation.

    Raises:
        ValueError: says what is wrong, where, and how to write what was probably meant.
    """
    value = as_lists(value)
    if value is None:
        raise ValueError(
            f"the locations under {key!r} are None: list places, or leave unit_locations out to intervene everywhere."
        )
    if is_flat(value) and len(value) == 2 and not (isinstance(value, tuple) and key != "base"):
        raise ValueError(
            f"two numbers under {key!r} are ambiguous: pyvene reads {value} as source {value[0]} -> base {value[1]}. For two "
            f"places write {{{key!r}: [[{value}] * batch_size]}} (one such list per representation); for a source and a base "
            f"place write {{'sources->base': ({value[0]}, {value[1]})}} with a tuple."
        )
    if key == "base":
        return None, _side(value, places, config, base, key)
    if isinstance(value, (tuple, list)) and len(value) == 2 and not (isinstance(value, list) and is_flat(value)):
        source_value, base_value = value
    else:
        source_value = base_value = value
    if base_value is None:
        raise ValueError(f"the base half of {key!r} is None: list the places to intervene on.")
    base_side = _side(base_value, places, config, base, key)
    if source_value is None or all(source is None for source in sources):
        return None, base_side
    return _side(source_value, places, config, sources, key), base_side


def _side(
    value: Any, places: Sequence[Representation], config: Any, inputs: Sequence[Inputs | None], key: str
) -> Locations:
    if isinstance(value, int):
        value = [value]
    if is_flat(value):
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
            raise MissingLocations(
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
        if not isinstance(rows, list) or any(not is_flat(row) or not isinstance(row, list) for row in rows):
            raise ValueError(
                f"the locations of {place} must be [example][{level}] lists of whole numbers, "
                f"such as [[3]] * batch_size, not {rows!r}."
            )
        if len(rows) == 1:  # one list for the whole batch, as pyvene takes it with use_fast
            rows = rows * inputs.batch
        if len(rows) != inputs.batch:
            raise ValueError(
                f"{place} has locations for {counted(len(rows), 'example')}, but {inputs.name} has {inputs.batch}: "
                "give one list per example, or one for all."
            )
        if len({len(row) for row in rows}) > 1 or not rows[0]:
            raise ValueError(
                f"the examples of {inputs.name} have {sorted({len(row) for row in rows})} locations in {place}: give every "
                "example the same number (at least one), or run them in separate calls."
            )
        if level == "h":
            for head in sorted({head for row in rows for head in row}):
                _check_head(head, place, config)
            checked.append([list(row) for row in rows])
        else:
            checked.append([_columns(row, example, place, inputs) for example, row in enumerate(rows)])
    return checked[0] if len(levels) == 1 else checked


def _check_head(head: int, place: Representation, config: Any) -> None:
    component = place.entry
    if component is None or component.heads is None:
        return
    sizes = dimensions(config)
    count = sizes[component.heads]
    if 0 <= head < count:
        return
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
    if not place.has_card and place.unit != "t":
        if min(row) < 0:
            raise ValueError(
                f"position {min(row)} of {place}: only in a model with a card do negative positions count from the end, as "
                "others may have rows for more than the tokens; count from 0."
            )
        return row  # `check_activation` checks them
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
    return place.has_card and place.component in ("key_rotated", "head_key_rotated")


def as_lists(value: Any, what: str = "a unit location") -> Any:
    """Convert tensors, arrays and ranges to lists.

    Args:
        value: whole numbers, nested in any way.
        what: what messages call one of them.

    Returns:
        The same in nested lists (tuples stay tuples).

    Raises:
        ValueError: something else among them.
    """
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(as_lists(item, what) for item in value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{what} must be a whole number, not {value!r}.")


def is_flat(value: Any) -> bool:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value)
