"""Tags of the words of a problem, and of tokens however they cut words."""

from __future__ import annotations

from itertools import groupby

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pyvene_ext.prompts.token_tags import spans_of, tag_tokens, tags_of
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer
from tests.saved_models import shipped_tokenizer

DUCKS = "Janet’s ducks lay 16 eggs per day; an Egg costs $2,000.50. Ann eats three of Janet's."


def tagged(text: str, tag: str) -> list[str]:
    runs = groupby(zip(text, tags_of(text), strict=True), key=lambda pair: pair[1])
    return ["".join(character for character, _ in run) for found, run in runs if found == tag]


@pytest.mark.parametrize(
    ("text", "numbers", "operators", "entities"),
    [
        (DUCKS, ["16", "2,000.50", "three"], [], ["Janet", "eggs", "Egg", "Ann", "Janet"]),
        ("<<6+5=11>> 16 - 3*4/2 = 10%", ["6", "5", "11", "16", "3", "4", "2", "10"],
         ["+", "=", "-", "*", "/", "=", "%"], []),
        ("a six-pack at 5 km/h, twenty-five oneself", ["six", "5", "twenty", "five"], [], ["km", "oneself"]),
        ("Question: How many 3 of 7   red cars did She see?\nAnswer: 4\nReds", ["3", "7", "4"], [], ["red", "Reds"]),
        ("7, pens. 8 pen", ["7,", "8"], [], ["pens", "pen"]),
        ("3 eggs: an egg breaks. Two more", ["3", "Two"], [], ["eggs", "egg"]),
        ("", [], [], []),
    ],
)  # fmt: skip
def test_words_are_tagged_by_simple_rules(
    text: str, numbers: list[str], operators: list[str], entities: list[str]
) -> None:
    assert tagged(text, "number") == numbers
    assert tagged(text, "operator") == operators
    assert tagged(text, "entity") == entities


def test_tokens_of_the_shipped_models_are_words() -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer("Kevin has 6 cakes. <<6+5=11>>")["input_ids"]
    tags, texts = tag_tokens(ids, tokenizer)
    assert [(text.strip(), tag) for text, tag in zip(texts, tags, strict=True)] == [
        ("", "other"), ("Kevin", "entity"), ("has", "other"), ("6", "number"), ("cakes", "entity"), (".", "other"),
        ("<<", "other"), ("6", "number"), ("+", "operator"), ("5", "number"), ("=", "operator"), ("11", "number"),
        (">>", "other"),
    ]  # fmt: skip


def test_parts_of_a_word_have_its_tag_and_parts_of_a_character_that_character() -> None:
    tokenizer = bpe_tokenizer(["egg"], vocab_size=262)
    ids = tokenizer(DUCKS)["input_ids"]
    text, spans = spans_of(ids, tokenizer)
    assert text == DUCKS and len(ids) > 60
    tags, texts = tag_tokens(ids, tokenizer)
    by_character = tags_of(DUCKS)
    quote = DUCKS.index("’")
    assert spans[quote : quote + 3] == [(quote, quote + 1)] * 3 and texts[quote : quote + 3] == ["’"] * 3
    for (start, end), tag in zip(spans, tags, strict=True):
        assert start < end and tag in by_character[start:end]
    assert [tags[i] for i, (start, _) in enumerate(spans) if start < 5] == ["entity"] * 5


def test_a_token_of_several_kinds_has_the_first_of_them() -> None:
    words = Tokenizer(models.WordLevel({"x=4": 0, "+x": 1, "Anna,": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tags, texts = tag_tokens(tokenizer("x=4 +x Anna,")["input_ids"], tokenizer)
    assert list(zip(texts, tags, strict=True)) == [("x=4", "number"), (" +x", "operator"), (" Anna,", "entity")]
