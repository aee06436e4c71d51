"""Figures of memory by lag: probability curves, one per number of ablated heads, and random heads as a band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyvene_ext.methods.heads.lag import LagCurves, lags_of
from pyvene_ext.runs.figures.style import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, legend_below, styled, titled
from pyvene_ext.stats.intervals import standard_error

ZOOM = 10  # lags on either side in the second panel of a figure
COLOURS = ("black", BLUE, SKY, GREEN, AMBER, ORANGE, PINK)


@styled
def lag_curves(
    found: Sequence[LagCurves],
    random: Float[np.ndarray, "set permutation lag"],
    title: str,
    untouched: Float[np.ndarray, "permutation lag"] | None = None,
) -> Figure:
    """One line per number of heads, with its standard error; the random sets' mean and range; of many lags the near ones again.

    Args:
        found: the curves with each number of heads ablated, smallest first.
        random: those of random sets as large as the last one; may be of no set.
        title: above the figure.
        untouched: the curve without any ablation; drawn unless `found` begins with no heads, which is the same.

    Returns:
        The figure.
    """
    curves = [(f"{at.n} ablated", at.own) for at in found if at.n]
    none = untouched if untouched is not None else next((at.own for at in found if not at.n), None)
    if none is not None:
        curves.insert(0, ("none ablated", none))
    colours = COLOURS[none is None :]  # black is the untouched model
    lags = lags_of(found[0].own.shape[1])
    few = len(lags) <= 4 * ZOOM
    panels = [(np.ones(len(lags), bool), "." if few else "")]
    if not few:
        panels.append((np.abs(lags) <= ZOOM, "."))
    figure = Figure(figsize=(2.8 + 2.8 * len(panels), 3.4))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=(1.6, 1)[: len(panels)])[0]
    for axes, (shown, marker) in zip(row, panels, strict=True):
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
        if len(random) and found[-1].n:
            band = random.mean(1)[:, shown]
            axes.fill_between(lags[shown], band.min(0), band.max(0), color="#bdbdbd", linewidth=0.6, alpha=0.8)
            label = f"{found[-1].n} random heads: mean and range ({len(random)} set{'s' * (len(random) > 1)})"
            grey: dict[str, Any] = {"color": GREY, "linewidth": 2.2, "linestyle": ":", "zorder": 3}
            axes.plot(lags[shown], band.mean(0), label=label, **grey)
        for number, (name, own) in enumerate(curves):
            colour = colours[number % len(colours)]
            mean, error = own.mean(0)[shown], standard_error(own)[shown]
            axes.plot(lags[shown], mean, color=colour, linewidth=1.2, marker=marker, label=name)
            axes.fill_between(lags[shown], mean - error, mean + error, color=colour, linewidth=0, alpha=0.25)
        axes.set_xlabel("lag")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        axes.margins(x=0.01)
    row[0].set_ylabel("probability (mean over permutations)")
    titled(row[0], title, figure.get_figwidth())
    legend_below(figure, *row[0].get_legend_handles_labels())
    return figure
