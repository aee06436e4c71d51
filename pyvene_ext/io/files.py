"""Files that are complete or absent: written aside and renamed, read with one clear sentence for whatever they may hold."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from pyvene_ext.io.errors import one_sentence


def cache_folder() -> Path:
    """Where reference statistics are kept between runs: $PYVENE_EXT_CACHE, else pyvene_ext in the user's cache folder."""
    if chosen := os.environ.get("PYVENE_EXT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvene_ext"


def output_path(wanted: Path | None, default: str | Path, flag: str = "--out") -> Path:
    """The folder that a study writes: as wanted with `flag`, else its default. Raises ValueError if one may not write there."""
    path = wanted or Path(default)
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: {existing} is not a folder one may write in.")
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it becomes `path` when the block ends well and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because NumPy, pandas and matplotlib choose a format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote one of these."""
    for path in paths:
        for leftover in path.parent.glob(f".{glob.escape(path.stem)}-????????{glob.escape(path.suffix)}"):
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON; NaN is refused, because JSON has none (use None)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_yaml(path: str | Path, value: Any) -> None:
    """Write plain data as YAML, keys in the order given."""
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Write an array as `.npy`."""
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table, its columns in the order in which rows first name them; None and NaN are empty cells."""
    import pandas as pd  # takes a second to import, and most programs write no table

    # As objects, else a column of 1 and 0.5 would be written as 1.0 and 0.5.
    table = pd.DataFrame(list(rows), dtype=object)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\r\n")  # as RFC 4180 has it


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file, their cells as text by column. Raises ValueError, naming the file, if it is not one."""
    # Not with pandas, which fills up short rows, takes cells in excess for an index and renames columns, all without a word.
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file ({error}); save the table as CSV, in UTF-8.") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has rows of unequal length; give each a cell for every column of the first line.")
    return rows


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises JSONDecodeError for whatever cannot be read, and for text that is not Unicode (half an emoji)."""
    try:
        return _in_unicode(json.loads(text), text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # not Unicode, a number of too many digits, nested too deeply
        raise json.JSONDecodeError(str(error), "", 0) from None


def parse_yaml(text: str) -> Any:
    """What YAML says, of plain data only: no tag runs anything. Raises ValueError, in one line, for whatever cannot be read."""
    try:
        return _in_unicode(yaml.safe_load(text), text)
    except (
        Exception
    ) as error:  # PyYAML's readers of single values have no error of their own: !!bool maybe is a KeyError
        reason = " ".join(str(error).split())
        raise ValueError(f"not valid YAML: {type(error).__name__}, {reason}") from None


def _in_unicode(value: Any, text: str | bytes) -> Any:
    r"""The data that a text holds; UnicodeError if it has half of a character, which can only be written as \uD800 to \uDFFF."""
    if re.search(rb"\\u[dD][89a-fA-F]", text if isinstance(text, bytes) else text.encode()):
        json.dumps(value, ensure_ascii=False, default=str).encode()
    return value


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says. Raises ValueError, naming the file, if it cannot be read."""
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it in that encoding.") from None
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def read_npy(path: str | Path) -> np.ndarray:
    """The array in a .npy file, never one of objects. Raises ValueError, naming the file, for anything else."""
    content = Path(path).read_bytes()
    try:
        # Not np.load, which takes every other file for a pickle and says so.
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # its header is Python, of which NumPy, ast and tokenize have errors of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a complete .npy file of numbers ({reason}).") from None


Model = TypeVar("Model", bound=BaseModel)


def read_as(kind: type[Model], path: str | Path) -> Model:
    """A JSON file as one of pydantic's models. Raises ValueError, naming the file and what is wrong first, for any other."""
    try:
        return kind.model_validate(parse_json(Path(path).read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{path}: {one_sentence(error).partition(';')[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
