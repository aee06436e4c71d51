"""Run folders: what was run, with what, and files that are complete or absent.

A run folder holds `config.yaml` (running it again gives the same), `metadata.json` (model, data and weight hashes, versions,
device, dtype, seed, time), arrays, tables and `figures/`. Every file is written aside and renamed, so that a killed process
never leaves half of one behind.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import yaml
from torch import Tensor, nn

from pyvene_ext.devices import input_device, on_cpu, processes

REPORTED_PACKAGES = ("pyvene-ext", "pyvene", "torch", "transformers", "numpy", "scipy", "datasets")


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


def write_config(path: str | Path, config: Any) -> None:
    """Write a dataclass of flags as the YAML that `--config` reads."""
    values = dataclasses.asdict(config)
    write_yaml(path, {name: str(value) if isinstance(value, Path) else value for name, value in values.items()})


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table, its columns named as in the first row; NaN is an empty cell."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises JSONDecodeError for whatever cannot be read, and for text that is not Unicode (half an emoji)."""
    try:
        return _in_unicode(json.loads(text), text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeError:
        reason = "not Unicode text"
    except ValueError:  # Python's limit to the digits of a number
        reason = "a number too long to read"
    raise json.JSONDecodeError(reason, "", 0)


def parse_yaml(text: str) -> Any:
    """What YAML says, of plain data only: no tag runs anything. Raises ValueError, in one line, for whatever cannot be read."""
    if re.search(r"[\da-fA-F_:]{3000}", text):  # of base 16 it would be read, but could not be written or shown
        raise ValueError("not valid YAML: a number too long to read")
    try:
        return _in_unicode(yaml.safe_load(text), text)
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeError:
        reason = "not Unicode text"
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except (
        Exception
    ) as error:  # PyYAML's readers of single values have no error of their own: !!bool maybe is a KeyError
        reason = f"a value that its tag does not fit, {type(error).__name__}"
    raise ValueError(f"not valid YAML: {reason}")


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


def data_hash(value: Any) -> str:
    """Hash of JSON-able data: equal data, equal hash, on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def weight_hash(model: nn.Module) -> str:
    """Hash of every parameter and buffer: name, shape, dtype and bytes (xxh3, some GB per second).

    It is the same wherever the weights are, and reads them one by one, so that offloaded ones need not fit in memory together.
    """
    return tensors_hash((name, on_cpu(model, name, tensor)) for name, tensor in sorted(model.state_dict().items()))


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors on the CPU in their order: name, shape, dtype and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_hash(model: nn.Module) -> str:
    """Hash of a transformers model's config, which counts beside the weights: a soft-cap or a RoPE base is no weight."""
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    return data_hash(
        {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    )


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """A generator for one named use of the run's one seed, so that a new draw somewhere never shifts another."""
    return np.random.default_rng([seed, *(xxhash.xxh32_intdigest(str(name).encode()) for name in names)])


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or the first of those that `accelerate launch` has started."""
    return processes().is_main_process


def choose_device(wanted: str | None) -> str:
    """The device of this process: `wanted` if given, else a GPU if there is one; of several processes each takes its own."""
    group = processes()
    if group.num_processes > 1 and wanted in (None, "cuda"):
        return str(group.device)
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def metadata(model: nn.Module, /, **facts: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run: command, weights, versions, device, dtype, time, and `facts` (model, seed ...)."""
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    return {
        "command": shlex.join(["python", *sys.argv]),
        **facts,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": getattr(config, "model_type", None),
        "weight_hash": weight_hash(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        "versions": {name: version_of(name) for name in REPORTED_PACKAGES},
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str | None:
    """What is installed, as its metadata say; None for what is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
