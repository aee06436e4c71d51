"""The recipe for a model of continuous thoughts: its loss is that of the model it makes, and it is written as studies read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import train_tiny_thought as recipe

from pyvene_ext.io.cli import run
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.tiny_tasks import Example

EXAMPLES = [
    Example(
        "Question: Lisa has 7 apples. Lisa finds 5 apples. How many apples does Lisa have? Answer:",
        " <<7+5=12>> #### 12",
    ),
    Example(
        "Question: David has 4 books. Lisa gives David 9 books. David loses 3 books. How many books does David have? Answer:",
        " <<4+9=13>> <<13-3=10>> #### 10",
    ),
]
SAID = (["7", "5", "12", "12", "12", "12", "12", "<eos>"], ["4", "9", "13", "13", "3", "10", "10", "<eos>"])


@pytest.mark.slow
def test_the_loss_is_that_of_the_numbers_at_latent_steps_and_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "solved", lambda *_: 0.25)
    assert run(recipe.main, recipe.Config, ["--steps", "2", "--batch_size", "3"]) == 0
    assert "25.0% of held-out problems solved" in capsys.readouterr().out
    model, tokenizer = load_model(tmp_path / "outputs/tiny-thought")
    form: Any = format_of(model)
    losses = []
    for example, said in zip(EXAMPLES, SAID, strict=True):
        wanted = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in said])
        ids = [*tokenizer(example.prompt)["input_ids"], *form.tokens, int(wanted[-2])]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        # The steps, the token behind them, and the answer; each says what comes, a step what it thinks.
        losses.append(torch.nn.functional.cross_entropy(logits[-8:], wanted).item())
    with torch.no_grad():
        found = recipe.loss_of(model, tokenizer, EXAMPLES).item()
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    assert recipe.loss_of(model, tokenizer, EXAMPLES).requires_grad


@pytest.mark.slow
def test_training_makes_the_loss_smaller_and_bad_flags_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "solved", lambda *_: 0.25)
    model, tokenizer = load_model("tiny-qwen2.5")
    config = recipe.Config(steps=6, batch_size=8)
    first = recipe.Config(steps=1, batch_size=8, learning_rate=1e-9)
    before = recipe.teach(load_model("tiny-qwen2.5")[0], tokenizer, first)[0]["loss"]
    assert recipe.teach(model, tokenizer, config)[-1]["loss"] < before - 1
    assert run(recipe.main, recipe.Config, ["--steps", "0"]) == 2
    assert "--steps must be 1 or more" in capsys.readouterr().err
