"""StableLM for pyvene: the rotary decoder, of which a part of each head is rotated."""

from __future__ import annotations

from transformers import StableLmForCausalLM, StableLmForSequenceClassification, StableLmModel

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "stablelm",
    "stablelm",
    (StableLmModel, StableLmForCausalLM, StableLmForSequenceClassification),
    decoder(),
    widths(d_head=("hidden_size/num_attention_heads",)),
    checkpoint="stabilityai/stablelm-2-1_6b",
    covers=lambda config: not config.use_parallel_residual,
    covered="use_parallel_residual=False",
)
