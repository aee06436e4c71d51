"""The card of Starcoder2."""

from __future__ import annotations

from transformers import Starcoder2ForCausalLM, Starcoder2ForSequenceClassification, Starcoder2Model

from modelcards.card import Card
from modelcards.overlay import overlay
from modelcards.starcoder2 import modelings_intervenable_starcoder2 as declared

card = Card.of(
    declared,
    (Starcoder2Model, Starcoder2ForCausalLM, Starcoder2ForSequenceClassification),
    overlay(),
)
