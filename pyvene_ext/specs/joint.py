"""Specs made of one edit or of several at once: their members, names, and what statistics they need."""

from __future__ import annotations

from collections.abc import Iterable

from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.base import SiteEdit
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.specs.patch import ActivationPatch

OneSpec = Ablation | ActivationPatch | ForcedAttention
Spec = OneSpec | tuple[OneSpec, ...]


def members(spec: Spec) -> tuple[OneSpec, ...]:
    """The edits of one spec: itself, or those of a joint one, which must not edit one place twice."""
    if isinstance(spec, SiteEdit):
        return (spec,)
    edits = tuple(spec)
    edited = [(a.place, head, a.positions) for a in edits for head in a.heads or (None,)]
    if not edits or len(set(edited)) < len(edited):
        raise ValueError(f"a joint intervention names one or more places, each once, not [{spec_name(edits)}].")
    return edits


def as_specs(specs: OneSpec | Iterable[Spec]) -> list[Spec]:
    """A list of specs, also of a single one. Raises ValueError for what is none."""
    if not isinstance(specs, Iterable) or isinstance(specs, SiteEdit | str):
        specs = [specs]
    found = list(specs)
    for spec in found:
        for edit in spec if isinstance(spec, tuple) else (spec,):
            if not isinstance(edit, SiteEdit):
                raise ValueError(
                    f"{edit!r} is no ablation, activation patch or forced attention, nor a tuple of them (paths are run by "
                    "pyvene_ext.patch)."
                )
    return found


def spec_name(spec: Spec) -> str:
    """The name of one edit, or those of a joint one with plus signs: "z.2.5+z.3.1"."""
    return "+".join(edit.name for edit in ((spec,) if isinstance(spec, SiteEdit) else spec))


def needs(specs: Iterable[Spec]) -> dict[str, tuple]:
    """What specs need of a reference set, as keywords of `Reference.compute` and `Reference.require`."""
    used = [a for spec in specs for a in members(spec) if a.uses_reference]

    def positions(ablations: Iterable[OneSpec]) -> tuple[str | int, ...]:
        named = (a.positions if isinstance(a.positions, tuple) else (a.positions,) for a in ablations)
        return tuple(dict.fromkeys(position for group in named for position in group))

    return {
        "places": tuple(dict.fromkeys(a.place for a in used)),
        "position_means": positions(a for a in used if isinstance(a, Ablation) and a.mean == "per_position"),
        "bank": positions(a for a in used if a.kind in ("resample", "patch")),
    }
