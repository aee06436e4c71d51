"""Figures of activation patching: the mean score of every patch, a figure a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pyvene_ext.models.sizes import has_heads
from pyvene_ext.runs.figures.heads import head_heatmap
from pyvene_ext.runs.figures.layers import layer_map


def site_maps(
    maps: Mapping[str, Float[np.ndarray, "position layer head"]],
    positions: Sequence[str],
    *,
    title: str,
    of: str,
    label: str,
) -> dict[str, Figure]:
    """By file name: layer x head for every site of heads and position; layer x position for the others.

    At one position the others are one figure, layer x site, named "layers".

    Args:
        maps: mean scores by site; sites without heads have one.
        positions: where the sites were patched.
        title: of every figure; site and position follow it.
        of: what was patched, at the titles' end.
        label: what the colour means, with its unit.

    Returns:
        The figure of each site.
    """
    found: dict[str, Figure] = {}
    others = {site: values[..., 0] for site, values in maps.items() if not has_heads(site)}
    for site, values in maps.items():
        if site not in others:
            for position, matrix in zip(positions, values, strict=True):
                file = site if len(positions) == 1 else f"{site}_{position}"
                found[file] = head_heatmap(matrix, f"{title}, {site}@{position}: {of}", label, diverging=True)
    if others and len(positions) == 1:
        together = np.concatenate(list(others.values())).T
        where = f"{title}, positions: {positions[0]}: {of}"
        found["layers"] = layer_map(together, list(others), where, label, "site")
    else:
        for site, matrix in others.items():
            found[site] = layer_map(matrix.T, positions, f"{title}, {site}: {of}", label, "position")
    return found
