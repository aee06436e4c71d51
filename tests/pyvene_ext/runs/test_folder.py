"""The folder of a run: its place, the order of its files, and what it keeps and removes of earlier runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from pyvene_ext.io import cli
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import FILE, View
from pyvene_ext.runs.facts import Evidence
from pyvene_ext.runs.folder import RunFolder
from pyvene_ext.runs.plans import seconds_a_pass
from pyvene_ext.stats.intervals import Interval


@dataclass(frozen=True)
class Config:
    out: Path | None = None
    limit: int | None = 3
    dry_run: bool = False


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_named_by_what_is_run_unless_a_flag_names_it(here: Path) -> None:
    run = RunFolder(Config(), "lens", "Qwen/Qwen2.5-3B", "data/pairs.json")
    assert run.path == Path("outputs/lens/Qwen2.5-3B_pairs") and run.of == "Qwen2.5-3B, pairs"
    assert RunFolder(Config(), "lens", ".").path == Path("outputs/lens") / here.name
    assert RunFolder(Config(out=Path("x")), "lens", "a").path == Path("x") and not Path("x").exists()
    Path("taken").touch()
    with pytest.raises(
        ValueError, match=r"^--out taken/x cannot be written: .*taken is not a folder one may write in.$"
    ):
        RunFolder(Config(out=Path("taken/x")), "lens", "a")


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_says_where_what_is_finished_lies(begun: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def study(config: Config) -> None:
        folder = RunFolder(config, "lens", "a")
        if begun:
            folder.unfinished.mkdir(parents=True)
        raise KeyboardInterrupt

    assert cli.run(study, Config, []) == 130
    where = "nothing was finished that could be kept, and the same command starts from the beginning"
    if begun:
        where = "what is finished is in outputs/lens/a/unfinished, and the same command goes on from there"
    assert capsys.readouterr().err == f"interrupted; {where}\n"


def test_everything_is_written_and_the_summary_comes_last(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(Config(), "lens", "a")
    run.unfinished.mkdir(parents=True)
    (run.unfinished / "part").touch()
    with run.writing({"n": 1}, []):
        run.array("ranks", np.arange(3))
        run.table("tables/heads", [{"layer": 0, "score": float("nan")}])
        run.figure("map", figures.head_heatmap(np.eye(2), "a map", "score"))
        run.json("routes", [1, 2])
        run.views([View("prompt 0", ["a"], {0: np.full((2, 1, 1), 255, np.uint8)})])
        assert not {"summary.json", "config.yaml"} & files(run.path) and run.unfinished.exists()
    assert files(run.path) == {
        "ranks.npy", "tables/heads.csv", "figures/map.png", "figures/map.pdf", "routes.json", FILE, "config.yaml", "summary.json",
    }  # fmt: skip
    assert np.array_equal(np.load(run.path / "ranks.npy"), np.arange(3))
    assert (run.path / "tables/heads.csv").read_text() == "layer,score\n0,\n"
    question = (__doc__ or "").splitlines()[0]
    assert json.loads((run.path / "summary.json").read_text()) == {"question": question, "n": 1, "evidence": []}
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"limit": 3, "out": None, "dry_run": False}
    assert capsys.readouterr().out == f"\nwritten:\n  {run.path}/ (summary, config, arrays, tables, figures)\n"


def test_a_run_that_stops_while_it_writes_leaves_no_summary_and_keeps_what_is_unfinished(here: Path) -> None:
    run = RunFolder(Config(), "lens", "a")
    with run.writing({"n": 1}, []):
        run.array("ranks", np.arange(3))
    run.unfinished.mkdir()
    with pytest.raises(OSError, match="no space"), run.writing({"n": 2}, []):
        raise OSError("no space")
    assert "summary.json" not in files(run.path) and run.unfinished.exists()
    (run.path / ".ranks-abcdefgh.npy").touch()  # of a process that was killed
    with run.writing({"n": 2}, []):
        pass
    assert files(run.path) == {"ranks.npy", "config.yaml", "summary.json"} and not run.unfinished.exists()


def test_files_of_an_earlier_run_go_if_they_are_named_and_those_of_others_stay(here: Path) -> None:
    run = RunFolder(Config(), "lens", "a")
    with run.writing({}, []):
        run.array("z_io", np.arange(3))
        run.table("heads", [{"layer": 0}])
        run.views([View("prompt 0", ["a"], {0: np.full((2, 1, 1), 255, np.uint8)})])
    (run.path / "notes.txt").touch()
    with run.writing({}, [], replacing=("*.npy", "figures/*")):
        run.array("z_s1", np.arange(3))
        run.views([])
    assert files(run.path) == {"z_s1.npy", "heads.csv", "notes.txt", "config.yaml", "summary.json"}


def test_several_runs_may_share_a_folder(here: Path) -> None:
    for name in ("zero", "mean"):
        run = RunFolder(Config(), "lag", "a", summary=f"{name}.json", config_file=f"{name}.yaml")
        with run.writing({"mode": name}, []):
            run.array(name, np.arange(3))
    assert files(run.path) == {f"{name}{ending}" for name in ("zero", "mean") for ending in (".json", ".yaml", ".npy")}


def test_files_beside_the_folder_go_first_and_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside, summary = Path("f.npy"), here / "f.json"
    run = RunFolder(Config(out=beside), "lens", "a", path=Path("f"), summary=summary, beside=(beside,))
    for n in range(2):
        with run.writing({"n": n}, []):
            assert not beside.exists() and not summary.exists()
            beside.touch()
            Path(".f-abcdefgh.npy").touch()  # of a process that was killed
    assert files(here) == {"f.npy", "f.json", "f/config.yaml"}
    assert capsys.readouterr().out.endswith("\nwritten:\n  f.npy\n  f/ (summary, config)\n")


def test_the_plan_is_said_and_a_dry_run_ends_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert RunFolder(Config(limit=None), "lens", "a").announce("3 patches x 4 prompts", 30.0, n=4)
    assert not RunFolder(Config(dry_run=True), "lens", "a").announce("9 patches", 430.0, n=4)
    assert not RunFolder(Config(limit=None, dry_run=True), "lens", "a").announce("9 patches", 7000.0, n=100)
    *said, advice = capsys.readouterr().out.splitlines()
    assert said == ["3 patches x 4 prompts: under a minute", "9 patches: about 7 minutes", "9 patches: about 2 hours"]
    assert advice.startswith("without --dry_run this stops: all 100 take") and "--limit 8 takes" in advice


def test_a_run_of_more_than_ten_minutes_starts_only_if_its_size_was_given() -> None:
    message = "^all 100 take about 2 hours here and nothing has been run: --limit 8 takes about 10 minutes, and --limit 100 runs"
    with pytest.raises(ValueError, match=message):
        RunFolder(Config(limit=None), "lens", "a").announce("much", 7000.0, n=100)
    with pytest.raises(ValueError, match=r"nothing has been run: --limit 2 runs them all\.$"):
        RunFolder(Config(limit=None), "lens", "a").announce("much", 7000.0, n=2)
    assert RunFolder(Config(limit=100), "lens", "a").announce("much", 7000.0, n=100)


def test_the_evidence_ends_a_study_and_is_in_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(Config(), "lens", "a")
    shown = Evidence("9 prompts", "2.1 adds", Interval(1.23456, 0.5, 2.0), "none", "a larger --limit")
    unsure = Evidence("9 prompts", "2.2 adds", Interval(0.1, -0.5, 0.7), "none", "a larger --limit")
    with run.writing({"n": 9}, [shown, unsure, Evidence("9 prompts", "no head", None, "none", "--tau")]):
        pass
    assert capsys.readouterr().out.splitlines()[:4] == [
        "",
        "evidence: 9 prompts; 2.1 adds 1.23 [0.5, 2]; control: none; to sharpen it: a larger --limit",
        "evidence: 9 prompts; 2.2 adds 0.1 [-0.5, 0.7], not told apart from 0; control: none; to sharpen it: a larger --limit",
        "evidence: 9 prompts; no head; control: none; to sharpen it: --tau",
    ]
    alone = Evidence("1 prompt", "2.3 adds", Interval(0.3, np.nan, np.nan), "none", "a larger --limit")
    assert "2.3 adds 0.3, without an interval, which proves nothing; control" in str(alone)
    assert alone.facts["interval"] == [0.3, None, None]
    first, second, third = json.loads((run.path / "summary.json").read_text())["evidence"]
    assert first["interval"] == [1.23456, 0.5, 2.0] and second["interval"][2] == 0.7 and third["interval"] is None


def test_a_timed_pass_leaves_the_model_as_it_was() -> None:
    model, tokenizer = load_model("tiny-qwen2.5")
    prompts = PromptSet.load("ioi_en")[:20].tokenize(tokenizer)
    model.train()
    assert seconds_a_pass(model, prompts) > 0 and model.training
