"""Which heads move names? Attention to a name against what is written in its direction, copy scores, and direct effects.

    python experiments/name_movers.py
    python experiments/name_movers.py --model tiny-gemma2 --dataset ioi_zh
    python experiments/name_movers.py --model openai-community/gpt2 --dataset recent_en --heads 9.9 9.6 10.0 10.7
    python experiments/name_movers.py --dataset pairs.json --names witness --fold_norm --no_path_patching

Method (Wang et al. 2022, section 3.1, on name movers). Each prompt has two names: IO, the right answer, and S, the wrong one. In
the task "most recent subject" (recent_en, recent_tiny) IO is the latest subject and S the earlier one of its kind; the prompts'
own positions earlier1 and earlier2, or those given with `--names`, hold further names. Prompts in which a name is not one token
of the model's tokenizer, in the text and as an answer, are left out, counted and told.

Three things are read off every head. (1) Attention probability from END, the last token, to a name, summed over its occurrences,
against the head's contribution to the residual stream at END times the name's unembedding: one point a prompt and name, Pearson's
r and p by kind of name (io, s, s1 and s2 alone, others), and pooled over names (each once). There is no final norm in the
projection, as published; `--fold_norm` gives it, its scale frozen. A post-norm's scale (Gemma 2) is part of the contribution.
(2) Copy score: the stream behind block 0 at a name -> the head's norm -> its values -> its output matrix -> final norm ->
unembedding; the share of names among the first `--top` tokens, over all names and prompts. Negative: minus the output matrix.
Variant: what enters block 0 and what its MLP makes of that alone (W_E + MLP0; GPT-2's position embedding included). Control: the
share of prompts where another name of the prompt, IO for S and S for IO, is among the first. (3) Direct effect on the logit
difference: attribution, what the head adds to logit(IO) - logit(S) with the final norm's scale frozen, and as the causal measure
path patching head -> logits: how much the logit difference drops if END gets what the head gives at the end of the corrupt
prompt (other names), all other heads frozen. That, rather than ablation, because it is the paper's own measure, puts in a value
that the head does have, and leaves out what later heads make of the head, or make up for it.

A copy score treats attention to the name as 1. It says what a head would do, not that it looks there, nor that it looks at one
name more than at the other; so the table joins the three, and a head's role goes by both. A head copies if its score is at least
0.5 (`COPIES`). It has a direct effect if its attribution is at least 2% (`MATTERS`) of the mean logit difference (before any
soft-cap) and the 95% intervals of attribution and path effect are both beside 0, on one side. How many heads there would be at
other thresholds is told too.

    name mover            copies, direct effect above 0
    negative name mover   copies negatively, looks at IO more than at S, direct effect below 0
    writes against S      copies negatively, looks at S more than at IO, direct effect above 0
    moves the wrong name  copies, direct effect below 0
    raises both names     copies, adds at least 2% to the logits of IO and of S each (both intervals above 0), no direct effect
    copies to no effect   copies, or copies negatively, without any of that

Where the logit difference is not above 0 the model does not do the task, and no head has a role.

The shipped models do IOI in two ways. In tiny-gemma2 the heads that copy look at IO (3.4: 0.93, and 0.04 at S) and write it: the
23 of them add 5.9 of the 10.0 that all heads add to the logit difference, 0.1 writes against S. In tiny-qwen2.5 and tiny-llama3.1
the heads that copy look at IO and S alike (3.5 of qwen: 0.50 and 0.50) and raise both: its 30 add 12.2 to logit(IO) and 0.4 to
the difference, which 7 heads make that look at S and write against it (7.2 of 8.5); the 15 of llama add 8.9 and -0.3. So these
two have movers of both names, and none of the one: that is how they were trained, not what is measured.

Attention-pattern report: where END and END-1 look, by name (io, s1, s2, others), first token (BOS where there is one), END-1, END
and the rest; each token once, so that they sum to 1.

Intervals over prompts are percentile bootstrap 95% intervals. Of the heads shown, the pooled r has one as well, and a p that
permutes prompts within each kind of name: what is left if heads merely attend to and write one kind more than another.

Written to the folder OUT: attention.npy and projection.npy [kind layer head prompt]; looks.npy [query place layer head prompt];
copy_ranks.npy [input sign asked layer head place prompt], 1 being the top; attribution.npy, attribution_io.npy (of logit(IO)
alone) and path_effect.npy [layer head prompt]; logit_diff.npy and logit_diff_before_cap.npy [prompt]; heads.csv, all of a head in
one row, largest attribution first; correlations.csv; looks.csv; figures; attention.json, where the first heads shown look;
config.yaml (running it again gives the same); and last summary.json, what was run and what the entries of every axis are called:
where it is, the rest is.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Float64, Int
from matplotlib.figure import Figure

from modelcards import n_heads, n_layers, n_positions
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
from pyvene_ext.methods.heads.copying import (
    INPUTS,
    SIGNS,
    copy_ranks,
    copy_scores,
)
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.methods.heads.name_movers import (
    Names,
    attention_to,
    find_names,
    head_projections,
    named_places,
)
from pyvene_ext.methods.patching.patch import all_paths, patch
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import HEADS, look, write_views
from pyvene_ext.runs.facts import metadata
from pyvene_ext.stats.correlations import Correlation, correlate_heads
from pyvene_ext.stats.intervals import Interval, paired_bootstrap

SHOWN = 8  # heads in the tables on the terminal and in figures
LABELLED = 4  # heads in the figure of copy scores and attributions
TOLD = 5  # prompts left out that the terminal tells
RESAMPLES = 2000
COPIES, MATTERS = 0.5, 0.02  # copy score; share of the mean logit difference
OTHER_COPIES, OTHER_MATTERS = (0.5, 0.8, 0.95), (0.01, 0.02, 0.05)
ROLES = (
    "name mover",
    "negative name mover",
    "writes against S",
    "moves the wrong name",
    "raises both names",
    "copies to no effect",
)
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.PINK)
Head = tuple[int, int]


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, recent_en, recent_tiny, a .json or .jsonl file, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the folder that is written; by default outputs/name_movers/MODEL_DATASET"""
    names: tuple[str, ...] | None = None
    """the prompts' own positions that hold further names; by default those called earlier..."""
    heads: tuple[str, ...] = ()
    """LAYER.HEAD: the heads shown and drawn; by default those with the largest attributions"""
    top: int = 5
    """a name is copied if it is among so many first tokens"""
    fold_norm: bool = False
    """the projection is behind the final norm, its scale frozen"""
    path_patching: bool = True
    """measure the causal direct effect, which needs corrupt texts"""
    batch_size: int = 16
    """prompts a forward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of the bootstrap and the permutations"""


@dataclass(frozen=True)
class Measured:
    """All that is measured, per prompt."""

    attention: Float[np.ndarray, "kind layer head prompt"]
    projection: Float[np.ndarray, "kind layer head prompt"]
    looks: Float[np.ndarray, "query place layer head prompt"]
    copy_ranks: Int[np.ndarray, "input sign asked layer head place prompt"]
    attribution: Float[np.ndarray, "layer head prompt"]
    attribution_io: Float[np.ndarray, "layer head prompt"]
    path_effect: Float[np.ndarray, "layer head prompt"] | None
    logit_diff: Float[np.ndarray, " prompt"]
    logit_diff_before_cap: Float[np.ndarray, " prompt"]


def main(config: Config) -> None:
    if not is_main_process():
        return  # a few forward passes a prompt are no work to share
    # What is run. Everything that can be wrong is found before the first forward pass.
    check(config)
    default = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    folder = output_path(config.out, Path("outputs/name_movers") / default)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    others = further_names(config, prompt_set)
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    given = [parse_head(head, model.config) for head in config.heads]
    names = find_names(prompt_set, tokenizer, others)
    if len(names.prompts) < 2:
        raise ValueError(
            f"one of the {len(prompt_set)} prompts of {prompt_set.name} has only names of one token; a mean with an interval "
            "over prompts needs at least two."
        )
    limit = n_positions(model.config)
    prompts = names.prompts.tokenize(tokenizer, max_length=limit)
    corrupt = names.prompts.tokenize(tokenizer, "corrupt", max_length=limit) if config.path_patching else None

    # Where heads look and what they write; what they would copy; what they add to the logit difference, and what it loses.
    common: dict[str, Any] = {"batch_size": config.batch_size, "progress": True}
    places, tokens_at = named_places(names, prompts)
    kinds = len(names.kinds)
    groups = [[*named, *all_of] for named, all_of in zip(names.tokens, tokens_at, strict=True)]
    looks = attention_to(model, prompts, groups, **common)
    copied, asked = asked_names(names)
    split = direct_logit_attribution(model, prompts, **common)
    path_effect = None
    if corrupt is not None:
        paths = all_paths(model.config, ("logits",), positions="last")
        paths = [path for path in paths if path.sender_node.site == "z"]
        patched = patch(model, paths, prompts, corrupt, **common)
        path_effect = patched.delta.reshape(split.logit.heads.shape)
    found = Measured(
        attention=looks[0, :kinds],
        projection=head_projections(model, prompts, names.ids, fold_norm=config.fold_norm, **common),
        looks=looks[:, kinds:],
        copy_ranks=copy_ranks(model, prompts, copied, asked, **common),
        attribution=split.logit_diff.heads,
        attribution_io=split.logit.heads,
        path_effect=path_effect,
        logit_diff=split.logit_diff.capped,
        logit_diff_before_cap=split.logit_diff.total,
    )

    # One row a head that joins the three, and one a head and kind of name.
    clean = interval(found.logit_diff, config.seed, "logit difference")
    correlations = all_correlations(found, names)
    whole = float(found.logit_diff_before_cap.mean()) if clean.low > 0 else None
    heads = head_table(found, names, correlations, whole, config)
    shown = given or [(row["layer"], row["head"]) for row in heads[:SHOWN]]
    pooled = {head: pooled_correlation(found, names, head, config.seed, RESAMPLES) for head in shown}

    # The files. The summary goes first and comes last: where it is, the rest is.
    (folder / "summary.json").unlink(missing_ok=True)
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    for old in folder.glob("figures/scatter_*"):  # of an earlier run, with other heads
        old.unlink()
    for layer, head in shown:
        figure = scatter(found, names, (layer, head), pooled[layer, head], name, config.fold_norm)
        figures.save(figure, folder / f"figures/scatter_{layer}.{head}.png")
    figures.save(copies_and_effects(heads, name), folder / "figures/copies_and_effects.png")
    figures.save(where_heads_look(found, places, shown, name), folder / "figures/looks.png")
    for measure, label in (("copy", "copy score"), ("copy_negative", "negative copy score")):
        heatmap = figures.head_heatmap(
            by_head(heads, measure), f"{label.capitalize()}: {name}", label, limits=(0.0, 1.0)
        )
        figures.save(heatmap, folder / f"figures/{measure}.png")
    write_csv(folder / "heads.csv", heads)
    write_csv(folder / "correlations.csv", correlation_table(correlations))
    write_csv(folder / "looks.csv", looks_table(found, places))
    (folder / "path_effect.npy").unlink(missing_ok=True)  # of an earlier run with path patching
    for measure, array in vars(found).items():
        if array is not None:
            write_npy(folder / f"{measure}.npy", array)
    kept = [f"prompt {index}" for index in range(len(prompt_set)) if index not in names.dropped]
    write_views(folder, look(model, tokenizer, prompts.input_ids, shown[:HEADS], names=kept))
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        prompts_hash=prompts.hash,
        n=len(prompts),
        dropped=[{"prompt": index, "why": why} for index, why in names.dropped.items()],
        kinds=list(names.kinds),
        pooled_kinds=[names.kinds[kind] for kind in names.whole],
        queries=["end", "end-1"],
        places=list(places),
        copy_inputs=list(INPUTS),
        copy_signs=list(SIGNS),
        copy_asked=["its own name", "another name of the prompt"],
        copy_places=list(copied),
        top=config.top,
        fold_norm=config.fold_norm,
        seed=config.seed,
        clean_logit_diff=clean.mean,
        clean_logit_diff_low=clean.low,
        clean_logit_diff_high=clean.high,
        clean_io_over_s=float((found.logit_diff > 0).mean()),
        logit_diff_before_cap=float(found.logit_diff_before_cap.mean()),
        does_the_task=clean.low > 0,
        mean_copy_score=float(by_head(heads, "copy").mean()),
        mean_negative_copy_score=float(by_head(heads, "copy_negative").mean()),
        roles={role: [head_name(row) for row in heads if row["role"] == role] for role in ROLES},
        by_threshold=counts(heads, whole),
        shown=[f"{layer}.{head}" for layer, head in shown],
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))

    print(summary(facts, heads, shown, pooled, found, places))
    print(f"\nwritten:\n  {folder}/ (summary, config, arrays, tables, figures)")


# -- what is run -------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raise ValueError for flags that no model could be run with."""
    for flag in ("batch_size", "top"):
        if getattr(config, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, not {getattr(config, flag)}.")
    for flag in ("heads", "names"):
        given = getattr(config, flag) or ()
        if len(set(given)) < len(given):
            raise ValueError(f"--{flag} names each of its {flag} once, not {' '.join(given)}.")


def further_names(config: Config, prompts: PromptSet) -> tuple[str, ...]:
    """The positions that hold names besides IO's and S's."""
    if config.path_patching and (lacking := [i for i, prompt in enumerate(prompts) if prompt.corrupt is None]):
        raise ValueError(
            f"prompt {lacking[0]} of {prompts.name} has no corrupt text, which path patching needs; add it, or leave path "
            "patching out with --no_path_patching."
        )
    if config.names is not None:
        return config.names
    shared = set.intersection(*(set(prompt.positions) for prompt in prompts))
    return tuple(name for name in prompts[0].positions if name in shared and name.startswith("earlier"))


def parse_head(text: str, config: Any) -> Head:
    """LAYER.HEAD; ValueError if the model has none."""
    layer, _, head = text.partition(".")
    if not (layer.isdecimal() and head.isdecimal()):
        raise ValueError(f"--heads {text} is no head; give LAYER.HEAD, such as 4.0.")
    if int(layer) >= n_layers(config) or int(head) >= n_heads(config):
        raise ValueError(
            f"--heads {text} is outside the model, which has {n_layers(config)} layers of {n_heads(config)} heads."
        )
    return int(layer), int(head)


def asked_names(names: Names) -> tuple[tuple[str, ...], Int[np.ndarray, "asked place prompt"]]:
    """The mentions that copy scores are taken at; their own names, and for each another one of its prompt."""
    places = tuple(kind for kind in names.kinds if kind != "s")
    own = [names.ids[names.kinds.index(place)] for place in places]
    other = [names.ids[names.kinds.index("s" if place == "io" else "io")] for place in places]
    return places, np.stack([own, other])


# -- numbers -----------------------------------------------------------------------------------------------------------


def interval(values: Float[np.ndarray, " prompt"], seed: int, *name: str | int) -> Interval:
    return paired_bootstrap(values, np.zeros_like(values), rng(seed, "bootstrap", *name), RESAMPLES)


def pooled_correlation(found: Measured, names: Names, head: Head, seed: int = 0, resamples: int = 1) -> Correlation:
    """Of all points of a head, each name once; with the kinds of names as rows, which permutations keep."""
    whole = list(names.whole)
    return correlate_heads(found.attention[whole, *head], found.projection[whole, *head], seed, resamples)


def all_correlations(found: Measured, names: Names) -> dict[Head, dict[str, Correlation]]:
    """R and p of every head, by kind of name and pooled; without intervals."""
    return {
        head: {
            kind: correlate_heads(found.attention[number, *head][None], found.projection[number, *head][None], 0, 1)
            for number, kind in enumerate(names.kinds)
        }
        | {"pooled": pooled_correlation(found, names, head)}
        for head in np.ndindex(found.attribution.shape[:2])
    }


def head_table(
    found: Measured, names: Names, correlations: dict[Head, dict[str, Correlation]], whole: float | None, config: Config
) -> list[dict[str, Any]]:
    """Copy scores, correlations, attention and direct effects of every head, and its role; largest attribution first."""
    scores: Float64[np.ndarray, "input sign asked layer head"] = copy_scores(found.copy_ranks, config.top)
    rows = []
    for layer, head in np.ndindex(found.attribution.shape[:2]):
        row: dict[str, Any] = {"layer": layer, "head": head, "role": ""}
        measures = {
            "attribution": found.attribution,
            "path_effect": found.path_effect,
            "attribution_io": found.attribution_io,
            "attribution_s": found.attribution_io - found.attribution,
        }
        for measure, values in measures.items():
            if values is not None:
                of_head = interval(values[layer, head], config.seed, measure, layer, head)
                row |= {measure: of_head.mean, f"{measure}_low": of_head.low, f"{measure}_high": of_head.high}
        row |= {
            f"copy{variant}{sign}": float(scores[which, minus, 0, layer, head])
            for which, variant in enumerate(("", "_embed"))
            for minus, sign in enumerate(("", "_negative"))
        }
        row |= {
            f"copy{sign}_control": float(scores[0, minus, 1, layer, head])
            for minus, sign in enumerate(("", "_negative"))
        }
        for number, kind in enumerate(names.kinds):
            row[f"attention_{kind}"] = float(found.attention[number, layer, head].mean())
        for kind, correlation in correlations[layer, head].items():
            row |= {f"r_{kind}": correlation.pearson.r, f"p_{kind}": correlation.pearson.p}
        row["role"] = role(row, whole)
        rows.append(row)
    return sorted(rows, key=lambda row: -abs(row["attribution"]))


def role(row: dict[str, Any], whole: float | None, copies: float = COPIES, matters: float = MATTERS) -> str:
    """What a head is by its copy scores and its direct effect together; "" if it copies nothing, or there is nothing to do.

    `whole` is what all attributions sum to, None where the model does not do the task.
    """
    if whole is None or max(row["copy"], row["copy_negative"]) < copies:
        return ""
    positive = row["copy"] >= row["copy_negative"]
    enough = matters * whole
    above = row["attribution"] >= enough and row["attribution_low"] > 0 and row.get("path_effect_low", 1) > 0
    below = row["attribution"] <= -enough and row["attribution_high"] < 0 and row.get("path_effect_high", -1) < 0
    at_io = row["attention_io"] > row["attention_s"]
    if positive and above:
        return "name mover"
    if positive and below:
        return "moves the wrong name"
    if not positive and below and at_io:
        return "negative name mover"
    if not positive and above and not at_io:
        return "writes against S"
    if above or below:
        return ""
    both = all(row[name] >= enough and row[f"{name}_low"] > 0 for name in ("attribution_io", "attribution_s"))
    return "raises both names" if positive and both else "copies to no effect"


def counts(heads: list[dict[str, Any]], whole: float | None) -> list[dict[str, Any]]:
    """How many heads copy, and how many of them move names, at several thresholds."""
    return [
        {
            "copy_score": copies,
            "share_of_logit_diff": matters,
            "copy": sum(row["copy"] >= copies for row in heads),
            **{
                kind.replace(" ", "_"): sum(role(row, whole, copies, matters) == kind for row in heads)
                for kind in ROLES
            },
        }
        for copies in OTHER_COPIES
        for matters in OTHER_MATTERS
    ]


def correlation_table(correlations: dict[Head, dict[str, Correlation]]) -> list[dict[str, Any]]:
    """One row a head and kind of name."""
    return [
        {"layer": layer, "head": head, "kind": kind, "n": c.n, "r": c.pearson.r, "p": c.pearson.p, "note": c.note}
        for (layer, head), by_kind in correlations.items()
        for kind, c in by_kind.items()
    ]


def looks_table(found: Measured, places: Sequence[str]) -> list[dict[str, Any]]:
    """Mean attention of every head from END and from END-1 to each group of tokens."""
    mean = found.looks.mean(-1)
    return [
        {"layer": layer, "head": head, "query": query}
        | {place: float(mean[number, at, layer, head]) for at, place in enumerate(places)}
        for layer, head in np.ndindex(mean.shape[2:])
        for number, query in enumerate(("end", "end-1"))
    ]


def by_head(heads: list[dict[str, Any]], measure: str) -> Float[np.ndarray, "layer head"]:
    """A column of the table as a matrix."""
    rows = sorted(heads, key=lambda row: (row["layer"], row["head"]))
    return np.array([row[measure] for row in rows], float).reshape(1 + rows[-1]["layer"], -1)


def head_name(row: dict[str, Any]) -> str:
    return f"{row['layer']}.{row['head']}"


# -- figures -----------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(figures.STYLE)
def scatter(
    found: Measured, names: Names, head: Head, pooled: Correlation, name: str, fold_norm: bool = False
) -> Figure:
    """A head's attention to each name against what it writes in its direction; one point a prompt and name."""
    figure = Figure(figsize=(4.8, 3.9))
    axes = figure.add_subplot()
    axes.axhline(0, color=figures.GREY, linewidth=0.8)
    for number, kind in enumerate(names.whole):
        x, y = found.attention[kind, *head], found.projection[kind, *head]
        colour = COLOURS[number % len(COLOURS)]
        axes.scatter(x, y, s=14, alpha=0.7, color=colour, linewidths=0, label=names.kinds[kind])
    r = pooled.pearson
    words = f"r = {r.r:.2f} [{r.low:.2f}, {r.high:.2f}]" if np.isfinite(r.r) else f"no correlation: {pooled.note}"
    title = f"Head {head[0]}.{head[1]}: {name}\n{words}, n = {pooled.n}"
    axes.set(
        title=title,
        xlabel="attention from END to the name (sum over its occurrences)",
        ylabel="contribution at END . W_U[name]" + (", final norm folded in" if fold_norm else ""),
    )
    axes.grid()
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@matplotlib.rc_context(figures.STYLE)
def copies_and_effects(heads: list[dict[str, Any]], name: str) -> Figure:
    """Every head's copy scores against its attribution: a head of the one kind need not be one of the other."""
    figure = Figure(figsize=(7.2, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measure, label in ((left, "copy", "copy score"), (right, "copy_negative", "negative copy score")):
        x, y = ([row[column] for row in heads] for column in (measure, "attribution"))
        axes.axhline(0, color=figures.GREY, linewidth=0.8)
        axes.scatter(x, y, s=16, alpha=0.75, color=figures.BLUE, linewidths=0)
        for row in heads[:LABELLED]:
            if row[measure] < max(row["copy"], row["copy_negative"]):
                continue  # in the other panel
            axes.annotate(
                head_name(row), (row[measure], row["attribution"]), (3, 2), textcoords="offset points", size=7
            )
        axes.set(xlabel=label, xlim=(-0.04, 1.08))
        axes.grid()
    left.set(
        ylabel="attribution to logit(IO) - logit(S)", title=textwrap.fill(f"Copying and direct effect: {name}", 44)
    )
    return figure


@matplotlib.rc_context(figures.STYLE)
def where_heads_look(found: Measured, places: Sequence[str], shown: Sequence[Head], name: str) -> Figure:
    """Mean attention of some heads from END and from END-1 to each group of tokens."""
    figure = Figure(figsize=(1.6 + 0.78 * len(places), 1.3 + 0.26 * len(shown)))
    panels = figure.subplots(1, 2, sharey=True)
    for number, (axes, query) in enumerate(zip(panels, ("END", "END-1"), strict=True)):
        mean = np.array([found.looks[number, :, *head].mean(-1) for head in shown])
        image = axes.imshow(mean, cmap=figures.SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(places)), places, rotation=45, ha="right")
        axes.set_yticks(range(len(shown)), [f"{layer}.{head}" for layer, head in shown])
        axes.set(title=f"from {query}", xlabel="looked at")
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("head")
    figure.suptitle(textwrap.fill(f"Where heads look: {name}", 60), x=0.01, ha="left", fontsize=10)
    figure.colorbar(image, ax=panels, label="mean attention", fraction=0.05, pad=0.02).outline.set_visible(False)
    return figure


# -- the terminal ------------------------------------------------------------------------------------------------------


def summary(
    facts: dict[str, Any],
    heads: list[dict[str, Any]],
    shown: Sequence[Head],
    pooled: dict[Head, Correlation],
    found: Measured,
    places: Sequence[str],
) -> str:
    """What the terminal shows: the clean run, the joined table of some heads, what copy scores alone would say, and the looks."""
    lines = [
        f"{facts['model']} on {facts['dataset']}: {facts['n']} prompts; mean logit difference "
        f"{facts['clean_logit_diff']:.2f} [{facts['clean_logit_diff_low']:.2f}, {facts['clean_logit_diff_high']:.2f}], "
        f"IO above S on {facts['clean_io_over_s']:.1%}"
    ]
    if facts["dropped"]:
        lines.append(f"{len(facts['dropped'])} prompts left out, in which a name is not one token:")
        lines += [f"  prompt {entry['prompt']}: {entry['why']}" for entry in facts["dropped"][:TOLD]]
        if len(facts["dropped"]) > TOLD:
            lines.append(f"  ... and {len(facts['dropped']) - TOLD} more in summary.json")
    if not facts["does_the_task"]:
        lines.append(
            "the logit difference is not above 0 (95% interval): the model does not do this task, so that no head moves its "
            "answer; attributions below say which heads favour which name."
        )
    lines += [
        f"\nmean over heads: copy score {facts['mean_copy_score']:.3f}, negative {facts['mean_negative_copy_score']:.3f} "
        f"(among the first {facts['top']})",
        "\n        attribution to             path     copy score            attention   pooled                     p within\n"
        "  head  logit diff  [95%]      IO  effect       +     -  control     io     s  r [95%]                   kinds  role",
    ]
    rows = {(row["layer"], row["head"]): row for row in heads}
    for at in shown:
        row, r = rows[at], pooled[at].pearson
        span = f"[{row['attribution_low']:.2f}, {row['attribution_high']:.2f}]"
        path = f"{row['path_effect']:.2f}" if "path_effect" in row else "-"
        correlation = f"{r.r:.2f} [{r.low:.2f}, {r.high:.2f}]"
        lines.append(
            f"{head_name(row):>6} {row['attribution']:6.2f} {span:>14} {row['attribution_io']:6.2f} {path:>7} "
            f"{row['copy']:8.2f}{row['copy_negative']:6.2f} {row['copy_control']:8.2f} {row['attention_io']:7.2f}"
            f"{row['attention_s']:6.2f}  {correlation:<21} {r.p_within_layers:>11.4f}  {row['role']}"
        )
    lines.append("\nroles of all heads:" if facts["does_the_task"] else "")
    for kind in ROLES:
        if facts["roles"][kind]:
            lines.append(f"  {kind}: {', '.join(facts['roles'][kind])}")
    if facts["does_the_task"]:
        lines.append(
            "\ncopy score of   attribution of   heads that copy   of them name movers   raise both   heads that write against S"
        )
        lines += [
            f"{row['copy_score']:>13}   {row['share_of_logit_diff']:>14.0%}   {row['copy']:>15}   {row['name_mover']:>19}   "
            f"{row['raises_both_names']:>10}   {row['writes_against_S']:>26}"
            for row in facts["by_threshold"]
        ]
    lines.append("\nwhere they look (mean attention)\n  head  from  " + "".join(f"{place:>9}" for place in places))
    for layer, head in shown:
        for number, query in enumerate(("end", "end-1")):
            mean = found.looks[number, :, layer, head].mean(-1)
            lines.append(f"{layer:>4}.{head} {query:>6} " + "".join(f"{value:9.2f}" for value in mean))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
