"""pyvene-ext: trustworthy causal interventions on open decoder language models.

Rooms, in the order in which data flows; a room imports only from those above it:

    io            files, hashes, seeds, progress bars, optional packages, the command line
    models        loading, devices, hooks, and running a model block by block
    prompts       prompt sets, tokenized prompts, named positions, word problems, parallel text
    stats         intervals, correlations, controls
    intervenable  IntervenableModel, its checks, generation, the intervention classes, statistics of activations
    specs         interventions as data, one module for each kind
    engine        resolving specs on prompts, metrics, the plain engine and the sweep engine
    methods       patching, attribution, circuits, steering, roles of heads, solving word problems, reasoning
    runs          what studies share: flags, run folders, metadata, figures
    report        one HTML page for one or more runs

The names that most programs need are here, and are imported on first use; `patching`, `attribution`, `edges`, `circuits` and
`metrics` are short names of modules in the rooms. Once this package and pyvene are both imported, in either order, pyvene's
mappings contain this project's cards.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import lazy_loader
import wrapt

from pyvene_ext.io.packages import ImportQuietly, version_of

__version__ = version_of("pyvene-ext") or "unknown"  # of a source tree that is not installed


def _import_cards(_: ModuleType) -> None:
    if "modelcards" not in sys.modules:  # otherwise modelcards itself is importing pyvene
        importlib.import_module("modelcards")


sys.meta_path.insert(0, ImportQuietly("pyvene"))  # it announces on standard output which of its backends are missing
# Importing pyvene takes five seconds; `--help` does without it.
wrapt.register_post_import_hook(lambda modelcards: modelcards.register(), "modelcards")
wrapt.register_post_import_hook(_import_cards, "pyvene")

# The public names are those of __init__.pyi, which type checkers read as well.
_of_stub, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
ROOMS = ("io", "models", "prompts", "stats", "specs", "engine", "methods", "runs", "report")


def __getattr__(name: str) -> Any:
    try:
        return _of_stub(name)
    except AttributeError:
        if name in __all__ or name.startswith("_"):
            raise
        for room in ROOMS:  # their stubs, which import nothing
            if name in importlib.import_module(f"{__name__}.{room}").__all__:
                raise AttributeError(
                    f"pyvene_ext has no {name!r} of its own: it is pyvene_ext.{room}.{name}."
                ) from None
        raise
