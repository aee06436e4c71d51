"""Every experiment runs as the README says: `python experiments/NAME.py`, from any folder."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from tests import processes

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS = sorted(path for path in EXPERIMENTS.rglob("*.py") if '__name__ == "__main__"' in path.read_text())


def run_script(script: Path, *arguments: str, shown: Path) -> None:
    """What `python SCRIPT ARGUMENTS` does, with its folder in place of ours on the path, but torch is imported already."""
    os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT), 1)
    os.chdir(shown.parent / "elsewhere")
    ours = (EXPERIMENTS.parent, EXPERIMENTS, Path.cwd())
    sys.path = [str(script.parent), *(path for path in sys.path if path and Path(path).absolute() not in ours)]
    sys.argv = [str(script), *arguments]
    assert not {name for name in sys.modules if (EXPERIMENTS / f"{name}.py").exists()}
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_the_script_says_what_it_does(script: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    process = processes.start(run_script, script, "--help", shown=tmp_path / "shown")
    process.join()
    shown = (tmp_path / "shown").read_text()
    first_line = script.read_text().splitlines()[0].strip('"')
    assert process.exitcode == 0
    assert first_line.split()[0] in shown and f"python {script.relative_to(EXPERIMENTS.parent)}" in shown
    assert not list((tmp_path / "elsewhere").iterdir())
