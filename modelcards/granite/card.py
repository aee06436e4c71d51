"""The card of Granite."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import GraniteForCausalLM, GraniteModel

from modelcards.card import Card
from modelcards.granite import modelings_intervenable_granite as declared
from modelcards.overlay import overlay

card = Card.of(
    declared,
    (GraniteModel, GraniteForCausalLM),
    overlay(
        attention_contribution=("layers[%s].self_attn.tap_added", CONST_OUTPUT_HOOK),
        mlp_contribution=("layers[%s].mlp.tap_added", CONST_OUTPUT_HOOK),
    ),
    own_logits=True,
    residual_multiplier=lambda config: config.residual_multiplier,
)
