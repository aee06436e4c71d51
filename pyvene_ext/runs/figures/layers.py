"""Figures by layer: curves against depth, maps of layers and positions, and what probes read at each layer."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pyvene_ext.runs.figures.style import BLUE, DIVERGING, GREY, ORANGE, styled, titled
from pyvene_ext.stats.intervals import Interval


@styled
def depth_curve(curve: Interval, title: str, label: str, scale: str = "linear") -> Figure:
    """A mean over prompts against depth, with its interval as a band.

    Args:
        curve: three arrays " depth".
        title: above the figure.
        label: what is averaged, with its unit.
        scale: of the vertical axis, "linear" or "log".

    Returns:
        The figure.
    """
    depths = np.arange(len(curve.mean))
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.add_subplot()
    if scale == "linear":
        axes.axhline(0, color=GREY, linewidth=0.8)
    axes.fill_between(depths, curve.low, curve.high, color=BLUE, alpha=0.25, linewidth=0, label="95% interval")
    axes.plot(depths, curve.mean, "o-", color=BLUE, linewidth=1.4, markersize=3.5, label="mean over prompts")
    titled(axes, title, figure.get_figwidth())
    axes.set(xlabel="depth (blocks passed; 0: the embedding)", ylabel=label, yscale=scale)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if scale == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the style has no formulas
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def layer_map(
    values: Float[np.ndarray, "layer column"], columns: Sequence[str], title: str, label: str, xlabel: str
) -> Figure:
    """One coloured cell per layer and named column; layer 0 on top, white at 0, grey where there is no number.

    Args:
        values: one number per cell.
        columns: their names.
        title: above the figure.
        label: what the colour means, with its unit.
        xlabel: what the columns are.

    Returns:
        The figure.
    """
    n, width = values.shape[0], max(2.4, 0.62 * len(columns))
    height = max(1.8, min(0.42, 6.0 / n) * n)
    limit = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
    figure = Figure(figsize=(width + 1.9, height + 1.2))
    axes = figure.add_subplot()
    axes.set_facecolor("#dcdcdc")
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    titled(axes, title, width + 1.9)
    axes.set(xlabel=xlabel, ylabel="layer")
    axes.set_xticks(range(len(columns)), labels=columns)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.16 / width, aspect=height / 0.14, pad=0.02)
    bar.set_label(textwrap.fill(label, int(11 * height)))
    bar.outline.set_visible(False)
    return figure


LINES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("in_sample", {"color": BLUE, "linestyle": ":"}, "in-sample"),
    ("r2", {"color": BLUE, "marker": "o", "markersize": 3.5}, "cross-validated, 95% interval"),
    ("question", {"color": ORANGE, "marker": "s", "markersize": 3}, "mean of the question at this layer"),
    ("shuffled", {"color": GREY, "linestyle": "--"}, "labels shuffled: mean and range"),
)


@styled
def probe_curves(model: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """R^2 by depth with its baselines; a row of panels per target, one column per position.

    Args:
        model: in the title.
        rows: one a position, target and depth, with "place", its name, "problems", and of each of LINES its value and the ends of
            its band: "_low" and "_high" of r2 and question, "_lowest" and "_highest" of shuffled.

    Returns:
        The figure.
    """
    positions, targets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("position", "target"))
    figure = Figure(figsize=(max(1.0 + 2.5 * len(positions), 7), 1.4 + 1.7 * len(targets)))
    panels = figure.subplots(len(targets), len(positions), sharex=True, sharey=True, squeeze=False)
    labels = list(dict.fromkeys(row["place"] for row in rows))
    for (i, target), (j, position) in itertools.product(enumerate(targets), enumerate(positions)):
        axes = panels[i, j]
        mine = [row for row in rows if (row["target"], row["position"]) == (target, position)]
        if not mine:
            axes.text(0.5, 0.5, "left out", transform=axes.transAxes, ha="center", color=GREY)
            continue
        x = [row["depth"] for row in mine]

        def band(axes: Axes, low: str, high: str, colour: str, x: list[int] = x, mine: Sequence[Any] = mine) -> None:
            ends = [row[low] for row in mine], [row[high] for row in mine]
            axes.fill_between(x, ends[0], ends[1], color=colour, alpha=0.2, linewidth=0)

        band(axes, "r2_low", "r2_high", BLUE)
        band(axes, "question_low", "question_high", ORANGE)
        band(axes, "shuffled_lowest", "shuffled_highest", GREY)
        for key, look, label in LINES:
            axes.plot(x, [row[key] for row in mine], label=label, **look)
        axes.set_title(f"{target}, {position} ({mine[0]['problems']})")
        axes.grid(axis="y")
    # Penalties keep predictions from being far worse than the mean; what is, lies below the panel.
    panels[0, 0].set_ylim(-0.25, 1.05)
    shown = range(0, len(labels), math.ceil(len(labels) / 14))
    for axes in panels[-1]:
        axes.set_xticks(shown, [labels[depth] for depth in shown], rotation=90)
        axes.set_xlabel("place in the residual stream")
    for axes in panels[:, 0]:
        axes.set_ylabel("R²")
    figure.suptitle(f"{model}: what a linear probe reads off the residual stream (in brackets: problems)", fontsize=10)
    drawn = next(axes for axes in panels.flat if axes.lines)
    figure.legend(*drawn.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
