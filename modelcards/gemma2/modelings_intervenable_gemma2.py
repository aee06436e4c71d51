"""Gemma 2 for pyvene: where each component lives, for the bare, language-model and classifier classes.

Gemma 2 norms twice around attention and MLP: what they add to the residual stream is the output of the second norm. Its final
logits are soft-capped in the model's forward, so that `lm_head`'s output is not the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from torch import Tensor

from modelcards.template import (
    Mapping,
    create,
    rotary_decoder_type_to_dimension_mapping,
    rotary_decoder_type_to_module_mapping,
    within,
)

gemma2_type_to_module_mapping: Mapping = {
    **rotary_decoder_type_to_module_mapping,
    "resid_mid": ("layers[%s].pre_feedforward_layernorm", CONST_INPUT_HOOK),
    "attention_contribution": ("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
    "mlp_contribution": ("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
}
gemma2_type_to_dimension_mapping: Mapping = dict(rotary_decoder_type_to_dimension_mapping)

"""Gemma 2 with language-model head"""
gemma2_lm_type_to_module_mapping: Mapping = {
    **within("model", gemma2_type_to_module_mapping),
    "logits": ("tap_logits", CONST_OUTPUT_HOOK),
}
gemma2_lm_type_to_dimension_mapping: Mapping = dict(gemma2_type_to_dimension_mapping)

"""Gemma 2 with classifier head: logits at every position, of which the model returns the last real one's"""
gemma2_classifier_type_to_module_mapping: Mapping = {
    **within("model", gemma2_type_to_module_mapping),
    "logits": ("score", CONST_OUTPUT_HOOK),
}
gemma2_classifier_type_to_dimension_mapping: Mapping = dict(gemma2_type_to_dimension_mapping)


def gemma2_post_norm_scale(norm: Any, x: Tensor) -> Tensor:
    """g / rms(x): what the post-norm multiplies `x` (`batch pos d_model`) with, elementwise."""
    rms = x.float().pow(2).mean(-1, keepdim=True).add(norm.eps).sqrt()
    return ((1.0 + norm.weight.float()) / rms).to(x.dtype)


def create_gemma2(
    name: str = "google/gemma-2-2b", cache_dir: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any, Any]:
    """Creates config, tokenizer and causal language model from the given name"""
    return create(name, cache_dir, dtype)
