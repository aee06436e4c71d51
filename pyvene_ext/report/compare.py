"""Two runs side by side: the maps of a column, their difference, a scatter of heads, and correlations with intervals."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pyvene_ext.report.attention import escaped
from pyvene_ext.report.colours import colours
from pyvene_ext.report.findings import leading
from pyvene_ext.report.plots import GAPS, axis, menu, plain
from pyvene_ext.report.run import Row, Run
from pyvene_ext.report.tables import table
from pyvene_ext.stats.controls import Head, head_label
from pyvene_ext.stats.correlations import Coefficient, Correlation, correlate_heads

AT_LEAST = 5  # heads for a correlation
DRAWN = 3  # pairs of runs that are drawn; of more runs there is the table
COLUMNS = 24  # of a pair of runs that are drawn
LABELLED = 12  # heads that a scatter plot names
RESAMPLES = 1000


class Shared(NamedTuple):
    """A column that two runs have for the same heads.

    Attributes:
        table: the file.
        name: the column, with the group of rows it is of.
        a: of the first run, NaN where either has no number.
        b: of the second.
        correlation: of the two.
    """

    table: str
    name: str
    a: Float[np.ndarray, "layer head"]
    b: Float[np.ndarray, "layer head"]
    correlation: Correlation


def side_by_side(runs: Sequence[Run], drawn: Any) -> Iterator[str]:
    """Render what runs of one model have in common.

    Args:
        runs: the runs.
        drawn: makes HTML of a plotly figure.

    Yields:
        HTML; nothing if no column is shared.
    """
    found = [run.by_head() for run in runs]
    pairs, left_out = [], []
    for (a, of_a), (b, of_b) in itertools.combinations(zip(runs, found, strict=True), 2):
        if a.weights and b.weights and a.weights != b.weights:
            if any(key in of_b for key in of_a):
                left_out.append(f"{a.name} and {b.name}")
        elif columns := shared(of_a, of_b):
            pairs.append((a, b, columns))
    if pairs or left_out:
        yield '<h2 id="side-by-side">Side by side</h2>'
    for a, b, columns in pairs[: DRAWN if len(pairs) <= DRAWN else 0]:
        yield f"<h3>{html.escape(a.name)} and {html.escape(b.name)}</h3>"
        leader = leading(a)
        first = sorted(columns, key=lambda column: column.name != leader)
        yield drawn(compared(first[:COLUMNS], (a.name, b.name), a.negative))
    if pairs:
        yield table([_in_words(a, b, one) for a, b, columns in pairs for one in columns])
    if len(pairs) > DRAWN:
        yield "<p>Give two runs to see their maps side by side.</p>"
    if left_out:
        yield (
            f"<p>Not correlated, because the weights differ, so that a head of one model is not the head of the same layer and "
            f"number in the other: {html.escape('; '.join(left_out))}.</p>"
        )


def shared(
    of_a: Mapping[tuple[str, str], Mapping[Head, float]], of_b: Mapping[tuple[str, str], Mapping[Head, float]]
) -> list[Shared]:
    """The columns that vary over five heads or more in both of two runs, as `Run.by_head` returns them."""
    found = []
    for key in (key for key in of_a if key in of_b):
        heads = sorted(of_a[key].keys() & of_b[key].keys())
        x, y = ([of_one[key][head] for head in heads] for of_one in (of_a, of_b))
        if len(heads) >= AT_LEAST and len(set(x)) > 1 and len(set(y)) > 1:
            shape = [1 + max(head[i] for head in heads) for i in (0, 1)]
            a, b = np.full(shape, np.nan), np.full(shape, np.nan)
            a[tuple(zip(*heads, strict=True))], b[tuple(zip(*heads, strict=True))] = x, y
            found.append(Shared(*key, a, b, correlate_heads(a, b, n_resamples=RESAMPLES)))
    return found


def compared(columns: Sequence[Shared], names: tuple[str, str], negative: frozenset[str] = frozenset()) -> Any:
    """Draw two maps on one scale, their difference, and a scatter of heads with the names of those that stand out.

    Args:
        columns: one or more; a menu chooses.
        names: of the two runs.
        negative: columns in which a negative number helps.

    Returns:
        A plotly figure.
    """
    from plotly.subplots import make_subplots

    a, b = map(escaped, names)
    titles = (a, b, f"{a} − {b}", "one point per head")
    figure = make_subplots(2, 2, subplot_titles=titles, horizontal_spacing=0.2, vertical_spacing=0.2)
    for number, column in enumerate(columns):
        for trace, place in zip(_traces(column, names, negative), itertools.product((1, 2), (1, 2)), strict=True):
            figure.add_trace(trace.update(visible=number == 0), *place)
    layers, heads = (max(column.a.shape[i] for column in columns) for i in (0, 1))
    for row, col in ((1, 1), (1, 2), (2, 1)):
        figure.update_xaxes(axis("head", heads), row=row, col=col)
        figure.update_yaxes(axis("layer", layers) | {"autorange": "reversed"}, row=row, col=col)
    figure.update_xaxes(title=a, gridcolor="#eee", zerolinecolor="#bbb", row=2, col=2)
    figure.update_yaxes(title=b, gridcolor="#eee", zerolinecolor="#bbb", row=2, col=2)
    height = 330 + 2 * int(max(200, min(30, 700 / layers) * layers))
    figure.update_layout(height=height, margin={"t": 140, "r": 20}, title=_title(columns[0]))
    places = len(figure.data) // len(columns)
    changes = [
        [
            {"visible": [trace // places == number for trace in range(len(figure.data))]},
            {"title.text": _title(column)["text"]},
        ]
        for number, column in enumerate(columns)
    ]
    choice = menu([f"{column.table}: {column.name}" for column in columns], changes)
    choice["updatemenus"][0]["pad"] = {"b": 22}  # above the title of the first map
    return figure.update_layout(choice)


def _traces(column: Shared, names: tuple[str, str], negative: frozenset[str]) -> Iterator[Any]:
    """Both maps, the difference, and the scatter plot."""
    import plotly.graph_objects as plotly

    a, b = column.a, column.b
    name = escaped(column.name)
    helps = column.name.rpartition(": ")[2] in negative
    both = np.stack([a, b])
    for values, where, look in (
        (a, (0.405, 1.0), colours(both, "", negative=helps)),
        (b, (1.0, 1.0), colours(both, "", negative=helps)),
        (a - b, (0.405, 0.4), colours(a - b, "", negative=helps, limit=_size(a - b))),
    ):
        bar = look["colorbar"] | {"x": where[0], "xanchor": "left", "y": where[1], "yanchor": "top", "len": 0.4}
        hover = f"head %{{y}}.%{{x}}<br>{name}: %{{z}}<extra></extra>"
        yield plotly.Heatmap(
            z=plain(values), hovertemplate=hover, **GAPS, **look | {"colorbar": bar | {"thickness": 10}}
        )
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(np.isfinite(a + b))]
    x, y = ([float(values[head]) for head in heads] for values in (a, b))
    texts = _labels(heads, x, y)
    words = [f"head {head_label(head)}" for head in heads]
    hover = f"%{{hovertext}}<br>{escaped(names[0])}: %{{x:.4g}}<br>{escaped(names[1])}: %{{y:.4g}}<extra></extra>"
    yield plotly.Scatter(
        x=plain(x),
        y=plain(y),
        text=texts,
        hovertext=words,
        mode="markers+text",
        textposition="top center",
        textfont={"size": 10},
        hovertemplate=hover,
        showlegend=False,
        cliponaxis=False,
        marker={
            "size": 7,
            "color": [layer for layer, _ in heads],
            "colorscale": "Cividis",
            "line": {"width": 0.5, "color": "white"},
            "colorbar": {
                "title": "layer",
                "thickness": 10,
                "x": 1.0,
                "xanchor": "left",
                "y": 0.4,
                "yanchor": "top",
                "len": 0.4,
            },
        },
    )


def _labels(heads: Sequence[Head], x: Sequence[float], y: Sequence[float]) -> list[str]:
    """The names of the heads that are farthest from the middle of all, as long as they do not hide one another."""
    points = np.array([x, y]).T
    spread = np.ptp(points, axis=0)
    points = (points - np.median(points, axis=0)) / np.where(spread > 0, spread, 1)
    texts = [""] * len(heads)
    taken: list[int] = []
    for i in np.argsort(-np.abs(points).max(axis=1)):
        near = any(abs(points[i] - points[j])[0] < 0.08 and abs(points[i] - points[j])[1] < 0.07 for j in taken)
        if len(taken) < LABELLED and not near:
            texts[int(i)] = f"{heads[i][0]}.{heads[i][1]}"
            taken.append(int(i))
    return texts


def _size(values: np.ndarray) -> float | None:
    return float(np.nanmax(np.abs(values))) or None


def _title(column: Shared) -> dict[str, Any]:
    rank, line, n = column.correlation.spearman, column.correlation.pearson, column.correlation.n
    words = f"Spearman {_coefficient(rank)}, Pearson {_coefficient(line)}, {n} heads"
    return {
        "text": escaped(words),
        "font": {"size": 13},
        "x": 0,
        "xref": "paper",
        "y": 1,
        "yanchor": "top",
        "pad": {"t": 46},
    }


def _coefficient(of: Coefficient) -> str:
    return f"{of.r:.2f}" + (f" [{of.low:.2f}, {of.high:.2f}]" if math.isfinite(of.low) else "")


def _in_words(a: Run, b: Run, column: Shared) -> Row:
    """A row of the table of correlations."""
    rank = column.correlation.spearman
    numbers = {"heads": str(column.correlation.n)}
    for name, value in (("Spearman", rank.r), ("Spearman_low", rank.low), ("Spearman_high", rank.high)):
        numbers[name] = f"{value:.3f}" if math.isfinite(value) else ""
    numbers |= {"p": f"{rank.p:.2g}", "p_within_layers": f"{rank.p_within_layers:.2g}"}
    return {"run": a.name, "and": b.name, "table": column.table, "column": column.name, **numbers}
