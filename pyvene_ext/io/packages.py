"""Packages that may be absent, and packages that print while they are imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# The package that each extra of pyproject.toml installs.
EXTRAS = {"report": "plotly", "input-attribution": "captum", "gguf": "gguf"}


class ImportQuietly(MetaPathFinder):
    """A finder for `sys.meta_path` that hides what a package prints while it is imported.

    Args:
        package: its name.
    """

    def __init__(self, package: str) -> None:
        self._package, self._busy = package, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the package with the other finders, and wrap its loader."""
        if fullname != self._package or self._busy:
            return None
        self._busy = True
        try:
            found = find_spec(fullname)
        finally:
            self._busy = False
        if found is not None and found.loader is not None:
            found.loader = _QuietLoader(found.loader)
        return found


class _QuietLoader(Loader):
    """A loader that hides what a module prints, and then leaves the module with its own loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with contextlib.redirect_stdout(io.StringIO()):
            self._loader.exec_module(module)


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
