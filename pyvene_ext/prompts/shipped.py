"""The prompt sets that ship, by name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

PROMPTS = Path(__file__).parent / "data"


def find_prompts(dataset: str, suffix: str = ".json") -> str | Path:
    """Find the file of a shipped prompt set.

    Args:
        dataset: the name of a shipped set ("ioi_en"), a path, or the id of a data set on the hub ("owner/name").
        suffix: that of the shipped files: ".json" for prompts, ".tsv" for parallel text.

    Returns:
        The shipped file, or `dataset` unchanged if it is a path or an id.

    Raises:
        ValueError: a mere name that is none of the shipped ones.
    """
    shipped = {path.stem: path for path in sorted(PROMPTS.glob(f"*{suffix}"))}
    if dataset not in shipped and re.fullmatch(r"[\w-]+", dataset) and not Path(dataset).exists():
        begun = [name for name in (f"{dataset}_en", *shipped) if name in shipped and name.startswith(f"{dataset}_")]
        close = begun or difflib.get_close_matches(dataset, shipped, n=1)
        hint = f"did you mean {close[0]!r}? Shipped are" if close else "shipped are"
        raise ValueError(
            f"there is no prompt set {dataset!r}; {hint} {', '.join(shipped)}; a file needs its suffix, and a data set of the "
            "hub its owner (owner/name)."
        )
    return shipped.get(dataset, dataset)
