"""Qwen3-MoE for pyvene: Qwen3 with experts for an MLP, a few of which a router chooses for each token."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification, Qwen3MoeModel

from modelcards.card import Card
from modelcards.template import BY_EXPERT, EXPERTS, MLP_INSIDE, decoder, widths

card = Card.of(
    "qwen3_moe",
    "qwen3_moe",
    (Qwen3MoeModel, Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification),
    decoder(
        *MLP_INSIDE,
        router_logits=("layers[%s].mlp.gate.tap_router", CONST_OUTPUT_HOOK),
        expert_contribution=("layers[%s].mlp.experts.tap_experts", CONST_OUTPUT_HOOK, BY_EXPERT),
    ),
    widths(d_mlp=(), n_expert=("num_experts",), expert_contribution=("hidden_size",)),
    checkpoint="Qwen/Qwen3-30B-A3B",
    absent=EXPERTS,
)
