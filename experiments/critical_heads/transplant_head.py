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
the verdicts. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyvene_ext.prompts.problems import Problem
    from pyvene_ext.runs.reasoning import Asked, Setting
    from pyvene_ext.runs.transplants import Host

Row = dict[str, Any]
Heads = tuple[tuple[int, int], ...]
OF_A_LAYER = 0.5  # how much of a layer's time a donor's head takes, which is all of its attention


@dataclass(frozen=True)
class Config(px.flags.Regeneration, px.flags.Ranking):
    donor: px.flags.ModelName = "tiny-llama3.1"
    """the model whose heads are transplanted; named as --models are, which are the hosts"""
    heads: px.flags.EachOnce[px.flags.HeadLabel] = ()
    """heads of the host, as layer.head, the first one first; by default those of the ranking"""
    donor_heads: tuple[px.flags.HeadLabel, ...] = ()
    """heads of the donor, each for the place of the head at its place in --heads or in the ranking"""
    donor_ranking: str | None = None
    """as --rankings, for the donor"""
    n_heads: Annotated[tuple[px.flags.Count, ...], px.io.Ascending()] = ()
    """how many heads to replace, one number after the other; by default all that are named, else 1 2 4 6 with tiny models, 4 with
    others"""
    method: Literal["ridge", "procrustes"] = "ridge"
    """how the maps are fitted"""
    alpha: Annotated[float, Gt(0)] | None = None
    """the penalty of ridge; by default a small one, for which there must be more tokens than dimensions"""
    fit_problems: Annotated[int, Ge(2)] | None = None
    """problems with reasoning that maps are fitted and tested on; the others are solved; by default half, at most 100"""
    test_share: Annotated[float, Gt(0), Lt(1)] = 0.25
    """how many of these are for the test"""
    random_sets: Annotated[int, Ge(0)] | None = None
    """sets of random heads of the donor; 0 for none; by default 20 with tiny models, 10 with others"""

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
        return self.n_heads or ((len(chosen),) if chosen else (1, 2, 4, 6) if self.tiny else (4,))

    @property
    def n_random(self) -> int:
        """--random_sets or its default."""
        return self.random_sets if self.random_sets is not None else 20 if self.tiny else 10

    @property
    def n_conditions(self) -> int:
        """How many there are at most."""
        return len(self.levels) * (4 + self.n_random)

    def fitted(self, n: int) -> int:
        """How many of n problems the maps are fitted on."""
        return self.fit_problems or min(100, n // 2)

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
    px.runs.transplants.check_number(len(problems), config.fitted(len(problems)))
    donor, tokenizer = config.load(config.donor)
    if not config.given_donor_heads(donor):
        px.methods.check_scores(donor)
    loader = partial(load, config, problems, run.unfinished, donor, tokenizer)
    what = f"heads of {Path(config.donor).name} in {px.io.counted(config.n_conditions, 'condition')} on "
    what += px.io.counted(len(problems), "problem")

    # Each host answers after the reasoning it wrote, with the donor's heads in the place of its own.
    rows: list[Row] = []
    randoms: list[Row] = []
    fits: list[Row] = []
    facts: Row = {}
    every = px.runs.each_model(run, loader, what, seconds_of, len(problems), shorter(config), least=4)
    for number, asked in enumerate(every):
        setting = asked.reason()
        host = prepare(config, number, setting, donor, tokenizer)
        found, of_random = transplant(config, host)
        rows, randoms, fits = rows + found, randoms + of_random, fits + host.fits
        facts[setting.name] = px.metadata(setting.model, **setting.facts, **host.facts)
        del asked, setting, host  # more than two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    # Whether the donor's heads do the work of those that they replace, and more of it than random heads.
    verdicts = verdicts_of(rows)

    print(summary(facts, fits, rows, verdicts))
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


def load(
    config: Config,
    problems: Sequence[Problem],
    unfinished: Path,
    donor: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
) -> Asked:
    """A host; ValueError for heads that it has not or that cannot be ranked, and for a donor that is too different."""
    asked = px.reasoning.load(config, problems, unfinished, None, number)
    if not config.host_heads(number, asked.model):
        px.methods.check_scores(asked.model)
    heads_given = bool(config.given_donor_heads(donor))
    px.runs.transplants.check_donor(asked, donor, config.donor, tokenizer, heads_given)
    return asked


def seconds_of(config: Config, asked: Asked, n: int) -> float:
    """How long the texts and all conditions take at most."""
    solved = n - config.fitted(n)
    tokens = config.new_tokens if asked.anew else config.answer_tokens
    # Under hooks, solved examples are not read once for all, and a donor's head reads all tokens again for each new one.
    reading = (
        solved * asked.a_pass * (1 + OF_A_LAYER * config.levels[-1] * tokens / px.models.n_layers(asked.model.config))
    )
    return asked.seconds(n) + config.n_conditions * (asked.writing.seconds(solved, tokens) + reading)


def shorter(config: Config) -> Row:
    """The flags that make a run shorter."""
    return {"random_sets": config.n_random, "n_heads": config.levels}


def prepare(
    config: Config, number: int, setting: Setting, donor: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Host:
    """Which of the donor's heads come into which places, and the maps."""
    how: Row = {name: getattr(config, name) for name in ("by", "method", "alpha", "test_share")}
    how |= {
        "random_sets": config.n_random,
        "host_heads": config.host_heads(number, setting.model),
        "donor_heads": config.given_donor_heads(donor),
    }
    fitted = config.fitted(len(setting.first))
    return px.runs.transplants.prepare(
        setting, donor, config.donor, tokenizer, wanted=config.levels[-1], fit_problems=fitted, **how
    )


# -- measurement and statistics ----------------------------------------------------------------------------------------


def transplant(config: Config, host: Host) -> tuple[list[Row], list[Row]]:
    """Every number of heads under every condition, and every random set."""
    rows: list[Row] = []
    randoms: list[Row] = []
    clean, name = host.setting.clean, host.setting.name
    total = sum(host.n_answers(n) for n in config.levels)
    with px.io.progress_bar(total, "set", name, shown=px.is_main_process()) as bar:
        for n in config.levels:
            found: dict[str, px.methods.Evaluation] = {}
            others: list[px.methods.Evaluation] = []
            for condition, heads, answers in host.answers(n):
                bar.update()
                if condition != "random":
                    found[condition] = answers
                    continue
                others.append(answers)
                about = {"model": name, "n_heads": n, "donor_heads": " ".join(map(px.stats.head_label, heads))}
                drop = 100 * (clean.accuracy - answers.accuracy)
                randoms.append({**about, "drop": drop, "unparsed": int((~answers.parsed).sum())})
            about = {"model": name, "donor": Path(config.donor).name, "n_heads": n}
            labels = [[px.stats.head_label(head) for head in pair] for pair in host.pairs[:n]]
            which = dict(zip(("heads", "donor_heads"), map(" ".join, zip(*labels, strict=True)), strict=True))
            for condition, answers in found.items():
                controls = others if condition == "transplant" else []
                compared = clean, found["zero"], answers, controls
                row = px.methods.transplant_row(*compared, config.seed, condition, n)
                rows.append({**about, "condition": condition, **which, **row})
    return rows, randoms


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdicts_of(rows: Sequence[Row]) -> list[str]:
    """Two lines per model and number of heads: what they are needed for, and whether the donor's do it."""
    found = {(row["model"], row["n_heads"], row["condition"]): row for row in rows}
    lines = []
    for model, n in dict.fromkeys((row["model"], row["n_heads"]) for row in rows):
        zero, moved, own = (found[model, n, condition] for condition in ("zero", "transplant", "self"))
        drops = {name: px.stats.interval_in(row, "drop") for name, row in (("zero", zero), ("moved", moved))}
        broken = {name: row["unparsed"] / row["problems"] for name, row in (("zero", zero), ("moved", moved))}
        words = [px.stats.verdict(drop, unparsed=broken[name]) for name, drop in drops.items()]
        gain, excess = px.stats.interval_in(moved, "gain"), px.stats.interval_in(moved, "excess")
        line = (
            f"{model}, {n} head{'s' * (n > 1)}: nothing in their place costs {px.stats.in_points(drops['zero'])}: "
            f"{words[0]}; those of {moved['donor']} cost {px.stats.in_points(drops['moved'])}: "
            f"{words[1]}; that gives back {px.stats.in_points(gain)}"
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


def summary(facts: Row, fits: Sequence[Row], rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(px.reasoning.counts(model, found))
        fitted = found["with_reasoning"] - found["solved"]
        lines.append(f"maps fitted on {fitted} of these; the {found['solved']} others are solved")
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
