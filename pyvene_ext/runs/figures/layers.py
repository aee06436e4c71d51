"""Figures of numbers by layer: curves over depth, and maps of layers against positions or sites."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pyvene_ext.runs.figures.style import BLUE, DIVERGING, GREY, styled
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
    axes.set(
        title=textwrap.fill(title, 60), xlabel="depth (blocks passed; 0: the embedding)", ylabel=label, yscale=scale
    )
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
    """One coloured cell a layer and a named column; layer 0 on top, white at 0, grey where there is no number.

    Args:
        values: one number a cell.
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
    axes.set_title(textwrap.fill(title, int(11 * (width + 1.9))))
    axes.set(xlabel=xlabel, ylabel="layer")
    axes.set_xticks(range(len(columns)), labels=columns)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.16 / width, aspect=height / 0.14, pad=0.02)
    bar.set_label(textwrap.fill(label, int(11 * height)))
    bar.outline.set_visible(False)
    return figure
