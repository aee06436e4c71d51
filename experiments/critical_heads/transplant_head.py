"""Can another model's heads do the work of heads that look critical? Heads transplanted from a donor into a host.

    python experiments/critical_heads/transplant_head.py
    python experiments/critical_heads/transplant_head.py --models tiny-llama3.1 --donor tiny-gemma2 --method procrustes
    python experiments/critical_heads/transplant_head.py --heads 0.0 0.4 --donor_heads 0.1 0.7
    python experiments/critical_heads/transplant_head.py --models tiny-qwen2.5 --donor tiny-qwen2.5 --heads 0.7 --donor_heads 0.4
    python experiments/critical_heads/transplant_head.py --models Qwen/Qwen2.5-1.5B-Instruct --donor Qwen/Qwen2.5-0.5B-Instruct \
        --problems gsm8k --limit 300 --max_new_tokens 320 --rankings host.csv --donor_ranking donor.csv

Method. The host solves the problems untouched. The reasoning it wrote is given again, and the answer behind `####` is generated
while the first n heads of a ranking work no more at the tokens of question and reasoning, and in the place of each stands the
donor's head of the same rank. A transplanted head is given x A, where x is the host's residual stream before the block; its
queries, its own keys and values, its rotary embedding, scale and window are the donor's; what it would add to the donor's stream
goes through B into the host's (`transplant` has the details). A and B are fitted on paired residual streams of
--fit_problems problems, which are then left out of everything else: ridge regression, or a Procrustes rotation with a scale. R2
is of problems kept out of the fit, at contexts that no fitted problem has. The donor must cut texts into the same tokens.

Conditions: zero, nothing comes in the heads' place; self, their own heads are transplanted with identity maps, which must change
nothing; transplant; without_maps, the donor's heads with the streams as they are, where the two models have the same width and
head size. The control is random heads: of the donor's same layers, in each place another head than the one that is meant for it.

The ranking is that of rank_heads.py, computed here on the host's reasoning in host and donor where no file and no heads are
given. A drop is the loss of accuracy against the untouched run, in points, with its paired bootstrap 95% interval and McNemar's
exact p; gain is what a transplant gives back beyond zero, and excess what it has beyond the mean of the random sets, likewise.
share_as_good is (1 + random sets that are as good) / (1 + sets). Above 10 points a drop is called causal and below 2 redundant,
by its mean and by its whole interval. The donor's heads do what random ones do not if the whole interval of the excess is above 0
and no random set is as good.

Written to the folder OUT: accuracy.csv (n_heads, MODEL_CONDITION_acc); transplants.csv, every number; random_sets.csv; maps.csv,
how well each map fits; figures/accuracy.png; config.yaml (running it again gives the same); and summary.json, what was run, with
the verdicts. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import dimensions, n_heads, n_layers, n_positions
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lag import rank_heads
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.block_scores import Score, block_scores
from pyvene_ext.methods.reasoning.block_scores import check_model as check_scores
from pyvene_ext.methods.reasoning.evaluate import Evaluation, evaluate
from pyvene_ext.methods.reasoning.transplant import (
    Layers,
    Maps,
    Method,
    Paired,
    Transplant,
    fit_maps,
    pair_texts,
    transplanted,
)
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.identity import config_hash, weight_hash
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import Questions, as_text
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.stats.controls import Head, mcnemar_p, verdict
from pyvene_ext.stats.intervals import Interval

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Row = dict[str, Any]
Heads = tuple[Head, ...]
COLOURS = {"zero": figures.GREY, "transplant": figures.BLUE, "without_maps": figures.GREEN, "self": figures.PINK}
LABELS = {"zero": "nothing in their place", "transplant": "the donor's heads", "self": "their own heads (control)"}
LABELS |= {"without_maps": "the donor's heads without maps"}


@dataclass(frozen=True)
class Config(common.Flags):
    donor: str = "tiny-llama3.1"
    """the model whose heads are transplanted; named as --models are, which are the hosts"""
    heads: tuple[str, ...] = ()
    """heads of the host, as layer.head, the first one first; by default those of the ranking"""
    donor_heads: tuple[str, ...] = ()
    """heads of the donor, each for the place of the head at its place in --heads or in the ranking"""
    by: Score = "flow"
    """which score ranks the heads, where neither heads nor a file are given"""
    rankings: tuple[str, ...] = ()
    """for each host a CSV scores,layer,head, such as rank_heads.py writes"""
    donor_ranking: str | None = None
    """the same for the donor"""
    n_heads: tuple[int, ...] = ()
    """how many heads to replace, one number after the other; by default 1 2 4 6, or all that are named"""
    method: Method = "ridge"
    """how the maps are fitted"""
    alpha: float | None = None
    """the penalty of ridge; by default a small one, for which there must be more tokens than dimensions"""
    fit_problems: int = 100
    """problems with reasoning that the maps are fitted and tested on; the others are solved"""
    test_share: float = 0.25
    """how many of these are for the test"""
    random_sets: int = 20
    """sets of random heads of the donor; 0 for none"""


@dataclass(frozen=True)
class Study:
    """One host, with the donor's heads that are to come into it."""

    setting: common.Setting
    config: Config
    donor: PreTrainedModel
    pairs: tuple[tuple[Head, Head], ...]
    random: list[Heads]
    maps: dict[Layers, Maps]
    depends_on: Row

    def transplants(self, heads: Sequence[Head], n: int, mapped: bool = True) -> list[Transplant]:
        """These heads of the donor in the first n places."""
        return [
            Transplant(place, self.donor, head, self.maps[place[0], head[0]] if mapped else None)
            for (place, _), head in zip(self.pairs[:n], heads[:n], strict=True)
        ]

    def run(self, condition: str, transplants: Sequence[Transplant], without: Sequence[Head] = ()) -> Evaluation:
        """The answers under a condition; kept between runs."""
        setting, config = self.setting, self.config
        key = {
            **self.depends_on,
            "condition": condition,
            "transplants": [[*one.head, *one.donor_head] for one in transplants],
            "without": [list(head) for head in without],
            "new": config.answer_tokens,
            "prompts": setting.questions.prompts.hash,
        }

        def measure() -> Evaluation:
            with transplanted(setting.model, transplants, without=without):
                return evaluate(
                    setting.model,
                    setting.tokenizer,
                    setting.questions,
                    max_new_tokens=config.answer_tokens,
                    batch_size=config.batch_size,
                )

        return setting.results.get(key, measure)


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, f"transplant_head/{Path(config.donor).name}")
    problems = common.find_problems(config)
    donor, tokenizer = load_model(config.donor, dtype=config.dtype, device=choose_device(config.device))
    check_model(donor, donor_heads(config, donor))

    # One host after the other.
    rows: list[Row] = []
    randoms: list[Row] = []
    fits: list[Row] = []
    facts: Row = {}
    for number, name in enumerate(config.models):

        def check(_: str, model: PreTrainedModel, number: int = number) -> None:
            check_model(model, host_heads(config, number, model))
            if (form := format_of(model)) is not None and format_of(donor) != form:
                raise ValueError(
                    f"{Path(config.models[number]).name} thinks in latent steps that {Path(config.donor).name} does not know; "
                    "use a donor with the same ones."
                )

        setting = common.prepare(config, name, problems, folder, check)
        study = prepare(config, number, setting, donor, tokenizer)
        found, of_random = transplants(study)
        rows, randoms, fits = rows + found, randoms + of_random, fits + fits_of(study)
        pairs = [f"{common.in_short(place)} <- {common.in_short(head)}" for place, head in study.pairs]
        counted = {**setting.facts, "solved": len(study.setting.questions), "heads": pairs}
        facts[setting.name] = metadata(setting.model, **counted, **study.depends_on)
        del setting, study  # more than two models need not fit in memory together

    if not is_main_process():
        return

    # The files.
    verdicts = verdicts_of(rows, config)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}):
        figures.save(figure(rows, config), folder / "figures/accuracy.png")
        write_csv(folder / "transplants.csv", rows)
        wide = [{**row, "model": f"{row['model']}_{row['condition']}"} for row in rows]
        write_csv(folder / "accuracy.csv", common.side_by_side(wide, "n_heads", "acc", "accuracy"))
        write_csv(folder / "maps.csv", fits)
        if randoms:
            write_csv(folder / "random_sets.csv", randoms)

    print(summary(config, facts, fits, rows, verdicts))
    print(f"\nwritten:\n  {folder}/ (tables, figure, config, summary)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    common.check_heads(config.heads)
    common.check_heads(config.donor_heads, "donor_heads", once=False)
    if config.heads and config.rankings:
        raise ValueError("--heads and --rankings were both given; give one of them.")
    if config.donor_heads and config.donor_ranking:
        raise ValueError("--donor_heads and --donor_ranking were both given; give one of them.")
    common.check_rankings(config.rankings, config)
    if config.heads and config.donor_heads and len(config.heads) != len(config.donor_heads):
        raise ValueError(
            f"--heads names {len(config.heads)} heads and --donor_heads {len(config.donor_heads)}; give each place its head."
        )
    levels = list(numbers(config))
    if levels[0] < 1 or levels != sorted(set(levels)):
        raise ValueError(f"--n_heads takes ascending numbers of heads from 1 on, not {' '.join(map(str, levels))}.")
    for flag in ("heads", "donor_heads"):
        if 0 < len(getattr(config, flag)) < levels[-1]:
            raise ValueError(f"--n_heads asks for {levels[-1]} heads and --{flag} names {len(getattr(config, flag))}.")
    for flag, least in (("fit_problems", 2), ("random_sets", 0)):
        if (value := getattr(config, flag)) < least:
            raise ValueError(f"--{flag} must be {least} or more, not {value}.")
    if not 0 < config.test_share < 1:
        raise ValueError(f"--test_share must lie between 0 and 1, not be {config.test_share}.")
    if config.alpha is not None and not 0 < config.alpha < math.inf:
        raise ValueError(f"--alpha must be above 0, not {config.alpha}.")


def check_model(model: PreTrainedModel, heads: Heads | None) -> None:
    """Raise ValueError for heads that are to be ranked and cannot be."""
    if heads is None:
        check_scores(model)


def numbers(config: Config) -> tuple[int, ...]:
    """How many heads are replaced, one number after the other."""
    chosen = config.heads or config.donor_heads
    return config.n_heads or ((len(chosen),) if chosen else (1, 2, 4, 6))


def host_heads(config: Config, number: int, model: PreTrainedModel) -> Heads | None:
    path = config.rankings[number] if config.rankings else None
    return given_heads(config, config.models[number], model, "heads", path)


def donor_heads(config: Config, donor: PreTrainedModel) -> Heads | None:
    return given_heads(config, config.donor, donor, "donor_heads", config.donor_ranking)


def given_heads(
    config: Config, name: str, model: PreTrainedModel, flag: Literal["heads", "donor_heads"], path: str | None
) -> Heads | None:
    """As many heads of a model as are replaced at most, from a file or a flag; None where they are still to be ranked.

    Raises ValueError for heads that the model has not.
    """
    layers, heads, most = n_layers(model.config), n_heads(model.config), numbers(config)[-1]
    name = Path(name).name
    if most > layers * heads:
        raise ValueError(f"--n_heads asks for {most} heads and {name} has {layers * heads}; ask for fewer.")
    if path is not None:
        return rank_heads(read_head_scores(path, model.config), "full", layers, most)
    return common.heads_of(getattr(config, flag), name, model, flag)[:most] or None


def prepare(
    config: Config, number: int, setting: common.Setting, donor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Study:
    """Which of the donor's heads come into which places, and the maps, fitted on problems that are then left out."""
    everything = setting.questions
    if len(everything) < config.fit_problems + 2:
        raise ValueError(
            f"{setting.name} reasons about {len(everything)} problems; --fit_problems {config.fit_problems} leaves fewer than "
            "the two that an interval needs."
        )
    same = tokenizer.get_vocab() == setting.tokenizer.get_vocab()
    longest, context = max(map(len, everything.prompts.input_ids)), n_positions(donor.config)
    if longest > context:
        raise ValueError(
            f"a problem with its reasoning has {longest} tokens and {config.donor} takes {context}; use another donor, or a "
            "smaller --max_new_tokens."
        )
    ranked = host_heads(config, number, setting.model) or top(setting.model, everything, config)
    heads = donor_heads(config, donor)
    if heads is None and not same:
        raise ValueError(
            f"{config.donor} has another vocabulary than {setting.name}, so that its heads cannot be ranked on the same tokens; "
            "name --donor_heads or a --donor_ranking."
        )
    pairs = tuple(zip(ranked, heads or top(donor, everything, config), strict=True))
    random = random_heads(config, pairs, n_heads(donor.config))

    fitted = everything.take(range(config.fit_problems))
    texts = [as_text(ids, setting.tokenizer) for ids in fitted.prompts.input_ids]
    paired = Paired(fitted.prompts, fitted.prompts) if same else pair_texts(texts, setting.tokenizer, tokenizer)
    maps = fit_maps(
        setting.model,
        donor,
        paired,
        [(place[0], head[0]) for place, head in pairs],
        method=config.method,
        alpha=config.alpha,
        test_share=config.test_share,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    solved = range(config.fit_problems, len(everything))
    depends_on = {
        "donor": config.donor,
        "donor weights": weight_hash(donor),
        "donor config": config_hash(donor),
        "maps": {
            "fitted on": paired.host.hash,
            **{name: getattr(config, name) for name in ("method", "alpha", "test_share", "seed")},
        },
    }
    some = replace(setting, questions=everything.take(solved), clean=setting.clean.take(solved))
    return Study(some, config, donor, pairs, random, maps, depends_on)


def top(model: PreTrainedModel, questions: Questions, config: Config) -> Heads:
    """The first heads by their scores inside the block of reasoning."""
    scores = block_scores(model, questions, batch_size=config.batch_size)
    return common.top_heads(scores.of(config.by), numbers(config)[-1])


def random_heads(config: Config, pairs: Sequence[tuple[Head, Head]], heads: int) -> list[Heads]:
    """Sets of other heads of the donor: of the same layers, each once, none where it is the one meant for the place."""
    draw = rng(config.seed, "random donor heads")
    by_layer: dict[int, list[int]] = defaultdict(list)
    for at, (_, (layer, _)) in enumerate(pairs):
        by_layer[layer].append(at)
    for layer, places in by_layer.items():
        if config.random_sets and (
            heads == 1 or len({pairs[at][1] for at in places}) < len(places) or len(places) > heads
        ):
            raise ValueError(
                f"there are no random heads to put in place of those of the donor's layer {layer}: it has {heads}, and "
                f"{len(places)} places take one from it; give each place another head, or take --random_sets 0."
            )
    sets: list[Heads] = []
    while len(sets) < config.random_sets:
        chosen: dict[int, Head] = {}
        for layer, places in by_layer.items():
            while not all(at in chosen and chosen[at] != pairs[at][1] for at in places):
                drawn = draw.choice(heads, len(places), replace=False)
                chosen |= {at: (layer, int(head)) for at, head in zip(places, drawn, strict=True)}
        sets.append(tuple(chosen[at] for at in range(len(pairs))))
    return sets


# -- what is found -----------------------------------------------------------------------------------------------------


def transplants(study: Study) -> tuple[list[Row], list[Row]]:
    """Every number of heads under every condition, and every random set."""
    config, setting = study.config, study.setting
    places, heads = zip(*study.pairs, strict=True)
    own = [Transplant(place, setting.model, place) for place in places]
    sets, unmapped = study.random, fits_as_it_is(study)
    rows: list[Row] = []
    randoms: list[Row] = []
    total = len(numbers(config)) * (3 + unmapped + len(sets))
    with tqdm(total=total, desc=setting.name, unit="set", disable=not is_main_process()) as bar:

        def run(*args: Any) -> Evaluation:
            bar.update()
            return study.run(*args)

        for n in numbers(config):
            zero = run("zero", [], places[:n])
            found = {"zero": zero, "self": run("self", own[:n])}
            if unmapped:
                found["without_maps"] = run("without_maps", study.transplants(heads, n, mapped=False))
            found["transplant"] = run("transplant", study.transplants(heads, n))
            others = {some[:n]: run("transplant", study.transplants(some, n)) for some in sets}
            for condition, answers in found.items():
                controls = list(others.values()) if condition == "transplant" else []
                rows.append(row_of(study, n, condition, answers, zero, controls))
            for some, answers in others.items():
                drop = 100 * (setting.clean.accuracy - answers.accuracy)
                names = " ".join(map(common.in_short, some))
                about = {"model": setting.name, "n_heads": n, "donor_heads": names, "drop": drop}
                randoms.append({**about, "unparsed": int((~answers.parsed).sum())})
    return rows, randoms


def fits_as_it_is(study: Study) -> bool:
    """Whether the donor's heads can also be transplanted without maps."""
    sizes = [dimensions(model.config) for model in (study.setting.model, study.donor)]
    return all(sizes[0][name] == sizes[1][name] for name in ("d_model", "d_head"))


def row_of(
    study: Study, n: int, condition: str, answers: Evaluation, zero: Evaluation, others: Sequence[Evaluation]
) -> Row:
    """One number of heads under one condition: accuracy in percent, its loss in points."""
    seed, clean = study.config.seed, study.setting.clean
    accuracy = common.accuracy(answers.correct)
    drop = common.drop_of(clean.correct, answers.correct, seed, condition, n)
    gain = common.drop_of(answers.correct, zero.correct, seed, condition, n, "gain")
    row: Row = {
        "model": study.setting.name,
        "donor": Path(study.config.donor).name,
        "n_heads": n,
        "condition": condition,
        "heads": " ".join(common.in_short(place) for place, _ in study.pairs[:n]),
        "donor_heads": " ".join(common.in_short(head) for _, head in study.pairs[:n]),
        "problems": len(answers),
        "accuracy": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "unparsed": int((~answers.parsed).sum()),
        "changed": sum(a != b for a, b in zip(answers.ids, clean.ids, strict=True)),
        "clean_accuracy": 100 * clean.accuracy,
        **common.of_interval("drop", drop),
        "mcnemar_p": mcnemar_p(clean.correct, answers.correct),
        **common.of_interval("gain", gain),
        "random_sets": len(others),
    }
    names = (
        "random_accuracy",
        "random_lowest",
        "random_highest",
        "excess",
        "excess_low",
        "excess_high",
        "share_as_good",
    )
    row |= dict.fromkeys(names, math.nan)
    if others:
        of_random = np.array([100 * other.accuracy for other in others])
        excess = common.drop_of(answers.correct, np.mean([other.correct for other in others], 0), seed, n, "excess")
        share = (1 + int((of_random >= accuracy.mean - 1e-9).sum())) / (1 + len(others))
        values = (of_random.mean(), of_random.min(), of_random.max(), *excess, share)
        row |= {name: float(value) for name, value in zip(names, values, strict=True)}
    return row


def interval_in(row: Row, name: str) -> Interval:
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


def fits_of(study: Study) -> list[Row]:
    """One row a map."""
    return [
        {"model": study.setting.name, "host_layer": host, "donor_layer": donor, "map": name, **fit.as_dict()}
        for (host, donor), maps in study.maps.items()
        for name, fit in (("A", maps.into.fit), ("B", maps.back.fit))
        if fit is not None
    ]


def verdicts_of(rows: Sequence[Row], config: Config) -> list[str]:
    """Two lines a model and number of heads: what they are needed for, and whether the donor's do it."""
    found = {(row["model"], row["n_heads"], row["condition"]): row for row in rows}
    lines = []
    for model, n in dict.fromkeys((row["model"], row["n_heads"]) for row in rows):
        zero, moved, own = (found[model, n, condition] for condition in ("zero", "transplant", "self"))
        drops = {name: interval_in(row, "drop") for name, row in (("zero", zero), ("moved", moved))}
        gain, excess = interval_in(moved, "gain"), interval_in(moved, "excess")
        line = (
            f"{model}, {n} head{'s' * (n > 1)}: nothing in their place costs {common.in_words(drops['zero'])}: "
            f"{verdict(drops['zero'])}; those of {moved['donor']} cost {common.in_words(drops['moved'])}: "
            f"{verdict(drops['moved'])}; that gives back {common.in_words(gain)}"
        )
        as_good = round(moved["share_as_good"] * (1 + moved["random_sets"])) - 1 if moved["random_sets"] else 0
        if moved["random_sets"]:
            line += (
                f", and is {common.in_words(excess)} beyond random heads of the donor, {as_good} of {moved['random_sets']} sets "
                "being as good"
            )
        if gain.low <= 0:
            line += ": not shown to do any of their work"
        elif moved["random_sets"]:
            special = excess.low > 0 and not as_good
            line += ": they do some of their work, " + (
                "which random heads do not" if special else "and so may random heads"
            )
        if own["changed"]:
            line += f"; the self-transplant changed {own['changed']} of {own['problems']} answers, which rounding should not"
        lines.append(line)
    return lines


@matplotlib.rc_context(figures.STYLE)
def figure(rows: Sequence[Row], config: Config) -> Figure:
    """Accuracy by the number of heads, a line a condition, a panel a model; the random sets as their mean and range."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    drawing = Figure(figsize=(1.4 + 4.4 * len(models), 3.8))
    panels = drawing.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        axes.axhline(mine[0]["clean_accuracy"], color="black", linewidth=0.8, linestyle="--", label="untouched")
        for condition in dict.fromkeys(row["condition"] for row in mine):
            some = [row for row in mine if row["condition"] == condition]
            x, y = (np.array([row[key] for row in some]) for key in ("n_heads", "accuracy"))
            ends = [y - [row["low"] for row in some], [row["high"] for row in some] - y]
            colour, mark = COLOURS[condition], "D:" if condition == "self" else "o-"
            axes.errorbar(x, y, ends, fmt=mark, color=colour, markersize=4, capsize=2, label=LABELS[condition])
            if some[0]["random_sets"]:
                mean, least, most = (
                    [row[f"random_{key}"] for row in some] for key in ("accuracy", "lowest", "highest")
                )
                axes.fill_between(x, least, most, color=figures.ORANGE, alpha=0.15, linewidth=0)
                axes.plot(
                    x, mean, "s:", color=figures.ORANGE, markersize=3, label="random heads of the donor, mean and range"
                )
        axes.set(title=f"{model} with heads of {mine[0]['donor']}", xlabel="heads replaced", ylim=(-3, 103))
        axes.set_xticks(numbers(config))
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy (%, 95% interval)")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawing


def summary(config: Config, facts: Row, fits: Sequence[Row], rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(common.counts(model, found))
        lines.append(f"maps fitted on {config.fit_problems} of these; the {found['solved']} others are solved")
        lines.append(f"heads: {', '.join(found['heads'])}")
        for fit in (fit for fit in fits if fit["model"] == model):
            held = "; fewer tokens than dimensions, so alpha determines it" if fit["short"] else ""
            lines.append(
                f"map {fit['map']}, host layer {fit['host_layer']}, donor layer {fit['donor_layer']}: R2 {fit['r2_test']:.3f} on "
                f"{fit['test_tokens']} test tokens, {fit['r2_train']:.3f} on {fit['train_tokens']} fitted ones{held}"
            )
        lines.append(
            "\nheads    condition  accuracy     drop   95% interval   McNemar p  unparsed  changed  random mean [range]"
        )
        for row in (row for row in rows if row["model"] == model):
            interval = f"[{row['drop_low']:.1f}, {row['drop_high']:.1f}]"
            line = (
                f"{row['n_heads']:5} {row['condition']:>12} {row['accuracy']:8.1f}% {row['drop']:8.1f} {interval:>14} "
                f"{row['mcnemar_p']:11.2g} {row['unparsed']:9} {row['changed']:8}"
            )
            if row["random_sets"]:
                line += f"  {row['random_accuracy']:.1f}% [{row['random_lowest']:.1f}, {row['random_highest']:.1f}]"
            lines.append(line)
        lines.append("")
    return "\n".join([*lines, "verdicts (drop above 10 points: causal, below 2: redundant)", *verdicts])


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
