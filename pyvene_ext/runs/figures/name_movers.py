"""Figures of name movers: attention to names against what is written towards them, copying, and where heads look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pyvene_ext.methods.heads.name_movers import Names
from pyvene_ext.methods.heads.name_roles import NameMeasures
from pyvene_ext.runs.figures.heads import head_heatmap
from pyvene_ext.runs.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, SEQUENTIAL, name_points, over_all, styled
from pyvene_ext.stats.controls import Head, head_label
from pyvene_ext.stats.correlations import Correlation

COLOURS = (BLUE, ORANGE, GREEN, PINK)
LABELLED = 4  # heads that the figure of copying and effects names


def figures_of_name_movers(
    found: NameMeasures,
    names: Names,
    heads: Sequence[Mapping[str, Any]],
    pooled: Mapping[Head, Correlation],
    places: Sequence[str],
    *,
    of: str,
    fold_norm: bool = False,
) -> dict[str, Figure]:
    """All figures by file name: of each head shown its points; of all heads copying and effects; where those shown look.

    Args:
        found: the measures.
        names: of the prompts.
        heads: one row per head, the largest attribution first, with "layer", "head", "copy", "copy_negative", "attribution".
        pooled: the heads that are shown, with the correlation of their points.
        places: the groups of tokens that heads look at.
        of: what was measured, for titles.
        fold_norm: whether the projection has the final norm in it.

    Returns:
        The figures by their file names.
    """
    figures: dict[str, Figure] = {}
    kinds = list(names.whole)
    for head, correlation in pooled.items():
        points = found.attention[kinds, *head], found.projection[kinds, *head]
        title = f"Head {head_label(head)}: {of}"
        figures[f"scatter_{head_label(head)}"] = attention_against_projection(
            *points, [names.kinds[kind] for kind in kinds], correlation, title=title, fold_norm=fold_norm
        )
    looks = np.stack([found.looks[:, :, *head].mean(-1) for head in pooled], -1)
    figures["copies_and_effects"] = copies_and_effects(heads, of)
    figures["looks"] = where_heads_look(looks, places, list(pooled), of)
    for measure, label in (("copy", "copy score"), ("copy_negative", "negative copy score")):
        matrix = np.zeros(found.attribution.shape[:2])
        for row in heads:
            matrix[row["layer"], row["head"]] = row[measure]
        figures[measure] = head_heatmap(matrix, f"{label.capitalize()}: {of}", label, limits=(0.0, 1.0))
    return figures


@styled
def attention_against_projection(
    attention: Float[np.ndarray, "kind prompt"],
    projection: Float[np.ndarray, "kind prompt"],
    kinds: Sequence[str],
    pooled: Correlation,
    *,
    title: str,
    fold_norm: bool = False,
) -> Figure:
    """A head's attention to each name against what it writes in its direction; one point per prompt and name.

    Args:
        attention: from END to the name.
        projection: on the name's unembedding.
        kinds: what the names are.
        pooled: the correlation of all points.
        title: above the figure; the correlation is its second line.
        fold_norm: whether the projection has the final norm in it, for the label.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(4.8, 3.9))
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=0.8)
    for number, (kind, x, y) in enumerate(zip(kinds, attention, projection, strict=True)):
        axes.scatter(x, y, s=14, alpha=0.7, color=COLOURS[number % len(COLOURS)], linewidths=0, label=kind)
    r = pooled.pearson
    words = f"r = {r.r:.2f} [{r.low:.2f}, {r.high:.2f}]" if np.isfinite(r.r) else f"no correlation: {pooled.note}"
    axes.set(
        title=f"{title}\n{words}, n = {pooled.n}",
        xlabel="attention from END to the name (sum over its occurrences)",
        ylabel="contribution at END . W_U[name]" + (", final norm folded in" if fold_norm else ""),
    )
    axes.grid()
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@styled
def copies_and_effects(heads: Sequence[Mapping[str, Any]], of: str) -> Figure:
    """Every head's copy scores against its attribution: a head that copies need not have an effect, nor the reverse.

    Args:
        heads: one row per head, the first of which are named: "layer", "head", "copy_own", "copy_own_negative" and "attribution".
        of: what was measured, for the title.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(7.2, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, label in ((left, "copy_own", "copy score"), (right, "copy_own_negative", "negative copy score")):
        x, y = ([row[column] for row in heads] for column in (measure, "attribution"))
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.scatter(x, y, s=16, alpha=0.75, color=BLUE, linewidths=0)
        axes.set(xlabel=label, xlim=(-0.04, 1.08))
        axes.grid()
    left.set_ylabel("attribution to logit(IO) - logit(S)")
    over_all(figure, f"Copying and direct effect: {of}", x=0.01, ha="left")
    for axes, measure in ((left, "copy_own"), (right, "copy_own_negative")):
        here = [row for row in heads[:LABELLED] if row[measure] == max(row["copy_own"], row["copy_own_negative"])]
        name_points(axes, {head_label((row["layer"], row["head"])): (row[measure], row["attribution"]) for row in here})
    return figure


@styled
def where_heads_look(
    looks: Float[np.ndarray, "query place head"], places: Sequence[str], heads: Sequence[Head], of: str
) -> Figure:
    """Mean attention of some heads from END and from END-1 to each group of tokens.

    Args:
        looks: means over prompts.
        places: the groups' names.
        heads: the heads' names.
        of: what was measured, for the title.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(1.6 + 0.78 * len(places), 1.3 + 0.26 * len(heads)))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, query, mean in zip(panels, ("END", "END-1"), looks, strict=True):
        image = axes.imshow(mean.T, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(places)), places, rotation=45, ha="right")
        axes.set_yticks(range(len(heads)), [head_label(head) for head in heads])
        axes.set(title=f"from {query}", xlabel="looked at")
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("head")
    over_all(figure, f"Where heads look: {of}", x=0.01, ha="left")
    figure.colorbar(image, ax=panels, label="mean attention", fraction=0.05, pad=0.02).outline.set_visible(False)
    return figure
