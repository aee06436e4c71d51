"""The HTML page of one or several runs."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pyvene_ext.io.files import atomic_path
from pyvene_ext.io.packages import need
from pyvene_ext.report.attention import SCRIPT as SHOW_ATTENTION
from pyvene_ext.report.attention import attention_html
from pyvene_ext.report.plots import first_heads, head_maps, prompt_by_prompt
from pyvene_ext.report.routes import draw_routes
from pyvene_ext.report.run import Row, Run, columns, files, rounded
from pyvene_ext.stats.correlations import spearman

SHOWN = 500  # the most rows of a table, and the most prompts of a slider; the files have all of them
AT_LEAST = 5  # heads for a correlation
LONG = 120  # characters of a fact before it is cut


def write_report(folders: Sequence[str | Path], out: str | Path, title: str | None = None) -> None:
    """Write the page of one or several runs.

    Args:
        folders: run folders.
        out: the page's file.
        title: the page's title; default the names of the runs.

    Raises:
        ValueError: no folder, one that is not of a finished run, or one named twice.
        MissingExtra: plotly is not installed.
    """
    need("report")
    if not folders:
        raise ValueError("there are no folders; name one or more folders of runs.")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is named twice; name each folder once.")
    runs = [Run.read(folder) for folder in folders]
    with atomic_path(out) as temporary:
        temporary.write_text(
            page(runs, title or ", ".join(run.name for run in runs), Path(out).parent), encoding="utf-8"
        )


def page(runs: Sequence[Run], title: str, home: Path) -> str:
    """Render the page.

    Args:
        runs: the runs.
        title: the page's title.
        home: the page's folder, which links to files are relative to.

    Returns:
        The page as HTML.
    """
    from plotly.offline import get_plotlyjs  # takes a while to import

    body = [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) > 1:
        links = "".join(f'<li><a href="#run{i}">{html.escape(run.name)}</a></li>' for i, run in enumerate(runs))
        body += [f"<ul>{links}</ul>", *_side_by_side(runs)]
    plots = itertools.count()
    for number, run in enumerate(runs):
        if len(runs) > 1:
            body.append(f'<h2 id="run{number}">{html.escape(run.name)}</h2>')
        body += _of_run(run, home, plots)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(body)}"
        f"<script>{SORT}{SHOW_ATTENTION}</script></body></html>\n"
    )


def _of_run(run: Run, home: Path, plots: Iterator[int]) -> Iterator[str]:
    def drawn(figure: Any) -> str:
        look = {"font": {"family": "system-ui, sans-serif", "size": 13}, "hoverlabel": {"align": "left"}}
        figure.update_layout(template="none", **look)
        # A number instead of a random name, so that the same runs give the same page.
        return figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"plot{next(plots)}", config={"displaylogo": False}
        )

    yield from _provenance(run)
    yield "".join(f'<p class="verdict">{html.escape(line)}</p>' for line in run.verdicts)
    drawings = [
        f"<figure><figcaption>{html.escape(name)}</figcaption>{drawn(figure)}</figure>"
        for name, rows in run.tables.items()
        for figure in (head_maps(rows), first_heads(rows))
        if figure is not None
    ]
    if drawings:
        yield f'<h3>Heads</h3><div class="row">{"".join(drawings)}</div>'
    if found := run.by_prompt():
        texts, deltas = found
        yield "<h3>Prompt by prompt <small>effect of each head: clean − ablated</small></h3>"
        yield drawn(prompt_by_prompt(texts[:SHOWN], deltas[..., :SHOWN]))
    if run.attention:
        yield f"<h3>Where heads look</h3>{attention_html(run.attention)}"
    if run.routes:
        yield f"<h3>Routes to the prediction of prompt {run.routes.prompt}</h3>{drawn(draw_routes(run.routes))}"
    if figures := files(run.folder, "figures/*.png") or files(run.folder, "*.png"):
        yield f'<h3>Figures</h3><div class="row">{"".join(_figure(path, home) for path in figures)}</div>'
    yield "<h3>Numbers and files</h3>"
    for name, rows in run.tables.items():
        yield _folded(f"{name} ({len(rows)} rows)", _table(rows[:SHOWN]))
    flags = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    yield _folded("config", f"<pre>{html.escape(flags)}</pre>")
    for name, facts in run.facts.items():
        yield _folded(name, f"<pre>{html.escape(json.dumps(facts, indent=2, ensure_ascii=False))}</pre>")
    links = [
        f"<li>{_link(path, home, str(path.relative_to(run.folder)))}</li>"
        for path in sorted(run.folder.rglob("*"))
        if path.is_file()
        and "unfinished" not in path.parts
        and not path.name.startswith(".")
        and path.name != "report.html"  # which would make the page differ the second time
    ]
    yield _folded("files", f"<ul>{''.join(links)}</ul>")


def _provenance(run: Run) -> Iterator[str]:
    """Command, model, hashes, versions, flags and the study's counts, one line each."""
    lines: list[tuple[str, str]] = []
    for record in run.records:
        lines.append(("command", f"<code>{html.escape(str(record['command']))}</code>"))
        model = [str(record[name]) for name in ("model", "model_type", "revision") if record.get(name)]
        lines.append(("model", html.escape(", ".join(model))))
        lines.append(
            ("run on", html.escape(", ".join(str(record[n]) for n in ("dtype", "device", "time") if n in record)))
        )
        hashes = dict(_hashes(record))
        lines.append(("hashes", _pairs(hashes)))
        versions = record.get("versions")
        if isinstance(versions, dict):
            versions = {name: version for name, version in versions.items() if version is not None}
            python = {"python": record["python"]} if "python" in record else {}
            lines.append(("versions", _pairs(python | versions, ": ")))
        listed = {"command", "model", "model_type", "revision", "dtype", "device", "time", "python", *hashes}
        config = run.config if isinstance(run.config, dict) else {}
        lines.append(
            (
                "found",
                _pairs(
                    {
                        name: rounded(str(value)) if isinstance(value, float) else value
                        for name, value in record.items()
                        if name not in listed and name not in config and isinstance(value, str | int | float)
                    }
                ),
            )
        )
    flags = run.config if isinstance(run.config, dict) else {"config.yaml": run.config}
    lines.append(("flags", _pairs({name: value for name, value in flags.items() if value is not None})))
    cells = dict.fromkeys((name, cell) for name, cell in lines if cell)  # models run together share some lines
    yield f'<dl class="run">{"".join(f"<dt>{name}</dt><dd>{cell}</dd>" for name, cell in cells)}</dl>'


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


def _figure(path: Path, home: Path) -> str:
    content = path.read_bytes()
    width = int.from_bytes(content[16:20]) * 45 // 100  # figures have 200 dots per inch, screens 96
    files = [path, *(other for ending in (".pdf", ".svg") if (other := path.with_suffix(ending)).is_file())]
    links = " · ".join(_link(file, home, file.suffix[1:].upper()) for file in files)
    name = html.escape(path.stem)
    image = f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{name}" width="{width}">'
    return f"<figure>{image}<figcaption>{name}: {links}</figcaption></figure>"


def _link(path: Path, home: Path, text: str) -> str:
    target = Path(os.path.relpath(path, home)).as_posix()
    return f'<a href="{urllib.parse.quote(target)}">{html.escape(text)}</a>'


def _side_by_side(runs: Sequence[Run]) -> Iterator[str]:
    """Rank correlations between runs of one model, of the same column for the same heads."""
    rows, left_out = [], []
    found = [run.by_head() for run in runs]
    for (a, of_a), (b, of_b) in itertools.combinations(zip(runs, found, strict=True), 2):
        if a.weights and b.weights and a.weights != b.weights:
            if any(key in of_b for key in of_a):
                left_out.append(f"{a.name} and {b.name}")
            continue
        for key in (key for key in of_a if key in of_b):
            heads = sorted(of_a[key].keys() & of_b[key].keys())
            x, y = ([of_one[key][head] for head in heads] for of_one in (of_a, of_b))
            if len(heads) >= AT_LEAST and len(set(x)) > 1 and len(set(y)) > 1:
                rho, p = spearman(np.array(x), np.array(y))
                numbers = {"heads": str(len(heads)), "Spearman": f"{rho:.3f}", "p": f"{p:.2g}"}
                rows.append({"run": a.name, "and": b.name, "table": key[0], "column": key[1], **numbers})
    if rows or left_out:
        yield "<h2>Side by side</h2>"
    if rows:
        yield _table(rows)
    if left_out:
        yield (
            f"<p>Not correlated, because the weights differ, so that a head of one model is not the head of the same layer and "
            f"number in the other: {html.escape('; '.join(left_out))}.</p>"
        )


def _table(rows: Sequence[Row]) -> str:
    """A table that sorts when a heading is clicked; numbers are shown with their intervals and sort by value."""
    shown = columns(rows)
    head = "".join(f"<th>{html.escape(column.title)}</th>" for column in shown)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-is="{html.escape(row[c.name])}">{html.escape(c.cell(row))}</td>' for c in shown)
        + "</tr>"
        for row in rows
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{inner}</details>"


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { border-top: 1px solid #ccc; padding-top: 1rem } h3 { margin: 2rem 0 .4rem } h3 small { color: #777; font-weight: normal }
.run { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .9rem; font-size: 13px; background: #f7f7f7;
  padding: .7rem .9rem; border-radius: 4px } .run dt { color: #777 } .run dd { margin: 0; overflow-wrap: anywhere }
.run span { margin-right: .8rem } .run b { font-weight: 600 }
.verdict { border-left: 4px solid #0072b2; padding-left: .7rem }
.row { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start }
figure { margin: .6rem 0 } img { max-width: 100%; height: auto } figcaption { font-size: 13px; color: #777 }
details { margin: .4rem 0 } summary { cursor: pointer } select { font: inherit; max-width: 44rem; margin-right: 1rem }
table { border-collapse: collapse; font-size: 13px } th { cursor: pointer; background: #f2f2f2; position: sticky; top: 0 }
th, td { padding: .15rem .5rem; border-bottom: 1px solid #ddd; text-align: right }
pre { overflow-x: auto; background: #f7f7f7; padding: .5rem }
"""

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
