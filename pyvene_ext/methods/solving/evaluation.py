"""Evaluation of a model's solutions of problems: texts, answers, accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num
from transformers import PreTrainedTokenizerBase

from pyvene_ext.methods.solving.answers import Rule, find_answer
from pyvene_ext.methods.solving.texts import Solution
from pyvene_ext.prompts.problems import STOPS, Questions, as_text, tokens_until
from pyvene_ext.stats.stopping import Stopped


@dataclass(frozen=True)
class Evaluation:
    """A model's solution of each problem, and how it was judged.

    Attributes:
        ids: the generated tokens, without the end token.
        texts: the solution as text, including the part that the prompt contained.
        answers: the number found by `answers.find_answer`; None: unparsed.
        gold: the correct answers.
        ended: whether the text ended, with an end token, with a new line after the answer that follows `####`, or with another
            question; the others were cut at `max_new_tokens`.
        confidence: geometric mean probability of the generated tokens that contain the answer's number; NaN if there are none.
        rule: the rule by which answers were read.
        index: the number of each problem among those that were asked, in ascending order; None: all of them.
        stopped: where an evaluation of some problems was stopped, and what it found.
    """

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    answers: tuple[float | None, ...]
    gold: tuple[float, ...]
    ended: Bool[np.ndarray, " problem"]
    confidence: Float[np.ndarray, " problem"]
    rule: Rule = "flexible-extract"
    index: tuple[int, ...] | None = None
    stopped: Stopped | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def parsed(self) -> Bool[np.ndarray, " problem"]:
        """Whether an answer was found."""
        return np.array([answer is not None for answer in self.answers], bool)

    @cached_property
    def correct(self) -> Bool[np.ndarray, " problem"]:
        """Whether an answer was found and is the correct number."""
        return np.array([found == right for found, right in zip(self.answers, self.gold, strict=True)], bool)

    @property
    def accuracy(self) -> float:
        """The share of its problems that were solved correctly."""
        return float(self.correct.mean())

    def where_taken(self, of: Evaluation) -> Evaluation:
        """Select from an evaluation of all problems those that this one took, so that the two can be compared.

        Args:
            of: such as the untouched model's.

        Returns:
            Its part, in the order of this one.
        """
        return of if self.index is None else of.take(self.index)

    def spread(self, values: Num[np.ndarray, " problem"], n: int) -> Float[np.ndarray, " all"]:
        """Put values of the problems that were taken at the places of all.

        Args:
            values: one a problem, such as `correct`.
            n: how many problems were asked.

        Returns:
            The values, with NaN for problems that were not taken.
        """
        everywhere = np.full(n, np.nan)
        everywhere[list(range(n) if self.index is None else self.index)] = values
        return everywhere

    def summary(self) -> dict[str, float | int | str]:
        """Counts for a table: problems, correct, wrong, unparsed (neither of the two), and of all of them those cut; the rule."""
        right, parsed = int(self.correct.sum()), int(self.parsed.sum())
        return {
            "problems": len(self),
            "accuracy": self.accuracy,
            "correct": right,
            "wrong": parsed - right,
            "unparsed": len(self) - parsed,
            "cut": int((~self.ended).sum()),
            "rule": self.rule,
        }

    def take(self, which: Iterable[int]) -> Evaluation:
        """Select some of the problems, in this order, which are then all that it has."""
        which = list(which)
        lists: dict[str, Any] = {
            name: tuple(getattr(self, name)[i] for i in which) for name in ("ids", "texts", "answers", "gold")
        }
        return replace(
            self, **lists, ended=self.ended[which], confidence=self.confidence[which], index=None, stopped=None
        )

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data for a JSON file, with None in place of NaN."""
        some = {} if self.stopped is None else {"index": self.index, "stopped": self.stopped.as_dict()}
        return {
            **some,
            "ids": self.ids,
            "texts": self.texts,
            "answers": self.answers,
            "gold": self.gold,
            "ended": self.ended.tolist(),
            "confidence": [None if np.isnan(value) else value for value in self.confidence.tolist()],
            "rule": self.rule,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evaluation:
        """Convert back what `as_dict` returned."""
        return cls(
            ids=tuple(map(tuple, record["ids"])),
            texts=tuple(record["texts"]),
            answers=tuple(record["answers"]),
            gold=tuple(record["gold"]),
            ended=np.array(record["ended"], bool),
            confidence=np.array([np.nan if value is None else value for value in record["confidence"]]),
            rule=record["rule"],
            index=tuple(record["index"]) if "index" in record else None,
            stopped=Stopped.from_dict(record["stopped"]) if "stopped" in record else None,
        )


def collect(
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Solution],
    rule: Rule,
    latent: bool,
) -> Evaluation:
    """Extract the answers from the generated texts; after latent steps, all that is written is the answer, also if it is cut."""
    texts, answers, confidence = [], [], []
    for which, row in enumerate(rows):
        given = questions.given(which)
        everything = [*given, *row.ids]
        text = as_text(everything, tokenizer)
        for stop in STOPS:
            text = text.partition(stop)[0]
        found = find_answer(text, rule, cut=not row.ended and not latent)
        texts.append(text)
        answers.append(None if found is None else found.value)
        held: list[float] = []
        if found is not None:
            first, last = (tokens_until(at, everything, tokenizer) or 0 for at in (found.start + 1, found.end))
            held = row.log_probabilities[max(first - 1 - len(given), 0) : max(last - len(given), 0)]
        confidence.append(float(np.exp(np.mean(held))) if held else np.nan)
    return Evaluation(
        ids=tuple(tuple(row.ids) for row in rows),
        texts=tuple(texts),
        answers=tuple(answers),
        gold=tuple(problem.answer for problem in questions.problems),
        ended=np.array([row.ended for row in rows]),
        confidence=np.array(confidence),
        rule=rule,
    )
