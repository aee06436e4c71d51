"""Checks of a checkpoint: its config, its files, and the model on a few tokens. Each raises ValueError with one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modelcards import CARDS, n_positions
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.identity import named_weights
from pyvene_ext.models.loading.errors import first_line
from pyvene_ext.models.loading.names import listed

# Transformers creates an object for each of these, and would run out of memory before it finds that the weights are of fewer.
COUNTS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), range(1, 1001)) | {"num_labels": range(10**6)}
SMALL = 2**22  # parameters and buffers that a config may ask for whatever the size of the weights' files
ADAPTER = "adapter_config.json"
TEXT = "Lisa gave the book to"  # to try a model on


def check_no_adapter(folder: Path, name: str) -> None:
    """Check that no adapter lies in a folder: transformers applies it where peft is installed, and elsewhere passes over it.

    Args:
        folder: the folder.
        name: what messages call it.

    Raises:
        ValueError: one does.
    """
    if not (folder / ADAPTER).is_file():
        return
    try:
        base = json.loads((folder / ADAPTER).read_bytes())["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError):
        base = None
    raise ValueError(
        f"{name} holds an adapter ({ADAPTER}); load its base model{f' ({base})' if base else ''}, give it to "
        f"peft.PeftModel.from_pretrained(model, {name!r}).merge_and_unload(), and save the result with save_pretrained."
    )


def check_type(config: dict[str, Any], name: str) -> None:
    """Check that a model's type has a card.

    Args:
        config: the contents of config.json.
        name: what messages call the model.

    Raises:
        ValueError: it has none.
    """
    model_type = config.get("model_type")
    supported = [card.model_type for card in CARDS]
    if model_type in supported:
        return
    its_type = f"model type {model_type!r}" if model_type else "no model type in its config.json"
    own_code = " and needs code from its own repository, which is never run" if "auto_map" in config else ""
    raise ValueError(f"{name} has {its_type}{own_code}; use a model of one of the types {listed(supported)}.")


def check_config(config: dict[str, Any], name: str) -> None:
    """Check that a config asks for a possible number of layers, and for no file of weights of its own.

    Args:
        config: the contents of config.json.
        name: what messages call the model.

    Raises:
        ValueError: it does not.
    """
    for key, possible in COUNTS.items():
        if isinstance(value := config.get(key), int) and value not in possible:
            raise ValueError(
                f"{name}: {key} in config.json is {str(value)[:20]}, and not from {possible[0]} to {possible[-1]}; copy or "
                "download it again."
            )
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"{name} names its own file of weights (transformers_weights in config.json), which is never read; get a checkpoint "
            "with model.safetensors."
        )


def check_files(folder: Path, name: str) -> None:
    """Check that weights lie in the folder, in safetensors, and fit the config.

    Transformers would first allocate weights that are missing or of another size, however large, and would cast any dtype.

    Args:
        folder: the folder of a saved transformers model.
        name: what messages call the model.

    Raises:
        ValueError: they do not.
    """
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        try:
            shards = sorted({str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{name}: {index.name} cannot be read; copy or download it again.") from None
        for shard in shards:
            if Path(shard).is_absolute() or ".." in Path(shard).parts or Path(shard).suffix != ".safetensors":
                raise ValueError(
                    f"{name}: {index.name} names {shard[:60]!r}, which is not a safetensors file of that folder; copy or "
                    "download it again."
                )
        files = [folder / shard for shard in shards]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        # With eager attention, which works on every machine; this model is never run.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    files = [file for file in files if file.is_file()]
    quantised = hasattr(config, "quantization_config")
    asked = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    size = sum(file.stat().st_size for file in files)
    # A byte stores at most one number, or eight if the weights are quantised.
    if files and asked > max(SMALL, size * (8 if quantised else 1)):
        raise ValueError(
            f"{name}: config.json asks for {asked:.3g} numbers but the weights are {size:.3g} bytes; get files that belong "
            "together."
        )
    own = dict(model.named_parameters(remove_duplicate=False))
    for file in () if quantised else files:
        with safe_open(file, "pt") as weights:
            for key in own.keys() & set(weights.keys()):
                found = weights.get_slice(key)
                if not found.get_dtype().startswith(("F", "BF")):
                    raise ValueError(
                        f"{name}: {key} has dtype {found.get_dtype()} in {file.name}, which is not floating point; copy or "
                        "download it again."
                    )
                if (shape := found.get_shape()) != list(own[key].shape):
                    raise ValueError(
                        f"{name}: {key} has shape {shape} in {file.name} but {list(own[key].shape)} by config.json; get files "
                        "that belong together."
                    )


def check_layers(model: PreTrainedModel, unexpected: Iterable[str], name: str) -> None:
    """Check that there are no weights of layers beyond the config's; other surplus weights are common and harmless.

    Args:
        model: the loaded model.
        unexpected: names of the weights that it has no place for.
        name: what messages call the model.

    Raises:
        ValueError: there are.
    """
    own = {key for part in (model, model.base_model) for key, _ in named_weights(part)}
    if surplus := [key for key in sorted(unexpected) if re.sub(r"\.\d+\.", ".0.", f".{key}", count=1)[1:] in own]:
        raise ValueError(
            f"{name} has weights of more layers ({surplus[0]} ...) than its config.json counts; get files that belong together."
        )


@torch.no_grad()
def check_runs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that weights are finite and that the model runs on a few words; nothing is checked if part of it stays on disk.

    Args:
        model: the loaded model.
        tokenizer: its tokenizer.
        name: what messages call the model.

    Raises:
        ValueError: they are not, or it fails.
    """
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        return
    # Embedding and unembedding rows of unused tokens may hold anything.
    words = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    exempt = {id(parameter) for module in words for parameter in module.parameters()}
    for key, parameter in parameters.items():
        if (
            id(parameter) not in exempt
            and type(parameter) is nn.Parameter  # torchao's quantised weights are of another type
            and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
            and not parameter.isfinite().all()
        ):
            raise ValueError(f"the weights of {name} are broken ({key} is not finite); copy or download them again.")
    written = [i for i in tokenizer(TEXT, add_special_tokens=False)["input_ids"] if i < vocabulary(model)] or [0]
    ids = torch.tensor(written[: n_positions(model.config)], device=input_device(model))
    try:
        logits = model.eval()(
            ids[None], use_cache=True
        ).logits  # with a cache, as in generation, which needs more of a config
    except Exception as error:
        raise ValueError(
            f"{name} cannot be run here ({first_line(error)}); look at its config.json, or load it in another dtype."
        ) from error
    if not logits[..., ids].isfinite().all():
        raise ValueError(
            f"the logits of {name} are not finite; "
            + (
                "load it in bfloat16 or float32."
                if model.dtype is torch.float16
                else "its config.json or its weights are broken: copy or download them again."
            )
        )


def vocabulary(model: PreTrainedModel) -> int:
    """Count the tokens that a model embeds.

    Args:
        model: the model.

    Returns:
        The number of rows of its embedding.
    """
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]
