"""Granite: the rotary decoder with multipliers.

The models' own forward multiplies the outputs of attention and MLP before it adds them to the residual stream, and embeddings
before they enter the first block, and divides the logits.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK

from ..template import decoder, load, widths, with_head

granite_type_to_module_mapping = decoder(
    "attention_contribution",
    "mlp_contribution",
    embeddings=("layers[0]", CONST_INPUT_HOOK),
)
granite_type_to_dimension_mapping = widths(granite_type_to_module_mapping, d_head=())

granite_lm_type_to_module_mapping = with_head("model", granite_type_to_module_mapping)
granite_lm_type_to_dimension_mapping = granite_type_to_dimension_mapping


def create_granite(name="ibm-granite/granite-3.3-8b-base", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import GraniteForCausalLM

    return load(GraniteForCausalLM, name, cache_dir, dtype)
