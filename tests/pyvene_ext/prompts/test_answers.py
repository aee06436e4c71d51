"""Answers of prompts: their texts, their tokens, and what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.sets import Prompt, PromptSet
from pyvene_ext.prompts.tokenized import AnswerTokens, TokenizedPrompts, answer_pairs
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer

FRANCE = "The capital of France is"
TEXTS = [FRANCE, "The capital of Italy is", "Paris: Rome the city of light Lyon"]
WORDS = word_tokenizer(TEXTS, bos=True)
IDS = WORDS.get_vocab()


def tokenized(*prompts: Prompt, **options: Any) -> TokenizedPrompts:
    return PromptSet(prompts, name="mine").tokenize(options.pop("tokenizer", WORDS), **options)


@pytest.mark.parametrize(
    ("text", "answer", "appended"),
    [
        (FRANCE, "Paris", " Paris"),
        (FRANCE, " Paris", " Paris"),
        (FRANCE, "'s", "'s"),
        ("2 + 2 =", "4", "4"),
        ("In 20", "24", " 24"),
        ("Столица Франции", "Париж", " Париж"),
        ("Die Antwort: ", "Paris", "Paris"),
        ("法国的首都是", "巴黎", "巴黎"),
        ("The capital is", "巴黎", "巴黎"),
        ("", "Paris", "Paris"),
    ],
)
def test_a_space_separates_an_answer_from_a_word_of_a_script_with_case(text: str, answer: str, appended: str) -> None:
    assert Prompt(text, answer).answers() == ((appended,), ())
    assert Prompt(text, [answer, "!"], [answer + "s"]).answers() == ((appended, "!"), (appended + "s",))


def test_names_give_the_answers_unless_there_are_others() -> None:
    names = {"io_name": "Lisa", "s_name": "Mark"}
    assert Prompt("Mark met Lisa.", **names).answers() == ((" Lisa",), (" Mark",))
    assert Prompt("Mark met Lisa.", **names, io_token=" to Lisa").answers() == ((" to Lisa",), (" to Mark",))
    assert Prompt("Mark met Lisa.", "her", **names).answers() == (("her",), (" Mark",))
    assert Prompt("Mark met Lisa.", io_name="Lisa").answers() == ((" Lisa",), ())


def test_the_corrupt_text_has_the_same_answers_unless_it_has_its_own() -> None:
    corrupt = "The capital of Italy is"
    same = Prompt(FRANCE, "Paris", "Rome", corrupt)
    own = Prompt(FRANCE, "Paris", "Rome", corrupt, corrupt_answer="Rome", corrupt_wrong="Paris")
    assert same.answers("corrupt") == same.answers() == ((" Paris",), (" Rome",))
    assert own.answers("corrupt") == ((" Rome",), (" Paris",)) and own.answers() == same.answers()
    assert Prompt(FRANCE, "Paris", corrupt=corrupt + ":").answers("corrupt") == (("Paris",), ())
    assert tokenized(own, text="corrupt").answer_ids == ((IDS["Rome"], IDS["Paris"]),)


def test_a_place_is_missed_only_when_someone_asks_for_it() -> None:
    prompts = tokenized(Prompt(FRANCE, io_name="Paris", s_name="Rome", positions={"country": "France", "second": 1}))
    assert prompts.answer_ids == ((IDS["Paris"], IDS["Rome"]),)
    assert [token_indices(prompts, 0, name) for name in ("country", "second")] == [[4], [1]]
    with pytest.raises(ValueError, match="prompt 0 has no position 's1'; choose among country, end, last, second"):
        token_indices(prompts, 0, "s1")
    free = Prompt(FRANCE, "Paris", "Rome", positions={"subject": "capital"})
    assert tokenized(free).positions[0]["subject"] == -4


@pytest.mark.parametrize("place", [-7, 6])
def test_a_token_beyond_the_prompt_is_refused(place: int) -> None:
    with pytest.raises(ValueError, match=f"prompt 0 of mine .*: position 'x' is token {place}, but there are 6 tokens"):
        tokenized(Prompt(FRANCE, positions={"x": place}))


def test_every_answer_keeps_all_its_tokens() -> None:
    prompts = tokenized(
        Prompt(FRANCE, ["Paris", "the city of light"], ["Rome", "Lyon"]),
        Prompt("The capital of Italy is", "Rome", "Rome Lyon"),
        Prompt("The capital"),
        Prompt(FRANCE, ["the city", "the", "Paris", "the"]),
    )

    def ids(text: str) -> tuple[int, ...]:
        return tuple(IDS[word] for word in text.split())

    assert prompts.answers == (
        AnswerTokens((ids("Paris"), ids("the city of light")), (ids("Rome"), ids("Lyon"))),
        AnswerTokens((ids("Rome"),), (ids("Rome Lyon"),)),
        AnswerTokens(),
        AnswerTokens((ids("the"), ids("Paris"))),  # whoever says "the city" says "the"
    )
    (batch,) = prompts.batches(4)
    by_prompt = dict(
        zip(batch.index, zip(batch.right_ids.tolist(), batch.wrong_ids.tolist(), strict=True), strict=True)
    )
    assert by_prompt == {
        0: ([IDS["Paris"], IDS["the"]], [IDS["Rome"], IDS["Lyon"]]),
        1: ([IDS["Rome"], -1], [IDS["Rome"], -1]),
        2: ([-1, -1], [-1, -1]),
        3: ([IDS["the"], IDS["Paris"]], [-1, -1]),
    }
    alone = next(prompts.take((2,)).batches(1))
    assert alone.right_ids.shape == alone.wrong_ids.shape == (1, 0)
    assert prompts.take((3, 1)).answers == (prompts.answers[3], prompts.answers[1])


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "prompt {} has 2 right and 1 wrong answers, and one of each is compared here; give it answer= and wrong="),
        (
            1,
            "the answers of prompt {} begin with the same token .* tokenize.answers='first_difference'., .* 'answer_logprob_d",
        ),
        (2, "prompt {} has 0 right and 0 wrong answers"),
        (3, "prompt {} has 1 right and 0 wrong answers"),
    ],
)
def test_whoever_compares_two_tokens_names_the_prompt_without_them(which: int, message: str) -> None:
    own = (
        Prompt(FRANCE, ["Paris", "Lyon"], "Rome"),
        Prompt(FRANCE, "Rome", "Rome Lyon"),
        Prompt(FRANCE),
        Prompt(FRANCE, "Paris"),
    )
    prompts = tokenized(Prompt(FRANCE, "Paris", "Rome"), own[which])
    with pytest.raises(ValueError, match=message.format(1)):
        prompts.answer_ids  # noqa: B018
    with pytest.raises(ValueError, match=message.format(1)):
        next(prompts.batches(2)).answer_ids  # noqa: B018
    assert next(prompts.batches(1)).answer_ids.tolist() == [[IDS["Paris"], IDS["Rome"]]]
    assert prompts.with_answer_ids(((3, 4), (5, 6))).answer_ids == ((3, 4), (5, 6))
    assert TokenizedPrompts(prompts.input_ids, answer_pairs(((3, 4), (5, 6)))).answer_ids == ((3, 4), (5, 6))


def test_first_difference_appends_what_all_answers_share() -> None:
    several = Prompt(FRANCE, ["the city of light", "the city of Rome"], "the city Lyon")
    prompts = tokenized(several, Prompt(FRANCE, ["the city", "the Rome"]), answers="first_difference")
    text = WORDS(FRANCE)["input_ids"]
    assert prompts.input_ids == ((*text, IDS["the"], IDS["city"]), tuple(text))
    assert prompts.answers[0] == (((IDS["of"], IDS["light"]), (IDS["of"], IDS["Rome"])), ((IDS["Lyon"],),))
    assert len(prompts.answers[1].right) == 2, "nothing is wrong, so that nothing has to be told apart"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (Prompt(FRANCE, "Rome", "Rome Lyon"), {"answers": "first_difference"}, "no token tells them apart"),
        (Prompt(FRANCE, "Paris", " "), {}, "the answer ' ' has no tokens"),
        (Prompt(FRANCE + ":", "Paris", " Paris"), {}, "'Paris' is both a right and a wrong answer"),
        (Prompt(FRANCE, "Oslo"), {}, "does not know 'Oslo'"),
        (Prompt("b ", "b"), {"tokenizer": bpe_tokenizer(["a b b"] * 5, 270)}, "merges with the end .* and no space"),
    ],
)
def test_an_answer_that_no_token_can_be_is_refused_by_name(prompt: Prompt, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^prompt 0 of mine .*{message}") as error:
        tokenized(prompt, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "there is no field 'text'; give the text of the prompt"),
        ({"prompt": "a", "answer": "b"}, "there is no field 'text' among prompt, answer; give the text of the prompt"),
        ({"text": 3}, "text: [37] should be a text, or a list of chat messages"),
        ({"text": FRANCE, "answer": []}, r"answer: \[\] should be a text or several, none of them empty"),
        ({"text": FRANCE, "answer": 5}, "answer: 5 should be a text or several"),
        ({"text": FRANCE, "answer": "Rome", "wrong": ["Lyon", "Rome"]}, "'Rome' is both a right and a wrong answer"),
        ({"text": FRANCE, "answer": "Rome", "wrong": " Rome"}, "'Rome' is both a right and a wrong answer"),
        ({"text": FRANCE, "io_token": " Rome"}, "io_token ' Rome' must end with io_name None"),
        ({"text": FRANCE, "answr": "Rome"}, "unknown field 'answr'; did you mean 'answer'"),
        ({"clen": FRANCE}, "unknown field 'clen'; did you mean 'clean'"),
        ({"text": FRANCE, "positions": {"all": 3}}, "position 'all' has a built-in meaning"),
        ({"text": FRANCE, "positions": {"x": "Spain"}}, "position 'x': 'Spain' must occur exactly once in the text"),
        (
            {"text": FRANCE, "positions": {"x": True}},
            r"positions\.x: True should be a substring, \[start, end\) in characters, or the index of a token",
        ),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said_in_one_sentence(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Prompt(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_what_was_given_is_saved(tmp_path: Path, name: str) -> None:
    prompts = PromptSet(
        (
            Prompt(FRANCE, "Paris", ["Rome", "Lyon"], positions={"first": 0, "country": "France", "the": (0, 3)}),
            Prompt(clean=FRANCE, io_name="Paris", s_name="Rome"),
            Prompt(FRANCE),
        )
    )
    prompts.save(tmp_path / name)
    again = PromptSet.load(tmp_path / name)
    assert again.prompts == prompts.prompts and again.hash == prompts.hash
    assert '"answer": "Paris"' in (tmp_path / name).read_text() and "io_token" not in (tmp_path / name).read_text()
    assert repr(again[1]) == f"Prompt(text={FRANCE!r}, io_name='Paris', s_name='Rome')"


def test_the_hash_of_a_set_of_names_is_that_of_version_0_1() -> None:
    assert PromptSet.load("ioi_en").hash == "6acb214724d58b5313f07fc8df29f53f"
