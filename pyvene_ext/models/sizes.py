"""How large a model is: modelcards' answers for programs that read nothing else of them."""

from __future__ import annotations

from modelcards import COMPONENTS, FIELD_NAMES, n_heads, n_kv_heads, n_layers, n_positions

__all__ = ["has_heads", "n_heads", "n_kv_heads", "n_layers", "n_positions"]


def has_heads(site: str) -> bool:
    """Whether a site ("z", "resid_pre" ...) is divided into heads."""
    return COMPONENTS[FIELD_NAMES[site]].heads is not None
