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

Whether the drop (and the excess) differs between the strata of a split is a permutation test: strata are reassigned to the
problems, their sizes kept. p is (1 + as far apart) / (1 + permutations); q is p with the false discovery rate over the splits of
all models. Of one stratum it is tested likewise whether its drop differs from that of all problems, q being over the strata of
its split. Verdicts: a drop above 10 points is causal and one below 2 redundant, by the mean and by the whole interval. A stratum
of fewer than --min_problems problems is shown with its counts and is in no test and no verdict.

With --decide or --width the heads take problems, in a random order, until their drop over all strata is decided, or its interval
that narrow, as in ablate_heads.py; random sets take the same problems. Strata are of the problems taken, which may be few. All
intervals are such that hold wherever one stops; the tests hold too, as the strata have no part in where that is.

Written to the folder OUT: drop_by_SPLIT.csv (stratum, MODEL_drop), one a split; strata.csv, every number; tests.csv, the tests;
problems/MODEL.csv, one row per problem with its strata and what was right; figures/MODEL.png and figures/MODEL_both.png;
config.yaml (running it again gives the same); and summary.json, what was run, with the edges and the verdicts. The same command
resumes an interrupted run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

import pyvene_ext as px

if TYPE_CHECKING:
    from pyvene_ext.methods.reasoning.strata import ProblemEffects
    from pyvene_ext.prompts.problems import Problem
    from pyvene_ext.runs.ablated import Loaded
    from pyvene_ext.runs.reasoning import Asked, Setting

N_PLAIN = 40  # problems, where no --limit is given
Row = dict[str, Any]


@dataclass(frozen=True)
class Config(px.flags.Regeneration, px.flags.Ranking, px.flags.Ablations, px.flags.Deciding):
    limit: px.flags.Limit = None
    """only the first N problems; by default 400 of the tiny models', 40 of one and two steps of plain, all of others"""
    max_new_tokens: Annotated[int, Ge(2)] | None = None  # the first new token follows from the question alone
    heads: px.flags.EachOnce[px.flags.HeadLabel] = ()
    """which heads to ablate, as layer.head; by default the first of a ranking"""
    n_heads: px.flags.Count | None = None
    """how many heads of the ranking to ablate; by default 1 with tiny models, 4 with others"""
    kind: Literal["zero", "mean", "resample"] = "zero"
    """what replaces the heads' outputs"""
    scope: Literal["reasoning", "new", "both"] = "reasoning"
    """at which tokens: reasoning, new (with the answer), both (with the question)"""
    hub: int | None = None
    """in place of all that: noise at this token of the reasoning (negative: from its end)"""
    site: Literal["embed", "resid", "kv"] = "embed"
    """with --hub: where the noise is put (resid: after the block in the middle)"""
    noise_seeds: px.flags.Count = 5
    """with --hub: draws of the noise"""
    quantiles: Annotated[int, Ge(2)] | None = None
    """parts by confidence; by default 4 with tiny models, 2 with others"""
    min_problems: Annotated[int, Ge(2)] | None = None
    """a stratum with fewer problems has no verdict; by default 20 with tiny models, 10 with others"""

    @property
    def wanted(self) -> int:
        """--n_heads or its default."""
        return self.n_heads or (1 if self.tiny else 4)

    @property
    def n_runs(self) -> int:
        """Runs with an intervention."""
        return 1 + self.n_random if self.hub is None else self.noise_seeds

    @property
    def n_parts(self) -> int:
        """--quantiles or its default."""
        return self.quantiles or (4 if self.tiny else 2)

    @property
    def least(self) -> int:
        """--min_problems or its default."""
        return self.min_problems or (20 if self.tiny else 10)

    def check_flags(self) -> None:
        super().check_flags()
        px.flags.check_rankings(self.rankings, self.models)
        if bool(self.heads) + bool(self.rankings) + (self.hub is not None) > 1:
            raise ValueError("--heads, --rankings and --hub are different interventions; give one of them.")
        self.check_deciding()
        if self.stops and self.hub is not None:
            raise ValueError("--decide and --width stop the ablation of heads, not noise: leave them out with --hub.")


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/stratify_difficulty", config.source, *config.models)
    flags = px.reasoning.of_both_steps(config, N_PLAIN)
    problems = px.reasoning.find_problems(flags)
    px.reasoning.check_number(problems)
    px.reasoning.check_deciding(flags, len(problems))
    what = f"{px.io.counted(config.n_runs, 'run')} with {'heads ablated' if config.hub is None else 'noise'} on "
    what += px.io.counted(len(problems), "problem")
    loader = partial(load, flags, problems, run.unfinished)
    shorter = {"random_sets": config.n_random} if config.hub is None else {"noise_seeds": config.noise_seeds}

    # Each model solves the problems with and without the intervention; its drop in every stratum.
    rows: list[Row] = []
    tests: list[Row] = []
    tables: dict[str, list[Row]] = {}
    facts: Row = {}
    spare = "random_sets" if config.random_sets is None and config.hub is None else None
    for loaded in px.runs.each_model(run, loader, what, seconds_of, len(problems), shorter, spare=spare):
        found = effects(config, loaded)
        del loaded  # two models need not fit in memory together
        strata, edges = px.methods.difficulty_strata(found.first, problems, config.n_parts)
        here = {split: [names[which] for which in found.which] for split, names in strata.items()}
        for split in px.methods.SPLITS:
            some, test = px.methods.split_by(found, split, here[split], config.least, config.seed)
            rows, tests = rows + some, [*tests, test]
        tables[found.name] = px.methods.effect_rows(found, problems, here["both"])
        facts[found.name] = {**found.facts, "intervention": found.what, "edges": edges}
    if config.dry_run or not px.is_main_process():
        return

    # Whether drops differ between strata, over the splits of all models.
    for p, q in (("p", "q"), ("excess_p", "excess_q")):
        for test, value in zip(tests, px.stats.q_values(np.array([test[p] for test in tests])), strict=True):
            test[q] = float(value)
    verdicts = verdicts_of(rows, tests, facts)

    print(summary(rows, facts, verdicts, config))
    shown = [evidence(rows, tests, model, found["intervention"]) for model, found in facts.items()]
    with run.writing({"models": facts, "verdicts": verdicts}, shown, replacing=("*.csv", "*/*.csv", "figures/*")):
        for split in px.methods.SPLITS:
            of_split = [row for row in rows if row["split"] == split]
            of_split.sort(key=lambda row: px.methods.stratum_order(row["stratum"]))
            run.table(f"drop_by_{split}", px.stats.side_by_side(of_split, "stratum", "drop", "drop"))
        run.table("strata", rows)
        run.table("tests", tests)
        for model, table in tables.items():
            run.table(f"problems/{model}", table)
            mine = [row for row in rows if row["model"] == model]
            title = f"{model}: {facts[model]['intervention']}"
            run.figure(model, px.figures.drops_by_stratum(title, mine))
            run.figure(f"{model}_both", px.figures.crossed_strata(title, mine))


# -- interventions -----------------------------------------------------------------------------------------------------


def load(config: Config, problems: Sequence[Problem], unfinished: Path, number: int) -> Asked | Loaded:
    """One model, with the heads that are named or ranked by a file."""
    if config.hub is not None:
        return px.reasoning.load(config, problems, unfinished, None, number)
    heads: Row = {"wanted": config.wanted, "by": config.by, "named": config.heads, "rankings": config.rankings}
    return px.runs.ablated.load(config, problems, unfinished, number, **heads)


def seconds_of(config: Config, loaded: Asked | Loaded, n: int) -> float:
    """How long a model's runs take at most: heads are ablated while all is written, noise is put before the rest of it."""
    if isinstance(loaded, px.runs.ablated.Loaded):
        solver, untouched = loaded.solver, 1 if loaded.heads else 2
        return untouched * solver.seconds(n) + solver.seconds(n, config.n_runs, config.scope)
    return loaded.seconds(n) + loaded.seconds_of_conditions(n, config.n_runs)


def effects(config: Config, loaded: Asked | Loaded) -> ProblemEffects:
    """What the intervention does to each problem."""
    if isinstance(loaded, px.runs.ablated.Loaded):
        return with_heads_ablated(config, loaded)
    assert config.hub is not None
    return with_noise_at(config.hub, config, loaded.reason())


def with_heads_ablated(config: Config, loaded: Loaded) -> ProblemEffects:
    """The model solves all problems without some heads."""
    solver, _, heads, controls = px.runs.ablated.choose(
        loaded, wanted=config.wanted, by=config.by, random_sets=config.n_random
    )
    sets = list({frozenset(some): some for some in controls}.values())
    reference = solver.transcripts(config.kind, [heads, *sets], config.donors)
    if (rule := config.stopping(config.seed)) is None:
        own, *others = solver.ablate([heads, *sets], config.kind, config.scope, reference)
    else:
        (own,) = solver.ablate([heads], config.kind, config.scope, reference, [rule])
        same = px.stats.Stopping(most=len(own), seed=config.seed)
        others = solver.ablate(sets, config.kind, config.scope, reference, [same] * len(sets)) if sets else []
    clean = own.where_taken(solver.clean)
    words = " ".join(map(px.stats.head_label, heads))
    return px.methods.ProblemEffects(
        name=solver.name,
        what=f"{config.kind} ablation of {words} at {px.runs.ablated.SCOPES[config.scope]}",
        first=solver.clean,
        which=np.arange(len(solver.questions)) if own.index is None else np.array(own.index),
        clean=clean.correct,
        after=own.correct.astype(np.float64),
        unparsed=(~own.parsed).astype(np.float64),
        random=np.array([run.correct for run in others]) if sets else None,
        facts=px.metadata(
            solver.model,
            problems=len(solver.questions),
            clean=solver.clean.summary(),
            random_sets=len(sets),
            **({} if own.stopped is None else {"stopped": own.stopped.as_dict()}),
        ),
        stopped=own.stopped is not None,
        thresholds=config.thresholds,
    )


def with_noise_at(hub: int, config: Config, setting: Setting) -> ProblemEffects:
    """The model answers after the reasoning it wrote, with noise at one token of that."""
    questions, which = setting.at(hub)
    if len(which) < 2:
        raise ValueError(f"--hub {hub}: {len(which)} problems of {setting.name} have a token there in their block.")
    seeds = range(config.seed, config.seed + config.noise_seeds)
    by_seed = [px.methods.noise_at("hub", setting.model.config, (config.site,), seed) for seed in seeds]
    (where,) = by_seed[0]
    specs = [of_seed[where] for of_seed in by_seed]
    prompts = setting.questions.prompts
    reference = px.reference_for(setting.model, specs, prompts, batch_size=config.batch_size, progress=False)
    runs = setting.run([(questions, spec) for spec in specs], reference)
    return px.methods.ProblemEffects(
        name=setting.name,
        what=f"noise at token {hub} of the reasoning, {where}",
        first=setting.first,
        which=np.array(setting.questions.index)[which],
        clean=setting.clean.correct[which],
        after=np.mean([run.correct for run in runs], 0),
        unparsed=np.mean([~run.parsed for run in runs], 0),
        random=None,
        facts=px.metadata(setting.model, **setting.facts),
    )


# -- what is written and shown -----------------------------------------------------------------------------------------


def verdicts_of(rows: Sequence[Row], tests: Sequence[Row], facts: Row) -> list[str]:
    """One line per model and split."""
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
                parts.append(
                    f"{what} in {about}: {px.stats.in_points(px.stats.interval_in(row, 'drop'))}: {row['verdict']}"
                )
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


def evidence(rows: Sequence[Row], tests: Sequence[Row], model: str, what: str) -> px.runs.Evidence:
    """The drop in the least confident quarter, beside random heads, and whether strata differ."""
    row = next(row for row in rows if row["model"] == model and row["split"] == "confidence")
    (test,) = (test for test in tests if test["model"] == model and test["split"] == "confidence")
    differ = (
        f"strata by confidence differ with p = {test['p']:.2g}"
        if test["p"] == test["p"]
        else "strata too small to test"
    )
    random = "" if math.isnan(row["random_drop"]) else f"random heads cost {row['random_drop']:.1f}; "
    drop = px.stats.interval_in(row, "drop")
    effect = f"{model}, {what}, costs in stratum {row['stratum']} (points)"
    return px.runs.Evidence(f"{row['problems']} problems", effect, drop, random + differ, "a larger --limit")


def summary(rows: Sequence[Row], facts: Row, verdicts: Sequence[str], config: Config) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        edges = " ".join(f"{edge:.4f}" for edge in found["edges"])
        lines.append(px.reasoning.outcome(model, found.get("first_run", found["clean"])))
        lines += [f"{model}: {found['intervention']}; edges of confidence {edges}"]
        lines += [f"stopped: {px.stats.Stopped.from_dict(found['stopped'])}"] if "stopped" in found else []
        lines.append("")
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
    return "\n".join([*lines, px.reasoning.verdicts_title(*config.thresholds), *verdicts])


def ends(row: Row, low: str, high: str) -> str:
    return "" if math.isnan(row[low]) else f"[{row[low]:.1f}, {row[high]:.1f}]"


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
