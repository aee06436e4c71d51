"""Parallel text: files and their faults, the published filters, the control, labels by characters, and prompts for one word."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pyvene_ext.models.loading import TINY_FOLDER
from pyvene_ext.prompts.parallel import (
    SentencePair,
    check_template,
    filter_pairs,
    load_pairs,
    parse_languages,
    render,
    swap_neighbours,
    tokenize_pairs,
    tokenize_texts,
    word_prompts,
    word_spans,
)
from pyvene_ext.prompts.tokenized import AnswerTokens
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer

EN_FR = ("en", "fr")
WORDS = AutoTokenizer.from_pretrained(TINY_FOLDER / "tiny-gemma2")  # a token a word, behind a start token
CAT = SentencePair("the cat sees the dog.", "le chat voit le chien.")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- files -------------------------------------------------------------------------------------------------------------


def test_tsv_and_jsonl_give_the_same_pairs_in_either_direction(tmp_path: Path) -> None:
    tsv = write(tmp_path / "a.tsv", "en\tde\tfr\r\na b\tx\tc d\r\n\r\ne\tx\tf\r\ng\tx\t\r\n")
    rows = [{"en": "a b", "fr": "c d"}, {"translation": {"en": "e", "fr": "f"}}, {"en": "g", "fr": " "}]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    for path in (tsv, jsonl):
        assert load_pairs(path, EN_FR) == [("a b", "c d"), ("e", "f"), ("g", "")]
        assert load_pairs(path, ("fr", "en")) == [("c d", "a b"), ("f", "e"), ("", "g")]
    assert load_pairs(tsv, ("fr", "de")) == [("c d", "x"), ("f", "x"), ("", "x")]  # a pair without English


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "en\tfr\na\tb\nc\td\te\n", "a.tsv, line 3 has 3 columns but the first line names 2"),
        ("a.tsv", "en\tfr\na\tb\nc\n", "a.tsv, line 3 has 1 columns"),
        ("a.tsv", "en\tde\na\tb\n", "a.tsv, line 2 has no text in 'fr'; it has 'en', 'de'"),
        ("a.tsv", "en\tfr\n", "a.tsv holds no sentences in en and fr"),
        ("a.tsv", "en\tfr\na\t \n\tb\n", "a.tsv holds no sentences in en and fr"),
        ("a.tsv", "", "a.tsv holds no sentences"),
        ("a.jsonl", '{"en": "a", "fr": "b"}\n{"en": "a"\n', "a.jsonl, line 2 is not one JSON object"),
        ("a.jsonl", '["a", "b"]\n', "a.jsonl, line 1: should be an object"),
        ("a.jsonl", '{"en": "a", "fr": 3}\n', "a.jsonl, line 1 has no text in 'fr'"),
        ("a.csv", "en,fr\n", "give a .tsv or a .jsonl file"),
    ],
)
def test_a_file_that_is_no_parallel_text_is_one_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(write(tmp_path / name, text), EN_FR)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_pairs(tmp_path / "none.tsv", EN_FR)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_pairs("./none/such/thing", EN_FR)
    (tmp_path / "a.tsv").write_bytes(b"en\tfr\n\xff\tb\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_pairs(tmp_path / "a.tsv", EN_FR)


@pytest.mark.parametrize(
    ("languages", "split", "config", "wanted"),
    [
        (EN_FR, None, "en-fr", "train[:1000]"),
        (("fr", "de"), None, "de-fr", "test"),
        (("fr", "en"), "validation", "en-fr", "validation"),
    ],
)
def test_the_hub_is_asked_as_opus_100_is_arranged(
    monkeypatch: pytest.MonkeyPatch, languages: Any, split: Any, config: str, wanted: str
) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> Any:
        assert (args, options) == (("some/set", config), {"split": wanted})
        return [{"translation": {language: f"in {language}" for language in languages}}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_pairs("some/set", languages, split) == [tuple(f"in {language}" for language in languages)]

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no network.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match=r"cannot be loaded .* \(no network\); give a local"):
        load_pairs("some/set", languages)


@pytest.mark.parametrize("pair", ["en", "en-en", "en-fr-de", "en_", "e1-fr", "-fr"])
def test_a_pair_of_languages_is_two_codes(pair: str) -> None:
    assert parse_languages("EN-fr") == EN_FR
    with pytest.raises(ValueError, match="is not a pair of languages"):
        parse_languages(pair)


# -- filters and control -----------------------------------------------------------------------------------------------


def test_words_are_between_spaces_and_characters_in_scripts_without() -> None:
    def words(text: str) -> list[str]:
        return [text[start:end] for start, end in word_spans(text)]

    assert words("le  chat-là voit. ") == ["le", "chat-là", "voit."]
    assert words("我爱 GPT很多") == ["我", "爱", "GPT", "很", "多"]


def test_the_published_filters() -> None:
    long = " ".join(["the"] * 50)
    cases = {
        "the cat sees": "the cat sees",
        "the cat": "not 3 to 50 words",
        long: long,
        long + " the": "not 3 to 50 words",
        "the cat sees 3": "digits",
        "the cat ٣ sees": "digits",  # in any script
        **{f"the cat sees{mark}": "unwanted characters" for mark in "%-_\\/*&\u3000♪♫♬♩"},
        "the cat sees #": "the cat sees #",
    }
    for source, outcome in cases.items():
        for pair in (SentencePair(source, source), SentencePair(source, "the cat sees")):
            if source.startswith(long) and pair.target != source:
                continue
            kept, dropped = filter_pairs([pair], WORDS)
            assert (kept, dropped) == (([pair], Counter()) if outcome == source else ([], Counter({outcome: 1}))), pair
    for empty in (SentencePair("", "the cat sees"), SentencePair("the cat sees", "")):
        assert filter_pairs([empty, CAT], WORDS) == ([CAT], {"one side is empty": 1})
    # The other side counts for characters, not for words.
    assert filter_pairs([SentencePair("the cat sees", "chat 3")], WORDS)[1] == {"digits": 1}
    assert filter_pairs([SentencePair("the cat sees", "le & chat")], WORDS)[1] == {"unwanted characters": 1}
    assert filter_pairs([SentencePair("the cat sees", "chat")], WORDS)[0]
    for more, kept in ((5, 1), (6, 0)):
        pairs = [SentencePair("the cat sees", " ".join(["le"] * (3 + more)))]
        assert len(filter_pairs(pairs, WORDS)[0]) == kept
        assert len(filter_pairs([SentencePair(*pairs[0][::-1])], WORDS)[0]) == kept


def test_neighbours_in_length_swap_targets() -> None:
    targets = ["le " * n for n in (7, 1, 5, 2, 8)]
    pairs = [SentencePair(str(i), target) for i, target in enumerate(targets)]
    swapped = swap_neighbours(pairs[:4], WORDS)  # by length 1, 2 | 5, 7
    assert [pair.source for pair in swapped] == list("0123")
    assert [len(pair.target.split()) for pair in swapped] == [5, 2, 7, 1]
    swapped = swap_neighbours(pairs, WORDS)  # 1, 2 | 5, 7, 8
    assert [len(pair.target.split()) for pair in swapped] == [8, 2, 7, 1, 5]
    twins = [*pairs[:3], SentencePair("again", "le ")]  # 1, 1 | 5, 7
    assert [pair.source for pair in swap_neighbours(twins, WORDS)] == ["0", "2"]
    with pytest.raises(ValueError, match="takes two pairs or more, not 1"):
        swap_neighbours(pairs[:1], WORDS)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_the_label_is_found_by_its_place_and_a_start_token_is_left_out() -> None:
    # A sentence with the label's word in it, in both places.
    pair = SentencePair("the cat FR sees : FR", "le FR chat")
    prompts = tokenize_pairs(WORDS, [CAT, pair], EN_FR)
    tokens = [WORDS.convert_ids_to_tokens(list(ids)) for ids in prompts.input_ids]
    assert tokens[0][:3] == ["<bos>", "EN", ":"]
    for row, number, length in ((tokens[0], 9, 17), (tokens[1], 9, 14)):
        assert row[number] == "FR" and len(row) == length
    assert [places["label"] for places in prompts.positions] == [9 - 17, 9 - 14]
    assert [places["first"] for places in prompts.positions] == [1 - 17, 1 - 14]
    tokenizer = bpe_tokenizer([render(CAT, EN_FR)[0]])
    (ids,), (places,) = (getattr(tokenize_pairs(tokenizer, [CAT], EN_FR), name) for name in ("input_ids", "positions"))
    before = tokenizer.decode(ids[: places["label"]])
    assert tokenizer.decode(ids[places["label"] :]).strip().startswith("FR: le chat") and "FR" not in before
    assert places["first"] == int(ids[0] == tokenizer.bos_token_id) - len(ids)


@pytest.mark.parametrize(
    "template",
    [
        "{source_label}: {source} {target}",
        "{source_label}: {source} {target_label}: {target} {",
        "{target_label}: {target} {source_label}: {source}",
        "{source_label}: {source} {target_label}: {target} {target}",
        "{source_label}: {source} {target_label!r}: {target}",
    ],
)
def test_a_template_without_a_label_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"the template .* must hold .*target_label"):
        check_template(template)
    with pytest.raises(ValueError, match="the template"):
        tokenize_pairs(WORDS, [CAT], EN_FR, template)


def test_another_template_with_braces_in_the_sentences() -> None:
    text, (start, end) = render(
        SentencePair("a {x} b", "c }"), EN_FR, "{source} ({source_label}) = {target_label}> {target}"
    )
    assert text == "a {x} b (EN) = FR> c }" and text[start:end] == "FR"


def test_prompts_that_cannot_be_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 .*does not know 'unheard'"):
        tokenize_pairs(WORDS, [CAT, SentencePair("the unheard cat", "le chat")], EN_FR)
    with pytest.raises(ValueError, match=r"prompt 0 .*does not know 'DE'"):
        tokenize_pairs(WORDS, [CAT], ("en", "de"))
    with pytest.raises(ValueError, match=r"prompt 0 .*has 17 tokens but the model takes 16"):
        tokenize_pairs(WORDS, [CAT], EN_FR, max_length=16)


def test_a_label_that_no_token_holds_is_one_sentence() -> None:
    tokenizer = word_tokenizer([render(CAT, EN_FR)[0]], drop="FR")
    with pytest.raises(ValueError, match="no token holds the label 'FR'"):
        tokenize_pairs(tokenizer, [CAT], EN_FR)


def test_texts_by_themselves() -> None:
    prompts = tokenize_texts(WORDS, ["the cat", "a dog sees"])
    assert [WORDS.decode(list(ids)) for ids in prompts.input_ids] == ["<bos> the cat", "<bos> a dog sees"]
    assert prompts.answers == (AnswerTokens(), AnswerTokens()) and prompts.pad_id == WORDS.pad_token_id


# -- one word ----------------------------------------------------------------------------------------------------------

PAIRS = [
    CAT,
    SentencePair("the dog sees the king.", "le chien voit le roi."),
    SentencePair("a girl sees the dog.", "une fille voit le chien."),
    SentencePair("the fox helps the cow.", "le renard aide la vache."),
    SentencePair("the cat helps the cow.", "le chat aide la vache."),
    SentencePair("the red wolf helps the cow.", "le loup rouge aide la vache."),
    SentencePair("the cat", "le"),
]


def test_swaps_agree_up_to_the_word_and_differ_in_it() -> None:
    asked = word_prompts(WORDS, PAIRS, EN_FR, 1)
    texts = [WORDS.decode(list(ids)).removeprefix("<bos>").strip() for ids in asked.plus.input_ids]
    answers = [WORDS.convert_ids_to_tokens(list(ids)) for ids in asked.plus.answer_ids]
    assert asked.dropped == {"no word 1 in the translation": 1, "no other pair to swap with": 2}
    assert len(texts) == 4 and all(text.endswith("FR: le") for text in texts)
    assert [own for own, _ in answers] == list(asked.words)
    for number in range(0, 4, 2):
        assert answers[number] == answers[number + 1][::-1] and len(set(answers[number])) == 2
        for row, other in ((number, number + 1), (number + 1, number)):
            assert asked.minus["source"].input_ids[row] == asked.plus.input_ids[other]
            label = WORDS.decode(list(asked.minus["label"].input_ids[row])).removeprefix("<bos>").strip()
            assert label == texts[row].replace("FR", "EN")
            assert asked.minus["source"].answer_ids[row] == asked.plus.answer_ids[row]
            assert asked.minus["label"].answer_ids[row] == asked.plus.answer_ids[row]
    for ids, places in zip(asked.plus.input_ids, asked.plus.positions, strict=True):
        source = WORDS.decode(list(ids[places["source_first"] : places["source"] + 1]))
        assert source.strip() in [pair.source for pair in PAIRS]
    three = word_prompts(WORDS, [PAIRS[0], PAIRS[4], PAIRS[5]], EN_FR, 1)  # chat, chat and loup
    assert three.words == ("chat", "loup") and three.dropped == {"no other pair to swap with": 1}
    first = word_prompts(WORDS, PAIRS, EN_FR, 0)
    assert all(WORDS.decode(list(ids)).endswith("FR:") for ids in first.plus.input_ids)
    assert sorted(first.words) == ["le", "une"]


def test_prompts_of_several_words_are_put_together_in_whole_swaps() -> None:
    one, two = (word_prompts(WORDS, PAIRS, EN_FR, word) for word in (0, 1))
    both = one.first(3) + two
    assert both.words == one.words[:2] + two.words and both.dropped == one.dropped + two.dropped
    for mine, first, second in (
        (both.plus, one.plus, two.plus),
        *((both.minus[of], one.minus[of], two.minus[of]) for of in both.minus),
    ):
        for name in ("input_ids", "answers", "positions"):
            assert getattr(mine, name) == getattr(first, name)[:2] + getattr(second, name)
    assert len(one.first(1).words) == 0 and one.first(100) == one


def test_tokens_that_both_words_begin_with_join_the_prompt() -> None:
    pairs = [SentencePair("a b c", "x undone"), SentencePair("d e f", "x unseen")]
    tokenizer = bpe_tokenizer(["x un a un b un"])
    asked = word_prompts(tokenizer, pairs, EN_FR, 1)
    for row, (ids, (own, other)) in enumerate(zip(asked.plus.input_ids, asked.plus.answer_ids, strict=True)):
        whole = next(text for text in (render(pair, EN_FR)[0] for pair in pairs) if text.endswith(asked.words[row]))
        assert own != other
        assert whole.startswith(tokenizer.decode([*ids, own]))
        assert not whole.startswith(tokenizer.decode([*ids, other]))
        assert tokenizer.decode(list(ids)).split()[-1] == "un"


def test_no_swap_or_no_such_word_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"no two of 1 pairs can be swapped at word 1 \(no other pair to swap with: 1\)"
    ):
        word_prompts(WORDS, PAIRS[:1], EN_FR, 1)
    with pytest.raises(ValueError, match=r"no word 9 in the translation: 7"):
        word_prompts(WORDS, PAIRS, EN_FR, 9)
    with pytest.raises(ValueError, match="cannot be -1"):
        word_prompts(WORDS, PAIRS, EN_FR, -1)
    with pytest.raises(ValueError, match=r"tokens do not tell the words apart: 4.*does not know 'DE'"):
        word_prompts(WORDS, PAIRS[:2] + PAIRS[3:5], ("en", "de"), 1)
    with pytest.raises(ValueError, match="the model takes 5"):
        word_prompts(WORDS, PAIRS, EN_FR, 1, max_length=5)
