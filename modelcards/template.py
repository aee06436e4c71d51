"""The decoder that the rotary families share, as a pyvene module mapping; a card says what differs.

An entry is (path of the module, hook, split functions ...) in pyvene's format; `%s` is the layer. Paths ending in `tap_...` are
places that `modelcards.attention_taps` makes visible during a run.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK, split_head_and_permute
from torch import Tensor

Mapping = dict[str, tuple]


# -- parts of what a module puts out, as views ---------------------------------------------------------------------------


def first_of_two(x: Tensor, _: int) -> Tensor:
    """The first half of the last axis."""
    return x.chunk(2, -1)[0]


def second_of_two(x: Tensor, _: int) -> Tensor:
    """The second half of the last axis."""
    return x.chunk(2, -1)[1]


# -- queries, keys and values that one projection makes: views `batch pos head d_head` of what it puts out ------------------


def side_by_side(x: Tensor, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """All queries, all keys, all values."""
    counts = [sizes[name] for name in ("n_head", "n_kv_head", "n_kv_head")]
    return x.unflatten(-1, (sum(counts), -1)).split(counts, 2)


def head_by_head(x: Tensor, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """Each head's query, key and value."""
    return x.unflatten(-1, (sizes["n_head"], 3, -1)).unbind(3)


BY_HEAD = (split_head_and_permute, "n_head")
BY_KV_HEAD = (split_head_and_permute, "n_kv_head")
BY_EXPERT = (split_head_and_permute, "n_expert")

# -- where components live -----------------------------------------------------------------------------------------------

rotary_decoder_type_to_module_mapping: Mapping = {
    "embeddings": ("embed_tokens", CONST_OUTPUT_HOOK),
    "block_input": ("layers[%s]", CONST_INPUT_HOOK),
    "resid_mid": ("layers[%s].post_attention_layernorm", CONST_INPUT_HOOK),
    "block_output": ("layers[%s]", CONST_OUTPUT_HOOK),
    "attention_contribution": ("layers[%s].self_attn", CONST_OUTPUT_HOOK),
    "mlp_contribution": ("layers[%s].mlp", CONST_OUTPUT_HOOK),
    "head_contribution": ("layers[%s].self_attn.tap_contribution", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_input": ("layers[%s].self_attn", CONST_INPUT_HOOK),
    "query_output": ("layers[%s].self_attn.q_proj", CONST_OUTPUT_HOOK),
    "key_output": ("layers[%s].self_attn.k_proj", CONST_OUTPUT_HOOK),
    "value_output": ("layers[%s].self_attn.v_proj", CONST_OUTPUT_HOOK),
    "head_query_output": ("layers[%s].self_attn.q_proj", CONST_OUTPUT_HOOK, BY_HEAD),
    "head_key_output": ("layers[%s].self_attn.k_proj", CONST_OUTPUT_HOOK, BY_KV_HEAD),
    "head_value_output": ("layers[%s].self_attn.v_proj", CONST_OUTPUT_HOOK, BY_KV_HEAD),
    "query_rotated": ("layers[%s].self_attn.tap_query", CONST_OUTPUT_HOOK),
    "key_rotated": ("layers[%s].self_attn.tap_key", CONST_OUTPUT_HOOK),
    "head_query_rotated": ("layers[%s].self_attn.tap_query", CONST_OUTPUT_HOOK, BY_HEAD),
    "head_key_rotated": ("layers[%s].self_attn.tap_key", CONST_OUTPUT_HOOK, BY_KV_HEAD),
    "attention_scores": ("layers[%s].self_attn.tap_scores", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_pattern": ("layers[%s].self_attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_value_output": ("layers[%s].self_attn.o_proj", CONST_INPUT_HOOK),
    "head_attention_value_output": ("layers[%s].self_attn.o_proj", CONST_INPUT_HOOK, BY_HEAD),
    "attention_output": ("layers[%s].self_attn", CONST_OUTPUT_HOOK),
    "mlp_input": ("layers[%s].mlp", CONST_INPUT_HOOK),
    "mlp_gate": ("layers[%s].mlp.gate_proj", CONST_OUTPUT_HOOK),
    "mlp_up": ("layers[%s].mlp.up_proj", CONST_OUTPUT_HOOK),
    "mlp_activation": ("layers[%s].mlp.act_fn", CONST_OUTPUT_HOOK),
    "mlp_neurons": ("layers[%s].mlp.down_proj", CONST_INPUT_HOOK),
    "mlp_output": ("layers[%s].mlp", CONST_OUTPUT_HOOK),
    "final_norm": ("norm", CONST_OUTPUT_HOOK),
}

# Widths of the components that pyvene 0.1.8 can spell (it needs them for trainable interventions), and only where the width is
# the whole vector: it cannot say "heads x head_dim", and a component without an entry is taken whole instead of being cut.
# `pyvene_ext.IntervenableModel` takes every width from `components.py` and does not look here.
_RESIDUAL = ("embeddings", "block_input", "resid_mid", "block_output", "attention_contribution", "mlp_contribution")
AS_WIDE_AS_MODEL = (
    *_RESIDUAL,
    "head_contribution",
    "attention_input",
    "attention_output",
    "mlp_input",
    "mlp_output",
    "final_norm",
)
AS_WIDE_AS_MLP = ("mlp_gate", "mlp_up", "mlp_activation", "mlp_neurons")
AS_WIDE_AS_HEAD = (
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "head_query_rotated",
    "head_key_rotated",
    "head_attention_value_output",
)

ATTENTION_INSIDE = (
    "query_rotated",
    "key_rotated",
    "head_query_rotated",
    "head_key_rotated",
    "attention_scores",
    "attention_pattern",
)
QKV = ("query_output", "key_output", "value_output")
MLP_INSIDE = ("mlp_gate", "mlp_up", "mlp_activation", "mlp_neurons")

# Why a family lacks components that others have: ends of sentences that begin with the family.
PARALLEL = {"resid_mid": "has none, as its blocks run attention and MLP side by side"}
WRITTEN_OUT = dict.fromkeys(ATTENTION_INSIDE, "has none, as transformers does not let its attention be looked into")
EXPERTS = dict.fromkeys(MLP_INSIDE, "has none, as its MLP is many experts; name router_logits or expert_contribution")


def decoder(
    *without: str, blocks: str = "layers", attention: str = "self_attn", fused: str = "", **differs: tuple
) -> Mapping:
    """The rotary decoder's module mapping but for some components, with others elsewhere.

    Args:
        blocks, attention: what the decoder calls its blocks, and a block its attention.
        fused: path of the projection that makes queries, keys and values, if one does; the card says how they lie in it.
        **differs: entries that replace the template's or are new.
    """

    def own(path: str) -> str:
        return path.replace("layers[", f"{blocks}[").replace(".self_attn", f".{attention}")

    mapping = {
        name: (own(path), *rest)
        for name, (path, *rest) in rotary_decoder_type_to_module_mapping.items()
        if name not in without
    }
    for name, split in (("query", BY_HEAD), ("key", BY_KV_HEAD), ("value", BY_KV_HEAD)):
        if fused:
            mapping[f"{name}_output"] = (f"{fused}.tap_fused_{name}", CONST_OUTPUT_HOOK)
            mapping[f"head_{name}_output"] = (f"{fused}.tap_fused_{name}", CONST_OUTPUT_HOOK, split)
    return {**mapping, **differs}


def widths(
    d_model: str = "hidden_size",
    d_mlp: tuple[str, ...] = ("intermediate_size",),
    d_head: tuple[str, ...] = ("head_dim", "hidden_size/num_attention_heads"),
    n_head: str = "num_attention_heads",
    n_kv_head: str = "num_key_value_heads",
    **more: tuple[str, ...],
) -> Mapping:
    """pyvene's dimension mapping, from what a config calls the sizes; without `d_mlp` or `d_head` these are left out."""
    return {
        "n_head": (n_head,),
        "n_kv_head": (n_kv_head,),
        **dict.fromkeys(AS_WIDE_AS_MODEL, (d_model,)),
        **(dict.fromkeys(AS_WIDE_AS_MLP, d_mlp) if d_mlp else {}),
        **(dict.fromkeys(AS_WIDE_AS_HEAD, d_head) if d_head else {}),
        **more,
    }


def within(prefix: str, mapping: Mapping) -> Mapping:
    """The same places, for a class that holds the bare model as `prefix`."""
    return {component: (f"{prefix}.{path}", *rest) for component, (path, *rest) in mapping.items()}
