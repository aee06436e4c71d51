"""The card of SmolLM3."""

from __future__ import annotations

from transformers import SmolLM3ForCausalLM, SmolLM3ForSequenceClassification, SmolLM3Model

from modelcards.card import Card
from modelcards.overlay import overlay
from modelcards.smollm3 import modelings_intervenable_smollm3 as declared

card = Card.of(
    declared,
    (SmolLM3Model, SmolLM3ForCausalLM, SmolLM3ForSequenceClassification),
    overlay(),
)
