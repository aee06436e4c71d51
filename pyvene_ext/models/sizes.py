"""Sizes of a model: what most programs need of `modelcards`, under one import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelcards import component_named, n_heads, n_kv_heads, n_layers, n_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["has_heads", "heads_of", "n_heads", "n_kv_heads", "n_layers", "n_positions", "site_named"]


def has_heads(site: str) -> bool:
    """Whether a site is split by heads.

    Args:
        site: its name in specs ("z", "resid_pre" ...), or pyvene's.

    Returns:
        True if its activations have an axis of heads (q, k, v, z, result, scores, pattern ...) or experts.

    Raises:
        ValueError: there is no such site.
    """
    return component_named(site).heads is not None


def site_named(name: str) -> str:
    """What specs call a site.

    Args:
        name: the site, or pyvene's name of the component.

    Returns:
        Such as "z" for "head_attention_value_output".

    Raises:
        ValueError: there is no such site; suggests one.
    """
    return component_named(name).site


def heads_of(
    named: Sequence[str], name: str, model: PreTrainedModel, flag: str = "heads"
) -> tuple[tuple[int, int], ...]:
    """The heads that a flag names.

    Args:
        named: heads as layer.head.
        name: the model's, for the error.
        model: which must have the heads.
        flag: for the error too.

    Returns:
        (layer, head) of each.

    Raises:
        ValueError: the model has no such head.
    """
    layers, heads = n_layers(model.config), n_heads(model.config)
    chosen = tuple((int(layer), int(head)) for layer, head in (one.split(".") for one in named))
    for layer, head in chosen:
        if layer >= layers or head >= heads:
            raise ValueError(
                f"--{flag} {layer}.{head}: {name} has layers 0 to {layers - 1}, each with heads 0 to {heads - 1}."
            )
    return chosen
