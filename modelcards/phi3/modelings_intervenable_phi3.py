"""Phi-3: the rotary decoder, with one projection for queries, keys and values and one for gate and up."""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_OUTPUT_HOOK, split_half

from ..template import QKV, decoder, load, widths, with_head

phi3_type_to_module_mapping = decoder(
    *QKV,
    mlp_gate=("layers[%s].mlp.gate_up_proj", CONST_OUTPUT_HOOK, (split_half, 0)),
    mlp_up=("layers[%s].mlp.gate_up_proj", CONST_OUTPUT_HOOK, (split_half, 1)),
    mlp_activation=("layers[%s].mlp.activation_fn", CONST_OUTPUT_HOOK),
)
phi3_type_to_dimension_mapping = widths(phi3_type_to_module_mapping, d_head=())

phi3_lm_type_to_module_mapping = with_head("model", phi3_type_to_module_mapping, "lm_head")
phi3_lm_type_to_dimension_mapping = phi3_type_to_dimension_mapping

phi3_classifier_type_to_module_mapping = with_head("model", phi3_type_to_module_mapping, "score")
phi3_classifier_type_to_dimension_mapping = phi3_type_to_dimension_mapping


def create_phi3(name="microsoft/Phi-3-mini-4k-instruct", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Phi3ForCausalLM

    return load(Phi3ForCausalLM, name, cache_dir, dtype)
