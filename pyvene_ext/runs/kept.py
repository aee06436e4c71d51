"""What several studies in one process share: models, measured times, and how long each study says that it takes.

    with kept() as here:
        ...   # each model is loaded once, each time measured once
    here.seconds   # of each study that announced itself

Outside of such a context nothing is kept, so that a study of several models needs memory for one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Kept:
    """What is kept inside the context.

    Attributes:
        things: models and times, by what they were made from.
        seconds: how long each study takes, in the order in which they announced themselves; None where it is quick.
    """

    things: dict[Hashable, Any] = field(default_factory=dict)
    seconds: list[float | None] = field(default_factory=list)


_NOW: list[Kept] = []


@contextmanager
def kept() -> Iterator[Kept]:
    """Keep models and measured times for all studies that are run inside.

    Yields:
        Kept: what is kept.
    """
    _NOW.append(Kept())
    try:
        yield _NOW[-1]
    finally:
        _NOW.pop()


def once(key: Hashable, make: Callable[[], T], worth: Callable[[T], bool] = lambda _: True) -> T:
    """Make something, or take what was made before inside the same `kept`.

    Args:
        key: what it is made from.
        make: makes it.
        worth: whether it is kept.

    Returns:
        What `make` returns or has returned.
    """
    if not _NOW:
        return make()
    things = _NOW[-1].things
    if key in things:
        return things[key]
    made = make()
    if worth(made):
        things[key] = made
    return made


def note_seconds(seconds: float | None) -> None:
    """Note how long the study takes that is about to run."""
    if _NOW:
        _NOW[-1].seconds.append(seconds)
