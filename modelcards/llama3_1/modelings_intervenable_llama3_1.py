"""Llama 3.1 for pyvene: where each component lives, for the bare, language-model and classifier classes."""

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

llama3_1_type_to_module_mapping: Mapping = dict(rotary_decoder_type_to_module_mapping)
llama3_1_type_to_dimension_mapping: Mapping = dict(rotary_decoder_type_to_dimension_mapping)

"""Llama 3.1 with language-model head"""
llama3_1_lm_type_to_module_mapping: Mapping = {
    **within("model", llama3_1_type_to_module_mapping),
    "logits": ("lm_head", CONST_OUTPUT_HOOK),
}
llama3_1_lm_type_to_dimension_mapping: Mapping = dict(llama3_1_type_to_dimension_mapping)

"""Llama 3.1 with classifier head: logits at every position, of which the model returns the last real one's"""
llama3_1_classifier_type_to_module_mapping: Mapping = {
    **within("model", llama3_1_type_to_module_mapping),
    "logits": ("score", CONST_OUTPUT_HOOK),
}
llama3_1_classifier_type_to_dimension_mapping: Mapping = dict(llama3_1_type_to_dimension_mapping)


def create_llama3_1(
    name: str = "meta-llama/Llama-3.1-8B", cache_dir: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any, Any]:
    """Creates config, tokenizer and causal language model from the given name"""
    return create(name, cache_dir, dtype)
