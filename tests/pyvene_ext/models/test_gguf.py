"""GGUF files give the model and the tokenizer that were written to them, or one sentence."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig

from pyvene_ext.io.files import cache_folder
from pyvene_ext.io.packages import MissingExtra
from pyvene_ext.models.identity import weight_hash
from pyvene_ext.models.loading import gguf, load_model, sources
from tests.saved_models import save_random_model

pytest.importorskip("gguf")

from tests.pyvene_ext.models.gguf_files import (
    LLAMA3,
    TEXTS,
    TOKENIZER,
    model_of,
    tensors_of,
    write_gguf,
)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVENE_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", "llama", model_of("llama"))


def refusal(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    """The sentence with which `load_model` refuses; nothing is left in the cache."""
    with pytest.raises(kind) as error:
        load_model(*arguments, **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not [path for path in (cache_folder() / "models" / "gguf").glob("*") if path.suffix != ".lock"]
    return str(error.value)


def logits(model: Any) -> torch.Tensor:
    inputs = TOKENIZER(TEXTS, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


# -- what works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "starcoder2"])
def test_a_file_gives_the_logits_and_tokens_of_the_model_in_it(family: str, tmp_path: Path) -> None:
    original = model_of(family)
    model, tokenizer = load_model(write_gguf(tmp_path / "m.gguf", family, original))
    assert type(model) is type(original) and model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(original), atol=1e-5, rtol=1e-5)
    assert tokenizer(TEXTS)["input_ids"] == TOKENIZER(TEXTS)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_quantised_weights_are_what_the_file_says_they_are(tmp_path: Path) -> None:
    import gguf as written

    kind = written.GGMLQuantizationType.Q8_0
    original = model_of("qwen2")
    model, _ = load_model(write_gguf(tmp_path / "m.gguf", "qwen2", original, quantise=True))
    for (name, found), (_, before) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        expected = before.detach().numpy()
        if expected.ndim == 2:
            expected = written.dequantize(written.quantize(expected, kind), kind)
            assert (expected != before.detach().numpy()).any(), name
        np.testing.assert_array_equal(found.detach().numpy(), expected, name)


def test_the_scaling_of_rope_is_that_of_the_file(tmp_path: Path) -> None:
    """transformers' reader passes over all of these."""
    plain = model_of("llama")
    llama3 = model_of("llama", rope_parameters=LLAMA3, max_position_embeddings=131072)
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(8) / 8)
    factors = [
        1.0 if w < 8192 / 4 else 8.0 if w > 8192 else 1 / ((1 - (8192 / w - 1) / 3) / 8 + (8192 / w - 1) / 3)
        for w in wavelengths
    ]
    assert len(set(factors)) > 2
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    path = write_gguf(tmp_path / "llama3.gguf", "llama", llama3, tensors=tensors)
    model, _ = load_model(path)
    assert (logits(llama3) - logits(plain)).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(llama3), atol=1e-5, rtol=1e-5)
    assert dict(model.config.rope_parameters) == pytest.approx(LLAMA3)

    linear = model_of("llama", rope_parameters={"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0})
    stated = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    model, _ = load_model(write_gguf(tmp_path / "linear.gguf", "llama", linear, stated=stated))
    torch.testing.assert_close(logits(model), logits(linear), atol=1e-5, rtol=1e-5)


def test_a_folder_with_one_file_is_that_model(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / "a.gguf")
    assert torch.equal(logits(load_model(folder)[0]), logits(model_of("llama")))
    (folder / "config.json").write_text("{}")  # as repositories of GGUF files have it
    assert load_model(str(folder))[0].config.model_type == "llama"
    save_random_model("gpt2", folder)
    assert load_model(folder)[0].config.model_type == "gpt2"


def test_a_file_on_the_hub(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        sources, "hf_hub_download", lambda *args, **kw: asked.append((*args, kw["revision"])) or str(file)
    )
    load_model("someone/Tiny-GGUF:deep/tiny.Q8_0.gguf", revision="main")
    assert asked == [("someone/Tiny-GGUF", "deep/tiny.Q8_0.gguf", "main")]


def test_a_file_is_dequantised_once_for_each_content(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weight_hash(load_model(file)[0])
    moved = file.rename(file.with_name("moved.gguf"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_convert", lambda *_: pytest.fail("a second time"))
        assert weight_hash(load_model(moved)[0]) == first
        half = load_model(moved, dtype="bfloat16")[0]  # from what is there
    assert half.dtype == torch.bfloat16
    write_gguf(file, "llama", model_of("llama", rms_norm_eps=1e-3))
    assert load_model(file)[0].config.rms_norm_eps == pytest.approx(1e-3)


def test_half_precision_is_stored_as_such_and_is_the_rounded_model(file: Path) -> None:
    model, _ = load_model(file, dtype="bfloat16")
    (folder,) = (path for path in (cache_folder() / "models" / "gguf").iterdir() if path.is_dir())
    assert "bfloat16" in folder.name and AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    assert weight_hash(model) == weight_hash(model_of("llama").bfloat16())


def test_two_at_once_dequantise_once_and_an_error_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert, calls = gguf._convert, []

    def slow(path: Path, name: str, dtype: torch.dtype, folder: Path) -> None:
        calls.append(folder)
        convert(path, name, dtype, folder)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", slow)
    with pytest.raises(KeyboardInterrupt):
        load_model(file)
    assert not [path for path in calls[0].parents[1].iterdir() if path.suffix != ".lock"]
    killed = calls[0].parents[1] / f"{calls[0].parent.name[:-8]}deadbeef"
    (killed / "made").mkdir(parents=True)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gguf.dequantised(file, "it"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2 and len(set(found)) == 1 and not killed.exists()


# -- tokenizers --------------------------------------------------------------------------------------------------------


def pieces(path: Path, text: str, **options: Any) -> list[str]:
    tokenizer = load_model(path)[1]
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options)["input_ids"])


def test_digits_are_single_where_the_file_says_so(tmp_path: Path) -> None:
    from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer

    counting = bpe_tokenizer(["12 34 12 34 12 34"], 270)
    model = model_of("llama", vocab_size=len(counting))
    for pre, expected in (("gpt-2", ["12", "Ġ34"]), ("smollm", ["1", "2", "Ġ", "3", "4"])):
        path = write_gguf(tmp_path / f"{pre}.gguf", "llama", model, words={"pre": pre}, tokenizer=counting)
        assert pieces(path, "12 34") == expected


def test_llama_3_begins_with_bos_and_takes_words_of_its_vocabulary_whole(tmp_path: Path) -> None:
    backend = TOKENIZER.backend_tokenizer
    merges = [" ".join(pair) for pair in __import__("json").loads(backend.to_str())["model"]["merges"]]
    word = next(
        token for token in sorted(TOKENIZER.get_vocab()) if token.isalpha() and len(token) > 3 and token.isascii()
    )
    without = [merge for merge in merges if merge.replace(" ", "") != word]
    assert len(without) == len(merges) - 1
    model = model_of("llama")
    for pre, expected in (("gpt-2", False), ("llama-bpe", True)):
        words = {"pre": pre, "merges": without}
        found = pieces(write_gguf(tmp_path / f"{pre}.gguf", "llama", model, words=words), word)
        assert (found[0] == "<bos>") is expected and (word in found) is expected
    words = {"pre": "llama-bpe", "add_bos_token": False}
    assert pieces(write_gguf(tmp_path / "stated.gguf", "llama", model, words=words), word)[0] != "<bos>"


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_space_before_the_text_is_as_the_file_says_or_refused(prefix: bool | None, tmp_path: Path) -> None:
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", "▁", "a", "▁a", "b"]
    words = {
        "model": "llama",
        "pre": None,
        "merges": None,
        "tokens": tokens,
        "scores": [float(-i) for i in range(8)],
        "token_type": [3, 3, 3, 3, 1, 1, 1, 1],
        "add_space_prefix": prefix,
    }
    path = write_gguf(tmp_path / "m.gguf", "llama", model_of("llama", vocab_size=8), words=words)
    if prefix is False:
        assert "add_space_prefix" in refusal(ValueError, path)
    else:
        assert pieces(path, "a b") == ["<bos>", "▁a", "▁", "b"]


# -- what does not -----------------------------------------------------------------------------------------------------


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for cut in (b"", b"not a GGUF file at all", whole[:20], whole[: len(whole) // 2], b"GGUF" + b"\xff" * 100):
        file.write_bytes(cut)
        assert "is no GGUF file that can be read" in refusal(ValueError, file)
    assert "there is no file" in refusal(FileNotFoundError, tmp_path / "none.gguf")
    (tmp_path / "other.gguf").write_bytes(whole)
    message = refusal(ValueError, tmp_path)
    assert "has 2 GGUF files" in message and str(tmp_path / "other.gguf") in message


def test_without_the_package_the_extra_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvene_ext.io.packages.find_spec", lambda _: None)
    assert "pip install 'pyvene-ext[gguf]'" in refusal(MissingExtra, file)


def test_a_file_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: Exception) -> Any:
        def download(*_: Any, **__: Any) -> str:
            raise error

        return download

    monkeypatch.setattr(sources, "hf_hub_download", raising(LocalEntryNotFoundError("offline")))
    assert "the hub cannot be reached" in refusal(ConnectionError, "someone/tiny:m.gguf")
    monkeypatch.setattr(sources, "hf_hub_download", raising(EntryNotFoundError.__new__(EntryNotFoundError)))
    assert "someone/tiny has no file m.gguf" in refusal(FileNotFoundError, "someone/tiny:m.gguf")


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        ("llama", {"stated": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "scales RoPE (yarn)"),
        (
            "llama",
            {"stated": {"attention.scale": 0.5}},
            "states attention.scale, which transformers' reader passes over",
        ),
        ("llama", {"stated": {"attention.key_length": 8}}, "states attention.key_length 8"),
        ("llama", {"stated": {"attention.sliding_window": 4}}, "states attention.sliding_window 4"),
        (
            "llama",
            {"tensors": {"rope_freqs.weight": np.array([1, 1, 1, 1, 1, 2, 3, 4], np.float32)}},
            "not Llama 3.1's",
        ),
        ("llama", {"tensors": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "rope_factors_long.weight"),
        ("llama", {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "does not know all of its tensors"),
        ("llama", {"tensors": {"blk.1.ffn_up.weight": None}}, "does not know all of its tensors"),
        ("llama", {"words": {"pre": "chatglm-bpe"}}, "splits text into words as 'chatglm-bpe'"),
        ("llama", {"words": {"pre": None}}, "splits text into words as 'default'"),
        ("llama", {"words": {"model": "plamo2"}}, "cannot be dequantised"),
    ],
)
def test_what_would_give_other_numbers_is_refused(
    family: str, change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in refusal(ValueError, write_gguf(tmp_path / "m.gguf", family, model_of(family), **change))


def test_parts_and_other_architectures_are_refused(file: Path, tmp_path: Path) -> None:
    import gguf as written

    def bare(architecture: str, **numbers: int) -> Path:
        writer = written.GGUFWriter(tmp_path / "bare.gguf", architecture)
        for key, number in numbers.items():
            writer.add_uint32(key.replace("__", "."), number)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "bare.gguf"

    assert "one of 3 parts" in refusal(ValueError, bare("llama", split__count=3))
    assert "architecture 'plamo', which transformers cannot read" in refusal(ValueError, bare("plamo"))
    assert "model type 'mamba'" in refusal(ValueError, bare("mamba", mamba__block_count=1))


def test_the_names_of_tensors_are_those_of_the_test_files() -> None:
    """So that a test file with a tensor left out cannot pass for a whole one."""
    assert len(tensors_of("llama", model_of("llama"))) == len(list(model_of("llama").parameters()))
