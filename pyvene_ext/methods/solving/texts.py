"""The text of one solution while it is written: where its reasoning ends, and where the text does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.io.hashes import data_hash
from pyvene_ext.methods.solving.answers import find_answer
from pyvene_ext.prompts.problems import MARK, STOPS, as_text

NEW_LINES = ("\n", "\u010a", "<0x0A>")  # as tokens spell it: itself, in byte-level vocabularies, as a byte token


class Ends:
    """The tokens of a model that end a text, a line or the reasoning, so that few texts need decoding.

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.never = list(getattr(model.generation_config, "suppress_tokens", None) or ())
        vocabulary = tokenizer.get_vocab()
        self.marks = {at for token, at in vocabulary.items() if "#" in token}  # may be part of ####
        self.new_lines = {at for token, at in vocabulary.items() if any(line in token for line in NEW_LINES)}
        self.stops = {
            at for token, at in vocabulary.items() if any(stop[-1] in token for stop in STOPS)
        }  # may complete one

    @cached_property
    def hash(self) -> str:
        """Hash of what a text depends on: the tokens that end it, those that are never written, and the vocabulary."""
        return data_hash([sorted(self.ends), sorted(self.never), sorted(self.tokenizer.get_vocab().items())])

    def text(self, *ids: Sequence[int]) -> str:
        """Decode the concatenation of several sequences of tokens."""
        return as_text([token for some in ids for token in some], self.tokenizer)


class Solution:
    """The tokens that a model writes after one prompt.

    Args:
        ends: of the model.
        given: the part of the solution that the prompt contains.
        reasoning_only: whether edits of new tokens end with the reasoning.

    Attributes:
        ids: the tokens written, without the end token.
        log_probabilities: of these tokens.
        ended: whether the text has ended.
        is_reasoning: whether the text has no `####` so far.
    """

    def __init__(self, ends: Ends, given: Sequence[int] = (), *, reasoning_only: bool = False) -> None:
        self._of, self._given, self._reasoning_only = ends, given, reasoning_only
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.ended = False
        self.is_reasoning = MARK not in ends.text(given)

    @property
    def is_edited(self) -> bool:
        """Whether the last token is edited, where new tokens are."""
        return self.is_reasoning or not self._reasoning_only

    def add(self, token: int, log_probability: float) -> None:
        """Add a token, or end the text.

        Args:
            token: the next token.
            log_probability: of the token.
        """
        of = self._of
        if token in of.ends:
            self.ended = True
            return
        self.ids.append(token)
        self.log_probabilities.append(log_probability)
        if self.is_reasoning and token in of.marks:
            self.is_reasoning = MARK not in of.text(self._given, self.ids)
        if token in of.stops:
            text = of.text(self._given, self.ids)
            self.ended = any(stop in text for stop in STOPS)
        if not self.is_reasoning and token in of.new_lines:
            text = of.text(self._given, self.ids)
            answer = find_answer(text, "strict-match")
            self.ended = answer is not None and "\n" in text[answer.end :]
