"""Cohere (Command R) for pyvene.

Attention and MLP of a block read the same normed stream and are added to it together. Logits are scaled in the model's own
forward.
"""

from __future__ import annotations

from transformers import CohereForCausalLM, CohereModel

from modelcards.card import Card
from modelcards.template import PARALLEL, decoder, widths

card = Card.of(
    "cohere",
    "cohere",
    (CohereModel, CohereForCausalLM),
    decoder("resid_mid"),
    widths(d_head=()),
    checkpoint="CohereLabs/c4ai-command-r-v01",
    own_logits=True,
    absent=PARALLEL,
)
