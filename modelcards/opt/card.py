"""The card of OPT."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import OPTForCausalLM, OPTForSequenceClassification, OPTModel

from modelcards.card import Card
from modelcards.opt import modelings_intervenable_opt as declared
from modelcards.overlay import overlay
from modelcards.template import within

card = Card.of(
    declared,
    (OPTModel, OPTForCausalLM, OPTForSequenceClassification),
    within(
        "decoder",
        overlay(
            resid_mid=("layers[%s].final_layer_norm.tap_rows_in", CONST_OUTPUT_HOOK),
            mlp_input=("layers[%s].fc1.tap_rows_in", CONST_OUTPUT_HOOK),
            mlp_up=("layers[%s].fc1.tap_rows_out", CONST_OUTPUT_HOOK),
            mlp_activation=("layers[%s].activation_fn.tap_rows_out", CONST_OUTPUT_HOOK),
            mlp_neurons=("layers[%s].fc2.tap_rows_in", CONST_OUTPUT_HOOK),
            mlp_output=("layers[%s].fc2.tap_rows_out", CONST_OUTPUT_HOOK),
            mlp_contribution=("layers[%s].fc2.tap_rows_out", CONST_OUTPUT_HOOK),
        ),
    ),
    overlay_widths=dict.fromkeys(("mlp_up", "mlp_activation", "mlp_neurons"), ("ffn_dim",)),
    covers=lambda config: config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size,
    covered="do_layer_norm_before=True and word_embed_proj_dim equal to hidden_size (all but opt-350m)",
)
