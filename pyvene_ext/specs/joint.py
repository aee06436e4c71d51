"""Specs of one edit or of several made jointly: their members, their names, and the statistics they need."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pyvene_ext.io.records import Record
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.addition import Addition
from pyvene_ext.specs.base import SiteEdit
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.specs.sources import Needs

OneSpec = Ablation | ActivationPatch | Addition | ForcedAttention
KINDS: tuple[type[OneSpec], ...] = get_args(OneSpec)
Spec = OneSpec | tuple[OneSpec, ...]


def members(spec: Spec) -> tuple[OneSpec, ...]:
    """The edits of one spec.

    Args:
        spec: a single edit, or a tuple of edits made jointly.

    Returns:
        The edits, in their order.

    Raises:
        ValueError: a joint spec is empty, or edits the same place twice.
    """
    if isinstance(spec, SiteEdit):
        return (spec,)
    edits = tuple(spec)
    edited = [(a.place, head, a.positions) for a in edits for head in a.heads or (None,)]
    if not edits or len(set(edited)) < len(edited):
        raise ValueError(f"a joint intervention names one or more places, each once, not [{spec_name(edits)}].")
    return edits


def listed(specs: Any) -> list[Any]:
    """One spec, or several, as a list."""
    return [specs] if not isinstance(specs, Iterable) or isinstance(specs, Record | str | Mapping) else list(specs)


def as_specs(specs: OneSpec | Iterable[Spec]) -> list[Spec]:
    """Turn one spec, or several, into a list.

    Args:
        specs: a single edit, or edits and tuples of them.

    Returns:
        The specs, in their order.

    Raises:
        ValueError: an entry is not a spec.
    """
    found = listed(specs)
    for spec in found:
        if isinstance(spec, list):
            raise ValueError("edits that are made jointly are a tuple, not a list: write tuple(edits).")
        for edit in spec if isinstance(spec, tuple) else (spec,):
            if isinstance(edit, PathPatch):
                raise ValueError(f"{edit.name} is a path, which is run alone and with pyvene_ext.patch.")
            if not isinstance(edit, SiteEdit):
                given = " ".join(reprlib.repr(edit).split())
                raise ValueError(
                    f"{given} is not an ablation, activation patch, addition or forced attention, nor a tuple of "
                    f"them{_hint(edit)}."
                )
    return found


def _hint(given: Any) -> str:
    """How what is not a spec becomes one, for messages."""
    if isinstance(given, Mapping):
        kind = next((one for one in KINDS[1:] if one.model_fields["kind"].default == given.get("kind")), Ablation)
        return f": write {kind.__name__}(**fields)"
    if isinstance(given, str) and (place := re.fullmatch(r"(\w+)\.(\d+)(?:\.(\d+))?", given)):
        site, layer, head = place.groups()
        return f': write Ablation(kind=..., site="{site}", layer={layer}{f", heads={head}" if head else ""})'
    return ""


def spec_name(spec: Spec) -> str:
    """Name a spec.

    Args:
        spec: a single or joint spec.

    Returns:
        The name of the edit, or the names of a joint spec's edits joined by plus signs: "z.2.5+z.3.1".
    """
    return "+".join(edit.name for edit in ((spec,) if isinstance(spec, SiteEdit) else spec))


def needs(specs: Iterable[Spec]) -> Needs:
    """The statistics that specs need of a reference set or of source prompts.

    Args:
        specs: single and joint specs.

    Returns:
        The union of their needs, each place and position once.
    """
    each = [edit.needs for spec in specs for edit in members(spec)]
    return Needs(
        tuple(dict.fromkeys(place for one in each for place in one.places)),
        tuple(dict.fromkeys(position for one in each for position in one.position_means)),
        tuple(dict.fromkeys(position for one in each for position in one.bank)),
    )
