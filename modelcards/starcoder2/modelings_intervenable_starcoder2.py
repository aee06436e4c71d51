"""Starcoder2 for pyvene: the rotary decoder, with an MLP without a gate."""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import Starcoder2ForCausalLM, Starcoder2ForSequenceClassification, Starcoder2Model

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "starcoder2",
    "starcoder2",
    (Starcoder2Model, Starcoder2ForCausalLM, Starcoder2ForSequenceClassification),
    decoder(
        "mlp_gate",
        mlp_up=("layers[%s].mlp.c_fc", CONST_OUTPUT_HOOK),
        mlp_activation=("layers[%s].mlp.act", CONST_OUTPUT_HOOK),
        mlp_neurons=("layers[%s].mlp.c_proj", CONST_INPUT_HOOK),
    ),
    widths(d_head=()),
    checkpoint="bigcode/starcoder2-3b",
)
