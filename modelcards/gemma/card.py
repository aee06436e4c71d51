"""The card of Gemma."""

from __future__ import annotations

from transformers import GemmaForCausalLM, GemmaForSequenceClassification, GemmaModel

from modelcards.card import Card
from modelcards.gemma import modelings_intervenable_gemma as declared
from modelcards.overlay import overlay

card = Card.of(
    declared,
    (GemmaModel, GemmaForCausalLM, GemmaForSequenceClassification),
    overlay(),
)
