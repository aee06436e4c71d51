"""Mixtral: the rotary decoder with experts for an MLP; a router chooses a few of them for each token."""

from __future__ import annotations

import torch

from ..template import MLP_INSIDE, decoder, load, widths, with_head

mixtral_type_to_module_mapping = decoder(*MLP_INSIDE)
mixtral_type_to_dimension_mapping = widths(mixtral_type_to_module_mapping)

mixtral_lm_type_to_module_mapping = with_head("model", mixtral_type_to_module_mapping, "lm_head")
mixtral_lm_type_to_dimension_mapping = mixtral_type_to_dimension_mapping

mixtral_classifier_type_to_module_mapping = with_head("model", mixtral_type_to_module_mapping, "score")
mixtral_classifier_type_to_dimension_mapping = mixtral_type_to_dimension_mapping


def create_mixtral(name="mistralai/Mixtral-8x7B-v0.1", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import MixtralForCausalLM

    return load(MixtralForCausalLM, name, cache_dir, dtype)
