"""Metrics with a number for each token of a prompt: both engines, stores, several processes, and who refuses them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvene_ext.engine import metrics
from pyvene_ext.engine.measure import Metric
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.sweep import plan_sweep, sweep
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.engine.sweep.sequential import frequencies
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.methods.patching.patch import all_patches, patch
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.joint import Spec
from tests.ground_truth import ablations as slow
from tests.pyvene_ext.engine.sweep.test_processes import Launch, assert_same_bits
from tests.random_prompts import random_prompts
from tests.tiny_random import FEWER, VOCAB, random_model

METRIC = "token_probabilities"
PLACE = ["intervention", "site", "layer", "head", "position"]
PROMPTS = random_prompts((9,) * 8)
UNEQUAL = random_prompts((9, 7, 9))
MEMORY = 300_000  # makes several waves
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def model_and_specs(family: str) -> tuple[Any, list[Spec]]:
    specs: list[Spec] = [
        *all_heads(random_model(family).config)[::3],
        Ablation(kind="mean", site="mlp_out", layer=1, positions="s1"),
        (
            Ablation(kind="zero", site="scores", layer=0, heads=(1,)),
            Ablation(kind="mean", site="scores", layer=2, heads=(0, 2)),
        ),
        Ablation(kind="zero", site="resid_post", layer=2, positions=(0,)),  # cannot reach what is read
    ]
    return random_model(family), specs


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("memory", [None, MEMORY])
def test_the_sweep_gives_what_the_plain_engine_gives(family: str, memory: int | None) -> None:
    model, specs = model_and_specs(family)
    plain = run(model, specs, PROMPTS, METRIC, batch_size=2, progress=False)
    fast = sweep(model, specs, PROMPTS, METRIC, memory=memory, progress=False)
    assert plain.baseline.shape == (8, 9) and plain.intervened.shape == (len(specs), 8, 9)
    assert plain.delta.shape == (len(specs), 8, 9)
    np.testing.assert_allclose(fast.baseline, plain.baseline, **CLOSE)
    np.testing.assert_allclose(fast.intervened, plain.intervened, **CLOSE)
    assert (np.abs(plain.delta).max((1, 2)) > 1e-3).sum() >= len(specs) - 2, "something is compared"


@pytest.mark.parametrize("family", FEWER)
def test_it_is_the_softmax_at_the_last_token_read_at_the_prompts_own_tokens(family: str) -> None:
    model, specs = model_and_specs(family)
    found = run(model, specs[:1], PROMPTS, METRIC, progress=False)
    change = ("z", 0, slow.replaced(range(9), [0], torch.zeros_like))
    for prompt, ids in enumerate(PROMPTS.input_ids):
        for changes, got in (((), found.baseline), ((change,), found.intervened[0])):
            logits = slow.logits(model, ids, changes)[-1]
            shares = [float(logits[token].exp() / logits.exp().sum()) for token in ids]
            np.testing.assert_allclose(got[prompt], shares, **CLOSE)


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 40_000, dtype=torch.bfloat16)
    found = metrics.token_probabilities(logits, batch_of(((0, 5, 0),)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 3), 1 / 40_000))


def test_a_frame_has_a_row_for_every_token() -> None:
    model, specs = model_and_specs("llama3_1")
    result = run(model, specs[:2], PROMPTS, METRIC, progress=False)
    frame = result.to_frame()
    assert list(frame) == [*PLACE, "prompt", "token", "baseline", "intervened", "delta"]
    assert len(frame) == result.intervened.size
    for row, at in zip(frame.itertuples(index=False), np.ndindex(result.intervened.shape), strict=True):
        before, after = result.baseline[at[1:]], result.intervened[at]
        assert (row[0], *row[len(PLACE) :]) == (result.names[at[0]], *at[1:], before, after, before - after)


def test_some_of_the_prompts_and_a_given_clean_run() -> None:
    model, specs = model_and_specs("llama3_1")
    whole = sweep(model, specs, PROMPTS, METRIC, progress=False)
    some = sweep(model, specs, PROMPTS, METRIC, subset=[3, 0], progress=False)
    np.testing.assert_allclose(some.intervened, whole.intervened[:, [3, 0]], **CLOSE)
    again = run(model, specs[:1], PROMPTS, METRIC, baseline=whole.baseline, progress=False)
    np.testing.assert_array_equal(again.baseline, whole.baseline)
    with pytest.raises(ValueError, match=r"baseline holds \(8,\) values for 8 prompts; give one per token"):
        run(model, specs[:1], PROMPTS, METRIC, baseline=whole.baseline[:, 0], progress=False)


def test_an_interrupted_sweep_goes_on_and_a_finished_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, specs = model_and_specs("gemma2")
    options: dict[str, Any] = {"memory": MEMORY, "progress": False}
    expected = sweep(model, specs, PROMPTS, METRIC, **options)
    assert len(plan_sweep(model, specs, PROMPTS, METRIC, memory=MEMORY).waves) >= 3
    original, seen = Executor.run, []

    def noted(self: Executor, wave: Any, *args: Any) -> Any:
        seen.append(wave)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, wave, *args)

    monkeypatch.setattr(Executor, "run", noted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, specs, PROMPTS, METRIC, store=tmp_path / "s", **options)
    with pytest.raises(ValueError, match="differs in metric"):
        sweep(model, specs, PROMPTS, "probability", store=tmp_path / "s", **options)
    found = sweep(model, specs, PROMPTS, METRIC, store=tmp_path / "s", **options)
    assert seen[3] == seen[2] and not set(seen[:2]) & set(seen[3:])
    ran = len(seen)
    read = sweep(model, specs, PROMPTS, METRIC, store=tmp_path / "s", **options)
    assert len(seen) == ran
    for result in (found, read):
        assert result.baseline.tobytes() == expected.baseline.tobytes()
        assert result.intervened.tobytes() == expected.intervened.tobytes()


def swept(store: Path) -> dict[str, np.ndarray]:
    model, specs = model_and_specs("llama3_1")
    result = sweep(model, specs, PROMPTS, METRIC, memory=MEMORY, store=store, progress=False)
    return {"clean": result.baseline, "intervened": result.intervened}


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    expected = swept(tmp_path / "alone")
    for found in Launch(tmp_path / "launch", swept, tmp_path / "store").both:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("engine", [run, sweep, plan_sweep])
def test_prompts_of_unequal_length_are_refused_before_the_model_runs(engine: Any) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(
        ValueError, match=r"token_probabilities has one number per token.*the same length, not 7 to 9 tokens"
    ):
        engine(model, all_heads(model.config), UNEQUAL, METRIC)


def test_whoever_needs_one_number_a_prompt_refuses_it() -> None:
    model, specs = model_and_specs("llama3_1")
    told = "token_probabilities is one number per token; here choose among logit_diff, probability"
    with pytest.raises(ValueError, match=told):
        estimate(model, specs, PROMPTS, METRIC, progress=False)
    with pytest.raises(ValueError, match=told):
        frequencies(model, specs, PROMPTS, 0.1, width=0.2, metric=METRIC, progress=False)
    for engine in ("sweep", "plain"):
        with pytest.raises(ValueError, match=told):
            patch(model, all_patches(model.config, "z"), PROMPTS, PROMPTS, METRIC, engine=engine, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"did you mean 'token_probabilities'\?"):
        run(model, specs, PROMPTS, "token_probs", progress=False)


def test_wrong_shapes_and_ids_are_refused() -> None:
    logits = torch.zeros(2, VOCAB)
    for ids, told in (
        (((1, 2),), r"do not belong to a batch of shape \(1, 2\)"),
        (((1,), (VOCAB,)), f"token ids range from 1 to {VOCAB}"),
        (((-1,), (2,)), "token ids range from -1"),
    ):
        with pytest.raises(ValueError, match=told):
            metrics.token_probabilities(logits, batch_of(ids))
    with pytest.raises(ValueError, match="prompts 1 are not finite"):
        metrics.token_probabilities(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), batch_of(((0,), (1,))))


def batch_of(ids: tuple[tuple[int, ...], ...]) -> Batch:
    return TokenizedPrompts(ids).batch(range(len(ids)))


# -- metrics read at every token ---------------------------------------------------------------------------------------


def loss_of_7(logits: Tensor, prompts: Batch) -> Tensor:
    """The loss of token 7 and of the prompt's own token at every position."""
    return logits.log_softmax(-1)[..., 7] - logits.gather(2, prompts.input_ids[..., None])[..., 0]


READ: dict[str, Any] = {
    "next_token_loss": "next_token_loss",
    "entropy": metrics.entropy,
    "token_kl": "token_kl",
    "loss_of_7": Metric(loss_of_7, of_tokens=True),
    "ids": Metric(lambda logits, prompts: logits[..., 1] - logits[..., 0], of_tokens=True, ids=(7, 9), name="ids"),
}


def by_hand(name: str, logits: Tensor, clean: Tensor, ids: tuple[int, ...]) -> list[float]:
    """What these metrics are at every token of one prompt."""
    found = []
    for at, (row, of_clean) in enumerate(zip(logits.double(), clean.double(), strict=True)):
        shares, before = row.softmax(-1), of_clean.softmax(-1)
        follows = shares[ids[at + 1]] if at + 1 < len(ids) else torch.tensor(torch.nan)
        values = {
            "next_token_loss": -follows.log(),
            "entropy": -sum(share * share.log() for share in shares),
            "token_kl": sum(p * (p / q).log() for p, q in zip(before, shares, strict=True)),
            "loss_of_7": shares[7].log() - row[ids[at]],
            "ids": row[9] - row[7],
        }
        found.append(float(values[name]))
    return found


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("name", READ)
def test_metrics_at_every_token_are_those_of_each_prompt_alone(family: str, name: str) -> None:
    model, specs = model_and_specs(family)
    options: list[dict[str, Any]] = [{"batch_size": 3}, {"batch_size": 3, "padding_side": "right"}, {"batch_size": 1}]
    for engine, given in (*((run, given) for given in options), (sweep, {})):
        found = engine(model, specs[:1], UNEQUAL, READ[name], **given, progress=False)
        assert found.metric == name and found.intervened.shape == (1, 3, 9)
        for prompt, ids in enumerate(UNEQUAL.input_ids):
            change = ("z", 0, slow.replaced(range(len(ids)), [0], torch.zeros_like))
            clean, ablated = slow.logits(model, ids), slow.logits(model, ids, [change])
            for logits, got in ((clean, found.baseline), (ablated, found.intervened[0])):
                np.testing.assert_allclose(got[prompt, : len(ids)], by_hand(name, logits, clean, ids), **CLOSE)
                assert np.isnan(got[prompt, len(ids) :]).all()
    assert np.nanmax(np.abs(found.delta)) > 1e-4


def test_a_frame_has_no_rows_after_a_prompts_end() -> None:
    model, specs = model_and_specs("llama3_1")
    for metric, missing in (("entropy", 0), ("next_token_loss", 1)):  # nothing follows the last token
        frame = run(model, specs[:2], UNEQUAL, metric, progress=False).to_frame()
        expected = [
            (number, prompt, pos)
            for number in specs[:2]
            for prompt, ids in enumerate(UNEQUAL.input_ids)
            for pos in range(len(ids) - missing)
        ]
        assert [tuple(row) for row in frame[["prompt", "token"]].to_numpy()] == [tuple(row[1:]) for row in expected]
        assert frame.notna().all(axis=None)


def test_a_metric_at_every_token_may_lack_the_last_token_and_no_other() -> None:
    model, specs = model_and_specs("llama3_1")

    def without(column: int, padding_side: str) -> Any:
        def function(logits: Tensor, prompts: Batch) -> Tensor:
            values = logits[..., 0].clone()
            values[prompts.attention_mask == 0] = torch.nan
            values[torch.arange(len(values)), prompts.columns(column)] = torch.nan
            return values

        return run(
            model, specs[:1], UNEQUAL, Metric(function, of_tokens=True), padding_side=padding_side, progress=False
        )

    for side in ("left", "right"):
        assert np.isnan(without(-1, side).baseline).sum() == 3 + 2
        with pytest.raises(ValueError, match="metric 'function' is nan for prompt 1; it must return finite numbers"):
            without(-2, side)
    with pytest.raises(
        ValueError, match=r"returned shape \(3,\) for 3 prompts; return one number per token, \[batch pos\]"
    ):
        run(model, specs[:1], UNEQUAL, Metric(lambda x, _: x[:, 0, 0], of_tokens=True), progress=False)


def test_what_reads_the_last_token_only_refuses_metrics_at_every_token() -> None:
    model, specs = model_and_specs("llama3_1")
    with pytest.raises(ValueError, match="entropy is one number per token; here choose among logit_diff"):
        estimate(model, specs, PROMPTS, "entropy", progress=False)
