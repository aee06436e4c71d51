"""The lens study against a hand recomputation on a shipped model, killed while it writes, and given bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import logit_lens as study
import numpy as np
import pytest
import torch
import yaml

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import folder as run_folder
from pyvene_ext.stats.intervals import Interval

N = 6


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the first shipped English prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "RESAMPLES", 100)
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:N]
    (tmp_path / "few.json").write_text(json.dumps(pairs), encoding="utf-8")
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def by_hand(position: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of tiny-qwen2.5: lens logits, rank of IO, every head's contribution to LD, and LD; one prompt at a time."""
    model, tokenizer = load_model("tiny-qwen2.5")
    config = model.config
    logits, ranks, heads, diffs = [], [], [], []
    for pair in json.loads(Path("few.json").read_text(encoding="utf-8")):
        ids = torch.tensor([tokenizer(pair["clean"])["input_ids"]])
        io, s = (tokenizer(" " + pair[n], add_special_tokens=False)["input_ids"][0] for n in ("io_name", "s_name"))
        token = {"last": -1, "s2": max(i for i, token in enumerate(ids[0]) if token == s)}[position]
        seen: list[torch.Tensor] = []
        last: list[torch.Tensor] = []
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1]))
            for layer in model.model.layers
        ]
        handles.append(model.model.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0][0])))
        output = model(ids, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        streams = [stream[0, token] for stream in output.hidden_states[:-1]] + [last[0][token]]
        lens = torch.stack([model.lm_head(model.model.norm(stream)) for stream in streams])
        logits.append(lens[:, [io, s]].numpy())
        ranks.append(1 + (lens > lens[:, [io]]).sum(-1).numpy())
        end = last[0][-1]
        rms = (end.square().mean() + config.rms_norm_eps).sqrt()
        direction = model.model.norm.weight / rms * (model.lm_head.weight[io] - model.lm_head.weight[s])
        heads.append(
            [
                [float(part @ weight.T @ direction) for part, weight in zip(z.split(width), rows, strict=True)]
                for z, layer in zip(seen, model.model.layers, strict=True)
                for width in [len(z) // config.num_attention_heads]
                for rows in [layer.self_attn.o_proj.weight.split(width, dim=1)]
            ]
        )
        diffs.append(float(output.logits[0, -1, io] - output.logits[0, -1, s]))
    return np.transpose(logits, (1, 2, 0)), np.transpose(ranks), np.transpose(heads, (1, 2, 0)), np.array(diffs)


@pytest.mark.parametrize("position", ["last", "s2"])
def test_arrays_and_tables_equal_a_hand_recomputation(folder: Path, position: str) -> None:
    logits, ranks, heads, diffs = by_hand(position)
    assert command("--dataset", "few.json", "--out", "x", "--batch_size", 4, "--position", position) == 0
    x = folder / "x"
    np.testing.assert_allclose(np.load(x / "lens_logits.npy"), logits, atol=1e-4)
    np.testing.assert_array_equal(np.load(x / "lens_rank.npy"), ranks)
    np.testing.assert_allclose(np.load(x / "logit_diff_heads.npy"), heads, atol=1e-4)
    np.testing.assert_allclose(np.load(x / "logit_diff_total.npy"), diffs, atol=1e-4)
    if position == "last":
        np.testing.assert_allclose(np.load(x / "logit_total.npy"), logits[-1, 0], atol=1e-4)

    depths = table(x / "depths.csv")
    assert [int(row["depth"]) for row in depths] == list(range(7))
    for row, of_answers, rank in zip(depths, logits, ranks, strict=True):
        assert float(row["logit_diff"]) == pytest.approx((of_answers[0] - of_answers[1]).mean(), abs=1e-4)
        assert float(row["rank"]) == pytest.approx(rank.mean())
        assert float(row["logit_diff_low"]) <= float(row["logit_diff"]) <= float(row["logit_diff_high"])
        assert float(row["io_over_s"]) == (of_answers[0] > of_answers[1]).mean()
        assert float(row["top"]) == (rank == 1).mean()
    rows = table(x / "heads.csv")
    assert len(rows) == heads[..., 0].size
    sizes = [abs(float(row["logit_diff"])) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    for row in rows:
        of_head = heads[int(row["layer"]), int(row["head"])]
        assert float(row["logit_diff"]) == pytest.approx(of_head.mean(), abs=1e-4)
        assert float(row["logit_diff_low"]) <= float(row["logit_diff"]) <= float(row["logit_diff_high"])
        assert float(row["positive"]) == (of_head > 0).mean()
    parts = {row["part"]: float(row["logit_diff"]) for row in table(x / "parts.csv")}
    assert parts.pop("total") == pytest.approx(diffs.mean(), abs=1e-4)
    assert sum(parts.values()) == pytest.approx(diffs.mean(), abs=1e-4)
    assert parts["heads of layer 4"] == pytest.approx(heads[4].sum(0).mean(), abs=1e-4)

    facts = json.loads((x / "summary.json").read_text(encoding="utf-8"))
    assert facts["clean_logit_diff"] == pytest.approx(diffs.mean(), abs=1e-4) and facts["n"] == N
    assert facts["from_heads"] == pytest.approx(heads.sum((0, 1)).mean(), abs=1e-3)
    total = sum(facts[f"from_{kind}"] for kind in ("heads", "mlps", "embedding", "biases"))
    assert total == pytest.approx(facts["logit_diff_before_cap"], abs=1e-4)


def test_the_control_splits_the_answers_of_other_prompts(folder: Path) -> None:
    model, tokenizer = load_model("tiny-gemma2")
    prompts = PromptSet.load("few.json").tokenize(tokenizer)
    others = study.with_answers_of_others(prompts, 5)
    assert sorted(others.answer_ids) == sorted(prompts.answer_ids) and others.input_ids == prompts.input_ids
    order = [prompts.answer_ids.index(answers) for answers in others.answer_ids]  # the six pairs of names differ
    assert len(set(prompts.answer_ids)) == N and all(donor != prompt for prompt, donor in enumerate(order))
    assert command("--model", "tiny-gemma2", "--dataset", "few.json", "--out", "x", "--seed", 5) == 0
    expected = direct_logit_attribution(model, others, progress=False).logit_diff
    np.testing.assert_allclose(np.load("x/control_heads.npy"), expected.heads, atol=1e-5)
    np.testing.assert_allclose(np.load("x/control_capped.npy"), expected.capped, atol=1e-4)
    rows = {(int(row["layer"]), int(row["head"])): float(row["control"]) for row in table(folder / "x/heads.csv")}
    assert all(rows[key] == pytest.approx(expected.heads[key].mean(), abs=1e-5) for key in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_what_is_written_and_that_its_config_repeats_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", "few.json", "--position", "s2") == 0
    out = folder / "outputs/logit_lens/tiny-qwen2.5_few"
    kinds = ("heads", "mlps", "embed", "bias", "total", "capped")
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "config.yaml", "summary.json", "depths.csv", "heads.csv", "parts.csv",
        "lens_logits.npy", "lens_probability.npy", "lens_rank.npy",
        *(f"{name}_{kind}.npy" for name in ("logit_diff", "logit", "control") for kind in kinds),
        *(f"figures/{name}.{ending}" for ending in ("png", "pdf")
          for name in ("lens_logit_diff", "lens_probability", "lens_rank", "heads_logit_diff", "heads_logit")),
    }  # fmt: skip
    facts = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert {"model", "revision", "n", "position", "dtype", "seed", "versions", "weight_hash", "prompts_hash"} <= set(
        facts
    )
    shown = capsys.readouterr().out
    assert "logit lens at s2" in shown and str(out.relative_to(folder)) in shown

    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    (folder / "again.yaml").write_text(yaml.safe_dump({**config, "out": "again"}), encoding="utf-8")
    assert command("--config", "again.yaml") == 0
    for path in out.glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(folder / "again" / path.name)), path.name
    for path in out.glob("*.csv"):
        assert path.read_text() == (folder / "again" / path.name).read_text()


def test_the_depth_from_which_the_answer_is_ahead_looks_back_from_the_last() -> None:
    def at(*lows: float) -> int | None:
        return study.depth_ahead([{"depth": depth, "logit_diff_low": low} for depth, low in enumerate(lows)])

    assert at(-1, 2, -1, 1, 3) == 3
    assert at(1, 2, 3) == 0
    assert at(1, 2, -3) is None
    assert at(1, 0, 3) == 2


def test_a_curve_shows_mean_and_interval() -> None:
    curve = Interval(np.array([1.0, 10.0, 3.0]), np.array([0.5, 8.0, 2.0]), np.array([2.0, 12.0, 4.0]))
    for scale in ("linear", "log"):
        figure = px.figures.depth_curve(curve, "a title " * 20, "rank", scale)
        figure.canvas.draw()
        (axes,) = figure.axes
        line = next(line for line in axes.lines if line.get_label() == "mean over prompts")
        np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [1, 10], [2, 3]])
        corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
        assert {(0, 0.5), (1, 12), (2, 2), (2, 4)} <= corners
        assert axes.get_yscale() == scale and axes.get_ylabel() == "rank" and "\n" in axes.get_title("left")
        assert not any("$" in label.get_text() for label in axes.get_yticklabels())


def test_a_run_that_stops_while_it_writes_leaves_no_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--dataset", "few.json", "--out", "x") == 0
    monkeypatch.setattr(run_folder, "write_config", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
    assert command("--dataset", "few.json", "--out", "x") == 2
    assert not (folder / "x/summary.json").exists()
    monkeypatch.setattr(run_folder, "write_config", write_config)
    assert command("--dataset", "few.json", "--out", "x") == 0
    assert (folder / "x/summary.json").exists()
    assert not [path for path in (folder / "x").rglob(".*")]


def test_only_the_main_process_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(px, "is_main_process", lambda: False)
    assert command("--dataset", "few.json", "--out", "x") == 0
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_size", 0], "--batch_size must be 1 or more, not 0."),
        (["--dataset", "ioi_enn"], "there is no prompt set 'ioi_enn'; did you mean 'ioi_en'?"),
        (["--position", "verb"], "prompt 0 has no position 'verb'; choose among"),
        (["--position", "all"], "--position all: the lens reads one position"),
        (
            ["--dataset", "one.json"],
            "one.json has one prompt; a mean with an interval over prompts needs at least two.",
        ),
        (["--out", "few.json/x"], "few.json is not a folder one may write in"),
        (["--model", "tiny-qwen3"], "tiny-qwen3"),
        (["--dataset", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str
) -> None:
    pairs = json.loads(Path("few.json").read_text(encoding="utf-8"))
    Path("one.json").write_text(json.dumps(pairs[:1]), encoding="utf-8")
    before = sorted(folder.rglob("*"))
    assert command("--dataset", "few.json", *flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before


def test_answers_that_are_no_names_are_called_right_and_wrong(
    tmp_path: Path, own_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--dataset", own_pairs, "--out", tmp_path / "f") == 0
    shown = capsys.readouterr().out
    assert "right above wrong on " in shown and "IO" not in shown
