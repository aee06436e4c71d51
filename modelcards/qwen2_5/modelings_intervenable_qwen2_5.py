"""Qwen2.5 for pyvene: where each component lives, for the bare, language-model and classifier classes."""

from __future__ import annotations

from typing import Any

import torch
from pyvene.models.constants import CONST_OUTPUT_HOOK

from modelcards.template import (
    Mapping,
    create,
    rotary_decoder_type_to_dimension_mapping,
    rotary_decoder_type_to_module_mapping,
    within,
)

qwen2_5_type_to_module_mapping: Mapping = dict(rotary_decoder_type_to_module_mapping)
# Qwen2.5's config has no head_dim to name.
qwen2_5_type_to_dimension_mapping: Mapping = {
    component: widths
    for component, widths in rotary_decoder_type_to_dimension_mapping.items()
    if "head_dim" not in widths
}

"""Qwen2.5 with language-model head"""
qwen2_5_lm_type_to_module_mapping: Mapping = {
    **within("model", qwen2_5_type_to_module_mapping),
    "logits": ("lm_head", CONST_OUTPUT_HOOK),
}
qwen2_5_lm_type_to_dimension_mapping: Mapping = dict(qwen2_5_type_to_dimension_mapping)

"""Qwen2.5 with classifier head: logits at every position, of which the model returns the last real one's"""
qwen2_5_classifier_type_to_module_mapping: Mapping = {
    **within("model", qwen2_5_type_to_module_mapping),
    "logits": ("score", CONST_OUTPUT_HOOK),
}
qwen2_5_classifier_type_to_dimension_mapping: Mapping = dict(qwen2_5_type_to_dimension_mapping)


def create_qwen2_5(
    name: str = "Qwen/Qwen2.5-3B", cache_dir: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any, Any]:
    """Creates config, tokenizer and causal language model from the given name"""
    return create(name, cache_dir, dtype)
