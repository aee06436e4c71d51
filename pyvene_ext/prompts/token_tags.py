"""What the tokens of a word problem stand for: numbers, operators, entities, and the rest.

Tags are of characters, so that a token has the same tag however the tokenizer cuts words; of a token with characters of several
kinds the first of these counts:

    number     digits, with the commas and the point inside; or a number word (two, twenty, hundred ...)
    operator   one of + - * / = and their like, unless between two letters ("six-pack", "km/h")
    entity     what the problem names: a capitalised word, or a word behind a number ("6 cakes"), and that word again wherever it
               stands, with or without an s at its end; in both cases but for words that say nothing (`PLAIN`)
    other      everything else

No dictionary, no parser: in "6 red cakes" the entity is red, and a capitalised word at the beginning of a sentence counts unless
it is in `PLAIN`. Only English is known.
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
    """The tag of every character."""
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
    """What tokens say, special ones left out, and which characters each stands for; none for a special one."""
    text, spans = "", []
    for count in range(1, len(ids) + 1):
        longer = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        # Bytes that are no whole character yet read as U+FFFD; the character belongs to all tokens with bytes of it.
        spans.append((len(text.rstrip("\ufffd")), len(longer)))
        text = longer
    return text, spans


def tag_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tag], list[str]]:
    """The tag of every token, and its text."""
    text, spans = spans_of(ids, tokenizer)
    tags = tags_of(text)
    of_tokens: list[Tag] = [min(tags[start:end], key=TAGS.index, default="other") for start, end in spans]
    return of_tokens, [text[start:end] for start, end in spans]
