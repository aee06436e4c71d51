"""A report's plots of heads: maps, the top heads with their intervals, and effects prompt by prompt."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pyvene_ext.report.attention import escaped
from pyvene_ext.report.run import Column, Head, Row, by_group, column_label, columns, number
from pyvene_ext.runs.figures import BLUE, DIVERGING, SEQUENTIAL

BARS = 20  # heads drawn with their intervals
LINES = 12  # lines of a hover text


def head_maps(rows: Sequence[Row]) -> Any | None:
    """Draw maps of heads with a menu of the columns whose numbers vary; hovering shows the whole row.

    Args:
        rows: a table.

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
            words[head] = _in_words(every, head, row)
        for column in every:
            if column.measures and len({row[column.name] for row in heads.values()} - {""}) > 1:
                values = np.full(shape, np.nan)
                for head, row in heads.items():
                    values[head] = number(row[column.name])
                looks.append(_colours(values) | {"colorbar": _bar(column.name), "text": words.tolist()})
                labels.append(column_label(group, column.name))
    if not looks:
        return None
    trace = plotly.Heatmap(hovertemplate="%{text}<extra></extra>", **GAPS, **looks[0])
    # With one group the hover text is the same for all columns, so the page has it once.
    constant = {"text"} if len(groups) == 1 else set()
    changes = [{name: [value] for name, value in look.items() if name not in constant} for look in looks]
    return plotly.Figure([trace], _axes(*shape) | _menu(labels, [[change] for change in changes]))


def first_heads(rows: Sequence[Row]) -> Any | None:
    """Draw the heads with the largest numbers, for every column with intervals.

    Args:
        rows: a table.

    Returns:
        A plotly figure, or None if no column has intervals.
    """
    import plotly.graph_objects as plotly

    every = columns(rows)
    traces: list[Any] = []
    labels: list[str] = []
    for group, heads in by_group(rows).items():
        for column in every:
            if column.ends is None or column.ends[0].endswith("lowest"):  # a range over random sets is not an interval
                continue
            known = [(head, row) for head, row in heads.items() if math.isfinite(number(row[column.name]))]
            first = sorted(known, key=lambda item: -abs(number(item[1][column.name])))[:BARS]
            value, low, high = (
                np.array([number(row[name]) for _, row in first]) for name in (column.name, *column.ends)
            )
            reach = {"array": _plain(high - value), "arrayminus": _plain(value - low), "color": "#444", "width": 3}
            traces.append(
                plotly.Bar(
                    x=[f"{layer}.{head}" for (layer, head), _ in first],
                    y=value.tolist(),
                    error_y=reach,
                    text=[_in_words(every, head, row) for head, row in first],
                    textposition="none",
                    hovertemplate="%{text}<extra></extra>",
                    marker={"color": BLUE},
                    visible=not traces,
                )
            )
            labels.append(column_label(group, column.title))
    if not traces:
        return None
    changes: list[list[dict[str, Any]]] = [
        [{"visible": _only(i, labels)}, {"yaxis.title.text": escaped(label)}] for i, label in enumerate(labels)
    ]
    layout = {
        "xaxis": {"title": "head, largest first", "type": "category", "tickangle": -60},
        "yaxis": {"title": escaped(labels[0]), "zerolinecolor": "#999", "gridcolor": "#eee"},
        "width": 560,
        "height": 370,
        "margin": {"t": 60},
    }
    return plotly.Figure(traces, layout | _menu(labels, changes))


def prompt_by_prompt(texts: Sequence[str], deltas: Float[np.ndarray, "layer head prompt"]) -> Any:
    """Draw the effect of each head on one prompt at a time, with a slider over the prompts.

    Args:
        texts: the prompts.
        deltas: the effects.

    Returns:
        A plotly figure.
    """
    import plotly.graph_objects as plotly

    most = float(np.abs(deltas[np.isfinite(deltas)]).max(initial=0))
    template = "head %{y}.%{x}<br>delta: %{z}<extra></extra>"
    traces = [
        plotly.Heatmap(
            hovertemplate=template, visible=i == 0, colorbar=_bar("delta"), **GAPS, **_colours(deltas[..., i], most)
        )
        for i in range(len(texts))
    ]
    titles = ["<br>".join(map(escaped, textwrap.wrap(text, 80, max_lines=3, placeholder=" …"))) for text in texts]
    steps = [
        {"label": str(i), "method": "update", "args": [{"visible": _only(i, texts)}, {"title.text": title}]}
        for i, title in enumerate(titles)
    ]
    layout = _axes(*deltas.shape[:2]) | {
        "width": max(640, 210 + 34 * min(deltas.shape[1], 24)),
        "title": {"text": titles[0], "font": {"size": 13}},
        "sliders": [{"steps": steps, "currentvalue": {"prefix": "prompt "}, "pad": {"t": 50}}],
    }
    return plotly.Figure(traces, layout | {"height": layout["height"] + 90, "margin": {"t": 90}})


GAPS = {"hoverongaps": False, "xgap": 1, "ygap": 1}


def _colours(values: Float[np.ndarray, "layer head"], most: float | None = None) -> dict[str, Any]:
    """Colours as in `figures.head_heatmap`, white at 0 if there are both signs; a gap for a missing number."""
    from plotly.colors import get_colorscale

    known = values[np.isfinite(values)]
    if most is None and known.min() < 0 < known.max():
        most = float(np.abs(known).max())
    return {
        # Rounded, because a page with many prompts is large.
        "z": [[float(f"{x:.4g}") if np.isfinite(x) else None for x in row] for row in values.tolist()],
        "colorscale": get_colorscale(SEQUENTIAL if most is None else DIVERGING),
        "zmin": float(known.min()) if most is None else -most,
        "zmax": float(known.max()) if most is None else most,
    }


def _bar(name: str) -> dict[str, Any]:
    return {"title": {"text": escaped(name), "side": "right"}, "thickness": 14, "outlinewidth": 0}


def _axes(layers: int, heads: int) -> dict[str, Any]:
    def axis(title: str, n: int) -> dict[str, Any]:
        step = next(step for step in (1, 2, 4, 8, 16, 32, n) if n <= 24 * step)
        return {"title": title, "dtick": step, "constrain": "domain", "showgrid": False, "zeroline": False}

    return {
        "xaxis": axis("head", heads),
        "yaxis": axis("layer", layers) | {"scaleanchor": "x", "autorange": "reversed"},
        "width": 210 + max(200, 34 * min(heads, 24)),
        "height": 190 + max(180, 34 * min(layers, 26)),
        "plot_bgcolor": "#dcdcdc",
        "margin": {"t": 70},
    }


def _menu(labels: Sequence[str], changes: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """A menu of what to show."""
    buttons = [
        {"label": escaped(label), "method": "update", "args": args} for label, args in zip(labels, changes, strict=True)
    ]
    return {"updatemenus": [{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"}]}


def _only(which: int, of: Sequence[Any]) -> list[bool]:
    return [other == which for other in range(len(of))]


def _in_words(every: Sequence[Column], head: Head, row: Row) -> str:
    """A row of a table, numbers with their intervals."""
    cells = [(column.title, column.cell(row)) for column in every if column.name not in ("layer", "head")]
    words = [f"{escaped(name)}: {escaped(cell)}" for name, cell in cells]
    # Plotly does not show a hover text that is taller than the plot.
    each = math.ceil(len(words) / LINES)
    lines = [" · ".join(words[start : start + each]) for start in range(0, len(words), each or 1)]
    return "<br>".join([f"<b>head {head[0]}.{head[1]}</b>", *lines])


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
