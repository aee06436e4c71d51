"""The decoder that the rotary families share, as pyvene's mappings; a family's file says what differs.

An entry is in pyvene's format: (path of the module, hook, split functions ...); `%s` is the layer. This module needs pyvene and
transformers only, so that a family's folder also works inside pyvene: copy it to `pyvene/models/` with this file beside it.
"""

from __future__ import annotations

from typing import Any

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK, split_head_and_permute

Mapping = dict[str, tuple]

PREFIX = "tap_"  # begins the name of every module that only `modelcards.attention_taps.Taps` puts into a model

BY_HEAD = (split_head_and_permute, "n_head")
BY_KV_HEAD = (split_head_and_permute, "n_kv_head")

# -- where components live -----------------------------------------------------------------------------------------------

rotary_decoder_type_to_module_mapping: Mapping = {
    "embeddings": ("embed_tokens", CONST_OUTPUT_HOOK),
    "block_input": ("layers[%s]", CONST_INPUT_HOOK),
    "resid_mid": ("layers[%s].post_attention_layernorm", CONST_INPUT_HOOK),
    "block_output": ("layers[%s]", CONST_OUTPUT_HOOK),
    "attention_contribution": ("layers[%s].self_attn", CONST_OUTPUT_HOOK),
    "mlp_contribution": ("layers[%s].mlp", CONST_OUTPUT_HOOK),
    "attention_input": ("layers[%s].self_attn", CONST_INPUT_HOOK),
    "query_output": ("layers[%s].self_attn.q_proj", CONST_OUTPUT_HOOK),
    "key_output": ("layers[%s].self_attn.k_proj", CONST_OUTPUT_HOOK),
    "value_output": ("layers[%s].self_attn.v_proj", CONST_OUTPUT_HOOK),
    "head_query_output": ("layers[%s].self_attn.q_proj", CONST_OUTPUT_HOOK, BY_HEAD),
    "head_key_output": ("layers[%s].self_attn.k_proj", CONST_OUTPUT_HOOK, BY_KV_HEAD),
    "head_value_output": ("layers[%s].self_attn.v_proj", CONST_OUTPUT_HOOK, BY_KV_HEAD),
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

QKV = (
    "query_output",
    "key_output",
    "value_output",
    "head_query_output",
    "head_key_output",
    "head_value_output",
)
MLP_INSIDE = ("mlp_gate", "mlp_up", "mlp_activation", "mlp_neurons")

_AS_WIDE_AS_MODEL = (
    "embeddings",
    "block_input",
    "resid_mid",
    "block_output",
    "attention_contribution",
    "mlp_contribution",
    "attention_input",
    "attention_output",
    "mlp_input",
    "mlp_output",
    "final_norm",
)
_AS_WIDE_AS_HEAD = ("head_query_output", "head_key_output", "head_value_output", "head_attention_value_output")
_AS_WIDE_AS_HEADS = ("query_output", "attention_value_output")
_AS_WIDE_AS_KV_HEADS = ("key_output", "value_output")


def decoder(*without: str, blocks: str = "layers", attention: str = "self_attn", **differs: tuple) -> Mapping:
    """Build a family's module mapping from the rotary decoder's.

    Args:
        *without: components that the family lacks.
        blocks: name of the list of blocks in the bare model.
        attention: name of the attention module in a block.
        **differs: entries that replace the template's, or new ones.

    Returns:
        The module mapping of the bare class.
    """
    mapping = {
        component: (in_family(path, blocks, attention), *rest)
        for component, (path, *rest) in rotary_decoder_type_to_module_mapping.items()
        if component not in without
    }
    return {**mapping, **differs}


def in_family(path: str, blocks: str, attention: str) -> str:
    """Rename the blocks and the attention module in a path of the rotary decoder."""
    return path.replace("layers[", f"{blocks}[").replace(".self_attn", f".{attention}")


def widths(
    places: Mapping,
    d_model: str = "hidden_size",
    d_mlp: tuple[str, ...] = ("intermediate_size",),
    d_head: tuple[str, ...] = ("head_dim", "hidden_size/num_attention_heads"),
    d_heads: tuple[str, ...] = (),
    n_head: str = "num_attention_heads",
    n_kv_head: str = "num_key_value_heads",
    d_kv_heads: tuple[str, ...] = (),
) -> Mapping:
    """Build a family's dimension mapping from the names its config gives to the sizes.

    pyvene takes the width of a trainable intervention from here, and cuts what it reads or writes to it. A component without an
    entry is read and written whole. pyvene 0.1.8 cannot spell "heads x head size", so whole queries, keys, values and z have an
    entry only where pyvene's own card has one and the product is the hidden size in the family's default config, or always.
    `modelcards.register(model)` has exact widths of everything, for the model's own config.

    Args:
        places: the family's module mapping; components that it lacks get no entry.
        d_model: width of the residual stream.
        d_mlp: proposals for the number of neurons; the first that the config has counts, here and below.
        d_head: proposals for the size of one head; none where pyvene cannot spell it.
        d_heads: proposals for the width of all query heads side by side.
        n_head: number of query heads.
        n_kv_head: number of key/value heads.
        d_kv_heads: proposals for the width of all key/value heads side by side.

    Returns:
        The dimension mapping, the same for every class of the family.
    """
    proposals = {
        **dict.fromkeys(_AS_WIDE_AS_MODEL, (d_model,)),
        **dict.fromkeys(MLP_INSIDE, d_mlp),
        **dict.fromkeys(_AS_WIDE_AS_HEAD, d_head),
        **dict.fromkeys(_AS_WIDE_AS_HEADS, d_heads),
        **dict.fromkeys(_AS_WIDE_AS_KV_HEADS, d_kv_heads),
    }
    known = {component: proposals[component] for component in places if proposals.get(component)}
    return {"n_head": (n_head,), "n_kv_head": (n_kv_head,), **known}


def within(prefix: str, places: Mapping) -> Mapping:
    """Return the same places for a model that holds theirs as its attribute `prefix`."""
    return {component: (f"{prefix}.{path}", *rest) for component, (path, *rest) in places.items()}


def with_head(prefix: str, places: Mapping, head: str = "") -> Mapping:
    """Build the module mapping of a class with a head from that of the bare class.

    Args:
        prefix: name of the bare model in the class.
        places: module mapping of the bare class.
        head: module whose output are the logits, if there is one.

    Returns:
        The mapping.
    """
    return {**within(prefix, places), **({"logits": (head, CONST_OUTPUT_HOOK)} if head else {})}


def at_layer(path: str, layer: int) -> str:
    """Return a mapping's path at one layer, as torch writes it: `layers[%s].mlp` -> `layers.3.mlp`."""
    return (path % layer if "%s" in path else path).replace("[", ".").replace("]", "")


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def load(model_class: Any, name: str, cache_dir: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Load a checkpoint as the `create_<family>` functions do.

    Args:
        model_class: class of the model.
        name: checkpoint on the hub, or a folder.
        cache_dir: where downloads are kept; None for the usual place.
        dtype: of the weights.

    Returns:
        The config, the tokenizer and the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    model = model_class.from_pretrained(name, config=config, cache_dir=cache_dir, dtype=dtype)
    return config, tokenizer, model
