"""Qwen3 for pyvene: the rotary decoder, with a norm on each head's query and key between projection and RoPE."""

from __future__ import annotations

from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "qwen3",
    "qwen3",
    (Qwen3Model, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    decoder(),
    widths(),
    checkpoint="Qwen/Qwen3-4B",
)
