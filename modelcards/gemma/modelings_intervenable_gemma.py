"""Gemma for pyvene: the rotary decoder; embeddings are scaled inside `embed_tokens`."""

from __future__ import annotations

from transformers import GemmaForCausalLM, GemmaForSequenceClassification, GemmaModel

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "gemma",
    "gemma",
    (GemmaModel, GemmaForCausalLM, GemmaForSequenceClassification),
    decoder(),
    widths(),
    checkpoint="google/gemma-2b",
)
