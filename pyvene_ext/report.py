"""One page for one run or several: what was run, verdicts, tables to sort, heads to hover over, figures. It needs no network.

    python -m pyvene_ext.report outputs/activation_frequencies_ifr/ioi_en
    python -m pyvene_ext.report outputs/english outputs/chinese --out outputs/both.html

A run is the folder that a study has written: config.yaml, JSON files of facts, CSV tables, figures. Every table with the columns
layer and head is also shown as a map, one number at a time. Where tables of two runs have the same numbers for the same heads, a
table gives their rank correlation (Spearman). Where a run has kept the effect of each head on each prompt (deltas.npy,
prompts.json), that is shown prompt by prompt.
"""

from __future__ import annotations

import base64
import csv
import html
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import yaml
from scipy.stats import spearmanr

from pyvene_ext.cli import run as run_command
from pyvene_ext.runs import atomic_path, parse_json, read_npy, read_yaml

Row = dict[str, str]
SHOWN = 500  # rows of a table; the file has them all
AT_LEAST = 5  # heads, for a correlation


@dataclass(frozen=True)
class Run:
    """What a study has left in its folder.

    Attributes:
        config: the flags it was run with.
        facts: its JSON files by name.
        tables: its CSV files by name, as text.
    """

    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    tables: dict[str, list[Row]]

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a folder; ValueError if it is not one of a finished run."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} has no config.yaml, so that it is no folder of a finished run.")
        config = read_yaml(folder / "config.yaml")
        beside = folder.with_suffix(".json")  # some studies write an array, NAME.npy, and their facts beside it
        facts = {
            path.name: _json(path) for path in (*_files(folder, "*.json"), *([beside] if beside.is_file() else []))
        }
        return cls(folder, config, facts, {path.name: _csv(path) for path in _files(folder, "*.csv")})

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def verdicts(self) -> list[str]:
        """The study's own words on what it found."""
        said = [facts.get("verdicts") for facts in self.facts.values() if isinstance(facts, dict)]
        return [str(line) for lines in said if isinstance(lines, list) for line in lines]

    @property
    def commands(self) -> list[str]:
        """What to type to have the run again, once for each model it was the same for."""
        return list(dict.fromkeys(_named("command", list(self.facts.values()))))

    def by_head(self) -> dict[tuple[str, str], dict[tuple[int, int], float]]:
        """Every column of numbers of a table that has one row a head, by table and column: a number for each (layer, head)."""
        return {
            (name, column): {
                head: number for head, row in heads.items() if math.isfinite(number := _number(row[column]))
            }
            for name, rows in self.tables.items()
            if (heads := _heads(rows))
            for column in _numeric(rows)
        }


def write_report(folders: Sequence[str | Path], out: str | Path, title: str | None = None) -> None:
    """Write the page of one or several runs.

    Raises ValueError for a folder that is not one of a finished run, or named twice.
    """
    if not folders:
        raise ValueError("name one or more folders of runs.")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError("name each folder once.")
    runs = [Run.read(folder) for folder in folders]
    with atomic_path(out) as temporary:
        temporary.write_text(
            page(runs, title or ", ".join(run.name for run in runs), Path(out).parent), encoding="utf-8"
        )


def page(runs: Sequence[Run], title: str, home: Path) -> str:
    """The page as HTML, with links to the files as seen from `home`."""
    from plotly.offline import get_plotlyjs  # takes a while to import

    body = [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) > 1:
        links = "".join(f'<li><a href="#run{i}">{html.escape(run.name)}</a></li>' for i, run in enumerate(runs))
        body += [f"<ul>{links}</ul>", *_side_by_side(runs)]
    for number, run in enumerate(runs):
        if len(runs) > 1:
            body.append(f'<h2 id="run{number}">{html.escape(run.name)}</h2>')
        body += _of_run(run, home)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(body)}"
        f"<script>{SORT}</script></body></html>\n"
    )


def _of_run(run: Run, home: Path) -> Iterator[str]:
    yield "".join(f"<p><code>{html.escape(command)}</code></p>" for command in run.commands)
    yield "".join(f'<p class="verdict">{html.escape(line)}</p>' for line in run.verdicts)
    for name in run.tables:
        columns = {column: of_head for (table, column), of_head in run.by_head().items() if table == name}
        columns = {column: of_head for column, of_head in columns.items() if len(set(of_head.values())) > 1}
        if columns:
            yield _map(name, columns, _heads(run.tables[name]))
    yield from _by_prompt(run)
    for path in _files(run.folder, "figures/*.png"):
        data = base64.b64encode(path.read_bytes()).decode()
        yield f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(path.stem)}"></figure>'
    for name, rows in run.tables.items():
        yield _folded(f"{name} ({len(rows)} rows)", _table(rows[:SHOWN]))
    yield _folded(
        "config", f"<pre>{html.escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre>"
    )
    for name, facts in run.facts.items():
        yield _folded(name, f"<pre>{html.escape(json.dumps(facts, indent=2, ensure_ascii=False))}</pre>")
    links = []
    for path in sorted(run.folder.rglob("*")):
        if path.is_file() and "unfinished" not in path.parts and not path.name.startswith("."):
            target = Path(os.path.relpath(path, home)).as_posix()
            links.append(
                f'<li><a href="{html.escape(target)}">{html.escape(str(path.relative_to(run.folder)))}</a></li>'
            )
    yield _folded("files", f"<ul>{''.join(links)}</ul>")


def _side_by_side(runs: Sequence[Run]) -> Iterator[str]:
    """Rank correlations of what tables of several runs say of the same heads."""
    rows = []
    found = [run.by_head() for run in runs]
    for (a, of_a), (b, of_b) in itertools.combinations(zip(runs, found, strict=True), 2):
        for key in (key for key in of_a if key in of_b):
            heads = sorted(of_a[key].keys() & of_b[key].keys())
            x, y = ([of_one[key][head] for head in heads] for of_one in (of_a, of_b))
            if len(heads) >= AT_LEAST and len(set(x)) > 1 and len(set(y)) > 1:
                rho, p = spearmanr(x, y)
                numbers = {"heads": str(len(heads)), "Spearman": f"{rho:.3f}", "p": f"{p:.2g}"}
                rows.append({"run": a.name, "and": b.name, "table": key[0], "column": key[1], **numbers})
    if rows:
        yield f"<h2>Side by side</h2>{_table(rows)}"


def _map(name: str, columns: Mapping[str, Mapping[tuple[int, int], float]], rows: Mapping[tuple[int, int], Row]) -> str:
    """A map of heads with a menu of columns; the whole row of the table is under the mouse."""
    import plotly.graph_objects as plotly

    n_layers, n_heads = (1 + max(head[axis] for head in rows) for axis in (0, 1))
    words = [
        [
            "<br>".join(f"{html.escape(k)}: {html.escape(v)}" for k, v in rows.get((layer, head), {}).items())
            for head in range(n_heads)
        ]
        for layer in range(n_layers)
    ]
    traces, buttons = [], []
    for number, (column, of_head) in enumerate(columns.items()):
        signed = min(of_head.values()) < 0 < max(of_head.values())
        most = max(map(abs, of_head.values()))
        z = [[of_head.get((layer, head)) for head in range(n_heads)] for layer in range(n_layers)]
        traces.append(
            plotly.Heatmap(
                z=z,
                text=words,
                hovertemplate="%{text}<extra></extra>",
                colorscale="RdBu" if signed else "Viridis",
                zmin=-most if signed else None,
                zmax=most if signed else None,
                colorbar={"title": column},
                visible=number == 0,
                hoverongaps=False,
            )
        )
        shown = [i == number for i in range(len(columns))]
        buttons.append({"label": column, "method": "update", "args": [{"visible": shown}]})
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.15}
    figure = plotly.Figure(traces, _axes(n_layers) | {"title": name, "updatemenus": [menu]})
    return figure.to_html(full_html=False, include_plotlyjs=False)


def _by_prompt(run: Run) -> Iterator[str]:
    """The effect of each head on one prompt at a time, with a slider over the prompts."""
    import plotly.graph_objects as plotly

    texts, path = run.facts.get("prompts.json"), run.folder / "deltas.npy"
    if texts is None or not path.is_file():
        return
    deltas = read_npy(path)
    if deltas.ndim != 3 or deltas.dtype.kind != "f" or not isinstance(texts, list) or len(texts) != deltas.shape[2]:
        raise ValueError(f"{path} must be [layer head prompt], with a text of prompts.json for each prompt.")
    texts = [html.escape(str(text)) for text in texts[:SHOWN]]
    most = float(np.nanmax(np.abs(deltas), initial=0))
    # Rounded, because a page of many prompts is large; None where a head was not run.
    shown = [
        [[None if np.isnan(x) else float(f"{x:.3g}") for x in row] for row in deltas[..., i]] for i in range(len(texts))
    ]
    traces = [
        plotly.Heatmap(z=z, zmin=-most, zmax=most, colorscale="RdBu", colorbar={"title": "delta"}, visible=i == 0)
        for i, z in enumerate(shown)
    ]
    steps = [
        {
            "label": str(i),
            "method": "update",
            "args": [{"visible": [j == i for j in range(len(texts))]}, {"title.text": text}],
        }
        for i, text in enumerate(texts)
    ]
    layout = _axes(deltas.shape[0]) | {
        "title": texts[0],
        "sliders": [{"steps": steps, "currentvalue": {"prefix": "prompt "}}],
    }
    yield plotly.Figure(traces, layout).to_html(full_html=False, include_plotlyjs=False)


def _axes(n_layers: int) -> dict[str, Any]:
    axis = {"dtick": 1, "constrain": "domain"}
    return {
        "xaxis": {"title": "head", **axis},
        "yaxis": {"title": "layer", "scaleanchor": "x", "autorange": "reversed", **axis},
        "height": 200 + 34 * n_layers,
    }


def _table(rows: Sequence[Row]) -> str:
    """A table that is sorted by a click on a column."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (rows[0] if rows else ()))
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(_rounded(value))}</td>' for value in row.values())}</tr>" for row in rows
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{inner}</details>"


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith(".")]


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None


def _csv(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has rows of unequal length.")
    return rows


def _named(name: str, value: Any) -> Iterator[str]:
    """Every entry of that name, however deep."""
    if isinstance(value, dict):
        if name in value:
            yield str(value[name])
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _named(name, inner)


def _number(text: str) -> float:
    """A cell as a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _rounded(text: str) -> str:
    number = _number(text)
    return f"{number:.4g}" if math.isfinite(number) and number != int(number) else text


def _numeric(rows: Sequence[Row]) -> list[str]:
    """The columns that hold numbers, or nothing, besides layer and head."""
    return [
        column
        for column in rows[0]
        if column not in ("layer", "head")
        and all(row[column] == "" or math.isfinite(_number(row[column])) for row in rows)
    ]


def _heads(rows: Sequence[Row]) -> dict[tuple[int, int], Row]:
    """The rows by (layer, head), if each head has one row at most; else nothing."""
    if not rows or not {"layer", "head"} <= rows[0].keys():
        return {}
    if not all(row["layer"].isdecimal() and row["head"].isdecimal() for row in rows):
        return {}
    found = {(int(row["layer"]), int(row["head"])): row for row in rows}
    return found if len(found) == len(rows) else {}


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { border-top: 1px solid #ccc; padding-top: 1rem }
.verdict { border-left: 4px solid #0072b2; padding-left: .7rem }
figure { margin: 1rem 0 } img { max-width: 100% }
details { margin: .4rem 0 } summary { cursor: pointer }
table { border-collapse: collapse; font-size: 13px } th { cursor: pointer; background: #f2f2f2; position: sticky; top: 0 }
th, td { padding: .15rem .5rem; border-bottom: 1px solid #ddd; text-align: right }
pre { overflow-x: auto; background: #f7f7f7; padding: .5rem }
"""

# Numbers sort as numbers and come before words; a second click turns the order round.
SORT = """
for (const th of document.querySelectorAll("table.sortable th")) th.onclick = () => {
  const body = th.closest("table").tBodies[0], column = th.cellIndex;
  const down = th.dataset.down = th.dataset.down === "1" ? "0" : "1";
  const key = row => row.cells[column].textContent;
  const order = (a, b) => {
    const [x, y] = [Number(a || NaN), Number(b || NaN)];
    return isNaN(x) - isNaN(y) || (isNaN(x) ? a.localeCompare(b) : (x - y) * (down === "1" ? -1 : 1));
  };
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
};
"""


@dataclass(frozen=True)
class Config:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of finished runs"""
    out: Path | None = None
    """the page; by default report.html in the first folder"""


def main(config: Config) -> None:
    out = config.out or (config.folders[0] if config.folders else Path()) / "report.html"
    write_report(config.folders, out)
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(run_command(main, Config))
