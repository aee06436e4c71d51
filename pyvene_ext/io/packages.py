"""Optional packages, which `pip install pyvene-ext` does not install."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec

# The package that each extra of pyproject.toml installs.
EXTRAS = {"report": "plotly", "input-attribution": "captum", "gguf": "gguf"}


class MissingExtra(ImportError):
    """An extra is needed but not installed."""


def need(extra: str) -> None:
    """Check that an extra is installed, without importing it.

    Args:
        extra: a key of `EXTRAS`.

    Raises:
        MissingExtra: it is not installed; says how to install it.
    """
    if find_spec(EXTRAS[extra]) is None:
        raise MissingExtra(f"{EXTRAS[extra]} is not installed; pip install 'pyvene-ext[{extra}]' brings it.")


def version_of(package: str) -> str | None:
    """The installed version of a package, by its metadata.

    Args:
        package: the name of a distribution.

    Returns:
        The version, or None if it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
