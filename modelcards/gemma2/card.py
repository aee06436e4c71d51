"""The card of Gemma 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2Model

from modelcards.card import Card
from modelcards.gemma2 import modelings_intervenable_gemma2 as declared
from modelcards.overlay import overlay


def post_norm_scale(norm: Any, x: Tensor) -> Tensor:
    """Return g / rms(x), by which the post-norm multiplies `x` (`batch pos d_model`) elementwise."""
    rms = x.float().pow(2).mean(-1, keepdim=True).add(norm.eps).sqrt()
    return ((1.0 + norm.weight.float()) / rms).to(x.dtype)


card = Card.of(
    declared,
    (Gemma2Model, Gemma2ForCausalLM, Gemma2ForSequenceClassification),
    overlay(),
    own_logits=True,
    post_norm_scale=post_norm_scale,
)
