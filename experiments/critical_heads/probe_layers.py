"""What does the residual stream know while a model reasons? Linear probes of every layer, cross-validated, against baselines.

    python experiments/critical_heads/probe_layers.py
    python experiments/critical_heads/probe_layers.py --models tiny-qwen2.5 tiny-llama3.1 --positions question_last mark 3
    python experiments/critical_heads/probe_layers.py --targets answer result_1 result_2 --mid --shuffles 99
    python experiments/critical_heads/probe_layers.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --log \
        --max_new_tokens 320

Method. The model solves the problems untouched; the reasoning it wrote is given again, up to the `####`, and the residual stream
is read at one token of every problem: question_last, block_first, block_last, mark (the last token given, after which the
answer is written), or a token of the block by its number. The block of a model of continuous thoughts is its latent steps. From
the residual stream a ridge regression reads

    answer          the right answer                         first_operand   the first number of the first calculation
    last_digit      its last digit, a class                  result_1 ...    the result of the first (second ...) calculation
    correct         whether the model will be right, a class

of the problem's own solution. Probes are cross-validated, the penalty chosen inside the training folds (`probes` has
the details). Problems with the same numbers in the same order are in one fold (or, by --group question, those with the same text
only), so that no probe is tested on what it has seen. R^2 is of all problems together, each predicted without its fold: 0 is
what knowing only the mean gives, and a class is one number per class, 1 or 0. Its 95% interval is a bootstrap over these groups,
each resample against the same mean.
Beside it stand

    in_sample       the same measure on the problems that a probe is fitted to
    shuffled        labels given to other problems, --shuffles times: mean and range; p = (1 + as good) / (1 + shuffles), and q
                    with the false discovery rate over all probes of a model (Benjamini and Hochberg 1995)
    question        the mean over the question's tokens at the same layer in place of the token; at the embedding, which words
                    there are. gain is what the token has beyond it

accuracy is the share of problems for which the prediction, rounded, is the number, or for which the likeliest class is right;
chance that of the most frequent one. The verdict is on the best layer, with the p of the best layer of each shuffle. A probe says
what can be read off, not what the model uses: ablate_heads.py and patch_hub.py tell that. The terminal shows the best layer of
each token and target, probes.csv all of them.

Written to the folder OUT: probe_POSITION_TARGET.csv (place, MODEL_r2); probes.csv, every number; figures/MODEL.png; config.yaml
(running it again gives the same); and summary.json, what was run, with the verdicts and what was skipped. A run that was
interrupted while the model solved problems goes on after that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyvene_ext.runs.reasoning import Asked, Setting

FEWEST = 19  # shuffles; with fewer no p is 0.05, and nothing could be found
N_TINY, N_PLAIN = 1200, 100  # problems, where no --limit is given
Position = Annotated[
    str,
    px.io.Matches(
        r"question_last|block_first|block_last|mark|-?\d+",
        "question_last, block_first, block_last, mark, or the number of a token of the block, such as 3 or -2",
    ),
]
Target = Annotated[
    str,
    px.io.Matches(
        r"answer|first_operand|last_digit|correct|result_[1-9]\d*",
        "answer, first_operand, last_digit, correct, or result_1, result_2 ...",
    ),
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Config(px.flags.Problems):
    limit: px.flags.Limit = None
    """only the first N problems; by default 1200 of the tiny models', 100 of one and two steps of plain, all of others"""
    positions: px.flags.OneOrMore[Position] = ("question_last", "block_first", "block_last", "mark")
    """where the residual stream is read: those named above, or a token of the block (negative: from its end)"""
    targets: px.flags.OneOrMore[Target] = ("answer", "last_digit", "first_operand", "result_1", "correct")
    """what a probe is to read off"""
    log: bool = False
    """numbers by their logarithm, sign(x) log(1 + |x|)"""
    mid: bool = False
    """also between attention and MLP"""
    group: Literal["numbers", "question"] = "numbers"
    """which problems must be in one fold: those with the same numbers in the same order, or with the same text"""
    folds: Annotated[int, Ge(3)] = 5
    """folds of the cross-validation"""
    shuffles: Annotated[int, Ge(FEWEST)] = 50
    """times that the labels are shuffled, 19 or more"""
    min_problems: Annotated[int, Ge(10)] = 50
    """a target or a token of the block that fewer problems have is skipped"""


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/probe_layers", config.source, *config.models)
    flags = px.reasoning.of_both_steps(config, N_PLAIN, N_TINY)  # probes need many
    problems = px.reasoning.find_problems(flags)
    px.reasoning.check_number(problems, config.min_problems)
    load = partial(px.reasoning.load, flags, problems, run.unfinished, partial(check, config))
    n, seconds = len(problems), None if config.tiny else seconds_of
    probes = f"probes of every layer for {px.io.counted(len(config.targets), 'target')} at "
    probes += px.io.counted(len(config.positions), "token")
    work = f"{px.io.counted(n, 'text')} of at most {config.new_tokens} tokens, and {probes}"

    # Each model reads its own reasoning again; probes of every place, cross-validated, and the same with shuffled labels.
    rows: list[Row] = []
    facts: Row = {}
    for asked in px.runs.each_model(run, load, work, seconds, n, shorter(config), least=config.min_problems):
        setting = asked.reason()
        found, skipped = probe(setting, config)
        rows += found
        facts[setting.name] = px.metadata(setting.model, **setting.facts, left_out=skipped)
        del asked, setting  # two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    # What can be read off at the best place.
    best = best_places(rows)
    tested = {"models": facts, "verdicts": verdicts_of(best)}

    print(summary(facts, best))
    with run.writing(tested, evidence(best, config.shuffles), replacing=("*.csv", "figures/*")):
        for position, target in dict.fromkeys((row["position"], row["target"]) for row in rows):
            some = [row for row in rows if (row["position"], row["target"]) == (position, target)]
            run.table(f"probe_{position}_{target}", px.stats.side_by_side(some, "place", "r2", "r2"))
        run.table("probes", rows)
        for model in facts:
            run.figure(model, px.figures.probe_curves(model, [row for row in rows if row["model"] == model]))


# -- measurement -------------------------------------------------------------------------------------------------------


def check(config: Config, _: int, __: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a model that lacks a place to be probed."""
    px.methods.places_of(model, config.mid)


def seconds_of(config: Config, asked: Asked, n: int) -> float:
    """How long the texts, one more forward pass and the probes take at most; fits are timed on all problems."""
    every = len(asked.questions)
    embeddings: Any = asked.model.get_input_embeddings()
    a_fit = seconds_to_fit(
        max(every, 2 * config.folds), embeddings.weight.shape[1], len(config.targets), 1 + config.shuffles, config.folds
    )
    n_fits = 2 * len(px.methods.places_of(asked.model, config.mid)) * len(config.positions)  # the question's mean, too
    return asked.seconds(n) + n * asked.a_pass + n_fits * a_fit * n / every


@cache
def seconds_to_fit(*sizes: int) -> float:
    """The same time for the same sizes."""
    return px.methods.seconds_to_fit(*sizes)


def shorter(config: Config) -> Row:
    """The flags that make a run shorter."""
    return {"positions": config.positions}


def probe(setting: Setting, config: Config) -> tuple[list[Row], Row]:
    """Every position, target and place of one model; and what was skipped, with the reason."""
    questions = setting.questions
    tokens = {position: setting.tokens_at(position) for position in config.positions}
    skipped: Row = {}
    targets: dict[str, list[px.methods.ProbeTarget]] = {}
    for position, at in tokens.items():
        has = [token is not None for token in at]
        for name in config.targets:
            target = target_of(setting, name, has, config)
            if isinstance(target, str):
                skipped[f"{position}, {name}"] = target
            else:
                targets.setdefault(position, []).append(target)
    if not targets:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise ValueError(f"{setting.name}: there is nothing to probe for ({reasons}).")
    asked = [range(length) for length in questions.lengths]
    how: Any = {"mid": config.mid, "batch_size": config.batch_size, "progress": px.is_main_process()}
    residuals = px.methods.read_residuals(setting.model, questions.prompts, tokens, asked, **how)
    groups = np.array([px.methods.problem_group(problem, config.group) for problem in questions.problems])
    n_probes = len(residuals.places) * sum(map(len, targets.values()))
    with px.io.progress_bar(n_probes, "probe", "probes", shown=px.is_main_process()) as bar:
        how = {"folds": config.folds, "shuffles": config.shuffles, "seed": config.seed, "done": bar.update}
        rows = px.methods.probe_rows(residuals, targets, groups, **how)
    return [{"model": setting.name, **row} for row in rows], skipped


def target_of(setting: Setting, name: str, has: Sequence[bool], config: Config) -> px.methods.ProbeTarget | str:
    """A target of the problems that have a token; or in words why it is skipped."""
    if name == "correct":
        every = setting.clean.correct.astype(np.float64)
    else:
        every = np.array([px.methods.solution_number(problem, name) for problem in setting.questions.problems])
    options: Any = {"least": config.min_problems, "folds": config.folds, "log": config.log}
    return px.methods.find_target(name, every, has, **options)


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdict_of(row: Row) -> str:
    """What the best place of a position and target says."""
    if row["p_best"] > 0.05 or row["r2_low"] <= 0:
        return "not found"
    if row["gain_low"] > 0:
        return "found, and more than in the question's mean"
    return "found, but no more than in the question's mean"


def best_places(rows: Sequence[Row]) -> list[Row]:
    """Of each model, position and target the place where most is known, with the number of places."""
    best = []
    for key in dict.fromkeys((row["model"], row["position"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["position"], row["target"]) == key]
        best.append(max(mine, key=lambda row: row["r2"]) | {"places": len(mine)})
    return best


def verdicts_of(best: Sequence[Row]) -> list[str]:
    """One line per model, position and target, of the place where most is known."""
    return [
        f"{row['model']}, {row['position']}, {row['target']}: {verdict_of(row)}: R^2 "
        f"{in_words(px.stats.interval_in(row, 'r2'))} at {row['place']}, the best of {row['places']} "
        f"(p = {row['p_best']:.2g}); in-sample {row['in_sample']:.2f}, labels shuffled {row['shuffled']:.2f}, question's "
        f"mean {row['question']:.2f}; {row['accuracy']:.1f}% exact (in-sample {row['accuracy_in_sample']:.1f}%, chance "
        f"{row['chance']:.1f}%)"
        for row in best
    ]


def evidence(best: Sequence[Row], shuffles: int) -> list[px.runs.Evidence]:
    """Of each model the position and target of which most is known beyond the question's mean."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in best):
        mine = [row for row in best if row["model"] == model]
        top = max(mine, key=lambda row: row["gain"])
        effect = f"{model}: R^2 of {top['target']} at {top['position']}, {top['place']}, beyond the question's mean "
        effect += f"({top['question']:.2f}), the largest of {len(mine)} gains,"
        control = (
            f"labels shuffled, p = {top['p_best']:.2g} of its R^2 of {top['r2']:.2f} (best places, {shuffles} shuffles)"
        )
        sample, gain = px.io.counted(top["problems"], "problem"), px.stats.interval_in(top, "gain")
        lines.append(px.runs.Evidence(sample, effect, gain, control, "a larger --limit, or --problems with more"))
    return lines


def in_words(interval: px.Interval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def summary(facts: Row, best: Sequence[Row]) -> str:
    """What the terminal shows: of each position and target its best place."""
    lines = []
    for model, found in facts.items():
        lines += [px.reasoning.counts(model, found), ""]
        lines.append(
            f"{'position':>14} {'target':>14} {'best place':>13} problems    R^2   95% interval labels shuffled  p best question"
            "   exact (chance)  what can be read off"
        )
        for row in best:
            if row["model"] != model:
                continue
            interval, spread = (
                f"[{row[low]:.2f}, {row[high]:.2f}]"
                for low, high in (("r2_low", "r2_high"), ("shuffled_lowest", "shuffled_highest"))
            )
            chance = f"({row['chance']:.1f}%)"
            lines.append(
                f"{row['position']:>14} {row['target']:>14} {row['place']:>13} {row['problems']:8d} {row['r2']:6.2f} "
                f"{interval:>14} {spread:>15} {row['p_best']:7.2g} {row['question']:8.2f} {row['accuracy']:6.1f}% {chance:>8}  "
                f"{verdict_of(row)}"
            )
        lines += [f"left out: {what}: {reason}" for what, reason in found["left_out"].items()]
        lines.append("")
    return "\n".join(
        [*lines, "every place is in probes.csv and in the figures; what can be read off is not what is used"]
    )


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
