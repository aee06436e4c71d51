"""SmolLM3: the rotary decoder, where every fourth layer does not rotate queries and keys."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

smollm3_type_to_module_mapping = decoder()
smollm3_type_to_dimension_mapping = widths(smollm3_type_to_module_mapping, d_head=())

smollm3_lm_type_to_module_mapping = with_head("model", smollm3_type_to_module_mapping, "lm_head")
smollm3_lm_type_to_dimension_mapping = smollm3_type_to_dimension_mapping

smollm3_classifier_type_to_module_mapping = with_head("model", smollm3_type_to_module_mapping, "score")
smollm3_classifier_type_to_dimension_mapping = smollm3_type_to_dimension_mapping


def create_smollm3(name="HuggingFaceTB/SmolLM3-3B-Base", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import SmolLM3ForCausalLM

    return load(SmolLM3ForCausalLM, name, cache_dir, dtype)
