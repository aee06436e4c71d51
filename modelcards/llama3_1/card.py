"""The card of Llama 3.1 (and 2, 3, 3.2, 3.3)."""

from __future__ import annotations

from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from modelcards.card import Card
from modelcards.llama3_1 import modelings_intervenable_llama3_1 as declared
from modelcards.overlay import overlay

card = Card.of(
    declared,
    (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification),
    overlay(),
)
