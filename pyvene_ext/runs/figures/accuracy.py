"""Figures of accuracy under interventions: by number of ablated or transplanted heads, and by forced attention pattern.

Rows are those of the studies' tables: "model", "accuracy" with "low" and "high" in percent, and what is named below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyvene_ext.runs.figures.style import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SKY, legend_below, styled

Rows = Sequence[Mapping[str, Any]]
OF_MODELS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
OF_CONDITIONS = {"zero": GREY, "transplant": BLUE, "without_maps": GREEN, "self": PINK}
LABELS = {
    "zero": "nothing in their place",
    "transplant": "the donor's heads",
    "self": "their own heads (control)",
    "without_maps": "the donor's heads without maps",
}


@styled
def ablation_curves(rows: Rows, title: str) -> Figure:
    """Accuracy by the number of ablated heads, one line per model, with the mean and range of its random sets.

    Args:
        rows: with "n_heads", 0 being the untouched run, "random_sets" and, where there are some, "random_drop", "random_lowest"
            and "random_highest".
        title: above the figure.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.6, 3.7))
    axes = figure.add_subplot()
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        some = [row for row in rows if row["model"] == model]
        colour = OF_MODELS[number % len(OF_MODELS)]
        n, accuracy, low, high = (
            np.array([row[key] for row in some]) for key in ("n_heads", "accuracy", "low", "high")
        )
        ends = (accuracy - low, high - accuracy)
        axes.errorbar(n, accuracy, ends, color=colour, marker="o", markersize=4, capsize=2, label=model)
        # Random sets that stop by themselves take different problems, so that there is no mean of their drops.
        clean, random = accuracy[0], [row for row in some if row["random_sets"] and np.isfinite(row["random_drop"])]
        if random:
            x = [0, *(row["n_heads"] for row in random)]
            mean, worst, best = (
                [clean, *(clean - row[key] for row in random)]
                for key in ("random_drop", "random_highest", "random_lowest")
            )
            axes.fill_between(x, worst, best, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, ":", color=colour, linewidth=1.4, label=f"{model}: random sets, mean and range")
    axes.set_title(title)
    axes.set(xlabel="heads ablated", ylabel="accuracy (%, 95% interval)", ylim=(-3, 103))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


@styled
def transplant_curves(rows: Rows) -> Figure:
    """Accuracy by the number of replaced heads, one line per condition, one panel per model; random sets as mean and range.

    Args:
        rows: with "donor", "n_heads", "condition", "clean_accuracy", "random_sets" and, where there are some, "random_accuracy",
            "random_lowest" and "random_highest".

    Returns:
        The figure.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.4 + 4.4 * len(models), 3.8))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        axes.axhline(mine[0]["clean_accuracy"], color="black", linewidth=0.8, linestyle="--", label="untouched")
        for condition in dict.fromkeys(row["condition"] for row in mine):
            some = [row for row in mine if row["condition"] == condition]
            x, y = (np.array([row[key] for row in some]) for key in ("n_heads", "accuracy"))
            ends = [y - [row["low"] for row in some], [row["high"] for row in some] - y]
            colour, mark = OF_CONDITIONS[condition], "D:" if condition == "self" else "o-"
            axes.errorbar(x, y, ends, fmt=mark, color=colour, markersize=4, capsize=2, label=LABELS[condition])
            if some[0]["random_sets"]:
                mean, least, most = (
                    [row[f"random_{key}"] for row in some] for key in ("accuracy", "lowest", "highest")
                )
                axes.fill_between(x, least, most, color=ORANGE, alpha=0.15, linewidth=0)
                label = "random heads of the donor, mean and range"
                axes.plot(x, mean, "s:", color=ORANGE, markersize=3, label=label)
        axes.set(title=f"{model} with heads of {mine[0]['donor']}", xlabel="heads replaced", ylim=(-3, 103))
        axes.set_xticks(list(dict.fromkeys(row["n_heads"] for row in mine)))
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy (%, 95% interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def pattern_bars(rows: Rows, shapes: Sequence[str]) -> Figure:
    """Accuracy by forced attention pattern, soft beside hard, one panel per model; the line is the untouched run.

    Args:
        rows: with "pattern": none, and each shape as SHAPE and SHAPE_hard.
        shapes: from left to right.

    Returns:
        The figure.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.6 + 0.85 * len(shapes) * len(models) + 1.2 * len(models), 3.3))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        mine = {row["pattern"]: row for row in rows if row["model"] == model}
        axes.axhline(mine["none"]["accuracy"], color=GREY, linewidth=1, linestyle="--", label="untouched")
        for hard, colour, shift in ((False, BLUE, -0.19), (True, ORANGE, 0.19)):
            some = [mine[f"{shape}_hard" if hard else shape] for shape in shapes]
            height = np.array([row["accuracy"] for row in some])
            error = [height - [row["low"] for row in some], [row["high"] for row in some] - height]
            x = np.arange(len(some)) + shift
            label = "mass moved into the block (hard)" if hard else "mass kept (soft)"
            axes.bar(x, height, 0.36, color=colour, label=label)
            axes.errorbar(x, height, np.abs(error), fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
        axes.set_xticks(range(len(shapes)), [shape.replace("_", "\n") for shape in shapes])
        axes.set(
            title=f"{model}: accuracy by forced pattern", xlabel="pattern of the reasoning's attention", ylim=(0, 103)
        )
        axes.grid(axis="y")
    panels[0].set_ylabel("problems correct (%, 95% interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
