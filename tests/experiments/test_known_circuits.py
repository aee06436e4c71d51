"""The table of known circuits: its measures by hand, and that linear methods fail where they must and exact ones do not."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path
from typing import Any

import known_circuits as study
import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny import planted_circuits

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_auroc_and_precision_are_counted_over_pairs() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.integers(0, 5, 12).astype(float)
        known = generator.permutation(12) < generator.integers(1, 11)
        pairs = [(a > b) + 0.5 * (a == b) for a, b in product(scores[known], scores[~known])]
        assert np.isclose(px.stats.auroc(scores, known), np.mean(pairs))
    scores, known = np.array([3.0, 9.0, 1.0, 5.0]), np.array([True, True, False, False])
    assert px.stats.precision_at_k(scores, known) == 0.5 and px.stats.auroc(scores, known) == 0.75


def few_circuits(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(planted_circuits, "CASES", {name: planted_circuits.CASES[name] for name in names})


def test_each_method_is_judged_as_by_hand_and_the_circuit_itself_as_a_score_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_circuits(monkeypatch)
    methods: Any = ("eap", "random")
    config = study.Config(methods=methods, planted_prompts=3)
    (case,) = study.known_circuits(config)
    assert case.circuit == "tiny-circuit" and len(case.edges) == 7
    oracle, eap, random = study.judged(config, case)
    assert [row["method"] for row in (oracle, eap, random)] == ["known", *methods]
    assert oracle["auroc"] == oracle["precision"] == 1 and oracle["cpr"] > 0.9 > 0.7 > random["cpr"]

    scoring, judging = ([texts.take(some) for texts in case.pairs] for some in ([0, 1, 2], [3, 4, 5]))
    edges = study.all_edges(case.model)
    found = px.methods.edge_attribution(case.model, *scoring, method="eap", progress=False)
    sizes = np.abs([found.edge(edge).mean() for edge in edges])
    known = np.array([edge in case.edges for edge in edges])
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(sizes[known], sizes[~known])]
    assert eap["auroc"] == pytest.approx(np.mean(pairs)) and (eap["n_known"], eap["n_edges"]) == (7, len(edges))
    shares = px.circuits.MIB_SHARES  # CMD: the strongest edges, as many as each share allows, by the trapezoidal rule
    strongest = [edges[at] for at in np.argsort(-sizes)]
    circuits = [px.circuits.Circuit(frozenset(strongest[: int(share * len(edges))])) for share in shares]
    away = np.abs(1 - px.circuits.run_circuits(case.model, circuits, *judging, progress=False).faithfulness)
    steps = zip(shares, shares[1:], away, away[1:], strict=False)
    assert eap["cmd"] == pytest.approx(sum((b - a) * (x + y) / 2 for a, b, x, y in steps), abs=1e-3)
    assert eap["cmd_low"] - 1e-6 <= eap["cmd"] <= eap["cmd_high"] + 1e-6


def test_areas_that_are_undefined_are_said_to_be() -> None:
    row = {"circuit": "a", "architecture": "gpt2", "auroc": 0.5, "cpr": None, "cmd": 2.0}
    trained = [{"model": "m", "over": "edges", "n": 3, "method": "EAP", "spearman": 0.5}]
    shown = study.summary([row | {"method": "eap"}, row | {"method": "flow", "cpr": 1.25}], trained).splitlines()
    assert [line.split()[2:] for line in shown[1:9:3]] == [
        ["0.500", "0.500"],
        ["undefined", "1.250"],
        ["2.000", "2.000"],
    ]
    one = [trained[0] | {"n": 1, "spearman": float("nan")}]  # of one edge
    assert study.summary([row | {"method": "eap"}], one).splitlines()[-1].split()[1:] == [
        "1",
        "edges",
        "EAP",
        "undefined",
    ]


@pytest.mark.slow
def test_linear_methods_fail_where_they_must_and_the_exact_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_circuits(monkeypatch, "k_composition", "saturated", "saturated_k", "backup")
    flags = ["--models", "tiny-llama3.1", "--planted_prompts", 2, "--limit", 2, "--steps", 3, "--out", tmp_path]
    methods = ("path_patching", "eap", "eap_ig_inputs", "acdc")
    assert command(*flags, "--methods", *methods) == 0
    found = {(r["circuit"], r["architecture"], r["method"]): r for r in rows(tmp_path / "known.csv")}
    assert {architecture for _, architecture, _ in found} == {"llama", "gemma2", "gpt2"}
    assert {method for *_, method in found} == {"known", *methods} and len(found) == 9 * 5
    for (circuit, _, method), row in found.items():
        auroc, precision, cpr, cmd = (float(row[name]) for name in ("auroc", "precision", "cpr", "cmd"))
        if method in ("known", "path_patching") or circuit == "k_composition":
            assert auroc == precision == 1 and cpr > 0.85 and cmd < 0.15
        elif method == "eap":
            assert auroc < 0.97 and precision < 0.7, "no gradient reaches a saturated softmax or a waiting backup"
            assert circuit == "backup" or (cpr < 0.5 and cmd > 0.1)
        elif circuit == "tiny-circuit":
            assert auroc > 0.98 and cpr > 0.85
    trained = {(r["over"], r["method"]): float(r["spearman"]) for r in rows(tmp_path / "trained.csv")}
    assert set(trained) == {("edges", m) for m in ("EAP", "EAP-IG inputs", "EAP-IG activations")} | {
        ("nodes", m) for m in ("AtP", "AtP, QK-fix", "AtP*")
    }
    assert all(0.5 < value <= 1 for value in trained.values())
    assert trained["nodes", "AtP, QK-fix"] > trained["nodes", "AtP"]
    shown = capsys.readouterr().out
    assert "saturated, gemma2" in shown and "written:" in shown
    names = {"known.csv", "trained.csv", "figures", "config.yaml", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_of_a_large_model_some_edges_and_nodes_are_patched_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_circuits(monkeypatch, "saturated")
    flags = ["--models", "tiny-llama3.1", "--planted_prompts", 2, "--limit", 2, "--steps", 1, "--out", tmp_path]
    flags += ["--methods", "path_patching", "eap"]
    assert command(*flags, "--exact", 30) == 0
    shown = capsys.readouterr().out
    assert "30 edges and 30 nodes of tiny-llama3.1 patched exactly" in shown and "no circuit is known" in shown
    assert {row["n"] for row in rows(tmp_path / "trained.csv")} == {"30"}

    # The correlation over the drawn nodes, by the library.
    model, tokenizer = px.load_model("tiny-llama3.1")
    clean, corrupt = px.methods.both_texts(px.PromptSet.load("ioi_en")[:2], model, tokenizer)
    drawn = study.drawn(study.Config(exact=30), study.all_nodes(model))
    assert len({spec.name for spec in drawn}) == 30 and drawn != study.all_nodes(model)[:30]
    exact = px.patch(model, drawn, clean, corrupt, progress=False).delta
    estimated = px.methods.atp(model, drawn, clean, corrupt, progress=False)
    expected = spearmanr(np.abs(exact).mean(1), np.abs(estimated).mean(1)).statistic
    found = {(row["over"], row["method"]): float(row["spearman"]) for row in rows(tmp_path / "trained.csv")}
    assert found["nodes", "AtP"] == pytest.approx(expected)

    # How far the first method is ahead of the second on the known circuits is the evidence.
    auroc = {(row["architecture"], row["method"]): float(row["auroc"]) for row in rows(tmp_path / "known.csv")}
    ahead = np.mean([auroc[of, "path_patching"] - auroc[of, "eap"] for of in ("llama", "gemma2", "gpt2")])
    assert f"above that of eap {ahead:.3g} [" in shown and ahead > 0.05

    monkeypatch.setattr(study, "cost", lambda *_: (7000.0, 100.0))
    assert command(*flags) == 0  # (600 - 100) / 7000 of 1055 are 75, of which three binary digits are kept
    assert "to keep within ten minutes 64 of 1055 are taken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "-1"], "--limit must be 0 or more"),
        (["--steps", 0], "--steps must be 1 or more"),
        (["--planted_prompts", 51], "--planted_prompts must be from 1 to 50, not 51"),
        (["--dataset", "ioi_enn"], "did you mean 'ioi_en'?"),
        (["--models", "tiny-gpt5"], "tiny-gpt5"),
        (["--methods", "eap"], "--methods takes two or more"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    flags: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*flags, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
