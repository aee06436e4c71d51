"""Which heads align a translation with its source? Diagonals of attention on sentence pairs, against pairs that do not belong.

    python experiments/translation_heads.py
    python experiments/translation_heads.py --model Qwen/Qwen2.5-3B --dtype bfloat16 --pairs en-fr en-de en-ja --check_known
    python experiments/translation_heads.py --model google/gemma-2-2b --pairs en-fr fr-en fr-zh --thresholds zh=0.03
    python experiments/translation_heads.py --dataset sentences.tsv --pairs de-en --show_heads 4.5 3.0 --show_sentences 0 7

Method. Each pair of sentences is one prompt, "EN: <a> FR: <b>" (`--template`). Kept are pairs with 3 to 50 words in a, no digit
and none of % - _ \\ / * &, U+3000 or a note of music, whose numbers of tokens differ by 5 at most; in scripts without spaces a
character counts as a word (ours). Of a head's attention pattern the part is cut out in which the translation, from the token on
where its label begins (found by its place in the text), looks at what is before, without the start token. A sentence's score is
the mean of the diagonals at offsets 0, +1 and -1, each the mean of its entries; a head's is the mean over sentences. Crops that
are too short for three diagonals are skipped and counted. Control: the pairs are sorted by the number of tokens of b, and
neighbours swap b, so that lengths match and sentences do not. (Where neighbours have the same b it is left out.)

A head is found if translation - control is above the threshold of the pair's languages (`--threshold`, for single languages
`--thresholds`; of two the lower one). By default they are the published ones, of Qwen2.5-3B and Gemma 2 2B, and for other models
0.05 (ours). The difference is blind where all sentences are built alike, so that a control is looked at as a translation is. That
is so of the grammar of the shipped tiny models: with them the default is `--criterion translation`, the score itself, above 0.13.

`--check_known` compares with the lists that are published: Qwen2.5-3B and Gemma 2 2B, from English to French, German, Japanese,
Arabic and Spanish. There is none for the other directions or for pairs without English. A model goes by the end of its name.

Sentences: `--dataset` is a .tsv or .jsonl file, a set that ships (en_fr), or a data set on the hub that is arranged as opus-100,
which is the default but for the shipped models. Sets of heads of any two language pairs are compared: Jaccard index, its mean
for random sets of the same sizes, and the probability that these share as many.

Written to the folder OUT, for each PAIR: PAIR_translation.npy and PAIR_control.npy [sentence layer head], NaN where skipped;
figures/PAIR.png, translation, control and difference; figures/PAIR_attention.html, to be looked at in a browser: the heads of
--show_heads (by default the five highest) on the sentences of --show_sentences. Also attention.json, the same for the report;
heads.csv, all scores by head; overlaps.csv; found.json, what `translation_causes.py --heads` takes; known.csv, precision and
recall against published lists, with --check_known; config.yaml (running it again gives the same); and last summary.json, what was
run: where it is, the rest is.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_positions
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.errors import one_sentence
from pyvene_ext.io.files import (
    atomic_path,
    output_path,
    parse_json,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.io.packages import need
from pyvene_ext.methods.heads.patterns import check_prompts
from pyvene_ext.methods.heads.translation import found_heads, translation_scores
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import TINY_MODELS, load_model
from pyvene_ext.prompts.parallel import (
    OPUS_100,
    TEMPLATE,
    Languages,
    SentencePair,
    check_template,
    filter_pairs,
    load_pairs,
    parse_languages,
    swap_neighbours,
    tokenize_pairs,
)
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.report.attention import attention_page
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import (
    HEADS,
    View,
    look,
    write_views,
)
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.graph import Node
from pyvene_ext.stats.controls import Head, head_overlap

KNOWN = Path(__file__).parent / "known_heads.json"
THRESHOLDS = {"difference": 0.05, "translation": 0.13}
SHOWN = 8  # heads of a pair on the terminal
Criterion = Literal["difference", "translation"]


@dataclass(frozen=True)
class Config:
    model: str = "tiny-gemma2"
    """a shipped tiny model, a folder, or a name on the hub"""
    pairs: tuple[str, ...] = ("en-fr", "fr-en")
    """pairs of languages, source first"""
    dataset: str | None = None
    """a .tsv or .jsonl file, en_fr, or a name on the hub; by default opus-100, and en_fr with a shipped model"""
    split: str | None = None
    """of a data set on the hub; by default train[:1000], and test for pairs without English"""
    limit: int | None = None
    """only the first so many sentence pairs that pass the filters"""
    out: Path | None = None
    """the folder that is written; by default outputs/translation_heads/MODEL"""
    template: str = TEMPLATE
    """of a prompt"""
    criterion: Criterion | None = None
    """what must be above the threshold: translation - control, or translation itself, the default with a shipped model"""
    threshold: float | None = None
    """by default the published one of the model, else 0.05 (of translation itself 0.13)"""
    thresholds: tuple[str, ...] = ()
    """of single languages, as in ja=0.03"""
    check_known: bool = False
    """compare with the published heads of the model: from English, into five languages"""
    known: Path = KNOWN
    """the file of published heads and thresholds"""
    show_heads: tuple[str, ...] = ()
    """heads to look at, as in 4.5; by default the five highest of each pair"""
    show_sentences: tuple[int, ...] = ()
    """sentences to look at, by their place among those that are kept; by default the first three"""
    batch_size: int = 8
    """prompts a forward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""


class Sentences(NamedTuple):
    """The sentences of one pair of languages that passed the filters, and the prompts made of them."""

    kept: list[SentencePair]
    dropped: dict[str, int]
    prompts: TokenizedPrompts
    control: TokenizedPrompts


class Scores(NamedTuple):
    """The scores of one pair of languages; `by_head` is held to the threshold, and `found` has the highest head first."""

    translation: Float[np.ndarray, "sentence layer head"]
    control: Float[np.ndarray, "sentence layer head"]
    by_head: Float[np.ndarray, "layer head"]
    threshold: float
    found: list[Head]

    @property
    def means(self) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Over the sentences that were not skipped: translation and control."""
        return np.nanmean(self.translation, 0), np.nanmean(self.control, 0)


def main(config: Config) -> None:
    if not is_main_process():
        return  # a few forward passes are no work to share
    # What is run. Everything that can be wrong is found before the first forward pass.
    need("report")
    check_flags(config)
    known = published(config)
    thresholds = {pair: threshold_of(parse_languages(pair), config, known) for pair in config.pairs}
    name = Path(config.model).name
    folder = output_path(config.out, Path("outputs/translation_heads") / name)
    source, criterion = find_prompts(dataset_of(config)), criterion_of(config)
    raw = {pair: load_pairs(source, parse_languages(pair), config.split) for pair in config.pairs}
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    wanted_heads = [parse_head(head, model) for head in config.show_heads]
    sentences = {pair: sentences_of(pair, raw[pair], model, tokenizer, config) for pair in config.pairs}

    # The scores of both, and the heads above the threshold.
    scores = {pair: scores_of(pair, sentences[pair], model, thresholds[pair], config) for pair in config.pairs}
    heads = table(scores, criterion)
    overlaps = [
        {"a": a, "b": b, "heads_a": len(scores[a].found), "heads_b": len(scores[b].found)}
        | head_overlap(scores[a].found, scores[b].found, scores[a].means[0].size)._asdict()
        for a, b in itertools.combinations(scores, 2)
    ]
    against = compared(scores, known) if config.check_known else []
    views: dict[str, list[View]] = {}
    for pair, these in sentences.items():
        shown = config.show_sentences or range(min(3, len(these.prompts)))
        names = [f"{pair}, sentence {number}" for number in range(len(these.prompts))]
        views[pair] = look(
            model, tokenizer, these.prompts.input_ids, wanted_heads or best(heads, pair), which=shown, names=names
        )

    # The files. The summary goes first and comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    for earlier in (*folder.glob("*.npy"), *folder.glob("*.csv"), *folder.glob("figures/*")):
        earlier.unlink()
    for pair, found in scores.items():
        write_npy(folder / f"{pair}_translation.npy", found.translation)
        write_npy(folder / f"{pair}_control.npy", found.control)
        panels = figures.compared_heads(
            *found.means,
            names=("Translation", "Control"),
            title=f"Translation heads, {pair}: {name}, {len(sentences[pair].kept)} sentences",
            label="mean attention on the diagonals",
        )
        figures.save(panels, folder / f"figures/{pair}.png")
        with atomic_path(folder / f"figures/{pair}_attention.html") as temporary:
            temporary.write_text(attention_page(views[pair], f"{name}, {pair}: attention"), encoding="utf-8")
    write_views(folder, [view for pair in views for view in views[pair]])
    write_csv(folder / "heads.csv", heads)
    for table_name, rows in (("overlaps", overlaps), ("known", against)):
        if rows:
            write_csv(folder / f"{table_name}.csv", rows)
    write_json(folder / "found.json", {pair: [head_name(head) for head in of.found] for pair, of in scores.items()})
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=dataset_of(config),
        criterion=criterion,
        pairs={pair: facts_of(sentences[pair], scores[pair]) for pair in scores},
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))

    print(summary(facts, heads, overlaps, against))
    print(f"\nwritten:\n  {folder}/ (summary, config, arrays, tables, figures, attention to look at)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that no model could be run with."""
    for name in ("limit", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < (2 if name == "limit" else 1):
            raise ValueError(f"--{name} must be {2 if name == 'limit' else 1} or more, not {value}.")
    if not config.pairs or len(set(config.pairs)) < len(config.pairs):
        raise ValueError("--pairs names one or more pairs of languages, each once, as in en-fr fr-en.")
    if len({parse_languages(pair) for pair in config.pairs}) < len(config.pairs):
        raise ValueError("--pairs names a pair of languages twice; give each once.")
    if min(config.show_sentences, default=0) < 0:
        raise ValueError(f"--show_sentences counts from 0, so that there is no {min(config.show_sentences)}.")
    check_template(config.template)


def dataset_of(config: Config) -> str:
    """The data set that is read."""
    return config.dataset or ("en_fr" if config.model in TINY_MODELS else OPUS_100)


def criterion_of(config: Config) -> Criterion:
    """What must be above the threshold."""
    return config.criterion or ("translation" if config.model in TINY_MODELS else "difference")


def published(config: Config) -> dict[str, Any]:
    """Heads and thresholds that are known of the model, nothing if none are; ValueError if it is to be checked and is not."""
    models = read_known(config.known)
    found = {name.lower(): known for name, known in models.items()}.get(Path(config.model).name.lower(), {})
    if config.check_known and not any(found.get("heads", {}).get(pair.lower()) for pair in config.pairs):
        lists = "; ".join(f"{name} ({', '.join(known.get('heads', ()))})" for name, known in models.items())
        raise ValueError(
            f"--check_known: no list of heads is published for {', '.join(config.pairs)} of {config.model}; there are only those "
            f"of {lists}: choose among these --pairs, or give lists of your own with --known."
        )
    return found


class KnownModel(BaseModel):
    """What a file of published heads says of one model."""

    threshold: float = 0
    thresholds: dict[str, float] = {}
    heads: dict[str, list[Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]]] = {}


class Known(BaseModel):
    """A file of published heads."""

    models: dict[str, KnownModel]


def read_known(path: Path) -> dict[str, dict[str, Any]]:
    """The models of a file of published heads by name; ValueError if it is none."""
    try:
        return Known.model_validate(parse_json(path.read_bytes())).model_dump(exclude_unset=True)["models"]
    except ValidationError as error:
        raise ValueError(f"--known {path}: {one_sentence(error)}") from None
    except ValueError as error:
        raise ValueError(f"--known {path} is not JSON ({error}).") from None


def threshold_of(languages: Languages, config: Config, known: dict[str, Any]) -> float:
    """The threshold of a pair: the lowest of its languages' own, else the model's."""
    own: dict[str, float] = {}
    criterion = criterion_of(config)
    if criterion == "difference" and config.threshold is None:
        own |= known.get("thresholds", {})
    for entry in config.thresholds:
        language, _, value = entry.partition("=")
        try:
            own[language.lower()] = float(value)
        except ValueError:
            raise ValueError(f"--thresholds {entry}: write a language and a number, as in ja=0.03.") from None
    general = config.threshold
    if general is None:
        general = known.get("threshold", THRESHOLDS[criterion]) if criterion == "difference" else THRESHOLDS[criterion]
    threshold = min((own[language] for language in languages if language in own), default=general)
    if not -1 < threshold < 1:
        raise ValueError(f"a threshold of {threshold} makes no sense for a share of attention; give one below 1.")
    return threshold


def parse_head(text: str, model: PreTrainedModel) -> Head:
    """A head of the model by its name; ValueError if there is none."""
    try:
        node = Node.parse(f"z.{text}")
    except ValueError:
        raise ValueError(f"{text!r} is no head; write layer and head as in 4.5.") from None
    node.check(model.config)
    assert node.layer is not None and node.head is not None  # so says z
    return node.layer, node.head


def sentences_of(
    pair: str, raw: list[SentencePair], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config
) -> Sentences:
    """Filter the sentences of a pair and make its prompts; ValueError for what no model could be run on."""
    languages = parse_languages(pair)
    kept, dropped = filter_pairs(raw, tokenizer)
    kept = kept[: config.limit]
    if len(kept) < 2:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "there are no more"
        raise ValueError(
            f"{len(kept)} of {len(raw)} {pair} pairs of {dataset_of(config)} pass the filters ({why}), and a control needs two; "
            "give more sentences."
        )
    if max(config.show_sentences, default=0) >= len(kept):
        raise ValueError(
            f"--show_sentences {max(config.show_sentences)}: {pair} has {len(kept)} sentences, the first being 0."
        )
    swapped = swap_neighbours(kept, tokenizer)
    if not swapped:
        raise ValueError(f"all {pair} sentences have the same translation, so that there is no control; give others.")
    longest = n_positions(model.config)
    prompts, control = (
        tokenize_pairs(tokenizer, pairs, languages, config.template, longest) for pairs in (kept, swapped)
    )
    check_prompts(model, prompts)
    return Sentences(kept, dict(dropped), prompts, control)


# -- what is found -----------------------------------------------------------------------------------------------------


def scores_of(pair: str, sentences: Sentences, model: PreTrainedModel, threshold: float, config: Config) -> Scores:
    """The scores of a pair of languages, and the heads above the threshold."""
    translation, control = (
        translation_scores(model, prompts, batch_size=config.batch_size, progress=is_main_process())
        for prompts in (sentences.prompts, sentences.control)
    )
    for what, values in (("translation", translation), ("control", control)):
        if np.isnan(values).all():
            raise ValueError(f"{pair}: every crop of the {what} is too short for three diagonals; give longer text.")
    of_head = np.nanmean(translation, 0)
    if criterion_of(config) == "difference":
        of_head = of_head - np.nanmean(control, 0)
    return Scores(translation, control, of_head, threshold, found_heads(of_head, threshold))


def table(scores: dict[str, Scores], criterion: Criterion) -> list[dict[str, Any]]:
    """One row a pair and head, the highest first: scores, and whether it is found."""
    rows = []
    for pair, of_pair in scores.items():
        translation, control = of_pair.means
        found = set(of_pair.found)
        of_this = [
            {
                "pair": pair,
                "layer": layer,
                "head": head,
                "translation": float(translation[layer, head]),
                "control": float(control[layer, head]),
                "difference": float(translation[layer, head] - control[layer, head]),
                "threshold": of_pair.threshold,
                "found": (layer, head) in found,
            }
            for layer, head in np.ndindex(translation.shape)
        ]
        rows += sorted(of_this, key=lambda row: -row[criterion])
    return rows


def best(heads: list[dict[str, Any]], pair: str) -> list[Head]:
    """The highest heads of a pair."""
    return [(row["layer"], row["head"]) for row in heads if row["pair"] == pair][:HEADS]


def compared(scores: dict[str, Scores], known: dict[str, Any]) -> list[dict[str, Any]]:
    """Precision and recall of the found heads against the published ones, one row a pair that has any."""
    rows = []

    def listed(heads: set[str]) -> str:
        return " ".join(sorted(heads, key=lambda head: [int(number) for number in head.split(".")]))

    for pair, of_pair in scores.items():
        if wanted := set(known.get("heads", {}).get(pair.lower(), [])):
            found = {head_name(head) for head in of_pair.found}
            rows.append(
                {
                    "pair": pair,
                    "precision": len(found & wanted) / len(found) if found else float("nan"),
                    "recall": len(found & wanted) / len(wanted),
                    "both": listed(found & wanted),
                    "only_found": listed(found - wanted),
                    "only_published": listed(wanted - found),
                }
            )
    return rows


def head_name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def facts_of(sentences: Sentences, scores: Scores) -> dict[str, Any]:
    """What was run of one pair, and found."""
    skipped = [int(np.isnan(values[:, 0, 0]).sum()) for values in (scores.translation, scores.control)]
    return {
        "n_sentences": len(sentences.kept),
        "n_control": len(sentences.control),
        "dropped": sentences.dropped,
        "skipped": skipped[0],
        "skipped_control": skipped[1],
        "hash": data_hash([sentences.kept]),
        "threshold": scores.threshold,
        "found": [head_name(head) for head in scores.found],
    }


def summary(
    facts: dict[str, Any], heads: list[dict[str, Any]], overlaps: list[dict[str, Any]], against: list[dict[str, Any]]
) -> str:
    """What the terminal shows: of each pair its sentences and highest heads, how pairs overlap, and the published lists."""
    lines = [f"{facts['model']} on {facts['dataset']}, found by {facts['criterion']}"]
    for pair, of_pair in facts["pairs"].items():
        dropped = ", ".join(f"{reason}: {count}" for reason, count in of_pair["dropped"].items()) or "none"
        lines += [
            f"\n{pair}: {of_pair['n_sentences']} sentences (dropped: {dropped}), control {of_pair['n_control']}, too short "
            f"{of_pair['skipped']} and {of_pair['skipped_control']}; heads above "
            f"{of_pair['threshold']:g}: {len(of_pair['found'])}",
            "   head  translation  control  difference",
        ]
        for row in [row for row in heads if row["pair"] == pair][:SHOWN]:
            mark = "  found" if row["found"] else ""
            lines.append(
                f"{row['layer']:>4}.{row['head']:<2} {row['translation']:12.3f} {row['control']:8.3f} {row['difference']:11.3f}"
                + mark
            )
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


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
