"""Do heads matter more for hard problems? What an intervention costs by the model's confidence and by the steps of the solution.

    python experiments/critical_heads/stratify_difficulty.py
    python experiments/critical_heads/stratify_difficulty.py --models tiny-qwen2.5 tiny-llama3.1 --n_heads 2 --scope both
    python experiments/critical_heads/stratify_difficulty.py --heads 0.7 1.7 --kind mean --random_sets 50
    python experiments/critical_heads/stratify_difficulty.py --hub 12 --site embed --noise_seeds 5
    python experiments/critical_heads/stratify_difficulty.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k \
        --rankings my_heads.csv --n_heads 5 --max_new_tokens 320

Method. The model solves the problems untouched, and again with heads ablated while it writes (--heads, else the first --n_heads
of a ranking, as in ablate_heads.py, which has the details), or with noise at one token of its reasoning (--hub, as in
patch_hub.py). The problems are split by

    confidence   geometric mean probability of the answer's tokens in the untouched run, in --quantiles parts from q1, the least
                 confident; their edges are quantiles of all problems, found once. Problems without an answer that can be parsed
                 have none and are a stratum of their own, unparsed
    steps        the number of <<...>> in the problem's own solution
    both         one by the other

Of each stratum: accuracy with Wilson's 95% interval, untouched and under the intervention; the drop in points with its paired
bootstrap interval, and in percent of the untouched accuracy (a stratum with low accuracy has little to lose); and with heads the
excess over the mean of random sets of other heads of the same layers, head for head. With noise the drop is the mean over seeds.

Whether the drop (and the excess) differs between the strata of a split is a permutation test: strata are dealt to the problems
anew, their sizes kept. p is (1 + as far apart) / (1 + permutations); q is p with the false discovery rate over the splits of all
models. Of one stratum it is tested likewise whether its drop differs from that of all problems, q being over the strata of its
split. Verdicts: a drop above 10 points is causal and one below 2 redundant, by the mean and by the whole interval. A stratum of
fewer than --min_problems problems is shown with its counts and is in no test and no verdict.

Written to the folder OUT: drop_by_SPLIT.csv (stratum, MODEL_drop), one a split; strata.csv, every number; tests.csv, the tests;
problems/MODEL.csv, a row a problem with its strata and what was right; figures/MODEL.png and figures/MODEL_both.png; config.yaml
(running it again gives the same); and summary.json, what was run, with the edges and the verdicts. A run that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tqdm import tqdm

from pyvene_ext.engine.plain import reference_for
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.block_scores import Score
from pyvene_ext.methods.reasoning.evaluate import Evaluation, Results, facts_of
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import Problem
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import heads_together
from pyvene_ext.stats.controls import Head, strata_test, verdict
from pyvene_ext.stats.correlations import q_values
from pyvene_ext.stats.intervals import Interval

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import ablate_heads as ablation
from critical_heads import patch_hub
from critical_heads import setting as common

Row = dict[str, Any]
Split = Literal["confidence", "steps", "both"]
SPLITS: tuple[Split, ...] = ("confidence", "steps", "both")
UNPARSED = "unparsed"


@dataclass(frozen=True)
class Config(common.Flags):
    heads: tuple[str, ...] = ()
    """which heads to ablate, as layer.head; by default the first of a ranking"""
    n_heads: int = 1
    """how many heads of the ranking to ablate"""
    by: Score = "flow"
    """which score ranks the heads, where no --rankings are given"""
    rankings: tuple[str, ...] = ()
    """for each model a CSV scores,layer,head, such as rank_heads.py writes"""
    kind: ablation.Kind = "zero"
    """what comes in place of the heads' outputs"""
    scope: ablation.Scope = "reasoning"
    """at which tokens: reasoning, new (with the answer), both (with the question)"""
    random_sets: int = 20
    """random sets of other heads of the same layers; 0 for none"""
    donors: int = 64
    """problems that means and other problems' activations are of"""
    hub: int | None = None
    """in place of all that: noise at this token of the reasoning (negative: from its end)"""
    site: patch_hub.Site = "embed"
    """with --hub: where the noise is put (resid: behind the block in the middle)"""
    noise_seeds: int = 5
    """with --hub: draws of the noise"""
    quantiles: int = 4
    """parts by confidence"""
    min_problems: int = 20
    """a stratum with fewer problems has no verdict"""


@dataclass(frozen=True)
class Measured:
    """What an intervention does to each problem.

    Attributes:
        what: the intervention, in words.
        first: the untouched run from the question on, of all problems.
        which: the problems that are compared; the arrays are of these.
        clean: right without the intervention.
        after: right with it; with several seeds the share of them.
        unparsed: no answer with it; likewise.
        random: the same with each random set; None without.
    """

    name: str
    what: str
    first: Evaluation
    which: Int[np.ndarray, " problem"]
    clean: Bool[np.ndarray, " problem"]
    after: Float[np.ndarray, " problem"]
    unparsed: Float[np.ndarray, " problem"]
    random: Bool[np.ndarray, "set problem"] | None
    facts: Row


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "stratify_difficulty")
    problems = common.find_problems(config)
    if len(problems) < 2:
        raise ValueError("there is one problem, and an interval needs two; give more.")

    # One model after the other.
    rows: list[Row] = []
    tests: list[Row] = []
    tables: dict[str, list[Row]] = {}
    facts: Row = {}
    for number, name in enumerate(config.models):
        if config.hub is None:
            found = with_heads_ablated(config, name, number, problems, folder)
        else:
            found = with_noise_at_hub(config, name, problems, folder)
        strata, edges = strata_of(found.first, problems, config.quantiles)
        here = {split: [names[which] for which in found.which] for split, names in strata.items()}
        for split in SPLITS:
            some, test = split_by(found, split, here[split], config)
            rows, tests = rows + some, [*tests, test]
        tables[found.name] = each_problem(found, problems, here)
        facts[found.name] = {**found.facts, "intervention": found.what, "edges": edges}
    for p, q in (("p", "q"), ("excess_p", "excess_q")):
        for test, value in zip(tests, q_values(np.array([test[p] for test in tests])), strict=True):
            test[q] = float(value)

    if not is_main_process():
        return

    # The files.
    verdicts = verdicts_of(rows, tests, facts)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}, "*/*.csv", "figures/*"):
        for split in SPLITS:
            some = sorted((row for row in rows if row["split"] == split), key=lambda row: order(row["stratum"]))
            write_csv(folder / f"drop_by_{split}.csv", common.side_by_side(some, "stratum", "drop", "drop"))
        write_csv(folder / "strata.csv", rows)
        write_csv(folder / "tests.csv", tests)
        for model, table in tables.items():
            write_csv(folder / f"problems/{model}.csv", table)
            mine = [row for row in rows if row["model"] == model]
            title = f"{model}: {facts[model]['intervention']}"
            figures.save(bars(title, mine), folder / f"figures/{model}.png")
            figures.save(crossed(title, mine), folder / f"figures/{model}_both.png")

    print(summary(rows, facts, verdicts))
    print(f"\nwritten:\n  {folder}/ (tables, figures, problems, config, summary)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    for flag, least in (
        ("n_heads", 1),
        ("random_sets", 0),
        ("donors", 2),
        ("noise_seeds", 1),
        ("quantiles", 2),
        ("min_problems", 2),
    ):
        if (value := getattr(config, flag)) < least:
            raise ValueError(f"--{flag} must be {least} or more, not {value}.")
    if bool(config.heads) + bool(config.rankings) + (config.hub is not None) > 1:
        raise ValueError("--heads, --rankings and --hub are different interventions; give one of them.")
    common.check_rankings(config.rankings, config)
    common.check_heads(config.heads)
    if config.max_new_tokens < 2:
        raise ValueError("--max_new_tokens must be 2 or more: the first new token follows from the question alone.")


def strata_of(
    first: Evaluation, problems: Sequence[Problem], quantiles: int
) -> tuple[dict[Split, list[str]], list[float]]:
    """The strata of all problems by each split, and the edges of the parts by confidence."""
    known = first.confidence[np.isfinite(first.confidence)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, quantiles + 1))) if known.size else known
    parts = np.searchsorted(edges[1:-1], first.confidence, side="right") + 1
    confidence = [
        f"q{part}" if np.isfinite(value) else UNPARSED for part, value in zip(parts, first.confidence, strict=True)
    ]
    steps = [str(problem.steps) for problem in problems]
    both = [f"{part}, {number}" for part, number in zip(confidence, steps, strict=True)]
    return {"confidence": confidence, "steps": steps, "both": both}, edges.tolist()


def order(stratum: str) -> tuple[bool, list[int]]:
    """q2 before q10, unparsed last."""
    return stratum.startswith(UNPARSED), [int(number) for number in re.findall(r"\d+", stratum)]


# -- interventions -----------------------------------------------------------------------------------------------------


def flags_of(config: Config) -> dict[str, Any]:
    """The flags that all studies have."""
    return {field.name: getattr(config, field.name) for field in fields(common.Flags)}


def with_heads_ablated(config: Config, name: str, number: int, problems: Sequence[Problem], folder: Path) -> Measured:
    """The model solves all problems without some heads."""
    settings = ablation.Config(
        **flags_of(config),
        n_heads=(config.n_heads,),
        by=config.by,
        kind=(config.kind,),
        scope=(config.scope,),
        random_sets=config.random_sets,
        donors=config.donors,
    )
    if config.heads:
        study, heads, controls = with_named_heads(settings, config.heads, name, problems, folder)
    else:
        path = config.rankings[number] if config.rankings else None
        study, heads, _, controls = ablation.prepare(settings, name, path, problems, folder)
    sets = list({frozenset(some): some for some in controls}.values())
    reference = ablation.transcripts(study, config.kind, [heads, *sets])
    (positions, scope), runs = study.places(config.scope), []
    for some in tqdm([heads, *sets], desc=study.name, unit="set", disable=not is_main_process()):
        runs.append(
            study.run(heads_together(some, config.kind, positions=positions, seed=config.seed), scope, reference)
        )
    words = " ".join(f"{layer}.{head}" for layer, head in heads)
    return Measured(
        name=study.name,
        what=f"{config.kind} ablation of {words} at {ablation.SCOPES[config.scope]}",
        first=study.clean,
        which=np.arange(len(problems)),
        clean=study.clean.correct,
        after=runs[0].correct.astype(np.float64),
        unparsed=(~runs[0].parsed).astype(np.float64),
        random=np.array([run.correct for run in runs[1:]]) if sets else None,
        facts=metadata(study.model, problems=len(problems), clean=study.clean.summary(), random_sets=len(sets)),
    )


def with_named_heads(
    settings: ablation.Config, named: Sequence[str], name: str, problems: Sequence[Problem], folder: Path
) -> tuple[ablation.Model, tuple[Head, ...], list[tuple[Head, ...]]]:
    """One model, the heads that were named, and as many random sets as are asked for."""
    model, tokenizer = load_model(name, dtype=settings.dtype, device=choose_device(settings.device))
    heads = common.heads_of(named, name, model)
    controls = ablation.random_sets(settings, heads, model)
    questions = common.ask(settings, model, tokenizer, problems, settings.max_new_tokens)
    results = Results(folder / "unfinished", facts_of(model, questions, settings.max_new_tokens))
    return ablation.Model(Path(name).name, model, tokenizer, questions, results, settings), heads, controls


def with_noise_at_hub(config: Config, name: str, problems: Sequence[Problem], folder: Path) -> Measured:
    """The model answers behind the reasoning it wrote, with noise at one token of that."""
    setting = common.prepare(config, name, problems, folder)
    assert config.hub is not None  # else heads are ablated
    questions, which = setting.at(config.hub)
    if len(which) < 2:
        raise ValueError(
            f"--hub {config.hub}: {len(which)} problems of {setting.name} have a token there in their block."
        )
    settings = patch_hub.Config(**flags_of(config), sites=(config.site,))
    seeds = range(config.seed, config.seed + config.noise_seeds)
    ((where, _),) = patch_hub.noise_at_hub(settings, setting.model.config, config.seed).items()
    specs = [patch_hub.noise_at_hub(settings, setting.model.config, seed)[where] for seed in seeds]
    prompts = setting.questions.prompts
    reference = reference_for(specs, setting.model, prompts, batch_size=config.batch_size, progress=False)
    runs = [setting.run(questions, spec, reference) for spec in tqdm(specs, desc=setting.name, unit="seed")]
    return Measured(
        name=setting.name,
        what=f"noise at token {config.hub} of the reasoning, {where}",
        first=setting.first,
        which=np.array(setting.questions.index)[which],
        clean=setting.clean.correct[which],
        after=np.mean([run.correct for run in runs], 0),
        unparsed=np.mean([~run.parsed for run in runs], 0),
        random=None,
        facts=metadata(setting.model, **setting.facts),
    )


# -- what is found -----------------------------------------------------------------------------------------------------


def split_by(found: Measured, split: Split, names: Sequence[str], config: Config) -> tuple[list[Row], Row]:
    """A row a stratum, and the test of their differences."""
    strata = sorted(set(names), key=order)
    at = {stratum: np.array([name == stratum for name in names]) for stratum in strata}
    enough = [stratum for stratum in strata if at[stratum].sum() >= config.min_problems]
    tested = np.any([at[stratum] for stratum in enough], 0) if enough else np.zeros(len(names), bool)
    of_tested = [name for name, there in zip(names, tested, strict=True) if there]

    def test(gain: Float[np.ndarray, " problem"], what: str) -> tuple[float, dict[str, float]]:
        if len(enough) < 2:
            return math.nan, {}
        return strata_test(gain[tested], of_tested, rng(config.seed, "strata", split, what), common.RESAMPLES)

    p, each = test(found.clean - found.after, "drop")
    excess_p = math.nan
    if found.random is not None:
        excess_p, _ = test(found.random.mean(0) - found.after, "excess")
    q = q_values(np.array([each.get(stratum, math.nan) for stratum in strata]))
    rows = [
        row_of(found, split, stratum, at[stratum], stratum in enough, config)
        | {"p": each.get(stratum, math.nan), "q": float(of_stratum)}
        for stratum, of_stratum in zip(strata, q, strict=True)
    ]
    about = {"model": found.name, "split": split, "problems": int(tested.sum()), "strata": len(enough)}
    return rows, {**about, "p": p, "excess_p": excess_p}


def row_of(
    found: Measured, split: Split, stratum: str, here: Bool[np.ndarray, " problem"], enough: bool, config: Config
) -> Row:
    """One stratum; without intervals where it has too few problems."""
    clean, after, names = found.clean[here], found.after[here], (split, stratum)
    before, then = common.accuracy(clean), mean_of(after, config.seed, *names)
    nothing = Interval(math.nan, math.nan, math.nan)
    drop = common.drop_of(clean, after, config.seed, "drop", *names) if enough else nothing
    random, excess = math.nan, nothing
    if found.random is not None:
        by_set = found.random[:, here]
        random = 100 * float(clean.mean() - by_set.mean())
        if enough:
            excess = common.drop_of(by_set.mean(0), after, config.seed, "excess", *names)
    mean = 100 * float(clean.mean() - after.mean())
    return {
        "model": found.name,
        "split": split,
        "stratum": stratum,
        "problems": int(here.sum()),
        "clean_accuracy": before.mean,
        "clean_low": before.low,
        "clean_high": before.high,
        "accuracy": then.mean,
        "low": then.low,
        "high": then.high,
        "unparsed": 100 * float(found.unparsed[here].mean()),
        "drop": mean,
        "drop_low": float(drop.low),
        "drop_high": float(drop.high),
        "relative_drop": mean / float(clean.mean()) if clean.any() else math.nan,
        "random_drop": random,
        "excess": float(excess.mean),
        "excess_low": float(excess.low),
        "excess_high": float(excess.high),
        "verdict": verdict(drop) if enough else "",
    }


def mean_of(right: Float[np.ndarray, " problem"], seed: int, *names: str) -> Interval:
    """Accuracy in percent: Wilson's interval, or the bootstrap's where problems are right for some seeds only."""
    if np.isin(right, (0, 1)).all():
        return common.accuracy(right.astype(bool))
    mean = common.drop_of(right, np.zeros_like(right), seed, "accuracy", *names)
    return Interval(mean.mean, max(mean.low, 0.0), min(mean.high, 100.0))


def each_problem(found: Measured, problems: Sequence[Problem], strata: dict[Split, list[str]]) -> list[Row]:
    """A row a problem."""
    rows = []
    for i, which in enumerate(found.which.tolist()):
        row: Row = {
            "problem": which,
            "gold": problems[which].answer,
            "confidence": float(found.first.confidence[which]),
            "steps": problems[which].steps,
            "stratum": strata["both"][i],
            "clean": int(found.clean[i]),
            "after": float(found.after[i]),
            "unparsed": float(found.unparsed[i]),
        }
        if found.random is not None:
            row["random"] = float(found.random[:, i].mean())
        rows.append(row)
    return rows


# -- what is said of it ------------------------------------------------------------------------------------------------


def verdicts_of(rows: Sequence[Row], tests: Sequence[Row], facts: Row) -> list[str]:
    """One line a model and split."""
    lines = []
    for test in tests:
        mine = [row for row in rows if (row["model"], row["split"]) == (test["model"], test["split"])]
        judged = [row for row in mine if row["verdict"]]
        line = f"{test['model']}, {facts[test['model']]['intervention']}, by {test['split']}: "
        few = len(mine) - len(judged)
        if judged:
            words = [row["verdict"] for row in judged]
            most, least = (choose(judged, key=lambda row: row["drop"]) for choose in (max, min))
            line += f"{words.count('causal')} of {len(judged)} strata causal, {words.count('redundant')} redundant; "
            parts = []
            for what, row in (("most", most), ("least", least))[: 1 + (least is not most)]:
                about = f"{row['stratum']} ({row['problems']} problems)"
                parts.append(f"{what} in {about}: {common.in_words(drop_in(row))}: {row['verdict']}")
                if not math.isnan(row["random_drop"]):
                    parts[-1] += f" (random heads {row['random_drop']:.1f})"
            line += "; ".join(parts)
        else:
            line += "no stratum has enough problems"
        for what, p, q in (("drop", "p", "q"), ("excess over random heads", "excess_p", "excess_q")):
            if not math.isnan(test[p]):
                differs = "differs" if test[q] <= 0.05 else "is not shown to differ"
                line += f"; the {what} {differs} between strata (p = {test[p]:.2g}, q = {test[q]:.2g})"
        lines.append(line + (f"; {few} strata with few problems" if few else ""))
    return lines


def drop_in(row: Row) -> Interval:
    return Interval(row["drop"], row["drop_low"], row["drop_high"])


def summary(rows: Sequence[Row], facts: Row, verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        edges = " ".join(f"{edge:.4f}" for edge in found["edges"])
        lines += [f"{model}: {found['intervention']}; edges of confidence {edges}", ""]
        lines.append(
            f"{'split':>10} {'stratum':>12} problems  untouched  accuracy   95% interval     drop   95% interval  relative "
            "unparsed  random  excess   95% interval      q  verdict"
        )
        for row in rows:
            if row["model"] != model:
                continue
            line = f"{row['split']:>10} {row['stratum']:>12} {row['problems']:8d} {row['clean_accuracy']:9.1f}% "
            line += f"{row['accuracy']:8.1f}% {ends(row, 'low', 'high'):>14} {row['drop']:8.1f} "
            line += f"{ends(row, 'drop_low', 'drop_high'):>14} {row['relative_drop']:8.1f}% {row['unparsed']:7.1f}% "
            line += f"{row['random_drop']:7.1f} {row['excess']:7.1f} {ends(row, 'excess_low', 'excess_high'):>14} "
            line += f"{row['q']:6.2g}  {row['verdict'] or 'few problems'}"
            lines.append(line.replace("nan", " - "))
        lines.append("")
    return "\n".join([*lines, "verdicts (drop above 10 points: causal, below 2: redundant)", *verdicts])


def ends(row: Row, low: str, high: str) -> str:
    return "" if math.isnan(row[low]) else f"[{row[low]:.1f}, {row[high]:.1f}]"


@matplotlib.rc_context(figures.STYLE)
def bars(title: str, rows: Sequence[Row]) -> Figure:
    """The drop by confidence and by steps, with its interval and what random heads cost."""
    sides = [[row for row in rows if row["split"] == split] for split in SPLITS[:2]]
    widths = [max(len(side), 2) for side in sides]
    figure = Figure(figsize=(2.6 + 0.75 * sum(widths), 3.6))
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=10)
    panels = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    for axes, side, xlabel in zip(
        panels, sides, ("confidence, from low to high", "steps of the solution"), strict=True
    ):
        x, drop = np.arange(len(side)), np.array([row["drop"] for row in side])
        few = [math.isnan(row["drop_low"]) for row in side]
        faces = ["#dcdcdc" if too_few else figures.BLUE for too_few in few]
        axes.bar(x, drop, 0.62, color=faces)
        errors = [np.abs(drop - [row[end] for row in side]) for end in ("drop_low", "drop_high")]
        axes.errorbar(x, drop, errors, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
        axes.plot(x, [row["random_drop"] for row in side], "D", color=figures.ORANGE, markersize=5)
        axes.axhline(0, color=figures.GREY, linewidth=0.8)
        labels = [f"{row['stratum']}\nn = {row['problems']}\nfrom {row['clean_accuracy']:.0f}%" for row in side]
        axes.set_xticks(x, labels)
        axes.set(xlabel=xlabel, xlim=(-0.6, max(len(side), 2) - 0.4))
        axes.grid(axis="y")
    panels[0].set_ylabel("drop in accuracy (points, 95% interval)")
    handles: list[Any] = [Patch(color=figures.BLUE, label="intervention")]
    if any(math.isnan(row["drop_low"]) for side in sides for row in side):
        handles.append(Patch(color="#dcdcdc", label="few problems"))
    if not all(math.isnan(row["random_drop"]) for row in rows):
        handles.append(Line2D([], [], color=figures.ORANGE, marker="D", ls="", label="random heads of the same layers"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@matplotlib.rc_context(figures.STYLE)
def crossed(title: str, rows: Sequence[Row]) -> Figure:
    """The drop by confidence and steps together, in colour and in numbers."""
    cells = {row["stratum"]: row for row in rows if row["split"] == "both"}
    parts, steps = ([row["stratum"] for row in rows if row["split"] == split] for split in SPLITS[:2])
    shown = np.full((len(parts), len(steps)), np.nan)
    for i, j in np.ndindex(shown.shape):
        row = cells.get(f"{parts[i]}, {steps[j]}")
        if row is not None and row["verdict"]:
            shown[i, j] = row["drop"]
    figure = Figure(figsize=(2.6 + 1.0 * max(len(steps), 2), 1.7 + 0.62 * max(len(parts), 2)))
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())), fontsize=10)
    axes = figure.add_subplot()
    axes.set_facecolor("#ececec")
    image = axes.imshow(np.ma.masked_invalid(shown), cmap=figures.SEQUENTIAL, vmin=0, vmax=100, aspect="auto")
    for i, j in np.ndindex(shown.shape):
        row = cells.get(f"{parts[i]}, {steps[j]}")
        if row is None:
            words, colour = "none", figures.GREY
        elif not row["verdict"]:
            words, colour = f"n = {row['problems']}", figures.GREY
        else:
            words = f"{row['drop']:.0f} {ends(row, 'drop_low', 'drop_high')}\nn = {row['problems']}"
            colour = "black" if row["drop"] > 60 else "white"
        axes.text(j, i, words, ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(len(steps)), steps)
    axes.set_yticks(range(len(parts)), parts)
    axes.set(xlabel="steps of the solution", ylabel="confidence, from low to high")
    figure.colorbar(image, ax=axes, label="drop (points)")
    return figure


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
