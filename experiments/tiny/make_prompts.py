"""Make the prompt sets that ship, in `pyvene_ext/prompts/data/`.

They are IOI prompts (ioi_en, ioi_zh), prompts of the task "most recent subject" (recent_en, recent_tiny), and parallel text
(en_fr).

    python experiments/tiny/make_prompts.py

IOI: clean prompts have two names, one of which returns; corrupt prompts are the same sentence with three other names. Half of
each set has the indirect object first (ABBA), half second (BABA). Every clean prompt is held out from the training of the
tiny models. Of the parallel text both directions are.

Most recent subject: the same is said of two pairs of people, and the prompt ends where the one of the last pair is to be named.
The answer (IO) is this latest subject; the wrong one (S) is its counterpart in the first pair, who was named there; earlier1 and
earlier2 are the others. Corrupt prompts have four other names. recent_tiny says it in words that the tiny models know; none of
them was trained on it.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyvene_ext as px
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.prompts.tiny_tasks import NAMES_EN, ioi_pair, is_held_out, sentence_pair

LANGUAGES = {"en": "English", "zh": "Chinese"}
RECENT = {
    "en": "{a} is a teacher. {b} is a student. The child is {b}. {c} is a teacher. {d} is a student. The child is",
    "tiny": "{a} greets the doctor. {b} greets the singer. the singer greets {b}. "
    "{c} greets the doctor. {d} greets the singer. the singer greets",
}


@dataclass(frozen=True)
class Settings:
    out: Path = PROMPTS
    """the folder that is written; by default where the package has them"""
    n_examples: px.flags.Count = 100
    """pairs of each set"""
    seed: px.flags.Seed = 0


def prompt_set(language: str, n_examples: int, seed: int) -> dict[str, Any]:
    """`n_examples` different held-out pairs in "en" or "zh", in the format of the published IOI files."""
    draw = px.rng(seed, "prompts", language)
    pairs: dict[str, dict[str, Any]] = {}
    while len(pairs) < n_examples:
        pair = ioi_pair(draw, language, order=("ABBA", "BABA")[len(pairs) % 2])
        if is_held_out(pair.clean) and pair.clean not in pairs:
            pairs[pair.clean] = {key: value for key, value in asdict(pair).items() if key != "order"}
    return {
        "n_examples": n_examples,
        "description": f"Clean/corrupt IOI pairs in {LANGUAGES[language]}, ABBA and BABA in turn, seed {seed}",
        "pairs": list(pairs.values()),
    }


def sentence_pairs(n_examples: int, seed: int) -> list[tuple[str, str]]:
    """`n_examples` different English sentences with their French translations; held out whichever is the source."""
    draw = px.rng(seed, "prompts", "en_fr")
    pairs: dict[str, str] = {}
    while len(pairs) < n_examples:
        english, french = sentence_pair(draw)
        if is_held_out(f"EN: {english} FR:") and is_held_out(f"FR: {french} EN:"):
            pairs[english] = french
    return list(pairs.items())


def recent_set(form: str, n_examples: int, seed: int) -> dict[str, Any]:
    """`n_examples` different pairs of the task "most recent subject", in a form of `RECENT`."""
    draw = px.rng(seed, "prompts", "recent", form)
    pairs: dict[str, dict[str, Any]] = {}
    while len(pairs) < n_examples:
        names = [NAMES_EN[i] for i in draw.choice(len(NAMES_EN), size=8, replace=False)]
        clean, corrupt = (
            RECENT[form].format(**dict(zip("abcd", some, strict=True))) for some in (names[:4], names[4:])
        )
        first, wrong, third, right = names[:4]
        pairs[clean] = {
            "clean": clean,
            "corrupt": corrupt,
            "io_name": right,
            "s_name": wrong,
            "io_token": f" {right}",
            "positions": {"earlier1": first, "earlier2": third},
        }
    return {
        "n_examples": n_examples,
        "description": f"Most recent subject, clean/corrupt pairs, seed {seed}; IO is the latest subject, S the earlier one",
        "pairs": list(pairs.values()),
    }


def main(settings: Settings) -> None:
    sets = {f"ioi_{language}": prompt_set(language, settings.n_examples, settings.seed) for language in LANGUAGES}
    sets |= {f"recent_{form}": recent_set(form, settings.n_examples, settings.seed) for form in RECENT}
    for name, pairs in sets.items():
        path = settings.out / f"{name}.json"
        px.io.write_json(path, pairs)
        print(f"{settings.n_examples} pairs: {path}")
    path = settings.out / "en_fr.tsv"
    rows = [("en", "fr"), *sentence_pairs(settings.n_examples, settings.seed)]
    with px.io.atomic_path(path) as temporary:
        temporary.write_text("".join(f"{english}\t{french}\n" for english, french in rows), encoding="utf-8")
    print(f"{settings.n_examples} pairs: {path}")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Settings))
