"""Drops by confidence and by steps against one problem at a time; strata of few problems; interrupted; given bad input."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critical_heads import patch_hub
from critical_heads import stratify_difficulty as study

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning import strata as statistics
from pyvene_ext.methods.reasoning.strata import ProblemEffects, difficulty_strata, split_by, stratum_order
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.results import Texts
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import Problem
from pyvene_ext.prompts.tiny_tasks import draw
from pyvene_ext.runs import ablated
from pyvene_ext.runs.figures.drops import crossed_strata, drops_by_stratum
from pyvene_ext.stats import accuracy
from tests.experiments.critical_heads import by_hand
from tests.ground_truth import ablations as slow
from tests.interrupted import stop_at

N = 8
MODEL = "tiny-llama3.1"
HEADS = ((0, 1), (1, 2))
FEW = ("--limit", N, "--models", MODEL, "--out", "x", "--max_new_tokens", 20, "--min_problems", 2, "--quantiles", 2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 200)
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [*map(str, flags)])


@cache
def solved(heads: tuple[tuple[int, int], ...]) -> tuple[list[bool], list[float], list[int]]:
    """Which problems are right without some heads at the reasoning, how sure the model is of its answer, and the steps."""
    model, tokenizer = load_model(MODEL)
    generator, mark = rng(0, "word problems"), tokenizer.convert_tokens_to_ids("####")
    right, sure, steps = [], [], []
    for _ in range(N):
        example = draw("arithmetic", generator, held_out=True)
        ids = tokenizer(example.prompt)["input_ids"]

        def logits(text: Any, start: int = len(ids)) -> torch.Tensor:
            where = range(start, text.index(mark) if mark in text else len(text))
            changes: Any = [
                ("z", layer, slow.replaced(where, [head for at, head in heads if at == layer], torch.zeros_like))
                for layer in {layer for layer, _ in heads}
            ]
            return slow.logits(model, text, changes)[-1]

        out = by_hand.written(model, tokenizer, ids, logits, 20)
        right.append(by_hand.number(str(tokenizer.decode(out))) == float(example.answer.split()[-1]))
        # The answer is one token, the last before the end.
        sure.append(float(logits([*ids, *out[:-1]]).softmax(-1)[out[-1]]))
        steps.append(example.answer.count("<<"))
    return right, sure, steps


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_every_stratum_is_that_of_each_problem_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*FEW, "--heads", "0.1", "1.2", "--random_sets", 2) == 0
    clean, sure, steps = solved(())
    after, *_ = solved(HEADS)
    assert sum(clean) > 6 and 0 < sum(after) < N, "something is compared"
    edges = np.quantile(sure, (0, 0.5, 1))
    parts = ["q2" if value >= edges[1] else "q1" for value in sure]
    strata = {"confidence": parts, "steps": [str(n) for n in steps]}
    strata["both"] = [f"{part}, {n}" for part, n in zip(parts, steps, strict=True)]

    problems = by_hand.table(folder / f"x/problems/{MODEL}.csv")
    assert [int(row["problem"]) for row in problems] == list(range(N))
    assert [row["clean"] for row in problems] == [str(int(value)) for value in clean]
    assert [float(row["after"]) for row in problems] == [float(value) for value in after]
    assert [float(row["confidence"]) for row in problems] == pytest.approx(sure, abs=1e-5)
    assert [row["stratum"] for row in problems] == strata["both"]

    facts = json.loads((folder / "x/summary.json").read_text())
    assert facts["models"][MODEL]["edges"] == pytest.approx(edges.tolist(), abs=1e-5)
    assert facts["models"][MODEL]["intervention"] == "zero ablation of 0.1 1.2 at reasoning"
    rows = by_hand.table(folder / "x/strata.csv")
    assert [(row["split"], row["stratum"]) for row in rows] == [
        (split, stratum) for split in statistics.SPLITS for stratum in sorted(set(strata[split]))
    ]
    random = np.array([float(row["random"]) for row in problems])
    for row in rows:
        here = np.array([name == row["stratum"] for name in strata[row["split"]]])
        before, then = np.array(clean)[here], np.array(after)[here]
        assert int(row["problems"]) == here.sum()
        assert float(row["clean_accuracy"]) == pytest.approx(100 * before.mean())
        assert float(row["accuracy"]) == pytest.approx(100 * then.mean())
        drop = 100 * (before.mean() - then.mean())
        assert float(row["drop"]) == pytest.approx(drop)
        assert float(row["relative_drop"]) == pytest.approx(100 * (1 - then.mean() / before.mean()))
        assert float(row["random_drop"]) == pytest.approx(100 * (before.mean() - random[here].mean()))
        if here.sum() < 2:
            assert row["drop_low"] == row["excess"] == row["verdict"] == row["p"] == ""
            continue
        assert float(row["excess"]) == pytest.approx(drop - float(row["random_drop"]))
        assert float(row["drop_low"]) < drop + 1e-9 and drop - 1e-9 < float(row["drop_high"]) and row["verdict"]
    by_steps = by_hand.table(folder / "x/drop_by_steps.csv")
    assert list(by_steps[0]) == ["stratum", f"{MODEL}_drop"]
    assert [row[f"{MODEL}_drop"] for row in by_steps] == [row["drop"] for row in rows if row["split"] == "steps"]
    assert len(facts["verdicts"]) == 3 and all(line in capsys.readouterr().out for line in facts["verdicts"][:1])
    for name in (MODEL, f"{MODEL}_both"):
        assert (folder / f"x/figures/{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_strata_of_heads_that_stop_are_of_the_problems_they_took(folder: Path) -> None:
    flags = ["--models", MODEL, "--limit", 24, "--max_new_tokens", 20, "--min_problems", 2, "--quantiles", 2]
    flags += ["--heads", "0.1", "1.2", "--random_sets", 2, "--seed", 3]
    assert command(*flags, "--out", "whole") == 0 and command(*flags, "--out", "x", "--decide", 30, 20) == 0
    whole, some = (by_hand.table(folder / f"{out}/problems/{MODEL}.csv") for out in ("whole", "x"))
    order = rng(3, "order of problems").permutation(24)
    clean, after = (np.array([float(row[name]) for row in whole])[order] for name in ("clean", "after"))
    stopped = px.stats.Stopping((30, 20), seed=3).judge(clean == 1, after == 1)
    assert stopped is not None and 2 < stopped.problems < 24
    facts = json.loads((folder / "x/summary.json").read_text())["models"][MODEL]
    assert px.stats.Stopped.from_dict(facts["stopped"]) == stopped and facts["problems"] == 24
    taken = sorted(order[: stopped.problems])
    assert some == [whole[number] for number in taken], "the same strata, and random sets on the same problems"
    for row in by_hand.table(folder / "x/strata.csv"):
        key = {"confidence": lambda r: r["stratum"].split(", ")[0], "steps": lambda r: r["steps"]}.get(row["split"])
        here = [r for r in some if (key(r) if key else r["stratum"]) == row["stratum"]]
        assert int(row["problems"]) == len(here)
        if len(here) < 2:
            continue
        lost = np.array([float(r["clean"]) - float(r["after"]) for r in here])
        excess = np.array([float(r["random"]) - float(r["after"]) for r in here])
        for name, values in (("drop", lost), ("excess", excess)):
            interval = [100 * end for end in px.stats.anytime_interval(values)]
            assert [float(row[column]) for column in (name, f"{name}_low", f"{name}_high")] == pytest.approx(interval)


def test_random_heads_are_of_the_same_layers_and_none_of_the_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = [], ablated.heads_together

    def seen(heads: Any, *more: Any, **named: Any) -> Any:
        asked.append(tuple(heads))
        return own(heads, *more, **named)

    monkeypatch.setattr(ablated, "heads_together", seen)
    assert command(*FEW, "--heads", "0.1", "1.2", "--random_sets", 3, "--limit", 3) == 0
    named, *random = dict.fromkeys(asked)
    assert named == HEADS and len(random) == 3
    for heads in random:
        assert sorted(layer for layer, _ in heads) == [0, 1] and not set(heads) & set(HEADS)
    facts = json.loads((folder / "x/summary.json").read_text())["models"][MODEL]
    assert facts["random_sets"] == 3


def test_the_first_heads_of_a_ranking_are_ablated(folder: Path) -> None:
    (folder / "ranking.csv").write_text("scores,layer,head\n0.9,1,2\n0.8,0,1\n0.1,3,0\n", encoding="utf-8")
    flags = ("--rankings", "ranking.csv", "--n_heads", 2, "--random_sets", 0)
    assert command(*FEW, *flags) == 0
    rows = by_hand.table(folder / f"x/problems/{MODEL}.csv")
    assert [float(row["after"]) for row in rows] == [float(value) for value in solved(HEADS)[0]]
    assert "random" not in rows[0]
    facts = json.loads((folder / "x/summary.json").read_text())["models"][MODEL]
    assert facts["intervention"] == "zero ablation of 1.2 0.1 at reasoning"


@pytest.mark.slow
def test_noise_at_a_token_of_the_reasoning_is_that_of_patch_hub(folder: Path) -> None:
    """Only problems with two steps have a token 12; the edges of confidence are of all problems."""
    flags = ("--hub", 12, "--noise_seeds", 2, "--seed", 3)
    assert command(*FEW, *flags) == 0
    rows = by_hand.table(folder / f"x/problems/{MODEL}.csv")
    _, sure, steps = solved(())
    assert [int(row["problem"]) for row in rows] == [i for i, n in enumerate(steps) if n == 2]
    facts = json.loads((folder / "x/summary.json").read_text())["models"][MODEL]
    assert facts["edges"] == pytest.approx(np.quantile(sure, (0, 0.5, 1)).tolist(), abs=1e-5)
    assert facts["intervention"] == "noise at token 12 of the reasoning, embed"
    same = f"--limit {N} --models {MODEL} --out y --max_new_tokens 20 --min_problems 2 --sites embed --seeds 2 --seed 3"
    assert run_study(patch_hub.main, patch_hub.Config, same.split()) == 0
    (expected,) = [row for row in by_hand.table(folder / "y/positions.csv") if row["position"] == "12"]
    (whole,) = [row for row in by_hand.table(folder / "x/strata.csv") if row["split"] == "steps"]
    assert float(whole["accuracy"]) == pytest.approx(float(expected["accuracy"]))
    assert float(whole["drop"]) == pytest.approx(float(expected["drop"])) and float(whole["drop"]) > 0
    assert whole["random_drop"] == whole["excess"] == whole["p"] == ""


# -- strata that are known ---------------------------------------------------------------------------------------------


def evaluation(confidence: list[float]) -> Evaluation:
    n = len(confidence)
    return Evaluation(((),) * n, ("",) * n, (None,) * n, (1.0,) * n, np.ones(n, bool), np.array(confidence))


def problems(steps: list[int]) -> list[Problem]:
    return [Problem(question="?", solution="", answer=1, steps=n) for n in steps]


def test_strata_by_quantiles_with_the_unparsed_apart() -> None:
    confidence = [0.1, np.nan, 0.2, 0.3, 0.4, 0.5, 0.6, np.nan]
    strata, edges = difficulty_strata(evaluation(confidence), problems([1, 2, 1, 2, 1, 10, 0, 2]), 3)
    known = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    np.testing.assert_allclose(edges, np.quantile(known, [0, 1 / 3, 2 / 3, 1]))
    assert strata["confidence"] == ["q1", "unparsed", "q1", "q2", "q2", "q3", "q3", "unparsed"]
    assert strata["steps"] == ["1", "2", "1", "2", "1", "10", "0", "2"]
    assert strata["both"][:2] == ["q1, 1", "unparsed, 2"]
    mixed = ["unparsed, 2", "q10, 1", "q2, 10", "q2, 2", "unparsed"]
    assert sorted(mixed, key=stratum_order) == ["q2, 2", "q2, 10", "q10, 1", "unparsed", "unparsed, 2"]
    onto = difficulty_strata(evaluation([0.1, 0.2, 0.3]), problems([1] * 3), 2)[0]["confidence"]
    assert onto == ["q1", "q2", "q2"], "what lies on an edge is of the part above"
    # A model that is as sure of everything has one part, and one that says nothing has none.
    assert set(difficulty_strata(evaluation([0.5] * 4), problems([1] * 4), 4)[0]["confidence"]) == {"q1"}
    nothing, none = difficulty_strata(evaluation([np.nan] * 2), problems([1] * 2), 4)
    assert nothing["confidence"] == ["unparsed"] * 2 and none == []


def measured(after: list[float], random: np.ndarray | None = None, clean: list[bool] | None = None) -> ProblemEffects:
    n = len(after)
    return ProblemEffects(
        "m",
        "w",
        evaluation([0.5] * n),
        np.arange(n),
        np.array(clean or [True] * n),
        np.array(after),
        np.zeros(n),
        random,
        {},
    )


def test_few_problems_are_in_no_test_and_a_difference_is_found() -> None:
    names = ["1"] * 40 + ["2"] * 40 + ["3"] * 4
    after = [1.0] * 40 + [0.0] * 40 + [0.0] * 4
    found = measured(after, np.array([after, after], bool))  # random heads cost the same
    rows, test = split_by(found, "steps", names, 5, 0)
    assert [row["problems"] for row in rows] == [40, 40, 4]
    assert [row["drop"] for row in rows] == [0, 100, 100]
    assert [row["verdict"] for row in rows][1:] == ["causal", ""] and rows[0]["verdict"].startswith(
        "redundant by its size"
    )
    assert np.isnan(rows[2]["p"]) and np.isnan(rows[2]["drop_low"]) and np.isnan(rows[2]["excess"])
    assert test == {"model": "m", "split": "steps", "problems": 80, "strata": 2, "p": 1 / 201, "excess_p": 1.0}
    assert rows[0]["p"] == rows[0]["q"] == 1 / 201

    alike = measured([1.0, 0.0] * 42)
    rows, test = split_by(alike, "steps", names, 5, 0)
    assert test["p"] > 0.5 and np.isnan(test["excess_p"])
    _, none = split_by(alike, "steps", names, 41, 0)
    assert np.isnan(none["p"]) and none["problems"] == none["strata"] == 0


def test_a_stratum_whose_text_broke_has_no_verdict() -> None:
    found = dataclasses.replace(measured([0.0] * 10), unparsed=np.array([1.0] * 5 + [0.0] * 5))
    rows, _ = split_by(found, "steps", ["1"] * 5 + ["2"] * 5, 5, 0)
    assert [row["verdict"].partition(" (")[0] for row in rows] == ["text broken, no verdict", "causal"]


def test_verdict_lines_name_the_strata_with_most_and_least() -> None:
    tests = [{"model": "m", "split": "steps", "p": 0.001, "q": 0.002, "excess_p": 0.2, "excess_q": 0.3}]
    row = {"model": "m", "split": "steps", "problems": 50, "random_drop": 3.0}
    low = {"stratum": "1", "drop": 0.5, "drop_low": 0.0, "drop_high": 1.5, "verdict": "redundant"}
    high = {"stratum": "2", "drop": 30.0, "drop_low": 20.0, "drop_high": 40.0, "verdict": "causal"}
    few = {"stratum": "3", "drop": 90.0, "drop_low": np.nan, "drop_high": np.nan, "verdict": ""}
    facts = {"m": {"intervention": "something"}}
    (said,) = study.verdicts_of([{**row, **more} for more in (low, high, few)], tests, facts)
    assert said == (
        "m, something, by steps: 1 of 2 strata causal, 1 redundant; most in 2 (50 problems): 30.0 points [20.0, 40.0]: causal "
        "(random heads 3.0); least in 1 (50 problems): 0.5 points [0.0, 1.5]: redundant (random heads 3.0); the drop differs "
        "between strata (p = 0.001, q = 0.002); the excess over random heads is not shown to differ between strata (p = 0.2, "
        "q = 0.3); 1 strata with few problems"
    )
    (said,) = study.verdicts_of([{**row, **low}, {**row, **low, "stratum": "2"}], tests, facts)
    assert "; most in 1 (50 problems)" in said and "least in" not in said  # all are alike
    (said,) = study.verdicts_of([{**row, **few}], [{**tests[0], "p": np.nan, "excess_p": np.nan}], facts)
    assert said == "m, something, by steps: no stratum has enough problems; 1 strata with few problems"


def test_accuracy_over_seeds_has_an_interval_within_0_and_100() -> None:
    known = accuracy.percent_correct(np.array([True, False, True, True]))
    assert statistics.mean_of(np.array([1.0, 0, 1, 1]), 0, "x") == known
    some = statistics.mean_of(np.array([0.5, 0, 0, 0]), 0, "x")
    assert some.mean == 12.5 and some.low == 0 and 12.5 < some.high <= 100


def test_the_figures_show_few_problems_as_such() -> None:
    names = ["1"] * 40 + ["2"] * 3
    rows = []
    for split, strata in (("confidence", ["q1"] * 43), ("steps", names), ("both", [f"q1, {name}" for name in names])):
        found = measured([0.0] * 20 + [1.0] * 20 + [0.0] * 3, np.ones((1, 43), bool))
        rows += split_by(found, split, strata, 20, 0)[0]  # type: ignore[arg-type]
    left, right = drops_by_stratum("title", rows).axes
    bars: Any = right.patches
    assert [bar.get_height() for bar in bars] == [50, 100]
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
    assert [label.get_text() for label in right.get_xticklabels()] == ["1\nn = 40\nfrom 100%", "2\nn = 3\nfrom 100%"]
    (diamonds,) = [line for line in right.lines if line.get_marker() == "D"]
    assert np.array(diamonds.get_ydata()).tolist() == [0, 0] and left.get_ylabel()
    cells, _ = crossed_strata("title", rows).axes
    words = [text.get_text() for text in cells.texts]
    assert re.fullmatch(r"50 \[\d+\.\d, \d+\.\d\]\nn = 40", words[0]) and words[1] == "n = 3"
    shown: Any = cells.images[0].get_array()
    assert shown.tolist() == [[50.0, None]]


# -- running it ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*FEW, "--heads", "0.1", "--random_sets", 2)
    made = stop_at(monkeypatch, 2 * N, Texts, "add")
    assert command(*flags) == 130
    assert all("unfinished" in path.parts for path in (folder / "x").rglob("*") if path.is_file())
    assert command(*flags) == 0 and len(made) == 1 + 4 * N, "only the text that was interrupted was written twice"
    assert not (folder / "x/unfinished").exists()
    assert command("--config", "x/config.yaml", "--out", "y") == 0 and len(made) == 1 + 2 * 4 * N
    for name in ("strata.csv", "tests.csv", f"problems/{MODEL}.csv"):
        assert (folder / "y" / name).read_bytes() == (folder / "x" / name).read_bytes()


@pytest.mark.slow
def test_the_q_of_a_split_counts_the_splits_of_all_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = iter((0.01, 0.04, 0.5, 0.02, 0.03, np.nan))

    def known(found: ProblemEffects, split: Any, *_: Any) -> tuple[list[study.Row], study.Row]:
        row = statistics.row_of(found, split, "1", np.ones(N, bool), True, 0) | {"p": 1.0, "q": 1.0}
        return [row], {"model": found.name, "split": split, "p": next(p), "excess_p": 0.5}

    monkeypatch.setattr(px.methods, "split_by", known)
    monkeypatch.setattr(study, "verdicts_of", lambda *_: [])
    assert command(*FEW, "--models", MODEL, "tiny-qwen2.5", "--heads", "0.1", "--random_sets", 0) == 0
    tests = by_hand.table(folder / "x/tests.csv")
    assert [row["model"] for row in tests] == [MODEL] * 3 + ["tiny-qwen2.5"] * 3
    assert [float(row["q"] or "nan") for row in tests] == pytest.approx(
        [0.05, 0.05, 0.5, 0.05, 0.05, np.nan], nan_ok=True
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--heads", "0.1", "--hub", 3),
            "--heads, --rankings and --hub are different interventions; give one of them.",
        ),
        (("--hub", 3, "--decide", 10, 2), "--decide and --width stop the ablation of heads, not noise"),
        (("--decide", 2, 10), "--decide takes an upper and a lower threshold"),
        (("--heads", "0.1", "--rankings", "a.csv"), "are different interventions"),
        (("--rankings", "a.csv", "b.csv"), "--rankings names 2 files for 1 models; give one file per model."),
        (("--heads", "layer1"), "--heads names heads as layer.head, such as 2.5, not 'layer1'."),
        (("--heads", "0.1", "0.1"), "--heads names each once, not 0.1 0.1."),
        (("--quantiles", 1), "--quantiles must be 2 or more, not 1."),
        (("--min_problems", 1), "--min_problems must be 2 or more"),
        (("--noise_seeds", 0), "--noise_seeds must be 1 or more"),
        (("--n_heads", 0), "--n_heads must be 1 or more"),
        (("--random_sets", -1), "--random_sets must be 0 or more"),
        (("--max_new_tokens", 1), "--max_new_tokens must be 2 or more"),
        (("--limit", 1), "there is one problem, and an interval needs two"),
        (("--problems", "none.jsonl"), "there is no file of problems none.jsonl"),
    ],
)
def test_bad_flags_are_one_sentence_before_the_model_is_loaded(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[Any, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(px.flags.Loading, "load", None)
    assert command(*FEW, *flags) == 2
    assert message in capsys.readouterr().err and not list(folder.rglob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--heads", "9.0"), "--heads 9.0: tiny-llama3.1 has layers 0 to 3, each with heads 0 to"),
        (("--rankings", "none.csv"), "none.csv"),
        (("--hub", 90), "--hub 90: 0 problems of tiny-llama3.1 have a token there in their block."),
    ],
)
def test_what_does_not_fit_the_model_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[Any, ...], message: str
) -> None:
    assert command(*FEW, *flags) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (folder / "x").rglob("*") if path.is_file() and "unfinished" not in path.parts]
