"""The tiers of `make test` and `make test-all`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.tiny_random import CORE_FAMILIES, FAMILIES, MORE_FAMILIES

ROOT = Path(__file__).resolve().parents[1]


def test_make_test_leaves_out_the_declared_markers_and_contributing_says_what_they_are() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    markers = [line.partition(":")[0] for line in options["markers"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (rest,) = re.findall(r"^REST := (.*)$", makefile, re.MULTILINE)
    assert rest.split(" or ") == [marker for marker in markers if marker != "real"]
    assert '-m "not ($(REST) or real)"' in makefile and "REAL := or real\n" in makefile
    assert (
        re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE) == markers
    )


def test_the_core_families_are_known() -> None:
    assert set(FAMILIES) < set(CORE_FAMILIES) < {*FAMILIES, *MORE_FAMILIES}
