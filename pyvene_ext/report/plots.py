"""A report's plots of heads: maps, the top heads with their intervals, and effects prompt by prompt."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pyvene_ext.report.attention import escaped
from pyvene_ext.report.colours import colour, colours, robust_limit
from pyvene_ext.report.run import Column, Row, by_group, column_label, columns, number
from pyvene_ext.stats.controls import Head, head_label

BARS = 20  # heads drawn with their intervals
LINES = 12  # lines of a hover text


def head_maps(rows: Sequence[Row], negative: Collection[str] = (), first: str = "") -> Any | None:
    """Draw maps of heads with a menu of the columns whose numbers vary; hovering shows the whole row.

    Args:
        rows: a table.
        negative: columns in which a negative number helps.
        first: the column that is shown at first.

    Returns:
        A plotly figure, or None if there is nothing to draw.
    """
    import plotly.graph_objects as plotly

    every, groups = columns(rows), by_group(rows)
    shape = [1 + max((head[axis] for heads in groups.values() for head in heads), default=0) for axis in (0, 1)]
    looks, labels = [], []
    for group, heads in groups.items():
        words = np.full(shape, "", object)
        for head, row in heads.items():
            words[head] = in_words(every, head, row)
        for column in sorted(every, key=lambda column: column.name != first):
            if column.measures and len({row[column.name] for row in heads.values()} - {""}) > 1:
                values = np.full(shape, np.nan)
                for head, row in heads.items():
                    values[head] = number(row[column.name])
                look = colours(values, column.name, negative=column.name in negative)
                looks.append(look | {"z": plain(values), "text": words.tolist()})
                labels.append(column_label(group, column.name))
    if not looks:
        return None
    trace = plotly.Heatmap(hovertemplate="%{text}<extra></extra>", **GAPS, **looks[0])
    # With one group the hover text is the same for all columns, so the page has it once.
    constant = {"text"} if len(groups) == 1 else set()
    changes = [{name: [value] for name, value in look.items() if name not in constant} for look in looks]
    return plotly.Figure([trace], axes(*shape) | menu(labels, [[change] for change in changes]))


def first_heads(rows: Sequence[Row], negative: Collection[str] = (), first: str = "") -> Any | None:
    """Draw the heads with the largest numbers, for every column with intervals.

    Args:
        rows: a table.
        negative: columns in which a negative number helps.
        first: the column that is shown at first.

    Returns:
        A plotly figure, or None if no column has intervals.
    """
    import plotly.graph_objects as plotly

    every = columns(rows)
    traces: list[Any] = []
    labels: list[str] = []
    for group, heads in by_group(rows).items():
        for column in sorted(every, key=lambda column: column.name != first):
            if column.ends is None or column.ends[0].endswith("lowest"):  # a range over random sets is not an interval
                continue
            known = [(head, row) for head, row in heads.items() if math.isfinite(number(row[column.name]))]
            top = sorted(known, key=lambda item: -abs(number(item[1][column.name])))[:BARS]
            value, low, high = (np.array([number(row[name]) for _, row in top]) for name in (column.name, *column.ends))
            helps = column.name in negative
            signed = helps or any(number(row[column.name]) < 0 for _, row in known)
            reach = {"array": plain(high - value), "arrayminus": plain(value - low), "color": "#444", "width": 3}
            traces.append(
                plotly.Bar(
                    x=[head_label(head) for head, _ in top],
                    y=value.tolist(),
                    error_y=reach,
                    text=[in_words(every, head, row) for head, row in top],
                    textposition="none",
                    hovertemplate="%{text}<extra></extra>",
                    marker={"color": [colour(one, signed, helps) for one in value.tolist()]},
                    visible=not traces,
                )
            )
            labels.append(column_label(group, column.title))
    if not traces:
        return None
    changes: list[list[dict[str, Any]]] = [
        [{"visible": only(i, labels)}, {"yaxis.title.text": escaped(label)}] for i, label in enumerate(labels)
    ]
    layout = {
        "xaxis": {"title": "head, largest first", "type": "category", "tickangle": -60},
        "yaxis": {"title": escaped(labels[0]), "zerolinecolor": "#999", "gridcolor": "#eee"},
        "height": 400,
        "margin": {"t": 60, "r": 20},
    }
    return plotly.Figure(traces, layout | menu(labels, changes))


def prompt_by_prompt(texts: Sequence[str], deltas: Float[np.ndarray, "layer head prompt"]) -> Any:
    """Draw the effect of each head on one prompt at a time, with a slider over the prompts, on one scale.

    The few largest effects lie beyond the scale, or they would leave all others pale.

    Args:
        texts: the prompts.
        deltas: the effects.

    Returns:
        A plotly figure.
    """
    import plotly.graph_objects as plotly

    look = colours(deltas, "delta", limit=robust_limit(deltas))
    template = "head %{y}.%{x}<br>delta: %{z}<extra></extra>"
    traces = [
        plotly.Heatmap(hovertemplate=template, visible=i == 0, z=plain(deltas[..., i]), **GAPS, **look)
        for i in range(len(texts))
    ]
    titles = ["<br>".join(map(escaped, textwrap.wrap(text, 100, max_lines=3, placeholder=" …"))) for text in texts]
    steps = [
        {"label": str(i), "method": "update", "args": [{"visible": only(i, texts)}, {"title.text": title}]}
        for i, title in enumerate(titles)
    ]
    layout = axes(*deltas.shape[:2]) | {
        "title": {"text": titles[0], "font": {"size": 13}, "x": 0, "xref": "paper"},
        "sliders": [{"steps": steps, "currentvalue": {"prefix": "prompt "}, "pad": {"t": 50}}],
    }
    return plotly.Figure(traces, layout | {"height": layout["height"] + 90, "margin": {"t": 90, "r": 20}})


GAPS = {"hoverongaps": False, "xgap": 1, "ygap": 1}


def plain(values: Any) -> Any:
    """Numbers for JSON, rounded because a page with many prompts is large; None for what is not finite."""
    if isinstance(values, np.ndarray | list):
        return [plain(value) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]
    return float(f"{values:.4g}") if math.isfinite(values) else None


def axes(layers: int, heads: int) -> dict[str, Any]:
    """The layout of a map of heads, layer 0 on top."""
    return {
        "xaxis": axis("head", heads),
        "yaxis": axis("layer", layers) | {"autorange": "reversed"},
        "height": 150 + int(max(180, min(34, 900 / layers) * layers)),
        "plot_bgcolor": "#dcdcdc",
        "margin": {"t": 60, "r": 20},
    }


def axis(title: str, n: int) -> dict[str, Any]:
    """An axis of n cells, with a tick at every whole number or at fewer."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, n) if n <= 24 * step)
    return {"title": title, "dtick": step, "showgrid": False, "zeroline": False}


def menu(labels: Sequence[str], changes: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """A menu of what to show; none for one thing."""
    buttons = [
        {"label": escaped(label), "method": "update", "args": args} for label, args in zip(labels, changes, strict=True)
    ]
    return {"updatemenus": [{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"}]}


def only(which: int, of: Sequence[Any]) -> list[bool]:
    """Which of several traces is visible."""
    return [other == which for other in range(len(of))]


def in_words(every: Sequence[Column], head: Head, row: Row) -> str:
    """A row of a table, numbers with their intervals."""
    cells = [(column.title, column.cell(row)) for column in every if column.name not in ("layer", "head")]
    words = [f"{escaped(name)}: {escaped(cell)}" for name, cell in cells]
    # Plotly does not show a hover text that is taller than the plot.
    each = math.ceil(len(words) / LINES)
    lines = [" · ".join(words[start : start + each]) for start in range(0, len(words), each or 1)]
    return "<br>".join([f"<b>head {head[0]}.{head[1]}</b>", *lines])
