"""The card of GPT-NeoX."""

from __future__ import annotations

from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel

from modelcards.card import Card
from modelcards.gpt_neox import modelings_intervenable_gpt_neox as declared
from modelcards.overlay import PARALLEL, head_by_head, overlay

card = Card.of(
    declared,
    (GPTNeoXModel, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification),
    overlay(attention="attention", fused="query_key_value"),
    fused=head_by_head,
    absent=PARALLEL,
    covers=lambda config: config.use_parallel_residual,
    covered="use_parallel_residual=True",
)
