"""pyvene-ext: causal interventions on open decoder language models that can be trusted.

Rooms, in the order in which data flows; a room imports only those before it:

    io            files, hashes, seeds, the command line
    models        loading, devices, hooks, and the model's own blocks run piece by piece
    prompts       prompt sets, tokenised prompts, named positions, word problems, parallel text
    stats         intervals, correlations, controls
    intervenable  IntervenableModel, its checks, generation, the intervention classes, statistics of activations
    specs         interventions as data, one module a kind
    engine        specs resolved on prompts, metrics, the plain engine, and the sweep engine
    methods       patching, attribution, what heads do, reasoning
    runs          what a study leaves behind: run folders, metadata, figures
    report        one page for one run or several

What a first program needs is here, and is imported when it is first used; `sweep`, `patching`, `attribution`, `edges`, `circuits`
and `metrics` are short names of modules in the rooms. pyvene's mappings hold this project's cards as soon
as both packages are imported, in whichever order.
"""

import importlib
import sys
from types import ModuleType

import lazy_loader
import wrapt

from pyvene_ext.io.packages import version_of

__version__ = version_of("pyvene-ext") or "unknown"  # of a source tree that is not installed


def _bring_cards(_: ModuleType) -> None:
    if "modelcards" not in sys.modules:  # if it is, it is what imports pyvene
        importlib.import_module("modelcards")


# pyvene takes five seconds to import; a command line that asks for its help alone does without it.
wrapt.register_post_import_hook(lambda modelcards: modelcards.register(), "modelcards")
wrapt.register_post_import_hook(_bring_cards, "pyvene")

# The public names are those of __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
