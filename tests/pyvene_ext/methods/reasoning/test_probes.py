"""Probes against normal equations and loops over folds; the residual stream against the hidden states of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modelcards import card_of
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.probes import (
    ALPHAS,
    Ridge,
    cross_validated,
    deal_folds,
    places_of,
    read_residuals,
    shuffled,
)
from pyvene_ext.stats.correlations import r_squared
from tests.ground_truth import ablations as slow
from tests.ground_truth import probes as by_hand
from tests.pyvene_ext.models.test_continuous_thought import asked, thinking
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model

PROMPTS = random_prompts((9, 6, 7, 6, 11))
TOKENS: dict[str, tuple[int | None, ...]] = {"some": (8, 0, None, 3, 5), "first": (0,) * 5}
QUESTIONS = (range(0, 4), range(1, 6), range(0, 7), range(2, 3), range(3, 9))


# -- what a model holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_hidden_states_of_every_prompt_by_itself(family: str) -> None:
    model = random_model(family)
    model.train()
    mid = "resid_mid" in card_of(model).mapping(type(model))  # blocks whose two parts run side by side have none
    found = read_residuals(model, PROMPTS, TOKENS, QUESTIONS, mid=mid, batch_size=3)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    layers = model.config.num_hidden_layers
    named = [f"resid_{at}.{layer}" for layer in range(layers) for at in ("pre", "mid")[: 1 + mid]]
    assert found.places == (*named, f"resid_post.{layers - 1}")
    for prompt, ids in enumerate(PROMPTS.input_ids):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for place, name in enumerate(found.places):
            site, _, layer = name.partition(".")
            x = states[int(layer)][0] if site == "resid_pre" else slow.activation(model, ids, site, int(layer))
            expected = x.detach().numpy()
            mean = np.mean([expected[token] for token in QUESTIONS[prompt]], 0)
            np.testing.assert_allclose(found.question[place, prompt], mean, atol=1e-5)
            for token_name, tokens in TOKENS.items():
                token, own = tokens[prompt], found.at[token_name][place, prompt]
                if token is None:
                    assert np.isnan(own).all()
                else:
                    np.testing.assert_allclose(own, expected[token], atol=1e-5)


def test_the_last_place_is_what_the_final_norm_is_given() -> None:
    model: Any = random_model("llama3_1")
    found = read_residuals(model, PROMPTS, TOKENS, QUESTIONS)
    assert found.places == ("resid_pre.0", "resid_pre.1", "resid_pre.2", "resid_post.2")
    ids = PROMPTS.input_ids[4]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        normed = model.model.norm(torch.from_numpy(found.at["some"][-1, 4]))
    np.testing.assert_allclose(normed.numpy(), states[-1][0, 5].numpy(), atol=1e-5)


def test_latent_steps_are_read_when_the_thought_is_whole() -> None:
    """A model of continuous thoughts runs once a step before it runs for good."""
    model, *_ = thinking("llama3_1")
    asks = asked(model, (7, 5))
    latent = [block[2] for block in asks.blocks]
    found = read_residuals(model, asks.prompts, {"latent": latent}, [range(length) for length in asks.lengths])
    for prompt, ids in enumerate(asks.prompts.input_ids):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for place in range(3):
            own = found.at["latent"][place, prompt]
            np.testing.assert_allclose(own, states[place][0, latent[prompt]].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "questions"),
    [
        ((9, 0, 0, 0, 0), QUESTIONS),
        ((-1, 0, 0, 0, 0), QUESTIONS),
        ((0,) * 5, (range(0), *QUESTIONS[1:])),
        ((0,) * 5, (range(4, 10), *QUESTIONS[1:])),
    ],
)
def test_tokens_outside_a_prompt_are_refused_before_the_model_runs(
    tokens: tuple[int, ...], questions: tuple[range, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama3_1")
    monkeypatch.setattr(type(model.base_model), "forward", None)
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens; its question or a token to be read lies outside"):
        read_residuals(model, PROMPTS, {"x": tokens}, questions)


def test_a_place_that_a_model_lacks_is_refused_before_it_runs() -> None:
    model = random_model("gpt_neox")
    assert list(places_of(model)) == ["resid_pre.0", "resid_pre.1", "resid_post.1"]
    model.base_model.forward = None
    with pytest.raises(ValueError, match="run attention and MLP side by side"):
        read_residuals(model, PROMPTS, TOKENS, QUESTIONS, mid=True)


def test_an_error_in_the_model_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("gpt2")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model.base_model), "forward", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        read_residuals(model, PROMPTS, TOKENS, QUESTIONS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- probes ------------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (12, 40)])
def test_ridge_is_the_solution_of_the_normal_equations(n: int, d: int) -> None:
    x = noise(n, d) * np.linspace(0.01, 100, d) + 7
    x[:, 1] = 3.3  # says nothing
    y, new = noise(n, 3, seed=1) + 5, noise(6, d, seed=2) * 10
    found = Ridge(x).predict(new, y, (1e-3, 0.5, 20.0))
    assert found.shape == (3, 6, 3)
    for alpha, own in zip((1e-3, 0.5, 20.0), found, strict=True):
        np.testing.assert_allclose(own, by_hand.ridge(x, y, alpha, new), rtol=1e-8, atol=1e-8)


def test_ridge_of_one_feature_by_arithmetic() -> None:
    """Features -1, 0, 1 scaled by sqrt(2/3) and labels 0, 2, 4: the slope in scaled units is s xy / (s xx + 3 alpha)."""
    x, y = np.array([[9.0], [10.0], [11.0]]), np.array([[0.0], [2.0], [4.0]])
    scale = np.sqrt(2 / 3)
    slope = (2 * 2 / scale) / (3 + 3 * 0.5)
    found = Ridge(x).predict(np.array([[12.0]]), y, (0.5,))
    assert found[0, 0, 0] == pytest.approx(2 + slope * 2 / scale)


def test_nested_cross_validation_is_that_of_loops_over_folds_with_a_penalty_a_trial() -> None:
    x, folds = noise(40, 5), np.arange(40) % 4
    signal = x @ noise(5, 1, seed=1)
    number = np.stack([signal + 0.3 * noise(40, 1, seed=2), noise(40, 1, seed=3)])  # trial problem column
    weak = (signal + 2 * noise(40, 1, seed=2))[None]
    classes = np.eye(3)[noise(2, 40, seed=4).argsort(1) % 3]
    alphas = (1e-4, 1e-2, 1.0, 100.0)
    fits = cross_validated(x, [number, classes, weak], folds, alphas)
    for target, fit in zip((number, classes, weak), fits, strict=True):
        for trial in range(len(target)):
            predicted, chosen = by_hand.nested(x, target[trial], folds, alphas)
            assert fit.alphas[trial].tolist() == chosen
            np.testing.assert_allclose(fit.predicted[trial], predicted, atol=1e-9)
            middle = sorted(alphas.index(alpha) for alpha in fit.alphas[0])[1:3]
            fitted = by_hand.ridge(x, target[trial], alphas[int(np.mean(middle))], x)
            np.testing.assert_allclose(fit.in_sample[trial], fitted, atol=1e-9)
    assert fits[0].alphas[0].max() < fits[0].alphas[1].min(), "noise wants another penalty than a signal"
    assert fits[2].alphas[0].min() < np.median(fits[2].alphas[0]), "the median is one of several"


def test_leave_one_out_of_a_small_case() -> None:
    x, y = noise(7, 2), noise(7, 1, seed=1)
    (fit,) = cross_validated(x, [y[None]], np.arange(7), alphas=(0.1,))
    for one in range(7):
        others = np.arange(7) != one
        expected = by_hand.ridge(x[others], y[others], 0.1, x[[one]])
        np.testing.assert_allclose(fit.predicted[0, one], expected[0], atol=1e-12)


def test_a_planted_signal_is_found_and_noise_is_not_though_it_fits_in_sample() -> None:
    """More dimensions than problems, as in a real model."""
    x, folds = noise(150, 200), deal_folds(range(150), 5, rng(0, "folds"))
    planted = 3 * x[:, :2] @ np.array([[1.0], [-2.0]]) + 0.1 * noise(150, 1, seed=1)
    unrelated = noise(150, 1, seed=2)
    signal, random = cross_validated(x, [planted[None], unrelated[None]], folds, alphas=ALPHAS)
    weak = cross_validated(x, [unrelated[None]], folds, alphas=ALPHAS[:1])[0]
    assert r_squared(planted, signal.predicted[0]) > 0.5
    assert r_squared(unrelated, random.predicted[0]) < 0.02
    assert r_squared(unrelated, weak.in_sample[0]) > 0.99 and r_squared(unrelated, weak.predicted[0]) < 0
    plenty = noise(600, 20, seed=3)
    wide = plenty[:, :1] + 0.1 * noise(600, 1, seed=4)
    (easy,) = cross_validated(plenty, [wide[None]], np.arange(600) % 5)
    assert r_squared(wide, easy.predicted[0]) > 0.98


@pytest.mark.parametrize("what", ["folds", "features"])
def test_what_cannot_be_cross_validated_is_refused(what: str) -> None:
    x, y, folds = noise(6, 2), noise(1, 6, 1), np.arange(6) % 3
    if what == "folds":
        with pytest.raises(ValueError, match="probes need three folds or more"):
            cross_validated(x, [y], folds % 2)
    else:
        x[2, 1] = np.inf
        with pytest.raises(ValueError, match="the features are not finite"):
            cross_validated(x, [y], folds)


def test_a_group_is_in_one_fold_and_folds_are_of_about_one_size() -> None:
    groups = [f"g{number}" for number in [0] * 9 + [1] * 5 + [2] * 5 + list(range(3, 34))]
    folds = deal_folds(groups, 5, rng(0, "folds"))
    for group in set(groups):
        assert len({fold for fold, own in zip(folds, groups, strict=True) if own == group}) == 1
    assert sorted(np.bincount(folds)) == [10] * 5
    assert folds.tolist() == deal_folds(groups, 5, rng(0, "folds")).tolist()
    assert folds.tolist() != deal_folds(groups, 5, rng(1, "folds")).tolist()
    with pytest.raises(ValueError, match="4 problems in 2 groups cannot be divided into 3 folds"):
        deal_folds(["a", "b", "a", "b"], 3, rng(0, "folds"))


def test_shuffled_labels_are_the_same_ones_elsewhere_and_those_of_a_group_stay_together() -> None:
    groups = np.array([0, 1, 0, 2, 1, 2, 3, 3])
    y = np.array([[group, place] for place, group in enumerate(groups)])
    seen = set()
    for number in range(50):
        new = shuffled(y, groups, rng(number, "shuffle"))
        assert sorted(new[:, 1]) == list(range(8))
        given = {group: set(new[groups == group, 0].tolist()) for group in range(4)}
        assert all(len(some) == 1 for some in given.values()), "groups of one size take the labels of one group"
        seen.add(tuple(next(iter(given[group])) for group in range(4)))
    assert len(seen) > 15  # of 24
