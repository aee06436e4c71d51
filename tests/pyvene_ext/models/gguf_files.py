"""GGUF files of tiny random models, written the way llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer

TEXTS = ["When Lisa and Mark went to the store , Mark gave the book to"]
TOKENIZER = bpe_tokenizer(TEXTS, 300)
_SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_of(family: str, **changes: Any) -> Any:
    """A family's tiny model with large random weights, so that everything matters."""
    torch.manual_seed(0)
    gemma = {**_GROUPED, "head_dim": 24, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-6, **changes}
    windows = {"sliding_window": 4, "layer_types": None}
    match family:
        case "llama":
            rope = {"rope_type": "default", "rope_theta": 2e4}
            model: Any = LlamaForCausalLM(LlamaConfig(**{**_GROUPED, "rope_parameters": rope, **changes}))
        case "qwen2":
            model = Qwen2ForCausalLM(
                Qwen2Config(**{**_GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
            )
        case "gemma2":
            caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
            model = Gemma2ForCausalLM(Gemma2Config(**(gemma | windows | caps)))
        case "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**(gemma | windows | {"num_hidden_layers": 6})))
        case "gpt2":
            sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "vocab_size": len(TOKENIZER)}
            model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        case "starcoder2":
            rope = {"rope_type": "default", "rope_theta": 3e5}
            model = Starcoder2ForCausalLM(Starcoder2Config(**_GROUPED, rope_parameters=rope, sliding_window=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter))
    return model.eval()


def stated_by(family: str, model: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes about a model, without the architecture's name before each key."""
    config = model.config
    if family == "gpt2":
        return {
            "context_length": 1024,
            "embedding_length": 64,
            "feed_forward_length": 256,
            "block_count": 2,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    stated = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    if family == "starcoder2":
        stated |= {"attention.layer_norm_epsilon": config.norm_epsilon}
    else:
        stated |= {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    if family == "llama":
        stated |= {"rope.dimension_count": 16, "vocab_size": config.vocab_size}
    if family.startswith("gemma"):
        stated |= {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 4}
    if family == "gemma2":
        stated |= {key: getattr(config, key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    rope = config.rope_parameters
    if family != "gemma2":
        stated |= {"rope.freq_base": rope.get("full_attention", rope)["rope_theta"]}
    return stated


def write_gguf(
    path: Path,
    family: str,
    model: Any,
    *,
    stated: dict[str, Any] | None = None,
    words: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    quantise: bool = False,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
) -> Path:
    """Write a model as llama.cpp's converter does.

    Args:
        stated: what to state otherwise or beside `stated_by`; None leaves a key out.
        words: the same of the tokenizer.
        tensors: tensors to write otherwise or beside the model's.
        quantise: store the matrices in eight bits.
    """
    writer = gguf.GGUFWriter(path, family)
    _add(writer, {f"{family}.{key}": value for key, value in (stated_by(family, model) | (stated or {})).items()})
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].get)
    spoken = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": vocabulary,
        "token_type": [3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary],
        "merges": [" ".join(pair) for pair in bpe["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 3,
        "padding_token_id": 0,
    }
    _add(writer, {f"tokenizer.ggml.{key}": value for key, value in (spoken | (words or {})).items()})
    for name, array in (tensors_of(family, model) | (tensors or {})).items():
        if array is None:
            continue
        if quantise and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    for key, value in values.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)


def tensors_of(family: str, model: Any) -> dict[str, np.ndarray]:
    """A model's weights by llama.cpp's names, in its layout."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {}
    for key, parameter in model.named_parameters():
        array = parameter.detach().numpy().copy()
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name, key
        if family == "llama" and (".attn_q." in name or ".attn_k." in name):  # rotary halves are interleaved
            heads = model.config.num_attention_heads if ".attn_q." in name else model.config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array += 1
        if family == "gpt2" and array.ndim == 2 and ".h." in key:  # Conv1D stores the transpose
            array = array.T.copy()
        found[name] = array
    return found
