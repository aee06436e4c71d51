"""The folder of a run: its place, the order of its files, and what it keeps and removes of earlier runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

import pyvene_ext as px
from pyvene_ext.io import cli
from pyvene_ext.io.cli import TooLong, run_shortened
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import FILE, View
from pyvene_ext.runs.facts import Evidence
from pyvene_ext.runs.folder import RunFolder
from pyvene_ext.runs.plans import seconds_a_pass, that_fit
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


@pytest.mark.parametrize("finished", [(), ("manifest.json", "lock"), ("manifest.json", "a/waves/000000.npz")])
def test_ctrl_c_says_where_what_is_finished_lies(finished: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    def study(config: Config) -> None:
        folder = RunFolder(config, "lens", "a").unfinished
        for name in finished:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        raise KeyboardInterrupt

    assert cli.run(study, Config, []) == 130
    where = "nothing was finished that could be kept, and the same command starts from the beginning"
    if "a/waves/000000.npz" in finished:
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


def test_an_undefined_number_is_null_and_does_not_lose_the_summary() -> None:
    run = RunFolder(Config(out=Path("x")), "lens")
    with run.writing({"shared": [{"p": float("nan"), "n": 2}], "top": (np.float64("inf"), 1.5)}, []):
        pass
    summary = json.loads(Path("x/summary.json").read_text())
    assert summary["shared"] == [{"p": None, "n": 2}] and summary["top"] == [None, 1.5]


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
    run = RunFolder(Config(out=beside), "lens", "a", path=Path("f"), summary=summary, beside={"out": beside})
    for n in range(2):
        with run.writing({"n": n}, []):
            assert not beside.exists() and not summary.exists()
            beside.touch()
            Path(".f-abcdefgh.npy").touch()  # of a process that was killed
    assert files(here) == {"f.npy", "f.json", "f/config.yaml"}
    assert capsys.readouterr().out.endswith("\nwritten:\n  f.npy\n  f/ (summary, config)\n")


@dataclass(frozen=True)
class Reads(Config):
    problems: str = "x/problems.json"
    rankings: tuple[str, ...] = ()
    settings: Path | None = None


def test_a_file_that_the_run_reads_is_not_overwritten() -> None:
    Path("x/heads").mkdir(parents=True)
    for name in ("x/problems.json", "x/a.csv", "x/config.yaml", "x/heads/a.csv", "x/problems.jsonl"):
        Path(name).touch()
    inside = "^x/problems.json, which --problems reads, lies in the folder x, whose files are replaced; nothing was run: give "
    with pytest.raises(ValueError, match=inside + "another --out.$"):
        RunFolder(Reads(out=Path("x")), "lens", "a")
    with pytest.raises(ValueError, match=r"^x/a.csv, which --rankings reads"):
        RunFolder(Reads(out=Path("x/../x"), problems="tiny", rankings=("tiny", "x/a.csv")), "lens", "a")
    with pytest.raises(ValueError, match=r"^x/config.yaml is what --settings reads, and would be overwritten"):
        RunFolder(Reads(out=Path("x"), problems="tiny", settings=Path("x/config.yaml")), "lens", "a")
    # What the run leaves alone: a deeper folder, files of kinds that no study writes, and another folder.
    RunFolder(Reads(out=Path("x"), problems="x/problems.jsonl", rankings=("x/heads/a.csv",)), "lens", "a")
    RunFolder(Reads(out=Path("y"), problems="x" * 5000), "lens", "a")


def test_the_plan_is_said_and_a_dry_run_ends_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert RunFolder(Config(limit=None), "lens", "a").announce("3 patches x 4 prompts", 30.0, n=4)
    assert not RunFolder(Config(dry_run=True), "lens", "a").announce("9 patches", 430.0, n=4)
    assert capsys.readouterr().out.splitlines() == [
        "3 patches x 4 prompts: under a minute",
        "9 patches: about 7 minutes",
    ]


@dataclass(frozen=True)
class Study(px.flags.Prompts):
    out: Path | None = None
    limit: px.flags.Limit = None
    site: str = "z"
    examples: int | None = None
    dry_run: bool = False


def main(config: Study, seconds: float = 45.0, n: int = 100, stop: bool = False, limit: str = "limit") -> int | None:
    """A study that takes so many seconds a prompt, and may be stopped; how many prompts it was about to run."""
    size = getattr(config, limit) or n
    run = RunFolder(config, "lens", "a")
    if not run.announce(f"{size} prompts", size * seconds, n=size, limit=limit):
        return None
    if stop:
        raise KeyboardInterrupt
    with run.writing({"n": size}, []):
        pass
    return size


def test_a_run_of_more_than_ten_minutes_takes_fewer_prompts_and_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_shortened(main, Study()) == 12  # 13 would fit
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [
        "100 prompts: about 75 minutes",
        "to keep within ten minutes 12 of 100 are taken; --limit 0 takes all",
        "12 prompts: about 9 minutes",
    ]
    assert "shortened: 12 of 100, as --limit was not given" in shown
    assert files(here / "outputs/lens/a") == {"summary.json", "config.yaml"}
    assert yaml.safe_load((here / "outputs/lens/a/config.yaml").read_text())["limit"] == 12
    size = json.loads((here / "outputs/lens/a/summary.json").read_text())["shortened"]
    assert size == {"flag": "limit", "value": 12, "of": 100}
    # The same flags with the number given are that run, and say no more of it.
    assert run_shortened(main, Study(limit=12)) == 12 and "of 100" not in capsys.readouterr().out
    assert "shortened" not in json.loads((here / "outputs/lens/a/summary.json").read_text())
    assert run_shortened(main, Study(limit=0)) == 100
    assert run_shortened(partial(main, seconds=6.0), Study()) == 100
    capsys.readouterr()
    assert run_shortened(partial(main, limit="examples"), Study()) == 12
    assert "--examples 100 takes all" in capsys.readouterr().out


def test_an_interrupted_run_that_was_shortened_goes_on_with_as_many(here: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_shortened(partial(main, stop=True), Study())
    assert files(here / "outputs/lens/a") == {"shortened.json"}
    assert run_shortened(partial(main, seconds=30.0), Study(site="q")) == 20  # another run
    for seconds in (60.0, 1.0):  # the machine is busier, or idle
        with pytest.raises(KeyboardInterrupt):
            run_shortened(partial(main, stop=True), Study())
        assert run_shortened(partial(main, seconds=seconds), Study()) == 12
        assert files(here / "outputs/lens/a") == {"summary.json", "config.yaml"}
    (here / "outputs/lens/a/shortened.json").write_text("[]")  # damaged
    assert run_shortened(partial(main, seconds=30.0), Study()) == 20


def test_a_dry_run_says_what_would_be_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_shortened(main, Study(dry_run=True)) is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("to keep within ten minutes 12 of 100 are taken; ")
    assert run_shortened(partial(main, seconds=100.0), Study(dry_run=True)) is None
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("without --dry_run this stops: all 100 take about 3 hours")
    )
    assert not files(here)


def test_a_run_of_which_too_little_fits_is_refused(here: Path) -> None:
    message = (
        "^all 100 take about 3 hours here, and 8 of them about 13 minutes, and nothing has been run: --limit 8 runs 8 all the "
        "same, and --limit 0 takes all.$"
    )
    with pytest.raises(ValueError, match=message):
        run_shortened(partial(main, seconds=100.0), Study())
    with pytest.raises(
        ValueError, match=r"^all 2 take about 2 hours here, and nothing has been run: --limit 2 runs them all"
    ):
        run_shortened(partial(main, seconds=3500.0, n=2), Study())
    # Of a study that is called by a program, the error says what to give.
    with pytest.raises(
        TooLong, match=r"^all 100 take about 75 minutes here: --limit 12 takes less, and --limit 0 takes all.$"
    ):
        main(Study())
    assert files(here) <= {"outputs/lens/a/shortened.json"}


def test_what_fits_is_rounded_down_so_that_load_seldom_changes_it() -> None:
    fits = {n: that_fit(100, 60_000 / n) for n in (7, 8, 9, 11, 19, 43, 99)}
    assert fits == {7: 7, 8: 8, 9: 8, 11: 10, 19: 16, 43: 40, 99: 96}
    assert that_fit(100, 300 + 600, fixed=300) == 48 and that_fit(100, 7000.0, fixed=700) == 0 and that_fit(5, 1.0) == 5


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
