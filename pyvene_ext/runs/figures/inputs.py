"""Figures of what tokens contribute to a head's attention or output: shares by tag, and the tokens themselves, coloured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pyvene_ext.runs.figures.style import BLUE, DIVERGING, GREY, LIGHT, ORANGE, drawable, styled

if TYPE_CHECKING:
    from pyvene_ext.methods.attribution.by_tag import AttributedHead

WIDTH = 100  # characters a line


@styled
def tag_shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of |attribution| by tag, one panel per head: beside random heads, and against the share of tokens.

    Args:
        rows: one a head and tag, with "model", "head", "tag", "token_share", and "share" and "random_share" with "_low" and
            "_high"; all from 0 to 1.

    Returns:
        The figure.
    """
    panels = list(dict.fromkeys((row["model"], row["head"]) for row in rows))
    columns = min(4, len(panels))
    figure = Figure(figsize=(max(1 + 2.9 * columns, 5.5), 0.6 + 2.7 * math.ceil(len(panels) / columns)))
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (model, head) in zip(grid.flat, panels, strict=False):
        mine = [row for row in rows if (row["model"], row["head"]) == (model, head)]
        x = np.arange(len(mine))
        for name, label, colour, shift in (
            ("share", "the head", BLUE, -0.2),
            ("random_share", "random heads of its layer", LIGHT, 0.2),
        ):
            height, low, high = (np.array([100 * row[name + end] for row in mine]) for end in ("", "_low", "_high"))
            ends = (height - low, high - height)
            axes.bar(x + shift, height, 0.38, color=colour, label=label)
            axes.errorbar(x + shift, height, ends, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
        tokens = [100 * row["token_share"] for row in mine]
        axes.hlines(tokens, x - 0.42, x + 0.42, color=ORANGE, linewidth=2, label="share of the tokens")
        axes.set_xticks(x, [row["tag"] for row in mine])
        axes.set(title=f"{model}, {head}", xlabel="kind of token")
        axes.grid(axis="y")
    for row in grid:
        row[0].set_ylabel("share of |attribution| (%, 95%)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


class TokenText(NamedTuple):
    """One text of a figure of tokens.

    Attributes:
        heading: above it.
        tokens: as text.
        values: one number per token; colours are shares of the largest.
        boxed: the token with a box, if any.
        underlined: the tokens with a line.
    """

    heading: str
    tokens: Sequence[str]
    values: Float[np.ndarray, " token"]
    boxed: int | None
    underlined: Sequence[int]


def token_texts(found: AttributedHead, shown: int) -> list[TokenText]:
    """The first complete problems of a head, or the first ones if none is complete, for `coloured_tokens`.

    Args:
        found: its attributions.
        shown: how many problems.

    Returns:
        The problems.
    """
    every, own = range(len(found.problems)), found.own
    texts = []
    for problem in list(np.flatnonzero(own.complete)[:shown]) or list(every[:shown]):
        value, base, error = (float(x[problem]) for x in (own.value, own.at_baseline, own.error))
        heading = f"problem {found.problems[problem]}: {value:.3f}, {base:.3f} with baselines; "
        heading += f"completeness error {100 * error:.1f}%"
        hub = None if found.target.hubs is None else found.target.hubs[problem]
        texts.append(TokenText(heading, found.texts[problem], own.tokens[problem], hub, found.target.queries[problem]))
    return texts


@styled
def coloured_tokens(texts: Sequence[TokenText], title: str) -> Figure:
    """Texts whose tokens are coloured by numbers."""
    cells: list[tuple[int, int, float, int, str]] = []  # text, token, line, column, characters
    headings, line = [], 0.0
    for which, one in enumerate(texts):
        headings.append(line)
        line, column = line + 1.3, 0
        for token, text in enumerate(one.tokens):
            text = text.replace("\n", "↵")
            text = text if drawable(text) else "·" * len(text)
            if column and column + len(text) > WIDTH:
                line, column = line + 1.3, 0
            cells.append((which, token, line, column, text))
            column += len(text)
        line += 2
    figure = Figure(figsize=(0.072 * WIDTH + 0.4, 0.17 * line + 1.1), layout="none")  # type: ignore[arg-type]
    height = figure.get_size_inches()[1]
    axes = figure.add_axes((0.02, 0.6 / height, 0.96, 1 - 1.1 / height))
    axes.set(xlim=(0, WIDTH), ylim=(line, -0.3))
    axes.set_axis_off()
    colours = ScalarMappable(Normalize(-1, 1), DIVERGING)
    for start, one in zip(headings, texts, strict=True):
        axes.text(0, start + 0.5, one.heading, va="center", fontsize=8, color=GREY)
    for which, token, at, column, text in cells:
        one = texts[which]
        scaled = float(one.values[token] / (np.abs(one.values).max() or 1))
        box = Rectangle((column, at), len(text), 1.05, facecolor=colours.to_rgba(np.array([scaled]))[0], linewidth=0)
        axes.add_patch(box)
        if token == one.boxed:
            box.set(edgecolor="black", linewidth=1.3, zorder=3, clip_on=False)
        if token in one.underlined:
            axes.hlines(at + 1.15, column + 0.1, column + len(text) - 0.1, color=GREY, linewidth=0.8)
        dark = "white" if abs(scaled) > 0.7 else "black"
        for shift, character in enumerate(text):  # one by one, so that none drifts out of its cell
            x, y = column + shift + 0.5, at + 0.55
            axes.text(x, y, character, ha="center", va="center", fontsize=7.5, color=dark, zorder=4)
    figure.text(0.02, 1 - 0.25 / height, title, fontsize=10)
    below = figure.add_axes((0.3, 0.42 / height, 0.4, 0.1 / height))
    bar = figure.colorbar(colours, cax=below, orientation="horizontal")
    bar.set_label("attribution, as a share of the problem's largest", fontsize=8)
    bar.outline.set_visible(False)
    return figure
