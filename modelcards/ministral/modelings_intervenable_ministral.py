"""Ministral: the rotary decoder as it is."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

ministral_type_to_module_mapping = decoder()
ministral_type_to_dimension_mapping = widths(ministral_type_to_module_mapping)

ministral_lm_type_to_module_mapping = with_head("model", ministral_type_to_module_mapping, "lm_head")
ministral_lm_type_to_dimension_mapping = ministral_type_to_dimension_mapping

ministral_classifier_type_to_module_mapping = with_head("model", ministral_type_to_module_mapping, "score")
ministral_classifier_type_to_dimension_mapping = ministral_type_to_dimension_mapping


def create_ministral(name="mistralai/Ministral-8B-Instruct-2410", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import MinistralForCausalLM

    return load(MinistralForCausalLM, name, cache_dir, dtype)
