"""Read a model and its tokenizer from a folder or a repository on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from modelcards.wrapped import refuse_mixed_batches
from pyvene_ext.io.bars import is_shown
from pyvene_ext.models.latent_steps import restore
from pyvene_ext.models.loading.checks import (
    check_config,
    check_files,
    check_layers,
    check_runs,
    check_type,
    vocabulary,
)
from pyvene_ext.models.loading.errors import explained
from pyvene_ext.models.loading.sources import source_of

NO_TOKENIZER = "has no tokenizer that can be read; its tokenizer.json belongs beside config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@contextmanager
def _bars() -> Iterator[None]:
    """Silence the bars of transformers and the hub inside, if ours are silenced."""
    hidden = not is_shown() and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


@_bars()
def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model of a family that has a card, in eval mode, with its tokenizer.

    Weights are read from safetensors only and code from a repository is never run, so loading a model executes nothing that came
    with it. Files that contradict one another are refused, and so is a model that fails on a few tokens (not tried if part of it
    stays on disk). A tokenizer without a padding token gets its end token as one; the model's config is left alone.

    Args:
        name_or_path: one of `TINY_MODELS`, "tiny-circuit", one of the models that `python -m pyvene_ext.models` fetches, else a
            local folder, a GGUF file (or a folder with one, or hub-id:file.gguf), else a repository on the hub.
        dtype: one of `DTYPES`, or torch's; "auto" keeps the checkpoint's, and is float32 for a GGUF file.
        device: where the model goes, such as "cuda"; default the CPU. "auto" spreads a model that is larger than one GPU over all
            of them, then over the CPU's memory, and leaves the rest on disk.
        attn_implementation: "eager", "sdpa" ...; default transformers' choice.
        device_map: which module goes where (accelerate), instead of `device`.
        revision: branch, tag or commit on the hub.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: a wrong argument, or a checkpoint that cannot be used (no card, own code, no safetensors, missing, broken or
            surplus weights, no tokenizer or another model's).
        FileNotFoundError: there is no such folder or repository.
        PermissionError: a gated model without access.
        ConnectionError: the hub cannot be reached.
        OSError: another error that the hub reports.
    """
    dtype = str(dtype).removeprefix("torch.")
    _check_arguments(dtype, device, attn_implementation, device_map)
    name, source = str(name_or_path), source_of(name_or_path, dtype, revision)
    # By default transformers lets a bot of the hub convert pickled weights, and loads the bot's revision instead of this one.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except Exception as error:
        raise explained(error, name, revision, "has no config.json that can be read") from error
    check_type(config, name)
    check_config(config, name)
    try:
        if Path(source).is_dir():
            check_files(Path(source), name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map="auto" if device == "auto" else device_map,
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise explained(error, name, revision, "cannot be loaded") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]} ...), which would be random; "
            "get the complete checkpoint of a causal language model."
        )
    check_layers(model, report["unexpected_keys"], name)
    refuse_mixed_batches(model)
    if getattr(model, "_hf_peft_config_loaded", False):  # of a repository; folders are looked at before
        raise ValueError(
            f"{name} holds an adapter; load its base model, give it to peft.PeftModel.from_pretrained(model, "
            f"{name!r}).merge_and_unload(), and save the result with save_pretrained."
        )
    restore(model, name, source, revision)
    if device not in (None, "auto"):
        model.to(device)
    try:
        tokenizer = _tokenizer(source, revision)
        tokenizer("a b")  # some errors in its files show only in use
    except Exception as error:
        raise explained(error, name, revision, NO_TOKENIZER) from error
    # If there are no files, transformers returns an empty tokenizer for some families.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{name} {NO_TOKENIZER}.")
    # Some added tokens have no embedding, and never occur in text.
    last = max(set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values()), default=0)
    if last >= vocabulary(model):
        raise ValueError(
            f"the tokenizer of {name} has ids up to {last} and the model embeds {vocabulary(model)} tokens; get files that "
            "belong together."
        )
    check_runs(model, tokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _check_arguments(dtype: str, device: str | None, attn_implementation: str | None, device_map: Any) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose among {', '.join(DTYPES)}.")
    # Transformers would take an unknown name for code to fetch from the hub.
    known = ("eager", *AttentionInterface().valid_keys())
    if attn_implementation is not None and attn_implementation not in known:
        raise ValueError(f"unknown attn_implementation {attn_implementation!r}; use eager or sdpa.")
    if device is None:
        return
    if device_map is not None:
        raise ValueError("device and device_map were both given; give one of them.")
    if device == "auto":
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
            raise ValueError(
                "device 'auto' would spread the model of every process over the same GPUs; launch one process, or leave it out."
            )
        return
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda, cuda:1 ..., mps or auto.") from None
    available = torch.cuda.device_count() if wanted.type == "cuda" else int(torch.backends.mps.is_available())
    if wanted.type in ("cuda", "mps") and (wanted.index or 0) >= available:
        raise ValueError(f"device {device!r} was asked for but this machine offers {available} of its kind; use cpu.")


def _tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of `AutoTokenizer`, unless it contradicts the tokenizer.json saved with the model.

    If no class is named, and for Qwen2 always, transformers builds the family's own kind of tokenizer around the saved
    vocabulary; a model trained with another kind would then silently get other tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    try:
        as_saved = PreTrainedTokenizerFast.from_pretrained(source, revision=revision or "main")
    except Exception:  # there is no tokenizer.json; the error depends on the version of transformers
        return tokenizer
    words = sorted(as_saved.get_vocab())
    probe = " ".join(words[:: len(words) // 500 + 1])
    same = tokenizer.encode(probe, add_special_tokens=False) == as_saved.encode(probe, add_special_tokens=False)
    return tokenizer if same else as_saved
