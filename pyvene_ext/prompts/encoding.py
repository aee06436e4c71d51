"""Texts and their answers as tokens: answers in context, named positions, chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.errors import counted

Answers = Literal["first_token", "first_difference"]
RESERVED_POSITIONS = ("all", "end", "last")


# -- answers -----------------------------------------------------------------------------------------------------------


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


def same_first_token(prompt: int, token: int) -> ValueError:
    """The error for a right and a wrong answer of a prompt that begin with the same token."""
    return ValueError(
        f"the answers of prompt {prompt} begin with the same token (id {token}), which cannot tell them apart; use "
        "tokenize(answers='first_difference'), the metric 'answer_logprob_diff', or other answers."
    )


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
        raise same_first_token(prompt, right)
    return right, wrong


def first_tokens(answers: Sequence[tuple[tuple[int, ...], ...]]) -> Int[Tensor, "batch some"]:
    """Collect the first tokens of each prompt's answers.

    Args:
        answers: the tokens of the answers of every prompt.

    Returns:
        The first tokens of each prompt's answers, each once, filled up with -1.
    """
    rows = [list(dict.fromkeys(answer[0] for answer in own)) for own in answers]
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), width)


def distinct(answers: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Drop answers that repeat or extend another one, whose probability includes theirs.

    Args:
        answers: their tokens.

    Returns:
        The others, in order.
    """
    whole = list(dict.fromkeys(map(tuple, answers)))
    return tuple(one for one in whole if not any(one != other and one[: len(other)] == other for other in whole))


# -- one prompt --------------------------------------------------------------------------------------------------------


class TokenizedPrompt(NamedTuple):
    """One row of `TokenizedPrompts`."""

    input_ids: tuple[int, ...]
    answers: AnswerTokens
    positions: dict[str, int]


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
    *,
    chat: bool = False,
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
        chat: the text comes from a chat template (`encode`).

    Returns:
        Its token ids, answers and positions.

    Raises:
        ValueError: a word that the tokenizer does not know, an answer that merges with the end of the prompt, a right answer of
            the same tokens as a wrong one, answers that no token tells apart (with "first_difference"), a position without a
            token, or a prompt that is empty or too long.
    """
    ids, offsets = encode(tokenizer, text, where, chat=chat)
    right, wrong = (
        distinct([_continuation(tokenizer, text, ids, answer, where, chat) for answer in some]) for some in answer_texts
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


class Encoded(NamedTuple):
    """Token ids of a text, and `[start, end)` in characters of each token."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def encode(tokenizer: PreTrainedTokenizerBase, string: str, where: str, *, chat: bool = False) -> Encoded:
    """Tokenise a text with its leading special tokens but without those that the tokenizer appends.

    Args:
        tokenizer: a fast one.
        string: the text.
        where: what messages call it.
        chat: the text comes from a chat template, which writes the special tokens itself, so that none are added.

    Returns:
        Ids and character offsets.

    Raises:
        ValueError: no tokens, a start token written out in the text, or a word that the tokenizer does not know.
    """
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a character at {error.start}, which no tokenizer reads; write it whole."
        ) from None
    encoding = tokenizer(
        string, add_special_tokens=not chat, return_offsets_mapping=True, return_special_tokens_mask=True
    )
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
    if unknown := list(dict.fromkeys(word for word in words if word and word != tokenizer.unk_token)):
        more = f" and {counted(len(unknown) - 10, 'other')}" if len(unknown) > 10 else ""
        raise ValueError(
            f"{where}: the tokenizer does not know {', '.join(map(repr, unknown[:10]))}{more}; use words of its vocabulary "
            "(docs/prompts.md says which prompts a shipped model knows), or another model."
        )
    return Encoded(ids, offsets)


def _continuation(
    tokenizer: PreTrainedTokenizerBase, string: str, ids: list[int], answer: str, where: str, chat: bool
) -> list[int]:
    """The tokens that `answer` adds to a prompt."""
    longer = encode(tokenizer, string + answer, where, chat=chat).ids
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


def render_chat(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Turn chat messages into text by the tokenizer's chat template.

    Args:
        messages: each with "role" and "content"; a last one of the assistant's is continued, else the assistant's turn begins.
        tokenizer: the model's.

    Returns:
        The text with its special tokens, so that none are to be added.

    Raises:
        ValueError: there is no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; give plain text, or use an instruct model.")
    goes_on = messages[-1]["role"] == "assistant"
    try:
        text = str(
            tokenizer.apply_chat_template(
                list(map(dict, messages)),
                tokenize=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
            )
        )
        text.encode()  # a template may write half a character
        return text
    except Exception as error:  # a template is a sandboxed program, which may fail in any way
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"the tokenizer's chat template fails ({reason}); give other messages, or plain text."
        ) from None
