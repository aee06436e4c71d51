"""The activation-patching study against a hand recomputation, interrupted and resumed, and given bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import activation_patching as study
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import pyvene_ext as px
from modelcards import head_dim, n_heads, n_kv_heads, n_layers
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import folder as run_folder
from tests.interrupted import stop_at
from tests.saved_models import save_random_model
from tests.tiny_random import FAMILIES

N, UNEQUAL = 4, 2  # pairs, and the one whose texts differ in length
SITES = ("z", "q", "k", "v", "mlp_out", "resid_pre")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the first shipped English pairs, one with a corrupt text of another length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "RESAMPLES", 100)
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"]
    few = pairs[:N]
    words = len(few[UNEQUAL]["clean"].split())
    few[UNEQUAL]["corrupt"] = next(pair["corrupt"] for pair in pairs if len(pair["corrupt"].split()) != words)
    (tmp_path / "few.json").write_text(json.dumps(few), encoding="utf-8")
    equal = [pair for number, pair in enumerate(few) if number != UNEQUAL]
    (tmp_path / "equal.json").write_text(json.dumps(equal), encoding="utf-8")
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# -- by hand -----------------------------------------------------------------------------------------------------------


def hooked(model: Any, site: str, layer: int, head: int | None, change: Any) -> Any:
    """Calls `change` with a copy of a site's values, `pos d`, and has the model go on with what it makes of them."""
    gpt2 = hasattr(model, "transformer")
    block = (model.transformer.h if gpt2 else model.model.layers)[layer]
    attention = block.attn if gpt2 else block.self_attn
    start, width = 0, model.config.hidden_size
    if head is not None:
        width = head_dim(model.config)
        start = head * width + ("qkv".index(site) * n_heads(model.config) * width if gpt2 and site != "z" else 0)

    def changed(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        change(x[0, :, start : start + width])
        return x

    if site in ("z", "resid_pre"):  # what goes into a module
        into = block if site == "resid_pre" else attention.c_proj if gpt2 else attention.o_proj
        return into.register_forward_pre_hook(lambda _, args: (changed(args[0]), *args[1:]))
    made = block.mlp if site == "mlp_out" else attention.c_attn if gpt2 else getattr(attention, f"{site}_proj")
    return made.register_forward_hook(lambda _module, _args, output: changed(output))


@torch.no_grad()
def by_hand(folder: Path, pairs: list[int], direction: str, position: str) -> dict[str, Any]:
    """Logit differences of base and source [prompt], and by patch (site, layer, head) of the patched base [prompt]."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(folder)[1]
    heads = {site: n_kv_heads(model.config) if site in "kv" else n_heads(model.config) for site in "zqkv"}
    all_pairs = json.loads(Path("few.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"base": [], "source": [], "patched": {}}
    for pair in (all_pairs[number] for number in pairs):
        clean, corrupt = (torch.tensor([tokenizer(pair[text])["input_ids"]]) for text in ("clean", "corrupt"))
        io, s = (tokenizer(" " + pair[n], add_special_tokens=False)["input_ids"][0] for n in ("io_name", "s_name"))
        base, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)
        s2 = max(i for i, token in enumerate(clean[0]) if token == s) - clean.shape[1]
        tokens = {"all": list(range(clean.shape[1])), "last": [-1], "s2": [s2]}[position]

        def logit_diff(ids: torch.Tensor, io: int = io, s: int = s) -> float:
            logits = model(ids).logits[0, -1]
            return float(logits[io] - logits[s])

        found["base"].append(logit_diff(base))
        found["source"].append(logit_diff(source))
        for site in SITES:
            for layer in range(n_layers(model.config)):
                for head in range(heads[site]) if site in heads else (None,):
                    seen: list[torch.Tensor] = []
                    handle = hooked(model, site, layer, head, lambda x, seen=seen: seen.append(x.clone()))
                    model(source)
                    handle.remove()

                    def put(x: torch.Tensor, new: torch.Tensor = seen[0], at: list[int] = tokens) -> None:
                        x[at] = new[at]

                    handle = hooked(model, site, layer, head, put)
                    found["patched"].setdefault((site, layer, head), []).append(logit_diff(base))
                    handle.remove()
    return found


CASES = [*((family, "denoise", "all") for family in FAMILIES), ("gemma2", "noise", "s2"), ("gpt2", "noise", "last")]


@pytest.mark.parametrize(("family", "direction", "position"), CASES)
def test_scores_equal_a_hand_recomputation(
    family: str, direction: str, position: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "drawn", lambda *_: {})
    save_random_model(family, folder / "model")
    kept = [pair for pair in range(N) if pair != UNEQUAL or position == "last"]
    expected = by_hand(folder / "model", kept, direction, position)
    base, source, patched = (
        np.array(some) for some in (expected["base"], expected["source"], list(expected["patched"].values()))
    )
    assert np.ptp(patched, axis=0).min() > 1e-3, "patches differ"

    flags = ["--model", "model", "--dataset", "few.json", "--site", *SITES, "--batch_size", 2, "--out", "x"]
    assert command(*flags, "--direction", direction, "--positions", position) == 0
    for name, array in {"base": base, "source": source, "patched": patched}.items():
        np.testing.assert_allclose(np.load(f"x/{name}.npy"), array, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.load("x/scores.npy"), (patched - base) / (source - base), rtol=1e-3, atol=1e-3)

    scores = dict(zip(expected["patched"], (patched - base).mean(1) / (source - base).mean(), strict=True))
    rows = table(folder / "x/patches.csv")
    assert len(rows) == len(scores)
    for row in rows:
        key = row["site"], int(row["layer"]), int(row["head"]) if row["head"] else None
        assert list(scores)[int(row["row"])] == key and row["positions"] == position
        assert float(row["score"]) == pytest.approx(scores[key], abs=1e-4)
        assert float(row["low"]) <= float(row["high"])
        assert float(row["change"]) == pytest.approx((np.array(expected["patched"][key]) - base).mean(), abs=1e-5)
    sizes = [abs(float(row["score"])) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    for site in SITES:
        of_site = [value for key, value in scores.items() if key[0] == site]
        np.testing.assert_allclose(np.load(f"x/{site}.npy"), np.reshape(of_site, (3, -1)), atol=1e-4)

    facts = facts_in(folder / "x")
    assert facts["pairs"] == kept and facts["dropped"] == sorted({*range(N)} - {*kept})
    assert facts["n"] == len(kept) and facts["n_dropped"] == N - len(kept)
    zero, one = ("clean", "corrupt") if direction == "noise" else ("corrupt", "clean")
    assert (facts["score_0"], facts["score_1"]) == (f"the {zero} run", f"the {one} run")


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_is_every_named_position_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset", "equal.json", "--site", "head_key_output", "resid_pre"]  # which is k
    assert command(*flags, "--out", "each") == 0
    positions = facts_in(folder / "each")["positions"]
    assert positions == ["s1", "io", "s2", "end"], "by place; subject is s2, last is end"
    assert {path.name for path in (folder / "each/figures").iterdir()} == {
        f"{name}.{ending}" for name in ("resid_pre", "k_io", "k_s1", "k_s2", "k_end") for ending in ("png", "pdf")
    }  # fmt: skip
    monkeypatch.setattr(study, "drawn", lambda *_: {})
    patched = np.load("each/patched.npy")
    resid = np.load("each/resid_pre.npy")
    assert resid.shape == (6, 4)
    names = facts_in(folder / "each")["patches"]
    for column, position in enumerate(positions):
        assert command(*flags, "--positions", position, "--out", position) == 0
        rows = [number for number, name in enumerate(names) if name.endswith(f"@{position}")]
        np.testing.assert_allclose(patched[rows], np.load(f"{position}/patched.npy"), atol=1e-4)
        np.testing.assert_allclose(resid[:, [column]], np.load(f"{position}/resid_pre.npy"), atol=1e-5)
        np.testing.assert_allclose(np.load(f"each/k_{position}.npy"), np.load(f"{position}/k.npy"), atol=1e-5)


def test_a_text_with_the_name_keeps_its_own_place(folder: Path) -> None:
    """In the other order of names, io of the corrupt text is where s1 of the clean one is."""
    clean = "When Lisa and David went to the store, David gave the book to"
    swapped = "When David and Lisa went to the store, David gave the book to"
    pairs = [{"clean": clean, "corrupt": text, "io_name": "Lisa", "s_name": "David"} for text in (swapped, clean)]
    (folder / "swapped.json").write_text(json.dumps(pairs), encoding="utf-8")
    assert command("--dataset", "swapped.json", "--site", "resid_pre", "--positions", "io", "--out", "x") == 0
    # Lisa's embedding comes in place of Lisa's, and nothing changes.
    np.testing.assert_allclose(np.load("x/patched.npy")[0], np.load("x/base.npy"), atol=1e-5)


def test_at_all_tokens_the_residual_stream_restores_everything(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", "few.json", "--positions", "all", "--out", "x", "--site", "resid_pre", "resid_mid"]
    assert command(*flags, "--metric", "probability", "--limit", 3) == 0
    np.testing.assert_allclose(np.load("x/resid_pre.npy"), 1, atol=1e-3)
    assert np.load("x/patched.npy").shape == (12, 2), "of three pairs one is left out"
    shown = capsys.readouterr().out
    assert f"1 pair left out, whose texts differ in number of tokens: {UNEQUAL}" in shown
    assert "score: 0 is the corrupt run, 1 the clean run" in shown


def test_numerator_and_denominator_are_drawn_together() -> None:
    draw = np.random.default_rng(0)
    below = draw.normal(3, 2, 30)
    above = np.stack([0.3 * below, draw.normal(1, 1, 30)])
    found = px.stats.ratio_of_means(above, below, rng(0, "x"))
    np.testing.assert_allclose([found.mean[0], found.low[0], found.high[0]], 0.3)
    assert found.low[1] < found.mean[1] < found.high[1] and found.mean[1] == pytest.approx(
        above[1].mean() / below.mean()
    )
    # Against resamples taken one by one.
    picks = draw.integers(0, 30, (4000, 30))
    slow = [above[1, pick].mean() / below[pick].mean() for pick in picks]
    spread = np.quantile(slow, 0.975) - np.quantile(slow, 0.025)
    np.testing.assert_allclose([found.low[1], found.high[1]], np.quantile(slow, (0.025, 0.975)), atol=0.3 * spread)
    nothing = px.stats.ratio_of_means(above, np.zeros(30), rng(0, "x"))
    assert all(np.isnan(values).all() for values in nothing)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_what_is_written_and_that_its_config_repeats_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", "equal.json", "--positions", "s2", "--direction", "noise") == 0
    out = folder / "outputs/activation_patching/tiny-qwen2.5_equal"
    written = {
        "config.yaml", "summary.json", "patches.csv", "patched.npy", "scores.npy", "base.npy", "source.npy",
        "z.npy", "mlp_out.npy", "resid_pre.npy", "attention.json",
        "figures/z.png", "figures/z.pdf", "figures/layers.png", "figures/layers.pdf",
    }  # fmt: skip
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == written
    facts = facts_in(out)
    assert {"model", "revision", "n", "positions", "dtype", "seed", "versions", "weight_hash", "base_hash"} <= set(
        facts
    )
    assert facts["mean_base"] == pytest.approx(np.load(out / "base.npy").mean(), abs=1e-5)
    shown = capsys.readouterr().out
    assert "z.0.2@s2" in shown and "left out" not in shown and str(out.relative_to(folder)) in shown

    # The evidence is the largest score of the first site, heads, beside the median of the other heads.
    (evidence,), scores = facts["evidence"], np.abs(np.load(out / "z.npy")).ravel()
    assert abs(evidence["interval"][0]) == pytest.approx(scores.max(), rel=1e-5)
    assert f"{np.median(np.sort(scores)[:-1]):.2g}" in evidence["control"] and f"of {len(scores)} patches" in shown

    # What it will do, and how long that takes, is said before.
    assert command("--dataset", "equal.json", "--positions", "s2", "--dry_run", "--out", "dry") == 0
    assert re.fullmatch(
        r"60 patches x \d+ pairs \(z, mlp_out, resid_pre at s2\): under a minute\n", capsys.readouterr().out
    )
    assert not (folder / "dry").exists()

    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    (folder / "again.yaml").write_text(yaml.safe_dump({**config, "out": "again"}), encoding="utf-8")
    assert command("--config", "again.yaml") == 0
    for path in out.glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(folder / "again" / path.name)), path.name
    assert (out / "patches.csv").read_text() == (folder / "again/patches.csv").read_text()

    # Another run into the same folder leaves nothing of this one.
    assert command("--dataset", "equal.json", "--site", "attn_out") == 0
    assert not (out / "z.npy").exists() and not list(out.glob("figures/layers.*"))
    assert not (out / "attention.json").exists()
    assert (out / "attn_out.npy").exists()


def test_an_interrupted_run_goes_on_and_ends_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", "equal.json", "--memory", 0.001, "--site", "v", "--positions", "s2"]
    monkeypatch.setattr(study, "drawn", lambda *_: {})
    calls = stop_at(monkeypatch, 3, Executor, "run")
    assert command(*flags, "--out", "stopped") == 130
    assert not (folder / "stopped/summary.json").exists()
    assert command(*flags, "--out", "stopped", "--direction", "noise") == 2
    assert "unfinished" in capsys.readouterr().err
    assert command(*flags, "--out", "stopped") == 0
    waves = [wave for _, wave, *_ in calls]
    assert waves[3] == waves[2] and not set(waves[:2]) & set(waves[3:]), "finished batches stay done"
    assert command(*flags, "--out", "whole") == 0
    for path in (folder / "whole").glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(folder / "stopped" / path.name)), path.name
    assert not (folder / "stopped/unfinished").exists()


def test_a_run_that_stops_while_it_writes_leaves_no_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset", "equal.json", "--site", "mlp_out", "--out", "x"]
    assert command(*flags) == 0
    monkeypatch.setattr(run_folder, "write_config", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
    assert command(*flags) == 2
    assert not (folder / "x/summary.json").exists()
    monkeypatch.setattr(run_folder, "write_config", write_config)
    assert command(*flags) == 0
    assert (folder / "x/summary.json").exists()
    assert not [path for path in (folder / "x").rglob(".*")]


def test_texts_that_do_not_differ_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = json.loads(Path("equal.json").read_text(encoding="utf-8"))
    same = [{**pair, "corrupt": pair["clean"]} for pair in pairs]
    (folder / "same.json").write_text(json.dumps(same), encoding="utf-8")
    assert command("--dataset", "same.json", "--site", "z", "--positions", "s2", "--out", "x") == 2
    assert "base and source are the same texts" in capsys.readouterr().err and not (folder / "x").exists()


def test_only_the_main_process_prints_and_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px, "is_main_process", lambda: False)
    assert command("--dataset", "equal.json", "--site", "mlp_out", "--out", "x") == 0
    assert "score" not in capsys.readouterr().out
    assert [path.name for path in (folder / "x").iterdir()] == ["unfinished"]


def test_a_map_shows_every_layer_and_column() -> None:
    values = np.array([[0.5, -0.25, np.nan], [0.0, 1.0, 0.1]])
    figure = px.figures.layer_map(values, ["io", "s1", "end"], "a title " * 20, "mean score", "position")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["io", "s1", "end"]
    assert axes.images[0].get_clim() == (-1, 1) and axes.images[0].get_array().mask.sum() == 1
    assert axes.get_ylabel() == "layer" and "\n" in axes.get_title("left")
    px.figures.layer_map(np.full((2, 1), np.nan), ["end"], "nothing", "mean score", "position").canvas.draw()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_size", 0], "--batch_size must be 1 or more, not 0."),
        (["--limit", "-1"], "--limit must be 0 or more, not -1."),
        (["--memory", 0], "--memory must be above 0, in GiB, not 0.0."),
        (["--site", "z", "z"], "--site names one or more, each once, not z z."),
        (["--dataset", "ioi_enn"], "there is no prompt set 'ioi_enn'; did you mean 'ioi_en'?"),
        (["--positions", "verb"], "--positions verb: pair 0 has no such position; choose among all, each, "),
        (["--dataset", "lone.json"], "prompt 0 of lone has no corrupt text"),
        (["--limit", 1], "few.json gives 1 pair; an interval over pairs needs two or more."),
        (["--dataset", "unequal.json", "--positions", "all"], "0 of 2 pairs of unequal.json can be patched at"),
        (["--dataset", "unequal.json", "--positions", "s1"], "use --positions last, or texts of equal length."),
        (["--out", "few.json/x"], "few.json is not a folder one may write in"),
        (["--model", "tiny-qwen3"], "tiny-qwen3"),
        (["--dataset", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(px, "patch", None)
    pairs = json.loads(Path("few.json").read_text(encoding="utf-8"))
    Path("unequal.json").write_text(json.dumps([pairs[UNEQUAL]] * 2), encoding="utf-8")
    Path("lone.json").write_text(json.dumps([{**pairs[0], "corrupt": None}]), encoding="utf-8")
    before = sorted(folder.rglob("*"))
    assert command("--dataset", "few.json", *flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before


def test_an_unequal_pair_is_patched_at_its_last_token(folder: Path) -> None:
    pairs = json.loads(Path("few.json").read_text(encoding="utf-8"))
    (folder / "unequal.json").write_text(json.dumps([pairs[UNEQUAL]] * 2), encoding="utf-8")
    assert command("--dataset", "unequal.json", "--positions", "last", "--site", "resid_post", "--out", "x") == 0
    np.testing.assert_allclose(np.load("x/resid_post.npy")[-1], 1, atol=1e-4)
