"""Are the heads that look critical needed? Accuracy with the first 1, 2, ... n of a ranking ablated while the model reasons.

    python experiments/critical_heads/ablate_heads.py
    python experiments/critical_heads/ablate_heads.py --models tiny-qwen2.5 tiny-llama3.1 --by composite --kind mean
    python experiments/critical_heads/ablate_heads.py --rankings my_heads.csv --n_heads 1 2 5 10 --kind zero mean resample
    python experiments/critical_heads/ablate_heads.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --limit 300 \
        --max_new_tokens 320 --n_heads 1 2 5 10 20

Method. The model solves each problem by itself, greedily, with the outputs z of the first heads of a ranking replaced: by
nothing (zero), by their means (mean), or by another problem's (resample). Scopes: reasoning, each generated token before `####`;
new, those and the answer's; both, the question's tokens too. A token's own z is replaced, so the token after it is the first to
change. The reasoning of a model of continuous thoughts is its latent steps; those after an ablated one are recomputed. Means
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

With --decide 10 2 a set takes problems, in a random order, until the 95% interval of its drop is above 10 points or below 2, the
thresholds of the verdict too, or no outcome of those that are left would bring it there; with --width, until it is that narrow.
Intervals are then such that may be looked at after every problem (Waudby-Smith and Ramdas 2024), and wider than the bootstrap's.
A random set stops once its drop is known to be above or below the upper threshold. As sets differ in their problems, drops are
not averaged or ranked: there is no excess, and no McNemar's p. share_as_large is (1 + random sets above the threshold) / (1 +
sets) if the heads are above it, else 1; one rule judges all sets. Heads are specific if they are above it, no random set is, and
there are 19 or more. problems, of and stopped say what a set took, and why no more; correct/MODEL.npy has NaN for the rest.

Written to the folder OUT: accuracy_KIND_SCOPE.csv (n_heads, MODEL_acc); ablations.csv, every number; random_sets.csv, the drop of
each random set; correct/MODEL.npy, the problems that each of the model's rows of ablations.csv got right, [row problem];
heads/MODEL.csv, the ranking; figures/accuracy_KIND_SCOPE.png; config.yaml (running it again gives the same); and summary.json,
what was run, with the verdicts. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from jaxtyping import Bool, Float
from pydantic import BeforeValidator

import pyvene_ext as px

if TYPE_CHECKING:
    from pyvene_ext.runs.ablated import Loaded, Solver
    from pyvene_ext.stats.controls import Head

Kind = Literal["zero", "mean", "resample"]
Scope = Literal["reasoning", "new", "both"]
Row = dict[str, Any]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


Listed = BeforeValidator(_listed)  # a file of flags may hold one value in place of a list


@dataclass(frozen=True)
class Config(px.flags.Problems, px.flags.Ranking, px.flags.Ablations, px.flags.Deciding):
    max_new_tokens: Annotated[int, Ge(2)] | None = None  # the first new token follows from the question alone
    n_heads: Annotated[tuple[px.flags.Count, ...], px.io.Ascending(), Listed] = ()
    """how many heads of the ranking to ablate, one number after the other; by default 1 2 3 4 with tiny models, 4 with others"""
    kind: Annotated[px.flags.OneOrMore[Kind], Listed] = ("zero",)
    """what replaces the heads' outputs"""
    scope: Annotated[px.flags.EachOnce[Scope], Listed] = ()
    """at which tokens: reasoning, new (with the answer), both (with the question); by default all three with tiny models, and
    reasoning with others"""

    @property
    def levels(self) -> tuple[int, ...]:
        """--n_heads or its default."""
        return self.n_heads or ((1, 2, 3, 4) if self.tiny else (4,))

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """--scope or its default."""
        return self.scope or (("reasoning", "new", "both") if self.tiny else ("reasoning",))

    @property
    def n_sets(self) -> int:
        """Of heads that are ablated, random ones included."""
        return len(self.kind) * len(self.scopes) * len(self.levels) * (1 + self.n_random)

    def check_flags(self) -> None:
        super().check_flags()
        px.flags.check_rankings(self.rankings, self.models)
        self.check_deciding()

    @property
    def control_rule(self) -> px.stats.Stopping | None:
        """With --decide or --width: a random set stops once it is known on which side of the upper threshold its drop is."""
        above, _ = self.thresholds
        return px.stats.Stopping((above, above), seed=self.seed) if self.stops else None


class Found(NamedTuple):
    """The outcome with one model: one row per kind, scope and number of heads; one per random set; what each row got right.

    Where sets stop, what is right is NaN for the problems that a set did not take.
    """

    rows: list[Row]
    randoms: list[Row]
    correct: list[Bool[np.ndarray, " problem"] | Float[np.ndarray, " problem"]]


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/ablate_heads", config.source, *config.models)
    problems = px.reasoning.find_problems(config)
    px.reasoning.check_number(problems)
    px.reasoning.check_deciding(config, len(problems))
    texts = f"{px.io.counted(len(problems), 'text')} of at most {config.new_tokens} tokens"
    work = f"{texts}, untouched and with each of {px.io.counted(config.n_sets, 'set')} of heads ablated"
    heads: Row = {"wanted": config.levels[-1], "by": config.by}
    load = partial(px.runs.ablated.load, config, problems, run.unfinished, rankings=config.rankings, **heads)
    seconds = None if config.tiny else seconds_of

    # Each model solves the problems with the first heads of its ranking ablated, and with random heads of the same layers.
    rows: list[Row] = []
    randoms: list[Row] = []
    facts: Row = {}
    rankings: dict[str, list[Row]] = {}
    correct: dict[str, np.ndarray] = {}  # row problem
    # Where even a few problems take too long with all random sets, fewer sets are left.
    spare = "random_sets" if config.random_sets is None else None
    for loaded in px.runs.each_model(run, load, work, seconds, len(problems), shorter(config), spare=spare):
        solver, scores, first, controls = px.runs.ablated.choose(loaded, random_sets=config.n_random, **heads)
        found = ablate(config, solver, first, controls)
        rows, randoms = rows + found.rows, randoms + found.randoms
        correct[solver.name] = np.array(found.correct)
        rankings[solver.name] = [dict(zip(("scores", "layer", "head"), row, strict=True)) for row in scores]
        facts[solver.name] = px.metadata(
            solver.model, clean=solver.clean.summary(), heads=[list(head) for head in first], seed=config.seed
        )
        del loaded, solver  # two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    # Whether the largest set is needed, and more than random heads are.
    verdicts = verdicts_of(rows, config)

    print(table(rows, facts, config))
    print("\n".join([f"\n{px.reasoning.verdicts_title(*config.thresholds)}", *verdicts]))
    with run.writing({"models": facts, "verdicts": verdicts}, evidence(rows, config), replacing=("*.csv",)):
        for kind in config.kind:
            for scope in config.scopes:
                some = [row for row in rows if (row["kind"], row["scope"]) == (kind, scope)]
                accuracies = px.stats.side_by_side(some, "n_heads", "acc", "accuracy")
                run.table(f"accuracy_{kind}_{scope}", accuracies)
                title = f"{kind} ablation of z at {px.runs.ablated.SCOPES[scope]}"
                run.figure(f"accuracy_{kind}_{scope}", px.figures.ablation_curves(some, title))
        run.table("ablations", rows)
        if randoms:
            run.table("random_sets", randoms)
        for model, ranking in rankings.items():
            run.table(f"heads/{model}", ranking)
            run.array(f"correct/{model}", correct[model])


# -- measurement -------------------------------------------------------------------------------------------------------


def seconds_of(config: Config, loaded: Loaded, n: int) -> float:
    """How long all sets take at most, once untouched, and where the heads are ranked here about as long again."""
    solver, of_scope = loaded.solver, config.n_sets // len(config.scopes)
    untouched = (1 if loaded.heads else 2) * solver.seconds(n)
    return untouched + sum(solver.seconds(n, of_scope, scope) for scope in config.scopes)


def shorter(config: Config) -> Row:
    """The flags that make a run shorter."""
    return {
        "random_sets": config.n_random,
        "n_heads": config.levels,
        "scope": config.scopes,
        "kind": config.kind,
    }


def ablate(config: Config, solver: Solver, ranked: tuple[Head, ...], controls: list[tuple[Head, ...]]) -> Found:
    """Every kind, scope and number of heads, with the random sets."""
    controls_of = {n: px.stats.first_of(controls, ranked, n) for n in config.levels}
    sets = [heads for n in config.levels for heads in (ranked[:n], *controls_of[n].sets)]
    own_rule, rule = config.stopping(config.seed), config.control_rule
    rules = [one for n in config.levels for one in (own_rule, *[rule] * len(controls_of[n].sets)) if one is not None]
    seed, clean = config.seed, solver.clean
    found = Found([], [], [])
    for kind in config.kind:
        reference = solver.transcripts(kind, [ranked, *controls], config.donors)
        for scope in config.scopes:
            about: Row = {"model": solver.name, "kind": kind, "scope": scope}
            none = px.methods.drop_row(clean, clean, [], seed, rule)
            found.rows.append({**about, "n_heads": 0, **none, "control": ""})
            found.correct.append(clean.correct)
            solved = iter(solver.ablate(sets, kind, scope, reference, rules or None))
            for n in config.levels:
                own, *others = islice(solved, 1 + len(controls_of[n].sets))
                strength = controls_of[n].strength if others else ""
                about["n_heads"] = n
                found.rows.append({**about, **px.methods.drop_row(clean, own, others, seed, rule), "control": strength})
                found.correct.append(own.correct if rule is None else own.spread(own.correct, len(clean)))
                for heads, other in zip(controls_of[n].sets, others, strict=True):
                    named = " ".join(map(px.stats.head_label, heads))
                    found.randoms.append({**about, "heads": named, **px.methods.random_set_row(clean, other)})
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdicts_of(rows: Sequence[Row], config: Config) -> list[str]:
    """One line per model, kind and scope, of the largest set."""
    lines = []
    ranking = "given" if config.rankings else config.by
    for row in rows:
        if row["n_heads"] != config.levels[-1]:
            continue
        drop = px.stats.interval_in(row, "drop")
        scope, tokens = row["scope"], px.runs.ablated.SCOPES[row["scope"]]
        at = scope if scope == tokens else f"{scope} ({tokens})"
        sure = f"after {sample(row, config)}" if config.stops else f"(p = {row['mcnemar_p']:.2g})"
        unparsed = row["unparsed"] / row["problems"]
        broken = unparsed > px.stats.BROKEN  # which heads break it says nothing of reasoning
        line = (
            f"{row['model']}, {row['kind']}, {at}: the first {row['n_heads']} heads "
            f"({ranking}) cost {px.stats.in_points(drop)} {sure}: {px.stats.verdict(drop, *config.thresholds, unparsed=unparsed)}"
        )
        if row["random_sets"] and config.stops:
            specific = "not told apart from random heads"
            if drop.low > config.thresholds[0] and not row["random_above"]:
                few = row["share_as_large"] > 0.05
                specific = "unlike all random sets, too few to call it specific" if few else "specific to these heads"
            line += f"{'' if broken else f', {specific}'}: {random_above(row, config)}"
        elif row["random_sets"]:
            as_much = round(row["share_as_large"] * (1 + row["random_sets"])) - 1
            specific = "not specific to these heads"
            if row["excess_low"] > 0 and not as_much:
                few = row["share_as_large"] > 0.05
                specific = (
                    "more than all random sets, too few to call it specific" if few else "specific to these heads"
                )
            line += (
                f"{'' if broken else f', {specific}'}: {row['control'].partition(';')[0]} cost {row['random_drop']:.1f} "
                f"[{row['random_lowest']:.1f} to {row['random_highest']:.1f}], {as_much} of them as much; excess "
                f"{row['excess']:.1f} [{row['excess_low']:.1f}, {row['excess_high']:.1f}]"
            )
        if row["unparsed"]:
            line += f"; {row['unparsed']} of {row['problems']} answers unparsed"
        lines.append(line)
    return lines


def sample(row: Row, config: Config) -> str:
    """How many problems a row is of, where sets stop of how many."""
    return f"{row['problems']} of {row['of']} problems" if config.stops else f"{row['problems']} problems"


def random_above(row: Row, config: Config) -> str:
    """How many random sets are above the upper threshold, where all stop on one side of it."""
    sets = row["control"].partition(";")[0]
    above = f"{row['random_above']} of {sets} cost more than {config.thresholds[0]:g} points"
    return f"{above}, p = {row['share_as_large']:.2g}"


def evidence(rows: Sequence[Row], config: Config) -> list[px.runs.Evidence]:
    """One line per model, of the largest set in the first kind and scope."""
    lines = []
    for row in rows:
        if (row["n_heads"], row["kind"], row["scope"]) != (config.levels[-1], config.kind[0], config.scopes[0]):
            continue
        control = "none"
        if row["random_sets"] and config.stops:
            control = random_above(row, config)
        elif row["random_sets"]:
            spread = f"{row['random_drop']:.3g} [{row['random_lowest']:.3g} to {row['random_highest']:.3g}]"
            control = f"{row['control'].partition(';')[0]} cost {spread}, p = {row['share_as_large']:.2g}"
        effect = f"{row['model']}: accuracy lost in points with {row['n_heads']} heads ablated ({row['kind']}, {row['scope']})"
        drop = px.stats.interval_in(row, "drop")
        decided = row.get("stopped", "undecided") != "undecided"
        sharpen = "leaving out --decide and --width" if decided else "a larger --limit"
        lines.append(px.runs.Evidence(sample(row, config), effect, drop, control, sharpen))
    return lines


def table(rows: Sequence[Row], facts: Row, config: Config) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        heads = " ".join(map(px.stats.head_label, found["heads"]))
        lines.append(f"{px.reasoning.outcome(model, found['clean'])}; heads {heads}")
        last, beside = ("problems", "above, problems") if config.stops else ("McNemar p", "drop [range]")
        lines.append(
            f"{'kind':>9} {'scope':>10} heads accuracy    drop   95% interval {last:>10} unparsed  cut  random sets: {beside}"
        )
        mine = [row for row in rows if row["model"] == model]
        for row in mine:
            sure = row["problems"] if config.stops else f"{row['mcnemar_p']:.2g}"
            line = (
                f"{row['kind']:>9} {row['scope']:>10} {row['n_heads']:5d} {row['accuracy']:7.1f}% {row['drop']:7.1f} "
                f"{'[{:.1f}, {:.1f}]'.format(row['drop_low'], row['drop_high']):>14} {sure:>10} "
                f"{row['unparsed']:8d} {row['cut']:4d}"
            )
            if row["random_sets"] and config.stops:
                line += f"   {row['random_sets']:2d}: {row['random_above']}, {row['random_problems']}"
            elif row["random_sets"]:
                line += f"   {row['random_sets']:2d}: {row['random_drop']:.1f} "
                line += f"[{row['random_lowest']:.1f}, {row['random_highest']:.1f}]"
            lines.append(line)
        if config.stops:
            sets = [row for row in mine if row["n_heads"]]
            taken = sum(row["problems"] + row["random_problems"] for row in sets)
            lines.append(f"{taken} of {sum(row['of'] * (1 + row['random_sets']) for row in sets)} texts were needed")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
