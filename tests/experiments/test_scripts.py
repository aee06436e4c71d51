"""Every script runs as the README says: `python experiments/NAME.py`, from any folder; and help comes before anything heavy."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
SCRIPTS = sorted(
    path
    for folder in ("experiments", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
HEAVY = {"torch", "pyvene", "transformers", "matplotlib", "datasets", "scipy"}
# Studies that still import what is heavy before their flags are parsed.
SLOW = {
    "bench_sweep",
}  # fmt: skip


def run_script(script: Path, *arguments: str, shown: Path) -> None:
    """What `python SCRIPT ARGUMENTS` does, with its folder in place of ours on the path, but torch is imported already."""
    os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT), 1)
    os.chdir(shown.parent / "elsewhere")
    ours = (ROOT, EXPERIMENTS, ROOT / "benchmarks", Path.cwd())
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
    assert first_line.split()[0] in shown and f"python {script.relative_to(ROOT)}" in shown
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.xfail(strict=True)] if path.stem in SLOW else [])
        for path in SCRIPTS
    ],
)
@pytest.mark.parametrize("flag", ["--help", "--mistyped"])
def test_help_and_typing_errors_load_nothing_heavy(script: Path, flag: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(script)!r}, {flag!r}]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"sys.exit(' '.join({HEAVY} & sys.modules.keys()) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (answer.stdout + answer.stderr) and answer.returncode == 0, answer.stderr
