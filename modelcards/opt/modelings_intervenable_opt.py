"""OPT for pyvene.

A block has no MLP module: two projections follow each other, and see tokens without their batch. Queries are scaled, not scores.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import OPTForCausalLM, OPTForSequenceClassification, OPTModel

from modelcards.card import Card
from modelcards.template import BY_HEAD, decoder, widths, within

Z = "layers[%s].self_attn.out_proj"
card = Card.of(
    "opt",
    "opt",
    (OPTModel, OPTForCausalLM, OPTForSequenceClassification),
    within(
        "decoder",
        decoder(
            "mlp_gate",
            embeddings=("layers[0]", CONST_INPUT_HOOK),
            resid_mid=("layers[%s].final_layer_norm.tap_rows_in", CONST_OUTPUT_HOOK),
            attention_value_output=(Z, CONST_INPUT_HOOK),
            head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
            mlp_input=("layers[%s].fc1.tap_rows_in", CONST_OUTPUT_HOOK),
            mlp_up=("layers[%s].fc1.tap_rows_out", CONST_OUTPUT_HOOK),
            mlp_activation=("layers[%s].activation_fn.tap_rows_out", CONST_OUTPUT_HOOK),
            mlp_neurons=("layers[%s].fc2.tap_rows_in", CONST_OUTPUT_HOOK),
            mlp_output=("layers[%s].fc2.tap_rows_out", CONST_OUTPUT_HOOK),
            mlp_contribution=("layers[%s].fc2.tap_rows_out", CONST_OUTPUT_HOOK),
            final_norm=("final_layer_norm", CONST_OUTPUT_HOOK),
        ),
    ),
    widths(d_mlp=("ffn_dim",), d_head=("hidden_size/num_attention_heads",), n_kv_head="num_attention_heads"),
    checkpoint="facebook/opt-1.3b",
    covers=lambda config: config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size,
    covered="do_layer_norm_before=True and word_embed_proj_dim equal to hidden_size (all but opt-350m)",
)
