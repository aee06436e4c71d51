"""Qwen3: the rotary decoder, with a norm on each head's query and key between projection and RoPE."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

qwen3_type_to_module_mapping = decoder()
qwen3_type_to_dimension_mapping = widths(qwen3_type_to_module_mapping)

qwen3_lm_type_to_module_mapping = with_head("model", qwen3_type_to_module_mapping, "lm_head")
qwen3_lm_type_to_dimension_mapping = qwen3_type_to_dimension_mapping

qwen3_classifier_type_to_module_mapping = with_head("model", qwen3_type_to_module_mapping, "score")
qwen3_classifier_type_to_dimension_mapping = qwen3_type_to_dimension_mapping


def create_qwen3(name="Qwen/Qwen3-4B", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Qwen3ForCausalLM

    return load(Qwen3ForCausalLM, name, cache_dir, dtype)
