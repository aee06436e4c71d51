"""Gemma: the rotary decoder; embeddings are scaled inside `embed_tokens`."""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

gemma_type_to_module_mapping = decoder()
gemma_type_to_dimension_mapping = widths(gemma_type_to_module_mapping)

gemma_lm_type_to_module_mapping = with_head("model", gemma_type_to_module_mapping, "lm_head")
gemma_lm_type_to_dimension_mapping = gemma_type_to_dimension_mapping

gemma_classifier_type_to_module_mapping = with_head("model", gemma_type_to_module_mapping, "score")
gemma_classifier_type_to_dimension_mapping = gemma_type_to_dimension_mapping


def create_gemma(name="google/gemma-2b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import GemmaForCausalLM

    return load(GemmaForCausalLM, name, cache_dir, dtype)
