"""At what depth does a translation appear, and does the source's word first? The logit lens in both languages.

    python experiments/translation_lens.py
    python experiments/translation_lens.py --model tiny-qwen2.5 --pair fr-en
    python experiments/translation_lens.py --model Qwen/Qwen2.5-3B --heads 20.1 20.4 20.6 25.5 26.12 --words 0 1

Method. A prompt ends before one of the `--words` of the translation: "EN: the cat sees the dog. FR: le chat" (they are made in
pairs, of which the source alone tells which word comes next, or stand alone; see translation_ablation.py). The logit lens
(nostalgebraist 2020) reads the residual stream at the last token after every block with the model's own final norm and
unembedding: probability and rank of the right word, and of the word of the source that the heads together look at most. The heads
are those of `--heads`; by default all that translation_heads.py finds in the same sentences.

Written to the folder OUT: lens.csv, one row per depth (0: the embedding), mean probabilities and median ranks; figures/lens.png;
config.yaml (running it again gives the same); and last summary.json, what was run: where it is, the rest is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

import pyvene_ext as px

SHOWN = 8  # pairs of words on the terminal
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config(px.flags.TranslationHeads):
    out: px.flags.Out = None


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # a few forward passes per prompt are no work to share
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "translation_lens", config.model, config.pair)
    setting = px.translation.prepare(config, config.heads)
    model, plus = setting.model, setting.asked.plus
    px.methods.check_patterns(model)
    seconds = setting.seconds_to_find_heads() + 3 * px.runs.seconds_a_pass(model, plus)
    work = f"the lens in two languages on {px.io.counted(len(plus), 'prompt')}"
    if not run.announce(work, seconds, n=len(plus) // len(config.words)):
        return
    heads = setting.heads

    # The word of the source that the heads look at most, and the lens on it and on the right word.
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": True}
    targets = [own for own, _ in plus.answer_ids]
    sources = px.methods.source_tokens(model, plus, heads, source_spans(plus), **options)
    # Only the first token of each pair is read; the second must be another one, which the right word need not be.
    others = [next(i for i in ids if i != source) for ids, source in zip(plus.answer_ids, sources, strict=True)]
    lenses = {
        "target": px.methods.logit_lens(model, plus, **options),
        "source": px.methods.logit_lens(model, plus.with_answer_ids(zip(sources, others, strict=True)), **options),
    }

    # Over prompts, by depth.
    rows = depth_table(lenses)
    words = dict.fromkeys(zip(sources, targets, strict=True))
    pairs = [" -> ".join(str(setting.tokenizer.decode([word])) for word in pair) for pair in list(words)[:SHOWN]]
    facts = px.metadata(
        model,
        **setting.facts,
        heads=[px.stats.head_label(head) for head in setting.heads],
        looked_at=pairs,
    )

    print(f"{setting.headline(setting.heads)}\n{summary(pairs, rows)}")
    with run.writing(facts, [evidence(setting, lenses, rows, config.seed)]):
        run.table("lens", rows)
        curves = {name: np.array([row[f"{name}_probability"] for row in rows]) for name in lenses}
        run.figure("lens", px.figures.word_probabilities(curves, f"Logit lens: {run.of}"))


def source_spans(prompts: px.TokenizedPrompts) -> list[tuple[int, int]]:
    """`[first, last)` of the tokens of the sentence to be translated."""
    return [
        (len(ids) + places["source_first"], len(ids) + places["source"] + 1)
        for ids, places in zip(prompts.input_ids, prompts.positions, strict=True)
    ]


def depth_table(lenses: dict[str, px.methods.Lens]) -> Rows:
    """One row per depth: mean probability and median rank of the word in either language."""
    return [
        {
            "depth": depth,
            **{f"{name}_probability": float(lens.probability[depth].mean()) for name, lens in lenses.items()},
            **{f"{name}_median_rank": float(np.median(lens.rank[depth])) for name, lens in lenses.items()},
        }
        for depth in range(len(lenses["target"].rank))
    ]


def summary(pairs: list[str], rows: Rows) -> str:
    """What the terminal shows: the words that are looked at, and both languages by depth."""
    lines = [
        f"\nlens: looked at -> right ({'; '.join(pairs)})",
        "depth  p(target)  p(source)  rank of target  of source (medians)",
    ]
    lines += [
        f"{row['depth']:5} {row['target_probability']:10.3f} {row['source_probability']:10.3f} "
        f"{row['target_median_rank']:15.0f} {row['source_median_rank']:10.0f}"
        for row in rows
    ]
    return "\n".join(lines)


def evidence(
    setting: px.translation.WordSetting, lenses: dict[str, px.methods.Lens], rows: Rows, seed: int
) -> px.runs.Evidence:
    """Where the source's word is ahead of the right one by most, before the last depth."""
    ahead = {row["depth"]: row["source_probability"] - row["target_probability"] for row in rows[:-1]}
    depth = max(ahead, key=lambda at: ahead[at])
    source, target = (lenses[name].probability[depth] for name in ("source", "target"))
    difference = px.stats.paired_bootstrap(source, target, px.rng(seed, "bootstrap"), 2000)
    effect = f"at depth {depth}, where most of {len(ahead)}, the source's word is more probable than the right one by"
    last = f"at the last depth {rows[-1]['source_probability'] - rows[-1]['target_probability']:.2f}"
    return px.runs.Evidence(f"{len(setting.asked.plus)} prompts", effect, difference, last, "a larger --limit")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
