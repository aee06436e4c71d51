"""Logits of models in half precision: the hidden state as the model rounds it, times the weights in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from pyvene_ext import ActivationPatch, PathPatch, patch, run
from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.methods.circuits.circuit import Circuit
from pyvene_ext.methods.circuits.running import run_circuits
from pyvene_ext.methods.heads.lens import direct_logit_attribution, logit_lens
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.models import modes
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.replay import Replay
from pyvene_ext.specs.ablation import all_heads
from tests.pyvene_ext.methods.solving.test_evaluate import asked, tokenizer
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import CORE_FAMILIES, MORE_FAMILIES, random_model
from tests.traces import traces

PROMPTS = random_prompts((9, 6, 7, 9))
BASE = random_prompts((6, 8), seed=1)
SOURCE = replace(random_prompts((6, 8), seed=2), answers=BASE.answers)
PATCHES = [ActivationPatch(site="z", layer=0, heads=(1,), positions="last")]


def half_model(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model: Any = random_model(family).to(dtype)
    if hasattr(model.config, "num_experts_per_tok"):  # the default takes sizes that are multiples of 8 only
        model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


def by_hand(head: Any, x: Tensor) -> Tensor:
    logits = x.float() @ head.weight.float().T
    return logits if head.bias is None else logits + head.bias.float()


@contextmanager
def watched(model: Any) -> Iterator[list[Tensor]]:
    """Checks whatever the unembedding returns, all of it or some tokens; gives the tensors that it was called with."""
    head, seen = model.get_output_embeddings(), []

    def check(_: nn.Module, args: tuple, logits: Tensor) -> None:
        assert logits.dtype == torch.float32
        expected = by_hand(head, args[0])
        if logits.shape == expected.shape:
            assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)
        else:  # some tokens of the vocabulary
            assert ((logits[..., None] - expected[..., None, :]).abs().amin(-1) < 1e-5).all()
        seen.append(args[0])

    handle = head.register_forward_hook(check)
    yield seen
    handle.remove()


READERS: dict[str, Callable[[Any], Any]] = {
    "run": lambda m: run(m, all_heads(m.config)[:2], PROMPTS, progress=False),
    "run, every token": lambda m: run(
        m, all_heads(m.config)[:2], BASE.take([0]), "token_probabilities", progress=False
    ),
    "sweep": lambda m: sweep(m, all_heads(m.config)[:2], PROMPTS, progress=False),
    "sweep, kl": lambda m: sweep(m, all_heads(m.config)[:2], PROMPTS, "kl", progress=False),
    "patch": lambda m: patch(m, PATCHES, BASE, SOURCE, engine="plain", progress=False),
    "path": lambda m: patch(
        m, [PathPatch(sender="z.0.1", receivers=("q.1.0",))], BASE, SOURCE, engine="plain", progress=False
    ),
    "direct path": lambda m: patch(
        m, [PathPatch(sender="z.0.1", receivers=("logits",), direct=True)], BASE, SOURCE, progress=False
    ),
    "lens": lambda m: logit_lens(m, PROMPTS, progress=False),
    "direct attribution": lambda m: direct_logit_attribution(m, PROMPTS, progress=False),
    "atp": lambda m: atp(m, PATCHES, BASE, SOURCE, progress=False),
    "estimates": lambda m: estimate(m, all_heads(m.config)[:2], BASE, progress=False),
    "edges": lambda m: edge_attribution(m, BASE, SOURCE, progress=False),
    "circuits": lambda m: run_circuits(m, [Circuit(frozenset())], BASE, SOURCE, progress=False),
    "evaluate": lambda m: evaluate(m, tokenizer(), asked(), max_new_tokens=2),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("family", ["gemma2", "llama3_1"])
def test_every_reader_unembeds_in_float32_and_leaves_no_trace(
    family: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, "CHUNK", 700)  # about 20 of the 61 tokens at once
    model = half_model(family)
    with watched(model) as seen:
        before = traces(model)
        READERS[reader](model)
        assert seen and traces(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*CORE_FAMILIES, *sorted({*MORE_FAMILIES} - {*CORE_FAMILIES})])
def test_scale_and_soft_cap_are_applied_to_float32_logits(family: str, dtype: torch.dtype) -> None:
    model = half_model(family, dtype)
    batch = next(PROMPTS.batches(4))
    with evaluating(model), torch.no_grad(), watched(model) as seen:
        found = model(**batch.inputs()).logits
        replayed = Replay(model).unembed(seen[0][:, -1])
    scale = getattr(model.config, "logit_scale", 1.0) / getattr(model.config, "logits_scaling", 1.0)
    expected = scale * by_hand(model.get_output_embeddings(), seen[0])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        expected = cap * torch.tanh(expected / cap)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replayed, expected[:, -1], atol=1e-5, rtol=1e-5)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


@pytest.mark.parametrize("dtype", first_only([torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.fewer) for family in CORE_FAMILIES])
def test_both_engines_give_the_same_deltas_which_are_no_steps_of_the_dtype(family: str, dtype: torch.dtype) -> None:
    model = half_model(family, dtype)
    specs = all_heads(model.config)
    plain, fast = (engine(model, specs, PROMPTS, progress=False) for engine in (run, sweep))
    # To rounding: on some CPUs a row of a product in half precision depends on how many rows there are.
    rounding = distance(plain.delta, run(model.float(), specs, PROMPTS, progress=False).delta)
    assert distance(fast.delta, plain.delta) < 2 * rounding
    for result in (plain, fast):
        changed = torch.from_numpy(result.delta[np.abs(result.delta) > 1e-6])
        assert (changed.to(dtype).float() == changed).float().mean() < 0.1


@pytest.mark.parametrize("family", ["gemma2", "llama3_1"])
def test_gradients_pass_through_the_weights_in_float32(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "CHUNK", 700)
    model = half_model(family)
    with evaluating(model), watched(model) as seen:
        logits = answer_logits(model, next(PROMPTS.batches(4)))
        found = torch.autograd.grad(logits.square().sum(), seen[0])[0]
    x = seen[0].detach().requires_grad_()
    again = by_hand(model.get_output_embeddings(), x)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        again = cap * torch.tanh(again / cap)
    expected = torch.autograd.grad(again.square().sum(), x)[0]
    assert found.dtype == torch.bfloat16  # rounded once, as the state is
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=2**-8)


def test_an_offloaded_unembedding_is_loaded_and_gives_the_same_logits() -> None:
    model, specs = half_model("llama3_1"), all_heads(random_model("llama3_1").config)[::5]
    away = cpu_offload(half_model("llama3_1"), execution_device=torch.device("cpu"))
    before = traces(away)
    for engine in (run, sweep):
        expected, found = (engine(one, specs, PROMPTS, "kl", progress=False).delta for one in (model, away))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert traces(away) == before


class Adapted(nn.Linear):
    """Not a plain projection: its forward is not its weight alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Add one."""
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", ["float32", "adapted", "failing"])
def test_other_models_keep_their_unembedding_and_a_failure_leaves_none(kind: str) -> None:
    model = random_model("llama3_1") if kind == "float32" else half_model("llama3_1")
    if kind == "adapted":
        model.lm_head.__class__ = Adapted
    before = traces(model)
    with pytest.raises(RuntimeError, match="enough"), evaluating(model):
        assert ("forward" in vars(model.lm_head)) == (kind == "failing")
        raise RuntimeError("enough")
    assert traces(model) == before
