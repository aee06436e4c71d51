"""The study of head scores against the definition on a shipped model, stopped while it writes, and given bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import induction_scores as study
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.models.loading import TINY_FOLDER, load_model
from pyvene_ext.runs import folder as run_folder
from tests.pyvene_ext.tokenizers_for_tests import word_tokenizer
from tests.tiers import first_only
from tests.tiny_random import random_model

KINDS = ("induction", "previous_token", "duplicate_token", "copying")
SMALL = ("--length", 6, "--repeats", 3, "--examples", 4, "--seeds", 0, 7)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save_model(name: str) -> None:
    """A random Mistral with sliding windows of 4, whose tokenizer knows 30 words and no start token."""
    random_model("mistral").save_pretrained(name)
    tokenizer = word_tokenizer([" ".join(f"w{i}" for i in range(30))])
    tokenizer.bos_token = None
    tokenizer.save_pretrained(name)


def scored(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Filled with the sequences that the study scores."""
    seen: list[torch.Tensor] = []
    own = px.methods.attention_scores

    def watched(model: Any, ids: torch.Tensor, **options: Any) -> Any:
        seen.append(ids)
        return own(model, ids, **options)

    monkeypatch.setattr(px.methods, "attention_scores", watched)
    return seen


@pytest.mark.parametrize("bos", first_only(["auto", "no"]))
@pytest.mark.usefixtures("drawn")
def test_files_hold_the_scores_by_definition(folder: Path, monkeypatch: pytest.MonkeyPatch, bos: str) -> None:
    seen = scored(monkeypatch)
    assert command(*SMALL, "--output_dir", "x", "--batch_size", 3, "--bos", bos) == 0
    x, config = folder / "x", AutoConfig.from_pretrained(TINY_FOLDER / "tiny-llama3.1")
    first = int(bos == "auto")
    model, _ = load_model("tiny-llama3.1", attn_implementation="eager")
    for ids, ending in zip(seen, ("sequences", "control"), strict=True):
        assert ids.shape == (8, first + 18) and (ids[:, :first] == 1).all()
        assert (ids[0] != ids[4]).any() and all(len(set(row)) == len(set(ids[0].tolist())) for row in ids.tolist())
        with torch.no_grad():
            patterns = torch.stack(model(ids, output_attentions=True).attentions, 1).numpy()
        for kind, start, back in (("induction", 6, 5), ("duplicate_token", 6, 6), ("previous_token", 1, 1)):
            at = range(first + start, first + 18)
            wanted = np.mean([patterns[:, :, :, i, i - back] for i in at], axis=0)
            if ending == "sequences":
                found = np.load(x / f"{kind}_sequences.npy")
                assert found.shape == (2, 4, 4, 8)
                np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-5)
            else:
                np.testing.assert_allclose(np.load(x / f"{kind}_control.npy"), wanted.mean(0), atol=1e-5)
    assert len(set(seen[0][0].tolist())) == first + 6 and len(set(seen[1][0].tolist())) == first + 18

    rows = table(x / "heads.csv")
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == list(np.ndindex(4, 8))
    for kind in KINDS:
        sequences = np.load(x / f"{kind}_sequences.npy").reshape(8, 4, 8)
        mean, se = np.load(x / f"{kind}.npy"), np.load(x / f"{kind}_se.npy")
        np.testing.assert_allclose(mean, sequences.mean(0), atol=1e-12)
        np.testing.assert_allclose(se, np.std(sequences, axis=0, ddof=1) / 8**0.5, atol=1e-12)
        found = read_head_scores(x / f"{kind}_scores.csv", config)
        assert [row[0] for row in found] == sorted(mean.ravel().tolist(), reverse=True)
        assert all(mean[layer, head] == score for score, layer, head in found) and len(found) == mean.size
        assert [float(row[kind]) for row in rows] == mean.ravel().tolist()
        assert [float(row[f"{kind}_se"]) for row in rows] == se.ravel().tolist()
        if kind != "copying":
            control = np.load(x / f"{kind}_control.npy")
            assert [float(row[f"{kind}_control"]) for row in rows] == control.ravel().tolist()
        assert (x / f"figures/{kind}.png").stat().st_size > 5000
    assert not (x / "copying_control.npy").exists()


def test_the_terminal_and_the_summary_name_the_heads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SMALL) == 0
    x = folder / "outputs/induction_scores/tiny-llama3.1"
    facts = json.loads((x / "summary.json").read_text(encoding="utf-8"))
    assert facts["model"] == "tiny-llama3.1" and facts["n_sequences"] == 8 and facts["bos"] == [1]
    assert facts["usable_tokens"] == 399 and len(facts["weight_hash"]) == 32 and "command" in facts
    shown = capsys.readouterr().out
    assert "tiny-llama3.1: 8 sequences of 6 random tokens x 3, with a start token, 399 tokens to draw from" in shown
    heads = table(x / "heads.csv")
    for kind in KINDS:
        top = sorted(heads, key=lambda row: -float(row[kind]))[: study.SHOWN]
        assert facts["top"][kind] == [f"{row['layer']}.{row['head']}" for row in top]
        section = shown[shown.index(f"\n{kind.replace('_', ' ')} (mean over heads") :].splitlines()[3:8]
        assert [line.split()[0] for line in section] == facts["top"][kind]
        assert [line.split()[1] for line in section] == [f"{float(row[kind]):.3f}" for row in top]
        beside = [2 / 6 - 1 if kind == "copying" else float(row[f"{kind}_control"]) for row in top]
        assert [line.split()[3] for line in section] == [f"{value:.3f}" for value in beside]
    # Copying: chance is a share of one in six; how many heads lie above it.
    assert facts["copying_chance"] == 2 / 6 - 1
    sequences = np.load(x / "copying_sequences.npy").reshape(8, -1)
    clearly = (sequences.min(0) > facts["copying_chance"]).sum(), (sequences.mean(0) > facts["copying_chance"]).sum()
    said = re.search(r"copying \(mean over heads .*; (\d+) of 32 heads above chance\)", shown)
    assert said and 0 < clearly[0] <= int(said[1]) <= clearly[1] < 32
    for kind in ("induction", "copying"):
        best = facts["top"][kind][0]
        row = next(row for row in heads if f"{row['layer']}.{row['head']}" == best)
        line = f"evidence: 8 sequences; {best}, the highest of 32 heads, has the {kind} score {float(row[kind]):.3g} ["
        assert line in shown
    assert "control: chance, -0.667" in shown and "at the same distance, nothing repeated" in shown


def test_a_head_that_copies_nothing_in_particular_has_the_copying_score_of_chance() -> None:
    """Random OV circuits: the share of the own token in what is raised is one in s, the score 2 / s - 1."""
    model = random_model("llama3_1")
    tokens, s = np.arange(10, 40), 5
    ids = px.methods.random_tokens(tokens, s, 2, examples=200, rng=np.random.default_rng(0))
    for layer in model.model.layers:  # values that have nothing to do with the token that they are at
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
        layer.self_attn.v_proj.bias = torch.nn.Parameter(torch.randn(layer.self_attn.v_proj.out_features))
    scores = px.methods.attention_scores(model, ids, s, copying=True, progress=False).copying
    assert np.abs(scores.mean() - (2 / s - 1)) < 0.02


def test_a_dry_run_says_how_long_it_takes_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px.methods, "attention_scores", None)
    assert command(*SMALL, "--dry_run", "--output_dir", "x") == 0
    assert "8 sequences of 19 tokens, and as many for the control: under a minute" in capsys.readouterr().out
    monkeypatch.setattr(px.runs, "seconds_a_pass", lambda *_: 1e4)
    assert command("--output_dir", "x") == 2
    error = capsys.readouterr().err
    assert "nothing has been run: --examples 8 runs 8 all the same, and --examples 10 takes all" in error
    assert not (folder / "x").exists()


@pytest.mark.slow
def test_the_config_repeats_the_run_and_seeds_matter(folder: Path) -> None:
    assert command(*SMALL, "--output_dir", "x", "--trim", 0.2, "--occurrences", "all") == 0
    config = yaml.safe_load((folder / "x/config.yaml").read_text())
    assert config["seeds"] == [0, 7] and config["trim"] == 0.2
    assert json.loads((folder / "x/summary.json").read_text())["usable_tokens"] == 399 - 2 * 79
    assert command("--config", "x/config.yaml", "--output_dir", "again") == 0
    assert command("--config", "x/config.yaml", "--output_dir", "other", "--seeds", 7, 1) == 0
    assert command("--config", "x/config.yaml", "--output_dir", "last", "--occurrences", "last") == 0
    for kind in KINDS:
        x, again, other, last = (
            np.load(folder / f"{run}/{kind}_sequences.npy") for run in ("x", "again", "other", "last")
        )
        np.testing.assert_array_equal(x, again)
        np.testing.assert_allclose(x[1], other[0], atol=1e-6)  # a seed's sequences do not depend on the other seeds
        assert np.abs(x[0] - x[1]).max() > 1e-3
        assert (np.abs(x - last).max() > 0.01) == (kind in ("induction", "duplicate_token"))


def test_a_local_folder_without_start_token_and_without_copying(folder: Path) -> None:
    save_model("mine")
    assert command(*SMALL, "--model_name", "mine", "--no-copying", "--output_dir", "x") == 0
    assert json.loads((folder / "x/summary.json").read_text())["usable_tokens"] == 30
    assert json.loads((folder / "x/summary.json").read_text())["bos"] == []
    assert (np.load(folder / "x/induction.npy") == 0).all()  # 5 tokens back is outside of the windows
    assert (np.load(folder / "x/previous_token.npy") > 0).all()
    assert not list((folder / "x").rglob("copying*")) and "copying" not in (folder / "x/heads.csv").read_text()


def test_a_run_that_stops_while_it_writes_leaves_no_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(*SMALL, "--output_dir", "x") == 0
    monkeypatch.setattr(run_folder, "write_config", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
    assert command(*SMALL, "--output_dir", "x") == 2
    assert not (folder / "x/summary.json").exists()
    monkeypatch.setattr(run_folder, "write_config", write_config)
    assert command(*SMALL, "--output_dir", "x") == 0
    assert (folder / "x/summary.json").exists() and not list((folder / "x").rglob(".*"))


def test_only_the_main_process_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(px, "is_main_process", lambda: False)
    assert command(*SMALL, "--output_dir", "x") == 0
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--length", 1], "--length must be 2 or more, not 1."),
        (["--repeats", 1], "--repeats must be 2 or more, not 1."),
        (["--examples", 0], "--examples must be 1 or more, not 0."),
        (["--batch_size", 0], "--batch_size must be 1 or more, not 0."),
        (["--seeds", 1, 1], "--seeds names one or more, each once, not 1 1."),
        (["--seeds", -1], "--seeds must be 0 or more, not -1."),
        (["--seeds"], "--seeds names one or more, each once, not nothing."),
        (["--seeds", 3, "--examples", 1], "one sequence has no standard error"),
        (["--trim", 0.5], "trim must be at least 0 and below 0.5"),
        (["--length", 100, "--repeats", 3], "the sequences are 301 tokens long but the model has 256 positions"),
        (["--length", 100, "--repeats", 4], "400 distinct random tokens are needed but only 399 are usable"),
        (["--model_name", "tiny-llama4"], "tiny-llama4"),
        (["--output_dir", "file/x"], "--output_dir file/x cannot be written"),
        (["--model_name", "mine", "--bos", "yes"], "the tokenizer of mine has no start token; leave out --bos yes."),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str
) -> None:
    Path("file").write_text("x")
    if "mine" in flags:
        save_model("mine")
    before = sorted(folder.rglob("*"))
    assert command(*flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before
