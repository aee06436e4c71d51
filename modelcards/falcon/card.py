"""The card of Falcon."""

from __future__ import annotations

from pyvene.models.constants import CONST_INPUT_HOOK
from transformers import FalconForCausalLM, FalconForSequenceClassification, FalconModel

from modelcards.card import Card
from modelcards.falcon import modelings_intervenable_falcon as declared
from modelcards.overlay import ATTENTION_INSIDE, PARALLEL, WRITTEN_OUT, overlay, side_by_side

card = Card.of(
    declared,
    (FalconModel, FalconForCausalLM, FalconForSequenceClassification),
    overlay(
        *ATTENTION_INSIDE,
        blocks="h",
        attention="self_attention",
        fused="query_key_value",
        attention_input=("h[%s].self_attention", CONST_INPUT_HOOK),
    ),
    fused=side_by_side,
    absent={**PARALLEL, **WRITTEN_OUT},
    covers=lambda config: config.parallel_attn and config.multi_query and not config.new_decoder_architecture,
    covered="parallel_attn and multi_query, and no new_decoder_architecture (falcon-7b)",
)
