"""Mixtral for pyvene: the rotary decoder with experts for an MLP, a few of which a router chooses for each token."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel

from modelcards.card import Card
from modelcards.template import BY_EXPERT, EXPERTS, MLP_INSIDE, decoder, widths

card = Card.of(
    "mixtral",
    "mixtral",
    (MixtralModel, MixtralForCausalLM, MixtralForSequenceClassification),
    decoder(
        *MLP_INSIDE,
        router_logits=("layers[%s].mlp.gate.tap_router", CONST_OUTPUT_HOOK),
        expert_contribution=("layers[%s].mlp.experts.tap_experts", CONST_OUTPUT_HOOK, BY_EXPERT),
    ),
    widths(d_mlp=(), n_expert=("num_local_experts",), expert_contribution=("hidden_size",)),
    checkpoint="mistralai/Mixtral-8x7B-v0.1",
    absent=EXPERTS,
)
