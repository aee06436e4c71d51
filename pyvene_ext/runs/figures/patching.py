"""Figures of patching: the mean score of every patch, edges as a matrix or drawn by layer, and how well methods find them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyvene_ext.models.sizes import has_heads
from pyvene_ext.runs.figures.heads import head_heatmap
from pyvene_ext.runs.figures.layers import layer_map
from pyvene_ext.runs.figures.style import (
    BLUE,
    DIVERGING,
    GREY,
    SEQUENTIAL,
    Helpful,
    caption,
    fitted,
    over_all,
    signed_map,
    styled,
    titled,
)
from pyvene_ext.specs.graph import Node
from pyvene_ext.stats.intervals import Interval


def site_maps(
    maps: Mapping[str, Float[np.ndarray, "position layer head"]],
    positions: Sequence[str],
    *,
    title: str,
    of: str,
    label: str,
) -> dict[str, Figure]:
    """By file name: layer x head for every site of heads and position; layer x position for the others.

    At one position the others are one figure, layer x site, named "layers".

    Args:
        maps: mean scores by site; sites without heads have one.
        positions: where the sites were patched.
        title: of every figure; site and position follow it.
        of: what was patched, at the titles' end.
        label: what the colour means, with its unit.

    Returns:
        The figure of each site.
    """
    found: dict[str, Figure] = {}
    others = {site: values[..., 0] for site, values in maps.items() if not has_heads(site)}
    for site, values in maps.items():
        if site not in others:
            for position, matrix in zip(positions, values, strict=True):
                file = site if len(positions) == 1 else f"{site}_{position}"
                found[file] = head_heatmap(matrix, f"{title}, {site}@{position}: {of}", label, diverging=True)
    if others and len(positions) == 1:
        together = np.concatenate(list(others.values())).T
        where = f"{title}, positions: {positions[0]}: {of}"
        found["layers"] = layer_map(together, list(others), where, label, "site")
    else:
        for site, matrix in others.items():
            found[site] = layer_map(matrix.T, positions, f"{title}, {site}: {of}", label, "position")
    return found


@styled
def effect_bars(names: Sequence[str], interval: Interval, title: str, label: str, of: str = "intervention") -> Figure:
    """One horizontal bar per intervention, the first on top, with its 95% interval if it has one.

    Args:
        names: of the interventions.
        interval: three arrays " intervention".
        title: above the figure.
        label: what the bars measure, with its unit.
        of: what has a bar.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.6, 1.2 + 0.22 * len(names)))
    axes = figure.add_subplot()
    axes.barh(range(len(names)), interval.mean, color=BLUE, height=0.7)
    axes.hlines(range(len(names)), interval.low, interval.high, color="black", linewidth=1.2)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.invert_yaxis()
    axes.grid(axis="x")
    caption(figure, axes, title, label, of)
    return figure


@styled
def method_maps(
    measures: Mapping[str, Float[np.ndarray, "row method"]],
    rows: Sequence[str],
    methods: Sequence[str],
    title: str,
    *,
    lower: Sequence[str] = (),
) -> Figure:
    """One map per measure, side by side: one row per case, one column per method, colours from 0 to 1, yellow where it is best.

    Args:
        measures: the numbers of each measure, by its name; NaN where it is undefined, which is grey.
        rows: names of the cases.
        methods: names of the methods.
        title: above the figure.
        lower: the measures of which lower is better.

    Returns:
        The figure.
    """
    width, height = max(2.0, 0.4 * len(methods)), 0.22 * len(rows)
    figure = Figure(figsize=(width * len(measures) + 2.4, height + 2.2))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, measures.items(), strict=True):
        colours = matplotlib.colormaps[SEQUENTIAL + "_r" * (name in lower)]
        axes.set_facecolor("#dcdcdc")
        axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (row, column), value in np.ndenumerate(values):
            dark = np.isfinite(value) and sum(colours(float(np.clip(value, 0, 1)))[:3]) < 1.4
            words = f"{value:.2f}" if np.isfinite(value) else "–"
            axes.text(column, row, words, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
        axes.set_title(f"{name} ({'lower' if name in lower else 'higher'} is better)", fontsize=8.5)
        axes.set_xticks(range(len(methods)), labels=methods, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), labels=rows)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("method")
    panels[0].set_ylabel("known circuit")
    over_all(figure, title)
    return figure


CLIPPED = 0.995  # of the edges' sizes lie within the colour scale
NAMED = 12  # nodes that are named one by one; of more, only their layers are


@styled
def edge_matrix(
    matrix: Float[np.ndarray, "sender receiver"],
    senders: Sequence[Node],
    receivers: Sequence[Node],
    title: str,
    label: str,
    *,
    cell: float = 0.12,
    helpful: Helpful = "positive",
) -> Figure:
    """One coloured cell per edge; white at 0, grey where there is no edge. The few largest may lie beyond the colour scale.

    Red helps the answer and blue works against it.

    Args:
        matrix: one number per edge; NaN where there is none.
        senders: the nodes of the rows, in the order of the model's layers.
        receivers: likewise of the columns.
        title: above the figure.
        label: what the colour means, with its unit.
        cell: the side of a cell in inches, at most.
        helpful: the sign of numbers that help.

    Returns:
        The figure.
    """
    sizes = np.abs(matrix[np.isfinite(matrix)])
    limit = float(np.quantile(sizes, CLIPPED)) if sizes.size else 0.0
    beyond = bool(sizes.size and sizes.max() > limit > 0)
    cell = min(cell, 9.0 / max(matrix.shape))
    width, height = max(3.0, matrix.shape[1] * cell), max(2.4, matrix.shape[0] * cell)
    figure = Figure(figsize=(width + 1.9, height + 1.3))
    axes = figure.add_subplot()
    axes.set_facecolor("#dcdcdc")
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        cmap=signed_map(helpful),
        vmin=-(limit or 1.0),
        vmax=limit or 1.0,
        aspect="auto",
        interpolation="nearest",
    )
    _name_nodes(axes.yaxis, senders)
    _name_nodes(axes.xaxis, receivers)
    titled(axes, title, width + 1.9)
    axes.set_xlabel("receiver (layer; in each q, k, v of its heads, then the MLP)")
    if len(receivers) <= NAMED:
        axes.set_xlabel("receiver")
        axes.tick_params("x", rotation=45)
    axes.set_ylabel("sender (layer; in each its heads, then the MLP)")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=label, extend="both" if beyond else "neither", fraction=0.04)
    bar.outline.set_visible(False)
    return figure


def _name_nodes(axis: Axis, nodes: Sequence[Node]) -> None:
    """A tick at each of a few nodes; of many, one where a layer begins and one at each node that belongs to none."""
    if len(nodes) <= NAMED:
        axis.set_ticks(range(len(nodes)), labels=list(map(str, nodes)))
        return
    first = first_of_layers(nodes)
    axis.set_ticks(list(first.values()), labels=list(first))


def first_of_layers(nodes: Sequence[Node], of_layer: str = "{}") -> dict[str, int]:
    """Where each layer begins, by its number in `of_layer`, and each node that belongs to none, by its site."""
    first: dict[str, int] = {}
    for place, node in enumerate(nodes):
        first.setdefault(node.site if node.layer is None else of_layer.format(node.layer), place)
    return first


# -- edges drawn by layer ----------------------------------------------------------------------------------------------

EDGES = 40  # edges that a figure draws; of more, those with the largest numbers
LABELLED = 40  # nodes that are named
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
        edges: one number per edge, such as its effect; or the edges of a circuit (`Circuit.edges`), which have none.
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
    for node in drawn[:LABELLED]:
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
