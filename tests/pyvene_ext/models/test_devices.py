"""Models that are offloaded or spread over devices give the numbers, and have the hash, of the same model in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyvene_ext.engine.plain import reference_for, run
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep import plan_sweep, sweep
from pyvene_ext.engine.sweep.plan import (
    MIB,
    ActivationSizes,
    Budget,
    default_budget,
    make_plan,
)
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.models.devices import input_device, weights_on_a_device
from pyvene_ext.models.identity import weight_hash
from pyvene_ext.models.loading import load_model
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.joint import Spec
from tests.pretended_devices import PretendedDevices, spread
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, random_model
from tests.traces import traces

PROMPTS = random_prompts((9, 6, 7, 9, 6, 7))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CPU = torch.device("cpu")
OFFLOADS = ("cpu", "with buffers", "disk", "mixed")


def specs_for(model: PreTrainedModel) -> list[Spec]:
    """Every site, every kind, joint ones, and one that is behind the last block."""
    edits: list[dict[str, Any]] = [
        {"kind": "zero"},
        {"kind": "mean", "positions": "s1"},
        {"kind": "resample", "positions": "last"},
        {"kind": "noise", "noise": "norm_matched", "positions": ("s1", -2, 0)},
    ]
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    specs: list[Spec] = [Ablation(site=site, layer=n % 3, **edit) for n, site in enumerate(sites) for edit in edits]
    specs += [Ablation(site="embed", **edit) for edit in edits]
    specs += [
        Ablation(site="scores", kind=kind, layer=layer, heads=(1,)) for kind in ("zero", "mean") for layer in (1, 2)
    ]
    specs += [*all_heads(model.config), *all_heads(model.config, "mean", positions="last")]
    specs.append(Ablation(kind="zero", site="resid_post", layer=2, positions="last"))
    return [*specs, (specs[4], specs[-2]), tuple(all_heads(model.config)[1::4])]  # type: ignore[arg-type]


def offloaded(model: PreTrainedModel, how: str, folder: Path) -> PreTrainedModel:
    """The model with its weights elsewhere, brought to the CPU when a module runs."""
    if how == "disk":
        return disk_offload(model, str(folder), execution_device=CPU)
    if how != "mixed":
        return cpu_offload(model, execution_device=CPU, offload_buffers=how == "with buffers")
    base = model.base_model_prefix
    places: dict[str, Any] = {f"{base}.{name}": "cpu" for name, _ in model.get_submodule(base).named_children()}
    blocks = next(name for name in places if name.endswith((".layers", ".h")))
    del places[blocks]
    places |= {f"{blocks}.0": "cpu", f"{blocks}.1": "disk", f"{blocks}.2": "cpu", "lm_head": "cpu"}
    if not model.config.tie_word_embeddings:
        places["lm_head"] = "disk"
    return dispatch_model(model, places, offload_dir=str(folder), force_hooks=True)


@cache
def in_memory(family: str) -> tuple[PreTrainedModel, list[Spec], Any, Result]:
    model = random_model(family)
    specs = specs_for(model)
    reference = reference_for(model, specs, PROMPTS, progress=False)
    return model, specs, reference, run(model, specs, PROMPTS, reference=reference, progress=False)


# -- offloaded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", first_only(OFFLOADS))
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_has_the_hash_and_gives_the_numbers_of_one_in_memory(
    family: str, how: str, tmp_path: Path
) -> None:
    original, specs, reference, expected = in_memory(family)
    model = offloaded(random_model(family), how, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = traces(model)
    assert weight_hash(model) == weight_hash(original)
    assert input_device(model) == CPU and metadata(model)["device"] == "cpu"
    fast = sweep(model, specs, PROMPTS, progress=False)
    np.testing.assert_allclose(fast.baseline, expected.baseline, **CLOSE)
    np.testing.assert_allclose(fast.intervened, expected.intervened, **CLOSE)
    assert traces(model) == before
    # Statistics of the model in memory are this model's too.
    some = specs[::5]
    slow = run(model, some, PROMPTS, reference=reference, progress=False)
    np.testing.assert_allclose(slow.intervened, expected.intervened[::5], **CLOSE)
    assert traces(model) == before


@pytest.mark.parametrize("metric", ["kl", "rank"])
@pytest.mark.parametrize("family", ["gemma2", "llama3_1"])
def test_metrics_that_read_all_logits_do_so_from_an_offloaded_unembedding(
    family: str, metric: str, tmp_path: Path
) -> None:
    original, specs, reference, _ = in_memory(family)
    some = specs[::5]
    expected = run(original, some, PROMPTS, metric, reference, progress=False)
    found = sweep(offloaded(random_model(family), "disk", tmp_path), some, PROMPTS, metric, reference, progress=False)
    np.testing.assert_allclose(found.intervened, expected.intervened, **CLOSE)


@pytest.mark.parametrize("family", ["gemma2", "llama3_1", "gpt2"])
def test_estimates_are_the_same_too(family: str, tmp_path: Path) -> None:
    original, specs, reference, _ = in_memory(family)
    expected = estimate(original, specs, PROMPTS, reference=reference, progress=False)
    model = offloaded(random_model(family), "mixed", tmp_path)
    before = traces(model)
    found = estimate(model, specs, PROMPTS, reference=reference, progress=False)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert traces(model) == before
    with PretendedDevices():
        found = estimate(spread(random_model(family)), specs, PROMPTS, reference=reference, progress=False)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_grad_flags_of_offloaded_weights_survive_and_they_can_be_trained_afterwards(tmp_path: Path) -> None:
    model = offloaded(random_model("llama3_1"), "mixed", tmp_path)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    specs = all_heads(model.config, "mean")[::5]
    for engine in (run, sweep):
        engine(model, specs, PROMPTS, progress=False)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    model.requires_grad_(True)
    ids = torch.tensor(PROMPTS.input_ids[:1])
    assert model(ids).logits.requires_grad


@pytest.mark.slow
def test_a_store_begun_in_memory_is_finished_offloaded(tmp_path: Path) -> None:
    original, specs, reference, expected = in_memory("mistral")
    model = offloaded(random_model("mistral"), "cpu", tmp_path)
    sweep(original, specs, PROMPTS, reference=reference, store=tmp_path / "store", progress=False)
    found = sweep(model, specs, PROMPTS, reference=reference, store=tmp_path / "store", progress=False)
    np.testing.assert_allclose(found.intervened, expected.intervened, **CLOSE)


class OneAtATime(Mapping):
    """Offloaded weights that are read anew each time, and never while others that were read are still there."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.read, self.most = weights, weakref.WeakSet[Tensor](), 0

    def __getitem__(self, name: str) -> Tensor:
        fresh = self.weights[name].clone()
        self.read.add(fresh)
        self.most = max(self.most, sum(tensor.numel() for tensor in self.read))
        return fresh

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hash_reads_one_module_at_a_time(family: str) -> None:
    model = offloaded(random_model(family), "cpu", Path())
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook") and module._hf_hook.offload]
    weights = OneAtATime(hooks[0].weights_map.dataset)
    for hook in hooks:
        hook.weights_map.dataset = weights
    assert weight_hash(model) == weight_hash(random_model(family))
    modules = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    assert 0 < weights.most <= 2 * max(modules)


def test_a_model_without_values_has_no_hash() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight of the LlamaForCausalLM has no values, only a shape; load the"
    ):
        weight_hash(model)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_spread_or_left_on_the_disk(dtype: str) -> None:
    original, _ = load_model("tiny-llama3.1", dtype=dtype)
    on_disk = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    automatic, _ = load_model("tiny-llama3.1", dtype=dtype, device="auto")
    left, _ = load_model("tiny-llama3.1", dtype=dtype, device_map=on_disk | {"model.layers": "disk"})
    assert next(left.model.layers.parameters()).is_meta
    specs = all_heads(original.config)[::7]
    prompts = random_prompts((8, 8, 6, 7))
    expected = sweep(original, specs, prompts, progress=False).intervened
    for model in (automatic, left):
        assert not model.training and weight_hash(model) == weight_hash(original)
        found = sweep(model, specs, prompts, progress=False).intervened
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.2)


def test_a_model_that_every_process_would_spread_over_all_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert load_model("tiny-llama3.1", device="auto")[0].device == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="over the same GPUs; launch one process, or leave it out"):
        load_model("tiny-llama3.1", device="auto")


# -- spread over devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", first_only(["kl", "logit_diff"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_spread_over_gpus_never_brings_tensors_of_two_of_them_together(family: str, metric: str) -> None:
    original, specs, reference, _ = in_memory(family)
    expected = sweep(original, specs, PROMPTS, metric, reference, progress=False)
    with PretendedDevices():
        model = spread(random_model(family))
        assert len({parameter.device for parameter in model.parameters()}) >= 5
        assert input_device(model) == torch.device("cuda:0")
        assert weight_hash(model) == weight_hash(original)
        found = sweep(model, specs, PROMPTS, metric, progress=False)
        behind = sweep(model, specs[-3:-2], PROMPTS, metric, progress=False)
        some = run(model, specs[::5], PROMPTS, metric, reference, progress=False)
    np.testing.assert_allclose(found.baseline, expected.baseline, **CLOSE)
    np.testing.assert_allclose(found.intervened, expected.intervened, **CLOSE)
    np.testing.assert_allclose(behind.intervened, expected.intervened[-3:-2], **CLOSE)
    np.testing.assert_allclose(some.intervened, expected.intervened[::5], **CLOSE)


def test_pretended_devices_refuse_what_gpus_would() -> None:
    with PretendedDevices():
        a, b = torch.ones(2, 2, device="cuda:0"), torch.ones(2, 2).to("cuda:1")
        first, index = torch.tensor([0]), torch.tensor([0], device="cuda:1")
        assert (a.device, b.device, (a + 1).device, b[0].device) == tuple(map(torch.device, ["cuda:0", "cuda:1"] * 2))
        for meet in (
            lambda: a @ b,
            lambda: a + b.cpu(),
            lambda: torch.cat([a, b]),
            lambda: a[index],
            lambda: a.__setitem__((first,), b[0]),
            lambda: nn.functional.linear(a, b),
            lambda: torch.einsum("ab,bc->ac", a, b),
        ):
            with pytest.raises(AssertionError):
                meet()
        a[:1] = b[:1]
        assert a[first].device == (a + torch.tensor(1.0)).device == a.device


def test_the_default_budget_counts_what_one_device_holds(tmp_path: Path) -> None:
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, num_hidden_layers=3, intermediate_size=11008, vocab_size=32000)
        model = LlamaForCausalLM(config)
    assert weights_on_a_device(model) == 0 and default_budget(model, None).memory == 256 * MIB
    small = random_model("llama3_1")
    whole = sum(p.numel() * p.element_size() for p in small.parameters())
    assert weights_on_a_device(small) == whole
    with PretendedDevices():
        parts = spread(random_model("llama3_1"))
        block = sum(p.numel() * p.element_size() for p in parts.model.layers[0].parameters())
        assert weights_on_a_device(parts) == block < whole / 2
    assert weights_on_a_device(offloaded(small, "cpu", tmp_path)) == 0
    assert plan_sweep(small, all_heads(small.config), PROMPTS).budget.memory == 256 * MIB


# -- the arithmetic of docs/studies/gpus.md ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_of_several_gpus_counts_the_memory_of_llama_3_1_70b_as_the_plan_does() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    gib = 2**30

    def size(module: nn.Module) -> float:
        return sum(p.numel() * p.element_size() for p in module.parameters()) / gib

    block, ends = size(model.model.layers[0]), size(model.lm_head)
    parameters = sum(p.numel() for p in model.parameters())
    weights = f"{parameters / 1e9:.2f} billion × 2 bytes = {size(model):.1f} GiB"
    rows = [
        f"| weights: {weights}, an eighth of which is 10 of 80 blocks of {block:.2f} | {10 * block:.1f} |",
        f"| on the first GPU the embeddings, on the last the unembedding | {ends:.1f} |",
        "| `--memory` | 40 |",
        f"| left of 80, for CUDA itself and its allocator | {80 - 10 * block - ends - 40:.1f} |",
    ]
    prompts = random_prompts((32,) * 100)
    token, batches = ActivationSizes(model).token, {}
    for positions in ("all", "last"):
        specs = all_heads(config, positions=positions)
        batches[positions] = len(make_plan(resolve(specs, model, prompts), range(100), Budget(40 * gib, 65536)).waves)
    whole, last = len(specs) * 32 * token / gib, len(specs) * token / gib
    text = (
        f"{token // 2**10} KiB per token, for 64 × 80 heads and a prompt of 32 tokens {whole:.2f} GiB, or {last:.2f} GiB with "
        f"`--positions last`. That makes {batches['all']} batches of 100 such prompts, or {batches['last']}."
    )
    page = (Path(__file__).resolve().parents[3] / "docs/studies/gpus.md").read_text(encoding="utf-8")
    table = "\n".join(rows)
    assert table in page, f"docs/studies/gpus.md needs exactly these rows:\n{table}"
    assert text in " ".join(page.split()), f"docs/studies/gpus.md needs this sentence: {text}"
