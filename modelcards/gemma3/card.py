"""The card of Gemma 3 (text)."""

from __future__ import annotations

from transformers import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel

from modelcards.card import Card
from modelcards.gemma2.card import post_norm_scale
from modelcards.gemma3 import modelings_intervenable_gemma3 as declared
from modelcards.overlay import overlay

card = Card.of(
    declared,
    (Gemma3TextModel, Gemma3ForCausalLM, Gemma3TextForSequenceClassification),
    overlay(),
    own_logits=True,
    post_norm_scale=post_norm_scale,
)
