"""Prompt sets, positions and batches, against slow and obvious versions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pyvene_ext.prompts.sets import Prompt, PromptSet
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer
from tests.tiny_random import FAMILIES, VOCAB, random_model

PAIR = {
    "clean": "When Lisa and Mark went to the Market, Mark gave the book to",
    "corrupt": "When Anna and Paul went to the Market, Emma gave the book to",
    "io_name": "Lisa",
    "s_name": "Mark",
    "io_token": " Lisa",
}
SHORT = {"clean": "Mark gave Anna a book. Then Mark left", "io_name": "Anna", "s_name": "Mark"}
CHINESE = {"clean": "当小娟和小龙去商店时，小龙把书给了", "io_name": "小娟", "s_name": "小龙", "io_token": "小娟"}
ENGLISH_TEXTS = [PAIR["clean"], PAIR["corrupt"], SHORT["clean"]]
CHINESE_TEXTS = ["当小娟和小龙去商店时，", "小龙把书给了小娟", "小红把书给了小明，小红 小龙 小娟"] * 3


def prompt_set(*pairs: dict) -> PromptSet:
    return PromptSet(tuple(Prompt(**pair) for pair in pairs), name="mine")


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs_in_every_format(tmp_path: Path) -> dict[str, object]:
    rows = [PAIR, SHORT]
    (tmp_path / "object.json").write_text(
        json.dumps({"n_examples": 2, "description": "two", "pairs": rows, "author": "me"}), encoding="utf-8"
    )
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\r\n", encoding="utf-8")
    dataset = datasets.Dataset.from_list(rows)  # a missing field is a null there
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "saved_with_split")
    names = ("object.json", "list.json", "lines.jsonl", "saved", "saved_with_split")
    return {"dataset": dataset, "split": datasets.DatasetDict(a=dataset)} | {
        name: (str(tmp_path / name) if "." in name else tmp_path / name) for name in names
    }


def test_every_format_gives_the_same_prompts(pairs_in_every_format: dict[str, object]) -> None:
    expected = (Prompt(**PAIR), Prompt(**SHORT))
    loaded = {name: PromptSet.load(source) for name, source in pairs_in_every_format.items()}
    assert {prompts.prompts for name, prompts in loaded.items() if prompts.prompts != expected} == set()
    assert len({prompts.hash for prompts in loaded.values()}) == 1
    assert loaded["object.json"].name == "object" and loaded["object.json"].description == "two"


def test_a_data_set_of_the_hub_is_loaded_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {"someone/pairs": datasets.DatasetDict(train=datasets.Dataset.from_list([PAIR]))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub[name])
    prompts = PromptSet.load("someone/pairs")
    assert prompts[0] == Prompt(**PAIR) and len(prompts) == 1


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_saving_and_loading_loses_nothing(tmp_path: Path, name: str) -> None:
    own = PAIR | {"positions": {"verb": "gave", "first": [0, 4]}}
    prompts = prompt_set(own, SHORT, CHINESE)
    prompts.save(tmp_path / name)
    again = PromptSet.load(tmp_path / name)
    assert again.prompts == prompts.prompts and again.hash == prompts.hash
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_the_hash_follows_content_and_order_only() -> None:
    a = prompt_set(PAIR, SHORT)
    assert a.hash == PromptSet(a.prompts, "other name", "text").hash
    assert a.hash == prompt_set(PAIR, SHORT | {"io_token": " Anna", "note": "left out"}).hash
    assert a.hash != prompt_set(SHORT, PAIR).hash
    assert a.hash != prompt_set(PAIR, SHORT | {"io_token": "Anna"}).hash


def broken(**changes: object) -> str:
    return json.dumps([SHORT, {**PAIR, **changes}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "[", r"is not JSON \(.*line 1 column 2\)"),
        ("a.jsonl", json.dumps(PAIR) + "\n{", "not one JSON object per line.*line 2 column"),
        ("a.jsonl", json.dumps(PAIR) + "\n3", "pair 1: should be an object"),
        ("a.json", "[]", "holds no pairs"),
        ("a.json", '{"pairs": []}', "holds no pairs"),
        ("a.json", '{"n_examples": 3}', "a list 'pairs'"),
        ("a.json", '{"pairs": {}}', "a list 'pairs'"),
        ("a.json", "3", "a list 'pairs'"),
        ("a.json", json.dumps({"n_examples": 3, "pairs": [PAIR]}), "says n_examples is 3 but holds 1 pairs"),
        ("a.json", json.dumps([PAIR, ["clean"]]), "pair 1: should be an object"),
        ("a.json", broken(clean=None), "pair 1: there is no field 'text'"),
        ("a.json", broken(clean=7), "pair 1: text: [37] should be a text, or a list of chat messages"),
        ("a.json", broken(answer=["Lisa", 7]), r"pair 1: answer: \['Lisa', 7\] should be a text or several"),
        ("a.json", broken(wrong=""), "pair 1: wrong: '' should be a text or several, none of them empty"),
        (
            "a.json",
            broken(wrong=["Anna", "Lisa"]),
            "pair 1: 'Lisa' is both a right and a wrong answer of the clean text",
        ),
        ("a.json", broken(corrupt_answer="Mark"), "'Mark' is both a right and a wrong answer of the corrupt text"),
        ("a.json", broken(io_name="Mark"), "pair 1: io_name and s_name are both 'Mark'"),
        ("a.json", broken(io_name=""), "pair 1: io_name: String should have at least 1 character"),
        ("a.json", broken(io_name="Ann"), "pair 1: io_token ' Lisa' must end with io_name 'Ann'"),
        ("a.json", broken(positions={"end": "gave"}), "position 'end' has a built-in meaning"),
        ("a.json", broken(positions={"x": "the"}), "position 'x': 'the' must occur exactly once"),
        ("a.json", broken(positions={"x": "zoo"}), "position 'x': 'zoo' must occur exactly once"),
        ("a.json", broken(positions={"x": ""}), "position 'x': '' must occur exactly once"),
        ("a.json", broken(positions={"x": [3, 3]}), "must be a non-empty part of the 60 characters"),
        ("a.json", broken(positions={"x": [50, 61]}), "must be a non-empty part of the 60 characters"),
        ("a.json", broken(positions={"x": 3.5}), r"pair 1: positions\.x: "),
        ("a.txt", "[]", "suffix .json or .jsonl"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        PromptSet.load(path)
    assert str(path) in one_line(error)
    assert re.search(message, str(error.value))


def test_other_bad_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'[{"clean": "caf\xe9"}]')
    two = datasets.DatasetDict(a=datasets.Dataset.from_list([PAIR]), b=datasets.Dataset.from_list([SHORT]))
    cases: list[tuple[object, type[Exception], str]] = [
        (latin, ValueError, "not UTF-8"),
        (tmp_path, ValueError, "is a folder but not a dataset"),
        (tmp_path / "none.json", FileNotFoundError, "there is no prompt file"),
        ("some/where/else", FileNotFoundError, "there is no prompt file"),
        (two, ValueError, "the splits a, b; choose one with split="),
        (3, TypeError, "cannot read prompts from a int"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            PromptSet.load(source)
        one_line(error)
    assert PromptSet.load(two, split="b")[0] == Prompt(**SHORT)
    with pytest.raises(ValueError, match="no prompts"):
        PromptSet(())
    with pytest.raises(ValueError, match=r"end the name with \.json or \.jsonl"):
        prompt_set(PAIR).save(tmp_path / "prompts.yaml")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="nobody/nothing is not a file, and loading it as a data set of the hub failed"):
        PromptSet.load("nobody/nothing")


def test_prompts_are_immutable() -> None:
    with pytest.raises(ValueError, match="text cannot be changed") as error:
        Prompt(**PAIR).text = "x"
    one_line(error)


# --- names and places -----------------------------------------------------------------------------------------------------


def texts_at(prompt: Prompt) -> dict[str, tuple[int, str]]:
    return {name: (span[0], prompt.clean[slice(*span)]) for name, span in prompt.spans("clean").items()}


def test_mentions_are_whole_words_in_alphabets_and_anything_in_chinese() -> None:
    assert texts_at(Prompt(**PAIR)) == {
        "io": (5, "Lisa"),
        "s1": (14, "Mark"),
        "s2": (39, "Mark"),
        "subject": (39, "Mark"),
    }
    assert texts_at(Prompt(**CHINESE)) == {
        "io": (1, "小娟"),
        "s1": (4, "小龙"),
        "s2": (11, "小龙"),
        "subject": (11, "小龙"),
    }


@pytest.mark.parametrize(
    ("clean", "io", "s", "io_at", "s_at"),
    [
        ("Mark和Lisa去, Mark's", "Lisa", "Mark", 5, [0, 12]),  # Latin names between Chinese characters
        ("小明明和小明去，小明", "小明明", "小明", 0, [4, 8]),  # one name begins with the other
        ("小明明和小明去，小明明", "小明", "小明明", 4, [0, 8]),
        ("Anna Maria saw Anna, Anna", "Anna Maria", "Anna", 0, [15, 21]),
        ("민수가 영희를 보고 민수는", "영희", "민수", 4, [0, 11]),  # Korean particles follow the name
        ("ДОМ Дом Домна Ира", "Ира", "Дом", 14, [4]),
        ("Mark2 Mark xMark Lisa", "Lisa", "Mark", 17, [6]),
    ],
)
def test_a_name_is_found_where_a_reader_sees_it(clean: str, io: str, s: str, io_at: int, s_at: list[int]) -> None:
    spans = Prompt(clean=clean, io_name=io, s_name=s).spans("clean")
    assert spans["io"][0] == io_at
    assert (spans["s1"][0], spans["s2"][0]) == (s_at[0], s_at[-1])


def test_places_in_the_corrupt_text_are_those_found_there() -> None:
    own = {"verb": "gave", "emma": [0, 4], "mark_and": "Mark went"}
    prompt = Prompt(**PAIR | {"positions": own})
    assert set(prompt.spans("clean")) == {"io", "s1", "s2", "subject", *own}
    assert prompt.spans("corrupt") == {"verb": (44, 48)}


# --- tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_a_word_tokenizer_gives_what_one_counts_by_hand(bos: bool, eos: bool) -> None:
    tokenizer = word_tokenizer(ENGLISH_TEXTS, bos=bos, eos=eos)
    words = re.findall(r"\w+|[.,]", PAIR["clean"])
    tokenized = prompt_set(PAIR | {"positions": {"place": "the Market", "start": [0, 4]}}).tokenize(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert tokenized.input_ids == (tuple([vocabulary["<bos>"]] * bos + [vocabulary[word] for word in words]),)
    assert tokenized.answer_ids == ((vocabulary["Lisa"], vocabulary["Mark"]),)
    assert tokenized.positions == (
        {
            "end": -1,
            "last": -1,
            "io": words.index("Lisa") - len(words),
            "s1": words.index("Mark") - len(words),
            "s2": words.index("Mark", 5) - len(words),
            "subject": words.index("Mark", 5) - len(words),
            "place": words.index("Market") - len(words),
            "start": -len(words),
        },
    )


def slow_last_token(tokenizer: PreTrainedTokenizerFast, ids: list[int], text: str, end: int) -> int:
    """The first token after which the decoded text covers `text[:end]`."""
    return next(i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1], errors="ignore").startswith(text[:end]))


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("vocab_size", [262, 275, 290, 300])
@pytest.mark.parametrize("pair", [PAIR, SHORT, CHINESE], ids=["long", "short", "chinese"])
def test_positions_in_a_byte_level_bpe_match_decoding_token_by_token(
    pair: dict, vocab_size: int, trim_offsets: bool
) -> None:
    tokenizer = bpe_tokenizer(ENGLISH_TEXTS + CHINESE_TEXTS, vocab_size, trim_offsets=trim_offsets)
    prompts = prompt_set(pair)
    tokenized = prompts.tokenize(tokenizer, answers="first_difference")
    ids = tokenizer(pair["clean"])["input_ids"]
    for name, (_, end) in prompts[0].spans("clean").items():
        place = len(tokenized.input_ids[0]) + tokenized.positions[0][name]
        assert place == slow_last_token(tokenizer, ids, pair["clean"], end), name


@pytest.mark.parametrize("eos", [False, True])
def test_names_that_share_their_first_token_are_refused_or_compared_where_they_differ(eos: bool) -> None:
    tokenizer = bpe_tokenizer(CHINESE_TEXTS, 262, bos=True, eos=eos)
    prompts = prompt_set(CHINESE)
    undecided = prompts.tokenize(tokenizer)
    for owner in (undecided, next(undecided.batches(1))):
        with pytest.raises(
            ValueError, match=r"answers of prompt 0 begin with the same token .*'first_difference'"
        ) as error:
            owner.answer_ids  # noqa: B018
        assert "answer_logprob_diff" in one_line(error)

    tokenized = prompts.tokenize(tokenizer, answers="first_difference")

    def ids(text: str) -> list[int]:
        return [i for i in tokenizer(text)["input_ids"] if i != tokenizer.eos_token_id]

    clean, io, s = ids(CHINESE["clean"]), ids(CHINESE["clean"] + "小娟"), ids(CHINESE["clean"] + "小龙")
    first = next(i for i in range(len(io)) if io[i] != s[i])
    assert len(clean) < first < len(io), "the tokenizer of this test must give the names a common first token"
    assert tokenized.input_ids == (tuple(io[:first]),)
    assert tokenized.answer_ids == ((io[first], s[first]),)
    assert tokenized.positions[0]["end"] == -1
    # The appended tokens move every place away from the end.
    plain = slow_last_token(tokenizer, clean[1:], CHINESE["clean"], 3) + 1
    assert tokenized.positions[0]["io"] == plain - first


def test_first_difference_leaves_names_with_different_first_tokens_alone() -> None:
    tokenizer = word_tokenizer(ENGLISH_TEXTS)
    prompts = prompt_set(PAIR, SHORT)
    assert prompts.tokenize(tokenizer) == prompts.tokenize(tokenizer, answers="first_difference")


def test_the_corrupt_text_has_its_own_tokens_and_the_same_answers() -> None:
    tokenizer = word_tokenizer(ENGLISH_TEXTS)
    clean, corrupt = (prompt_set(PAIR).tokenize(tokenizer, text=text) for text in ("clean", "corrupt"))
    assert corrupt.input_ids == (tuple(tokenizer(PAIR["corrupt"])["input_ids"]),)
    assert corrupt.answer_ids == clean.answer_ids
    assert corrupt.positions == ({"end": -1, "last": -1},)


def test_a_special_token_written_in_the_text_stays() -> None:
    tokenizer = word_tokenizer(ENGLISH_TEXTS, eos=True)
    tokenizer.unk_token = "<eos>"  # as GPT-2's is
    tokenized = prompt_set(SHORT | {"clean": "<eos>" + SHORT["clean"]}).tokenize(tokenizer)
    assert tokenized.input_ids[0].count(tokenizer.eos_token_id) == 1
    assert tokenized.input_ids[0][0] == tokenizer.eos_token_id


def test_the_hash_of_tokens_depends_on_the_tokenizer() -> None:
    prompts = prompt_set(PAIR, SHORT)
    hashes = {prompts.tokenize(word_tokenizer(ENGLISH_TEXTS, bos=bos)).hash for bos in (False, True, False)}
    assert len(hashes) == 2


def test_the_pad_id_is_the_end_token_where_there_is_no_padding_token() -> None:
    with_pad, without = (word_tokenizer(ENGLISH_TEXTS, pad=pad) for pad in (True, False))
    assert prompt_set(PAIR).tokenize(with_pad).pad_id == with_pad.pad_token_id
    assert prompt_set(PAIR).tokenize(without).pad_id == without.eos_token_id


class Slow(PreTrainedTokenizerBase):
    is_fast = False

    def __init__(self) -> None:
        pass


TOKENIZERS = {
    "words": lambda: word_tokenizer(ENGLISH_TEXTS),
    "words after <bos>": lambda: word_tokenizer(ENGLISH_TEXTS, bos=True),
    "words but Lisa": lambda: word_tokenizer(ENGLISH_TEXTS, drop="Lisa(?=.)"),
    "bytes": lambda: bpe_tokenizer(CHINESE_TEXTS, 260),
    "pairs": lambda: bpe_tokenizer(["ab", "ac"] * 5, 262),
    "slow": Slow,
    "none": lambda: None,
}


@pytest.mark.parametrize(
    ("changes", "tokenizer", "arguments", "message"),
    [
        ({}, "words", {"max_length": 13}, "^prompt 0 of mine .* has 14 tokens but the model takes 13"),
        ({"corrupt": None}, "words", {"text": "corrupt"}, "^prompt 0 of mine has no corrupt text"),
        ({"corrupt": ""}, "words", {"text": "corrupt"}, "^prompt 0 of mine .* has no tokens"),
        ({"corrupt": ""}, "words after <bos>", {"text": "corrupt"}, "^prompt 0 of mine .* has no tokens"),
        ({"clean": "Lisa, Mark, zebra, yak"}, "words", {}, "^prompt 0 of mine .* does not know 'zebra', 'yak';"),
        ({"clean": "<bos>" + PAIR["clean"]}, "words after <bos>", {}, "begins with '<bos>', which the tokenizer adds"),
        (
            {"clean": "小明明小明", "io_name": "小明明", "s_name": "小明", "io_token": "小明明"},
            "bytes",
            {"answers": "first_difference"},
            "^prompt 0 of mine .* no token tells them apart",
        ),
        ({"clean": "b c a", "io_name": "b", "s_name": "c", "io_token": "b"}, "pairs", {}, "'b' merges with the end"),
        ({"clean": "b c a", "io_name": "c", "s_name": "b", "io_token": "c"}, "pairs", {}, "'c' merges with the end"),
        ({"clean": "Mark,Lisa went to"}, "words but Lisa", {}, "no token holds 'Lisa', the place 'io'"),
        ({}, "words but Lisa", {}, "^prompt 0 of mine .* no token holds 'Lisa', the place 'io'"),
        ({}, "words", {"answers": "last_token"}, "answers must be 'first_token' or 'first_difference'"),
        ({}, "words", {"text": "both"}, "text must be 'clean' or 'corrupt'"),
        ({}, "slow", {}, "Slow is a slow tokenizer"),
        ({}, "none", {}, "expected a tokenizer, not NoneType"),
    ],
)
def test_a_prompt_that_cannot_be_tokenised_is_refused_in_one_sentence(
    changes: dict, tokenizer: str, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prompt_set(PAIR | changes).tokenize(TOKENIZERS[tokenizer](), **arguments)
    one_line(error)


def test_a_prompt_as_long_as_the_context_is_taken() -> None:
    assert prompt_set(PAIR).tokenize(word_tokenizer(ENGLISH_TEXTS), max_length=14)
    with_shared = {"tokenizer": bpe_tokenizer(CHINESE_TEXTS, 262), "answers": "first_difference"}
    length = len(prompt_set(CHINESE).tokenize(**with_shared).input_ids[0])
    assert prompt_set(CHINESE).tokenize(**with_shared, max_length=length)
    with pytest.raises(ValueError, match=f"has {length} tokens but the model takes {length - 1}"):
        prompt_set(CHINESE).tokenize(**with_shared, max_length=length - 1)


# --- batches --------------------------------------------------------------------------------------------------------------

UNEQUAL = [
    SHORT | {"positions": {"verb": "gave", "mine": "book"}},
    PAIR | {"positions": {"verb": "gave", "mine": "book"}},
    {"clean": "Lisa and Mark", "io_name": "Lisa", "s_name": "Mark", "positions": {"verb": "and"}},
    SHORT | {"clean": "Mark gave Anna the book. Then Mark left", "positions": {"verb": "gave"}},
    {"clean": "Mark and Lisa", "io_name": "Lisa", "s_name": "Mark", "positions": {"verb": "and"}},
]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_a_batch_holds_every_prompt_once_padded_on_one_side(batch_size: int, padding_side: str) -> None:
    tokenized = prompt_set(*UNEQUAL).tokenize(word_tokenizer(ENGLISH_TEXTS))
    batches = list(tokenized.batches(batch_size, padding_side))
    lengths = [len(ids) for ids in tokenized.input_ids]
    assert [i for batch in batches for i in batch.index] == [2, 4, 0, 3, 1]
    assert sorted(lengths) == [lengths[i] for i in (2, 4, 0, 3, 1)]
    for batch in batches:
        assert batch.lengths == [lengths[i] for i in batch.index]
        assert batch.input_ids.shape == batch.attention_mask.shape == (len(batch.index), max(batch.lengths))
        assert batch.answer_ids.tolist() == [list(tokenized.answer_ids[i]) for i in batch.index]
        for row, i in enumerate(batch.index):
            real = batch.attention_mask[row].bool()
            assert batch.input_ids[row][real].tolist() == list(tokenized.input_ids[i])
            assert batch.position_ids[row][real].tolist() == list(range(lengths[i]))
            assert bool((batch.input_ids[row][~real] == tokenized.pad_id).all())
            edge = 0 if padding_side == "right" else -1
            assert bool(real[edge])
            # Columns found the slow way: the n-th real column.
            real_columns = real.nonzero().flatten().tolist()
            for name in ("io", "s1", "s2", "subject", "end", "last", "verb"):
                assert batch.columns(name)[row] == real_columns[tokenized.positions[i][name]]
            for position in (0, 2, -1, -3):
                assert batch.columns(position)[row] == real_columns[position]
            assert batch.last_columns[row] == real_columns[-1]


def test_a_position_that_some_prompt_lacks_is_in_no_batch() -> None:
    tokenized = prompt_set(*UNEQUAL).tokenize(word_tokenizer(ENGLISH_TEXTS))
    batch = list(tokenized.batches(1))[-1]
    assert "mine" in tokenized.positions[batch.index[0]]
    with pytest.raises(ValueError, match="not every prompt has a position named 'mine'; all have end, io, last"):
        batch.columns("mine")


def test_bad_requests_of_batches_are_refused() -> None:
    tokenized = prompt_set(*UNEQUAL).tokenize(word_tokenizer(ENGLISH_TEXTS))
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        tokenized.batches(0)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right'"):
        tokenized.batches(2, "both")
    batch = next(tokenized.batches(5))
    for position in (-4, 3):
        with pytest.raises(ValueError, match=f"position {position} lies outside prompt 2, which has 3 tokens"):
            batch.columns(position)


def test_moving_a_batch_moves_its_tensors() -> None:
    batch = next(prompt_set(*UNEQUAL).tokenize(word_tokenizer(ENGLISH_TEXTS)).batches(2))
    moved = batch.to("meta")
    assert {t.device.type for t in (*moved.inputs().values(), moved.right_ids, moved.wrong_ids)} == {"meta"}
    assert {t.device.type for t in batch.inputs("meta").values()} == {"meta"}
    assert moved.index == batch.index and batch.input_ids.device.type == "cpu"


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_logits_of_one_prompt_at_a_time(family: str, padding_side: str) -> None:
    tokenized = prompt_set(*UNEQUAL).tokenize(word_tokenizer(ENGLISH_TEXTS, bos=True))
    assert max(map(max, tokenized.input_ids)) < VOCAB
    model = random_model(family, attn_implementation="eager")
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in tokenized.input_ids])
        for batch in tokenized.batches(3, padding_side):
            logits = model(**batch.inputs("cpu")).logits
            last = logits[torch.arange(len(batch.index)), batch.last_columns]
            torch.testing.assert_close(last, alone[batch.index], atol=1e-5, rtol=1e-5)


def test_a_misspelt_field_is_refused_and_other_fields_are_left_out() -> None:
    pair = {"clean": "Lisa and David went, David gave it to", "io_name": "Lisa", "s_name": "David"}
    with pytest.raises(ValueError, match="unknown field 'positons'; did you mean 'positions'"):
        Prompt(**pair, positons={"verb": "gave"})
    assert Prompt(**pair, source="a book").positions == {}
