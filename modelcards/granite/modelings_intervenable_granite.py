"""Granite for pyvene.

What attention and MLP put out is multiplied before it is added to the residual stream, embeddings before they enter the first
block, and logits are divided, all in the models' own forward.
"""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from transformers import GraniteForCausalLM, GraniteModel

from modelcards.card import Card
from modelcards.template import decoder, widths

card = Card.of(
    "granite",
    "granite",
    (GraniteModel, GraniteForCausalLM),
    decoder(
        embeddings=("layers[0]", CONST_INPUT_HOOK),
        attention_contribution=("layers[%s].self_attn.tap_added", CONST_OUTPUT_HOOK),
        mlp_contribution=("layers[%s].mlp.tap_added", CONST_OUTPUT_HOOK),
    ),
    widths(d_head=()),
    checkpoint="ibm-granite/granite-3.3-8b-base",
    own_logits=True,
    residual_multiplier=lambda config: config.residual_multiplier,
)
