"""GPT-2: learnt positions, no gate, and one projection for queries, keys and values.

`embeddings` is the sum of token and position embeddings.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK, split_three

from ..template import BY_HEAD, Mapping, load, widths, with_head

gpt2_type_to_module_mapping: Mapping = {
    "embeddings": ("drop", CONST_OUTPUT_HOOK),
    "block_input": ("h[%s]", CONST_INPUT_HOOK),
    "resid_mid": ("h[%s].ln_2", CONST_INPUT_HOOK),
    "block_output": ("h[%s]", CONST_OUTPUT_HOOK),
    "attention_contribution": ("h[%s].attn.resid_dropout", CONST_OUTPUT_HOOK),
    "mlp_contribution": ("h[%s].mlp", CONST_OUTPUT_HOOK),
    "attention_input": ("h[%s].attn", CONST_INPUT_HOOK),
    "query_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 0)),
    "key_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 1)),
    "value_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 2)),
    "head_query_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 0), BY_HEAD),
    "head_key_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 1), BY_HEAD),
    "head_value_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 2), BY_HEAD),
    "attention_value_output": ("h[%s].attn.c_proj", CONST_INPUT_HOOK),
    "head_attention_value_output": ("h[%s].attn.c_proj", CONST_INPUT_HOOK, BY_HEAD),
    "attention_output": ("h[%s].attn.resid_dropout", CONST_OUTPUT_HOOK),
    "mlp_input": ("h[%s].mlp", CONST_INPUT_HOOK),
    "mlp_up": ("h[%s].mlp.c_fc", CONST_OUTPUT_HOOK),
    "mlp_activation": ("h[%s].mlp.act", CONST_OUTPUT_HOOK),
    "mlp_neurons": ("h[%s].mlp.c_proj", CONST_INPUT_HOOK),
    "mlp_output": ("h[%s].mlp", CONST_OUTPUT_HOOK),
    "final_norm": ("ln_f", CONST_OUTPUT_HOOK),
}
gpt2_type_to_dimension_mapping = widths(
    gpt2_type_to_module_mapping,
    d_model="n_embd",
    d_mlp=("n_inner", "n_embd*4"),
    d_head=("n_embd/n_head",),
    d_heads=("n_embd",),
    n_head="n_head",
    n_kv_head="n_head",
    d_kv_heads=("n_embd",),
)

gpt2_lm_type_to_module_mapping = with_head("transformer", gpt2_type_to_module_mapping, "lm_head")
gpt2_lm_type_to_dimension_mapping = gpt2_type_to_dimension_mapping

gpt2_classifier_type_to_module_mapping = with_head("transformer", gpt2_type_to_module_mapping, "score")
gpt2_classifier_type_to_dimension_mapping = gpt2_type_to_dimension_mapping


def create_gpt2(name="openai-community/gpt2", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import GPT2LMHeadModel

    return load(GPT2LMHeadModel, name, cache_dir, dtype)


create_gpt2_lm = create_gpt2  # pyvene's name for it: its own `create_gpt2` returns the bare model
