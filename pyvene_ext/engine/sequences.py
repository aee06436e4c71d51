"""What is run for a metric: prompts, read at their last token or at every token, or prompts followed by their answers.

The log-probability of a whole answer is the sum of its tokens', each predicted from the prompt and the answer's tokens before it
(teacher forcing). So a prompt is run followed by an answer without its last token. Edits are made in the prompt only; the answer's
tokens run untouched and read the edited prompt through attention, like tokens that `generate(scope="prompt")` writes. Answers that
begin alike share a sequence, and answers of one token need no more than the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from pyvene_ext.prompts.tokenized import AnswerTokens, TokenizedPrompts


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
        found: list[list[int]] = [[] for _ in range(self.prompt_of[-1] + 1)]
        for sequence, prompt in enumerate(self.prompt_of):
            found[prompt].append(sequence)
        return found


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


def log_probabilities_by_prompt(
    values: Float32[np.ndarray, "*specs sequence 2"], sequences: Iterable[Sequence[int]]
) -> Float32[np.ndarray, "2 *specs prompt"]:
    """Put together the answers of a prompt that are read in different sequences.

    Args:
        values: `AnswerTable.log_probabilities` of sequences.
        sequences: those of every prompt, as indices into `values`.

    Returns:
        The log-probability of the right answers of each prompt, and of the wrong ones.
    """
    merged = np.stack([np.logaddexp.reduce(values[..., list(own), :], axis=-2) for own in sequences], -2)
    return np.moveaxis(merged, -1, 0)
