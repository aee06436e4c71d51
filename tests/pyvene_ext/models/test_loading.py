"""Loading from folders, and one sentence for everything that can go wrong on the way."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    Qwen2Tokenizer,
)

from pyvene_ext.models.loading import load, load_model, names
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer
from tests.saved_models import save_random_model
from tests.tiny_random import FAMILIES, random_inputs, random_model

TEXT = "When Lisa and Mark went to the store , Mark gave the book to"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family, model and tokenizer as transformers saves them."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        random_model(family).save_pretrained(folders[family])
        word_tokenizer([TEXT], pad=False).save_pretrained(folders[family])
    return folders


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved["llama3_1"], tmp_path / "model"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path], tmp_path: Path) -> None:
    """Two shipped models."""
    for name in ("tiny-llama3.1", "tiny-qwen2.5"):
        shutil.copytree(saved["llama3_1"], tmp_path / "tiny" / name)
    monkeypatch.setattr(names, "TINY_FOLDER", tmp_path / "tiny")
    monkeypatch.setattr(names, "SHIPPED_MODELS", ("tiny-llama3.1", "tiny-qwen2.5"))


def refusal(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    """The sentence with which `load_model` refuses, whose kind of error is exactly `kind`."""
    with pytest.raises(kind) as error:
        load_model(*arguments, **options)
    message = str(error.value)
    assert type(error.value) is kind
    assert "\n" not in message and message.endswith(".")
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what works -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_gives_the_saved_model_and_its_tokenizer(saved: dict[str, Path], family: str) -> None:
    model, tokenizer = load_model(str(saved[family]))
    original = random_model(family)
    assert type(model) is type(original) and not model.training and model.dtype == torch.float32
    inputs = random_inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_dtype_is_the_one_asked_for_and_auto_keeps_the_checkpoints(folder: Path, dtype: str) -> None:
    model, _ = load_model(folder, dtype=dtype)
    assert model.dtype == getattr(torch, dtype) == load_model(folder, dtype=getattr(torch, dtype))[0].dtype
    again = folder.with_name("again")
    model.save_pretrained(again)
    shutil.copy(folder / "tokenizer.json", again)
    assert load_model(again)[0].dtype == getattr(torch, dtype)


def test_attention_and_device_are_passed_on(folder: Path) -> None:
    assert load_model(folder, attn_implementation="eager")[0].config._attn_implementation == "eager"
    assert load_model(folder, attn_implementation="sdpa", device="cpu")[0].config._attn_implementation == "sdpa"
    assert load_model(folder, device_map={"": "meta"})[0].device.type == "meta"


def test_a_missing_padding_token_becomes_the_end_token_of_the_tokenizer_only(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert model.config.pad_token_id == 0  # as saved
    assert "pad_token" not in json.loads((folder / "tokenizer_config.json").read_text())
    word_tokenizer([TEXT]).save_pretrained(folder)
    assert load_model(folder)[1].pad_token == "<pad>"


@pytest.mark.parametrize("config", ["as saved", "without a class", "absent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_tokenizer_is_used_whatever_the_family_usually_has(
    family: str, config: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[family], tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    if config == "without a class":
        edit_json(settings, tokenizer_class=None)
    if config == "absent":
        settings.unlink()
    tokenizer = load_model(folder)[1]
    assert tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"]) == TEXT.split()


def test_a_family_keeps_its_own_tokenizer_class(folder: Path) -> None:
    backend = bpe_tokenizer([TEXT], 280).backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    edit_json(folder / "config.json", model_type="qwen2")
    Qwen2Tokenizer(vocab=model["vocab"], merges=list(map(tuple, model["merges"]))).save_pretrained(folder)
    assert type(load._tokenizer(str(folder), None)) is Qwen2Tokenizer


@pytest.mark.usefixtures("tiny")
def test_a_shipped_name_comes_before_a_folder_of_that_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path]
) -> None:
    monkeypatch.chdir(folder.parent)
    shutil.copytree(saved["gpt2"], folder.parent / "tiny-llama3.1")
    assert load_model("tiny-llama3.1")[0].config.model_type == "llama"
    assert load_model("./tiny-llama3.1")[0].config.model_type == "gpt2"


def test_the_shipped_models_are_the_folders_beside_the_code() -> None:
    assert {*names.TINY_MODELS, "tiny-circuit"} == {
        path.parent.name for path in names.TINY_FOLDER.glob("*/config.json")
    }
    assert Path(names.__file__).parents[2] / "tiny" == names.TINY_FOLDER


def test_nothing_that_came_with_the_model_can_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):

        def recorded(*arguments: Any, _original: Any = auto.from_pretrained, **options: Any) -> Any:
            asked.append(options)
            return _original(*arguments, **options)

        monkeypatch.setattr(auto, "from_pretrained", recorded)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    load_model(folder)
    assert [options["trust_remote_code"] for options in asked] == [False, False]
    assert asked[0]["use_safetensors"] is True


# --- what does not: names -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("name", "guess"), [("tiny-qwen", "tiny-qwen2.5"), ("qwen2.5", "tiny-qwen2.5"), ("tiny_llama3.1", "tiny-llama3.1")]
)
def test_a_misspelt_shipped_name_gets_a_suggestion(name: str, guess: str) -> None:
    message = refusal(FileNotFoundError, name)
    assert f"perhaps {guess} is meant" in message and "tiny-llama3.1, tiny-qwen2.5" in message


@pytest.mark.usefixtures("tiny")
def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    assert "there are tiny-llama3.1, tiny-qwen2.5" in refusal(FileNotFoundError, "tiny-")
    for name in ("./nowhere", "some/where/else", "~/nowhere", str(tmp_path / "nowhere"), ""):
        if name:
            assert f"there is no folder {name}" in refusal(FileNotFoundError, name)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file; give the folder" in refusal(ValueError, file)
    assert "has no config.json" in refusal(FileNotFoundError, tmp_path)


# --- arguments ------------------------------------------------------------------------------------------------------------


def test_arguments_are_checked_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    nowhere = "no/where"
    assert "unknown dtype 'float8'; choose among auto, float32" in refusal(ValueError, nowhere, dtype="float8")
    assert "unknown device 'gpu'" in refusal(ValueError, nowhere, device="gpu")
    for device in ("cuda", "mps"):
        assert f"device {device!r} was asked for but this machine offers 0" in refusal(
            ValueError, nowhere, device=device
        )
    both = refusal(ValueError, nowhere, device="cpu", device_map="auto")
    assert "device and device_map were both given" in both
    # transformers would fetch a kernel of this name from the hub and run it.
    remote = refusal(ValueError, nowhere, attn_implementation="kernels-community/flash-attn")
    assert "unknown attn_implementation 'kernels-community/flash-attn'; use eager or sdpa" in remote
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "'cuda:2' was asked for but this machine offers 2" in refusal(ValueError, nowhere, device="cuda:2")


# --- folders --------------------------------------------------------------------------------------------------------------


def test_models_without_a_card_are_refused_with_the_list_of_those_that_have_one(tmp_path: Path) -> None:
    types = "use a model of one of the types qwen2, gemma2, llama, mistral, gpt2"
    BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path)
    message = refusal(ValueError, tmp_path)
    assert "model type 'bert'" in message and types in message
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "brand_new"}')
    assert "model type 'brand_new'" in refusal(ValueError, tmp_path)
    config.write_text('{"model_type": "brand_new", "auto_map": {"AutoConfig": "x.Y"}}')
    message = refusal(ValueError, tmp_path)
    assert "needs code from its own repository, which is never run" in message and types in message
    config.write_text('{"hidden_size": 8}')
    assert "no model type in its config.json" in refusal(ValueError, tmp_path)
    config.write_text("{")
    assert "config.json that can be read" in refusal(OSError, tmp_path)


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    without = refusal(ValueError, folder)
    torch.save(weights, folder / "pytorch_model.bin")
    assert refusal(ValueError, folder) == without
    assert "no weights in safetensors format" in without and "use_safetensors=False" in without


def test_broken_and_incomplete_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    # Copies, because the file they are mapped from is about to change.
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"the weights of {folder} are broken (" in refusal(ValueError, folder)
    lacking = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(lacking, path, metadata={"format": "pt"})
    message = refusal(ValueError, folder)
    assert "lacks 6 of the weights of a LlamaForCausalLM (model.layers.1.mlp" in message
    weights["model.norm.weight"] = torch.zeros(5)
    save_file(weights, path, metadata={"format": "pt"})
    assert f"{folder}: model.norm.weight has shape [5] in model.safetensors but [42] by config.json" in refusal(
        ValueError, folder
    )


def test_a_classifier_is_refused_for_want_of_a_language_model_head(tmp_path: Path) -> None:
    random_model("llama3_1", "classifier").save_pretrained(tmp_path)
    assert "lacks 1 of the weights of a LlamaForCausalLM (lm_head.weight" in refusal(ValueError, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tokenizer_is_refused(family: str, saved: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved[family] / name, tmp_path)
    assert "has no tokenizer that can be read; its tokenizer.json belongs beside" in refusal(ValueError, tmp_path)


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "has no tokenizer that can be read" in refusal(ValueError, folder)


# --- the hub --------------------------------------------------------------------------------------------------------------


def http_error(kind: type[HfHubHTTPError], status: int = 403) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/org/model")
    return kind(f"{status} Client Error.\n\nMore lines.", response=httpx2.Response(status, request=request))


HUB_ERRORS = {
    "gated": (
        http_error(GatedRepoError),
        PermissionError,
        "org/model is a gated model: accept its licence at .* HF_TOKEN",
    ),
    "unknown": (
        http_error(RepositoryNotFoundError),
        FileNotFoundError,
        "no public hub repository org/model; .* HF_TOKEN",
    ),
    "revision": (http_error(RevisionNotFoundError), ValueError, "org/model has no revision 'v9'"),
    "server": (http_error(HfHubHTTPError, 503), OSError, r"the hub refused org/model \(503 Client Error\); try again"),
    "no network": (
        LocalEntryNotFoundError("no"),
        ConnectionError,
        "hub cannot be reached; .*tiny-llama3.1.*smollm2-135m-instruct",
    ),
    "offline": (OfflineModeIsEnabled("no"), ConnectionError, "unset HF_HUB_OFFLINE"),
    "other": (RuntimeError("boo.\nmore"), ValueError, r"org/model has no config.json that can be read \(boo\)"),
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("case", HUB_ERRORS)
def test_an_error_of_the_hub_says_what_to_do(case: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cause, kind, message = HUB_ERRORS[case]

    def hub(*_: Any, **__: Any) -> None:
        if wrapped:
            raise OSError("There was a problem\nwith many lines") from cause
        raise cause

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", hub)
    if case == "other" and wrapped:
        kind, message = OSError, r"\(There was a problem\)"
    sentence = refusal(kind, "org/model", revision="v9")
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_an_error_of_the_hub_is_explained_at_every_step(
    part: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *_, **__: (config, {}))
    if part == "tokenizer":
        model = random_model("llama3_1")
        report: dict[str, set[str]] = {"missing_keys": set(), "unexpected_keys": set()}
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, report))

    def hub(*_: Any, **__: Any) -> None:
        raise OSError("wrapped") from http_error(GatedRepoError)

    monkeypatch.setattr({"model": AutoModelForCausalLM, "tokenizer": AutoTokenizer}[part], "from_pretrained", hub)
    assert "org/model is a gated model" in refusal(PermissionError, "org/model")


@pytest.mark.usefixtures("tiny")
def test_being_offline_is_explained_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(ConnectionError, "some-org/tiny-qwen2.5")
    assert "the hub cannot be reached; go online (and unset HF_HUB_OFFLINE)" in message
    assert "a shipped model (tiny-llama3.1, tiny-qwen2.5)" in message


# -- what must not be refused ------------------------------------------------------------------------------------------


def test_rows_of_unused_tokens_may_hold_anything(tmp_path: Path) -> None:
    """Some checkpoints have NaN or -inf where no token is: padding of the vocabulary, tokens never trained."""
    save_random_model("llama3_1", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name][3] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(tmp_path)
    assert 3 not in tokenizer("Lisa gave the book to", add_special_tokens=False)["input_ids"]
    assert model.get_input_embeddings().weight[3].isnan().all()


def test_attention_of_another_machine_in_the_config_can_be_replaced(tmp_path: Path) -> None:
    save_random_model("llama3_1", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    assert load_model(tmp_path, attn_implementation="eager")[0].config._attn_implementation == "eager"


def test_shards_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    save_random_model("llama3_1", tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "w/model-00001-of-00001.safetensors")
    keys = load_file(tmp_path / "w/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "w/model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(tmp_path)[0].config.num_hidden_layers


def test_a_model_is_tried_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a GPU must not be run on the CPU first."""
    save_random_model("llama3_1", tmp_path)
    tried: list[str] = []
    monkeypatch.setattr("pyvene_ext.models.loading.load.check_runs", lambda model, *_: tried.append(model.device.type))
    load_model(tmp_path, device="meta")
    assert tried == ["meta"]
