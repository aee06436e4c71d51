"""What identifies a model: its weights, its config, and whatever else its forward pass depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyvene_ext.io.hashes import tensors_hash
from pyvene_ext.models.identity import weight_hash
from tests.tiny_random import CORE_FAMILIES, random_model


class Packed(nn.Linear):
    """Like a quantised module that is asked for its state dict: it converts its weights, with loss."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.weight.data = self.weight.data.bfloat16().float()
        super()._save_to_state_dict(*args, **kwargs)


class Scaled(torch.Tensor):
    """A weight with a scale beside it, as in bitsandbytes."""


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_the_hash_is_that_of_the_state_dict(family: str) -> None:
    model = random_model(family)
    assert weight_hash(model) == tensors_hash(sorted(model.state_dict().items()))


def test_hashing_leaves_weights_alone_that_a_state_dict_would_convert() -> None:
    model: Any = random_model("llama3_1")
    model.lm_head.__class__ = Packed
    before = model.lm_head.weight.detach().clone()
    weight_hash(model)
    assert torch.equal(model.lm_head.weight, before)


def test_scales_of_quantised_weights_belong_to_the_hash() -> None:
    class QuantState:
        absmax = None

    hashes = set()
    for scale, absmax in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)):
        weight: Any = nn.Parameter(torch.ones(2, 2).as_subclass(Scaled))
        weight.scale, weight.state = torch.tensor(scale), QuantState()
        weight.state.absmax = torch.tensor(absmax)
        module = nn.Module()
        module.weight = weight
        hashes.add(weight_hash(module))
    assert len(hashes) == 3


def test_a_weight_made_of_several_tensors_is_hashed_by_all_of_them() -> None:
    class Two(torch.Tensor):
        @staticmethod
        def __new__(cls: Any, a: Tensor, b: Tensor) -> Any:
            made = torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)
            made.a, made.b = a, b
            return made

        def __tensor_flatten__(self) -> Any:
            return ["a", "b"], None

        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("it cannot be computed with")

    def of(a: float, b: float) -> str:
        module = nn.Module()
        module.register_buffer("weight", Two(torch.tensor([a]), torch.tensor([b])))
        return weight_hash(module)

    assert of(1, 2) == of(1, 2) and len({of(1, 2), of(3, 2), of(1, 3)}) == 3
