r"""Reading the answer from a solution that a model wrote, by the rules of lm-evaluation-harness's GSM8K tasks.

The rules have the names that lm_eval/tasks/gsm8k/gsm8k.yaml (version 3.0) gives them:

    strict-match       the number that follows a `####`; there `#### (\-?[0-9\.\,]+)`, the first match
    flexible-extract   the last number; there `(-?[$0-9.,]{2,})|(-?[0-9]+)`, the last match

What is found is compared as a number, and not as text, so that 12.0 is 12. The rules differ from the harness's where those
misread a text:

* A number is what `problems.numbers_in` reads: with any minus sign, before or after a currency sign; `.5`, `1e3`, `1/2`,
  `3 1/2` and `\frac{1}{2}` are one number each; and a minus between two numbers is no sign (`3-4` ends with 4).
* Between `####` and its number there may be white space or none, a currency sign, `\boxed{`, brackets, a colon or asterisks.
* flexible-extract takes the number of strict-match if there is one, else that of the last `\boxed{}`, so that a remark after the
  answer does not replace it; and nothing before a `####`, which would be the reasoning.
* Of a text that was cut at the token limit only an answer that was marked as one (`####`, `\boxed{}`) counts, and only if the
  text goes on after it: a number at the end may lack digits, and the last number of half a solution is no answer.

The third rule is for models that know no remarks and whose numbers are one token each, such as the shipped tiny ones:

    last-of-line       the last number of the line that follows the first `####`; without `####`, of a text that was not cut

By it a model that goes on after the right number is not right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, get_args

from pyvene_ext.prompts.problems import MARK, FoundNumber, number_at, numbers_in

Rule = Literal["flexible-extract", "strict-match", "last-of-line"]
_AFTER_MARK = re.compile(rf"{MARK}(?:\s|[:=*~(\[$€£¥]|\\[(\[$]|\\boxed\{{)*")
_UNFINISHED = re.compile(r"[.,/eE]?[-+]?\Z")  # a number may go on after these
_BOX = r"\boxed{"


def check_rule(rule: str) -> None:
    """Refuse an unknown rule.

    Args:
        rule: its name.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(
            f"there is no rule {rule!r} by which answers are read; choose among {', '.join(get_args(Rule))}."
        )


def find_answer(text: str, rule: Rule = "flexible-extract", cut: bool = False) -> FoundNumber | None:
    """Read the answer from a text.

    Args:
        text: what a model wrote.
        rule: one of the rules above.
        cut: whether the text ended at the token limit, and not by itself.

    Returns:
        The number and its place, or None if the text gives no answer (which is not the same as a wrong answer).
    """
    if rule == "last-of-line":
        return _last_of_line(text, cut)

    def whole(found: FoundNumber) -> bool:
        return not cut or not _UNFINISHED.match(text, found.end)

    for mark in _AFTER_MARK.finditer(text):
        found = number_at(text, mark.end())
        if found is not None:
            return found if whole(found) else None
    if rule == "strict-match":
        return None
    start = text.rfind(MARK) + len(MARK) if MARK in text else 0
    boxed = list(_boxed(text, start))
    if boxed:
        return boxed[-1]
    numbers = [] if cut else list(numbers_in(text, start))
    return numbers[-1] if numbers else None


def _last_of_line(text: str, cut: bool) -> FoundNumber | None:
    """The answer by the rule last-of-line; white space may come before the line's text."""
    _, mark, after = text.partition(MARK)
    start = len(text) - len(after.lstrip()) if mark else 0
    line_end = text.find("\n", start) if mark else -1
    numbers = [] if cut and not mark else list(numbers_in(text, start, len(text) if line_end < 0 else line_end))
    return numbers[-1] if numbers else None


def _boxed(text: str, start: int) -> Iterator[FoundNumber]:
    r"""The first number of every `\boxed{}` that is closed, after its last equals sign; none where a box holds no number."""
    while (box := text.find(_BOX, start)) >= 0:
        start, depth = box + len(_BOX), 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                after = max(text.rfind("=", start, end) + 1, start)
                yield from list(numbers_in(text, after, end))[:1]
                break
