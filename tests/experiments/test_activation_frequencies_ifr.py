"""The activation-frequency study against a hand recomputation, interrupted and resumed, and given bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_frequencies_ifr as study
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, CodeGenConfig, CodeGenForCausalLM

import pyvene_ext as px
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.sweep import run as engine
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_json
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.loading import TINY_FOLDER, TINY_MODELS, load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import figures, folder
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.stats.controls import random_heads
from pyvene_ext.stats.intervals import frequency_interval
from tests.interrupted import stop_at
from tests.processes import start
from tests.saved_models import save_random_model
from tests.tiny_random import FAMILIES

N = 6
MEMORY = 0.001  # GiB: little enough for several batches


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first shipped English prompts, some of other lengths than others."""
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:N]
    path = tmp_path_factory.mktemp("data") / "few.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of random models of each family with the shipped tokenizer."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_random_model(family, folder)
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
    assert np.allclose(np.load(tmp_path / "f/mean_delta.npy"), expected.mean(-1), atol=1e-5)
    frequency = np.load(out)
    assert frequency.dtype == np.float32
    assert np.array_equal(frequency, (np.abs(expected) > tau).mean(-1).astype(np.float32))


@pytest.mark.slow
def test_signed_frequencies_and_other_batches(random_folder: Any, dataset: Path, tmp_path: Path) -> None:
    folder = random_folder("llama3_1")
    for name, flags in {"signed": ["--no_abs"], "one": ["--memory", 0.0005], "many": ["--memory", 2]}.items():
        assert (
            command("--model", folder, "--dataset", dataset, "--out", tmp_path / f"{name}.npy", "--tau", 0.05, *flags)
            == 0
        )
    deltas = np.load(tmp_path / "signed/deltas.npy")
    assert np.array_equal(np.load(tmp_path / "signed.npy"), (deltas > 0.05).mean(-1).astype(np.float32))
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "many.npy"))
    assert np.allclose(np.load(tmp_path / "one/deltas.npy"), np.load(tmp_path / "many/deltas.npy"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
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
        "clean.npy", "config.yaml", "deltas.npy", "mean_delta.npy",
        "frequency_vs_tau.csv", "heads.csv", "prompts.json", "attention.json",
        *(f"figures/{name}.{ending}" for name in ("frequency", "mean_delta", "frequency_vs_tau", "abs_delta")
          for ending in ("png", "pdf")),
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "IO above S on" in shown and "right above" not in shown and str(out) in shown

    # The written config alone repeats the run.
    config = yaml.safe_load((tmp_path / "f/config.yaml").read_text(encoding="utf-8"))
    first, config["out"] = np.load(tmp_path / "f/deltas.npy"), str(tmp_path / "again.npy")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert command("--config", tmp_path / "again.yaml") == 0
    assert np.array_equal(np.load(tmp_path / "again/deltas.npy"), first)


@pytest.mark.parametrize("signed", [False, True])
def test_by_default_a_tenth_is_active_and_the_largest_effect_comes_first(
    signed: bool, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--dataset", dataset, "--out", tmp_path / "f.npy", *["--no_abs"] * signed) == 0
    shown = capsys.readouterr().out
    deltas, frequency = np.load(tmp_path / "f/deltas.npy"), np.load(tmp_path / "f.npy")
    size = (deltas if signed else np.abs(deltas)).astype(np.float64)
    tau = sorted(size.ravel())[int(0.9 * (size.size - 1))]  # 48 x 6 values: the quantile lies a little above this one
    meta = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert meta["tau"] == pytest.approx(tau, rel=0.1) and meta["tau"] == np.quantile(size, 0.9)
    assert "tenth" in meta["tau_is"] and meta["share_active"] == pytest.approx(0.1, abs=1 / size.size)
    assert np.array_equal(frequency, (size > meta["tau"]).mean(-1).astype(np.float32))
    compared = "delta" if signed else "|delta|"
    assert (
        f"active ({compared} > {meta['tau']:.3g}, the tau that a tenth exceed): {meta['share_active']:.1%} of" in shown
    )

    means = deltas.mean(-1, dtype=np.float64)
    order = np.argsort(-np.abs(means), axis=None, kind="stable")
    rows = head_rows(tmp_path / "f/heads.csv")
    assert list(rows) == [divmod(int(head), means.shape[1]) for head in order]
    for at, row in rows.items():
        low, mean, high = (float(row[f"mean_delta{end}"]) for end in ("_low", "", "_high"))
        assert mean == pytest.approx(means[at]) and low <= mean <= high
        half = 1.96 * deltas[at].std(ddof=1) / N**0.5
        assert 0.5 * half <= (high - low) / 2 <= 1.3 * half, "of the bootstrap over so few prompts"
    (at, largest), *_ = rows.items()
    (evidence,) = meta["evidence"]
    assert evidence["interval"] == [float(largest[f"mean_delta{end}"]) for end in ("", "_low", "_high")]
    assert f"mean delta of {at[0]}.{at[1]}, the largest of 48 heads" in shown
    assert f"{np.median(np.sort(np.abs(means), axis=None)[:-1]):.2g}" in evidence["control"]


def test_published_runs_give_tau(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", dataset, "--out", tmp_path / "f.npy", "--tau", 0.03) == 0
    meta = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert meta["tau"] == 0.03 and meta["tau_is"] == "given" and "active (|delta| > 0.03):" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "resample", "noise"])
def test_the_numbers_are_those_of_the_plain_engine(kind: Any, dataset: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny-gemma2")
    prompts = PromptSet.load(dataset).tokenize(tokenizer)
    expected = run(model, all_heads(model.config, kind, seed=3), prompts, progress=False)
    flags = ["--kind", kind, "--seed", 3, "--memory", 4 * MEMORY]
    assert command("--model", "tiny-gemma2", "--dataset", dataset, "--out", tmp_path / "f.npy", *flags) == 0
    deltas = np.load(tmp_path / "f/deltas.npy")
    assert deltas.dtype == np.float32 and deltas.shape == (6, 8, N)
    assert np.allclose(deltas.reshape(-1, N), expected.delta, atol=1e-4)
    assert np.allclose(np.load(tmp_path / "f/clean.npy"), expected.baseline, atol=1e-4)


def test_a_dry_run_shows_the_plan_and_does_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px, "reference_for", None)
    monkeypatch.setattr(Executor, "run", None)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", dataset, "--kind", "mean", "--dry_run"]
    assert command(*flags) == 0
    shown = capsys.readouterr().out
    assert f"48 interventions x {N} prompts" in shown and "under a minute" in shown and "at most" not in shown
    assert command(*flags, "--screen", "atp", "--tau", 1) == 0
    assert "at most" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# -- sooner, with less -------------------------------------------------------------------------------------------------


def head_rows(path: Path) -> dict[tuple[int, int], dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {(int(row["layer"]), int(row["head"])): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_screen_runs_what_could_matter_and_says_what_it_missed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", dataset, "--kind", "mean", "--positions", "last", "--tau", 4]
    assert command(*flags, "--out", tmp_path / "all.npy") == 0
    everything, without = np.load(tmp_path / "all/deltas.npy"), np.load(tmp_path / "all.npy")
    capsys.readouterr()
    assert command(*flags, "--out", tmp_path / "f.npy", "--screen", "atp", "--check", 0) == 0
    shown = capsys.readouterr().out

    estimates, deltas, frequency = (np.load(tmp_path / f"f{name}.npy") for name in ("/estimates", "/deltas", ""))
    could_matter = (np.abs(estimates) > 0.5 * 4).any(-1)
    was_run = np.isfinite(frequency)
    left_out = int((~was_run).sum())
    assert left_out and was_run[could_matter].all() and was_run.sum() == could_matter.sum() + 20
    assert np.array_equal(np.isfinite(deltas), np.broadcast_to(was_run[..., None], deltas.shape))
    assert np.allclose(deltas[was_run], everything[was_run], atol=1e-5)
    assert np.array_equal(frequency[was_run], without[was_run])

    rows = list(head_rows(tmp_path / "f/heads.csv").values())
    assert all(row["frequency"] for row in rows[:-left_out])
    for row in rows[-left_out:]:
        assert row["n_prompts"] == "0" and {row[name] for name in list(row)[3:]} == {""}
    with (tmp_path / "f/frequency_vs_tau.csv").open(encoding="utf-8", newline="") as file:
        means = [float(row["mean"]) for row in csv.DictReader(file)]
    assert means == sorted(means, reverse=True), "of the heads that were run"

    meta = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    active = (np.abs(everything) > 4).any(-1)
    assert meta["n_could_matter"] == could_matter.sum() and meta["n_checked"] == 20
    assert meta["n_caught"] == (active & could_matter).sum() and meta["n_heads_run"] == was_run.sum()
    assert meta["n_missed"] == (active & was_run & ~could_matter).sum()
    assert 0 <= meta["recall_low"] <= meta["recall"] <= meta["recall_high"] <= 1
    assert f"recall: {meta['recall']:.3f}" in shown and "of the heads x prompts that were run" in shown
    assert meta["share_active"] == pytest.approx((np.abs(everything) > 4)[was_run].mean())

    # A later run without a screen leaves no estimates behind; one where nothing is active has no recall.
    assert command(*flags, "--out", tmp_path / "f.npy") == 0
    assert not (tmp_path / "f/estimates.npy").exists()
    assert command(*flags[:-1], 1000, "--out", tmp_path / "f.npy", "--screen", "atp") == 0
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["recall"] is None


@pytest.mark.slow
def test_a_head_takes_no_more_prompts_once_its_interval_is_narrow(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", dataset, "--tau", 0.5, "--no_abs", "--kind", "resample"]
    assert command(*flags, "--out", tmp_path / "all.npy") == 0
    everything = np.load(tmp_path / "all/deltas.npy")
    capsys.readouterr()
    assert command(*flags, "--out", tmp_path / "f.npy", "--width", 0.7, "--block", 2) == 0
    shown = capsys.readouterr().out
    deltas, frequency, clean = (np.load(tmp_path / f"f{name}.npy") for name in ("/deltas", "", "/clean"))
    was_run = np.isfinite(deltas)
    assert np.allclose(deltas[was_run], everything[was_run], atol=1e-5)
    assert np.array_equal(np.isfinite(clean), was_run.any((0, 1)))
    taken = rng(0, "sequential").permutation(N)
    for (layer, head), row in head_rows(tmp_path / "f/heads.csv").items():
        n = int(row["n_prompts"])
        assert set(np.flatnonzero(was_run[layer, head])) == set(taken[:n])
        for seen in range(2, n + 1, 2):
            interval = frequency_interval(everything[layer, head, taken[:seen]] > 0.5)
            assert (interval.high - interval.low <= 0.7) == (seen == n) or seen == n == N
        found = [float(row[name]) for name in ("frequency", "low", "high")]
        assert np.allclose(found, interval) and np.float32(found[0]) == frequency[layer, head]
    counts = was_run.sum(-1)
    assert len(np.unique(counts)) > 1, "some heads stop before others"
    meta = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert meta["mean_prompts_a_head"] == counts.mean() and meta["n_heads_reached"] <= counts.size
    assert f"of 48 heads, after {counts.mean():.1f} prompts per head" in shown


# -- interrupted, killed, refused --------------------------------------------------------------------------------------


MODES: dict[str, list[Any]] = {
    "all": [],
    "screen": ["--tau", 4, "--screen", "atp"],
    "width": ["--tau", 0.1, "--width", 0.45, "--block", 2],
}


# Every kind and every mode, not all of their pairs: what is kept of a run knows nothing of the kind.
@pytest.mark.parametrize(("kind", "mode"), [("noise", "all"), ("mean", "screen"), ("zero", "width")])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    kind: str,
    mode: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = stop_at(monkeypatch, 3, Executor, "run")
    flags = ["--dataset", dataset, "--kind", kind, "--memory", MEMORY, *MODES[mode]]
    assert command(*flags, "--out", tmp_path / "stopped.npy") == 130
    assert not (tmp_path / "stopped.npy").exists() and not (tmp_path / "stopped.json").exists()
    # Other settings must not be mixed into it.
    assert command(*flags, "--positions", "last", "--out", tmp_path / "stopped.npy") == 2
    assert "unfinished run that differs in specs" in capsys.readouterr().err
    assert command(*flags, "--out", tmp_path / "stopped.npy") == 0
    waves = [wave for _, wave, *_ in calls]
    assert waves[3] == waves[2] and not set(waves[:2]) & set(waves[3:]), "finished batches are not run again"
    assert command(*flags, "--out", tmp_path / "whole.npy") == 0
    assert written(tmp_path / "stopped.npy") == written(tmp_path / "whole.npy")


def written(out: Path) -> dict[str, bytes]:
    """The names of all files of a run, and what is in those that say nothing of time and place."""
    folder = out.with_suffix("")
    paths = {path.name.replace(out.stem, "OUT"): path for path in out.parent.glob(f"*{out.stem}*") if path.is_file()}
    paths |= {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    told = ("attention.json", ".npy", ".csv", ".png", ".pdf")
    return {name: path.read_bytes() if path.name.endswith(told) else b"" for name, path in paths.items()}


def run_as_process(flags: list[Any]) -> None:
    """The study; its figures are not drawn, so that most moments are moments of the sweep."""
    figures.save = lambda figure, path: write_json(path, "a figure")
    os._exit(command(*flags))


@pytest.mark.parametrize(("mode", "kills"), [("all", 20), ("screen", 4), ("width", 4)])
def test_kills_at_random_moments_end_in_the_same_files(mode: str, kills: int, tmp_path: Path) -> None:
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][: 3 * N]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    flags = ["--dataset", tmp_path / "pairs.json", "--kind", "mean", "--memory", MEMORY, *MODES[mode]]

    def whole(name: str) -> tuple[float, dict[str, bytes]]:
        process, started = start(run_as_process, [*flags, "--out", tmp_path / name]), time.monotonic()
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - started, written(tmp_path / name)

    _, expected = whole("first.npy")  # which also leaves the reference statistics in the cache
    took, again = whole("second.npy")
    assert again == expected
    moments, done, rounds = np.random.default_rng(0), 0, 0
    while done < kills:  # a run that finishes between two kills is compared, and another begins
        out, rounds = tmp_path / f"killed-{rounds:02d}.npy", rounds + 1
        while True:
            process = start(run_as_process, [*flags, "--out", out])
            last = done >= kills
            process.join(300 if last else moments.uniform(0, took))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL and not last
            done += 1
        assert written(out) == expected


@pytest.mark.slow
def test_a_run_in_progress_elsewhere_is_left_alone(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts: list[Any] = []
    original = engine.Store

    with pytest.MonkeyPatch.context() as patch:

        def noted(folder: Path, its_facts: Any, plan: Any, **options: Any) -> Store:
            facts.append(its_facts)
            return original(folder, its_facts, plan, **options)

        patch.setattr(engine, "Store", noted)
        assert command("--dataset", dataset, "--out", tmp_path / "other.npy") == 0
    with Store(tmp_path / "f/unfinished", facts[0], {}):
        assert command("--dataset", dataset, "--out", tmp_path / "f.npy") == 2
    assert f"is in use by another process (pid {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "f.npy").exists()


@pytest.mark.slow
def test_of_several_processes_one_prints_and_writes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (px, folder):
        monkeypatch.setattr(module, "is_main_process", lambda: False)
    assert command("--dataset", dataset, "--dry_run", "--out", tmp_path / "f.npy") == 0
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    assert command("--dataset", dataset, "--out", tmp_path / "f.npy") == 0
    assert "written" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["unfinished"]


def pair(**changes: Any) -> dict[str, Any]:
    clean = "When Lisa and David went to the store, David gave the book to"
    return {"clean": clean, "corrupt": clean, "io_name": "Lisa", "s_name": "David", "io_token": " Lisa", **changes}


BAD_DATA: dict[str, tuple[str, str]] = {
    "empty": ("", "empty"),
    "no pairs": (json.dumps({"pairs": []}), "no pairs"),
    "malformed": ("{", "JSON"),
    "a field missing": (json.dumps([{"corrupt": "x"}]), "pair 0"),
    "no answers": (json.dumps([pair(), {"clean": "Lisa and David went to"}]), "prompt 1"),
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
        (["--tau", "inf"], "--tau must be 0 or more"),
        (["--batch_size", "0"], "--batch_size must be 1 or more"),
        (["--limit", "1"], "gives 1 prompt; an interval over prompts needs two or more."),
        (["--limit", "-1"], "--limit must be 0 or more"),
        (["--margin", "-1"], "--margin must be 0 or more"),
        (["--check", "1.5"], "--check must be from 0 to 1"),
        (["--width", "0"], "--width must be above 0 and at most 1"),
        (["--block", "0"], "--block must be 1 or more"),
        (["--memory", "0"], "--memory must be above 0"),
        (["--memory", "inf"], "--memory must be above 0"),
        (["--memory", "1e-5"], "are too little for prompts of"),
        (["--screen", "atp", "--width", "0.2"], "--screen and --width were both given"),
        (["--screen", "atp"], "give --tau too"),
        (["--width", "0.2"], "give --tau too"),
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


def test_frequencies_may_be_named_like_the_prompts(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_bytes(dataset.read_bytes())
    run, _ = study.run_folder(study.Config(dataset="mine.json", out=Path("mine.npy")))
    assert run._summary == tmp_path / "mine.meta.json"
    run, _ = study.run_folder(study.Config(dataset="mine.json", out=Path("other.npy")))
    assert run._summary == tmp_path / "other.json"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--meta", "mine.json"], "give another --meta"),
        (["--meta", "linked.json"], "give another --meta"),
        (["--meta", "flags.yaml", "--config", "flags.yaml"], "flags.yaml is what --config reads"),
    ],
)
def test_an_output_that_is_an_input_is_refused_and_the_input_kept(
    flags: list[str],
    expected: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_bytes(dataset.read_bytes())
    Path("linked.json").symlink_to("mine.json")
    Path("flags.yaml").write_text("tau: 0.5\n", encoding="utf-8")
    assert command("--dataset", "mine.json", *flags) == 2
    assert expected in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "linked.json", "flags.yaml"}
    assert Path("mine.json").read_bytes() == dataset.read_bytes()
    assert Path("flags.yaml").read_text(encoding="utf-8") == "tau: 0.5\n"


@pytest.mark.slow
def test_the_config_of_an_earlier_run_may_be_given_and_is_replaced(dataset: Path, tmp_path: Path) -> None:
    assert command("--dataset", dataset, "--out", tmp_path / "f.npy") == 0
    assert command("--config", tmp_path / "f/config.yaml") == 0


def test_an_unsupported_model_type_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CodeGenConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=4, rotary_dim=2, bos_token_id=1, eos_token_id=2)
    CodeGenForCausalLM(config).save_pretrained(tmp_path / "other")
    assert command("--model", tmp_path / "other", "--out", tmp_path / "f.npy") == 2
    assert "codegen" in capsys.readouterr().err


def test_the_same_weights_under_another_config_do_not_resume(
    random_folder: Any,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A soft-cap is no weight: batches computed without it must not be mixed with batches computed with it."""
    stop_at(monkeypatch, 3, Executor, "run")
    folder = random_folder("gemma2")
    flags = ["--model", folder, "--dataset", dataset, "--memory", 0.0004, "--out", tmp_path / "f.npy"]
    assert command(*flags) == 130
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 7.0}), encoding="utf-8")
    assert command(*flags) == 2
    assert "unfinished run that differs in model config" in capsys.readouterr().err


# -- what the shipped models show --------------------------------------------------------------------------------------


@pytest.mark.slow
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
    controls = random_heads(most, layers, heads, 20, rng(0, "controls")).sets

    def jointly(chosen: Any) -> tuple[Ablation, ...]:
        by_layer: dict[int, list[int]] = {}
        for layer, head in chosen:
            by_layer.setdefault(layer, []).append(head)
        return tuple(Ablation(site="z", layer=at, heads=tuple(which), **how) for at, which in by_layer.items())

    model, tokenizer = load_model(name)
    prompts = PromptSet.load(PROMPTS / "ioi_en.json").tokenize(tokenizer)
    result = px.sweep(model, [jointly(most), *map(jointly, controls)], prompts, progress=False)
    left = result.intervened.mean(1) / result.baseline.mean()  # share of the logit difference that survives
    assert left[0] <= 0.4
    assert left[1:].min() >= 0.75 and np.median(left[1:]) >= 0.9


@pytest.mark.slow
def test_the_shipped_models_give_the_published_file_format(tmp_path: Path) -> None:
    out = tmp_path / "zh.npy"
    assert command("--dataset", "ioi_zh", "--limit", 6, "--out", out) == 0
    frequency = np.load(out)
    config = AutoConfig.from_pretrained(TINY_FOLDER / "tiny-qwen2.5")
    assert frequency.shape == (config.num_hidden_layers, config.num_attention_heads)
    assert ((frequency >= 0) & (frequency <= 1)).all()


@pytest.mark.slow
def test_answers_that_are_no_names_are_called_right_and_wrong(
    tmp_path: Path, own_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--dataset", own_pairs, "--out", tmp_path / "f.npy") == 0
    shown = capsys.readouterr().out
    assert "right above wrong on " in shown and "IO" not in shown
