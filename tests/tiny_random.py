"""Tiny random models, one per family, with awkward shapes on purpose.

`FAMILIES` are those on which everything is tested. `MORE_FAMILIES` share most of their code with them and have tests of their
own: `tests/modelcards` proves their cards, `tests/pyvene_ext/test_every_family.py` what is built on these. `make test` takes
`CORE_FAMILIES`, one of each way to build a block; `make test-all` takes the rest, which `tests/conftest.py` marks `families`.

head_dim x heads differs from the hidden size wherever the family allows it, key/value heads are grouped (one of them in
Gemma 2), sizes are odd or not powers of two, windows are shorter than the prompts.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2Model,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

VOCAB = 61
PAD = 0

CLASSES: dict[str, dict[str, type[PreTrainedModel]]] = {
    "qwen2_5": {
        "causal_lm": Qwen2ForCausalLM,
        "bare": Qwen2Model,
        "classifier": Qwen2ForSequenceClassification,
    },
    "gemma2": {
        "causal_lm": Gemma2ForCausalLM,
        "bare": Gemma2Model,
        "classifier": Gemma2ForSequenceClassification,
    },
    "llama3_1": {
        "causal_lm": LlamaForCausalLM,
        "bare": LlamaModel,
        "classifier": LlamaForSequenceClassification,
    },
    "mistral": {
        "causal_lm": MistralForCausalLM,
        "bare": MistralModel,
        "classifier": MistralForSequenceClassification,
    },
    "gpt2": {"causal_lm": GPT2LMHeadModel, "bare": GPT2Model, "classifier": GPT2ForSequenceClassification},
}
FAMILIES = tuple(CLASSES)

_GROUPED = {
    "hidden_size": 42,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 53,
}
_WHOLE = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 53}  # heads x head size is the hidden size
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
# The bare class (the others are named after it unless they are given), and the config's values beside the common ones.
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Model", {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "gemma": ("GemmaModel", {**_GROUPED, "num_key_value_heads": 1}),
    "gemma3": (
        "Gemma3TextModel",
        {
            **_GROUPED,
            "query_pre_attn_scalar": 11,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3Model", {**_GROUPED, "sliding_window": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "ministral": ("MinistralModel", {**_GROUPED, "sliding_window": 4}),
    "olmo2": ("Olmo2Model", {**_GROUPED, "attention_bias": True, "bos_token_id": 1, "eos_token_id": 2}),
    "granite": (
        "GraniteModel",
        {
            **_GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.7,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.5,
        },
    ),
    "smollm3": ("SmolLM3Model", {**_GROUPED, "no_rope_layers": [1, 0], "bos_token_id": 1, "eos_token_id": 2}),
    "cohere": (
        "CohereModel",
        {**_GROUPED, "logit_scale": 0.6, "use_qk_norm": True, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "stablelm": (
        "StableLmModel",
        {
            **_WHOLE,
            "num_key_value_heads": 2,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "starcoder2": ("Starcoder2Model", {**_GROUPED, "sliding_window": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXModel", {**_WHOLE, "bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": (
        "MixtralModel",
        {
            **_GROUPED,
            **_EXPERTS,
            "hidden_size": 44,
            "intermediate_size": 52,
            "num_local_experts": 5,
            "sliding_window": 4,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeModel",
        {
            **_GROUPED,
            **_EXPERTS,
            "hidden_size": 44,
            "num_experts": 5,
            "moe_intermediate_size": 20,
            "norm_topk_prob": False,
        },
    ),
    "gptj": ("GPTJModel", {"n_embd": 40, "n_head": 5, "n_layer": 2, "n_inner": 49, "rotary_dim": 4, "n_positions": 64}),
    "opt": (
        "OPTModel",
        {
            "hidden_size": 42,
            "word_embed_proj_dim": 42,
            "num_attention_heads": 6,
            "ffn_dim": 53,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon": (
        "FalconModel",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "ffn_hidden_size": 53,
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": ("BloomModel", {"hidden_size": 42, "n_head": 6, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2}),
}
_OWN_CLASSES = {"gemma3": {"causal_lm": "Gemma3ForCausalLM", "classifier": "Gemma3TextForSequenceClassification"}}
MORE_FAMILIES = tuple(_MORE)
# Attention and MLP side by side, experts, attention written out, learned positions with an offset.
CORE_FAMILIES = (*FAMILIES, "cohere", "mixtral", "bloom", "opt")
# Two that share least: norms before and after a block or before it only, gates, biases, heads in groups or fused.
UNLIKE = ("gemma2", "gpt2")
# Of one architecture; they differ in biases, windows and the form of rotary positions.
ALIKE = ("qwen2_5", "llama3_1", "mistral")
# For what does not depend on the family, or what another test holds on each: `make test` takes one of UNLIKE.
FEWER = [pytest.param(family, marks=pytest.mark.fewer) for family in FAMILIES]
for _family, (_bare, _) in _MORE.items():
    _named = {
        cls: _bare.removesuffix("Model") + end
        for cls, end in (("causal_lm", "ForCausalLM"), ("classifier", "ForSequenceClassification"))
    }
    _named |= _OWN_CLASSES.get(_family, {})
    CLASSES[_family] = {
        cls: getattr(transformers, name)
        for cls, name in {"bare": _bare, **_named}.items()
        if hasattr(transformers, name)
    }


def tiny_config(family: str) -> PreTrainedConfig:
    """A config of `family` with 3 layers (2 of `MORE_FAMILIES`) and shapes that hide no mistake."""
    if family in _MORE:
        more = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": 3, **_MORE[family][1]}
        if "n_layer" not in more:
            more |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
        return CLASSES[family]["bare"].config_class(**more)
    common = {"vocab_size": VOCAB, "num_hidden_layers": 3, "pad_token_id": PAD, "num_labels": 3}
    match family:
        case "qwen2_5":  # Qwen 2.5 has no head_dim in its config; sliding window on the last layer only
            return Qwen2Config(
                **common,
                hidden_size=42,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=10,
                intermediate_size=53,
                use_sliding_window=True,
                sliding_window=5,
                max_window_layers=2,
                max_position_embeddings=64,
            )
        case "gemma2":
            return Gemma2Config(
                **common,
                hidden_size=36,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=14,
                query_pre_attn_scalar=11,
                intermediate_size=47,
                sliding_window=4,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                max_position_embeddings=64,
            )
        case "llama3_1":
            return LlamaConfig(
                **common,
                hidden_size=42,
                num_attention_heads=6,
                num_key_value_heads=3,
                head_dim=12,
                intermediate_size=51,
                attention_bias=True,
                mlp_bias=True,
                max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            )
        case "mistral":
            return MistralConfig(
                **common,
                hidden_size=44,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=6,
                intermediate_size=37,
                sliding_window=4,
                max_position_embeddings=64,
            )
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCAB,
                n_layer=3,
                n_head=5,
                n_embd=35,
                n_inner=49,
                n_positions=64,
                pad_token_id=PAD,
                bos_token_id=1,
                eos_token_id=2,
                num_labels=3,
                attn_pdrop=0.1,
                resid_pdrop=0.1,
                embd_pdrop=0.1,
            )
    raise ValueError(f"no tiny model for the family {family!r}")


def random_model(
    family: str, cls: str = "causal_lm", attn_implementation: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """A float32 model in eval mode with weights, biases and norm scales all away from their defaults."""
    model, drawn = _built(family, cls, attn_implementation, seed)
    torch.set_rng_state(drawn)  # as if the weights had been drawn again
    return deepcopy(model)


@cache
def _built(family: str, cls: str, attn_implementation: str | None, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    config = tiny_config(family)
    config._attn_implementation = attn_implementation
    torch.manual_seed(seed)
    model = CLASSES[family][cls](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights and biases start at constants that would hide a forgotten scale or bias.
            scale = 0.2 if parameter.ndim == 1 else 0.25
            parameter.add_(scale * torch.randn_like(parameter)) if "norm" in name or "ln_" in name else (
                parameter.copy_(scale * torch.randn_like(parameter))
            )
    return model.eval(), torch.get_rng_state()


def random_inputs(lengths: tuple[int, ...] = (9, 6, 7), padding_side: str = "left", seed: int = 0) -> dict:
    """A padded batch with position ids counted from each prompt's first real token."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(longest - length, None) if padding_side == "left" else slice(0, length)
        ids[row, columns] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, columns] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
