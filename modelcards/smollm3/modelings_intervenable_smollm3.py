"""SmolLM3 for pyvene: the rotary decoder, where every fourth layer does not rotate queries and keys."""

from __future__ import annotations

from transformers import SmolLM3ForCausalLM, SmolLM3ForSequenceClassification, SmolLM3Model

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "smollm3",
    "smollm3",
    (SmolLM3Model, SmolLM3ForCausalLM, SmolLM3ForSequenceClassification),
    decoder(),
    widths(d_head=()),
    checkpoint="HuggingFaceTB/SmolLM3-3B-Base",
)
