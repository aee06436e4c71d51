"""Fixes of pyvene as patches: what is wrong, the change, and the unit test that fails without it, in one file each.

A patch has the title and text of a pull request before its diff, which `git apply` passes over. All were made for pyvene 0.1.8;
on another version git finds the places if the lines around them are the same, and the export says so if they are not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from modelcards.export.checkout import Checkout, Files


@dataclass(frozen=True)
class Fix:
    """One patch; its file's name begins with the numbers of the defects that it mends."""

    path: Path

    @property
    def numbers(self) -> list[int]:
        """Of the defects."""
        return [int(part) for part in takewhile(str.isdigit, self.path.name.split("-"))]

    @cached_property
    def _head_and_diff(self) -> tuple[str, str]:
        head, _, diff = self.path.read_text(encoding="utf-8").partition("\n---\n")
        return head, diff

    @property
    def title(self) -> str:
        """Of the pull request."""
        return self._head_and_diff[0].splitlines()[0].removeprefix("Subject: ")

    @property
    def text(self) -> str:
        """Of the pull request, without its title."""
        return self._head_and_diff[0].partition("\n\n")[2]

    @property
    def paths(self) -> list[str]:
        """The files that it changes or makes."""
        return re.findall(r"^\+\+\+ b/(.*)$", self._head_and_diff[1], re.MULTILINE)

    @property
    def tests(self) -> list[str]:
        """Those of them that are unit tests."""
        return [path for path in self.paths if path.startswith("tests/")]


FIXES = tuple(Fix(path) for path in sorted((Path(__file__).parent / "patches").glob("*.patch")))


def chosen(numbers: list[int]) -> list[Fix]:
    """Select fixes by the numbers of the defects they mend.

    Args:
        numbers: of the defects; none: all.

    Returns:
        The fixes, each once.

    Raises:
        ValueError: for a number without a fix.
    """
    known = [number for fix in FIXES for number in fix.numbers]
    if unknown := [number for number in numbers if number not in known]:
        raise ValueError(f"there is no fix {unknown[0]}; there are {', '.join(map(str, known))}.")
    return [fix for fix in FIXES if not numbers or set(numbers) & set(fix.numbers)]


def fixed(checkout: Checkout, fixes: list[Fix]) -> tuple[list[Fix], Files]:
    """Apply fixes to a copy of a checkout, each that applies; one whose test is committed there already is skipped.

    Fixes that do not apply are listed on standard error, with git's reason.

    Args:
        checkout: left as it is.
        fixes: which.

    Returns:
        The fixes that are there afterwards, and the files that change with all of them applied.

    Raises:
        ValueError: if none applies.
    """
    there = [fix for fix in fixes if checkout.paths.issuperset(fix.tests)]
    applied, refused = [], []
    with checkout.copy() as folder:
        for fix in (fix for fix in fixes if fix not in there):
            done = subprocess.run(
                ["git", "apply", "--whitespace=nowarn", str(fix.path.resolve())],
                cwd=folder,
                env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},  # no repository around it
                capture_output=True,
                text=True,
            )
            if done.returncode:
                said = done.stderr.strip().splitlines()[0].removeprefix("error: ")
                name = " and ".join(map(str, fix.numbers))
                refused.append(f"fix {name}, made for pyvene 0.1.8, does not apply to {checkout.root}: {said}.")
            else:
                applied.append(fix)
        files = {path: (folder / path).read_text(encoding="utf-8") for fix in applied for path in fix.paths}
    if refused and not applied and not there:
        raise ValueError(" ".join(refused))
    for why in refused:
        print(why, file=sys.stderr)
    return there + applied, files
