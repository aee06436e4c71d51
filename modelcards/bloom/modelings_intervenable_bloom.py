"""BLOOM for pyvene.

Attention sees the distance of a key by a bias (ALiBi), and is written out in the model, so that nothing inside it can be seen.
The modules of attention and MLP add to the residual themselves: what they add is the output of their last projection. One
projection makes each head's query, key and value.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import BloomForCausalLM, BloomForSequenceClassification, BloomModel

from modelcards.card import Card
from modelcards.template import ATTENTION_INSIDE, BY_HEAD, WRITTEN_OUT, decoder, head_by_head, widths

Z = "h[%s].self_attention.dense"
NEURONS = "h[%s].mlp.dense_4h_to_h"
card = Card.of(
    "bloom",
    "bloom",
    (BloomModel, BloomForCausalLM, BloomForSequenceClassification),
    decoder(
        "mlp_gate",
        *ATTENTION_INSIDE,
        blocks="h",
        attention="self_attention",
        fused="h[%s].self_attention.query_key_value",
        embeddings=("word_embeddings_layernorm", CONST_OUTPUT_HOOK),
        attention_contribution=(Z, CONST_OUTPUT_HOOK),
        attention_output=(Z, CONST_OUTPUT_HOOK),
        attention_value_output=(Z, CONST_INPUT_HOOK),
        head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
        mlp_up=("h[%s].mlp.dense_h_to_4h", CONST_OUTPUT_HOOK),
        mlp_activation=("h[%s].mlp.gelu_impl", CONST_OUTPUT_HOOK),
        mlp_neurons=(NEURONS, CONST_INPUT_HOOK),
        mlp_output=(NEURONS, CONST_OUTPUT_HOOK),
        mlp_contribution=(NEURONS, CONST_OUTPUT_HOOK),
        final_norm=("ln_f", CONST_OUTPUT_HOOK),
    ),
    widths(d_mlp=("hidden_size*4",), d_head=("hidden_size/n_head",), n_head="n_head", n_kv_head="n_head"),
    prefix="transformer",
    checkpoint="bigscience/bloom-560m",
    fused=head_by_head,
    absent=WRITTEN_OUT,
    sums_inside=True,
    covers=lambda config: not config.apply_residual_connection_post_layernorm,
    covered="apply_residual_connection_post_layernorm=False",
)
