"""Gemma 3 (text): Gemma 2's norms around attention and MLP, a norm on queries and keys, no soft-cap of scores."""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import decoder, load, widths, with_head

gemma3_type_to_module_mapping = decoder(
    resid_mid=("layers[%s].pre_feedforward_layernorm", CONST_INPUT_HOOK),
    attention_contribution=("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
    mlp_contribution=("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
)
gemma3_type_to_dimension_mapping = widths(gemma3_type_to_module_mapping)

gemma3_lm_type_to_module_mapping = with_head("model", gemma3_type_to_module_mapping)
gemma3_lm_type_to_dimension_mapping = gemma3_type_to_dimension_mapping

gemma3_classifier_type_to_module_mapping = with_head("model", gemma3_type_to_module_mapping, "score")
gemma3_classifier_type_to_dimension_mapping = gemma3_type_to_dimension_mapping


def create_gemma3(name="google/gemma-3-1b-pt", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Gemma3ForCausalLM

    return load(Gemma3ForCausalLM, name, cache_dir, dtype)
