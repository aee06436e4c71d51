"""Tag the tokens of a word problem as numbers, operators, entities, or other.

Characters are tagged, so that tags do not depend on how the tokenizer splits words; a token with characters of several kinds gets
the first of these:

    number     digits, with commas and a point between them; or a number word (two, twenty, hundred ...)
    operator   one of + - * / = and the like, unless between two letters ("six-pack", "km/h")
    entity     a thing in the problem: a capitalised word, or a word after a number ("6 cakes") and its other occurrences, with or
               without a final s; function words (`PLAIN`) are never entities
    other      everything else

There is no dictionary and no parser: in "6 red cakes" the entity is red, and a capitalised word that begins a sentence counts
unless it is in `PLAIN`. English only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

Tag = Literal["number", "operator", "entity", "other"]
TAGS: tuple[Tag, ...] = get_args(Tag)
Span = tuple[int, int]

WORD = re.compile(r"[^\W\d_]+")
NUMBER_WORDS = WORD.findall(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million"
)
PLAIN = frozenset(
    WORD.findall(
        "a about after all also an and another answer are as at be because before but by can did do does each every for from "
        "had has have he her here him his how i if in is it its left less let many more most much no not now of off on or other "
        "out over per question she so some step than that the their them then there these they this those times to together "
        "total up was we were what when where which while who whose why will with would you your"
    )
)
NUMBER = re.compile(rf"\d[\d,]*(?:\.\d+)?|\b(?:{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
OPERATOR = re.compile(r"(?<![^\W\d_])[-+*/=×÷−^%]|[-+*/=×÷−^%](?![^\W\d_])")


def tags_of(text: str) -> list[Tag]:
    """Tag every character of a text.

    Args:
        text: the text.

    Returns:
        One tag per character.
    """
    things = set()
    for number in NUMBER.finditer(text):
        word = WORD.match(text, number.end() + len(text[number.end() :]) - len(text[number.end() :].lstrip(" ")))
        if word and word.group().lower() not in PLAIN:
            things.add(_stem(word.group()))
    tags: list[Tag] = ["other"] * len(text)
    for word in WORD.finditer(text):
        name = word.group()[0].isupper() and word.group().lower() not in PLAIN
        if name or _stem(word.group()) in things:
            tags[word.start() : word.end()] = ["entity"] * len(word.group())
    for pattern, tag in ((OPERATOR, "operator"), (NUMBER, "number")):
        for found in pattern.finditer(text):
            tags[found.start() : found.end()] = [tag] * len(found.group())  # type: ignore[list-item]
    return tags


def _stem(word: str) -> str:
    return word.lower().removesuffix("s")


def spans_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Decode tokens and locate each in the text.

    Args:
        ids: the tokens.
        tokenizer: the model's tokenizer.

    Returns:
        The text without special tokens, and `[start, end)` in characters of each token; empty for a special one.
    """
    text, spans = "", []
    for count in range(1, len(ids) + 1):
        longer = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        # Bytes of an incomplete character decode to U+FFFD; the character belongs to every token with bytes of it.
        spans.append((len(text.rstrip("\ufffd")), len(longer)))
        text = longer
    return text, spans


def tag_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tag], list[str]]:
    """Tag every token.

    Args:
        ids: the tokens.
        tokenizer: the model's tokenizer.

    Returns:
        Each token's tag, and each token's text.
    """
    text, spans = spans_of(ids, tokenizer)
    tags = tags_of(text)
    of_tokens: list[Tag] = [min(tags[start:end], key=TAGS.index, default="other") for start, end in spans]
    return of_tokens, [text[start:end] for start, end in spans]
