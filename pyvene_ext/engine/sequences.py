"""What is run for a metric: prompts, read at their last token or at every token, or prompts followed by their answers.

The log-probability of a whole answer is the sum of its tokens', each predicted from the prompt and the answer's tokens before it
(teacher forcing). So a prompt is run followed by an answer without its last token. Edits are made in the prompt only; the tokens
of the answer run untouched and read the edited prompt through attention, like those that `generate(scope="prompt")` writes.
Answers that begin alike share a sequence, and answers of one token need no more than the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from pyvene_ext.engine.measure import Metric, as_array
from pyvene_ext.prompts.tokenized import AnswerTokens, Batch, TokenizedPrompts


@dataclass(frozen=True)
class Sequences:
    """The token sequences that are run, each of which begins with a prompt.

    Attributes:
        prompts: the sequences; the answers of each are those that are read in it.
        prompt_of: the prompt that each begins with, in ascending order.
        first_read: the first token of each at which the metric is read; it is read at all later ones too.
    """

    prompts: TokenizedPrompts
    prompt_of: tuple[int, ...]
    first_read: tuple[int, ...]

    @classmethod
    def of_metric(cls, prompts: TokenizedPrompts, metric: Metric) -> Sequences:
        """What is run and read for a metric.

        Args:
            prompts: the prompts.
            metric: the metric.

        Returns:
            Each prompt, or each prompt followed by its answers.
        """
        if metric.of_answers:
            return cls.of_answers(prompts, wrong="wrong" in metric.needs)
        return cls.of_prompts(prompts, of_tokens=metric.of_tokens)

    @classmethod
    def of_prompts(cls, prompts: TokenizedPrompts, *, of_tokens: bool = False) -> Sequences:
        """The prompts themselves.

        Args:
            prompts: the prompts.
            of_tokens: read every token, not only the last one.

        Returns:
            One sequence per prompt.
        """
        first_read = tuple(0 if of_tokens else len(ids) - 1 for ids in prompts.input_ids)
        return cls(prompts, tuple(range(len(prompts))), first_read)

    @classmethod
    def of_answers(cls, prompts: TokenizedPrompts, *, wrong: bool) -> Sequences:
        """The prompts, each followed by its answers without their last tokens.

        Args:
            prompts: the prompts.
            wrong: read the wrong answers too, not only the right ones.

        Returns:
            One or more sequences per prompt: an answer is read in the longest one that begins with its tokens.
        """
        found: list[tuple[int, tuple[int, ...], AnswerTokens]] = []
        for prompt, answers in enumerate(prompts.answers):
            left = AnswerTokens(answers.right, answers.wrong if wrong else ())
            forced = {answer[:-1] for some in left for answer in some}
            for tokens in sorted(forced, key=lambda tokens: (-len(tokens), tokens)):
                read = AnswerTokens(*(tuple(a for a in some if a[:-1] == tokens[: len(a) - 1]) for some in left))
                left = AnswerTokens(*(tuple(a for a in some if a not in set(read[i])) for i, some in enumerate(left)))
                if any(read):
                    found.append((prompt, prompts.input_ids[prompt] + tokens, read))
        prompt_of, ids, answers_of = zip(*found, strict=True)
        sequences = TokenizedPrompts(input_ids=ids, answers=answers_of, pad_id=prompts.pad_id)
        return cls(sequences, prompt_of, tuple(len(prompts.input_ids[prompt]) - 1 for prompt in prompt_of))

    @cached_property
    def of_prompt(self) -> list[list[int]]:
        """The sequences of every prompt."""
        found: list[list[int]] = [[] for _ in range(self.prompt_of[-1] + 1 if self.prompt_of else 0)]
        for sequence, prompt in enumerate(self.prompt_of):
            found[prompt].append(sequence)
        return found

    def log_probabilities(self, logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> Float32[Tensor, "batch 2"]:
        """The log-probabilities of the answers that are read in a batch of sequences.

        Args:
            logits: at every token.
            batch: the sequences, padded on either side.

        Returns:
            As of `AnswerTable.log_probabilities`.
        """
        first = [start + self.first_read[sequence] for start, sequence in zip(batch.starts, batch.index, strict=True)]
        begin, last = (torch.tensor(columns, device=logits.device)[:, None] for columns in (first, batch.last_columns))
        pos = torch.arange(int((last - begin).max()) + 1, device=logits.device)
        columns = torch.minimum(begin + pos, last)  # what a shorter answer reads besides has no token
        own = [self.prompts.answers[sequence] for sequence in batch.index]
        rows = torch.arange(len(own), device=logits.device)[:, None]
        return AnswerTable.of(own, len(pos), logits.device).log_probabilities(logits[rows, columns])


class AnswerTable(NamedTuple):
    """The answers that are read in some sequences.

    Attributes:
        tokens: the answers' tokens from `first_read` on, -1 after an answer's end.
        sides: which answers are right, and which are wrong.
    """

    tokens: Int[Tensor, "sequence pos answer"]
    sides: Bool[Tensor, "sequence 2 answer"]

    @classmethod
    def of(cls, answers: Sequence[AnswerTokens], pos: int, device: torch.device) -> AnswerTable:
        """Tabulate answers.

        Args:
            answers: of every sequence.
            pos: number of tokens that are read of each.
            device: of the tensors.

        Returns:
            The table.
        """
        most = max(len(own.right) + len(own.wrong) for own in answers)
        tokens = np.full((len(answers), pos, most), -1)
        sides = np.zeros((len(answers), 2, most), bool)
        for row, own in enumerate(answers):
            for number, answer in enumerate([*own.right, *own.wrong]):
                tokens[row, : len(answer), number] = answer
                sides[row, int(number >= len(own.right)), number] = True
        return cls(torch.from_numpy(tokens).to(device), torch.from_numpy(sides).to(device))

    def take(self, which: Int[Tensor, " row"]) -> AnswerTable:
        """Select sequences, each as often as wanted."""
        return AnswerTable(self.tokens[which], self.sides[which])

    def log_probabilities(self, logits: Float[Tensor, "sequence pos vocab"]) -> Float32[Tensor, "sequence 2"]:
        """Sum the log-probabilities of every answer's tokens, and of several answers take the log of the summed probability.

        Args:
            logits: at the tokens that are read.

        Returns:
            The log-probability of the right answers and of the wrong ones; -inf where there are none.
        """
        each = logits.float().log_softmax(-1).gather(2, self.tokens.clamp(min=0))
        whole = each.masked_fill(self.tokens < 0, 0.0).sum(1)
        return whole[:, None].masked_fill(~self.sides, -torch.inf).logsumexp(-1)


def answers_measured(
    metric: Metric, values: Float32[np.ndarray, "*specs sequence 2"], counts: Sequence[int]
) -> Float32[np.ndarray, "*specs prompt"]:
    """Compute a metric of whole answers, once those of a prompt that are read in different sequences are put together.

    Args:
        metric: the metric.
        values: `AnswerTable.log_probabilities` of sequences, those of a prompt side by side.
        counts: how many sequences every prompt has.

    Returns:
        One number per prompt.

    Raises:
        ValueError: the function returns another shape, or numbers that are not finite.
    """
    merged = np.logaddexp.reduceat(values, np.cumsum([0, *counts[:-1]]), axis=-2)
    right, wrong = torch.from_numpy(merged).unbind(-1)
    found = metric.function(right, wrong)
    if not isinstance(found, Tensor) or found.shape != right.shape or not found.isfinite().all():
        raise ValueError(f"metric {metric.label!r} must return one finite number for each it is given.")
    return as_array(found)
