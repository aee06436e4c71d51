"""OLMo 2: the rotary decoder with norms after attention and MLP instead of before.

Attention and MLP read the residual stream itself. Queries and keys are normed over all heads at once, between projection and
RoPE.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import decoder, load, widths, with_head

olmo2_type_to_module_mapping = decoder(
    "attention_input",
    "mlp_input",
    resid_mid=("layers[%s].mlp", CONST_INPUT_HOOK),
    attention_contribution=("layers[%s].post_attention_layernorm", CONST_OUTPUT_HOOK),
    mlp_contribution=("layers[%s].post_feedforward_layernorm", CONST_OUTPUT_HOOK),
)
olmo2_type_to_dimension_mapping = widths(olmo2_type_to_module_mapping, d_head=())

olmo2_lm_type_to_module_mapping = with_head("model", olmo2_type_to_module_mapping, "lm_head")
olmo2_lm_type_to_dimension_mapping = olmo2_type_to_dimension_mapping

olmo2_classifier_type_to_module_mapping = with_head("model", olmo2_type_to_module_mapping, "score")
olmo2_classifier_type_to_dimension_mapping = olmo2_type_to_dimension_mapping


def create_olmo2(name="allenai/OLMo-2-1124-7B", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import Olmo2ForCausalLM

    return load(Olmo2ForCausalLM, name, cache_dir, dtype)
