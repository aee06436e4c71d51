"""Answers read from solutions: every case that was once misread, and the harness's own expressions where they are right."""

from __future__ import annotations

import re

import pytest

from pyvene_ext.methods.solving.answers import Rule, find_answer
from pyvene_ext.prompts.problems import load_problems
from pyvene_ext.prompts.shipped import PROMPTS

STEPS = "Step 1: add 3 and 4 to get 7.\nStep 5: "


def value(text: str, rule: Rule, cut: bool = False) -> float | None:
    found = find_answer(text, rule, cut)
    return None if found is None else found.value


def by_the_harness(text: str, rule: Rule) -> float | None:
    """What lm_eval/tasks/gsm8k/gsm8k.yaml 3.0 finds, as a number: its expressions, and what its metric leaves out."""
    if rule == "strict-match":
        matches = re.findall(r"#### (\-?[0-9\.\,]+)", text)[:1]
    else:
        matches = ["".join(groups) for groups in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)][-1:]
    return float(re.sub(r",|\$|\.$", "", matches[0])) if matches else None


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("<<7+5=12>> #### 12", 12, 12),
        ("#### 1,209", 1209, 1209),
        ("#### -3", -3, -3),
        ("#### \u22125", -5, -5),
        ("#### .5", 0.5, 0.5),
        ("#### 1e3", 1000, 1000),
        ("#### 1/2", 0.5, 0.5),
        ("#### 3 1/2 pies", 3.5, 3.5),
        ("#### $18.50 dollars", 18.5, 18.5),
        ("#### -$5", -5, -5),
        ("#### **7**", 7, 7),
        ("#### $\\boxed{7}$", 7, 7),
        ("####9", 9, 9),
        ("####\n9", 9, 9),
        ("#### 9\n#### 8", 9, 9),
        ("#### 9 of 12", 9, 9),
        ("#### 7 apples (2 left over)", 7, 7),
        ("#### 3-4", 3, 3),
        ("#### 9\nQuestion: Lisa has 7 apples.", 9, 9),
        ("#### Step 1: add 3 and 4\nso it is 7\n#### 7", 7, 7),
        ("#### The answer is 7.", None, 7),
        ("#### nine\n9", None, 9),
        ("12, so \\boxed{42} (I checked it 3 times)", None, 42),
        ("\\boxed{1} or \\boxed{x = \\frac{1}{2}\\text{ of 3}} or \\boxed{none}", None, 0.5),
        ("\\boxed{7", None, 7),
        ("12 - 3 = 9 apples.", None, 9),
        ("that leaves 3-4", None, 4),
        ("so 5 and then 12.", None, 12),
        ("<<7+5=12>> ####", None, None),  # what comes before the mark is reasoning, and no answer
        ("12 ####  \n", None, None),
        ("#### nine", None, None),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_answers_of_whole_texts(text: str, strict: float | None, flexible: float | None) -> None:
    assert value(text, "strict-match") == strict
    assert value(text, "flexible-extract") == flexible


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 12", None, None),  # of 125, perhaps
        ("#### 12.", None, None),
        ("#### 1,", None, None),
        ("#### 1/", None, None),
        ("#### 1e-", None, None),
        ("#### 12 apples, which", 12, 12),
        ("#### 12\n", 12, 12),
        ("#### 12. So", 12, 12),
        (STEPS, None, None),
        (STEPS + "5 + 6 = 11", None, None),
        ("#### " + STEPS, None, None),
        ("\\boxed{42} because", None, 42),
        ("\\boxed{42", None, None),
        ("#### 7\n" + STEPS, 7, 7),
    ],
)
def test_a_cut_text_has_an_answer_only_if_it_is_marked_and_goes_on(
    text: str, strict: float | None, flexible: float | None
) -> None:
    assert value(text, "strict-match", cut=True) == strict
    assert value(text, "flexible-extract", cut=True) == flexible


@pytest.mark.parametrize(
    ("text", "answer", "if_cut"),
    [
        ("<<7+5=12>> #### 12", 12, 12),
        ("#### 12=10>> #### 9", 9, 9),
        ("#### 9 of 12", 12, 12),
        ("####\n9\n8", 9, 9),
        ("#### nine\n9", None, None),
        ("<<7+5=12>>", 12, None),
    ],
)
def test_the_last_number_of_the_answers_line(text: str, answer: float | None, if_cut: float | None) -> None:
    assert value(text, "last-of-line") == answer and value(text, "last-of-line", cut=True) == if_cut


@pytest.mark.parametrize(
    "text",
    [
        "Lisa has 7+5=<<7+5=12>>12 apples.\n#### 12",
        "She pays $1,200.50 in all.\n#### 1,200.50",
        "#### -3",
        "#### 5.",
        "it is 18",
        "it is $18.00.",
        "it is -18",
        "10, 20 or 3,000",
        "nothing",
    ],
)
def test_plain_answers_are_those_of_the_harness(text: str) -> None:
    for rule in ("strict-match", "flexible-extract"):
        assert value(text, rule) == by_the_harness(text, rule)


def test_gold_answers_are_read_by_every_rule() -> None:
    for split in ("test", "train"):
        problems = load_problems(PROMPTS / f"plain_{split}.jsonl")
        for problem in problems:
            for rule in ("strict-match", "flexible-extract", "last-of-line"):
                assert (
                    value(problem.solution, rule) == problem.answer == by_the_harness(problem.solution, "strict-match")
                )
