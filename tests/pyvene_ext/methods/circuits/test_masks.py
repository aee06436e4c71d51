"""Gradients of soft circuits against edge attribution and finite differences; learned masks against planted circuits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from tiny.planted_circuits import ARCHITECTURES, CASES, Architecture, Planted, planted
from torch import Tensor

from pyvene_ext.engine.measure import METRICS
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.circuits.choosing import top_nodes
from pyvene_ext.methods.circuits.circuit import Circuit, exists
from pyvene_ext.methods.circuits.edgewise import Ablated, EdgewiseModel
from pyvene_ext.methods.circuits.masks import Mask, _sampled, _shift, learn_mask
from pyvene_ext.methods.circuits.running import MIB_SHARES, circuits_at_once, faithfulness_curve
from pyvene_ext.models.modes import evaluating
from pyvene_ext.specs.graph import senders
from pyvene_ext.stats import auroc
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model

LENGTHS = (7, 7, 7)
BASE, SOURCE = random_prompts(LENGTHS), random_prompts(LENGTHS, seed=1)
learned: Callable[..., Mask] = partial(learn_mask, progress=False)


def logit_diff(model: Any, kept: Any) -> Tensor:
    """The metric of each prompt where edges are partly kept, with a graph."""
    with evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        edgewise, batch = EdgewiseModel(model), BASE.batch(range(len(BASE)))
        ablated = Ablated.by_run(edgewise.plain(SOURCE.batch(range(len(SOURCE))).input_ids))
        last = edgewise.circuits(batch.input_ids, kept, ablated)
        return torch.stack([edgewise.read(one, batch, METRICS["logit_diff"]) for one in last])


def some_shares(model: Any, *shape: int) -> Tensor:
    there = torch.from_numpy(exists(model.config))
    return (torch.rand(*shape, *there.shape, generator=torch.Generator().manual_seed(0)) * there).requires_grad_()


# -- gradients ---------------------------------------------------------------------------------------------------------


# Where one module computes q, k and v: GPT-2, Phi-3, BLOOM.
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "phi3", "bloom", "olmo2", "mixtral", "opt"])
def test_gradients_at_the_whole_model_are_eap_and_elsewhere_finite_differences(family: str) -> None:
    model = random_model(family)
    there = exists(model.config)
    full = torch.from_numpy(there).float()[None].requires_grad_()
    values = logit_diff(model, full)[0]
    found = torch.stack([torch.autograd.grad(value, full, retain_graph=True)[0][0] for value in values], -1).numpy()
    # M(base) - M(edge patched), to first order, is what M loses when the edge's share falls from 1 to 0.
    expected = edge_attribution(model, BASE, SOURCE, progress=False).per_prompt
    np.testing.assert_allclose(found[there], expected[there], rtol=1e-4, atol=1e-5 * np.nanmax(abs(expected)))
    assert not found[~there].any()

    kept = some_shares(model, 1)
    (gradient,) = torch.autograd.grad(logit_diff(model, kept).sum(), kept)
    direction = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)) * torch.from_numpy(there)
    ends = [
        logit_diff(model, (kept + step * direction).detach().requires_grad_()).double().sum() for step in (3e-3, -3e-3)
    ]
    np.testing.assert_allclose(
        float((gradient * direction).sum().detach()), float((ends[0] - ends[1]).detach()) / 6e-3, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_shares_of_0_and_1_are_the_circuit_and_each_prompt_may_have_its_own(family: str) -> None:
    model = random_model(family)
    hard = some_shares(model, len(BASE)).detach() > 0.5
    one_by_one = logit_diff(model, hard.numpy())
    soft = logit_diff(model, hard.float().requires_grad_())
    np.testing.assert_allclose(soft.detach(), one_by_one, rtol=1e-5, atol=1e-5)
    for own in (hard.float()[None].requires_grad_(), hard.numpy()[None]):
        np.testing.assert_allclose(logit_diff(model, own)[0].detach(), one_by_one.diagonal(), rtol=1e-5, atol=1e-5)


def test_gates_have_their_probability_as_mean_and_an_unbiased_gradient() -> None:
    theta = torch.tensor([-4.0, -1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = _sampled(theta, uniform)
    p = torch.sigmoid(theta).detach()
    np.testing.assert_allclose(gates.mean(0).detach(), p, atol=3e-3)
    partly = ((gates > 0) & (gates < 1)).double().mean(0)
    np.testing.assert_allclose(partly, p * (1 - p), atol=3e-3)  # the window
    (gradient,) = torch.autograd.grad(gates.mean(0).sum(), theta)
    np.testing.assert_allclose(gradient, p * (1 - p), atol=3e-3)  # of p itself
    for share in (0.9, 0.3, 1e-3):
        assert float(torch.sigmoid(theta.detach() + _shift(theta.detach(), share)).mean()) == pytest.approx(share)


# -- planted circuits --------------------------------------------------------------------------------------------------


def ranking(case: Planted, scores: np.ndarray) -> float:
    config: Any = case.model.config
    return auroc(scores[exists(config)], Circuit(case.edges).matrix(config)[exists(config)])


@pytest.mark.slow
def test_a_mask_finds_the_planted_edges_where_the_softmax_has_no_gradient() -> None:
    case = planted("saturated", "llama")
    mask = learned(case.model, case.clean, case.corrupt, "logit_diff", steps=60)
    assert mask.circuit.edges == case.edges and ranking(case, mask.scores) == 1
    assert ranking(case, abs(edge_attribution(case.model, case.clean, case.corrupt, progress=False).matrix)) < 0.9
    assert mask.open[0] > 150 and mask.open[-1] == pytest.approx(0.02 * 190)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "metric"),
    list(zip(CASES, cycle(ARCHITECTURES), cycle(["logit_diff", "logit_diff", "kl"]), strict=False)),
)
def test_a_mask_ranks_every_planted_edge_first(name: str, architecture: Architecture, metric: str) -> None:
    case = planted(name, architecture)
    mask = learned(case.model, case.clean, case.corrupt, metric, steps=60)
    assert ranking(case, mask.scores) > 0.98


@pytest.mark.slow
def test_a_mask_over_nodes_finds_the_planted_heads() -> None:
    case = planted("saturated_k", "llama")
    config: Any = case.model.config
    mask = learned(case.model, case.clean, case.corrupt, "logit_diff", level="node", steps=60)
    heads = {f"z.{layer}.{head}" for layer, head in case.heads.values()}
    names = list(map(str, senders(config)))
    best = sorted(zip(mask.scores[1:], names[1:], strict=True))[-len(heads) :]
    assert {name for _, name in best} == heads and mask.scores[0] == 1
    assert mask.circuit == top_nodes(mask.scores, int((mask.scores[1:] > 0.5).sum()), config)
    curve = faithfulness_curve(case.model, mask.scores, case.clean, case.corrupt, [len(heads)], progress=False)
    assert curve.values[0] == pytest.approx(1, abs=0.03)


# -- what else it promises ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_mask_and_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = random_model("gemma2").train()
    next(model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    masks = [learned(model, BASE, SOURCE, steps=3, batch_size=2, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(masks[0].scores, masks[1].scores) and np.array_equal(masks[0].loss, masks[1].loss)
    assert not np.array_equal(masks[0].scores, masks[2].scores)
    assert np.array_equal(masks[0].scores > 0, exists(model.config))
    for p, (wanted, grad, value) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == wanted and p.grad is grad is None and torch.equal(p, value)
    list(model.parameters())[-1].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        learned(model, BASE, SOURCE, steps=3)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_in_bfloat16_give_a_mask_whose_curve_can_be_run(ablation: Any) -> None:
    model = random_model("gpt2").to(torch.bfloat16)
    source = SOURCE if ablation == "mean" else None
    base = random_prompts((7, 5, 7))
    mask = learned(model, base, source, "logit_diff", ablation=ablation, steps=4, memory=2**24)
    curve = faithfulness_curve(model, mask.scores, base, source, shares=MIB_SHARES, ablation=ablation, progress=False)
    assert np.isfinite([curve.cpr(), curve.cmd()]).all()
    assert np.array_equal(mask.matrix[exists(model.config)], mask.scores[exists(model.config)])
    frame = mask.to_frame()
    assert frame["loss"].tolist() == mask.loss.tolist() and list(frame) == ["step", "open", "loss"]
    assert repr(mask).startswith("Mask by logit_diff: ") and mask.settings["ablation"] == ablation


@pytest.mark.parametrize("level", ["edge", "node"])
def test_a_mask_is_the_same_where_memory_holds_fewer_prompts_than_a_step_takes(level: Any) -> None:
    model, tight = random_model("gemma2"), 500_000
    assert [circuits_at_once(model, BASE, SOURCE, 3, memory, gradient=True) for memory in (None, tight)] == [3, 1]
    # A step of two of the three prompts is one part.
    assert circuits_at_once(model, BASE, SOURCE, 2, None, gradient=True) == 2
    whole, parts = (learned(model, BASE, SOURCE, level=level, steps=4, memory=memory) for memory in (None, tight))
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-6)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)


def test_what_cannot_be_learned_is_refused_in_a_sentence_before_the_model_runs() -> None:
    model = random_model("llama3_1")
    model.forward = None  # type: ignore[assignment]
    options: dict[str, Any]
    for told, options in (
        ("level must be 'edge' or 'node', not 'head'", {"level": "head"}),
        ("share must be above 0 and below 1, not 1", {"share": 1}),
        ("share must be above 0 and below 1, not nan", {"share": float("nan")}),
        ("learning_rate must be a finite number above 0, not 0", {"learning_rate": 0}),
        ("steps must be a whole number of 1 or more, not 0", {"steps": 0}),
        ("unknown ablation 'resample'", {"ablation": "resample"}),
        ("gradient of 'accuracy' is 0 or undefined", {"metric": "accuracy"}),
        ("batch_size must be at least 1", {"batch_size": 0}),
        ("memory must be a whole number of bytes", {"memory": 0.5}),
        ("do not hold what one prompt takes", {"memory": 1}),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            learned(model, BASE, SOURCE, **options)
        assert str(caught.value).endswith(".")
