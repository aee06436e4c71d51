"""Shared set-up: markers of the tiers, one thread a process, and pyvene's own cards, kept for the tests of their defects.

With pytest-xdist one more process reads this file and runs no test, while the workers wait for it: what takes seconds to load
(torch, transformers, pyvene) is imported where tests are collected.
"""

from __future__ import annotations

import gc
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Tests that are known by their place.
PLACES = {
    "fuzz": "fuzz",
    "real": "real",
    "experiments/test_every_family.py": "matrix",
    "pyvene_ext/engine/sweep/test_processes.py": "processes",
    "modelcards/test_export.py": "packaging",
    "test_packaging.py": "packaging",
    "test_howto.py": "docs",
    "test_readme.py": "docs",
    "test_site.py": "docs",
}
# They see a model through cards and engines, which are held on CORE_FAMILIES: `make test` takes one of UNLIKE.
BUILT_ON_OTHERS = (
    "pyvene_ext/engine/test_reading.py",
    "pyvene_ext/methods",
    "pyvene_ext/models/test_continuous_thought.py",
    "pyvene_ext/models/test_devices.py",
    "pyvene_ext/report",
    "pyvene_ext/specs",
    "pyvene_ext/test_every_family.py",
    "experiments",
)
# These take every family, whatever it shares with others.
ON_EACH = ("experiments/test_every_family.py", "pyvene_ext/test_every_family.py")
INTERRUPTED = re.compile(r"_(kill|kills|killed|interrupted|goes_on|stops_while)(_|$)")

# Many tiny models: threads only cost. So for the commands that tests start, which would also say how many cores are free.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--each-family", action="store_true", help="also the calls on families that are much like another's"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fewer: of these families `make test` takes one")


def pytest_collectstart() -> None:
    import torch

    from tests import pyvenes_cards  # noqa: F401  before any test registers ours

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Libraries make a million objects, which no garbage collection need look at again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test with what it is; `make test` leaves out what CONTRIBUTING's "Checks" gives to `make test-all`.

    What is built on cards and engines takes one family of `UNLIKE` there, and in `make test-all` the other or one of `ALIKE`, by
    turns, unless --each-family is given.
    """
    from tests.tiny_random import ALIKE, UNLIKE

    tested, same_call = defaultdict(set), defaultdict(set)
    for item in items:
        same_call[call_of(item)] |= families(item)
        if not item.get_closest_marker("slow"):
            tested[function_of(item)] |= families(item)
    left_out = []
    for item in items:
        for kind in kinds(item):
            item.add_marker(kind)
        if not families(item) or not (lies_in(item.path, BUILT_ON_OTHERS) or item.get_closest_marker("fewer")):
            continue
        unlike = sorted(tested[function_of(item)].intersection(UNLIKE))
        if unlike and not families(item) & {by_turns(unlike, item)}:
            item.add_marker("families")
        here = same_call[call_of(item)]
        alike = sorted(here.intersection(ALIKE))
        others = {*alike} - {by_turns(alike, item)} if alike else set()
        if alike and unlike and here.issuperset(UNLIKE):  # beside that of `make test` the other, or one of those alike
            (other,) = {*UNLIKE} - {by_turns(unlike, item)}
            others |= {other, by_turns(alike, item)} - {by_turns([other, by_turns(alike, item)], item, 1)}
        if here.intersection(UNLIKE) and families(item) <= others:
            left_out.append(item)
    if not config.getoption("each_family"):
        left_out = [item for item in left_out if not lies_in(item.path, ON_EACH)]
        config.hook.pytest_deselected(items=left_out)
        gone = {*map(id, left_out)}
        items[:] = [item for item in items if id(item) not in gone]


def kinds(item: pytest.Item) -> Iterator[str]:
    """The markers of a test by its place, its fixtures, its name and the families it is called with."""
    yield from (kind for where, kind in PLACES.items() if lies_in(item.path, (where,)))
    if "launch" in getattr(item, "fixturenames", ()):
        yield "processes"
    if INTERRUPTED.search(item.name.partition("[")[0]):
        yield "kills"
    if families(item) & beyond():
        yield "families"


@cache
def every_family() -> frozenset[str]:
    from tests.tiny_random import FAMILIES, MORE_FAMILIES

    return frozenset({*FAMILIES, *MORE_FAMILIES})


@cache
def beyond() -> frozenset[str]:
    """The families that `make test` leaves out."""
    from tests.tiny_random import CORE_FAMILIES

    return every_family() - {*CORE_FAMILIES}


@cache
def lies_in(path: Path, places: tuple[str, ...]) -> bool:
    return any(path.relative_to(TESTS).is_relative_to(place) for place in places)


def function_of(item: pytest.Item) -> tuple[Path, str]:
    return item.path, item.name.partition("[")[0]


def call_of(item: pytest.Item) -> tuple[Path, str]:
    """A test with its arguments, whatever the family."""
    name = item.name
    for family in sorted(families(item)):
        name = name.replace(family, "*")
    return item.path, name


def by_turns(some: list[str], item: pytest.Item, turn: int = 0) -> str:
    """One family for all calls of a test; half of the tests take one of two, half the other, and other halves at another turn."""
    return some[(zlib.crc32(function_of(item)[1].encode()) >> turn) % len(some)]


def families(item: pytest.Item) -> set[str]:
    """The families among what a test is called with; `FAMILY/IMPLEMENTATION` counts too."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    return {str(getattr(value, "family", value)).partition("/")[0] for value in values} & every_family()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics are cached in a folder of the tests, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYVENE_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def plain_cards() -> Iterator[None]:
    """pyvene's own cards, as they are without this project, for one test."""
    from tests.pyvenes_cards import CARDS, PLAIN

    ours = [dict(mapping) for mapping in CARDS]
    for mapping, plain in zip(CARDS, PLAIN, strict=True):
        mapping.clear()
        mapping.update(plain)
    yield
    for mapping, own in zip(CARDS, ours, strict=True):
        mapping.clear()
        mapping.update(own)
