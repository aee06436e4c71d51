"""Files that are complete or absent: written to a temporary file and renamed; read correctly or refused with a clear error."""

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
from jaxtyping import Float
from pydantic import (
    BaseModel,
    ValidationError,
)

from pyvene_ext.io.errors import one_sentence


def cache_folder() -> Path:
    """The folder that caches reference statistics: $PYVENE_EXT_CACHE, else pyvene_ext in the user's cache folder."""
    if chosen := os.environ.get("PYVENE_EXT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvene_ext"


def output_path(wanted: Path | None, default: str | Path, flag: str = "--out") -> Path:
    """Choose the folder that a study writes, and check that it can be written.

    Args:
        wanted: the flag's value, if given.
        default: the folder otherwise.
        flag: the flag's name for messages.

    Returns:
        The folder, which need not exist yet.

    Raises:
        ValueError: it cannot be written.
    """
    path = wanted or Path(default)
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: {existing} is not a folder one may write in.")
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    Args:
        path: the file; its folder is created if necessary.

    Yields:
        Path: a temporary path in the same folder, which is renamed to `path` if the block succeeds and removed otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the same suffix, because NumPy, pandas and matplotlib choose a format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Args:
        path: the folder; the one that it lies in is created if necessary.

    Yields:
        Path: a folder to be made beside it, which takes the place of `path` if the block succeeds and is removed otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as aside:
        made = Path(aside) / "made"
        yield made
        if path.exists():
            path.rename(Path(aside) / "old")
        made.rename(path)


def remove_leftovers(*paths: Path) -> None:
    """Remove temporary files left by processes that were killed while writing.

    Args:
        *paths: the files that they were writing.
    """
    for path in paths:
        for leftover in path.parent.glob(f".{glob.escape(path.stem)}-????????{glob.escape(path.suffix)}"):
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_json(path: str | Path, value: Any) -> None:
    """Write indented UTF-8 JSON.

    Args:
        path: the file.
        value: anything that JSON can write, and NumPy's numbers.

    Raises:
        ValueError: a NaN or infinity, which JSON does not have (use None).
        TypeError: something that is no plain data.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Convert a NumPy number; JSON takes Python's only."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"JSON has no {type(value).__name__}; give plain data.")


def write_yaml(path: str | Path, value: Any) -> None:
    """Write YAML.

    Args:
        path: the file.
        value: plain data; keys keep their order.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Write a `.npy` file.

    Args:
        path: the file.
        array: an array of numbers.
    """
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV (RFC 4180).

    Args:
        path: the file.
        rows: values by column; columns are in the order in which rows first name them. None and NaN become empty cells.
    """
    import pandas as pd  # takes a second to import, and most programs write no table

    # As objects, because a column of 1 and 0.5 would otherwise be written as 1.0 and 0.5.
    table = pd.DataFrame(list(rows), dtype=object)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\r\n")  # as RFC 4180 has it


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV file.

    Args:
        path: the file.

    Returns:
        Its rows, cells as text by column.

    Raises:
        ValueError: the file is not CSV, or has rows of unequal length; names the file.
    """
    # Not with pandas, which silently fills short rows, takes surplus cells as an index and renames columns.
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file ({error}); save the table as CSV, in UTF-8.") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has rows of unequal length; give each a cell for every column of the first line.")
    return rows


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Args:
        text: the JSON text.

    Returns:
        The data.

    Raises:
        JSONDecodeError: whatever is wrong, including text that is not Unicode (half a surrogate pair).
    """
    try:
        return _in_unicode(json.loads(text), text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # not Unicode, a number of too many digits, nested too deeply
        raise json.JSONDecodeError(str(error), "", 0) from None


def parse_yaml(text: str) -> Any:
    """Parse YAML without executing tags.

    Args:
        text: the YAML text.

    Returns:
        Plain data.

    Raises:
        ValueError: whatever is wrong, in one line.
    """
    try:
        return _in_unicode(yaml.safe_load(text), text)
    except Exception as error:  # PyYAML's constructors raise any exception: `!!bool maybe` is a KeyError
        reason = " ".join(str(error).split())
        raise ValueError(f"not valid YAML: {type(error).__name__}, {reason}") from None


def _in_unicode(value: Any, text: str | bytes) -> Any:
    r"""Return `value`; UnicodeError if the text has a lone surrogate, which can only be written as \uD800 to \uDFFF."""
    if re.search(rb"\\u[dD][89a-fA-F]", text if isinstance(text, bytes) else text.encode()):
        json.dumps(value, ensure_ascii=False, default=str).encode()
    return value


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    Args:
        path: the file.

    Returns:
        Plain data.

    Raises:
        ValueError: the file is not UTF-8 or not YAML; names the file.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it in that encoding.") from None
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def read_npy(path: str | Path) -> np.ndarray:
    """Read a `.npy` file, without unpickling.

    Args:
        path: the file.

    Returns:
        The array, of numbers.

    Raises:
        ValueError: anything else; names the file.
    """
    content = Path(path).read_bytes()
    try:
        # Not np.load, whose message takes every other file for a pickle.
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy, ast and tokenize raise different errors for a damaged header
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a complete .npy file of numbers ({reason}).") from None


def read_head_matrix(path: str | Path) -> Float[np.ndarray, "layer head"]:
    """Read one real number per head from a `.npy` file.

    Args:
        path: the file.

    Returns:
        The numbers, as float64.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a `.npy` file of real numbers with two axes and at least one head.
    """
    matrix = read_npy(path)
    if matrix.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {matrix.dtype}, not real numbers; save it as float32 or float64.")
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{path} has shape {matrix.shape}; a [layer head] matrix with at least one head is needed.")
    return matrix.astype(np.float64)


Model = TypeVar("Model", bound=BaseModel)


def read_as(kind: type[Model], path: str | Path) -> Model:
    """Read a JSON file into a pydantic model.

    Args:
        kind: the model's class.
        path: the file.

    Returns:
        The model.

    Raises:
        ValueError: the file is not JSON or does not fit the class; names the file and the first error.
    """
    try:
        return kind.model_validate(parse_json(Path(path).read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{path}: {one_sentence(error).partition(';')[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
