"""Which heads align a translation with its source? Diagonals of attention on sentence pairs, against mismatched pairs.

    python experiments/translation_heads.py
    python experiments/translation_heads.py --model Qwen/Qwen2.5-3B --dtype bfloat16 --pairs en-fr en-de en-ja --check_known
    python experiments/translation_heads.py --model google/gemma-2-2b --pairs en-fr fr-en fr-zh --thresholds zh=0.03
    python experiments/translation_heads.py --dataset sentences.tsv --pairs de-en --show_heads 4.5 3.0 --show_sentences 0 7

Method. Each pair of sentences is one prompt, "EN: <a> FR: <b>" (`--template`). Kept are pairs with 3 to 50 words in a, no digit
and none of % - _ / * &, a backslash, U+3000 or a note of music, whose numbers of tokens differ by 5 at most
(`--max_length_difference`); in scripts without spaces a character counts as a word (ours). Of a head's attention pattern the part
is cut out in which the translation, from the token on where its label begins (found by its place in the text), looks at what is
before, without the start token. A sentence's score is the mean of the diagonals at offsets 0, +1 and -1, each the mean of its
entries; a head's is the mean over sentences. Crops that are too short for three diagonals are skipped and counted. Control: the
pairs are sorted by the number of tokens of b, and neighbours swap b, so that lengths match and sentences do not. (Where
neighbours have the same b it is skipped.) Heads are ranked, and translation - control has Student's t 95% intervals over
sentences.

A head is found if translation - control is above the threshold of the pair's languages (`--threshold`, for single languages
`--thresholds`; of two the lower one). By default they are the published ones, of Qwen2.5-3B (0.075) and Gemma 2 2B (0.04), which
were chosen by eye for those models; for others 0.05 (ours), a convention and no test: go by the ranking and the intervals. The
difference is blind where all sentences are built alike, so that heads attend to a control as they do to a translation. That is so
of the grammar of the shipped tiny models: with them the default is `--criterion translation`, the score itself, above 0.13.

`--check_known` compares with the lists that are published: Qwen2.5-3B and Gemma 2 2B, from English to French, German, Japanese,
Arabic and Spanish. There is none for the other directions or for pairs without English. A model goes by the end of its name.

Sentences: `--dataset` is a .tsv or .jsonl file, a set that ships (en_fr), or a data set on the hub that is arranged as opus-100,
which is the default but for the shipped models. Sets of heads of any two language pairs are compared: Jaccard index, its mean
for random sets of the same sizes, and the probability that these share as many.

Written to the folder OUT, for each PAIR: PAIR_translation.npy and PAIR_control.npy [sentence layer head], NaN where skipped;
figures/PAIR.png, translation, control and difference; figures/PAIR_attention.html, a page for the browser with the attention of
--show_heads (by default the five highest) on --show_sentences. Also attention.json, the same for the report; heads.csv, all
scores by head; overlaps.csv; found.json, what `translation_ablation.py --heads` takes; known.csv, precision and recall against
published lists, with --check_known; config.yaml (running it again gives the same); and last summary.json, what was run: where it
is, the rest is.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge
from typing_extensions import Doc

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # heads of a pair on the terminal
SENTENCES = 3  # that a page shows if not told otherwise
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config(px.flags.Translation):
    pairs: px.flags.OneOrMore[str] = ("en-fr", "fr-en")
    """pairs of languages, source first"""
    limit: Annotated[
        Annotated[int, Ge(0)] | None,
        Doc("only the first N pairs that pass the filters, 0 for all; by default as many as ten minutes allow here"),
    ] = None
    out: px.flags.Out = None
    check_known: bool = False
    """compare with the published heads of the model: from English, into five languages"""
    show_heads: tuple[px.flags.HeadLabel, ...] = ()
    """heads to look at, as in 4.5; by default the five highest of each pair"""
    show_sentences: tuple[Annotated[int, Ge(0)], ...] = ()
    """sentences to look at, by their place among those that are kept; by default the first three"""

    def check_flags(self) -> None:
        if self.limit == 1:
            raise ValueError("--limit must be 2 or more, or 0 for all, not 1: a control needs two pairs.")
        for pair in self.pairs:
            try:
                px.prompts.parse_languages(pair)
            except ValueError as error:
                raise ValueError(f"--pairs: {error}") from None
        if len({px.prompts.parse_languages(pair) for pair in self.pairs}) < len(self.pairs):
            raise ValueError("--pairs names a pair of languages twice; give each once.")


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # a few forward passes are no work to share
    # Everything that can be wrong is found before the first forward pass.
    px.io.need("report")
    known = published_heads(config) if config.check_known else {}
    thresholds = {pair: px.translation.threshold_of(px.prompts.parse_languages(pair), config) for pair in config.pairs}
    run = px.RunFolder(config, "translation_heads", config.model)
    raw = {pair: px.translation.load_sentences(pair, config) for pair in config.pairs}
    model, tokenizer = config.load_model()
    px.methods.check_patterns(model)
    wanted = px.models.heads_of(config.show_heads, config.model, model, "show_heads")
    sentences = {
        pair: px.translation.sentences_of(pair, of_pair, model, tokenizer, config, config.limit)
        for pair, of_pair in raw.items()
    }
    check_shown(config.show_sentences, sentences)
    work = f"attention of all heads on {sum(len(of.prompts) for of in sentences.values())} sentence pairs and their controls"
    seconds = sum(3 * px.runs.seconds_a_pass(model, of_pair.prompts) for of_pair in sentences.values())
    if not run.announce(work, seconds, n=max(len(of_pair.prompts) for of_pair in sentences.values())):
        return

    # The scores of translations and controls, and where the best heads look.
    scores = {
        pair: px.translation.scores_of(pair, of_pair, model, thresholds[pair], config)
        for pair, of_pair in sentences.items()
    }
    criterion = px.translation.criterion_of(config)
    heads = head_table(scores, criterion)
    views = {}
    for pair, of_pair in sentences.items():
        shown = config.show_sentences or range(min(SENTENCES, len(of_pair.prompts)))
        names = [f"{pair}, sentence {number}" for number in range(len(of_pair.prompts))]
        chosen = wanted or highest(heads, pair)
        views[pair] = px.runs.look(model, tokenizer, of_pair.prompts.input_ids, chosen, which=shown, names=names)

    # How the heads of two pairs overlap, and how well the published ones are found.
    overlaps = overlap_table(scores)
    against = px.methods.precision_and_recall({pair: found.found for pair, found in scores.items()}, known)
    facts = px.metadata(
        model,
        model=config.model,
        dataset=px.translation.dataset_of(config),
        criterion=criterion,
        threshold_from=px.translation.source_of_threshold(config),
        pairs={pair: facts_of(sentences[pair], scores[pair]) for pair in scores},
    )

    print(summary(facts, heads, overlaps, against))
    stands = [evidence(pair, of_pair, heads) for pair, of_pair in facts["pairs"].items()]
    with run.writing(facts, stands, replacing=("*.npy", "*.csv", "figures/*")):
        for pair, found in scores.items():
            run.array(f"{pair}_translation", found.translation)
            run.array(f"{pair}_control", found.control)
            run.figure(pair, drawn(pair, found, run.of, len(sentences[pair].kept)))
            page = px.report.attention_page(views[pair], f"{run.of}, {pair}: attention")
            with px.io.atomic_path(run.path / f"figures/{pair}_attention.html") as temporary:
                temporary.write_text(page, encoding="utf-8")
        run.views([view for of_pair in views.values() for view in of_pair])
        for name, rows in (("heads", heads), ("overlaps", overlaps), ("known", against)):
            if rows:
                run.table(name, rows)
        run.json("found", {pair: of_pair["found"] for pair, of_pair in facts["pairs"].items()})


# -- what is run -------------------------------------------------------------------------------------------------------


def published_heads(config: Config) -> dict[str, list[str]]:
    """The published heads of the model by pair of languages; ValueError if none are of --pairs."""
    heads: dict[str, list[str]] = px.translation.published(config).get("heads", {})
    if not any(heads.get(pair.lower()) for pair in config.pairs):
        lists = "; ".join(
            f"{name} ({', '.join(known.get('heads', ()))})"
            for name, known in px.methods.read_known(config.known or px.methods.KNOWN).items()
        )
        raise ValueError(
            f"--check_known: no list of heads is published for {', '.join(config.pairs)} of {config.model}; there are only those "
            f"of {lists}: choose among these --pairs, or give lists of your own with --known."
        )
    return heads


def check_shown(shown: tuple[int, ...], sentences: dict[str, px.translation.Sentences]) -> None:
    """Raise ValueError for a sentence to look at that a pair has not."""
    for pair, of_pair in sentences.items():
        if max(shown, default=0) >= len(of_pair.kept):
            raise ValueError(
                f"--show_sentences {max(shown)}: {pair} has {len(of_pair.kept)} sentences, the first being 0."
            )


# -- statistics --------------------------------------------------------------------------------------------------------


def head_table(scores: dict[str, px.translation.Scores], criterion: str) -> Rows:
    """One row per pair and head, the highest first: scores, and whether it is found."""
    rows = []
    for pair, of_pair in scores.items():
        translation, control = of_pair.means
        found, differences = set(of_pair.found), of_pair.difference
        of_this = [
            {
                "pair": pair,
                "layer": layer,
                "head": head,
                "translation": float(translation[layer, head]),
                "control": float(control[layer, head]),
                "difference": float(translation[layer, head] - control[layer, head]),
                "difference_low": float(differences.low[layer, head]),
                "difference_high": float(differences.high[layer, head]),
                "threshold": of_pair.threshold,
                "found": (layer, head) in found,
            }
            for layer, head in np.ndindex(translation.shape)
        ]
        rows += sorted(of_this, key=lambda row: -row[criterion])
    return rows


def highest(heads: Rows, pair: str) -> list[tuple[int, int]]:
    """The highest heads of a pair."""
    return [(row["layer"], row["head"]) for row in heads if row["pair"] == pair][: px.runs.HEADS]


def overlap_table(scores: dict[str, px.translation.Scores]) -> Rows:
    """One row for any two pairs of languages: how many of their heads are the same, against random sets."""
    return [
        {"a": a, "b": b, "heads_a": len(scores[a].found), "heads_b": len(scores[b].found)}
        | px.stats.head_overlap(scores[a].found, scores[b].found, scores[a].by_head.size)._asdict()
        for a, b in itertools.combinations(scores, 2)
    ]


def facts_of(sentences: px.translation.Sentences, scores: px.translation.Scores) -> dict[str, Any]:
    """What was run of one pair, and found."""
    skipped = [int(np.isnan(values[:, 0, 0]).sum()) for values in (scores.translation, scores.control)]
    return {
        "n_sentences": len(sentences.kept),
        "n_control": len(sentences.control),
        "dropped": sentences.dropped,
        "skipped": skipped[0],
        "skipped_control": skipped[1],
        "hash": px.io.data_hash([sentences.kept]),
        "threshold": scores.threshold,
        "found": [px.stats.head_label(head) for head in scores.found],
    }


# -- what is shown -----------------------------------------------------------------------------------------------------


def drawn(pair: str, scores: px.translation.Scores, of: str, n: int) -> Figure:
    """Translation, control and their difference by head."""
    return px.figures.compared_heads(
        *scores.means,
        names=("Translation", "Control"),
        title=f"Translation heads, {pair}: {of}, {n} sentences",
        label="mean attention on the diagonals",
    )


def summary(facts: dict[str, Any], heads: Rows, overlaps: Rows, against: Rows) -> str:
    """What the terminal shows: of each pair its sentences and highest heads, how pairs overlap, and the published lists."""
    lines = [f"{facts['model']} on {facts['dataset']}, ranked by {facts['criterion']}"]
    for pair, of_pair in facts["pairs"].items():
        dropped = ", ".join(f"{reason}: {count}" for reason, count in of_pair["dropped"].items()) or "none"
        lines += [
            f"\n{pair}: {of_pair['n_sentences']} sentences (dropped: {dropped}), control {of_pair['n_control']}, too short "
            f"{of_pair['skipped']} and {of_pair['skipped_control']}",
            "   head  translation  control  difference    95% interval",
        ]
        for row in [row for row in heads if row["pair"] == pair][:SHOWN]:
            mark = "  found" if row["found"] else ""
            span = f"[{row['difference_low']:.3f}, {row['difference_high']:.3f}]"
            lines.append(
                f"{row['layer']:>4}.{row['head']:<2} {row['translation']:12.3f} {row['control']:8.3f} {row['difference']:11.3f} "
                f"{span:>15}{mark}"
            )
        lines.append(f"found: {len(of_pair['found'])} heads above {of_pair['threshold']:g} ({facts['threshold_from']})")
    if overlaps:
        lines.append("\noverlap         shared  Jaccard  by chance       p")
    lines += [
        f"{row['a'] + ' ' + row['b']:<15} {row['shared']:6} {row['jaccard']:8.2f} {row['chance']:10.2f} {row['p']:8.2g}"
        for row in overlaps
    ]
    if against:
        lines.append("\nagainst published heads  precision  recall")
    lines += [
        f"{row['pair']:<24} {row['precision']:9.2f} {row['recall']:7.2f}  both: {row['both'] or '-'}; only found: "
        f"{row['only_found'] or '-'}; only published: {row['only_published'] or '-'}"
        for row in against
    ]
    if against and (unknown := [pair for pair in facts["pairs"] if pair not in {row["pair"] for row in against}]):
        lines.append(f"no list is published for {', '.join(unknown)}")
    return "\n".join(lines)


def evidence(pair: str, of_pair: dict[str, Any], heads: Rows) -> px.runs.Evidence:
    """The highest head of a pair, against mismatched sentences."""
    ranked = [row for row in heads if row["pair"] == pair]
    row = ranked[0]
    effect = (
        f"{pair}: {row['layer']}.{row['head']}, the highest of {len(ranked)} heads, attends along the diagonals of translations "
        "more than of controls by"
    )
    above = sum(one["difference_low"] > 0 for one in ranked)
    control = (
        f"{of_pair['n_control']} mismatched pairs of similar lengths, {row['control']:.3f}; {above} of {len(ranked)} heads have "
        "an interval above 0"
    )
    difference = px.Interval(*(row[f"difference{end}"] for end in ("", "_low", "_high")))
    return px.runs.Evidence(f"{of_pair['n_sentences']} sentences", effect, difference, control, "a larger --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
