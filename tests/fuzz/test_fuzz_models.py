"""Folders of models that are damaged in any way: read as what their files say, or refused in one sentence and little memory."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyvene_ext.engine.plain import run
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.tokenized import TokenizedPrompts, answer_pairs
from pyvene_ext.specs.ablation import Ablation
from tests.fuzz.outcomes import few, outcome
from tests.fuzz.test_fuzz_files import changed, damaged
from tests.fuzz.test_fuzz_no_code import KINDS, traps
from tests.saved_models import save_random_model
from tests.tiny_random import FAMILIES, random_inputs

GIGABYTE = 2**30


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What asks for much more memory than there is now gets none."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIGABYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save_random_model(family, folder)
    return folders


def copy_of(folder: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt, in the place of the last one."""
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    return Path(shutil.copytree(folder, tmp_path / "model"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**random_inputs()).logits


def loaded(folder: Path) -> Any:
    """A model and its tokenizer from a folder, that do all a study asks of them; or None."""
    given = outcome(load_model, folder, names=folder)
    if given is None:
        return None
    model, tokenizer = given
    assert logits(model).isfinite().all()
    ids = tokenizer("Anna and Mark met")["input_ids"]
    if not ids:  # which the prompts' reader refuses
        return given
    prompts = TokenizedPrompts((tuple(ids),) * 2, answer_pairs(((0, 1),) * 2), ({"end": -1, "last": -1},) * 2, pad_id=0)
    spec = Ablation(kind="mean", site="mlp_out", layer=0)
    plain = outcome(lambda: run(model, spec, prompts, progress=False))
    fast = outcome(lambda: sweep(model, spec, prompts, progress=False))
    assert (plain is None) == (fast is None)
    if plain is not None:
        np.testing.assert_allclose(fast.intervened, plain.intervened, rtol=1e-4, atol=1e-4)
    return given


# -- weights -----------------------------------------------------------------------------------------------------------

SIZES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def by_hand(content: bytes) -> dict[str, Tensor] | None:
    """What a safetensors file says, read without its library; None if it cannot be made out."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length].decode())
        data = content[8 + length :]
        found = {}
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, end = about["data_offsets"]
            if about["dtype"] == "BF16":
                raw = np.frombuffer(data[start:end], "<u2").astype("<u4") << 16
                array = raw.astype("<u4").view("<f4")
            else:
                array = np.frombuffer(data[start:end], SIZES[about["dtype"]])
            found[name] = torch.from_numpy(array.reshape(about["shape"]).copy())
        return found
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None


def check_weights(folder: Path) -> None:
    """The model has the weights that its file says, or there is none."""
    said = by_hand((folder / "model.safetensors").read_bytes())
    given = loaded(folder)
    if given is None:
        return
    assert said is not None
    own = dict(given[0].named_parameters(remove_duplicate=False))
    assert {name.partition(".weight")[0] for name in own.keys() - said.keys()} <= {"lm_head"}, "but for what is tied"
    for name in own.keys() & said.keys():
        torch.testing.assert_close(own[name], said[name].to(own[name].dtype), rtol=0, atol=0)


@given(data=st.data())
@few(3)
def test_damaged_weights_are_read_or_refused(data: st.DataObject, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved[data.draw(st.sampled_from(FAMILIES))], tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = content[8 : 8 + length], content[8 + length :]
    match data.draw(st.sampled_from(["header", "header", "length", "bytes", "tensors"])):
        case "header":
            entries = json.loads(header)
            names = [name for name in entries if name != "__metadata__"]
            chosen, other = (data.draw(st.sampled_from(names)) for _ in range(2))
            match data.draw(st.sampled_from(["dtype", "shape", "offsets", "swap", "drop", "double", "any"])):
                case "dtype":
                    entries[chosen]["dtype"] = data.draw(
                        st.sampled_from(["I32", "BF16", "F64", "BOOL", "F8_E4M3", "x"])
                    )
                case "shape":
                    sizes = [*entries[chosen]["shape"][::-1], data.draw(st.sampled_from([0, 1, -1, 2, 10**9, 10**18]))]
                    entries[chosen]["shape"] = sizes[: data.draw(st.integers(0, 3))]
                case "offsets":
                    at = data.draw(st.integers(0, 1))
                    entries[chosen]["data_offsets"][at] += data.draw(st.sampled_from([-4, 4, 1, 10**9, -(10**9)]))
                case "swap":
                    entries[chosen], entries[other] = entries[other], entries[chosen]
                case "drop":
                    del entries[chosen]
                case "double":
                    entries[data.draw(st.sampled_from(["x", f"{chosen}s", chosen.replace("0", "9")]))] = entries[other]
                case "any":
                    entries = data.draw(changed(entries))
            header = json.dumps(entries).encode()
            header += b" " * (-len(header) % 8)
            content = struct.pack("<Q", len(header)) + header + tensors
        case "length":
            length = data.draw(st.sampled_from([0, 1, length - 8, length + 8, 2**31, 2**40, 2**63, 2**64 - 1]))
            content = struct.pack("<Q", length) + content[8:]
        case "bytes":
            content = data.draw(damaged(content))
        case "tensors":
            at = data.draw(st.integers(0, len(tensors) // 4 - 1)) * 4
            bits = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38, 0.0, 1e-45]))
            content = content[: 8 + length + at] + struct.pack("<f", bits) + content[8 + length + at + 4 :]
    file.write_bytes(content)
    check_weights(folder)


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Put tensors into a weights file; None takes one out."""
    file = folder / "model.safetensors"
    held = {name: tensor.clone() for name, tensor in load_file(file).items()} | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file, metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({NORM: torch.full((42,), math.nan)}, f"{NORM} is not finite"),
        ({NORM: torch.full((42,), math.inf, dtype=torch.float16)}, f"{NORM} is not finite"),
        ({NORM: torch.ones(42, dtype=torch.int64)}, f"{NORM} has dtype I64 in model.safetensors"),
        ({NORM: torch.ones(42, dtype=torch.complex64)}, f"{NORM} has dtype C64 in model.safetensors"),
        ({NORM: torch.ones(42, dtype=torch.bool)}, f"{NORM} has dtype BOOL in model.safetensors"),
        ({NORM: torch.ones(41)}, rf"{NORM} has shape \[41\] in model.safetensors but \[42\] by config.json"),
        ({NORM: None}, "lacks 1 of the weights"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(51, 42)}, "weights of more layers .model.layers.3.mlp"),
        ({NORM: torch.full((42,), 3e38)}, "the logits of .* are not finite"),
    ],
)
def test_weights_that_mean_nothing_are_named(
    tensors: dict[str, Tensor | None], said: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(saved["llama3_1"], tmp_path)
    rewrite(folder, **tensors)
    with pytest.raises(ValueError, match=said):
        load_model(folder)


def test_surplus_weights_that_are_of_no_layer_do_no_harm(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["llama3_1"], tmp_path)
    expected = logits(load_model(folder)[0])
    rewrite(
        folder, **{"score.weight": torch.ones(3, 42), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    )
    assert torch.equal(logits(load_model(folder)[0]), expected)


# -- config ------------------------------------------------------------------------------------------------------------

ABSURD = [0, -1, 1, 2, 7, 10**4, 10**7, 10**9, 10**12, 10**30, -(10**12), 0.0, -0.5, 1.5, math.nan, math.inf]
ODD: list[Any] = [None, True, "x", "", [], {}, [3], {"a": 1}, "7", "\ud800", "torch.load", [[]] * 3]
# Fields that change nothing a study measures.
IDLE = {
    "initializer_range",
    "use_cache",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
}
OPTIONAL = [
    *("head_dim", "num_key_value_heads", "num_labels", "pruned_heads", "layer_types", "rope_scaling", "rope_theta"),
    *("quantization_config", "tie_word_embeddings", "return_dict", "output_attentions", "output_hidden_states"),
    *("continuous_thought", "torch_dtype", "chunk_size_feed_forward", "transformers_weights", "text_config"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "attn_implementation", "_name_or_path"),
]


@given(data=st.data())
@few(2)
@example(data=None)
def test_configs_with_absurd_fields_are_right_or_refused(
    data: st.DataObject | None, saved: dict[str, Path], tmp_path: Path
) -> None:
    if data is None:  # as it is
        assert all(loaded(folder) for folder in saved.values())
        return
    folder = copy_of(saved[data.draw(st.sampled_from(FAMILIES))], tmp_path)
    expected = logits(load_model(folder)[0])
    config = json.loads((folder / "config.json").read_text())
    content, fields = "", []
    match data.draw(st.sampled_from(["fields", "fields", "fields", "any", "bytes"])):
        case "fields":
            fields = data.draw(st.lists(st.sampled_from([*config, *config, *OPTIONAL]), min_size=1, max_size=2))
            config |= {name: data.draw(st.sampled_from(ABSURD) | st.sampled_from(ODD)) for name in fields}
            content = json.dumps(config)
        case "any":
            content = json.dumps(data.draw(changed(config)))
        case "bytes":
            content = data.draw(damaged(json.dumps(config).encode())).decode("latin-1")
    (folder / "config.json").write_text(content, encoding="latin-1", errors="replace")
    given = loaded(folder)
    if given is not None:
        model = given[0]
        assert len(
            [name for name in load_file(folder / "model.safetensors") if "norm" in name or "ln_" in name]
        ) == len([name for name, _ in model.named_parameters() if "norm" in name or "ln_" in name]), (
            "every layer is there"
        )
        if {*fields} <= IDLE and fields:
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"n_layer": 10**9}),
        ("gpt2", {"n_layer": 10**6}),
        ("gpt2", {"n_layer": 0}),
        ("gpt2", {"n_layer": 2}),
        ("gpt2", {"n_layer": -1}),
        ("gpt2", {"n_head": -1}),
        ("gpt2", {"n_head": 10**9}),
        ("gpt2", {"num_labels": 10**9}),
        ("gpt2", {"n_embd": 10**6 * 5}),
        ("gpt2", {"n_positions": 10**8}),
        ("gpt2", {"resid_pdrop": math.nan}),
        ("gpt2", {"layer_norm_epsilon": math.nan}),
        ("qwen2_5", {"hidden_size": 10**6}),
        ("qwen2_5", {"num_hidden_layers": 10**9, "layer_types": None}),
        ("qwen2_5", {"intermediate_size": 10**9}),
        ("qwen2_5", {"vocab_size": 10**8}),
        ("qwen2_5", {"vocab_size": 10**12}),
        ("qwen2_5", {"num_key_value_heads": 10**5}),
        ("qwen2_5", {"sliding_window": -1}),
        ("gemma2", {"head_dim": 10**7}),
        ("gemma2", {"final_logit_softcapping": math.nan}),
        ("mistral", {"num_attention_heads": 3}),
        ("mistral", {"return_dict": False}),
        ("llama3_1", {"num_attention_heads": "six"}),
        ("llama3_1", {"hidden_act": "no such function"}),
        ("llama3_1", {"transformers_weights": "../model.safetensors"}),
        ("llama3_1", {"transformers_weights": "adapter_model.bin"}),
    ],
)
def test_configs_that_ask_for_the_impossible_are_refused_in_little_memory(
    family: str, fields: dict[str, Any], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(saved[family], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome(load_model, folder, names=folder) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE // 4 // 1024  # of kilobytes


def test_what_is_missing_is_not_made_up_however_large(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["qwen2_5"], tmp_path)
    rewrite(folder, **{"model.embed_tokens.weight": None, "lm_head.weight": None})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 10**8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json asks for 8.4e\+09 numbers but the weights are"):
        load_model(folder)


# -- shards ------------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def in_shards(folder: Path, *names: str) -> dict[str, Any]:
    """The weights in two files, of which an index tells; the index."""
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    where = {name: names[number % len(names)] for number, name in enumerate(sorted(weights))}
    for shard in names:
        (folder / shard).parent.mkdir(exist_ok=True)
        save_file({name: weights[name] for name in where if where[name] == shard}, folder / shard, {"format": "pt"})
    return {"metadata": {"total_size": 1}, "weight_map": where}


def test_shards_in_the_folder_are_read_and_others_are_not(saved: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(load_model(saved["mistral"])[0])
    for names, fits in (
        (("a.safetensors", "b.safetensors"), True),
        (("a.safetensors", "../b.safetensors"), False),
        (("a.safetensors", str(tmp_path / "b.safetensors")), False),
        (("a.safetensors", "within/b.safetensors"), True),
    ):
        folder = copy_of(saved["mistral"], tmp_path)
        (folder / INDEX).write_text(json.dumps(in_shards(folder, *names)))
        given = outcome(load_model, folder, names=folder)
        assert (given is not None) == fits, names
        if fits:
            assert torch.equal(logits(given[0]), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "torch" in kind or "pickle" in kind])
@pytest.mark.parametrize("name", ["b.bin", "b.safetensors", "b.pt"])
def test_pickles_among_the_shards_are_not_read(kind: str, name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder, mark = copy_of(saved["mistral"], tmp_path), tmp_path / "mark"
    index = in_shards(folder, "a.safetensors", "b.safetensors")
    content, _ = traps(mark)[kind]
    (folder / name).write_bytes(content)
    text = json.dumps(index)
    (folder / INDEX).write_text(text.replace("b.safetensors", name))
    assert outcome(load_model, folder, names=folder) is None
    assert not mark.exists()


def test_tensors_that_torch_saved_are_not_among_the_shards(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["mistral"], tmp_path)
    index = in_shards(folder, "a.safetensors", "b.safetensors")
    torch.save(load_file(folder / "b.safetensors"), folder / "b.bin")
    (folder / INDEX).write_text(json.dumps(index).replace("b.safetensors", "b.bin"))
    with pytest.raises(ValueError, match=r"names 'b\.bin', which is not a safetensors file"):
        load_model(folder)


@given(data=st.data())
@few(3)
def test_a_damaged_index_is_read_or_refused(data: st.DataObject, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["gpt2"], tmp_path)
    expected = logits(load_model(folder)[0])
    index = in_shards(folder, "a.safetensors", "b.safetensors")
    spoilt = changed(index).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(index).encode())
    (folder / INDEX).write_bytes(data.draw(spoilt))
    given = loaded(folder)
    assert given is None or torch.equal(logits(given[0]), expected)


# -- tokenizer and the other files -------------------------------------------------------------------------------------


@given(data=st.data())
@few(2)
def test_damaged_tokenizers_and_other_files_are_read_or_refused(
    data: st.DataObject, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(saved["gpt2"], tmp_path)
    expected = logits(load_model(folder)[0])
    names = ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    file = folder / data.draw(st.sampled_from(names))
    value = json.loads(file.read_text())
    spoilt = changed(value).map(lambda value: json.dumps(value).encode()) | damaged(file.read_bytes())
    file.write_bytes(data.draw(spoilt))
    given = loaded(folder)
    if given is not None:
        assert torch.equal(logits(given[0]), expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[]"),
        ("config.json", '[{"model_type": "gpt2"}]'),
        ("tokenizer_config.json", '{"model_max_length": [1]}'),
        ("generation_config.json", "[]"),
    ],
)
def test_what_was_found_is_named(name: str, text: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["gpt2"], tmp_path)
    said, there = json.loads(text), json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(there | said if isinstance(said, dict) else said))
    assert outcome(load_model, folder, names=folder) is None


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["gpt2"], tmp_path)
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text())
    value["model"]["vocab"]["one more"] = 10**6
    file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="ids up to 1000000 and the model embeds 403 tokens"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("how", ["folder", "loop", "nowhere", "empty"])
def test_what_is_no_file_is_refused(name: str, how: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(saved["gpt2"], tmp_path)
    file = folder / name
    file.unlink()
    match how:
        case "folder":
            file.mkdir()
        case "loop":
            file.symlink_to(file)
        case "nowhere":
            file.symlink_to(folder / "nothing")
        case "empty":
            file.touch()
    with contextlib.suppress(OSError):
        given = outcome(load_model, folder, names=folder)
        assert given is None or name == "generation_config.json"
