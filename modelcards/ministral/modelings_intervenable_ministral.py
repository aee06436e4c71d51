"""Ministral for pyvene: the rotary decoder as it is."""

from __future__ import annotations

from transformers import MinistralForCausalLM, MinistralForSequenceClassification, MinistralModel

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "ministral",
    "ministral",
    (MinistralModel, MinistralForCausalLM, MinistralForSequenceClassification),
    decoder(),
    widths(),
    checkpoint="mistralai/Ministral-8B-Instruct-2410",
)
