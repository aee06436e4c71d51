"""Families in pyvene's own format: the names they bind, and their folders at work inside plain pyvene."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import pyvene
import torch
from transformers import PreTrainedTokenizerBase

import modelcards
from modelcards import CARDS, Card
from modelcards.template import PREFIX
from tests.saved_models import save_random_model

MODELCARDS = Path(modelcards.__file__).parent
ROLES = ("", "_lm", "_classifier")

# Families of different kinds, three of which pyvene has, each with a component that it lacks or has wrong: where that lives, and
# which entries of the last axis are those of its head 0, or of the whole.
COPIED = {
    "gemma2": ("mlp_contribution", "model.layers.1.post_feedforward_layernorm", "output", (0, 36)),
    "gpt2": ("mlp_neurons", "transformer.h.1.mlp.c_proj", "input", (0, 4 * 36)),
    "gpt_neox": ("mlp_up", "gpt_neox.layers.1.mlp.dense_h_to_4h", "output", (0, 53)),
    "phi3": ("mlp_up", "model.layers.1.mlp.gate_up_proj", "output", (53, 106)),
    "olmo2": ("head_attention_value_output", "model.layers.1.self_attn.o_proj", "input", (0, 10)),
}

# Runs where `modelcards` and `pyvene_ext` cannot be imported: zeroes a component of layer 1 at the last position by plain pyvene
# with the copied dictionaries, and by a hook.
INSIDE_PYVENE = """
import json, sys
from importlib import import_module
sys.modules.update(dict.fromkeys(("modelcards", "pyvene_ext")))
sys.path.insert(0, sys.argv[1])
import pyvene, torch

def differences(family, name, checkpoint, component, path, side, part):
    copied = import_module(f"pyvene.models.{family}.modelings_intervenable_{family}")
    assert copied.__file__.startswith(sys.argv[1])
    config, tokenizer, model = getattr(copied, f"create_{name}")(checkpoint, dtype=torch.float32)
    pyvene.type_to_module_mapping[type(model)] = getattr(copied, f"{name}_lm_type_to_module_mapping")
    pyvene.type_to_dimension_mapping[type(model)] = getattr(copied, f"{name}_lm_type_to_dimension_mapping")
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    unit, at = ("h.pos", [[[0]], [[3]]]) if component.startswith("head_") else ("pos", [[3]])
    item = pyvene.RepresentationConfig(1, component, unit, 1, intervention_type=pyvene.ZeroIntervention)
    untouched = model(**inputs).logits
    _, found = pyvene.IntervenableModel(pyvene.IntervenableConfig([item]), model)(inputs, unit_locations={"base": [at]})

    def zero(x):
        x = x.clone()
        x[:, 3, slice(*part)] = 0
        return x

    module = model.get_submodule(path)
    if side == "input":
        module.register_forward_pre_hook(lambda _, args: (zero(args[0]),))
    else:
        module.register_forward_hook(lambda _, args, output: zero(output))
    expected = model(**inputs).logits
    return [float((other - expected).abs().max()) for other in (found.logits, untouched)]

print("\\n" + json.dumps({asked[0]: differences(*asked) for asked in json.loads(sys.argv[2])}))
"""


@pytest.fixture(scope="module")
def inside_pyvene(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The intervened and the untouched run's largest difference from the hook's, by family, in a pyvene with our folders."""
    root = tmp_path_factory.mktemp("pyvene")
    models = root / "pyvene" / "models"
    shutil.copytree(Path(pyvene.__file__).parent, root / "pyvene", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(MODELCARDS / "template.py", models)
    asked = []
    for family, place in COPIED.items():
        shutil.copytree(MODELCARDS / family, models / family, dirs_exist_ok=True)
        save_random_model(family, root / f"checkpoint_{family}")
        asked.append((family, card_of(family).name, str(root / f"checkpoint_{family}"), *place))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INSIDE_PYVENE, str(root), json.dumps(asked)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def card_of(family: str) -> Card:
    return next(card for card in CARDS if card.family == family)


@pytest.mark.packaging
@pytest.mark.parametrize("family", COPIED)
def test_a_copied_folder_works_in_plain_pyvene(family: str, inside_pyvene: dict[str, list[float]]) -> None:
    intervened, untouched = inside_pyvene[family]
    assert intervened < 1e-5 < 1e-2 < untouched


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.family)
def test_a_family_binds_the_names_of_pyvene_without_taps(card: Card) -> None:
    bound = vars(import_module(f"modelcards.{card.family}.modelings_intervenable_{card.family}"))
    mappings = {
        f"{card.name}{role}_type_to_{of}_mapping" for role in ROLES[: len(card.plain)] for of in ("module", "dimension")
    }
    assert {name for name in bound if name.endswith("_mapping")} == mappings
    for name in mappings:
        assert PREFIX not in str(bound[name])
    for role, model_class in zip(ROLES, card.plain, strict=False):
        assert bound[f"{card.name}{role}_type_to_module_mapping"].items() <= card.mapping(model_class).items()
        assert bound[f"{card.name}{role}_type_to_dimension_mapping"].items() <= card.dimension_mapping.items()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.family)
def test_create_loads_a_checkpoint(card: Card, tmp_path: Path) -> None:
    saved = save_random_model(card.family, tmp_path)
    config, tokenizer, model = card.create(str(tmp_path))
    assert type(model) is type(saved) and type(model) is list(card.plain)[1]
    assert (model.dtype, config.model_type) == (torch.bfloat16, card.model_type)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(saved.parameters(), model.parameters(), strict=True))
