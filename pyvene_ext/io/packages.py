"""Packages that only some uses need, and that `pip install pyvene-ext` leaves out."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec

# The package that each extra of pyproject.toml brings.
EXTRAS = {"report": "plotly", "input-attribution": "captum"}


class MissingExtra(ImportError):
    """An extra is needed and not installed."""


def need(extra: str) -> None:
    """Raise MissingExtra, with the command that mends it, unless an extra's package is there; loads nothing."""
    if find_spec(EXTRAS[extra]) is None:
        raise MissingExtra(f"{EXTRAS[extra]} is not installed; pip install 'pyvene-ext[{extra}]' brings it.")


def version_of(package: str) -> str | None:
    """What is installed, as its metadata say; None for what is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
