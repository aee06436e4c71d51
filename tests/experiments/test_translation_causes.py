"""Translation heads found by attention cause translation; by-hand ablations; interruption and resumption; bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translation_causes as study

from modelcards import n_heads
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads import translation
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.models.loading import TINY_MODELS, load_model
from pyvene_ext.prompts.parallel import word_prompts
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.specs.path import PathPatch
from tests.saved_models import save_random_model

ROOT = Path(study.__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with some of the shipped sentences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "RESAMPLES", 100)
    lines = (PROMPTS / "en_fr.tsv").read_text(encoding="utf-8").splitlines()[:31]
    (tmp_path / "few.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


# -- shown by ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["en-fr", "fr-en"])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_heads_found_by_attention_are_crucial_for_translation_and_not_for_ioi(
    folder: Path, model: str, pair: str
) -> None:
    """By the study's defaults, but for the number of prompts: the same rule for every model."""
    flags = (
        "--out",
        "run",
        "--model",
        model,
        "--pair",
        pair,
        "--limit",
        20,
        "--kinds",
        "resample",
        "--minus",
        "source",
    )
    assert command(*flags, "--parts", "sets", "paths") == 0
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
    overlap = facts["overlap_with_heads"]["source_standard"]
    assert overlap["jaccard"] > 2 * overlap["chance"]
    spearman = facts["attention_and_loss"]["source"]
    assert spearman["r"] > 0.3 and spearman["low"] > 0
    rows = table(folder / "run/sets.csv")
    assert len(rows) == 41 and [row["set"] for row in rows] == ["found"] + 20 * ["same layers"] + 20 * ["any layer"]
    found = set(rows[0]["heads"].split())
    apart = {name: of["apart"] for name, of in facts["random_sets"].items()}
    for row in rows[1:]:
        heads = set(row["heads"].split())
        assert len(heads) == len(found) and heads != found
        assert not (apart[row["set"]] and heads & found)
        if row["set"] == "same layers":
            layers, wanted = (sorted(head.split(".")[0] for head in of) for of in (heads, found))
            assert layers == wanted
    assert len({row["heads"] for row in rows}) == 41


@pytest.mark.parametrize("pair", ["en-fr", "fr-en"])
def test_the_lens_shows_the_word_and_what_heads_look_at_is_its_source(folder: Path, pair: str) -> None:
    assert command("--out", "run", "--pair", pair, "--limit", 20, "--parts", "lens", "--words", 2) == 0
    facts = facts_in(folder / "run")
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


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_sets_and_paths_equal_plain_hooks_and_plain_paths(folder: Path) -> None:
    model = save_random_model("qwen2_5", folder / "model")
    flags = (
        "--model",
        "model",
        "--dataset",
        "few.tsv",
        "--out",
        "run",
        "--limit",
        6,
        "--words",
        1,
        "--heads",
        "1.2",
        "0.5",
        "1.0",
    )
    assert command(*flags, "--parts", "sets", "paths", "lens", "--kinds", "zero", "--other", "none") == 0
    tokenizer = load_model(str(folder / "model"))[1]
    pairs = study.load_pairs("few.tsv", ("en", "fr"))
    asked = word_prompts(tokenizer, pairs, ("en", "fr"), 1)
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

    plus = asked.plus.take(range(6))
    for what in ("source", "label"):
        minus = asked.minus[what].take(range(6))
        for variant in ("standard", "subspace") if what == "label" else ("standard",):
            senders = [
                PathPatch(sender=f"z.{head}", receivers=("logits",), positions="last", subspace=variant == "subspace")
                for head in ("0.3", "2.1")
            ]
            plain = patch(model, senders, plus, minus, "logit", engine="plain", progress=False)
            wanted = (plain.intervened - plain.clean).mean(1) / np.abs(plain.clean).mean()
            found = np.load(folder / f"run/{what}_{variant}.npy")
            np.testing.assert_allclose([found[0, 3], found[2, 1]], wanted, atol=1e-4)
    facts = facts_in(folder / "run")
    rows = table(folder / "run/paths.csv")
    for name, heads in facts["crucial"].items():
        large = {f"{row['layer']}.{row['head']}" for row in rows if abs(float(row[name])) > 0.01}
        assert set(heads) == large
    assert [row for row in rows if row["found"] == "True"].__len__() == 3

    with torch.no_grad():
        last = [model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in plus.input_ids]
    wanted = np.mean([p[own].item() for p, (own, _) in zip(last, plus.answer_ids, strict=True)])
    assert float(table(folder / "run/lens.csv")[-1]["target_probability"]) == pytest.approx(wanted, abs=1e-5)


def test_the_first_attempt_is_a_config(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Zero by plain hooks; what maximum and minimum put in place is tested with the package."""
    model = save_random_model("gpt2", folder / "model")
    flags = (
        "--config",
        ROOT / "translation_first_attempt.yaml",
        "--model",
        "model",
        "--dataset",
        "few.tsv",
        "--limit",
        4,
    )
    assert command(*flags, "--out", "run") == 0
    assert facts_in(folder / "run")["heads"] == []
    drops = {kind: np.load(folder / f"run/each_{kind}.npy") for kind in ("mean", "maximum", "minimum", "zero")}
    assert all(drop.shape == (3, n_heads(model.config)) for drop in drops.values())
    assert not np.allclose(drops["maximum"], drops["minimum"]) and not np.allclose(drops["mean"], drops["maximum"])
    asked = word_prompts(
        load_model(str(folder / "model"))[1], study.load_pairs("few.tsv", ("en", "fr")), ("en", "fr"), 0
    )

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


# -- runs --------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_model("llama3_1", folder / "model")
    flags = ("--model", "model", "--dataset", "few.tsv", "--limit", 4, "--words", 1, "--heads", "0.1")
    monkeypatch.setattr(translation, "AT_ONCE", 2)  # each variant is kept in two halves
    assert command(*flags, "--out", "whole") == 0
    sweep, patched_with, calls = study.sweep, translation.patch, []

    def swept(*args: Any, **options: Any) -> Any:
        calls.append(options["store"].name)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return sweep(*args, **options)

    def patched_once(*args: Any, **options: Any) -> Any:
        calls.append("patch")
        if calls.count("patch") == 6:
            raise KeyboardInterrupt  # in the second half of the third variant
        return patched_with(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(study, "sweep", swept)
        assert command(*flags, "--out", "run") == 130
    assert len(set(calls)) == 7 and len(list((folder / "run/unfinished").iterdir())) == 6
    assert not (folder / "run/summary.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(translation, "patch", patched_once)
        assert command(*flags, "--out", "run") == 130
        assert not (folder / "run/summary.json").exists()
        assert command(*flags, "--out", "run") == 0
        assert calls.count("patch") == 7  # only what was not done
    assert not (folder / "run/unfinished").exists()
    names = ("sets.csv", "sets_zero.npy", "sets_mean.npy", "sets_resample.npy", "paths.csv", "label_subspace.npy")
    for name in names:
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert command("--config", "run/config.yaml", "--out", "again") == 0
    assert all((folder / "again" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in names)
    assert not (folder / "again/unfinished").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pair", "fr"), "'fr' is not a pair of languages"),
        (("--limit", 3), "--limit must be 4 or more"),
        (("--n_random", 19), "--n_random must be 20 or more"),
        (("--words", 1, -1), "--words counts from 0, so that there is no -1"),
        (("--words", 1, 1), "--words names one or more, each once, not 1 1"),
        (("--words", 1, 30), "no two of 30 pairs can be swapped at word 30"),
        (("--crucial", 1), "--crucial must be above 0 and below 1"),
        (("--parts", "sets", "sets"), "--parts names one or more, each once"),
        (("--heads", "4.8"), "head 8 is out of range"),
        (("--heads", "x"), "'x' is no head"),
        (("--threshold", 0.9), "no head is above the threshold of 0.9"),
        (("--threshold", 0.05), "so that no random set of as many others is left"),
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
    given = {"--dataset": "few.tsv", "--out": "run", "--limit": 4, "--parts": "sets"}
    before = [arg for flag, value in given.items() if flag not in flags for arg in (flag, value)]
    assert command(*before, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and message in printed.err.splitlines()[-1]
    assert not printed.out
    assert not (folder / "run").exists()
