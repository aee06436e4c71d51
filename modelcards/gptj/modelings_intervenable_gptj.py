"""GPT-J for pyvene.

Attention and MLP of a block read the same normed stream and are added to it together. Attention is written out in the model, so
that nothing inside it can be seen.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import GPTJForCausalLM, GPTJForSequenceClassification, GPTJModel

from modelcards.card import Card
from modelcards.template import ATTENTION_INSIDE, BY_HEAD, PARALLEL, QKV, WRITTEN_OUT, decoder, widths

Z = "h[%s].attn.out_proj"
card = Card.of(
    "gptj",
    "gptj",
    (GPTJModel, GPTJForCausalLM, GPTJForSequenceClassification),
    decoder(
        "resid_mid",
        "mlp_gate",
        *ATTENTION_INSIDE,
        blocks="h",
        attention="attn",
        embeddings=("drop", CONST_OUTPUT_HOOK),
        attention_value_output=(Z, CONST_INPUT_HOOK),
        head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
        mlp_up=("h[%s].mlp.fc_in", CONST_OUTPUT_HOOK),
        mlp_activation=("h[%s].mlp.act", CONST_OUTPUT_HOOK),
        mlp_neurons=("h[%s].mlp.fc_out", CONST_INPUT_HOOK),
        final_norm=("ln_f", CONST_OUTPUT_HOOK),
    ),
    {
        **widths("n_embd", ("n_inner", "n_embd*4"), ("n_embd/n_head",), "n_head", "n_head"),
        **dict.fromkeys((*QKV, "attention_value_output"), ("n_embd",)),
    },
    prefix="transformer",
    checkpoint="EleutherAI/gpt-j-6b",
    absent={**PARALLEL, **WRITTEN_OUT},
)
