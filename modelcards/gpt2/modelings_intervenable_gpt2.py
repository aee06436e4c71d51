"""GPT-2 for pyvene: where each component lives, for the bare, language-model and classifier classes.

One fused projection makes query, key and value; there is no rotary embedding and no gate. `embeddings` is the sum of token and
position embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK, split_three

from modelcards.template import (
    AS_WIDE_AS_HEAD,
    AS_WIDE_AS_MLP,
    AS_WIDE_AS_MODEL,
    BY_HEAD,
    Mapping,
    create,
    within,
)

gpt2_type_to_module_mapping: Mapping = {
    "embeddings": ("drop", CONST_OUTPUT_HOOK),
    "block_input": ("h[%s]", CONST_INPUT_HOOK),
    "resid_mid": ("h[%s].ln_2", CONST_INPUT_HOOK),
    "block_output": ("h[%s]", CONST_OUTPUT_HOOK),
    "attention_contribution": ("h[%s].attn.resid_dropout", CONST_OUTPUT_HOOK),
    "mlp_contribution": ("h[%s].mlp", CONST_OUTPUT_HOOK),
    "head_contribution": ("h[%s].attn.tap_contribution", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_input": ("h[%s].attn", CONST_INPUT_HOOK),
    "query_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 0)),
    "key_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 1)),
    "value_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 2)),
    "head_query_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 0), BY_HEAD),
    "head_key_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 1), BY_HEAD),
    "head_value_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 2), BY_HEAD),
    "attention_scores": ("h[%s].attn.tap_scores", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_pattern": ("h[%s].attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_weight": ("h[%s].attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD),
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
gpt2_type_to_dimension_mapping: Mapping = {
    "n_head": ("n_head",),
    "n_kv_head": ("n_head",),
    **dict.fromkeys(AS_WIDE_AS_MODEL, ("n_embd",)),
    **dict.fromkeys(("query_output", "key_output", "value_output", "attention_value_output"), ("n_embd",)),
    **dict.fromkeys(AS_WIDE_AS_MLP, ("n_inner", "n_embd*4")),
    **dict.fromkeys(AS_WIDE_AS_HEAD, ("n_embd/n_head",)),
}

"""GPT-2 with language-model head"""
gpt2_lm_type_to_module_mapping: Mapping = {
    **within("transformer", gpt2_type_to_module_mapping),
    "logits": ("lm_head", CONST_OUTPUT_HOOK),
}
gpt2_lm_type_to_dimension_mapping: Mapping = dict(gpt2_type_to_dimension_mapping)

"""GPT-2 with classifier head: logits at every position, of which the model returns the last real one's"""
gpt2_classifier_type_to_module_mapping: Mapping = {
    **within("transformer", gpt2_type_to_module_mapping),
    "logits": ("score", CONST_OUTPUT_HOOK),
}
gpt2_classifier_type_to_dimension_mapping: Mapping = dict(gpt2_type_to_dimension_mapping)


def create_gpt2(
    name: str = "openai-community/gpt2", cache_dir: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Any]:
    """Creates config, tokenizer and causal language model from the given name"""
    return create(name, cache_dir, dtype)
