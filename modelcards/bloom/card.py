"""The card of BLOOM."""

from __future__ import annotations

from transformers import BloomForCausalLM, BloomForSequenceClassification, BloomModel

from modelcards.bloom import modelings_intervenable_bloom as declared
from modelcards.card import Card
from modelcards.overlay import ATTENTION_INSIDE, WRITTEN_OUT, head_by_head, overlay

card = Card.of(
    declared,
    (BloomModel, BloomForCausalLM, BloomForSequenceClassification),
    overlay(*ATTENTION_INSIDE, blocks="h", attention="self_attention", fused="query_key_value"),
    fused=head_by_head,
    absent=WRITTEN_OUT,
    sums_inside=True,
    covers=lambda config: not config.apply_residual_connection_post_layernorm,
    covered="apply_residual_connection_post_layernorm=False",
)
