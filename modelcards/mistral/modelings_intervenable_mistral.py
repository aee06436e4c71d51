"""Mistral: the rotary decoder as it is."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

mistral_type_to_module_mapping = decoder()
mistral_type_to_dimension_mapping = widths(mistral_type_to_module_mapping, d_heads=("hidden_size",))

mistral_lm_type_to_module_mapping = with_head("model", mistral_type_to_module_mapping, "lm_head")
mistral_lm_type_to_dimension_mapping = mistral_type_to_dimension_mapping

mistral_classifier_type_to_module_mapping = with_head("model", mistral_type_to_module_mapping, "score")
mistral_classifier_type_to_dimension_mapping = mistral_type_to_dimension_mapping


def create_mistral(name="mistralai/Mistral-7B-v0.3", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import MistralForCausalLM

    return load(MistralForCausalLM, name, cache_dir, dtype)
