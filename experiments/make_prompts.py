"""Make the prompt sets that ship, in `pyvene_ext/prompts/data/`.

    python experiments/make_prompts.py
    python experiments/make_prompts.py ioi_fr capitals_en --n 500 --seed 1 --out my_prompts

Without names it makes them all. Names and words are in `tiny/prompt_words.py` and `pyvene_ext/prompts/tiny_tasks.py`.

Indirect object (ioi_en, ioi_zh, ioi_fr, ioi_de, ioi_es, ioi_ja, ioi_ar): clean prompts have two names, one of which returns;
corrupt prompts are the same sentence with three other names. Half of each set has the indirect object first (ABBA), half second
(BABA). Clean prompts in English and Chinese are held out from the training of the tiny models.

Most recent subject (recent_en, recent_tiny): the same is said of two pairs of people, and the prompt ends where the one of the
last pair is to be named. The answer (IO) is this latest subject; the wrong one (S) is its counterpart in the first pair, who was
named there; earlier1 and earlier2 are the others. Corrupt prompts have four other names. recent_tiny says it in words that the
tiny models know; none of them was trained on it.

Agreement (agreement_en): "The keys to the cabinet" is followed by "are" and not "is". The noun and the distractor, which are
positions of these names, are singular and plural in all four combinations. The corrupt prompt has the noun in the other number,
and its answers are swapped.

Capitals (capitals_en): "The capital of France is", Paris against the capital of another country, which the corrupt prompt asks
for. The position country is the last token of the country, whatever it is called in the two texts.

The task of tiny-circuit (tiny_circuit, see `tiny/train_tiny_circuit.py`): "d a c b 2 3 =", c against the corrupt prompt's answer.
Each edge of the model's circuit alone, patched from the corrupt prompt, changes the answer.

Parallel text (en_fr): English sentences and their French translations, both held out from the training of the tiny models.

Word problems in plain English (plain_test, plain_train), in GSM8K's form: of one step and of two in turn, with numbers from 2 to
10 and results from 2 to 99. No question is in both files; solved examples are taken from plain_train.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tiny import train_tiny_circuit
from tiny.prompt_words import (
    CAPITAL_TEMPLATES,
    COUNTRIES,
    LANGUAGES,
    PHRASES,
    PLAIN_BOXES,
    PLAIN_THINGS,
    STORIES,
    Story,
)

import pyvene_ext as px
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.prompts.tiny_tasks import IOI, NAMES_EN, ioi_pair, is_held_out, sentence_pair

Pair = dict[str, Any]
RECENT = {
    "en": "{a} is a teacher. {b} is a student. The child is {b}. {c} is a teacher. {d} is a student. The child is",
    "tiny": "{a} greets the doctor. {b} greets the singer. the singer greets {b}. "
    "{c} greets the doctor. {d} greets the singer. the singer greets",
}


@dataclass(frozen=True)
class Settings:
    sets: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """names of the sets; by default all of them"""
    out: Path = PROMPTS
    """the folder that is written; by default where the package has them"""
    n: px.flags.Count = 100
    """prompts of each set"""
    seed: px.flags.Seed = 0


def ioi(language: str) -> Callable[[np.random.Generator, int], Pair | None]:
    """Pairs of one language in the format of the published IOI files, ABBA and BABA in turn."""

    def draw(generator: np.random.Generator, number: int) -> Pair | None:
        pair = ioi_pair(generator, LANGUAGES[language][1], order=("ABBA", "BABA")[number % 2])
        if language in IOI and not is_held_out(pair.clean):
            return None
        return {key: value for key, value in asdict(pair).items() if key != "order"}

    return draw


def recent(form: str) -> Callable[[np.random.Generator, int], Pair]:
    """Pairs of the task "most recent subject", in a form of `RECENT`."""

    def draw(generator: np.random.Generator, number: int) -> Pair:
        names = [NAMES_EN[i] for i in generator.choice(len(NAMES_EN), size=8, replace=False)]
        clean, corrupt = (
            RECENT[form].format(**dict(zip("abcd", some, strict=True))) for some in (names[:4], names[4:])
        )
        first, wrong, third, right = names[:4]
        return {
            "clean": clean,
            "corrupt": corrupt,
            "io_name": right,
            "s_name": wrong,
            "io_token": f" {right}",
            "positions": {"earlier1": first, "earlier2": third},
        }

    return draw


def agreement(generator: np.random.Generator, number: int) -> Pair:
    """A noun, a distractor and the verb that agrees with the noun; the four combinations of their numbers in turn."""
    nouns, preposition, distractors = PHRASES[generator.integers(len(PHRASES))]
    noun, distractor = (str(generator.choice(words.split())) for words in (nouns, distractors))
    plural, distractor_is_plural = number % 2 == 0, number // 2 % 2 == 1
    distractor += "s" * distractor_is_plural
    clean, corrupt = (f"The {noun}{'s' * many} {preposition} the {distractor}" for many in (plural, not plural))
    answer, wrong = ("are", "is") if plural else ("is", "are")
    return {
        "clean": clean,
        "corrupt": corrupt,
        "answer": answer,
        "wrong": wrong,
        "corrupt_answer": wrong,
        "corrupt_wrong": answer,
        "positions": {
            "noun": noun,
            "distractor": distractor,
        },  # the singular is part of the plural: found in both texts
    }


def capitals(generator: np.random.Generator, number: int) -> Pair:
    """A country's capital against that of another."""
    template = CAPITAL_TEMPLATES[number % len(CAPITAL_TEMPLATES)]
    country, other = (list(COUNTRIES)[i] for i in generator.choice(len(COUNTRIES), size=2, replace=False))
    return {
        "clean": template.format(country=country),
        "corrupt": template.format(country=other),
        "answer": COUNTRIES[country],
        "wrong": COUNTRIES[other],
        "corrupt_answer": COUNTRIES[other],
        "corrupt_wrong": COUNTRIES[country],
        "positions": {"country": -2},  # before " is"
    }


def tiny_circuit(generator: np.random.Generator, _: int) -> Pair:
    clean, corrupt = (ids[0] for ids in train_tiny_circuit.pairs(1, generator))
    texts = [" ".join(train_tiny_circuit.WORDS[token] for token in ids[1:]) for ids in (clean, corrupt)]
    right, wrong = (
        train_tiny_circuit.WORDS[train_tiny_circuit.causal(ids[None])["answer"][0]] for ids in (clean, corrupt)
    )
    return {"clean": texts[0], "corrupt": texts[1], "answer": right, "wrong": wrong}


@dataclass(frozen=True)
class Recipe:
    """How the pairs of a set are drawn: a function of a generator and of how many there are, None to draw again."""

    description: str
    draw: Callable[[np.random.Generator, int], Pair | None]
    names: tuple[str, ...]
    """those of the generator"""


RECIPES = {
    f"ioi_{code}": Recipe(f"Clean/corrupt IOI pairs in {name}, ABBA and BABA in turn, seed {{}}", ioi(code), (code,))
    for code, (name, _) in LANGUAGES.items()
}
RECIPES |= {
    f"recent_{form}": Recipe(
        "Most recent subject, clean/corrupt pairs, seed {}; IO is the latest subject, S the earlier one",
        recent(form),
        ("recent", form),
    )
    for form in RECENT
}
RECIPES["agreement_en"] = Recipe(
    "Subject-verb agreement across a distractor, clean/corrupt pairs, seed {}; the corrupt noun has the other number",
    agreement,
    ("agreement_en",),
)
RECIPES["capitals_en"] = Recipe(
    "Capitals of countries, clean/corrupt pairs, seed {}; the wrong answer is the capital of the corrupt text's country",
    capitals,
    ("capitals_en",),
)
RECIPES["tiny_circuit"] = Recipe(
    "The letter that the larger of two digits counts to, clean/corrupt pairs, seed {}; the wrong answer is the corrupt text's",
    tiny_circuit,
    ("tiny_circuit",),
)
EN_FR = "en_fr"
PLAIN = {"plain_test": True, "plain_train": False}  # word problems, and whether they are held out
SETS = (*RECIPES, EN_FR, *PLAIN)
MOST_MISSES = 2000  # draws in a row that give nothing new


def prompt_set(name: str, n: int, seed: int) -> dict[str, Any]:
    """The set of this name, of `n` different clean texts, as it is written to a file."""
    recipe = RECIPES[name]
    draw = px.rng(seed, "prompts", *recipe.names)
    pairs: dict[str, Pair] = {}
    misses = 0
    while len(pairs) < n:
        pair = recipe.draw(draw, len(pairs))
        if pair is not None and pair["clean"] not in pairs:
            pairs[pair["clean"]] = pair
            misses = 0
        elif (misses := misses + 1) == MOST_MISSES:
            raise ValueError(f"there are only about {len(pairs)} different prompts of {name}; ask for fewer with --n.")
    return {"n_examples": n, "description": recipe.description.format(seed), "pairs": list(pairs.values())}


def sentence_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` different English sentences with their French translations; held out whichever is the source."""
    draw = px.rng(seed, "prompts", EN_FR)
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        english, french = sentence_pair(draw)
        if is_held_out(f"EN: {english} FR:") and is_held_out(f"FR: {french} EN:"):
            pairs[english] = french
    return list(pairs.items())


def word_problem(generator: np.random.Generator, steps: int) -> dict[str, str]:
    """A word problem with this many steps, and its solution."""
    stories = [story for story in STORIES if len(story.solution) == steps]
    story = stories[generator.integers(len(stories))]
    who, other = (NAMES_EN[i] for i in generator.choice(len(NAMES_EN), size=2, replace=False))
    things, box = (str(generator.choice(words)) for words in (PLAIN_THINGS, PLAIN_BOXES))
    words = {"who": who, "other": other, "things": things, "box": box, "boxes": box + ("es" if box == "box" else "s")}
    while True:
        numbers = dict(zip("abc", generator.integers(2, 11, size=3).tolist(), strict=True))
        lines, result = solution_of(story, numbers)
        if result is not None:
            text = "\n".join([*lines, f"#### {result}"])
            return {
                "question": f"{story.told} {story.asked}".format(**words, **numbers),
                "answer": text.format(**words),
            }


def solution_of(story: Story, numbers: dict[str, int]) -> tuple[list[str], int | None]:
    """The sentences of a solution with its calculations, and the result; None if one is not from 2 to 99, or no whole number."""
    lines, result = [], 0
    for sentence in story.solution:
        before, left, operation, right, after = re.split(r"\[(\w)(.)(\w)\]", sentence)
        first, second = (result if name == "x" else numbers[name] for name in (left, right))
        if operation == "/" and first % second:
            return [], None
        result = {"+": first + second, "-": first - second, "*": first * second, "/": first // second}[operation]
        if not 2 <= result <= 99:
            return [], None
        shown = f"{first}{operation}{second}"
        lines.append(f"{before}{shown}=<<{shown}={result}>>{result}{after}")
    return lines, result


def word_problems(name: str, n: int, seed: int) -> list[dict[str, str]]:
    """`n` different word problems, of one step and of two in turn."""
    draw = px.rng(seed, "prompts", name)
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < n:
        problem = word_problem(draw, 1 + len(problems) % 2)
        if is_held_out(problem["question"]) == PLAIN[name]:
            problems.setdefault(problem["question"], problem)
    return list(problems.values())


def main(settings: Settings) -> None:
    for name in settings.sets:
        if name not in SETS:
            raise ValueError(f"there is no prompt set {name!r}; choose among {', '.join(SETS)}.")
    for name in settings.sets or SETS:
        if name == EN_FR:
            path = settings.out / f"{name}.tsv"
            rows = [("en", "fr"), *sentence_pairs(settings.n, settings.seed)]
            with px.io.atomic_path(path) as temporary:
                temporary.write_text("".join(f"{english}\t{french}\n" for english, french in rows), encoding="utf-8")
        elif name in PLAIN:
            path = settings.out / f"{name}.jsonl"
            lines = [json.dumps(problem) + "\n" for problem in word_problems(name, settings.n, settings.seed)]
            with px.io.atomic_path(path) as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        else:
            path = settings.out / f"{name}.json"
            px.io.write_json(path, prompt_set(name, settings.n, settings.seed))
        print(f"{settings.n} {'problems' if name in PLAIN else 'pairs'}: {path}")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Settings))
