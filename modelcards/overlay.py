"""The overlay of a card: places that plain pyvene cannot reach; those that it can are in the family's dictionaries.

Most are taps: modules that `modelcards.attention_taps.Taps` puts into a model while an intervened run lasts. The others are
inputs whose tensor another module reads as well: plain pyvene edits in place, and so would edit both.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK, split_head_and_permute
from torch import Tensor

from modelcards.template import BY_HEAD, BY_KV_HEAD, MLP_INSIDE, Mapping, in_family

BY_EXPERT = (split_head_and_permute, "n_expert")

ROTATED = ("query_rotated", "key_rotated", "head_query_rotated", "head_key_rotated")
ATTENTION_INSIDE = (*ROTATED, "attention_scores", "attention_pattern")
_TAPS: Mapping = {
    "head_contribution": ("layers[%s].self_attn.tap_contribution", CONST_OUTPUT_HOOK, BY_HEAD),
    "query_rotated": ("layers[%s].self_attn.tap_query", CONST_OUTPUT_HOOK),
    "key_rotated": ("layers[%s].self_attn.tap_key", CONST_OUTPUT_HOOK),
    "head_query_rotated": ("layers[%s].self_attn.tap_query", CONST_OUTPUT_HOOK, BY_HEAD),
    "head_key_rotated": ("layers[%s].self_attn.tap_key", CONST_OUTPUT_HOOK, BY_KV_HEAD),
    "attention_scores": ("layers[%s].self_attn.tap_scores", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_pattern": ("layers[%s].self_attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD),
}

# Why a family lacks components that others have: ends of sentences that begin with the family.
PARALLEL = {"resid_mid": "has none, as its blocks run attention and MLP side by side"}
WRITTEN_OUT = dict.fromkeys(
    ATTENTION_INSIDE, "has none, as its attention does not go through transformers' AttentionInterface"
)
EXPERTS = dict.fromkeys(MLP_INSIDE, "has none, as its MLP is many experts; name router_logits or expert_contribution")


def overlay(
    *without: str, blocks: str = "layers", attention: str = "self_attn", fused: str = "", **more: tuple
) -> Mapping:
    """Build a family's overlay.

    Args:
        *without: taps of the rotary decoder that the family lacks.
        blocks: name of the list of blocks in the bare model.
        attention: name of the attention module in a block.
        fused: name of the projection in it that makes queries, keys and values, if one does.
        **more: further entries.

    Returns:
        The entries for the bare class, in pyvene's format.
    """
    entries = {component: entry for component, entry in _TAPS.items() if component not in without}
    if fused:
        for name, split in (("query", BY_HEAD), ("key", BY_KV_HEAD), ("value", BY_KV_HEAD)):
            tap = (f"layers[%s].self_attn.{fused}.tap_fused_{name}", CONST_OUTPUT_HOOK)
            entries |= {f"{name}_output": tap, f"head_{name}_output": (*tap, split)}
    entries = {component: (in_family(path, blocks, attention), *rest) for component, (path, *rest) in entries.items()}
    return {**entries, **more}


# -- how a fused projection lays out queries, keys and values ---------------------------------------------------------------


def side_by_side(x: Tensor, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """Take apart an output with all queries first, then all keys, then all values.

    Args:
        x: `batch pos d_out`, what the projection returns.
        sizes: the model's dimensions.

    Returns:
        Queries, keys and values as views `batch pos head d_head`.
    """
    counts = [sizes[name] for name in ("n_head", "n_kv_head", "n_kv_head")]
    return x.unflatten(-1, (sum(counts), -1)).split(counts, 2)


def head_by_head(x: Tensor, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """Take apart an output with each head's query, key and value together.

    Args:
        x: `batch pos d_out`, what the projection returns.
        sizes: the model's dimensions.

    Returns:
        Queries, keys and values as views `batch pos head d_head`.
    """
    return x.unflatten(-1, (sizes["n_head"], 3, -1)).unbind(3)
