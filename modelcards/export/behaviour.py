"""What the pyvene of a checkout can do, found out by asking it, whatever its functions are called."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from modelcards.export.checkout import Checkout

# Runs in the checkout; nothing of this project can be imported there.
_ASK = """
import importlib, json, sys
sys.modules.update(dict.fromkeys(("modelcards", "pyvene_ext")))
import pyvene, torch
from pyvene.models.modeling_utils import get_dimension_by_component
from transformers import LlamaConfig, LlamaModel

class Asked:
    pass

def width(module, name, sizes, proposals):
    pyvene.type_to_dimension_mapping[Asked] = {"it": tuple(proposals)}
    try:
        return get_dimension_by_component(Asked, getattr(importlib.import_module(module), name)(**sizes), "it")
    except Exception:
        return None

def edits_a_copy():
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    place = pyvene.RepresentationConfig(0, "block_input", "pos", 1, intervention_type=pyvene.ZeroIntervention)
    model, embeddings = LlamaModel(LlamaConfig(**sizes)), torch.ones(1, 2, 8)
    intervenable = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model)
    intervenable({"inputs_embeds": embeddings}, unit_locations={"base": [[[0]]]})
    return bool(embeddings.all())

questions = json.load(sys.stdin)
answer = {"edits_a_copy": edits_a_copy(), "widths": [width(*question) for question in questions]}
print("\\n" + json.dumps(answer))
"""


class Question(NamedTuple):
    """What width pyvene reads from proposals of a dimension mapping, for a config of these sizes."""

    config_class: type
    sizes: tuple[tuple[str, Any], ...]
    proposals: tuple[str, ...]


class Behaviour(NamedTuple):
    """What a checkout's pyvene does.

    Attributes:
        edits_a_copy: whether an intervention edits a copy of a module's input, which others may read as well.
        widths: the answer to each question; None where pyvene raises or gives none.
    """

    edits_a_copy: bool
    widths: dict[Question, int | None]


def behaviour(checkout: Checkout, questions: Sequence[Question]) -> Behaviour:
    """Ask the pyvene that is committed in a checkout.

    Args:
        checkout: left as it is.
        questions: about widths.

    Returns:
        The answers.

    Raises:
        ValueError: that pyvene cannot be imported.
    """
    asked = [
        [one.config_class.__module__, one.config_class.__name__, dict(one.sizes), one.proposals] for one in questions
    ]
    copies, widths = _answers(checkout, json.dumps(asked))
    return Behaviour(copies, dict(zip(questions, widths, strict=True)))


def _answers(checkout: Checkout, questions: str) -> tuple[bool, list[int | None]]:
    with checkout.copy() as folder:
        command = [sys.executable, "-W", "ignore", "-c", _ASK]
        done = subprocess.run(
            command, cwd=folder, env=checkout.environment, input=questions, capture_output=True, text=True
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise ValueError(f"the pyvene of {checkout.root} cannot be asked what it can do: {said}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["edits_a_copy"], answer["widths"]
