"""Mistral for pyvene: the rotary decoder as it is."""

from __future__ import annotations

from transformers import MistralForCausalLM, MistralForSequenceClassification, MistralModel

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "mistral",
    "mistral",
    (MistralModel, MistralForCausalLM, MistralForSequenceClassification),
    decoder(),
    widths(),
    checkpoint="mistralai/Mistral-7B-v0.3",
)
