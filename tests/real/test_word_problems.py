"""Word problems in plain English on real weights: solutions against `generate`, and forced attention against hooks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pyvene_ext.methods.solving.answers import find_answer
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.runs import reasoning
from pyvene_ext.runs.flags import Problems
from pyvene_ext.specs.forced_attention import force
from tests.ground_truth import forced_attention as slow
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")
N, NEW = 3, 32


@cache
def prompts(name: str) -> list[str]:
    """One-step problems behind three solved ones, without the package's help but for the problems themselves."""
    flags = Problems(models=(name,), limit=N)
    shown = "".join(f"Question: {p.question}\nAnswer: {p.solution}\n\n" for p in reasoning.find_examples(flags)[:3])
    assert shown.count("####") == 3 and "<<" not in shown
    return [f"{shown}Question: {p.question}\nAnswer:" for p in reasoning.find_problems(flags)]


def untouched(real: Real) -> tuple[Any, Any]:
    flags = Problems(models=(real.folder,), limit=N)
    questions = reasoning.ask(flags, real.model, real.tokenizer, reasoning.find_problems(flags), NEW)
    return questions, evaluate(real.model, real.tokenizer, questions, max_new_tokens=NEW, read_once=True)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_solutions_are_those_of_generate(name: str, request: pytest.FixtureRequest) -> None:
    real: Real = request.getfixturevalue(name)
    questions, found = untouched(real)
    for text, ids, written in zip(prompts(real.folder), questions.prompts.input_ids, found.ids, strict=True):
        inputs = real.tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == list(ids)
        out = real.model.generate(**inputs, max_new_tokens=len(written), do_sample=False)[0, len(ids) :].tolist()
        assert out == list(written)
        solution = real.tokenizer.decode(out)
        assert "\n" in solution.partition("####")[2] or len(written) == NEW
    answers = [find_answer(text) for text in found.texts]
    assert found.answers == tuple(None if answer is None else answer.value for answer in answers)
    assert found.ended.all() and found.parsed.all() and max(map(len, found.ids)) < NEW
    if name == "smollm2":
        assert found.accuracy > 0.6


def test_reasoning_written_with_forced_attention_is_that_of_hooks(smollm2: Real, tmp_path: Path) -> None:
    """Uniform attention in two layers, token by token; each row of the pattern made by hand."""
    questions, first = untouched(smollm2)
    layers, new = (20, 23), 6
    setting = reasoning.Setting(
        "smollm2",
        smollm2.model,
        smollm2.tokenizer,
        questions.take([0]),
        first,
        first.take([0]),
        reasoning.Results(tmp_path, {}),
        reasoning.Regeneration(models=(smollm2.folder,), max_new_tokens=new),
        anew=True,
    )
    spec = force(smollm2.model.config, shape="uniform", block=(0, -1), hard=True)
    (found,) = setting.force([reasoning.Forcing(tuple(edit for edit in spec if edit.layer in layers), [0])])

    start, out = len(questions.prompts.input_ids[0]), list(questions.prompts.input_ids[0])
    smollm2.model.set_attn_implementation("eager")
    try:
        for _ in range(new):
            last, where = len(out) - 1, layers if len(out) > start else ()
            edits = [slow.Forced(layer, range(9), "uniform", start, last, None, hard=True) for layer in where]
            out.append(int(slow.logits(smollm2.model, out, edits)[0][-1].argmax()))
    finally:
        smollm2.model.set_attn_implementation("sdpa")
    assert list(found.ids[0]) == out[start:] and found.ids[0] != setting.clean.ids[0][:new]
