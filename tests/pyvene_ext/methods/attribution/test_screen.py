"""First-order estimates equal autograd through hand-written hooks, one prompt at a time; recall equals a count by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from pyvene_ext.engine.plain import reference_for, run
from pyvene_ext.engine.results import Result
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.attribution.screen import (
    Screen,
    _hypergeometric_interval,
    estimate,
    screened,
)
from pyvene_ext.specs.ablation import Ablation, all_heads, donors
from pyvene_ext.specs.joint import Spec, members, spec_name
from tests.ground_truth import ablations as slow
from tests.pyvene_ext.engine.test_compile import PROMPTS, SETS, SITES, _change, _model, _specs, kv_specs
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model

torch.set_num_threads(1)

HEADS = [Ablation(kind="zero", site="z", layer=layer, heads=(head,)) for layer in range(3) for head in range(4)]


def _every_layer() -> list[Spec]:
    """The specs of `test_compile` have their edits in the middle; these are at both ends, where a graph begins or stops."""
    specs: list[Spec] = [
        Ablation(kind="mean", site=site, layer=layer, heads=(1, 2) if site == "z" else None)
        for site in SITES
        for layer in (0, 2)
        if site != "embed"
    ]
    return specs + [Ablation(kind="mean", site="scores", layer=layer, heads=(2,)) for layer in (0, 1)]


def _metric(logits: Tensor, answers: tuple[int, int], metric: str) -> Tensor:
    if metric == "probability":
        return logits.softmax(-1)[answers[0]]
    return logits[answers[0]] - logits[answers[1]]


def _by_hand(family: str, name: str, spec: Spec, prompt: int, metric: str) -> float:
    """Minus the derivative of the metric along the edit: every activation x becomes x + t (new - x), at t = 0."""
    model, prompts = _model(family), SETS[name]
    t = torch.zeros((), requires_grad=True)

    def along(change: slow.Change) -> slow.Change:
        return lambda x, *more: x + t * (change(x, *more) - x).detach()

    changes = [_change(family, name, a, prompt) for a in members(spec)]
    handles = [h for site, layer, change in changes for h in slow.hooks(model, site, layer, along(change))]
    try:
        logits = model(torch.tensor([prompts.input_ids[prompt]])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    (slope,) = torch.autograd.grad(_metric(logits, prompts.answer_ids[prompt], metric), t)
    return -slope.item()


def _compare(family: str, name: str, specs: list[Spec], metric: str = "logit_diff") -> None:
    got = estimate(_model(family), specs, SETS[name], metric, batch_size=4, progress=False)
    assert got.dtype == np.float32
    assert (np.abs(got).max(1) > 1e-3).mean() > 0.8  # else little was compared
    for number, spec in enumerate(specs):
        expected = np.array([_by_hand(family, name, spec, prompt, metric) for prompt in range(len(SETS[name]))])
        # Relative to the spec's largest: a small estimate may be the difference of large ones, and so is it in float32 by hand.
        scale = 1 + np.abs(expected).max()
        np.testing.assert_allclose(
            got[number] / scale, expected / scale, atol=1e-5, err_msg=f"{family} {spec_name(spec)}"
        )


@pytest.mark.parametrize(
    ("family", "every"),
    [*((family, 3) for family in FAMILIES), pytest.param("gemma2", 2, marks=pytest.mark.slow)],
)
def test_estimates_of_every_site_and_kind_equal_autograd_on_single_prompts(family: str, every: int) -> None:
    specs = _specs() + _every_layer()
    some = [spec for number, spec in enumerate(specs) if number % every == 0 or isinstance(spec, tuple)]
    assert {(a.site, a.kind) for s in some for a in members(s)} == {(a.site, a.kind) for s in specs for a in members(s)}
    _compare(family, "unequal", some)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_keys_and_values_equal_autograd(family: str) -> None:
    _compare(family, "unequal", kv_specs(family)[::3])


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_means_per_position_over_all_positions_equal_autograd(family: str) -> None:
    _compare(
        family,
        "equal",
        [
            Ablation(
                kind="mean",
                mean="per_position",
                site=site,
                layer=None if site == "embed" else 1,
                heads=(0, 3) if site == "z" else None,
            )
            for site in SITES
        ],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_of_probability_equal_autograd(family: str) -> None:
    _compare(family, "unequal", _every_layer()[::2], "probability")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_under_eager_attention_equal_autograd(family: str) -> None:
    _compare(f"{family}/eager", "unequal", [s for s in _specs() if isinstance(s, tuple) or s.site in ("z", "scores")])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_depends_neither_on_the_other_specs_nor_on_the_batch(family: str) -> None:
    model = _model(family)
    specs = [spec for spec in [*_specs(), *_every_layer()] if not isinstance(spec, tuple)][::5]
    reference = reference_for(model, specs, PROMPTS, progress=False)
    together = estimate(model, specs, PROMPTS, reference=reference, batch_size=6, progress=False)
    alone = [estimate(model, spec, PROMPTS, reference=reference, batch_size=1, progress=False)[0] for spec in specs]
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smaller_the_edit_the_nearer_the_estimate_to_the_exact_delta(family: str) -> None:
    """Donors are moved towards their receivers, until replacing one activation by the other changes almost nothing."""
    model = _model(family)
    where = [(s, x) for s in SITES for x in ((None,) if s == "embed" else range(3))]
    specs: list[Spec] = [
        Ablation(kind="resample", site=s, layer=x, heads=(0, 2) if s == "z" else None, positions="last")
        for s, x in where
    ]
    reference = reference_for(model, specs, PROMPTS, progress=False)
    assert reference is not None
    givers = donors(PROMPTS, PROMPTS, "last", 0)

    def errors(scale: float) -> np.ndarray:
        tensors = dict(reference.tensors)
        for name, bank in reference.tensors.items():
            if name.startswith("bank"):
                tensors[name] = bank.clone()
                tensors[name][givers] = bank + scale * (bank[givers] - bank)
        nearer = replace(reference, tensors=tensors)
        exact = run(model, specs, PROMPTS, reference=nearer, progress=False).delta / scale
        return np.abs(estimate(model, specs, PROMPTS, reference=nearer, progress=False) / scale - exact).max(1)

    far, near = errors(0.1), errors(0.01)
    rounding = 1e-6 / 0.01  # of the metric, in float32
    assert (near < far / 5 + 10 * rounding).all()
    assert np.median(far) > 100 * rounding  # else there was nothing to shrink


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_what_the_final_norm_reads_is_what_first_order_cannot_see(family: str) -> None:
    model = _model(family)
    spec = Ablation(kind="zero", site="resid_post", layer=2)
    assert np.abs(estimate(model, spec, PROMPTS, progress=False)).max() < 1e-3
    assert np.abs(run(model, spec, PROMPTS, progress=False).delta).min() > 1e-2


def test_one_forward_pass_a_batch_however_many_specs() -> None:
    model = random_model("llama3_1")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for specs in (HEADS[:1], HEADS):
        calls.clear()
        estimate(model, specs, PROMPTS, batch_size=4, progress=False)
        assert len(calls) == 2


def test_estimates_in_bfloat16_are_float32_and_near_those_of_float32() -> None:
    wide, narrow = random_model("qwen2_5"), random_model("qwen2_5").bfloat16()
    specs = [*HEADS, *_every_layer()]
    expected, got = (estimate(model, specs, PROMPTS, progress=False) for model in (wide, narrow))
    assert got.dtype == np.float32
    assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.99
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_estimates_are_had_where_gradients_are_switched_off(mode) -> None:
    model = random_model("gpt2")
    expected = estimate(model, HEADS, PROMPTS, progress=False)
    with mode():
        got = estimate(model.requires_grad_(False), HEADS, PROMPTS, progress=False)
    np.testing.assert_array_equal(got, expected)


def test_an_offloaded_model_gives_the_same_estimates() -> None:
    model = random_model("gemma2")
    specs = [*HEADS, Ablation(kind="mean", site="scores", layer=1, heads=(0,))]
    expected = estimate(model, specs, PROMPTS, progress=False)
    offloaded = cpu_offload(random_model("gemma2"), execution_device="cpu")
    flags = {name: parameter.requires_grad for name, parameter in offloaded.named_parameters()}
    np.testing.assert_allclose(estimate(offloaded, specs, PROMPTS, progress=False), expected, atol=1e-5, rtol=1e-5)
    assert {name: parameter.requires_grad for name, parameter in offloaded.named_parameters()} == flags


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = random_model("gemma2").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)

    def state() -> tuple:
        modules = list(model.named_modules())
        return (
            [name for name, _ in modules],
            [(module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks)) for _, module in modules],
            [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
            copy.deepcopy(model.config.to_dict()),
            [getattr(module, "config", model.config)._attn_implementation for _, module in modules],
        )

    before, weights = state(), copy.deepcopy(model.state_dict())
    specs = [*HEADS, Ablation(kind="mean", site="scores", layer=1, heads=(0,))]
    estimate(model, specs, PROMPTS, progress=False)
    assert state() == before and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="61 tokens; use the model's own tokenizer"):
        estimate(model, specs, PROMPTS.with_answer_ids(((3, 99),) * 6), progress=False)
    assert state() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "kl"}, "no first-order term there.*choose among logit_diff, probability, logit"),
        ({"metric": "rank"}, "the gradient of 'rank' is 0 or undefined.*choose among logit_diff, probability, logit"),
        ({"metric": "accuracy"}, "the gradient of 'accuracy' is 0 or undefined"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"specs": []}, "at least one spec"),
        ({"prompts": ["a prompt"]}, r"\.tokenize\(tokenizer\)"),
        ({"specs": [Ablation(kind="zero", site="z", layer=1, heads=(7,))]}, "head 7 is out of range"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(changes: dict, message: str) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    arguments = {"specs": [Ablation(kind="mean", site="z", layer=1, heads=(0,))], "prompts": PROMPTS, **changes}
    with pytest.raises(ValueError, match=message):
        estimate(model, progress=False, **arguments)
    with pytest.raises(ValueError, match=message):
        screened(model, tau=0.1, progress=False, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": -1}, "tau must be"),
        ({"tau": math.nan}, "tau must be"),
        ({"margin": math.inf}, "margin"),
        ({"check": 2}, "0 to 1"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        screened(model, HEADS, PROMPTS, progress=False, **{"tau": 0.1, **changes})


def test_a_model_without_a_vocabulary_and_statistics_of_another_are_refused() -> None:
    with pytest.raises(ValueError, match="has no logits over a vocabulary"):
        estimate(random_model("llama3_1", "classifier"), HEADS, PROMPTS, progress=False)
    specs = [Ablation(kind="mean", site="z", layer=1, heads=(0,))]
    reference = reference_for(random_model("llama3_1", seed=1), specs, PROMPTS, progress=False)
    with pytest.raises(ValueError, match="a model that differs in model weights"):
        estimate(random_model("llama3_1"), specs, PROMPTS, reference=reference, progress=False)
    with pytest.raises(ValueError, match="without all in bank"):
        estimate(
            random_model("llama3_1"),
            Ablation(kind="resample", site="z", layer=2, heads=(0,)),
            PROMPTS,
            reference=Reference.compute(random_model("llama3_1"), PROMPTS, [("z", 2)]),
            progress=False,
        )


# -- the screen --------------------------------------------------------------------------------------------------------


def test_a_screen_runs_what_could_matter_and_a_random_part_of_the_rest() -> None:
    model = random_model("qwen2_5")
    specs = [*all_heads(model.config), *all_heads(model.config, "mean"), *all_heads(model.config, "resample")]
    reference = reference_for(model, specs, PROMPTS, progress=False)
    estimates = estimate(model, specs, PROMPTS, reference=reference, progress=False)
    exact = run(model, specs, PROMPTS, reference=reference, progress=False)
    size = np.abs(estimates).max(1)
    tau = float(np.quantile(np.abs(exact.delta).max(1), 0.6))
    asked = []

    def recorded(model, specs, *args, **kwargs) -> Result:
        asked.extend(specs)
        return run(model, specs, *args, **kwargs)

    found = screened(model, specs, PROMPTS, tau, reference=reference, margin=1.3, progress=False, sweep=recorded)
    np.testing.assert_array_equal(found.could_matter, size > 1.3 * tau)
    aside = np.flatnonzero(size <= 1.3 * tau)
    assert len(found.checked) == 20 < len(aside) and set(found.checked) <= set(aside)
    assert asked == [spec for spec, run_exactly in zip(specs, found.exact, strict=True) if run_exactly]
    assert found.result.names == exact.names and found.result.metric == "logit_diff"
    np.testing.assert_array_equal(found.result.baseline, exact.baseline)
    np.testing.assert_allclose(found.result.delta[found.exact], exact.delta[found.exact], atol=1e-5)
    assert np.isnan(found.result.delta[~found.exact]).all() and (~found.exact).any()

    active = (np.abs(exact.delta) > tau).any(1)
    caught, missed = (active & found.could_matter).sum(), active[found.checked].sum()
    assert 0 < missed < active.sum() - caught  # so that the weight of a checked one counts
    assert found.recall is not None
    assert found.recall.mean == pytest.approx(caught / (caught + missed * len(aside) / 20))
    assert found.recall.low <= caught / active.sum() <= found.recall.high
    assert found.precision == pytest.approx(caught / found.could_matter.sum())
    assert f"{caught} are active" in found.summary() and f"of which {missed} are active" in found.summary()
    assert f"recall: {found.recall.mean:.3f}" in found.summary()

    other = screened(model, specs, PROMPTS, tau, reference=reference, margin=1.3, seed=1, progress=False)
    again = screened(model, specs, PROMPTS, tau, reference=reference, margin=1.3, progress=False)
    np.testing.assert_array_equal(again.checked, found.checked)
    assert set(other.checked) != set(found.checked)


def test_a_share_of_the_rest_is_checked_where_it_is_more_than_twenty() -> None:
    model = random_model("llama3_1")
    specs: list[Spec] = [s for seed in range(4) for s in all_heads(model.config, "noise", seed=seed)]
    prompts = random_prompts((5, 6))
    everything = screened(model, specs, prompts, 1e9, check=0.5, progress=False)
    assert not everything.could_matter.any() and len(everything.checked) == 36
    assert everything.recall is None and everything.precision is None
    assert "recall: not measurable: nothing that was run exactly is active" in everything.summary()
    nothing_aside = screened(model, specs[:3], prompts, 0.0, progress=False)
    assert nothing_aside.could_matter.all() and not len(nothing_aside.checked)
    assert nothing_aside.recall == (1.0, 1.0, 1.0) and nothing_aside.precision == 1.0


def _screen(could_matter: list[int], checked: list[int], active: list[int]) -> Screen:
    """Ten interventions on one prompt, of which the active ones have a delta of 2 against a threshold of 1."""
    flags = np.isin(np.arange(10), could_matter)
    delta = np.where(np.isin(np.arange(10), active), 2.0, 0.0)
    delta[~np.isin(np.arange(10), could_matter + checked)] = np.nan
    result = Result(
        tuple(map(str, range(10))), "logit_diff", np.zeros(1, np.float32), -delta[:, None].astype(np.float32)
    )
    return Screen(result, np.zeros((10, 1), np.float32), flags, np.array(checked, int), 1.0, 0.5)


def test_recall_and_its_interval_equal_a_count_by_hand() -> None:
    # 2 of 3 that could matter are active; of 7 aside 4 are checked, 1 active: 7/4 expected, so recall 2 / (2 + 7/4).
    screen = _screen([0, 1, 2], [3, 4, 5, 6], [0, 1, 3, 9])
    assert (screen.caught, screen.missed, screen.precision) == (2, 1, pytest.approx(2 / 3))

    # With k active among the 7, C(k, j) C(7 - k, 4 - j) / C(7, 4) is the chance of j among the 4: k = 1 to 4 are plausible.
    def chance(k: int, counts: range) -> float:
        return sum(math.comb(k, j) * math.comb(7 - k, 4 - j) for j in counts) / math.comb(7, 4)

    plausible = [k for k in range(8) if chance(k, range(2)) > 0.025 and chance(k, range(1, 5)) > 0.025]
    assert plausible == [1, 2, 3, 4]
    assert screen.recall == pytest.approx((2 / (2 + 7 / 4), 2 / 6, 2 / 3))

    all_checked = _screen([0, 1, 2], [3, 4, 5, 6, 7, 8, 9], [0, 1, 3, 9])
    assert all_checked.recall == pytest.approx((0.5, 0.5, 0.5))
    no_miss = _screen([0, 1, 2], [3, 4, 5, 6], [0, 1])
    assert no_miss.recall is not None and no_miss.recall.mean == no_miss.recall.high == 1 and no_miss.recall.low == 0.4
    assert _screen([0], [3, 4], [3]).recall == (0.0, 0.0, 0.0)
    assert _screen([0], [3, 4], []).recall is None


@pytest.mark.parametrize(("population", "drawn"), [(20, 20), (21, 20), (60, 20), (97, 31)])
def test_the_interval_of_a_count_covers_in_at_least_95_of_100_draws(population: int, drawn: int) -> None:
    intervals = {k: _hypergeometric_interval(k, drawn, population) for k in range(drawn + 1)}
    for active in range(population + 1):
        covered = sum(
            math.comb(active, k) * math.comb(population - active, drawn - k)
            for k, (low, high) in intervals.items()
            if low <= active <= high
        )
        assert covered / math.comb(population, drawn) >= 0.95
