"""The card of Cohere."""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK
from transformers import CohereForCausalLM, CohereModel

from modelcards.card import Card
from modelcards.cohere import modelings_intervenable_cohere as declared
from modelcards.overlay import PARALLEL, overlay

card = Card.of(
    declared,
    (CohereModel, CohereForCausalLM),
    overlay(attention_input=("layers[%s].self_attn", CONST_INPUT_HOOK)),
    own_logits=True,
    absent=PARALLEL,
)
