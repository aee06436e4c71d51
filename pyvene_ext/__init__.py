"""pyvene-ext: causal interventions on open decoder language models that can be trusted.

Importing it registers the model cards with pyvene.
"""

import modelcards

modelcards.register()

from pyvene_ext.forced_attention import force  # noqa: E402
from pyvene_ext.intervenable import IntervenableModel  # noqa: E402
from pyvene_ext.loading import TINY_MODELS, load_model  # noqa: E402
from pyvene_ext.patching import Patched, all_patches, all_paths, patch  # noqa: E402
from pyvene_ext.paths import PathPatch  # noqa: E402
from pyvene_ext.prompts import Prompt, PromptSet  # noqa: E402
from pyvene_ext.reference import Reference  # noqa: E402
from pyvene_ext.runner import Result, reference_for, run  # noqa: E402
from pyvene_ext.runs import version_of  # noqa: E402
from pyvene_ext.spec_files import load_specs, save_specs  # noqa: E402
from pyvene_ext.specs import Ablation, ActivationPatch, ForcedAttention, all_heads  # noqa: E402

__version__ = version_of("pyvene-ext") or "unknown"  # of a source tree that is not installed

__all__ = [
    "TINY_MODELS",
    "Ablation",
    "ActivationPatch",
    "ForcedAttention",
    "IntervenableModel",
    "Patched",
    "PathPatch",
    "Prompt",
    "PromptSet",
    "Reference",
    "Result",
    "all_heads",
    "all_patches",
    "all_paths",
    "force",
    "load_model",
    "load_specs",
    "patch",
    "reference_for",
    "run",
    "save_specs",
    "verify_card",
]


def __getattr__(name: str) -> object:
    # Late, because Python warns when `python -m pyvene_ext.verify` finds its module imported already.
    if name == "verify_card":
        from pyvene_ext.verify import verify_card

        return verify_card
    raise AttributeError(f"module 'pyvene_ext' has no attribute {name!r}")
