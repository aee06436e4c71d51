"""The lag study against a hand recomputation, on a shipped model whose induction heads are known, interrupted, and misused."""

from __future__ import annotations

import csv
import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_ablations as study
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyvene_ext as px
from modelcards import n_heads, n_layers
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads import lag
from pyvene_ext.methods.heads.lag import LagCurves
from pyvene_ext.models import loading
from pyvene_ext.models.loading import load_model
from tests.ground_truth import ablations as slow
from tests.interrupted import stop_at
from tests.saved_models import save_random_model
from tests.tiers import first_only
from tests.tiny_random import FAMILIES

EXPERIMENTS = Path(study.__file__).parent
N, P = 14, 4  # tokens and permutations
HEADS = ((2, 1), (0, 3), (2, 0), (0, 2), (1, 0))  # by their scores in scores.csv
TOKENS = list(range(20, 60))
FEW = ["--permutations", P, "--n_tokens", N, "--output_dir", "out"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a list of tokens (a special one too) and scores of a few heads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.json").write_text(json.dumps(TOKENS[:14]), encoding="utf-8")
    (tmp_path / "tokens.json").write_text(json.dumps([[0, token] for token in TOKENS]), encoding="utf-8")
    rows = [f"{0.9 - 0.1 * i},{layer},{head}" for i, (layer, head) in enumerate(HEADS)]
    (tmp_path / "scores.csv").write_text("\n".join(["scores,layer,head", *rows]) + "\n", encoding="utf-8")
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        words = ("control", "carried by")
        rows = [{name: x for name, x in row.items() if name not in words} for row in csv.DictReader(file)]
    return [{name: float(x) if x else np.nan for name, x in row.items()} for row in rows]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- by hand -----------------------------------------------------------------------------------------------------------


def curves_by_hand(folder: Path, heads: list[tuple[int, int]], mode: str, bos: list[int]) -> np.ndarray:
    """Probability by permutation and lag, one prompt at a time, with plain hooks at all layers at once."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = np.random.default_rng(42)
    chosen = rng.choice(np.array(TOKENS), N, replace=False)
    found = []
    for _ in range(P):
        ids = rng.permutation(chosen).tolist()
        prompt = [*bos, *ids, ids[7]]
        new = (lambda z, uniform: 0 * z) if mode == "zero" else (lambda z, uniform: uniform)
        changes = [
            ("scores", layer, slow.replaced(range(len(prompt)), [h for at, h in heads if at == layer], new))
            for layer in {layer for layer, _ in heads}
        ]
        last = slow.logits(model, prompt, changes)[-1].double()
        found.append([float(last.softmax(0)[token]) for token in ids])
    return np.array(found)


@pytest.mark.parametrize("mode", first_only(["mean", "zero"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_curves_equal_a_hand_recomputation(family: str, mode: str, folder: Path) -> None:
    """With the start token of the tokenizer, which is no part of the list; of the mean without one, as published."""
    save_random_model(family, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    bos = tokenizer("")["input_ids"] if mode == "zero" else []
    flags = [
        *([] if bos else ["--bos", "no"]),
        "--to_abl",
        "0-1-3",
        "--mode",
        mode,
        "--tokens_path",
        "tokens.json",
        "--induction_scores_csv",
        "scores.csv",
    ]
    assert command("--model_name", "model", *flags, *FEW, "--random_draws", 5, "--max_heads_abl", 4) == 0
    lags = list(range(-7, 7))
    far = [lag for lag in lags if abs(lag) > 5]
    rows = table(folder / f"out/tables/model_perm{P}_{mode}_induction_full_summary.csv")
    biases: list[np.ndarray] = []
    crps: list[float] = []
    for n, row in zip((0, 1, 3), rows, strict=True):
        name = f"model_perm{P}_abl{n}_{mode}_induction_full"
        heads = json.loads((folder / f"out/heads/{name}.json").read_text())
        expected_heads = [list(head) for head in HEADS[:n]]
        assert heads == {"head_type": "induction", "layer_abl": "full", "mode": mode, "heads": expected_heads}
        curves = curves_by_hand(folder / "model", list(HEADS[:n]), mode, bos)
        np.testing.assert_allclose(np.load(folder / f"out/arrays/{name}.npy"), curves, atol=1e-5, rtol=1e-4)
        shown = table(folder / f"out/tables/{name}.csv")
        assert list(shown[0])[:2] == ["Lag", "Mean Probability"] and [line["Lag"] for line in shown] == lags
        given = curves.sum() - curves[:, 7].sum()
        for line, column in zip(shown, curves.T, strict=True):
            assert line["Mean Probability"] == pytest.approx(sum(column) / P, rel=1e-4, abs=1e-6)
            error = (sum((column - column.mean()) ** 2) / (P - 1) / P) ** 0.5
            assert line["Standard Error"] == pytest.approx(error, rel=1e-3, abs=1e-6)
            crp = line["Conditional Response Probability"]
            assert np.isnan(crp) if line["Lag"] == 0 else crp == pytest.approx(sum(column) / given, rel=1e-3)
        biases.append(curves[:, 8] - curves[:, [lag + 7 for lag in far]].mean(1))
        assert row["heads"] == n and row["bias"] == pytest.approx(biases[-1].mean(), abs=1e-5)
        assert row["change"] == pytest.approx((biases[-1] - biases[0]).mean(), abs=1e-5)
        assert (
            (biases[-1] - biases[0]).min() - 1e-5
            <= row["change low"]
            <= row["change"] + 1e-9
            <= row["change high"] + 2e-9
        )
        crp = curves[:, 8].sum() / given
        crps = [*crps, crp]
        assert row["crp(+1)"] == pytest.approx(crp, rel=1e-3)
        assert row["crp change"] == pytest.approx(crp - crps[0], abs=1e-5)
        assert row["crp change low"] <= row["crp change"] + 1e-9 and row["crp change high"] >= row["crp change"] - 1e-9
        assert row["p(+1)"] == pytest.approx(curves[:, 8].mean(), abs=1e-6)
        assert curves[:, 8].min() - 1e-6 <= row["p(+1) low"] <= row["p(+1) high"] <= curves[:, 8].max() + 1e-6
        likeliest = [max((lag for lag in range(N) if lag != 7), key=lambda lag: line[lag]) == 8 for line in curves]
        assert row["first"] == sum(likeliest) / P and row["recalled"] == pytest.approx(given / P, abs=1e-6)

        # The random sets: of the same layers, none of the first four heads; what is kept of them is by hand too.
        sets = json.loads((folder / f"out/heads/{name.replace('induction', 'random')}.json").read_text())["heads"]
        kept = np.load(folder / f"out/arrays/{name.replace('induction', 'random')}_bias.npy")
        assert len(sets) == len(kept) >= 1
        if not n:
            assert np.isnan(row["random sets"])  # no heads have no random ones
            continue
        assert len(sets) == row["random sets"]
        means, own_crps = [], []
        for chosen, bias in zip(sets, kept, strict=True):
            assert [layer for layer, _ in chosen] == [layer for layer, _ in HEADS[:n]]
            assert not {tuple(head) for head in chosen} & set(HEADS[:4])
            curves = curves_by_hand(folder / "model", [tuple(head) for head in chosen], mode, bos)
            own_crps.append(curves[:, 8].sum() / (curves.sum() - curves[:, 7].sum()))
            by_hand = curves[:, 8] - curves[:, [lag + 7 for lag in far]].mean(1)
            np.testing.assert_allclose(bias, by_hand, atol=1e-5)
            means.append(by_hand.mean() - biases[0].mean())
        assert row["random change"] == pytest.approx(np.mean(means), abs=1e-5)
        assert row["random crp change"] == pytest.approx(np.mean(own_crps) - crps[0], abs=1e-5)
        as_low = sum(other - crps[0] <= row["crp change"] for other in own_crps)
        assert row["crp share as low"] == pytest.approx((1 + as_low) / (1 + len(sets)))
        assert (row["random lowest"], row["random highest"]) == pytest.approx((min(means), max(means)), abs=1e-5)
    if family != "mistral":
        assert abs(rows[-1]["change"]) > 1e-6, "something is compared"


def test_zeroed_scores_are_a_zeroed_z(folder: Path) -> None:
    """At all layers at once; single ablations, padded and under windows, are in tests/pyvene_ext/test_compile.py."""
    model = save_random_model("gemma2", folder / "model")
    prompt = [*TOKENS[:N], TOKENS[7]]

    def zeroed(site: str) -> torch.Tensor:
        changes = [(site, at, slow.replaced(range(N + 1), [h], lambda z, *_: 0 * z)) for at, h in ((0, 3), (2, 1))]
        return slow.logits(model, prompt, changes)

    torch.testing.assert_close(zeroed("scores"), zeroed("z"))
    curves = curves_by_hand(folder / "model", [(2, 1), (0, 3)], "zero", [])
    flags = [
        "--bos",
        "no",
        "--to_abl",
        2,
        "--random_draws",
        0,
        "--tokens_path",
        "tokens.json",
        "--induction_scores_csv",
        "scores.csv",
    ]
    assert command("--model_name", "model", *flags, *FEW) == 0
    found = np.load(folder / f"out/arrays/model_perm{P}_abl2_zero_induction_full.npy")
    np.testing.assert_allclose(found, curves, atol=1e-6)


# -- a model that is known ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_peak_at_lag_1_vanishes_with_the_induction_heads_and_not_with_others_of_their_layer(folder: Path) -> None:
    """tiny-gemma2, whose layer 5 has six induction heads; its other heads, and its weakest two of those, are the control."""
    assert command("--permutations", 40, "--mode", "zero", "mean", "--output_dir", "out") == 0
    for mode in ("zero", "mean"):
        rows = table(folder / f"out/tables/tiny-gemma2_perm40_{mode}_induction_full_summary.csv")
        assert [row["heads"] for row in rows] == [0, 1, 2, 3, 4]
        peak = [row["p(+1)"] for row in rows]
        assert peak[0] > 0.9 and peak[4] < 0.2 and peak == sorted(peak, reverse=True)
        assert rows[4]["change high"] < -0.8 and rows[4]["random lowest"] > -0.05
        for row in rows[1:]:
            assert row["change high"] < row["random lowest"] and row["random lowest"] > -0.1
            assert row["share as low"] == pytest.approx(1 / (1 + row["random sets"]))
        heads = json.loads((folder / f"out/heads/tiny-gemma2_perm40_abl4_{mode}_induction_full.json").read_text())
        assert {layer for layer, _ in heads["heads"]} == {5}
    scores = table(folder / "out/heads/tiny-gemma2_induction_scores.csv")
    assert len(scores) == 48 and scores[3]["scores"] > 0.9 and [s["layer"] for s in scores[:4]] == [5] * 4


@pytest.mark.slow
def test_in_tiny_llama_the_strongest_heads_of_the_layer_count_more_than_the_rest(folder: Path) -> None:
    """All heads of its layer 1 are induction heads, so that the control lowers the peak as well, but by far less."""
    assert command("--model_name", "tiny-llama3.1", "--permutations", 40, "--n_tokens", 40, "--output_dir", "out") == 0
    rows = table(folder / "out/tables/tiny-llama3.1_perm40_zero_induction_full_summary.csv")
    assert rows[0]["p(+1)"] > 0.9 and rows[4]["p(+1)"] < 0.3 and rows[4]["change high"] < rows[4]["random lowest"] - 0.2


# -- choices -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_gives_what_its_settings_give_alone(folder: Path) -> None:
    grid = {
        "model_name": "tiny-gemma2",
        "permutations": P,
        "n_tokens": N,
        "to_abl": "0-2",
        "mode": ["zero", "mean"],
        "layer_abl": ["full", "top", "bottom"],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({**grid, "output_dir": "grid"}), encoding="utf-8")
    assert command("--config", "grid.yaml") == 0
    for mode in ("zero", "mean"):
        for layers in ("full", "top", "bottom"):
            one = {**grid, "mode": mode, "layer_abl": layers, "output_dir": "one"}  # one of a list needs no list
            (folder / "one.yaml").write_text(yaml.safe_dump(one), encoding="utf-8")
            assert command("--config", "one.yaml") == 0
    found, expected = files(folder / "grid"), files(folder / "one")
    stems = {Path(name).name for name in set(found) ^ set(expected)}
    run_names = [f"tiny-gemma2_perm{P}_{m}_induction_{x}" for m in ("zero", "mean") for x in ("full", "top", "bottom")]
    run_names.append(f"tiny-gemma2_perm{P}_zero-mean_induction_full-top-bottom")
    assert stems == {f"{name}.{ending}" for name in run_names for ending in ("yaml", "json")}
    for name in set(found) & set(expected):
        if name.endswith(".npy"):
            np.testing.assert_allclose(np.load(f"grid/{name}"), np.load(f"one/{name}"), atol=1e-6)
        elif name.startswith("heads/"):
            assert found[name] == expected[name], name
    middle = n_layers(load_model("tiny-gemma2")[0].config) / 2
    for layers, fits in (("top", lambda layer: layer < middle), ("bottom", lambda layer: layer >= middle)):
        for kind in ("induction", "random"):
            heads = json.loads(found[f"heads/tiny-gemma2_perm{P}_abl2_zero_{kind}_{layers}.json"])["heads"]
            sets = heads if kind == "random" else [heads]
            assert sets and all(fits(layer) for chosen in sets for layer, _ in chosen)


@pytest.mark.slow
def test_larger_sets_hold_the_smaller_ones_and_random_heads_alone_are_the_same_ones(folder: Path) -> None:
    both = ["--permutations", P, "--n_tokens", N, "--to_abl", "0-1-2-3"]
    assert command(*both, "--output_dir", "a") == 0
    assert command(*both, "--output_dir", "b", "--head_type", "random") == 0
    own: list[Any] = []
    previous: set[frozenset[Any]] = {frozenset()}
    for n in range(4):
        name = f"tiny-gemma2_perm{P}_abl{n}_zero_KIND_full"
        found = json.loads((folder / f"a/heads/{name.replace('KIND', 'induction')}.json").read_text())["heads"]
        assert len(found) == n and found[: len(own)] == own
        own = found
        name = name.replace("KIND", "random")
        sets = json.loads((folder / f"a/heads/{name}.json").read_text())["heads"]
        smaller, previous = previous, {frozenset(map(tuple, chosen)) for chosen in sets}
        assert len(previous) == len(sets) and all(len(chosen) == n for chosen in previous), "each set once"
        assert n == 0 or all(frozenset(map(tuple, chosen[:-1])) in smaller for chosen in sets)
        assert sets == json.loads((folder / f"b/heads/{name}.json").read_text())["heads"]
        for ending in (".npy", "_bias.npy"):
            a, b = (np.load(folder / f"{x}/arrays/{name}{ending}") for x in "ab")
            np.testing.assert_allclose(a, b, atol=1e-6)
        by_lag = [row["Mean Probability"] for row in table(folder / f"b/tables/{name}.csv")]
        np.testing.assert_allclose(by_lag, np.load(folder / f"b/arrays/{name}.npy").mean(0), atol=1e-6)
    assert not list((folder / "b").rglob("*induction_full*"))
    rows = table(folder / f"b/tables/tiny-gemma2_perm{P}_zero_random_full_summary.csv")
    for row in rows:
        assert row["change"] == pytest.approx(row["random change"], abs=1e-6, nan_ok=True) or not row["heads"]
        assert "share as low" not in row


@pytest.mark.slow
def test_without_a_list_ordinary_tokens_of_the_tokenizer_are_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = px.sweep
    monkeypatch.setattr(px, "sweep", lambda *args, **kw: seen.update(prompts=args[2]) or original(*args, **kw))
    assert command(*FEW, "--to_abl", 1) == 0
    _, tokenizer = load_model("tiny-gemma2")
    ids = {i for row in seen["prompts"].input_ids for i in row[1:]}
    assert len(ids) == N and not ids & set(tokenizer.all_special_ids)
    assert {row[0] for row in seen["prompts"].input_ids} == {tokenizer.bos_token_id}
    # Of a file the special ones are left out, however often they are in it.
    (folder / "tokens.pkl").write_bytes(pickle.dumps([[0, token] for token in TOKENS[:N]]))
    assert command(*FEW, "--to_abl", 1, "--tokens_path", "tokens.pkl") == 0
    assert {i for row in seen["prompts"].input_ids for i in row[1:]} == set(TOKENS[:N])


@pytest.mark.slow
def test_heads_are_ranked_and_lists_are_read_with_the_same_start_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    sweep, scores = px.sweep, lag.attention_scores

    def noted(model: Any, ids: torch.Tensor, *args: Any, **kw: Any) -> Any:
        seen.update(scored=ids, first=kw["first"])
        return scores(model, ids, *args, **kw)

    monkeypatch.setattr(px, "sweep", lambda *args, **kw: seen.update(prompts=args[2]) or sweep(*args, **kw))
    monkeypatch.setattr(lag, "attention_scores", noted)
    (bos,) = load_model("tiny-gemma2")[1]("")["input_ids"]
    for choice, first in (("auto", 1), ("yes", 1), ("no", 0)):
        assert command(*FEW, "--to_abl", 1, "--bos", choice) == 0
        for ids in (seen["scored"].tolist(), seen["prompts"].input_ids):
            assert {bos in row for row in ids} == {bool(first)} and {row.index(bos) for row in ids if first} <= {0}
        assert seen["first"] == first and {len(row) for row in seen["prompts"].input_ids} == {first + N + 1}


def test_names_on_the_hub_may_be_short_and_need_not_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, **_: Any) -> Any:
        asked.append(name)
        raise ValueError("stop")

    monkeypatch.setattr(loading, "load_model", load)
    for given in ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "someone/new", "tiny-qwen2.5"):
        assert command("--model_name", given) == 2
    known = "meta-llama/Llama-3.1-8B-Instruct"
    assert asked == [known, known, "someone/new", "tiny-qwen2.5"]


def test_published_defaults(folder: Path) -> None:
    config = study.Config(model_name="meta-llama/Llama-3.1-8B-Instruct")
    assert study.levels_of(config) == [0, 1, 5, 10, 20, 50] and lag.N_TOKENS == 500
    assert (lag.PERMUTATIONS, config.head_type, config.mode, config.layer_abl) == (
        300,
        "induction",
        ("zero",),
        ("full",),
    )
    assert config.seed == 42 and config.random_draws >= 20
    grid = yaml.safe_load((EXPERIMENTS / "run_ablations_grid.yaml").read_text())
    assert study.Config(**{**grid, "mode": ("zero",), "layer_abl": ("full",)}) != config  # every key is a flag
    assert (grid["n_tokens"], grid["permutations"], grid["bos"]) == (lag.N_TOKENS, lag.PERMUTATIONS, "no")
    assert grid["to_abl"] == lag.TO_ABL and grid["layer_abl"] == ["full", "top", "bottom"]


@pytest.mark.slow
def test_sizes_are_what_the_model_allows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published on a GPU from a billion parameters on; else short lists, few permutations of a model that takes seconds."""

    def sizes(*flags: Any) -> tuple[int, int, list[int]]:
        assert command(*flags, "--random_draws", 0, "--output_dir", "out") == 0
        (summary,) = (folder / "out").glob("*.json")
        facts = json.loads(summary.read_text())
        config = yaml.safe_load(summary.with_suffix(".yaml").read_text())
        assert (config["n_tokens"], config["permutations"]) == (facts["n_tokens"], facts["permutations"])
        assert config["to_abl"] == "-".join(map(str, facts["levels"])), "running it again gives the same anywhere"
        summary.unlink()
        return facts["n_tokens"], facts["permutations"], facts["levels"]

    monkeypatch.setattr(lag, "PERMUTATIONS", 5)
    assert sizes() == (20, 5, [0, 1, 2, 3, 4])
    assert sizes("--permutations", 2, "--n_tokens", 30, "--to_abl", "0-9") == (30, 2, [0, 9])
    assert sizes("--tokens_path", "few.json", "--permutations", 2) == (14, 2, [0, 1, 2, 3, 4]), "as many as there are"
    csv = ["--induction_scores_csv", "scores.csv"]
    assert sizes("--permutations", 2, *csv, "--layer_abl", "top")[2] == [0, 1, 2, 3, 4], "five heads have scores"
    monkeypatch.setattr(lag, "MIDDLING", 0)
    monkeypatch.setattr(lag, "FEW_PERMUTATIONS", 3)
    assert sizes()[:2] == (20, 3)
    # Another model of a folder: half of its heads at most, and no more than have scores.
    model = save_random_model("gemma2", folder / "model")
    half = n_layers(model.config) * n_heads(model.config) // 2
    levels = sizes("--model_name", "model")[2]
    assert levels == [n for n in (0, 1, 5, 10, 20, 50) if n <= half] and 5 in levels and 50 not in levels
    rows = (folder / "scores.csv").read_text().splitlines()
    (folder / "scores.csv").write_text("\n".join(rows[:4]), encoding="utf-8")
    assert sizes("--model_name", "model", *csv)[2] == [0, 1]


@pytest.mark.slow
def test_a_run_of_more_than_ten_minutes_takes_fewer_permutations_or_says_what_to_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px.runs, "seconds_a_pass", lambda *_: 1e5)
    assert command("--output_dir", "out", "--random_draws", 0) == 2
    said = capsys.readouterr()
    assert "4 interventions x 300 prompts, permutations of 20 tokens: about" in said.out
    assert "all 300 take" in said.err and "--permutations 300 takes all" in said.err
    assert not (folder / "out").exists()
    assert command(*FEW, "--random_draws", 0) == 0
    monkeypatch.setattr(px.runs, "seconds_a_pass", lambda _, prompts: 40.0 * len(prompts))
    capsys.readouterr()
    assert command("--output_dir", "short", "--random_draws", 0, "--to_abl", "0-1") == 0
    (summary,) = (folder / "short").glob("*.json")
    facts = json.loads(summary.read_text())
    n = facts["permutations"]
    assert 8 <= n < 100 and facts["shortened"] == {"flag": "permutations", "value": n, "of": 300}
    assert f"to keep within ten minutes {n} of 300 are taken; --permutations 300 takes all" in capsys.readouterr().out
    assert yaml.safe_load(summary.with_suffix(".yaml").read_text())["permutations"] == n
    assert not (folder / "short/shortened.json").exists()


def test_token_ids_of_another_tokenizer_are_found_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_model("tiny-gemma2")[1]
    right = {tokenizer.decode([token]): token for token in TOKENS}
    assert len(right) == len(TOKENS)
    (folder / "texts.json").write_text(json.dumps(right), encoding="utf-8")
    few = [*FEW, "--to_abl", 1, "--random_draws", 0]
    assert command(*few, "--tokens_path", "texts.json") == 0
    assert "warning" not in capsys.readouterr().err
    found = np.load(folder / f"out/arrays/tiny-gemma2_perm{P}_abl1_zero_induction_full.npy")
    assert command(*few, "--tokens_path", "tokens.json") == 0
    again = np.load(folder / f"out/arrays/tiny-gemma2_perm{P}_abl1_zero_induction_full.npy")
    np.testing.assert_array_equal(found, again)
    capsys.readouterr()
    (folder / "other.json").write_text(json.dumps({**right, " zebra": TOKENS[3]}), encoding="utf-8")
    assert command(*few, "--tokens_path", "other.json", "--output_dir", "other") == 2
    here = tokenizer.decode([TOKENS[3]])
    assert (
        f"other.json was written for another tokenizer: the token {TOKENS[3]} is ' zebra' there and {here!r} here, and 1 of 41"
        in capsys.readouterr().err
    )
    assert not (folder / "other").exists()
    # Ids alone: of a fifth it is seen that they are no text.
    (folder / "ids.json").write_text(json.dumps([0, 1, 2, 3, *TOKENS[:16]]), encoding="utf-8")
    assert command(*few, "--tokens_path", "ids.json") == 0
    assert "4 of 20 tokens of ids.json are special, unused or parts of characters" in capsys.readouterr().err


def test_a_model_that_does_not_do_the_task_is_said_so_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_model("gemma2", folder / "model")
    assert command("--model_name", "model", *FEW, "--to_abl", "0-1", "--random_draws", 2) == 0
    first, second, third, *_ = (line for line in capsys.readouterr().out.splitlines() if "interventions" not in line)
    assert first.startswith("model: 4 permutations") and "THE MODEL DOES NOT DO THE TASK" in second
    assert third.startswith("untouched: p(+1) ")
    assert command(*FEW, "--to_abl", "0-4", "--random_draws", 2) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT DO" not in shown and "any random set: p(+1) and lag-CRP(+1) (heads: 4)" in shown
    assert shown.count("evidence: 4 permutations of 14 tokens; 4 induction heads (zero, full layers) change ") == 2


def test_the_evidence_is_that_of_the_fewest_heads_with_enough_random_sets() -> None:
    def row(heads: int, sets: int) -> dict[str, Any]:
        ends = {f"{name}{end}": -0.1 * heads for name in ("change", "crp change") for end in ("", " low", " high")}
        control = {"control": f"{sets} sets", "share as low": 1 / (1 + sets), "crp share as low": 0.5}
        return {"heads": heads, "random sets": sets, "random change": 0.0, "random crp change": 0.25, **ends, **control}

    rows = [{"heads": 0}, row(1, 6), row(5, 19), row(10, 20)]
    bias, crp = px.runs.lag.lag_evidence("7 lists", "induction", {("zero", "full"): rows})
    assert bias.effect == "5 induction heads (zero, full layers) change the bias of p to lag +1 by"
    assert bias.interval == (-0.5, -0.5, -0.5) and bias.control == "19 sets; they change it by 0 on average, p = 0.05"
    assert crp.control == "19 sets; they change it by 0.25 on average, p = 0.5"
    (first, _) = px.runs.lag.lag_evidence("7 lists", "induction", {("zero", "full"): rows[:2]})
    assert first.effect.startswith("1 induction heads") and first.sample == "7 lists"


# -- files, and runs that stop ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_what_is_written_and_that_its_config_repeats_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--permutations", P, "--n_tokens", N, "--to_abl", "0-1") == 0
    out = folder / "outputs/ablations/tiny-gemma2"
    stem = f"tiny-gemma2_perm{P}"
    expected = {f"{stem}_zero_induction_full.{ending}" for ending in ("yaml", "json")}
    expected |= {"heads/tiny-gemma2_induction_scores.csv", f"tables/{stem}_zero_induction_full_summary.csv"}
    expected |= {
        f"figures/{stem}{n}_zero_induction_full.{ending}" for n in ("", "_abl0", "_abl1") for ending in ("png", "pdf")
    }
    for n in (0, 1):
        for kind in ("induction", "random"):
            name = f"{stem}_abl{n}_zero_{kind}_full"
            expected |= {f"tables/{name}.csv", f"heads/{name}.json", f"arrays/{name}.npy"}
        expected.add(f"arrays/{stem}_abl{n}_zero_random_full_bias.npy")
    assert set(files(out)) == expected
    shown = capsys.readouterr().out
    model, tokenizer = load_model("tiny-gemma2")
    (prompt, *_) = px.methods.lag_prompts(px.methods.usable_tokens(model, tokenizer), N, P, 42).input_ids
    first = tokenizer.batch_decode([[token] for token in prompt[:4]])
    assert f"{P} permutations of {N} tokens ({', '.join(map(repr, first))} ...)" in shown
    assert "p(+1)" in shown and "zero, full layers" in shown and str(out.relative_to(folder)) in shown
    facts = json.loads((out / f"{stem}_zero_induction_full.json").read_text())
    assert {"command", "model", "weight_hash", "prompts_hash", "seed", "versions", "n_tokens", "summaries"} <= set(
        facts
    )
    assert facts["n_tokens"] == N and len(facts["summaries"]["zero_full"]) == 2
    config = yaml.safe_load((out / f"{stem}_zero_induction_full.yaml").read_text())
    (folder / "again.yaml").write_text(yaml.safe_dump({**config, "output_dir": "again"}), encoding="utf-8")
    assert command("--config", "again.yaml") == 0
    again = files(folder / "again")
    for name, content in files(out).items():
        assert Path(name).parent in (Path("."), Path("figures")) or content == again[name], name
    # The scores that were computed serve as --induction_scores_csv.
    scores = out / "heads/tiny-gemma2_induction_scores.csv"
    assert command("--config", "again.yaml", "--induction_scores_csv", scores, "--output_dir", "third") == 0
    for name, content in files(folder / "third").items():
        assert not name.startswith(("arrays", "heads", "tables")) or content == again[name], name


def test_an_interrupted_run_goes_on_and_ends_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--permutations", 12, "--n_tokens", N, "--to_abl", "0-1", "--random_draws", 2, "--memory", 0.002]
    calls = stop_at(monkeypatch, 3, Executor, "run")
    assert command(*flags, "--output_dir", "stopped") == 130
    assert [path.name for path in (folder / "stopped").iterdir()] == ["unfinished"]
    assert command(*flags, "--output_dir", "stopped", "--seed", 1) == 2
    assert "unfinished" in capsys.readouterr().err
    assert command(*flags, "--output_dir", "stopped") == 0
    waves = [wave for _, wave, *_ in calls]
    assert waves[3] == waves[2] and not set(waves[:2]) & set(waves[3:]), "finished batches stay done"
    assert command(*flags, "--output_dir", "whole") == 0
    stopped, whole = files(folder / "stopped"), files(folder / "whole")
    assert set(stopped) == set(whole) and not (folder / "stopped/unfinished").exists()
    for name, content in whole.items():
        assert not name.startswith(("arrays", "heads", "tables")) or content == stopped[name], name


def test_only_the_main_process_prints_and_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px, "is_main_process", lambda: False)
    assert command(*FEW, "--to_abl", 1) == 0
    assert "p(+1)" not in capsys.readouterr().out
    assert [path.name for path in (folder / "out").iterdir()] == ["unfinished"]


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px, "sweep", None)
    assert command(*FEW, "--to_abl", "0-1", "--mode", "zero", "mean", "--random_draws", 0, "--dry_run") == 0
    assert f"2 interventions x {P} prompts" in capsys.readouterr().out
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_the_grid_is_tried_out_as_its_file_says(folder: Path) -> None:
    grid = Path(study.__file__).with_name("run_ablations_grid.yaml")
    tried = ["--model_name", "tiny-gemma2", "--to_abl", "0-1-2-3", "--n_tokens", 20]
    assert (
        " ".join(map(str, tried)) in grid.read_text()
        and " ".join(map(str, tried)) in grid.with_name("run_ablations.sh").read_text()
    )
    assert command("--config", grid, *tried, "--permutations", 2, "--random_draws", 1, "--output_dir", "out") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_script_of_the_published_grid_runs_on_a_tiny_model(folder: Path) -> None:
    script = EXPERIMENTS / "run_ablations.sh"
    flags = ["--mode", "zero", "--layer_abl", "full", "bottom"]
    flags += ["--model_name", "tiny-gemma2", "--to_abl", "0-1", "--max_heads_abl", "1", "--permutations", "2"]
    flags += ["--n_tokens", "12", "--dtype", "auto", "--random_draws", "1", "--output_dir", str(folder / "out")]
    environment = {"LAUNCH": "printf %s\\n", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(["bash", script, *flags], env=environment, check=True, capture_output=True, text=True)
    study_there, *given = ran.stdout.splitlines()
    assert Path(study_there).samefile(study.__file__) and command(*given) == 0
    assert len(list((folder / "out/tables").glob("*_summary.csv"))) == 2
    pictures = [path.read_bytes() for path in (folder / "out/figures").glob("*.png")]
    assert len(pictures) == 6 and all(picture.startswith(b"\x89PNG") for picture in pictures)


# -- figures -----------------------------------------------------------------------------------------------------------


def curves(n: int, lags: int, peak: float) -> np.ndarray:
    values = np.full((5, lags), 0.01) + 0.001 * np.arange(5)[:, None]
    values[:, lags // 2 + 1] += peak
    return values


def test_a_figure_has_a_line_for_each_level_the_random_band_and_a_line_at_0() -> None:
    random = np.stack([curves(0, 60, peak) for peak in (0.5, 0.7, 0.6)])
    found = [LagCurves(n, curves(n, 60, 0.9 / (n + 1)), random) for n in (0, 1, 5)]
    figure = px.figures.lag_curves(found, random, "a title")
    figure.canvas.draw()
    assert len(figure.axes) == 2
    for axes, lags in zip(figure.axes, (np.arange(-30, 30), np.arange(-10, 11)), strict=True):
        zero, control, *lines = axes.lines
        np.testing.assert_allclose(control.get_ydata(), random.mean((0, 1))[lags + 30])
        assert list(zero.get_xdata()) == [0, 0] and zero.get_linestyle() == "--"
        for line, at in zip(lines, found, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), lags)
            np.testing.assert_allclose(line.get_ydata(), at.own.mean(0)[lags + 30])
        band = axes.collections[0].get_paths()[0].vertices
        assert band[band[:, 0] == 1][:, 1].max() == pytest.approx(random.mean(1)[1, 31])
        assert band[band[:, 0] == 1][:, 1].min() == pytest.approx(random.mean(1)[0, 31])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["5 random heads: mean and range (3 sets)", "none ablated", "1 ablated", "5 ablated"]
    none = px.figures.lag_curves(found, np.empty((0, 5, 60)), "no control")
    assert len(none.axes[0].collections) == len(found)
    short = px.figures.lag_curves(
        [LagCurves(0, curves(0, 40, 0.5), random[:0, :, :40])], random[:0, :, :40], "few lags"
    )
    (axes,) = short.axes
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), np.arange(-20, 20))


# -- bad input ---------------------------------------------------------------------------------------------------------


def bad_files(folder: Path) -> None:
    (folder / "no_head.csv").write_text("scores,layer\n0.5,1\n", encoding="utf-8")
    (folder / "outside.csv").write_text("scores,layer,head\n0.5,6,0\n", encoding="utf-8")
    (folder / "many.json").write_text(json.dumps(list(range(300))), encoding="utf-8")
    (folder / "large.json").write_text(json.dumps([*TOKENS, 403]), encoding="utf-8")
    (folder / "special.json").write_text(json.dumps([0, 1, 2, 3, *TOKENS[:10]]), encoding="utf-8")
    (folder / "bad.pkl").write_bytes(b"cos\nsystem\n(Vtouch ran\ntR.")
    (folder / "file").write_text("", encoding="utf-8")


BEFORE_LOADING = [
    (["--to_abl", ""], "--to_abl '' must be ascending numbers of heads"),
    (["--to_abl", "0"], "not only 0"),
    (["--to_abl", "5-1"], "ascending"),
    (["--to_abl", "1-1"], "ascending"),
    (["--to_abl", "1,5"], "ascending"),
    (["--max_heads_abl", 3], "--to_abl asks for 4 heads and --max_heads_abl allows 3"),
    (["--permutations", 1], "--permutations must be 2 or more, not 1."),
    (["--n_tokens", 11], "--n_tokens must be 12 or more"),
    (["--random_draws", -1], "--random_draws must be 0 or more"),
    (["--random_draws", 0, "--head_type", "random"], "--random_draws must be 1 or more"),
    (["--memory", 0], "--memory must be above 0, in GiB"),
    (["--seed", -1], "--seed must be 0 or more"),
    (["--mode", "zero", "zero"], "--mode names one or more, each once, not zero zero."),
    (["--layer_abl", "top", "top"], "--layer_abl names one or more, each once, not top top."),
    (
        ["--tokens_path", "tokens.json", "--n_tokens", 50],
        "tokens.json has 41 usable tokens (distinct, not special) and 50",
    ),
    (
        ["--tokens_path", "bad.pkl"],
        "bad.pkl is not a pickle of lists of whole numbers (it imports os.system), and nothing in it was run",
    ),
    (["--tokens_path", "none.json"], "none.json"),
    (["--output_dir", "file/x"], "file is not a folder one may write in"),
]
BEFORE_RUNNING = [
    (["--induction_scores_csv", "no_head.csv"], "no_head.csv lacks the column head"),
    (["--induction_scores_csv", "outside.csv"], "head 6.0 is outside a model of 6 layers with 8 heads"),
    (["--induction_scores_csv", "scores.csv", "--to_abl", "6"], "6 heads are asked for but there are scores for 5"),
    (["--induction_scores_csv", "none.csv"], "none.csv"),
    (
        ["--tokens_path", "special.json", "--n_tokens", 12],
        "special.json has 10 usable tokens (distinct, not special) and 12",
    ),
    (["--tokens_path", "large.json"], "the tokens contain the id 403 but the vocabulary has 403 tokens"),
    (
        ["--tokens_path", "many.json", "--n_tokens", 256],
        "--n_tokens 256 makes prompts of 258 tokens and tiny-gemma2 takes 256",
    ),
    (["--n_tokens", 500], "takes 256; take fewer."),
    (["--model_name", "tiny-qwen3"], "tiny-qwen3"),
]


@pytest.mark.parametrize(("flags", "told"), BEFORE_LOADING + BEFORE_RUNNING)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_files(folder)
    if (flags, told) in BEFORE_LOADING:
        monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr(px, "sweep", None)
    if "--induction_scores_csv" not in flags:
        monkeypatch.setattr(lag, "attention_scores", None)
    before = sorted(folder.rglob("*"))
    assert command(*flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before


def test_more_heads_than_there_are_and_layers_without_a_control(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(px, "sweep", None)
    monkeypatch.setattr(lag, "attention_scores", None)
    heads = n_heads(load_model("tiny-gemma2")[0].config) * 6
    assert command("--to_abl", heads + 1) == 2
    assert f"{heads + 1} heads are asked for but there are scores for {heads}" in capsys.readouterr().err
    assert command("--to_abl", heads // 2 + 1, "--layer_abl", "top") == 2
    assert f"there are scores for {heads // 2} in layers 0 to 2 (top)" in capsys.readouterr().err
    assert not (folder / "outputs").exists()


def test_without_a_control_whole_layers_may_go(folder: Path) -> None:
    assert command(*FEW, "--to_abl", "0-8", "--random_draws", 0) == 0
    (row,) = table(folder / f"out/tables/tiny-gemma2_perm{P}_zero_induction_full_summary.csv")[1:]
    assert "random sets" not in row and row["p(+1)"] < 0.2
    assert not list((folder / "out").rglob("*random*"))
