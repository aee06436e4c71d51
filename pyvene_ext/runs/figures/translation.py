"""Figures of what causes a translation: ablated sets of heads beside random ones, and the logit lens in two languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pyvene_ext.runs.figures.style import BLUE, GREY, ORANGE, styled

# By the set's name: label, marker, colour, size, and where the points stand beside the kind of ablation.
MARKS = {
    "found": ("found", "D", ORANGE, 7, 0.0),
    "same layers": ("random, same layers", "o", GREY, 3.5, -0.25),
    "any layer": ("random, any layer", "^", GREY, 3.5, 0.25),
}


@styled
def ablated_sets(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], tasks: Mapping[str, str]) -> Figure:
    """The logit difference that sets of heads leave: one column per kind of ablation, one point per set, one panel per task.

    Args:
        rows: one a kind and set: "kind", "set" (a key of `MARKS`), and of every task COLUMN and COLUMN_clean.
        kinds: of ablations, in their order.
        tasks: the panels' titles by the rows' column.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(1.2 + 2.6 * len(tasks), 3.4))
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, (column, task) in zip(panels, tasks.items(), strict=True):
        for at, kind in enumerate(kinds):
            for name, (_, style, colour, size, shift) in MARKS.items():
                points = [row[column] for row in rows if row["kind"] == kind and row["set"] == name]
                spread = 0.1 * np.linspace(-1, 1, len(points)) * (len(points) > 1)
                axes.plot(at + shift + spread, points, style, color=colour, markersize=size, alpha=0.8)
        axes.axhline(rows[0][f"{column}_clean"], color=BLUE, linewidth=1.2, linestyle="--")
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(title=task, xlabel="ablation", xlim=(-0.5, len(kinds) - 0.5))
        axes.grid(axis="y")
    panels[0].set_ylabel("logit difference")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, 0), max(high, 0))
    panels[0].plot([], [], "--", color=BLUE, label="clean", markersize=5)
    for label, style, colour, *_ in MARKS.values():
        panels[0].plot([], [], style, color=colour, label=label, markersize=5)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def word_probabilities(probabilities: Mapping[str, Float[np.ndarray, " depth"]], title: str) -> Figure:
    """What the logit lens gives to a word in either language, by depth.

    Args:
        probabilities: means over prompts by what the language is, "target" and "source".
        title: above the figure.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(4.8, 3.2))
    axes = figure.add_subplot()
    for (name, values), colour in zip(probabilities.items(), (BLUE, ORANGE), strict=True):
        axes.plot(range(len(values)), values, "o-", color=colour, label=f"word in the {name} language", markersize=4)
    axes.set(title=title, xlabel="blocks passed", ylabel="mean probability", ylim=(0, 1.02))
    axes.grid()
    axes.legend()
    return figure
