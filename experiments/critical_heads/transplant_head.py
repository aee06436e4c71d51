"""Can another model's heads do the work of heads that look critical? Heads transplanted from a donor into a host.

    python experiments/critical_heads/transplant_head.py
    python experiments/critical_heads/transplant_head.py --models tiny-llama3.1 --donor tiny-gemma2 --method procrustes
    python experiments/critical_heads/transplant_head.py --heads 0.0 0.4 --donor_heads 0.1 0.7
    python experiments/critical_heads/transplant_head.py --models tiny-qwen2.5 --donor tiny-qwen2.5 --heads 0.7 --donor_heads 0.4
    python experiments/critical_heads/transplant_head.py --models Qwen/Qwen2.5-1.5B-Instruct --donor Qwen/Qwen2.5-0.5B-Instruct \
        --problems gsm8k --limit 300 --max_new_tokens 320 --rankings host.csv --donor_ranking donor.csv

Method. The host solves the problems untouched. Then the first n heads of a ranking work no more, and in the place of each stands
the donor's head of the same rank. With --regenerate answer, the reasoning that the host wrote is given again and the answer after
`####` is generated; with --regenerate reasoning, the default of real models, the host writes reasoning and answer with these
heads, so that nothing can be copied from reasoning that was written untouched. A transplanted head is given x A, where x is the
host's residual stream before the block; its queries, its own keys and values, its rotary embedding, scale and window are the
donor's; what it would add to the donor's stream goes through B into the host's (`transplant` has the details). A and B are fitted
on paired residual streams of --fit_problems problems, which are then skipped by everything else: ridge regression, or a
Procrustes rotation with a scale. R2 is of problems kept out of the fit, at contexts that no fitted problem has. The donor must
cut texts into the same tokens.

Conditions: zero, nothing replaces the heads; self, their own heads are transplanted with identity maps, which must change
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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from tqdm import tqdm

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyvene_ext.runs.reasoning import Setting
    from pyvene_ext.runs.transplants import Host

Row = dict[str, Any]
Heads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Config(px.flags.Regeneration, px.flags.Ranking):
    donor: px.flags.ModelName = "tiny-llama3.1"
    """the model whose heads are transplanted; named as --models are, which are the hosts"""
    heads: px.flags.EachOnce[px.flags.Head] = ()
    """heads of the host, as layer.head, the first one first; by default those of the ranking"""
    donor_heads: tuple[px.flags.Head, ...] = ()
    """heads of the donor, each for the place of the head at its place in --heads or in the ranking"""
    donor_ranking: str | None = None
    """as --rankings, for the donor"""
    n_heads: Annotated[tuple[px.flags.Count, ...], px.io.Ascending()] = ()
    """how many heads to replace, one number after the other; by default 1 2 4 6, or all that are named"""
    method: Literal["ridge", "procrustes"] = "ridge"
    """how the maps are fitted"""
    alpha: Annotated[float, Gt(0)] | None = None
    """the penalty of ridge; by default a small one, for which there must be more tokens than dimensions"""
    fit_problems: Annotated[int, Ge(2)] | None = None
    """problems with reasoning that maps are fitted and tested on; the others are solved; by default half, at most 100"""
    test_share: Annotated[float, Gt(0), Lt(1)] = 0.25
    """how many of these are for the test"""
    random_sets: Annotated[int, Ge(0)] = 20
    """sets of random heads of the donor; 0 for none"""

    def check_flags(self) -> None:
        super().check_flags()
        px.flags.check_rankings(self.rankings, self.models)
        if self.heads and self.rankings:
            raise ValueError("--heads and --rankings were both given; give one of them.")
        if self.donor_heads and self.donor_ranking:
            raise ValueError("--donor_heads and --donor_ranking were both given; give one of them.")
        if self.heads and self.donor_heads and len(self.heads) != len(self.donor_heads):
            raise ValueError(
                f"--heads names {len(self.heads)} heads and --donor_heads {len(self.donor_heads)}; give each place its head."
            )
        for flag in ("heads", "donor_heads"):
            if 0 < (named := len(getattr(self, flag))) < self.levels[-1]:
                raise ValueError(f"--n_heads asks for {self.levels[-1]} heads and --{flag} names {named}.")

    @property
    def levels(self) -> tuple[int, ...]:
        """How many heads are replaced, one number after the other."""
        chosen = self.heads or self.donor_heads
        return self.n_heads or ((len(chosen),) if chosen else (1, 2, 4, 6))

    @property
    def for_maps(self) -> int:
        """How many problems the maps are fitted on, which `main` chooses where the flag is not given."""
        return self.fit_problems or 0

    def host_heads(self, number: int, model: PreTrainedModel) -> Heads:
        """As many heads of a host as are replaced at most; none where they are still to be ranked."""
        name = Path(self.models[number]).name
        return px.reasoning.given_heads(model, name, self.levels[-1], self.heads, self.ranking_of(number))

    def given_donor_heads(self, donor: PreTrainedModel) -> Heads:
        """The same for the donor."""
        name, wanted = Path(self.donor).name, self.levels[-1]
        return px.reasoning.given_heads(donor, name, wanted, self.donor_heads, self.donor_ranking, "donor_heads")


def main(config: Config) -> None:
    study = f"critical_heads/transplant_head/{Path(config.donor).name}"
    run = px.RunFolder(config, study, config.source, *config.models)
    problems = px.reasoning.find_problems(config)
    config = run.config = replace(config, fit_problems=config.fit_problems or min(100, len(problems) // 2))
    px.runs.transplants.check_number(len(problems), config.for_maps)
    donor, tokenizer = config.load(config.donor)
    if not config.given_donor_heads(donor):
        px.methods.check_scores(donor)
    conditions = len(config.levels) * (4 + config.random_sets)
    checks = [partial(check_host, config, number, donor) for number in range(len(config.models))]
    seconds = px.reasoning.estimate(
        config, problems, run.unfinished, lambda asked: conditions * asked.seconds_a_condition(), checks
    )
    what = f"heads of {Path(config.donor).name} in {conditions} conditions on {len(problems)} problems"
    if not run.announce(what, seconds, n=len(problems)):
        return

    # Each host answers after the reasoning it wrote, with the donor's heads in the place of its own.
    rows: list[Row] = []
    randoms: list[Row] = []
    fits: list[Row] = []
    facts: Row = {}
    for number, name in enumerate(config.models):
        setting = px.reasoning.prepare(config, name, problems, run.unfinished, checks[number])
        host = prepare(config, number, setting, donor, tokenizer)
        found, of_random = transplant(config, host)
        rows, randoms, fits = rows + found, randoms + of_random, fits + host.fits
        facts[setting.name] = px.metadata(setting.model, **setting.facts, **host.facts)
        del setting, host  # more than two models need not fit in memory together
    if not px.is_main_process():
        return

    # Whether the donor's heads do the work of those that they replace, and more of it than random heads.
    verdicts = verdicts_of(rows)

    print(summary(config, facts, fits, rows, verdicts))
    shown = [evidence(rows, model) for model in facts]
    with run.writing({"models": facts, "verdicts": verdicts}, shown, replacing=("*.csv",)):
        run.figure("accuracy", px.figures.transplant_curves(rows))
        run.table("transplants", rows)
        wide = [{**row, "model": f"{row['model']}_{row['condition']}"} for row in rows]
        run.table("accuracy", px.stats.side_by_side(wide, "n_heads", "acc", "accuracy"))
        run.table("maps", fits)
        if randoms:
            run.table("random_sets", randoms)


# -- hosts, heads and maps ---------------------------------------------------------------------------------------------


def check_host(config: Config, number: int, donor: PreTrainedModel, name: str, host: PreTrainedModel) -> None:
    """Raise ValueError for heads that the host has not or that cannot be ranked, and for latent steps that the donor lacks."""
    if not config.host_heads(number, host):
        px.methods.check_scores(host)
    px.runs.transplants.check_latents(name, host, config.donor, donor)


def prepare(
    config: Config, number: int, setting: Setting, donor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Host:
    """Which of the donor's heads come into which places, and the maps."""
    return px.runs.transplants.prepare(
        setting,
        donor,
        config.donor,
        tokenizer,
        host_heads=config.host_heads(number, setting.model),
        donor_heads=config.given_donor_heads(donor),
        wanted=config.levels[-1],
        by=config.by,
        random_sets=config.random_sets,
        fit_problems=config.for_maps,
        method=config.method,
        alpha=config.alpha,
        test_share=config.test_share,
    )


# -- measurement and statistics ----------------------------------------------------------------------------------------


def transplant(config: Config, host: Host) -> tuple[list[Row], list[Row]]:
    """Every number of heads under every condition, and every random set."""
    setting = host.setting
    places, heads = zip(*host.pairs, strict=True)
    sets, unmapped = host.random, host.same_sizes
    rows: list[Row] = []
    randoms: list[Row] = []
    total = len(config.levels) * (3 + unmapped + len(sets))
    with tqdm(total=total, desc=setting.name, unit="set", disable=not px.is_main_process()) as bar:

        def run(*args: Any) -> px.methods.Evaluation:
            bar.update()
            return host.run(*args)

        for n in config.levels:
            zero = run("zero", [], places[:n])
            found = {"zero": zero, "self": run("self", host.own(n))}
            if unmapped:
                found["without_maps"] = run("without_maps", host.transplants(heads, n, mapped=False))
            found["transplant"] = run("transplant", host.transplants(heads, n))
            others = {some[:n]: run("transplant", host.transplants(some, n)) for some in sets}
            for condition, answers in found.items():
                controls = list(others.values()) if condition == "transplant" else []
                rows.append(row_of(config, host, n, condition, answers, zero, controls))
            for some, answers in others.items():
                drop = 100 * (setting.clean.accuracy - answers.accuracy)
                names = " ".join(map(px.stats.head_label, some))
                about = {"model": setting.name, "n_heads": n, "donor_heads": names, "drop": drop}
                randoms.append({**about, "unparsed": int((~answers.parsed).sum())})
    return rows, randoms


def row_of(
    config: Config,
    host: Host,
    n: int,
    condition: str,
    answers: px.methods.Evaluation,
    zero: px.methods.Evaluation,
    others: Sequence[px.methods.Evaluation],
) -> Row:
    """One number of heads under one condition: accuracy in percent, its loss in points."""
    seed, clean = config.seed, host.setting.clean
    accuracy = px.stats.percent_correct(answers.correct)
    drop = px.stats.accuracy_drop(clean.correct, answers.correct, seed, condition, n)
    gain = px.stats.accuracy_drop(answers.correct, zero.correct, seed, condition, n, "gain")
    row: Row = {
        "model": host.setting.name,
        "donor": Path(config.donor).name,
        "n_heads": n,
        "condition": condition,
        "heads": " ".join(px.stats.head_label(place) for place, _ in host.pairs[:n]),
        "donor_heads": " ".join(px.stats.head_label(head) for _, head in host.pairs[:n]),
        "problems": len(answers),
        "accuracy": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "unparsed": int((~answers.parsed).sum()),
        "changed": sum(a != b for a, b in zip(answers.ids, clean.ids, strict=True)),
        "clean_accuracy": 100 * clean.accuracy,
        **px.stats.interval_columns("drop", drop),
        "mcnemar_p": px.stats.mcnemar_p(clean.correct, answers.correct),
        **px.stats.interval_columns("gain", gain),
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
        excess = px.stats.accuracy_drop(
            answers.correct, np.mean([other.correct for other in others], 0), seed, n, "excess"
        )
        share = px.stats.share_as_large(accuracy.mean, of_random)
        values = (of_random.mean(), of_random.min(), of_random.max(), *excess, share)
        row |= {name: float(value) for name, value in zip(names, values, strict=True)}
    return row


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdicts_of(rows: Sequence[Row]) -> list[str]:
    """Two lines a model and number of heads: what they are needed for, and whether the donor's do it."""
    found = {(row["model"], row["n_heads"], row["condition"]): row for row in rows}
    lines = []
    for model, n in dict.fromkeys((row["model"], row["n_heads"]) for row in rows):
        zero, moved, own = (found[model, n, condition] for condition in ("zero", "transplant", "self"))
        drops = {name: px.stats.interval_in(row, "drop") for name, row in (("zero", zero), ("moved", moved))}
        gain, excess = px.stats.interval_in(moved, "gain"), px.stats.interval_in(moved, "excess")
        line = (
            f"{model}, {n} head{'s' * (n > 1)}: nothing in their place costs {px.stats.in_points(drops['zero'])}: "
            f"{px.stats.verdict(drops['zero'])}; those of {moved['donor']} cost {px.stats.in_points(drops['moved'])}: "
            f"{px.stats.verdict(drops['moved'])}; that gives back {px.stats.in_points(gain)}"
        )
        as_good = round(moved["share_as_good"] * (1 + moved["random_sets"])) - 1 if moved["random_sets"] else 0
        if moved["random_sets"]:
            line += (
                f", and is {px.stats.in_points(excess)} beyond random heads of the donor, {as_good} of {moved['random_sets']} "
                "sets being as good"
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


def evidence(rows: Sequence[Row], model: str) -> px.runs.Evidence:
    """What the donor's heads give back of what the most heads are needed for, beside random heads."""
    row = [row for row in rows if row["model"] == model and row["condition"] == "transplant"][-1]
    effect = f"{model}, {row['n_heads']} heads of {row['donor']} in place of none give back (points)"
    control = (
        f"{row['random_sets']} random sets give {row['excess']:.1f} less, share as good {row['share_as_good']:.2g}"
    )
    gain = px.stats.interval_in(row, "gain")
    return px.runs.Evidence(
        f"{row['problems']} problems", effect, gain, control if row["random_sets"] else "none", "a larger --limit"
    )


def summary(config: Config, facts: Row, fits: Sequence[Row], rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(px.reasoning.counts(model, found))
        lines.append(f"maps fitted on {config.for_maps} of these; the {found['solved']} others are solved")
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
    return "\n".join([*lines, px.reasoning.VERDICTS, *verdicts])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
