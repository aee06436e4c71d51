"""Which heads carry a translation along their direct path to the logits, and are they those that align it? Path patching.

    python experiments/translation_paths.py
    python experiments/translation_paths.py --model tiny-qwen2.5 --pair fr-en
    python experiments/translation_paths.py --model Qwen/Qwen2.5-3B --heads 20.1 20.4 20.6 25.5 26.12 --words 0 1

Method (arXiv 2502.11806). A prompt X+ ends before one of the `--words` of the translation: "EN: the cat sees the dog. FR: le
chat" (they are made in pairs, each the other's swap, of which the source alone tells which word comes next, or stand alone where
there are hardly any swaps; see translation_ablation.py). A head's output at the last token is taken from X-, and what of it
reaches the logits past all other heads changes the logit of the right word; relative change is the mean change by the mean size
of that logit, with percentile bootstrap 95% intervals over prompts. X- (`--minus`) is the swap's prompt, or without swaps the own
one with another sentence of similar length to translate (source), or the own one with the source's label in place of the
target's, so that nothing asks for a translation (label). A head is crucial if the change exceeds `--crucial` (1%).

Standard, and along the one direction in which X+ and X- differ (subspace; of label alone, as swaps, each the other's X-, differ
in none). Beside them what gradients say of patching the head (AtP), which is not along paths. The crucial heads are compared with
those of `--heads`, by default all that translation_heads.py finds in the same sentences: Jaccard index, its mean for random sets,
and the probability that these share as many. That no threshold decides: over all heads, the correlation of the attention score
with what is lost, and its p if heads are permuted within their layers.

Written to the folder OUT: paths.csv, one row per head, the largest change first; for each MINUS, MINUS_standard.npy,
MINUS_subspace.npy and MINUS_atp.npy, relative changes [layer head], NaN where a head has no direction; the same as figures;
config.yaml (running it again gives the same); and, written last, summary.json, what was run. The same command resumes an
interrupted run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Lt
from jaxtyping import Float

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Relative = Mapping[str, px.Interval]  # by MINUS_VARIANT, of every head in order

SHOWN = 8  # heads in a table on the terminal
RESAMPLES = 2000
VARIANTS = {
    "standard": "Path patching to the logits",
    "subspace": "Path patching to the logits, along one direction",
    "atp": "Attribution patching",
}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Config(px.flags.TranslationHeads):
    out: px.flags.Out = None
    minus: px.flags.OneOrMore[Literal["source", "label"]] = ("source", "label")
    """what X- differs in: the sentence to be translated, the label of the language asked for, or either"""
    crucial: Annotated[float, Gt(0), Lt(1)] = 0.01
    """relative change of the right word's logit above which a head is crucial"""


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "translation_paths", config.model, config.pair)
    setting = px.translation.prepare(config, config.heads, scores=True)

    size = px.models.n_layers(setting.model.config) * px.models.n_heads(setting.model.config)
    n, kinds = px.io.counted(len(setting.asked.plus), "prompt"), px.io.counted(len(config.minus), "kind")
    work = f"paths of {size} heads to the logits on {n}, {kinds} of X-"
    # The paths run from the end alone; beside them two backward passes and some for what is patched in.
    passes = (10 + size / 10) * len(config.minus)
    seconds = passes * px.runs.seconds_a_pass(setting.model, setting.asked.plus) + setting.seconds_to_find_heads()
    if not run.announce(work, seconds, n=len(setting.asked.plus) // len(config.words)):
        return

    # The heads by their attention, and every head patched along its path, in each variant.
    heads, scores = setting.heads, setting.scores
    changes, clean = path_changes(setting, config, run.unfinished)
    if not px.is_main_process():
        return

    # Relative changes with intervals; which heads are crucial; and how far attention says so.
    shape, size = scores.by_head.shape, np.abs(clean)
    relative = {
        name: px.stats.ratio_of_means(change.reshape(-1, len(size)), size, px.rng(config.seed, name), RESAMPLES)
        for name, change in changes.items()
    }
    crucial = {name: crucial_heads(of.mean.reshape(shape), config.crucial) for name, of in relative.items()}
    overlaps = {name: px.stats.head_overlap(some, heads, math.prod(shape))._asdict() for name, some in crucial.items()}
    with_attention = {
        what: px.stats.correlate_heads(
            scores.by_head, -relative[f"{what}_standard"].mean.reshape(shape), config.seed, RESAMPLES
        )
        for what in config.minus
    }
    rows = head_table(relative, crucial, heads, shape)
    facts = px.metadata(
        setting.model,
        **setting.facts,
        heads=labels(heads),
        minus=list(config.minus),
        helps_if_negative=list(relative),
        attention_and_loss={what: coefficient(of) for what, of in with_attention.items()},
        without_direction={
            name: labels(np.argwhere(np.isnan(of.mean.reshape(shape))))
            for name, of in relative.items()
            if name.endswith("subspace")
        },
        mean_logit=float(clean.mean()),
        crucial={name: labels(some) for name, some in crucial.items()},
        overlap_with_heads=overlaps,
        spearman_with_standard=like_standard(relative),
    )

    print(f"{setting.headline(heads)}\n{summary(config, facts, rows, overlaps, with_attention)}")
    stands = [evidence(what, rows, with_attention[what], len(setting.asked.plus)) for what in config.minus]
    with run.writing(facts, stands, replacing=("*.npy", "figures/*")):
        run.table("paths", rows)
        for name, of in relative.items():
            run.array(name, of.mean.reshape(shape))
            run.figure(name, drawn(name, of.mean.reshape(shape), run.of))


def path_changes(
    setting: px.translation.WordSetting, config: Config, store: Path
) -> tuple[dict[str, Float[np.ndarray, "layer head prompt"]], Float[np.ndarray, " prompt"]]:
    """How the right word's logit changes, by MINUS_VARIANT; and that logit, untouched."""
    model, plus = setting.model, setting.asked.plus
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": px.is_main_process()}
    heads_alone = px.all_patches(model.config, "z", positions="last")
    changes: dict[str, np.ndarray] = {}
    for what in config.minus:
        minus = setting.asked.minus[what]
        for variant in ("standard", "subspace") if what == "label" else ("standard",):
            name = f"{what}_{variant}"
            changes[name], clean = px.methods.path_changes(
                model, plus, minus, subspace=variant == "subspace", store=store / name, **options
            )
        estimate = -px.methods.atp(model, heads_alone, plus, minus, "logit", **options)
        changes[f"{what}_atp"] = estimate.reshape(changes[f"{what}_standard"].shape)
    return changes, clean


# -- statistics --------------------------------------------------------------------------------------------------------


def crucial_heads(change: Float[np.ndarray, "layer head"], threshold: float) -> list[tuple[int, int]]:
    """The heads whose relative change is beyond the threshold, in either direction."""
    return [(int(layer), int(head)) for layer, head in np.argwhere(np.abs(change) > threshold)]


def head_table(
    relative: Relative,
    crucial: dict[str, list[tuple[int, int]]],
    found: list[tuple[int, int]],
    shape: tuple[int, ...],
) -> Rows:
    """One row per head, the largest change by the first X- first: change, interval and whether crucial, by variant."""
    rows: Rows = []
    for number, (layer, head) in enumerate(np.ndindex(*shape)):
        row: dict[str, Any] = {"layer": layer, "head": head, "found": (layer, head) in found}
        for name, of in relative.items():
            change = px.Interval(*(float(values[number]) for values in of))
            row |= px.stats.interval_columns(name, change) | {f"{name}_crucial": (layer, head) in crucial[name]}
        rows.append(row)
    first = next(iter(relative))
    return sorted(rows, key=lambda row: -abs(row[first]))


def like_standard(relative: Relative) -> dict[str, float]:
    """Spearman's correlation over heads of every other variant with standard path patching."""
    from scipy.stats import spearmanr

    correlations = {}
    for name, of in relative.items():
        what, variant = name.split("_")
        if variant != "standard":
            standard = relative[f"{what}_standard"].mean
            correlations[name] = float(spearmanr(standard, of.mean, nan_policy="omit").statistic)
    return correlations


def coefficient(correlation: px.stats.Correlation) -> dict[str, Any]:
    """Spearman's for the summary."""
    return asdict(correlation.spearman) | {"n": correlation.n}


def labels(heads: Any) -> list[str]:
    """The names of heads."""
    return [px.stats.head_label((layer, head)) for layer, head in heads]


# -- what is shown -----------------------------------------------------------------------------------------------------


def drawn(name: str, relative: Float[np.ndarray, "layer head"], of: str) -> Figure:
    """The relative changes of one variant as a map of heads."""
    what, variant = name.split("_")
    title = f"{VARIANTS[variant]}, X- by {what}: {of}"
    return px.figures.head_heatmap(
        100 * relative, title, "change of the logit (%)", diverging=True, helpful="negative", missing="no direction"
    )


def summary(
    config: Config,
    facts: dict[str, Any],
    rows: Rows,
    overlaps: dict[str, dict[str, float]],
    with_attention: Mapping[Any, px.stats.Correlation],
) -> str:
    """What the terminal shows: crucial heads by variant, how attention goes with what is lost, and the largest changes."""
    like, crucial = facts["spearman_with_standard"], facts["crucial"]
    lines = [
        f"\npaths: mean logit {facts['mean_logit']:.2f}; crucial above {config.crucial:.1%}",
        "X- and variant   crucial heads  among the heads  Jaccard  by chance       p  Spearman with standard",
    ]
    for name, overlap in overlaps.items():
        rank = f"{like[name]:.2f}" if name in like else "-"
        lines.append(
            f"{name:<16} {len(crucial[name]):13} {overlap['shared']:16} {overlap['jaccard']:8.2f} {overlap['chance']:10.2f} "
            f"{overlap['p']:7.2g} {rank:>23}"
        )
    for what, correlation in with_attention.items():
        r = correlation.spearman
        lines.append(
            f"attention score and loss, X- by {what}: Spearman {r.r:.2f} [{r.low:.2f}, {r.high:.2f}] over {correlation.n} heads, "
            f"p within layers {r.p_within_layers:.2g}"
        )
    lines.append("   head  " + "  ".join(f"{name:>15}" for name in overlaps))
    for row in rows[:SHOWN]:
        percents = "  ".join(f"{row[name]:15.1%}" for name in overlaps)
        lines.append(f"{row['layer']:>4}.{row['head']:<2}  {percents}" + "  found" * row["found"])
    return "\n".join(lines)


def evidence(what: str, rows: Rows, with_attention: px.stats.Correlation, n: int) -> px.runs.Evidence:
    """The largest relative change by one X-, and whether heads that align translations are those whose paths matter."""
    name = f"{what}_standard"
    row = max(rows, key=lambda one: abs(one[name]))
    change = px.Interval(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))
    effect = (
        f"X- by {what}: {px.stats.head_label((row['layer'], row['head']))}, the largest of {len(rows)} heads, changes the right "
        "word's logit by a share of"
    )
    r = with_attention.spearman
    control = f"heads permuted within layers: attention score and loss, Spearman {r.r:.2f}, p {r.p_within_layers:.2g}"
    return px.runs.Evidence(f"{n} prompts", effect, change, control, "a larger --limit with a larger --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
