"""The card of Qwen2.5 and Qwen2."""

from __future__ import annotations

from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model

from modelcards.card import Card
from modelcards.overlay import overlay
from modelcards.qwen2_5 import modelings_intervenable_qwen2_5 as declared

card = Card.of(
    declared,
    (Qwen2Model, Qwen2ForCausalLM, Qwen2ForSequenceClassification),
    overlay(),
)
