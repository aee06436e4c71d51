"""Log-probabilities of whole answers: both engines against plain hooks on prompt and answer, one answer at a time, unpadded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import pyvene_ext as px
from pyvene_ext import ActivationPatch, Addition, ForcedAttention, Metric, PathPatch, patch, run
from pyvene_ext.engine.generate import generate
from pyvene_ext.engine.sequences import Sequences
from pyvene_ext.engine.sweep import frequencies, plan_sweep, sweep
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.prompts.tokenized import AnswerTokens, TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.joint import Spec, members
from tests.ground_truth import ablations as slow
from tests.ground_truth import forced_attention
from tests.pyvene_ext.engine import test_compile as ablations
from tests.pyvene_ext.engine.sweep.test_run import BEGINNINGS
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, FEWER, VOCAB, random_model

BOTH = ("answer_logprob", "answer_logprob_diff")
QUIET: dict[str, Any] = {"progress": False}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# One token each; begun alike, one in another's beginning, on both sides; longer and shorter than the other; several of both.
ANSWERS = (
    AnswerTokens(((5,),), ((6,),)),
    AnswerTokens(((5, 7, 8), (5, 9)), ((6,), (5, 7, 3), (10, 11))),
    AnswerTokens(((20, 21),), ((22,),)),
    AnswerTokens(((5, 7, 8),), ((6, 4),)),
    AnswerTokens(((5,),), ((9, 3, 4, 6),)),
    AnswerTokens(((1, 2), (3, 4), (5, 6)), ((2, 1),)),
)
PROMPTS = replace(ablations.PROMPTS, answers=ANSWERS)  # two of every length
Changes = Sequence[tuple[str, int | None, slow.Change]]


@cache
def model_of(family: str) -> Any:
    return random_model(family)


def in_prompt(changes: Changes, length: int) -> Changes:
    """Changes of a prompt's activations, in a sequence that begins with the prompt."""

    def of_first(change: slow.Change) -> slow.Change:
        return lambda x, *more: torch.cat([change(x[:length], *(other[:length] for other in more)), x[length:]])

    return [(site, layer, of_first(change)) for site, layer, change in changes]


def log_probability(logits_of: Any, ids: tuple[int, ...], answers: Sequence[tuple[int, ...]]) -> float:
    """Summed over each answer's tokens, and the log of the summed probability of the answers."""
    total = 0.0
    for answer in answers:
        logits = logits_of(ids + answer[:-1])
        shares = [logits[len(ids) - 1 + at].double().softmax(-1)[token] for at, token in enumerate(answer)]
        total += float(torch.stack(shares).prod())
    return float(np.log(total))


def by_hand(metric: str, logits_of: Any, ids: tuple[int, ...], answers: AnswerTokens) -> float:
    right, wrong = (log_probability(logits_of, ids, some) for some in answers)
    return right - wrong if metric == "answer_logprob_diff" else right


def by_hooks(family: str, metric: str, changes_of: Any, prompts: TokenizedPrompts = PROMPTS) -> np.ndarray:
    """The metric of every prompt under its changes."""
    found = []
    for prompt, ids in enumerate(prompts.input_ids):
        changes = in_prompt(changes_of(prompt), len(ids))
        logits_of = lambda sequence, changes=changes: slow.logits(model_of(family), sequence, changes)  # noqa: E731
        found.append(by_hand(metric, logits_of, ids, prompts.answers[prompt]))
    return np.array(found)


def engines_give(
    family: str, metric: str, specs: Sequence[Spec], expected: np.ndarray, prompts: TokenizedPrompts = PROMPTS
) -> None:
    model, clean = model_of(family), by_hooks(family, metric, lambda _: [], prompts)
    for engine, options in (
        (run, {"batch_size": 4}),
        (run, {"batch_size": 5, "padding_side": "right"}),
        (sweep, {}),
        (sweep, {"memory": 400_000}),
    ):
        found = engine(model, specs, prompts, metric, **options, **QUIET)
        assert found.metric == metric
        np.testing.assert_allclose(found.baseline, clean, **CLOSE)
        for name, got, wanted in zip(found.names, found.intervened, expected, strict=True):
            np.testing.assert_allclose(got, wanted, **CLOSE, err_msg=f"{name}, {engine.__name__} {options}")


@pytest.mark.parametrize("family", FEWER)
def test_every_ablation_edits_the_prompt_alone_and_the_answers_read_it(family: str) -> None:
    metric = "answer_logprob_diff"
    # Every kind, at every site and choice of positions, on each family others.
    specs = [*ablations._specs(), *ablations.kv_specs(family)][FAMILIES.index(family) :: 17]
    expected = [
        by_hooks(
            family, metric, lambda i, spec=spec: [ablations._change(family, "unequal", a, i) for a in members(spec)]
        )
        for spec in specs
    ]
    engines_give(family, metric, specs, np.array(expected))
    clean = by_hooks(family, metric, lambda _: [])
    assert (np.abs(np.array(expected) - clean).max(1) > 1e-3).mean() > 0.9  # and not because nothing is changed


@pytest.mark.parametrize("family", FEWER)
def test_additions_and_joint_edits_at_the_prompts_last_token(family: str) -> None:
    width = model_of(family).config.hidden_size
    vector = torch.linspace(-1, 1, width)
    last = Addition(site="resid_post", layer=1, positions="last", vector=vector)
    everywhere = Addition(site="resid_pre", layer=2, vector=vector, scale=0.3)
    zero = Ablation(kind="zero", site="z", layer=2, heads=(1,))

    def changes(prompt: int) -> list[list[tuple]]:
        tokens = range(len(PROMPTS.input_ids[prompt]))
        one = ("resid_post", 1, slow.replaced(tokens[-1:], None, lambda x: x + vector))
        two = ("resid_pre", 2, slow.replaced(tokens, None, lambda x: x + 0.3 * vector))
        three = ("z", 2, slow.replaced(tokens, (1,), torch.zeros_like))
        return [[one], [two], [one, three], [two, three]]

    specs: list[Spec] = [last, everywhere, (last, zero), (everywhere, zero)]
    expected = [by_hooks(family, BOTH[1], lambda i, n=number: changes(i)[n]) for number in range(len(specs))]
    engines_give(family, BOTH[1], specs, np.array(expected))


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("hard", [False, True])
def test_forced_attention_ends_with_the_prompt(family: str, hard: bool) -> None:
    eager = random_model(family, attn_implementation="eager")
    specs, forced = [], []
    for shape, hub in (("hub", 1), ("uniform", None), ("sequential", None)):
        specs.append(ForcedAttention(shape=shape, layer=1, heads=(0, 2), block=(1, -1), hub=hub, hard=hard))
        forced.append((shape, hub))
    expected = np.empty((len(specs), len(PROMPTS)))
    for number, (shape, hub) in enumerate(forced):
        for prompt, ids in enumerate(PROMPTS.input_ids):
            edit = forced_attention.Forced(1, (0, 2), shape, 1, len(ids) - 1, hub, hard)
            logits_of = lambda sequence, edit=edit: forced_attention.logits(eager, sequence, [edit])[0]  # noqa: E731
            expected[number, prompt] = by_hand(BOTH[1], logits_of, ids, ANSWERS[prompt])
    engines_give(family, BOTH[1], specs, expected)


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("metric", first_only(BOTH))
def test_patches_come_from_the_source_prompt_on_either_engine(family: str, metric: str) -> None:
    source = replace(random_prompts((9, 6, 7, 9, 6, 7), seed=8), answers=ANSWERS)
    model, specs, expected = model_of(family), [], []
    for site, layer, heads in (
        ("z", 1, (0, 3)),
        ("k", 2, (0,)),
        ("v", 0, (0,)),
        ("mlp_out", 2, None),
        ("embed", None, None),
    ):
        for positions, at in (("all", slice(None)), ("last", slice(-1, None)), (("s2", 0), [-2, 0])):
            specs.append(ActivationPatch(site=site, layer=layer, heads=heads, positions=positions))

            def changes(prompt: int, site: Any = site, layer: Any = layer, heads: Any = heads, at: Any = at) -> Changes:
                new = slow.activation(model, source.input_ids[prompt], site, layer)
                tokens = np.arange(len(new))[at].tolist()
                return [(site, layer, slow.replaced(tokens, heads, lambda x: new))]

            expected.append(by_hooks(family, metric, changes))
    for engine in ("plain", "sweep"):
        found = patch(model, specs, PROMPTS, source, metric, engine=engine, **QUIET)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.source, by_hooks(family, metric, lambda _: [], source), **CLOSE)
        for spec, got, wanted in zip(specs, found.intervened, expected, strict=True):
            np.testing.assert_allclose(got, wanted, **CLOSE, err_msg=f"{spec.name}, {engine}")


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize("metric", first_only(BOTH))
def test_prompts_and_answers_that_begin_alike_are_run_once_with_the_same_numbers(family: str, metric: str) -> None:
    answers = (
        *ANSWERS[1:5],
        ANSWERS[0],
        AnswerTokens(((7, 8, 9, 3, 4), (7, 8, 9, 4, 4)), ((7, 8, 9, 3, 5), (7, 8, 8, 3, 5))),
    )
    prompts = replace(BEGINNINGS, answers=answers)
    specs = [*ablations._specs()[1::5], *ablations.kv_specs(family)[::6]]
    specs = [spec for spec in specs if "per_position" not in repr(spec)]
    slow_run = run(model_of(family), specs, prompts, metric, **QUIET)
    for memory in (None, 600_000):
        fast = sweep(model_of(family), specs, prompts, metric, memory=memory, **QUIET)
        np.testing.assert_allclose(fast.intervened, slow_run.intervened, **CLOSE)


@pytest.mark.parametrize("family", FEWER)
def test_the_log_probability_is_that_with_which_generate_writes_the_answer(family: str) -> None:
    model = model_of(family)
    spec = (
        Ablation(kind="mean", site="mlp_out", layer=0),
        Ablation(kind="zero", site="z", layer=2, heads=(0, 1), positions="last"),
    )
    scores: list[Tensor] = []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
            scores.append(logits[0].log_softmax(-1))
            return logits

    options: dict[str, Any] = {"max_new_tokens": 4, "use_cache": False, "eos_token_id": None, "batch_size": 1}
    written = generate(
        model, spec, PROMPTS, scope="prompt", logits_processor=LogitsProcessorList([Recorder()]), **options
    )
    assert len(scores) == 4 * len(PROMPTS) and max(map(len, written)) == 4
    assert written != generate(model, None, PROMPTS, **options)
    order = sorted(range(len(PROMPTS)), key=lambda prompt: len(PROMPTS.input_ids[prompt]))
    expected = np.empty(len(PROMPTS))
    for place, prompt in enumerate(order):
        steps = scores[4 * place : 4 * place + 4]
        expected[prompt] = sum(float(step[token]) for step, token in zip(steps, written[prompt], strict=False))
    prompts = replace(PROMPTS, answers=tuple(AnswerTokens((tuple(tokens),)) for tokens in written))
    for engine in (run, sweep):
        np.testing.assert_allclose(
            engine(model, [spec], prompts, "answer_logprob", **QUIET).intervened[0], expected, **CLOSE
        )


@pytest.mark.parametrize("family", FEWER)
def test_an_answer_of_one_token_is_read_at_the_last_token_and_costs_no_more(family: str) -> None:
    model, specs = model_of(family), all_heads(model_of(family).config)[::4]
    several = tuple(AnswerTokens(((5,), (7,)), ((i + 8,),)) for i in range(len(PROMPTS)))
    for answers in (ablations.PROMPTS.answers, several):
        prompts = replace(PROMPTS, answers=answers)
        log_odds = sweep(model, specs, prompts, "logit_diff", **QUIET)
        for engine in (run, sweep):
            difference = engine(model, specs, prompts, "answer_logprob_diff", **QUIET)
            np.testing.assert_allclose(difference.intervened, log_odds.intervened, **CLOSE)
            found = engine(model, specs, prompts, "answer_logprob", **QUIET)
            probability = engine(model, specs, prompts, "probability", **QUIET)
            np.testing.assert_allclose(np.exp(found.intervened), probability.intervened, **CLOSE)
        costs = {plan_sweep(model, specs, prompts, metric).token_layers for metric in ("logit_diff", *BOTH)}
        assert len(costs) == 1


def test_an_answer_is_read_in_the_longest_sequence_that_begins_with_it() -> None:
    ids = ((1, 2, 3), (4, 5))
    answers = (
        AnswerTokens(((7, 8, 9), (7, 8), (6,)), ((7, 9, 9), (7, 9, 3), (8,))),
        AnswerTokens(((3,),), ((2,), (3, 3))),
    )
    prompts = TokenizedPrompts(ids, answers)
    found = Sequences.of_answers(prompts, wrong=True)
    assert found.prompts.input_ids == ((1, 2, 3, 7, 8), (1, 2, 3, 7, 9), (4, 5, 3))
    assert found.prompt_of == (0, 0, 1) and found.first_read == (2, 2, 1) and found.of_prompt == [[0, 1], [2]]
    assert found.prompts.answers == (
        AnswerTokens(((7, 8, 9), (7, 8), (6,)), ((8,),)),
        AnswerTokens((), ((7, 9, 9), (7, 9, 3))),
        AnswerTokens(((3,),), ((2,), (3, 3))),
    )
    right = Sequences.of_answers(prompts, wrong=False)
    assert right.prompts.input_ids == ((1, 2, 3, 7, 8), (4, 5)) and right.prompts.answers[1] == AnswerTokens(((3,),))


def test_some_prompts_a_given_clean_run_stores_and_early_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, specs = model_of("llama3_1"), all_heads(model_of("llama3_1").config)[::3]
    whole = sweep(model, specs, PROMPTS, BOTH[1], store=tmp_path / "s", **QUIET)
    some = sweep(model, specs, PROMPTS, BOTH[1], subset=[4, 1], **QUIET)
    np.testing.assert_allclose(some.intervened, whole.intervened[:, [4, 1]], **CLOSE)
    np.testing.assert_allclose(some.baseline, whole.baseline[[4, 1]], **CLOSE)
    given = whole.baseline + np.float32(1e-3)
    again = run(model, specs, PROMPTS, BOTH[1], baseline=given, **QUIET)
    np.testing.assert_array_equal(again.baseline, given)
    np.testing.assert_allclose(again.intervened, whole.intervened, **CLOSE)
    active = frequencies(model, specs, PROMPTS, 0.1, width=0.01, block=2, metric=BOTH[1], **QUIET)
    np.testing.assert_array_equal(active.frequency, (np.abs(whole.delta) > 0.1).mean(1))
    monkeypatch.setattr(Executor, "run", lambda *_: pytest.fail("run again"))
    kept = sweep(model, specs, PROMPTS, BOTH[1], store=tmp_path / "s", **QUIET)
    np.testing.assert_array_equal(kept.intervened, whole.intervened)
    other = replace(PROMPTS, answers=(*ANSWERS[:5], ANSWERS[4]))
    for metric, prompts in ((BOTH[0], PROMPTS), (BOTH[1], other)):
        with pytest.raises(ValueError, match=r"differs in .*(metric|prompts)"):
            sweep(model, specs, prompts, metric, store=tmp_path / "s", **QUIET)


@pytest.mark.parametrize("engine", [run, sweep])
def test_a_function_of_ones_own_takes_both_log_probabilities(engine: Any) -> None:
    model, spec = model_of("gpt2"), Ablation(kind="zero", site="mlp_out", layer=1)
    odds = Metric(lambda right, wrong: right - torch.logaddexp(right, wrong), of_answers=True, needs=("right", "wrong"))
    expected = engine(model, spec, PROMPTS, BOTH[1], **QUIET).intervened.astype(float)
    found = engine(model, spec, PROMPTS, odds, **QUIET)
    np.testing.assert_allclose(found.intervened, -np.log1p(np.exp(-expected)), **CLOSE)
    named = engine(model, spec, PROMPTS, px.metrics.answer_logprob_diff, **QUIET)
    assert named.metric == BOTH[1] and np.array_equal(named.intervened, expected.astype(np.float32))
    for wrong in (lambda right, wrong: right.sum(), lambda right, wrong: right * torch.nan, lambda *_: 0.0):
        with pytest.raises(ValueError, match="metric '<lambda>' must return one finite number for each it is given"):
            engine(model, spec, PROMPTS, Metric(wrong, of_answers=True, needs=("right",)), **QUIET)


@pytest.mark.parametrize(
    ("metric", "answers", "message"),
    [
        (BOTH[0], AnswerTokens((), ((5,),)), "prompt 1 has no right answer, which answer_logprob needs"),
        (BOTH[1], AnswerTokens(((5,),)), "prompt 1 has no wrong answer, which answer_logprob_diff needs"),
        (BOTH[1], AnswerTokens(((5, 6), (4,)), ((5, 6),)), "the answers of prompt 1 are right and wrong at once"),
        (
            BOTH[0],
            AnswerTokens(((5, VOCAB),)),
            f"answers of prompt 1 have ids from 5 to {VOCAB} but the vocabulary has",
        ),
        (BOTH[0], AnswerTokens(((5,) * 60,)), "prompt 1 has 65 tokens with its longest answer but the model takes 64"),
    ],
)
def test_answers_that_cannot_be_read_are_refused_before_the_model_runs(
    metric: str, answers: AnswerTokens, message: str
) -> None:
    model, spec = random_model("gpt2"), Ablation(kind="zero", site="mlp_out", layer=1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    prompts = replace(PROMPTS, answers=(ANSWERS[0], answers, *ANSWERS[2:]))
    for takes in (run, sweep, plan_sweep):
        with pytest.raises(ValueError, match=message):
            takes(model, spec, prompts, metric)


def test_what_reads_the_last_token_only_refuses_whole_answers() -> None:
    model = model_of("gpt2")
    source = replace(random_prompts((9, 6, 7, 9, 6, 7), seed=8), answers=ANSWERS)
    with pytest.raises(
        ValueError, match="answer_logprob reads whole answers; here choose among logit_diff, probability"
    ):
        estimate(model, Ablation(kind="zero", site="mlp_out", layer=1), PROMPTS, "answer_logprob")
    with pytest.raises(ValueError, match="answer_logprob reads whole answers; here choose among"):
        patch(model, PathPatch(sender="z.0.0", receivers=("logits",)), PROMPTS, source, "answer_logprob")


def test_a_metric_of_first_tokens_says_once_of_how_many_prompts_answers_are_longer() -> None:
    model, spec = model_of("gpt2"), Ablation(kind="zero", site="mlp_out", layer=1)
    prompts = replace(PROMPTS, answers=(ANSWERS[0], ANSWERS[2], ANSWERS[4], *(ANSWERS[0],) * 3))
    source = replace(random_prompts(list(map(len, prompts.input_ids)), seed=3), answers=prompts.answers)
    said = "logit_diff reads first tokens only: the answers of 2 of 6 prompts have several"
    hint = "; metric='answer_logprob_diff' reads them whole"
    moved = ActivationPatch(site="mlp_out", layer=1, positions="last")
    path = PathPatch(sender="mlp_out.0", receivers=("mlp_in.2",), positions="last")
    for call, more in (
        (lambda: run(model, spec, prompts, **QUIET), hint),
        (lambda: sweep(model, spec, prompts, **QUIET), hint),
        (lambda: frequencies(model, spec, prompts, tau=0.1, width=0.2, block=2, **QUIET).result, hint),
        (lambda: patch(model, moved, prompts, source, **QUIET), hint),
        (lambda: patch(model, path, prompts, source, **QUIET), "; answers='first_difference' tells them apart"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = call()
        assert [str(one.message) for one in caught] == [f"{said}{more}."]
        assert f"{said}{more}\n" in repr(result)
    with pytest.warns(
        UserWarning, match="probability reads first tokens only: the answers of 1 of 6 prompts .*'answer_logprob'"
    ):
        run(model, spec, prompts, "probability", **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric, some in (("answer_logprob", prompts), ("kl", prompts), ("logit_diff", ablations.PROMPTS)):
            assert "first tokens" not in repr(run(model, spec, some, metric, **QUIET))
