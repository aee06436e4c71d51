"""Phi-3 for pyvene: the rotary decoder, queries, keys and values from one projection, gate and up from another."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3Model

from modelcards.card import Card
from modelcards.template import decoder, first_of_two, second_of_two, side_by_side, widths

card = Card.of(
    "phi3",
    "phi3",
    (Phi3Model, Phi3ForCausalLM, Phi3ForSequenceClassification),
    decoder(
        fused="layers[%s].self_attn.qkv_proj",
        mlp_gate=("layers[%s].mlp.gate_up_proj", CONST_OUTPUT_HOOK, (first_of_two, 2)),
        mlp_up=("layers[%s].mlp.gate_up_proj", CONST_OUTPUT_HOOK, (second_of_two, 2)),
        mlp_activation=("layers[%s].mlp.activation_fn", CONST_OUTPUT_HOOK),
    ),
    widths(d_head=()),
    checkpoint="microsoft/Phi-3-mini-4k-instruct",
    fused=side_by_side,
)
