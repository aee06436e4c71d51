"""Do the heads that align a translation with its source also cause it? Ablations, path patching, gradients and the logit lens.

    python experiments/translation_causes.py
    python experiments/translation_causes.py --model tiny-qwen2.5 --pair fr-en
    python experiments/translation_causes.py --model Qwen/Qwen2.5-3B --pair en-fr --heads 20.1 20.4 20.6 25.5 26.12 --words 0 1
    python experiments/translation_causes.py --config experiments/translation_first_attempt.yaml

A prompt ends before one of the `--words` of the translation: "EN: the cat sees the dog. FR: le chat". Two sentences are each
other's swap if their translations agree up to there and then go on with different words, so that the source alone tells which.
What is read is the paired logit difference, half the sum of logit(own word) - logit(the other's) over the two prompts of a swap,
in which a prior for one of the words cancels out. By default the words are those behind the first, which is an article in the
shipped sentences; further on hardly two translations agree. The heads are those of `--heads`; by default all that
translation_heads.py finds in the same sentences.

sets    The heads are ablated together (zero, mean, resample; at `--positions`), and so are up to `--n_random` random sets of as
        many other heads, of the same layers and of any layer. (Where the same layers have too few others, sets of theirs may hold
        some of the heads.) The same on another task (`--other`) tells what is of translation. Besides the logit difference the
        accuracy is read: whether the right word is the most likely of all. p is the share of sets, the found one counted with
        the random ones, that lower the metric as much.
paths   Path patching as in arXiv 2502.11806: a head's output at the last token is taken from X-, and what of it reaches the
        logits past all other heads changes the logit of the right word; relative change is the mean change by the mean size of
        that logit.
        X- (`--minus`) is the swap's prompt (source), or the own one with the source's label in place of the target's, so that
        nothing asks for a translation (label). A head is crucial if the change exceeds `--crucial` (1%). Standard, and along the
        one direction in which X+ and X- differ (subspace; of label alone, as swaps, each the other's X-, differ in none). Beside
        them what gradients say of patching the head (AtP), which is not along paths. That no threshold decides: over all heads,
        the correlation of the attention score with what is lost, and its p if heads are permuted within their layers.
lens    What the residual stream at the last token says after each layer, read with the model's own final norm and unembedding:
        probability and rank of the right word, and of the word of the source that the heads look at most.
each    The study's first attempt, which failed: one head at a time, its output at every token replaced by the mean, maximum or
        minimum, dimension by dimension, that it has over the source sentences alone, or by zero.

The shipped models, by these defaults, resampled: the heads found carry translation in all three. The logit difference falls
from 12.7 to 7.1 and from 12.9 to 6.3 (tiny-gemma2, en-fr and fr-en), from 16.2 to 10.6 and 8.9 (tiny-qwen2.5), and from 14.5 to
7.0 and from 15.1 to 5.6 (tiny-llama3.1): more than by any of 20 sets of any layer (11.1 to 14.3 on average; p = 0.048), while
that of IOI keeps 92% and more; with zeros or means in place of resampling p is 0.095 and 0.14 in tiny-qwen2.5. Attention
scores and losses along paths correlate with 0.39 to 0.83. Against sets of the same
layers that holds in tiny-gemma2 (p = 0.048) and in tiny-llama3.1 en-fr (0.048), but not in fr-en (0.19) and in tiny-qwen2.5 (0.29
and 0.095): there most heads of these layers translate (patched along its path, each of seven of the eight heads of qwen's layer 3
costs 0.7 to 2.2 of 17.4 at word 2, en-fr), so that a set of others does so too. In these two models, not in tiny-gemma2, the
same heads copy names: another prompt's name, resampled into IOI, costs accuracy (to 0.38 to 0.60), hardly the difference.

Written to the folder OUT, of what is in `--parts`: sets.csv and sets_KIND.npy [set swap], the found set first; paths.csv and,
for each MINUS, MINUS_standard.npy, MINUS_subspace.npy and MINUS_atp.npy, relative changes [layer head], NaN where a head has no
direction; lens.csv; each.csv and each_KIND.npy, mean drops [layer head]; figures; config.yaml (running it again gives the same);
and last summary.json, what was run: where it is, the rest is. A run that was interrupted goes on where it stopped when the same
command is given again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from translation_heads import Config as Attention
from translation_heads import (
    Criterion,
    Scores,
    Sentences,
    check_flags,
    dataset_of,
    head_name,
    parse_head,
    published,
    scores_of,
    sentences_of,
    threshold_of,
)

from modelcards import n_heads, n_layers, n_positions
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep.run import sweep
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import (
    output_path,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.heads.lens import logit_lens
from pyvene_ext.methods.heads.translation import (
    Replacement,
    control_sets,
    of_swaps,
    path_changes,
    replaced_heads,
    source_tokens,
)
from pyvene_ext.methods.patching.patch import all_patches
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.parallel import (
    TEMPLATE,
    Minus,
    WordPrompts,
    load_pairs,
    parse_languages,
    tokenize_texts,
    word_prompts,
)
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.runs.sweeps import discard
from pyvene_ext.specs.ablation import heads_together
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head, head_overlap
from pyvene_ext.stats.correlations import correlate_heads
from pyvene_ext.stats.intervals import paired_bootstrap, ratio_of_means

Part = Literal["sets", "paths", "lens", "each"]
Kind = Literal["zero", "mean", "resample"]
Rows = list[dict[str, Any]]
SHOWN = 8  # heads in a table on the terminal
CONTROLS = ("same layers", "any layer")
RESAMPLES = 2000


@dataclass(frozen=True)
class Config:
    model: str = "tiny-gemma2"
    """a shipped tiny model, a folder, or a name on the hub"""
    pair: str = "en-fr"
    """the languages, source first"""
    dataset: str | None = None
    """a .tsv or .jsonl file, en_fr, or a name on the hub; by default opus-100, and en_fr with a shipped model"""
    split: str | None = None
    """of a data set on the hub; by default train[:1000], and test for pairs without English"""
    out: Path | None = None
    """the folder that is written; by default outputs/translation_causes/MODEL_PAIR"""
    parts: tuple[Part, ...] = ("sets", "paths", "lens")
    """what is done: sets, paths, lens, each"""
    heads: tuple[str, ...] = ()
    """the heads, as in 4.5; by default those found by their attention"""
    criterion: Criterion | None = None
    """as for translation_heads.py"""
    threshold: float | None = None
    """as for translation_heads.py"""
    words: tuple[int, ...] = (1, 2)
    """which words of the translation are asked for, the first being 0"""
    limit: int = 40
    """at most so many prompts of each word, two a swap"""
    template: str = TEMPLATE
    """of a prompt"""
    kinds: tuple[Kind, ...] = ("zero", "mean", "resample")
    """of the ablations of sets"""
    positions: Literal["last", "all"] = "last"
    """where sets are ablated: at the last token, or at all (resample: only prompts of equal length can)"""
    n_random: int = 20
    """random sets of heads, of the same layers and of any"""
    other: str = "ioi_en"
    """the other task: a prompt set, or none"""
    minus: tuple[Minus, ...] = ("source", "label")
    """what X- differs in: the sentence to be translated, the label of the language asked for, or either"""
    crucial: float = 0.01
    """relative change of the right word's logit above which a head is crucial"""
    replacements: tuple[Replacement, ...] = ("mean", "maximum", "minimum", "zero")
    """of the first attempt"""
    batch_size: int = 8
    """prompts a forward pass where activations are read; other batches follow from memory"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of random sets, donors and the bootstrap"""

    @property
    def attention(self) -> Attention:
        """The same as flags of translation_heads.py."""
        names = ("model", "dataset", "split", "template", "criterion", "threshold", "batch_size")
        return Attention(pairs=(self.pair,), **{name: getattr(self, name) for name in names})


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first forward pass.
    check(config)
    threshold = threshold_of(parse_languages(config.pair), config.attention, published(config.attention))
    name = f"{Path(config.model).name}_{config.pair}"
    folder = output_path(config.out, Path("outputs/translation_causes") / name)
    raw = load_pairs(find_prompts(dataset_of(config.attention)), parse_languages(config.pair), config.split)
    others = None if config.other == "none" else PromptSet.load(find_prompts(config.other))
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    given = [parse_head(head, model) for head in config.heads]
    sentences = sentences_of(config.pair, raw, model, tokenizer, config.attention)
    asked, words = asked_of(sentences, tokenizer, model, config)
    other = None
    if others is not None and "sets" in config.parts:
        other = others.tokenize(tokenizer, max_length=n_positions(model.config))
        other = other.take(range(min(config.limit, len(other))))

    # The heads, and what is asked of them.
    found, scores = given, None
    if "paths" in config.parts or (not given and config.parts != ("each",)):
        scores = scores_of(config.pair, sentences, model, threshold, config.attention)
        found = given or scores.found
        if not found:
            raise ValueError(
                f"no head is above the threshold of {threshold:g}, so that there is none to ablate; lower --threshold, or name "
                "--heads."
            )
    facts: dict[str, Any] = {"heads": [head_name(head) for head in found]}
    written: list[Callable[[Path], None]] = []
    text: list[str] = []
    for part in config.parts:
        done = {"sets": sets, "paths": paths, "lens": lens, "each": each}[part]
        study = Study(config, model, tokenizer, sentences, asked, other, found, scores, folder / "unfinished")
        of_part, files, lines = done(study)
        facts |= of_part
        written.append(files)
        text += lines
    if not is_main_process():
        return

    # The files. The summary goes first and comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    for earlier in (*folder.glob("*.npy"), *folder.glob("*.csv"), *folder.glob("figures/*")):
        earlier.unlink()
    for files in written:
        files(folder)
    write_config(folder / "config.yaml", config)
    common = {
        "model": config.model,
        "dataset": dataset_of(config.attention),
        "pair": config.pair,
        "n_prompts": len(asked.plus),
        "dropped": dict(asked.dropped),
        "hash": asked.plus.hash,
        "seed": config.seed,
    }
    write_json(folder / "summary.json", metadata(model, **common, **facts))
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")

    print(
        f"{config.model}, {config.pair}: {len(asked.plus)} prompts for words {', '.join(map(str, config.words))} (such as "
        f"{', '.join(words)}), "
        f"heads {', '.join(facts['heads']) or 'all, one at a time'}"
    )
    print("\n".join(text))
    print(f"\nwritten:\n  {folder}/ (summary, config, arrays, tables, figures)")


@dataclass(frozen=True)
class Study:
    """What every part works on."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sentences: Sentences
    asked: WordPrompts
    other: TokenizedPrompts | None
    heads: list[Head]
    scores: Scores | None
    unfinished: Path


Done = tuple[dict[str, Any], Callable[[Path], None], list[str]]  # facts, what writes the files, lines for the terminal


def check(config: Config) -> None:
    """Raise ValueError for flags that no model could be run with."""
    check_flags(config.attention)
    for name, least in (("limit", 4), ("n_random", 20), ("seed", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(config, name)}.")
    if min(config.words, default=0) < 0:
        raise ValueError(f"--words counts from 0, so that there is no {min(config.words)}.")
    if not 0 < config.crucial < 1:
        raise ValueError(f"--crucial must be above 0 and below 1, as in 0.01 for 1%, not {config.crucial}.")
    for name in ("parts", "heads", "words", "kinds", "minus", "replacements"):
        values = getattr(config, name)
        if (not values and name != "heads") or len(set(values)) < len(values):
            raise ValueError(f"--{name} names one or more, each once, not {' '.join(map(str, values)) or 'nothing'}.")


def asked_of(
    sentences: Sentences, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, config: Config
) -> tuple[WordPrompts, list[str]]:
    """The prompts for the words, whole swaps of them, and some of the words."""
    options: dict[str, Any] = {"template": config.template, "max_length": n_positions(model.config)}
    languages = parse_languages(config.pair)
    of_words = (word_prompts(tokenizer, sentences.kept, languages, word, **options) for word in config.words)
    asked = reduce(add, (of_word.first(config.limit) for of_word in of_words))
    if len(asked.words) < 4:
        raise ValueError(
            "only one swap of sentences is left at these words, and an interval needs two; choose other --words, or give more "
            "sentences."
        )
    return asked, list(dict.fromkeys(asked.words))[:4]


# -- sets --------------------------------------------------------------------------------------------------------------


def sets(study: Study) -> Done:
    """Ablate the heads together, and random sets of as many heads in the same layers; on translation and on another task."""
    config, model = study.config, study.model
    size = n_layers(model.config), n_heads(model.config)
    fields: dict[str, Any] = {"positions": config.positions, "seed": config.seed}
    controls = control_sets(study.heads, *size, config.n_random, config.seed)
    chosen = [("found", tuple(study.heads)), *((control.name, heads) for control in controls for heads in control.sets)]
    specs_of = {kind: [heads_together(heads, kind, **fields) for _, heads in chosen] for kind in config.kinds}
    tasks = {"": study.asked.plus} | ({} if study.other is None else {"other_": study.other})
    for prompts in tasks.values():  # now, not when half of the kinds are done
        resolve([spec for specs in specs_of.values() for spec in specs], model, prompts)
    rows: Rows = []
    values: dict[str, np.ndarray] = {}
    for kind, specs in specs_of.items():
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for prefix, prompts in tasks.items():
            for metric in ("logit_diff", "accuracy"):
                result = swept(study, specs, prompts, f"sets-{kind}-{prefix}{metric}", metric=metric)
                found[prefix + metric] = result.clean, result.intervened
        clean, values[kind] = map(of_swaps, found["logit_diff"])
        found["logit_diff"] = clean, values[kind]
        for number, (name, heads) in enumerate(chosen):
            row: dict[str, Any] = {"kind": kind, "set": name, "heads": " ".join(map(head_name, sorted(heads)))}
            drop = paired_bootstrap(clean, values[kind][number], rng(config.seed, "drop"), RESAMPLES)
            row |= {"drop": drop.mean, "low": drop.low, "high": drop.high}
            for measure, (before, after) in found.items():
                row |= {f"{measure}_clean": float(before.mean()), measure: float(after[number].mean())}
            rows.append(row)
    facts = {kind: set_facts([row for row in rows if row["kind"] == kind], list(found)) for kind in config.kinds}

    def files(folder: Path) -> None:
        write_csv(folder / "sets.csv", rows)
        for kind, of_kind in values.items():
            write_npy(folder / f"sets_{kind}.npy", of_kind)
        figures.save(set_figure(rows, study), folder / "figures/sets.png")

    lines = [
        "\nsets                                  clean  found"
        + "".join(f"{of.name:>14} (lowest)      p" for of in controls)
    ]
    for kind, of_kind in facts.items():
        for measure in found:
            of = of_kind[measure]
            task = config.other if measure.startswith("other_") else config.pair
            random = "".join(f"{of[at]['mean']:13.2f} ({of[at]['lowest']:6.2f}) {of[at]['p']:6.3f}" for at in CONTROLS)
            name = measure.removeprefix("other_")
            lines.append(f"{kind:<9} {task:<10} {name:<11} {of['clean']:10.2f} {of['found']:6.2f} {random}")
    for control in controls:
        held = "none" if control.apart else "some"
        lines.append(f"random sets of heads, {control.name}: {len(control.sets)}; {held} of their heads found")
    random_sets = {control.name: {"n": len(control.sets), "apart": control.apart} for control in controls}
    return {"sets": facts, "random_sets": random_sets}, files, lines


def swept(study: Study, specs: Sequence[Spec], prompts: TokenizedPrompts, store: str, **options: Any) -> Any:
    """A sweep that goes on where it was interrupted."""
    folder = study.unfinished / store
    return sweep(study.model, specs, prompts, store=folder, progress=is_main_process(), **options)


def set_facts(rows: Rows, measures: list[str]) -> dict[str, dict[str, Any]]:
    """One kind in short, by measure: the found set against the random ones of each control."""
    facts: dict[str, dict[str, Any]] = {}
    for measure in measures:
        found = rows[0][measure]
        facts[measure] = {"clean": rows[0][f"{measure}_clean"], "found": found}
        for control in CONTROLS:
            random = [row[measure] for row in rows if row["set"] == control]
            p = (1 + sum(value <= found for value in random)) / (1 + len(random))
            facts[measure][control] = {"mean": float(np.mean(random)), "lowest": min(random), "p": p}
    return facts


@matplotlib.rc_context(figures.STYLE)
def set_figure(rows: Rows, study: Study) -> Figure:
    """One column a kind, one point a set; the same for the other task beside it."""
    tasks = [("logit_diff", study.config.pair)]
    if study.other is not None:
        tasks.append(("other_logit_diff", study.config.other))
    kinds = study.config.kinds
    marks = {
        "found": ("found", "D", figures.ORANGE, 7),
        "same layers": ("random, same layers", "o", figures.GREY, 3.5),
        "any layer": ("random, any layer", "^", figures.GREY, 3.5),
    }
    shift = {"found": 0.0, "same layers": -0.25, "any layer": 0.25}
    figure = Figure(figsize=(1.2 + 2.6 * len(tasks), 3.4))
    for axes, (value, task) in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True):
        for at, kind in enumerate(kinds):
            of_kind = [row for row in rows if row["kind"] == kind]
            for name, (_, style, colour, size) in marks.items():
                points = [row[value] for row in of_kind if row["set"] == name]
                spread = 0.1 * np.linspace(-1, 1, len(points)) * (len(points) > 1)
                axes.plot(at + shift[name] + spread, points, style, color=colour, markersize=size, alpha=0.8)
        axes.axhline(rows[0][f"{value}_clean"], color=figures.BLUE, linewidth=1.2, linestyle="--")
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(title=task, xlabel="ablation", xlim=(-0.5, len(kinds) - 0.5))
        axes.grid(axis="y")
    figure.axes[0].set_ylabel("logit difference")
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set_ylim(min(low, 0), max(high, 0))
    for label, style, colour, _ in (("clean", "--", figures.BLUE, 0), *marks.values()):
        figure.axes[0].plot([], [], style, color=colour, label=label, markersize=5)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# -- paths -------------------------------------------------------------------------------------------------------------


def paths(study: Study) -> Done:
    """Path patching from every head at the last token to the logits, both variants; AtP beside it."""
    config, model, plus = study.config, study.model, study.asked.plus
    shape = n_layers(model.config), n_heads(model.config)
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": is_main_process()}
    changes: dict[str, np.ndarray] = {}
    for what in config.minus:
        minus = study.asked.minus[what]
        for variant in ("standard", "subspace") if what == "label" else ("standard",):
            name = f"{what}_{variant}"
            store = study.unfinished / f"paths-{name}"
            changes[name], clean = path_changes(
                model, plus, minus, subspace=variant == "subspace", store=store, **options
            )
        of_heads_alone = all_patches(model.config, "z", positions="last")
        estimate = -atp(model, of_heads_alone, plus, minus, "logit", **options)
        changes[f"{what}_atp"] = estimate.reshape(*shape, -1)
    relative = {
        name: ratio_of_means(x.reshape(-1, len(plus)), np.abs(clean), rng(config.seed, name), RESAMPLES)
        for name, x in changes.items()
    }
    names = [(int(layer), int(head)) for layer, head in np.ndindex(shape)]
    crucial = {
        name: [head for head, value in zip(names, relative[name].mean, strict=True) if abs(value) > config.crucial]
        for name in relative
    }
    rows: Rows = []
    for number, head in enumerate(names):
        row: dict[str, Any] = {"layer": head[0], "head": head[1], "found": head in study.heads}
        for name, interval in relative.items():
            row |= {name: float(interval.mean[number]), f"{name}_low": float(interval.low[number])}
            row |= {f"{name}_high": float(interval.high[number]), f"{name}_crucial": head in crucial[name]}
        rows.append(row)
    rows.sort(key=lambda row: -abs(row[f"{config.minus[0]}_standard"]))
    like = {
        name: float(
            stats.spearmanr(relative[f"{what}_standard"].mean, relative[name].mean, nan_policy="omit").statistic
        )
        for what in config.minus
        for name in relative
        if name.startswith(what) and name != f"{what}_standard"
    }
    overlaps = {name: head_overlap(heads, study.heads, len(names))._asdict() for name, heads in crucial.items()}
    assert study.scores is not None  # so says main
    attention = {
        what: correlate_heads(
            study.scores.by_head, -relative[f"{what}_standard"].mean.reshape(shape), config.seed, RESAMPLES
        )
        for what in config.minus
    }
    facts = {
        "minus": list(config.minus),
        "attention_and_loss": {
            what: {key: finite(value) for key, value in asdict(c.spearman).items()} | {"n": c.n}
            for what, c in attention.items()
        },
        "without_direction": {
            name: [head_name(head) for head, value in zip(names, of.mean, strict=True) if math.isnan(value)]
            for name, of in relative.items()
            if name.endswith("subspace")
        },
        "mean_logit": float(clean.mean()),
        "crucial": {name: [head_name(head) for head in heads] for name, heads in crucial.items()},
        "overlap_with_heads": {
            name: {key: finite(value) for key, value in overlap.items()} for name, overlap in overlaps.items()
        },
        "spearman_with_standard": {name: finite(value) for name, value in like.items()},
    }
    title = f"{Path(config.model).name}, {config.pair}"

    def files(folder: Path) -> None:
        write_csv(folder / "paths.csv", rows)
        variants = {
            "standard": "Path patching to the logits",
            "subspace": "Path patching to the logits, along one direction",
            "atp": "Attribution patching",
        }
        for name in relative:
            what, variant = name.split("_")
            matrix = relative[name].mean.reshape(shape)
            write_npy(folder / f"{name}.npy", matrix)
            drawing = figures.head_heatmap(
                100 * matrix,
                f"{variants[variant]}, X- by {what}: {title}",
                "change of the logit (%)",
                diverging=True,
                missing="no direction",
            )
            figures.save(drawing, folder / f"figures/{name}.png")

    lines = [
        f"\npaths: mean logit {facts['mean_logit']:.2f}; crucial above {config.crucial:.1%}",
        "X- and variant   crucial heads  among the heads  Jaccard  by chance       p  Spearman with standard",
    ]
    for name, overlap in overlaps.items():
        rank = f"{like[name]:.2f}" if name in like else "-"
        lines.append(
            f"{name:<16} {len(crucial[name]):13} {overlap['shared']:16} {overlap['jaccard']:8.2f} {overlap['chance']:10.2f} "
            f"{overlap['p']:7.2g} {rank:>23}"
        )
    for what, c in attention.items():
        r = c.spearman
        lines.append(
            f"attention score and loss, X- by {what}: Spearman {r.r:.2f} [{r.low:.2f}, {r.high:.2f}] over {c.n} heads, p within "
            f"layers {r.p_within_layers:.2g}"
        )
    lines.append("   head  " + "  ".join(f"{name:>15}" for name in relative))
    for row in rows[:SHOWN]:
        percents = "  ".join(f"{row[name]:15.1%}" for name in relative)
        lines.append(f"{row['layer']:>4}.{row['head']:<2}  {percents}" + "  found" * row["found"])
    return facts, files, lines


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


# -- lens --------------------------------------------------------------------------------------------------------------


def lens(study: Study) -> Done:
    """By depth: the right word, and the word of the source that the heads look at most."""
    config, model, plus = study.config, study.model, study.asked.plus
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": is_main_process()}
    spans = [
        (len(ids) + places["source_first"], len(ids) + places["source"] + 1)
        for ids, places in zip(plus.input_ids, plus.positions, strict=True)
    ]
    sources = source_tokens(model, plus, study.heads, spans, **options)
    targets = [own for own, _ in plus.answer_ids]
    read = {
        language: logit_lens(model, replace(plus, answer_ids=tuple(zip(tokens, behind, strict=True))), **options)
        for language, tokens, behind in (("target", targets, sources), ("source", sources, targets))
    }
    rows: Rows = [
        {
            "depth": depth,
            **{f"{name}_probability": float(of.probability[depth].mean()) for name, of in read.items()},
            **{f"{name}_median_rank": float(np.median(of.rank[depth])) for name, of in read.items()},
        }
        for depth in range(len(read["target"].rank))
    ]
    pairs = [
        f"{study.tokenizer.decode([source])!s} -> {study.tokenizer.decode([target])!s}"
        for source, target in list(dict.fromkeys(zip(sources, targets, strict=True)))[:SHOWN]
    ]

    def files(folder: Path) -> None:
        write_csv(folder / "lens.csv", rows)
        figures.save(
            lens_figure(rows, f"Logit lens: {Path(config.model).name}, {config.pair}"), folder / "figures/lens.png"
        )

    lines = [
        f"\nlens: looked at -> right ({'; '.join(pairs)})",
        "depth  p(target)  p(source)  rank of target  of source (medians)",
    ]
    lines += [
        f"{row['depth']:5} {row['target_probability']:10.3f} {row['source_probability']:10.3f} "
        f"{row['target_median_rank']:15.0f} {row['source_median_rank']:10.0f}"
        for row in rows
    ]
    return {"looked_at": pairs}, files, lines


@matplotlib.rc_context(figures.STYLE)
def lens_figure(rows: Rows, title: str) -> Figure:
    """Mean probabilities by depth."""
    figure = Figure(figsize=(4.8, 3.2))
    axes = figure.add_subplot()
    for name, colour in (("target", figures.BLUE), ("source", figures.ORANGE)):
        values = [row[f"{name}_probability"] for row in rows]
        axes.plot(range(len(rows)), values, "o-", color=colour, label=f"word in the {name} language", markersize=4)
    axes.set(title=title, xlabel="blocks passed", ylabel="mean probability", ylim=(0, 1.02))
    axes.grid()
    axes.legend()
    return figure


# -- each --------------------------------------------------------------------------------------------------------------


def each(study: Study) -> Done:
    """One head at a time, replaced by what it is over the source sentences; the drop of the paired logit difference."""
    config, model = study.config, study.model
    shape = n_layers(model.config), n_heads(model.config)
    sources = tokenize_texts(study.tokenizer, [pair.source for pair in study.sentences.kept])
    rows: Rows = []
    drops: dict[str, np.ndarray] = {}
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": is_main_process()}
    for kind, specs, reference in replaced_heads(model, sources, config.replacements, **options):
        result = swept(study, specs, study.asked.plus, f"each-{kind}", reference=reference)
        clean, replaced = of_swaps(result.clean), of_swaps(result.intervened)
        drops[kind] = (clean - replaced).mean(1).reshape(shape)
        for number, (layer, head) in enumerate(np.ndindex(shape)):
            drop = paired_bootstrap(clean, replaced[number], rng(config.seed, "drop"), RESAMPLES)
            rows.append(
                {
                    "replacement": kind,
                    "layer": layer,
                    "head": head,
                    "drop": drop.mean,
                    "low": drop.low,
                    "high": drop.high,
                }
            )
    facts = {"each_clean": float(clean.mean()), "n_sources": len(sources)}

    def files(folder: Path) -> None:
        write_csv(folder / "each.csv", rows)
        for kind, drop in drops.items():
            write_npy(folder / f"each_{kind}.npy", drop)
            words = ", ".join(map(str, config.words))
            title = f"One head replaced ({kind}): {Path(config.model).name}, {config.pair}, words {words}"
            drawing = figures.head_heatmap(drop, title, "drop of the paired logit difference", diverging=True)
            figures.save(drawing, folder / f"figures/each_{kind}.png")

    lines = [f"\neach: one head at a time; paired logit difference {facts['each_clean']:.2f}; largest drops"]
    for kind in config.replacements:
        largest = sorted((row for row in rows if row["replacement"] == kind), key=lambda row: -row["drop"])[:SHOWN]
        lines.append(f"{kind:<8} " + ", ".join(f"{row['layer']}.{row['head']} {row['drop']:.2f}" for row in largest))
    return facts, files, lines


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
