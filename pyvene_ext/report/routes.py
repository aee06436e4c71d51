"""The routes to one prediction, as written by `information_flow_routes.py`, drawn with names shown on hovering."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from pyvene_ext.io.files import read_as
from pyvene_ext.methods.heads.flow import StreamState
from pyvene_ext.report.attention import escaped, shown_token
from pyvene_ext.runs.figures import BLUE, LIGHT, ORANGE

NODE = re.compile(r"(resid_pre|resid_mid|resid_post)\.(\d{1,6})@(\d{1,6})", re.ASCII)
KINDS = {"residual": LIGHT, "MLP": ORANGE, "attention": BLUE}
STEPS = 8  # line widths, and positions of the slider


class DrawnEdge(BaseModel):
    """What one state of the residual stream contributes to another.

    Attributes:
        source: the state it comes from, such as "resid_mid.3@7".
        target: the state it is added to.
        via: "residual", "mlp" or a head, such as "2.5".
        importance: its share of the target, from 0 to 1.
    """

    source: Annotated[str, Field(pattern=f"^{NODE.pattern}$")]
    target: Annotated[str, Field(pattern=f"^{NODE.pattern}$")]
    via: Annotated[str, Field(pattern=r"^(residual|mlp|\d+\.\d+)$")]
    importance: Annotated[float, Field(ge=0, le=1.001, allow_inf_nan=False)]

    @property
    def nodes(self) -> tuple[StreamState, StreamState]:
        """Source and target, parsed."""
        return _node(self.source), _node(self.target)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return {"residual": "residual", "mlp": "MLP"}.get(self.via, "attention")


class Routes(BaseModel):
    """The routes of one prompt.

    Attributes:
        prompt: the prompt's index in its set.
        tokens: its tokens as text.
        tau: the threshold; every edge is more important.
        renormalised: whether importances were renormalised after low ones were removed.
        edges: the edges.
    """

    prompt: int
    tokens: list[str]
    tau: Annotated[float, Field(ge=0, lt=1)]
    renormalised: bool
    edges: list[DrawnEdge]

    @classmethod
    def read(cls, path: Path) -> Routes:
        """Read a file.

        Args:
            path: a routes.json.

        Returns:
            The routes.

        Raises:
            ValueError: the file does not hold routes; names the file.
        """
        routes = read_as(cls, path)
        for edge in routes.edges:
            if max(node.pos for node in edge.nodes) >= len(routes.tokens):
                raise ValueError(
                    f"{path} has an edge from {edge.source} to {edge.target} but only {len(routes.tokens)} tokens; run it again."
                )
        return routes


class _Lines(NamedTuple):
    """Lines of one kind and width, concatenated with gaps; and points near their middles that show text on hovering."""

    x: list[float | None]
    y: list[float | None]
    x_hover: list[float]
    y_hover: list[float]
    hover: list[str]


def draw_routes(routes: Routes) -> Any:
    """Draw routes: tokens from left to right, layers upwards, every edge as wide and as dark as it is important.

    Hovering over the middle of an edge shows its names and importance. Several heads between the same two states have a line
    each, side by side. A slider hides edges of little importance.

    Args:
        routes: the routes of one prompt.

    Returns:
        A plotly figure.
    """
    import plotly.graph_objects as plotly

    tokens = [escaped(shown_token(token)) for token in routes.tokens]
    most = max((edge.importance for edge in routes.edges), default=1.0)
    limits = np.geomspace(max(routes.tau, most / 100), most, STEPS, endpoint=False) if most else np.zeros(1)
    nodes = dict.fromkeys(node for edge in routes.edges for node in edge.nodes)
    traces: list[Any] = []
    levels: list[int] = []  # a trace is visible while the slider is at its level or below
    for (level, kind), lines in sorted(_lines(routes, tokens, limits).items()):
        share = (level + 1) / STEPS
        common = {"name": kind, "legendgroup": kind, "showlegend": False}
        line = {"color": KINDS[kind], "width": 1 + 6 * share}
        traces.append(
            plotly.Scatter(
                x=lines.x, y=lines.y, mode="lines", line=line, opacity=0.35 + 0.6 * share, hoverinfo="skip", **common
            )
        )
        # Invisible points, because plotly shows hover text for points but not along lines.
        traces.append(_points(lines.x_hover, lines.y_hover, lines.hover, {"size": 12, "opacity": 0}, **common))
        levels += [level, level]
    for kind, colour in KINDS.items():
        line = {"color": colour, "width": 4}
        traces.append(plotly.Scatter(x=[None], y=[None], mode="lines", line=line, name=kind, legendgroup=kind))
    x, y = np.array([_place(node) for node in nodes] or np.empty((0, 2))).T
    words = [f"{node}<br>{tokens[node.pos]}" for node in nodes]
    traces.append(_points(x.tolist(), y.tolist(), words, {"size": 6, "color": "black"}, showlegend=False))
    levels += [STEPS] * (len(traces) - len(levels))
    steps = [
        {"label": f"{limit:.2g}", "method": "restyle", "args": [{"visible": [level >= step for level in levels]}]}
        for step, limit in enumerate(limits)
    ]
    layers = 1 + max((node.layer for node in nodes), default=0)
    every = -(-layers // 20)
    depths = [0, *range(1, layers + 1, every)]
    axis = {"showgrid": False, "zeroline": False, "automargin": True}
    return plotly.Figure(
        traces,
        {
            "xaxis": {
                "title": "token",
                "tickvals": list(range(len(tokens))),
                "ticktext": tokens,
                "tickangle": -60,
                **axis,
            },
            "yaxis": {
                "title": "residual stream after layer",
                "tickvals": depths,
                "ticktext": ["embed", *(str(depth - 1) for depth in depths[1:])],
                **axis,
            },
            "height": 320 + 60 * min(layers, 14),
            "hovermode": "closest",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            "sliders": [
                {"steps": steps, "currentvalue": {"prefix": "edges of an importance above "}, "pad": {"t": 90}}
            ],
            "margin": {"t": 40},
        },
    )


def _lines(routes: Routes, tokens: list[str], limits: np.ndarray) -> dict[tuple[int, str], _Lines]:
    """Group the edges' lines by level of importance and kind."""
    found: dict[tuple[int, str], _Lines] = defaultdict(lambda: _Lines([], [], [], [], []))
    beside: Counter[tuple[StreamState, StreamState, str]] = Counter()
    for edge in sorted(routes.edges, key=lambda edge: -edge.importance):
        source, target = edge.nodes
        key = source, target, edge.kind
        x, y = _bow(source, target, edge.kind, beside[key])
        beside[key] += 1
        lines = found[max(int((limits <= edge.importance).sum()) - 1, 0), edge.kind]
        lines.x.extend([*x.tolist(), None])
        lines.y.extend([*y.tolist(), None])
        middle = slice(6, 15, 4)
        lines.x_hover.extend(x[middle].tolist())
        lines.y_hover.extend(y[middle].tolist())
        words = f"<b>{edge.kind if edge.via in ('residual', 'mlp') else f'head {edge.via}'}</b>"
        words += f"<br>{tokens[source.pos]} → {tokens[target.pos]}<br>{edge.source} → {edge.target}"
        lines.hover.extend([f"{words}<br>importance {edge.importance:.3f}"] * 3)
    return found


def _points(x: list[float], y: list[float], words: list[str], marker: dict[str, Any], **more: Any) -> Any:
    import plotly.graph_objects as plotly

    template = "%{text}<extra></extra>"
    return plotly.Scatter(x=x, y=y, text=words, mode="markers", marker=marker, hovertemplate=template, **more)


def _bow(source: StreamState, target: StreamState, kind: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A line between two states, the first, second ... of its kind; curved if it would hide another."""
    (x0, y0), (x1, y1) = _place(source), _place(target)
    if x0 == x1:
        by = {"residual": 0.0, "MLP": 0.22, "attention": -0.22 - 0.09 * number}[kind]
    else:
        by = 0.12 * ((number + 1) // 2) * (-1) ** number
    along = np.linspace(0, 1, 21)
    x, y = x0 + (x1 - x0) * along + by * 4 * along * (1 - along), y0 + (y1 - y0) * along
    return x.round(3), y.round(3)


def _place(node: StreamState) -> tuple[float, float]:
    """Where a state is drawn: resid_mid half-way up its layer, resid_post at its end."""
    return node.pos, node.layer + {"resid_pre": 0.0, "resid_mid": 0.5, "resid_post": 1.0}[node.site]


def _node(name: str) -> StreamState:
    found = NODE.fullmatch(name)
    assert found, name  # DrawnEdge has checked it
    return StreamState(found[1], int(found[2]), int(found[3]))
