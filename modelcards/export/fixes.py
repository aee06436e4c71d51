"""Fixes of pyvene as patches: what is wrong, the change, and the unit test that fails without it, in one file each.

A patch has the title and text of a pull request before its diff, which `git apply` passes over. Where the lines around a change
differ between versions of pyvene, the diff holds the test alone, and the change is made by a function of `edits`. The others were
made for pyvene 0.1.8; on another version git finds the places if the lines around them are the same, and the export says so if
they are not.
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

from modelcards.export import edits
from modelcards.export.behaviour import Behaviour, behaviour
from modelcards.export.checkout import Checkout, Files
from modelcards.export.source import Source


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
        """The files that its diff changes or makes."""
        return re.findall(r"^\+\+\+ b/(.*)$", self._head_and_diff[1], re.MULTILINE)

    @property
    def tests(self) -> list[str]:
        """Those of them that are unit tests."""
        return [path for path in self.paths if path.startswith("tests/")]

    @property
    def edit(self) -> edits.SourceEdit | None:
        """What makes the change, if its diff does not."""
        return edits.EDITS.get(self.numbers[0])

    def apply(self, folder: Path, checkout: Checkout, found: Behaviour | None) -> tuple[Files, str]:
        """Apply it to a copy of a checkout.

        Args:
            folder: the copy.
            checkout: of what.
            found: what that pyvene does; only where `edit` makes the change.

        Returns:
            The files that it changes, and its text.

        Raises:
            ValueError: it does not apply.
        """
        opened: dict[str, Source] = {}

        def open_file(name: str) -> Source:
            path = name if "/" in name else checkout.mapping_file(name)
            if not (folder / path).is_file():
                raise ValueError(f"there is no {path}")
            return opened.setdefault(path, Source(path, (folder / path).read_text(encoding="utf-8")))

        change = self.edit(open_file, found) if self.edit is not None and found is not None else ""
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", str(self.path.resolve())],
            cwd=folder,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},  # no repository around it
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[0].removeprefix("error: "))
        for path, source in opened.items():
            (folder / path).write_text(source.edited(), encoding="utf-8", newline="")
        paths = [*opened, *self.paths]
        return {path: (folder / path).read_text(encoding="utf-8") for path in paths}, self.said(change)

    def said(self, change: str = "") -> str:
        """Its text, with what was changed in this version."""
        return self.text.replace(" {change}\n", f" {change}\n" if change else "\n")


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


def fixed(checkout: Checkout, fixes: list[Fix]) -> tuple[list[tuple[str, str]], Files]:
    """Apply fixes to a copy of a checkout, each that applies; one whose test is committed there already is skipped.

    Fixes that do not apply, and those that this pyvene does not need, are listed on standard error with the reason.

    Args:
        checkout: left as it is.
        fixes: which.

    Returns:
        Title and text of the fixes that are there afterwards, and the files that change with all of them applied.

    Raises:
        ValueError: if none applies.
    """
    there = [fix for fix in fixes if checkout.paths.issuperset(fix.tests)]
    fixes = [fix for fix in fixes if fix not in there]
    found = behaviour(checkout, edits.QUESTIONS) if any(fix.edit for fix in fixes) else None
    texts, refused = [(fix.title, fix.said()) for fix in there], []
    files: Files = {}
    with checkout.copy() as folder:
        for fix in fixes:
            name = f"fix {' and '.join(map(str, fix.numbers))}"
            try:
                changed, text = fix.apply(folder, checkout, found)
            except edits.NotNeeded as reason:
                refused.append(f"{name} is not needed by {checkout.root}: {reason}.")
            except ValueError as error:
                made = "" if fix.edit else ", made for pyvene 0.1.8,"
                refused.append(f"{name}{made} does not apply to {checkout.root}: {str(error).rstrip('.')}.")
            else:
                texts.append((fix.title, text))
                files |= changed
    if refused and not texts:
        raise ValueError(" ".join(refused))
    for why in refused:
        print(why, file=sys.stderr)
    return texts, files
