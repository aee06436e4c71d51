"""The card of Mixtral."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel

from modelcards.card import Card
from modelcards.mixtral import modelings_intervenable_mixtral as declared
from modelcards.overlay import BY_EXPERT, EXPERTS, overlay

card = Card.of(
    declared,
    (MixtralModel, MixtralForCausalLM, MixtralForSequenceClassification),
    overlay(
        router_logits=("layers[%s].mlp.gate.tap_router", CONST_OUTPUT_HOOK),
        expert_contribution=("layers[%s].mlp.experts.tap_experts", CONST_OUTPUT_HOOK, BY_EXPERT),
    ),
    overlay_widths={"n_expert": ("num_local_experts",)},
    absent=EXPERTS,
)
