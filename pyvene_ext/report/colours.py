"""What colours mean on a page: red helps the answer, blue works against it, in ablation, patching and paths alike.

The sign alone does not say which it is: the delta of an ablation is positive for a head that helps, the effect of a patched path
negative. A study names the columns that are negative where they help in its summary ("helps_if_negative"); in every other column
with both signs positive is red. Numbers of one sign, such as scores and frequencies, have a scale without red and blue.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyvene_ext.report.attention import escaped
from pyvene_ext.runs.figures import DIVERGING, GREY, SEQUENTIAL

HELPS, AGAINST = "rgb(178,24,43)", "rgb(33,102,172)"  # of bars and lines: the scale's red and blue
ROBUST = 0.98  # of the sizes lie within a robust scale
MEANING = (
    "Effects are red where a head or path helps the answer and blue where it works against it, whatever the sign of the number. "
    "In other numbers of both signs red is positive."
)


def colours(values: Any, name: str, *, negative: bool = False, limit: float | None = None) -> dict[str, Any]:
    """Choose colours for numbers: white at 0 if there are both signs or `negative`, else from dark to light.

    Args:
        values: the numbers, NaN where there is none.
        name: what they are, for the colour bar.
        negative: whether a negative number helps.
        limit: where the scale ends on either side, for numbers of both signs; default the largest.

    Returns:
        Fields of a plotly heatmap.
    """
    from plotly.colors import get_colorscale

    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    most = max(-low, high)
    if limit is None and not negative and not low < 0 < high:
        look = {"colorscale": get_colorscale(SEQUENTIAL), "zmin": low, "zmax": high}
        return look | {"colorbar": bar(name)}
    ends = limit or most or 1.0
    scale = get_colorscale(DIVERGING.removesuffix("_r") if negative else DIVERGING)
    return {"colorscale": scale, "zmin": -ends, "zmax": ends, "colorbar": bar(name) | clipped(ends, most)}


def colour(value: float, signed: bool, negative: bool) -> str:
    """The colour of one number's bar or line; grey where its sign says nothing about helping."""
    if not signed:
        return GREY
    return AGAINST if (value < 0) != negative else HELPS


def robust_limit(values: Any, share: float = ROBUST) -> float:
    """The size that a share of all sizes does not exceed, so that one outlier does not make all others pale."""
    sizes = np.abs(np.asarray(values, float))
    sizes = sizes[np.isfinite(sizes)]
    limit = float(np.quantile(sizes, share)) if sizes.size else 0.0
    return limit or float(sizes.max(initial=0.0)) or 1.0


def clipped(ends: float, most: float) -> dict[str, Any]:
    """Ticks of a scale that ends before the largest number: they say so, and how large that is."""
    if most <= ends:
        return {}
    half = ends / 2
    words = [f"≤ −{ends:.2g}", f"−{half:.2g}", "0", f"{half:.2g}", f"≥ {ends:.2g}<br>(up to {most:.2g})"]
    return {"tickvals": [-ends, -half, 0, half, ends], "ticktext": words}


def bar(name: str) -> dict[str, Any]:
    """A colour bar with its title beside it."""
    return {"title": {"text": escaped(name), "side": "right"}, "thickness": 14, "outlinewidth": 0}
