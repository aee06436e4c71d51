"""OPT: learnt positions.

A block has no MLP module: two projections follow each other, and see tokens without their batch, so that plain pyvene reaches
nothing between them. Queries are scaled, not scores.
"""

from __future__ import annotations

import torch
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK

from ..template import BY_HEAD, MLP_INSIDE, decoder, load, widths, with_head, within

Z = "layers[%s].self_attn.out_proj"
opt_type_to_module_mapping = within(
    "decoder",
    decoder(
        "resid_mid",
        "mlp_contribution",
        "mlp_input",
        *MLP_INSIDE,
        "mlp_output",
        embeddings=("layers[0]", CONST_INPUT_HOOK),
        attention_value_output=(Z, CONST_INPUT_HOOK),
        head_attention_value_output=(Z, CONST_INPUT_HOOK, BY_HEAD),
        final_norm=("final_layer_norm", CONST_OUTPUT_HOOK),
    ),
)
opt_type_to_dimension_mapping = widths(
    opt_type_to_module_mapping,
    d_head=("hidden_size/num_attention_heads",),
    d_heads=("hidden_size",),
    n_kv_head="num_attention_heads",
    d_kv_heads=("hidden_size",),
)

opt_lm_type_to_module_mapping = with_head("model", opt_type_to_module_mapping, "lm_head")
opt_lm_type_to_dimension_mapping = opt_type_to_dimension_mapping

opt_classifier_type_to_module_mapping = with_head("model", opt_type_to_module_mapping, "score")
opt_classifier_type_to_dimension_mapping = opt_type_to_dimension_mapping


def create_opt(name="facebook/opt-1.3b", cache_dir=None, dtype=torch.bfloat16):
    """Load a causal language model: (config, tokenizer, model)."""
    from transformers import OPTForCausalLM

    return load(OPTForCausalLM, name, cache_dir, dtype)
