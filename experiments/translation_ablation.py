"""Do the heads that align a translation with its source also cause it? They are ablated together, and random sets beside them.

    python experiments/translation_ablation.py
    python experiments/translation_ablation.py --model tiny-qwen2.5 --pair fr-en
    python experiments/translation_ablation.py --model Qwen/Qwen2.5-3B --heads 20.1 20.4 20.6 25.5 26.12 --words 0 1

Method. A prompt ends before one of the `--words` of the translation: "EN: the cat sees the dog. FR: le chat". Two sentences are
each other's swap if their translations agree up to there and then go on with different words, so that the source alone tells
which. What is read is the paired logit difference, half the sum of logit(own word) - logit(the other's) over the two prompts of
a swap, in which a prior for one of the words cancels out, and the accuracy: whether the right word is the most likely of all. By
default the words are those after the first, which is an article in the shipped sentences; further on hardly two translations
agree. Of real text hardly two agree at all (fewer than four swaps): there every sentence is asked for its own word, and what is
read is the logit of the right word above that of its strongest rival, the other token that the untouched model finds most likely
(`--contrast` chooses). The heads are those of `--heads`; by default all that translation_heads.py finds in the same sentences, or
the five highest if no head is above the threshold and no threshold is published for the model.

The heads are ablated together (`--kinds`: zero, mean, resample; at `--positions`), and so are up to `--n_random` random sets of
as many other heads, of the same layers and of any layer: heads of any layer differ in depth too, and heads of the same layers may
do the same. (Where the same layers have too few others, some come from the nearest ones, as the output says.) The same on another
task (`--other`) tells what is of translation alone. p is the share of sets, the found one counted with the random ones, that
lower the metric as much; drops of the logit difference have percentile bootstrap 95% intervals over swaps or prompts.

Written to the folder OUT: sets.csv, one row per kind and set, the found set first; sets_KIND.npy, the logit difference [set
swap], or [set prompt] without swaps; figures/sets.png; config.yaml (running it again gives the same); and, written last,
summary.json, what was run. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import pyvene_ext as px

if TYPE_CHECKING:
    from pyvene_ext.specs.joint import Spec
    from pyvene_ext.stats import RandomHeads

CONTROLS = ("same layers", "any layer")
RESAMPLES = 2000
Rows = list[dict[str, Any]]
Sets = list[tuple[str, tuple[tuple[int, int], ...]]]  # "found" or the control's name, and the heads
Measures = dict[str, tuple[np.ndarray, np.ndarray]]  # untouched [prompt or swap], and with every set ablated [set ...]


@dataclass(frozen=True)
class Config(px.flags.TranslationHeads, px.flags.Memory):
    out: px.flags.Out = None
    kinds: px.flags.OneOrMore[Literal["zero", "mean", "resample"]] = ("zero", "mean", "resample")
    """of ablation"""
    positions: Literal["last", "all"] = "last"
    """where: at the last token, or at all (resample: only prompts of equal length can)"""
    n_random: px.flags.Count = 20
    """random sets of heads, of the same layers and of any; p cannot be lower than 1 / (1 + N)"""
    other: str = "ioi_en"
    """the other task: a prompt set, or none"""


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first ablation.
    run = px.RunFolder(config, "translation_ablation", config.model, config.pair)
    other = None if config.other == "none" else px.PromptSet.load(config.other)
    setting = px.translation.prepare(config, config.heads)
    tasks = {"": setting.asked.plus} | other_task(other, setting, config)
    likely = specs_of(heads_and_controls(setting.likely_heads, setting, config)[0], config)
    n_sets, n_prompts = len(likely[config.kinds[0]]), sum(map(len, tasks.values()))
    work = f"{n_sets} sets of heads ablated in {len(config.kinds)} ways on {px.io.counted(n_prompts, 'prompt')}"
    if not run.announce(work, seconds(likely, setting, tasks, config), n=len(setting.asked.plus) // len(config.words)):
        return

    # Every set ablated in every way, on both tasks.
    sets, controls = heads_and_controls(setting.heads, setting, config)
    specs = specs_of(sets, config)
    measured = {kind: ablated(specs[kind], setting, tasks, run.unfinished / kind, config) for kind in config.kinds}
    if not px.is_main_process():
        return

    # The found set against the random ones.
    rows = [row for kind in config.kinds for row in set_table(kind, sets, measured[kind], config.seed)]
    facts = px.metadata(
        setting.model,
        **setting.facts,
        heads=[px.stats.head_label(head) for head in setting.heads],
        sets={kind: set_facts([row for row in rows if row["kind"] == kind], measured[kind]) for kind in config.kinds},
        random_sets={name: control.strength for name, control in controls.items()},
    )

    print(f"{setting.headline(setting.heads)}\n{summary(config, setting, facts, rows)}")
    with run.writing(facts, [evidence(kind, setting, rows, facts) for kind in config.kinds], replacing=("*.npy",)):
        run.table("sets", rows)
        for kind, measures in measured.items():
            run.array(f"sets_{kind}", measures["logit_diff"][1])
        names = (config.pair, config.other)
        panels = {f"{prefix}logit_diff": name for prefix, name in zip(tasks, names, strict=False)}
        run.figure("sets", px.figures.ablated_sets(rows, config.kinds, panels))


# -- what is run -------------------------------------------------------------------------------------------------------


def other_task(
    other: px.PromptSet | None, setting: px.translation.WordSetting, config: Config
) -> dict[str, px.TokenizedPrompts]:
    """The first prompts of the other task, as many as --limit, under the prefix of its measures; nothing if there is none."""
    if other is None:
        return {}
    prompts = other.tokenize(setting.tokenizer, max_length=px.models.n_positions(setting.model.config))
    limit = px.translation.PROMPTS if config.limit is None else config.limit or len(prompts)
    return {"other_": prompts.take(range(min(limit, len(prompts))))}


def seconds(
    specs: Mapping[Any, Sequence[Spec]],
    setting: px.translation.WordSetting,
    tasks: dict[str, px.TokenizedPrompts],
    config: Config,
) -> float:
    """How long the ablations take, each for both metrics; everything that a sweep would refuse is refused here."""
    passes = 2 * sum(
        px.plan_sweep(setting.model, of_kind, prompts, memory=config.memory_bytes).passes
        * px.runs.seconds_a_pass(setting.model, prompts)
        for of_kind in specs.values()
        for prompts in tasks.values()
    )
    # Accuracy needs the logits of all tokens, and goes through them more than once.
    rows = sum(len(of_kind) * len(prompts) for of_kind in specs.values() for prompts in tasks.values())
    return passes + 2 * px.runs.seconds_of_logits(setting.model, rows) + setting.seconds_to_find_heads()


def heads_and_controls(
    heads: Sequence[tuple[int, int]], setting: px.translation.WordSetting, config: Config
) -> tuple[Sets, dict[str, RandomHeads]]:
    """The heads, then random sets of as many others; and the controls that these make up."""
    size = px.models.n_layers(setting.model.config), px.models.n_heads(setting.model.config)
    controls = px.methods.control_sets(heads, *size, config.n_random, config.seed)
    random = [(name, some) for name, control in controls.items() for some in control.sets]
    return [("found", tuple(heads)), *random], controls


def specs_of(sets: Sets, config: Config) -> dict[Any, list[Spec]]:
    """The ablation of every set, by kind."""
    how: dict[str, Any] = {"positions": config.positions, "seed": config.seed}
    return {kind: [px.specs.heads_together(heads, kind, **how) for _, heads in sets] for kind in config.kinds}


def ablated(
    specs: Sequence[Spec],
    setting: px.translation.WordSetting,
    tasks: dict[str, px.TokenizedPrompts],
    store: Path,
    config: Config,
) -> Measures:
    """Logit difference and accuracy on every task with every set ablated; that of translation by swap."""
    found: Measures = {}
    for prefix, prompts in tasks.items():
        for metric in ("logit_diff", "accuracy"):
            result = px.sweep(
                setting.model,
                specs,
                prompts,
                metric,
                memory=config.memory_bytes,
                store=store / f"{prefix}{metric}",
                progress=px.is_main_process(),
            )
            found[prefix + metric] = result.baseline, result.intervened
    clean, intervened = map(setting.by_item, found["logit_diff"])
    return found | {"logit_diff": (clean, intervened)}


# -- statistics --------------------------------------------------------------------------------------------------------


def set_table(kind: str, sets: Sets, measures: Measures, seed: int) -> Rows:
    """One row per set: how far the logit difference drops, and the means of all measures."""
    rows = []
    clean, intervened = measures["logit_diff"]
    for number, (name, heads) in enumerate(sets):
        drop = px.stats.paired_bootstrap(clean, intervened[number], px.rng(seed, "drop"), RESAMPLES)
        row: dict[str, Any] = {"kind": kind, "set": name, "heads": " ".join(map(px.stats.head_label, sorted(heads)))}
        row |= {"drop": drop.mean, "low": drop.low, "high": drop.high}
        for measure, (before, after) in measures.items():
            row |= {f"{measure}_clean": float(before.mean()), measure: float(after[number].mean())}
        rows.append(row)
    return rows


def set_facts(rows: Rows, measures: Measures) -> dict[str, dict[str, Any]]:
    """One kind in short, by measure: the found set against the random ones of each control."""
    facts: dict[str, dict[str, Any]] = {}
    for measure in measures:
        found = rows[0][measure]
        facts[measure] = {"clean": rows[0][f"{measure}_clean"], "found": found}
        for control in CONTROLS:
            random = [row[measure] for row in rows if row["set"] == control]
            facts[measure][control] = px.stats.against_random(found, random)._asdict()
    return facts


# -- what is shown -----------------------------------------------------------------------------------------------------


def summary(config: Config, setting: px.translation.WordSetting, facts: dict[str, Any], rows: Rows) -> str:
    """What the terminal shows: every kind and measure, untouched, with the found set ablated, and with random ones."""
    header = "".join(f"{name:>14} (lowest)      p" for name in CONTROLS)
    lines = [
        f"\nlogit_diff of {config.pair} is the {setting.measure}; means over {setting.items}",
        f"\nsets                                  clean  found{header}",
    ]
    for kind, measures in facts["sets"].items():
        for measure, of in measures.items():
            task = config.other if measure.startswith("other_") else config.pair
            random = "".join(f"{of[at]['mean']:13.2f} ({of[at]['lowest']:6.2f}) {of[at]['p']:6.3f}" for at in CONTROLS)
            name = measure.removeprefix("other_")
            lines.append(f"{kind:<9} {task:<10} {name:<11} {of['clean']:10.2f} {of['found']:6.2f} {random}")
    lines += [f"control, {name}: {strength}" for name, strength in facts["random_sets"].items()]
    lines += [
        f"{row['kind']}: the found heads take {row['drop']:.2f} [{row['low']:.2f}, {row['high']:.2f}] off"
        for row in rows
        if row["set"] == "found"
    ]
    return "\n".join(lines)


def evidence(kind: str, setting: px.translation.WordSetting, rows: Rows, facts: dict[str, Any]) -> px.runs.Evidence:
    """What one kind of ablation takes off the logit difference, beside the random sets."""
    found = next(row for row in rows if (row["kind"], row["set"]) == (kind, "found"))
    drop = px.Interval(found["drop"], found["low"], found["high"])
    of = facts["sets"][kind]["logit_diff"]
    control = "; ".join(
        f"{name} {of['clean'] - of[name]['mean']:.2f} on average, p = {of[name]['p']:.2g} ({facts['random_sets'][name]})"
        for name in CONTROLS
    )
    effect = f"the heads ({len(facts['heads'])}), ablated together ({kind}), take off the {setting.measure}"
    n = len(setting.asked.plus) // (2 if setting.asked.in_couples else 1)
    return px.runs.Evidence(f"{n} {setting.items}", effect, drop, control, "a larger --limit with a larger --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
