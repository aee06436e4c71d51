"""Sequential frequencies equal those of the whole run on the prompts they used, and their intervals cover as is said."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binom

from pyvene_ext.engine.plain import reference_for, run
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep.sequential import Sequential, frequencies
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.joint import Spec, spec_name
from pyvene_ext.stats.intervals import frequency_interval
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import random_model

torch.set_num_threads(1)

PROMPTS = random_prompts((6, 7) * 20)


def _specs(model) -> list[Spec]:
    specs: list[Spec] = [*all_heads(model.config), *all_heads(model.config, "resample")]
    return [*specs, Ablation(kind="noise", site="mlp_out", layer=1), Ablation(kind="mean", site="resid_post", layer=2)]


def _sliced(model, specs, prompts, metric, reference, *, subset, progress) -> Result:
    """The plain engine on all prompts, cut to some of them."""
    assert not progress
    whole = run(model, specs, prompts, metric, reference, progress=False)
    return Result(whole.names, metric, whole.baseline[subset], whole.intervened[:, subset])


def _given(delta: np.ndarray) -> tuple[list[Spec], Callable[..., Result]]:
    """As many specs as `delta` [spec prompt] has rows, and an engine that returns its rows."""
    specs: list[Spec] = [Ablation(kind="zero", site="z", layer=0, heads=(0,), seed=row) for row in range(len(delta))]

    def engine(model, specs, prompts, metric, reference, *, subset, progress) -> Result:
        rows = [spec.seed for spec in specs]
        return Result(
            tuple(map(spec_name, specs)), metric, np.zeros(len(subset), np.float32), -delta[np.ix_(rows, subset)]
        )

    return specs, engine


def _frequencies(delta: np.ndarray, **settings) -> Sequential:
    specs, engine = _given(delta.astype(np.float32))
    prompts = random_prompts((2,) * delta.shape[1])
    model = random_model("llama3_1")
    return frequencies(model, specs, prompts, sweep=engine, progress=False, **settings)


@pytest.mark.parametrize("engine", first_only([None, _sliced]))
def test_each_spec_has_the_numbers_of_the_whole_run_on_the_prompts_it_used(engine) -> None:
    model = random_model("qwen2_5")
    specs = _specs(model)
    whole = run(model, specs, PROMPTS, progress=False)
    tau = float(np.median(np.abs(whole.delta)))
    settings = {} if engine is None else {"sweep": engine}
    found = frequencies(model, specs, PROMPTS, tau, width=0.45, block=6, progress=False, **settings)
    assert sorted(found.order) == list(range(40)) and list(found.order) != list(range(40))
    assert found.result.names == whole.names and 6 <= found.n_prompts.min() < found.n_prompts.max()
    for row, n in enumerate(found.n_prompts):
        used, unused = found.order[:n], found.order[n:]
        np.testing.assert_allclose(found.result.delta[row, used], whole.delta[row, used], atol=1e-4)
        assert np.isnan(found.result.delta[row, unused]).all()
        active = np.abs(found.result.delta[row, used]) > tau
        assert (found.frequency[row], found.low[row], found.high[row]) == frequency_interval(active)
        # It stopped at the first look at which the interval was narrow enough, or when there were no more prompts.
        looks = [min(look, 40) for look in range(6, 46, 6)]
        narrow = [np.diff(frequency_interval(active[:look])[1:])[0] <= 0.45 for look in looks if look <= n]
        assert not any(narrow[:-1]) and (narrow[-1] or n == 40) and found.reached[row] == narrow[-1]


@pytest.mark.slow
def test_statistics_and_donors_are_those_of_all_prompts_whatever_the_blocks() -> None:
    model = random_model("llama3_1")
    specs = _specs(model)
    one, several = (
        frequencies(model, specs, PROMPTS, 0.1, width=0.01, block=block, progress=False).result for block in (40, 7)
    )
    np.testing.assert_allclose(one.intervened, several.intervened, atol=1e-4)
    reference = reference_for(model, specs, random_prompts((6, 7) * 3, seed=5), progress=False)
    other = frequencies(model, specs, PROMPTS, 0.1, width=0.01, reference=reference, progress=False).result
    np.testing.assert_allclose(
        other.delta, run(model, specs, PROMPTS, reference=reference, progress=False).delta, atol=1e-4
    )


def test_a_spec_that_stopped_is_not_run_again_and_the_last_block_ends_the_run() -> None:
    always, mixed = np.ones(60), np.tile([0.0, 1.0], 30)
    calls = []
    specs, engine = _given(np.stack([always, mixed]).astype(np.float32))

    def counted(model, specs, *args, subset, progress) -> Result:
        calls.append((len(specs), len(subset)))
        return engine(model, specs, *args, subset=subset, progress=progress)

    model, prompts = random_model("llama3_1"), random_prompts((2,) * 60)
    found = frequencies(model, specs, prompts, 0.5, width=0.22, block=25, sweep=counted, progress=False)
    assert calls == [(2, 25), (1, 25), (1, 10)]
    assert found.n_prompts.tolist() == [25, 60] and found.reached.tolist() == [True, False]
    calls.clear()
    frequencies(model, specs[:1], prompts, 0.5, width=0.22, block=25, sweep=counted, progress=False)
    assert calls == [(1, 25)]


def test_the_sign_counts_unless_absolute_and_the_seed_is_of_the_order() -> None:
    delta = np.array([[-1.0] * 30, [1.0] * 30])
    assert _frequencies(delta, tau=0.5, width=0.2).frequency.tolist() == [1, 1]
    assert _frequencies(delta, tau=0.5, width=0.2, absolute=False).frequency.tolist() == [0, 1]
    orders = [_frequencies(delta, tau=0.5, width=0.2, seed=seed).order.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def _coverage(frequency: float, width: float, block: int) -> float:
    """How often the interval at the stopping time holds the frequency: a recursion over (prompts, active ones) without end."""
    going, n, covered = np.ones(1), 0, 0.0
    while going.sum() > 1e-9:
        going = np.convolve(going, binom.pmf(np.arange(block + 1), block, frequency))
        n += block
        shares = [frequency_interval(np.arange(n) < k) for k in np.flatnonzero(going > 1e-12)]
        low, high = np.zeros(n + 1), np.ones(n + 1)
        low[going > 1e-12], high[going > 1e-12] = [s.low for s in shares], [s.high for s in shares]
        stops = high - low <= width
        covered += going[stops & (low <= frequency) & (frequency <= high)].sum()
        going = np.where(stops, 0.0, going)
    return float(covered)


@pytest.mark.parametrize(
    ("frequency", "width"), first_only([(0.05, 0.2), (0.3, 0.2), (0.5, 0.3), (0.8, 0.2), (0.95, 0.3)])
)
def test_intervals_cover_in_simulation_as_often_as_the_recursion_says(frequency: float, width: float) -> None:
    draws = np.random.default_rng(0).random((4000, 160)) < frequency
    found = _frequencies(draws, tau=0.5, width=width)
    assert found.reached.all()
    covered = ((found.low <= frequency) & (frequency <= found.high)).mean()
    expected = _coverage(frequency, width, 16)
    assert covered == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    assert expected > 0.91
    outwards = (found.frequency.mean() - frequency) * np.sign(frequency - 0.5)
    assert -0.01 < outwards < width / 9


@pytest.mark.slow
def test_coverage_at_a_width_of_a_tenth_is_at_least_92_of_100_away_from_the_ends() -> None:
    assert min(_coverage(frequency, 0.1, 32) for frequency in (0.05, 0.1, 0.2, 0.35, 0.5)) > 0.92


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be above 0 and at most 1, not 0"),
        ({"block": 0}, "block must be at least 1"),
        ({"tau": -0.1}, "tau must be a finite number of 0 or more"),
        ({"tau": math.nan}, "tau must be"),
        ({"confidence": 95}, "confidence must be between 0 and 1, not 95"),
        ({"metric": "loss"}, "unknown metric"),
        ({"specs": []}, "at least one spec"),
        ({"specs": [Ablation(kind="zero", site="z", layer=1, heads=(7,))]}, "head 7 is out of range"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(changes: dict, message: str) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    arguments = {"specs": all_heads(model.config, "mean"), "tau": 0.1, "width": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        frequencies(model, prompts=PROMPTS, progress=False, **arguments)


def test_the_bar_ends_at_what_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    specs, engine = _given(np.stack([np.ones(60), np.tile([0.0, 1.0], 30)]).astype(np.float32))
    model, prompts = random_model("llama3_1"), random_prompts((2,) * 60)
    frequencies(model, specs, prompts, 0.5, width=0.25, block=25, sweep=engine)
    assert "85/85" in capsys.readouterr().err
