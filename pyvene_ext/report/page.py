"""The HTML page of one or several runs: findings first, then plots, then tables and provenance."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pyvene_ext.io.files import atomic_path
from pyvene_ext.io.packages import need
from pyvene_ext.report.attention import PAGE, attention_html
from pyvene_ext.report.attention import SCRIPT as SHOW_ATTENTION
from pyvene_ext.report.attention import STYLE as OF_ATTENTION
from pyvene_ext.report.colours import MEANING
from pyvene_ext.report.compare import side_by_side
from pyvene_ext.report.edges import CIRCUIT, circuits_html, edge_graph, edge_map, edges_of
from pyvene_ext.report.findings import findings, leading
from pyvene_ext.report.plots import first_heads, head_maps, prompt_by_prompt
from pyvene_ext.report.routes import draw_routes
from pyvene_ext.report.run import Run, files
from pyvene_ext.report.tables import SORT, folded, provenance, table

SHOWN = 500  # the most rows of a table, and the most prompts of a slider; the files have all of them


def write_report(folders: Sequence[str | Path], out: str | Path, title: str | None = None) -> None:
    """Write the page of one or several runs.

    Args:
        folders: run folders.
        out: the page's file.
        title: the page's title; default the names of the runs.

    Raises:
        ValueError: no folder, one that is not of a finished run, one named twice, or a file that does not end in .html.
        MissingExtra: plotly is not installed.
    """
    need("report")
    if not folders:
        raise ValueError("there are no folders; name one or more folders of runs.")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is named twice; name each folder once.")
    if Path(out).suffix.lower() not in (".html", ".htm"):  # which may be a table of a run, or a folder
        raise ValueError(f"{out} is no name of a page; let it end in .html.")
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

    Raises:
        ValueError: what a run's summary states as evidence is none.
    """
    from plotly.offline import get_plotlyjs  # takes a while to import

    plots = itertools.count()

    def drawn(figure: Any) -> str:
        look = {"font": {"family": "system-ui, sans-serif", "size": 13}, "hoverlabel": {"align": "left"}}
        figure.update_layout(template="none", **look)
        config = {"displaylogo": False, "responsive": True}  # as wide as the page
        # A number instead of a random name, so that the same runs give the same page.
        name = f"plot{next(plots)}"
        return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)

    compared = "".join(side_by_side(runs, drawn)) if len(runs) > 1 else ""
    sections = [list(_sections(run, home, drawn)) for run in runs]
    body = [f"<h1>{html.escape(title)}</h1>", _navigation(runs, sections, bool(compared))]
    if len(runs) > 1:  # all findings on the first screen
        for run, parts in zip(runs, sections, strict=True):
            body.append(f"<h2>{html.escape(run.name)}</h2>{parts.pop(0).inner}")
    body.append(compared)
    for number, (run, parts) in enumerate(zip(runs, sections, strict=True)):
        if len(runs) > 1:
            body.append(f'<h2 id="run{number}">{html.escape(run.name)} in full</h2>')
        body += [f'<section id="run{number}-{part.name}"><h3>{part.title}</h3>{part.inner}</section>' for part in parts]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{PAGE}{STYLE}{OF_ATTENTION}</style><script>{get_plotlyjs()}</script></head><body>{''.join(body)}"
        f"<script>{RESIZE}{SORT}{SHOW_ATTENTION}</script></body></html>\n"
    )


class Section(NamedTuple):
    """A part of a run on the page.

    Attributes:
        name: in links.
        title: above it.
        inner: HTML.
    """

    name: str
    title: str
    inner: str


def _navigation(runs: Sequence[Run], sections: Sequence[Sequence[Section]], compared: bool) -> str:
    """Links to the sections, by run if there are several."""
    lines = ['<a href="#side-by-side">Side by side</a>'] if compared else []
    for number, (run, parts) in enumerate(zip(runs, sections, strict=True)):
        links = [f'<a href="#run{number}-{part.name}">{part.title}</a>' for part in parts[len(runs) > 1 :]]
        name = f'<a href="#run{number}"><b>{html.escape(run.name)}</b></a>: ' if len(runs) > 1 else ""
        lines.append(name + " · ".join(links))
    return f"<nav>{''.join(f'<div>{line}</div>' for line in lines)}</nav>"


def _sections(run: Run, home: Path, drawn: Callable[[Any], str]) -> Iterator[Section]:
    """The parts of one run: findings, plots, tables, provenance."""
    yield Section("findings", "Findings", "".join(findings(run)))
    if circuits := list(circuits_html(run, drawn)):
        yield Section("circuits", "Circuits", "".join(circuits))
    effects = list(_effects(run, drawn))
    if effects:
        yield Section("heads", "Heads", f'<p>{MEANING}</p><div class="row">{"".join(effects)}</div>')
    if paths := list(_paths(run, drawn)):
        yield Section("paths", "Paths", f"<p>{MEANING}</p>{''.join(paths)}")
    if found := run.by_prompt():
        texts, deltas = found
        told = "<p>Effect of each head: clean − ablated.</p>"
        yield Section("prompts", "Prompt by prompt", told + drawn(prompt_by_prompt(texts[:SHOWN], deltas[..., :SHOWN])))
    if run.attention:
        yield Section("attention", "Where heads look", attention_html(run.attention))
    if run.routes:
        prompt = f"Routes to the prediction of prompt {run.routes.prompt}"
        yield Section("routes", prompt, drawn(draw_routes(run.routes)))
    if figures := files(run.folder, "figures/*.png") or files(run.folder, "*.png"):
        yield Section(
            "figures", "Figures", f'<div class="row">{"".join(_figure(path, home) for path in figures)}</div>'
        )
    yield Section("numbers", "Numbers and files", "".join(_numbers(run, home)))
    yield Section("provenance", "Command, hashes and versions", provenance(run))


def _effects(run: Run, drawn: Callable[[Any], str]) -> Iterator[str]:
    """Maps and bars of every table of heads."""
    first = leading(run)
    for name, rows in sorted(run.tables.items(), key=lambda item: not item[1] or first not in item[1][0]):
        for figure in (head_maps(rows, run.negative, first), first_heads(rows, run.negative, first)):
            if figure is not None:
                yield f"<figure><figcaption>{html.escape(name)}</figcaption>{drawn(figure)}</figure>"


def _paths(run: Run, drawn: Callable[[Any], str]) -> Iterator[str]:
    """The map and the drawing of every table of edges."""
    found = {
        name: edges for name, rows in run.tables.items() if not CIRCUIT.fullmatch(name) and (edges := edges_of(rows))
    }
    pairs = {name: {(edge.sender, edge.receiver) for edge in edges} for name, edges in found.items()}
    for name, edges in found.items():
        if any(pairs[name] < other for other in pairs.values()):
            continue  # part of another table
        for figure in (edge_map(edges, run.negative), edge_graph(edges, run.negative)):
            if figure is not None:
                yield f"<figure><figcaption>{html.escape(name)}</figcaption>{drawn(figure)}</figure>"


def _numbers(run: Run, home: Path) -> Iterator[str]:
    """Tables, flags, facts, and links to all files."""
    for name, rows in run.tables.items():
        yield folded(f"{name} ({len(rows)} rows)", table(rows[:SHOWN]))
    flags = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    yield folded("config", f"<pre>{html.escape(flags)}</pre>")
    for name, facts in run.facts.items():
        yield folded(name, f"<pre>{html.escape(json.dumps(facts, indent=2, ensure_ascii=False))}</pre>")
    links = [
        f"<li>{_link(path, home, str(path.relative_to(run.folder)))}</li>"
        for path in sorted(run.folder.rglob("*"))
        if path.is_file()
        and "unfinished" not in path.parts
        and not path.name.startswith(".")
        and path.name != "report.html"  # which would make the page differ the second time
    ]
    yield folded("files", f"<ul>{''.join(links)}</ul>")


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


# A plot that was drawn before what now stands beside it is too wide.
RESIZE = """
for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
"""

STYLE = """
h2 { border-top: 1px solid #ccc; padding-top: 1rem } h3 { margin: 2rem 0 .4rem; scroll-margin-top: 4rem }
nav { position: sticky; top: 0; background: white; z-index: 5; padding: .4rem 0; border-bottom: 1px solid #ddd; font-size: 14px;
  max-height: 30vh; overflow-y: auto }
h2, section { scroll-margin-top: 4rem } p, li { max-width: 60rem } .asked { font-size: 17px }
.findings li { margin: .4rem 0 } .verdict { border-left: 4px solid #888; padding-left: .7rem }
.run { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .9rem; font-size: 13px; background: #f7f7f7;
  padding: .7rem .9rem; border-radius: 4px } .run dt { color: #777 } .run dd { margin: 0; overflow-wrap: anywhere }
.run span { margin-right: .8rem } .run b { font-weight: 600 }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem; align-items: start }
figure { margin: .6rem 0; min-width: 0 } img { max-width: 100%; height: auto } figcaption { font-size: 13px; color: #777 }
details { margin: .4rem 0 } summary { cursor: pointer } .wide { overflow-x: auto; max-height: 70vh }
table { border-collapse: collapse; font-size: 13px } th { cursor: pointer; background: #f2f2f2; position: sticky; top: 0 }
th, td { padding: .15rem .5rem; border-bottom: 1px solid #ddd; text-align: right }
pre { overflow-x: auto; background: #f7f7f7; padding: .5rem }
"""
