"""Sizes of a model and labels of its heads: what most programs need of `modelcards`, under one import."""

from __future__ import annotations

from modelcards import COMPONENTS, FIELD_NAMES, n_heads, n_kv_heads, n_layers, n_positions

__all__ = ["has_heads", "head_label", "n_heads", "n_kv_heads", "n_layers", "n_positions"]


def has_heads(site: str) -> bool:
    """Whether a site is split by heads.

    Args:
        site: its name in specs ("z", "resid_pre" ...).

    Returns:
        True if its activations have an axis of heads (q, k, v, z, result, scores, pattern ...) or experts.
    """
    return COMPONENTS[FIELD_NAMES[site]].heads is not None


def head_label(head: tuple[int, int]) -> str:
    """Label a head as flags, tables and figures do: "2.5" is head 5 of layer 2.

    Args:
        head: layer and head.

    Returns:
        The label.
    """
    return f"{head[0]}.{head[1]}"
