"""Steering vectors against activations read by plain hooks, one prompt at a time, and sweeps over scales against plain hooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelcards import FIELD_NAMES
from pyvene_ext import Addition, generate, plan_sweep, run, steering_vector
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.intervenable.truth import Truth
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, MORE_FAMILIES, random_model

POSITIVE = random_prompts((8, 6, 9, 7), seed=1)
NEGATIVE = random_prompts((7, 9, 6, 6), seed=2)
FEWER = NEGATIVE.take([0, 2, 3])
PLACES: list[dict[str, Any]] = [
    {"site": "resid_post", "layer": 1},
    {"site": "resid_pre", "layer": 1, "positions": "s1"},
    {"site": "mlp_out", "layer": 0, "positions": (0, -2)},
    {"site": "embed", "positions": "all"},
    {"site": "z", "layer": 1, "heads": 2, "positions": -1},
]


@cache
def model_of(family: str) -> Any:
    return random_model(family)


def inputs(ids: Any) -> dict[str, Tensor]:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": torch.arange(row.shape[1])[None]}


def activations(model: Any, prompts: TokenizedPrompts, place: dict[str, Any]) -> np.ndarray:
    """The mean over each prompt's positions, [prompt d]."""
    found = []
    for ids, named in zip(prompts.input_ids, prompts.positions, strict=True):
        x = Truth(model).read(inputs(ids), FIELD_NAMES[place["site"]], place.get("layer", 0))[0]
        x = x[place["heads"]] if "heads" in place else x
        positions = place.get("positions", "last")
        names = positions if isinstance(positions, tuple) else (positions,)
        at = [named.get(name, name) if isinstance(name, str) else name for name in names]
        found.append((x if positions == "all" else x[at]).double().mean(0).numpy())
    return np.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_difference_of_means_and_the_first_component_are_those_of_plain_hooks(family: str) -> None:
    model = model_of(family)
    for place in PLACES:
        for negative in (NEGATIVE, FEWER):
            ours, theirs = (activations(model, prompts, place) for prompts in (POSITIVE, negative))
            mean = ours.mean(0) - theirs.mean(0)
            found = steering_vector(model, POSITIVE, negative, **place, batch_size=3, progress=False)
            assert found.dtype == torch.float32 and found.shape == mean.shape
            np.testing.assert_allclose(found, mean, atol=1e-5, rtol=1e-5)
            pooled = np.concatenate([ours, theirs])
            for paired in {None, False, len(negative) == len(POSITIVE) or None}:
                pairs = len(negative) == len(POSITIVE) and paired is not False
                rows = ours - theirs if pairs else pooled - pooled.mean(0)
                axis = np.linalg.eigh(rows.T @ rows)[1][:, -1]
                found = steering_vector(
                    model, POSITIVE, negative, **place, method="pca", paired=paired, batch_size=3, progress=False
                )
                np.testing.assert_allclose(found, axis * (axis @ mean), atol=1e-4, rtol=1e-4)
                assert (ours.mean(0) - theirs.mean(0)) @ found.numpy() > 0  # positive has the larger mean projection
        Addition(**place, vector=found).check(model)


@torch.no_grad()
def test_at_scale_1_the_negative_mean_becomes_the_positive_one() -> None:
    model, place = model_of("llama3_1"), {"site": "resid_post", "layer": 1}
    spec = Addition(**place, vector=steering_vector(model, POSITIVE, NEGATIVE, **place, progress=False))
    steered = [Truth(model).read(inputs(ids), "block_output", 1)[0, -1] for ids in NEGATIVE.input_ids]
    moved = torch.stack(steered).mean(0) + torch.tensor(spec.vector)
    np.testing.assert_allclose(moved, activations(model, POSITIVE, place).mean(0), atol=1e-5)


@torch.no_grad()
def test_a_model_in_bfloat16_gives_the_float32_mean_of_its_activations() -> None:
    model, place = random_model("qwen2_5").to(torch.bfloat16), {"site": "resid_post", "layer": 1}
    found = steering_vector(model, POSITIVE, NEGATIVE, **place, batch_size=1, progress=False)
    read: list[Tensor] = []
    hook = model.model.layers[1].register_forward_hook(lambda _, __, output: read.append(output[0, -1].double()))
    for ids in (*POSITIVE.input_ids, *NEGATIVE.input_ids):
        model(**inputs(ids), use_cache=False)
    hook.remove()
    ours, theirs = torch.stack(read).split(len(POSITIVE))
    np.testing.assert_allclose(found, ours.mean(0) - theirs.mean(0), atol=1e-6)
    assert generate(model, Addition(**place, vector=found, scale=50.0), NEGATIVE) != generate(model, None, NEGATIVE)


@pytest.mark.parametrize("family", (*FAMILIES, *MORE_FAMILIES))
@torch.no_grad()
def test_a_sweep_over_scales_is_exact_and_computes_only_what_comes_after_the_vector(family: str) -> None:
    model, scales = model_of(family), [-8.0, -1.0, 0.0, 0.3, 1.0, 20.0]
    place = {"site": "resid_post", "layer": model.config.num_hidden_layers - 2, "positions": "last"}
    vector = steering_vector(model, POSITIVE, NEGATIVE, **place, progress=False)
    specs = [Addition(**place, vector=vector, scale=scale) for scale in scales]
    found = sweep(model, specs, NEGATIVE, progress=False)
    for number, scale in enumerate(scales):
        for prompt, (ids, (io, s)) in enumerate(zip(NEGATIVE.input_ids, NEGATIVE.answer_ids, strict=True)):

            def added(x: Tensor, scale: float = scale) -> Tensor:
                x = x.clone()
                x[0, -1] += scale * vector
                return x

            logits = Truth(model).run(inputs(ids), "block_output", place["layer"], added)[0, -1]
            assert found.intervened[number, prompt] == pytest.approx(float(logits[io] - logits[s]), abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(found.intervened, run(model, specs, NEGATIVE, progress=False).intervened, atol=1e-5)
    # One more scale runs one more token of each prompt through one more block.
    one, all_of_them = (plan_sweep(model, some, NEGATIVE).token_layers for some in (specs[:1], specs))
    assert all_of_them - one == (len(specs) - 1) * len(NEGATIVE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "mean"}, "unknown method 'mean'; choose mean_difference or pca."),
        ({"paired": True}, "paired=True does not apply to mean_difference: leave paired out."),
        ({"site": "k", "heads": 0}, "no addition of 'k'; choose among z, attn_out"),
        ({"layer": 9}, "layer 9 is out of range"),
        ({"layer": None}, "resid_post needs a layer"),
        ({"site": "z"}, "z needs heads"),
        ({"site": "z", "heads": (0, 1)}, "z.1.0,1@last: every head has a vector of its own; give one head"),
        ({"site": "z", "heads": 6}, "head 6 is out of range"),
        ({"positions": "verb"}, "in the positive prompts, prompt 0 has no position 'verb'"),
        ({"positions": -7}, "in the positive prompts, position -7 lies outside prompt 1, which has 6 tokens"),
        ({"negative": NEGATIVE.take([])}, "there are no negative prompts; give at least one."),
        ({"negative": ["a text"]}, "prompts must be tokenised, not a list"),
        ({"negative": FEWER, "method": "pca", "paired": True}, "there are 4 positive and 3 negative prompts, which are no pairs"),
        ({"negative": POSITIVE}, "resid_post.1@last: positive and negative prompts have the same mean activation"),
    ],
)  # fmt: skip
def test_what_gives_no_vector_is_refused_in_a_sentence(arguments: dict[str, Any], said: str) -> None:
    wanted = {"positive": POSITIVE, "negative": NEGATIVE, "site": "resid_post", "layer": 1} | arguments
    with pytest.raises(ValueError) as caught:
        steering_vector(model_of("llama3_1"), **wanted, progress=False)
    assert said in str(caught.value) and "\n" not in str(caught.value)
