"""Wrapped models, and those whose batches mix prompts, are refused in one sentence that says what to give instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import pyvene_ext as px
from modelcards import card_of
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model


class Peft(nn.Module):
    """What peft wraps around a model."""

    def __init__(self, prompt_learning: bool) -> None:
        super().__init__()
        self.base_model = random_model("llama3_1")
        self.peft_config = {"default": SimpleNamespace(is_prompt_learning=prompt_learning)}


@pytest.mark.parametrize(
    ("wrapper", "advice"),
    [
        (lambda: Peft(False), "this Peft wraps a model with adapters; give its get_base_model()"),
        (lambda: Peft(True), "this Peft learns a prompt"),
        (lambda: nn.DataParallel(random_model("llama3_1")), "this DataParallel wraps a model .*; give its .module"),
        (lambda: nn.Linear(2, 2), "no model card covers Linear"),
    ],
)
def test_of_a_wrapper_it_is_said_what_to_give(wrapper: Any, advice: str) -> None:
    prompts = random_prompts((5, 4))
    for use in (
        card_of,
        lambda model: px.run(model, [px.Ablation(kind="zero", site="z", layer=0, heads=(0,))], prompts),
    ):
        with pytest.raises(ValueError, match=advice):
            use(wrapper())


def test_eight_bits_that_depend_on_the_batch_are_refused() -> None:
    """With LLM.int8's threshold, an outlier of one prompt changes how the others are quantised."""

    class Linear8bitLt(nn.Linear):
        """What bitsandbytes puts in the place of a linear layer."""

        state = None

    model: Any = random_model("llama3_1")
    down = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = replaced = Linear8bitLt(down.in_features, down.out_features)
    vars(replaced)["state"] = SimpleNamespace(threshold=6.0)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.mlp\.down_proj .* batch; load the model with BitsAndBytesConfig"
    ):
        card_of(model)
    vars(replaced)["state"].threshold = 0.0
    card_of(model)
