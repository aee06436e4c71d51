"""circuit_localization.py against the functions that it is made of, by its files and its table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import circuit_localization as study
import numpy as np
import pytest

import pyvene_ext as px
from pyvene_ext.circuits import (
    MIB_SHARES,
    Circuit,
    acdc,
    faithfulness_curve,
    judge,
    load_circuit,
    named_scores,
    overlap,
    run_circuit,
    run_circuits,
    score,
    top_edges,
)
from pyvene_ext.report import write_report
from pyvene_ext.runs.facts import Evidence
from tests.saved_models import save_random_model


def command(*flags: Any) -> int:
    return px.io.run(study.main, study.Config, [str(flag) for flag in flags])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("circuits") / "en"
    flags = ["--methods", "eap", "flow", "--share", 0.05, "--removed", 3, "--random_circuits", 2, "--batch_size", 4]
    assert command("--limit", 8, "--out", out, *flags) == 0
    return out


@pytest.mark.slow
def test_the_tables_hold_what_the_functions_give_on_either_half(folder: Path) -> None:
    model, tokenizer = px.load_model("tiny-qwen2.5")
    facts = json.loads((folder / "summary.json").read_text())
    assert sorted(facts["scored"] + facts["judged"]) == list(range(8)) and len(facts["scored"]) == 4
    clean, corrupt = px.methods.both_texts(px.PromptSet.load("ioi_en")[:8], model, tokenizer)
    on_scored, on_judged = ((clean.take(some), corrupt.take(some)) for some in (facts["scored"], facts["judged"]))
    assert facts["n_all"] == 1936
    for row in rows(folder / "methods.csv"):
        method: Any = row["method"]
        scores = score(model, *on_scored, method, batch_size=4, progress=False)
        np.testing.assert_allclose(np.load(folder / f"scores_{method}.npy"), scores, atol=1e-6)
        circuit = top_edges(scores, 96, model.config)
        assert load_circuit(folder / f"circuit_{method}.json", model) == circuit
        how: dict[str, Any] = {"scores": scores, "n": 96, "random": 2, "removed": 3, "progress": False}
        expected = judge(model, circuit, *on_judged, **how).row()
        areas = {}
        for by, name in (("value", "cpr"), ("magnitude", "cmd")):
            curve = faithfulness_curve(model, scores, *on_judged, shares=MIB_SHARES, by=by, progress=False)  # type: ignore[arg-type]
            areas[name] = getattr(curve, name)()
            shown = [r for r in rows(folder / "curves.csv") if (r["method"], r["by"]) == (method, by)]
            np.testing.assert_allclose([float(r["faithfulness"]) for r in shown], curve.values, atol=1e-4)
            assert [float(r["share"]) for r in shown] == list(MIB_SHARES)
        for name, value in (expected | areas).items():
            found = float(row[name]) if row[name] else np.nan
            np.testing.assert_allclose(found, value, atol=1e-4, err_msg=f"{method} {name}")
        assert float(row["cpr_low"]) <= float(row["cpr"]) <= float(row["cpr_high"])
    assert "digraph" in (folder / "circuit_eap.dot").read_text()
    for row in rows(folder / "circuit_eap.csv"):
        (value,) = named_scores(
            np.load(folder / "scores_eap.npy"), Circuit(frozenset({row["edge"]})), model.config
        ).values()
        assert float(row["score"]) == pytest.approx(value) and set(row) == {"edge", "score"}
    assert {row["edge"] for row in rows(folder / "circuit_eap.csv")} == load_circuit(
        folder / "circuit_eap.json", model
    ).edges
    said = [Evidence.of(facts).measured for facts in facts["evidence"]]
    best = rows(folder / "methods.csv")[0]
    for measured, area in zip(said[1:], ("cpr", "cmd"), strict=True):
        assert measured.startswith(f"the {area.upper()} by eap is {float(best[area]):.3g} [")
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"faithfulness", "circuit"}


@pytest.mark.slow
def test_another_runs_circuit_is_compared_and_nodes_are_judged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder / "circuit_eap.json"
    flags = [
        "--level",
        "node",
        "--share",
        0.3,
        "--removed",
        2,
        "--random_circuits",
        2,
        "--limit",
        8,
        "--ablation",
        "zero",
        "--compare",
        other,
    ]
    assert command("--out", tmp_path / "nodes", *flags) == 0
    said = capsys.readouterr().out
    model, _ = px.load_model("tiny-qwen2.5")
    own, compared = (load_circuit(path, model) for path in (tmp_path / "nodes/circuit_atp.json", other))
    (row,) = rows(tmp_path / "nodes" / "shared.csv")
    assert float(row["jaccard"]) == pytest.approx(overlap(own, compared, model.config).jaccard)
    assert f"{row['n_shared']} edges shared with {other}: Jaccard" in said
    facts = json.loads((tmp_path / "nodes/summary.json").read_text())
    clean = px.PromptSet.load("ioi_en")[:8].tokenize(px.load_model("tiny-qwen2.5")[1]).take(facts["judged"])
    there, empty, whole = (
        run_circuit(model, circuit, clean, None, ablation="zero", progress=False)
        for circuit in (compared, Circuit(frozenset()), Circuit.full(model.config))
    )
    expected = (there.mean() - empty.mean()) / (whole.mean() - empty.mean())
    assert float(row["faithfulness"]) == pytest.approx(expected, abs=1e-4) and int(row["n_other"]) == len(compared)
    assert [row["method"] for row in rows(tmp_path / "nodes/methods.csv")] == ["atp", "random"]
    scores = dict(
        zip(map(str, px.specs.senders(model.config)), np.load(tmp_path / "nodes/scores_atp.npy"), strict=True)
    )
    sizes = []
    for row in rows(tmp_path / "nodes/circuit_atp.csv"):
        assert row["shared_with"] == (str(other) if row["edge"] in compared.edges else "none")
        assert float(row["score_of_sender"]) == pytest.approx(scores[row["edge"].partition("->")[0]])
        sizes.append(abs(float(row["score_of_sender"])))
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(own)
    write_report([tmp_path / "nodes"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (
        f"atp: {len(own)} edges; faithfulness" in page and f"solid: the {len(own.edges & compared.edges)} that" in page
    )
    assert not (tmp_path / "nodes/circuit_random.csv").exists()


@pytest.mark.slow
def test_every_method_is_judged_at_the_size_that_acdc_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--methods", "acdc", "eap", "--tau", 0.5, "--removed", 1, "--random_circuits", 1, "--limit", 6]
    assert command("--out", tmp_path / "x", *flags) == 0
    model, tokenizer = px.load_model("tiny-qwen2.5")
    facts = json.loads((tmp_path / "x/summary.json").read_text())
    pairs = px.methods.both_texts(px.PromptSet.load("ioi_en")[:6], model, tokenizer)
    on_scored, on_judged = ([texts.take(facts[half]) for texts in pairs] for half in ("scored", "judged"))
    found = acdc(model, *on_scored, "logit_diff", tau=0.5, progress=False)
    n = len(found.unpruned)
    assert facts["n_acdc"] == n > 3
    eap = top_edges(score(model, *on_scored, "eap", progress=False), n, model.config)
    expected = run_circuits(model, [found.circuit, eap], *on_judged, progress=False).faithfulness
    table = rows(tmp_path / "x/methods.csv")
    np.testing.assert_allclose([float(row["as_many"]) for row in table], expected, atol=1e-4)
    assert float(table[0]["passes"]) > 5 * float(table[1]["passes"]) > 0
    assert f"faithfulness of as many edges as acdc keeps, {n}: acdc {expected[0]:.2f}, eap" in capsys.readouterr().out


@pytest.mark.slow
def test_acdc_tests_only_the_edges_that_the_first_method_ranks_highest(tmp_path: Path) -> None:
    flags = ["--methods", "eap", "acdc", "--acdc_from", 0.05, "--tau", 0.5, "--removed", 1, "--random_circuits", 1]
    assert command("--limit", 6, "--out", tmp_path / "x", "--by", "value", *flags) == 0
    model, tokenizer = px.load_model("tiny-qwen2.5")
    facts = json.loads((tmp_path / "x/summary.json").read_text())
    pairs = px.methods.both_texts(px.PromptSet.load("ioi_en")[:6], model, tokenizer)
    on_scored = [texts.take(facts["scored"]) for texts in pairs]
    start = top_edges(np.load(tmp_path / "x/scores_eap.npy"), 96, model.config, "value")
    found = acdc(model, *on_scored, "logit_diff", tau=0.5, by="value", start_from=start, progress=False)
    assert load_circuit(tmp_path / "x/circuit_acdc.json", model) == found.circuit and 3 < len(found.circuit) < len(
        start
    )
    tested = named_scores(np.load(tmp_path / "x/scores_acdc.npy"), Circuit.full(model.config), model.config)
    assert {edge for edge, effect in tested.items() if effect} <= start.edges
    assert facts["n_acdc"] == len(found.unpruned)
    on_judged = [texts.take(facts["judged"]) for texts in pairs]
    expected = run_circuits(model, [found.circuit], *on_judged, progress=False).faithfulness
    assert float(rows(tmp_path / "x/methods.csv")[1]["as_many"]) == pytest.approx(expected[0], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--methods", "atp"], "--methods atp does not score edges; choose among eap, "),
        (["--level", "node", "--methods", "flow"], "--methods flow does not score nodes"),
        (["--metric", "kl"], "leave eap and atp out of --methods"),
        (["--share", "1.5"], "--share"),
        (["--methods", "acdc", "--tau", "0"], "--tau"),
        (["--level", "node", "--methods", "acdc"], "--methods acdc does not score nodes"),
        (["--methods", "acdc", "--acdc_from", "0.1"], "--acdc_from needs a method that ranks the edges"),
        (
            ["--methods", "flow", "acdc", "--acdc_from", "0.0001"],
            "none of the 0 edges that flow ranks highest leads from the embedding to the logits; take a larger share",
        ),
        (["--limit", "2"], "too few to score edges on some and judge on others"),
        (["--compare", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--limit", 8, "--out", tmp_path / "x", *flags) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said and not (tmp_path / "x").exists()


def test_zero_ablation_needs_no_corrupt_text_and_acdc_writes_the_circuit_that_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_model("mistral", tmp_path / "model")  # of a tenth as many edges as the shipped ones
    prompts = [
        {"text": one.text, "answer": one.io_name, "wrong": one.s_name} for one in px.PromptSet.load("ioi_en")[:8]
    ]
    (tmp_path / "own.json").write_text(json.dumps([*prompts, prompts[0]]))
    out = tmp_path / "out"
    flags = ("--model", tmp_path / "model", "--dataset", tmp_path / "own.json", "--ablation", "zero")
    flags += ("--methods", "acdc", "--tau", 0.1)
    assert command(*flags, "--removed", 1, "--random_circuits", 1, "--out", out) == 0
    said = capsys.readouterr().out
    assert "1 pair left out: 1 that repeat an earlier one" in said
    facts = json.loads((out / "summary.json").read_text())
    model, tokenizer = px.load_model(tmp_path / "model")
    scored = px.PromptSet.load(tmp_path / "own.json").tokenize(tokenizer).take(facts["scored"])
    found = acdc(model, scored, None, "logit_diff", tau=0.1, ablation="zero", batch_size=8, progress=False)
    assert load_circuit(out / "circuit_acdc.json", model) == found.circuit
    (row,) = rows(out / "methods.csv")
    assert int(row["n_chosen"]) == facts["n_acdc"] == len(found.unpruned) > 0
