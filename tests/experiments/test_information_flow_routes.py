"""The study of information flow routes against a hand recomputation, cut short, and given bad input."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import information_flow_routes as study
import numpy as np
import pytest
from transformers import CodeGenConfig, CodeGenForCausalLM

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads.flow import Flow, FlowEdge, StreamState, flow_routes
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import folder as run_folder
from pyvene_ext.runs.figures.frequencies import NAMED
from pyvene_ext.stats.correlations import correlate_heads
from pyvene_ext.stats.intervals import frequency_interval
from tests.pyvene_ext.methods.heads.test_flow import ARRAYS, by_hand, searched
from tests.saved_models import save_random_model, save_with_random_weights, shipped_tokenizer

N = 3
TAU = 0.05
FOLDER = {
    "routes.json",
    "attention.json",
    "summary.json",
    "config.yaml",
    "heads.csv",
    "prompts.csv",
    "frequency_vs_tau.csv",
}
ARRAY_FILES = {"active.npy", "importances.npy", "importance.npy", "frequency.npy"}
FIGURES = {
    f"figures/{name}.{ending}"
    for name in ("frequency", "importance", "frequency_vs_tau", "routes")
    for ending in ("png", "pdf")
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first shipped English prompts, one of them shorter than the others."""
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:N]
    pairs[1] |= {"clean": pairs[1]["clean"].removeprefix("When ")}
    path = tmp_path_factory.mktemp("data") / "few.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_what_is_written_equals_a_hand_recomputation(family: str, dataset: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    model = save_random_model(family, folder)
    config = model.config
    flags = ("--model", folder, "--dataset", dataset, "--out", out, "--tau", TAU, "--batch_size", 3, "--prompt", 2)
    assert command(*flags) == 0

    encode = load_model(folder)[1]
    prompts = [encode(pair["clean"])["input_ids"] for pair in json.loads(dataset.read_text(encoding="utf-8"))]
    assert len({len(ids) for ids in prompts}) > 1
    hand = [by_hand(model, tuple(ids)) for ids in prompts]
    flow = Flow(*(tuple(of[name] for of in hand) for name in ARRAYS))
    heads = config.num_attention_heads
    active = np.zeros((N, 3, heads), bool)
    for prompt in range(N):
        for _, _, via, _ in searched(flow, prompt, TAU):
            if via not in ("mlp", "residual"):
                layer, head = via.split(".")
                active[prompt, int(layer), int(head)] = True
    assert 0 < active.mean() < 1
    assert np.array_equal(np.load(out / "active.npy"), active)
    frequency = np.load(out / "frequency.npy")
    assert frequency.dtype == np.float32 and np.array_equal(frequency, active.mean(0).astype(np.float32))
    importances = np.stack([of["attention"].sum(-1).mean(-1) for of in hand])
    assert np.allclose(np.load(out / "importances.npy"), importances, atol=1e-5)
    assert np.allclose(np.load(out / "importance.npy"), importances.mean(0), atol=1e-5)

    routes = json.loads((out / "routes.json").read_text(encoding="utf-8"))
    expected = {edge[:3]: edge[3] for edge in searched(flow, 2, TAU)}
    found = {(edge["source"], edge["target"], edge["via"]): edge["importance"] for edge in routes["edges"]}
    assert len(routes["edges"]) == len(found) and found == pytest.approx(expected, abs=1e-5)
    assert len(routes["tokens"]) == len(prompts[2]) and routes["prompt"] == 2 and not routes["renormalised"]

    rows = list(csv.DictReader((out / "heads.csv").open(encoding="utf-8")))
    assert len(rows) == 3 * heads and [float(row["frequency"]) for row in rows] == sorted(active.mean(0).flat)[::-1]
    interval = frequency_interval(active, axis=0)
    at_last = np.mean([of["attention"][:, :, -1].sum(-1) for of in hand], axis=0)
    for row in rows:
        at = int(row["layer"]), int(row["head"])
        assert (float(row["low"]), float(row["high"])) == pytest.approx((interval.low[at], interval.high[at]))
        assert float(row["importance_at_last"]) == pytest.approx(at_last[at], abs=1e-5)
        assert float(row["largest_edge"]) == pytest.approx(max(of["attention"][at].max() for of in hand), abs=1e-5)
    per_prompt = list(csv.DictReader((out / "prompts.csv").open(encoding="utf-8")))
    assert [int(row["heads"]) for row in per_prompt] == active.sum((1, 2)).tolist()
    assert [int(row["edges"]) for row in per_prompt] == [len(searched(flow, prompt, TAU)) for prompt in range(N)]
    states = [{str(end) for edge in searched(flow, prompt, TAU) for end in edge[:2]} for prompt in range(N)]
    assert [int(row["nodes"]) for row in per_prompt] == list(map(len, states))
    curve = list(csv.DictReader((out / "frequency_vs_tau.csv").open(encoding="utf-8")))
    at_tau = next(row for row in curve if float(row["tau"]) == TAU)
    assert float(at_tau["mean"]) == pytest.approx(active.mean())


@pytest.mark.slow
def test_without_an_argument_it_runs_on_a_shipped_model_and_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command() == 0
    folder = Path("outputs/information_flow_routes/tiny-qwen2.5_ioi_en")
    assert written(folder) == FOLDER | ARRAY_FILES | FIGURES
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["n"] == 100 and summary["compare"] is None
    assert {"model", "dataset", "prompts_hash", "weight_hash", "versions", "seed", "share_active"} <= set(summary)
    shown = capsys.readouterr().out
    assert "100 prompts" in shown and str(folder) in shown

    # The default threshold is the one at which about a tenth is active: a little below it more is.
    model, tokenizer = load_model("tiny-qwen2.5")
    flow = flow_routes(model, PromptSet.load("ioi_en").tokenize(tokenizer), progress=False)
    active = flow.active_heads(summary["tau"])
    assert np.array_equal(np.load(folder / "active.npy"), active) and 0.05 < active.mean() <= 0.1
    assert summary["share_active"] == active.mean() and flow.active_heads(0.98 * summary["tau"]).mean() > 0.1
    assert "a tenth" in summary["tau_is"] and f"above {summary['tau']:.3g}, the tau at which about a tenth" in shown
    frequency, first = active.mean(0), next(csv.DictReader((folder / "heads.csv").open(encoding="utf-8")))
    (evidence,) = summary["evidence"]
    assert evidence["interval"] == [float(first[name]) for name in ("frequency", "low", "high")]
    assert evidence["interval"][0] == frequency.max() and evidence["null"] == active.mean()


@pytest.mark.slow
def test_the_same_config_gives_the_same_renormalised_routes(dataset: Path, tmp_path: Path) -> None:
    assert command("--dataset", dataset, "--out", tmp_path / "a", "--tau", 0.02, "--renormalise") == 0
    assert command("--config", tmp_path / "a/config.yaml", "--out", tmp_path / "b") == 0
    for name in ARRAY_FILES | FIGURES | {"routes.json", "heads.csv", "attention.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    sums: dict[str, float] = {}
    routes = json.loads((tmp_path / "a/routes.json").read_text(encoding="utf-8"))
    for edge in routes["edges"]:
        sums[edge["target"]] = sums.get(edge["target"], 0) + edge["importance"]
    assert routes["renormalised"] and sums and list(sums.values()) == pytest.approx([1] * len(sums), abs=1e-5)


@pytest.mark.slow
def test_compared_frequencies_are_correlated_head_by_head(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = np.random.default_rng(0).random((6, 8)).astype(np.float32)
    causal[2, 3] = np.nan  # a head that was not run
    np.save(tmp_path / "causal.npy", causal)
    out = tmp_path / "out"
    assert command("--dataset", dataset, "--out", out, "--compare", tmp_path / "causal.npy") == 0
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))["compare"]
    active = np.load(out / "active.npy").mean(0)
    expected = correlate_heads(active, causal)
    assert found["n"] == 47 and found["dropped"] == 1
    for name in ("pearson", "spearman"):
        assert found[name]["r"] == pytest.approx(getattr(expected, name).r)
    kept = np.isfinite(causal)
    assert found["pearson"]["r"] == pytest.approx(np.corrcoef(active[kept], causal[kept])[0, 1], abs=1e-6)
    assert {"figures/compare.png", "figures/compare.pdf"} <= written(out)
    assert f"Pearson {expected.pearson.r:.3f}" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "heads.csv").open(encoding="utf-8")))
    for row in rows:
        value = causal[int(row["layer"]), int(row["head"])]
        assert row["compared"] == "" if np.isnan(value) else float(row["compared"]) == pytest.approx(float(value))
    # Another run into the same folder without it leaves nothing of it.
    assert command("--dataset", dataset, "--out", out) == 0
    assert written(out) == FOLDER | ARRAY_FILES | FIGURES


def test_a_comparison_without_a_correlation_says_why(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "causal.npy", np.ones((6, 8)))
    assert command("--dataset", dataset, "--out", tmp_path / "out", "--compare", tmp_path / "causal.npy") == 0
    assert "no correlation (constant input: b)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["compare"]["pearson"]["r"] is None


def test_a_run_cut_short_has_no_summary(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")  # of an earlier run

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "write_csv", killed)
    assert command("--dataset", dataset, "--out", tmp_path, "--tau", 0.1) == 130
    assert "summary.json" not in written(tmp_path)


# -- the drawing -------------------------------------------------------------------------------------------------------


def test_the_drawing_has_a_line_for_every_edge_and_a_dot_for_every_node() -> None:
    last, mid = StreamState("resid_post", 0, 1), StreamState("resid_mid", 0, 1)
    first, own = StreamState("resid_pre", 0, 0), StreamState("resid_pre", 0, 1)
    edges = (
        FlowEdge(mid, last, "residual", 0.6),
        FlowEdge(mid, last, "mlp", 0.4),
        FlowEdge(own, mid, "residual", 0.5),
        FlowEdge(own, mid, "0.1", 0.1),
        FlowEdge(first, mid, "0.0", 0.1),
        FlowEdge(first, mid, "0.2", 0.3),
    )
    figure = px.figures.routes(edges, ["a", "\n"], 1, "title")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.0, 0.2"]
    assert sorted(round(line.get_linewidth(), 3) for line in axes.lines) == [0.7, 1.6, 1.6, 1.9, 2.2]
    ends = {(*line.get_xydata()[0], *line.get_xydata()[-1]) for line in axes.lines}
    assert ends == {(1, 0.5, 1, 1), (1, 0, 1, 0.5), (0, 0, 1, 0.5)}
    assert {tuple(dot) for dot in axes.collections[0].get_offsets()} == {(0, 0), (1, 0), (1, 0.5), (1, 1)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", r"\n"]


def test_the_dots_are_drawn_in_an_order_that_does_not_depend_on_hashes() -> None:
    states = [StreamState("resid_pre", 0, pos) for pos in range(8)]
    edges = tuple(FlowEdge(state, StreamState("resid_mid", 0, 7), "0.1", 0.1) for state in reversed(states))
    dots = px.figures.routes(edges, ["x"] * 8, 1, "title").axes[0].collections[0].get_offsets().tolist()
    assert dots == [[7, 0.5], [7, 1], *([pos, 0] for pos in range(8))]


def test_the_drawing_without_any_edge_is_the_prediction_alone() -> None:
    (axes,) = px.figures.routes((), ["a", "b", "c"], 2, "title").axes
    assert not axes.lines and axes.collections[0].get_offsets().tolist() == [[2, 2]]


def test_the_drawing_names_no_heads_where_they_would_cover_it() -> None:
    edges = tuple(
        FlowEdge(StreamState("resid_pre", 0, i), StreamState("resid_mid", 0, 70), "0.1", 0.1) for i in range(NAMED + 1)
    )
    assert not px.figures.routes(edges, ["x"] * 71, 1, "title").axes[0].texts
    assert len(px.figures.routes(edges[1:], ["x"] * 71, 1, "title").axes[0].texts) == NAMED


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tau", 1), "tau must be at least 0 and below 1"),
        (("--tau", -0.1), "tau must be at least 0 and below 1"),
        (("--batch_size", 0), "--batch_size must be 1 or more, not 0"),
        (("--limit", "-1"), "--limit must be 0 or more, not -1."),
        (("--limit", 2, "--prompt", 2), "--prompt 2 is not there: "),
        (("--prompt", N), "--prompt 3 is not there: "),
        (("--prompt", -1), "--prompt must be 0 or more, not -1."),
        (("--dataset", "ioi_eng"), "there is no prompt set 'ioi_eng'; did you mean 'ioi_en'?"),
        (("--compare", "nowhere.npy"), "nowhere.npy: no such file"),
        (("--compare", "text.npy"), "--compare text.npy is not a complete .npy file of numbers"),
        (("--compare", "empty.npy"), "--compare empty.npy is not a complete .npy file of numbers"),
        (("--compare", "vector.npy"), "--compare vector.npy has shape (4,); a [layer head] matrix"),
        (("--compare", "words.npy"), "--compare words.npy holds <U1, not real numbers"),
        (("--compare", "other.npy"), "--compare other.npy is (4, 4) and tiny-qwen2.5 has (6, 8) layers and heads"),
        (("--out", "text.npy"), "text.npy is not a folder one may write in"),
        (("--out", "text.npy/deeper"), "text.npy is not a folder one may write in"),
        (("--model", "other"), "other has model type 'codegen'; use a model of one of the types"),
    ],
)
def test_bad_input_gives_one_sentence_and_writes_nothing(
    flags: tuple[str, Any],
    message: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("no numbers", encoding="utf-8")
    Path("empty.npy").touch()
    np.save("vector.npy", np.ones(4))
    np.save("words.npy", np.array([["a"]]))
    np.save("other.npy", np.ones((4, 4)))
    if "other" in flags:
        config = CodeGenConfig(vocab_size=len(shipped_tokenizer()), n_embd=8, n_layer=1, n_head=4, rotary_dim=2)
        save_with_random_weights(CodeGenForCausalLM(config), tmp_path / "other")
        capsys.readouterr()
    before = sorted(os.listdir())
    first = () if "--dataset" in flags else ("--dataset", dataset)
    assert command(*first, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert sorted(os.listdir()) == before
