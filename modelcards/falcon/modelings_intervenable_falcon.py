"""Falcon for pyvene, as in falcon-7b.

Attention and MLP of a block read the same normed stream and are added to it together. All queries and the one key and value are
made side by side. Attention is written out in the model, so that nothing inside it can be seen.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import FalconForCausalLM, FalconForSequenceClassification, FalconModel

from modelcards.card import Card
from modelcards.template import ATTENTION_INSIDE, BY_HEAD, PARALLEL, WRITTEN_OUT, decoder, side_by_side, widths

Z = "h[%s].self_attention.dense"
card = Card.of(
    "falcon",
    "falcon",
    (FalconModel, FalconForCausalLM, FalconForSequenceClassification),
    decoder(
        "resid_mid",
        "mlp_gate",
        *ATTENTION_INSIDE,
        blocks="h",
        attention="self_attention",
        fused="h[%s].self_attention.query_key_value",
        embeddings=("word_embeddings", CONST_OUTPUT_HOOK),
        attention_value_output=(Z, CONST_INPUT_HOOK),
        head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
        mlp_up=("h[%s].mlp.dense_h_to_4h", CONST_OUTPUT_HOOK),
        mlp_activation=("h[%s].mlp.act", CONST_OUTPUT_HOOK),
        mlp_neurons=("h[%s].mlp.dense_4h_to_h", CONST_INPUT_HOOK),
        final_norm=("ln_f", CONST_OUTPUT_HOOK),
    ),
    widths(
        d_mlp=("ffn_hidden_size",),
        d_head=("hidden_size/num_attention_heads",),
        n_kv_head="1",
    ),
    prefix="transformer",
    checkpoint="tiiuae/falcon-7b",
    fused=side_by_side,
    absent={**PARALLEL, **WRITTEN_OUT},
    covers=lambda config: config.parallel_attn and config.multi_query and not config.new_decoder_architecture,
    covered="parallel_attn and multi_query, and no new_decoder_architecture (falcon-7b)",
)
