"""Tokenised prompts: answers in context, token positions, batches of unequal lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import card_of, n_positions
from pyvene_ext.io.hashes import data_hash

Answers = Literal["first_token", "first_difference"]
PaddingSide = Literal["left", "right"]


class AnswerTexts(NamedTuple):
    """The answers of one prompt as they are appended to its text.

    Attributes:
        right: the right answers, any of which counts.
        wrong: the wrong ones.
    """

    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


class AnswerTokens(NamedTuple):
    """The answers of one prompt, as the tokens that follow it.

    Attributes:
        right: the token ids of every right answer, any of which counts.
        wrong: those of every wrong answer.
    """

    right: tuple[tuple[int, ...], ...] = ()
    wrong: tuple[tuple[int, ...], ...] = ()

    def first_ids(self, prompt: int) -> tuple[int, int]:
        """The first token of the only right and of the only wrong answer.

        Args:
            prompt: the prompt's index, for messages.

        Returns:
            Both ids, which may be equal.

        Raises:
            ValueError: there is not exactly one of each.
        """
        if len(self.right) != 1 or len(self.wrong) != 1:
            raise ValueError(
                f"prompt {prompt} has {len(self.right)} right and {len(self.wrong)} wrong answers, and one of each is compared "
                "here; give it answer= and wrong=."
            )
        return self.right[0][0], self.wrong[0][0]


def answer_pairs(pairs: Iterable[tuple[int, int]]) -> tuple[AnswerTokens, ...]:
    """Make answers of single tokens.

    Args:
        pairs: for every prompt the right token and the wrong one.

    Returns:
        The answers of every prompt.
    """
    return tuple(AnswerTokens(((right,),), ((wrong,),)) for right, wrong in pairs)


def check_first_ids(right: int, wrong: int, prompt: int) -> tuple[int, int]:
    """Check that one token tells two answers apart.

    Args:
        right: the first token of the right answer.
        wrong: the first token of the wrong one.
        prompt: the prompt's index.

    Returns:
        Both tokens.

    Raises:
        ValueError: they are the same.
    """
    if right == wrong:
        raise ValueError(
            f"the answers of prompt {prompt} begin with the same token (id {right}), which cannot tell them apart; use "
            "tokenize(answers='first_difference'), the metric 'answer_logprob_diff', or other answers."
        )
    return right, wrong


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
            answers=tuple(self.answers[i] for i in which),
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
            right_ids=_first_tokens([self.answers[i].right for i in which]),
            wrong_ids=_first_tokens([self.answers[i].wrong for i in which]),
            positions={name: [self.positions[i][name] for i in which] for name in self._shared_names},
            index=list(which),
            lengths=list(map(len, rows)),
            padding_side=padding_side,
        )

    @cached_property
    def _shared_names(self) -> list[str]:
        return [name for name in self.positions[0] if all(name in places for places in self.positions)]


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


def _first_tokens(answers: Sequence[tuple[tuple[int, ...], ...]]) -> Int[Tensor, "batch some"]:
    """The first tokens of each prompt's answers, each once, filled up with -1."""
    rows = [list(dict.fromkeys(answer[0] for answer in own)) for own in answers]
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), width)


class TokenizedPrompt(NamedTuple):
    """One row of `TokenizedPrompts`."""

    input_ids: tuple[int, ...]
    answers: AnswerTokens
    positions: dict[str, int]


def collect(rows: Iterable[TokenizedPrompt], tokenizer: PreTrainedTokenizerBase) -> TokenizedPrompts:
    """Make a tokenised set of one or more rows."""
    ids, answers, positions = zip(*rows, strict=True)
    return TokenizedPrompts(ids, answers, positions, pad_id(tokenizer))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills batches: the padding token, or else the end token, or else token 0."""
    return next(pad for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if pad is not None)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer_texts: AnswerTexts,
    places: Mapping[str, tuple[int, int] | int],
    answers: Answers,
    max_length: int | None,
    where: str,
) -> TokenizedPrompt:
    """Tokenise one prompt as `PromptSet.tokenize` describes.

    Args:
        tokenizer: a fast one.
        text: the prompt.
        answer_texts: its answers as they are appended to it.
        places: its named positions: `[start, end)` in characters, or a token index, negative from the last token.
        answers: "first_token" or "first_difference".
        max_length: the most tokens that it may have.
        where: what messages call it.

    Returns:
        Its token ids, answers and positions.

    Raises:
        ValueError: a word that the tokenizer does not know, an answer that merges with the end of the prompt, a right answer of
            the same tokens as a wrong one, answers that no token tells apart (with "first_difference"), a position without a
            token, or a prompt that is empty or too long.
    """
    ids, offsets = encode(tokenizer, text, where)
    right, wrong = (
        _distinct([_continuation(tokenizer, text, ids, answer, where) for answer in some]) for some in answer_texts
    )
    if same := set(right) & set(wrong):
        raise ValueError(
            f"{where}: {tokenizer.decode(list(same.pop()))!r} is both a right and a wrong answer; use different answers."
        )
    if answers == "first_difference" and right and wrong:
        several = (*right, *wrong)
        differ = (place for place, tokens in enumerate(zip(*several, strict=False)) if len(set(tokens)) > 1)
        shared = next(differ, min(map(len, several)))
        ids = ids + list(right[0][:shared])
        right, wrong = (tuple(answer[shared:] for answer in some) for some in (right, wrong))
        if not all((*right, *wrong)):
            raise ValueError(
                f"{where}: the tokens of one of the answers {', '.join(map(repr, sum(answer_texts, ())))} begin all others, so "
                "that no token tells them apart; use other answers, or the metric 'answer_logprob_diff'."
            )
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"{where} has {len(ids)} tokens but the model takes {max_length}; shorten it, or use another model."
        )
    positions = {"end": -1, "last": -1}
    for name, place in places.items():
        if isinstance(place, int):
            if not -len(ids) <= place < len(ids):
                raise ValueError(f"{where}: position {name!r} is token {place}, but there are {len(ids)} tokens.")
            positions[name] = place % len(ids) - len(ids)
            continue
        held = tokens_in_span(offsets, *place)
        if not held:
            raise ValueError(f"{where}: no token holds {text[slice(*place)]!r}, the place {name!r}.")
        positions[name] = held[-1] - len(ids)
    return TokenizedPrompt(tuple(ids), AnswerTokens(right, wrong), positions)


def _distinct(answers: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Drop answers that repeat or continue another one: whoever gives them has given that one."""
    whole = list(dict.fromkeys(map(tuple, answers)))
    return tuple(one for one in whole if not any(one != other and one[: len(other)] == other for other in whole))


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
            "the prompt with a whole word and no space, or let the answer begin with a space."
        )
    if len(longer) == len(ids):
        raise ValueError(f"{where}: the answer {answer!r} has no tokens; give it some text.")
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
