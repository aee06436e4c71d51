"""The card of GPT-2."""

from __future__ import annotations

from pyvene.models.constants import CONST_OUTPUT_HOOK
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from modelcards.card import Card
from modelcards.gpt2 import modelings_intervenable_gpt2 as declared
from modelcards.overlay import ROTATED, overlay
from modelcards.template import BY_HEAD

card = Card.of(
    declared,
    (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification),
    overlay(
        *ROTATED, blocks="h", attention="attn", attention_weight=("h[%s].attn.tap_pattern", CONST_OUTPUT_HOOK, BY_HEAD)
    ),
    counts_padding=True,
)
