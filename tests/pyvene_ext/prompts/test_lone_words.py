"""Prompts for one word of a translation where no two translations agree up to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvene_ext.prompts.parallel import SentencePair, filter_pairs, load_pairs, lone_word_prompts, swap_neighbours
from pyvene_ext.prompts.shipped import PROMPTS
from tests.pyvene_ext.tokenizers_for_tests import word_tokenizer

EN_FR = ("en", "fr")
PAIRS = [
    SentencePair("the cat sees a dog", "le chat voit un chien"),
    SentencePair("my house is big", "ma maison est grande"),
    SentencePair("we drink water", "nous buvons de eau"),
    SentencePair("she sings", "elle chante"),
]
WORDS = word_tokenizer([f"EN: {pair.source} FR: {pair.target}" for pair in PAIRS], bos=True)


def texts(prompts) -> list[str]:  # type: ignore[no-untyped-def]
    return [WORDS.decode(list(ids)).removeprefix("<bos>").strip().replace(" :", ":") for ids in prompts.input_ids]


def test_every_sentence_is_asked_for_its_own_word() -> None:
    asked = lone_word_prompts(WORDS, PAIRS, EN_FR, 1)
    assert not asked.in_couples and asked.words == ("chat", "maison", "buvons", "chante") and not asked.dropped
    assert [WORDS.convert_ids_to_tokens(row.right[0][0]) for row in asked.plus.answers] == list(asked.words)
    assert texts(asked.plus)[1] == "EN: my house is big FR: ma"
    assert texts(asked.minus["label"])[1] == "EN: my house is big EN: ma"
    # The other sentence is the one whose translation the control of translation heads puts there.
    control = {pair.target: pair.source for pair in swap_neighbours(PAIRS, WORDS)}
    for pair, text, ids, places in zip(
        PAIRS, texts(asked.minus["source"]), asked.plus.input_ids, asked.plus.positions, strict=True
    ):
        assert text == f"EN: {control[pair.target]} FR: {pair.target.split()[0]}"
        assert control[pair.target] != pair.source
        assert WORDS.decode(list(ids[places["source_first"] : places["source"] + 1])).strip() == pair.source
    third = lone_word_prompts(WORDS, PAIRS, EN_FR, 2)
    assert third.words == ("voit", "est", "de") and third.dropped == {"no word 2 in the translation": 1}
    both = asked.first(3) + third
    assert both.words == (*asked.words[:3], *third.words) and not both.in_couples


def test_rivals_become_the_wrong_answers_everywhere() -> None:
    asked = lone_word_prompts(WORDS, PAIRS, EN_FR, 1).with_rivals([1, 2, 1, 2])
    own = WORDS.convert_tokens_to_ids(list(asked.words))
    for prompts in (asked.plus, *asked.minus.values()):
        assert [tuple(ids) for ids in prompts.answer_ids] == list(zip(own, (1, 2, 1, 2), strict=True))


def test_a_word_that_the_other_sentence_asks_for_too_tells_nothing() -> None:
    pairs = [PAIRS[0], SentencePair("the cat is here", "le chat est ici"), *PAIRS[1:3]]
    tokenizer = word_tokenizer([f"EN: {pair.source} FR: {pair.target}" for pair in pairs])
    asked = lone_word_prompts(tokenizer, pairs[:2], EN_FR, 2)
    assert asked.words == ("voit", "est")
    with pytest.raises(
        ValueError, match=r"no pair of 2 can be asked for word 1 \(another sentence of similar length asks"
    ):
        lone_word_prompts(tokenizer, pairs[:2], EN_FR, 1)
    with pytest.raises(ValueError, match="cannot be -1"):  # which would be the last word of each
        lone_word_prompts(WORDS, PAIRS, EN_FR, -1)
    with pytest.raises(ValueError, match="no word 9 in the translation: 2"):
        lone_word_prompts(tokenizer, pairs[:2], EN_FR, 9)


def test_the_length_difference_is_chosen() -> None:
    pairs = [SentencePair("a b c", "d e f"), SentencePair("a b c", "d e f d e f d e f")]
    tokenizer = word_tokenizer(["a b c d e f"])
    assert len(filter_pairs(pairs, tokenizer)[0]) == 1
    assert filter_pairs(pairs, tokenizer)[1] == {"lengths differ by more than 5 tokens": 1}
    assert len(filter_pairs(pairs, tokenizer, 6)[0]) == 2
    assert filter_pairs(pairs, tokenizer, 2)[1] == {"lengths differ by more than 2 tokens": 1}


def test_plain_sentences_ship_in_two_languages() -> None:
    pairs = load_pairs(Path(PROMPTS) / "sentences.tsv", EN_FR)
    assert len(pairs) == len(set(pairs)) == len({pair.target for pair in pairs}) == 64
    everything = " ".join(pair.source + pair.target for pair in pairs)
    kept, dropped = filter_pairs(pairs, word_tokenizer([everything]))
    assert len(kept) == 64 and not dropped
