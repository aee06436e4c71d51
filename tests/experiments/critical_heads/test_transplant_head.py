"""The study of head transplants against heads computed by hand, one problem at a time; interrupted; given bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from critical_heads import transplant_head as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.reasoning.transplant_tables import transplant_row
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import tokenize_problems
from pyvene_ext.runs import reasoning, transplants
from pyvene_ext.runs.flags import Problems
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.controls import random_heads_in_place
from tests.experiments.critical_heads import by_hand
from tests.ground_truth import transplant as slow
from tests.interrupted import stop_at
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer
from tests.saved_models import save_random_model

N, FITTED = 14, 9
HOST, DONOR = "tiny-qwen2.5", "tiny-llama3.1"
PLACES, HEADS = [(0, 0), (1, 7), (0, 7), (0, 4)], [(0, 1), (1, 6), (0, 4), (0, 7)]
NAMED = ("--heads", *(f"{a}.{b}" for a, b in PLACES), "--donor_heads", *(f"{a}.{b}" for a, b in HEADS))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "RESAMPLES", 100)
    return tmp_path


def command(*flags: Any) -> int:
    flags = ("--limit", N, "--fit_problems", FITTED, "--alpha", 0.01, "--answer_tokens", 3, *flags)
    return run_study(study.main, study.Config, list(map(str, flags)))


def ridge(x: np.ndarray, y: np.ndarray, alpha: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Weight and offset, by least squares with the penalty as further rows."""
    mx, my = x.mean(0), y.mean(0)
    penalty = np.sqrt(alpha * ((x - mx) ** 2).sum() / x.shape[1]) * np.eye(x.shape[1])
    filled = np.vstack([x - mx, penalty]), np.vstack([y - my, np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(*filled, rcond=None)[0]
    return weight, my - mx @ weight


def maps_by_hand(layers: tuple[int, int]) -> tuple[Any, Any, float]:
    """A and B of two layers, and A's R2 on the test tokens."""
    host, _, problems = by_hand.blocks(HOST, N)
    donor, _ = load_model(DONOR)
    rows = [ids for ids, _, _ in problems[:FITTED]]
    train, test = slow.split(rows, round(0.25 * FITTED))
    both = [
        [slow.streams(model, ids, layer) for ids in rows] for model, layer in zip((host, donor), layers, strict=True)
    ]

    def stacked(side: int, place: int, which: list[tuple[int, int]]) -> np.ndarray:
        return np.stack([both[side][prompt][place][at].numpy() for prompt, at in which])

    a, offset = ridge(stacked(0, 0, train), stacked(1, 0, train))
    b, _ = ridge(stacked(1, 1, train), stacked(0, 1, train))
    goal = stacked(1, 0, test)
    error = ((goal - stacked(0, 0, test) @ a - offset) ** 2).sum()
    r2 = 1 - error / ((goal - stacked(1, 0, train).mean(0)) ** 2).sum()
    a, offset, b = (torch.tensor(value).float() for value in (a, offset, b))
    return (lambda x: x @ a + offset), (lambda c: c @ b), float(r2)


def correct_by_hand(moves: list[slow.Move]) -> list[bool]:
    host, tokenizer, problems = by_hand.blocks(HOST, N)

    def right(ids: list[int], gold: float) -> bool:
        def logits(tokens: Any) -> torch.Tensor:
            return slow.logits(host, tokens, moves, len(ids))[-1]

        out = by_hand.written(host, tokenizer, ids, logits, 3)
        return by_hand.number(tokenizer.decode([*ids, *out])) == gold

    return [right(ids, gold) for ids, _, gold in problems[FITTED:]]


@pytest.mark.slow
def test_accuracies_are_those_of_heads_computed_by_hand(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, made = transplants.transplanted, []

    def recorded(host: Any, moved: Any, **kwargs: Any) -> Any:
        made.append([(one.head, one.donor is host, one.donor_head, one.maps is None) for one in moved])
        return own(host, moved, **kwargs)

    monkeypatch.setattr(transplants, "transplanted", recorded)
    assert command("--out", "x", *NAMED, "--n_heads", 2, 4, "--random_sets", 2) == 0
    assert [(place, True, place, True) for place in PLACES] in made  # the self-transplant is one
    out = capsys.readouterr().out
    rows = by_hand.table(folder / "x/transplants.csv")
    assert [(row["n_heads"], row["condition"]) for row in rows] == [
        (n, condition) for n in "24" for condition in ("zero", "self", "transplant")
    ]
    host, _, _ = by_hand.blocks(HOST, N)
    donor, _ = load_model(DONOR)
    pairs = list(zip(PLACES, HEADS, strict=True))
    maps = {(a[0], b[0]): maps_by_hand((a[0], b[0])) for a, b in pairs}
    fits = by_hand.table(folder / "x/maps.csv")
    assert [(int(row["host_layer"]), int(row["donor_layer"]), row["map"]) for row in fits] == [
        (*layers, name) for layers in maps for name in "AB"
    ]
    for row in fits[::2]:
        wanted = maps[int(row["host_layer"]), int(row["donor_layer"])][2]
        assert float(row["r2_test"]) == pytest.approx(wanted, abs=1e-4)
        assert f"R2 {wanted:.3f} on {row['test_tokens']} test tokens" in out

    def moves(heads: list[tuple[int, int]], n: int) -> list[slow.Move]:
        return [slow.Move(a, donor, b, *maps[a[0], b[0]][:2]) for a, b in list(zip(PLACES, heads, strict=True))[:n]]

    seen = set()
    for n in (2, 4):
        found = {row["condition"]: row for row in rows if row["n_heads"] == str(n)}
        zero = correct_by_hand([slow.Move(a, host, a, lambda x: x, torch.zeros_like) for a in PLACES[:n]])
        moved = correct_by_hand(moves(HEADS, n))
        for condition, right in (("zero", zero), ("self", [True] * 5), ("transplant", moved)):
            row = found[condition]
            assert float(row["accuracy"]) == pytest.approx(100 * np.mean(right)), (n, condition)
            assert float(row["drop"]) == pytest.approx(100 - 100 * np.mean(right))
            assert float(row["gain"]) == pytest.approx(100 * np.mean(right) - 100 * np.mean(zero))
            assert float(row["mcnemar_p"]) == pytest.approx(min(1.0, 2 * 0.5 ** (5 - sum(right))))
            assert int(row["problems"]) == 5
            seen.add(sum(right))
        assert found["self"]["changed"] == "0"
        assert int(found["transplant"]["changed"]) >= 5 - sum(moved)
        random = [row for row in by_hand.table(folder / "x/random_sets.csv") if row["n_heads"] == str(n)]
        assert len(random) == 2
        drops = []
        for row in random:
            heads = [tuple(map(int, head.split("."))) for head in row["donor_heads"].split()]
            assert len(heads) == n and len(set(heads)) == n
            for mine, meant in zip(heads, HEADS, strict=False):
                assert mine[0] == meant[0] and mine != meant
            right = correct_by_hand(moves([*heads, *HEADS[n:]], n))  # type: ignore[list-item]
            drops.append(100 - 100 * np.mean(right))
            assert float(row["drop"]) == pytest.approx(drops[-1])
        moved_row = found["transplant"]
        assert float(moved_row["random_accuracy"]) == pytest.approx(100 - np.mean(drops))
        assert float(moved_row["random_lowest"]) == pytest.approx(100 - max(drops))
        assert float(moved_row["excess"]) == pytest.approx(100 * np.mean(moved) - 100 + np.mean(drops))
        as_good = sum(100 - drop >= 100 * np.mean(moved) - 1e-9 for drop in drops)
        assert float(moved_row["share_as_good"]) == pytest.approx((1 + as_good) / 3)
    assert len(seen) > 2  # else little was compared
    wide = by_hand.table(folder / "x/accuracy.csv")
    assert list(wide[0]) == ["n_heads", *(f"{HOST}_{name}_acc" for name in ("zero", "self", "transplant"))]
    assert wide[1][f"{HOST}_transplant_acc"] == rows[-1]["accuracy"]


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_verdicts_follow_the_table_and_the_same_command_gives_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--out", "x", "--n_heads", 1, 4, "--random_sets", 1) == 0
    out = capsys.readouterr().out
    facts = json.loads((folder / "x/summary.json").read_text())
    row = by_hand.table(folder / "x/transplants.csv")[-1]
    drop, gain, low = (float(row[name]) for name in ("drop", "gain", "gain_low"))
    assert len(facts["verdicts"]) == 2 and all(line in out for line in facts["verdicts"])
    line = facts["verdicts"][1]
    assert line.startswith(f"{HOST}, 4 heads: nothing in their place costs ")
    assert f"those of {DONOR} cost {drop:.1f} points" in line and f"that gives back {gain:.1f} points" in line
    assert ("not shown to do any of their work" in line) == (low <= 0)
    assert facts["models"][HOST]["solved"] == N - FITTED and facts["models"][HOST]["with_reasoning"] == N
    heads = [pair.split(" <- ") for pair in facts["models"][HOST]["heads"]]
    assert row["heads"].split() == [place for place, _ in heads]
    assert row["donor_heads"].split() == [head for _, head in heads]
    before = (folder / "x/transplants.csv").read_bytes()
    assert yaml.safe_load((folder / "x/config.yaml").read_text())["n_heads"] == [1, 4]
    assert run_study(study.main, study.Config, ["--config", "x/config.yaml"]) == 0
    assert (folder / "x/transplants.csv").read_bytes() == before
    assert not (folder / "x/unfinished").exists()
    assert (folder / "x/figures/accuracy.png").stat().st_size > 5000


def test_the_ranking_is_by_the_score_and_random_heads_are_others_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scores:
        def of(self, score: str) -> np.ndarray:
            return np.array([[0.1, 0.7, 0.2], [0.9, 0.0, 0.2]]) * (1 if score == "hub" else -1)

    monkeypatch.setattr(transplants, "block_scores", lambda *_, **__: Scores())
    nothing: Any = None
    top = transplants.rank(nothing, nothing, "hub", 4, 1)
    assert top == ((1, 0), (0, 1), (0, 2), (1, 2))
    sets = random_heads_in_place(top, 3, 30, np.random.default_rng(0))
    assert len(sets) == 30 and len(set(sets)) > 3
    for heads in sets:
        assert [layer for layer, _ in heads] == [1, 0, 0, 1] and len(set(heads)) == 4
        assert all(mine != meant for mine, meant in zip(heads, top, strict=True))


def test_what_the_verdicts_say() -> None:
    def rows(
        gain_low: float, excess_low: float, share: float, changed: int = 0, unparsed: int = 0
    ) -> list[dict[str, Any]]:
        common_part: dict[str, Any] = {"model": "a", "donor": "b", "n_heads": 1, "problems": 9, "random_sets": 0}
        common_part |= {"changed": changed, "unparsed": unparsed}
        common_part |= {f"{name}{end}": 5.0 for name in ("drop", "gain", "excess") for end in ("", "_low", "_high")}
        moved = {"gain_low": gain_low, "excess_low": excess_low, "share_as_good": share, "random_sets": 4}
        return [
            {**common_part, "condition": "zero"},
            {**common_part, "condition": "self"},
            {**common_part, "condition": "transplant", **moved},
        ]

    def said(*args: Any) -> str:
        (line,) = study.verdicts_of(rows(*args))
        return line

    assert said(-1.0, 1.0, 0.2).endswith("not shown to do any of their work")
    assert said(1.0, 1.0, 0.2).endswith("which random heads do not") and "0 of 4 sets being as good" in said(1, 1, 0.2)
    assert said(1.0, -1.0, 0.2).endswith("and so may random heads")
    assert said(1.0, 1.0, 0.4).endswith("and so may random heads") and "1 of 4 sets" in said(1, 1, 0.4)
    assert said(1.0, 1.0, 0.2, 3).endswith("the self-transplant changed 3 of 9 answers, which rounding should not")
    assert said(1.0, 1.0, 0.2, 0, 5).count("text broken, no verdict (56%") == 2


def test_a_random_set_that_is_just_as_good_counts_as_that() -> None:
    def solved(*right: int) -> Any:
        n = len(right)
        answers = tuple(1.0 if one else None for one in right)
        return Evaluation(((),) * n, ("",) * n, answers, (1.0,) * n, np.ones(n, bool), np.full(n, np.nan))

    clean, zero, moved = solved(1, 1, 1, 1, 1, 1, 1), solved(*[0] * 7), solved(0, 0, 1, 0, 1, 1, 0)
    others = [solved(*(i < right for i in range(7))) for right in (2, 3, 3, 5)]
    row = transplant_row(clean, zero, moved, others, 0, "transplant", 1)
    assert row["share_as_good"] == pytest.approx((1 + 3) / 5)
    assert (row["unparsed"], row["random_sets"]) == (4, 4)


@pytest.mark.slow
def test_within_a_model_there_is_a_transplant_without_maps(folder: Path) -> None:
    """The same head: exact without maps. Rankings come from files; two hosts stand side by side."""
    (folder / "one.csv").write_text("scores,layer,head\n1,0,7\n3,0,0\n2,0,4\n")
    flags = ("--models", HOST, DONOR, "--donor", HOST, "--rankings", "one.csv", "one.csv", "--donor_ranking", "one.csv")
    assert command("--out", "x", *flags, "--n_heads", 3, "--random_sets", 0) == 0
    rows = by_hand.table(folder / "x/transplants.csv")
    assert [(row["model"], row["condition"]) for row in rows] == [
        *((HOST, name) for name in ("zero", "self", "without_maps", "transplant")),
        *((DONOR, name) for name in ("zero", "self", "transplant")),
    ]
    assert rows[0]["heads"] == rows[0]["donor_heads"] == "0.0 0.4 0.7"
    assert rows[2]["accuracy"] == "100.0" and rows[2]["changed"] == "0" and float(rows[0]["accuracy"]) < 100
    assert rows[3]["share_as_good"] == "" and not (folder / "x/random_sets.csv").exists()


@pytest.mark.slow
def test_a_donor_of_another_vocabulary_needs_equal_pieces(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without them it is refused, and its heads cannot be ranked on the host's tokens."""
    save_random_model("gpt2", folder / "other")
    path = folder / "other/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    names = sorted((name for name in vocabulary if name.isalpha() and name.islower()), key=vocabulary.get)[:2]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]  # the same pieces
    path.write_text(json.dumps(content))
    flags = ("--out", "x", "--donor", "other", "--n_heads", 1, "--random_sets", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasoning.Asked, "reason", None)  # before anything is run
        assert command(*flags) == 2
    assert "other has another vocabulary than tiny-qwen2.5" in capsys.readouterr().err
    assert command(*flags, "--donor_heads", "1.1") == 0
    bpe_tokenizer(["xyz"]).save_pretrained(folder / "other")
    assert command(*flags, "--donor_heads", "1.1") == 2
    assert "only one of them ends a token of text 0 after 'Q', so that their tokens" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--out", "x", *NAMED, "--n_heads", 1, 2, "--random_sets", 1)
    made = stop_at(monkeypatch, 4, transplants, "evaluate")
    assert command(*flags) == 130
    assert sorted(path.name for path in (folder / "x").iterdir()) == ["unfinished"]
    assert command(*flags) == 0
    assert len(made) == 3 + 1 + 5  # of eight
    whole = (folder / "x/transplants.csv").read_bytes()
    assert command(*flags[2:], "--out", "y") == 0
    assert (folder / "y/transplants.csv").read_bytes() == whole


@pytest.mark.slow
def test_a_host_writes_its_reasoning_anew_without_heads_and_with_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the zero ablation of the same heads at all tokens, prompt and new ones."""
    flags = ("--heads", "0.0", "0.4", "--donor_heads", "0.1", "0.4", "--random_sets", 2, "--max_new_tokens", 20)
    assert command("--out", "x", "--regenerate", "reasoning", *flags) == 0
    rows = {row["condition"]: row for row in by_hand.table(folder / "x/transplants.csv")}
    assert rows["self"]["changed"] == "0" and float(rows["self"]["drop"]) == 0
    model, tokenizer = load_model(HOST)
    problems = reasoning.find_problems(Problems(limit=N))
    questions = tokenize_problems(problems, tokenizer).take(range(FITTED, N))
    without = evaluate(
        model,
        tokenizer,
        questions,
        Ablation(kind="zero", site="z", layer=0, heads=(0, 4)),
        "both",
        max_new_tokens=20,
        rule="last-of-line",
    )
    clean = evaluate(model, tokenizer, questions, max_new_tokens=20, rule="last-of-line")
    assert float(rows["zero"]["accuracy"]) == pytest.approx(100 * without.accuracy)
    assert int(rows["zero"]["changed"]) == sum(a != b for a, b in zip(clean.ids, without.ids, strict=True)) > 0
    assert int(rows["zero"]["unparsed"]) == (~without.parsed).sum()
    assert "evidence: 5 problems; tiny-qwen2.5, 2 heads of tiny-llama3.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--heads", "2"), "--heads names heads as layer.head, such as 2.5, not '2'"),
        (("--donor_heads", "x.1"), "--donor_heads names heads as layer.head"),
        (("--heads", "0.1", "0.1"), "--heads names each once, not 0.1 0.1."),
        (("--heads", "6.0"), "--heads 6.0: tiny-qwen2.5 has layers 0 to 5, each with heads 0 to 7"),
        (("--donor_heads", "4.0"), "--donor_heads 4.0: tiny-llama3.1 has layers 0 to 3, each with heads 0 to 7"),
        (("--heads", "0.1", "--donor_heads", "0.1", "0.2"), "--heads names 1 heads and --donor_heads 2"),
        (("--heads", "0.1", "--rankings", "a.csv"), "--heads and --rankings were both given"),
        (("--donor_heads", "0.1", "--donor_ranking", "a.csv"), "--donor_heads and --donor_ranking were both given"),
        (("--rankings", "a.csv", "b.csv"), "--rankings names 2 files for 1 models"),
        (("--rankings", "lost.csv"), "lost.csv"),
        (("--donor_ranking", "lost.csv"), "lost.csv"),
        (("--n_heads", "2", "1"), "--n_heads takes ascending numbers, not 2 1."),
        (("--n_heads", "2", "--heads", "0.1"), "--n_heads asks for 2 heads and --heads names 1"),
        (("--n_heads", "40"), "--n_heads asks for 40 heads and tiny-llama3.1 has 32"),
        (("--fit_problems", "13"), "--fit_problems 13 leaves fewer than the two"),
        (("--fit_problems", "1"), "--fit_problems must be 2 or more"),
        (("--test_share", "1"), "--test_share must be above 0 and below 1, not 1.0."),
        (("--alpha", "0"), "--alpha must be above 0"),
        (("--method", "procrustes", "--fit_problems", "3"), "tokens are too few to fit maps between streams of 128 and 160"),
        (("--random_sets", "-1"), "--random_sets must be 0 or more"),
        (("--heads", "0.1", "0.2", "--donor_heads", "0.1", "0.1"), "there are no random heads to put in place of"),
        (("--donor", "tiny-lost"), "no shipped model is called 'tiny-lost'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert command("--out", "x", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not [path for path in (folder / "x").rglob("*") if path.is_file() and "unfinished" not in path.parts]
