"""Single heads replaced equal plain hooks; the first attempt is a config; interruption and resumption; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translation_single_heads as study

import pyvene_ext as px
from modelcards import n_heads
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.parallel import load_pairs, word_prompts
from tests.saved_models import save_random_model

ROOT = Path(study.__file__).parent


@pytest.fixture(autouse=True)
def folder(few_sentences: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "RESAMPLES", 100)
    return few_sentences


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


@pytest.mark.slow
def test_the_first_attempt_is_a_config(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Zero by plain hooks; what maximum and minimum put in place is tested with the package."""
    model = save_random_model("gpt2", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--limit", 4)
    assert command("--config", ROOT / "translation_first_attempt.yaml", *flags, "--out", "run") == 0
    facts = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    assert "heads" not in facts and facts["n_sources"] == 30  # all heads, whatever their attention
    drops = {kind: np.load(folder / f"run/each_{kind}.npy") for kind in ("mean", "maximum", "minimum", "zero")}
    assert all(drop.shape == (3, n_heads(model.config)) for drop in drops.values())
    assert not np.allclose(drops["maximum"], drops["minimum"]) and not np.allclose(drops["mean"], drops["maximum"])
    tokenizer = load_model(str(folder / "model"))[1]
    asked = word_prompts(tokenizer, load_pairs("few.tsv", ("en", "fr")), ("en", "fr"), 0)

    def mean_difference() -> float:
        with torch.no_grad():
            last = [model(torch.tensor([ids])).logits[0, -1] for ids in asked.plus.input_ids[:4]]
        return float(
            np.mean([(x[own] - x[s]).item() for x, (own, s) in zip(last, asked.plus.answer_ids, strict=False)])
        )

    before, width = mean_difference(), model.config.n_embd // model.config.n_head

    def put(_: Any, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., 3 * width : 4 * width] = 0
        return (x,)

    handle = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(put)
    assert drops["zero"][1, 3] == pytest.approx(before - mean_difference(), abs=1e-4)
    handle.remove()
    assert "one head at a time" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_model("llama3_1", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--limit", 4, "--replacements", "mean", "zero")
    assert command(*flags, "--out", "whole") == 0
    sweep, calls = px.sweep, []

    def swept(*args: Any, **options: Any) -> Any:
        calls.append(options["store"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(px, "sweep", swept)
        assert command(*flags, "--out", "run") == 130
    assert [path.name for path in (folder / "run/unfinished").iterdir()] == ["mean"]
    assert not (folder / "run/summary.json").exists()
    assert command(*flags, "--out", "run") == 0
    assert not (folder / "run/unfinished").exists()
    for name in ("each.csv", "each_mean.npy", "each_zero.npy"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pair", "fr"), "'fr' is not a pair of languages"),
        (("--replacements", "zero", "zero"), "--replacements names one or more, each once, not zero zero."),
        (("--dataset", "none.tsv"), "none.tsv"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
) -> None:
    given = {"--dataset": "few.tsv", "--out": "run", "--limit": 4}
    before = [arg for flag, value in given.items() if flag not in flags for arg in (flag, value)]
    assert command(*before, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and message in printed.err.splitlines()[-1]
    assert not printed.out
    assert not (folder / "run").exists()
