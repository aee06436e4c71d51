"""The activation-frequency study against a hand recomputation, interrupted and resumed, and given bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_frequencies_ifr as study
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from pyvene_ext.cli import run as run_study
from pyvene_ext.loading import TINY_FOLDER, TINY_MODELS, load_model
from pyvene_ext.prompts import PromptSet
from pyvene_ext.runner import run
from pyvene_ext.runs import rng
from pyvene_ext.specs import Ablation
from pyvene_ext.stats import layer_matched_random_heads
from tests.tiny_random import CLASSES, FAMILIES, tiny_config

N = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first shipped English prompts, some of other lengths than others."""
    pairs = json.loads((study.PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:N]
    path = tmp_path_factory.mktemp("data") / "few.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of random models of each family with the shipped tokenizer."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(TINY_FOLDER / TINY_MODELS[0] / "tokenizer.json"), pad_token="<pad>", bos_token="<bos>"
        )
        config = tiny_config(family)
        config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        model = CLASSES[family]["causal_lm"](config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.25 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def deltas_by_hand(folder: Path, dataset: Path) -> np.ndarray:
    """One prompt, one head at a time: z of the head zeroed by a plain hook, logits read at the last token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(folder)[1]
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    heads = model.config.num_attention_heads
    pairs = json.loads(dataset.read_text(encoding="utf-8"))
    deltas = np.zeros((len(blocks), heads, len(pairs)))
    for prompt, pair in enumerate(pairs):
        ids = torch.tensor([tokenizer(pair["clean"])["input_ids"]])
        io, s = (
            tokenizer(" " + pair[name], add_special_tokens=False)["input_ids"][0] for name in ("io_name", "s_name")
        )

        def logit_diff(ids: torch.Tensor = ids, io: int = io, s: int = s) -> float:
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            return float(logits[io] - logits[s])

        clean = logit_diff()
        for layer, block in enumerate(blocks):
            projection = block.self_attn.o_proj if hasattr(block, "self_attn") else block.attn.c_proj
            for head in range(heads):

                def zero(_: Any, args: tuple, head: int = head) -> tuple:
                    z = args[0].clone()
                    width = z.shape[-1] // heads
                    z[..., head * width : (head + 1) * width] = 0.0
                    return (z,)

                handle = projection.register_forward_pre_hook(zero)
                deltas[layer, head, prompt] = clean - logit_diff()
                handle.remove()
    return deltas


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_equal_a_hand_recomputation(family: str, random_folder: Any, dataset: Path, tmp_path: Path) -> None:
    folder, out = random_folder(family), tmp_path / "f.npy"
    expected = deltas_by_hand(folder, dataset)
    sizes = np.sort(np.abs(expected), axis=None)
    gap = len(sizes) // 4 + int(np.diff(sizes[len(sizes) // 4 : -len(sizes) // 4]).argmax())
    tau = float(sizes[gap : gap + 2].mean())  # between two deltas, so that rounding cannot decide
    assert command("--model", folder, "--dataset", dataset, "--out", out, "--tau", tau, "--batch_size", 4) == 0
    assert np.allclose(np.load(tmp_path / "f/deltas.npy"), expected, atol=1e-5, rtol=1e-5)
    frequency = np.load(out)
    assert frequency.dtype == np.float32
    assert np.array_equal(frequency, (np.abs(expected) > tau).mean(-1).astype(np.float32))


def test_signed_frequencies_and_other_batches(random_folder: Any, dataset: Path, tmp_path: Path) -> None:
    folder = random_folder("llama3_1")
    for name, flags in {"signed": ["--no_abs"], "one": ["--batch_size", 1], "many": ["--batch_size", 99]}.items():
        assert (
            command("--model", folder, "--dataset", dataset, "--out", tmp_path / f"{name}.npy", "--tau", 0.05, *flags)
            == 0
        )
    deltas = np.load(tmp_path / "signed/deltas.npy")
    assert np.array_equal(np.load(tmp_path / "signed.npy"), (deltas > 0.05).mean(-1).astype(np.float32))
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "many.npy"))
    assert np.allclose(np.load(tmp_path / "one/deltas.npy"), np.load(tmp_path / "many/deltas.npy"), atol=1e-5)


def test_what_is_written(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f.npy"
    assert command("--dataset", dataset, "--out", out, "--meta", tmp_path / "meta.json") == 0
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert {"model", "revision", "tau", "n", "kind", "positions", "dtype", "seed", "versions", "weight_hash"} <= set(
        meta
    )
    assert meta["n"] == N
    written = {str(path.relative_to(tmp_path / "f")) for path in (tmp_path / "f").rglob("*") if path.is_file()}
    assert written == {
        "clean.npy", "config.yaml", "deltas.npy", "frequency_vs_tau.csv", "heads.csv",
        "figures/frequency.png", "figures/mean_delta.png", "figures/frequency_vs_tau.png", "figures/abs_delta.png",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "IO above S on" in shown and str(out) in shown

    # The written config alone repeats the run.
    config = yaml.safe_load((tmp_path / "f/config.yaml").read_text(encoding="utf-8"))
    first, config["out"] = np.load(tmp_path / "f/deltas.npy"), str(tmp_path / "again.npy")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert command("--config", tmp_path / "again.yaml") == 0
    assert np.array_equal(np.load(tmp_path / "again/deltas.npy"), first)


@pytest.mark.parametrize("kind", ["zero", "mean", "noise"])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    kind: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", dataset, "--kind", kind]
    assert command(*flags, "--out", tmp_path / "whole.npy") == 0
    layers: list[int] = []

    def until_interrupted(model: Any, specs: Any, *args: Any, **kwargs: Any) -> Any:
        layers.append(specs[0].layer)
        if len(layers) == 3:
            raise KeyboardInterrupt
        return run(model, specs, *args, **kwargs)

    monkeypatch.setattr(study, "run", until_interrupted)
    assert command(*flags, "--out", tmp_path / "stopped.npy") == 130
    assert not (tmp_path / "stopped.npy").exists() and not (tmp_path / "stopped.json").exists()
    # Other settings must not be mixed into it.
    assert command(*flags, "--positions", "last", "--out", tmp_path / "stopped.npy") == 2
    assert "unfinished run with another specs" in capsys.readouterr().err
    assert command(*flags, "--out", tmp_path / "stopped.npy") == 0
    assert layers[:3] == [0, 1, 2] and layers[3] == 2, "finished layers are not run again"
    for name in (".npy", "/deltas.npy", "/clean.npy"):
        assert (tmp_path / f"stopped{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    assert not (tmp_path / "stopped/unfinished").exists()


def pair(**changes: Any) -> dict[str, Any]:
    clean = "When Lisa and David went to the store, David gave the book to"
    return {"clean": clean, "corrupt": clean, "io_name": "Lisa", "s_name": "David", "io_token": " Lisa", **changes}


BAD_DATA: dict[str, tuple[str, str]] = {
    "empty": ("", "empty"),
    "no pairs": (json.dumps({"pairs": []}), "no pairs"),
    "malformed": ("{", "JSON"),
    "a field missing": (json.dumps([{"clean": "x"}]), "pair 0"),
    "one name": (json.dumps([pair(s_name="Lisa")]), "pair 0"),
    "unknown words": (json.dumps([pair(), pair(clean="Zyx and Lisa and David went to")]), "prompt 1"),
    "too long": (json.dumps([pair(clean="Lisa and David " * 200 + "went to")]), "prompt 0"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_sentence_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = BAD_DATA[case]
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    assert command("--dataset", path, "--out", tmp_path / "f.npy") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and expected.lower() in error.lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tau", "-1"], "--tau must be 0 or more"),
        (["--tau", "nan"], "--tau must be 0 or more"),
        (["--batch_size", "0"], "--batch_size must be 1 or more"),
        (["--model", "tiny-quen2.5"], "tiny-qwen2.5"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--dataset", "nowhere.json"], "nowhere.json"),
        (["--dataset", "ioi_eng"], "did you mean 'ioi_en'?"),
        (["--out", "/dev/null/x.npy"], "is not a folder one may write in"),
        (["--positions", "verb"], "no position 'verb'"),
        (["--out", "x.npz"], "must end in .npy"),
    ],
)
def test_bad_flags_are_one_sentence(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0]
    assert not list(tmp_path.iterdir())


def test_an_unsupported_model_type_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    OPTForCausalLM(OPTConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "opt")
    assert command("--model", tmp_path / "opt", "--out", tmp_path / "f.npy") == 2
    assert "opt" in capsys.readouterr().err


def test_a_half_written_row_is_never_read(dataset: Path, tmp_path: Path) -> None:
    """A process killed while it writes leaves a temporary file at most, which counts for nothing."""
    out, folder = tmp_path / "f.npy", tmp_path / "f/unfinished"
    folder.mkdir(parents=True)
    (folder / ".layer-000-abc.npy").write_bytes(b"\x93NUMPY")
    (folder / "layer-000.npy").write_bytes(b"\x93NUMPY")  # without a key.json it belongs to no run
    assert command("--dataset", dataset, "--out", out) == 0
    assert np.isfinite(np.load(out)).all()


# -- what the shipped models show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_most_active_heads_are_the_ones_ioi_needs(name: str, tmp_path: Path) -> None:
    """Ablated together, the heads active most often destroy IOI; as many others of the same layers do not.

    Mean ablation at the last token (its mean over the prompts), where the answer is read: a head of the first layer taken away
    everywhere breaks much more than IOI. tau is 0.5, because at a small one nearly every head is active (the clean logit
    difference is above 10).
    """
    out, how = tmp_path / "f.npy", {"kind": "mean", "mean": "per_position", "positions": "last"}
    flags = [f"--{flag}={value}" for flag, value in how.items()]
    assert command("--model", name, "--tau", 0.5, "--batch_size", 50, "--out", out, *flags) == 0
    frequency = np.load(out)
    layers, heads = frequency.shape
    most = [divmod(int(i), heads) for i in np.argsort(-frequency, axis=None, kind="stable")[:6]]
    controls = layer_matched_random_heads(most, layers, heads, 20, rng(0, "controls"))

    def jointly(chosen: Any) -> tuple[Ablation, ...]:
        by_layer: dict[int, list[int]] = {}
        for layer, head in chosen:
            by_layer.setdefault(layer, []).append(head)
        return tuple(Ablation(site="z", layer=at, heads=tuple(which), **how) for at, which in by_layer.items())

    model, tokenizer = load_model(name)
    prompts = PromptSet.load(study.PROMPTS / "ioi_en.json").tokenize(tokenizer)
    result = run(model, [jointly(most), *map(jointly, controls)], prompts, progress=False, batch_size=50)
    left = result.intervened.mean(1) / result.clean.mean()  # share of the logit difference that survives
    assert left[0] <= 0.4
    assert left[1:].min() >= 0.75 and np.median(left[1:]) >= 0.9


def test_the_shipped_models_give_the_published_file_format(tmp_path: Path) -> None:
    out = tmp_path / "zh.npy"
    assert command("--dataset", "ioi_zh", "--out", out) == 0
    frequency = np.load(out)
    config = AutoConfig.from_pretrained(TINY_FOLDER / "tiny-qwen2.5")
    assert frequency.shape == (config.num_hidden_layers, config.num_attention_heads)
    assert ((frequency >= 0) & (frequency <= 1)).all()


def test_the_same_weights_under_another_config_do_not_resume(
    random_folder: Any,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A soft-cap is no weight: rows computed without it must not be mixed with rows computed with it."""
    folder = random_folder("gemma2")
    flags = ["--model", folder, "--dataset", dataset, "--out", tmp_path / "f.npy"]
    calls: list[int] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(study, "run", once)
    assert command(*flags) == 130
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 7.0}), encoding="utf-8")
    assert command(*flags) == 2
    assert "unfinished run with another config_hash" in capsys.readouterr().err
