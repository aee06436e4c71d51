"""What `make test` takes of the calls of one test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_only(values: Iterable[Any]) -> list[Any]:
    """The first of these in `make test`, the others with the rest; values of several arguments are tuples."""
    first, *others = values
    return [
        first,
        *(pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow) for one in others),
    ]
