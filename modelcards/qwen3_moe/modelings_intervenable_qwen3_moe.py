"""Qwen3-MoE: Qwen3 with experts for an MLP; a router chooses a few of them for each token.

A config need not have the head_dim that pyvene could name.
"""

from __future__ import annotations

import torch

from ..template import MLP_INSIDE, decoder, load, widths, with_head

qwen3_moe_type_to_module_mapping = decoder(*MLP_INSIDE)
qwen3_moe_type_to_dimension_mapping = widths(qwen3_moe_type_to_module_mapping, d_head=())

qwen3_moe_lm_type_to_module_mapping = with_head("model", qwen3_moe_type_to_module_mapping, "lm_head")
qwen3_moe_lm_type_to_dimension_mapping = qwen3_moe_type_to_dimension_mapping

qwen3_moe_classifier_type_to_module_mapping = with_head("model", qwen3_moe_type_to_module_mapping, "score")
qwen3_moe_classifier_type_to_dimension_mapping = qwen3_moe_type_to_dimension_mapping


def create_qwen3_moe(name="Qwen/Qwen3-30B-A3B", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Qwen3MoeForCausalLM

    return load(Qwen3MoeForCausalLM, name, cache_dir, dtype)
