"""The card of Qwen3."""

from __future__ import annotations

from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model

from modelcards.card import Card
from modelcards.overlay import overlay
from modelcards.qwen3 import modelings_intervenable_qwen3 as declared

card = Card.of(
    declared,
    (Qwen3Model, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    overlay(),
)
