"""Starcoder2: the rotary decoder, with an MLP without a gate."""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import decoder, load, widths, with_head

starcoder2_type_to_module_mapping = decoder(
    "mlp_gate",
    mlp_up=("layers[%s].mlp.c_fc", CONST_OUTPUT_HOOK),
    mlp_activation=("layers[%s].mlp.act", CONST_OUTPUT_HOOK),
    mlp_neurons=("layers[%s].mlp.c_proj", CONST_INPUT_HOOK),
)
starcoder2_type_to_dimension_mapping = widths(starcoder2_type_to_module_mapping, d_head=())

starcoder2_lm_type_to_module_mapping = with_head("model", starcoder2_type_to_module_mapping, "lm_head")
starcoder2_lm_type_to_dimension_mapping = starcoder2_type_to_dimension_mapping

starcoder2_classifier_type_to_module_mapping = with_head("model", starcoder2_type_to_module_mapping, "score")
starcoder2_classifier_type_to_dimension_mapping = starcoder2_type_to_dimension_mapping


def create_starcoder2(name="bigcode/starcoder2-3b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Starcoder2ForCausalLM

    return load(Starcoder2ForCausalLM, name, cache_dir, dtype)
