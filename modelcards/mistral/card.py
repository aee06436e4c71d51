"""The card of Mistral."""

from __future__ import annotations

from transformers import MistralForCausalLM, MistralForSequenceClassification, MistralModel

from modelcards.card import Card
from modelcards.mistral import modelings_intervenable_mistral as declared
from modelcards.overlay import overlay

card = Card.of(
    declared,
    (MistralModel, MistralForCausalLM, MistralForSequenceClassification),
    overlay(),
)
