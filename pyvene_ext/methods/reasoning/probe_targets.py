"""Probe targets of word problems: numbers in their solutions, and classes.

answer, first_operand (the first number of the first calculation) and result_1, result_2 ... (of the first, second ...
calculation) are numbers; last_digit (of the answer) and correct (whether the model is right) are classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from pyvene_ext.prompts.problems import NUMBER, STEP, Problem

CLASSES = ("last_digit", "correct")
OPERAND = re.compile(r"-?(\d+(\.\d+)?|\.\d+)")  # calculations may leave the 0 of 0.5 out


@dataclass(frozen=True)
class ProbeTarget:
    """A probe target and its values.

    Attributes:
        name: of the target.
        which: indices of the problems that have it.
        values: a number for each of them.
        y: what the ridge regression predicts: one column for a number, or one per class.
        log: y is the logarithm of the number, sign(x) log(1 + |x|).
    """

    name: str
    which: Int[np.ndarray, " problem"]
    values: Float[np.ndarray, " problem"]
    y: Float[np.ndarray, "problem column"]
    log: bool = False

    def accuracy(self, predicted: Float[np.ndarray, "problem column"]) -> float:
        """Score predictions.

        Args:
            predicted: as `y`.

        Returns:
            The percentage of problems whose rounded prediction is the number, or whose highest column is the correct class.
        """
        if self.name in CLASSES:
            return 100 * float((predicted.argmax(1) == self.y.argmax(1)).mean())
        number = predicted[:, 0]
        if self.log:
            number = np.sign(number) * np.expm1(np.abs(number))
        return 100 * float((np.round(number) == self.values).mean())

    @property
    def chance(self) -> float:
        """The percentage of problems that have the most frequent value."""
        return 100 * float(np.unique(self.values, return_counts=True)[1].max()) / len(self.which)


def find_target(
    name: str, every: Float[np.ndarray, " problem"], has: Sequence[bool], *, least: int, folds: int, log: bool = False
) -> ProbeTarget | str:
    """Select the problems that have both a target and the probed token.

    Args:
        name: of the target.
        every: its value in each problem; NaN if it has none.
        has: whether a problem has the token.
        least: how many problems must have both (--min_problems).
        folds: of the cross-validation; as many problems must be outside of the most frequent class.
        log: predict the logarithm of numbers.

    Returns:
        The target; or, as text, why it cannot be probed.
    """
    which = np.flatnonzero(np.isfinite(every) & np.array(has))
    values = every[which]
    if len(which) < least:
        return f"{len(which)} problems have it, and --min_problems asks for {least}"
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) == 1:
        return f"it is {kinds[0]:g} in all {len(which)} problems"
    if name in CLASSES and np.sort(counts)[:-1].sum() < folds:
        return f"{len(which) - counts.max()} of {len(which)} problems are not {kinds[counts.argmax()]:g}"
    if name in CLASSES:
        y = (values[:, None] == kinds).astype(np.float64)
    else:
        y = (np.sign(values) * np.log1p(np.abs(values)) if log else values)[:, None]
    return ProbeTarget(name, which, values, y, log)


def solution_number(problem: Problem, target: str) -> float:
    """Read a target's value from a problem's solution.

    Args:
        problem: the problem.
        target: answer, last_digit, first_operand or result_N.

    Returns:
        The number; NaN if the solution has none.
    """
    if target == "answer":
        return problem.answer
    if target == "last_digit":
        return abs(problem.answer) % 10 if problem.answer == int(problem.answer) else math.nan
    steps = [step.replace(",", "").strip("<>") for step in STEP.findall(problem.solution)]
    number = 0 if target == "first_operand" else int(target.removeprefix("result_")) - 1
    if number >= len(steps):
        return math.nan
    first, equals, result = steps[number].partition("=")
    found = OPERAND.search(first if target == "first_operand" else result)
    return float(found.group()) if found and equals else math.nan


def problem_group(problem: Problem, by: str) -> str:
    """The key of the problems that must be in the same fold.

    Args:
        problem: the problem.
        by: group by the numbers of the question in their order ("numbers"), or by its text.

    Returns:
        The key.
    """
    numbers = " ".join(match.group() for match in NUMBER.finditer(problem.question.replace(",", "")))
    return numbers if numbers and by == "numbers" else problem.question
