"""Figures of drops in accuracy: by the token of the reasoning that is changed, and by the difficulty of the problems.

Rows are those of the studies' tables: "model", "drop" in points, and what is named below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pyvene_ext.runs.figures.style import AMBER, BLUE, GREEN, GREY, ORANGE, PINK, SEQUENTIAL, SKY, over_all, styled

Rows = Sequence[Mapping[str, Any]]
OF_SITES = (GREY, ORANGE, BLUE, GREEN, PINK, SKY, AMBER)
FEW = "#dcdcdc"  # strata with too few problems for an interval


@styled
def drops_by_token(rows: Rows) -> Figure:
    """Drop by the token of the block that gets noise, one line per site, one panel per model.

    Args:
        rows: with "site", "position", "low" and "high".

    Returns:
        The figure.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.2 + 4.6 * len(models), 3.4))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8)
        for number, site in enumerate(dict.fromkeys(row["site"] for row in rows if row["model"] == model)):
            mine = [row for row in rows if row["model"] == model and row["site"] == site]
            x, colour = [row["position"] for row in mine], OF_SITES[number % len(OF_SITES)]
            axes.fill_between(x, [row["low"] for row in mine], [row["high"] for row in mine], color=colour, alpha=0.15)
            axes.plot(x, [row["drop"] for row in mine], "o-", color=colour, markersize=3.5, label=site)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{model}: noise at one token of the block", xlabel="token of the block")
        axes.grid(axis="y")
        axes.legend()
    panels[0].set_ylabel("drop in accuracy (points, 95% interval)")
    return figure


@styled
def drops_by_hub(rows: Rows) -> Figure:
    """Drop by the token of the block that is the hub, soft and hard patterns, one panel per model.

    Args:
        rows: with "position", "hard", "drop_low" and "drop_high".

    Returns:
        The figure.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.2 + 4.4 * len(models), 3.3))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8)
        for hard, colour in ((False, BLUE), (True, ORANGE)):
            some = [row for row in rows if row["model"] == model and row["hard"] == hard]
            x, label = [row["position"] for row in some], "hard" if hard else "soft"
            ends = ([row[end] for row in some] for end in ("drop_low", "drop_high"))
            axes.fill_between(x, *ends, color=colour, alpha=0.15)
            axes.plot(x, [row["drop"] for row in some], "o-", color=colour, markersize=3.5, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{model}: hub swept over the block", xlabel="hub (token of the block)")
        axes.grid(axis="y")
    panels[0].set_ylabel("drop in accuracy (points, 95% interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@styled
def drops_by_stratum(title: str, rows: Rows) -> Figure:
    """Drop by confidence and by steps of the solution, with its interval and the drop of random heads.

    Args:
        title: above the figure.
        rows: of one model, with "split", "stratum", "problems", "clean_accuracy", "drop_low" and "drop_high" (NaN where there are
            too few problems), and "random_drop" (NaN without random heads).

    Returns:
        The figure.
    """
    sides = [[row for row in rows if row["split"] == split] for split in ("confidence", "steps")]
    widths = [max(len(side), 2) for side in sides]
    figure = Figure(figsize=(2.6 + 0.75 * sum(widths), 3.6))
    over_all(figure, title)
    panels = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    for axes, side, xlabel in zip(
        panels, sides, ("confidence, from low to high", "steps of the solution"), strict=True
    ):
        x, drop = np.arange(len(side)), np.array([row["drop"] for row in side])
        few = [math.isnan(row["drop_low"]) for row in side]
        axes.bar(x, drop, 0.62, color=[FEW if too_few else BLUE for too_few in few])
        errors = [np.abs(drop - [row[end] for row in side]) for end in ("drop_low", "drop_high")]
        axes.errorbar(x, drop, errors, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
        axes.plot(x, [row["random_drop"] for row in side], "D", color=ORANGE, markersize=5)
        axes.axhline(0, color=GREY, linewidth=0.8)
        labels = [f"{row['stratum']}\nn = {row['problems']}\nfrom {row['clean_accuracy']:.0f}%" for row in side]
        axes.set_xticks(x, labels)
        axes.set(xlabel=xlabel, xlim=(-0.6, max(len(side), 2) - 0.4))
        axes.grid(axis="y")
    panels[0].set_ylabel("drop in accuracy (points, 95% interval)")
    few_of = [math.isnan(row["drop_low"]) for side in sides for row in side]
    handles: list[Any] = [] if all(few_of) else [Patch(color=BLUE, label="intervention")]
    if any(few_of):
        handles.append(Patch(color=FEW, label="few problems"))
    if not all(math.isnan(row["random_drop"]) for row in rows):
        handles.append(Line2D([], [], color=ORANGE, marker="D", ls="", label="random heads of the same layers"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def crossed_strata(title: str, rows: Rows) -> Figure:
    """Drop by confidence and steps together, in colour and in numbers.

    Args:
        title: above the figure.
        rows: as for `drops_by_stratum`, with the split "both", whose strata are "PART, STEPS", and "verdict" ("" where there are
            too few problems).

    Returns:
        The figure.
    """
    cells = {row["stratum"]: row for row in rows if row["split"] == "both"}
    parts, steps = ([row["stratum"] for row in rows if row["split"] == split] for split in ("confidence", "steps"))
    shown = np.full((len(parts), len(steps)), np.nan)
    for i, j in np.ndindex(shown.shape):
        row = cells.get(f"{parts[i]}, {steps[j]}")
        if row is not None and row["verdict"]:
            shown[i, j] = row["drop"]
    figure = Figure(figsize=(2.6 + 1.0 * max(len(steps), 2), 1.7 + 0.62 * max(len(parts), 2)))
    over_all(figure, title)
    axes = figure.add_subplot()
    axes.set_facecolor("#ececec")
    image = axes.imshow(np.ma.masked_invalid(shown), cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto")
    for i, j in np.ndindex(shown.shape):
        row = cells.get(f"{parts[i]}, {steps[j]}")
        if row is None:
            words, colour = "none", GREY
        elif not row["verdict"]:
            words, colour = f"n = {row['problems']}", GREY
        else:
            words = f"{row['drop']:.0f} [{row['drop_low']:.1f}, {row['drop_high']:.1f}]\nn = {row['problems']}"
            colour = "black" if row["drop"] > 60 else "white"
        axes.text(j, i, words, ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(len(steps)), steps)
    axes.set_yticks(range(len(parts)), parts)
    axes.set(xlabel="steps of the solution", ylabel="confidence, from low to high")
    figure.colorbar(image, ax=axes, label="drop (points)")
    return figure
