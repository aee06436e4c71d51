"""The card of Phi-3."""

from __future__ import annotations

from transformers import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3Model

from modelcards.card import Card
from modelcards.overlay import overlay, side_by_side
from modelcards.phi3 import modelings_intervenable_phi3 as declared

card = Card.of(
    declared,
    (Phi3Model, Phi3ForCausalLM, Phi3ForSequenceClassification),
    overlay(fused="qkv_proj"),
    fused=side_by_side,
)
