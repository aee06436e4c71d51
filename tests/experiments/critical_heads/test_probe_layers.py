"""The study of probes against hidden states, normal equations and loops over folds; interrupted; given bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critical_heads import probe_layers as study

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning import probe_tables
from pyvene_ext.methods.reasoning.probe_tables import probe_rows
from pyvene_ext.methods.reasoning.probe_targets import ProbeTarget, problem_group, solution_number
from pyvene_ext.methods.reasoning.probes import ALPHAS, Residuals, deal_folds
from pyvene_ext.prompts.problems import Problem
from pyvene_ext.prompts.tiny_tasks import NAMES_EN, draw
from pyvene_ext.runs import reasoning
from pyvene_ext.runs.figures.layers import probe_curves
from pyvene_ext.runs.flags import Problems
from tests.experiments.critical_heads import by_hand
from tests.ground_truth import probes as slow

N = 30
MODEL = "tiny-qwen2.5"
TARGETS = "answer, first_operand, last_digit, correct, or result_1, result_2 ..."
FEW = ("--limit", N, "--models", MODEL, "--min_problems", 10, "--folds", 3, "--shuffles", 19, "--out", "x")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe_tables, "RESAMPLES", 100)
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [*map(str, flags)])


@cache
def examples() -> list[Any]:
    generator = rng(0, "word problems")
    return [draw("arithmetic", generator, held_out=True) for _ in range(N)]


@cache
def states(position: str) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream at one token of each problem, and the question's mean, [place problem d]; one problem at a time."""
    model, _, problems = by_hand.blocks(MODEL, N)
    own, question = [], []
    for ids, block, _ in problems:
        kept: list[torch.Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        handle.remove()
        layers = np.stack([x[0].numpy() for x in (*hidden[:-1], kept[0])]).astype(np.float64)
        at = {"question_last": block[0] - 1, "mark": len(ids) - 1, "block_last": block[-1], "3": block[3]}[position]
        own.append(layers[:, at])
        question.append(layers[:, : block[0]].mean(1))
    return np.stack(own, 1), np.stack(question, 1)


def target_by_hand(name: str) -> np.ndarray:
    """[problem column]"""
    answers = [example.answer.split()[-1] for example in examples()]
    if name == "answer":
        return np.array([[float(answer)] for answer in answers])
    if name == "first_operand":
        return np.array([[float(re.findall(r"\d+", example.answer)[0])] for example in examples()])
    digits = [answer[-1] for answer in answers]
    return np.array([[float(digit == kind) for kind in sorted(set(digits))] for digit in digits])


@pytest.mark.slow
@pytest.mark.parametrize("position", ["question_last", "mark", "3"])
@pytest.mark.usefixtures("drawn")
def test_every_number_is_that_of_loops_over_places_and_folds(position: str, folder: Path) -> None:
    assert (
        command(*FEW, "--positions", position, "--targets", "answer", "last_digit", "first_operand", "--seed", 4) == 0
    )
    rows = {(row["target"], int(row["depth"])): row for row in by_hand.table(folder / "x/probes.csv")}
    own, question = states(position)
    numbers = [" ".join(re.findall(r"\d+", example.prompt)) for example in examples()]
    folds = deal_folds(numbers, 3, rng(4, "folds"))
    assert len(rows) == 3 * len(own) == 3 * 7
    for (target, depth), row in rows.items():
        if depth not in (0, 1, 6):
            continue
        y = target_by_hand(target)
        predicted, alphas = slow.nested(own[depth], y, folds, ALPHAS)
        baseline, _ = slow.nested(question[depth], y, folds, ALPHAS)
        fitted = slow.ridge(own[depth], y, sorted(alphas)[1], own[depth])
        r2, other = slow.r_squared(y, predicted), slow.r_squared(y, baseline)
        assert float(row["r2"]) == pytest.approx(r2, abs=1e-5)
        assert float(row["question"]) == pytest.approx(other, abs=1e-5)
        assert float(row["gain"]) == pytest.approx(r2 - other, abs=1e-5)
        assert float(row["in_sample"]) == pytest.approx(slow.r_squared(y, fitted), abs=1e-5)
        for x, column in ((predicted, "accuracy"), (fitted, "accuracy_in_sample"), (baseline, "accuracy_question")):
            right = x.argmax(1) == y.argmax(1) if target == "last_digit" else np.round(x[:, 0]) == y[:, 0]
            assert float(row[column]) == pytest.approx(100 * right.mean())
        most = max(np.sum((y == some).all(1)) for some in y)
        assert float(row["chance"]) == pytest.approx(100 * most / N)
        assert (int(row["problems"]), int(row["groups"])) == (N, len(set(numbers)))
        assert float(row["r2_low"]) < float(row["r2_high"])
        assert 20 * float(row["p"]) == pytest.approx(round(20 * float(row["p"]))) and 0.05 <= float(row["p"]) <= 1
        assert float(row["p_best"]) >= float(row["p"]) or float(row["r2"]) < max(
            float(other["r2"]) for (name, _), other in rows.items() if name == target
        )
    # The mark has read the answer, which no layer of the question gives away.
    if position == "mark":
        assert float(rows["answer", 1]["r2"]) > 0.3 > float(rows["answer", 0]["r2"])
    by_place = by_hand.table(folder / f"x/probe_{position}_answer.csv")
    assert list(by_place[0]) == ["place", f"{MODEL}_r2"] and by_place[-1]["place"] == "resid_post.5"
    assert [row[f"{MODEL}_r2"] for row in by_place] == [rows["answer", depth]["r2"] for depth in range(7)]
    assert (folder / f"x/figures/{MODEL}.png").stat().st_size > 5000


def test_shuffled_labels_tell_nothing_and_fit_in_sample_all_the_same(folder: Path) -> None:
    flags = ("--positions", "mark", "--targets", "answer", "--shuffles", 19, "--mid", "--group", "question")
    assert command(*FEW, *flags) == 0
    rows = by_hand.table(folder / "x/probes.csv")
    assert [row["place"] for row in rows[:3]] == ["resid_pre.0", "resid_mid.0", "resid_pre.1"] and len(rows) == 13
    assert {row["groups"] for row in rows} == {str(N)}
    for row in rows[1:]:
        low, mean, high = (float(row[name]) for name in ("shuffled_lowest", "shuffled", "shuffled_highest"))
        assert low < mean < high and mean < 0.05 < float(row["r2"])
        assert float(row["p"]) == pytest.approx(0.05) and float(row["q"]) < 0.06
        assert float(row["in_sample_shuffled"]) > 0.3, "30 problems in 128 dimensions"
    assert float(rows[0]["p"]) > 0.2, "the mark's embedding is one and the same"
    (said,) = json.loads((folder / "x/summary.json").read_text())["verdicts"]
    best = max(rows, key=lambda row: float(row["r2"]))
    assert f"{MODEL}, mark, answer: found, and more than in the question's mean: R^2 {float(best['r2']):.2f} [" in said
    assert f"at {best['place']}, the best of 13 (p = 0.05); in-sample {float(best['in_sample']):.2f}, " in said


def test_the_terminal_shows_the_best_place_of_each_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--positions", "mark", "block_first", "--targets", "answer", "first_operand")
    assert command(*FEW, *flags) == 0
    rows, shown = by_hand.table(folder / "x/probes.csv"), capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * 2 * 7
    for position in ("mark", "block_first"):
        for target in ("answer", "first_operand"):
            mine = [row for row in rows if (row["position"], row["target"]) == (position, target)]
            best = max(mine, key=lambda row: float(row["r2"]))
            (line,) = [line for line in shown if line.split()[:2] == [position, target]]
            assert line.split()[2:5] == [best["place"], best["problems"], f"{float(best['r2']):.2f}"]
    assert all(float(row["r2_low"]) <= float(row["r2"]) <= float(row["r2_high"]) for row in rows)
    assert len(shown) < 24 and max(len(line) for line in shown if not line.startswith("evidence")) < 170
    (said,) = [line for line in shown if line.startswith("evidence: ")]
    best = {(row["position"], row["target"]): row for row in sorted(rows, key=lambda row: float(row["r2"]))}
    top = max(best.values(), key=lambda row: float(row["gain"]))
    assert f"R^2 of {top['target']} at {top['position']}, {top['place']}, beyond the question's mean" in said
    assert f"the largest of 4 gains, {float(top['gain']):.3g} [" in said
    (kept,) = json.loads((folder / "x/summary.json").read_text())["evidence"]
    assert kept["interval"] == pytest.approx([float(top[name]) for name in ("gain", "gain_low", "gain_high")])


@pytest.mark.slow
def test_problems_with_the_same_numbers_are_not_told_from_one_another(folder: Path) -> None:
    """Each problem twice, with other names: a probe that has seen the twin knows the answer, unless both are in one fold."""
    lines = []
    for number, example in enumerate(examples()[:20]):
        question = example.prompt.removeprefix("Question: ").removesuffix(" Answer:")
        names = [name for name in NAMES_EN if name in question]
        for text in (
            question,
            question.replace(names[0], next(name for name in NAMES_EN[number:] if name not in names)),
        ):
            lines.append(json.dumps({"question": text, "answer": example.answer}))
    (folder / "twins.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = ("--problems", "twins.jsonl", "--positions", "question_last", "--targets", "answer")
    found = {}
    for group in ("numbers", "question"):
        assert command(*FEW, *flags, "--limit", 40, "--group", group) == 0
        rows = by_hand.table(folder / "x/probes.csv")
        found[group] = int(rows[0]["groups"]), max(float(row["r2"]) for row in rows)
    assert found["numbers"][0] == 20 and found["question"][0] == 40
    assert found["numbers"][1] < 0.3 < found["question"][1]


def test_the_p_of_the_best_place_counts_shuffles_whose_best_place_is_as_good(folder: Path) -> None:
    """Noise in every place: among 40 the best one is good by chance, and so is that of each shuffle."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((40, 60, 3)).astype(np.float32)
    y = generator.standard_normal((60, 1))
    target = ProbeTarget("answer", np.arange(60), y[:, 0], y)

    def rows_of() -> list[Any]:
        residuals = Residuals(tuple(map(str, range(40))), {"mark": noise}, noise.copy())
        return probe_rows(residuals, {"mark": [target]}, np.arange(60), folds=3, shuffles=30, seed=0)

    rows = rows_of()
    assert min(row["p"] for row in rows) < 0.1 < rows[0]["p_best"] and len({row["p_best"] for row in rows}) == 1
    assert all(row["gain"] == pytest.approx(0, abs=1e-12) for row in rows)
    noise[7, :, 0] = 5 * y[:, 0]
    (row, *_) = rows_of()
    assert row["p_best"] == pytest.approx(1 / 31)


def test_what_a_verdict_says() -> None:
    row = {"p_best": 0.02, "r2_low": 0.3, "gain_low": 0.1}
    said = [study.verdict_of({**row, **more}) for more in ({}, {"gain_low": -0.1}, {"r2_low": -0.1}, {"p_best": 0.06})]
    assert said == [
        "found, and more than in the question's mean",
        "found, but no more than in the question's mean",
        "not found",
        "not found",
    ]


SOLUTION = "He has 1,000/4 = <<1,000/4=250>>250. Then <<250-.5=249.50>> and <<about two>>. #### 249.5"


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("answer", 249.5),
        ("last_digit", None),
        ("first_operand", 1000),
        ("result_1", 250),
        ("result_2", 249.5),
        ("result_3", None),
        ("result_4", None),
    ],
)
def test_targets_are_read_from_the_solution(target: str, value: float | None) -> None:
    problem = Problem(question="?", solution=SOLUTION, answer=249.5, steps=3)
    found = solution_number(problem, target)
    assert np.isnan(found) if value is None else found == value
    halves = Problem(question="?", solution="<<.5*-.25=-.125>> #### -0.125", answer=-0.125, steps=1)
    assert [solution_number(halves, name) for name in ("first_operand", "result_1")] == [0.5, -0.125]
    assert solution_number(Problem(question="?", solution="#### -17", answer=-17, steps=0), "last_digit") == 7


def test_problems_with_the_same_numbers_are_of_one_group_and_without_numbers_those_with_the_same_text() -> None:
    def group(question: str, by: str) -> str:
        return problem_group(Problem(question=question, solution="", answer=1, steps=0), by)

    assert group("Lisa has 1,200 cats and 3 dogs.", "numbers") == group("Paul sells 1200 eggs, then 3.", "numbers")
    assert group("Lisa has 3 cats and 12 dogs.", "numbers") != group("Lisa has 31 cats and 2 dogs.", "numbers")
    assert group("Half a dozen?", "numbers") != group("Three?", "numbers")
    assert group("Lisa has 3 cats.", "question") != group("Paul has 3 cats.", "question")


def test_what_cannot_be_probed_is_left_out_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are solved; only those with two steps have a second result and a token 12 of the block."""
    flags = ("--positions", "mark", "12", "--targets", "correct", "result_2", "--log")
    assert command(*FEW, *flags) == 0
    two = sum(example.answer.count("<<") == 2 for example in examples())
    rows = by_hand.table(folder / "x/probes.csv")
    assert {(row["position"], row["target"], row["problems"]) for row in rows} == {
        ("mark", "result_2", str(two)),
        ("12", "result_2", str(two)),
    }
    assert 10 <= two < N
    facts = json.loads((folder / "x/summary.json").read_text())["models"][MODEL]
    assert facts["left_out"]["mark, correct"] == f"it is 1 in all {N} problems"
    assert f"left out: 12, correct: it is 1 in all {two} problems" in capsys.readouterr().out


@pytest.mark.slow
def test_numbers_by_their_logarithm(folder: Path) -> None:
    assert command(*FEW, "--positions", "mark", "--targets", "answer", "--log") == 0
    row = by_hand.table(folder / "x/probes.csv")[1]
    own, y = states("mark")[0][1], np.log(1 + target_by_hand("answer"))
    numbers = [" ".join(re.findall(r"\d+", example.prompt)) for example in examples()]
    predicted, _ = slow.nested(own, y, deal_folds(numbers, 3, rng(0, "folds")), ALPHAS)
    assert float(row["r2"]) == pytest.approx(slow.r_squared(y, predicted), abs=1e-5)
    right = np.round(np.exp(predicted) - 1) == target_by_hand("answer")
    assert float(row["accuracy"]) == pytest.approx(100 * right.mean()) and right.any()


def test_problems_that_are_wrong_are_a_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reasoning.Asked.reason

    def some_wrong(asked: reasoning.Asked) -> Any:
        setting = made(asked)
        gold = tuple(value + (i % 3 == 0) for i, value in enumerate(setting.clean.gold))
        return replace(setting, clean=replace(setting.clean, gold=gold))

    monkeypatch.setattr(reasoning.Asked, "reason", some_wrong)
    assert command(*FEW, "--positions", "mark", "--targets", "correct") == 0
    rows = by_hand.table(folder / "x/probes.csv")
    assert {row["chance"] for row in rows} == {str(100 * 20 / 30)} and float(rows[0]["accuracy"]) == pytest.approx(
        200 / 3
    )


def test_more_tiny_problems_than_other_studies_have_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    def problems(flags: Problems) -> list[Problem]:
        seen.append(flags.limit)
        return []

    monkeypatch.setattr(reasoning, "find_problems", problems)

    def stop(*_: Any, **__: Any) -> None:
        raise ValueError("enough")

    monkeypatch.setattr(reasoning, "load", stop)
    for flags in ((), ("--limit", 7), ("--problems", "gsm8k"), ("--problems", "plain")):
        assert command("--out", "x", *flags) == 2
    assert seen == [1200, 7, None, 100]


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--positions", "mark", "--targets", "answer")
    made, own = [], reasoning.evaluate

    def counted(*given: Any, **more: Any) -> Any:
        made.append(1)
        return own(*given, **more)

    monkeypatch.setattr(reasoning, "evaluate", counted)
    read = px.methods.read_residuals

    def stops(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(px.methods, "read_residuals", stops)
    assert command(*FEW, *flags) == 130 and len(made) == 2
    assert all("unfinished" in path.parts for path in (folder / "x").rglob("*") if path.is_file())
    monkeypatch.setattr(px.methods, "read_residuals", read)
    assert command(*FEW, *flags) == 0 and len(made) == 2
    assert not (folder / "x/unfinished").exists()
    assert command("--config", "x/config.yaml", "--out", "y") == 0 and len(made) == 4
    assert (folder / "y/probes.csv").read_bytes() == (folder / "x/probes.csv").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--folds", "2"), "--folds must be 3 or more, not 2."),
        (("--shuffles", "18"), "--shuffles must be 19 or more"),
        (("--min_problems", "9"), "--min_problems must be 10 or more"),
        (("--positions", "mark", "mark"), "--positions names one or more, each once, not mark mark."),
        (
            ("--positions", "middle"),
            "--positions names question_last, block_first, block_last, mark, or the number of a token of the block, such as "
            "3 or -2, not 'middle'.",
        ),
        (
            ("--targets", "answers"),
            "--targets names answer, first_operand, last_digit, correct, or result_1, result_2 ..., not 'answers'.",
        ),
        (
            ("--targets", "result_0"),
            "--targets names answer, first_operand, last_digit, correct, or result_1, result_2 ..., not 'result_0'.",
        ),
        (("--targets", "answer", "answer"), "--targets names one or more, each once, not answer answer."),
        (("--batch_size", "0"), "--batch_size must be 1 or more"),
    ],
)
def test_bad_flags_are_one_sentence_before_the_model_is_loaded(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(px.flags.Loading, "load", None)
    assert command("--out", "x", *flags) == 2
    assert message in capsys.readouterr().err and not list(folder.rglob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--min_problems", "31"), "--min_problems 31: there are only 30 problems; give a larger --limit"),
        (("--positions", "40"), "nothing to probe for (0 problems have it, and --min_problems asks for 10)"),
        (("--targets", "correct"), "nothing to probe for (it is 1 in all 30 problems)"),
        (("--folds", "31", "--targets", "answer"), "cannot be divided into 31 folds; give more problems."),
    ],
)
def test_problems_that_do_not_suffice_are_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert command(*FEW, *flags) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (folder / "x").rglob("*") if path.is_file() and "unfinished" not in path.parts]


@pytest.mark.slow
def test_a_figure_of_one_panel_holds_its_title_and_its_legend(folder: Path) -> None:
    assert command(*FEW, "--positions", "mark", "--targets", "answer") == 0
    rows = [
        {
            name: value if name in ("model", "position", "target", "place") else float(value)
            for name, value in row.items()
        }
        for row in by_hand.table(folder / "x/probes.csv")
    ]
    drawing = probe_curves(MODEL, rows)
    drawing.draw_without_rendering()
    for words in (drawing.legends[0], *drawing.texts):
        box = words.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawing.bbox.width
