"""The lens shows the word, heads look at its source; the last depth is what the model says; bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translation_lens as study

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.parallel import load_pairs, word_prompts
from tests.saved_models import save_random_model
from tests.tiers import first_only


@pytest.fixture(autouse=True)
def folder(few_sentences: Path) -> Path:
    return few_sentences


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("pair", first_only(["en-fr", "fr-en"]))
def test_the_lens_shows_the_word_and_what_heads_look_at_is_its_source(folder: Path, pair: str) -> None:
    assert command("--out", "run", "--pair", pair, "--limit", 20, "--words", 2) == 0
    facts = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    lens = table(folder / "run/lens.csv")
    assert float(lens[-1]["target_probability"]) > 0.99 and float(lens[1]["target_probability"]) < 0.01
    dictionary = dict(
        zip(
            *(
                text.replace(".", "").split()
                for text in ("cat king girl niece sees pushes happy", "chat roi fille nièce")
            ),
            strict=False,
        )
    )
    looked = dict(pair.split(" -> ") for pair in facts["looked_at"])
    for english, french in dictionary.items():
        source, target = (english, french) if pair == "en-fr" else (french, english)
        assert looked.get(source, target) == target


def test_the_last_depth_is_what_the_model_says(folder: Path) -> None:
    model = save_random_model("qwen2_5", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--out", "run", "--limit", 6, "--words", 1)
    assert command(*flags, "--heads", "1.2", "0.5", "1.0") == 0
    tokenizer = load_model(str(folder / "model"))[1]
    plus = word_prompts(tokenizer, load_pairs("few.tsv", ("en", "fr")), ("en", "fr"), 1).plus.take(range(6))
    with torch.no_grad():
        last = [model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in plus.input_ids]
    wanted = np.mean([p[own].item() for p, (own, _) in zip(last, plus.answer_ids, strict=True)])
    assert float(table(folder / "run/lens.csv")[-1]["target_probability"]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--heads", "x"), "--heads names heads as layer.head, such as 2.5, not 'x'."),
        (("--threshold", 0.9), "no head is above the threshold of 0.9"),
        (("--words", 1, 30), "--words 30: the longest en-fr translation has 8 words; give numbers from 0 to 7."),
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
