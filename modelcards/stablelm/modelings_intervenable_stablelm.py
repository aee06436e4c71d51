"""StableLM: the rotary decoder, with RoPE on a part of each head."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

stablelm_type_to_module_mapping = decoder()
stablelm_type_to_dimension_mapping = widths(
    stablelm_type_to_module_mapping, d_head=("hidden_size/num_attention_heads",)
)

stablelm_lm_type_to_module_mapping = with_head("model", stablelm_type_to_module_mapping, "lm_head")
stablelm_lm_type_to_dimension_mapping = stablelm_type_to_dimension_mapping

stablelm_classifier_type_to_module_mapping = with_head("model", stablelm_type_to_module_mapping, "score")
stablelm_classifier_type_to_dimension_mapping = stablelm_type_to_dimension_mapping


def create_stablelm(name="stabilityai/stablelm-2-1_6b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import StableLmForCausalLM

    return load(StableLmForCausalLM, name, cache_dir, dtype)
