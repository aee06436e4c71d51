"""Tables of a page, sortable by any column, with intervals; collapsible sections; and each run's provenance."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from pyvene_ext.report.run import Row, Run, columns, rounded

LONG = 120  # characters of a fact before it is cut


def table(rows: Sequence[Row]) -> str:
    """Render a table that sorts when a heading is clicked.

    Args:
        rows: cells as text.

    Returns:
        HTML. Numbers are shown with their intervals and sort by value.
    """
    shown = columns(rows)
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in shown)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-is="{html.escape(row[c.name])}">{html.escape(c.cell(row))}</td>' for c in shown)
        + "</tr>"
        for row in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="sortable">{inner}</table></div>'


def folded(title: str, inner: str) -> str:
    """Render a collapsible section; `inner` is HTML already."""
    return f"<details><summary>{html.escape(title)}</summary>{inner}</details>"


def provenance(run: Run) -> str:
    """Render command, model, hashes, versions, flags and the study's counts, one line each.

    Args:
        run: the run.

    Returns:
        A list of names and values, as HTML.
    """
    lines = [line for record in run.records for line in _of_record(record, run.config)]
    flags = run.config if isinstance(run.config, dict) else {"config.yaml": run.config}
    lines.append(("flags", _pairs({name: value for name, value in flags.items() if value is not None})))
    cells = dict.fromkeys((name, cell) for name, cell in lines if cell)  # models run together share some lines
    return f'<dl class="run">{"".join(f"<dt>{name}</dt><dd>{cell}</dd>" for name, cell in cells)}</dl>'


def _of_record(record: dict[str, Any], config: Any) -> Iterator[tuple[str, str]]:
    yield "command", f"<code>{html.escape(str(record['command']))}</code>"
    yield "model", html.escape(", ".join(str(record[n]) for n in ("model", "model_type", "revision") if record.get(n)))
    yield "run on", html.escape(", ".join(str(record[n]) for n in ("dtype", "device", "time") if n in record))
    hashes = dict(_hashes(record))
    yield "hashes", _pairs(hashes)
    versions = record.get("versions")
    if isinstance(versions, dict):
        versions = {name: version for name, version in versions.items() if version is not None}
        python = {"python": record["python"]} if "python" in record else {}
        yield "versions", _pairs(python | versions, ": ")
    listed = {"command", "question", "model", "model_type", "revision", "dtype", "device", "time", "python", *hashes}
    listed |= {*config} if isinstance(config, dict) else set()
    found = {
        name: rounded(str(value)) if isinstance(value, float) else value
        for name, value in record.items()
        if name not in listed and isinstance(value, str | int | float)
    }
    yield "found", _pairs(found)


def _hashes(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every hash in a record, at any depth, with its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _hashes(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and name.endswith(("hash", "sha256")):
        yield name, value


def _pairs(of: dict[Any, Any], between: str = " ") -> str:
    """Names and values on one line."""

    def one(name: Any, value: Any) -> str:
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
        text = text.removesuffix("\n").removesuffix("\n...")
        text = text if len(text) <= LONG else f"{text[:LONG]}…"
        return f"<span>{html.escape(str(name))}{between}<b>{html.escape(text)}</b></span>"

    return " ".join(one(name, value) for name, value in of.items())


# Numbers sort as numbers and before words; a second click reverses the order.
SORT = """
for (const th of document.querySelectorAll("table.sortable th")) th.onclick = () => {
  const body = th.closest("table").tBodies[0], column = th.cellIndex;
  const down = th.dataset.down = th.dataset.down === "1" ? "0" : "1";
  const key = row => row.cells[column].dataset.is;
  const order = (a, b) => {
    const [x, y] = [Number(a || NaN), Number(b || NaN)];
    return isNaN(x) - isNaN(y) || (isNaN(x) ? a.localeCompare(b) : (x - y) * (down === "1" ? -1 : 1));
  };
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
};
"""
