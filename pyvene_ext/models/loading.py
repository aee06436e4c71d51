"""Models and tokenizers by name: a shipped tiny model, a local folder, or a repository on the hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassFieldValidationError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modelcards import CARDS, n_positions
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.identity import named_weights
from pyvene_ext.models.latent_steps import restore

TINY_FOLDER = Path(__file__).parents[1] / "tiny"
TINY_MODELS = tuple(sorted(path.parent.name for path in TINY_FOLDER.glob("*/config.json")))
NO_TOKENIZER = "has no tokenizer that can be read; its tokenizer.json belongs beside config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# Transformers creates an object for each of these, and would run out of memory before it finds that the weights are of fewer.
COUNTS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), range(1, 1001)) | {"num_labels": range(10**6)}
SMALL = 2**22  # parameters and buffers that a config may ask for whatever the size of the weights' files
TEXT = "Lisa gave the book to"  # to try a model on


def load_model(
    name_or_path: str | Path,
    dtype: str = "auto",
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
        name_or_path: one of `TINY_MODELS`, else a local folder, else a repository on the hub.
        dtype: one of `DTYPES`; "auto" keeps the checkpoint's.
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
    _check_arguments(dtype, device, attn_implementation, device_map)
    name, source = str(name_or_path), _source(name_or_path)
    # By default transformers lets a bot of the hub convert pickled weights, and loads the bot's revision instead of this one.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except Exception as error:
        raise _explained(error, name, revision, "has no config.json that can be read") from error
    _check_type(config, name)
    _check_config(config, name)
    try:
        if Path(source).is_dir():
            _check_files(Path(source), name)
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
        raise _explained(error, name, revision, "cannot be loaded") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]} ...), which would be random; "
            "get the complete checkpoint of a causal language model."
        )
    _check_layers(model, report["unexpected_keys"], name)
    restore(model, name, source, revision)
    if device not in (None, "auto"):
        model.to(device)
    try:
        tokenizer = _tokenizer(source, revision)
        tokenizer("a b")  # some errors in its files show only in use
    except Exception as error:
        raise _explained(error, name, revision, NO_TOKENIZER) from error
    # If there are no files, transformers returns an empty tokenizer for some families.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{name} {NO_TOKENIZER}.")
    # Some added tokens have no embedding, and never occur in text.
    last = max(set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values()), default=0)
    if last >= _vocabulary(model):
        raise ValueError(
            f"the tokenizer of {name} has ids up to {last} and the model embeds {_vocabulary(model)} tokens; get files that "
            "belong together."
        )
    _check_runs(model, tokenizer, name)
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


def _source(name_or_path: str | Path) -> str:
    """The folder or hub id for transformers to load."""
    name = str(name_or_path)
    if name in TINY_MODELS:
        return str(TINY_FOLDER / name)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"the folder {name} has no config.json; give the folder of a saved transformers model."
            )
        return str(path)
    if path.exists():
        raise ValueError(f"{name} is a file; give the folder of a saved transformers model.")
    close = difflib.get_close_matches(name, TINY_MODELS, n=1)
    if "/" not in name and (close or name.startswith("tiny-")):
        guess = f"; perhaps {close[0]} is meant" if close else ""
        raise FileNotFoundError(f"no shipped model is called {name!r}{guess} (there are {_list(TINY_MODELS)}).")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"there is no folder {name}; check the path.")
    return name


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


def _check_type(config: dict[str, Any], name: str) -> None:
    model_type = config.get("model_type")
    supported = [card.model_type for card in CARDS]
    if model_type in supported:
        return
    its_type = f"model type {model_type!r}" if model_type else "no model type in its config.json"
    own_code = " and needs code from its own repository, which is never run" if "auto_map" in config else ""
    raise ValueError(f"{name} has {its_type}{own_code}; use a model of one of the types {_list(supported)}.")


def _check_config(config: dict[str, Any], name: str) -> None:
    """Raise ValueError for a config that asks for more layers than any model has, for none, or for another file of weights."""
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


def _check_files(folder: Path, name: str) -> None:
    """Raise ValueError for weights outside of the folder or not in safetensors, and for a config that does not fit them.

    Transformers would first allocate weights that are missing or of another size, however large, and would cast any dtype.
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


def _check_layers(model: PreTrainedModel, unexpected: Iterable[str], name: str) -> None:
    """Raise ValueError for weights of layers beyond the config's; other surplus weights are common and harmless."""
    own = {key for part in (model, model.base_model) for key, _ in named_weights(part)}
    if surplus := [key for key in sorted(unexpected) if re.sub(r"\.\d+\.", ".0.", f".{key}", count=1)[1:] in own]:
        raise ValueError(
            f"{name} has weights of more layers ({surplus[0]} ...) than its config.json counts; get files that belong together."
        )


@torch.no_grad()
def _check_runs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError for weights that are not finite, and for a model that fails on a few words."""
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        return
    # Embedding and unembedding rows of unused tokens may hold anything.
    words = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    exempt = {id(parameter) for module in words for parameter in module.parameters()}
    for key, parameter in parameters.items():
        if (
            id(parameter) not in exempt
            and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
            and not parameter.isfinite().all()
        ):
            raise ValueError(f"the weights of {name} are broken ({key} is not finite); copy or download them again.")
    written = [i for i in tokenizer(TEXT, add_special_tokens=False)["input_ids"] if i < _vocabulary(model)] or [0]
    ids = torch.tensor(written[: n_positions(model.config)], device=input_device(model))
    try:
        logits = model.eval()(
            ids[None], use_cache=True
        ).logits  # with a cache, as in generation, which needs more of a config
    except Exception as error:
        raise ValueError(
            f"{name} cannot be run here ({_first_line(error)}); look at its config.json, or load it in another dtype."
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


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model embeds."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


def _explained(error: Exception, name: str, revision: str | None, otherwise: str) -> Exception:
    """Turn an error of transformers or the hub into one sentence that says what to do; `otherwise` words any unknown kind."""
    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)

    def caused_by(*kinds: type[BaseException]) -> str:
        """The first line of the first cause of these kinds."""
        return next((_first_line(cause) for cause in causes if isinstance(cause, kinds)), "")

    instead = f"use a local folder or a shipped model ({_list(TINY_MODELS)})"
    if caused_by(GatedRepoError):
        return PermissionError(
            f"{name} is a gated model: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN or run `hf auth "
            f"login`, or {instead}."
        )
    if caused_by(RevisionNotFoundError):
        return ValueError(f"{name} has no revision {revision!r}; give a branch, tag or commit of the repository.")
    if caused_by(RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no folder and no public hub repository {name}; check the name, set HF_TOKEN if it is private, or "
            f"{instead}."
        )
    if isinstance(error, OSError) and "named model.safetensors" in str(error):
        return ValueError(
            f"{name} has no weights in safetensors format, and pickled ones can run code when read; if you trust them, convert "
            "them once with AutoModelForCausalLM.from_pretrained(..., use_safetensors=False).save_pretrained(FOLDER)."
        )
    if reason := caused_by(HfHubHTTPError):
        return OSError(f"the hub refused {name} ({reason}); try again later, or {instead}.")
    if caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError):
        return ConnectionError(
            f"{name} is not in the local cache and the hub cannot be reached; go online (and unset HF_HUB_OFFLINE), or {instead}."
        )
    if "ignore_mismatched_sizes" in str(error):
        return ValueError(
            f"{name} has weights whose shapes differ from its config.json; get files that belong together."
        )
    if reason := caused_by(SafetensorError):
        return ValueError(f"the weights of {name} are broken ({reason}); copy or download them again.")
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(f"{name} {otherwise} ({_first_line(error)}).")


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassFieldValidationError):  # its first line names the field, the second the error
        return " ".join(str(error).split())
    line = str(error).strip().split("\n")[0].rstrip(" .:")
    # The text of a KeyError is the key.
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) and line else line or type(error).__name__


def _list(words: tuple[str, ...] | list[str]) -> str:
    return ", ".join(words) or "none"
