"""The shipped tiny models load offline, stay small and do what their cards say; the generators behind them are seeded."""

import json
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny.train_tiny_models import (
    ARCHITECTURES,
    BOS,
    EOS,
    RECIPES,
    REPEATED,
    REQUIRED,
    SHIPPED,
    TASK_NAMES,
    batches,
    build_tokenizer,
    evaluate,
    text_row,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyvene_ext.prompts import tiny_tasks
from tests.tiers import first_only

TOKENIZER = build_tokenizer()
SLACK = 0.04  # on 64 prompts one wrong answer costs 0.016


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name):
    return AutoTokenizer.from_pretrained(SHIPPED / name, local_files_only=True)


@pytest.fixture(scope="module")
def model(name):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(SHIPPED / name, local_files_only=True).eval()


# --- shipped models ---------------------------------------------------------------------------------------------------


def test_folder_is_complete_and_small(name):
    folder = SHIPPED / name
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert files >= {"evaluation.json", "loss.csv", "loss.png"}
    assert (folder / "model.safetensors").stat().st_size < 4_000_000


def test_architecture_is_the_one_in_the_script(name, model):
    _, shape = ARCHITECTURES[name]
    for key in shape.keys() - {"rope_parameters"}:
        assert getattr(model.config, key) == shape[key]
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(TOKENIZER)
    if name == "tiny-llama3.1":
        assert model.config.rope_parameters["rope_type"] == "llama3"
    if name == "tiny-gemma2":
        assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}


def test_shipped_tokenizer_is_the_one_in_the_script(tokenizer):
    text = "When Lisa and David 当小娟和小龙去商店时， <<7+5=12>> #### 12"
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 256)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)


def test_copy_of_a_shipped_tokenizer_is_the_same(tokenizer, model, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("小娟和小龙") == ["小娟", "和", "小龙"]


def test_folder_states_the_recipe_of_the_script_and_meets_the_requirement(name):
    evaluation = json.loads((SHIPPED / name / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["recipe"] == asdict(RECIPES[name])
    assert evaluation["prompts_per_task"] >= 500
    for task in TASK_NAMES:
        assert evaluation["accuracy"][task] >= REQUIRED[task]


@pytest.mark.slow
def test_accuracy_measured_again_on_fresh_prompts(model, tokenizer):
    accuracy = evaluate(model, tokenizer, n_prompts=64, draw=np.random.default_rng(12345))
    for task in TASK_NAMES:
        assert accuracy[task] >= REQUIRED[task] - SLACK, task


def test_chinese_ioi_needs_no_space_and_english_no_bos(model, tokenizer):
    for prompt, answer in (
        ("当小娟和小龙去商店时，小龙把书给了", "小娟"),
        ("When Lisa and David went to the store, David gave the book to", "Lisa"),
    ):
        for special in (True, False):
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)
            logits = model(input_ids=inputs["input_ids"]).logits[0, -1]
            assert tokenizer.convert_ids_to_tokens(logits.argmax().item()) == answer


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_texts_survive_encoding_and_decoding_with_right_offsets(task):
    draw = np.random.default_rng(0)
    for _ in range(50):
        example = tiny_tasks.draw(task, draw, held_out=True)
        text = example.prompt + example.answer
        encoded = TOKENIZER(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        assert ids[0] == BOS
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
        assert [text[start:end] for start, end in offsets[1:]] == TOKENIZER.convert_ids_to_tokens(ids[1:])
        assert all(before <= start for (_, before), (start, _) in pairwise(offsets))


def test_space_before_a_word_changes_nothing():
    assert (
        TOKENIZER(" Lisa")["input_ids"]
        == TOKENIZER("Lisa")["input_ids"]
        == [BOS, *TOKENIZER.convert_tokens_to_ids(["Lisa"])]
    )


def test_chinese_is_split_into_the_longest_known_words():
    words = ["在", "图书馆", "里", "，", "小娟", "和", "小龙", "见面", "后", "，", "小龙", "把", "笔记本", "展示给了"]
    assert TOKENIZER.tokenize("".join(words)) == words


def test_punctuation_and_numbers_are_tokens_and_unknown_words_are_unk():
    tokens = TOKENIZER.tokenize("store, 12? <<7+5=12>> #### 30")
    assert " ".join(tokens) == "store , 12 ? << 7 + 5 = 12 >> #### 30"
    assert TOKENIZER.tokenize("Zebediah gave 31") == ["<unk>", "gave", "<unk>"]


# --- generators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", first_only(tiny_tasks.TASKS))
def test_generators_are_seeded_and_training_never_meets_held_out_prompts(task):
    def prompts(seed, held_out):
        draw = np.random.default_rng(seed)
        return [tiny_tasks.draw(task, draw, held_out).prompt for _ in range(200)]

    assert prompts(1, True) == prompts(1, True) != prompts(2, True)
    assert not set(prompts(1, True)) & set(prompts(3, False))
    assert all(tiny_tasks.is_held_out(prompt) for prompt in prompts(1, True))
    assert not any(tiny_tasks.is_held_out(prompt) for prompt in prompts(1, False))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_batches_of_a_step_are_the_same_for_the_same_seed(recipe):
    first, second = (batches(recipe, 0.1, TOKENIZER, np.random.default_rng(7)) for _ in range(2))
    assert first == second
    assert {task: len(rows) for task, rows in first.items()} == {task: recipe.share(task) for task in TASK_NAMES}


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_loss_falls_on_the_answer(task):
    example = tiny_tasks.draw(task, np.random.default_rng(0), held_out=False)
    ids, weights = text_row(example, TOKENIZER, prompt_weight=0.0, bos=True)
    answer = [token for token, weight in zip(ids, weights, strict=True) if weight > 0]
    assert answer == [*TOKENIZER(example.answer, add_special_tokens=False)["input_ids"], EOS]
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("rotate", [False, True])
def test_tokens_of_a_repeated_block_follow_from_the_text_before(rotate):
    draw = np.random.default_rng(0)
    for block in (8, 40):
        ids = tiny_tasks.repeated_block(draw, range(4, 400), block, 100, held_out=True, rotate=rotate)
        assert len(ids) == 100
        assert len(set(ids)) == len(set(ids[:block])) == block
        assert (ids[block : 2 * block] == ids[:block]) != rotate
        surprises = [i for i in range(block, 100) if ids[i] not in _successors(ids, i)]
        assert surprises[0] == block
        assert len(surprises) == 1 + rotate  # a rotated block surprises once more: when it first goes round


def _successors(ids, i):
    return {ids[j] for j in range(1, i) if ids[j - 1] == ids[i - 1]}


def test_arithmetic_answers_are_right():
    draw = np.random.default_rng(0)
    for _ in range(200):
        example = tiny_tasks.arithmetic(draw)
        *steps, total = example.answer.replace("####", "").split()
        for step in steps:
            left, right = step.strip("<>").split("=")
            first, second = (int(number) for number in left.replace("-", "+").split("+"))
            assert int(right) == (first + second if "+" in left else first - second)
            assert 2 <= int(right) <= tiny_tasks.LARGEST_NUMBER
        assert steps[-1].endswith(f"={total}>>")
        assert steps[0].startswith(f"<<{example.prompt.split(' has ')[1].split()[0]}")


def test_no_word_is_spelt_alike_in_english_and_french():
    entries = (*tiny_tasks.NOUNS_MASCULINE, *tiny_tasks.NOUNS_FEMININE, *tiny_tasks.ADJECTIVES, *tiny_tasks.VERBS)
    words = [entry.split(":") for entry in (*entries, *tiny_tasks.ADVERBS)]
    assert not {word[0] for word in words} & {french for word in words for french in word[1:]}
    assert REPEATED not in tiny_tasks.TASKS


def test_enough_names():
    for names in (tiny_tasks.NAMES_EN, tiny_tasks.NAMES_ZH):
        assert len(set(names)) == len(names) >= 40
