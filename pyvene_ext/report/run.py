"""Read a study's run folder."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import ValidationError

from pyvene_ext.io.errors import one_sentence
from pyvene_ext.io.files import parse_json, read_csv, read_npy, read_yaml
from pyvene_ext.report.routes import Routes
from pyvene_ext.runs.attention import FILE as ATTENTION
from pyvene_ext.runs.attention import View, read_views
from pyvene_ext.runs.facts import Evidence
from pyvene_ext.stats.controls import Head

Row = dict[str, str]
ROUTES, PROMPTS, DELTAS = "routes.json", "prompts.json", "deltas.npy"
CIRCUITS = "circuit_"  # files of circuits, which are drawn from their tables
HEAD = re.compile(r"z\.([0-9]{1,6})\.([0-9]{1,6})", re.ASCII)
PLACES = ("layer", "head", "row")  # columns of numbers that measure nothing
GROUPS = 12  # the most maps of one table, which has one for each value of a text column (a language pair, a site)
ENDS = {"low": "high", "lowest": "highest"}


class Column(NamedTuple):
    """A column of a table, with the columns of its interval or standard error.

    Attributes:
        name: the column's name.
        measures: whether its cells are numbers (or empty) and not layers or heads.
        ends: the columns of the two ends of its interval or range.
        error: the column of its standard error.
    """

    name: str
    measures: bool
    ends: tuple[str, str] | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """The heading: "drop [low, high]"."""
        if self.ends:
            return f"{self.name} [{', '.join(end.rpartition('_')[2] for end in self.ends)}]"
        return f"{self.name} ± se" if self.error else self.name

    def cell(self, row: Row) -> str:
        """Format one row's number and interval.

        Args:
            row: the row.

        Returns:
            Such as "0.42 [0.31, 0.55]".
        """
        text = rounded(row[self.name])
        if self.ends and all(row[end] for end in self.ends):
            return f"{text} [{', '.join(rounded(row[end]) for end in self.ends)}]"
        return f"{text} ± {rounded(row[self.error])}" if self.error and row[self.error] else text


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        folder: the folder.
        config: the flags; if the folder has several runs, the flags of each by its name.
        facts: the JSON files by name, except those below and circuits.
        tables: the CSV files by name, cells as text.
        attention: attention patterns of some heads.
        routes: the routes of one prompt, if the study has traced any.
    """

    folder: Path
    config: Any
    facts: dict[str, Any]
    tables: dict[str, list[Row]]
    attention: list[View]
    routes: Routes | None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Args:
            folder: the folder.

        Returns:
            Its contents.

        Raises:
            ValueError: it is not the folder of a finished run, or one of its files is damaged.
        """
        folder = Path(folder)
        # Some studies put the files of many runs in one folder, each under the run's name.
        configs = files(folder, "config.yaml") or files(folder, "*.yaml")
        if not configs:
            raise ValueError(f"{folder} has no config.yaml; give the folder of a finished run.")
        config = {path.stem: read_yaml(path) for path in configs}
        if len(config) == 1:
            (config,) = config.values()
        beside = folder.parent / f"{folder.name}.json"  # written by studies whose main file is an array, NAME.npy
        inside = [path for path in files(folder, "*.json") if not path.name.startswith(CIRCUITS)]
        facts = {
            path.name: _json(path)
            for path in (*inside, *([beside] if beside.is_file() else []))
            if path.name not in (ATTENTION, ROUTES)
        }
        return cls(
            folder,
            config,
            facts,
            {
                path.relative_to(folder).as_posix(): with_heads(read_csv(path))
                for path in files(folder, "*.csv") or files(folder, "tables/*.csv")
            },
            read_views(folder / ATTENTION) if (folder / ATTENTION).is_file() else [],
            Routes.read(folder / ROUTES) if (folder / ROUTES).is_file() else None,
        )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def verdicts(self) -> list[str]:
        """The study's verdicts on what it found, one sentence each."""
        return [str(line) for lines in self._stated("verdicts", list) for line in lines]

    @property
    def questions(self) -> list[str]:
        """What the study asked."""
        return [str(question) for question in dict.fromkeys(self._stated("question", str))]

    @property
    def evidence(self) -> list[Evidence]:
        """The main effects, as the study states them.

        Raises:
            ValueError: what the summary states is not evidence.
        """
        try:
            return [Evidence.of(facts) for every in self._stated("evidence", list) for facts in every]
        except ValidationError as error:
            raise ValueError(f"{self.folder} states evidence that is none: {one_sentence(error)}") from None

    @property
    def negative(self) -> frozenset[str]:
        """The columns in which a negative number helps the answer."""
        return frozenset(str(name) for names in self._stated("helps_if_negative", list) for name in names)

    def _stated(self, name: str, kind: type) -> list[Any]:
        """What the JSON files of the run state under a name."""
        every = [facts.get(name) for facts in self.facts.values() if isinstance(facts, dict)]
        return [value for value in every if isinstance(value, kind)]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The metadata of the run, as `runs.metadata` returns it: one record, or one per model."""
        return list(_records(list(self.facts.values())))

    @property
    def weights(self) -> frozenset[str]:
        """The hashes of the weights of the run's models; none of a run that does not say."""
        return frozenset(str(record["weight_hash"]) for record in self.records if record.get("weight_hash"))

    def by_head(self) -> dict[tuple[str, str], dict[Head, float]]:
        """Collect every column of numbers with one row per head, by table and column.

        Returns:
            A number for each (layer, head). If a table has one row per head and value of a text column, the column's name
            includes that value: "en-fr: difference". Ends of intervals and standard errors are not columns of their own.
        """
        return {
            (name, column_label(group, column.name)): {
                head: value for head, row in heads.items() if math.isfinite(value := number(row[column.name]))
            }
            for name, rows in self.tables.items()
            for columns in [measures(rows)]
            for group, heads in by_group(rows).items()
            for column in columns
        }

    def by_prompt(self) -> tuple[list[str], Float[np.ndarray, "layer head prompt"]] | None:
        """Read the effect of each head on each prompt.

        Returns:
            The prompts' texts and the effects, or None if the run has not kept them.

        Raises:
            ValueError: texts and effects do not fit together.
        """
        texts, path = self.facts.get(PROMPTS), self.folder / DELTAS
        if texts is None or not path.is_file():
            return None
        deltas = read_npy(path)
        if deltas.ndim != 3 or deltas.dtype.kind != "f" or not isinstance(texts, list) or len(texts) != deltas.shape[2]:
            raise ValueError(f"{path} must be [layer head prompt], with a text of {PROMPTS} for each prompt.")
        return [str(text) for text in texts], deltas


def with_heads(rows: list[Row]) -> list[Row]:
    """Add layer and head to a table of paths from many senders to the same receivers; other tables stay as they are."""
    if not rows or not {"sender", "receivers"} <= rows[0].keys() or len({row["receivers"] for row in rows}) > 1:
        return rows
    heads = [HEAD.fullmatch(row["sender"]) for row in rows]
    return [
        {"layer": head[1] if head else "", "head": head[2] if head else ""} | row
        for row, head in zip(rows, heads, strict=True)
    ]


def columns(rows: Sequence[Row]) -> list[Column]:
    """Group a table's columns: each with its interval or standard error.

    Adjacent columns NAME_low and NAME_high are the ends of NAME, or of the column before them if there is no NAME, and so are low
    and high; likewise lowest and highest. NAME_se is the standard error of NAME.

    Args:
        rows: the table.

    Returns:
        Its columns, without ends and errors.
    """
    names = list(rows[0]) if rows else []
    numeric = [name for name in names if name not in PLACES and is_numeric(rows, name)]
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
    """Index a table by head.

    Args:
        rows: the table.

    Returns:
        Rows by (layer, head), under "" or, if heads have several rows, under the values of the text columns that distinguish
        them; empty if no text columns do, or for a table without heads.
    """
    if not rows or not {"layer", "head"} <= rows[0].keys():
        return {}
    rows = [row for row in rows if row["layer"].isdecimal() and row["head"].isdecimal()]  # an MLP has no head
    values = {name: {row[name] for row in rows} for name in (rows[0] if rows else ())}
    words = [
        name
        for name, some in values.items()
        if name not in ("layer", "head") and 1 < len(some) <= GROUPS and not is_numeric(rows, name)
    ]
    # As few text columns as suffice, the first ones first.
    for names in itertools.chain.from_iterable(itertools.combinations(words, n) for n in range(len(words) + 1)):
        groups: dict[str, dict[Head, Row]] = {}
        for row in rows:
            heads = groups.setdefault(" ".join(row[name] for name in names), {})
            heads[int(row["layer"]), int(row["head"])] = row
        if sum(map(len, groups.values())) == len(rows):
            return groups
    return {}


def column_label(group: str, column: str) -> str:
    """Label a column of one group: "en-fr: difference"."""
    return f"{group}: {column}" if group else column


def is_numeric(rows: Sequence[Row], name: str) -> bool:
    """Whether every cell of a column is a number or empty."""
    return all(row[name] == "" or math.isfinite(number(row[name])) for row in rows)


def number(text: str) -> float:
    """Parse a cell; NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def rounded(text: str) -> str:
    """Round a cell to four digits; whole numbers and text stay as they are."""
    value = number(text)
    return f"{value:.4g}" if math.isfinite(value) and value != int(value) else text


def files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted, without hidden ones."""
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
