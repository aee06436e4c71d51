"""Gemma 2: the rotary decoder with norms before and after attention and MLP.

What attention and MLP add to the residual stream is the output of their second norm. The language model's forward soft-caps the
logits, so that they are not the output of `lm_head`.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import decoder, load, widths, with_head

gemma2_type_to_module_mapping = decoder(
    resid_mid=("layers[%s].pre_feedforward_layernorm", CONST_INPUT_HOOK),
    attention_contribution=("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
    mlp_contribution=("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
)
gemma2_type_to_dimension_mapping = widths(gemma2_type_to_module_mapping)

gemma2_lm_type_to_module_mapping = with_head("model", gemma2_type_to_module_mapping)
gemma2_lm_type_to_dimension_mapping = gemma2_type_to_dimension_mapping

gemma2_classifier_type_to_module_mapping = with_head("model", gemma2_type_to_module_mapping, "score")
gemma2_classifier_type_to_dimension_mapping = gemma2_type_to_dimension_mapping


def create_gemma2(name="google/gemma-2-2b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Gemma2ForCausalLM

    return load(Gemma2ForCausalLM, name, cache_dir, dtype)
