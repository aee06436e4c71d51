"""Paths and circuits: a map of senders by receivers, the strongest edges drawn by layer, and how faithful a circuit is."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyvene_ext.report.attention import escaped
from pyvene_ext.report.colours import MEANING, colour, colours, robust_limit
from pyvene_ext.report.plots import menu, only, plain
from pyvene_ext.report.run import CIRCUITS, Row, Run, columns, number
from pyvene_ext.report.tables import table
from pyvene_ext.runs.figures.patching import CLIPPED, ends, first_of_layers, places
from pyvene_ext.specs.graph import Node, reaches

SHOWN = (10, 20, 40, 80)  # strongest edges, by the slider
MOST = 250_000  # cells of a map; of larger models the strongest edges are drawn alone
CIRCUIT = re.compile(rf"{CIRCUITS}(.+)\.csv")  # of one method, as `circuit_localization.py` writes it
METHODS = "methods.csv"  # how faithful the circuit of each is
SHARED = "shared_with"  # a column of a circuit that was compared: the other circuits that have the edge, or "none"


class Edge(NamedTuple):
    """One row of a table of edges.

    Attributes:
        sender: what writes.
        receiver: what reads.
        row: the row.
    """

    sender: Node
    receiver: Node
    row: Row


def edges_of(rows: Sequence[Row]) -> list[Edge]:
    """The edges of a table with a column "edge", or "sender" and "receivers", which are joined by + if patched jointly.

    Args:
        rows: a table.

    Returns:
        The edges, one for each receiver; none of a table of something else.
    """
    found: list[Edge] = []
    for row in rows:
        names = row["edge"].split("->") if "edge" in row else [row.get("sender", ""), row.get("receivers", "")]
        try:
            pairs = [ends(f"{names[0]}->{receiver}") for receiver in names[-1].split("+")]
            if not all(reaches(*pair) for pair in pairs):
                return []
        except ValueError:
            return []
        found += [Edge(*pair, row) for pair in pairs]
    return found


def edge_map(edges: Sequence[Edge], negative: Collection[str] = ()) -> Any | None:
    """Draw a map of senders by receivers with a menu of columns; hovering shows the edge, its number and interval.

    Args:
        edges: of one table.
        negative: columns in which a negative number helps.

    Returns:
        A plotly figure; None for fewer than two receivers, for edges without numbers, and for more cells than a page can hold.
    """
    import plotly.graph_objects as plotly

    senders = sorted({edge.sender for edge in edges}, key=_order)
    receivers = sorted({edge.receiver for edge in edges}, key=_order)
    shown = [column for column in columns([edge.row for edge in edges]) if column.measures]
    if len(receivers) < 2 or not shown or len(senders) * len(receivers) > MOST:
        return None
    row, column_of = ({node: i for i, node in enumerate(nodes)} for nodes in (senders, receivers))
    looks = []
    for column in shown:
        values = np.full((len(senders), len(receivers)), np.nan)
        words = np.full(values.shape, "", object)
        for edge in edges:
            cell = row[edge.sender], column_of[edge.receiver]
            values[cell], words[cell] = (
                number(edge.row[column.name]),
                escaped(column.cell(edge.row)) if column.ends else "",
            )
        limit = robust_limit(values, CLIPPED) if column.name in negative or np.nanmin(values) < 0 else None
        look = colours(values, column.name, negative=column.name in negative, limit=limit)
        hover = (
            "%{y} → %{x}<br>" + escaped(column.title) + (": %{text}" if column.ends else ": %{z}") + "<extra></extra>"
        )
        looks.append(
            look | {"z": plain(values), "text": words.tolist() if column.ends else None, "hovertemplate": hover}
        )
    names = {"x": list(map(str, receivers)), "y": list(map(str, senders))}
    layout = {
        "xaxis": _ticks(receivers) | {"title": "receiver"},
        "yaxis": _ticks(senders) | {"title": "sender", "autorange": "reversed"},
        "height": 220 + int(min(900, max(200, 12 * len(senders)))),
        "plot_bgcolor": "#dcdcdc",
        "margin": {"t": 60, "r": 20},
    }
    changes = [[{name: [value] for name, value in look.items()}] for look in looks]
    return plotly.Figure(
        [plotly.Heatmap(hoverongaps=False, **names, **looks[0])], layout | menu([c.title for c in shown], changes)
    )


def edge_graph(edges: Sequence[Edge], negative: Collection[str] = ()) -> Any | None:
    """Draw the strongest edges by layer, as wide as they are strong, with a slider of how many; without numbers all alike.

    Where a column says which edges another circuit shares (`SHARED`), the others are dotted.

    Args:
        edges: of one table; its first column of numbers counts.
        negative: columns in which a negative number helps.

    Returns:
        A plotly figure; None for no edges.
    """
    import plotly.graph_objects as plotly

    if not edges:
        return None
    column = next((column for column in columns([edge.row for edge in edges]) if column.measures), None)
    values = [number(edge.row[column.name]) if column else math.nan for edge in edges]
    helps = column is not None and column.name in negative
    signed = helps or any(value < 0 for value in values)
    order = sorted(range(len(edges)), key=lambda i: -_strength(values[i]))[: SHOWN[-1]]
    largest = max((_strength(value) for value in values), default=0.0)
    at = places(node for edge in edges for node in (edge.sender, edge.receiver))
    counts = [n for n in SHOWN if n < len(order)] + [len(order)]
    start = min(1, len(counts) - 1)
    traces = []
    for rank, i in enumerate(order):
        share = _strength(values[i]) / largest if largest else 0.4
        words = f"{edges[i].sender} → {edges[i].receiver}"
        words += f"<br>{escaped(column.title)}: {escaped(column.cell(edges[i].row))}" if column else ""
        others = edges[i].row.get(SHARED, "")
        words += f"<br>shared with: {escaped(others)}" if others else ""
        line = {"width": round(1 + 6 * share, 2), "color": colour(values[i], signed, helps)}
        line["dash"] = "dot" if others == "none" else "solid"
        x, y = (
            np.linspace(at[edges[i].sender], at[edges[i].receiver], 11).round(4).T.tolist()
        )  # hovering works at points
        look = {"mode": "lines", "line": line, "opacity": round(0.35 + 0.6 * share, 2), "visible": rank < counts[start]}
        traces.append(plotly.Scatter(x=x, y=y, text=words, hoverinfo="text", showlegend=False, **look))
    steps = []
    for place, n in enumerate(counts):
        nodes = _nodes([node for i in order[:n] for node in (edges[i].sender, edges[i].receiver)], at)
        traces.append(nodes.update(visible=place == start))
        visible = [*(rank < n for rank in range(len(order))), *only(place, counts)]
        steps.append({"label": str(n), "method": "restyle", "args": [{"visible": visible}]})
    prefix = f"strongest edges by {escaped(column.name)}: " if column else "edges: "
    current = {"prefix": prefix, "suffix": f" of {len(edges)}"}
    slider = {"steps": steps, "active": start, "currentvalue": current, "pad": {"t": 40}}
    return plotly.Figure(traces, _layout(1 + max(node.layer or 0 for node in at)) | {"sliders": [slider]})


def circuits_html(run: Run, drawn: Callable[[Any], str]) -> Iterator[str]:
    """Render the table of methods, and below it the graph of each circuit.

    Args:
        run: the run.
        drawn: makes HTML of a plotly figure.

    Yields:
        HTML; nothing of a run without circuits.
    """
    named = {of[1]: edges_of(rows) for name, rows in run.tables.items() if (of := CIRCUIT.fullmatch(name))}
    found = {method: edges for method, edges in named.items() if edges}
    methods = run.tables.get(METHODS, [])
    worth = {row.get("method", ""): row for row in methods}
    if found:
        yield f"<p>{MEANING}</p>{table(methods)}"
    for method in sorted(found, key=[*worth, *found].index):
        words = html.escape(_caption(method, found[method], worth.get(method, {})))
        yield f"<figure><figcaption>{words}</figcaption>{drawn(edge_graph(found[method], run.negative))}</figure>"


def _caption(method: str, edges: Sequence[Edge], row: Row) -> str:
    """How faithful a circuit is, and how to read its graph."""
    cells = {column.name: column.cell(row) for column in columns([row])}
    told = {"faithfulness": "faithfulness", "random_mean": "random circuits of the same layers and kinds"}
    words = [f"{method}: {len(edges)} edges", *(f"{told[name]} {cells[name]}" for name in told if name in cells)]
    if len(edges) > SHOWN[-1]:
        words.append(f"at most the {SHOWN[-1]} strongest are drawn, all are in {CIRCUITS}{method}.csv")
    if SHARED in edges[0].row:
        n = sum(edge.row[SHARED] != "none" for edge in edges)
        words.append(f"solid: the {n} that another circuit shares; dotted: those of this one alone")
    return "; ".join(words)


def _strength(value: float) -> float:
    return abs(value) if math.isfinite(value) else 0.0


def _nodes(nodes: Sequence[Node], at: Mapping[Node, tuple[float, float]]) -> Any:
    """Points with their names."""
    import plotly.graph_objects as plotly

    drawn = list(dict.fromkeys(nodes))
    x, y = zip(*(at[node] for node in drawn), strict=True)
    # Edges leave upwards and arrive from below.
    sides = {"mlp_in": "middle right", "mlp_out": "middle right", "z": "bottom center", "embed": "bottom center"}
    look = {
        "textposition": [sides.get(node.site, "top center") for node in drawn],
        "textfont": {"size": 10},
        "marker": {"size": 6, "color": "black"},
    }
    names = list(map(str, drawn))
    return plotly.Scatter(x=x, y=y, text=names, mode="markers+text", hoverinfo="text", showlegend=False, **look)


def _layout(layers: int) -> dict[str, Any]:
    """Layers upwards."""
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "range": [-0.12, 1.2]}
    step = next(step for step in (1, 2, 4, 8, layers) if layers <= 20 * step)
    ticks = {"tickvals": list(range(0, layers, step)), "gridcolor": "#eee", "zeroline": False}
    return {
        "xaxis": bare | {"title": "heads from left to right, MLPs at the right"},
        "yaxis": ticks | {"title": "layer", "range": [-0.9, layers + 0.8]},
        "height": 260 + int(min(1000, max(300, 75 * layers))),
        "hovermode": "closest",
        "margin": {"t": 30, "r": 20},
    }


def _order(node: Node) -> tuple[float, int, int]:
    """The order in which nodes write and read."""
    sites = ("embed", "resid_pre", "q", "k", "v", "z", "resid_mid", "mlp_in", "mlp_out", "resid_post", "logits")
    layer = {"embed": -1.0, "logits": math.inf}.get(node.site, float(node.layer or 0))
    return layer, sites.index(node.site), node.head or 0


def _ticks(nodes: Sequence[Node]) -> dict[str, Any]:
    """An axis of named nodes, with a tick where a layer begins and at those that belong to none."""
    first = first_of_layers(nodes, "layer {}")
    return {
        "type": "category",
        "tickmode": "array",
        "tickvals": list(first.values()),
        "ticktext": list(first),
        "showgrid": False,
        "automargin": True,
    }
