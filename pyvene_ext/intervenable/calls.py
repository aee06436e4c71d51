"""A call of an intervenable model, checked before anything runs: its batches, sources, locations and subspaces."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pyvene import CollectIntervention, RepresentationConfig
from pyvene.models.modeling_utils import LambdaIntervention
from torch import Tensor

from modelcards import Card
from pyvene_ext.intervenable.checks import (
    check_places_once,
    check_source_counts,
    check_source_shapes,
    check_steps,
    check_subspaces,
    check_unit_counts,
)
from pyvene_ext.intervenable.config import width_of
from pyvene_ext.intervenable.locations import (
    Inputs,
    Representation,
    check_tokens,
    edited_shape,
    everywhere,
    resolve_locations,
    with_position_ids,
)
from pyvene_ext.io.errors import counted

Given = dict[str, Any]  # source representations by key


def by_key(representations: Any, keys: Sequence[str]) -> Given:
    """Source representations by key, in a dict of our own.

    Args:
        representations: as pyvene takes them: a dict, a list in the order of the keys, or one tensor for all.
        keys: of the interventions.

    Returns:
        Those that are given.

    Raises:
        ValueError: they are of another type or number, or for another key.
    """
    if not isinstance(representations, dict | list | Tensor | None):
        raise ValueError(
            f"source_representations are a dict of tensors by key, a list of tensors or one tensor, not "
            f"{type(representations).__name__}."
        )
    if isinstance(representations, list) and len(representations) != len(keys):
        raise ValueError(
            f"source_representations lists {counted(len(representations), 'tensor')} for "
            f"{counted(len(keys), 'intervention')}; give one each (None for one that needs none), or a dict."
        )
    if isinstance(representations, Tensor):
        return dict.fromkeys(keys, representations)
    named = (
        representations if isinstance(representations, dict) else dict(zip(keys, representations or (), strict=False))
    )
    given = {key: value for key, value in named.items() if value is not None}
    if unknown := given.keys() - set(keys):
        raise ValueError(f"source_representations names {', '.join(sorted(unknown))}; the keys are {', '.join(keys)}.")
    return given


@dataclass(frozen=True)
class Call:
    """What a call gives, in the one form that pyvene reads without a doubt.

    Attributes:
        inputs: the sizes of the base batch.
        sources: a source batch or None for each group.
        locations: resolved, by entry.
    """

    inputs: Inputs
    sources: list[Any]
    locations: dict[str, Any]


@dataclass
class Calls:
    """The calls that interventions of a model can answer.

    Attributes:
        model: the model.
        card: its family's card, if there is one.
        mode: parallel or serial.
        keys: of the interventions, in order.
        groups: the keys of each group.
        representations: by key.
        interventions: by key.
    """

    model: Any
    card: Card | None
    mode: str
    keys: list[str]
    groups: Mapping[Any, list[str]]
    representations: Mapping[str, RepresentationConfig]
    interventions: Any

    def checked(
        self,
        base: Any,
        sources: Any,
        representations: Any,
        unit_locations: Any,
        subspaces: Any,
        *,
        labels: Tensor | None = None,
        twice: bool | None = False,
        generating: bool = False,
    ) -> Call:
        """Check a call.

        Args:
            base: the base batch.
            sources: a source batch, or one for each group.
            representations: of sources, as pyvene takes them.
            unit_locations: where to intervene, as pyvene takes it.
            subspaces: as pyvene takes them.
            labels: for the model's loss.
            twice: whether the model also runs without interventions.
            generating: whether it generates, so that of source representations only the widths are known.

        Returns:
            The call.

        Raises:
            ValueError: says what is wrong, and how to fix it.
        """
        inputs = Inputs.of(base, "base", self.card)
        if generating and inputs.mask is not None and not all(row[-1] for row in inputs.mask):
            raise ValueError("base is padded on the right, and new tokens would follow the padding: pad on the left.")
        given = by_key(representations, self.keys)
        clean_run = bool(twice) and not generating and sources is None and not given and unit_locations is None
        left_out = self._left_out(sources, given, unit_locations, clean_run)
        sources = self._with_sources(sources, given, left_out, isinstance(representations, Tensor))
        locations = self._resolved(inputs, sources, unit_locations, left_out)
        self._check_inputs(base, sources, twice, labels)
        check_subspaces(subspaces, self.interventions, self.representations, inputs.batch, self.widths)
        self._check_source_shapes(given, {} if generating else locations, inputs)
        return Call(inputs, sources, locations)

    def _needs_source(self, key: str) -> bool:
        intervention = self.interventions[key]
        if isinstance(intervention, LambdaIntervention | CollectIntervention):
            return False
        return not intervention.is_source_constant

    def _per_group(self, sources: Any) -> list[Any]:
        sources = list(sources) if isinstance(sources, list | tuple) else [sources]
        return sources * len(self.groups) if len(sources) == 1 else sources

    def _left_out(self, sources: Any, given: Given, unit_locations: Any, clean_run: bool) -> set[str]:
        """Keys whose source and locations are both None, which are left out, or all that need a source in a `clean_run`."""
        if clean_run:
            left_out = {key for key in self.keys if self._needs_source(key)}
            if left_out:
                warnings.warn(f"no sources are given: {', '.join(sorted(left_out))} left out.", stacklevel=4)
            return left_out
        entry = unit_locations.get("sources->base") if isinstance(unit_locations, Mapping) else None
        halves = entry if isinstance(entry, list | tuple) and len(entry) == 2 else ()
        lists = [half for half in halves if isinstance(half, list | tuple)]
        places = {key: [half[number] for half in lists if number < len(half)] for number, key in enumerate(self.keys)}
        groups = zip(self._per_group(sources), self.groups.values(), strict=False)
        return {
            key
            for source, keys in groups
            for key in keys
            if source is None and key not in given and self._needs_source(key)
            if lists and places[key] == [None] * len(lists)
        }

    def _with_sources(self, sources: Any, given: Given, left_out: set[str], one_for_all: bool) -> list[Any]:
        """One source per group, in a list of our own; every intervention that needs a source has one."""
        groups = self.groups
        sources = self._per_group(sources)
        if len(sources) != len(groups):
            raise ValueError(
                f"{counted(len(sources), 'source')} were given for {counted(len(groups), 'group')} of interventions: give one "
                "each."
            )
        for source, keys in zip(sources, groups.values(), strict=True):
            for key in keys:
                if self._needs_source(key) and source is None and key not in given and key not in left_out:
                    raise ValueError(
                        f"{key} ({self.interventions[key]}) needs a source and has none: give sources, or "
                        "source_representations for this key."
                    )
                if source is not None and isinstance(self.interventions[key], CollectIntervention):
                    raise ValueError(
                        f"{key} collects in a group that has a source: give it a group of its own (group_key on every "
                        "representation) and None as that group's source, as in sources=[source, None]."
                    )
                constant = getattr(self.interventions[key], "is_source_constant", False)
                if constant and key in given and not one_for_all:
                    raise ValueError(
                        f"{key} ({self.interventions[key]}) takes no source, but source_representations has one for it."
                    )
                if source is None and self.mode == "serial":
                    raise ValueError(
                        f"{key} has no source, and serial mode skips such a group: use mode='parallel', or give it a source."
                    )
        if given and any(source is not None for source in sources):
            raise ValueError("give sources or source_representations, not both: pyvene would ignore the sources.")
        return [with_position_ids(source, self.card) for source in sources]

    def _check_source_shapes(self, given: Given, locations: dict[str, Any], inputs: Inputs) -> None:
        """Check the shapes of source representations against the places that are edited."""
        edited = [row for _, base in locations.values() for row in base]
        shapes = {
            key: edited_shape(self._place(key), rows, inputs)
            for key, rows in zip(self.keys, edited, strict=False)
            if rows is not None and (self.card or self.representations[key].unit != "h")
        }
        check_source_shapes(given, self.representations, self.interventions, shapes)

    def _check_inputs(self, base: Any, sources: list[Any], twice: bool | None, labels: Tensor | None) -> None:
        """Refuse inputs that would run but give something other than asked for."""
        caches = [inputs["past_key_values"] for inputs in (base, *sources) if inputs and "past_key_values" in inputs]
        caches = [id(cache) for cache in caches if cache is not None]
        if twice and base.get("past_key_values") is not None:
            raise ValueError(
                "output_original_output runs base twice, and past_key_values would grow twice: run the original separately, with "
                "its own copy of the cache."
            )
        for name, inputs in (("base", base), *((f"source {number}", inputs) for number, inputs in enumerate(sources))):
            if inputs is not None and self.card is not None:
                check_tokens(inputs, name, self.model)
        if len(set(caches)) < len(caches):
            raise ValueError(
                "two of the runs (base, sources) share one past_key_values, which each appends to: give each its own copy."
            )
        if self.model.training and getattr(self.model, "is_activation_checkpointing", False):
            raise ValueError(
                "gradient checkpointing recomputes blocks without the interventions, so the gradients would be wrong: call "
                "model.activation_checkpointing_disable() or model.eval()."
            )
        if self.card is not None and any(item.component == "logits" for item in self.representations.values()):
            if base.get("logits_to_keep"):
                raise ValueError(
                    "logits_to_keep drops positions that an intervention on the logits counts: leave it out."
                )
            # A tap if the model's own forward soft-caps or scales them.
            rescaled = self.card.is_tap(self.model, "logits")
            if rescaled and (labels is not None or base.get("labels") is not None):
                raise ValueError(
                    "the loss of this model is computed before its soft-capped or scaled logits can be edited: leave labels "
                    "out."
                )

    @cached_property
    def widths(self) -> dict[str, int | None]:
        """The last axis of what each key edits, where it is known and of use."""
        return {
            key: width_of(item.component, self.model, self.card)
            for key, item in self.representations.items()
            if self.card is not None or getattr(self.interventions[key], "embed_dim", None) is not None
        }

    def _resolved(
        self, inputs: Inputs, sources: list[Any], unit_locations: Mapping[str, Any] | None, left_out: set[str]
    ) -> dict[str, Any]:
        groups = list(self.groups.values())
        source_of_key: dict[str, Inputs | None] = {}
        for number, (source, keys) in enumerate(zip(sources, groups, strict=True)):
            known = None if source is None else Inputs.of(source, f"source {number}", self.card)
            if known is not None and known.batch != inputs.batch:
                raise ValueError(
                    f"{known.name} has {known.batch} examples and base {inputs.batch}: give as many of each."
                )
            source_of_key.update(dict.fromkeys(keys, known))
        if unit_locations is None:
            if self.mode == "serial":
                raise ValueError("serial mode needs unit_locations for every step, such as 'source_0->base'.")
            if any(known is not None and known.length != inputs.length for known in source_of_key.values()):
                raise ValueError("without unit_locations everything is swapped, which needs sources as long as base.")
            # Spelled out, because without locations pyvene would not split the activations by heads.
            locations = [
                None if key in left_out else everywhere(self._place(key), self.model.config, inputs)
                for key in self.keys
            ]
            has_source = any(known is not None for known in source_of_key.values())
            return {"sources->base": (locations if has_source else None, locations)}
        if not isinstance(unit_locations, Mapping) or len(unit_locations) != (
            1 if self.mode == "parallel" else len(groups)
        ):
            raise ValueError(
                "unit_locations must be a dict with one entry, 'base' or 'sources->base' (in serial mode one entry per step)."
            )
        resolved: dict[str, Any] = {}
        for entry, value in unit_locations.items():
            keys, after = self.keys, inputs
            if self.mode == "serial":
                number, keys, after = self._serial_step(entry, sources, inputs)
            elif entry not in ("base", "sources->base"):
                raise ValueError(f"unit_locations has an entry {entry!r}; use 'base' or 'sources->base'.")
            places = [self._place(key) for key in keys]
            own_sources = [source_of_key[key] for key in keys]
            bases = [None if key in left_out else after for key in keys]
            source_side, base_side = resolve_locations(value, entry, places, self.model.config, bases, own_sources)
            for key, source in zip(keys, own_sources, strict=True):
                if source is not None and source_side is None:
                    raise ValueError(
                        f"{key} has a source run, but only base locations are given: write "
                        "{'sources->base': (source locations, base locations)}."
                    )
            check_source_counts(keys, source_side, base_side, self.interventions)
            check_unit_counts(keys, places, base_side, self.interventions, self.representations)
            check_places_once(keys, places, base_side, self.interventions)
            check_steps(keys, places, (source_side, base_side), self.interventions)
            resolved["sources->base" if entry == "base" else entry] = (source_side, base_side)
        return resolved

    def _serial_step(self, entry: str, sources: list[Any], base: Inputs) -> tuple[int, list[str], Inputs]:
        """The group number and keys of a serial entry `source_0->source_1`, and the batch that its right side indexes."""
        groups = list(self.groups.values())
        last = len(groups) - 1
        names = [f"source_{i}->{'base' if i == last else f'source_{i + 1}'}" for i in range(last + 1)]
        if entry not in names:
            raise ValueError(f"serial mode needs unit_locations {', '.join(names)}, not {entry!r}.")
        number = names.index(entry)
        after = base if number == last else Inputs.of(sources[number + 1], f"source {number + 1}", self.card)
        return number, groups[number], after

    def _place(self, key: str) -> Representation:
        item, has_card = self.representations[key], self.card is not None
        place = Representation(item.component, item.unit, item.layer, self._needs_source(key), has_card)
        return replace(place, layer=None) if place.entry and not place.entry.per_layer else place
