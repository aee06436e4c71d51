"""Sizes of a model: what most programs need of `modelcards`, under one import."""

from __future__ import annotations

from modelcards import COMPONENTS, FIELD_NAMES, n_heads, n_kv_heads, n_layers, n_positions

__all__ = ["has_heads", "n_heads", "n_kv_heads", "n_layers", "n_positions"]


def has_heads(site: str) -> bool:
    """Whether a site is split by heads.

    Args:
        site: its name in specs ("z", "resid_pre" ...).

    Returns:
        True if its activations have an axis of heads (q, k, v, z, result, scores, pattern ...) or experts.
    """
    return COMPONENTS[FIELD_NAMES[site]].heads is not None
