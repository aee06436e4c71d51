"""Figures of patching: the mean score of every patch, a figure a site or a bar each; of every edge, senders against receivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from pyvene_ext.models.sizes import has_heads
from pyvene_ext.runs.figures.heads import head_heatmap
from pyvene_ext.runs.figures.layers import layer_map
from pyvene_ext.runs.figures.style import BLUE, GREY, Helpful, caption, signed_map, styled, titled
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
    """One horizontal bar an intervention, the first on top, with its 95% interval if it has one.

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
    """One coloured cell an edge; white at 0, grey where there is no edge. The few largest may lie beyond the colour scale.

    Red helps the answer and blue works against it.

    Args:
        matrix: one number an edge; NaN where there is none.
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
    first: dict[str, int] = {}
    for place, node in enumerate(nodes):
        first.setdefault(node.site if node.layer is None else str(node.layer), place)
    axis.set_ticks(list(first.values()), labels=list(first))
