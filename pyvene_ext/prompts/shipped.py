"""The prompt sets that ship, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

PROMPTS = Path(__file__).parent / "data"


def find_prompts(dataset: str) -> str | Path:
    """Find the file of a shipped prompt set.

    Args:
        dataset: the name of a shipped set ("ioi_en"), or anything else that names a data set.

    Returns:
        The shipped file, or `dataset` unchanged.

    Raises:
        ValueError: a near miss of a shipped name, which would otherwise be looked up on the hub.
    """
    shipped = {path.stem: path for path in PROMPTS.glob("*.*") if path.suffix in (".json", ".tsv")}
    close = difflib.get_close_matches(dataset, shipped, n=1, cutoff=0.75)
    if dataset not in shipped and close and not Path(dataset).exists():
        raise ValueError(f"there is no prompt set {dataset!r}; did you mean {close[0]!r}?")
    return shipped.get(dataset, dataset)
