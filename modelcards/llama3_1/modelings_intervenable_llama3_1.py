"""Llama 3.1 (and 2, 3, 3.2, 3.3) for pyvene: the rotary decoder as it is."""

from __future__ import annotations

from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "llama3_1",
    "llama",
    (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification),
    decoder(),
    widths(),
    checkpoint="meta-llama/Llama-3.1-8B",
)
