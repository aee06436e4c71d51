"""Figures of both activation frequencies: of heads that are ablated one at a time, and of information flow routes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyvene_ext.methods.heads.flow import FlowEdge, StreamState
from pyvene_ext.runs.figures.heads import frequency_curve, head_heatmap, histogram_abs_delta
from pyvene_ext.runs.figures.style import BLUE, LIGHT, ORANGE, drawable, styled, titled

NAMED = 60  # lines of attention between tokens that are named in a drawing, if there are no more


def figures_of_effects(
    deltas: Float[np.ndarray, "layer head prompt"],
    mean_delta: Float[np.ndarray, "layer head"],
    frequency: Float[np.ndarray, "layer head"],
    against_tau: tuple[Float[np.ndarray, " tau"], Float[np.ndarray, "tau layer head"]],
    *,
    tau: float,
    signed: bool,
    of: str,
) -> dict[str, Figure]:
    """All figures by file name: maps of heads, and if anything has an effect, how the frequency depends on tau.

    Args:
        deltas: effects, NaN where a head was not run.
        mean_delta: their means over prompts.
        frequency: share of prompts with an effect above tau.
        against_tau: thresholds, and the frequency at each.
        tau: the threshold.
        signed: whether an effect is compared with tau, and not its size.
        of: what was measured, for titles.

    Returns:
        The figures by their file names.
    """
    compared = "delta" if signed else "|delta|"
    label = f"share of prompts with {compared} > {tau:.3g}"
    figures = {
        "frequency": head_heatmap(frequency, f"Activation frequency: {of}", label, limits=(0, 1), missing="not run"),
        "mean_delta": head_heatmap(
            mean_delta, f"Mean effect: {of}", "mean delta (logit difference)", diverging=True, missing="not run"
        ),
    }
    if np.nanmax(deltas if signed else np.abs(deltas)) > 0:
        title = f"Activation frequency against the threshold: {of}"
        threshold = f"threshold tau on {compared} (logit difference)"
        figures["frequency_vs_tau"] = frequency_curve(*against_tau, tau=tau, title=title, threshold=threshold)
        figures["abs_delta"] = histogram_abs_delta(deltas, tau=tau)
    return figures


@styled
def routes(edges: Sequence[FlowEdge], tokens: Sequence[str], layers: int, title: str) -> Figure:
    """One prompt's routes, every edge as wide as it is important.

    Heads that carry between the same two states are one line, as wide as their sum; it names them where there is room.

    Args:
        edges: as `Flow.graph` gives them.
        tokens: of the prompt.
        layers: of the model.
        title: above the figure.

    Returns:
        The figure.
    """
    residual, mlp = {}, {}
    attention: dict[tuple[StreamState, StreamState], list[FlowEdge]] = defaultdict(list)
    for edge in edges:
        pair = edge.source, edge.target
        if edge.via == "residual":
            residual[pair] = edge.importance
        elif edge.via == "mlp":
            mlp[pair] = edge.importance
        else:
            attention[pair].append(edge)
    between = {pair for pair in attention if pair[0].pos != pair[1].pos}
    named = between if len(between) <= NAMED else set()
    written: list[tuple[float, float]] = []
    labels = [token.strip() or repr(token)[1:-1] for token in tokens]
    figure = Figure(figsize=(min(18.0, 1.8 + 0.5 * len(tokens)), min(16.0, 1.9 + 0.75 * layers)))
    axes = figure.add_subplot()
    for pair, importance in residual.items():
        axes.plot(*_bow(*pair, 0), color=LIGHT, linewidth=0.4 + 3 * importance, zorder=1)
    for pair, importance in mlp.items():
        axes.plot(*_bow(*pair, 0.22), color=ORANGE, linewidth=0.4 + 3 * importance, zorder=2)
    for pair, parts in attention.items():
        line = _bow(*pair, 0 if pair in between else -0.22)
        width = 0.4 + 3 * sum(part.importance for part in parts)
        axes.plot(*line, color=BLUE, linewidth=width, alpha=0.8, zorder=3)
        if pair in named:
            at = min(10, max(1, 24 // (pair[1].pos - pair[0].pos)))  # near the source: lines meet at their target
            (x, y), words = np.transpose(line)[at], ", ".join(part.via for part in parts)
            if any(abs(x - taken[0]) < 0.8 and abs(y - taken[1]) < 0.14 for taken in written):
                continue
            written.append((x, y))
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4}
            axes.text(x, y, words, fontsize=5.5, ha="center", va="center", bbox=box, zorder=5)
    nodes = {node for edge in edges for node in (edge.source, edge.target)}
    prediction = StreamState("resid_post", layers - 1, len(tokens) - 1)
    # Sorted: the order of a set changes from process to process, and with it the bytes of the PDF.
    x, y = zip(*map(_place, sorted(nodes | {prediction})), strict=True)
    axes.scatter(x, y, s=9, color="black", zorder=4)
    titled(axes, title, figure.get_figwidth())
    axes.set_xlabel("token")
    axes.set_ylabel("residual stream after layer")
    shown = [label if drawable(label) else f"({number})" for number, label in enumerate(labels)]
    axes.set_xticks(range(len(tokens)), shown, rotation=60)
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    step = -(-layers // 16)
    axes.set_yticks([0, *range(1, layers + 1, step)], ["embed", *map(str, range(0, layers, step))])
    axes.set_ylim(-0.3, layers + 0.3)
    heads = "attention (heads named where there is room)" if named else "attention (heads: routes.json)"
    kinds = (("residual", LIGHT), ("MLP", ORANGE), (heads, BLUE))
    lines = [Line2D([], [], color=colour, linewidth=2, label=label) for label, colour in kinds]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    return figure


def _place(node: StreamState) -> tuple[float, float]:
    """Where a node is drawn: resid_mid half-way up its layer, resid_post at its end."""
    return node.pos, node.layer + {"resid_pre": 0.0, "resid_mid": 0.5, "resid_post": 1.0}[node.site]


def _bow(
    source: StreamState, target: StreamState, by: float
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """A line from node to node, bent to the right by `by` tokens."""
    (x0, y0), (x1, y1) = _place(source), _place(target)
    along = np.linspace(0, 1, 21)
    return x0 + (x1 - x0) * along + by * 4 * along * (1 - along), y0 + (y1 - y0) * along
