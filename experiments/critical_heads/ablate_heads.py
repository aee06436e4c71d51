"""Are the heads that look critical needed? Accuracy with the first 1, 2, ... n of a ranking ablated while the model reasons.

    python experiments/critical_heads/ablate_heads.py
    python experiments/critical_heads/ablate_heads.py --models tiny-qwen2.5 tiny-llama3.1 --by composite --kind mean
    python experiments/critical_heads/ablate_heads.py --rankings my_heads.csv --n_heads 1 2 5 10 --kind zero mean resample
    python experiments/critical_heads/ablate_heads.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --limit 300 \
        --max_new_tokens 320 --n_heads 1 2 5 10 20

Method. The model solves each problem by itself, greedily, with the outputs z of the first heads of a ranking replaced: by
nothing (zero), by their means (mean), or by another problem's (resample). Scopes: reasoning, each generated token before `####`;
new, those and the answer's; both, the question's tokens too. A token's own z is replaced, so the token after it is the first to
change. The reasoning of a model of continuous thoughts is its latent steps; those behind an ablated one are thought anew. Means
and other problems' activations are of the untouched model on the first --donors problems, with what it wrote for them; resampling
takes the token at the same distance from the question's end, of a problem that is not the same.

The ranking is one of rank_heads.py, computed here where no file is given. Larger sets hold the smaller ones. The control is
many random sets (ours): of the same layers, head for head, and none of the ranked heads; draws that are the same set count once.

A drop is the loss of accuracy against the untouched run on the same problems, in points, with its paired bootstrap 95% interval,
in percent of the untouched accuracy, and McNemar's exact p. excess is the drop beyond the mean of the random sets;
share_as_large is (1 + sets that cost as much) / (1 + sets). Answers that cannot be parsed are no correct ones, and are counted
apart; so are texts that do not end. Verdict, for the largest set: a drop above 10 points is causal and one below 2 redundant, by
its mean and by its whole interval. It is specific to the heads if the whole interval of the excess is above 0, no random set
costs as much, and there are 19 sets or more (share_as_large 0.05).

Written to the folder OUT: accuracy_KIND_SCOPE.csv (n_heads, MODEL_acc); ablations.csv, every number; random_sets.csv, the drop of
each random set; correct/MODEL.npy, the problems that each of the model's rows of ablations.csv got right, [row problem];
heads/MODEL.csv, the ranking; figures/accuracy_KIND_SCOPE.png; config.yaml (running it again gives the same); and summary.json,
what was run, with the verdicts. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import matplotlib
import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import BeforeValidator
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_heads, n_layers
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.files import write_csv, write_npy
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lag import random_rankings, rank_heads
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.block_scores import Score, block_scores, check_model
from pyvene_ext.methods.reasoning.evaluate import (
    Evaluation,
    Results,
    Transcripts,
    condition_of,
    evaluate,
    facts_of,
)
from pyvene_ext.methods.reasoning.evaluate import Scope as ScopeOfSpec
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.problems import Problem, Questions, with_reasoning
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.ablation import heads_together
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head, mcnemar_p, verdict
from pyvene_ext.stats.intervals import Interval

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Kind = Literal["zero", "mean", "resample"]
Scope = Literal["reasoning", "new", "both"]
Row = dict[str, Any]
SCOPES: dict[Scope, str] = {"reasoning": "reasoning", "new": "reasoning and answer", "both": "all tokens"}
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.PINK, figures.AMBER, figures.SKY)


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


@dataclass(frozen=True)
class Config(common.Flags):
    n_heads: Annotated[tuple[int, ...], BeforeValidator(_listed)] = (1, 2, 3, 4)
    """how many heads of the ranking to ablate, one number after the other"""
    by: Score = "flow"
    """which score ranks the heads, where no --rankings are given"""
    rankings: tuple[str, ...] = ()
    """for each model a CSV scores,layer,head, such as rank_heads.py writes"""
    kind: Annotated[tuple[Kind, ...], BeforeValidator(_listed)] = ("zero",)
    """what comes in place of the heads' outputs"""
    scope: Annotated[tuple[Scope, ...], BeforeValidator(_listed)] = get_args(Scope)
    """at which tokens: reasoning, new (with the answer), both (with the question)"""
    random_sets: int = 20
    """random sets for each set of ranked heads; 0 for none"""
    donors: int = 64
    """problems that means and other problems' activations are of"""


@dataclass(frozen=True)
class Model:
    """One model and its problems."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    results: Results
    config: Config

    @cached_property
    def clean(self) -> Evaluation:
        """The solutions of the untouched model."""
        return self.run(None)

    def places(self, scope: Scope) -> tuple[Positions, ScopeOfSpec]:
        """A scope as positions of the prompt, and as what `evaluate` is told."""
        form = format_of(self.model)
        if form is None or scope == "both":
            return "all", scope
        return tuple(f"latent_{step}" for step in range(form.steps)), "prompt" if scope == "reasoning" else "both"

    def run(self, spec: Spec | None, scope: ScopeOfSpec = "both", reference: Transcripts | None = None) -> Evaluation:
        """The solutions with a spec in place; kept between runs."""
        return self.results.get(
            condition_of(spec, scope, reference),
            lambda: evaluate(
                self.model,
                self.tokenizer,
                self.questions,
                spec,
                scope,
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                reference=reference,
            ),
        )


class Found(NamedTuple):
    """What is found with one model: a row a kind, scope and number of heads; a row a random set; what each row got right."""

    rows: list[Row]
    randoms: list[Row]
    correct: list[Bool[np.ndarray, " problem"]]

    def add(self, row: Row, solutions: Evaluation) -> None:
        self.rows.append(row)
        self.correct.append(solutions.correct)


def main(config: Config) -> None:
    # What is run.
    check_flags(config)
    folder = common.folder_of(config, "ablate_heads")
    problems = common.find_problems(config)
    if len(problems) < 2:
        raise ValueError("there is one problem, and an interval needs two; give more.")

    # One model after the other.
    rows: list[Row] = []
    randoms: list[Row] = []
    facts: Row = {}
    rankings: Row = {}
    correct: dict[str, Bool[np.ndarray, "row problem"]] = {}
    for number, name in enumerate(config.models):
        path = config.rankings[number] if config.rankings else None
        study, ranked, matrix, controls = prepare(config, name, path, problems, folder)
        found = ablated(study, ranked, controls)
        rows, randoms = rows + found.rows, randoms + found.randoms
        correct[study.name], rankings[study.name] = np.array(found.correct), matrix
        heads = [list(head) for head in ranked]
        facts[study.name] = metadata(study.model, clean=study.clean.summary(), heads=heads, seed=config.seed)

    if not is_main_process():
        return

    # The files.
    verdicts = verdicts_of(rows, config)
    with common.written(folder, config, {"models": facts, "verdicts": verdicts}):
        for kind in config.kind:
            for scope in config.scope:
                some = [row for row in rows if (row["kind"], row["scope"]) == (kind, scope)]
                write_csv(
                    folder / f"accuracy_{kind}_{scope}.csv", common.side_by_side(some, "n_heads", "acc", "accuracy")
                )
                figures.save(draw(some, kind, scope), folder / f"figures/accuracy_{kind}_{scope}.png")
        write_csv(folder / "ablations.csv", rows)
        if randoms:
            write_csv(folder / "random_sets.csv", randoms)
        for model, matrix in rankings.items():
            write_csv(folder / f"heads/{model}.csv", matrix)
            write_npy(folder / f"correct/{model}.npy", correct[model])

    print(table(rows, facts))
    print("\n".join(["\nverdicts (drop above 10 points: causal, below 2: redundant)", *verdicts]))
    print(f"\nwritten:\n  {folder}/ (tables, figures, heads, config, summary)")


# -- what is asked for -------------------------------------------------------------------------------------------------


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    common.check_flags(config)
    levels = list(config.n_heads)
    if not levels or levels[0] < 1 or levels != sorted(set(levels)):
        raise ValueError(f"--n_heads takes ascending numbers of heads from 1 on, not {' '.join(map(str, levels))}.")
    for flag, least in (("random_sets", 0), ("donors", 2)):
        if (value := getattr(config, flag)) < least:
            raise ValueError(f"--{flag} must be {least} or more, not {value}.")
    for flag in ("kind", "scope"):
        chosen = getattr(config, flag)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"--{flag} names one or more, each once.")
    common.check_rankings(config.rankings, config)
    if config.max_new_tokens < 2:
        raise ValueError("--max_new_tokens must be 2 or more: the first new token follows from the question alone.")


def prepare(
    config: Config, name: str, path: str | None, problems: Sequence[Problem], folder: Path
) -> tuple[Model, tuple[Head, ...], list[Row], list[tuple[Head, ...]]]:
    """One model with its problems solved, its ranked heads, the ranking as a table, and the random rankings that match."""
    model, tokenizer = load_model(name, dtype=config.dtype, device=choose_device(config.device))
    sizes, most = (n_layers(model.config), n_heads(model.config)), config.n_heads[-1]
    if most > sizes[0] * sizes[1]:
        raise ValueError(f"--n_heads asks for {most} heads and {name} has {sizes[0] * sizes[1]}; ask for fewer.")
    scores = None if path is None else read_head_scores(path, model.config)
    if scores is None:
        check_model(model)
    else:
        rank_heads(scores, "full", sizes[0], most)
    questions = common.ask(config, model, tokenizer, problems, config.max_new_tokens)
    results = Results(folder / "unfinished", facts_of(model, questions, config.max_new_tokens))
    study = Model(Path(name).name, model, tokenizer, questions, results, config)
    print(f"{study.name}: {len(questions)} problems", file=sys.stderr)
    if scores is None:
        reasoned = questions if format_of(model) else with_reasoning(questions, study.clean.ids, tokenizer)
        found = block_scores(model, reasoned, batch_size=config.batch_size)
        matrix = found.of(config.by)
        scores = sorted(((float(x), *at) for at, x in np.ndenumerate(matrix)), key=lambda row: (-row[0], row[1:]))
    ranked = rank_heads(scores, "full", sizes[0], most)
    controls = random_sets(config, ranked, model)
    table = [dict(zip(("scores", "layer", "head"), row, strict=True)) for row in scores]
    return study, ranked, table, controls


def random_sets(config: Config, ranked: tuple[Head, ...], model: PreTrainedModel) -> list[tuple[Head, ...]]:
    """Random rankings of other heads, layer by layer those of the ranked ones; none if none are asked for."""
    if not config.random_sets:
        return []
    sizes, draw = (n_layers(model.config), n_heads(model.config)), rng(config.seed, "random heads")
    try:
        return random_rankings(ranked, len(ranked), *sizes, config.random_sets, draw)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}, or take --random_sets 0 for no control.") from None


# -- what is found -----------------------------------------------------------------------------------------------------


def ablated(study: Model, ranked: tuple[Head, ...], controls: list[tuple[Head, ...]]) -> Found:
    """Every kind, scope and number of heads, with the random sets."""
    config = study.config
    # Of draws that begin with the same heads one counts: small layers have few sets.
    sets = {n: list({frozenset(ranking[:n]): ranking[:n] for ranking in controls}.values()) for n in config.n_heads}
    n_runs = len(config.kind) * len(config.scope) * sum(1 + len(random) for random in sets.values())
    found = Found([], [], [])
    with tqdm(total=n_runs, desc=study.name, unit="set") as bar:
        for kind in config.kind:
            reference = transcripts(study, kind, [ranked, *controls])
            for scope in config.scope:
                at = study.places(scope)

                def run(
                    heads: tuple[Head, ...], kind: Kind = kind, at: tuple = at, given: Any = reference
                ) -> Evaluation:
                    bar.update()
                    return study.run(heads_together(heads, kind, positions=at[0], seed=config.seed), at[1], given)

                found.add(row_of(study, kind, scope, 0, study.clean, []), study.clean)
                for n in config.n_heads:
                    own, others = run(ranked[:n]), [run(heads) for heads in sets[n]]
                    found.add(row_of(study, kind, scope, n, own, others), own)
                    for heads, other in zip(sets[n], others, strict=True):
                        named = " ".join(f"{layer}.{head}" for layer, head in heads)
                        drop = 100 * (study.clean.accuracy - other.accuracy)
                        about = {"model": study.name, "kind": kind, "scope": scope, "n_heads": n, "heads": named}
                        found.randoms.append({**about, "drop": drop, "unparsed": int((~other.parsed).sum())})
    return found


def transcripts(study: Model, kind: Kind, rankings: Iterable[tuple[Head, ...]]) -> Transcripts | None:
    """What ablations of these heads put in their place."""
    few = range(min(study.config.donors, len(study.questions)))
    clean = study.clean.take(few)
    specs = [heads_together(ranking, kind, seed=study.config.seed) for ranking in rankings]
    return Transcripts.compute(study.model, study.questions.take(few), clean, specs, batch_size=study.config.batch_size)


def row_of(study: Model, kind: Kind, scope: Scope, n: int, own: Evaluation, others: Sequence[Evaluation]) -> Row:
    """One number of heads."""
    seed, clean = study.config.seed, study.clean.correct
    accuracy = common.accuracy(own.correct)
    drop = common.drop_of(clean, own.correct, seed, "drop") if n else Interval(0.0, 0.0, 0.0)
    row: Row = {
        "model": study.name,
        "kind": kind,
        "scope": scope,
        "n_heads": n,
        "problems": len(own),
        "accuracy": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "drop": drop.mean,
        "drop_low": drop.low,
        "drop_high": drop.high,
        "relative_drop": drop.mean / clean.mean() if clean.any() else np.nan,
        "lost": int((clean & ~own.correct).sum()),
        "won": int((~clean & own.correct).sum()),
        "mcnemar_p": mcnemar_p(clean, own.correct),
        "unparsed": int((~own.parsed).sum()),
        "cut": int((~own.ended).sum()),
        "random_sets": len(others),
    }
    names = ("random_drop", "random_lowest", "random_highest", "excess", "excess_low", "excess_high", "share_as_large")
    row |= dict.fromkeys(names, np.nan)
    if others:
        random = np.mean([other.correct for other in others], 0)
        drops = np.array([100 * (clean.mean() - other.correct.mean()) for other in others])
        excess = common.drop_of(random, own.correct, seed, "excess")
        share = (1 + int((drops >= drop.mean - 1e-9).sum())) / (1 + len(drops))
        row |= dict(zip(names, (drops.mean(), drops.min(), drops.max(), *excess, share), strict=True))
    return {name: float(value) if isinstance(value, float) else value for name, value in row.items()}


def verdicts_of(rows: Sequence[Row], config: Config) -> list[str]:
    """One line a model, kind and scope, of the largest set."""
    lines = []
    ranking = "given" if config.rankings else config.by
    for row in rows:
        if row["n_heads"] != config.n_heads[-1]:
            continue
        drop = Interval(row["drop"], row["drop_low"], row["drop_high"])
        line = (
            f"{row['model']}, {row['kind']}, {SCOPES[row['scope']]}: the first {row['n_heads']} heads ({ranking}) cost "
            f"{common.in_words(drop)} (p = {row['mcnemar_p']:.2g}): {verdict(drop)}"
        )
        if row["random_sets"]:
            as_much = round(row["share_as_large"] * (1 + row["random_sets"])) - 1
            specific = "not specific to these heads"
            if row["excess_low"] > 0 and not as_much:
                few = row["share_as_large"] > 0.05
                specific = (
                    "more than all random sets, too few to call it specific" if few else "specific to these heads"
                )
            line += (
                f", {specific}: {row['random_sets']} random sets of the same layers cost {row['random_drop']:.1f} "
                f"[{row['random_lowest']:.1f} to {row['random_highest']:.1f}], {as_much} of them as much; excess "
                f"{row['excess']:.1f} [{row['excess_low']:.1f}, {row['excess_high']:.1f}]"
            )
        if row["unparsed"]:
            line += f"; {row['unparsed']} of {row['problems']} answers unparsed"
        lines.append(line)
    return lines


def table(rows: Sequence[Row], facts: Row) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        clean = found["clean"]
        heads = " ".join(f"{layer}.{head}" for layer, head in found["heads"])
        lines.append(
            f"{model}: {clean['problems']} problems, {100 * clean['accuracy']:.1f}% correct untouched ({clean['unparsed']} "
            f"unparsed, {clean['cut']} cut); heads {heads}"
        )
        lines.append(
            f"{'kind':>9} {'scope':>10} heads accuracy    drop   95% interval  McNemar p unparsed  cut  random sets: drop [range]"
        )
        for row in rows:
            if row["model"] != model:
                continue
            line = (
                f"{row['kind']:>9} {row['scope']:>10} {row['n_heads']:5d} {row['accuracy']:7.1f}% {row['drop']:7.1f} "
                f"{'[{:.1f}, {:.1f}]'.format(row['drop_low'], row['drop_high']):>14} {row['mcnemar_p']:10.2g} "
                f"{row['unparsed']:8d} {row['cut']:4d}"
            )
            if row["random_sets"]:
                line += f"   {row['random_sets']:2d}: {row['random_drop']:.1f} "
                line += f"[{row['random_lowest']:.1f}, {row['random_highest']:.1f}]"
            lines.append(line)
    return "\n".join(lines)


@matplotlib.rc_context(figures.STYLE)
def draw(rows: Sequence[Row], kind: Kind, scope: Scope) -> Figure:
    """Accuracy by the number of heads, a line a model, with its interval and the range of the random sets."""
    figure = Figure(figsize=(5.6, 3.7))
    axes = figure.add_subplot()
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        some = [row for row in rows if row["model"] == model]
        colour = COLOURS[number % len(COLOURS)]
        n, accuracy, low, high = (
            np.array([row[key] for row in some]) for key in ("n_heads", "accuracy", "low", "high")
        )
        axes.errorbar(
            n,
            accuracy,
            (accuracy - low, high - accuracy),
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=model,
        )
        clean, random = accuracy[0], [row for row in some if row["random_sets"]]
        if random:
            x = [0, *(row["n_heads"] for row in random)]
            mean, worst, best = (
                [clean, *(clean - row[key] for row in random)]
                for key in ("random_drop", "random_highest", "random_lowest")
            )
            axes.fill_between(x, worst, best, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, ":", color=colour, linewidth=1.4, label=f"{model}: random sets, mean and range")
    axes.set_title(f"{kind} ablation of z at {SCOPES[scope]}")
    axes.set(xlabel="heads ablated", ylabel="accuracy (%, 95% interval)", ylim=(-3, 103))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
