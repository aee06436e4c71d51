"""Tokenised prompts: answers, token positions, batches of unequal lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import card_of, n_positions
from pyvene_ext.io.errors import counted, with_article
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.io.records import Record
from pyvene_ext.prompts.encoding import (
    RESERVED_POSITIONS,
    AnswerTokens,
    TokenizedPrompt,
    answer_pairs,
    check_first_ids,
    distinct,
    first_tokens,
    pad_id,
)
from pyvene_ext.prompts.prompt import Prompt

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class TokenizedPrompts:
    """A tokenised prompt set, unpadded.

    Attributes:
        input_ids: the tokens of every prompt.
        answers: for every prompt, the tokens of its answers; by default there are none.
        positions: for every prompt, token positions by name, counted from its last token (-1). Always has "end" and "last" (both
            -1), the default; "io", "s1", "s2" and "subject" where the names occur; and the prompt's own.
        pad_id: the padding token; it is masked, so its value does not matter.
    """

    input_ids: tuple[tuple[int, ...], ...]
    answers: tuple[AnswerTokens, ...] = ()
    positions: tuple[dict[str, int], ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", self.answers or (AnswerTokens(),) * len(self))
        object.__setattr__(self, "positions", self.positions or ({"end": -1, "last": -1},) * len(self))

    @classmethod
    def of(
        cls,
        ids: Any,
        attention_mask: Any = None,
        answers: Iterable[Any] | None = None,
        positions: Mapping[str, int] | Iterable[Mapping[str, int]] | None = None,
        pad_id: int = 0,
    ) -> TokenizedPrompts:
        """Take prompts that are tokenised already.

            TokenizedPrompts.of(tokenizer(texts, padding=True, return_tensors="pt"), answers=[(5, 7), (12, [9, 3])])

        Args:
            ids: what a tokenizer returns for a list of texts, a tensor or array `batch pos`, or a list of lists.
            attention_mask: 1 for tokens and 0 for padding, on either side of each prompt; by default that of `ids`, or else
                everything is a token.
            answers: for every prompt its right and its wrong answer, `(right, wrong)`: each a token id, the ids of an answer of
                several tokens, a list of such lists, or None.
            positions: named token indices, negative from the last token; the same for all prompts, or for each its own.
            pad_id: the padding token.

        Returns:
            The prompts without padding.

        Raises:
            ValueError: something else is given, a mask with gaps, a prompt without tokens, or numbers of prompts that differ;
                names the prompt.
        """
        rows = _as_rows(ids, attention_mask)
        return cls(rows, _as_answers(answers, len(rows)), _as_positions(positions, rows), pad_id)

    @cached_property
    def answer_ids(self) -> tuple[tuple[int, int], ...]:
        """The tokens that are compared at the last token of every prompt: the first ones of its right and of its wrong answer.

        Raises:
            ValueError: a prompt does not have one answer of each, or they begin with the same token.
        """
        return tuple(check_first_ids(*own.first_ids(prompt), prompt) for prompt, own in enumerate(self.answers))

    def with_answer_ids(self, pairs: Iterable[tuple[int, int]]) -> TokenizedPrompts:
        """Replace the answers by single tokens.

        Args:
            pairs: for every prompt the right token and the wrong one.

        Returns:
            The same prompts with these answers.
        """
        return replace(self, answers=answer_pairs(pairs))

    @cached_property
    def hash(self) -> str:
        """Hash of ids, answers and positions, which depends on the tokenizer."""
        return data_hash([self.input_ids, self.answers, self.positions])

    def __hash__(self) -> int:
        return hash(self.hash)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        least, most = min(map(len, self.input_ids), default=0), max(map(len, self.input_ids), default=0)
        tokens = f"{least} to {most} tokens" if least < most else counted(most, "token")
        sides = [side for side in AnswerTokens._fields if any(getattr(own, side) for own in self.answers)]
        answers = f"{' and '.join(sides)} answers" if sides else "no answers"
        return f"<TokenizedPrompts: {counted(len(self), 'prompt')} of {tokens}, {answers}>"

    def __getitem__(self, which: slice | Iterable[int] | int) -> TokenizedPrompts:
        return self.take(which)

    __iter__ = None  # a subscript is a set too, so that a loop over them is more likely a mistake

    def take(self, which: slice | Iterable[int] | int) -> TokenizedPrompts:
        """Select some of the prompts; so does a subscript, `prompts[:2]`.

        Args:
            which: their indices, in the order wanted; one index; a slice; or a boolean for every prompt.

        Returns:
            The prompts selected.

        Raises:
            ValueError: there is no such prompt, something else is given, or a mask of another length.
        """
        which = range(len(self))[which] if isinstance(which, slice) else which
        listed = _plain(which)
        given = list(map(_plain, listed)) if isinstance(listed, Iterable) else [listed]
        if given and all(isinstance(one, bool) for one in given):
            if len(given) != len(self):
                raise ValueError(
                    f"a mask of {counted(len(given), 'boolean')} cannot select among {counted(len(self), 'prompt')}; give one "
                    "for every prompt."
                )
            given = [prompt for prompt, taken in enumerate(given) if taken]
        for one in given:
            if isinstance(one, bool) or not isinstance(one, Integral):
                raise ValueError(f"prompts are selected by whole numbers, a slice, or one boolean each, not {one!r}.")
        if missing := [one for one in given if not -len(self) <= one < len(self)]:
            raise ValueError(f"there is no prompt {missing[0]} among {counted(len(self), 'prompt')}, numbered from 0.")
        return replace(
            self,
            input_ids=tuple(self.input_ids[i] for i in given),
            answers=tuple(self.answers[i] for i in given),
            positions=tuple(self.positions[i] for i in given),
        )

    def batches(
        self, batch_size: int, padding_side: PaddingSide = "left", which: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Iterate over padded batches, shortest prompts first (equal lengths in the order of the set).

        Args:
            batch_size: prompts per batch; the last batch may have fewer.
            padding_side: "left" or "right".
            which: indices of the prompts that are wanted; by default all.

        Returns:
            The batches, each padded to its longest prompt. Only positions that every prompt of the set has are kept.

        Raises:
            ValueError: a batch size below 1, or another padding side.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size!r}.")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
        return self._batches(batch_size, padding_side, range(len(self)) if which is None else which)

    def _batches(self, batch_size: int, padding_side: PaddingSide, which: Sequence[int]) -> Iterator[Batch]:
        order = sorted(which, key=lambda i: len(self.input_ids[i]))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], padding_side)

    def batch(self, which: Sequence[int], padding_side: PaddingSide = "left") -> Batch:
        """Make one batch of some prompts.

        Args:
            which: their indices, in the order wanted.
            padding_side: "left" or "right".

        Returns:
            The batch, padded to its longest prompt. Only positions that every prompt of the set has are kept.
        """
        rows = [torch.tensor(self.input_ids[i], dtype=torch.long) for i in which]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id, padding_side=padding_side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=padding_side)
        return Batch(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            right_ids=first_tokens([self.answers[i].right for i in which]),
            wrong_ids=first_tokens([self.answers[i].wrong for i in which]),
            positions={name: [self.positions[i][name] for i in which] for name in self._shared_names},
            index=list(which),
            lengths=list(map(len, rows)),
            padding_side=padding_side,
        )

    @cached_property
    def _shared_names(self) -> list[str]:
        return [name for name in self.positions[0] if all(name in places for places in self.positions)]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def collect(rows: Iterable[TokenizedPrompt], tokenizer: PreTrainedTokenizerBase) -> TokenizedPrompts:
    """Make a tokenised set of one or more rows."""
    ids, answers, positions = zip(*rows, strict=True)
    return TokenizedPrompts(ids, answers, positions, pad_id(tokenizer))


def check_tokenized(model: PreTrainedModel, *prompts: TokenizedPrompts) -> None:
    """Check that prompt sets are tokenised, and for this model.

    Args:
        model: a model whose family has a card.
        *prompts: tokenised prompt sets.

    Raises:
        ValueError: a set that is not tokenised, or a prompt that is empty, too long, or has ids beyond the model's embeddings.
    """
    card_of(model)
    if isinstance(model, type):
        raise ValueError(f"{model.__name__} is a class; load a model with pyvene_ext.load_model(NAME).")
    embeddings: Any = model.get_input_embeddings()
    context, n_vocab = n_positions(model.config), embeddings.weight.shape[0]
    for some in prompts:
        if not isinstance(some, TokenizedPrompts):
            how = "call .tokenize(tokenizer) on the set"
            if isinstance(some, str | list | tuple | Prompt):
                how = "PromptSet([...]).tokenize(tokenizer) makes them"
            elif hasattr(some, "input_ids") or hasattr(some, "shape"):  # what a tokenizer returns, tensors and arrays
                how = "TokenizedPrompts.of(ids, attention_mask) takes tokens"
            first = some[0] if isinstance(some, list | tuple) and some else some
            if isinstance(first, Record) and not isinstance(first, Prompt):  # a spec
                how = "the arguments are swapped, which are (model, specs, prompts)"
            raise ValueError(f"prompts must be tokenised, not {with_article(type(some).__name__)}: {how}.")
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
        right_ids: the first token of every right answer, each token once; -1 where a prompt has fewer.
        wrong_ids: the same of wrong answers.
        positions: named positions of each prompt, counted from its last real token (-1).
        index: the index in the set of each row's prompt.
        lengths: the number of real tokens of each row.
        padding_side: "left" or "right".
        clean_logits: the logits of the untouched run at the last tokens, which engines set for metrics that compare with them.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    right_ids: Int[Tensor, "batch n_right"]
    wrong_ids: Int[Tensor, "batch n_wrong"]
    positions: dict[str, list[int]]
    index: list[int]
    lengths: list[int]
    padding_side: PaddingSide
    clean_logits: Float[Tensor, "batch vocab"] | None = None

    @property
    def answer_ids(self) -> Int[Tensor, "batch 2"]:
        """The first token of each prompt's right answer, then of its wrong one.

        Raises:
            ValueError: a prompt does not have one of each, or they are the same token.
        """
        for prompt, *both in zip(self.index, self.right_ids.tolist(), self.wrong_ids.tolist(), strict=True):
            right, wrong = (tuple((id,) for id in ids if id >= 0) for ids in both)
            check_first_ids(*AnswerTokens(right, wrong).first_ids(prompt), prompt)
        return torch.cat((self.right_ids, self.wrong_ids), 1)

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
            right_ids=self.right_ids.to(device),
            wrong_ids=self.wrong_ids.to(device),
            clean_logits=None if self.clean_logits is None else self.clean_logits.to(device),
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """Select rows.

        Args:
            rows: their numbers, in the order wanted; a row may occur more than once.

        Returns:
            The batch of these rows, with its padding.
        """
        at = torch.as_tensor(rows, device=self.input_ids.device)
        names = ("input_ids", "attention_mask", "position_ids", "right_ids", "wrong_ids")
        return replace(
            self,
            **{name: getattr(self, name)[at] for name in names},
            positions={name: [places[row] for row in rows] for name, places in self.positions.items()},
            index=[self.index[row] for row in rows],
            lengths=[self.lengths[row] for row in rows],
            clean_logits=None if self.clean_logits is None else self.clean_logits[at],
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


def common_beginning(rows: Iterable[Sequence[int]]) -> int:
    """Count the tokens that all sequences begin with.

    Args:
        rows: token ids.

    Returns:
        How many first tokens are the same in all.
    """
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


# -- ids in whatever form they are given -------------------------------------------------------------------------------


def _as_rows(ids: Any, attention_mask: Any = None) -> tuple[tuple[int, ...], ...]:
    """Remove the padding of prompts.

    Args:
        ids: a tokenizer's output, an array or tensor `batch pos`, or lists of ids.
        attention_mask: of the same shape, 1 for tokens and 0 for padding on one side; by default that in `ids`, if any.

    Returns:
        The tokens of every prompt.

    Raises:
        ValueError: anything else; names the prompt.
    """
    if isinstance(ids, Mapping):
        if "input_ids" not in ids:
            raise ValueError(f"there are no input_ids but {', '.join(map(str, ids))}; give what a tokenizer returns.")
        attention_mask = ids.get("attention_mask") if attention_mask is None else attention_mask
        ids = ids["input_ids"]
    rows = [_numbers(row, f"prompt {prompt}") for prompt, row in enumerate(_entries(ids, "ids"))]
    if not rows:
        raise ValueError("there are no prompts; give the ids of at least one.")
    if attention_mask is not None:
        masks = [
            _numbers(row, f"the attention mask of prompt {n}") for n, row in enumerate(_entries(attention_mask, "mask"))
        ]
        if list(map(len, masks)) != list(map(len, rows)):
            raise ValueError(
                "the attention mask does not have the shape of the ids; give both as the tokenizer returns them."
            )
        rows = [_unpadded(row, mask, prompt) for prompt, (row, mask) in enumerate(zip(rows, masks, strict=True))]
    for prompt, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {prompt} has no tokens; give it some text.")
    return tuple(rows)


def _as_answers(answers: Iterable[Any] | None, count: int) -> tuple[AnswerTokens, ...]:
    """Bring answers to one form.

    Args:
        answers: a pair (right, wrong) for every prompt: token ids, lists of ids, lists of those, or None.
        count: the number of prompts.

    Returns:
        The answers of every prompt; empty if `answers` is None.

    Raises:
        ValueError: anything else; names the prompt.
    """
    if answers is None:
        return ()
    found = []
    for prompt, pair in enumerate(_entries(answers, "answers")):
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ValueError(
                f"the answers of prompt {prompt} should be a pair (right, wrong) of token ids, not {pair!r}."
            )
        right, wrong = (_sequences(side, f"an answer of prompt {prompt}") for side in pair)
        if set(right) & set(wrong):
            raise ValueError(f"an answer of prompt {prompt} is both right and wrong; use different answers.")
        found.append(AnswerTokens(right, wrong))
    if len(found) != count:
        raise ValueError(f"there are answers of {len(found)} prompts but {count} prompts; give each prompt a pair.")
    return tuple(found)


def _as_positions(
    positions: Mapping[str, int] | Iterable[Mapping[str, int]] | None, rows: tuple[tuple[int, ...], ...]
) -> tuple[dict[str, int], ...]:
    """Count named positions from the last token of each prompt.

    Args:
        positions: token indices by name, negative from the last token, for all prompts or for each its own.
        rows: the tokens of every prompt.

    Returns:
        Positions of every prompt, with "end" and "last".

    Raises:
        ValueError: a position outside its prompt, or another number of prompts; names the prompt.
    """
    own = [positions or {}] * len(rows) if positions is None or isinstance(positions, Mapping) else list(positions)
    if len(own) != len(rows):
        raise ValueError(f"there are positions of {len(own)} prompts but {len(rows)} prompts; give them for each.")
    found = []
    for prompt, (named, row) in enumerate(zip(own, rows, strict=True)):
        for name, at in named.items():
            if name in RESERVED_POSITIONS:
                raise ValueError(f"position {name!r} has a built-in meaning; choose another name.")
            if not -len(row) <= at < len(row):
                raise ValueError(f"position {name!r} is token {at} of prompt {prompt}, which has {len(row)} tokens.")
        found.append({"end": -1, "last": -1, **{name: int(at) % len(row) - len(row) for name, at in named.items()}})
    return tuple(found)


def _entries(values: Any, what: str) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{what} should have one entry per prompt, not be a {type(values).__name__}.")
    return list(values)


def _numbers(row: Any, where: str) -> tuple[int, ...]:
    row = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(row, list | tuple) or not all(isinstance(i, int | np.integer) and i >= 0 for i in row):
        raise ValueError(
            f"{where} should be a list of token ids, not {row!r:.60}; give [batch pos] or lists of whole numbers."
        )
    return tuple(map(int, row))


def _sequences(side: Any, where: str) -> tuple[tuple[int, ...], ...]:
    """One side's answers: nothing, a token, the tokens of an answer, or those of several."""
    side = side.tolist() if hasattr(side, "tolist") else side
    if side is None:
        return ()
    if isinstance(side, int):
        side = [side]
    if isinstance(side, list | tuple) and not any(isinstance(one, list | tuple) for one in side):
        side = [side] if side else []
    if not isinstance(side, list | tuple) or not all(side):
        raise ValueError(f"{where} should be token ids, not {side!r:.60}.")
    return distinct([_numbers(one, where) for one in side])


def _unpadded(row: tuple[int, ...], mask: tuple[int, ...], prompt: int) -> tuple[int, ...]:
    kept = [i for i, real in enumerate(mask) if real]
    if kept and len(kept) != kept[-1] + 1 - kept[0]:
        raise ValueError(f"the attention mask of prompt {prompt} has gaps; padding belongs on one side.")
    return tuple(row[i] for i in kept)
