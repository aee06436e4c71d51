"""The shipped prompt sets are what the script makes, balanced, held out, and known to the tiny models' tokenizer."""

import json
import re
from collections import Counter

import pytest
from make_prompts import (
    PLAIN,
    PROMPTS,
    RECENT,
    RECIPES,
    SETS,
    Settings,
    main,
    prompt_set,
    sentence_pairs,
    word_problems,
)
from tiny.prompt_words import CAPITAL_TEMPLATES, COUNTRIES, LANGUAGES, PHRASES
from tiny.train_tiny_models import build_tokenizer

from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tiny_tasks import IOI, NAMES_EN, is_held_out
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer
from tests.tiers import first_only

TOKENIZER = build_tokenizer()


@pytest.fixture(params=IOI)
def language(request):
    return request.param


@pytest.fixture
def shipped(language):
    return json.loads((PROMPTS / f"ioi_{language}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    main(Settings(out=folder))
    return folder


def test_shipped_files_are_what_the_script_writes(written):
    by_hand = {"sentences.tsv"}  # real text, which no grammar writes
    assert {path.name for path in written.iterdir()} | by_hand == {path.name for path in PROMPTS.iterdir()}
    for path in written.iterdir():
        assert path.read_bytes() == (PROMPTS / path.name).read_bytes()


def test_only_the_named_sets_are_written_in_the_number_asked_for(tmp_path):
    main(Settings(("ioi_fr", "en_fr"), tmp_path, n=7))
    assert {path.name for path in tmp_path.iterdir()} == {"ioi_fr.json", "en_fr.tsv"}
    assert len(PromptSet.load(tmp_path / "ioi_fr.json")) == 7
    with pytest.raises(ValueError, match=f"no prompt set 'ioi_xx'; choose among {', '.join(SETS)}"):
        main(Settings(("ioi_xx",), tmp_path))
    with pytest.raises(ValueError, match=r"there are only about [0-9]+ different prompts of agreement_en; ask"):
        prompt_set("agreement_en", 1000, seed=0)


@pytest.mark.parametrize("name", RECIPES)
def test_another_seed_gives_other_prompts(name):
    pairs = json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))["pairs"]
    assert prompt_set(name, 5, seed=0)["pairs"] == pairs[:5]
    assert prompt_set(name, 5, seed=1)["pairs"] != pairs[:5]


def test_format_and_number(shipped):
    assert shipped["n_examples"] == len(shipped["pairs"]) == 100
    assert all(set(pair) == {"clean", "corrupt", "io_name", "s_name", "io_token"} for pair in shipped["pairs"])


def test_pairs_are_distinct_and_held_out_from_training(shipped):
    assert len({pair["clean"] for pair in shipped["pairs"]}) == 100
    assert all(is_held_out(pair["clean"]) for pair in shipped["pairs"])


def test_clean_has_two_names_and_corrupt_three_others(language, shipped):
    for pair in shipped["pairs"]:
        clean = [token for token in TOKENIZER.tokenize(pair["clean"]) if token in IOI[language].names]
        corrupt = [token for token in TOKENIZER.tokenize(pair["corrupt"]) if token in IOI[language].names]
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
def test_prompts_of_the_most_recent_subject_say_who_is_who(form):
    path = PROMPTS / f"recent_{form}.json"
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


def test_parallel_text_is_held_out_in_both_directions_without_unknown_words():
    header, *pairs = [line.split("\t") for line in (PROMPTS / "en_fr.tsv").read_text(encoding="utf-8").splitlines()]
    assert header == ["en", "fr"] and len({english for english, _ in pairs}) == 100
    for english, french in pairs:
        assert is_held_out(f"EN: {english} FR:") and is_held_out(f"FR: {french} EN:")
        assert TOKENIZER.unk_token_id not in TOKENIZER(f"EN: {english} FR: {french}")["input_ids"]
    assert sentence_pairs(5, seed=0) == [tuple(pair) for pair in pairs[:5]] != sentence_pairs(5, seed=1)


# -- every set ---------------------------------------------------------------------------------------------------------


def mentions(words, text):
    """Where names are mentioned, by a search of its own."""
    either = "|".join(map(re.escape, sorted(words.names, key=len, reverse=True)))
    return list(re.finditer(rf"(?<!\w)({either})(?!\w)" if words.space else either, text))


@pytest.mark.parametrize("code", LANGUAGES)
def test_prompts_of_every_language_name_two_people_and_corrupt_ones_three_others(code):
    prompts, words = PromptSet.load(f"ioi_{code}"), LANGUAGES[code][1]
    orders = Counter()
    for prompt in prompts:
        clean, corrupt = mentions(words, prompt.clean), mentions(words, prompt.corrupt)
        io, s = prompt.io_name, prompt.s_name
        names, others = [found[0] for found in clean], [found[0] for found in corrupt]
        assert names in ([io, s, s], [s, io, s])
        assert len(set(others)) == len(others) == 3 and not set(names) & set(others)
        assert re.sub("|".join(names), "_", prompt.clean) == re.sub("|".join(others), "_", prompt.corrupt)
        spans = prompt.spans("clean")
        assert sorted(spans[name] for name in ("io", "s1", "s2")) == [found.span() for found in clean]
        assert prompt.io_token == " " * words.space + io
        # Without a space before it a Latin name might be other tokens.
        assert not words.space or clean[0].start() > 0
        orders[names[0] == io] += 1
    assert orders == {True: 50, False: 50}


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_template_of_a_language_is_used(code):
    words, prompts = LANGUAGES[code][1], PromptSet.load(f"ioi_{code}")
    for template in words.templates:
        parts = [part for part in re.split(r"\{\w+\}", template) if part.strip()]
        assert any(all(part in prompt.clean for part in parts) for prompt in prompts)


def test_agreement_crosses_the_numbers_of_noun_and_distractor_and_answers_follow_the_noun():
    numbers = Counter()
    for prompt in PromptSet.load("agreement_en"):
        for text, right, wrong in (
            (prompt.clean, prompt.answer, prompt.wrong),
            (prompt.corrupt, prompt.corrupt_answer, prompt.corrupt_wrong),
        ):
            noun, distractor = text.split()[1], text.split()[-1]
            assert (right, wrong) == (("are", "is") if noun.endswith("s") else ("is", "are"))
            assert any(
                noun.removesuffix("s") in nouns.split() and distractor.removesuffix("s") in distractors.split()
                for nouns, _, distractors in PHRASES
            )
            spans = prompt.spans("clean" if text == prompt.clean else "corrupt")
            assert spans["noun"] == (4, 4 + len(noun.removesuffix("s")))
            assert spans["distractor"] == (len(text) - len(distractor), len(text))
            numbers[text == prompt.clean, noun.endswith("s"), distractor.endswith("s")] += 1
        assert prompt.clean.replace("s ", " ") == prompt.corrupt.replace("s ", " ")
    assert set(numbers.values()) == {25} and len(numbers) == 8


def test_capitals_are_asked_for_in_the_clean_text_and_their_rivals_in_the_corrupt_one():
    texts = {
        template.format(country=country): capital
        for country, capital in COUNTRIES.items()
        for template in CAPITAL_TEMPLATES
    }
    for prompt in PromptSet.load("capitals_en"):
        assert texts[prompt.clean] == prompt.answer == prompt.corrupt_wrong
        assert texts[prompt.corrupt] == prompt.corrupt_answer == prompt.wrong != prompt.answer
        assert prompt.clean.split()[:-2] == prompt.corrupt.split()[:-2]
        assert prompt.positions == {"country": -2} and prompt.clean.endswith(" is")


@pytest.mark.parametrize("name", first_only(RECIPES))
def test_every_set_has_a_hundred_prompts_whose_answers_a_byte_level_tokenizer_tells_apart(name):
    prompts = PromptSet.load(name)
    assert len({prompt.clean for prompt in prompts}) == len(prompts) == 100
    tokenizer = bpe_tokenizer([prompt.clean for prompt in prompts])
    for text in ("clean", "corrupt"):
        tokens = prompts.tokenize(tokenizer, text, answers="first_difference")
        assert len(tokens.answer_ids) == 100


def test_word_problems_are_solved_right_and_never_in_both_files():
    seen = {}
    for name in PLAIN:
        problems = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(problems) == 100 and problems[:5] == word_problems(name, 5, 0) != word_problems(name, 5, 1)
        for number, problem in enumerate(problems):
            *sentences, result = problem["answer"].split("\n")
            assert len(sentences) == 1 + number % 2
            for sentence in sentences:
                calculation, found = re.search(r"<<(\d+[-+*/]\d+)=(\d+)>>\2 ", sentence).groups()
                assert eval(calculation) == int(found) and 2 <= int(found) <= 99
            assert result == f"#### {found}"
            for shown in re.findall(r"\d+", problem["question"]):
                assert 2 <= int(shown) <= 10 and shown in problem["answer"]
            assert "{" not in problem["question"] + problem["answer"]
            assert is_held_out(problem["question"]) == PLAIN[name]
        seen[name] = {problem["question"] for problem in problems}
    assert not seen["plain_test"] & seen["plain_train"] and all(len(some) == 100 for some in seen.values())
