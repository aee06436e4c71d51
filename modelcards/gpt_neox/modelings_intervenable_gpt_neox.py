"""GPT-NeoX (Pythia) for pyvene.

Attention and MLP of a block read the same stream, each through its own norm, and are added to it together. One projection makes
each head's query, key and value.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel

from modelcards.card import Card
from modelcards.template import BY_HEAD, PARALLEL, decoder, head_by_head, widths

card = Card.of(
    "gpt_neox",
    "gpt_neox",
    (GPTNeoXModel, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification),
    decoder(
        "resid_mid",
        "mlp_gate",
        attention="attention",
        fused="layers[%s].attention.query_key_value",
        embeddings=("emb_dropout", CONST_OUTPUT_HOOK),
        attention_value_output=("layers[%s].attention.dense", CONST_INPUT_HOOK),
        head_attention_value_output=("layers[%s].attention.dense", CONST_INPUT_HOOK, BY_HEAD),
        mlp_up=("layers[%s].mlp.dense_h_to_4h", CONST_OUTPUT_HOOK),
        mlp_activation=("layers[%s].mlp.act", CONST_OUTPUT_HOOK),
        mlp_neurons=("layers[%s].mlp.dense_4h_to_h", CONST_INPUT_HOOK),
        final_norm=("final_layer_norm", CONST_OUTPUT_HOOK),
    ),
    widths(d_head=("hidden_size/num_attention_heads",), n_kv_head="num_attention_heads"),
    prefix="gpt_neox",
    checkpoint="EleutherAI/pythia-1.4b",
    fused=head_by_head,
    absent=PARALLEL,
    covers=lambda config: config.use_parallel_residual,
    covered="use_parallel_residual=True",
)
