"""What does the residual stream know while a model reasons? Linear probes of every layer, cross-validated, against baselines.

    python experiments/critical_heads/probe_layers.py
    python experiments/critical_heads/probe_layers.py --models tiny-qwen2.5 tiny-llama3.1 --positions question_last mark 3
    python experiments/critical_heads/probe_layers.py --targets answer result_1 result_2 --mid --shuffles 99
    python experiments/critical_heads/probe_layers.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --log \
        --max_new_tokens 320

Method. The model solves the problems untouched; the reasoning it wrote is given again, up to the `####`, and the residual stream
is read at one token of every problem: question_last, block_first, block_last, mark (the last token given, behind which the
answer is written), or a token of the block by its number. The block of a model of continuous thoughts is its latent steps. From
the residual stream a ridge regression tells

    answer          the right answer                         first_operand   the first number of the first calculation
    last_digit      its last digit, a class                  result_1 ...    the result of the first (second ...) calculation
    correct         whether the model will be right, a class

of the problem's own solution. Probes are cross-validated, the penalty chosen inside the training folds (`probes` has
the details). Problems with the same numbers in the same order are in one fold (or, by --group question, those with the same text
only), so that no probe is tested on what it has seen. R^2 is of all problems together, each predicted without its fold: 0 is
what knowing only the mean gives, and a class is one number a class, 1 or 0. Its 95% interval is a bootstrap over these groups.
Beside it stand

    in_sample       the same measure on the problems that a probe is fitted to, which is how 97.6% were published
    shuffled        labels given to other problems, --shuffles times: mean and range; p = (1 + as good) / (1 + shuffles), and q
                    with the false discovery rate over all probes of a model (Benjamini and Hochberg 1995)
    question        the mean over the question's tokens at the same layer in place of the token; at the embedding, which words
                    there are. gain is what the token has beyond it

accuracy is the share of problems for which the prediction, rounded, is the number, or for which the likeliest class is right;
chance that of the most frequent one. The verdict is on the best layer, with the p of the best layer of each shuffle. A probe says
what can be read off, not what the model uses: ablate_heads.py and patch_hub.py tell that.

Written to the folder OUT: probe_POSITION_TARGET.csv (place, MODEL_r2); probes.csv, every number; figures/MODEL.png; config.yaml
(running it again gives the same); and summary.json, what was run, with the verdicts and what was left out. A run that was
interrupted while the model solved problems goes on behind that.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float, Float32, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.probes import (
    Fit,
    cross_validated,
    deal_folds,
    places_of,
    read_residuals,
    shuffled,
)
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.prompts.problems import NUMBER, STEP, Problem
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.stats.correlations import cluster_shares, q_values, r_squared
from pyvene_ext.stats.intervals import Interval

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

FEWEST = 19  # shuffles; with fewer no p is 0.05, and nothing could be found
N_TINY = 1200  # problems of the tiny models, where no --limit is given
RESAMPLES = 2000
CLASSES = ("last_digit", "correct")
NAMED = ("question_last", "block_first", "block_last", "mark")
LINES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("in_sample", {"color": figures.BLUE, "linestyle": ":"}, "in-sample"),
    ("r2", {"color": figures.BLUE, "marker": "o", "markersize": 3.5}, "cross-validated, 95% interval"),
    ("question", {"color": figures.ORANGE, "marker": "s", "markersize": 3}, "mean of the question at this layer"),
    ("shuffled", {"color": figures.GREY, "linestyle": "--"}, "labels shuffled: mean and range"),
)
OPERAND = re.compile(r"-?(\d+(\.\d+)?|\.\d+)")  # calculations may leave the 0 of 0.5 out
Row = dict[str, Any]


@dataclass(frozen=True)
class Config(common.Flags):
    limit: int | None = None
    """only the first so many problems; by default 1200 of the tiny models' and all of others"""
    positions: tuple[str, ...] = NAMED
    """where the residual stream is read: those named above, or a token of the block (negative: from its end)"""
    targets: tuple[str, ...] = ("answer", "last_digit", "first_operand", "result_1", "correct")
    """what a probe is to tell"""
    log: bool = False
    """numbers by their logarithm, sign(x) log(1 + |x|)"""
    mid: bool = False
    """also between attention and MLP"""
    group: Literal["numbers", "question"] = "numbers"
    """which problems must be in one fold: those with the same numbers in the same order, or with the same text"""
    folds: int = 5
    """folds of the cross-validation"""
    shuffles: int = 50
    """times that the labels are shuffled, 19 or more"""
    min_problems: int = 50
    """a target or a token of the block that fewer problems have is left out"""


@dataclass(frozen=True)
class Target:
    """What a probe is to tell of some problems.

    Attributes:
        which: the problems that have it.
        values: a number for each of them.
        y: what the ridge regression predicts: a column for the number, or one for each class.
    """

    name: str
    which: Int[np.ndarray, " problem"]
    values: Float[np.ndarray, " problem"]
    y: Float[np.ndarray, "problem column"]


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "probe_layers")
    tiny = config.problems == common.TINY and config.limit is None
    problems = common.find_problems(replace(config, limit=N_TINY) if tiny else config)

    # One model after the other.
    rows: list[Row] = []
    facts: Row = {}
    for name in config.models:
        setting = common.prepare(config, name, problems, folder, lambda _, model: places_of(model, config.mid))
        found, left_out = probed(setting, config)
        rows += found
        facts[setting.name] = metadata(setting.model, **setting.facts, left_out=left_out)
        del setting  # two models need not fit in memory together

    if not is_main_process():
        return

    # The files.
    verdicts = verdicts_of(rows)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}, "figures/*"):
        for position, target in dict.fromkeys((row["position"], row["target"]) for row in rows):
            some = [row for row in rows if (row["position"], row["target"]) == (position, target)]
            table = common.side_by_side(some, "place", "r2", "r2")
            write_csv(folder / f"probe_{position}_{target}.csv", table)
        write_csv(folder / "probes.csv", rows)
        for model in facts:
            figures.save(figure(model, [row for row in rows if row["model"] == model]), folder / f"figures/{model}.png")

    print(summary(facts, rows, verdicts))
    print(f"\nwritten:\n  {folder}/ (tables, figures, config, summary)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    for flag, least in (("folds", 3), ("shuffles", FEWEST), ("min_problems", 10)):
        if (value := getattr(config, flag)) < least:
            raise ValueError(f"--{flag} must be {least} or more, not {value}.")
    for flag in ("positions", "targets"):
        chosen = getattr(config, flag)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"--{flag} names one or more, each once.")
    for position in config.positions:
        if position not in NAMED and not re.fullmatch(r"-?\d+", position):
            raise ValueError(
                f"--positions {position}: give {', '.join(NAMED)}, or the number of a token of the block, such as 3 or -2."
            )
    for target in config.targets:
        if target not in ("answer", "first_operand", *CLASSES) and not re.fullmatch(r"result_[1-9]\d*", target):
            raise ValueError(
                f"--targets {target}: give answer, first_operand, {', '.join(CLASSES)}, or result_1, result_2 ..."
            )


def tokens_at(setting: common.Setting, position: str) -> list[int | None]:
    """The token of each problem, counted from its first, that a position names; None where a block is too short."""
    found: list[int | None] = []
    questions = setting.questions
    for block, ids, length in zip(questions.blocks, questions.prompts.input_ids, questions.lengths, strict=True):
        named = {
            "question_last": length - 1,
            "block_first": block[0],
            "block_last": block[-1],
            "mark": len(ids) - 1,
        }
        if position in named:
            found.append(named[position])
        else:
            number = int(position)
            found.append(block[number] if -len(block) <= number < len(block) else None)
    return found


def group_of(problem: Problem, group: str) -> str:
    """What problems that must not be in two folds have in common."""
    numbers = " ".join(match.group() for match in NUMBER.finditer(problem.question.replace(",", "")))
    return numbers if numbers and group == "numbers" else problem.question


def value_of(problem: Problem, target: str) -> float:
    """A number of a problem's solution; NaN where it has none."""
    if target == "answer":
        return problem.answer
    if target == "last_digit":
        return abs(problem.answer) % 10 if problem.answer == int(problem.answer) else math.nan
    steps = [step.replace(",", "").strip("<>") for step in STEP.findall(problem.solution)]
    number = 0 if target == "first_operand" else int(target.removeprefix("result_")) - 1
    if number >= len(steps):
        return math.nan
    first, equals, result = steps[number].partition("=")
    found = OPERAND.search(first if target == "first_operand" else result)
    return float(found.group()) if found and equals else math.nan


def target_of(setting: common.Setting, name: str, has: Sequence[bool], config: Config) -> Target | str:
    """A target of the problems that have a token; or in words why there is nothing to tell."""
    if name == "correct":
        every = setting.clean.correct.astype(np.float64)
    else:
        every = np.array([value_of(problem, name) for problem in setting.questions.problems])
    which = np.flatnonzero(np.isfinite(every) & np.array(has))
    values = every[which]
    if len(which) < config.min_problems:
        return f"{len(which)} problems have it, and --min_problems asks for {config.min_problems}"
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) == 1:
        return f"it is {kinds[0]:g} in all {len(which)} problems"
    if name in CLASSES and np.sort(counts)[:-1].sum() < config.folds:
        return f"{len(which) - counts.max()} of {len(which)} problems are not {kinds[counts.argmax()]:g}"
    if name in CLASSES:
        y = (values[:, None] == kinds).astype(np.float64)
    else:
        y = (np.sign(values) * np.log1p(np.abs(values)) if config.log else values)[:, None]
    return Target(name, which, values, y)


# -- what is found -----------------------------------------------------------------------------------------------------


def probed(setting: common.Setting, config: Config) -> tuple[list[Row], Row]:
    """Every position, target and place of one model; and what was left out, with the reason."""
    questions = setting.questions
    tokens = {position: tokens_at(setting, position) for position in config.positions}
    left_out: Row = {}
    targets: dict[str, list[Target]] = {}
    for position, at in tokens.items():
        has = [token is not None for token in at]
        for name in config.targets:
            target = target_of(setting, name, has, config)
            if isinstance(target, str):
                left_out[f"{position}, {name}"] = target
            else:
                targets.setdefault(position, []).append(target)
    if not targets:
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise ValueError(f"{setting.name}: there is nothing to probe for ({reasons}).")
    residuals = read_residuals(
        setting.model,
        questions.prompts,
        tokens,
        [range(length) for length in questions.lengths],
        mid=config.mid,
        batch_size=config.batch_size,
        progress=is_main_process(),
    )
    every = np.array([group_of(problem, config.group) for problem in questions.problems])
    rows: list[Row] = []
    n_probes = len(residuals.places) * sum(map(len, targets.values()))
    with tqdm(total=n_probes, desc="probes", unit="probe", disable=not is_main_process()) as bar:
        for position, of_position in targets.items():
            # Targets of the same problems share fits.
            alike: dict[bytes, list[Target]] = {}
            for target in of_position:
                alike.setdefault(target.which.tobytes(), []).append(target)
            for some in alike.values():
                found = of_targets(residuals.at[position], residuals.question, some, every[some[0].which], config, bar)
                rows += [
                    {"model": setting.name, "position": position, **row, "place": residuals.places[row["depth"]]}
                    for row in found
                ]
    q = q_values(np.array([row["p"] for row in rows]))
    return [{**row, "q": float(value)} for row, value in zip(rows, q, strict=True)], left_out


def of_targets(
    own: Float32[np.ndarray, "place prompt d"],
    question: Float32[np.ndarray, "place prompt d"],
    targets: Sequence[Target],
    named: Shaped[np.ndarray, " problem"],
    config: Config,
    bar: tqdm,
) -> list[Row]:
    """A row a target and place. All places have the same folds, shuffles and resamples."""
    which, groups = targets[0].which, np.unique(named, return_inverse=True)[1]
    folds = deal_folds(named.tolist(), config.folds, rng(config.seed, "folds"))
    shares = cluster_shares(groups, rng(config.seed, "resamples"), RESAMPLES)
    trials = []
    for target in targets:
        draws = [rng(config.seed, "shuffle", target.name, number) for number in range(config.shuffles)]
        trials.append(np.stack([target.y, *(shuffled(target.y, groups, draw) for draw in draws)]))
    found: dict[str, list[Row]] = {target.name: [] for target in targets}
    best = np.full((len(targets), config.shuffles), -np.inf)
    for depth in range(len(own)):
        fits = cross_validated(own[depth, which], trials, folds)
        baselines = cross_validated(question[depth, which], [some[:1] for some in trials], folds)
        for number, (target, some, fit, baseline) in enumerate(zip(targets, trials, fits, baselines, strict=True)):
            row, random = row_of(target, depth, some, fit, baseline, shares, config)
            best[number] = np.maximum(best[number], random)
            found[target.name].append({**row, "groups": int(groups.max()) + 1})
            bar.update()
    rows = []
    for of_target, random in zip(found.values(), best, strict=True):
        # The best of many places is good by chance too: it is compared with the best of each shuffle.
        highest = max(row["r2"] for row in of_target)
        rows += [{**row, "p_best": float((1 + (random >= highest).sum()) / (1 + len(random)))} for row in of_target]
    return rows


def row_of(
    target: Target,
    depth: int,
    trials: Float[np.ndarray, "trial problem column"],
    fit: Fit,
    baseline: Fit,
    shares: Float[np.ndarray, "resample problem"],
    config: Config,
) -> tuple[Row, Float[np.ndarray, " shuffle"]]:
    """One target at one place; and the R^2 of each shuffle."""
    both = np.stack([fit.predicted[0], baseline.predicted[0]])
    (r2, question), resampled = r_squared(target.y, both), r_squared(target.y, both, shares)
    random = np.array([r_squared(y, at) for y, at in zip(trials[1:], fit.predicted[1:], strict=True)])
    fitted = np.array([r_squared(y, at) for y, at in zip(trials, fit.in_sample, strict=True)])
    row = {
        "target": target.name,
        "depth": depth,
        "place": "",
        "problems": len(target.which),
        "groups": 0,
        "in_sample": float(fitted[0]),
        "in_sample_shuffled": float(fitted[1:].mean()),
        **named_interval("r2", float(r2), resampled[0]),
        "shuffled": float(random.mean()),
        "shuffled_lowest": float(random.min()),
        "shuffled_highest": float(random.max()),
        "p": float((1 + (random >= r2).sum()) / (1 + len(random))),
        **named_interval("question", float(question), resampled[1]),
        **named_interval("gain", float(r2 - question), resampled[0] - resampled[1]),
        "accuracy": accuracy(target, fit.predicted[0], config),
        "accuracy_in_sample": accuracy(target, fit.in_sample[0], config),
        "accuracy_question": accuracy(target, baseline.predicted[0], config),
        "chance": 100 * float(np.unique(target.values, return_counts=True)[1].max()) / len(target.which),
        "alpha": float(np.median(fit.alphas[0])),
    }
    return row, random


def named_interval(name: str, value: float, resampled: Float[np.ndarray, " resample"]) -> dict[str, float]:
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


def accuracy(target: Target, predicted: Float[np.ndarray, "problem column"], config: Config) -> float:
    """Percent of problems for which a prediction is right."""
    if target.name in CLASSES:
        return 100 * float((predicted.argmax(1) == target.y.argmax(1)).mean())
    number = predicted[:, 0]
    if config.log:
        number = np.sign(number) * np.expm1(np.abs(number))
    return 100 * float((np.round(number) == target.values).mean())


# -- what is said of it ------------------------------------------------------------------------------------------------


def verdict_of(row: Row) -> str:
    """What the best place of a position and target says."""
    if row["p_best"] > 0.05 or row["r2_low"] <= 0:
        return "not found"
    if row["gain_low"] > 0:
        return "found, and more than in the question's mean"
    return "found, but no more than in the question's mean"


def verdicts_of(rows: Sequence[Row]) -> list[str]:
    """One line a model, position and target, of the place where most is known."""
    lines = []
    for key in dict.fromkeys((row["model"], row["position"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["position"], row["target"]) == key]
        top = max(mine, key=lambda row: row["r2"])
        interval = Interval(top["r2"], top["r2_low"], top["r2_high"])
        lines.append(
            f"{', '.join(key)}: {verdict_of(top)}: R^2 {in_words(interval)} at {top['place']}, the best of {len(mine)} "
            f"(p = {top['p_best']:.2g}); in-sample {top['in_sample']:.2f}, labels shuffled {top['shuffled']:.2f}, question's "
            f"mean {top['question']:.2f}; {top['accuracy']:.1f}% exact (in-sample {top['accuracy_in_sample']:.1f}%, chance "
            f"{top['chance']:.1f}%)"
        )
    return lines


def in_words(interval: Interval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def summary(facts: Row, rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines += [common.counts(model, found), ""]
        mine = [row for row in rows if row["model"] == model]
        lines.append(
            f"{'position':>14} {'target':>14} {'place':>13} problems in-sample    R^2   95% interval  shuffled [range]"
            "      q  question   exact"
        )
        for row in mine:
            interval, spread = (
                f"[{row[low]:.2f}, {row[high]:.2f}]"
                for low, high in (("r2_low", "r2_high"), ("shuffled_lowest", "shuffled_highest"))
            )
            lines.append(
                f"{row['position']:>14} {row['target']:>14} {row['place']:>13} {row['problems']:8d} {row['in_sample']:9.2f} "
                f"{row['r2']:6.2f} {interval:>14} {spread:>17} {row['q']:6.2g} {row['question']:9.2f} {row['accuracy']:6.1f}%"
            )
        lines += [f"left out: {what}: {reason}" for what, reason in found["left_out"].items()]
        lines.append("")
    return "\n".join([*lines, "verdicts (what can be read off; not what is used)", *verdicts])


@matplotlib.rc_context(figures.STYLE)
def figure(model: str, rows: Sequence[Row]) -> Figure:
    """R^2 by depth with its baselines; a row of panels a target, a column a position."""
    positions, targets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("position", "target"))
    drawing = Figure(figsize=(max(1.0 + 2.5 * len(positions), 7), 1.4 + 1.7 * len(targets)))
    panels = drawing.subplots(len(targets), len(positions), sharex=True, sharey=True, squeeze=False)
    labels = list(dict.fromkeys(row["place"] for row in rows))
    for (i, target), (j, position) in itertools.product(enumerate(targets), enumerate(positions)):
        axes = panels[i, j]
        mine = [row for row in rows if (row["target"], row["position"]) == (target, position)]
        if not mine:
            axes.text(0.5, 0.5, "left out", transform=axes.transAxes, ha="center", color=figures.GREY)
            continue
        x = [row["depth"] for row in mine]

        def band(axes: Axes, low: str, high: str, colour: str, x: list[int] = x, mine: list[Row] = mine) -> None:
            ends = [row[low] for row in mine], [row[high] for row in mine]
            axes.fill_between(x, ends[0], ends[1], color=colour, alpha=0.2, linewidth=0)

        band(axes, "r2_low", "r2_high", figures.BLUE)
        band(axes, "question_low", "question_high", figures.ORANGE)
        band(axes, "shuffled_lowest", "shuffled_highest", figures.GREY)
        for key, look, label in LINES:
            axes.plot(x, [row[key] for row in mine], label=label, **look)
        axes.set_title(f"{target}, {position} ({mine[0]['problems']})")
        axes.grid(axis="y")
    # Penalties keep predictions from being far worse than the mean; what is, lies below the panel.
    panels[0, 0].set_ylim(-0.25, 1.05)
    shown = range(0, len(labels), math.ceil(len(labels) / 14))
    for axes in panels[-1]:
        axes.set_xticks(shown, [labels[depth] for depth in shown], rotation=90)
        axes.set_xlabel("place in the residual stream")
    for axes in panels[:, 0]:
        axes.set_ylabel("R²")
    drawing.suptitle(f"{model}: what a linear probe reads off the residual stream (in brackets: problems)", fontsize=10)
    drawn = next(axes for axes in panels.flat if axes.lines)
    drawing.legend(*drawn.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawing


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
