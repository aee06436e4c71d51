"""Cohere (Command R): the rotary decoder with parallel blocks.

Attention and MLP of a block read the same normed stream and are added to the residual together. The language model's forward
scales the logits.
"""

from __future__ import annotations

import torch

from ..template import decoder, load, widths, with_head

cohere_type_to_module_mapping = decoder("resid_mid", "attention_input")
cohere_type_to_dimension_mapping = widths(cohere_type_to_module_mapping, d_head=())

cohere_lm_type_to_module_mapping = with_head("model", cohere_type_to_module_mapping)
cohere_lm_type_to_dimension_mapping = cohere_type_to_dimension_mapping


def create_cohere(name="CohereLabs/c4ai-command-r-v01", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import CohereForCausalLM

    return load(CohereForCausalLM, name, cache_dir, dtype)
