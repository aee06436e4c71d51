"""Names that these studies use until they take them from `px.flags`, `px.reasoning`, `px.stats` and `px.RunFolder`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pyvene_ext.io.bounds import check as check_flags
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import output_path, remove_leftovers, write_json
from pyvene_ext.methods.reasoning.evaluate import evaluate
from pyvene_ext.models.sizes import head_label as in_short
from pyvene_ext.prompts.problems import Problem, tiny_problems
from pyvene_ext.runs import reasoning
from pyvene_ext.runs.flags import Problems as Flags
from pyvene_ext.runs.flags import check_rankings as rankings_fit
from pyvene_ext.runs.reasoning import (
    N_TINY,
    TINY,
    Setting,
    ask,
    counts,
    find_examples,
    find_problems,
    heads_of,
    positions_of,
    top_heads,
)
from pyvene_ext.runs.sweeps import discard
from pyvene_ext.stats.accuracy import RESAMPLES
from pyvene_ext.stats.accuracy import accuracy_drop as drop_of
from pyvene_ext.stats.accuracy import in_points as in_words
from pyvene_ext.stats.accuracy import percent_correct as accuracy
from pyvene_ext.stats.tables import interval_columns as of_interval
from pyvene_ext.stats.tables import side_by_side

__all__ = [
    "N_TINY",
    "RESAMPLES",
    "TINY",
    "Flags",
    "Setting",
    "accuracy",
    "ask",
    "check_flags",
    "check_heads",
    "check_rankings",
    "counts",
    "drop_of",
    "evaluate",
    "find_examples",
    "find_problems",
    "folder_of",
    "heads_of",
    "in_short",
    "in_words",
    "of_interval",
    "positions_of",
    "prepare",
    "side_by_side",
    "tiny_problems",
    "top_heads",
    "written",
]


def check_rankings(rankings: Sequence[str], flags: Flags) -> None:
    rankings_fit(tuple(rankings), flags.models)


def folder_of(flags: Flags, study: str) -> Path:
    name = "_".join([Path(flags.problems).stem, *(Path(name).name for name in flags.models)])
    return output_path(flags.out, Path("outputs/critical_heads") / study / name)


def prepare(
    flags: Flags,
    name: str,
    problems: Sequence[Problem],
    folder: Path,
    check: Callable[[str, PreTrainedModel], object] = lambda name, model: None,
) -> Setting:
    return reasoning.prepare(flags, name, problems, folder / "unfinished", check)


def check_heads(named: Sequence[str], flag: str = "heads", once: bool = True) -> None:
    """Raise ValueError for what is no layer.head, and for a head named twice."""
    for head in named:
        if not re.fullmatch(r"\d+\.\d+", head):
            raise ValueError(f"--{flag} names heads as layer.head, such as 2.5, not {head!r}.")
    if once and len(set(named)) < len(named):
        raise ValueError(f"--{flag} names each head once.")


@contextmanager
def written(folder: Path, config: Flags, summary: dict[str, Any], *earlier: str) -> Iterator[None]:
    """Around the writing of a study's own files: an earlier run's go first, and the summary comes last."""
    (folder / "summary.json").unlink(missing_ok=True)
    for pattern in ("*.csv", *earlier):
        for path in folder.glob(pattern):
            path.unlink()
    yield
    write_config(folder / "config.yaml", config)
    write_json(folder / "summary.json", summary)
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")
