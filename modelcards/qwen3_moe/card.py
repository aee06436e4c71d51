"""The card of Qwen3-MoE."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification, Qwen3MoeModel

from modelcards.card import Card
from modelcards.overlay import BY_EXPERT, EXPERTS, overlay
from modelcards.qwen3_moe import modelings_intervenable_qwen3_moe as declared

card = Card.of(
    declared,
    (Qwen3MoeModel, Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification),
    overlay(
        router_logits=("layers[%s].mlp.gate.tap_router", CONST_OUTPUT_HOOK),
        expert_contribution=("layers[%s].mlp.experts.tap_experts", CONST_OUTPUT_HOOK, BY_EXPERT),
    ),
    overlay_widths={"n_expert": ("num_experts",)},
    absent=EXPERTS,
)
