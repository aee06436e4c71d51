"""How problems are asked: with solved examples before them, as a chat, or bare."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from critical_heads import rank_heads, run_all

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import CHAT_TEMPLATE, STEP, load_problems
from pyvene_ext.prompts.tiny_tasks import is_held_out
from pyvene_ext.runs import ablated, plans, reasoning
from pyvene_ext.runs.flags import Problems
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model


def asked(model: Any, tokenizer: Any, **flags: Any) -> list[str]:
    """The texts of the problems."""
    given = Problems(**flags)
    questions = reasoning.ask(given, model, tokenizer, reasoning.find_problems(given), 8)
    return [tokenizer.decode(ids) for ids in questions.prompts.input_ids]


def test_solved_examples_come_from_problems_that_are_not_asked(tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny-qwen2.5")
    bare, shown, again, other = (
        asked(model, tokenizer, limit=3, shots=shots, seed=seed) for shots, seed in ((0, 0), (2, 0), (2, 0), (2, 1))
    )
    assert shown == again != other
    for text, alone in zip(shown, bare, strict=True):
        assert text.endswith(alone.removeprefix("<bos> ")) and text.count("Question:") == 3 and text.count("####") == 2
        examples = text.removeprefix("<bos> ").split("Question:")[1:3]
        assert not any(is_held_out(f"Question:{example.partition(' Answer:')[0]} Answer:") for example in examples)

    problems = reasoning.find_problems(Problems(limit=3))
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"question": p.question, "answer": p.solution}) for p in problems))
    for text, problem in zip(asked(model, tokenizer, problems=str(path), shots=2), problems, strict=True):
        assert text.count(tokenizer.decode(tokenizer(problem.question, add_special_tokens=False)["input_ids"])) == 1
        others = [p.solution for p in load_problems(path) if p.question != problem.question]
        for solution in others:
            assert tokenizer.decode(tokenizer(solution, add_special_tokens=False)["input_ids"]) in text
    assert len(asked(model, tokenizer, limit=1, shots=2, shots_from=str(path))) == 1


def test_chats_use_the_tokenizers_template() -> None:
    model, tokenizer = load_model("tiny-qwen2.5")
    tokenizer.chat_template = "{% for m in messages %}{{ 'EN: ' + m.content }}{% endfor %} FR:"
    seen: list[str] = []
    own = tokenizer.apply_chat_template

    def noting(messages: Any, **options: Any) -> Any:
        seen.append(messages[-1]["content"])
        return own(
            [{"role": "user", "content": "the red cat"}], **options
        )  # the template's own words are unknown to it

    tokenizer.apply_chat_template = noting
    asked(model, tokenizer, limit=2, chat=True)
    problems = reasoning.find_problems(Problems(limit=2))
    assert seen == [CHAT_TEMPLATE.replace("{question}", problem.question) for problem in problems]


REAL = ("smollm2-135m-instruct",)


@pytest.mark.parametrize(
    ("flags", "source", "shots", "steps", "keeps", "rule", "tokens"),
    [
        ({}, "tiny", 0, (), True, "last-of-line", 32),
        ({"models": ("x/tiny-gemma2", "tiny-qwen2.5"), "problems": "p.jsonl"}, "p.jsonl", 0, (), True, "last-of-line", 32),
        ({"models": REAL}, "plain", 3, (1,), False, "flexible-extract", 48),
        ({"models": REAL, "problems": "tiny"}, "tiny", 0, (), True, "last-of-line", 32),
        ({"models": REAL, "chat": True}, "plain", 0, (1,), False, "flexible-extract", 256),
        ({"models": REAL, "problems": "gsm8k"}, "gsm8k", 3, (), True, "flexible-extract", 256),
        ({"models": (*REAL, "tiny-gemma2"), "problem_steps": (2,), "shots": 1}, "plain", 1, (2,), False, "flexible-extract", 48),
        (
            {
                "models": REAL,
                "calculations": "keep",
                "answer_rule": "strict-match",
                "max_new_tokens": 9,
                "problem_steps": (1, 2),
                "shots": 0,
            },
            "plain", 0, (1, 2), True, "strict-match", 9,
        ),
    ],
)  # fmt: skip
def test_defaults_are_what_the_models_can_be_asked(
    flags: Any, source: str, shots: int, steps: Any, keeps: bool, rule: str, tokens: int
) -> None:
    found = Problems(**flags)
    assert (found.source, found.n_shots, found.n_steps) == (source, shots, steps)
    assert (found.keeps_calculations, found.rule, found.new_tokens) == (keeps, rule, tokens)


def test_plain_problems_are_held_out_and_their_examples_are_from_the_training_file() -> None:
    problems = reasoning.find_problems(Problems(models=REAL))
    assert len(problems) == reasoning.N_PLAIN and {problem.steps for problem in problems} == {1}
    both = reasoning.find_problems(Problems(models=REAL, problem_steps=(1, 2), limit=100))
    assert [problem.steps for problem in both] == [1, 2] * 50 and problems == both[::2][: len(problems)]
    two = reasoning.find_problems(Problems(models=REAL, problem_steps=(2,), limit=3))
    assert two == both[1:6:2] and all("<<" in problem.solution for problem in both)

    train = {p.question: p for p in load_problems(reasoning.PROMPTS / "plain_train.jsonl")}
    assert not train.keys() & {problem.question for problem in both}
    shown = reasoning.find_examples(Problems(models=REAL))
    assert len(shown) == 4 and all(p.steps == 1 and p.question in train for p in shown)
    for problem in shown:
        assert problem.solution == STEP.sub("", train[problem.question].solution) and "<<" not in problem.solution
    kept = reasoning.find_examples(Problems(models=REAL, calculations="keep"))
    assert [p.solution for p in kept] == [train[p.question].solution for p in shown]


def solved(right: int, wrong: int, unparsed: int, cut: int) -> Evaluation:
    n, answers = right + wrong + unparsed, (*[1.0] * right, *[2.0] * wrong, *[None] * unparsed)
    ended = np.arange(n) >= cut
    return Evaluation(((),) * n, ("",) * n, answers, (1.0,) * n, ended, np.full(n, np.nan), "strict-match")


@pytest.mark.parametrize(
    ("counts", "flags", "message"),
    [
        ((6, 4, 0, 0), {}, ""),
        ((1, 4, 5, 6), {}, "6 of 10 texts are cut at the limit, .*; give more than --max_new_tokens 48$"),
        ((1, 4, 5, 6), {"chat": True}, "give more than --max_new_tokens 256, or leave out --chat$"),
        (
            (2, 2, 6, 0),
            {"answer_rule": "strict-match"},
            "6 of 10 .* no answer by strict-match, .* --answer_rule flexible",
        ),
        ((2, 2, 6, 0), {"shots": 0}, "6 of 10 texts have no answer by flexible-extract, .* with --shots 3$"),
        ((4, 6, 0, 0), {"shots": 0}, "6 of 10 answers are wrong, .*; give --shots 3$"),
        ((4, 6, 0, 0), {"problem_steps": (1, 2)}, "; give --problem_steps 1$"),
        ((4, 6, 0, 0), {"problems": "gsm8k", "shots": 0}, "; give --shots 3 or --problems plain$"),
        ((4, 6, 0, 0), {}, "; take a model that solves such problems$"),
    ],
)
def test_texts_of_little_use_are_said_with_what_to_change(
    counts: Any, flags: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reasoning.warn(Problems(models=REAL, **flags), "some", solved(*counts))
    said = capsys.readouterr().err.strip()
    assert (re.match("some, untouched: ", said) and re.search(message, said)) if message else not said
    shown = reasoning.outcome("some", solved(*counts).summary())
    right, wrong, unparsed, cut = counts
    assert f"({right} correct, {wrong} wrong, {unparsed} unparsed; {cut} cut), answers by strict-match" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--problem_steps", "1"), "--problem_steps is for other problems"),
        (
            ("--problems", "plain", "--problem_steps", "3"),
            "plain has problems of 1, 2 steps, and none of those asked for",
        ),
        (("--shots", "-1"), "--shots must be 0 or more, not -1"),
        (("--shots", "40"), "--shots 40: a problem after this many solved ones is longer than the 216 tokens"),
        (
            ("--problems", "plain", "--shots", "100"),
            "--shots 100: plain has 50 solved problems, .*; give --shots 0 to 49",
        ),
        (("--shots", "1", "--shots_from", "no.jsonl"), "there is no file of problems no.jsonl"),
        (("--chat",), "no chat template"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_study(rank_heads.main, rank_heads.Config, ["--limit", "2", *flags]) == 2
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("study", run_all.STUDIES)
def test_a_dry_run_says_what_would_be_done_and_generates_and_writes_nothing(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it loads each model once."""
    module: Any = importlib.import_module(f"critical_heads.{study}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reasoning.Asked, "reason", None)
    monkeypatch.setattr(ablated, "choose", None)
    own, loaded = Problems.load, []
    monkeypatch.setattr(Problems, "load", lambda flags, name: loaded.append(name) or own(flags, name))
    models = ["tiny-qwen2.5", "tiny-llama3.1"]
    donor = ["--donor", "tiny-gemma2"] if study == "transplant_head" else []
    assert run_study(module.main, module.Config, ["--models", *models, "--dry_run", "--limit", "60", *donor]) == 0
    (said,) = capsys.readouterr().out.splitlines()
    assert re.search("60 (text|problem)s", said) and not list(tmp_path.iterdir())
    assert sorted(loaded) == sorted([*models, *donor[1:]])


@pytest.mark.parametrize("study", ["patch_hub", "force_attention", "probe_layers"])
def test_too_few_problems_are_refused_before_anything_is_run(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = importlib.import_module(f"critical_heads.{study}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Problems, "load", None)
    assert run_study(module.main, module.Config, ["--limit", "12", "--min_problems", "13"]) == 2
    message = "--min_problems 13: there are only 12 problems; give a larger --limit, or --min_problems 12 or less."
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_time_of_writing_is_that_of_the_prompt_and_of_each_new_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts forward passes' tokens: 9 a prompt, one a new token."""
    model, widths = random_model("llama3_1"), []
    own, now = type(model).forward, [0.0]

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        widths.append(tuple(kwargs["input_ids"].shape))
        now[0] += kwargs["input_ids"].numel()
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    monkeypatch.setattr(plans.time, "perf_counter", lambda: now[0])
    prompts = random_prompts((9,) * 20)
    assert plans.time_writing(model, prompts, batch_size=16).seconds(20, 5) == 20 * (9 + 4)
    assert widths == [(8, 9), *[(16, 1)] * 3, *[(1, 1)] * 2], (
        "few prompts, and new tokens of a whole batch and of one row"
    )
    same = replace(prompts, input_ids=tuple((1, 2, 3, *ids[3:-1], at) for at, ids in enumerate(prompts.input_ids)))
    assert plans.time_writing(model, same, batch_size=16).seconds(20, 5) == pytest.approx(20 * (6 + 4))
    # A step that takes as long whatever its rows are: fewer texts take as long, up to a whole batch.
    step = plans.Writing(reading=0.5, a_step=2.0, a_row=0.25, batch_size=16)
    assert [step.seconds(n, 5) for n in (1, 16, 17)] == [0.5 + 4 * 2.25, 8 + 4 * 6, 8.5 + 4 * (4 + 17 / 4)]
