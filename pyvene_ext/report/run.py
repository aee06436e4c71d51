"""What a study has left in its folder, read again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pyvene_ext.io.files import parse_json, read_csv, read_npy, read_yaml
from pyvene_ext.report.routes import Routes
from pyvene_ext.runs.attention import FILE as ATTENTION
from pyvene_ext.runs.attention import View, read_views

Row = dict[str, str]
Head = tuple[int, int]
ROUTES, PROMPTS, DELTAS = "routes.json", "prompts.json", "deltas.npy"
# A table may hold a map for each value of such a column (a pair of languages, a site), if there are no more of them.
GROUPS = 12
ENDS = {"low": "high", "lowest": "highest"}


class Column(NamedTuple):
    """A column of a table, with those that belong to it.

    Attributes:
        name: of its cells.
        measures: whether it holds numbers (or nothing), and not a layer or a head.
        ends: the columns that hold the ends of an interval around it, or of a range.
        error: the column that holds its standard error.
    """

    name: str
    measures: bool
    ends: tuple[str, str] | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """What stands above the cells: "drop [low, high]"."""
        if self.ends:
            return f"{self.name} [{', '.join(end.rpartition('_')[2] for end in self.ends)}]"
        return f"{self.name} ± se" if self.error else self.name

    def cell(self, row: Row) -> str:
        """Number and interval as one text: "0.42 [0.31, 0.55]"."""
        text = rounded(row[self.name])
        if self.ends and all(row[end] for end in self.ends):
            return f"{text} [{', '.join(rounded(row[end]) for end in self.ends)}]"
        return f"{text} ± {rounded(row[self.error])}" if self.error and row[self.error] else text


@dataclass(frozen=True)
class Run:
    """What a study has left in its folder.

    Attributes:
        config: the flags it was run with; where the folder holds several runs, those of each by its name.
        facts: its JSON files by name, but for those below.
        tables: its CSV files by name, as text.
        attention: where some of its heads look.
        routes: of one prompt, if it has followed any.
    """

    folder: Path
    config: Any
    facts: dict[str, Any]
    tables: dict[str, list[Row]]
    attention: list[View]
    routes: Routes | None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a folder; ValueError if it is not one of a finished run."""
        folder = Path(folder)
        # Some studies put the files of many runs in one folder, each under the run's name.
        configs = files(folder, "config.yaml") or files(folder, "*.yaml")
        if not configs:
            raise ValueError(f"{folder} has no config.yaml, so that it is no folder of a finished run.")
        config = {path.stem: read_yaml(path) for path in configs}
        if len(config) == 1:
            (config,) = config.values()
        beside = folder.parent / f"{folder.name}.json"  # of a study whose main file is an array, NAME.npy
        facts = {
            path.name: _json(path)
            for path in (*files(folder, "*.json"), *([beside] if beside.is_file() else []))
            if path.name not in (ATTENTION, ROUTES)
        }
        return cls(
            folder,
            config,
            facts,
            {
                path.relative_to(folder).as_posix(): read_csv(path)
                for path in files(folder, "*.csv") or files(folder, "tables/*.csv")
            },
            read_views(folder / ATTENTION) if (folder / ATTENTION).is_file() else [],
            Routes.read(folder / ROUTES) if (folder / ROUTES).is_file() else None,
        )

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def verdicts(self) -> list[str]:
        """The study's own words on what it found."""
        said = [facts.get("verdicts") for facts in self.facts.values() if isinstance(facts, dict)]
        return [str(line) for lines in said if isinstance(lines, list) for line in lines]

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was run with what, as `runs.metadata` wrote it: one record, or one a model."""
        return list(_records(list(self.facts.values())))

    def by_head(self) -> dict[tuple[str, str], dict[Head, float]]:
        """Every column of numbers that has one row a head, by table and column: a number for each (layer, head).

        Where a table has one row a head and some other thing, the column's name says which: "en-fr: difference". Ends of
        intervals and standard errors are no columns of their own.
        """
        return {
            (name, in_group(group, column.name)): {
                head: value for head, row in heads.items() if math.isfinite(value := number(row[column.name]))
            }
            for name, rows in self.tables.items()
            for group, heads in by_group(rows).items()
            for column in measures(rows)
        }

    def by_prompt(self) -> tuple[list[str], Float[np.ndarray, "layer head prompt"]] | None:
        """Texts, and the effect of each head on each, if the run has kept them; ValueError if they do not belong together."""
        texts, path = self.facts.get(PROMPTS), self.folder / DELTAS
        if texts is None or not path.is_file():
            return None
        deltas = read_npy(path)
        if deltas.ndim != 3 or deltas.dtype.kind != "f" or not isinstance(texts, list) or len(texts) != deltas.shape[2]:
            raise ValueError(f"{path} must be [layer head prompt], with a text of {PROMPTS} for each prompt.")
        return [str(text) for text in texts], deltas


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of a table, those that belong to another with it.

    NAME_low and NAME_high side by side are the ends of NAME, or of the column before them if there is no NAME, as are low and
    high; lowest and highest likewise. NAME_se is the standard error of NAME.
    """
    names = list(rows[0]) if rows else []
    numeric = [name for name in names if name not in ("layer", "head") and is_numeric(rows, name)]
    ends: dict[str, tuple[str, str]] = {}
    for before, low, high in zip(["", *names], names, names[1:], strict=False):
        stem, _, end = low.rpartition("_")
        owner = stem if stem in names else before
        if end in ENDS and high == low.removesuffix(end) + ENDS[end] and {owner, low, high} <= {*numeric}:
            ends.setdefault(owner, (low, high))
    errors = {name: f"{name}_se" for name in numeric if f"{name}_se" in numeric}
    taken = {name for pair in ends.values() for name in pair} | {*errors.values()}
    return [Column(name, name in numeric, ends.get(name), errors.get(name)) for name in names if name not in taken]


def measures(rows: Sequence[Row]) -> list[Column]:
    """The columns that hold numbers."""
    return [column for column in columns(rows) if column.measures]


def by_group(rows: Sequence[Row]) -> dict[str, dict[Head, Row]]:
    """The rows by (layer, head), under "" or under what tells rows of one head apart; nothing if a head has two rows still."""
    if not rows or not {"layer", "head"} <= rows[0].keys():
        return {}
    rows = [row for row in rows if row["layer"].isdecimal() and row["head"].isdecimal()]  # an MLP has no head
    values = {name: {row[name] for row in rows} for name in (rows[0] if rows else ())}
    words = [
        name
        for name, some in values.items()
        if name not in ("layer", "head") and 1 < len(some) <= GROUPS and not is_numeric(rows, name)
    ]
    # As few of them as it takes, the first ones first.
    for names in itertools.chain.from_iterable(itertools.combinations(words, n) for n in range(len(words) + 1)):
        groups: dict[str, dict[Head, Row]] = {}
        for row in rows:
            heads = groups.setdefault(" ".join(row[name] for name in names), {})
            heads[int(row["layer"]), int(row["head"])] = row
        if sum(map(len, groups.values())) == len(rows):
            return groups
    return {}


def in_group(group: str, column: str) -> str:
    return f"{group}: {column}" if group else column


def is_numeric(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds numbers, or nothing."""
    return all(row[name] == "" or math.isfinite(number(row[name])) for row in rows)


def number(text: str) -> float:
    """A cell as a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def rounded(text: str) -> str:
    value = number(text)
    return f"{value:.4g}" if math.isfinite(value) and value != int(value) else text


def files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith(".")]


def _records(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "command" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _records(inner)


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
