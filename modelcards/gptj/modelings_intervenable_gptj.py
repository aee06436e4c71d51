"""GPT-J: parallel blocks.

Attention and MLP of a block read the same normed stream and are added to the residual together. Attention does not go through
transformers' AttentionInterface, so that no tap reaches its inside.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import BY_HEAD, decoder, load, widths, with_head

Z = "h[%s].attn.out_proj"
gptj_type_to_module_mapping = decoder(
    "resid_mid",
    "attention_input",
    "mlp_gate",
    blocks="h",
    attention="attn",
    embeddings=("drop", CONST_OUTPUT_HOOK),
    attention_value_output=(Z, CONST_INPUT_HOOK),
    head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
    mlp_up=("h[%s].mlp.fc_in", CONST_OUTPUT_HOOK),
    mlp_activation=("h[%s].mlp.act", CONST_OUTPUT_HOOK),
    mlp_neurons=("h[%s].mlp.fc_out", CONST_INPUT_HOOK),
    final_norm=("ln_f", CONST_OUTPUT_HOOK),
)
gptj_type_to_dimension_mapping = widths(
    gptj_type_to_module_mapping,
    d_model="n_embd",
    d_mlp=("n_inner", "n_embd*4"),
    d_head=("n_embd/n_head",),
    d_heads=("n_embd",),
    n_head="n_head",
    n_kv_head="n_head",
    d_kv_heads=("n_embd",),
)

gptj_lm_type_to_module_mapping = with_head("transformer", gptj_type_to_module_mapping, "lm_head")
gptj_lm_type_to_dimension_mapping = gptj_type_to_dimension_mapping

gptj_classifier_type_to_module_mapping = with_head("transformer", gptj_type_to_module_mapping, "score")
gptj_classifier_type_to_dimension_mapping = gptj_type_to_dimension_mapping


def create_gptj(name="EleutherAI/gpt-j-6b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import GPTJForCausalLM

    return load(GPTJForCausalLM, name, cache_dir, dtype)
