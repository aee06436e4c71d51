"""What tests of several studies start from."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tyro._parsers import ParserSpecification

from pyvene_ext import load_model  # which keeps it, so that it must not be what a test puts in its place
from pyvene_ext.models import loading
from pyvene_ext.models.loading import TINY_MODELS
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import figures, plans
from pyvene_ext.runs.figures.style import check_path, files_of

DRAW = figures.save
DESCRIBE = ParserSpecification.from_callable_or_type
DESCRIBED: dict[tuple[type, str], ParserSpecification] = {}


@pytest.fixture(autouse=True)
def figures_are_made_but_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures become empty files, because drawing takes most of a study's time on a tiny model; `drawn` draws each name once."""
    seen: set[str] = set()

    def save(figure: Figure, path: str | Path) -> list[Path]:
        path = Path(path)
        if "drawn" in request.fixturenames and path.name not in seen:
            seen.add(path.name)
            return DRAW(figure, path)
        check_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in files_of(path):
            file.touch()
        return files_of(path)

    monkeypatch.setattr(figures, "save", save)


@pytest.fixture(autouse=True)
def shipped_models_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies get copies of the shipped models, in a sixth of the time that reading one and trying it takes."""

    def load(name: str, **options: Any) -> Any:
        return deepcopy(read(name, **options)) if name in TINY_MODELS else load_model(name, **options)

    monkeypatch.setattr(loading, "load_model", load)


@pytest.fixture(autouse=True)
def passes_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not six times, for which the result would be more exact."""
    monkeypatch.setattr(plans, "REPEATS", 1)


@pytest.fixture(autouse=True)
def flags_are_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """tyro takes a twentieth of a second to find out what a study's flags are, for each command anew."""

    def describe(flags: type, **options: Any) -> ParserSpecification:
        if options["parent_classes"]:  # a group of flags
            return DESCRIBE(flags, **options)
        key = flags, options["description"]
        if key not in DESCRIBED:
            DESCRIBED[key] = DESCRIBE(flags, **options)
        return DESCRIBED[key]

    monkeypatch.setattr(ParserSpecification, "from_callable_or_type", describe)


@cache
def read(name: str, **options: Any) -> Any:
    return load_model(name, **options)


@pytest.fixture
def drawn() -> None:
    """Of a test whose figures are drawn."""


@pytest.fixture
def few_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with some of the shipped sentences, few.tsv."""
    monkeypatch.chdir(tmp_path)
    lines = (PROMPTS / "en_fr.tsv").read_text(encoding="utf-8").splitlines()[:31]
    (tmp_path / "few.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def own_pairs(tmp_path: Path) -> Path:
    """Prompts with answers of one's own, which are not called IO and S."""
    pairs = json.loads((PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:4]
    rows = [{"text": pair["clean"], "answer": pair["io_name"], "wrong": pair["s_name"]} for pair in pairs]
    (tmp_path / "own.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "own.json"
