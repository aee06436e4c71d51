"""The decoder that Qwen2.5, Gemma 2, Llama 3.1 and Mistral share, as a pyvene module mapping; a card says what differs.

An entry is (path of the module, hook, split functions ...) in pyvene's format; `%s` is the layer. Paths ending in `tap_...` are
places that `modelcards.attention_taps` makes visible during a run.
"""

from __future__ import annotations

from typing import Any

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK, split_head_and_permute
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Mapping = dict[str, tuple]

BY_HEAD = (split_head_and_permute, "n_head")
BY_KV_HEAD = (split_head_and_permute, "n_kv_head")

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

rotary_decoder_type_to_dimension_mapping: Mapping = {
    "n_head": ("num_attention_heads",),
    "n_kv_head": ("num_key_value_heads",),
    **dict.fromkeys(AS_WIDE_AS_MODEL, ("hidden_size",)),
    **dict.fromkeys(AS_WIDE_AS_MLP, ("intermediate_size",)),
    **dict.fromkeys(AS_WIDE_AS_HEAD, ("head_dim", "hidden_size/num_attention_heads")),
}


def within(prefix: str, mapping: Mapping) -> Mapping:
    """The same places, for a class that holds the bare model as `prefix`."""
    return {component: (f"{prefix}.{path}", *rest) for component, (path, *rest) in mapping.items()}


def create(name: str, cache_dir: str | None, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load (config, tokenizer, model) of a causal language model from the hub or a folder, without remote code."""
    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, cache_dir=cache_dir, dtype=dtype)
    return config, tokenizer, model
