"""A checkout of pyvene: what is committed, whether it may be written to, and its tests run on a copy."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REGISTRY = "pyvene/models/intervenable_modelcard.py"
PACKAGE = "pyvene/__init__.py"
TESTS = ("tests/unit_tests", "tests/integration_tests")

Files = dict[str, str]  # paths in the checkout and the texts to be written there

# Runs test modules by name; nothing of this project can be imported there. pyvene's tests refuse to run where `pip list` shows an
# installed pyvene, as it does here; the one they run on is the copy's.
_RUNNER = """
import json, subprocess, sys, unittest
run = subprocess.run
subprocess.run = lambda command, **how: run([sys.executable, "-c", ""] if command == ["pip", "list"] else command, **how)
sys.modules.update(dict.fromkeys(("modelcards", "pyvene_ext")))
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
result = unittest.TextTestRunner(stream=sys.stderr, verbosity=0).run(suite)
failed = [(case.id(), trace.strip().splitlines()[-1]) for case, trace in result.errors + result.failures]
checks = getattr(sys.modules.get("tests.modelcard_utils"), "CHECKS", [])
print("\\n" + json.dumps({"run": result.testsRun, "failed": failed, "checks": checks}))
"""


class Checkout:
    """A clean git checkout of pyvene; everything is made from what is committed there.

    Args:
        root: its top folder.

    Raises:
        ValueError: if `root` is not the top folder of a git checkout of pyvene with its tests.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        top = self._git("rev-parse", "--show-toplevel", of="checkout").strip()
        if Path(top).resolve() != root.resolve():
            raise ValueError(f"{root} is not the top folder of a git checkout: give {top} if that is pyvene's.")
        self.paths = set(self._git("ls-tree", "-r", "-z", "--name-only", "HEAD", of="commit").split("\0"))
        missing = [REGISTRY] * (REGISTRY not in self.paths)
        missing += [folder for folder in TESTS if not any(path.startswith(f"{folder}/") for path in self.paths)]
        if missing:
            raise ValueError(f"{root} is not a checkout of pyvene: it has no {' and no '.join(missing)}.")

    def _git(self, *arguments: str, of: str = "what is committed") -> str:
        return self._git_bytes(*arguments, of=of).decode("utf-8")

    def _git_bytes(self, *arguments: str, of: str) -> bytes:
        try:
            done = subprocess.run(["git", "-C", str(self.root), *arguments], capture_output=True)
        except FileNotFoundError:
            raise ValueError("git is not installed, or not on the PATH: the export needs it.") from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise ValueError(
                f"{self.root} is not a checkout of pyvene: git finds no {of} there ({(said or ['?'])[0]})."
            )
        return done.stdout

    def committed(self, path: str) -> str | None:
        """A file as it was committed; None if it was not."""
        return self._git("show", f"HEAD:{path}") if path in self.paths else None

    def mapping_file(self, family: str) -> str:
        """The path of a family's mapping file, there or not; `family` as pyvene names it."""
        path = f"pyvene/models/{family}/modelings_intervenable_{family}.py"
        spelled = fnmatch.filter(self.paths, path.replace("modelings", "model*ings"))  # Mistral's: modellings
        return spelled[0] if spelled else path

    @property
    def environment(self) -> dict[str, str]:
        """Of processes in a copy: no hub, and nothing of this project on the path."""
        return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}

    @property
    def commit(self) -> str:
        """The commit everything is made from, abbreviated."""
        return self._git("rev-parse", "--short", "HEAD").strip()

    def check_clean(self, files: Files) -> None:
        """Refuse uncommitted changes, apart from files that already are what would be written."""
        changed = self._git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all").split("\0")
        dirty = [line[3:] for line in changed if line and self._on_disk(line[3:]) != files.get(line[3:], line)]
        if dirty:
            more = f" and {len(dirty) - 3} more" if len(dirty) > 3 else ""
            raise ValueError(
                f"{self.root} has uncommitted changes ({', '.join(dirty[:3])}{more}): commit or stash them."
            )

    def _on_disk(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    def write(self, files: Files) -> list[str]:
        """Write files whole or not at all; return the paths that changed."""
        changed = {path: text for path, text in files.items() if self._on_disk(path) != text}
        aside: list[tuple[Path, Path]] = []
        try:
            for path, text in changed.items():
                target = self.root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.{os.getpid()}")
                aside.append((temporary, target))
                temporary.write_text(text, encoding="utf-8", newline="")
            for temporary, target in aside:
                temporary.replace(target)
        finally:
            for temporary, _ in aside:
                temporary.unlink(missing_ok=True)
        return sorted(changed)

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """What is committed, in a temporary folder."""
        archive = self._git_bytes("archive", "--format=tar", "HEAD", "pyvene", "tests", of="pyvene and tests")
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(folder, filter="data")
            yield Path(folder)

    def try_out(self, files: Files, tests: Iterable[str]) -> tuple[list[list[Any]], str]:
        """Run new test files, and the suite before and after, on a copy of the checkout that has the files to be written.

        Args:
            files: these.
            tests: paths of the new test files.

        Returns:
            What the tests of cards noted in `CHECKS`, and a paragraph on the suite.

        Raises:
            ValueError: a new test fails, or one of the suite that passed before; it says which and why.
        """
        new = sorted(tests)
        suite = sorted(path for path in self.paths if path.startswith("tests/") and path.endswith("TestCase.py"))
        suite = [path for path in suite if path not in new]
        with self.copy() as folder:
            before = self._run(folder, suite)
            for path, text in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8", newline="")
            outcome, after = self._run(folder, new), self._run(folder, suite)
        broken = {case: why for case, why in after["failed"] if case not in dict(before["failed"])}
        failed = [*outcome["failed"], *broken.items()]
        if failed:
            (case, why), *others = failed
            more = f" ({len(others)} more)" if others else ""
            raise ValueError(f"{case} fails with the pyvene of {self.root}{more}: {why}")
        counts = [f"{run['run']} run, {run['run'] - len(run['failed'])} pass" for run in (before, after)]
        return outcome["checks"], (
            f"The suite, `python -m unittest discover -p '*TestCase.py'`, without a hub: before {counts[0]}, after {counts[1]}; "
            "none that passed before fails."
        )

    def _run(self, folder: Path, tests: Sequence[str]) -> dict[str, Any]:
        """Run test files in a process of their own."""
        names = [path.removesuffix(".py").replace("/", ".") for path in tests]
        if not names:
            return {"run": 0, "failed": [], "checks": []}
        command = [sys.executable, "-W", "ignore", "-c", _RUNNER, *names]
        done = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["?"])[-1]
            raise ValueError(f"{tests[0]} and others cannot be run with the pyvene of {self.root}: {said}")
        return json.loads(done.stdout.splitlines()[-1])
