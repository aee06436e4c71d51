"""Published translation heads by model, with the thresholds at which they were found.

known = read_known()["Qwen2.5-3B"]            # {"threshold": 0.075, "thresholds": {...}, "heads": {"en-fr": ["20.1", ...]}}
rows = precision_and_recall({"en-fr": [(20, 1), (3, 4)]}, known["heads"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from pyvene_ext.io.errors import one_sentence
from pyvene_ext.io.files import parse_json
from pyvene_ext.stats.controls import Head, head_label

KNOWN = Path(__file__).parent / "known_heads.json"


class KnownModel(BaseModel):
    """The entry of one model in a file of published heads."""

    threshold: float = 0
    thresholds: dict[str, float] = {}
    heads: dict[str, list[Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]]] = {}


class Known(BaseModel):
    """A file of published heads."""

    models: dict[str, KnownModel]


def read_known(path: Path = KNOWN) -> dict[str, dict[str, Any]]:
    """Read a file of published heads.

    Args:
        path: the file; by default the heads of the literature.

    Returns:
        By the model's name: "threshold", "thresholds" of single languages and "heads" by pair of languages, as far as given.

    Raises:
        ValueError: the file is not a file of published heads.
    """
    try:
        return Known.model_validate(parse_json(path.read_bytes())).model_dump(exclude_unset=True)["models"]
    except ValidationError as error:
        raise ValueError(f"--known {path}: {one_sentence(error)}") from None
    except ValueError as error:
        raise ValueError(f"--known {path} is not JSON ({error}).") from None


def precision_and_recall(
    found: Mapping[str, Sequence[Head]], known: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Compare found heads with published ones.

    Args:
        found: heads by pair of languages.
        known: published heads by pair, as `read_known` returns them.

    Returns:
        One row per pair that has published heads: precision, recall, and the heads in both lists or only in one of them.
    """
    rows = []
    for pair, heads in found.items():
        if wanted := set(known.get(pair.lower(), [])):
            own = {head_label(head) for head in heads}
            rows.append(
                {
                    "pair": pair,
                    "precision": len(own & wanted) / len(own) if own else float("nan"),
                    "recall": len(own & wanted) / len(wanted),
                    "both": _listed(own & wanted),
                    "only_found": _listed(own - wanted),
                    "only_published": _listed(wanted - own),
                }
            )
    return rows


def _listed(heads: set[str]) -> str:
    return " ".join(sorted(heads, key=lambda head: [int(number) for number in head.split(".")]))
