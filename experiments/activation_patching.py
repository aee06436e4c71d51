"""Which activations carry the answer? Activation patching: one site at a time, from the one text of a pair into the other.

    python experiments/activation_patching.py
    python experiments/activation_patching.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/activation_patching.py --direction noise --site z q k v --positions last
    python experiments/activation_patching.py --site attn_out mlp_out --positions all --metric probability
    python experiments/activation_patching.py --positions last --subspace

Method (Meng et al. 2022; Wang et al. 2022; Zhang and Nanda 2024). Each pair has a clean and a corrupt text, with the same two
answers. `denoise` runs the corrupt text with one activation of the clean run in it and asks what restores the answer; `noise`
runs the clean text with one activation of the corrupt run and asks what breaks it. The metric is read at the last token. The
score of a patch is the mean of (patched - base) over the mean of (source - base): base is the text that is run and source the
one that gives, so that 0 is a patch that does nothing and 1 one that does all that changing the text does. Its 95% interval is
the percentile bootstrap over pairs, numerator and denominator drawn together.

With the name of a position the patch is at that token of either text; where one text lacks the name (a corrupt text without S),
it is at the token in the same place if the texts are equally long, else the pair is left out. `each` does so for every name that
all pairs have, one at a time; of names for the same tokens the first stands for all. `all` patches every token at once (the
residual stream then scores 1, whatever the model); pairs whose texts differ in number of tokens are left out, counted and named.
`--subspace` replaces nothing but the component along one direction, that in which the two texts differ (arXiv 2502.11806).

Written to the folder OUT: patched.npy and scores.npy [patch prompt] (of a single prompt; not finite where its base and source
are equal), base.npy and source.npy [prompt]; patches.csv, the mean scores, largest effect first, `row` being the row of the
arrays; of every site of heads SITE.npy, its mean scores [layer head], with `each` SITE_POSITION.npy, of every other site
SITE.npy [layer position]; figures; with site z attention.json, where the heads of the largest effects look in the clean texts;
config.yaml (running it again gives the same); and summary.json, what was run. A run that was interrupted goes on where it stopped
when the same command is given again.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from prompt_sets import both_texts, find_prompts, patchable

from modelcards import COMPONENTS, FIELD_NAMES, n_layers
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import (
    output_path,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.patching.patch import all_patches, patch
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.tokenized import Answers, TokenizedPrompts
from pyvene_ext.report.attention import HEADS, look, write_views
from pyvene_ext.runs import figures
from pyvene_ext.runs.metadata import metadata
from pyvene_ext.runs.sweeps import discard
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.stats.intervals import Interval, paired_bootstrap, ratio_of_means

Site = Literal["z", "q", "k", "v", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
Maps = Mapping[Site, Float[np.ndarray, "position layer head"]]
SHOWN = 12  # patches of a site in the table on the terminal
NAMED = 10  # pairs left out that the terminal names
RESAMPLES = 2000


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file with clean and corrupt, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the folder of what is written; by default outputs/activation_patching/MODEL_DATASET"""
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean activations into the corrupt run; noise: corrupt ones into the clean run"""
    site: tuple[Site, ...] = ("z", "mlp_out", "resid_pre")
    """what is patched, in every layer; z, q, k and v head by head (k and v: K/V heads)"""
    positions: str = "each"
    """where: each named position of the prompts by itself, one of them (last, io, s1, s2, ...), or all tokens at once"""
    subspace: bool = False
    """only the component along the concept direction is replaced (pyvene_ext.methods.patching.subspace)"""
    metric: Literal["logit_diff", "probability", "rank", "accuracy"] = "logit_diff"
    """what is read at the last token"""
    limit: int | None = None
    """only the first so many pairs"""
    answers: Answers = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""
    memory: float | None = None
    """GiB of working memory besides the weights; by default half of what the weights take, at least 0.25"""
    batch_size: int = 16
    """prompts a forward pass, of the activations that are put in; the patches' batches follow from --memory"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of the bootstrap"""


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first forward pass.
    check_flags(config)
    folder = folder_of(config)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    prompt_set = replace(prompt_set, prompts=prompt_set.prompts[: config.limit])
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    clean, corrupt = both_texts(prompt_set, model, tokenizer, config.answers)
    names = wanted_names(clean, corrupt, config.positions)
    clean, corrupt, kept, dropped = patchable(clean, corrupt, names, config.dataset, config.positions)
    base, source = (clean, corrupt) if config.direction == "noise" else (corrupt, clean)
    positions = distinct(names, base, source) if names else ("all",)
    specs = [
        spec
        for site in config.site
        for position in positions
        for spec in all_patches(model.config, site, positions=position, subspace=config.subspace)
    ]
    resolve(specs, model, base, source)

    # Every patch on every pair.
    shown = is_main_process()
    result = patch(
        model,
        specs,
        base,
        source,
        config.metric,
        memory=None if config.memory is None else int(config.memory * 2**30),
        store=folder / "unfinished",
        batch_size=config.batch_size,
        progress=shown,
    )
    if not shown:
        return
    change, gap = result.intervened - result.clean, result.source - result.clean
    score = ratio_of_means(change, gap, rng(config.seed, "scores"), RESAMPLES)
    whole_gap = paired_bootstrap(result.source, result.clean, rng(config.seed, "gap"), RESAMPLES)
    rows = table(specs, score, change)
    maps: Maps = {
        site: score.mean[[spec.site == site for spec in specs]].reshape(len(positions), n_layers(model.config), -1)
        for site in config.site
    }

    # The files. The summary comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    for earlier in (*folder.glob("*.npy"), *folder.glob("figures/*")):
        earlier.unlink()
    draw(folder, config, positions, maps)
    write_csv(folder / "patches.csv", rows)
    for name, matrix in arrays(positions, maps).items():
        write_npy(folder / f"{name}.npy", matrix.astype(np.float32))
    write_npy(folder / "patched.npy", result.intervened)
    write_npy(folder / "scores.npy", result.score.astype(np.float32))
    write_npy(folder / "base.npy", result.clean)
    write_npy(folder / "source.npy", result.source)
    heads = dict.fromkeys((row["layer"], row["head"]) for row in rows if row["site"] == "z")
    pairs = [f"pair {pair}" for pair in kept]
    write_views(folder, look(model, tokenizer, clean.input_ids, list(heads)[:HEADS], names=pairs))
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        base_hash=base.hash,
        source_hash=source.hash,
        n=len(base),
        n_dropped=len(dropped),
        pairs=kept,
        dropped=dropped,
        direction=config.direction,
        score_0=f"the {run_of(config)[0]} run",
        score_1=f"the {run_of(config)[1]} run",
        subspace=config.subspace,
        metric=config.metric,
        positions=list(positions),
        answers=config.answers,
        seed=config.seed,
        mean_base=float(result.clean.mean()),
        mean_source=float(result.source.mean()),
        gap_low=finite(whole_gap.low),
        gap_high=finite(whole_gap.high),
        patches=[spec.where for spec in specs],
        mean_scores=[finite(value) for value in score.mean],
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")

    print(summary(config, facts, rows))
    print(f"\nwritten:\n  {folder}/ (scores, tables, figures, config, summary)")


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense."""
    for flag, value, fits, wanted in (
        ("limit", config.limit, config.limit is None or config.limit >= 1, "1 or more"),
        ("memory", config.memory, config.memory is None or 0 < config.memory < 2**20, "above 0, in GiB"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "1 or more"),
    ):
        if not fits:
            raise ValueError(f"--{flag} must be {wanted}, not {value}.")
    if not config.site or len(set(config.site)) < len(config.site):
        raise ValueError("--site names one or more sites, each once.")


def folder_of(config: Config) -> Path:
    """Where everything is written; a ValueError if that cannot be."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    return output_path(config.out, Path("outputs/activation_patching") / name)


def wanted_names(clean: TokenizedPrompts, corrupt: TokenizedPrompts, positions: str) -> tuple[str, ...]:
    """The named positions to patch, none for "all". Raises ValueError for a name that a pair has in neither of its texts."""
    known = [{**ours, **theirs} for ours, theirs in zip(clean.positions, corrupt.positions, strict=True)]
    shared = [name for name in known[0] if all(name in names for names in known)]
    if positions == "all":
        return ()
    if positions == "each":
        return tuple(shared)
    for pair, names in enumerate(known):
        if positions not in names:
            raise ValueError(
                f"--positions {positions}: pair {pair} has no such position; choose among all, each, {', '.join(shared)}."
            )
    return (positions,)


def distinct(names: tuple[str, ...], base: TokenizedPrompts, source: TokenizedPrompts) -> tuple[str, ...]:
    """The names in the order of their tokens (on average); of those at the same tokens of every pair, the first."""
    by_tokens: dict[tuple[int, ...], str] = {}
    for name in names:
        by_tokens.setdefault(tuple(at[name] for some in (base, source) for at in some.positions), name)
    where = {name: np.mean(tokens) for tokens, name in by_tokens.items()}
    return tuple(sorted(where, key=lambda name: where[name]))


def table(
    specs: list[ActivationPatch], score: Interval, change: Float[np.ndarray, "patch prompt"]
) -> list[dict[str, Any]]:
    """One row a patch, largest mean change of the metric first, which is the order of the scores' sizes."""
    rows = []
    for number, spec in enumerate(specs):
        rows.append(
            {
                "patch": spec.where,
                "site": spec.site,
                "layer": spec.layer,
                "head": "" if spec.heads is None else spec.heads[0],
                "positions": spec.positions,
                "score": float(score.mean[number]),
                "low": float(score.low[number]),
                "high": float(score.high[number]),
                "change": float(change[number].mean(dtype=np.float64)),
                "row": number,
            }
        )
    return sorted(rows, key=lambda row: -abs(row["change"]))


def arrays(positions: tuple[str, ...], maps: Maps) -> dict[str, Float[np.ndarray, "layer head"]]:
    """The mean scores by file name: of a site of heads one [layer head] a position, of another one [layer position]."""
    found: dict[str, Float[np.ndarray, "layer head"]] = {}
    for site, values in maps.items():
        if COMPONENTS[FIELD_NAMES[site]].heads is None:
            found[site] = values[..., 0].T
        else:
            found |= {
                site if len(positions) == 1 else f"{site}_{position}": of_heads
                for position, of_heads in zip(positions, values, strict=True)
            }
    return found


def draw(
    folder: Path,
    config: Config,
    positions: tuple[str, ...],
    maps: Maps,
) -> None:
    """Layer x head for every site of heads and position; layer x position for the others, or layer x site at one position."""
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    zero, one = run_of(config)
    label = f"mean score (0: {zero} run, 1: {one} run)"
    title = f"Activation patching ({config.direction})"
    with_heads = [site for site in maps if COMPONENTS[FIELD_NAMES[site]].heads is not None]
    others = [site for site in maps if site not in with_heads]
    for site in with_heads:
        for position, values in zip(positions, maps[site], strict=True):
            drawing = figures.head_heatmap(values, f"{title}, {site}@{position}: {name}", label, diverging=True)
            file = site if len(positions) == 1 else f"{site}_{position}"
            figures.save(drawing, folder / f"figures/{file}.png")
    if others and len(positions) == 1:
        values = np.stack([maps[site][0, :, 0] for site in others], 1)
        drawing = layer_map(values, others, f"{title}, positions: {positions[0]}: {name}", label, "site")
        figures.save(drawing, folder / "figures/layers.png")
    for site in others if len(positions) > 1 else ():
        drawing = layer_map(maps[site][..., 0].T, positions, f"{title}, {site}: {name}", label, "position")
        figures.save(drawing, folder / f"figures/{site}.png")


@matplotlib.rc_context(figures.STYLE)
def layer_map(
    values: Float[np.ndarray, "layer column"], columns: Sequence[str], title: str, label: str, xlabel: str
) -> Figure:
    """One coloured cell a layer and a named column; layer 0 on top, white at 0, grey where there is no number."""
    n, width = values.shape[0], max(2.4, 0.62 * len(columns))
    height = max(1.8, min(0.42, 6.0 / n) * n)
    limit = float(np.abs(values[np.isfinite(values)]).max(initial=0)) or 1.0
    figure = Figure(figsize=(width + 1.9, height + 1.2))
    axes = figure.add_subplot()
    axes.set_facecolor("#dcdcdc")
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=figures.DIVERGING,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(textwrap.fill(title, int(11 * (width + 1.9))))
    axes.set(xlabel=xlabel, ylabel="layer")
    axes.set_xticks(range(len(columns)), labels=columns)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.16 / width, aspect=height / 0.14, pad=0.02)
    bar.set_label(textwrap.fill(label, int(11 * height)))
    bar.outline.set_visible(False)
    return figure


def run_of(config: Config) -> tuple[str, str]:
    """Which text is base and which source."""
    return ("clean", "corrupt") if config.direction == "noise" else ("corrupt", "clean")


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def summary(config: Config, facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What the terminal shows: the pairs, what 0 and 1 are, and of every site the patches with the largest effect."""
    base, source = run_of(config)
    lines = [
        f"{config.model} on {config.dataset}: {facts['n']} pairs, {config.direction} ({source} activations into the {base} "
        f"run{', along one direction' * config.subspace}), positions: {', '.join(facts['positions'])}"
    ]
    if left_out := facts["dropped"]:
        some = ", ".join(map(str, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        lines.append(f"{len(left_out)} pairs left out, whose texts differ in number of tokens: {some}")
    lines += [
        f"mean {config.metric}: {base} run {facts['mean_base']:.3f}, {source} run {facts['mean_source']:.3f}",
        f"score: 0 is the {base} run, 1 the {source} run",
    ]
    low, high = facts["gap_low"], facts["gap_high"]
    if low is None or high is None or low <= 0 <= high:
        lines.append("the two runs do not differ beyond chance (95% interval), so that scores mean little")
    for site in config.site:
        lines.append(f"\n{site:>24}    score     95% interval    change")
        for row in [row for row in rows if row["site"] == site][:SHOWN]:
            interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"{row['patch']:>24} {row['score']:8.3f} {interval:>16} {row['change']:9.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
