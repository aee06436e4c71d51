"""BLOOM: no rotary embedding; a bias on the scores (ALiBi) that grows with the distance to the key.

The modules of attention and MLP add to the residual themselves: what they add is the output of their last projection. One
projection makes each head's query, key and value. Attention does not go through transformers' AttentionInterface, so that no tap
reaches its inside.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import BY_HEAD, QKV, decoder, load, widths, with_head

Z = "h[%s].self_attention.dense"
NEURONS = "h[%s].mlp.dense_4h_to_h"

bloom_type_to_module_mapping = decoder(
    "mlp_gate",
    *QKV,
    blocks="h",
    attention="self_attention",
    embeddings=("word_embeddings_layernorm", CONST_OUTPUT_HOOK),
    attention_contribution=(Z, CONST_OUTPUT_HOOK),
    attention_output=(Z, CONST_OUTPUT_HOOK),
    attention_value_output=(Z, CONST_INPUT_HOOK),
    head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
    mlp_up=("h[%s].mlp.dense_h_to_4h", CONST_OUTPUT_HOOK),
    mlp_activation=("h[%s].mlp.gelu_impl", CONST_OUTPUT_HOOK),
    mlp_neurons=(NEURONS, CONST_INPUT_HOOK),
    mlp_output=(NEURONS, CONST_OUTPUT_HOOK),
    mlp_contribution=(NEURONS, CONST_OUTPUT_HOOK),
    final_norm=("ln_f", CONST_OUTPUT_HOOK),
)
bloom_type_to_dimension_mapping = widths(
    bloom_type_to_module_mapping,
    d_mlp=("hidden_size*4",),
    d_head=("hidden_size/n_head",),
    d_heads=("hidden_size",),
    n_head="n_head",
    n_kv_head="n_head",
)

bloom_lm_type_to_module_mapping = with_head("transformer", bloom_type_to_module_mapping, "lm_head")
bloom_lm_type_to_dimension_mapping = bloom_type_to_dimension_mapping

bloom_classifier_type_to_module_mapping = with_head("transformer", bloom_type_to_module_mapping, "score")
bloom_classifier_type_to_dimension_mapping = bloom_type_to_dimension_mapping


def create_bloom(name="bigscience/bloom-560m", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import BloomForCausalLM

    return load(BloomForCausalLM, name, cache_dir, dtype)
