"""What tests of several studies start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyvene_ext.prompts.shipped import PROMPTS


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
