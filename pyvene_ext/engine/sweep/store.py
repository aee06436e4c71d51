"""A folder that holds the finished waves of a sweep while it runs, and the merged arrays afterwards.

A wave is written whole or not at all, so killing the process at any moment loses no more than the current wave. While the sweep
runs the folder holds `manifest.json`, `lock`, `owner` (of the lock) and one `.npz` per wave; when it is complete, the manifest
and one `.npy` per array.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from pyvene_ext.io.files import atomic_path, parse_json
from pyvene_ext.io.hashes import data_hash

FORMAT = 1
SHOWN = 24  # characters; longer facts, such as hashes, are named without their values
DIGEST = xxhash.xxh3_128().digest_size


class Store:
    """The waves of one sweep on disk, for one process or one launched group at a time; use it in a `with` block.

    Args:
        folder: created if it does not exist.
        facts: what the numbers depend on, as JSON-able data: hashes of weights, config, prompts, specs; metric, dtype ...
        plan: how the work is cut into waves, as JSON-able data. An existing store keeps the plan that it was created with,
            because other batches may round differently and a resumed run should give the same bits.
        member: this process is another rank of the group whose first rank holds the store; it only adds waves and takes no lock.

    Raises:
        ValueError: the folder holds a run with other facts, is in use by another process, or cannot hold a store.
    """

    def __init__(
        self, folder: str | Path, facts: Mapping[str, Any], plan: Mapping[str, Any], *, member: bool = False
    ) -> None:
        self.folder = Path(folder)
        # No fallback to a soft lock on file systems without locks: it would outlive a killed process.
        self._lock = FileLock(self.folder / "lock", timeout=0.1, thread_local=False, fallback_to_soft=False)
        new = {"format": FORMAT, "complete": False, "facts": dict(facts), "plan": dict(plan), "arrays": {}}
        # Through JSON and back, so that the first run sees exactly what a resumed one will.
        self._manifest: dict[str, Any] = json.loads(json.dumps(new, allow_nan=False))
        try:
            self._open(member)
        except OSError as error:
            self.close()
            reason = error.strerror or error
            raise ValueError(f"{folder} cannot hold a store: {reason}; choose another folder.") from error
        except BaseException:
            self.close()
            raise

    def _open(self, member: bool) -> None:
        found = self._found()
        if member and not found:
            raise ValueError(f"{self.folder} holds no store yet; the first rank must open it before the others.")
        if not member and not (found and found["complete"]):
            self._take_lock()
            found = self._found()  # again, because the last holder may have finished in between
        self._manifest = found or self._manifest
        if self._manifest["complete"]:  # nothing more is written: no lock is needed, and the folder may be read-only
            self.close()
            self._tidy()
        elif not member:
            for pattern in (".manifest-????????.json", ".*-????????.npy", f"{self._waves.name}/.*"):
                for leftover in sorted(self.folder.glob(pattern)):  # from a process killed while writing
                    leftover.unlink(missing_ok=True)
            if not found:
                self._write_manifest(self._manifest)

    def _found(self) -> dict[str, Any] | None:
        """The manifest on disk, if there is one; ValueError if it is damaged or of a run with other facts."""
        path = self.folder / "manifest.json"
        try:
            found = parse_json(path.read_bytes())
        except FileNotFoundError:
            if foreign := sorted(self.folder.glob("*.npy")):
                raise ValueError(
                    f"{foreign[0]} does not belong to a store, which could overwrite it; choose another folder."
                ) from None
            return None
        except ValueError:
            found = None
        intact = isinstance(found, dict) and found.pop("hash", None) == data_hash(found)
        if not intact or found.keys() != self._manifest.keys() or found["format"] != FORMAT:
            raise ValueError(
                f"{path} is damaged, or not of format {FORMAT}; choose another folder, or delete {self.folder}."
            )
        old, new = found["facts"], self._manifest["facts"]
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if names:
            state, finish = ("a finished", "") if found["complete"] else ("an unfinished", "finish that run, ")
            different = ", ".join(_difference(name, old.get(name), new.get(name)) for name in names)
            raise ValueError(
                f"{self.folder} holds {state} run that differs in {different}; {finish}choose another folder, or delete this one."
            )
        return found

    def _take_lock(self) -> None:
        """Take the lock of the one process that may write; the system releases it when the process dies, however it dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = self.folder / "owner"  # a file of its own, because not every system lets others read a locked one
        try:
            self._lock.acquire()
        except Timeout:
            holder = (owner.read_text(encoding="utf-8").strip() if owner.exists() else "") or "just started"
            raise ValueError(
                f"{self.folder} is in use by another process ({holder}); wait until it ends, or choose another folder."
            ) from None
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that the store was created with."""
        return self._manifest["plan"]

    @property
    def _waves(self) -> Path:
        # Named by facts and plan, so that a wave of another run can never be read as one of this run.
        return self.folder / f"waves-{data_hash([self._manifest['facts'], self.plan])}"

    @property
    def finished(self) -> dict[int, dict[str, np.ndarray]]:
        """The waves on disk by number, including other ranks'; read again with each call. A damaged wave counts as absent."""
        waves = {}
        for path in sorted(self._waves.glob("[0-9]*.npz")):
            content = path.read_bytes()
            number = int(path.stem) if path.stem.isdecimal() else -1
            if xxhash.xxh3_128_digest(content[:-DIGEST], seed=max(number, 0)) == content[-DIGEST:] and number >= 0:
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    waves[number] = dict(arrays)
        return waves

    def add(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Save a finished wave; it is on disk when this returns.

        Args:
            number: the wave's, counted from 0.
            arrays: such as clean [n_prompts] and intervened [n_specs n_prompts].
        """
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # mypy thinks of savez's own flag
        content = buffer.getvalue()
        # The digest comes last because a zip file may have trailing bytes: np.load reads the file as it is.
        _write(self._waves / f"{number:06d}.npz", content + xxhash.xxh3_128_digest(content, seed=number))

    def complete(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the merged arrays, then mark the manifest as complete, then remove what only an unfinished run needs.

        Args:
            arrays: of the whole sweep, by name.
        """
        about = {}
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            content = buffer.getvalue()
            _write(self.folder / f"{name}.npy", content)
            about[name] = {"shape": list(array.shape), "hash": xxhash.xxh3_128_hexdigest(content)}
        complete = self._manifest | {"complete": True, "arrays": about}
        self._write_manifest(complete)
        self._manifest = complete
        self._tidy()

    @property
    def result(self) -> dict[str, np.ndarray] | None:
        """The merged arrays of a complete store; None if it is unfinished. Raises ValueError for a missing or damaged file."""
        if not self._manifest["complete"]:
            return None
        arrays = {}
        for name, about in self._manifest["arrays"].items():
            path = self.folder / f"{name}.npy"
            content = path.read_bytes() if path.exists() else b""
            if xxhash.xxh3_128_hexdigest(content) != about["hash"]:
                raise ValueError(f"{path} is missing or damaged; delete {self.folder} and run again.")
            arrays[name] = np.load(io.BytesIO(content), allow_pickle=False)
        return arrays

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest | {"hash": data_hash(manifest)}, indent=2, ensure_ascii=False, allow_nan=False)
        _write(self.folder / "manifest.json", (text + "\n").encode())

    def _tidy(self) -> None:
        """Remove what a complete store does not need; leftovers that cannot be removed do no harm."""
        shutil.rmtree(self._waves, ignore_errors=True)
        # A process that still acquires the removed lock reads the manifest next, and finds it complete.
        for name in ("lock", "owner"):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

    def close(self) -> None:
        """Release the lock."""
        with contextlib.suppress(OSError):  # of a file system without locks
            self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _difference(name: str, old: Any, new: Any) -> str:
    """The name of a fact that differs, with both values where they are short."""
    before, now = (json.dumps(value, ensure_ascii=False) for value in (old, new))
    return f"{name} ({before} there, {now} now)" if max(len(before), len(now)) <= SHOWN else name


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and flush it to disk, so that files survive a power cut in the order of writing."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # Windows opens no folder, and some network file systems cannot sync one
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
