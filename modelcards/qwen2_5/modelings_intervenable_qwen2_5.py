"""Qwen2.5 and Qwen2 for pyvene: the rotary decoder, with biases on queries, keys and values."""

from __future__ import annotations

from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model

from modelcards.card import Card
from modelcards.template import decoder, widths

# The config has no head_dim that pyvene could name.
card = Card.of(
    "qwen2_5",
    "qwen2",
    (Qwen2Model, Qwen2ForCausalLM, Qwen2ForSequenceClassification),
    decoder(),
    widths(d_head=()),
    checkpoint="Qwen/Qwen2.5-3B",
)
