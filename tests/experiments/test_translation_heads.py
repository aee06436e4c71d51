"""The study of translation heads against a recomputation from text, its thresholds and published lists, and bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import translation_heads as study
import yaml
from scipy import stats

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.heads.published import KNOWN
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.parallel import TEMPLATE, filter_pairs, load_pairs, parse_languages, tokenize_pairs
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import read_views
from pyvene_ext.runs.translation import threshold_of
from tests.saved_models import save_random_model

N = 7  # sentences; an odd number, so that three go round in the control


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the first shipped sentences, and one that the filters drop."""
    monkeypatch.chdir(tmp_path)
    lines = (PROMPTS / "en_fr.tsv").read_text(encoding="utf-8").splitlines()[: N + 1]
    text = "\n".join([*lines, "the cat\tle chat"]) + "\n"
    (tmp_path / "few.tsv").write_text(text, encoding="utf-8")
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_hand(model: Any, tokenizer: Any, source: str, target: str, labels: tuple[str, str]) -> np.ndarray:
    """The score of all heads on one pair, from the text on."""
    ids = tokenizer(f"{labels[0]}: {source} {labels[1]}: {target}", return_tensors="pt")["input_ids"]
    label = len(tokenizer(f"{labels[0]}: {source}")["input_ids"])
    with torch.no_grad():
        patterns = model(ids, output_attentions=True).attentions
    crops = [pattern[0, :, label:, 1:label].numpy() for pattern in patterns]
    diagonals = [[crop.diagonal(offset, 1, 2).mean(-1) for offset in (0, 1, -1)] for crop in crops]
    return np.array(diagonals).mean(1)


@pytest.mark.usefixtures("drawn")
def test_the_study_equals_a_recomputation_from_the_text(folder: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_random_model("llama3_1", folder / "model")
    model.set_attn_implementation("eager")
    tokenizer = load_model(str(folder / "model"))[1]
    flags = ("--model", "model", "--dataset", "few.tsv", "--out", "run", "--threshold", 0.0, "--batch_size", 3)
    assert command(*flags) == 0
    pairs = [line.split("\t") for line in (folder / "few.tsv").read_text(encoding="utf-8").splitlines()[1 : N + 1]]
    found = json.loads((folder / "run/found.json").read_text(encoding="utf-8"))
    rows = table(folder / "run/heads.csv")
    facts = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    for pair, both in (("en-fr", pairs), ("fr-en", [(b, a) for a, b in pairs])):
        labels = tuple(pair.upper().split("-"))
        order = sorted(range(N), key=lambda i: len(tokenizer(both[i][1])["input_ids"]))
        giver = dict(zip(order, [order[i] for i in (1, 0, 3, 2, 5, 6, 4)], strict=True))
        wanted = np.stack([by_hand(model, tokenizer, *both[i], labels) for i in range(N)])
        control = [by_hand(model, tokenizer, both[i][0], both[giver[i]][1], labels) for i in range(N)]
        np.testing.assert_allclose(np.load(folder / f"run/{pair}_translation.npy"), wanted, atol=1e-6)
        np.testing.assert_allclose(np.load(folder / f"run/{pair}_control.npy"), control, atol=1e-6)
        difference = wanted.mean(0) - np.mean(control, 0)
        of_pair = [row for row in rows if row["pair"] == pair]
        assert len(of_pair) == difference.size
        for row in of_pair:
            at = int(row["layer"]), int(row["head"])
            assert float(row["difference"]) == pytest.approx(difference[at], abs=1e-6)
            each = (wanted - np.array(control))[:, *at]
            half = stats.t.ppf(0.975, N - 1) * each.std(ddof=1) / N**0.5
            assert float(row["difference_high"]) == pytest.approx(difference[at] + half, abs=1e-5)
            assert float(row["difference_low"]) == pytest.approx(difference[at] - half, abs=1e-5)
            assert (row["found"] == "True") == (difference[at] > 0)
        values = [float(row["difference"]) for row in of_pair]
        assert values == sorted(values, reverse=True)
        names = [f"{row['layer']}.{row['head']}" for row in of_pair if row["found"] == "True"]
        assert found[pair] == names == facts["pairs"][pair]["found"] and 0 < len(names) < len(of_pair)
        assert facts["pairs"][pair]["dropped"] == {"not 3 to 50 words": 1}
        assert (facts["pairs"][pair]["n_sentences"], facts["pairs"][pair]["skipped"]) == (N, 0)
        assert (folder / f"run/figures/{pair}.png").stat().st_size > 10_000
        page = (folder / f"run/figures/{pair}_attention.html").read_text(encoding="utf-8")
        assert all(f'"name":"{pair}, sentence {sentence}"' in page for sentence in range(3))
        assert re.search(rf'"first":\["{names[0]}"', page), "the strongest head is shown first"
    (overlap,) = table(folder / "run/overlaps.csv")
    a, b = map(set, found.values())
    assert float(overlap["jaccard"]) == pytest.approx(len(a & b) / len(a | b))
    shown = capsys.readouterr().out
    assert "en-fr: 7 sentences (dropped: not 3 to 50 words: 1)" in shown and "heads above 0 (given)" in shown
    assert shown.count("evidence: 7 sentences; ") == 2

    before = {path.name: path.read_bytes() for path in folder.glob("run/*") if path.suffix in (".npy", ".csv")}
    assert command("--config", "run/config.yaml", "--out", "again") == 0
    assert {name: (folder / "again" / name).read_bytes() for name in before} == before
    assert yaml.safe_load((folder / "run/config.yaml").read_text())["dataset"] == "few.tsv"


def test_chosen_heads_on_chosen_sentences_are_looked_at(folder: Path) -> None:
    flags = ("--dataset", "few.tsv", "--pairs", "en-fr", "--out", "run", "--show_heads", "4.5", "0.1")
    assert command(*flags, "--show_sentences", 6) == 0
    page = (folder / "run/figures/en-fr_attention.html").read_text(encoding="utf-8")
    assert "en-fr, sentence 6" in page and "sentence 0" not in page
    assert [(view.name, list(view.first)) for view in read_views(folder / "run/attention.json")] == [
        ("en-fr, sentence 6", [(4, 5), (0, 1)])
    ]
    assert not (folder / "run/overlaps.csv").exists()


@pytest.mark.parametrize(
    ("model", "flags", "pair", "threshold"),
    [
        ("Qwen/Qwen2.5-3B", {}, "en-fr", 0.075),
        ("Qwen/Qwen2.5-3B", {}, "ja-en", 0.05),
        ("google/gemma-2-2b", {}, "en-ja", 0.03),
        ("google/gemma-2-2b", {"thresholds": ("JA=0.02", "fr=0.5")}, "ja-fr", 0.02),
        ("google/gemma-2-2b", {"threshold": 0.1}, "en-ja", 0.1),
        ("google/gemma-2-2b", {"criterion": "translation"}, "en-ja", 0.13),
        ("some/model", {}, "en-ja", 0.05),
        ("tiny-gemma2", {}, "en-fr", 0.13),
        ("tiny-gemma2", {"criterion": "difference"}, "en-fr", 0.05),
    ],
)
def test_thresholds_are_the_published_ones_unless_told(model: str, flags: Any, pair: str, threshold: float) -> None:
    config = study.Config(model=model, **flags)
    assert threshold_of(parse_languages(pair), config) == threshold


def test_the_default_template_is_that_of_the_prompts() -> None:
    assert study.Config().template == TEMPLATE


def test_published_lists_are_those_of_the_literature() -> None:
    models = json.loads(KNOWN.read_text(encoding="utf-8"))["models"]
    qwen, gemma = models["Qwen2.5-3B"], models["gemma-2-2b"]
    assert qwen["heads"]["en-fr"] == ["20.1", "20.4", "20.6", "25.5", "26.12"]
    assert [len(heads) for heads in qwen["heads"].values()] == [5, 4, 2, 2, 7]
    assert [len(heads) for heads in gemma["heads"].values()] == [4, 8, 8, 6, 4]
    for known, layers, heads in ((qwen, 36, 16), (gemma, 26, 8)):
        places = {tuple(map(int, head.split("."))) for of in known["heads"].values() for head in of}
        assert all(0 <= layer < layers and 0 <= head < heads for layer, head in places)


@pytest.mark.slow
def test_check_known_prints_precision_and_recall(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("--dataset", "few.tsv", "--pairs", "en-fr", "--out", "run", "--threshold", 0.16) == 0
    found = json.loads((folder / "run/found.json").read_text(encoding="utf-8"))["en-fr"]
    known = {"models": {"tiny-gemma2": {"heads": {"en-fr": [*found[:2], "0.0", "5.4", "5.6"]}}}}
    (folder / "known.json").write_text(json.dumps(known), encoding="utf-8")
    flags = ("--dataset", "few.tsv", "--out", "run", "--threshold", 0.16, "--check_known", "--known", "known.json")
    assert command(*flags) == 0
    (row,) = table(folder / "run/known.csv")
    assert (row["pair"], float(row["precision"]), float(row["recall"])) == ("en-fr", 2 / len(found), 0.4)
    assert row["both"].split() == sorted(found[:2]) and row["only_published"].split() == ["0.0", "5.4", "5.6"]
    told = capsys.readouterr().out.split("against published heads")[1]
    assert "0.40" in told and told.splitlines()[2] == "no list is published for fr-en"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pairs", "en"), "--pairs: 'en' is not a pair of languages"),
        (("--pairs", "en-fr", "EN-FR"), "twice"),
        (("--limit", 1), "--limit must be 2 or more, or 0 for all, not 1"),
        (("--batch_size", 0), "--batch_size must be 1 or more"),
        (("--template", "{source_label}: {source} {target}"), "the template"),
        (("--thresholds", "fr"), "--thresholds fr: write a language and a number"),
        (("--threshold", 1.5), "makes no sense"),
        (
            ("--check_known",),
            "no list of heads is published for en-fr, fr-en of tiny-gemma2; there are only those of Qwen2.5-3B (en-fr",
        ),
        (("--show_heads", "9.1"), "--show_heads 9.1: tiny-gemma2 has layers 0 to 5, each with heads 0 to 7."),
        (("--show_heads", "4"), "--show_heads names heads as layer.head, such as 2.5, not '4'."),
        (("--show_sentences", 7), "en-fr has 7 sentences"),
        (("--show_sentences", -1), "--show_sentences must be 0 or more, not -1."),
        (("--pairs", "en-fr", "en-fr"), "--pairs names one or more, each once, not en-fr en-fr."),
        (("--known", "short.tsv"), "--known short.tsv is not JSON"),
        (("--pairs", "en-de"), "--pairs en-de: few.tsv, line 2 has no text in 'de'"),
        (("--dataset", "broken.tsv"), "broken.tsv, line 3 has 3 columns"),
        (("--dataset", "short.tsv"), "0 of 2 en-fr pairs of short.tsv pass the filters (not 3 to 50 words: 2)"),
        (("--dataset", "same.tsv"), "have the same translation"),
        (("--dataset", "unheard.tsv"), "does not know 'an', 'unheard'"),
        (("--dataset", "en_fx"), "did you mean 'en_fr'?"),
        (("--dataset", "none.tsv"), "no file none.tsv"),
        (("--model", "tiny-gemma"), "perhaps tiny-gemma2 is meant"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
) -> None:
    cat = "the cat sees the dog\tle chat voit le chien\n"
    (folder / "broken.tsv").write_text(f"en\tfr\n{cat}a\tb\tc\n", encoding="utf-8")
    (folder / "short.tsv").write_text("en\tfr\na\tb\nc\td\n", encoding="utf-8")
    (folder / "same.tsv").write_text(f"en\tfr\n{cat}{cat}{cat}{cat}", encoding="utf-8")
    (folder / "unheard.tsv").write_text(f"en\tfr\n{cat}an unheard dog\tle chien\n", encoding="utf-8")
    given = {"--dataset": "few.tsv", "--out": "run"}
    before = [arg for flag, value in given.items() if flag not in flags for arg in (flag, value)]
    assert command(*before, *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ") and message in printed.err.splitlines()[-1]
    assert not printed.out
    assert not (folder / "run").exists()


def test_a_failure_leaves_no_new_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "save", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            command("--dataset", "few.tsv", "--out", "run")
    assert not (folder / "run/summary.json").exists()


def test_the_shipped_sentences_are_known_to_the_shipped_models() -> None:
    pairs = load_pairs(PROMPTS / "en_fr.tsv", ("en", "fr"))
    tokenizer = load_model("tiny-gemma2")[1]
    kept, dropped = filter_pairs(pairs, tokenizer)
    assert len(kept) == 100 and not dropped
    assert len(tokenize_pairs(tokenizer, kept, ("en", "fr"))) == 100
