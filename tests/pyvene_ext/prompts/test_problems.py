"""Problems from files and the hub, answers out of text, and questions as tokens with blocks of reasoning."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts import problems as module
from pyvene_ext.prompts.problems import (
    Problem,
    Questions,
    load_problems,
    number_at,
    numbers_in,
    prompt_budget,
    solved_before,
    tiny_problems,
    tokenize_problems,
    tokens_until,
    with_reasoning,
)
from pyvene_ext.prompts.tokenized import TokenizedPrompts

SOLUTION = "Lisa has 7+5=<<7+5=12>>12 apples.\nSo 1,212-3=$<<1212-3=1,209>>1,209.\n#### 1,209"
STORY = "Lisa has 7 apples. David gives Lisa 5 apples. How many apples does Lisa have?"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("tiny-qwen2.5")[1]


def problem(question: str = STORY, answer: float = 12) -> Problem:
    return Problem(question=question, solution=f"#### {answer}", answer=answer, steps=1)


# -- solved examples and chats -------------------------------------------------------------------------------------------


def test_solved_examples_stand_before_the_question_that_is_never_one_of_them(tokenizer: Any) -> None:
    others = [
        Problem(
            question=STORY.replace("5", str(n)), solution=f"<<7+{n}={7 + n}>> #### {7 + n}\n", answer=7 + n, steps=1
        )
        for n in (3, 5, 9)
    ]
    questions = tokenize_problems([problem(), others[2]], tokenizer, examples=others, shots=2)
    for ids, shown, asked in zip(
        questions.prompts.input_ids, ((0, 2), (0, 1)), (STORY, others[2].question), strict=True
    ):
        before = [f"Question: {others[n].question}\nAnswer: {others[n].solution.strip()}\n\n" for n in shown]
        assert list(ids) == tokenizer("".join(before) + f"Question: {asked}\nAnswer:")["input_ids"]
    assert questions.lengths == tuple(map(len, questions.prompts.input_ids))
    assert questions.given(0) == ()
    none = tokenize_problems([problem()], tokenizer, examples=others)
    assert none.prompts.input_ids == tokenize_problems([problem()], tokenizer).prompts.input_ids
    with pytest.raises(ValueError, match="problem 0 needs 3 solved examples but there are only 2 besides itself"):
        tokenize_problems([problem()], tokenizer, examples=others, shots=3)
    with pytest.raises(ValueError, match="ask for fewer solved examples"):
        tokenize_problems([problem()], tokenizer, context=60, examples=others, shots=2)


def test_dicts_are_problems_and_what_is_none_is_refused(tokenizer: Any) -> None:
    row, other = (
        {"question": text, "answer": "7+5=<<7+5=12>>12\n#### 12"} for text in (STORY, STORY.replace("7", "8"))
    )
    questions = tokenize_problems([row, problem()], tokenizer, examples=[other], shots=1)
    made = Problem(question=other["question"], solution=other["answer"], answer=12, steps=1)
    assert questions.problems == (made.model_copy(update={"question": STORY}), problem())
    same = tokenize_problems(questions.problems, tokenizer, examples=[made], shots=1)
    assert questions.prompts.input_ids == same.prompts.input_ids
    texts: Any
    for texts, message in (
        (["2+2?"], "^problem 0 is a str; give problems of load_problems, or dicts with 'question' and 'answer'"),
        ([problem(), 4], "^problem 1 is an int; give"),
        (STORY, "^give a list of problems, not a str.$"),
        (row, "^give a list of problems, not a dict.$"),
        (
            [{"question": STORY}],
            "^problem 0: a problem needs the texts 'question' and 'answer', and this one has question",
        ),
        ([{"question": STORY, "answer": "4"}], "^problem 0: the answer has no ####"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_problems(texts, tokenizer)
    examples: Any = ["2+2?"]
    with pytest.raises(ValueError, match=r"^solved example 0 is a str"):
        tokenize_problems([problem()], tokenizer, examples=examples, shots=1)


def test_a_chat_is_in_the_words_of_the_tokenizers_template(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_problems([problem()], tokenizer, chat=True)
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ' EN:' if m.role == 'user' else ' FR:' }} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} FR:{% endif %}"
    )
    other = Problem(question=STORY.replace("5", "3"), solution="<<7+3=10>> #### 10", answer=10, steps=1)
    questions = tokenize_problems([problem()], chatting, "{question}", examples=[other], shots=1, chat=True)
    text = f"<bos> EN: {other.question} FR: {other.solution} EN: {STORY} FR:"
    assert list(questions.prompts.input_ids[0]) == chatting(text, add_special_tokens=False)["input_ids"]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12 and -3, or 4.5.", [12, -3, 4.5]),
        ("80,000 and 2,500", [80000, 2500]),
        ("1,2,09.50", [1209.5]),
        ("070, 0.50, .5 and -.5", [70, 0.5, 0.5, -0.5]),
        ("3-4, 3 - 4, (3)-4, x-4, 50%-4, 3\u22124", [3, 4, 3, 4, 3, 4, 4, 50, 4, 3, 4]),
        ("pages 3\u20134", [3, 4]),
        ("= -4, (-4), \u22124, \u20134, \uff0d4, 3 * -4", [-4, -4, -4, -4, -4, 3, -4]),
        ("$5, -$5, $-5, \\$5, \u2212\u20ac5", [5, -5, -5, 5, -5]),
        ("1e3, 1.5e-3, 2E2, 1e\u22122, 1e3.", [1000, 0.0015, 200, 0.01, 1000]),
        ("1em, 3end, 2 e3", [1, 3, 2, 3]),
        ("1/2, -1/2, 3 1/2, 10/4 = 5, 1 / 4.", [0.5, -0.5, 3.5, 2.5, 5, 0.25]),
        ("\\frac{1}{2}, -\\dfrac{3}{4}", [0.5, -0.75]),
        ("\u00bd, 3\u00bd", [0.5, 3.5]),
        ("1/2/2024", [1, 2, 2024]),
        ("1.5.2", [1.5, 2]),
        ("<<7+5=12>>12", [7, 5, 12, 12]),
        ("1/0, 1e999, none" + "9" * 400, []),
        ("", []),
    ],
)
def test_the_numbers_of_a_text(text: str, numbers: list[float]) -> None:
    found = list(numbers_in(text))
    assert [number.value for number in found] == pytest.approx(numbers)
    for one in found:
        assert number_at(text, one.start) == one and number_at(text, one.end) is None and text[one.start] not in "$€ "


def test_the_characters_of_a_number_are_those_of_the_text_as_it_stands() -> None:
    text = "1,5,6 ####  $1,2,09.50 left\n3"
    found = list(numbers_in(text))[1]
    assert found.value == 1209.5 and text[found.start : found.end] == "1,2,09.50"
    assert list(numbers_in(text, found.end)) == [(3, len(text) - 1, len(text))]
    assert list(numbers_in(text, 0, 3)) == [(15, 0, 3)]


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["p.jsonl", "p.json"])
def test_problems_come_from_files_in_the_form_of_gsm8k(form: str, tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": SOLUTION}, {"question": "And now?", "answer": "#### 4.5", "id": 3}]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / form).write_text(lines if form.endswith("l") else json.dumps(rows), encoding="utf-8")
    found = load_problems(tmp_path / form)
    assert [(p.question, p.answer, p.steps) for p in found] == [("How many?", 1209, 2), ("And now?", 4.5, 0)]
    assert found[0].solution == SOLUTION
    assert load_problems(tmp_path / form, limit=1) == found[:1] and load_problems(tmp_path / form, limit=9) == found


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k"])
def test_gsm8k_is_read_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*given: Any, **more: Any) -> Any:
        asked.append((*given, more))
        return datasets.Dataset.from_list([{"question": "How many?", "answer": SOLUTION}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [p.answer for p in load_problems(name, limit=2, split="train")] == [1209, 1209]
    assert asked == [("openai/gsm8k", "main", {"split": "train"})]

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"gsm8k from the hub failed \(no route\); give a local"):
        load_problems(name)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no problems"),
        ("\n \n", "holds no problems"),
        ('{"question": "a", "answer": "12"}', "line 1: the answer has no ####"),
        (
            '{"question": "a", "answer": "#### 1"}\n{"question": "a", "answer": "5 #### none"}',
            "line 2: there is no number",
        ),
        ('{"question": "a"}', "line 1: a problem needs the texts"),
        ('{"q": "a", "a": "b"}', "line 1: a problem needs the texts 'question' and 'answer', and this one has q, a."),
        ("{}", "line 1: a problem needs the texts 'question' and 'answer', and this one has none."),
        ('{"question": " ", "answer": "#### 1"}', "line 1: a problem needs the texts"),
        ('{"question": 3, "answer": "#### 1"}', "line 1: a problem needs the texts"),
        ("[1]", "line 1: a problem needs the texts"),
        ('{"question": ', "is not one JSON object per line"),
    ],
)
def test_a_bad_file_is_one_sentence(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=told) as error:
        load_problems(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_other_bad_input(tmp_path: Path) -> None:
    (tmp_path / "object.json").write_text("{}", encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a list"):
        load_problems(tmp_path / "object.json")
    with pytest.raises(ValueError, match="UTF-8"):
        load_problems(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError, match="no file of problems"):
        load_problems(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="limit must be 1"):
        load_problems(tmp_path / "empty.json", limit=0)
    with pytest.raises(ValidationError):
        Problem(question="", solution="", answer=1, steps=0)


# -- as tokens ---------------------------------------------------------------------------------------------------------


def test_a_question_is_what_the_tiny_models_were_trained_on(tokenizer: Any) -> None:
    questions = tokenize_problems([problem(), problem(STORY.replace("7", "8"))], tokenizer)
    assert list(questions.prompts.input_ids[0]) == tokenizer(f"Question: {STORY} Answer:")["input_ids"]
    assert questions.lengths == tuple(map(len, questions.prompts.input_ids)) and questions.index == (0, 1)
    assert questions.blocks == (range(0), range(0)) and questions.given(0) == ()
    other = tokenize_problems([problem(), problem(STORY.replace("7", "8"), 13)], tokenizer)
    assert other.prompts.hash == questions.prompts.hash and other.hash != questions.hash
    assert questions.take([1]).prompts.input_ids == questions.prompts.input_ids[1:] and questions.take([1]).index == (
        1,
    )


def test_solved_examples_may_stand_before_the_question(tokenizer: Any) -> None:
    questions = tokenize_problems([problem()], tokenizer, "Lisa has 3. {question} Answer:")
    assert list(questions.prompts.input_ids[0]) == tokenizer(f"Lisa has 3. {STORY} Answer:")["input_ids"]


def test_questions_that_cannot_be_asked(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no problems"):
        tokenize_problems([], tokenizer)
    for template in ("Answer:", "{question} {question}"):
        with pytest.raises(ValueError, match="exactly once"):
            tokenize_problems([problem()], tokenizer, template)
    with pytest.raises(ValueError, match="problem 0: the tokenizer does not know 'Janet'"):
        tokenize_problems([problem("Janet has 7 apples.")], tokenizer)
    length = len(tokenize_problems([problem()], tokenizer).prompts.input_ids[0])
    assert len(tokenize_problems([problem()], tokenizer, context=length)) == 1
    with pytest.raises(ValueError, match=f"problem 0 has {length} tokens and there is room for {length - 1}"):
        tokenize_problems([problem()], tokenizer, context=length - 1)


def test_the_prompt_budget_is_what_new_tokens_leave() -> None:
    model = load_model("tiny-qwen2.5")[0]
    assert prompt_budget(model, 56) == 200
    with pytest.raises(ValueError, match="takes 256 in all"):
        prompt_budget(model, 256)
    with pytest.raises(ValueError, match="must be 1 or more"):
        prompt_budget(model, 0)


def test_reasoning_is_a_block_up_to_the_mark(tokenizer: Any) -> None:
    questions = tokenize_problems([problem(), problem("Lisa has 7 apples."), problem(), problem()], tokenizer)
    texts = ["<<7+5=12>> #### 12", "<<7+5=12>> <<12-3=9>> #### 9 #### 8", "#### 12", "<<7+5=12>>"]
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    reasoned = with_reasoning(questions, written, tokenizer)
    assert reasoned.index == (0, 1)  # the others have no reasoning, or no mark
    for which, (text, length) in enumerate([("<<7+5=12>>", 7), ("<<7+5=12>> <<12-3=9>>", 14)]):
        ids, block = reasoned.prompts.input_ids[which], reasoned.blocks[which]
        assert len(block) == length and block.start == questions.lengths[which] == reasoned.lengths[which]
        assert tokenizer.decode(ids[block.start : block.stop]) == text
        assert tokenizer.decode(ids[block.stop :]) == "####"
        places = reasoned.prompts.positions[which]
        assert ids[places["block_first"]] == tokenizer.convert_tokens_to_ids("<<")
        assert len(ids) + places["block_last"] == block.stop - 1
        assert tokenizer.decode(reasoned.given(which)) == f"{text} ####"
    # Once more with the same: what stood there is replaced.
    again = with_reasoning(reasoned, [written[0], written[0]], tokenizer)
    assert again.blocks[1] == range(questions.lengths[1], questions.lengths[1] + 7)
    with pytest.raises(ValueError, match="none of the 4 texts has reasoning"):
        with_reasoning(questions, [written[2]] * 4, tokenizer)
    with pytest.raises(ValueError, match="3 texts were given for 4 questions"):
        with_reasoning(questions, written[:3], tokenizer)


class Pieces:
    """A tokenizer whose tokens are pieces of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_a_mark_of_several_tokens_ends_the_block_before_its_first() -> None:
    pieces: Any = Pieces("12", "##", "## ", "9", " #", "###")
    assert tokens_until("####", [0, 1, 2, 3], pieces) == 3
    assert tokens_until("####", [0, 0], pieces) is None and tokens_until("####", [], pieces) is None
    assert [tokens_until(n, [0, 1, 2], pieces) for n in (1, 2, 3, 4, 7, 8)] == [1, 1, 2, 2, 3, None]
    assert module._before_mark([0, 1, 2], pieces) == 1
    assert module._before_mark([0, 3, 4, 5], pieces) == 2


def test_a_problem_begins_with_the_token_that_holds_its_first_letter() -> None:
    """Whether or not the space before it is part of that token."""
    pieces: Any = Pieces("Question:", " Is", " it?", " ", "Is", "\nAnswer:", "")
    (problem,) = tiny_problems(1, np.random.default_rng(0), held_out=True)
    problem = problem.model_copy(update={"question": "Is it?"})

    def before(*ids: int) -> list[int]:
        prompts = TokenizedPrompts((ids,))
        return solved_before(Questions((problem,), prompts, (len(ids),), (range(0),), (0,)), pieces)

    assert before(0, 1, 2, 5, 0, 1, 2, 5) == [5] and before(0, 3, 4, 2, 5) == [2]
    assert before(6, 6, 0, 1, 2) == [3] and before(4, 2) == [0] and before(0, 5) == [0]
