"""Integrated gradients of a head's number against gradients summed by hand, one prompt and one step at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pyvene_ext.methods.attribution import inputs as module
from pyvene_ext.methods.attribution.inputs import InputAttribution, Target, integrated_gradients
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, PAD, random_model

LENGTHS = (9, 6, 12, 7)
QUERIES = ([8], [3, 4, 5], [7, 10], [6])
HUBS = (6, 2, 7, 5)  # within every window of the random models, but for one query
STEPS = 7
LAYER, HEAD = 2, 3


def double(family: str) -> Any:
    """The same model, whose patterns can be asked for."""
    return random_model(family, attn_implementation="eager").double()


def contribution(model: Any, family: str, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head adds to the residual stream: [pos d_model]."""
    block = model.transformer.h[LAYER] if family == "gpt2" else model.model.layers[LAYER]
    projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
    weight = projection.weight if family == "gpt2" else projection.weight.T
    heads = model.config.num_attention_heads
    share = seen["z"][0].unflatten(-1, (heads, -1))[:, HEAD] @ weight.unflatten(0, (heads, -1))[HEAD]
    if family == "gemma2":
        norm = block.post_attention_layernorm
        whole = seen["out"][0]
        share = share * (1 + norm.weight) / torch.sqrt(whole.pow(2).mean(-1, keepdim=True) + norm.eps)
    return share


def number(model: Any, family: str, x: torch.Tensor, queries: list[int], hub: int | None, along: Any) -> torch.Tensor:
    """f of embeddings [pos d_model]; `along` is a direction, or one for each token."""
    seen: dict[str, torch.Tensor] = {}
    block = model.transformer.h[LAYER] if family == "gpt2" else model.model.layers[LAYER]
    projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
    handle = projection.register_forward_hook(lambda _, args, out: seen.update(z=args[0], out=out))
    out = model(inputs_embeds=x[None], output_attentions=True)
    handle.remove()
    if hub is not None:
        return out.attentions[LAYER][0, HEAD, queries, hub].mean()
    return (contribution(model, family, seen) * along).sum(-1)[queries].mean()


def by_hand(
    model: Any,
    family: str,
    prompts: TokenizedPrompts,
    baseline: str,
    kind: str,
    fixed: tuple[int, ...],
    steps: int,
    given: tuple[int, ...] = (0,) * len(LENGTHS),
) -> tuple[list[np.ndarray], list[float], list[float]]:
    """Token attributions, f of the prompt and of its baseline."""
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size)).detach()
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    tokens, values, bases = [], [], []
    for prompt, ids in enumerate(prompts.input_ids):
        end = table[list(ids)]
        start = {"zero": torch.zeros_like(table[0]), "mean": table.mean(0), "pad": table[PAD]}[baseline].repeat(
            len(ids), 1
        )
        for token, of in enumerate(ids):
            if of in fixed or token < given[prompt]:
                start[token] = end[token]
        along: Any = None
        if kind == "own":
            seen: dict[str, torch.Tensor] = {}
            block = model.transformer.h[LAYER] if family == "gpt2" else model.model.layers[LAYER]
            projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
            handle = projection.register_forward_hook(lambda _, args, out, seen=seen: seen.update(z=args[0], out=out))
            model(input_ids=torch.tensor([ids]))
            handle.remove()
            along = contribution(model, family, seen).detach()
            along = along / along.norm(dim=-1, keepdim=True)
        elif kind == "direction":
            along = directions(model)[prompt]
        hub = HUBS[prompt] if kind == "attention" else None
        total = torch.zeros_like(end)
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            point = (start + node * (end - start)).requires_grad_()
            f = number(model, family, point, list(QUERIES[prompt]), hub, along)
            total += weight * torch.autograd.grad(f, point)[0]
        tokens.append((total * (end - start)).sum(-1).numpy())
        for found, x in ((values, end), (bases, start)):
            with torch.no_grad():
                found.append(float(number(model, family, x, list(QUERIES[prompt]), hub, along)))
    return tokens, values, bases


def directions(model: Any) -> torch.Tensor:
    return torch.randn(len(LENGTHS), model.config.hidden_size, generator=torch.Generator().manual_seed(3)).double()


def target(kind: str, model: Any) -> Target:
    hubs = HUBS if kind == "attention" else None
    return Target(LAYER, HEAD, QUERIES, hubs, directions(model) if kind == "direction" else None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "baseline", "batch_size", "implementation"),
    [("attention", "zero", 3, None), ("own", "pad", 4, "eager"), ("direction", "mean", 9, None)],
)
def test_attributions_are_the_gradients_summed_by_hand(
    family: str, kind: str, baseline: Any, batch_size: int, implementation: str | None
) -> None:
    model, prompts = random_model(family, attn_implementation=implementation), random_prompts(LENGTHS)
    fixed = (prompts.input_ids[0][0], prompts.input_ids[2][4])
    asked = target(kind, model)
    found = integrated_gradients(
        model, prompts, asked, baseline=baseline, steps=STEPS, fixed=fixed, batch_size=batch_size
    )
    tokens, values, bases = by_hand(double(family), family, prompts, baseline, kind, fixed, STEPS)
    size = max(1.0, *(np.abs(some).max() for some in tokens))
    for prompt, some in enumerate(tokens):
        np.testing.assert_allclose(found.tokens[prompt], some, atol=1e-5 * size, rtol=0)
    np.testing.assert_allclose(found.value, values, atol=1e-5 * size)
    np.testing.assert_allclose(found.at_baseline, bases, atol=1e-5 * size)
    assert found.tokens[0][0] == found.tokens[2][4] == 0
    assert np.abs(np.concatenate(tokens)).max() > (1e-4 if baseline == "zero" else 0.05)  # else little was compared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("attention", (4, 2, 6, 3)),
        ("own", (3, 0, 0, 1)),
        *(
            pytest.param(kind, given, marks=pytest.mark.slow)
            for kind, given in (
                ("attention", (3, 0, 0, 1)), ("own", (4, 2, 6, 3)), ("direction", (4, 2, 6, 3)), ("direction", (3, 0, 0, 1))
            )
        ),
    ],
)  # fmt: skip
def test_tokens_that_are_given_stay_as_they_are_and_are_read_once(
    family: str, kind: str, given: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, widths = random_model(family).double(), random_prompts(LENGTHS), []
    asked = target(kind, model)
    own = type(model.base_model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["inputs_embeds"].shape[1])
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", counted)
    found = integrated_gradients(model, prompts, asked, steps=STEPS, given=given, batch_size=4)
    monkeypatch.undo()
    first = min(given)
    assert widths == [first] * (first > 0) + [12 - first] * (len(widths) - (first > 0))
    tokens, values, bases = by_hand(double(family), family, prompts, "mean", kind, (), STEPS, given)
    size = max(1.0, *(np.abs(some).max() for some in tokens))
    for prompt, some in enumerate(tokens):
        np.testing.assert_allclose(found.tokens[prompt], some, atol=1e-5 * size, rtol=0)
        assert not some[: given[prompt]].any() and some.any()
    np.testing.assert_allclose(found.value, values, atol=1e-5 * size)
    np.testing.assert_allclose(found.at_baseline, bases, atol=1e-5 * size)
    with pytest.raises(ValueError, match="4 tokens of prompt 1 cannot be given: its first query is token 3"):
        integrated_gradients(model, prompts, asked, given=(1, 4, 1, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_enough_steps_attributions_add_up(family: str) -> None:
    model, prompts = random_model(family), random_prompts(LENGTHS)
    asked = target("attention", model)
    few, many = (integrated_gradients(model, prompts, asked, baseline="pad", steps=steps) for steps in (1, 200))
    sums = [some.sum() for some in many.tokens]
    np.testing.assert_allclose(sums, many.value - many.at_baseline, atol=1e-3)
    by_one = [abs(some.sum() - change) / abs(change) for some, change in
              zip(few.tokens, few.value - few.at_baseline, strict=True)]  # fmt: skip
    np.testing.assert_allclose(few.error, by_one)
    assert few.error.max() > 0.05 > many.error.max()
    assert many.complete.all() and not few.complete.all()


def test_prompts_that_are_not_complete_are_attributed_with_more_steps() -> None:
    model, prompts = random_model("llama3_1"), random_prompts(LENGTHS)
    asked = target("attention", model)
    few = integrated_gradients(model, prompts, asked, steps=2)
    found = integrated_gradients(model, prompts, asked, steps=2, most_steps=17)
    assert not few.complete.all() and set(found.steps) <= {2, 6, 17} and found.steps.max() > 2
    for prompt in range(len(prompts)):
        tried = [integrated_gradients(model, prompts, asked, steps=steps) for steps in (2, 6, 17)]
        first = next((some for some in tried if some.complete[prompt]), tried[-1])
        assert found.steps[prompt] == first.steps[prompt]
        np.testing.assert_allclose(found.tokens[prompt], first.tokens[prompt], atol=1e-6)
        assert (found.value[prompt], found.at_baseline[prompt]) == pytest.approx(
            (first.value[prompt], first.at_baseline[prompt])
        )


def test_half_precision_is_attributed_along_points_that_are_not_rounded_in_between() -> None:
    model, prompts = random_model("llama3_1"), random_prompts(LENGTHS)
    asked = target("attention", model)
    wide = integrated_gradients(model, prompts, asked)
    narrow = integrated_gradients(model.to(torch.bfloat16), prompts, asked)
    assert narrow.tokens[0].dtype == np.float64
    for a, b in zip(wide.tokens, narrow.tokens, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)


def test_a_target_that_nothing_changes_is_not_complete() -> None:
    found = InputAttribution((np.zeros(3), np.ones(3)), np.array([0.5, 4.0]), np.array([0.5, 1.0]), np.array([2, 3]))
    assert np.isnan(found.error[0]) and found.error[1] == 0
    assert found.complete.tolist() == [False, True]
    again = InputAttribution.from_dict(found.as_dict())
    np.testing.assert_array_equal(again.error, found.error)
    assert [some.tolist() for some in again.tokens] == [[0, 0, 0], [1, 1, 1]]
    assert InputAttribution((np.array([1.05]),), np.ones(1), np.zeros(1), np.ones(1)).complete.tolist() == [False]


def test_the_model_is_left_as_it_was_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = random_model("gemma2"), random_prompts(LENGTHS)
    model.train()
    config = model.model.layers[LAYER].self_attn.config

    def same() -> None:
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        assert model.model.layers[LAYER].self_attn.config is config
        assert not hasattr(model.model.layers[LAYER].self_attn, "tap_pattern")
        assert all(parameter.grad is None for parameter in model.parameters())

    integrated_gradients(model, prompts, target("attention", model), steps=2)
    same()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("captum.attr.IntegratedGradients.attribute", broken)
    for kind in ("attention", "own"):
        with pytest.raises(RuntimeError, match="broken"):
            integrated_gradients(model, prompts, target(kind, model), steps=2)
        same()


def test_the_mean_embedding_is_over_the_whole_vocabulary_with_gemmas_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    model = double("gemma2")
    mean = model.model.embed_tokens.weight.mean(0) * model.config.hidden_size**0.5
    torch.testing.assert_close(module.baseline_embedding(model, "mean", 0), mean.detach(), atol=1e-6, rtol=1e-6)
    pad = model.model.embed_tokens.weight[5] * model.config.hidden_size**0.5
    torch.testing.assert_close(module.baseline_embedding(model, "pad", 5), pad.detach(), atol=1e-6, rtol=1e-6)
    assert not module.baseline_embedding(model, "zero", 5).any()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"steps": 0}, "take 1 step or more, not 0"),
        ({}, {"baseline": "noise"}, "unknown baseline 'noise'"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1"),
        ({"layer": 3}, {}, "no head 3.3; the model has layers 0 to 2, each with heads 0 to 5"),
        ({"head": -1}, {}, "no head 2.-1"),
        ({"queries": QUERIES[:3]}, {}, "queries for 3 prompts but there are 4"),
        ({"hubs": HUBS[:2]}, {}, "hubs for 2 prompts but there are 4"),
        ({"queries": ([9], *QUERIES[1:])}, {}, "the queries of prompt 0 must be one or more of its 9 tokens"),
        ({"queries": ([8], [], *QUERIES[2:])}, {}, "the queries of prompt 1"),
        ({"hubs": (9, *HUBS[1:])}, {}, "token 9 of prompt 0 cannot be the hub of the query at token 8"),
        ({"hubs": (-1, *HUBS[1:])}, {}, "token -1 of prompt 0 cannot be the hub"),
        ({"hubs": (6, 4, *HUBS[2:])}, {}, "token 4 of prompt 1 cannot be the hub of the query at token 3"),
        ({"hubs": None, "directions": torch.zeros(3, 42)}, {}, "directions for 3 prompts"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = random_model("llama3_1")
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    asked = replace(target("attention", model), **change)
    with pytest.raises(ValueError, match=message):
        integrated_gradients(model, random_prompts(LENGTHS), asked, **options)


def test_models_without_gradients_are_refused() -> None:
    model = random_model("llama3_1")
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(51, 42, dtype=torch.int8), False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is int8, .* without quantisation"):
        integrated_gradients(model, random_prompts(LENGTHS), target("attention", model))
    half = random_model("llama3_1").half()
    with pytest.raises(ValueError, match="too small for float16; load the model in bfloat16 or float32"):
        integrated_gradients(half, random_prompts(LENGTHS), target("attention", half))
