"""Gemma 2 for pyvene.

It norms twice around attention and MLP: what they add to the residual stream is the output of the second norm. Its final
logits are soft-capped in the model's forward, so that `lm_head`'s output is not the logits.
"""

from __future__ import annotations

from typing import Any

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from torch import Tensor
from transformers import Gemma2ForCausalLM, Gemma2ForSequenceClassification, Gemma2Model

from modelcards.card import Card
from modelcards.template import decoder, widths


def post_norm_scale(norm: Any, x: Tensor) -> Tensor:
    """g / rms(x): what the post-norm multiplies `x` (`batch pos d_model`) with, elementwise."""
    rms = x.float().pow(2).mean(-1, keepdim=True).add(norm.eps).sqrt()
    return ((1.0 + norm.weight.float()) / rms).to(x.dtype)


card = Card.of(
    "gemma2",
    "gemma2",
    (Gemma2Model, Gemma2ForCausalLM, Gemma2ForSequenceClassification),
    decoder(
        resid_mid=("layers[%s].pre_feedforward_layernorm", CONST_INPUT_HOOK),
        attention_contribution=("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
        mlp_contribution=("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
    ),
    widths(),
    checkpoint="google/gemma-2-2b",
    own_logits=True,
    post_norm_scale=post_norm_scale,
)
