"""Models with adapters or quantised weights: either the numbers of hooks on the same model, or one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pyvene_ext as px
from pyvene_ext import Ablation, PathPatch
from pyvene_ext.attribution import atp
from pyvene_ext.edges import edge_attribution
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.methods.heads.name_movers import head_projections
from pyvene_ext.models.loading import load_model
from tests.random_prompts import random_prompts
from tests.saved_models import save_random_model
from tests.tiny_random import random_model

PROMPTS, OTHERS = random_prompts((8, 5, 7)), random_prompts((8, 5, 7), seed=1)
OTHERS = OTHERS.with_answer_ids(PROMPTS.answer_ids)
PROJECTIONS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


class LowRank(nn.Module):
    """A linear layer with an adapter, as peft has it: under the layer's name, and with the base layer's weight as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class InEightBits(Tensor):
    """A weight of eight bits that a plain nn.Linear holds, as torchao has it: it can be multiplied with and little else."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> InEightBits:
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)  # type: ignore[attr-defined]

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.packed = (weight / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    def whole(self) -> Tensor:
        return self.packed * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            return linear(*(x.whole() if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a weight of eight bits")


def replaced(change: Callable[[Any, str], None], names: tuple[str, ...] = PROJECTIONS) -> Any:
    """A tiny model with a change of these of its linear layers."""
    torch.manual_seed(0)
    model: Any = random_model("llama3_1")
    for module in list(model.modules()):
        for name in names:
            if isinstance(vars(module)["_modules"].get(name), nn.Linear):
                change(module, name)
    return model.requires_grad_(False)


def adapt(parent: Any, name: str) -> None:
    setattr(parent, name, LowRank(getattr(parent, name)))


def quantise(parent: Any, name: str) -> None:
    module = getattr(parent, name)
    module._parameters["weight"] = InEightBits(0.3 * torch.randn(module.out_features, module.in_features))


def by_hooks(model: Any, layer: int, head: int) -> list[float]:
    """The logit difference of each prompt with one head's z at zero."""
    width = model.config.head_dim

    def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    found = []
    with torch.no_grad():
        for ids, (right, wrong) in zip(PROMPTS.input_ids, PROMPTS.answer_ids, strict=True):
            logits = model(torch.tensor([ids])).logits[0, -1]
            found.append(float(logits[right] - logits[wrong]))
    handle.remove()
    return found


def check_right_or_refused(model: Any, *, gradients: bool = True) -> None:
    """Edits of activations are those of hooks, in both engines; what needs the weights says so before anything runs."""
    specs = [Ablation(kind="zero", site="z", layer=layer, heads=(head,)) for layer, head in ((0, 1), (1, 2))]
    expected = [by_hooks(model, layer, head) for layer, head in ((0, 1), (1, 2))]
    np.testing.assert_allclose(px.run(model, specs, PROMPTS, progress=False).intervened, expected, atol=1e-5)
    np.testing.assert_allclose(px.sweep(model, specs, PROMPTS, progress=False).intervened, expected, atol=1e-4)
    plain = "quantisation.*merge adapters|merge adapters.*quantisation"
    path = [PathPatch(sender="z.0.1", receivers=("logits",), direct=True)]
    for use in (
        lambda: px.patch(model, path, base=PROMPTS, source=OTHERS, progress=False),
        lambda: edge_attribution(model, PROMPTS, OTHERS),
        lambda: direct_logit_attribution(model, PROMPTS),
        lambda: head_projections(model, PROMPTS, np.zeros((1, len(PROMPTS)), int)),
    ):
        with pytest.raises(ValueError, match=plain):
            use()
    patches = px.all_patches(model.config, "z")[:2]
    if gradients:
        assert np.isfinite(atp(model, patches, PROMPTS, OTHERS)).all()
    else:
        with pytest.raises(ValueError, match="no gradient passes through the model"):
            atp(model, patches, PROMPTS, OTHERS)


def test_adapters_are_part_of_the_model_or_refused() -> None:
    model = replaced(adapt)
    check_right_or_refused(model)
    merged: Any = copy.deepcopy(model)
    for module in list(merged.modules()):
        for name, part in module.named_children():
            if isinstance(part, LowRank):
                part.base_layer.weight += part.up @ part.down
                setattr(module, name, part.base_layer)
    paths = [PathPatch(sender="z.0.1", receivers=("logits",)), PathPatch(sender="mlp_out.0", receivers=("q.1.2",))]
    found, expected = (
        px.patch(m, paths, base=PROMPTS, source=OTHERS, progress=False).intervened for m in (model, merged)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_adapter_of_the_unembedding_is_not_passed_over() -> None:
    """peft gives the base layer's weight as the adapter's own."""
    model = replaced(adapt, ("lm_head",))
    with pytest.raises(ValueError, match="the unembedding of LlamaForCausalLM has no accessible weights"):
        head_projections(model, PROMPTS, np.zeros((1, len(PROMPTS)), int))


def test_quantised_weights_are_used_as_they_are_or_refused() -> None:
    check_right_or_refused(replaced(quantise))


def test_weights_without_a_gradient_are_named_by_attribution() -> None:
    def cut(parent: Any, name: str) -> None:
        getattr(parent, name).register_forward_hook(lambda *args: args[-1].detach())

    model = replaced(cut, ("o_proj", "down_proj"))
    for module in model.model.layers:
        module.register_forward_hook(lambda *args: args[-1].detach())
    with pytest.raises(ValueError, match="no gradient passes through the model, as through some quantised weights"):
        atp(model, px.all_patches(model.config, "z")[:2], PROMPTS, OTHERS)


def test_a_folder_with_an_adapter_says_how_to_merge_it(tmp_path: Path) -> None:
    """Where peft is installed transformers would apply it, elsewhere not."""
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    sentence = r"holds an adapter .*load its base model \(someone/base\).*merge_and_unload\(\)"
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)
    kept = adapter.rename(tmp_path / "kept")
    save_random_model("llama3_1", tmp_path)
    kept.rename(adapter)
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)
    adapter.write_text("broken")
    with pytest.raises(ValueError, match=r"load its base model, give it"):
        load_model(tmp_path)
    adapter.unlink()
    load_model(tmp_path)


def test_a_quantised_folder_without_its_package_says_what_is_missing(tmp_path: Path) -> None:
    save_random_model("llama3_1", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    method = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    with pytest.raises(
        ValueError, match=r"needs a package that is not installed \(.*hqq.*\); install it, or get the plain"
    ):
        load_model(tmp_path)


# -- the packages themselves, where they are installed -----------------------------------------------------------------


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=list(PROJECTIONS), r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(random_model("llama3_1"), config).eval()
    with pytest.raises(ValueError, match="give its get_base_model"):
        px.run(wrapped, [Ablation(kind="zero", site="z", layer=0, heads=(0,))], PROMPTS)
    check_right_or_refused(wrapped.get_base_model())
    merged = wrapped.merge_and_unload()
    assert np.isfinite(edge_attribution(merged, PROMPTS, OTHERS).matrix).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)

    def loaded(**how: Any) -> Any:
        options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**how), "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()

    if bits == 4:
        check_right_or_refused(loaded(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), gradients=False)
    else:
        with pytest.raises(ValueError, match=r"depend on the others in its batch; .*llm_int8_threshold=0.0"):
            px.run(loaded(load_in_8bit=True), px.all_heads(LlamaConfig(**sizes))[:1], PROMPTS)
        check_right_or_refused(loaded(load_in_8bit=True, llm_int8_threshold=0.0))


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = random_model("llama3_1")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    check_right_or_refused(model)
