"""Does it matter how reasoning tokens attend to one another? Their attention patterns forced to given shapes.

    python experiments/critical_heads/force_attention.py
    python experiments/critical_heads/force_attention.py --models tiny-qwen2.5 tiny-llama3.1 --hub 5
    python experiments/critical_heads/force_attention.py --heads 1.3 2.0 2.1 --shapes uniform --no_sweep
    python experiments/critical_heads/force_attention.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --max_new_tokens 320

Method. The model solves the problems untouched. The reasoning it wrote is the block of a problem; it is given again, and the
answer behind `####` is generated while the queries of the block, in the chosen layers and heads, have a pattern that is given by
hand. A query that gives the block's tokens a mass m of its attention shares it out anew: hub, 0.8 m to one token and 0.2 m evenly
to the others that it may see; uniform, m evenly; sequential, m to the token before. Attention to the question is kept, or with a
`hard` pattern moved into the block too (`forced_attention.ForcedAttention` has the details). The block's tokens stay what they
are; what changes is the keys and values that the answer is read from.

Then the hub is put at every token of the block in turn. Token i of a block is there in problems whose blocks are longer than i;
each is compared with the untouched run on the same problems. `random_hub` in the table is its control: a hub drawn for each
problem. With --heads there is another control: random sets of other heads of the same layers, forced likewise; random_p is the
share of sets that lose at least as much, (1 + count) / (1 + sets).

A drop is the loss of accuracy against the untouched run, in points, with its paired bootstrap 95% interval and McNemar's p. Above
10 points a pattern is called causal and below 2 redundant, by the mean and by the whole interval.

Written to the folder OUT: accuracy_by_pattern.csv (pattern, MODEL_acc) and hub_sweep.csv (position, MODEL_soft_acc,
MODEL_hard_acc); patterns.csv and hubs.csv, the same with intervals, drops and p; figures; config.yaml (running it again gives the
same); and summary.json, what was run, with the verdicts. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import card_of, n_heads, n_layers
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.evaluate import Evaluation
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.stats.controls import layer_matched_random_heads, mcnemar_p, verdict
from pyvene_ext.stats.intervals import Interval

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Shape = Literal["hub", "random_hub", "uniform", "sequential"]
Row = dict[str, Any]
Heads = dict[int, tuple[int, ...]]  # by layer
BLOCK = ("block_first", "block_last")


@dataclass(frozen=True)
class Config(common.Flags):
    shapes: tuple[Shape, ...] = ("hub", "random_hub", "uniform", "sequential")
    """the patterns, each soft and hard"""
    hub: int = 0
    """the token of the block that is the hub of the pattern hub; a negative one counts from the block's end"""
    heads: tuple[str, ...] = ()
    """which heads, as layer.head; by default all"""
    sweep: bool = True
    """also put the hub at every token of the block in turn"""
    min_problems: int = 10
    """a token of the block that fewer problems have is left out of the sweep"""
    random_sets: int = 20
    """with --heads: random sets of other heads of the same layers, forced likewise; 0 for none"""


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "force_attention")
    problems = common.find_problems(config)

    # One model after the other.
    patterns: list[Row] = []
    hubs: list[Row] = []
    facts: Row = {}
    for name in config.models:
        setting = common.prepare(config, name, problems, folder, partial(forced_heads, config))
        heads, controls = forced_heads(config, setting.name, setting.model)
        patterns.append(untouched(setting))
        for shape in config.shapes:
            patterns += [one_pattern(setting, config, heads, controls, shape, hard) for hard in (False, True)]
        if config.sweep:
            hubs += swept(setting, config, heads)
        facts[setting.name] = metadata(setting.model, **setting.facts)
        del setting  # two models need not fit in memory together

    if not is_main_process():
        return

    # The files.
    verdicts = verdicts_of(patterns, hubs)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}):
        figures.save(pattern_figure(patterns, config), folder / "figures/accuracy_by_pattern.png")
        write_csv(folder / "patterns.csv", patterns)
        write_csv(folder / "accuracy_by_pattern.csv", common.side_by_side(patterns, "pattern", "acc", "accuracy"))
        if hubs:
            figures.save(hub_figure(hubs, config), folder / "figures/hub_sweep.png")
            write_csv(folder / "hubs.csv", hubs)
            named = [{**row, "model": f"{row['model']}_{'hard' if row['hard'] else 'soft'}"} for row in hubs]
            write_csv(folder / "hub_sweep.csv", common.side_by_side(named, "position", "acc", "accuracy"))

    print(summary(config, facts, patterns, verdicts))
    print(f"\nwritten:\n  {folder}/ (tables, figures, config, summary)")


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    if not config.shapes or len(set(config.shapes)) < len(config.shapes):
        raise ValueError("--shapes names one or more patterns, each once.")
    if config.random_sets < 0:
        raise ValueError(f"--random_sets must be 0 or more, not {config.random_sets}.")
    if config.min_problems < 2:
        raise ValueError(f"--min_problems must be 2 or more, not {config.min_problems}: an interval needs two.")
    common.check_heads(config.heads)


def forced_heads(config: Config, name: str, model: PreTrainedModel) -> tuple[Heads, list[Heads]]:
    """The heads to force, and the random sets beside them: as many other heads of each layer; none where all heads are forced.

    Raises ValueError for a model whose attention cannot be seen, a head that it has not, and layers with too few other heads.
    """
    card_of(model).component(model, "attention_pattern")
    layers, heads = n_layers(model.config), n_heads(model.config)
    if not config.heads:
        return dict.fromkeys(range(layers), tuple(range(heads))), []
    chosen = sorted(common.heads_of(config.heads, name, model))
    draw = rng(config.seed, "random heads")
    sets = layer_matched_random_heads(chosen, layers, heads, config.random_sets, draw) if config.random_sets else []
    return by_layer(chosen), [by_layer(some) for some in sets]


def by_layer(heads: Iterable[tuple[int, int]]) -> Heads:
    found: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for layer, head in heads:
        found[layer] += (head,)
    return dict(found)


def force(heads: Heads, shape: Shape, hard: bool) -> tuple[ForcedAttention, ...]:
    """The pattern in all of these heads; a hub is at the position "hub"."""
    named: dict[str, Any] = {"shape": shape} if "hub" not in shape else {"shape": "hub", "hub": "hub"}
    return tuple(
        ForcedAttention(layer=layer, heads=some, block=BLOCK, hard=hard, **named) for layer, some in heads.items()
    )


def untouched(setting: common.Setting) -> Row:
    """The untouched run as a row of the table."""
    clean = setting.clean
    row = row_of(setting, "none", False, clean.correct, clean, 0)
    return {**row, **dict.fromkeys(("drop", "drop_low", "drop_high", "mcnemar_p"), math.nan), **no_control()}


def one_pattern(
    setting: common.Setting, config: Config, heads: Heads, controls: list[Heads], shape: Shape, hard: bool
) -> Row:
    """One pattern on all problems that have its hub."""
    questions, which = setting.questions, list(range(len(setting.questions)))
    if shape == "hub":
        questions, which = setting.at(config.hub)
        if len(which) < 2:
            raise ValueError(
                f"--hub {config.hub}: {len(which)} problems have a token there in their block; choose another."
            )
    elif shape == "random_hub":
        questions = with_random_hubs(questions, config.seed)
    clean = setting.clean.correct[which]
    row = row_of(setting, shape, hard, clean, setting.run(questions, force(heads, shape, hard)), config.seed)
    if not controls:
        return {**row, **no_control()}
    after = [setting.run(questions, force(others, shape, hard)).correct.mean() for others in controls]
    drops = 100 * (clean.mean() - np.array(after))
    as_large = int((drops >= row["drop"] - 1e-9).sum())
    return {**row, "random_drop": float(drops.mean()), "random_p": (1 + as_large) / (1 + len(drops))}


def no_control() -> Row:
    return {"random_drop": math.nan, "random_p": math.nan}


def with_random_hubs(questions: Questions, seed: int) -> Questions:
    """The problems with a token of each block drawn as "hub"."""
    draw = rng(seed, "hubs")
    rows = zip(questions.prompts.input_ids, questions.prompts.positions, questions.blocks, strict=True)
    positions = tuple({**named, "hub": int(draw.choice(block)) - len(ids)} for ids, named, block in rows)
    return replace(questions, prompts=replace(questions.prompts, positions=positions))


def swept(setting: common.Setting, config: Config, heads: Heads) -> list[Row]:
    """The hub at every token of the block that enough problems have."""
    rows = []
    positions = common.positions_of(setting, config.min_problems)
    for position in tqdm(positions, desc="hub", unit="token", disable=not is_main_process()):
        questions, which = setting.at(position)
        for hard in (False, True):
            after = setting.run(questions, force(heads, "hub", hard))
            row = row_of(setting, "hub", hard, setting.clean.correct[which], after, config.seed, position)
            rows.append({"position": position, **row})
    return rows


def row_of(
    setting: common.Setting,
    shape: str,
    hard: bool,
    clean: Bool[np.ndarray, " problem"],
    after: Evaluation,
    seed: int,
    position: int = -1,
) -> Row:
    """A row of a table: accuracy in percent, its loss in points."""
    share = common.accuracy(after.correct)
    drop = common.drop_of(clean, after.correct, seed, shape, str(hard), position)
    return {
        "model": setting.name,
        "pattern": f"{shape}_hard" if hard else shape,
        "hard": hard,
        "problems": len(after),
        "accuracy": share.mean,
        "low": share.low,
        "high": share.high,
        "unparsed": int((~after.parsed).sum()),
        "clean_accuracy": 100 * float(clean.mean()),
        "drop": drop.mean,
        "drop_low": drop.low,
        "drop_high": drop.high,
        "mcnemar_p": mcnemar_p(clean, after.correct),
    }


def drop_in(row: Row) -> Interval:
    return Interval(row["drop"], row["drop_low"], row["drop_high"])


def verdicts_of(patterns: Sequence[Row], hubs: Sequence[Row]) -> list[str]:
    """One line a model and pattern, and one for the sweep of the hub."""
    lines = []
    for row in patterns:
        if row["pattern"] != "none":
            drop = drop_in(row)
            control = row["random_drop"]
            beside = "" if math.isnan(control) else f"; random heads {control:.1f} points, p = {row['random_p']:.2g}"
            lines.append(f"{row['model']}, {row['pattern']}: {common.in_words(drop)}: {verdict(drop)}{beside}")
    for model in dict.fromkeys(row["model"] for row in hubs):
        mine = [row for row in hubs if row["model"] == model and not row["hard"]]
        worst = max(mine, key=lambda row: row["drop"])
        drop = drop_in(worst)
        lines.append(
            f"{model}, hub swept: largest drop with the hub at token {worst['position']} of the block ({worst['problems']} "
            f"problems): {common.in_words(drop)}: {verdict(drop)}; the best of {len(mine)} tokens"
        )
    return lines


@matplotlib.rc_context(figures.STYLE)
def pattern_figure(rows: Sequence[Row], config: Config) -> Figure:
    """Accuracy by pattern, soft beside hard, one panel a model; the line is the untouched run."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.6 + 0.85 * len(config.shapes) * len(models) + 1.2 * len(models), 3.3))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        mine = {row["pattern"]: row for row in rows if row["model"] == model}
        axes.axhline(mine["none"]["accuracy"], color=figures.GREY, linewidth=1, linestyle="--", label="untouched")
        for hard, colour, shift in ((False, figures.BLUE, -0.19), (True, figures.ORANGE, 0.19)):
            some = [mine[f"{shape}_hard" if hard else shape] for shape in config.shapes]
            height = np.array([row["accuracy"] for row in some])
            error = [height - [row["low"] for row in some], [row["high"] for row in some] - height]
            x = np.arange(len(some)) + shift
            axes.bar(
                x, height, 0.36, color=colour, label="mass moved into the block (hard)" if hard else "mass kept (soft)"
            )
            axes.errorbar(x, height, np.abs(error), fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
        axes.set_xticks(range(len(config.shapes)), [shape.replace("_", "\n") for shape in config.shapes])
        axes.set(
            title=f"{model}: accuracy by forced pattern", xlabel="pattern of the reasoning's attention", ylim=(0, 103)
        )
        axes.grid(axis="y")
    panels[0].set_ylabel("problems correct (%, 95% interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@matplotlib.rc_context(figures.STYLE)
def hub_figure(rows: Sequence[Row], config: Config) -> Figure:
    """Drop by the place of the hub, one panel a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(1.2 + 4.4 * len(models), 3.3))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        axes.axhline(0, color=figures.GREY, linewidth=0.8)
        for hard, colour in ((False, figures.BLUE), (True, figures.ORANGE)):
            some = [row for row in rows if row["model"] == model and row["hard"] == hard]
            x = [row["position"] for row in some]
            axes.fill_between(
                x, *([row[end] for row in some] for end in ("drop_low", "drop_high")), color=colour, alpha=0.15
            )
            axes.plot(
                x, [row["drop"] for row in some], "o-", color=colour, markersize=3.5, label="hard" if hard else "soft"
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{model}: hub swept over the block", xlabel="hub (token of the block)")
        axes.grid(axis="y")
    panels[0].set_ylabel("drop in accuracy (points, 95% interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def summary(config: Config, facts: Row, rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(common.counts(model, found))
        lines.append(f"\n{'pattern':>18}  problems  accuracy     drop   95% interval   McNemar p  unparsed")
        for row in rows:
            if row["model"] == model and row["pattern"] == "none":
                lines.append(f"{'none':>18} {row['problems']:9} {row['accuracy']:8.1f}% {row['unparsed']:44}")
            elif row["model"] == model:
                interval = f"[{row['drop_low']:.1f}, {row['drop_high']:.1f}]"
                lines.append(
                    f"{row['pattern']:>18} {row['problems']:9} {row['accuracy']:8.1f}% {row['drop']:8.1f} {interval:>14} "
                    f"{row['mcnemar_p']:11.2g} {row['unparsed']:9}"
                )
        lines.append("")
    return "\n".join([*lines, "verdicts (drop above 10 points: causal, below 2: redundant)", *verdicts])


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
