"""GPT-NeoX (Pythia): parallel blocks.

Attention and MLP of a block read the same stream, each through its own norm, and are added to it together. One projection makes
each head's query, key and value.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import BY_HEAD, QKV, decoder, load, widths, with_head

gpt_neox_type_to_module_mapping = decoder(
    "resid_mid",
    "mlp_gate",
    *QKV,
    attention="attention",
    embeddings=("emb_dropout", CONST_OUTPUT_HOOK),
    attention_value_output=("layers[%s].attention.dense", CONST_INPUT_HOOK),
    head_attention_value_output=("layers[%s].attention.dense", CONST_INPUT_HOOK, BY_HEAD),
    mlp_up=("layers[%s].mlp.dense_h_to_4h", CONST_OUTPUT_HOOK),
    mlp_activation=("layers[%s].mlp.act", CONST_OUTPUT_HOOK),
    mlp_neurons=("layers[%s].mlp.dense_4h_to_h", CONST_INPUT_HOOK),
    final_norm=("final_layer_norm", CONST_OUTPUT_HOOK),
)
gpt_neox_type_to_dimension_mapping = widths(
    gpt_neox_type_to_module_mapping,
    d_head=("hidden_size/num_attention_heads",),
    d_heads=("hidden_size",),
    n_kv_head="num_attention_heads",
)

gpt_neox_lm_type_to_module_mapping = with_head("gpt_neox", gpt_neox_type_to_module_mapping, "lm_head")
gpt_neox_lm_type_to_dimension_mapping = gpt_neox_type_to_dimension_mapping

gpt_neox_classifier_type_to_module_mapping = with_head("gpt_neox", gpt_neox_type_to_module_mapping, "score")
gpt_neox_classifier_type_to_dimension_mapping = gpt_neox_type_to_dimension_mapping


def create_gpt_neox(name="EleutherAI/pythia-1.4b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import GPTNeoXForCausalLM

    return load(GPTNeoXForCausalLM, name, cache_dir, dtype)
