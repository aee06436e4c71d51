"""Specs that stop when their cost is decided: the first outcomes of the whole run, whatever the batches; resumed; misused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvene_ext.engine.decode import rows as rows_module
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.solving import evaluate as module
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.many import ProblemRows
from pyvene_ext.methods.solving.replacing import Transcripts
from pyvene_ext.methods.solving.rounds import round_ends
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import Questions, tiny_problems, tokenize_problems
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.stats.stopping import Stopping

N = 40
RULES = [Stopping(decide=(30, 20), seed=3), Stopping(decide=(60, 40)), Stopping(width=80, seed=3), Stopping(most=7)]
SPECS: list[Any] = [
    None,
    *(Ablation(kind="zero", site="z", layer=0, heads=heads) for heads in ((3,), (2,), (1, 3))),
    Ablation(kind="resample", site="z", layer=0, heads=(0,)),
]


@cache
def solved() -> tuple[Any, Any, Questions, list[Evaluation], dict[str, Any]]:
    """A model, its tokenizer and problems, and what it writes under each spec for all of them."""
    model, tokenizer = load_model("tiny-llama3.1")
    questions = tokenize_problems(tiny_problems(N, rng(0, "problems"), held_out=True), tokenizer)
    # Of every eighth problem the right answer is another.
    problems = tuple(
        problem.model_copy(update={"answer": problem.answer + (number % 8 == 0)})
        for number, problem in enumerate(questions.problems)
    )
    questions = replace(questions, problems=problems)
    options: dict[str, Any] = {"max_new_tokens": 20, "rule": "last-of-line"}
    (clean,) = evaluate(model, tokenizer, questions, [None], **options)
    options["reference"] = Transcripts.compute(model, questions, clean, SPECS[1:])
    return model, tokenizer, questions, evaluate(model, tokenizer, questions, SPECS, "new", **options), options


def expected(whole: list[Evaluation], number: int, rule: Stopping) -> Evaluation:
    """What the first outcomes of the whole run decide."""
    order = rule.order(N)
    clean, after = whole[0].correct[order], whole[number].correct[order]
    for n in range(1, N + 1):
        if stopped := rule.judge(clean, after[:n]):
            which = sorted(order[:n].tolist())
            return replace(whole[number].take(which), index=tuple(which), stopped=stopped)
    raise AssertionError


def same(found: Evaluation, wanted: Evaluation) -> bool:
    np.testing.assert_allclose(found.confidence, wanted.confidence, rtol=1e-4)
    return json.dumps(found.as_dict() | {"confidence": 0}) == json.dumps(wanted.as_dict() | {"confidence": 0})


@pytest.mark.parametrize(
    ("together", "more"),
    [
        (True, {}),
        pytest.param(True, {"memory": 3_000_000, "batch_size": 3}, marks=pytest.mark.slow),
        pytest.param(False, {}, marks=pytest.mark.slow),
    ],
)
def test_a_spec_takes_the_first_problems_that_decide_it_whatever_the_batches(
    together: bool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, questions, whole, options = solved()
    assert whole[0].accuracy == 1 - 1 / 8, "something can be lost and won"
    if not together:
        monkeypatch.setattr(module, "runs_together", lambda *_: False)
    clean, *found = evaluate(model, tokenizer, questions, SPECS, "new", stop=[None, *RULES], **options, **more)
    assert same(clean, whole[0]) and clean.index is None and clean.stopped is None
    for number, (rule, of_spec) in enumerate(zip(RULES, found, strict=True), 1):
        assert same(of_spec, expected(whole, number, rule))
        assert same(Evaluation.from_dict(json.loads(json.dumps(of_spec.as_dict()))), of_spec)
    assert len({len(of_spec) for of_spec in found}) > 2 and min(map(len, found)) == 7


def test_an_evaluation_of_some_problems_is_compared_on_these() -> None:
    model, tokenizer, questions, whole, options = solved()
    rule = RULES[0]
    found = evaluate(model, tokenizer, questions, SPECS[1], "new", stop=rule, baseline=whole[0], **options)
    assert same(found, expected(whole, 1, rule)) and found.index is not None and found.stopped is not None
    before = found.where_taken(whole[0]).correct
    assert before.tolist() == whole[0].correct[list(found.index)].tolist() and found.where_taken(whole[0]).index is None
    assert found.stopped.drop.mean == pytest.approx(100 * (before.mean() - found.accuracy))
    everywhere = found.spread(found.correct, N)
    assert np.isnan(everywhere).sum() == N - len(found) and np.nansum(everywhere) == found.correct.sum()
    assert found.summary()["problems"] == len(found) < N


def test_problems_that_are_not_needed_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, questions, _, options = solved()
    written: list[tuple[int, int]] = []
    begin = ProblemRows.text
    monkeypatch.setattr(ProblemRows, "text", lambda *args: (written.append(args[1:]), begin(*args))[1])
    found = evaluate(model, tokenizer, questions, SPECS, "new", stop=RULES[0], **options)
    assert len(written) == len(set(written)), "no text is written twice"
    for number, of_spec in enumerate(found):
        texts = sum(spec == number for spec, _ in written)
        assert texts == (N if number == 0 else min(end for end in round_ends(N) if end >= len(of_spec)))
    assert len(written) < len(SPECS) * N
    assert list(round_ends(100)) == [16, 24, 36, 54, 81, 100] and list(round_ends(3)) == [3]


def test_an_interrupted_evaluation_that_stops_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, questions, _, options = solved()
    rules = [None, *RULES]
    whole = evaluate(model, tokenizer, questions, SPECS, "new", stop=rules, **options)
    own, steps = rows_module._Writer.step, [0]

    def interrupted(self: Any) -> None:
        steps[0] += 1
        if steps[0] == 45:  # in a later round
            raise KeyboardInterrupt
        own(self)

    options = options | {"stop": rules, "store": tmp_path / "texts", "memory": 40_000_000}
    monkeypatch.setattr(rows_module._Writer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, questions, SPECS, "new", **options)
    assert list(tmp_path.rglob("*.jsonl"))
    again = evaluate(model, tokenizer, questions, SPECS, "new", **options)
    assert all(map(same, again, whole))


def test_without_anything_to_compare_with_nothing_stops() -> None:
    model, tokenizer, questions, whole, options = solved()
    rule = RULES[0]
    for given, listed, told in (
        ({"stop": rule}, SPECS[1:], "stop compares with the untouched model: give None as one of the specs"),
        ({"stop": [rule]}, SPECS, "stop has 1 rules for 5 specs"),
        ({"stop": rule, "baseline": whole[0].take(range(3))}, SPECS, "an evaluation of these 40 problems"),
        ({"stop": rule, "baseline": expected(whole, 1, rule)}, SPECS, "all of them and in this order"),
    ):
        with pytest.raises(ValueError, match=told):
            evaluate(model, tokenizer, questions, listed, "new", **given, **options)
