"""Outputs that would overwrite inputs, found before a study runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyvene_ext.io.cli import CONFIG_FILES

REPLACED = (".csv", ".json", ".npy")  # what studies write directly into their folders, or remove there


def refuse_inputs(
    config: Any,
    outputs: Sequence[tuple[str, Path]],
    *,
    folder: tuple[str, Path] | None = None,
    config_file: Path | None = None,
    also: Sequence[tuple[str, Path]] = (),
) -> None:
    """Check that no file that a run reads is one that it will write.

    Args:
        config: the flags; the files and folders that they name are inputs, but for the flags of outputs.
        outputs: files that will be written, each with the flag (without dashes) that says where.
        folder: a folder whose tables, arrays and JSON files will be replaced, with its flag.
        config_file: where the flags will be written; the file of --config may be it.
        also: files that are read too, each with the flag of the file that they belong to.

    Raises:
        ValueError: an output is an input.
    """
    places = [*outputs, *([folder] if folder else [])]
    flags = {flag for flag, _ in places}
    inputs = [*((name, path) for name, path in _named(config) if name not in flags), *also]
    first = places[0][0]
    for source, read in [*inputs, *(("config", path) for path in CONFIG_FILES)]:
        settings = [(first, config_file)] if config_file and source != "config" else []
        for flag, written in [*places, *settings]:
            if written.exists() and read.exists() and written.samefile(read):
                raise ValueError(
                    f"{read} is what --{source} reads, and would be overwritten; nothing was run: give another --{flag}."
                )
    for source, read in inputs:
        if (
            folder
            and read.is_file()
            and read.suffix.lower() in REPLACED
            and read.resolve().parent == folder[1].resolve()
        ):
            raise ValueError(
                f"{read}, which --{source} reads, lies in the folder {folder[1]}, whose files are replaced; nothing was run: "
                f"give another --{folder[0]}."
            )


def _named(config: Any) -> Iterator[tuple[str, Path]]:
    """The files and folders that exist among the values of flags."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str | Path) and str(one) and _exists(Path(one)):
                yield field.name, Path(one)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text too long for a name, or with a zero byte
        return False
