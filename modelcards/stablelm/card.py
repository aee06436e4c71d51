"""The card of StableLM."""

from __future__ import annotations

from transformers import StableLmForCausalLM, StableLmForSequenceClassification, StableLmModel

from modelcards.card import Card
from modelcards.overlay import overlay
from modelcards.stablelm import modelings_intervenable_stablelm as declared

card = Card.of(
    declared,
    (StableLmModel, StableLmForCausalLM, StableLmForSequenceClassification),
    overlay(),
    covers=lambda config: not config.use_parallel_residual,
    covered="use_parallel_residual=False",
)
