"""Run folders: what was run, with what, and files that are complete or absent.

A run folder holds `config.yaml` (running it again gives the same), `metadata.json` (model, data and weight hashes, versions,
device, dtype, seed, time), arrays, tables and `figures/`. Every file is written aside and renamed, so that a killed process
never leaves half of one behind.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import yaml
from torch import nn

REPORTED_PACKAGES = ("pyvene-ext", "pyvene", "torch", "transformers", "numpy", "scipy", "datasets")


def cache_folder() -> Path:
    """Where reference statistics are kept between runs: $PYVENE_EXT_CACHE, else pyvene_ext in the user's cache folder."""
    if chosen := os.environ.get("PYVENE_EXT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvene_ext"


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


def data_hash(value: Any) -> str:
    """Hash of JSON-able data: equal data, equal hash, on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def weight_hash(model: nn.Module) -> str:
    """Hash of every parameter and buffer: name, shape, dtype and bytes (xxh3, some GB per second)."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
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


def metadata(model: nn.Module, /, **facts: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run: weights, versions, device, dtype and time, then `facts` (model name, seed ...)."""
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    return {
        **facts,
        "model_type": getattr(config, "model_type", None),
        "weight_hash": weight_hash(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "versions": {name: _version(name) for name in REPORTED_PACKAGES},
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Resumable:
    """Rows of an array computed one by one, kept on disk until all are there.

    A folder with one `.npy` a row and a `key.json` that says what they belong to. Rows of another key are refused: resuming a
    run with other data, weights or settings would mix numbers that do not belong together.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any]) -> None:
        self.folder, self.key = Path(folder), key
        self._key_file = self.folder / "key.json"
        if self._key_file.exists():
            found = json.loads(self._key_file.read_text(encoding="utf-8"))
            different = sorted(name for name in {*found, *key} if found.get(name) != key.get(name))
            if different:
                raise ValueError(
                    f"{self.folder} holds an unfinished run with another {', '.join(different)}; finish that run, "
                    "choose another output, or delete the folder."
                )

    def row(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The row called `name`: read if an earlier run finished it, else computed and kept."""
        path = self.folder / f"{name}.npy"
        if path.exists() and self._key_file.exists():
            return np.load(path, allow_pickle=False)
        value = compute()
        if not self._key_file.exists():
            write_json(self._key_file, self.key)
        write_npy(path, value)
        return value

    def discard(self) -> None:
        """Remove the folder: the whole result is written elsewhere."""
        shutil.rmtree(self.folder)
