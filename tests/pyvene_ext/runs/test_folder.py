"""The folder of a run: its place, the order of its files, and what it keeps and removes of earlier runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from pyvene_ext.io import cli
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import FILE, View
from pyvene_ext.runs.folder import RunFolder


@dataclass(frozen=True)
class Config:
    out: Path | None = None
    limit: int = 3


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
    where = (
        "; what is finished is in outputs/lens/a/unfinished, and the same command goes on from there" if begun else ""
    )
    assert capsys.readouterr().err == f"interrupted{where}\n"


def test_everything_is_written_and_the_summary_comes_last(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(Config(), "lens", "a")
    run.unfinished.mkdir(parents=True)
    (run.unfinished / "part").touch()
    with run.writing({"n": 1}):
        run.array("ranks", np.arange(3))
        run.table("tables/heads", [{"layer": 0, "score": float("nan")}])
        run.figure("map", figures.head_heatmap(np.eye(2), "a map", "score"))
        run.json("routes", [1, 2])
        run.views([View("prompt 0", ["a"], {"0.1": np.ones((1, 1))})])
        assert not {"summary.json", "config.yaml"} & files(run.path) and run.unfinished.exists()
    assert files(run.path) == {
        "ranks.npy", "tables/heads.csv", "figures/map.png", "figures/map.pdf", "routes.json", FILE, "config.yaml", "summary.json",
    }  # fmt: skip
    assert np.array_equal(np.load(run.path / "ranks.npy"), np.arange(3))
    assert (run.path / "tables/heads.csv").read_text() == "layer,score\n0,\n"
    assert json.loads((run.path / "summary.json").read_text()) == {"n": 1}
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"limit": 3, "out": None}
    assert capsys.readouterr().out == f"\nwritten:\n  {run.path}/ (summary, config, arrays, tables, figures)\n"


def test_a_run_that_stops_while_it_writes_leaves_no_summary_and_keeps_what_is_unfinished(here: Path) -> None:
    run = RunFolder(Config(), "lens", "a")
    with run.writing({"n": 1}):
        run.array("ranks", np.arange(3))
    run.unfinished.mkdir()
    with pytest.raises(OSError, match="no space"), run.writing({"n": 2}):
        raise OSError("no space")
    assert "summary.json" not in files(run.path) and run.unfinished.exists()
    (run.path / ".ranks-abcdefgh.npy").touch()  # of a process that was killed
    with run.writing({"n": 2}):
        pass
    assert files(run.path) == {"ranks.npy", "config.yaml", "summary.json"} and not run.unfinished.exists()


def test_files_of_an_earlier_run_go_if_they_are_named_and_those_of_others_stay(here: Path) -> None:
    run = RunFolder(Config(), "lens", "a")
    with run.writing({}):
        run.array("z_io", np.arange(3))
        run.table("heads", [{"layer": 0}])
        run.views([View("prompt 0", ["a"], {"0.1": np.ones((1, 1))})])
    (run.path / "notes.txt").touch()
    with run.writing({}, replacing=("*.npy", "figures/*")):
        run.array("z_s1", np.arange(3))
        run.views([])
    assert files(run.path) == {"z_s1.npy", "heads.csv", "notes.txt", "config.yaml", "summary.json"}


def test_several_runs_may_share_a_folder(here: Path) -> None:
    for name in ("zero", "mean"):
        run = RunFolder(Config(), "lag", "a", summary=f"{name}.json", config_file=f"{name}.yaml")
        with run.writing({"mode": name}):
            run.array(name, np.arange(3))
    assert files(run.path) == {f"{name}{ending}" for name in ("zero", "mean") for ending in (".json", ".yaml", ".npy")}


def test_files_beside_the_folder_go_first_and_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside, summary = Path("f.npy"), here / "f.json"
    run = RunFolder(Config(out=beside), "lens", "a", path=Path("f"), summary=summary, beside=(beside,))
    for n in range(2):
        with run.writing({"n": n}):
            assert not beside.exists() and not summary.exists()
            beside.touch()
            Path(".f-abcdefgh.npy").touch()  # of a process that was killed
    assert files(here) == {"f.npy", "f.json", "f/config.yaml"}
    assert capsys.readouterr().out.endswith("\nwritten:\n  f.npy\n  f/ (summary, config)\n")
