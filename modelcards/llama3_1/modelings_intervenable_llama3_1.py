"""Llama 3.1 (and 2, 3, 3.2, 3.3): the rotary decoder as it is."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

llama_type_to_module_mapping = decoder()
llama_type_to_dimension_mapping = widths(
    llama_type_to_module_mapping, d_heads=("hidden_size",), d_kv_heads=("hidden_size",)
)

llama_lm_type_to_module_mapping = with_head("model", llama_type_to_module_mapping, "lm_head")
llama_lm_type_to_dimension_mapping = llama_type_to_dimension_mapping

llama_classifier_type_to_module_mapping = with_head("model", llama_type_to_module_mapping, "score")
llama_classifier_type_to_dimension_mapping = llama_type_to_dimension_mapping


def create_llama(name="meta-llama/Llama-3.1-8B", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import LlamaForCausalLM

    return load(LlamaForCausalLM, name, cache_dir, dtype)
