"""Heads along their paths equal plain path patching, and go with attention; interruption and resumption; bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import translation_paths as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads import translation
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.models.loading import TINY_MODELS, load_model
from pyvene_ext.prompts.parallel import load_pairs, word_prompts
from pyvene_ext.specs.path import PathPatch
from tests.saved_models import save_random_model


@pytest.fixture(autouse=True)
def folder(few_sentences: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "RESAMPLES", 100)
    return few_sentences


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "pair"), [*zip(TINY_MODELS, ["en-fr", "fr-en", "en-fr"], strict=True)])
def test_heads_found_by_attention_are_crucial_along_their_paths(folder: Path, model: str, pair: str) -> None:
    """By the study's defaults, but for the number of prompts: the same rule for every model."""
    assert command("--out", "run", "--model", model, "--pair", pair, "--limit", 20, "--minus", "source") == 0
    facts = facts_in(folder / "run")
    overlap = facts["overlap_with_heads"]["source_standard"]
    assert overlap["jaccard"] > 2 * overlap["chance"]
    spearman = facts["attention_and_loss"]["source"]
    assert spearman["r"] > 0.3 and spearman["low"] > 0


def test_changes_equal_plain_paths(folder: Path) -> None:
    save_random_model("qwen2_5", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--out", "run", "--limit", 6, "--words", 1)
    assert command(*flags, "--heads", "1.2", "0.5", "1.0") == 0
    model, tokenizer = load_model(str(folder / "model"))
    asked = word_prompts(tokenizer, load_pairs("few.tsv", ("en", "fr")), ("en", "fr"), 1)
    plus = asked.plus.take(range(6))
    for what in ("source", "label"):
        minus = asked.minus[what].take(range(6))
        for variant in ("standard", "subspace") if what == "label" else ("standard",):
            senders = [
                PathPatch(sender=f"z.{head}", receivers=("logits",), positions="last", subspace=variant == "subspace")
                for head in ("0.3", "2.1")
            ]
            plain = patch(model, senders, plus, minus, "logit", engine="plain", progress=False)
            wanted = (plain.intervened - plain.baseline).mean(1) / np.abs(plain.baseline).mean()
            found = np.load(folder / f"run/{what}_{variant}.npy")
            np.testing.assert_allclose([found[0, 3], found[2, 1]], wanted, atol=1e-4)
    facts = facts_in(folder / "run")
    with (folder / "run/paths.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, heads in facts["crucial"].items():
        large = {f"{row['layer']}.{row['head']}" for row in rows if abs(float(row[name])) > 0.01}
        assert set(heads) == large
    assert [row for row in rows if row["found"] == "True"].__len__() == 3


def test_an_interrupted_run_goes_on_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_model("llama3_1", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--limit", 4, "--words", 1, "--heads", "0.1")
    monkeypatch.setattr(translation, "AT_ONCE", 2)  # each variant is kept in two halves
    assert command(*flags, "--out", "whole") == 0
    patched_with, calls = translation.patch, []

    def patched_once(*args: Any, **options: Any) -> Any:
        calls.append("patch")
        if calls.count("patch") == 6:
            raise KeyboardInterrupt  # in the second half of the third variant
        return patched_with(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(translation, "patch", patched_once)
        assert command(*flags, "--out", "run") == 130
        assert not (folder / "run/summary.json").exists()
        assert command(*flags, "--out", "run") == 0
        assert calls.count("patch") == 7  # only what was not done
    assert not (folder / "run/unfinished").exists()
    names = ("paths.csv", "label_subspace.npy")
    for name in names:
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert command("--config", "run/config.yaml", "--out", "again") == 0
    assert all((folder / "again" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in names)
    assert not (folder / "again/unfinished").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--crucial", 1), "--crucial must be above 0 and below 1"),
        (("--minus", "label", "label"), "--minus names one or more, each once"),
        (("--heads", "4.8"), "--heads 4.8: tiny-gemma2 has layers 0 to 5, each with heads 0 to 7."),
        (("--threshold", 0.9), "no head is above the threshold of 0.9"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
) -> None:
    assert command("--dataset", "few.tsv", "--out", "run", "--limit", 4, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and message in printed.err.splitlines()[-1]
    assert not printed.out or "--threshold" in flags  # for which the heads must be found first
    assert not (folder / "run").exists()
