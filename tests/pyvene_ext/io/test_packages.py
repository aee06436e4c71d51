"""What a package prints while it is imported stays unseen, and the package is as if imported in the ordinary way."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path

import pytest

import pyvene_ext
from pyvene_ext.io.packages import ImportQuietly


def test_a_package_is_imported_without_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("chatty", "other"):
        (tmp_path / f"{name}.py").write_text("print('look at me')\nanswer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [ImportQuietly("chatty"), *sys.meta_path])
    assert find_spec("chatty") is not None  # to look for it is no import
    chatty = importlib.import_module("chatty")
    assert capsys.readouterr().out == "" and chatty.answer == 42
    assert isinstance(chatty.__loader__, SourceFileLoader) and chatty.__spec__.loader is chatty.__loader__
    importlib.import_module("other")
    assert capsys.readouterr().out == "look at me\n"


def test_pyvene_is_imported_in_this_way() -> None:
    assert pyvene_ext.__file__ is not None
    assert [finder._package for finder in sys.meta_path if isinstance(finder, ImportQuietly)] == ["pyvene"]
