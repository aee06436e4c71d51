"""Shared set-up: one thread a process, and pyvene's own cards kept for the tests that show what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping

# Taken before anything imports modelcards and registers ours.
PLAIN_MODULES = dict(type_to_module_mapping)
PLAIN_DIMENSIONS = dict(type_to_dimension_mapping)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics are cached in a folder of the tests, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYVENE_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


torch.set_num_threads(1)  # many tiny models: threads only cost


@pytest.fixture
def plain_cards() -> Iterator[None]:
    """pyvene's own cards, as they are without this project, for one test."""
    ours = dict(type_to_module_mapping), dict(type_to_dimension_mapping)
    for mapping, plain in (
        (type_to_module_mapping, PLAIN_MODULES),
        (type_to_dimension_mapping, PLAIN_DIMENSIONS),
    ):
        mapping.clear()
        mapping.update(plain)
    yield
    for mapping, own in zip((type_to_module_mapping, type_to_dimension_mapping), ours, strict=True):
        mapping.clear()
        mapping.update(own)
