"""The card of OLMo 2."""

from __future__ import annotations

from typing import Any

from pyvene.models.constants import CONST_INPUT_HOOK
from torch import Tensor
from transformers import Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model

from modelcards.card import Card
from modelcards.olmo2 import modelings_intervenable_olmo2 as declared
from modelcards.overlay import overlay


def post_norm_scale(norm: Any, x: Tensor) -> Tensor:
    """Return weight / rms(x), by which the post-norm multiplies `x` (`batch pos d_model`) elementwise."""
    rms = x.float().pow(2).mean(-1, keepdim=True).add(norm.variance_epsilon).sqrt()
    return (norm.weight.float() / rms).to(x.dtype)


card = Card.of(
    declared,
    (Olmo2Model, Olmo2ForCausalLM, Olmo2ForSequenceClassification),
    overlay(
        attention_input=("layers[%s].self_attn", CONST_INPUT_HOOK),
        mlp_input=("layers[%s].mlp", CONST_INPUT_HOOK),
    ),
    post_norm_scale=post_norm_scale,
)
