"""The card of Ministral."""

from __future__ import annotations

from transformers import MinistralForCausalLM, MinistralForSequenceClassification, MinistralModel

from modelcards.card import Card
from modelcards.ministral import modelings_intervenable_ministral as declared
from modelcards.overlay import overlay

card = Card.of(
    declared,
    (MinistralModel, MinistralForCausalLM, MinistralForSequenceClassification),
    overlay(),
)
