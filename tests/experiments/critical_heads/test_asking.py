"""How problems are asked: with solved examples before them, as a chat, or bare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from critical_heads import rank_heads

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import CHAT_TEMPLATE, load_problems
from pyvene_ext.prompts.tiny_tasks import is_held_out
from pyvene_ext.runs import reasoning
from pyvene_ext.runs.flags import Problems


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shots", "-1"), "--shots must be 0 or more, not -1"),
        (("--shots", "40"), "ask for fewer solved examples"),
        (("--shots", "1", "--shots_from", "no.jsonl"), "there is no file of problems no.jsonl"),
        (("--chat",), "no chat template"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_study(rank_heads.main, rank_heads.Config, ["--limit", "2", *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
