"""Figures of numbers by head: maps, curves, histograms and scatter plots."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from pyvene_ext.runs.figures.style import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    LAYERS,
    ORANGE,
    PINK,
    SEQUENTIAL,
    SKY,
    Helpful,
    caption,
    log_axis,
    over_all,
    signed_map,
    styled,
    whole_numbers,
)
from pyvene_ext.stats.correlations import Correlation, q_values
from pyvene_ext.stats.intervals import Interval


@styled
def head_heatmap(
    matrix: Num[np.ndarray, "layer head"],
    title: str,
    label: str,
    *,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    helpful: Helpful = "positive",
    first_layer: int = 0,
    missing: str = "not finite",
) -> Figure:
    """One coloured cell per head; layer 0 on top, as the matrix is printed. Cells that are not finite are hatched grey.

    Args:
        matrix: one number per head.
        title: above the figure.
        label: what the colour means, with its unit.
        diverging: blue - white - red with white at 0, for signed values.
        helpful: for those, the sign of numbers that help the answer, which are red.
        limits: the ends of the colour scale; the finite values' range by default. For `diverging` the farther end counts.
        first_layer: the number of the matrix's first row.
        missing: what the legend calls cells that are not finite.

    Returns:
        The figure.

    Raises:
        ValueError: the matrix is not [layer head], or is empty.
    """
    matrix = _matrix(matrix)
    n_layers, n_heads = matrix.shape
    low, high = limits or _range(matrix)
    if diverging:
        high = max(abs(low), abs(high))
        low = -high

    width, height = _map_size(n_layers, n_heads)
    figure = Figure(figsize=(width + 1.7, height + 1.0))
    axes = figure.add_subplot()
    image = _draw_heads(axes, matrix, low, high, signed_map(helpful) if diverging else SEQUENTIAL, first_layer)
    caption(figure, axes, title, "head", "layer")
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.16 / width, aspect=height / 0.14, pad=0.02)
    bar.outline.set_visible(False)
    if not np.isfinite(matrix).all():
        swatch = Patch(facecolor="#dcdcdc", edgecolor="#9a9a9a", linewidth=0, hatch="//////", label=missing)
        figure.legend(handles=[swatch], loc="outside lower left")
    return figure


@styled
def compared_heads(
    a: Num[np.ndarray, "layer head"],
    b: Num[np.ndarray, "layer head"],
    *,
    names: tuple[str, str],
    title: str,
    label: str,
) -> Figure:
    """Three maps side by side: two conditions on one colour scale, and a - b, white at 0.

    Args:
        a: one number per head, of the first condition.
        b: of the second.
        names: of the two conditions.
        title: above the figure.
        label: what the colours mean, with its unit.

    Returns:
        The figure.

    Raises:
        ValueError: a or b is not [layer head], or their shapes differ.
    """
    a, b = _matrix(a), _matrix(b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, not {a.shape} and {b.shape}.")
    low, high = _range(np.stack([a, b]))
    farthest = max(map(abs, _range(a - b)))
    width, height = _map_size(*a.shape)
    figure = Figure(figsize=(3 * width + 2.8, height + 1.3))
    over_all(figure, title)
    panels = figure.subplots(1, 3)
    for axes, name, matrix in zip(panels, (*names, "Difference"), (a, b, a - b), strict=True):
        difference = matrix is not a and matrix is not b
        ends = (-farthest, farthest) if difference else (low, high)
        image = _draw_heads(axes, matrix, *ends, DIVERGING if difference else SEQUENTIAL, 0)
        axes.set(title=name, xlabel="head", ylabel="layer")
        if matrix is not a:  # the first two share one colour bar, to the right of the second
            words = f"{label}: difference" if difference else label
            bar = figure.colorbar(image, ax=axes if difference else panels[:2], aspect=height / 0.14, pad=0.02)
            bar.set_label(textwrap.fill(words, int(11 * height)))
            bar.outline.set_visible(False)
    return figure


@styled
def frequency_curve(
    taus: Float[np.ndarray, " tau"],
    frequencies: Float[np.ndarray, "tau layer head"],
    *,
    tau: float | None = None,
    title: str = "Activation frequency against the threshold",
    threshold: str = "threshold tau on |delta| (logit difference)",
) -> Figure:
    """How the activation frequency falls with tau: the mean over all heads, and each layer's mean coloured by depth.

    A frequency at one tau hides how much it depends on tau; this curve shows it.

    Args:
        taus: ascending thresholds.
        frequencies: each head's frequency at each tau; nan for heads that were not run, which are in no mean.
        tau: the run's own threshold, marked by a line.
        title: above the figure.
        threshold: the horizontal axis' label.

    Returns:
        The figure.

    Raises:
        ValueError: `taus` and `frequencies` do not fit together.
    """
    taus, frequencies = np.asarray(taus, dtype=np.float64), np.asarray(frequencies, dtype=np.float64)
    if frequencies.ndim != 3 or len(frequencies) != len(taus):
        raise ValueError(f"frequencies must be [tau layer head] for {len(taus)} taus, not {frequencies.shape}.")
    figure = Figure(figsize=(5.6, 3.6))
    axes = figure.add_subplot()
    run = np.ma.masked_invalid(frequencies)
    by_layer = run.mean(axis=2).filled(np.nan)
    colours = _layer_colours(figure, axes, np.arange(by_layer.shape[1]))
    for layer, curve in enumerate(by_layer.T):
        axes.plot(taus, curve, color=colours[layer], linewidth=1.1)
    every = "all heads" if np.isfinite(frequencies).all() else "all heads that were run"
    axes.plot(taus, run.mean(axis=(1, 2)), color="black", linewidth=2.2, label=every)
    if tau is not None:
        axes.axvline(tau, color=ORANGE, linewidth=1.2, linestyle="--", label=f"tau = {tau:g}")
    if taus[0] > 0:
        log_axis(axes)
    caption(figure, axes, title, threshold, "activation frequency (mean over heads)")
    axes.set_ylim(0, 1.02)
    axes.margins(x=0)
    axes.grid()
    axes.legend(loc="upper right")
    return figure


@styled
def histogram_abs_delta(
    delta: np.ndarray,
    *,
    tau: float | None = None,
    title: str = "Size of the effect of ablating one head",
) -> Figure:
    """The distribution of |delta| over all heads and prompts, on a logarithmic axis, with the share above tau.

    Exact zeros have no place on that axis, and effects below a millionth of the largest are rounding; the legend counts both.

    Args:
        delta: clean minus ablated logit difference, any shape (heads and prompts).
        tau: the run's threshold, marked by a line.
        title: above the figure.

    Returns:
        The figure.

    Raises:
        ValueError: no value is finite and other than 0.
    """
    size = np.abs(np.asarray(delta, dtype=np.float64)).ravel()
    size = size[np.isfinite(size)]
    if not size.any():
        raise ValueError("every |delta| is 0 or not finite; there is no distribution to draw.")
    smallest = max(size[size > 0].min(), size.max() * 1e-6)
    shown = size[size >= smallest]
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.add_subplot()
    bins = np.geomspace(smallest * 0.999, size.max() * 1.001, 61)
    axes.hist(shown, bins=list(bins), weights=np.full(shown.size, 100 / size.size), color=BLUE, linewidth=0)
    log_axis(axes)
    caption(figure, axes, title, "|delta| (logit difference)", "share of heads × prompts (%)")
    axes.margins(x=0)
    axes.grid(axis="y")
    if tau is not None:
        above = f"tau = {tau:g}: {(size > tau).mean():.0%} above"
        axes.axvline(tau, color=ORANGE, linewidth=1.2, linestyle="--", label=above)
    if shown.size < size.size:
        share = 1 - shown.size / size.size
        axes.plot(
            [], [], " ", label=f"not shown: {share:.1%} at or near 0" if share >= 0.0005 else "not shown: under 0.1%"
        )
    if tau is not None or shown.size < size.size:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def scatter_heads(
    a: Num[np.ndarray, "layer head"],
    b: Num[np.ndarray, "layer head"],
    *,
    name_a: str,
    name_b: str,
    quantity: str,
    correlation: Correlation,
    title: str,
    first_layer: int = 0,
) -> Figure:
    """One point per head, coloured by layer, with the correlations in words and the line y = x.

    Args:
        a: one number per head, of the first condition; pairs that are not finite are left out (the correlation says how many).
        b: of the second.
        name_a: the name of the first condition.
        name_b: of the second.
        quantity: what the numbers are, with its unit.
        correlation: of `correlate_heads(a, b)`.
        title: above the figure.
        first_layer: the number of the matrices' first row.

    Returns:
        The figure.

    Raises:
        ValueError: a or b is not [layer head], or their shapes differ.
    """
    a, b = _matrix(a), _matrix(b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, not {a.shape} and {b.shape}.")
    layers = np.broadcast_to(np.arange(len(a))[:, None], a.shape)
    kept = np.isfinite(a) & np.isfinite(b)
    figure = Figure(figsize=(5.0, 4.3))
    axes = figure.add_subplot()
    colours = _layer_colours(figure, axes, first_layer + np.arange(len(a)))
    axes.scatter(a[kept], b[kept], c=colours[layers[kept]], s=18, alpha=0.85, linewidths=0.3, edgecolors="white")
    limits = axes.get_xlim(), axes.get_ylim()
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":", zorder=0, label="y = x")
    axes.set(xlim=limits[0], ylim=limits[1])  # the line must not widen the view
    caption(figure, axes, title, f"{name_a}: {quantity}", f"{name_b}: {quantity}", pad=21)
    words = axes.text(0, 1.02, _in_words(correlation), transform=axes.transAxes, color=GREY)
    words.set_in_layout(False)  # else the axes shrink until the words end beside the colour bar
    axes.grid()
    axes.legend(loc="lower right")
    return figure


@styled
def layer_lines(
    layers: Sequence[int], correlations: Sequence[Correlation], *, title: str, alpha: float = 0.05
) -> Figure:
    """Pearson and Spearman per layer with their 95% intervals; a layer whose correlation is nan has no point.

    Filled points have q < alpha: the within-layer permutation p, corrected for the number of layers (`stats.q_values`).

    Args:
        layers: the layers' numbers.
        correlations: one a layer (`stats.correlate_layers`).
        title: above the figure.
        alpha: the q below which a point is filled.

    Returns:
        The figure.
    """
    numbers = np.asarray(layers, dtype=np.float64)
    figure = Figure(figsize=(min(max(4.8, 1.6 + 0.22 * len(layers)), 13.0), 3.5))
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=0.8)
    # The two stand side by side; on top of one another their intervals could not be read.
    for name, shift, colour, marker in (("pearson", -0.13, BLUE, "o"), ("spearman", 0.13, ORANGE, "s")):
        row = [getattr(correlation, name) for correlation in correlations]
        r, low, high = np.array([(c.r, c.low, c.high) for c in row]).T
        significant = q_values(np.array([c.p_within_layers for c in row])) < alpha
        look: dict[str, Any] = {"color": colour, "linewidth": 1.2}
        axes.plot(numbers + shift, r, alpha=0.45, **look)
        axes.vlines(numbers + shift, low, high, alpha=0.8, **look)
        for chosen, face in ((significant, colour), (~significant, "white")):
            x, y = numbers[chosen] + shift, r[chosen]
            axes.plot(x, y, marker, markersize=4.5, markerfacecolor=face, markeredgecolor=colour)
        axes.plot([], [], marker=marker, markersize=4.5, label=name.capitalize(), **look)
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": GREY}
    axes.plot([], [], "o", markersize=4.5, label=f"hollow: permutation q ≥ {alpha:g}", **hollow)
    caption(figure, axes, title, "layer", "correlation over heads (95% interval)")
    axes.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    whole_numbers(axes.xaxis, layers[0], len(layers))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled
def faithfulness_curves(
    curves: Mapping[str, tuple[Int[np.ndarray, " size"], Interval]],
    random: Mapping[str, tuple[int | Int[np.ndarray, " size"], Float[np.ndarray, "*size circuit"]]] | None = None,
    *,
    title: str = "Faithfulness by size",
    axis: str = "edges allowed",
) -> Figure:
    """Faithfulness of circuits by the number of edges they were allowed, with 95% intervals, and of random ones beside them.

    Args:
        curves: by name, up to four: sizes in ascending order and the faithfulness of each (`Curve.sizes` and
            `Curve.runs.interval()` of `pyvene_ext.circuits`).
        random: by name, up to two: a size, or several, and the faithfulness of random circuits of each, drawn as dashes.
        title: above the figure.
        axis: what the sizes count.

    Returns:
        The figure.

    Raises:
        ValueError: more curves or kinds of random circuits than there are colours for; or a curve's arrays do not fit together.
    """
    random, colours, of_random = random or {}, (BLUE, SKY, GREEN, PINK), (ORANGE, GREY)
    if not 1 <= len(curves) <= len(colours) or len(random) > len(of_random):
        raise ValueError(
            f"one figure takes 1 to {len(colours)} curves and up to {len(of_random)} kinds of random circuits, not "
            f"{len(curves)} and {len(random)}."
        )
    figure = Figure(figsize=(5.6, 3.6))
    axes = figure.add_subplot()
    axes.axhline(1, color=GREY, linewidth=0.8)
    for (name, (sizes, interval)), colour in zip(curves.items(), colours, strict=False):
        sizes, (mean, low, high) = np.asarray(sizes), (np.asarray(ends, dtype=np.float64) for ends in interval)
        if not sizes.shape == mean.shape == low.shape == high.shape or sizes.ndim != 1:
            raise ValueError(
                f"curve {name!r} needs a faithfulness with its interval for each of its sizes, not arrays of shapes "
                f"{sizes.shape}, {mean.shape}, {low.shape} and {high.shape}."
            )
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(sizes, mean, "o-", color=colour, markersize=4, label=name)
    for (name, (size, values)), colour in zip(random.items(), of_random, strict=False):
        values = np.atleast_2d(values)
        at = np.broadcast_to(np.reshape(size, (-1, 1)), values.shape)
        label = f"{values.shape[1]} random circuits: {name}"
        axes.plot(at.ravel(), values.ravel(), "_", color=colour, markersize=12, label=label)
    if all(sizes[0] > 0 for sizes, _ in curves.values()):
        log_axis(axes)
    caption(figure, axes, title, axis, "faithfulness (1: the whole model)")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _map_size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Width and height of a map of heads, in inches."""
    cell = min(0.42, 6.0 / max(n_layers, n_heads))
    return max(n_heads * cell, 2.4), max(n_layers * cell, 1.8)


def _draw_heads(
    axes: Axes, matrix: Float[np.ndarray, "layer head"], low: float, high: float, cmap: str, first_layer: int
) -> AxesImage:
    """One coloured cell per head; layer 0 on top."""
    n_layers, n_heads = matrix.shape
    # The background shows through where nothing is drawn.
    axes.set_facecolor("#dcdcdc")
    axes.patch.set_hatch("//////")
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        cmap=cmap,
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, n_heads - 0.5, first_layer + n_layers - 0.5, first_layer - 0.5),
    )
    whole_numbers(axes.xaxis, 0, n_heads)
    whole_numbers(axes.yaxis, first_layer, n_layers)
    axes.spines[:].set_visible(False)
    return image


def _matrix(values: Num[np.ndarray, "layer head"]) -> Float[np.ndarray, "layer head"]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a [layer head] matrix with at least one head is needed, not shape {values.shape}.")
    return values


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _layer_colours(figure: Figure, axes: Axes, layers: np.ndarray) -> np.ndarray:
    """One colour per layer, [layer rgba], and the colour bar that says which."""
    cmap: Colormap = matplotlib.colormaps[LAYERS].resampled(len(layers))
    norm = BoundaryNorm(np.arange(layers[0], layers[-1] + 2) - 0.5, cmap.N)
    bar = figure.colorbar(ScalarMappable(norm, cmap), ax=axes, label="layer", fraction=0.05, aspect=26, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    whole_numbers(bar.ax.yaxis, layers[0], len(layers))
    return cmap(np.arange(len(layers)))


def _in_words(correlation: Correlation) -> str:
    if math.isnan(correlation.pearson.r):
        return f"no correlation: {correlation.note}, n = {correlation.n}"
    words = [
        f"{name} {c.r:.2f} [{c.low:.2f}, {c.high:.2f}]"
        for name, c in (("Pearson", correlation.pearson), ("Spearman", correlation.spearman))
    ]
    return f"{', '.join(words)}, n = {correlation.n}"
