"""The shipped prompt sets are what the script makes, balanced, held out, and known to the tiny models' tokenizer."""

import json

import pytest
from tiny.make_prompts import LANGUAGES, PROMPTS, RECENT, Settings, main, prompt_set, recent_set, sentence_pairs
from tiny.train_tiny_models import build_tokenizer

from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tiny_tasks import NAMES_EN, NAMES_ZH, is_held_out

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
    assert (tmp_path / "en_fr.tsv").read_bytes() == (PROMPTS / "en_fr.tsv").read_bytes()


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


# -- most recent subject -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", RECENT)
def test_prompts_of_the_most_recent_subject_are_as_shipped_and_say_who_is_who(form, tmp_path):
    path = PROMPTS / f"recent_{form}.json"
    main(Settings(out=tmp_path))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    prompts = PromptSet.load(path)
    assert len({prompt.clean for prompt in prompts}) == len(prompts) == 100
    for prompt in prompts:
        spans = prompt.spans("clean")
        assert spans["earlier1"] < spans["s1"] < spans["s2"] < spans["earlier2"] < spans["io"]
        first, *_, before = prompt.clean.split(". ")
        said = first.removeprefix(prompt.positions["earlier1"])
        assert f"{prompt.positions['earlier2']}{said}." in prompt.clean
        assert prompt.clean.count(before) == 2 and f"{before} {prompt.s_name}." in prompt.clean
        clean, corrupt = (
            [word.strip(".") for word in text.split() if word.strip(".") in NAMES_EN]
            for text in (prompt.clean, prompt.corrupt)
        )
        assert clean[1] == clean[2] == prompt.s_name and clean[4] == prompt.io_name and len(set(clean)) == 4
        assert corrupt[1] == corrupt[2] and len(set(corrupt)) == 4 and not set(clean) & set(corrupt)


def test_the_tiny_form_has_no_word_that_the_tiny_models_lack():
    prompts = PromptSet.load(PROMPTS / "recent_tiny.json")
    for text in ("clean", "corrupt"):
        assert len(set(map(len, prompts.tokenize(TOKENIZER, text).input_ids))) == 1
    assert recent_set("en", 3, seed=1)["pairs"] != recent_set("en", 3, seed=0)["pairs"]


def test_parallel_text_is_held_out_in_both_directions_without_unknown_words():
    header, *pairs = [line.split("\t") for line in (PROMPTS / "en_fr.tsv").read_text(encoding="utf-8").splitlines()]
    assert header == ["en", "fr"] and len({english for english, _ in pairs}) == 100
    for english, french in pairs:
        assert is_held_out(f"EN: {english} FR:") and is_held_out(f"FR: {french} EN:")
        assert TOKENIZER.unk_token_id not in TOKENIZER(f"EN: {english} FR: {french}")["input_ids"]
    assert sentence_pairs(5, seed=0) == [tuple(pair) for pair in pairs[:5]] != sentence_pairs(5, seed=1)
