"""The study of forced attention against rows made by hand, one problem at a time; interrupted; given bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from critical_heads import force_attention as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.solving.results import Texts
from pyvene_ext.runs import reasoning
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.accuracy import accuracy_drop
from pyvene_ext.stats.intervals import Interval
from tests.experiments.critical_heads import by_hand
from tests.ground_truth import forced_attention as slow
from tests.interrupted import stop_at
from tests.tiers import first_only

N = 6
MODEL = "tiny-llama3.1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, ["--limit", str(N), "--models", MODEL, *map(str, flags)])


def correct_by_hand(
    shape: str, hard: bool, hubs: list[int | None], heads: dict[int, list[int]], new: int = 4
) -> list[bool]:
    """With the patterns of an eager model made row by row, which problems are right; `hubs` are tokens of the blocks."""
    model, tokenizer, problems = by_hand.blocks(MODEL, N, attn_implementation="eager")
    right = []
    for (ids, block, gold), hub in zip(problems, hubs, strict=True):
        at = None if hub is None else block[hub]
        edits = [slow.Forced(layer, some, shape, block[0], block[-1], at, hard) for layer, some in heads.items()]
        out = by_hand.written(model, tokenizer, ids, lambda tokens, e=edits: slow.logits(model, tokens, e)[0][-1], new)
        right.append(by_hand.number(tokenizer.decode([*ids, *out])) == gold)
    return right


@pytest.mark.slow
def test_accuracies_are_those_of_patterns_made_by_hand(folder: Path) -> None:
    everything = {layer: list(range(8)) for layer in range(4)}
    assert command("--out", "x", "--hub", 5, "--no_sweep", "--answer_tokens", 4) == 0
    rows = {row["pattern"]: row for row in by_hand.table(folder / "x/patterns.csv")}
    by_pattern = {row["pattern"]: row for row in by_hand.table(folder / "x/accuracy_by_pattern.csv")}
    assert list(rows) == list(by_pattern) == [
        "none", *(f"{shape}{hard}" for shape in ("hub", "random_hub", "uniform", "sequential") for hard in ("", "_hard"))
    ]  # fmt: skip
    assert float(rows["none"]["accuracy"]) == 100.0 and rows["none"]["drop"] == ""

    _, _, problems = by_hand.blocks(MODEL, N)
    draw = rng(0, "hubs")
    drawn: list[int | None] = [int(draw.choice(block)) - block[0] for _, block, _ in problems]
    seen, nowhere = set(), [None] * N
    conditions: list[tuple[str, bool, list[int | None]]] = [
        ("hub", False, [5] * N),
        ("hub", True, [5] * N),
        ("random_hub", False, drawn),
        ("uniform", True, nowhere),
        ("sequential", False, nowhere),
    ]
    for shape, hard, hubs in conditions:
        right = correct_by_hand(shape.removeprefix("random_"), hard, hubs, everything)
        name = f"{shape}_hard" if hard else shape
        row = rows[name]
        assert float(row["accuracy"]) == pytest.approx(100 * np.mean(right)), name
        assert float(by_pattern[name][f"{MODEL}_acc"]) == float(row["accuracy"])
        assert float(row["drop"]) == pytest.approx(100 - 100 * np.mean(right))
        lost = N - sum(right)
        assert float(row["mcnemar_p"]) == pytest.approx(min(1.0, 2 * 0.5**lost))
        assert float(row["drop_low"]) <= float(row["drop"]) <= float(row["drop_high"])
        seen.add(sum(right))
    assert len(seen) > 2  # else little was compared


def written_anew(
    shape: str, hard: bool, hubs: list[int | None], heads: dict[int, list[int]], new: int
) -> tuple[list[str], list[float | None]]:
    """Solutions written with every token of the reasoning so far forced, all recomputed for each token.

    Also the probability of the answer, where it is the last token.
    """
    model, tokenizer, problems = by_hand.blocks(MODEL, N, attn_implementation="eager")
    mark, texts, chances = tokenizer.convert_tokens_to_ids("####"), [], []
    for (ids, block, _), hub in zip(problems, hubs, strict=True):
        start, seen = block[0], []

        def logits(tokens: Any, start: int = start, hub: int | None = hub, seen: list[float] = seen) -> Any:
            end = list(tokens).index(mark, start) if mark in tokens[start:] else len(tokens)
            at = None if hub is None or start + hub >= end else start + hub  # before the hub is written all is even
            edits = [slow.Forced(layer, some, shape, start, end - 1, at, hard) for layer, some in heads.items()]
            found = slow.logits(model, tokens, edits if end > start else [])[0][-1]
            seen.append(float(found.softmax(-1).max()))
            return found

        out = by_hand.written(model, tokenizer, ids[:start], logits, new)
        texts.append(tokenizer.decode(out))
        chances.append(seen[len(out) - 1] if len(out) < new and out[-2:-1] == [mark] else None)
    return texts, chances


@pytest.mark.parametrize(
    ("shape", "hard"), first_only([("hub", False), ("hub", True), ("uniform", True), ("sequential", False)])
)
def test_reasoning_written_anew_is_forced_token_by_token(folder: Path, shape: str, hard: bool) -> None:
    config = study.Config(models=(MODEL,), limit=N, hub=3, regenerate="reasoning", max_new_tokens=18)
    setting = reasoning.load(config, reasoning.find_problems(config), folder / "kept", None, 0).reason()
    assert setting.anew and setting.clean.ids == setting.first.ids and setting.clean.accuracy == 1
    heads = {0: [1, 6], 2: [0, 3, 7], 3: list(range(8))}
    hubs = study.hubs_of(setting, config, shape)  # type: ignore[arg-type]
    spec = study.force({layer: tuple(some) for layer, some in heads.items()}, shape, hard)  # type: ignore[arg-type]
    (found,) = study.forced(setting, [(spec, hubs)])
    texts, chances = written_anew(shape, hard, hubs, heads, 18)
    assert list(found.texts) == texts
    compared = [i for i, chance in enumerate(chances) if chance is not None]
    assert len(compared) > 1
    np.testing.assert_allclose([found.confidence[i] for i in compared], [chances[i] for i in compared], rtol=1e-4)
    changed = np.abs(found.confidence - setting.clean.confidence) > 1e-3
    assert changed.any() or any(a != b for a, b in zip(found.ids, setting.clean.ids, strict=True))


@pytest.mark.slow
def test_what_is_written_anew_is_in_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--out", "x", "--regenerate", "reasoning", "--shapes", "uniform", "hub", "--max_new_tokens", 18)
    assert command(*flags, "--min_problems", 2, "--places", 2) == 0
    rows = {row["pattern"]: row for row in by_hand.table(folder / "x/patterns.csv")}
    texts, _ = written_anew("uniform", True, [None] * N, {layer: list(range(8)) for layer in range(4)}, 18)
    gold = [answer for *_, answer in by_hand.blocks(MODEL, N)[2]]
    right = [by_hand.number(text) == answer for text, answer in zip(texts, gold, strict=True)]
    assert float(rows["uniform_hard"]["accuracy"]) == pytest.approx(100 * np.mean(right))
    assert float(rows["none"]["accuracy"]) == 100
    assert len({row["position"] for row in by_hand.table(folder / "x/hubs.csv")}) == 2
    assert json.loads((folder / "x/summary.json").read_text())["models"][MODEL]["regenerated"] == "reasoning"
    assert "evidence: " in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasoning.Asked, "reason", None)  # before anything is run
        assert command(*flags, "--min_problems", 2, "--hub", -1) == 2
    assert "of a block that is not written yet" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", "x", "--dry_run", "--min_problems", 2) == 0
    assert capsys.readouterr().out.strip().endswith("on 6 problems, and a sweep of the hub: under a minute")
    assert not (folder / "x").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_hub_is_swept_over_the_tokens_that_enough_problems_have(folder: Path) -> None:
    _, _, problems = by_hand.blocks(MODEL, N)
    lengths = sorted(len(block) for _, block, _ in problems)
    least = 1 + lengths.count(lengths[-1])
    assert lengths[-least] < lengths[-1]
    flags = ("--shapes", "uniform", "--heads", "0.3", "1.2", "1.5", "--random_sets", 0, "--min_problems", least)
    assert command("--out", "x", *flags) == 0
    rows = by_hand.table(folder / "x/hubs.csv")
    assert [(int(row["position"]), row["hard"]) for row in rows] == [
        (position, hard) for position in range(lengths[-least]) for hard in ("False", "True")
    ]
    for row in rows:
        assert int(row["problems"]) == sum(length > int(row["position"]) for length in lengths)
    swept = by_hand.table(folder / "x/hub_sweep.csv")
    assert list(swept[0]) == ["position", f"{MODEL}_soft_acc", f"{MODEL}_hard_acc"]
    assert [float(row[f"{MODEL}_hard_acc"]) for row in swept] == [float(row["accuracy"]) for row in rows[1::2]]
    assert (folder / "x/figures/hub_sweep.png").stat().st_size > 5000


@pytest.mark.slow
def test_one_place_of_the_sweep_is_made_by_hand(folder: Path) -> None:
    """Of all heads, where it matters; at a token that only the longer blocks have."""
    assert command("--out", "x", "--shapes", "uniform", "--min_problems", 2, "--answer_tokens", 4) == 0
    _, _, problems = by_hand.blocks(MODEL, N)
    longer = [i for i, (_, block, _) in enumerate(problems) if len(block) > 9]
    assert 2 <= len(longer) < N
    hubs: list[int | None] = [9 if i in longer else 0 for i in range(N)]
    right = correct_by_hand("hub", True, hubs, {layer: list(range(8)) for layer in range(4)})
    (row,) = [row for row in by_hand.table(folder / "x/hubs.csv") if row["position"] == "9" and row["hard"] == "True"]
    assert float(row["accuracy"]) == pytest.approx(100 * np.mean([right[i] for i in longer]))
    assert int(row["problems"]) == len(longer)


@pytest.mark.slow
def test_chosen_heads_have_random_heads_of_their_layers_beside_them(folder: Path) -> None:
    flags = ("--out", "x", "--shapes", "sequential", "--no_sweep", "--heads", "0.3", "1.2", "1.5", "--random_sets", 3)
    flags += ("--answer_tokens", 4)
    assert command(*flags) == 0
    rows = by_hand.table(folder / "x/patterns.csv")
    hard = next(row for row in rows if row["pattern"] == "sequential_hard")
    right = correct_by_hand("sequential", True, [None] * N, {0: [3], 1: [2, 5]})
    assert float(hard["accuracy"]) == pytest.approx(100 * np.mean(right))
    model, *_ = by_hand.blocks(MODEL, 0)
    config = study.Config(heads=("0.3", "1.2", "1.5"), random_sets=3)
    forced, controls, _ = study.forced_heads(config, MODEL, model)
    assert forced == {0: (3,), 1: (2, 5)} and len(controls) == 3
    drops = []
    for heads in controls:
        assert {layer: len(some) for layer, some in heads.items()} == {0: 1, 1: 2}
        assert 3 not in heads[0] and not {2, 5} & set(heads[1])
        right = correct_by_hand("sequential", True, [None] * N, {layer: list(some) for layer, some in heads.items()})
        drops.append(100 - 100 * np.mean(right))
    assert float(hard["random_drop"]) == pytest.approx(np.mean(drops))
    as_large = sum(drop >= float(hard["drop"]) - 1e-9 for drop in drops)
    assert float(hard["random_p"]) == pytest.approx((1 + as_large) / 4)
    assert not (folder / "x/hubs.csv").exists()


def test_a_pattern_that_breaks_the_text_is_not_called_causal_nor_is_it_the_evidence() -> None:
    row: dict[str, Any] = {"model": "m", "pattern": "hub", "hard": False, "position": 0, "problems": 16, "unparsed": 16}
    row |= {"drop": 56.2, "drop_low": 31.2, "drop_high": 81.2, "random_drop": float("nan")}
    words = "56.2 points [31.2, 81.2]: text broken, no verdict (100% of answers unparsed)"
    one, swept = study.verdicts_of([row], [row])
    assert one == f"m, hub: {words}" and f"(16 problems): {words}; the best of 1" in swept
    readable = row | {"pattern": "uniform", "unparsed": 8, "drop": 25.0, "drop_low": 6.0, "drop_high": 44.0}
    measured = study.evidence([row, readable], "m").measured
    assert measured == "m, uniform, the largest of 1 drop (1 pattern broke the text), costs (points) 25 [6, 44]"


@pytest.mark.slow
def test_the_verdicts_follow_the_table_and_the_same_command_gives_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out", "x", "--shapes", "sequential", "--no_sweep")
    assert command(*flags) == 0
    out = capsys.readouterr().out
    facts = json.loads((folder / "x/summary.json").read_text())
    row = next(row for row in by_hand.table(folder / "x/patterns.csv") if row["pattern"] == "sequential_hard")
    drop, low, high = (float(row[name]) for name in ("drop", "drop_low", "drop_high"))
    assert facts["verdicts"][1].startswith(f"{MODEL}, sequential_hard: {drop:.1f} points [{low:.1f}, {high:.1f}]: ")
    assert facts["verdicts"][1].endswith(": causal") == (low > 10 < drop)
    assert facts["verdicts"][1] in out and f"{N} problems, 100.0% correct untouched" in out
    assert facts["models"][MODEL]["with_reasoning"] == N and facts["models"][MODEL]["weight_hash"]
    before = (folder / "x/patterns.csv").read_bytes()
    assert yaml.safe_load((folder / "x/config.yaml").read_text())["shapes"] == ["sequential"]
    assert run_study(study.main, study.Config, ["--config", "x/config.yaml"]) == 0
    assert (folder / "x/patterns.csv").read_bytes() == before
    assert not (folder / "x/unfinished").exists()


@pytest.mark.slow
def test_several_models_stand_side_by_side(folder: Path) -> None:
    assert command("--models", MODEL, "tiny-gemma2", "--out", "x", "--shapes", "uniform", "--no_sweep") == 0
    rows = by_hand.table(folder / "x/accuracy_by_pattern.csv")
    assert list(rows[0]) == ["pattern", f"{MODEL}_acc", "tiny-gemma2_acc"]
    assert [row["pattern"] for row in rows] == ["none", "uniform", "uniform_hard"]


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--out", "x", "--shapes", "uniform", "sequential", "--no_sweep")
    kept = stop_at(monkeypatch, 16, Texts, "add")
    assert command(*flags) == 130
    assert sorted(path.name for path in (folder / "x").iterdir()) == ["unfinished"]
    assert command(*flags) == 0
    assert len(kept) == 4 * N + 1  # the one that was interrupted is written again
    whole = (folder / "x/patterns.csv").read_bytes()
    assert command(*flags[2:], "--out", "y") == 0
    assert (folder / "y/patterns.csv").read_bytes() == whole


def test_an_interval_of_no_change_has_a_width() -> None:
    nothing = accuracy_drop(np.ones(54), np.ones(54), 0, "x")
    reach = 100 * (1.959964**2 / 54) / (1 + 1.959964**2 / 54)  # Wilson's for 0 of 54
    assert nothing == pytest.approx(Interval(0.0, -reach, reach), rel=1e-4)
    assert accuracy_drop(np.ones(400), np.ones(400), 0, "x").high < 2
    all_lost = accuracy_drop(np.ones(54), np.zeros(54), 0, "x")
    assert all_lost == pytest.approx(Interval(100.0, 100 - reach, 100.0), rel=1e-4)
    one = np.ones(54)
    one[3] = 0.2  # a fifth of the seeds
    wider = accuracy_drop(np.ones(54), one, 0, "x")
    assert wider == pytest.approx(Interval(80 / 54, 80 / 54 - reach, 80 / 54 + reach), rel=1e-4)
    four, five = (np.arange(400) >= lost for lost in (4, 5))
    assert accuracy_drop(np.ones(400), four, 0, "x").low < 0.2 < accuracy_drop(np.ones(400), five, 0, "x").low


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shapes", "ring"), "invalid choice"),
        (("--heads", "2"), "--heads names heads as layer.head, such as 2.5, not '2'"),
        (("--heads", "4.0"), "--heads 4.0: tiny-llama3.1 has layers 0 to 3, each with heads 0 to 7"),
        (("--heads", "1.2", "1.2"), "--heads names each once, not 1.2 1.2."),
        (("--hub", "99"), "--hub 99: 0 problems have a token there"),
        (("--random_sets", "-1"), "--random_sets must be 0 or more"),
        (("--min_problems", "1"), "--min_problems must be 2 or more"),
        (("--min_problems", "9"), "--min_problems 9: there are only 6 problems"),
        (("--limit", "-1"), "--limit must be 0 or more"),
        (("--models", "tiny-gemma2", "tiny-gemma2"), "--models names one or more, each once, not tiny-"),
        (("--max_new_tokens", "4"), "none of the 6 texts has reasoning and then ####"),
        (("--problems", "lost.jsonl"), "there is no file of problems lost.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    enough = () if "--min_problems" in flags else ("--min_problems", "2")
    try:
        code = command("--out", "x", *enough, *flags)
    except SystemExit as stopped:  # tyro's own
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (folder / "x").rglob("*") if path.is_file() and "unfinished" not in path.parts]


def test_problems_without_the_mark_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.jsonl").write_text(json.dumps({"question": "How many?", "answer": "Two."}))
    assert command("--problems", "bad.jsonl") == 2
    assert "####" in capsys.readouterr().err
