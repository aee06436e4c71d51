"""Interventions come back from their files as they were, or are refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pyvene
import torch
from pyvene import AdditionIntervention, IntervenableConfig, RepresentationConfig, VanillaIntervention
from pyvene.models import interventions as classes
from torch import Tensor

from pyvene_ext import IntervenableModel
from tests.tiny_random import random_inputs, random_model

WIDTH = 42
VECTOR = torch.linspace(-1, 1, WIDTH)
PLACES = {"sources->base": ([[[5]] * 3], [[[5]] * 3])}
PARTITION = [[0, 2], [7, 3, 9]]


def item(**fields: Any) -> RepresentationConfig:
    return RepresentationConfig(1, "block_output", "pos", 1, **fields)


def of(cls: str, change: Callable[[Any], None] | None = None, **fields: Any) -> Any:
    """An instance, changed after it was built."""
    intervention = getattr(classes, cls)(**fields)
    if change is not None:
        change(intervention)
    return item(intervention=intervention)


ITEMS: dict[str, RepresentationConfig] = {
    "a width set later": of("VanillaIntervention", lambda x: x.set_interchange_dim(5), embed_dim=WIDTH),
    "a width of one without any": of("VanillaIntervention", lambda x: x.set_interchange_dim(5)),
    "a rank": of("LowRankRotatedSpaceIntervention", embed_dim=WIDTH, low_rank_dimension=3),
    "a rank by type": item(intervention_type=classes.LowRankRotatedSpaceIntervention, low_rank_dimension=3),
    "a vector": of("AdditionIntervention", source_representation=VECTOR),
    "a vector by type": item(intervention_type=AdditionIntervention, source_representation=VECTOR),
    "a rotation": item(intervention_type=classes.RotatedSpaceIntervention),
    "in another dtype": of("RotatedSpaceIntervention", lambda x: x.double(), embed_dim=WIDTH),
    "boundaries": of(
        "BoundlessRotatedSpaceIntervention", lambda x: x.set_intervention_boundaries(0.2), embed_dim=WIDTH
    ),
    "a mask": of("SigmoidMaskIntervention", lambda x: x.mask.data.normal_(), embed_dim=WIDTH),
    "a partition": of("VanillaIntervention", embed_dim=WIDTH, subspace_partition=PARTITION),
    "a latent space": of(
        "AutoencoderIntervention", lambda x: x.set_interchange_dim([0, 2, 3]), embed_dim=WIDTH, latent_dim=7
    ),
    "a sparse one": of(
        "JumpReLUAutoencoderIntervention",
        lambda x: [p.data.normal_() for p in x.parameters()],
        embed_dim=WIDTH,
        low_rank_dimension=7,
    ),
}


def run(iv: Any, subspaces: Any = None) -> Tensor:
    intervention = next(iter(iv.interventions.values()))
    needs_source = not intervention.is_source_constant
    source = random_inputs(seed=1) if needs_source else None
    places = PLACES if needs_source else {"base": PLACES["sources->base"][1]}
    return iv(random_inputs(), source, places, subspaces=subspaces)[1].logits


@pytest.mark.parametrize("what", ITEMS)
def test_what_is_saved_acts_the_same_when_loaded_and_saved_again(what: str, tmp_path: Path) -> None:
    model = random_model("llama3_1")
    iv = IntervenableModel(IntervenableConfig([ITEMS[what]]), model)
    subspaces = [[[0]] * 3] if what == "a partition" else None
    drawn = torch.random.get_rng_state()
    iv.save(str(tmp_path / "once"))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    IntervenableModel.load(str(tmp_path / "once"), model).save(str(tmp_path / "twice"))
    again = IntervenableModel.load(str(tmp_path / "twice"), model)
    expected = run(iv, subspaces)
    assert torch.equal(run(again, subspaces), expected)
    assert not torch.allclose(expected, model(**random_inputs()).logits)
    trained, loaded = (sum(p.numel() for p in x.get_trainable_parameters()) for x in (iv, again))
    assert trained == loaded


@pytest.mark.parametrize(("kind", "files"), [(VanillaIntervention, 0), (classes.RotatedSpaceIntervention, 2)])
def test_only_what_has_weights_has_a_file_of_them(kind: type, files: int, tmp_path: Path) -> None:
    both = [item(intervention_type=kind), item(intervention_type=kind)]
    IntervenableModel(IntervenableConfig(both), random_model("llama3_1")).save(str(tmp_path))
    assert len(list(tmp_path.glob("*.bin"))) == files


class Own(VanillaIntervention):
    """A class that no one else has."""


REFUSED: dict[str, tuple[Any, str]] = {
    "a function": (
        lambda base, source: 2 * base,
        r"\(LambdaIntervention\) cannot be saved: it is a function or a class of",
    ),
    "a class of one's own": (Own(), r"\(Own\) cannot be saved: it is a function or a class of your own"),
    "a function inside": (
        of("VanillaIntervention", lambda x: vars(x).update(scale=abs)),
        "its scale is a builtin_func",
    ),
    "a module inside": (
        of("VanillaIntervention", lambda x: setattr(x, "extra", torch.nn.Linear(2, 2))),
        r"VanillaIntervention\(...\) fails with the values it has",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_not_be_loaded_is_not_saved(what: str, tmp_path: Path) -> None:
    one, said = REFUSED[what]
    one = one if isinstance(one, RepresentationConfig) else item(intervention=one)
    iv = IntervenableModel(IntervenableConfig([one]), random_model("llama3_1"))
    with pytest.raises(ValueError, match=said) as refusal:
        iv.save(str(tmp_path / "new"))
    assert "\n" not in str(refusal.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["a width set later", "a rotation", "a vector by type"])
def test_folders_written_by_pyvene_are_read_too(what: str, tmp_path: Path) -> None:
    model = random_model("llama3_1")
    theirs = pyvene.IntervenableModel(IntervenableConfig([ITEMS[what]]), model)
    theirs.save(str(tmp_path))
    assert torch.equal(run(IntervenableModel.load(str(tmp_path), model)), run(theirs))


def test_a_linked_pair_stays_linked(tmp_path: Path) -> None:
    kind = classes.RotatedSpaceIntervention
    pair = [
        RepresentationConfig(layer, "block_output", "pos", 1, intervention_type=kind, intervention_link_key=0)
        for layer in (0, 1)
    ]
    model = random_model("llama3_1")
    IntervenableModel(IntervenableConfig(pair), model).save(str(tmp_path))
    one, other = IntervenableModel.load(str(tmp_path), model).interventions.values()
    assert one is other
