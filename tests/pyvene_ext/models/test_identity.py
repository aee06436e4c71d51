"""What identifies a model: its weights, its config, and whatever else its forward pass depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from pyvene_ext import run
from pyvene_ext.engine.plain import reference_for
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.io.hashes import data_hash, tensors_hash
from pyvene_ext.models.identity import active_adapters, identity_of, weight_hash
from pyvene_ext.models.modes import evaluating
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import all_heads
from tests.random_prompts import random_prompts
from tests.tiny_random import CORE_FAMILIES, random_model

PROMPTS = random_prompts((7, 5, 6))


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


# -- what changes a forward pass ---------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer with adapters beside it, as in peft: they can be chosen, scaled, switched off and merged."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scaling = base, {"a": 1.0, "b": 1.0}
        self.down = nn.ModuleDict({name: nn.Linear(base.in_features, 2, bias=False) for name in self.scaling})
        self.up = nn.ModuleDict({name: nn.Linear(2, base.out_features, bias=False) for name in self.scaling})
        self._active_adapter, self._disable_adapters, self.merged = ["a"], False, False

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for name in () if self.disable_adapters or self.merged else self.active_adapters:
            out = out + self.scaling[name] * self.up[name](self.down[name](x))
        return out


def adapted_model() -> Any:
    torch.manual_seed(0)
    model: Any = random_model("llama3_1")
    for layer in model.model.layers:
        layer.mlp.up_proj = LowRank(layer.mlp.up_proj).requires_grad_(False)
    return model


def on_each(model: Any, change: Callable[[Any], None]) -> None:
    for layer in model.model.layers:
        change(layer.mlp.up_proj)


def merge(module: Any) -> None:
    module.base.weight += module.up["a"].weight @ module.down["a"].weight
    module.merged = True


def double(_: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapters off": (lambda m: on_each(m, lambda x: vars(x).update(_disable_adapters=True)), "adapters"),
    "another adapter": (lambda m: on_each(m, lambda x: vars(x).update(_active_adapter=["b"])), "adapters"),
    "scaling": (lambda m: on_each(m, lambda x: x.scaling.update(a=0.5)), "module attributes"),
    "merged": (lambda m: on_each(m, merge), "model weights"),
    "weights": (lambda m: m.model.norm.weight.mul_(2), "model weights"),
    "an attribute": (lambda m: setattr(m.model.norm, "variance_epsilon", 0.1), "module attributes"),
    "a hook": (lambda m: m.model.layers[0].mlp.register_forward_hook(double), "hooks"),
    "a forward": (lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: x), "hooks"),
    "config": (lambda m: setattr(m.config, "rms_norm_eps", 0.1), "model config"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_kept_is_refused_or_made_again_once_the_forward_pass_changes(change: str, tmp_path: Path) -> None:
    model, (apply, differs) = adapted_model(), CHANGES[change]
    specs = all_heads(model.config, "mean")[:3]
    reference = reference_for(model, specs, PROMPTS, cache_dir=tmp_path / "cache", progress=False)
    sweep(model, specs, PROMPTS, reference=reference, store=tmp_path / "store", progress=False)
    with torch.no_grad():
        apply(model)
    with pytest.raises(ValueError, match=rf"belong to a model that differs in .*{differs}.*; compute them on this one"):
        run(model, specs, PROMPTS, reference=reference, progress=False)
    again = reference_for(model, specs, PROMPTS, cache_dir=tmp_path / "cache", progress=False)
    fresh = reference_for(model, specs, PROMPTS, progress=False)
    assert again is not None and fresh is not None
    assert all(torch.equal(again.tensors[name], fresh.tensors[name]) for name in fresh.tensors)
    with pytest.raises(ValueError, match=rf"holds a finished run that differs in .*{differs}"):
        sweep(model, specs, PROMPTS, reference=again, store=tmp_path / "store", progress=False)


def test_what_does_not_change_the_forward_pass_does_not_count(tmp_path: Path) -> None:
    model = adapted_model()
    before = identity_of(model)
    model.train().requires_grad_(True)
    model.name_or_path = model.config._name_or_path = "elsewhere"
    model.model.gradient_checkpointing = True
    model(torch.tensor([PROMPTS.input_ids[0] * 9]), output_hidden_states=True)  # longer than the model was made for
    with evaluating(model.bfloat16().float()):
        pass
    assert {name: value for name, value in identity_of(model).items() if value != before[name]} == {
        "model weights": weight_hash(model)  # rounded
    }
    assert active_adapters(model) == metadata(model)["active_adapters"] == ["a"]


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_running_a_model_leaves_its_identity(family: str) -> None:
    model = random_model(family)
    before = identity_of(model)
    run(model, all_heads(model.config)[:1], PROMPTS, progress=False)
    sweep(model, all_heads(model.config)[:1], PROMPTS, progress=False)
    assert identity_of(model) == before == identity_of(random_model(family))
    assert identity_of(cpu_offload(model, execution_device=torch.device("cpu"))) == before


def test_adapters_of_peft_belong_to_the_identity() -> None:
    peft = pytest.importorskip("peft")
    model: Any = random_model("llama3_1")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    for name in ("a", "b"):
        model.add_adapter(config, name)
    seen = set()
    for change in (
        lambda: model.set_adapter("a"),
        lambda: model.set_adapter("b"),
        model.disable_adapters,
        lambda: model.enable_adapters() or [x.scale_layer(0.5) for x in model.modules() if hasattr(x, "scale_layer")],
        lambda: [x.merge() for x in model.modules() if hasattr(x, "merge")],
    ):
        change()
        seen.add(data_hash(identity_of(model)))
        model(torch.tensor([PROMPTS.input_ids[0]]))
        assert data_hash(identity_of(model)) in seen
    assert len(seen) == 5
