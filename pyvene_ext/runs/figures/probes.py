"""Figures of linear probes: R^2 by depth, with its baselines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyvene_ext.runs.figures.style import BLUE, GREY, ORANGE, styled

LINES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("in_sample", {"color": BLUE, "linestyle": ":"}, "in-sample"),
    ("r2", {"color": BLUE, "marker": "o", "markersize": 3.5}, "cross-validated, 95% interval"),
    ("question", {"color": ORANGE, "marker": "s", "markersize": 3}, "mean of the question at this layer"),
    ("shuffled", {"color": GREY, "linestyle": "--"}, "labels shuffled: mean and range"),
)


@styled
def probe_curves(model: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """R^2 by depth with its baselines; a row of panels a target, a column a position.

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
