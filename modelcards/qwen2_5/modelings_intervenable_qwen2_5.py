"""Qwen2.5 and Qwen2: the rotary decoder, with biases on queries, keys and values.

Its configs have no head_dim: pyvene's mapping takes heads to be as wide as in every published checkpoint.
"""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

qwen2_type_to_module_mapping = decoder()
qwen2_type_to_dimension_mapping = widths(
    qwen2_type_to_module_mapping,
    d_head=("hidden_size/num_attention_heads",),
    d_heads=("hidden_size",),
    d_kv_heads=("hidden_size",),
)

qwen2_lm_type_to_module_mapping = with_head("model", qwen2_type_to_module_mapping, "lm_head")
qwen2_lm_type_to_dimension_mapping = qwen2_type_to_dimension_mapping

qwen2_classifier_type_to_module_mapping = with_head("model", qwen2_type_to_module_mapping, "score")
qwen2_classifier_type_to_dimension_mapping = qwen2_type_to_dimension_mapping


def create_qwen2(name="Qwen/Qwen2.5-3B", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Qwen2ForCausalLM

    return load(Qwen2ForCausalLM, name, cache_dir, dtype)
