"""What a user sees of a loader: what it gives, or one line on stderr and exit code 2. Anything else is a defect and is raised."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import settings

from pyvene_ext.io.cli import run


@dataclass
class NoFlags:
    """Of a study without flags."""


def few(share: int) -> settings:
    """One example where others have `share`: for what is slow."""
    return settings(max_examples=max(3, settings.default.max_examples // share))  # type: ignore[union-attr]


def command(study: Callable[[Any], Any], config: type, args: list[str], names: str | Path | None = None) -> bool:
    """Whether a study ends well; else it says in one sentence, which has `names` in it, why not."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = run(study, config, args)
    if code == 0:
        return True
    *before, last = said.getvalue().splitlines()
    assert (
        code == 2 and last.startswith("error: ") and not any("Error" in line or "error:" in line for line in before)
    ), said
    assert names is None or str(names) in last, last
    return False


def outcome(load: Callable[..., Any], *args: Any, names: str | Path | None = None) -> Any:
    """What `load(*args)` gives; None if it says in one sentence, which has `names` in it, why it gives nothing."""
    given: list[Any] = []
    return given[0] if command(lambda _: given.append(load(*args)), NoFlags, [], names) else None
