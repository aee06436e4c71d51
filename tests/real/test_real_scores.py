"""Scores and probes on real weights: the studies' tables against plain hooks on the texts that the model writes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from critical_heads import probe_layers, rank_heads

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.reasoning.probes import ALPHAS, deal_folds
from tests.ground_truth import probes as slow
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")


def solved(folder: Path, count: int) -> Path:
    """Problems of one step whose solutions are as long as the model's."""
    lines = []
    for number in range(count):
        a, b = 11 + 3 * number % 29, 2 + number % 7
        answer = f"Tom has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pens.\\n#### {a + b}"
        lines.append(f'{{"question": "Tom has {a} pens and buys {b} more. How many pens?", "answer": "{answer}"}}')
    file = folder / "problems.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def texts_of(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Any]:
    """What the study under test is given to score: its settings, as they are made."""
    found: list[Any] = []
    own = module.px.reasoning.Asked.reason

    def keeps(self: Any) -> Any:
        found.append(own(self))
        return found[-1]

    monkeypatch.setattr(module.px.reasoning.Asked, "reason", keeps)
    return found


def by_hooks(real: Real, ids: tuple[int, ...], block: range) -> np.ndarray:
    """The hub score of every head on one text, [layer head], from transformers' own patterns."""
    config = real.model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            attentions = real.model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        config._attn_implementation = before
    scores = np.zeros((len(attentions), attentions[0].shape[1]))
    for layer, pattern in enumerate(attentions):
        queries = range(block.start + 1, len(ids))
        for key in block:
            later = [query for query in queries if query > key]
            received = pattern[0, :, later, key].sum(1).numpy() / len(queries)
            scores[layer] = np.maximum(scores[layer], received)
    return scores


def test_hub_scores_are_those_of_the_patterns(
    smollm2: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = texts_of(monkeypatch, rank_heads)
    flags = [
        "--models",
        smollm2.folder,
        "--problems",
        str(solved(tmp_path, 4)),
        "--limit",
        "3",
        "--shots",
        "1",
    ]
    out = tmp_path / "out"
    assert run_study(rank_heads.main, rank_heads.Config, [*flags, "--max_new_tokens", "32", "--out", str(out)]) == 0
    (setting,) = made
    questions = setting.questions
    expected = np.mean(
        [
            by_hooks(smollm2, ids, block)
            for ids, block in zip(questions.prompts.input_ids, questions.blocks, strict=True)
        ],
        0,
    )
    rows = table(out / "scores.csv")
    assert len(rows) == 30 * 9
    found = np.array([float(row["hub"]) for row in rows]).reshape(30, 9)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    flow = np.array([float(row["flow"]) for row in rows])
    assert 0 < flow.max() < 1 and (flow >= 0).all()
    shown = capsys.readouterr().out
    assert f"caution: 270 heads are ranked from {len(questions)} problems" in shown and "evidence: " in shown


def test_a_probe_is_a_ridge_regression_on_hidden_states(
    smollm2: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = texts_of(monkeypatch, probe_layers)
    flags = [
        "--models",
        smollm2.folder,
        "--problems",
        str(solved(tmp_path, 16)),
        "--limit",
        "14",
        "--shots",
        "1",
    ]
    flags += ["--positions", "question_last", "--targets", "first_operand", "--folds", "3", "--shuffles", "19"]
    flags += ["--min_problems", "10", "--max_new_tokens", "24", "--out", str(tmp_path / "out")]
    assert run_study(probe_layers.main, probe_layers.Config, flags) == 0
    (setting,) = made
    questions, depth = setting.questions, 12
    states = []
    for ids, length in zip(questions.prompts.input_ids, questions.lengths, strict=True):
        with torch.no_grad():
            hidden = smollm2.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        states.append(hidden[depth][0, length - 1].double().numpy())
    numbers = [[int(x) for x in problem.question.split() if x.isdigit()] for problem in questions.problems]
    folds = deal_folds([f"{a} {b}" for a, b in numbers], 3, probe_layers.px.rng(0, "folds"))
    y = np.array([[float(a)] for a, _ in numbers])
    predicted, _ = slow.nested(np.stack(states), y, folds, ALPHAS)
    (row,) = [row for row in table(tmp_path / "out/probes.csv") if row["depth"] == str(depth)]
    assert float(row["r2"]) == pytest.approx(slow.r_squared(y, predicted), abs=1e-4)
    assert float(row["r2_low"]) <= float(row["r2"]) <= float(row["r2_high"])
