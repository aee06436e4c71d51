"""The ranking of heads against the scores of the texts that the model writes; what is written; interrupted; misused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from critical_heads import rank_heads as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.block_scores import SCORES, block_scores
from pyvene_ext.prompts.problems import Problem, Questions
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs.attention import read_views
from pyvene_ext.runs.flags import Loading
from tests.experiments.critical_heads import by_hand

MODEL = "tiny-qwen2.5"
N = 6


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, ["--limit", str(N), "--max_new_tokens", "20", *map(str, flags)])


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_scores_are_those_of_the_reasoning_that_the_model_writes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--models", MODEL, "tiny-llama3.1", "--out", "out", "--top", 3) == 0
    model, _, problems = by_hand.blocks(MODEL, N)
    prompts = TokenizedPrompts(tuple(tuple(ids) for ids, _, _ in problems))
    given = Questions(
        (Problem(question="?", solution="", answer=0, steps=1),) * N,
        prompts,
        tuple(block.start for _, block, _ in problems),
        tuple(block for _, block, _ in problems),
        tuple(range(N)),
    )
    expected = block_scores(model, given)
    table = [row for row in by_hand.table(folder / "out/scores.csv") if row["model"] == MODEL]
    assert [(int(row["layer"]), int(row["head"])) for row in table] == list(np.ndindex(6, 8))
    for score in SCORES:
        values = expected.of(score)
        np.testing.assert_allclose([float(row[score]) for row in table], values.ravel(), atol=1e-5)
        ranking = read_head_scores(folder / f"out/heads/{MODEL}_{score}.csv", model.config)
        assert [x for x, *_ in ranking] == sorted((x for x, *_ in ranking), reverse=True)
        assert all(abs(x - values[layer, head]) < 1e-5 for x, layer, head in ranking) and len(ranking) == 48
        assert (folder / f"out/figures/{MODEL}_{score}.png").stat().st_size > 1000
    assert [int(row["hub_at"]) for row in table] == expected.usual_hub().ravel().tolist()
    shown = capsys.readouterr().out
    assert f"{MODEL}: {N} problems, 100.0% correct untouched" in shown and shown.count("rank correlation") == 2
    first = read_head_scores(folder / f"out/heads/{MODEL}_flow.csv", model.config)[0]
    assert f"{first[1]}.{first[2]} {first[0]:.3f}" in shown
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "attention.json",
        "config.yaml",
        "figures",
        "heads",
        "scores.csv",
        "summary.json",
    ]
    # Of its own config the same.
    assert run_study(study.main, study.Config, ["--config", "out/config.yaml", "--out", "again"]) == 0
    for name in ("scores.csv", "attention.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()
    # The first heads are looked at on the first problems, as the model was given them.
    views = read_views(folder / "out/attention.json")
    assert [view.name for view in views] == [
        f"{name}, problem {i}" for name in (MODEL, "tiny-llama3.1") for i in range(N)
    ]
    assert [len(view.tokens) for view in views[:N]] == [len(ids) for ids, _, _ in problems]
    composite = read_head_scores(folder / f"out/heads/{MODEL}_composite.csv", model.config)
    assert list(views[0].first) == [(layer, head) for _, layer, head in composite[:5]]
    assert {pattern.shape[0] for pattern in views[0].patterns.values()} == {model.config.num_attention_heads}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--top", 0], "--top must be 1 or more, not 0."),
        (["--models", MODEL, MODEL], "--models names one or more, each once, not tiny-"),
        (["--batch_size", 0], "--batch_size must be 1 or more"),
        (["--problems", "none.jsonl"], "there is no file of problems none.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loading, "load", None)
    assert command(*flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and not list(folder.iterdir())


def test_a_model_that_writes_no_mark_has_no_block(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--max_new_tokens", 3) == 2
    assert "none of the 6 texts has reasoning and then ####" in capsys.readouterr().err
