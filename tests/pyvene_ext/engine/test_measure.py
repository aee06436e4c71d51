"""A metric of one's own: by hand, by name and by function the same numbers, wherever a metric is taken; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyvene_ext as px
from pyvene_ext.engine.measure import METRICS, Metric, as_metric
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.sweep import plan_sweep, sweep
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.engine.sweep.sequential import frequencies
from pyvene_ext.methods.attribution.atp import atp, atp_star
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.attribution.screen import estimate, screened
from pyvene_ext.methods.circuits.circuit import Circuit
from pyvene_ext.methods.circuits.running import run_circuits
from pyvene_ext.methods.patching.patch import all_patches, all_paths, patch
from pyvene_ext.prompts.tokenized import AnswerTokens, Batch, answer_pairs
from pyvene_ext.specs.ablation import Ablation, all_heads
from tests.ground_truth import ablations as slow
from tests.pretended_devices import PretendedDevices, spread
from tests.random_prompts import random_prompts
from tests.tiny_random import FEWER, VOCAB, random_model

# How a metric is called does not depend on the family.
ONE = ["gemma2", pytest.param("gpt2", marks=pytest.mark.slow)]

torch.set_num_threads(1)

PROMPTS = random_prompts((9, 6, 7, 9, 6))
BASE, SOURCE = random_prompts((7, 6, 7)), random_prompts((7, 6, 7), seed=5)
SOURCE = replace(SOURCE, answers=BASE.answers)
HEAD = Ablation(kind="zero", site="z", layer=1, heads=(2,))
SPECS = [
    HEAD,
    Ablation(kind="mean", site="mlp_out", layer=0, positions=("s1", -1)),
    (HEAD, HEAD.model_copy(update={"layer": 2})),
]
MONTHS = [40, 7, 23, 8]
TARGETS = torch.tensor([11, 50, 3, 29, 60])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
QUIET: dict[str, Any] = {"progress": False}

model_of = cache(random_model)


def months(logits: Tensor, prompts: Batch) -> Tensor:
    return logits.softmax(-1)[:, MONTHS].sum(-1)


def own_target(logits: Tensor, prompts: Batch) -> Tensor:
    """The log-probability of a token of each prompt, minus the logit of the prompt's own last but one."""
    rows = torch.arange(len(logits))
    before_last = prompts.input_ids[rows, [column - 1 for column in prompts.last_columns]]
    return logits.log_softmax(-1)[rows, TARGETS[prompts.index]] - logits[rows, before_last]


def moved(logits: Tensor, prompts: Batch) -> Tensor:
    """Half the squared distance from the untouched run."""
    assert prompts.clean_logits is not None and not prompts.clean_logits.requires_grad
    return (logits - prompts.clean_logits).square().sum(-1) / 2


def by_hand(logits: Tensor, prompts: Any, prompt: int, clean: Tensor) -> dict[str, float]:
    """What these functions give for the logits of one prompt."""
    shares = logits.softmax(-1)
    return {
        "months": sum(float(shares[token]) for token in MONTHS),
        "own_target": float(shares[TARGETS[prompt]].log() - logits[prompts.input_ids[prompt][-2]]),
        "moved": float((logits - clean).square().sum() / 2),
    }


OWN: dict[str, Any] = {"months": months, "own_target": own_target, "moved": Metric(moved, needs=("clean",))}


@pytest.mark.parametrize("family", ONE)
@pytest.mark.parametrize("name", OWN)
def test_a_function_of_ones_own_is_read_from_the_logits_of_each_prompt(family: str, name: str) -> None:
    model = model_of(family)
    plain = run(model, HEAD, PROMPTS, OWN[name], batch_size=3, **QUIET)
    assert plain.metric == name and plain.intervened.dtype == np.float32
    for prompt, ids in enumerate(PROMPTS.input_ids):
        clean = slow.logits(model, ids)[-1]
        ablated = slow.logits(model, ids, [("z", 1, slow.replaced(range(len(ids)), [2], torch.zeros_like))])[-1]
        for logits, got in ((clean, plain.baseline), (ablated, plain.intervened[0])):
            np.testing.assert_allclose(got[prompt], by_hand(logits, PROMPTS, prompt, clean)[name], **CLOSE)
    for memory in (None, 300_000):
        fast = sweep(model, [HEAD, *all_heads(model.config)[:3]], PROMPTS, OWN[name], memory=memory, **QUIET)
        np.testing.assert_allclose(fast.baseline, plain.baseline, **CLOSE)
        np.testing.assert_allclose(fast.intervened[0], plain.intervened[0], **CLOSE)
    assert np.abs(plain.delta).max() > 1e-4


@pytest.mark.parametrize("family", ONE)
@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if not metric.of_tokens])
def test_by_name_and_by_function_it_is_the_same_metric(family: str, name: str) -> None:
    known = METRICS[name]
    prompts = random_prompts((6,) * 3) if known.per_token else PROMPTS
    kind = {"per_token": known.per_token, "of_answers": known.of_answers}
    anew = Metric(lambda *of: known.function(*of), needs=known.needs, **kind)  # the whole vocabulary
    for engine in (run, sweep):
        by_name, by_function, by_own = (
            engine(model_of(family), SPECS[:1], prompts, metric, **QUIET) for metric in (name, known.function, anew)
        )
        assert by_name.metric == by_function.metric == name and by_own.metric == "<lambda>"
        np.testing.assert_array_equal(by_function.intervened, by_name.intervened)
        np.testing.assert_allclose(by_own.intervened, by_name.intervened, **CLOSE)
        np.testing.assert_allclose(by_own.baseline, by_name.baseline, **CLOSE)


@pytest.mark.parametrize("family", ONE)
def test_a_function_of_some_ids_gives_what_it_gives_with_the_whole_vocabulary(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def first_over_others(logits: Tensor, prompts: Batch) -> Tensor:
        seen.append(logits.shape[1])
        return logits[:, 0] - logits[:, 1:].logsumexp(-1)

    whole = Metric(lambda logits, prompts: first_over_others(logits[:, MONTHS], prompts))
    narrow = Metric(first_over_others, ids=torch.tensor(MONTHS))
    for engine in (run, sweep, sweep):
        expected, found = (engine(model_of(family), SPECS, PROMPTS, metric, **QUIET) for metric in (whole, narrow))
        # The second sweep is with an unembedding that cannot be taken apart.
        monkeypatch.setattr("pyvene_ext.models.replay.output_weight", lambda projection: None)
        np.testing.assert_allclose(found.intervened, expected.intervened, **CLOSE)
        np.testing.assert_allclose(found.baseline, expected.baseline, **CLOSE)
    assert set(seen) == {len(MONTHS)}


def test_answers_are_columns_for_a_function_that_reads_these_alone() -> None:
    several = replace(
        PROMPTS,
        answers=tuple(AnswerTokens(own.right + ((2,),) * (i % 2), own.wrong) for i, own in enumerate(PROMPTS.answers)),
    )
    whole = Metric(METRICS["logit_diff"].function, needs=("right", "wrong"))
    model = model_of("gemma2")
    expected = run(model, SPECS, several, whole, **QUIET)
    assert np.abs(expected.baseline - run(model, HEAD, PROMPTS, **QUIET).baseline)[[1, 3]].min() > 1e-3
    for engine in (run, sweep):
        np.testing.assert_allclose(engine(model, SPECS, several, **QUIET).intervened, expected.intervened, **CLOSE)
    right_only = replace(PROMPTS, answers=tuple(AnswerTokens(own.right) for own in PROMPTS.answers))
    expected = run(model, SPECS, PROMPTS, "logit", **QUIET)
    np.testing.assert_allclose(sweep(model, SPECS, right_only, "logit", **QUIET).delta, expected.delta, **CLOSE)


@pytest.mark.parametrize("family", ONE)
def test_patching_takes_functions(family: str) -> None:
    model = model_of(family)
    specs = [*all_patches(model.config, "z")[::7], *all_paths(model.config, ("logits",))[::6]]
    specs += all_paths(model.config, ("v.2.0",), direct=True)[::5]
    by_name = patch(model, specs, BASE, SOURCE, "logit", **QUIET)
    for engine in ("sweep", "plain"):
        found = patch(model, specs, BASE, SOURCE, lambda *of: METRICS["logit"].function(*of), engine=engine, **QUIET)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.intervened, by_name.intervened, **CLOSE)
        np.testing.assert_allclose(found.source, by_name.source, **CLOSE)
        far = patch(model, specs, BASE, SOURCE, OWN["moved"], engine=engine, **QUIET)  # type: ignore[arg-type]
        assert (far.baseline == 0).all() and np.isnan(far.source).all() and far.intervened.max() > 1e-4
        target = patch(model, specs, BASE, SOURCE, own_target, engine=engine, **QUIET)  # type: ignore[arg-type]
        assert target.metric == "own_target"
    logits = [slow.logits(model, ids)[-1] for ids in SOURCE.input_ids]
    expected = [by_hand(row, SOURCE, prompt, row)["own_target"] for prompt, row in enumerate(logits)]
    np.testing.assert_allclose(target.source, expected, **CLOSE)


@pytest.mark.parametrize("family", FEWER)
def test_attribution_takes_differentiable_functions(family: str) -> None:
    model = model_of(family)
    patches = all_patches(model.config, "z")[::5]

    def log_odds(logits: Tensor, prompts: Batch) -> Tensor:
        return METRICS["logit_diff"].function(logits, prompts)

    for method in (atp, partial(atp_star, grad_drop=False)):
        expected = method(model, patches, BASE, SOURCE, **QUIET)
        np.testing.assert_allclose(method(model, patches, BASE, SOURCE, log_odds, **QUIET), expected, **CLOSE)
    expected = estimate(model, SPECS, PROMPTS, **QUIET)
    np.testing.assert_allclose(estimate(model, SPECS, PROMPTS, log_odds, **QUIET), expected, **CLOSE)
    np.testing.assert_array_equal(estimate(model, SPECS, PROMPTS, METRICS["logit_diff"].function, **QUIET), expected)
    assert (estimate(model, SPECS, PROMPTS, OWN["moved"], **QUIET) == 0).all()  # of second order
    for name in ("logit_diff", "kl"):
        options: dict[str, Any] = {"method": "eap_ig_inputs", "steps": 2, **QUIET}
        known = edge_attribution(model, BASE, SOURCE, name, **options)
        own = Metric(lambda *of, name=name: METRICS[name].function(*of), needs=METRICS[name].needs)
        np.testing.assert_allclose(edge_attribution(model, BASE, SOURCE, own, **options).matrix, known.matrix, **CLOSE)


def test_the_estimate_of_a_function_is_its_derivative() -> None:
    model = model_of("llama3_1")
    spec = Ablation(kind="zero", site="resid_post", layer=2, positions="last")  # before the final norm
    found = estimate(model, spec, PROMPTS, own_target, **QUIET)[0]
    for prompt, ids in enumerate(PROMPTS.input_ids):
        stream = slow.activation(model, ids, "resid_post", 2)[-1].detach().requires_grad_()
        logits = model.lm_head(model.model.norm(stream))
        shares = logits.log_softmax(-1)[TARGETS[prompt]] - logits[ids[-2]]
        (gradient,) = torch.autograd.grad(shares, stream)
        np.testing.assert_allclose(found[prompt], float((stream * gradient).sum().detach()), **CLOSE)


def test_circuits_screens_and_frequencies_take_functions() -> None:
    model = model_of("qwen2_5")
    runs = run_circuits(model, [Circuit.full(model.config), Circuit(frozenset())], BASE, SOURCE, own_target, **QUIET)
    for prompts, got in ((BASE, runs.circuits[0]), (SOURCE, runs.circuits[1])):
        for prompt, ids in enumerate(prompts.input_ids):
            # The function gets the base prompt, also on the source's logits.
            logits = slow.logits(model, ids)[-1]
            np.testing.assert_allclose(got[prompt], by_hand(logits, BASE, prompt, logits)["own_target"], **CLOSE)
    exact = sweep(model, SPECS, PROMPTS, own_target, **QUIET)
    screen = screened(model, SPECS, PROMPTS, 0.1, own_target, **QUIET)
    np.testing.assert_allclose(screen.result.intervened, exact.intervened, **CLOSE)
    found = frequencies(model, SPECS, PROMPTS, 0.1, width=1.0, block=5, metric=own_target, **QUIET)
    assert (found.frequency == (np.abs(exact.delta) > 0.1).mean(1)).all()
    assert runs.metric == screen.result.metric == found.result.metric == "own_target"


@pytest.mark.slow
def test_functions_get_logits_and_prompts_on_one_device() -> None:
    def own(logits: Tensor, prompts: Batch) -> Tensor:
        assert prompts.clean_logits is not None
        first = prompts.input_ids.gather(1, prompts.position_ids[:, -1:])
        return logits.gather(1, first + prompts.right_ids)[:, 0] - prompts.clean_logits.square().sum(1)

    pairs = [replace(prompts, answers=answer_pairs([(0, 1)] * len(prompts))) for prompts in (BASE, SOURCE)]
    metrics: list[Any] = [
        Metric(own, needs=("clean",)),
        "logit_diff",
        Metric(lambda logits, prompts: logits.logsumexp(-1), ids=MONTHS, needs=("clean",)),
        "token_kl",
        "next_token_loss",
    ]

    def numbers(model: Any) -> list[np.ndarray]:
        heads = all_patches(model.config, "z")[::7]
        found = [run(model, SPECS, pairs[0], metric, **QUIET).intervened for metric in metrics]
        for metric in metrics[:3]:
            found.append(sweep(model, SPECS, pairs[0], metric, **QUIET).intervened)
            paths = all_paths(model.config, ("logits",), direct=True)[::5]
            found.append(patch(model, [*heads, *paths], *pairs, metric, **QUIET).intervened)
            found.append(atp(model, heads, *pairs, metric, **QUIET))
            found.append(edge_attribution(model, *pairs, metric, **QUIET).matrix)
            found.append(run_circuits(model, [Circuit(frozenset())], *pairs, metric, **QUIET).circuits)
        return found

    expected = numbers(random_model("gemma2"))
    with PretendedDevices():
        found = numbers(spread(random_model("gemma2")))
    for ours, known in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, known, **CLOSE)


def test_a_store_knows_a_metric_by_the_name_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama3_1")
    named = Metric(months, name="months", ids=None)
    for unnamed in (months, lambda logits, prompts: months(logits, prompts), Metric(months)):
        for refused in (
            partial(sweep, model, SPECS, PROMPTS, unnamed),
            partial(patch, model, all_patches(model.config, "z")[:1], BASE, SOURCE, unnamed),
        ):
            model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
            with pytest.raises(ValueError, match=r'has no name by which a store.*give Metric\(function, name="..."\)'):
                refused(store=tmp_path / "s", **QUIET)
            model._forward_pre_hooks.clear()
    first = sweep(model, SPECS, PROMPTS, named, store=tmp_path / "s", **QUIET)
    monkeypatch.setattr(Executor, "run", lambda *_: pytest.fail("the model ran"))  # a hook would belong to the model
    again = sweep(model, SPECS, PROMPTS, Metric(lambda *of: months(*of), name="months"), store=tmp_path / "s", **QUIET)
    np.testing.assert_array_equal(again.intervened, first.intervened)
    for other, difference in (
        (Metric(months, name="days"), r'metric \("months" there, "days" now\)'),
        (Metric(lambda x, _: x.sum(-1), name="months", ids=MONTHS), "metric reads"),
        ("logit", r'metric \("months" there, "logit" now\)'),
    ):
        with pytest.raises(ValueError, match=f"differs in .*{difference}"):
            sweep(model, SPECS, PROMPTS, other, store=tmp_path / "s", **QUIET)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_function_may_return_numbers_of_any_kind(dtype: torch.dtype) -> None:
    for engine in (run, sweep):
        found = engine(model_of("gpt2"), HEAD, PROMPTS, lambda x, _: (x[:, 5] > 0).to(dtype), **QUIET)
        assert found.intervened.dtype == np.float32 and set(found.intervened.ravel()) <= {0, 1}


def _nan_for_prompt_4(logits: Tensor, prompts: Batch) -> Tensor:
    return logits[:, 0].where(torch.tensor(prompts.index) != 4, torch.nan)


@pytest.mark.parametrize("engine", [run, sweep])
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda x, _: x,
            rf"metric '<lambda>' returned shape \(\d, {VOCAB}\) for \d prompts; return one number per prompt",
        ),
        (lambda x, _: x[:, 0].mean(), r"returned shape \(\) for \d prompts; return one number per prompt, \[batch\]"),
        (Metric(lambda x, _: x[:, 0].tolist(), name="f"), "metric 'f' returned a list for . prompts"),
        (Metric(lambda x, _: x[:, 0], per_token=True), r"one number per token, \[batch pos\] = "),
        (_nan_for_prompt_4, "metric '_nan_for_prompt_4' is nan for prompt 4; it must return finite numbers"),
        (lambda x, _: x[:, 0] / 0, "is -?inf for prompt"),
        (lambda x, _: x[:, 0] * 1j, "metric '<lambda>' returned complex numbers; return real ones"),
        (
            lambda x, _: x[:, -1, 5],
            rf"'<lambda>' indexes logits that are not there \(.*\): they are \(\d, {VOCAB}\), \[batch vocab\] at each "
            r"prompt's last token; Metric\(\.\.\., of_tokens=True\) is given those at every token\.$",
        ),
        (Metric(lambda x, _: x[:, 9], ids=[5]), r"at each prompt's last token, with columns for `ids` only"),
        (Metric(lambda x, _: x[..., 10**6], of_tokens=True), r"\[batch pos vocab\] at every token\.$"),
        (lambda *of: px.metrics.kl(*of), r'ask for them by Metric\(..., needs=\("clean",\)\)'),
    ],
)
def test_wrong_results_get_one_sentence(engine: Any, metric: Any, message: str) -> None:
    prompts = random_prompts((6,) * 5) if isinstance(metric, Metric) and metric.per_token else PROMPTS
    with pytest.raises(ValueError, match=message):
        engine(model_of("gpt2"), HEAD, prompts, metric, **QUIET)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("logit_dif", "unknown metric 'logit_dif'; did you mean 'logit_diff'[?]"),
        ("loss of nothing", "unknown metric 'loss of nothing'; choose among logit_diff, probability"),
        (5, r"a metric is a function \(logits, prompts\), one of the names logit_diff, .*, or a Metric, not 5"),
        (lambda logits: logits, r"metric '<lambda>' must take two arguments, \(logits, prompts\)"),
        (lambda logits, prompts, more: logits, "and no others without a default"),
    ],
)
def test_what_is_no_metric_is_refused_before_the_model_runs(metric: Any, message: str) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for takes in (run, sweep, plan_sweep, estimate, partial(frequencies, tau=0.1, width=0.2)):
        with pytest.raises(ValueError, match=message):
            takes(model, HEAD, PROMPTS, metric=metric)
    for takes in (patch, atp, atp_star):
        with pytest.raises(ValueError, match=message):
            takes(model, all_patches(model.config, "z"), BASE, SOURCE, metric)
    with pytest.raises(ValueError, match=message):
        edge_attribution(model, BASE, SOURCE, metric)
    with pytest.raises(ValueError, match=message):
        run_circuits(model, [Circuit(frozenset())], BASE, SOURCE, metric)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": []}, r'ids of metric .months. must be one or more token ids, or "answers", not \[\]'),
        ({"ids": [3, -1]}, "must be one or more token ids"),
        ({"ids": [0.5]}, "must be one or more token ids"),
        ({"ids": "answer"}, "must be one or more token ids"),
        ({"needs": ("wright",)}, r"metric 'months' cannot need 'wright'; needs is a tuple of right, wrong, clean"),
        ({"needs": "right"}, "cannot need 'r'"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metric(months, **fields)


def test_the_names_of_built_in_metrics_are_taken() -> None:
    with pytest.raises(ValueError, match="kl is the name of a metric of this package; give yours another one"):
        as_metric(Metric(months, name="kl"))
    assert as_metric(px.metrics.logit_diff) is METRICS["logit_diff"]
    assert as_metric(Metric(px.metrics.logit_diff)).ids is None
    assert px.Metric is Metric and all(getattr(px.metrics, name) is METRICS[name].function for name in METRICS)


@pytest.mark.parametrize("engine", [run, sweep, plan_sweep, estimate])
def test_answers_and_ids_that_a_metric_cannot_read_are_named_before_the_model_runs(engine: Any) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for prompt, answers, metric, message in (
        (
            3,
            AnswerTokens(((5,),), ()),
            "logit_diff",
            "prompt 3 has no wrong answer, which logit_diff needs; give it one",
        ),
        (1, AnswerTokens((), ((5,),)), "probability", "prompt 1 has no right answer, which probability needs"),
        (
            0,
            AnswerTokens(((VOCAB,),), ((5,),)),
            "logit",
            f"answers of prompt 0 have ids from 5 to {VOCAB} but the vocabulary",
        ),
        (
            2,
            AnswerTokens(((5, 6),), ((4,), (5, 7))),
            "logit_diff",
            r"answers of prompt 2 begin with the same token \(id 5\)",
        ),
        (
            2,
            AnswerTokens(((5, 6),), ((5, 7),)),
            "probability",
            r"answers of prompt 2 begin with the same token \(id 5\)",
        ),
    ):
        changed = list(PROMPTS.answers)
        changed[prompt] = answers
        with pytest.raises(ValueError, match=message):
            engine(model, HEAD, replace(PROMPTS, answers=tuple(changed)), metric)
    with pytest.raises(ValueError, match=f"metric 'months' reads the id {VOCAB} but the vocabulary has {VOCAB} tokens"):
        engine(model, HEAD, PROMPTS, Metric(months, ids=[3, VOCAB]))


def test_a_metric_that_needs_no_answers_takes_prompts_without_any() -> None:
    none = replace(PROMPTS, answers=())
    for engine in (run, sweep):
        expected = engine(model_of("gemma2"), HEAD, PROMPTS, months, **QUIET)
        np.testing.assert_array_equal(engine(model_of("gemma2"), HEAD, none, months, **QUIET).delta, expected.delta)


def test_attribution_refuses_what_has_no_gradient() -> None:
    model = model_of("llama3_1")
    for metric, message in (
        (
            "rank",
            "the gradient of 'rank' is 0 or undefined everywhere: choose among logit_diff, probability, logit, or",
        ),
        (px.metrics.accuracy, "the gradient of 'accuracy' is 0"),
        (Metric(months, differentiable=False), "the gradient of 'months' is 0"),
        ("kl", "kl to the base run has no first-order term there"),
        (lambda x, _: x.argmax(-1), "metric '<lambda>' has no gradient.*use sweep, or a differentiable function"),
        (lambda x, _: x.detach()[:, 0], "has no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(model, HEAD, PROMPTS, metric, **QUIET)
        with pytest.raises(ValueError, match=message):
            atp(model, all_patches(model.config, "z"), BASE, SOURCE, metric, **QUIET)
        with pytest.raises(ValueError, match=message):
            edge_attribution(model, BASE, SOURCE, metric, **QUIET)


@pytest.mark.parametrize(
    "metric",
    [
        Metric(lambda logits, _: logits[:, 5] - logits[:, 5].mean(), "centred"),
        Metric(lambda logits, _: logits[:, 5] / len(logits), "shared"),
        Metric(lambda logits, _: logits.softmax(0)[:, 0], "wrong axis", ids=(5, 6)),
        Metric(lambda logits, _: logits.amax(-1) - logits.amax(), "of tokens", of_tokens=True),
        Metric(lambda right, wrong: right - wrong.mean(), "of answers", of_answers=True, needs=("right", "wrong")),
    ],
    ids=lambda metric: metric.label,
)
def test_a_metric_that_mixes_the_prompts_of_a_batch_is_refused_before_the_model_runs(metric: Metric) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    for engine in (run, sweep, plan_sweep):
        with pytest.raises(ValueError, match=f"^metric '{metric.name}' gives a prompt another number beside a second"):
            engine(model, HEAD, PROMPTS, metric)
    plan_sweep(model, HEAD, PROMPTS.take([0]), metric)  # one prompt has nothing to be mixed with


def test_a_baseline_of_another_run_is_refused() -> None:
    model = model_of("llama3_1")
    own = run(model, HEAD, PROMPTS, **QUIET).baseline
    np.testing.assert_array_equal(run(model, HEAD, PROMPTS, baseline=own, **QUIET).baseline, own)
    other = run(model, HEAD, random_prompts((9, 6, 7, 9, 6), seed=3), **QUIET).baseline
    for baseline in (other, own[::-1].copy(), own + np.array([0, 0, 0, 0, 1], np.float32)):
        with pytest.raises(
            ValueError, match=r"^baseline is of another run: prompt [04] has logit_diff .* and not .*; give"
        ):
            run(model, HEAD, PROMPTS, baseline=baseline, **QUIET)
    with pytest.raises(ValueError, match="has probability"):
        run(model, HEAD, PROMPTS, "probability", baseline=own, **QUIET)
