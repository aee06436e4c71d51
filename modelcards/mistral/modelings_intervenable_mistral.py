"""Mistral for pyvene: where each component lives, for the bare, language-model and classifier classes."""

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

mistral_type_to_module_mapping: Mapping = dict(rotary_decoder_type_to_module_mapping)
mistral_type_to_dimension_mapping: Mapping = dict(rotary_decoder_type_to_dimension_mapping)

"""Mistral with language-model head"""
mistral_lm_type_to_module_mapping: Mapping = {
    **within("model", mistral_type_to_module_mapping),
    "logits": ("lm_head", CONST_OUTPUT_HOOK),
}
mistral_lm_type_to_dimension_mapping: Mapping = dict(mistral_type_to_dimension_mapping)

"""Mistral with classifier head: logits at every position, of which the model returns the last real one's"""
mistral_classifier_type_to_module_mapping: Mapping = {
    **within("model", mistral_type_to_module_mapping),
    "logits": ("score", CONST_OUTPUT_HOOK),
}
mistral_classifier_type_to_dimension_mapping: Mapping = dict(mistral_type_to_dimension_mapping)


def create_mistral(
    name: str = "mistralai/Mistral-7B-v0.3", cache_dir: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any, Any]:
    """Creates config, tokenizer and causal language model from the given name"""
    return create(name, cache_dir, dtype)
