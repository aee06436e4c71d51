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
what knowing only the mean gives, and a class is one number a class, 1 or 0. Its 95% interval is a bootstrap over these groups,
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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float, Float32, Shaped
from tqdm import tqdm

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyvene_ext.runs.reasoning import Asked, Setting

FEWEST = 19  # shuffles; with fewer no p is 0.05, and nothing could be found
N_TINY, N_PLAIN = 1200, 100  # problems, where no --limit is given
RESAMPLES = 2000
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
    """only the first so many problems; by default 1200 of the tiny models', 100 of one and two steps of plain, all of others"""
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
    flags = with_more_problems(config)
    problems = px.reasoning.find_problems(flags)

    def check(_: str, model: PreTrainedModel) -> None:
        px.methods.places_of(model, config.mid)

    # Each model reads its own reasoning again; probes of every place, cross-validated, and the same with shuffled labels.
    rows: list[Row] = []
    facts: Row = {}
    for name in config.models:
        asked = px.reasoning.load(flags, name, problems, run.unfinished, check)
        n_probes = len(px.methods.places_of(asked.model, config.mid)) * len(config.positions) * len(config.targets)
        work = f"{asked.name}: {len(problems)} texts of at most {config.new_tokens} tokens, and {n_probes} probes"
        if not run.announce(work, seconds_of(asked, config), n=len(problems)):
            continue
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


def with_more_problems(config: Config) -> Config:
    """The flags with more problems than other studies have by default: probes need many."""
    if config.limit is None and config.source == px.reasoning.TINY:
        return replace(config, limit=N_TINY)
    if config.limit is None and config.source == px.reasoning.PLAIN:
        return replace(config, limit=N_PLAIN, problem_steps=config.problem_steps or (1, 2))
    return config


# -- measurement -------------------------------------------------------------------------------------------------------


def seconds_of(asked: Asked, config: Config) -> float | None:
    """How long the texts, one more forward pass and the probes take at most; None with tiny models, which are quick."""
    if config.tiny:
        return None
    embeddings: Any = asked.model.get_input_embeddings()
    n, d = max(len(asked.questions), 2 * config.folds), embeddings.weight.shape[1]
    fits = px.methods.seconds_to_fit(n, d, len(config.targets), 1 + config.shuffles, config.folds)
    n_fits = 2 * len(px.methods.places_of(asked.model, config.mid)) * len(config.positions)  # the question's mean, too
    return asked.seconds() + px.runs.seconds_a_pass(asked.model, asked.questions.prompts) + n_fits * fits


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
    residuals = px.methods.read_residuals(
        setting.model,
        questions.prompts,
        tokens,
        [range(length) for length in questions.lengths],
        mid=config.mid,
        batch_size=config.batch_size,
        progress=px.is_main_process(),
    )
    every = np.array([px.methods.problem_group(problem, config.group) for problem in questions.problems])
    rows: list[Row] = []
    n_probes = len(residuals.places) * sum(map(len, targets.values()))
    with tqdm(total=n_probes, desc="probes", unit="probe", disable=not px.is_main_process()) as bar:
        for position, of_position in targets.items():
            # Targets of the same problems share fits.
            alike: dict[bytes, list[px.methods.ProbeTarget]] = {}
            for target in of_position:
                alike.setdefault(target.which.tobytes(), []).append(target)
            for some in alike.values():
                found = of_targets(residuals.at[position], residuals.question, some, every[some[0].which], config, bar)
                rows += [
                    {"model": setting.name, "position": position, **row, "place": residuals.places[row["depth"]]}
                    for row in found
                ]
    q = px.stats.q_values(np.array([row["p"] for row in rows]))
    return [{**row, "q": float(value)} for row, value in zip(rows, q, strict=True)], skipped


def target_of(setting: Setting, name: str, has: Sequence[bool], config: Config) -> px.methods.ProbeTarget | str:
    """A target of the problems that have a token; or in words why it is skipped."""
    if name == "correct":
        every = setting.clean.correct.astype(np.float64)
    else:
        every = np.array([px.methods.solution_number(problem, name) for problem in setting.questions.problems])
    options: Any = {"least": config.min_problems, "folds": config.folds, "log": config.log}
    return px.methods.find_target(name, every, has, **options)


# -- statistics --------------------------------------------------------------------------------------------------------


def of_targets(
    own: Float32[np.ndarray, "place prompt d"],
    question: Float32[np.ndarray, "place prompt d"],
    targets: Sequence[px.methods.ProbeTarget],
    named: Shaped[np.ndarray, " problem"],
    config: Config,
    bar: tqdm,
) -> list[Row]:
    """A row a target and place. All places have the same folds, shuffles and resamples."""
    which, groups = targets[0].which, np.unique(named, return_inverse=True)[1]
    folds = px.methods.deal_folds(named.tolist(), config.folds, px.rng(config.seed, "folds"))
    shares = px.stats.cluster_shares(groups, px.rng(config.seed, "resamples"), RESAMPLES)
    trials = []
    for target in targets:
        draws = [px.rng(config.seed, "shuffle", target.name, number) for number in range(config.shuffles)]
        trials.append(np.stack([target.y, *(px.methods.shuffled(target.y, groups, draw) for draw in draws)]))
    found: dict[str, list[Row]] = {target.name: [] for target in targets}
    best = np.full((len(targets), config.shuffles), -np.inf)
    for depth in range(len(own)):
        fits = px.methods.cross_validated(own[depth, which], trials, folds)
        baselines = px.methods.cross_validated(question[depth, which], [some[:1] for some in trials], folds)
        for number, (target, some, fit, baseline) in enumerate(zip(targets, trials, fits, baselines, strict=True)):
            row, random = row_of(target, depth, some, fit, baseline, shares)
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
    target: px.methods.ProbeTarget,
    depth: int,
    trials: Float[np.ndarray, "trial problem column"],
    fit: px.methods.Fit,
    baseline: px.methods.Fit,
    shares: Float[np.ndarray, "resample problem"],
) -> tuple[Row, Float[np.ndarray, " shuffle"]]:
    """One target at one place; and the R^2 of each shuffle."""
    both = np.stack([fit.predicted[0], baseline.predicted[0]])
    (r2, question), resampled = px.stats.r_squared(target.y, both), px.stats.r_squared(target.y, both, shares)
    random = np.array([px.stats.r_squared(y, at) for y, at in zip(trials[1:], fit.predicted[1:], strict=True)])
    fitted = np.array([px.stats.r_squared(y, at) for y, at in zip(trials, fit.in_sample, strict=True)])
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
        "accuracy": target.accuracy(fit.predicted[0]),
        "accuracy_in_sample": target.accuracy(fit.in_sample[0]),
        "accuracy_question": target.accuracy(baseline.predicted[0]),
        "chance": target.chance,
        "alpha": float(np.median(fit.alphas[0])),
    }
    return row, random


def named_interval(name: str, value: float, resampled: Float[np.ndarray, " resample"]) -> dict[str, float]:
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


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
    """One line a model, position and target, of the place where most is known."""
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
        top = max(mine, key=lambda row: row["r2"])
        control = (
            f"labels shuffled, p = {top['p_best']:.2g} (the best place of each of {shuffles}); the question's mean "
            f"{top['question']:.2f}"
        )
        where = f"{top['position']}, {top['place']}, the largest of {len(mine)} x {top['places']},"
        effect = f"{model}: R^2 of {top['target']} at {where}"
        sample = f"{top['problems']} problems"
        more = "a larger --limit, or --problems with more"
        lines.append(px.runs.Evidence(sample, effect, px.stats.interval_in(top, "r2"), control, more))
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
