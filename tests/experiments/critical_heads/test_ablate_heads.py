"""Ablating ranked heads against one problem at a time without cache; heads that matter and others; interrupted; misused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from critical_heads import ablate_heads as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.solving.results import Texts
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.tiny_tasks import draw
from pyvene_ext.runs import ablated, figures
from pyvene_ext.runs.figures.accuracy import ablation_curves
from pyvene_ext.runs.flags import Loading
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.controls import mcnemar_p
from pyvene_ext.stats.stopping import Stopping
from tests.experiments.critical_heads import by_hand
from tests.ground_truth import ablations as slow
from tests.interrupted import stop_at

N = 6
MODEL = "tiny-qwen2.5"
HEADS = ((0, 7), (1, 7), (0, 0))  # by their scores in scores.csv


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a ranking of a few heads; figures take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 200)
    monkeypatch.setattr(figures, "save", lambda _, path: path.parent.mkdir(exist_ok=True) or path.touch())
    write_ranking(tmp_path / "scores.csv", HEADS)
    return tmp_path


def write_ranking(path: Path, heads: Any) -> None:
    rows = [f"{0.9 - 0.1 * i},{layer},{head}" for i, (layer, head) in enumerate(heads)]
    path.write_text("\n".join(["scores,layer,head", *rows]) + "\n", encoding="utf-8")


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


FEW = ["--limit", N, "--models", MODEL, "--out", "out", "--max_new_tokens", 20]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- by hand -----------------------------------------------------------------------------------------------------------


def correct_by_hand(heads: list[tuple[int, int]], scope: str, kind: str = "zero") -> list[bool]:
    """Which problems are right, one at a time, each step from the whole text, with plain hooks."""
    model, tokenizer = load_model(MODEL)
    generator, right = rng(0, "word problems"), []
    mark = tokenizer.convert_tokens_to_ids("####")
    means: dict[int, Any] = {}
    if kind == "mean":
        texts = []
        for _ in range(N):
            ids = tokenizer(draw("arithmetic", generator, held_out=True).prompt)["input_ids"]
            texts.append([*ids, *by_hand.written(model, tokenizer, ids, lambda x: slow.logits(model, x)[-1], 20)])
        for layer in {layer for layer, _ in heads}:
            means[layer] = slow.statistics([slow.activation(model, text, "z", layer) for text in texts])[0]
        generator = rng(0, "word problems")
    for _ in range(N):
        example = draw("arithmetic", generator, held_out=True)
        ids = tokenizer(example.prompt)["input_ids"]

        def logits(text: Any, start: int = len(ids)) -> Any:
            until = text.index(mark) if mark in text else len(text)
            where = {"reasoning": range(start, until), "new": range(start, len(text)), "both": range(len(text))}[scope]
            changes: Any = [
                (
                    "z",
                    at,
                    slow.replaced(
                        where,
                        [h for layer, h in heads if layer == at],
                        lambda z, at=at: means[at].expand_as(z) if kind == "mean" else 0 * z,
                    ),
                )
                for at in {layer for layer, _ in heads}
            ]
            return slow.logits(model, text, changes)[-1]

        text = tokenizer.decode(by_hand.written(model, tokenizer, ids, logits, 20))
        numbers = re.findall(r"-?\d+", text.partition("####")[2] if "####" in text else text)
        right.append(bool(numbers) and float(numbers[-1]) == float(example.answer.split()[-1]))
    return right


@pytest.mark.slow
def test_accuracies_are_those_of_each_problem_by_itself(folder: Path) -> None:
    flags = ["--rankings", "scores.csv", "--n_heads", 1, 3, "--random_sets", 2, "--scope", "reasoning", "both"]
    assert command(*FEW, *flags) == 0
    rows = by_hand.table(folder / "out/ablations.csv")
    assert [(row["scope"], row["n_heads"]) for row in rows] == [
        (scope, n) for scope in ("reasoning", "both") for n in "013"
    ]
    kept = np.load(folder / f"out/correct/{MODEL}.npy")
    clean = np.array(correct_by_hand([], "new"))
    seen = set()
    for row, right in zip(rows, kept, strict=True):
        expected = np.array(correct_by_hand(list(HEADS[: int(row["n_heads"])]), row["scope"]))
        assert right.tolist() == expected.tolist()
        assert float(row["accuracy"]) == pytest.approx(100 * expected.mean())
        assert float(row["drop"]) == pytest.approx(100 * (clean.mean() - expected.mean()))
        assert float(row["relative_drop"]) == pytest.approx(100 * (1 - expected.mean() / clean.mean()))
        assert float(row["mcnemar_p"]) == pytest.approx(mcnemar_p(clean, expected))
        assert (int(row["lost"]), int(row["won"])) == ((clean & ~expected).sum(), (~clean & expected).sum())
        assert float(row["drop_low"]) <= float(row["drop"]) <= float(row["drop_high"])
        seen.add(row["accuracy"])
    assert len(seen) >= 3, "something is compared"

    randoms = by_hand.table(folder / "out/random_sets.csv")
    for row in rows:
        some = [r for r in randoms if (r["scope"], r["n_heads"]) == (row["scope"], row["n_heads"])]
        assert len(some) == int(row["random_sets"])
        if not some:
            continue
        drops = [float(r["drop"]) for r in some]
        assert float(row["random_drop"]) == pytest.approx(np.mean(drops))
        assert (float(row["random_lowest"]), float(row["random_highest"])) == (min(drops), max(drops))
        assert float(row["excess"]) == pytest.approx(float(row["drop"]) - np.mean(drops))
        at_least = sum(drop >= float(row["drop"]) - 1e-9 for drop in drops)
        assert float(row["share_as_large"]) == pytest.approx((1 + at_least) / (1 + len(drops)))
        for r in some:
            heads = [tuple(map(int, name.split("."))) for name in r["heads"].split()]
            assert sorted(layer for layer, _ in heads) == sorted(layer for layer, _ in HEADS[: len(heads)])
            assert not set(heads) & set(HEADS)
    last = randoms[-1]
    heads = [tuple(map(int, name.split("."))) for name in last["heads"].split()]
    assert float(last["drop"]) == pytest.approx(100 * (clean.mean() - np.mean(correct_by_hand(heads, "both"))))  # type: ignore[arg-type]
    by_model = by_hand.table(folder / "out/accuracy_zero_both.csv")
    assert list(by_model[0]) == ["n_heads", f"{MODEL}_acc"]
    assert [row[f"{MODEL}_acc"] for row in by_model] == [row["accuracy"] for row in rows if row["scope"] == "both"]


def test_means_are_of_the_untouched_models_own_texts(folder: Path) -> None:
    flags = ["--rankings", "scores.csv", "--n_heads", 2, "--random_sets", 0, "--scope", "new", "--kind", "mean"]
    assert command(*FEW, *flags) == 0
    kept = np.load(folder / f"out/correct/{MODEL}.npy")
    assert kept[1].tolist() == correct_by_hand(list(HEADS[:2]), "new", "mean")
    assert not (folder / "out/random_sets.csv").exists()


@pytest.mark.slow
def test_the_first_problems_and_what_was_written_for_each_are_the_donors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, given = ablated.Transcripts.compute, []

    def seen(model: Any, questions: Any, clean: Any, *more: Any, **options: Any) -> Any:
        given.append([[*ids, *new] for ids, new in zip(questions.prompts.input_ids, clean.ids, strict=True)])
        return compute(model, questions, clean, *more, **options)

    monkeypatch.setattr(ablated.Transcripts, "compute", seen)
    flags = ["--rankings", "scores.csv", "--n_heads", 1, "--random_sets", 0, "--scope", "new", "--kind", "resample"]
    assert command(*FEW, *flags, "--donors", 4) == 0
    for text, (ids, _, gold) in zip(given[0], by_hand.blocks(MODEL, N)[2][:4], strict=True):
        assert text[: len(ids)] == ids and load_model(MODEL)[1].decode(text[len(ids) :]) == f"{gold:.0f}"


# -- sets that stop ----------------------------------------------------------------------------------------------------

STOP = ["--limit", 24, "--models", MODEL, "--max_new_tokens", 20, "--rankings", "scores.csv", "--n_heads", 1, 3]
STOP += ["--random_sets", 2, "--scope", "reasoning", "--seed", 5]


def test_sets_that_stop_take_the_first_problems_that_decide_them(folder: Path) -> None:
    assert command(*STOP, "--out", "whole") == 0 and command(*STOP, "--out", "out", "--decide", 30, 2) == 0
    whole, kept = (np.load(folder / f"{out}/correct/{MODEL}.npy") for out in ("whole", "out"))
    rule, order = Stopping(decide=(30, 2), seed=5), rng(5, "order of problems").permutation(24)
    clean = whole[0][order]
    rows = by_hand.table(folder / "out/ablations.csv")
    assert kept[0].tolist() == whole[0].tolist() and rows[0]["stopped"] == "" and rows[0]["problems"] == "24"
    for row, right, of_all in zip(rows[1:], kept[1:], whole[1:], strict=True):
        wanted = rule.judge(clean, of_all[order])
        assert wanted is not None
        taken = order[: wanted.problems]
        assert (row["stopped"], int(row["problems"]), row["of"]) == (wanted.verdict, wanted.problems, "24")
        assert sorted(np.flatnonzero(~np.isnan(right))) == sorted(taken)
        assert (right[taken] == of_all[taken]).all()
        assert float(row["accuracy"]) == pytest.approx(100 * of_all[taken].mean())
        assert float(row["drop"]) == pytest.approx(100 * (whole[0][taken].mean() - of_all[taken].mean()))
        assert [float(row[name]) for name in ("drop", "drop_low", "drop_high")] == pytest.approx([*wanted.drop])
        assert float(row["low"]) < float(row["accuracy"]) < float(row["high"]) or float(row["accuracy"]) in (0, 100)
        assert row["mcnemar_p"] == row["excess"] == row["random_drop"] == "", "of sets with different problems"
        mine = [r for r in by_hand.table(folder / "out/random_sets.csv") if r["n_heads"] == row["n_heads"]]
        above = sum(r["stopped"] == "above" for r in mine)
        assert (int(row["random_above"]), int(row["random_problems"])) == (above, sum(int(r["problems"]) for r in mine))
        as_one = rule.judge(clean, of_all[order]).verdict == "above"  # type: ignore[union-attr]
        assert float(row["share_as_large"]) == pytest.approx((1 + above) / 3 if as_one else 1)
    assert "above" in {row["stopped"] for row in rows} and np.isnan(kept).any()


def test_runs_that_stop_sets_are_the_same_after_a_kill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*STOP, "--out", "out", "--width", 100]
    assert command(*flags) == 0
    whole = files(folder / "out")
    (folder / "out").rename(folder / "before")
    stop_at(monkeypatch, 60, Texts, "add")
    assert command(*flags) == 130 and command(*flags) == 0
    again = files(folder / "out")
    assert set(again) == set(whole)
    assert all(again[name] == whole[name] for name in whole if name != "summary.json")
    assert json.loads(again["summary.json"])["verdicts"] == json.loads(whole["summary.json"])["verdicts"]
    assert any(row["stopped"] == "narrow" for row in by_hand.table(folder / "out/ablations.csv"))


def test_what_sets_that_stopped_say(capsys: pytest.CaptureFixture[str]) -> None:
    config = study.Config(decide=(20, 4))
    row = {"model": "m", "kind": "zero", "scope": "new", "n_heads": 4, "problems": 12, "of": 50, "unparsed": 0}
    row |= {"drop": 50.0, "drop_low": 21.0, "drop_high": 80.0, "random_sets": 19, "random_above": 0, "stopped": "above"}
    row |= {"share_as_large": 0.05, "control": "19 random sets of the same layers; least p 0.05"}
    (said,) = study.verdicts_of([row], config)
    assert (
        "cost 50.0 points [21.0, 80.0] after 12 of 50 problems: causal, specific to these heads: 0 of 19 random" in said
    )
    assert said.endswith("sets of the same layers cost more than 20 points, p = 0.05")
    (other,) = study.verdicts_of([row | {"random_above": 3, "share_as_large": 0.2}], config)
    assert ": causal, not told apart from random heads: 3 of 19" in other
    (few,) = study.verdicts_of([row | {"share_as_large": 0.1}], config)
    assert "unlike all random sets, too few" in few
    (broken,) = study.verdicts_of([row | {"unparsed": 11}], config)
    assert ": text broken, no verdict (92% of answers unparsed): 0 of 19 random" in broken and "specific" not in broken


# -- a model that is known ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flow_finds_heads_that_arithmetic_needs_and_late_heads_are_redundant(folder: Path) -> None:
    flags = ["--n_heads", 1, 2, "--scope", "reasoning", "--max_new_tokens", 20, "--limit", 40]
    assert command(*flags, "--out", "flow", "--random_sets", 3) == 0
    one, two = by_hand.table(folder / "flow/ablations.csv")[1:]
    assert float(one["drop"]) > 10 and float(two["drop"]) > 60 and float(two["drop_low"]) > 10
    assert float(two["excess_low"]) > 0 and float(two["mcnemar_p"]) < 1e-6
    assert int(two["unparsed"]) <= int(two["cut"]), "a number is unparsed only where its text was cut"
    (said,) = json.loads((folder / "flow/summary.json").read_text())["verdicts"]
    assert (
        ": causal, more than all random sets, too few to call it specific: 3 random" in said
        and ", 0 of them as much; excess " in said
    )
    ranking = by_hand.table(folder / f"flow/heads/{MODEL}.csv")
    assert len(ranking) == 48 and {row["layer"] for row in ranking[:3]} == {"0"}

    write_ranking(folder / "late.csv", [(5, 1), (4, 2), (3, 0), (2, 5)])
    assert command(*flags, "--n_heads", 4, "--rankings", "late.csv", "--out", "late", "--random_sets", 0) == 0
    (said,) = json.loads((folder / "late/summary.json").read_text())["verdicts"]
    assert "(given) cost 0.0 points" in said and ": redundant by its size" in said
    kept = np.load(folder / f"late/correct/{MODEL}.npy")
    assert kept.all()


# -- running it ----------------------------------------------------------------------------------------------------------


def test_what_random_heads_do_as_well_is_not_specific() -> None:
    row = {"model": "m", "kind": "zero", "scope": "new", "n_heads": 4, "problems": 50, "unparsed": 3}
    row |= {"drop": 30.0, "drop_low": 20.0, "drop_high": 40.0, "mcnemar_p": 0.001, "random_sets": 19}
    row |= {"random_drop": 5.0, "random_lowest": 1.0, "random_highest": 31.0, "excess": 25.0}
    row |= {"excess_low": 15.0, "excess_high": 35.0, "share_as_large": 0.05}
    said = {
        name: study.verdicts_of(
            [{"control": f"{(row | changes)['random_sets']} random sets", **row, **changes}], study.Config()
        )[0]
        for name, changes in {
            "specific": {},
            "one as much": {"share_as_large": 0.1},
            "excess": {"excess_low": -1.0},
            "few": {"random_sets": 18, "share_as_large": 1 / 19},
            "broken": {"unparsed": 26},
        }.items()
    }
    assert (
        "m, zero, new (reasoning and answer): the first 4 heads (flow) cost 30.0 points [20.0, 40.0]"
        in said["specific"]
    )
    assert ": causal, specific to these heads: 19 random sets" in said["specific"]
    assert "0 of them as much" in said["specific"] and said["specific"].endswith("3 of 50 answers unparsed")
    assert ": causal, not specific" in said["one as much"] and "1 of them as much" in said["one as much"]
    assert ": causal, not specific" in said["excess"]
    assert ": causal, more than all random sets, too few to call it specific: 18 random sets" in said["few"]
    assert ": text broken, no verdict (52% of answers unparsed): 19 random sets cost 5.0" in said["broken"]
    assert "specific" not in said["broken"]
    assert not study.verdicts_of([{**row, "n_heads": 3}], study.Config()), "of the largest set"


def test_what_was_interrupted_goes_on_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*FEW, "--n_heads", 1, 2, "--random_sets", 1, "--scope", "new", "--kind", "zero", "resample"]
    assert command(*flags) == 0
    whole = files(folder / "out")
    assert not any("unfinished" in name for name in whole)
    (folder / "out").rename(folder / "before")
    kept = stop_at(monkeypatch, 3 * N, Texts, "add")
    assert command(*flags) == 130
    assert set(files(folder / "out")) == {name for name in files(folder / "out") if name.startswith("unfinished/")}
    assert len(files(folder / "out")) == 3  # the clean run, the scores that rank the heads, and the texts of the sets
    assert command(*flags) == 0
    assert len(kept) == 1 + N * (1 + 2 * 2 * 2), "only the text that was interrupted was written twice"
    again = files(folder / "out")
    assert set(again) == set(whole)
    same = [name for name in whole if not name.endswith(".json")]
    assert all(again[name] == whole[name] for name in same) and len(same) >= 7
    # And from its own config.
    config = yaml.safe_load(whole["config.yaml"])
    assert config["n_heads"] == [1, 2] and config["kind"] == ["zero", "resample"]
    assert command("--config", "before/config.yaml", "--out", "third") == 0
    third = files(folder / "third")
    assert all(third[name] == whole[name] for name in same if name != "config.yaml")


@pytest.mark.slow
def test_two_models_side_by_side_and_what_the_terminal_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--limit", 4, "--max_new_tokens", 20, "--n_heads", 1, "--random_sets", 1, "--scope", "new", "--out", "out"]
    assert command("--models", MODEL, "tiny-llama3.1", "--by", "composite", *flags) == 0
    none, _ = by_hand.table(folder / "out/accuracy_zero_new.csv")
    assert list(none) == ["n_heads", f"{MODEL}_acc", "tiny-llama3.1_acc"] and none["n_heads"] == "0"
    shown = capsys.readouterr().out
    assert "(4 correct, 0 wrong, 0 unparsed; 0 cut), answers by last-of-line; heads " in shown
    assert shown.count("the first 1 heads (composite) cost") == 2
    facts = json.loads((folder / "out/summary.json").read_text())["models"]
    assert set(facts) == {MODEL, "tiny-llama3.1"} and facts[MODEL]["clean"]["correct"] == 4
    assert facts[MODEL]["command"].startswith("python ") and len(facts[MODEL]["heads"]) == 1


def test_a_figure_has_a_line_a_model_with_the_range_of_its_random_sets(folder: Path) -> None:
    row = {"model": "m", "n_heads": 0, "accuracy": 90.0, "low": 85.0, "high": 95.0, "random_sets": 0}
    more = {"random_drop": 5.0, "random_lowest": 1.0, "random_highest": 9.0, "random_sets": 3}
    rows = [row, {**row, **more, "n_heads": 1, "accuracy": 40.0, "low": 30.0, "high": 50.0}]
    (axes,) = ablation_curves([*rows, *({**r, "model": "other", "random_sets": 0} for r in rows)], "title").axes
    labels = axes.get_legend_handles_labels()[1]
    assert sorted(labels) == ["m", "m: random sets, mean and range", "other"]
    (mean,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(mean.get_xdata()) == [0, 1] and list(mean.get_ydata()) == [90, 85]
    corners = [{tuple(v) for path in c.get_paths() for v in path.vertices.tolist()} for c in axes.collections]
    assert any({(0.0, 90.0), (1.0, 81.0), (1.0, 89.0)} <= some for some in corners), "the band"
    assert any({(1.0, 30.0), (1.0, 50.0)} <= some for some in corners), "the interval"


# -- bad input -------------------------------------------------------------------------------------------------------------

BEFORE_LOADING: list[tuple[list[Any], str]] = [
    (["--n_heads", 0], "--n_heads must be 1 or more, not 0."),
    (["--n_heads", 2, 1], "--n_heads takes ascending numbers, not 2 1."),
    (["--n_heads", 2, 2], "--n_heads takes ascending numbers, not 2 2."),
    (["--random_sets", -1], "--random_sets must be 0 or more, not -1."),
    (["--donors", 1], "--donors must be 2 or more"),
    (["--seed", -1], "--seed must be 0 or more"),
    (["--kind", "zero", "zero"], "--kind names one or more, each once, not zero zero."),
    (["--scope", "new", "new"], "--scope names each once, not new new."),
    (["--rankings", "scores.csv", "scores.csv"], "--rankings names 2 files for 1 models"),
    (["--max_new_tokens", 1], "--max_new_tokens must be 2 or more"),
    (["--limit", "-1"], "--limit must be 0 or more"),
    (["--decide", 2, 10], "--decide takes an upper and a lower threshold in points, of at least 0"),
    (["--decide", 10, 10], "--decide takes two different thresholds, the upper one first, not 10 twice."),
    (["--decide", 10, "-1"], "less than 100, such as 10 2, not 10 -1."),
    (["--decide", 101, 2], "less than 100, such as 10 2, not 101 2."),
    (
        ["--decide", 10],
        "--decide takes an upper and a lower threshold in points, of at least 0 and less than 100, such",
    ),
    (["--width", 0], "--width must be above 0 and below 200, in points, not 0"),
    (
        ["--decide", 10, 2, "--limit", 6],
        "a drop above 10 points takes 8 problems at least, all of them lost, and one below 2",
    ),
    (["--limit", 1], "there is one problem, and an interval needs two"),
    (["--problems", "nomark.jsonl"], "nomark.jsonl, line 2: the answer has no ####"),
    (["--problems", "empty.jsonl"], "empty.jsonl holds no problems"),
    (["--problems", "none.jsonl"], "there is no file of problems none.jsonl"),
    (["--out", "scores.csv/x"], "scores.csv is not a folder one may write in"),
]
BEFORE_RUNNING: list[tuple[list[Any], str]] = [
    (["--n_heads", 49], "--n_heads asks for 49 heads and tiny-qwen2.5 has 48; ask for fewer."),
    (["--n_heads", 4, "--rankings", "scores.csv"], "4 heads are asked for but there are scores for 3"),
    (["--rankings", "outside.csv"], "head 6.0 is outside"),
    (["--rankings", "none.csv"], "none.csv"),
    (["--max_new_tokens", 256], "max_new_tokens is 256 and the model takes 256 in all"),
    (["--max_new_tokens", 240], "there is room for 16 before what is generated"),
    (["--problems", "unknown.jsonl"], "the tokenizer does not know 'Janet'"),
    (["--models", "tiny-qwen3"], "tiny-qwen3"),
]


@pytest.mark.parametrize(("flags", "told"), BEFORE_LOADING + BEFORE_RUNNING)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = json.dumps({"question": "Lisa has 7 apples.", "answer": "#### 7"}) + "\n"
    (folder / "nomark.jsonl").write_text(good + json.dumps({"question": "How?", "answer": "7"}), encoding="utf-8")
    (folder / "unknown.jsonl").write_text(good + good.replace("Lisa", "Janet"), encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    (folder / "outside.csv").write_text("scores,layer,head\n0.5,6,0\n", encoding="utf-8")
    if (flags, told) in BEFORE_LOADING:
        monkeypatch.setattr(Loading, "load", None)
    monkeypatch.setattr(ablated, "evaluate", None)
    before = sorted(folder.rglob("*"))
    assert command(*flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_layer_with_too_few_other_heads_has_a_weaker_control_or_none(folder: Path) -> None:
    write_ranking(folder / "layer.csv", [(0, head) for head in range(5)])
    flags = ["--rankings", "layer.csv", "--n_heads", 5, "--limit", 2, "--scope", "new", "--out", "out"]
    assert command(*flags, "--random_sets", 3) == 0
    (row,) = by_hand.table(folder / "out/ablations.csv")[1:]
    assert row["control"] == "3 random sets 0.4 layers away on average; least p 0.25"  # two of five are of layer 1
    assert command(*flags, "--random_sets", 0) == 0
    (row,) = by_hand.table(folder / "out/ablations.csv")[1:]
    assert row["random_sets"] == "0" and row["excess"] == "" and row["control"] == ""


def test_texts_that_never_end_are_cut_and_said_to_be(folder: Path) -> None:
    """Cut before the answer: no number of the reasoning is an answer."""
    assert command(*FEW[:-1], 4, "--rankings", "scores.csv", "--n_heads", 1, "--random_sets", 0, "--scope", "new") == 0
    facts = json.loads((folder / "out/summary.json").read_text())["models"][MODEL]["clean"]
    assert facts["cut"] == N and facts["unparsed"] == N
    (none, one) = by_hand.table(folder / "out/ablations.csv")
    assert none["relative_drop"] == "" and none["cut"] == one["cut"] == str(N)
