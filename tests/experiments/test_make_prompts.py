"""The shipped IOI prompt sets are what the script makes, balanced, held out, and known to the tiny models' tokenizer."""

import json

import pytest
from make_prompts import LANGUAGES, PROMPTS, Settings, main, prompt_set
from tiny_tasks import NAMES_EN, NAMES_ZH, is_held_out
from train_tiny_models import build_tokenizer

TOKENIZER = build_tokenizer()
NAMES = {"en": NAMES_EN, "zh": NAMES_ZH}


@pytest.fixture(params=LANGUAGES)
def language(request):
    return request.param


@pytest.fixture
def shipped(language):
    return json.loads((PROMPTS / f"ioi_{language}.json").read_text(encoding="utf-8"))


def test_shipped_files_are_what_the_script_writes(tmp_path):
    main(Settings(out=tmp_path))
    for language in LANGUAGES:
        name = f"ioi_{language}.json"
        assert (tmp_path / name).read_bytes() == (PROMPTS / name).read_bytes()


def test_another_seed_gives_other_prompts(language, shipped):
    assert prompt_set(language, 5, seed=0)["pairs"] == shipped["pairs"][:5]
    assert prompt_set(language, 5, seed=1)["pairs"] != shipped["pairs"][:5]


def test_format_and_number(shipped):
    assert shipped["n_examples"] == len(shipped["pairs"]) == 100
    assert all(set(pair) == {"clean", "corrupt", "io_name", "s_name", "io_token"} for pair in shipped["pairs"])


def test_pairs_are_distinct_and_held_out_from_training(shipped):
    assert len({pair["clean"] for pair in shipped["pairs"]}) == 100
    assert all(is_held_out(pair["clean"]) for pair in shipped["pairs"])


def test_half_the_prompts_begin_with_the_indirect_object(shipped):
    first = [pair["clean"].index(pair["io_name"]) < pair["clean"].index(pair["s_name"]) for pair in shipped["pairs"]]
    assert sum(first) == 50


def test_clean_has_two_names_and_corrupt_three_others(language, shipped):
    for pair in shipped["pairs"]:
        clean = [token for token in TOKENIZER.tokenize(pair["clean"]) if token in NAMES[language]]
        corrupt = [token for token in TOKENIZER.tokenize(pair["corrupt"]) if token in NAMES[language]]
        assert sorted(clean) == sorted([pair["io_name"], pair["s_name"], pair["s_name"]])
        assert clean[2] == pair["s_name"]
        assert len(corrupt) == len(set(corrupt)) == 3
        assert not set(clean) & set(corrupt)


def test_clean_and_corrupt_are_of_one_length_without_unknown_words(shipped):
    for pair in shipped["pairs"]:
        clean, corrupt = TOKENIZER(pair["clean"])["input_ids"], TOKENIZER(pair["corrupt"])["input_ids"]
        assert len(clean) == len(corrupt)
        assert TOKENIZER.unk_token_id not in clean + corrupt


def test_answer_token_continues_the_prompt_as_one_token(language, shipped):
    for pair in shipped["pairs"]:
        assert pair["io_token"] == (" " if language == "en" else "") + pair["io_name"]
        prompt = TOKENIZER(pair["clean"])["input_ids"]
        whole = TOKENIZER(pair["clean"] + pair["io_token"])["input_ids"]
        assert whole == [*prompt, TOKENIZER.convert_tokens_to_ids(pair["io_name"])]
