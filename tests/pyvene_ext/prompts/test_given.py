"""Prompts in the forms that users have them: lists, tables, chat messages, and token ids."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from pyvene_ext.prompts.prompt import Prompt
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import AnswerTokens, TokenizedPrompts
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer

FRANCE = "The capital of France is"
ITALY = "The capital of Italy is"
TEXTS = [f"{FRANCE} {ITALY} Paris Rome Lyon", "system user assistant: Say it."]
PROMPTS = (Prompt(FRANCE, ["Paris", "Lyon"], "Rome", positions={"country": "France"}), Prompt(ITALY, "Rome"))
FIELDS = [
    {"text": FRANCE, "answer": ["Paris", "Lyon"], "wrong": "Rome", "positions": {"country": "France"}},
    {"text": ITALY, "answer": "Rome"},
]


# --- lists, tables, data sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        PROMPTS,
        list(PROMPTS),
        iter(PROMPTS),
        FIELDS,
        [PROMPTS[0], {**FIELDS[1], "corrupt": None, "mine": 3}],
        {"pairs": FIELDS, "n_examples": 2},
        pd.DataFrame(FIELDS),
        pd.DataFrame(FIELDS).assign(corrupt=[None, np.nan], io_name=[pd.NA, pd.NA], difficulty=[0.5, np.nan]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_prompts_are_the_same_from_lists_dicts_and_tables(given: Any) -> None:
    assert PromptSet.load(given).prompts == PROMPTS


def test_a_set_is_made_of_a_list_and_a_text_is_a_prompt_without_answers() -> None:
    assert PromptSet(FIELDS) == PromptSet(PROMPTS) == PromptSet(list(PROMPTS))
    assert PromptSet([FRANCE, PROMPTS[1]], "mine").prompts == (Prompt(FRANCE), PROMPTS[1])
    assert PromptSet(datasets.Dataset.from_list([{"text": FRANCE}, {"text": ITALY}])) == PromptSet([FRANCE, ITALY])


def test_a_table_of_a_file_with_lists_is_read(tmp_path: Any) -> None:
    datasets.Dataset.from_list([{**FIELDS[0], "wrong": ["Rome"]}]).to_parquet(tmp_path / "some.parquet")
    read = pd.read_parquet(tmp_path / "some.parquet")
    assert PromptSet.load(read).prompts == (Prompt(**{**FIELDS[0], "wrong": ["Rome"]}),)


def test_a_slice_of_a_set_is_a_set() -> None:
    some = PromptSet([FRANCE, *PROMPTS], "mine", "three")
    assert some[1:] == PromptSet(PROMPTS, "mine", "three") and some[-1] == PROMPTS[1] and len(some[:20]) == 3
    assert repr(some) == "<PromptSet mine: 3 prompts, the first 'The capital of France is'>"
    with pytest.raises(ValueError, match="mine holds no prompts"):
        some[5:]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("ioi_en", TypeError, r"not a str; .* PromptSet\.load"),
        (PROMPTS[0], TypeError, "not a Prompt; put a prompt in a list"),
        (FIELDS[0], TypeError, "not a dict; put a prompt in a list"),
        (pd.DataFrame(FIELDS), TypeError, r"not a DataFrame; .*a table with PromptSet\.load"),
        (3, TypeError, "not a int"),
        ([FRANCE, 3], ValueError, "^prompt 1 of mine: should be an object with the fields of a prompt, not 3"),
        ([{"answer": "Rome"}], ValueError, "^prompt 0 of mine: there is no field 'text' among answer; give"),
        ([{"text": FRANCE, "answer": ["Rome", None]}], ValueError, "^prompt 0 of mine: answer: "),
        ([], ValueError, "^mine holds no prompts"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        PromptSet(given, "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            "ioi",
            ValueError,
            "there is no prompt set 'ioi'; did you mean 'ioi_en'. Shipped are agreement_en, .*, ioi_zh, .*; a file needs",
        ),
        ("ioi-en", ValueError, "no prompt set 'ioi-en'; did you mean 'ioi_en'"),
        ("imdb", ValueError, "no prompt set 'imdb'; shipped are agreement_en, "),
        ("en_fr", ValueError, "no prompt set 'en_fr'"),
        ("mine.txt", FileNotFoundError, "there is no prompt file mine.txt"),
        (PROMPTS[0], TypeError, "cannot read prompts from a Prompt; give a list"),
        (pd.DataFrame({"answer": ["Rome"]}), ValueError, "the table, pair 0: there is no field 'text'"),
        (pd.DataFrame({"text": [FRANCE, None]}), ValueError, "the table, pair 1: there is no field 'text'"),
        ({"text": FRANCE}, ValueError, "the object is not a prompt set"),
        ([], ValueError, "the list holds no pairs"),
    ],
)
def test_a_source_without_prompts_is_refused_before_a_hub_is_asked(
    given: Any, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail(f"the hub was asked for {name}"))
    with pytest.raises(kind, match=message) as error:
        PromptSet.load(given)
    assert "\n" not in str(error.value)


# --- chat messages --------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "<bos>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)
ASKED = [{"role": "user", "content": f"Say it. {FRANCE}"}]


def chat_tokenizer(**options: Any) -> Any:
    tokenizer = word_tokenizer(TEXTS, bos=True, **options)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("eos", [False, True])
def test_messages_are_rendered_by_the_template_with_one_start_token(eos: bool) -> None:
    tokenizer = chat_tokenizer(eos=eos)
    prompt = Prompt(ASKED, "Paris", "Rome", positions={"country": "France", "start": (5, 9), "third": 2})
    tokenized = PromptSet([prompt]).tokenize(tokenizer)
    words = ["<bos>", "user", ":", "Say", "it", ".", *FRANCE.split(), "assistant", ":"]
    assert tokenizer.convert_ids_to_tokens(list(tokenized.input_ids[0])) == words
    by_template = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert list(tokenized.input_ids[0]) == by_template
    vocabulary = tokenizer.get_vocab()
    assert tokenized.answer_ids == ((vocabulary["Paris"], vocabulary["Rome"]),)
    at = {name: words[place] for name, place in tokenized.positions[0].items()}
    assert at == {"end": ":", "last": ":", "country": "France", "start": "user", "third": ":"}


def test_a_last_message_of_the_assistant_is_continued() -> None:
    tokenizer = chat_tokenizer()
    prompt = Prompt([*ASKED, {"role": "assistant", "content": FRANCE}], "Paris", "Rome")
    assert prompt.rendered(tokenizer).text == f"<bos>user: Say it. {FRANCE} assistant: {FRANCE}"
    assert prompt.rendered(tokenizer).answers() == ((" Paris",), (" Rome",))
    ids = PromptSet([prompt]).tokenize(tokenizer).input_ids[0]
    assert tokenizer.convert_ids_to_tokens(list(ids))[-6:] == [":", *FRANCE.split()]
    assert Prompt(FRANCE).rendered(tokenizer) == Prompt(FRANCE)


def test_messages_are_saved_and_may_be_the_corrupt_text(tmp_path: Any) -> None:
    corrupt = [{"role": "user", "content": f"Say it. {ITALY}"}]
    prompts = PromptSet([Prompt(ASKED, "Paris", "Rome", corrupt, positions={"country": "France"})])
    prompts.save(tmp_path / "chat.json")
    pairs = json.loads((tmp_path / "chat.json").read_text())["pairs"]
    assert pairs == [
        {
            "text": ASKED,
            "answer": "Paris",
            "wrong": "Rome",
            "corrupt": corrupt,
            "positions": {"country": "France"},
        }
    ]
    again = PromptSet.load(tmp_path / "chat.json")
    assert again.prompts == prompts.prompts and again.hash == prompts.hash
    tokenized = again.tokenize(chat_tokenizer(), text="corrupt")
    assert len(tokenized.input_ids[0]) == 13 and tokenized.positions == ({"end": -1, "last": -1},)


@pytest.mark.parametrize(
    ("fields", "template", "message"),
    [
        ({"text": ASKED}, None, "prompt 0 of prompts: the tokenizer has no chat template; give plain text"),
        (
            {"text": [{"role": "system", "content": "x"}]},
            TEMPLATE,
            "prompt 0 of prompts: .* template fails .no system role",
        ),
        (
            {"text": ASKED, "positions": {"x": "Spain"}},
            TEMPLATE,
            "prompt 0 of prompts: position 'x': 'Spain' must occur",
        ),
        ({"text": ASKED, "positions": {"x": (90, 99)}}, TEMPLATE, r"position 'x': \[90, 99\) must be a non-empty part"),
        ({"text": ASKED, "answer": "Oslo"}, TEMPLATE, "prompt 0 of prompts .*does not know 'Oslo'"),
        ({"text": FRANCE, "corrupt": ASKED}, None, "prompt 0 of prompts: the tokenizer has no chat template"),
    ],
)
def test_messages_that_no_template_takes_are_refused(fields: dict, template: str | None, message: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as error:
        PromptSet([fields]).tokenize(tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [[], [3], [{"role": "user"}], [{"role": "user", "content": 3}], [["user", "x"]]])
def test_what_is_no_message_is_refused(text: list) -> None:
    with pytest.raises(ValueError, match=r"text: .* should be a (text, or a list of chat messages|chat message with)"):
        Prompt(text)
    with pytest.raises(ValueError, match="call rendered"):
        Prompt(ASKED).spans("clean")


# --- token ids ------------------------------------------------------------------------------------------------------------

ROWS = ((5, 6, 7), (8, 9), (4,))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["tokenizer", "dict", "tensors", "arrays", "lists", "bool"])
def test_padding_on_either_side_is_removed_by_the_mask(form: str, side: str) -> None:
    tokenizer = bpe_tokenizer(["abc de f"])
    tokenizer.padding_side = side
    given = tokenizer(["abc", "de", "f"], padding=True, return_tensors="pt")
    rows = tuple(tuple(tokenizer(text)["input_ids"]) for text in ("abc", "de", "f"))
    ids, mask = given["input_ids"], given["attention_mask"]
    found = {
        "tokenizer": lambda: TokenizedPrompts.of(given),
        "dict": lambda: TokenizedPrompts.of({"input_ids": ids, "attention_mask": mask}),
        "tensors": lambda: TokenizedPrompts.of(ids, mask),
        "arrays": lambda: TokenizedPrompts.of(ids.numpy(), mask.numpy()),
        "lists": lambda: TokenizedPrompts.of(ids.tolist(), mask.tolist()),
        "bool": lambda: TokenizedPrompts.of(ids, mask.bool()),
    }[form]()
    assert found == TokenizedPrompts(rows) and found.hash == TokenizedPrompts(rows).hash


def test_without_a_mask_everything_is_a_token() -> None:
    expected = TokenizedPrompts(ROWS[:2], pad_id=3)
    given: tuple[Any, ...] = (ROWS[:2], [list(ROWS[0]), np.array(ROWS[1])], [torch.tensor(row) for row in ROWS[:2]])
    assert all(TokenizedPrompts.of(ids, pad_id=3) == expected for ids in given)
    assert TokenizedPrompts.of(torch.tensor([[0, 5], [6, 0]])).input_ids == ((0, 5), (6, 0))


def test_answers_and_positions_of_given_ids() -> None:
    found = TokenizedPrompts.of(
        ROWS,
        answers=[(5, [7, 8]), ([[5], [6, 7], [6]], None), AnswerTokens(((3,),), ((4,),))],
        positions=[{"verb": 1}, {}, {"verb": -1}],
    )
    assert found.answers == (
        AnswerTokens(((5,),), ((7, 8),)),
        AnswerTokens(((5,), (6,)), ()),
        AnswerTokens(((3,),), ((4,),)),
    )
    assert [named.get("verb") for named in found.positions] == [-2, None, -1]
    pairs = TokenizedPrompts.of(ROWS[:2], answers=torch.tensor([[5, 6], [7, 8]]), positions={"first": 0})
    assert pairs.answer_ids == ((5, 6), (7, 8))
    assert pairs.positions == ({"end": -1, "last": -1, "first": -3}, {"end": -1, "last": -1, "first": -2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": 3}, "ids should have one entry per prompt, not be a int"),
        ({"ids": "abc"}, "ids should have one entry per prompt, not be a str"),
        ({"ids": [3, 4]}, "prompt 0 should be a list of token ids, not 3"),
        ({"ids": ["abc"]}, "prompt 0 should be a list of token ids, not 'abc'"),
        ({"ids": [[3, 4.5]]}, "prompt 0 should be a list of token ids"),
        ({"ids": [[3], [-1]]}, "prompt 1 should be a list of token ids"),
        ({"ids": []}, "there are no prompts"),
        ({"ids": [[3], []]}, "prompt 1 has no tokens"),
        ({"ids": {"attention_mask": [[1]]}}, "there are no input_ids but attention_mask"),
        ({"ids": [[3, 4]], "attention_mask": [[1]]}, "mask does not have the shape of the ids"),
        ({"ids": [[3, 4]], "attention_mask": [[1, 1], [1, 1]]}, "mask does not have the shape of the ids"),
        ({"ids": [[3, 4, 5]], "attention_mask": [[1, 0, 1]]}, "attention mask of prompt 0 has gaps"),
        ({"ids": [[3, 4]], "attention_mask": [[0, 0]]}, "prompt 0 has no tokens"),
        ({"ids": ROWS, "answers": [(3, 4)]}, "there are answers of 1 prompts but 3 prompts"),
        ({"ids": ROWS, "answers": [3, 4, 5]}, "answers of prompt 0 should be a pair"),
        ({"ids": ROWS, "answers": ["ab", "ab", "ab"]}, "answers of prompt 0 should be a pair"),
        ({"ids": ROWS, "answers": [("a", "b")] * 3}, "an answer of prompt 0 should be token ids, not 'a'"),
        ({"ids": ROWS, "answers": [(3, [[]])] * 3}, "an answer of prompt 0 should be token ids"),
        ({"ids": ROWS, "answers": [(3, [4, 3]), (3, 3), (3, 4)]}, "an answer of prompt 1 is both right and wrong"),
        ({"ids": ROWS, "positions": {"x": 2}}, "position 'x' is token 2 of prompt 1, which has 2 tokens"),
        ({"ids": ROWS, "positions": {"last": 0}}, "position 'last' has a built-in meaning"),
        ({"ids": ROWS, "positions": [{}]}, "there are positions of 1 prompts but 3 prompts"),
    ],
)
def test_ids_that_are_no_prompts_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TokenizedPrompts.of(**given)
    assert "\n" not in str(error.value)


# --- parts of a set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "taken"),
    [
        ([True, False, True], [0, 2]),
        (np.array([False, True, True]), [1, 2]),
        (torch.tensor([True, False, False]), [0]),
        ([np.True_, np.False_, np.False_], [0]),
        ([2, 0], [2, 0]),
        (torch.tensor([1, -1]), [1, 2]),
        (np.int64(1), [1]),
        (slice(0, 2), [0, 1]),
        (iter([2]), [2]),
        ([], []),
    ],
)
def test_prompts_are_taken_by_numbers_slices_and_masks_and_a_subscript_takes_too(which: Any, taken: list[int]) -> None:
    prompts = TokenizedPrompts.of([[7], [8, 8], [9, 9, 9]])
    expected = tuple(prompts.input_ids[i] for i in taken)
    which = list(which) if hasattr(which, "__next__") else which
    assert prompts.take(which).input_ids == prompts[which].input_ids == expected


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([True, False], "a mask of 2 booleans cannot select among 3 prompts"),
        ([True, 0, 1], "not True"),
        (np.array([0.0, 1.0]), "not 0.0"),
        (1.5, "not 1.5"),
        ("ab", "not 'a'"),
        (3, "there is no prompt 3 among 3 prompts"),
    ],
)
def test_anything_else_takes_no_prompts(which: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizedPrompts.of([[7], [8, 8], [9, 9, 9]]).take(which)


def test_a_tokenised_set_shows_its_size_and_no_ids() -> None:
    prompts = TokenizedPrompts.of([[7] * 1000, [8] * 3], answers=[(1, 2), (3, None)])
    assert repr(prompts) == "<TokenizedPrompts: 2 prompts of 3 to 1000 tokens, right and wrong answers>"
    assert repr(TokenizedPrompts.of([[7]])) == "<TokenizedPrompts: 1 prompt of 1 token, no answers>"
