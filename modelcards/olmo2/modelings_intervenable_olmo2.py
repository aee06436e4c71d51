"""OLMo 2 for pyvene.

Attention and MLP read the residual stream as it is; what they put out is normed before it is added. Queries and keys are normed
over all heads at once, between projection and RoPE.
"""

from __future__ import annotations

from typing import Any

from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from torch import Tensor
from transformers import Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model

from modelcards.card import Card
from modelcards.template import decoder, widths


def post_norm_scale(norm: Any, x: Tensor) -> Tensor:
    """weight / rms(x): what the post-norm multiplies `x` (`batch pos d_model`) with, elementwise."""
    rms = x.float().pow(2).mean(-1, keepdim=True).add(norm.variance_epsilon).sqrt()
    return (norm.weight.float() / rms).to(x.dtype)


card = Card.of(
    "olmo2",
    "olmo2",
    (Olmo2Model, Olmo2ForCausalLM, Olmo2ForSequenceClassification),
    decoder(
        resid_mid=("layers[%s].mlp", CONST_INPUT_HOOK),
        attention_contribution=("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
        mlp_contribution=("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
    ),
    widths(d_head=()),
    checkpoint="allenai/OLMo-2-1124-7B",
    post_norm_scale=post_norm_scale,
)
