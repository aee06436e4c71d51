from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from pyvene_ext.engine.measure import METRICS
from pyvene_ext.engine.plain import reference_for, run
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.joint import Spec
from tests.ground_truth import ablations as slow
from tests.random_prompts import random_prompts
from tests.tiny_random import FEWER, random_model

torch.set_num_threads(1)

PLACE = ["intervention", "site", "layer", "head", "position"]
PROMPTS = random_prompts((9, 6, 7, 9, 6, 7))
HEAD = Ablation(kind="zero", site="z", layer=1, heads=(2,))
SPECS: list[Spec] = [
    HEAD,
    Ablation(kind="noise", site="mlp_out", layer=0, positions=("s1", -1)),
    Ablation(kind="resample", site="z", layer=2, heads=(0, 1)),
    Ablation(kind="mean", site="scores", layer=0, heads=(1,)),
    (HEAD, Ablation(kind="mean", site="resid_pre", layer=2, positions="last")),
]


def _quiet_run(model, specs=SPECS, prompts=PROMPTS, *args, **kwargs):
    return run(model, specs, prompts, *args, progress=False, **kwargs)


@pytest.mark.parametrize("family", FEWER)
def test_batches_of_unequal_lengths_equal_one_prompt_at_a_time(family: str) -> None:
    model = random_model(family)
    single = _quiet_run(model, batch_size=1)
    assert single.intervened.shape == (5, 6) and single.intervened.dtype == np.float32
    for batch_size, padding_side in ((4, "left"), (4, "right"), (6, "left")):
        batched = _quiet_run(model, batch_size=batch_size, padding_side=padding_side)
        np.testing.assert_allclose(batched.baseline, single.baseline, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(batched.intervened, single.intervened, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "metric", [name for name, metric in METRICS.items() if not (metric.per_token or metric.of_answers)]
)
def test_metrics_are_those_of_hand_ablated_logits(metric: str) -> None:
    model = random_model("qwen2_5")
    result = _quiet_run(model, [HEAD], PROMPTS, metric, batch_size=4)
    change = ("z", 1, slow.replaced(range(99)[:6], [2], torch.zeros_like))
    for prompt in (1, 4):  # the two of six tokens
        ids = PROMPTS.input_ids[prompt]
        clean = slow.logits(model, ids)[-1:]
        ablated = slow.logits(model, ids, [change])[-1:]
        batch = replace(PROMPTS.batch([prompt]), clean_logits=clean)
        for logits, got in ((clean, result.baseline), (ablated, result.intervened[0])):
            assert got[prompt] == pytest.approx(METRICS[metric].function(logits, batch).item(), abs=1e-5)


def test_delta_is_clean_minus_intervened_and_names_are_in_order() -> None:
    result = _quiet_run(random_model("llama3_1"), [HEAD, SPECS[4]])
    np.testing.assert_array_equal(result.delta, result.baseline - result.intervened)
    assert result.names == ("z.1.2", "z.1.2+resid_pre.2@last:mean")


def test_a_frame_has_a_row_for_every_intervention_and_prompt() -> None:
    result = run(
        random_model("gpt2"), [Ablation(kind="zero", site="mlp_out", layer=layer) for layer in (1, 0, 1)], PROMPTS
    )
    frame = result.to_frame()
    assert list(frame) == [*PLACE, "prompt", "baseline", "intervened", "delta"]
    assert frame["baseline"].dtype == np.float32
    rows = iter(frame.itertuples(index=False))
    for number, name in enumerate(result.names):
        for prompt in range(len(PROMPTS)):
            before, after = result.baseline[prompt], result.intervened[number, prompt]
            row = next(rows)
            assert (row[0], *row[len(PLACE) :]) == (name, prompt, before, after, before - after)
    assert next(rows, None) is None


def test_a_given_reference_and_a_given_clean_run_are_used() -> None:
    model, forwards = random_model("llama3_1"), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    other = random_prompts((5, 8), seed=9)
    spec = Ablation(kind="mean", site="mlp_out", layer=1)
    own = _quiet_run(model, [spec])
    reference = reference_for(model, [spec], other, progress=False)
    borrowed = _quiet_run(model, [spec], reference=reference)
    assert np.abs(own.intervened - borrowed.intervened).max() > 1e-3

    forwards.clear()
    again = _quiet_run(model, [spec], reference=reference, baseline=own.baseline, batch_size=6)
    assert len(forwards) == 2  # one of the prompts that are compared with the clean run
    np.testing.assert_allclose(again.delta, borrowed.delta, atol=1e-5)


def test_noise_and_donors_depend_on_the_seed_alone() -> None:
    model = random_model("llama3_1")

    def effect(kind: str, seed: int) -> np.ndarray:
        spec = Ablation(kind=kind, site="z", layer=0, heads=(1,), positions="last", seed=seed)
        return _quiet_run(model, [spec]).intervened

    for kind in ("noise", "resample"):
        np.testing.assert_array_equal(effect(kind, 0), effect(kind, 0))
        assert np.abs(effect(kind, 0) - effect(kind, 1)).max() > 1e-4


def test_the_order_of_prompts_in_the_result_is_the_sets() -> None:
    model = random_model("gpt2")
    result = _quiet_run(model, all_heads(model.config)[:3], batch_size=2)
    for prompt, ids in enumerate(PROMPTS.input_ids):
        io, s = PROMPTS.answer_ids[prompt]
        logits = slow.logits(model, ids)[-1]
        assert result.baseline[prompt] == pytest.approx((logits[io] - logits[s]).item(), abs=1e-5)


def _state(model) -> tuple:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [name for name, _ in model.named_modules()],
        [dict(module._forward_hooks) | dict(module._forward_pre_hooks) for module in model.modules()],
        copy.deepcopy(model.config.to_dict()),
    )


def _assert_same(before: tuple, after: tuple) -> None:
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = random_model("gemma2").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.register_forward_hook(lambda *_: None)
    before = _state(model)
    _quiet_run(model)
    _assert_same(before, _state(model))

    class Stop(Exception):
        pass

    calls = []

    def stop(*_: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Stop

    handle = model.model.layers[2].mlp.register_forward_hook(stop)
    before = _state(model)
    with pytest.raises(Stop):
        _quiet_run(model)
    _assert_same(before, _state(model))
    handle.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "loss"}, "unknown metric 'loss'; choose among logit_diff"),
        ({"specs": []}, "at least one spec"),
        ({"specs": [HEAD, Ablation(kind="zero", site="z", layer=1, heads=(7,))]}, "head 7 is out of range"),
        ({"specs": [HEAD, Ablation(kind="zero", site="mlp_out", layer=1, positions="verb")]}, "no position 'verb'"),
        ({"baseline": np.zeros(3, np.float32)}, "values for 6 prompts"),
        ({"baseline": [0.0] * 6}, "baseline takes Result.baseline of an earlier run, an array of floats"),
        ({"prompts": random_prompts((6, 6, 7)), "specs": SPECS[2:3]}, "prompt 2 cannot be resampled"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(changes: dict, message: str) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        run(model, **{"specs": SPECS, "prompts": PROMPTS, "progress": False, **changes})


def test_a_reference_that_lacks_something_is_refused_before_the_model_runs() -> None:
    model = random_model("llama3_1")
    reference = Reference.compute(model, PROMPTS, [("z", 2)])
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="without all in bank"):
        _quiet_run(model, SPECS[2:3], reference=reference)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no logits over a vocabulary"):
        _quiet_run(random_model("llama3_1", "classifier"))


def test_progress_counts_every_prompt_of_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    run(random_model("llama3_1"), [HEAD], PROMPTS, batch_size=4)
    assert "6/6" in capsys.readouterr().err
    with tqdm(total=100) as longer:
        run(random_model("llama3_1"), [HEAD, HEAD.model_copy(update={"layer": 0})], PROMPTS, progress=longer)
        assert longer.n == 12


def test_statistics_of_another_model_are_refused() -> None:
    specs = [Ablation(kind="mean", site="z", layer=1, heads=(0,))]
    model, other = random_model("llama3_1"), random_model("llama3_1", seed=1)
    reference = reference_for(model, specs, PROMPTS, progress=False)
    with pytest.raises(ValueError, match="a model that differs in model weights"):
        run(other, specs, PROMPTS, reference=reference, progress=False)
    run(copy.deepcopy(model), specs, PROMPTS, reference=reference, progress=False)  # the same weights will do


def test_one_ablation_needs_no_list_and_prompts_must_be_tokenised() -> None:
    model = random_model("llama3_1")
    one, listed = (run(model, specs, PROMPTS, progress=False) for specs in (HEAD, [HEAD]))
    assert np.array_equal(one.intervened, listed.intervened)
    with pytest.raises(ValueError, match=r"PromptSet\(\[...\]\).tokenize\(tokenizer\) makes them"):
        run(model, HEAD, ["a prompt"], progress=False)
