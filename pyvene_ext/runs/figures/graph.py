"""Edges of a model's graph drawn by layer: paths with their effects, or a circuit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyvene_ext.runs.figures.style import DIVERGING, GREY, Helpful, fitted, styled
from pyvene_ext.specs.graph import Node

EDGES = 40  # edges that a figure draws; of more, those with the largest numbers
NAMED = 40  # nodes that are named
# How far up its layer a site is, and where it is between the heads: a head reads left to right by q, k and v, and writes above.
HEIGHTS = {"embed": -0.5, "q": 0.0, "k": 0.0, "v": 0.0, "z": 0.3, "mlp_in": 0.5, "mlp_out": 0.75}
HEIGHTS |= {"resid_pre": -0.1, "resid_mid": 0.4, "resid_post": 0.9, "logits": 0.4}
ASIDE = {"q": -0.22, "v": 0.22}


def places(nodes: Iterable[Node]) -> dict[Node, tuple[float, float]]:
    """Where nodes are drawn: layers upwards, heads from left to right, MLPs to their right.

    K/V heads stand below the middle of the query heads that they serve, as far as `nodes` has the last head of either kind.

    Args:
        nodes: senders and receivers.

    Returns:
        x from 0 to 1.1 and y in layers, by node.
    """
    nodes = list(nodes)
    top = 1 + max((node.layer for node in nodes if node.layer is not None), default=-1)

    def count(*sites: str) -> int:
        return 1 + max((node.head for node in nodes if node.site in sites and node.head is not None), default=0)

    heads = {"q": count("q", "z"), "z": count("q", "z"), "k": count("k", "v"), "v": count("k", "v")}

    def place(node: Node) -> tuple[float, float]:
        height = HEIGHTS[node.site] + (top if node.site == "logits" else node.layer or 0)
        if node.head is not None:
            return (node.head + 0.5 + ASIDE.get(node.site, 0.0)) / heads[node.site], height
        return {"embed": 0.5, "logits": 0.5, "mlp_in": 1.08, "mlp_out": 1.08}.get(node.site, -0.06), height

    return {node: place(node) for node in nodes}


def strongest_edges(edges: Mapping[str, float] | Iterable[str], n: int) -> dict[str, float]:
    """The edges with the largest numbers; of edges without numbers the first, with NaN."""
    numbers = dict(edges) if isinstance(edges, Mapping) else dict.fromkeys(edges, math.nan)
    order = sorted(numbers, key=lambda edge: -abs(numbers[edge]) if math.isfinite(numbers[edge]) else 0.0)
    return {edge: numbers[edge] for edge in order[:n]}


def ends(edge: str) -> tuple[Node, Node]:
    """Sender and receiver of an edge such as "z.0.1->k.2.0"; ValueError if it is none."""
    sender, arrow, receiver = edge.partition("->")
    if not arrow:
        raise ValueError(f"{edge!r} is no edge; write SENDER->RECEIVER, such as z.0.1->k.2.0.")
    return Node.parse(sender), Node.parse(receiver)


@styled
def edge_graph(
    edges: Mapping[str, float] | Iterable[str],
    title: str,
    label: str = "",
    *,
    nodes: Sequence[Node] = (),
    helpful: Helpful = "positive",
) -> Figure:
    """Edges as lines from layer to layer, as wide as they are important; red helps the answer, blue works against it.

    Args:
        edges: a number an edge, such as its effect; or the edges of a circuit (`Circuit.edges`), which have none.
        title: above the figure.
        label: what the numbers are, for the legend.
        nodes: all senders and receivers of the model, so that nodes are where they are in other figures.
        helpful: the sign of numbers that help.

    Returns:
        The figure, with the 40 largest edges.
    """
    shown = strongest_edges(edges, EDGES)
    pairs = {edge: ends(edge) for edge in shown}
    drawn = list(dict.fromkeys(node for pair in pairs.values() for node in pair))
    at = places([*nodes, *drawn])
    layers = 1 + max((node.layer or 0 for node in at), default=0)
    figure = Figure(figsize=(7.0, min(2.2 + 0.75 * layers, 14.0)))
    axes = figure.add_subplot()
    largest = max((abs(value) for value in shown.values() if math.isfinite(value)), default=1.0) or 1.0
    against, helps = matplotlib.colormaps[DIVERGING](np.array([0.08, 0.92]))
    for edge, value in reversed(shown.items()):  # the strongest on top
        (x0, y0), (x1, y1) = (at[node] for node in pairs[edge])
        share = abs(value) / largest if math.isfinite(value) else 0.4
        colour = GREY if not math.isfinite(value) else helps if (value > 0) == (helpful == "positive") else against
        axes.plot([x0, x1], [y0, y1], color=colour, linewidth=0.5 + 3 * share, alpha=0.35 + 0.6 * share, zorder=2)
    x, y = zip(*(at[node] for node in drawn), strict=True) if drawn else ((), ())
    axes.scatter(x, y, s=12, color="black", zorder=3)
    for node in drawn[:NAMED]:
        axes.annotate(str(node), at[node], (3, 3), textcoords="offset points", size=6, zorder=4)
    text, size = fitted(title, 7.0, 10)
    axes.set_title(text, fontsize=size)
    axes.set(
        xlabel="heads from left to right, MLPs at the right",
        ylabel="layer",
        xlim=(-0.12, 1.24),
        ylim=(-0.8, layers + 0.8),
    )
    axes.set_xticks([])
    step = next(step for step in (1, 2, 4, 8, layers) if layers <= 16 * step)
    axes.set_yticks(range(0, layers, step))
    axes.grid(axis="y")
    if any(map(math.isfinite, shown.values())):
        kinds = ((helps, "helps the answer"), (against, "works against it"))
        lines = [Line2D([], [], color=colour, linewidth=2, label=words) for colour, words in kinds]
        figure.legend(handles=lines, title=label or None, title_fontsize=8, loc="outside lower center", ncols=2)
    return figure
