"""The path-patching study against paths patched by plain hooks, and given bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import path_patching as study
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

import pyvene_ext as px
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.patching.patch import all_paths, corresponding, patch
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import folder as run_folder
from pyvene_ext.runs.figures import patching
from pyvene_ext.specs.graph import Node
from tests.ground_truth.paths import every_path_by_hooks, path_patch_by_hooks, precedes, run_by_hooks, senders
from tests.ground_truth.paths import receivers as all_receivers
from tests.saved_models import save_random_model
from tests.tiers import first_only
from tests.tiny_random import FAMILIES

N, UNEQUAL = 4, 2  # pairs, and the one whose texts differ in length


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the first shipped English pairs, one with a corrupt text of another length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "RESAMPLES", 100)
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"]
    few = pairs[:N]
    words = len(few[UNEQUAL]["clean"].split())
    few[UNEQUAL]["corrupt"] = next(pair["corrupt"] for pair in pairs if len(pair["corrupt"].split()) != words)
    (tmp_path / "few.json").write_text(json.dumps(few), encoding="utf-8")
    equal = [pair for number, pair in enumerate(few) if number != UNEQUAL]
    (tmp_path / "equal.json").write_text(json.dumps(equal), encoding="utf-8")
    return tmp_path


def command(*flags: Any) -> int:
    return run_study(study.main, study.Config, [str(flag) for flag in flags])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def texts(folder: Path, name: str) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """Of every pair of a file the clean and the corrupt ids [1 pos], and the ids of IO and S."""
    _, tokenizer = load_model(folder)
    found = []
    for pair in json.loads(Path(name).read_text(encoding="utf-8")):
        io, s = (tokenizer(" " + pair[n], add_special_tokens=False)["input_ids"][0] for n in ("io_name", "s_name"))
        clean, corrupt = (torch.tensor([tokenizer(pair[text])["input_ids"]]) for text in ("clean", "corrupt"))
        found.append((clean, corrupt, io, s))
    return found


def patched_at(
    model: Any, sender: str, receivers: tuple[str, ...], clean: torch.Tensor, corrupt: torch.Tensor, token: int
) -> torch.Tensor:
    """`path_patch_by_hooks` with the sender patched at one token of either text, counted from the last; MLPs recomputed."""
    frozen = [name for name in senders(model) if name.startswith("z.")]
    _, of_base = run_by_hooks(model, clean, read=(*frozen, sender))
    _, of_source = run_by_hooks(model, corrupt, read=(sender,))
    new = of_base[sender].clone()
    new[:, token] = of_source[sender][:, token]
    _, recorded = run_by_hooks(model, clean, put={**of_base, sender: new}, read=receivers)
    return run_by_hooks(model, clean, put=recorded)[0]


def is_of(name: str, base: np.ndarray, source: np.ndarray, expected: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """The arrays and the table in a folder, found to be those of these paths; the rows of the table."""
    patched = np.array(list(expected.values()))
    np.testing.assert_allclose(np.load(f"{name}/base.npy"), base, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.load(f"{name}/source.npy"), source, atol=1e-5, rtol=1e-5)
    rows = table(Path(name, "paths.csv"))
    assert sorted(row["path"] for row in rows) == sorted(expected)
    order = [row["path"] for row in sorted(rows, key=lambda row: int(row["row"]))]
    np.testing.assert_allclose(np.load(f"{name}/patched.npy"), [expected[path] for path in order], atol=1e-5, rtol=1e-5)
    effects = {path: 100 * (at - base).mean() / base.mean() for path, at in expected.items()}
    scale = 100 / abs(base.mean())
    np.testing.assert_allclose(
        np.load(f"{name}/effects.npy").mean(1), [effects[path] for path in order], atol=2e-5 * scale, rtol=1e-4
    )
    assert np.abs(patched - base).max() > 1e-3, "some path matters"
    for row in rows:
        change = (expected[row["path"]] - base).mean()
        assert float(row["effect"]) == pytest.approx(effects[row["path"]], abs=2e-5 * scale, rel=1e-4)
        assert float(row["change"]) == pytest.approx(change, abs=1e-5)
        assert float(row["score"]) == pytest.approx(change / (source - base).mean(), abs=1e-3, rel=1e-3)
        assert float(row["low"]) <= float(row["high"])
    sizes = [abs(float(row["change"])) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    return rows


@pytest.mark.slow
def test_direct_terms_and_the_concept_direction_are_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "drawn", lambda *_: {})
    model = save_random_model("gemma2", folder / "model")
    flags = ["--model", "model", "--dataset", "few.json", "--positions", "last", "--receivers", "q.2.1"]
    for number, chosen in enumerate(([], ["--direct"], ["--direct", "--subspace"])):
        assert command(*flags, *chosen, "--out", f"x{number}") == 0
    plain, direct, along = (np.load(f"x{number}/patched.npy") for number in range(3))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    prompts = PromptSet.load("few.json")
    clean, corrupt = (prompts.tokenize(tokenizer, text) for text in ("clean", "corrupt"))
    both = corresponding(clean, corrupt, ["last"])[:2]
    for found, how in ((direct, {}), (along, {"subspace": True})):
        paths = all_paths(model.config, ("q.2.1",), positions="last", direct=True, **how)
        expected = patch(model, paths, *both, engine="plain", progress=False).intervened
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(plain - direct).max() > 1e-5 and np.abs(direct - along).max() > 1e-5


@pytest.mark.parametrize("freeze_mlps", first_only([False, True]))
@pytest.mark.parametrize("family", FAMILIES)
def test_effects_equal_paths_patched_by_hooks(
    family: str, freeze_mlps: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "drawn", lambda *_: {})
    model = save_random_model(family, folder / "model")
    receivers = ("q.1.2", "q.2.0", "v.2.0") if freeze_mlps else ("logits",)
    pairs = texts(folder / "model", "equal.json")

    def logit_diffs(of_pair: Any) -> np.ndarray:
        logits = [(of_pair(clean, corrupt)[0], io, s) for clean, corrupt, io, s in pairs]
        return np.array([float(row[io] - row[s]) for row, io, s in logits])

    base = logit_diffs(lambda clean, _: run_by_hooks(model, clean)[0])
    source = logit_diffs(lambda _, corrupt: run_by_hooks(model, corrupt)[0])
    end = "->" + "+".join(receivers) + (", MLPs frozen" if freeze_mlps else "")
    expected = {
        sender + end: logit_diffs(
            lambda clean, corrupt, sender=sender: path_patch_by_hooks(
                model, sender, receivers, clean, corrupt, freeze_mlps
            )
        )
        for sender in senders(model)
        if all(precedes(sender, receiver) for receiver in receivers)
    }
    flags = ["--receivers", *receivers, "--freeze_mlps"] if freeze_mlps else []
    assert command("--model", "model", "--dataset", "few.json", "--out", "x", "--batch_size", 2, *flags) == 0
    rows = is_of("x", base, source, expected)

    heads = np.load("x/heads.npy")
    effects = {row["sender"]: float(row["effect"]) for row in rows}
    for layer, head in np.ndindex(heads.shape):
        if freeze_mlps and layer > 0:
            assert np.isnan(heads[layer, head]), "a head of layer 1 tells q.1.2 nothing"
        else:
            assert heads[layer, head] == pytest.approx(effects.pop(f"z.{layer}.{head}"), rel=1e-5)
    assert {row["sender"] for row in table(folder / "x/others.csv")} == set(effects)
    facts = facts_in(folder / "x")
    assert facts["dropped"] == [UNEQUAL] and facts["n"] == N - 1 and facts["receivers"] == list(receivers)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_pairs_equal_every_path_patched_by_hooks(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "drawn", lambda *_: {})
    model = save_random_model(family, folder / "model")
    pairs = texts(folder / "model", "equal.json")[:2]
    found: dict[str, list[float]] = {}
    for clean, corrupt, io, s in pairs:
        for edge, logits in every_path_by_hooks(model, clean, corrupt, freeze_mlps=False).items():
            found.setdefault(edge, []).append(float(logits[0, io] - logits[0, s]))
    base, source = (
        np.array([float((row := run_by_hooks(model, pair[which])[0][0])[pair[2]] - row[pair[3]]) for pair in pairs])
        for which in (0, 1)
    )
    assert command("--model", "model", "--dataset", "equal.json", "--limit", 2, "--pairs", "--out", "x") == 0
    rows = is_of("x", base, source, {edge: np.array(values) for edge, values in found.items()})

    facts, matrix = facts_in(folder / "x"), np.load("x/matrix.npy")
    assert facts["senders"] == list(senders(model)) and sorted(facts["receivers"]) == sorted(all_receivers(model))
    effects = {row["path"]: float(row["effect"]) for row in rows}
    for row, sender in enumerate(facts["senders"]):
        for column, receiver in enumerate(facts["receivers"]):
            expected = effects.pop(f"{sender}->{receiver}", np.nan)
            np.testing.assert_allclose(matrix[row, column], expected, rtol=1e-5)
    assert not effects and not (folder / "x/heads.npy").exists()

    # Fewer receivers are columns of the same matrix, and another run leaves no matrix behind.
    few = ["k.1.0", "logits"]
    flags = ["--model", "model", "--dataset", "equal.json", "--limit", 2, "--out", "x"]
    assert command(*flags, "--pairs", "--receivers", *few) == 0
    columns = [facts["receivers"].index(receiver) for receiver in few]
    np.testing.assert_allclose(np.load("x/matrix.npy"), matrix[:, columns], rtol=1e-3, atol=1e-3)
    assert command(*flags) == 0
    assert not (folder / "x/matrix.npy").exists() and (folder / "x/heads.npy").exists()


@pytest.mark.slow
def test_a_sender_at_a_named_position_and_receivers_in_two_layers(folder: Path) -> None:
    """The corrupt text has no S: its token in the same place is S2's."""
    model = save_random_model("llama3_1", folder / "model")
    pairs, receivers = texts(folder / "model", "equal.json"), ("v.1.1", "k.2.2")

    def logit_diffs(of_pair: Any) -> np.ndarray:
        logits = [(of_pair(clean, corrupt, s)[0], io, s) for clean, corrupt, io, s in pairs]
        return np.array([float(row[io] - row[s]) for row, io, s in logits])

    def by_hooks(sender: str) -> np.ndarray:
        def of_pair(clean: torch.Tensor, corrupt: torch.Tensor, s: int) -> torch.Tensor:
            s2 = max(i for i, token in enumerate(clean[0]) if token == s) - clean.shape[1]
            return patched_at(model, sender, receivers, clean, corrupt, s2)

        return logit_diffs(of_pair)

    base = logit_diffs(lambda clean, _corrupt, _s: run_by_hooks(model, clean)[0])
    source = logit_diffs(lambda _clean, corrupt, _s: run_by_hooks(model, corrupt)[0])
    expected = {
        f"{sender}@s2->{'+'.join(receivers)}": by_hooks(sender)
        for sender in senders(model)
        if all(precedes(sender, receiver) for receiver in receivers)
    }
    flags = ["--receivers", *receivers[::-1], "--positions", "s2", "--dataset", "few.json", "--out", "x"]
    assert command("--model", "model", *flags) == 0
    is_of("x", base, source, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_what_is_written_and_that_its_config_repeats_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--dataset", "few.json", "--receivers", "q.2.0", "q.2.2", "--metric", "probability") == 0
    out = folder / "outputs/path_patching/tiny-qwen2.5_few"
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "config.yaml", "summary.json", "paths.csv", "others.csv", "patched.npy", "effects.npy", "base.npy", "source.npy",
        "heads.npy", "figures/heads.png", "figures/heads.pdf",
    }  # fmt: skip
    facts = facts_in(out)
    assert {"model", "revision", "n", "positions", "dtype", "seed", "versions", "weight_hash", "base_hash"} <= set(
        facts
    )
    assert 0 < facts["base_low"] <= facts["mean_base"] <= facts["base_high"] <= 1
    shown = capsys.readouterr().out
    assert "->q.2.0+q.2.2" in shown and "effect: mean change in % of the clean run's mean" in shown
    assert f"1 pair left out, whose texts differ in number of tokens: {UNEQUAL}" in shown
    assert str(out.relative_to(folder)) in shown
    with (out / "paths.csv").open(encoding="utf-8") as file:
        first, *others = csv.DictReader(file)
    (evidence,) = facts["evidence"]
    assert evidence["interval"] == [float(first[name]) for name in ("effect", "low", "high")]
    median = np.median([abs(float(row["effect"])) for row in others])
    assert evidence["effect"].startswith(first["path"]) and f"{median:.2g}%" in evidence["control"]

    assert command("--dataset", "few.json", "--receivers", "q.2.0", "--dry_run", "--out", "dry") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len(others) + 1} paths x ") and said.endswith(": under a minute\n")
    assert not (folder / "dry").exists()

    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    (folder / "again.yaml").write_text(yaml.safe_dump({**config, "out": "again"}), encoding="utf-8")
    assert command("--config", "again.yaml") == 0
    for path in out.glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(folder / "again" / path.name), equal_nan=True), path.name
    for path in out.glob("*.csv"):
        assert path.read_text() == (folder / "again" / path.name).read_text()


def test_a_run_that_stops_while_it_writes_leaves_no_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset", "equal.json", "--receivers", "mlp_in.0", "--out", "x"]
    assert command(*flags) == 0
    monkeypatch.setattr(run_folder, "write_config", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "x")))
    assert command(*flags) == 2
    assert not (folder / "x/summary.json").exists()
    monkeypatch.setattr(run_folder, "write_config", write_config)
    assert command(*flags) == 0
    assert (folder / "x/summary.json").exists()
    assert not [path for path in (folder / "x").rglob(".*")]


def test_only_the_main_process_prints_and_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(px, "is_main_process", lambda: False)
    assert command("--dataset", "equal.json", "--receivers", "mlp_in.0", "--out", "x") == 0
    assert "effect" not in capsys.readouterr().out
    assert [path.name for path in (folder / "x").iterdir()] == ["unfinished"]


def test_a_run_cut_short_has_no_summary_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset", "equal.json", "--receivers", "q.4.0", "--limit", 2]
    assert command(*flags, "--out", "whole") == 0
    assert not (folder / "whole/unfinished").exists()
    with monkeypatch.context() as broken:
        broken.setattr(run_folder, "write_npy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            study.main(study.Config(dataset="equal.json", receivers=("q.4.0",), limit=2, out=folder / "cut"))
    assert (folder / "cut/unfinished").exists() and not (folder / "cut/summary.json").exists()
    monkeypatch.setattr("pyvene_ext.engine.sweep.run.Executor", lambda *_: pytest.fail("run again"))
    assert command(*flags, "--out", "cut") == 0
    for name in ("patched", "base", "source"):
        assert (folder / f"cut/{name}.npy").read_bytes() == (folder / f"whole/{name}.npy").read_bytes()


def test_a_ratio_has_its_interval_and_nothing_to_divide_by_has_none() -> None:
    draw = np.random.default_rng(0)
    below = draw.normal(3, 2, 30)
    above = np.stack([0.3 * below, draw.normal(1, 1, 30)])
    found = px.stats.ratio_of_means(above, below, rng(0, "x"))
    np.testing.assert_allclose([found.mean[0], found.low[0], found.high[0]], 0.3)  # both means of the same draws
    assert found.low[1] < above[1].mean() / below.mean() < found.high[1]
    assert all(np.isnan(values).all() for values in px.stats.ratio_of_means(above, np.zeros(30), rng(0, "x")))


def test_the_figure_of_pairs_names_receivers_and_marks_what_is_no_path() -> None:
    senders_, receivers = [Node("embed"), Node("z", 0, 0), Node("z", 0, 1)], [Node("q", 0, 0), Node("logits")]
    matrix = np.array([[1.0, -3.0], [np.nan, 2.0], [np.nan, 0.5]])
    figure = px.figures.edge_matrix(matrix, senders_, receivers, "a title " * 20, "effect")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q.0.0", "logits"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embed", "z.0.0", "z.0.1"]
    assert axes.images[0].get_array().mask.tolist() == [[False, False], [True, False], [True, False]]
    low, high = axes.images[0].get_clim()
    assert low == -high and high == pytest.approx(np.quantile([1, 3, 2, 0.5], patching.CLIPPED))
    px.figures.edge_matrix(np.zeros((3, 2)), senders_, receivers, "nothing", "effect").canvas.draw()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch_size", 0], "--batch_size must be 1 or more, not 0."),
        (["--limit", "-1"], "--limit must be 0 or more, not -1."),
        (["--memory", -1], "--memory must be above 0, in GiB, not -1.0."),
        (["--receivers", "q.4.0", "q.4.0"], "--receivers names each once, not q.4.0 q.4.0."),
        (["--receivers", "q.4"], "there is no node 'q.4'"),
        (["--receivers", "z.4.0"], "z.4.0 is not a receiver; receivers are q, k, v"),
        (["--receivers", "embed", "--pairs"], "embed is not a receiver"),
        (["--direct", "--freeze_mlps"], "--direct passes no MLP anyway"),
        (["--receivers", "logits", "q.4.0"], "logits cannot be patched jointly with other receivers"),
        (["--receivers", "q.6.0"], "q.6.0: layer 6 is out of range, the model has layers 0 to 5."),
        (["--receivers", "k.4.7"], "k.4.7: head 7 is out of range; k counts K/V heads"),
        (["--dataset", "ioi_enn"], "there is no prompt set 'ioi_enn'; did you mean 'ioi_en'?"),
        (["--positions", "verb"], "--positions verb: pair 0 has no such position; choose among all, "),
        (["--dataset", "lone.json"], "prompt 0 of lone has no corrupt text"),
        (["--limit", 1], "few.json gives 1 pair; an interval over pairs needs two or more."),
        (["--dataset", "unequal.json"], "0 of 2 pairs of unequal.json can be patched at --positions all and 2 cannot"),
        (["--dataset", "unequal.json", "--positions", "s1"], "use --positions last, or texts of equal length."),
        (["--out", "few.json/x"], "few.json is not a folder one may write in"),
        (["--model", "tiny-qwen3"], "tiny-qwen3"),
        (["--dataset", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(px, "patch", None)
    pairs = json.loads(Path("few.json").read_text(encoding="utf-8"))
    Path("unequal.json").write_text(json.dumps([pairs[UNEQUAL]] * 2), encoding="utf-8")
    Path("lone.json").write_text(json.dumps([{**pairs[0], "corrupt": None}]), encoding="utf-8")
    before = sorted(folder.rglob("*"))
    assert command("--dataset", "few.json", *flags) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and captured.out == ""
    assert sorted(folder.rglob("*")) == before
