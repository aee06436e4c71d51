"""Does it matter how reasoning tokens attend to one another? Their attention patterns forced to given shapes.

    python experiments/critical_heads/force_attention.py
    python experiments/critical_heads/force_attention.py --models tiny-qwen2.5 tiny-llama3.1 --hub 5
    python experiments/critical_heads/force_attention.py --heads 1.3 2.0 2.1 --shapes uniform --no_sweep
    python experiments/critical_heads/force_attention.py --models Qwen/Qwen2.5-1.5B-Instruct --problems gsm8k --max_new_tokens 320

Method. The model solves the problems untouched. The reasoning it wrote is the block of a problem. With --regenerate answer it is
given again, and the answer after `####` is generated while the queries of the block, in the chosen layers and heads, have a
pattern that is given by hand. With --regenerate reasoning, the default of real models, the question alone is given, and the model
writes reasoning and answer while each token of the reasoning that it writes has such a pattern among those written; so nothing
can be copied from reasoning that was written untouched. A query that gives the block's tokens a mass m of its attention
redistributes it: hub, 0.8 m to one token and 0.2 m evenly to the others that it may see; uniform, m evenly; sequential, m to the
token before. Attention to the question is kept, or with a `hard` pattern moved into the block too
(`forced_attention.ForcedAttention` has the details). Given tokens stay what they are; what changes is the keys and values that
later ones are written from.

Then the hub is put at every token of the block in turn, or at --places of them. Token i of a block is there in problems whose
untouched blocks are longer than i; each is compared with the untouched run on the same problems. `random_hub` in the table is its
control: a hub drawn for each problem. With --heads there is another control: random sets of other heads of the same layers,
forced likewise; random_p is the share of sets that lose at least as much, (1 + count) / (1 + sets).

A drop is the loss of accuracy against the untouched run, in points, with its paired bootstrap 95% interval and McNemar's p. Above
10 points a pattern is called causal and below 2 redundant, by the mean and by the whole interval.

Written to the folder OUT: accuracy_by_pattern.csv (pattern, MODEL_acc) and hub_sweep.csv (position, MODEL_soft_acc,
MODEL_hard_acc); patterns.csv and hubs.csv, the same with intervals, drops and p; figures; config.yaml (running it again gives the
same); and summary.json, what was run, with the verdicts. The same command resumes an interrupted run.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Bool

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyvene_ext.runs.reasoning import Asked, Setting

Shape = Literal["hub", "random_hub", "uniform", "sequential"]
Row = dict[str, Any]
Heads = dict[int, tuple[int, ...]]  # by layer
BLOCK = ("block_first", "block_last")


@dataclass(frozen=True)
class Config(px.flags.Regeneration):
    shapes: px.flags.OneOrMore[Shape] = ("hub", "random_hub", "uniform", "sequential")
    """the patterns, each soft and hard"""
    hub: int = 0
    """the token of the block that is the hub of the pattern hub; a negative one counts from the end of a block that is given"""
    heads: px.flags.EachOnce[px.flags.HeadLabel] = ()
    """which heads, as layer.head; by default all"""
    sweep: bool = True
    """also put the hub at every token of the block in turn"""
    places: px.flags.Count | None = None
    """only this many tokens of the block in the sweep, evenly spaced; by default all, and 2 where reasoning is regenerated"""
    min_problems: Annotated[int, Ge(2)] = 10
    """a token of the block that fewer problems have is skipped by the sweep"""
    random_sets: Annotated[int, Ge(0)] = 20
    """with --heads: random sets of other heads of the same layers, forced likewise; 0 for none"""

    def most_places(self, anew: bool) -> int | None:
        """--places or its default; None for all."""
        return self.places or (2 if anew else None)


def main(config: Config) -> None:
    run = px.RunFolder(config, "critical_heads/force_attention", config.source, *config.models)
    problems = px.reasoning.find_problems(config)
    px.reasoning.check_number(problems, config.min_problems if config.sweep else 2)
    load = partial(px.reasoning.load, config, problems, run.unfinished, partial(check, config))
    what = (
        f"{px.io.counted(len(config.shapes), 'pattern')}, soft and hard, on {px.io.counted(len(problems), 'problem')}"
    )
    what += ", and a sweep of the hub" if config.sweep else ""
    n, least = len(problems), config.min_problems

    # Each model answers, with the attention among its reasoning forced to every pattern.
    patterns: list[Row] = []
    hubs: list[Row] = []
    facts: Row = {}
    for asked in px.runs.each_model(run, load, what, seconds_of, n, shorter(config), least=least):
        setting = asked.reason()
        heads, controls, strength = forced_heads(config, setting.name, setting.model)
        found, swept = measure(setting, config, heads, controls)
        patterns += [untouched(setting), *found]
        hubs += swept
        facts[setting.name] = px.metadata(setting.model, **setting.facts, control=strength)
        del asked, setting  # two models need not fit in memory together
    if config.dry_run or not px.is_main_process():
        return

    # Which patterns cost accuracy, and where the hub costs most.
    verdicts = verdicts_of(patterns, hubs)

    print(summary(facts, patterns, verdicts))
    shown = [evidence(patterns, model) for model in facts]
    with run.writing({"models": facts, "verdicts": verdicts}, shown, replacing=("*.csv",)):
        run.figure("accuracy_by_pattern", px.figures.pattern_bars(patterns, config.shapes))
        run.table("patterns", patterns)
        run.table("accuracy_by_pattern", px.stats.side_by_side(patterns, "pattern", "acc", "accuracy"))
        if hubs:
            run.figure("hub_sweep", px.figures.drops_by_hub(hubs))
            run.table("hubs", hubs)
            named = [{**row, "model": f"{row['model']}_{'hard' if row['hard'] else 'soft'}"} for row in hubs]
            run.table("hub_sweep", px.stats.side_by_side(named, "position", "acc", "accuracy"))


# -- patterns ----------------------------------------------------------------------------------------------------------


def check(config: Config, _: int, name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose attention cannot be forced so, and a hub that is not there when it is needed."""
    forced_heads(config, name, model)
    if "hub" in config.shapes and config.hub < 0 and config.anew and px.models.format_of(model) is None:
        raise ValueError(
            f"--hub {config.hub} counts from the end of a block that is not written yet; count from its start."
        )


def forced_heads(config: Config, name: str, model: PreTrainedModel) -> tuple[Heads, list[Heads], str]:
    """The heads to force, the random sets beside them, none where all heads are forced, and how strong a control these are.

    Raises ValueError for a model whose attention cannot be seen, and a head that it has not.
    """
    px.methods.check_patterns(model)
    layers, heads = px.models.n_layers(model.config), px.models.n_heads(model.config)
    if not config.heads:
        return dict.fromkeys(range(layers), tuple(range(heads))), [], ""
    chosen = sorted(px.reasoning.heads_of(config.heads, name, model))
    if not config.random_sets:
        return by_layer(chosen), [], ""
    random = px.stats.random_heads(chosen, layers, heads, config.random_sets, px.rng(config.seed, "random heads"))
    return by_layer(chosen), [by_layer(some) for some in random.sets], random.strength


def by_layer(heads: Iterable[tuple[int, int]]) -> Heads:
    found: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for layer, head in heads:
        found[layer] += (head,)
    return dict(found)


def seconds_of(config: Config, asked: Asked, n: int) -> float:
    """How long the texts, and then the patterns take at most."""
    sets = 1 + (config.random_sets if config.heads else 0)
    swept = (config.most_places(asked.anew) or config.new_tokens) if config.sweep else 0
    conditions = 2 * (len(config.shapes) * sets + swept)
    return asked.seconds(n) + asked.seconds_of_conditions(n, conditions, 0 if asked.anew else 1)


def shorter(config: Config) -> Row:
    """The flags that make a run shorter."""
    swept: Row = {"places": config.most_places(config.anew) or config.new_tokens} if config.sweep else {}
    return swept | {"shapes": config.shapes} | ({"random_sets": config.random_sets} if config.heads else {})


def force(heads: Heads, shape: Shape, hard: bool) -> tuple[px.ForcedAttention, ...]:
    """The pattern in all of these heads; a hub is at the position "hub"."""
    named: dict[str, Any] = {"shape": shape} if "hub" not in shape else {"shape": "hub", "hub": "hub"}
    return tuple(
        px.ForcedAttention(layer=layer, heads=some, block=BLOCK, hard=hard, **named) for layer, some in heads.items()
    )


# -- measurement and statistics ----------------------------------------------------------------------------------------


def untouched(setting: Setting) -> Row:
    """The untouched run as a row of the table."""
    clean = setting.clean
    row = row_of(setting, "none", False, clean.correct, clean, 0)
    return {
        **row,
        **dict.fromkeys(("drop", "drop_low", "drop_high", "mcnemar_p"), math.nan),
        **control_of(0, clean, []),
    }


def measure(setting: Setting, config: Config, heads: Heads, controls: Sequence[Heads]) -> tuple[list[Row], list[Row]]:
    """Every pattern on all problems that have its hub; and the hub at every token of the block that enough problems have."""
    every = [(shape, hard, hubs_of(setting, config, shape)) for shape in config.shapes for hard in (False, True)]
    places: Sequence[int] = ()
    if config.sweep:
        places = px.reasoning.positions_of(setting, config.min_problems, config.most_places(setting.anew))
    swept = [
        (place, hard, [place if place < len(block) else None for block in setting.questions.blocks])
        for place in places
        for hard in (False, True)
    ]
    asked: list[tuple[tuple[px.ForcedAttention, ...], list[int | None]]] = []
    for shape, hard, hubs in every:
        asked += [(force(some, shape, hard), hubs) for some in (heads, *controls)]
    found = iter(forced(setting, [*asked, *((force(heads, "hub", hard), hubs) for _, hard, hubs in swept)]))
    patterns, rows = [], []
    for shape, hard, hubs in every:
        clean = setting.clean.take(having(hubs))
        run, *others = itertools.islice(found, 1 + len(controls))
        row = row_of(setting, shape, hard, clean.correct, run, config.seed)
        patterns.append({**row, **control_of(row["drop"], clean, others)})
    for place, hard, hubs in swept:
        clean = setting.clean.take(having(hubs))
        row = row_of(setting, "hub", hard, clean.correct, next(found), config.seed, place)
        rows.append({"position": place, **row})
    return patterns, rows


def control_of(drop: float, clean: px.methods.Evaluation, others: Sequence[px.methods.Evaluation]) -> Row:
    """What random heads with the same pattern come to, if there are any."""
    if not others:
        return {"random_drop": math.nan, "random_p": math.nan}
    drops = 100 * (clean.accuracy - np.array([run.accuracy for run in others]))
    return {"random_drop": float(drops.mean()), "random_p": px.stats.share_as_large(drop, drops)}


def hubs_of(setting: Setting, config: Config, shape: Shape) -> list[int | None]:
    """The token of each problem's block that is its hub; None where the block is too short. 0 if the shape has no hub.

    Raises ValueError if fewer than two problems have the token --hub.
    """
    blocks = setting.questions.blocks
    if shape == "hub":
        hubs = [config.hub if -len(block) <= config.hub < len(block) else None for block in blocks]
        if (n := len(having(hubs))) < 2:
            raise ValueError(f"--hub {config.hub}: {n} problems have a token there in their block; choose another.")
        return hubs
    draw = px.rng(config.seed, "hubs")
    return [int(draw.choice(len(block))) if shape == "random_hub" else 0 for block in blocks]


def having(hubs: Sequence[int | None]) -> list[int]:
    """The problems that have a hub."""
    return [i for i, hub in enumerate(hubs) if hub is not None]


def forced(
    setting: Setting, asked: Sequence[tuple[tuple[px.ForcedAttention, ...], Sequence[int | None]]]
) -> list[px.methods.Evaluation]:
    """The outcomes of the problems that have a hub, with each pattern in the block that is given or regenerated."""
    some = [(spec, having(hubs), [hub for hub in hubs if hub is not None]) for spec, hubs in asked]
    if setting.anew:
        return setting.force(
            [px.reasoning.Forcing(spec, which, hubs if spec[0].hub is not None else None) for spec, which, hubs in some]
        )
    return setting.run([(setting.with_hubs(which, hubs), spec) for spec, which, hubs in some])


def row_of(
    setting: Setting,
    shape: str,
    hard: bool,
    clean: Bool[np.ndarray, " problem"],
    after: px.methods.Evaluation,
    seed: int,
    position: int = -1,
) -> Row:
    """A row of a table: accuracy in percent, its loss in points."""
    share = px.stats.percent_correct(after.correct)
    drop = px.stats.accuracy_drop(clean, after.correct, seed, shape, str(hard), position)
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
        **px.stats.interval_columns("drop", drop),
        "mcnemar_p": px.stats.mcnemar_p(clean, after.correct),
    }


# -- what is shown -----------------------------------------------------------------------------------------------------


def verdicts_of(patterns: Sequence[Row], hubs: Sequence[Row]) -> list[str]:
    """One line per model and pattern, and one for the sweep of the hub."""
    lines = []
    for row in patterns:
        if row["pattern"] != "none":
            drop = px.stats.interval_in(row, "drop")
            control = row["random_drop"]
            beside = "" if math.isnan(control) else f"; random heads {control:.1f} points, p = {row['random_p']:.2g}"
            word = px.stats.verdict(drop, unparsed=row["unparsed"] / row["problems"])
            lines.append(f"{row['model']}, {row['pattern']}: {px.stats.in_points(drop)}: {word}{beside}")
    for model in dict.fromkeys(row["model"] for row in hubs):
        mine = [row for row in hubs if row["model"] == model and not row["hard"]]
        worst = max(mine, key=lambda row: row["drop"])
        drop = px.stats.interval_in(worst, "drop")
        word = px.stats.verdict(drop, unparsed=worst["unparsed"] / worst["problems"])
        lines.append(
            f"{model}, hub swept: largest drop with the hub at token {worst['position']} of the block ({worst['problems']} "
            f"problems): {px.stats.in_points(drop)}: {word}; the best of {len(mine)} tokens"
        )
    return lines


def evidence(patterns: Sequence[Row], model: str) -> px.runs.Evidence:
    """The largest drop among a model's patterns whose answers can be read, beside random heads if there are any."""
    mine = [row for row in patterns if row["model"] == model and row["pattern"] != "none"]
    readable = [row for row in mine if row["unparsed"] <= px.stats.BROKEN * row["problems"]]
    worst = max(readable or mine, key=lambda row: row["drop"])
    lost, drops = len(mine) - len(readable), px.io.counted(len(readable or mine), "drop")
    broken = f" ({px.io.counted(lost, 'pattern')} broke the text)" if lost else ""
    effect = f"{model}, {worst['pattern']}, the largest of {drops}{broken}, costs (points)"
    control = "none, as all heads are forced; name some with --heads"
    if not math.isnan(worst["random_drop"]):
        control = f"random heads cost {worst['random_drop']:.1f}, p = {worst['random_p']:.2g}"
    drop = px.stats.interval_in(worst, "drop")
    return px.runs.Evidence(f"{worst['problems']} problems", effect, drop, control, "a larger --limit")


def summary(facts: Row, rows: Sequence[Row], verdicts: Sequence[str]) -> str:
    """What the terminal shows."""
    lines = []
    for model, found in facts.items():
        lines.append(px.reasoning.counts(model, found))
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
    lines += [f"control of {model}: {found['control']}" for model, found in facts.items() if found["control"]]
    return "\n".join([*lines, px.reasoning.VERDICTS, *verdicts])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
