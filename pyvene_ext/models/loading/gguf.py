"""GGUF files: quantised weights in one file, as llama.cpp and related programs use them.

transformers' reader dequantises the weights, which takes from seconds to minutes, so that the result is kept as a folder of
safetensors in the cache, named by the file's checksum. The reader ignores some of what a file states (scaling of RoPE,
soft-caps, how text is split into words) and then silently computes with the defaults of the config's class; here that is set,
compared, or refused.
"""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pyvene_ext.io.files import atomic_folder, cache_folder, parse_json, write_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.io.packages import need
from pyvene_ext.models.loading.checks import check_config, check_type
from pyvene_ext.models.loading.errors import first_line
from pyvene_ext.models.loading.fetch import sha256

FORMAT = 1  # of the cached folders: raised when what is made of a file changes
INSTEAD = "get the model in safetensors"
# What a file states of an architecture and no number depends on, or which the shapes of the weights tell as well.
NO_NUMBERS = {
    "context_length",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
# Ways to split text, by llama.cpp's names (tokenizer.ggml.pre): like GPT-2, like GPT-2 after every single digit, and those where
# a word of the vocabulary is one token, which also put BOS first unless the file says otherwise.
AS_GPT2 = {"gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
IGNORE_MERGES = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space


def dequantised(path: Path, name: str, dtype: str = "auto", checksum: str | None = None) -> Path:
    """Dequantise a GGUF file, once, into a folder of safetensors that `load_model` reads.

    Args:
        path: the file.
        name: what messages call it.
        dtype: see `load_model`; "auto" is float32.
        checksum: what the file's SHA-256 must be, if known.

    Returns:
        The folder, in the cache.

    Raises:
        ValueError: the file is broken, or states something that cannot be reproduced.
        MissingExtra: the package `gguf` is not installed.
    """
    need("gguf")
    digest = sha256(path)
    if checksum not in (None, digest):
        raise ValueError(f"{path} has another checksum than {name}; fetch it again.")
    made_by = {package: importlib.metadata.version(package) for package in ("transformers", "gguf")} | {
        "format": FORMAT
    }
    stored = {"auto": "float32", "float64": "float32"}.get(dtype, dtype)
    parent = cache_folder() / "models" / "gguf"
    version = data_hash(made_by)[:8]
    for kind in (stored, "float32"):  # which is cast when it is loaded, to the same numbers
        folder = parent / f"{digest[:32]}-{kind}-{version}"
        if folder.is_dir():
            return folder
    folder = parent / f"{digest[:32]}-{stored}-{version}"
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            for leftover in parent.glob(f".{folder.name}-*"):  # of a process that was killed
                shutil.rmtree(leftover)
            with atomic_folder(folder) as made:
                _convert(path, name, getattr(torch, stored), made)
                write_json(made / "source.json", {"file": path.name, "sha256": digest, "dtype": stored, **made_by})
    return folder


def _convert(path: Path, name: str, dtype: torch.dtype, folder: Path) -> None:
    stated, sizes, rope_factors = _header(path, name)
    architecture = stated["general.architecture"]
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{name} has the architecture {architecture!r}, which transformers cannot read from a GGUF file "
            f"({first_line(error)}); {INSTEAD}."
        ) from error
    check_type({"model_type": config.model_type}, name)
    check_config(config.to_dict(), name)
    own = {key.removeprefix(f"{architecture}."): stated[key] for key in stated if key.startswith(f"{architecture}.")}
    _complete(config, own, rope_factors, name)
    _compare(config, own, name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{name} cannot be dequantised ({first_line(error)}); copy or download it again.") from error
    model, report = loaded
    # The reader passes over tensors that it knows no place for, and nothing else tells of them.
    used = {key: size for key, size in sizes.items() if not (key == "output.weight" and config.tie_word_embeddings)}
    if report["missing_keys"] or sum(used.values()) != sum(parameter.numel() for parameter in model.parameters()):
        raise ValueError(
            f"{name} holds {sum(used.values())} numbers and a {type(model).__name__} of its sizes has {model.num_parameters()}: "
            f"transformers' reader does not know all of its tensors; {INSTEAD}."
        )
    _complete_tokenizer(tokenizer, stated, name)
    # Dequantised, the weights are plain ones; while these are there transformers refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # By the name of a family's class, the tokenizer would be built twice when it is loaded, to compare (`load`).
    settings = folder / "tokenizer_config.json"
    generic = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": tokenizer.padding_side}
    write_json(settings, parse_json(settings.read_bytes()) | generic)


def _header(path: Path, name: str) -> tuple[dict[str, Any], dict[str, int], torch.Tensor | None]:
    """What a file states, short of its vocabulary; the sizes of its tensors; and the factors on RoPE's wavelengths, if any."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        stated = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("tokenizer.ggml.") or len(field.data) == 1
        }
        stated["general.architecture"].split()
    except Exception as error:
        raise ValueError(
            f"{name} is no GGUF file that can be read ({first_line(error)}); copy or download it again."
        ) from error
    if stated.get("split.count", 1) > 1:
        raise ValueError(
            f"{name} is one of {stated['split.count']} parts of a model; join them with llama-gguf-split --merge, or {INSTEAD}."
        )
    factors = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
    if others := factors.keys() - {"rope_freqs.weight"}:
        raise ValueError(f"{name} scales RoPE by {min(others)}, which transformers' reader passes over; {INSTEAD}.")
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in factors}
    return stated, sizes, torch.tensor(factors["rope_freqs.weight"].data) if factors else None


def _complete(config: PreTrainedConfig, own: dict[str, Any], rope_factors: torch.Tensor | None, name: str) -> None:
    """Set what a file states and transformers' reader leaves at the default of the config's class."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope.freq_base" in own and rope:
        rope["rope_theta"] = own["rope.freq_base"]
    if (kind := own.get("rope.scaling.type", "none")) == "linear":
        rope |= {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    elif kind != "none":
        raise ValueError(f"{name} scales RoPE ({kind}), which transformers' reader passes over; {INSTEAD}.")
    if rope_factors is not None:
        rope |= _llama3_scaling(rope_factors, rope["rope_theta"], name)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in own:
            setattr(config, key, own[key])
    if (
        config.model_type in ("phi3", "starcoder2")
        and 0 < own.get("attention.sliding_window", 0) < own["context_length"]
    ):
        config.sliding_window = own["attention.sliding_window"]
    if config.model_type in (
        "gemma2",
        "gemma3_text",
    ):  # as llama.cpp scales them; the 27B models have 46 and 62 layers
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if config.num_hidden_layers in (46, 62) else config.head_dim


def _llama3_scaling(factors: torch.Tensor, theta: float, name: str) -> dict[str, Any]:
    """Llama 3.1's scaling of RoPE from the factors on its wavelengths, which are all that a file keeps of it."""
    found = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = 8192
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    smooth = ((old / wavelengths - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - smooth) / found["factor"] + smooth), factors.double(), rtol=1e-4):
        raise ValueError(f"{name} scales RoPE by factors that are not Llama 3.1's (rope_freqs.weight); {INSTEAD}.")
    return {"rope_type": "llama3", "original_max_position_embeddings": old, **found}


def _compare(config: Any, own: dict[str, Any], name: str) -> None:
    """Raise ValueError if a file states what the config contradicts, or what neither transformers' reader nor we look at."""

    def first(*keys: str) -> Any:
        return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)

    head = first("head_dim") or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    eps = first("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    known = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": first("num_key_value_heads", "num_attention_heads"),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": eps,
        "attention.layer_norm_epsilon": eps,
        "attention.sliding_window": first("sliding_window"),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": rope.get("rope_type"),
        "rope.scaling.factor": rope.get("factor"),
        "attn_logit_softcapping": first("attn_logit_softcapping"),
        "final_logit_softcapping": first("final_logit_softcapping"),
        "expert_count": first("num_experts"),
        "expert_used_count": first("num_experts_per_tok"),
        "expert_feed_forward_length": first("moe_intermediate_size"),
    }
    for key, value in own.items():
        # The shapes of the weights tell the other lengths, and a window as long as the context is none.
        if key in NO_NUMBERS or (
            key == "attention.sliding_window" and not 0 < value < own.get("context_length", math.inf)
        ):
            continue
        if key not in known:
            raise ValueError(f"{name} states {key}, which transformers' reader passes over; {INSTEAD}.")
        if known[key] != value and not (key == "rope.scaling.type" and value == "none"):
            raise ValueError(f"{name} states {key} {value}, and transformers' reader makes it {known[key]}; {INSTEAD}.")


def _complete_tokenizer(tokenizer: PreTrainedTokenizerBase, stated: dict[str, Any], name: str) -> None:
    """Let a tokenizer split text as the file says; ValueError where it names a pre-tokenizer unknown here."""
    backend: Any = tokenizer.backend_tokenizer
    split = stated.get("tokenizer.ggml.pre", "default")
    if stated.get("tokenizer.ggml.model") != "gpt2":  # sentencepiece splits by its vocabulary
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
        if pieces[0].startswith(SPACE) != stated.get("tokenizer.ggml.add_space_prefix", True):
            raise ValueError(f"{name} states add_space_prefix, which transformers' reader passes over; {INSTEAD}.")
        return
    if split in IGNORE_MERGES:
        backend.model.ignore_merges = True  # a word of the vocabulary is one token, whatever the merges
        if "tokenizer.ggml.add_bos_token" not in stated:
            tokenizer.add_bos_token = True
    if type(backend.pre_tokenizer) is not pre_tokenizers.ByteLevel:  # transformers' reader knows how
        return
    if split in DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    elif split not in AS_GPT2:
        raise ValueError(
            f"{name} splits text into words as {split!r}, which transformers' reader does not know; {INSTEAD}."
        )
