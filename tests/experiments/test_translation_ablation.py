"""Heads found by attention cause translation, ablated together; by plain hooks; interruption and resumption; bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translation_ablation as study
import translation_lens
import translation_paths

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.models.loading import TINY_MODELS, load_model
from pyvene_ext.prompts.parallel import load_pairs, lone_word_prompts, word_prompts
from pyvene_ext.runs import translation as runs_of_translation
from tests.pyvene_ext.tokenizers_for_tests import word_tokenizer
from tests.saved_models import save_random_model
from tests.tiers import first_only


@pytest.fixture(autouse=True)
def folder(few_sentences: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "RESAMPLES", 100)
    return few_sentences


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "pair"), [*zip(TINY_MODELS, ["en-fr", "fr-en", "en-fr"], strict=True)])
def test_heads_found_by_attention_are_crucial_for_translation_and_not_for_ioi(
    folder: Path, model: str, pair: str
) -> None:
    """By the study's defaults, but for the number of prompts: the same rule for every model."""
    assert command("--out", "run", "--model", model, "--pair", pair, "--limit", 20, "--kinds", "resample") == 0
    facts = facts_in(folder / "run")
    of_kind = facts["sets"]["resample"]
    difference, accuracy, ioi = (of_kind[name] for name in ("logit_diff", "accuracy", "other_logit_diff"))
    assert difference["any layer"]["p"] == 1 / 21  # no random set lowers it as much
    assert difference["found"] < 0.7 * difference["clean"]
    assert difference["any layer"]["mean"] > 0.8 * difference["clean"]
    assert accuracy["clean"] == 1 and accuracy["found"] < 0.8 and accuracy["any layer"]["mean"] > 0.9
    assert ioi["found"] > 0.85 * ioi["clean"] and ioi["any layer"]["p"] > 0.2
    if model == "tiny-gemma2":  # in the others more heads of the same layers translate, and the same heads copy names
        assert difference["same layers"]["p"] == 1 / 21
        assert of_kind["other_accuracy"]["found"] == 1
    rows = table(folder / "run/sets.csv")
    n_same = int(facts["random_sets"]["same layers"].split()[0])  # of a layer that is half found there is one other set
    assert 1 <= n_same <= 20
    assert [row["set"] for row in rows] == ["found"] + n_same * ["same layers"] + 20 * ["any layer"]
    found = set(rows[0]["heads"].split())
    same_layers = "of the same layers" in facts["random_sets"]["same layers"]
    for row in rows[1:]:
        heads = set(row["heads"].split())
        assert len(heads) == len(found) and heads != found
        assert not heads & found
        if row["set"] == "same layers" and same_layers:
            layers, wanted = (sorted(head.split(".")[0] for head in of) for of in (heads, found))
            assert layers == wanted
    assert len({row["heads"] for row in rows}) == len(rows)


def test_sets_equal_plain_hooks(folder: Path) -> None:
    model = save_random_model("qwen2_5", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--out", "run", "--limit", 6, "--words", 1)
    assert command(*flags, "--heads", "1.2", "0.5", "1.0", "--kinds", "zero", "--other", "none") == 0
    tokenizer = load_model(str(folder / "model"))[1]
    asked = word_prompts(tokenizer, load_pairs("few.tsv", ("en", "fr")), ("en", "fr"), 1)
    width = model.config.head_dim

    def zeroed(layer: int, heads: list[int]) -> Any:
        def put(_: Any, args: tuple) -> tuple:
            x = args[0].clone()
            for head in heads:
                x[:, -1, head * width : (head + 1) * width] = 0
            return (x,)

        return model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(put)

    differences = []
    handles = [zeroed(0, [5]), zeroed(1, [0, 2])]
    for prompt in range(6):
        with torch.no_grad():
            logits = model(torch.tensor([asked.plus.input_ids[prompt]])).logits[0, -1]
        own, other = asked.plus.answer_ids[prompt]
        differences.append((logits[own] - logits[other]).item())
    for handle in handles:
        handle.remove()
    found = np.load(folder / "run/sets_zero.npy")
    assert found.shape == (41, 3)
    wanted = [(differences[i] + differences[i + 1]) / 2 for i in (0, 2, 4)]
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


def test_without_swaps_the_right_word_is_held_against_its_strongest_rival(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plain hooks: the rival, the logit difference, and what the heads take off it."""
    model = save_random_model("qwen2_5", folder / "model")
    flags = (
        "--model",
        "model",
        "--dataset",
        "few.tsv",
        "--words",
        1,
        "--contrast",
        "rival",
        "--limit",
        5,
        "--n_random",
        3,
    )
    assert command(*flags, "--out", "run", "--heads", "1.2", "--kinds", "zero", "--other", "none") == 0
    facts = facts_in(folder / "run")
    assert facts["contrast"] == "rival" and facts["n_prompts"] == 5 and facts["clean_accuracy"] == 0
    tokenizer = load_model(str(folder / "model"))[1]
    asked = lone_word_prompts(tokenizer, load_pairs("few.tsv", ("en", "fr")), ("en", "fr"), 1).first(5)
    width, wanted, clean = model.config.head_dim, [], []

    def zero(_: Any, args: tuple) -> tuple:
        x = args[0].clone()
        x[:, -1, 2 * width : 3 * width] = 0
        return (x,)

    for ids, answers in zip(asked.plus.input_ids, asked.plus.answers, strict=True):
        own = answers.right[0][0]
        with torch.no_grad():
            before = model(torch.tensor([ids])).logits[0, -1]
            handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(zero)
            after = model(torch.tensor([ids])).logits[0, -1]
            handle.remove()
        rival = next(int(token) for token in before.argsort(descending=True) if token != own)
        clean.append(float(before[own] - before[rival]))
        wanted.append(float(after[own] - after[rival]))
    np.testing.assert_allclose(np.load(folder / "run/sets_zero.npy")[0], wanted, atol=1e-4)
    found = table(folder / "run/sets.csv")[0]
    assert float(found["drop"]) == pytest.approx(np.mean(clean) - np.mean(wanted), abs=1e-4)
    assert float(found["logit_diff_clean"]) == pytest.approx(np.mean(clean), abs=1e-4)
    shown = capsys.readouterr().out
    assert "3 random sets of the same layers; least p 0.25" in shown and "above its strongest rival's" in shown
    assert "evidence: 5 prompts; the heads (1), ablated together (zero), take off" in shown


def test_real_text_without_swaps_is_asked_word_by_word(folder: Path) -> None:
    lines = [f"{one} thing is here\t{one} chose est ici" for one in ("la", "le", "un", "une", "ma")]
    (folder / "lone.tsv").write_text("\n".join(["en\tfr", *lines]) + "\n", encoding="utf-8")
    words = sorted({word for line in lines for word in line.split()} | {"EN:", "FR:"})
    tokenizer = word_tokenizer([" ".join(words), "EN : FR :"])
    flags = study.Config(dataset="lone.tsv", words=(1, 2), n_random=2)
    asked = px.translation._asked(tokenizer, load_pairs("lone.tsv", ("en", "fr")), ("en", "fr"), flags, {})
    assert not asked.in_couples and len(asked.words) == 10


@pytest.mark.slow
def test_the_highest_heads_are_studied_where_no_threshold_is_published(folder: Path) -> None:
    save_random_model("qwen2_5", folder / "model")
    flags = (
        "--model",
        "model",
        "--dataset",
        "few.tsv",
        "--words",
        1,
        "--limit",
        4,
        "--kinds",
        "zero",
        "--other",
        "none",
    )
    assert command(*flags, "--n_random", 2, "--out", "run") == 0
    assert len(facts_in(folder / "run")["heads"]) == px.translation.HIGHEST
    assert command(*flags, "--n_random", 2, "--out", "again", "--threshold", 0.9) == 2
    assert command(*flags, "--out", "dry", "--dry_run") == 0 and not (folder / "dry").exists()


@pytest.mark.parametrize(
    "module", first_only([study, translation_lens, translation_paths]), ids=lambda one: one.__name__
)
def test_a_dry_run_ranks_no_heads(
    module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs_of_translation, "translation_scores", None)
    flags = ["--dataset", "few.tsv", "--limit", "8", "--dry_run"]
    assert run_study(module.main, module.Config, flags) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": under a minute") and not (folder / "outputs").exists()


def test_an_interrupted_run_goes_on_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_model("llama3_1", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--limit", 4, "--words", 1, "--heads", "0.1")
    assert command(*flags, "--out", "whole") == 0
    sweep, calls = px.sweep, []

    def swept(*args: Any, **options: Any) -> Any:
        calls.append(options["store"])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return sweep(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(px, "sweep", swept)
        assert command(*flags, "--out", "run") == 130
    assert len(set(calls)) == 7 and len(list((folder / "run/unfinished").glob("*/*"))) == 6
    assert not (folder / "run/summary.json").exists()
    assert command(*flags, "--out", "run") == 0
    assert not (folder / "run/unfinished").exists()
    names = ("sets.csv", "sets_zero.npy", "sets_mean.npy", "sets_resample.npy")
    for name in names:
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert command("--config", "run/config.yaml", "--out", "again") == 0
    assert all((folder / "again" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in names)
    assert not (folder / "again/unfinished").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pair", "fr"), "--pair fr: 'fr' is not a pair of languages"),
        (("--pair", "en-xx"), "--pair en-xx: few.tsv, line 2 has no text in 'xx'; it has 'en', 'fr'"),
        (("--limit", 3), "--limit must be 4 or more, or 0 for all, not 3"),
        (("--n_random", 0), "--n_random must be 1 or more"),
        (("--contrast", "rivals"), "--contrast"),
        (("--contrast", "swap", "--words", 4), "no two of 30 pairs can be swapped at word 4"),
        (("--words", 1, -1), "--words must be 0 or more, not -1."),
        (("--words", 1, 1), "--words names one or more, each once, not 1 1"),
        (("--words", 1, 30), "--words 30: the longest en-fr translation has 8 words; give numbers from 0 to 7."),
        (("--kinds", "zero", "zero"), "--kinds names one or more, each once"),
        (("--heads", "4.8"), "--heads 4.8: tiny-gemma2 has layers 0 to 5, each with heads 0 to 7."),
        (("--heads", "x"), "--heads names heads as layer.head, such as 2.5, not 'x'."),
        (("--threshold", 0.9), "no head is above the threshold of 0.9"),
        (("--other", "ioi_e"), "did you mean"),
        (("--template", "{source}"), "the template"),
        (("--dataset", "broken.tsv"), "broken.tsv, line 2 has 1 columns"),
        (("--positions", "all"), "cannot be resampled"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
) -> None:
    (folder / "broken.tsv").write_text("en\tfr\na\n", encoding="utf-8")
    given = {"--dataset": "few.tsv", "--out": "run", "--limit": 4}
    before = [arg for flag, value in given.items() if flag not in flags for arg in (flag, value)]
    assert command(*before, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and message in printed.err.splitlines()[-1]
    assert not printed.out or "--threshold" in flags  # for which the heads must be found first
    assert not (folder / "run").exists()
