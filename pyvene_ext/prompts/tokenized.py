"""Tokenised prompts: answers in context, token positions, batches of unequal lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import card_of, n_positions
from pyvene_ext.io.hashes import data_hash

Answers = Literal["first_token", "first_difference"]
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class TokenizedPrompts:
    """A tokenised prompt set, unpadded.

    Attributes:
        input_ids: the tokens of every prompt.
        answer_ids: for every prompt, the two ids whose logits are compared at its last token: IO's, then S's.
        positions: for every prompt, token positions by name, counted from its last token (-1). Always has "end" and "last" (both
            -1); "io", "s1", "s2" and "subject" where the names occur; and the prompt's own.
        pad_id: the padding token; it is masked, so its value does not matter.
    """

    input_ids: tuple[tuple[int, ...], ...]
    answer_ids: tuple[tuple[int, int], ...]
    positions: tuple[dict[str, int], ...]
    pad_id: int

    @cached_property
    def hash(self) -> str:
        """Hash of ids, answer ids and positions, which depends on the tokenizer."""
        return data_hash([self.input_ids, self.answer_ids, self.positions])

    def __hash__(self) -> int:
        return hash(self.hash)

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, which: Iterable[int]) -> TokenizedPrompts:
        """Select some of the prompts.

        Args:
            which: their indices, in the order wanted.

        Returns:
            The prompts selected.
        """
        which = list(which)
        return replace(
            self,
            input_ids=tuple(self.input_ids[i] for i in which),
            answer_ids=tuple(self.answer_ids[i] for i in which),
            positions=tuple(self.positions[i] for i in which),
        )

    def batches(self, batch_size: int, padding_side: PaddingSide = "left") -> Iterator[Batch]:
        """Iterate over padded batches, shortest prompts first (equal lengths in the order of the set).

        Args:
            batch_size: prompts per batch; the last batch may have fewer.
            padding_side: "left" or "right".

        Returns:
            The batches, each padded to its longest prompt. Only positions that every prompt of the set has are kept.

        Raises:
            ValueError: a batch size below 1, or another padding side.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
        return self._batches(batch_size, padding_side)

    def _batches(self, batch_size: int, padding_side: PaddingSide) -> Iterator[Batch]:
        order = sorted(range(len(self)), key=lambda i: len(self.input_ids[i]))
        names = [name for name in self.positions[0] if all(name in places for places in self.positions)]
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            rows = [torch.tensor(self.input_ids[i], dtype=torch.long) for i in index]
            ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id, padding_side=padding_side)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=padding_side)
            yield Batch(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                answer_ids=torch.tensor([self.answer_ids[i] for i in index]),
                positions={name: [self.positions[i][name] for i in index] for name in names},
                index=index,
                lengths=list(map(len, rows)),
                padding_side=padding_side,
            )


def check_tokenized(model: PreTrainedModel, *prompts: TokenizedPrompts) -> None:
    """Check that prompt sets are tokenised, and for this model.

    Args:
        model: a model whose family has a card.
        *prompts: tokenised prompt sets.

    Raises:
        ValueError: a set that is not tokenised, or a prompt that is empty, too long, or has ids beyond the model's embeddings.
    """
    card_of(model)
    embeddings: Any = model.get_input_embeddings()
    context, n_vocab = n_positions(model.config), embeddings.weight.shape[0]
    for some in prompts:
        if not isinstance(some, TokenizedPrompts):
            raise ValueError(
                f"prompts must be tokenised, not a {type(some).__name__}: call .tokenize(tokenizer) on the set."
            )
        for prompt, ids in enumerate(some.input_ids):
            if not ids:
                raise ValueError(f"prompt {prompt} has no tokens; give it some text.")
            if len(ids) > context:
                raise ValueError(f"prompt {prompt} has {len(ids)} tokens but the model takes {context}; shorten it.")
            if not 0 <= min(ids) <= max(ids) < n_vocab:
                raise ValueError(
                    f"the ids of prompt {prompt} range from {min(ids)} to {max(ids)} but the model embeds {n_vocab} tokens; use "
                    "its own tokenizer."
                )


@dataclass(frozen=True)
class Batch:
    """Some prompts, padded on one side.

    Attributes:
        input_ids: the tokens and the padding.
        attention_mask: 1 for real tokens, 0 for padding.
        position_ids: counted from each prompt's first real token (GPT-2's own default is wrong under left padding).
        answer_ids: the ids of IO and S.
        positions: named positions of each prompt, counted from its last real token (-1).
        index: the index in the set of each row's prompt.
        lengths: the number of real tokens of each row.
        padding_side: "left" or "right".
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    answer_ids: Int[Tensor, "batch 2"]
    positions: dict[str, list[int]]
    index: list[int]
    lengths: list[int]
    padding_side: PaddingSide

    def inputs(self, device: str | torch.device | None = None) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward, or pyvene's `base`.

        Args:
            device: where to put the tensors; None leaves them where they are.

        Returns:
            input_ids, attention_mask and position_ids.
        """
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: getattr(self, name).to(device) for name in names}

    def to(self, device: str | torch.device) -> Batch:
        """Move the batch's tensors.

        Args:
            device: the target device.

        Returns:
            The same batch on that device.
        """
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            answer_ids=self.answer_ids.to(device),
        )

    @property
    def starts(self) -> list[int]:
        """The column of each row's first real token."""
        width = self.input_ids.shape[1]
        return [width - length if self.padding_side == "left" else 0 for length in self.lengths]

    @property
    def logits_to_keep(self) -> int:
        """The number of columns that hold the last token of every row: a model's argument of this name."""
        return self.input_ids.shape[1] - min(self.last_columns)

    def columns(self, position: str | int) -> list[int]:
        """Find the column of a position in each row.

        Args:
            position: a name, or an integer: 0 is the first real token and -1 the last.

        Returns:
            One column per row.

        Raises:
            ValueError: a name that some prompt of the set lacks, or an integer outside a prompt.
        """
        if isinstance(position, str) and position not in self.positions:
            raise ValueError(
                f"not every prompt has a position named {position!r}; all have {', '.join(sorted(self.positions))}."
            )
        wanted = self.positions[position] if isinstance(position, str) else [position] * len(self.index)
        columns = []
        for at, start, length, prompt in zip(wanted, self.starts, self.lengths, self.index, strict=True):
            if not -length <= at < length:
                raise ValueError(f"position {at} lies outside prompt {prompt}, which has {length} tokens.")
            columns.append(start + at % length)
        return columns

    @property
    def last_columns(self) -> list[int]:
        """The column of each row's last real token, where the answer's logits are read."""
        return self.columns(-1)


class TokenizedPrompt(NamedTuple):
    """One row of `TokenizedPrompts`."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, int]
    positions: dict[str, int]


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer_texts: tuple[str, str],
    spans: dict[str, tuple[int, int]],
    answers: Answers,
    max_length: int | None,
    where: str,
) -> TokenizedPrompt:
    """Tokenise one prompt as `PromptSet.tokenize` describes.

    Args:
        tokenizer: a fast one.
        text: the prompt.
        answer_texts: the texts that IO and S append to it.
        spans: its named positions, `[start, end)` in characters.
        answers: "first_token" or "first_difference".
        max_length: the most tokens that it may have.
        where: what messages call it.

    Returns:
        Its token ids, answer ids and positions.

    Raises:
        ValueError: a word that the tokenizer does not know, an answer that merges with the end of the prompt, answers that no
            token tells apart, a position without a token, or a prompt that is empty or too long.
    """
    ids, offsets = encode(tokenizer, text, where)
    io, s = (_continuation(tokenizer, text, ids, answer, where) for answer in answer_texts)
    # Tokens that both answers begin with do not tell them apart.
    shared = 0
    while shared < min(len(io), len(s)) and io[shared] == s[shared]:
        shared += 1
    if shared == min(len(io), len(s)):
        raise ValueError(
            f"{where}: the tokens of one of the answers {answer_texts} begin the other's, so no token tells them apart; use "
            "other names."
        )
    if shared and answers == "first_token":
        raise ValueError(
            f"{where}: the answers {answer_texts} begin with the same token "
            f"{tokenizer.convert_ids_to_tokens(io[0])!r} (id {io[0]}); use other names, or answers='first_difference'."
        )
    ids = ids + io[:shared]
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"{where} has {len(ids)} tokens but the model takes {max_length}; shorten it, or use another model."
        )
    positions = {"end": -1, "last": -1}
    for name, (start, end) in spans.items():
        held = tokens_in_span(offsets, start, end)
        if not held:
            raise ValueError(f"{where}: no token holds {text[start:end]!r}, the place {name!r}.")
        positions[name] = held[-1] - len(ids)
    return TokenizedPrompt(tuple(ids), (io[shared], s[shared]), positions)


class Encoded(NamedTuple):
    """Token ids of a text, and `[start, end)` in characters of each token."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def encode(tokenizer: PreTrainedTokenizerBase, string: str, where: str) -> Encoded:
    """Tokenise a text with its leading special tokens but without those that the tokenizer appends.

    Args:
        tokenizer: a fast one.
        string: the text.
        where: what messages call it.

    Returns:
        Ids and character offsets.

    Raises:
        ValueError: no tokens, a start token written out in the text, or a word that the tokenizer does not know.
    """
    encoding = tokenizer(string, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets, special = (encoding[key] for key in ("input_ids", "offset_mapping", "special_tokens_mask"))
    of_text = [i for i, added in enumerate(special) if not added]
    if not of_text:
        raise ValueError(f"{where} has no tokens; give it some text.")
    if special[0] and ids[0] == ids[1]:
        added = tokenizer.convert_ids_to_tokens(ids[0])
        raise ValueError(f"{where} begins with {added!r}, which the tokenizer adds itself; leave it out of the text.")
    ids, offsets = ids[: of_text[-1] + 1], offsets[: of_text[-1] + 1]
    # GPT-2's end token is also its unknown token, so one that is written out in the text is not an unknown word.
    words = [
        string[start:end] for token, (start, end) in zip(ids, offsets, strict=True) if token == tokenizer.unk_token_id
    ]
    if unknown := [word for word in words if word and word != tokenizer.unk_token]:
        raise ValueError(
            f"{where}: the tokenizer does not know {', '.join(map(repr, unknown))}; use words of its vocabulary, or another "
            "model."
        )
    return Encoded(ids, offsets)


def _continuation(
    tokenizer: PreTrainedTokenizerBase, string: str, ids: list[int], answer: str, where: str
) -> list[int]:
    """The tokens that `answer` adds to a prompt."""
    longer = encode(tokenizer, string + answer, where).ids
    if longer[: len(ids)] != ids:
        raise ValueError(
            f"{where}: the answer {answer!r} merges with the end of the prompt when tokenised, so no position predicts it; end "
            "the prompt with a whole word, or let io_token begin with a space."
        )
    return longer[len(ids) :]


def tokens_in_span(offsets: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Find the tokens that overlap a span of characters.

    Args:
        offsets: `[start, end)` in characters of each token.
        start: the span's first character.
        end: one past its last character.

    Returns:
        Their indices, in order.
    """
    return [i for i, (begins, ends) in enumerate(offsets) if begins < end and ends > start]
