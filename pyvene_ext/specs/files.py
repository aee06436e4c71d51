"""Specs in files: ablations, patches, additions, forced attention and paths as YAML or JSON, loaded without loss.

- {kind: mean, site: z, layer: 2, heads: [5], positions: last}
- {kind: patch, site: k, layer: 2, heads: [0], positions: subject}
- {kind: force, shape: hub, layer: 2, heads: [5], block: [latent0, latent5], hub: latent2}
- {kind: path, sender: z.0.1, receivers: [q.2.3], freeze_mlps: true}
- [{kind: zero, site: z, layer: 1, heads: [0, 3]}, {kind: zero, site: mlp_out, layer: 3}]   # jointly
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml

from pyvene_ext.io.errors import did_you_mean
from pyvene_ext.io.files import atomic_path, parse_json, parse_yaml
from pyvene_ext.specs.ablation import Ablation, Kind
from pyvene_ext.specs.addition import Addition
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
    listed,
    members,
)
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch

KINDS: dict[Any, Any] = dict.fromkeys(get_args(Kind), Ablation)
KINDS |= {"path": PathPatch, "patch": ActivationPatch, "add": Addition, "force": ForcedAttention}


def to_plain(specs: Iterable[Spec | PathPatch]) -> list[Any]:
    """Convert specs to lists and dicts for YAML and JSON.

    Args:
        specs: single specs, joint specs and paths; or one of them.

    Returns:
        One dict per spec, a list of dicts for a joint one; fields at their defaults are omitted.
    """

    def plain(spec: OneSpec | PathPatch) -> dict[str, Any]:
        return {"kind": spec.kind, **spec.model_dump(mode="json", exclude_defaults=True)}

    return [[plain(edit) for edit in spec] if isinstance(spec, tuple) else plain(spec) for spec in listed(specs)]


def from_plain(values: Any) -> list[Any]:
    """Convert the lists and dicts of `to_plain` back to specs.

    Args:
        values: one entry per spec.

    Returns:
        The specs, in their order.

    Raises:
        ValueError: an entry, which the message names, is not a valid spec.
    """
    if not isinstance(values, list):
        raise ValueError(f"specs are a list of interventions, not {type(values).__name__}.")

    def one(value: Any) -> OneSpec | PathPatch:
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}; {did_you_mean(kind, KINDS)}")
        return KINDS.get(kind if isinstance(kind, str) else None, Ablation).model_validate(value)

    specs: list[Any] = []
    for index, value in enumerate(values):
        try:
            spec: Any = tuple(map(one, value)) if isinstance(value, list) else one(value)
            if not isinstance(spec, PathPatch):
                members(as_specs([spec])[0])
            specs.append(spec)
        except ValueError as error:
            raise ValueError(f"spec {index}: {error}") from None
    return specs


def to_yaml(specs: Iterable[Spec | PathPatch]) -> str:
    """Convert specs to YAML text."""
    return yaml.safe_dump(to_plain(specs), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> list[Any]:
    """Convert YAML (or JSON) text to specs; raises ValueError as `from_plain` does."""
    return from_plain(parse_yaml(text))


def save_specs(path: str | Path, specs: Iterable[Spec | PathPatch]) -> None:
    """Write specs to a file.

    Args:
        path: JSON if it ends in .json, else YAML.
        specs: single specs, joint specs and paths; or one of them.

    Raises:
        ValueError: something else among them, or no path.
    """
    if not isinstance(path, str | Path):
        raise ValueError("the arguments are swapped: save_specs(path, specs).")
    as_specs(spec for spec in listed(specs) if not isinstance(spec, PathPatch))
    text = json.dumps(to_plain(specs), indent=2) if Path(path).suffix == ".json" else to_yaml(specs)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_specs(path: str | Path) -> list[Any]:
    """Read specs from a file.

    Args:
        path: JSON if it ends in .json, else YAML.

    Returns:
        The specs, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid; the message names it and the entry that is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of specs {path}; check the path.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        # YAML contains all of JSON except surrogate pairs: two escapes for one character beyond U+FFFF.
        return from_plain(parse_json(text)) if Path(path).suffix == ".json" else from_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
