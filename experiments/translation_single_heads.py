"""Does any single head cause a translation? One head at a time is replaced by what it is over the source sentences.

    python experiments/translation_single_heads.py
    python experiments/translation_single_heads.py --model Qwen/Qwen2.5-3B --pair en-fr
    python experiments/translation_single_heads.py --words 1 2 --replacements mean zero

Method. A prompt ends before one of the `--words` of the translation, by default the first (they are made in pairs, each the
other's swap, of which the source alone tells which word comes next, or stand alone where there are hardly any swaps; see
translation_ablation.py). One head at a time, its output
at every token is replaced by the mean, maximum or minimum, dimension by dimension, that it has over the source sentences alone,
or by zero (`--replacements`). What is read is the drop of the paired logit difference, half the sum of logit(own word) -
logit(the other's) over the two prompts of a swap, with percentile bootstrap 95% intervals over swaps; of prompts that stand alone
the logit of the right word above its strongest rival's.

Limitation. Heads that make up for one another hide each other here, and a maximum or minimum is a value that no head ever has:
translation_ablation.py ablates heads together, against random sets.

Written to the folder OUT: each.csv, one row per replacement and head; each_KIND.npy, mean drops [layer head]; figures;
config.yaml (running it again gives the same); and, written last, summary.json, what was run. The same command resumes an
interrupted run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # heads of a replacement on the terminal
RESAMPLES = 2000
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config(px.flags.TranslatedWords, px.flags.Memory):
    words: px.flags.OneOrMore[Annotated[int, Ge(0)]] = (0,)
    out: px.flags.Out = None
    replacements: px.flags.OneOrMore[Literal["mean", "maximum", "minimum", "zero"]] = (
        "mean",
        "maximum",
        "minimum",
        "zero",
    )
    """what a head's output is replaced by"""


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "translation_single_heads", config.model, config.pair)
    setting = px.translation.prepare(config)
    model = setting.model
    sources = px.prompts.tokenize_texts(setting.tokenizer, [pair.source for pair in setting.sentences.kept])

    size = px.models.n_layers(model.config) * px.models.n_heads(model.config)
    one = list(px.all_heads(model.config, "zero"))
    passes = px.plan_sweep(model, one, setting.asked.plus, memory=config.memory_bytes).passes * len(config.replacements)
    seconds = passes * px.runs.seconds_a_pass(model, setting.asked.plus) + px.runs.seconds_a_pass(model, sources)
    prompts = px.io.counted(len(setting.asked.plus), "prompt")
    work = f"{size} heads replaced in {len(config.replacements)} ways on {prompts}"
    if not run.announce(work, seconds, n=len(setting.asked.plus) // len(config.words)):
        return

    # Every head by itself, replaced in every way.
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": px.is_main_process()}
    replaced: dict[str, Float[np.ndarray, "head swap"]] = {}
    for kind, specs, reference in px.methods.replaced_heads(model, sources, config.replacements, **options):
        result = px.sweep(
            model,
            specs,
            setting.asked.plus,
            reference=reference,
            memory=config.memory_bytes,
            store=run.unfinished / kind,
            progress=px.is_main_process(),
        )
        clean, replaced[kind] = setting.by_item(result.baseline), setting.by_item(result.intervened)
    if not px.is_main_process():
        return

    # Drops of the paired logit difference, with intervals over swaps.
    shape = px.models.n_layers(model.config), px.models.n_heads(model.config)
    rows = [row for kind in replaced for row in head_table(kind, clean, replaced[kind], shape, config.seed)]
    facts = px.metadata(model, **setting.facts, each_clean=float(clean.mean()), n_sources=len(sources))

    print(f"{setting.headline()}\n{summary(config, setting, facts, rows)}")
    stands = [evidence(kind, setting, rows) for kind in config.replacements]
    with run.writing(facts, stands, replacing=("*.npy", "figures/*")):
        run.table("each", rows)
        for name, values in replaced.items():
            drops = (clean - values).mean(1).reshape(shape)
            run.array(f"each_{name}", drops)
            run.figure(f"each_{name}", drawn(name, drops, run.of, config, setting.measure))


def head_table(
    kind: str,
    clean: Float[np.ndarray, " swap"],
    replaced: Float[np.ndarray, "head swap"],
    shape: tuple[int, int],
    seed: int,
) -> Rows:
    """One row per head: the drop of the logit difference."""
    rows = []
    for (layer, head), values in zip(np.ndindex(*shape), replaced, strict=True):
        drop = px.stats.paired_bootstrap(clean, values, px.rng(seed, "drop"), RESAMPLES)
        row = {"replacement": kind, "layer": layer, "head": head}
        rows.append(row | {"drop": drop.mean, "low": drop.low, "high": drop.high})
    return rows


def drawn(kind: str, drops: Float[np.ndarray, "layer head"], of: str, config: Config, measure: str) -> Figure:
    """The drops as a map of heads."""
    title = f"One head replaced ({kind}): {of}, words {', '.join(map(str, config.words))}"
    return px.figures.head_heatmap(drops, title, f"drop of the {measure}", diverging=True)


def summary(config: Config, setting: px.translation.WordSetting, facts: dict[str, Any], rows: Rows) -> str:
    """What the terminal shows: of every replacement the largest drops."""
    lines = [f"\neach: one head at a time; {setting.measure} {facts['each_clean']:.2f}; largest drops"]
    for kind in config.replacements:
        largest = sorted((row for row in rows if row["replacement"] == kind), key=lambda row: -row["drop"])[:SHOWN]
        lines.append(f"{kind:<8} " + ", ".join(f"{row['layer']}.{row['head']} {row['drop']:.2f}" for row in largest))
    return "\n".join(lines)


def evidence(kind: str, setting: px.translation.WordSetting, rows: Rows) -> px.runs.Evidence:
    """The largest drop of one replacement, beside those of all other heads."""
    ranked = sorted((row for row in rows if row["replacement"] == kind), key=lambda row: -row["drop"])
    largest = ranked[0]
    effect = f"{kind}: {largest['layer']}.{largest['head']}, the largest of {len(ranked)} heads, takes off the {setting.measure}"
    others = np.array([row["drop"] for row in ranked[1:]])
    control = (
        f"the other heads, {np.median(others):.2f} in the median, {others.max():.2f} at most" if others.size else "none"
    )
    n = len(setting.asked.plus) // (2 if setting.asked.in_couples else 1)
    drop = px.Interval(largest["drop"], largest["low"], largest["high"])
    return px.runs.Evidence(f"{n} {setting.items}", effect, drop, control, "a larger --limit with a larger --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
