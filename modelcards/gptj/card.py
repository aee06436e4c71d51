"""The card of GPT-J."""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK
from transformers import GPTJForCausalLM, GPTJForSequenceClassification, GPTJModel

from modelcards.card import Card
from modelcards.gptj import modelings_intervenable_gptj as declared
from modelcards.overlay import ATTENTION_INSIDE, PARALLEL, WRITTEN_OUT, overlay

card = Card.of(
    declared,
    (GPTJModel, GPTJForCausalLM, GPTJForSequenceClassification),
    overlay(*ATTENTION_INSIDE, blocks="h", attention="attn", attention_input=("h[%s].attn", CONST_INPUT_HOOK)),
    absent={**PARALLEL, **WRITTEN_OUT},
)
