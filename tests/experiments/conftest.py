"""What tests of several studies start from."""

from __future__ import annotations

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
