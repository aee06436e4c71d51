"""What the name of a model means: a shipped or a fetched model, a folder, a GGUF file, or a repository on the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from pyvene_ext.models.loading import names
from pyvene_ext.models.loading.checks import check_no_adapter
from pyvene_ext.models.loading.errors import explained
from pyvene_ext.models.loading.fetch import PUBLISHED, fetched
from pyvene_ext.models.loading.gguf import dequantised
from pyvene_ext.models.loading.names import listed

HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def source_of(name_or_path: str | Path, dtype: str = "auto", revision: str | None = None) -> str:
    """Find the folder or hub id for transformers to load; a GGUF file is dequantised into a folder first.

    Args:
        name_or_path: see `load_model`.
        dtype: see `load_model`.
        revision: branch, tag or commit on the hub.

    Returns:
        A folder of a saved transformers model, or the id of a repository.

    Raises:
        ValueError: a file that is no model.
        FileNotFoundError: nothing has this name.
        OSError: an error of the hub.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in names.SHIPPED_MODELS:
        return str(names.TINY_FOLDER / name)
    if name in PUBLISHED:
        return str(dequantised(fetched(name), name, dtype, PUBLISHED[name].sha256))
    if path.is_dir():
        check_no_adapter(path, name)
        file = _gguf_in(path, name)
        return str(path if file is None else dequantised(file, name, dtype))
    if path.suffix == ".gguf":
        if (on_hub := re.fullmatch(rf"({HUB_ID}):(.+)", name)) and not path.exists():
            path = _download(on_hub[1], on_hub[3], revision)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}; check the path.")
        return str(dequantised(path, name, dtype))
    if path.exists():
        raise ValueError(f"{name} is a file; give the folder of a saved transformers model, or a .gguf file.")
    close = difflib.get_close_matches(name, [*names.SHIPPED_MODELS, *PUBLISHED], n=1)
    if "/" not in name and (close or name.startswith("tiny-")):
        guess = f"; perhaps {close[0]} is meant" if close else ""
        raise FileNotFoundError(
            f"no shipped model is called {name!r}{guess} (there are {listed(names.SHIPPED_MODELS)}, and to fetch "
            f"{listed(PUBLISHED)})."
        )
    if not re.fullmatch(HUB_ID, name):
        raise FileNotFoundError(f"there is no folder {name}; check the path.")
    return name


def _gguf_in(folder: Path, name: str) -> Path | None:
    """The only GGUF file of a folder that has no other weights; None if the folder is a saved transformers model."""
    has_config = (folder / "config.json").is_file()
    if has_config and any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"the folder {name} has {len(files)} GGUF files; give one of {listed(map(str, files))}.")
    if not files and not has_config:
        raise FileNotFoundError(
            f"the folder {name} has no config.json; give the folder of a saved transformers model, or one with a GGUF file."
        )
    return files[0] if files else None


def _download(repository: str, file: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # not in the cache, and the hub cannot be reached
            raise explained(error, repository, revision, "cannot be downloaded") from error
        raise FileNotFoundError(f"{repository} has no file {file}; look at its files on the hub.") from None
    except Exception as error:
        raise explained(error, repository, revision, "cannot be downloaded") from error
