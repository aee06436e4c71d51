"""Every script runs as its page says: `python experiments/NAME.py`, from any folder; and help comes before anything heavy."""

from __future__ import annotations

import ast
import json
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
    "bench_attribution", "bench_generate", "bench_sweep",
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


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_the_script_says_what_it_does(script: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    process = processes.start(run_script, script, "--help", shown=tmp_path / "shown")
    process.join()
    assert process.exitcode == 0
    assert says_what_it_does(script, (tmp_path / "shown").read_text())
    assert not list((tmp_path / "elsewhere").iterdir())


def says_what_it_does(script: Path, shown: str) -> bool:
    first_line = script.read_text(encoding="utf-8").splitlines()[0].lstrip("r").strip('"')
    return first_line.split()[0] in shown and f"python {script.relative_to(ROOT)}" in shown


# Run one after the other in one process: what each says, and what it was the first to import.
ALL_OF_THEM = """
import contextlib, io, json, runpy, sys
heavy, scripts, answers = *map(json.loads, sys.argv[1:]), []
for script in scripts:
    sys.path[0] = script.rpartition("/")[0]  # as `python SCRIPT` has it
    for flag in ("--help", "--mistyped", *(["--decide=1"] if script.endswith("/ablate_heads.py") else [])):
        before, said, sys.argv = set(sys.modules), io.StringIO(), [script, flag]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            runpy.run_path(script, run_name="__main__")
        answers.append([script, flag, said.getvalue(), sorted((sys.modules.keys() - before) & set(heavy))])
print(json.dumps(answers))
"""


def test_help_and_typing_errors_load_nothing_heavy_and_help_says_what_the_script_does(tmp_path: Path) -> None:
    scripts = [str(path) for path in SCRIPTS if path.stem not in SLOW]
    commands = [str(ROOT / "pyvene_ext" / command) for command in ("verify.py", "report/__main__.py")]
    command = [sys.executable, "-c", ALL_OF_THEM, json.dumps(sorted(HEAVY)), json.dumps([*commands, *scripts])]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    answers = json.loads(ran.stdout)
    (decided,) = [answers.pop(i)[2:] for i, answer in enumerate(answers) if answer[1] == "--decide=1"]
    assert "--decide takes an upper and a lower threshold" in decided[0] and not decided[1]
    assert [answer[:2] for answer in answers] == [
        [x, y] for x in [*commands, *scripts] for y in ("--help", "--mistyped")
    ]
    for script, flag, said, loaded in answers:
        assert said and not loaded, (script, flag, loaded)
        assert flag == "--mistyped" or script in commands or says_what_it_does(Path(script), said), script
    assert not list(tmp_path.iterdir())


# Of little work, or none that could be named beforehand.
WITHOUT_DRY_RUN = {
    "crosslingual_head_corr",
    "make_prompts",
    "planted_circuits",
    "train_tiny_circuit",
    "train_tiny_models",
    "train_tiny_thought",
    "bench_attribution",
    "bench_generate",
    "bench_sweep",
}
SMALL = {"critical_heads": ("--limit", "60"), "translation_ablation": ("--limit", "4")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.stem not in WITHOUT_DRY_RUN], ids=lambda path: path.stem
)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(script: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    small = SMALL.get(script.stem, SMALL.get(script.parent.name, ()))
    process = processes.start(run_script, script, "--dry_run", *small, shown=tmp_path / "shown")
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "shown").read_text().strip()
    assert not list((tmp_path / "elsewhere").iterdir())


MOST_LINES, MOST_LINES_OF_MAIN = 350, 60
STUDIES = sorted([*EXPERIMENTS.glob("*.py"), *EXPERIMENTS.glob("critical_heads/*.py")])


@pytest.mark.parametrize("study", STUDIES, ids=[path.stem for path in STUDIES])
def test_a_study_fits_on_a_few_screens(study: Path) -> None:
    lines = study.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES, "what exceeds them is a method, a statistic or a figure, and belongs in its room"
    mains = [
        node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    for main in mains:
        code = [line for line in lines[main.lineno - 1 : main.end_lineno] if line.strip() and line.strip()[0] != "#"]
        assert len(code) <= MOST_LINES_OF_MAIN
