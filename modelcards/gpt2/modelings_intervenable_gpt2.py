"""GPT-2 for pyvene.

One fused projection makes query, key and value; there is no rotary embedding and no gate. `embeddings` is the sum of token and
position embeddings.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK, split_three
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from modelcards.card import Card
from modelcards.template import BY_HEAD, QKV, Mapping, widths

places: Mapping = {
    "embeddings": ("drop", CONST_OUTPUT_HOOK),
    "block_input": ("h[%s]", CONST_INPUT_HOOK),
    "resid_mid": ("h[%s].ln_2", CONST_INPUT_HOOK),
    "block_output": ("h[%s]", CONST_OUTPUT_HOOK),
    "attention_contribution": ("h[%s].attn.resid_dropout", CONST_OUTPUT_HOOK),
    "mlp_contribution": ("h[%s].mlp", CONST_OUTPUT_HOOK),
    "head_contribution": ("h[%s].attn.tap_contribution", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_input": ("h[%s].attn", CONST_INPUT_HOOK),
    "query_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 0)),
    "key_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 1)),
    "value_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 2)),
    "head_query_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 0), BY_HEAD),
    "head_key_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 1), BY_HEAD),
    "head_value_output": ("h[%s].attn.c_attn", CONST_OUTPUT_HOOK, (split_three, 2), BY_HEAD),
    "attention_scores": ("h[%s].attn.tap_scores", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_pattern": ("h[%s].attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_weight": ("h[%s].attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD),
    "attention_value_output": ("h[%s].attn.c_proj", CONST_INPUT_HOOK),
    "head_attention_value_output": ("h[%s].attn.c_proj", CONST_INPUT_HOOK, BY_HEAD),
    "attention_output": ("h[%s].attn.resid_dropout", CONST_OUTPUT_HOOK),
    "mlp_input": ("h[%s].mlp", CONST_INPUT_HOOK),
    "mlp_up": ("h[%s].mlp.c_fc", CONST_OUTPUT_HOOK),
    "mlp_activation": ("h[%s].mlp.act", CONST_OUTPUT_HOOK),
    "mlp_neurons": ("h[%s].mlp.c_proj", CONST_INPUT_HOOK),
    "mlp_output": ("h[%s].mlp", CONST_OUTPUT_HOOK),
    "final_norm": ("ln_f", CONST_OUTPUT_HOOK),
}
card = Card.of(
    "gpt2",
    "gpt2",
    (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification),
    places,
    {
        **widths("n_embd", ("n_inner", "n_embd*4"), ("n_embd/n_head",), "n_head", "n_head"),
        **dict.fromkeys((*QKV, "attention_value_output"), ("n_embd",)),
    },
    prefix="transformer",
    checkpoint="openai-community/gpt2",
)
