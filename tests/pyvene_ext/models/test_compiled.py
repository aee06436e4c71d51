"""Compiled models are refused by everything that hooks them, before anything runs, in a sentence that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pyvene import IntervenableConfig, RepresentationConfig, ZeroIntervention

from pyvene_ext import ActivationPatch, IntervenableModel, patch, run
from pyvene_ext.engine.plain import reference_for
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.heads.lens import direct_logit_attribution, logit_lens
from pyvene_ext.specs.ablation import all_heads
from tests.random_prompts import random_prompts
from tests.tiny_random import random_inputs, random_model

BASE = random_prompts((6, 8), seed=1)
SOURCE = replace(random_prompts((6, 8), seed=2), answers=BASE.answers)
PATCHES = [ActivationPatch(site="z", layer=1, heads=(1,))]
MEAN = all_heads(random_model("llama3_1").config, "mean")[:1]


def compile(module: Any) -> Any:
    return torch.compile(module, backend="eager")


COMPILED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the model": (lambda m: compile(m), "this model is compiled by torch.compile"),
    "the model in place": (lambda m: m.compile(backend="eager") or m, "the model is compiled by torch.compile"),
    "its forward": (lambda m: setattr(m, "forward", compile(m.forward)) or m, "the forward of the model is compiled"),
    "the decoder": (lambda m: setattr(m, "model", compile(m.model)) or m, "model is compiled by torch.compile"),
    "a block": (lambda m: m.model.layers[1].compile(backend="eager") or m, r"model.layers.1 is compiled by torch.comp"),
}


def zero_a_block(model: Any) -> None:
    item = RepresentationConfig(1, "block_output", "pos", 1, intervention_type=ZeroIntervention)
    IntervenableModel(IntervenableConfig([item]), model)(random_inputs(), unit_locations={"base": [[[5]] * 3]})


USED: dict[str, Callable[[Any], Any]] = {
    "run": lambda m: run(m, all_heads(random_model("llama3_1").config)[:1], BASE, progress=False),
    "a mean": lambda m: reference_for(MEAN, m, BASE, progress=False),
    "sweep": lambda m: sweep(m, MEAN, BASE, progress=False),
    "patch": lambda m: patch(m, PATCHES, BASE, SOURCE, progress=False),
    "atp": lambda m: atp(m, PATCHES, BASE, SOURCE, progress=False),
    "lens": lambda m: logit_lens(m, BASE, progress=False),
    "direct attribution": lambda m: direct_logit_attribution(m, BASE, progress=False),
    "IntervenableModel": zero_a_block,
}


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_models_are_refused(what: str, used: str) -> None:
    make, said = COMPILED[what]
    model = make(random_model("llama3_1"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=rf"^{said}.*hooks do not reach into compiled code; "):
        USED[used](model)
