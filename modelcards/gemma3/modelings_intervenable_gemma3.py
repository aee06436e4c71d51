"""Gemma 3 (text) for pyvene: Gemma 2's norms around attention and MLP, a norm on queries and keys, no soft-cap of scores."""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel

from modelcards.card import Card
from modelcards.gemma2.modelings_intervenable_gemma2 import post_norm_scale
from modelcards.template import decoder, widths

card = Card.of(
    "gemma3",
    "gemma3_text",
    (Gemma3TextModel, Gemma3ForCausalLM, Gemma3TextForSequenceClassification),
    decoder(
        resid_mid=("layers[%s].pre_feedforward_layernorm", CONST_INPUT_HOOK),
        attention_contribution=("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
        mlp_contribution=("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
    ),
    widths(),
    checkpoint="google/gemma-3-1b-pt",
    own_logits=True,
    post_norm_scale=post_norm_scale,
)
