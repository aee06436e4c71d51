"""Falcon, as in falcon-7b: parallel blocks.

Attention and MLP of a block read the same normed stream and are added to the residual together. One projection makes all queries
and the one key and value, side by side. Attention does not go through transformers' AttentionInterface, so that no tap reaches
its inside.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import BY_HEAD, QKV, decoder, load, widths, with_head

Z = "h[%s].self_attention.dense"
falcon_type_to_module_mapping = decoder(
    "resid_mid",
    "attention_input",
    "mlp_gate",
    *QKV,
    blocks="h",
    attention="self_attention",
    embeddings=("word_embeddings", CONST_OUTPUT_HOOK),
    attention_value_output=(Z, CONST_INPUT_HOOK),
    head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
    mlp_up=("h[%s].mlp.dense_h_to_4h", CONST_OUTPUT_HOOK),
    mlp_activation=("h[%s].mlp.act", CONST_OUTPUT_HOOK),
    mlp_neurons=("h[%s].mlp.dense_4h_to_h", CONST_INPUT_HOOK),
    final_norm=("ln_f", CONST_OUTPUT_HOOK),
)
falcon_type_to_dimension_mapping = widths(
    falcon_type_to_module_mapping,
    d_mlp=("ffn_hidden_size",),
    d_head=("hidden_size/num_attention_heads",),
    d_heads=("hidden_size",),
    n_kv_head="1",
)

falcon_lm_type_to_module_mapping = with_head("transformer", falcon_type_to_module_mapping, "lm_head")
falcon_lm_type_to_dimension_mapping = falcon_type_to_dimension_mapping

falcon_classifier_type_to_module_mapping = with_head("transformer", falcon_type_to_module_mapping, "score")
falcon_classifier_type_to_dimension_mapping = falcon_type_to_dimension_mapping


def create_falcon(name="tiiuae/falcon-7b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import FalconForCausalLM

    return load(FalconForCausalLM, name, cache_dir, dtype)
