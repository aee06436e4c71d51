"""Along which paths does the answer come about? Path patching: what one sender tells some receivers, past all other heads.

    python experiments/path_patching.py
    python experiments/path_patching.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference --positions last
    python experiments/path_patching.py --receivers q.4.0 q.4.2
    python experiments/path_patching.py --receivers v.4.0 --positions s2 --freeze_mlps
    python experiments/path_patching.py --positions last --direct --subspace
    python experiments/path_patching.py --pairs --limit 10
    python experiments/path_patching.py --pairs --receivers q.4.0 k.4.0 v.4.0 logits

Method (Wang et al. 2022, appendix B). Base is the clean and source the corrupt text of a pair, with the same two answers. Every
head's z is frozen to what it is in the base run, but for the sender, which takes its value of the source run; MLPs and norms are
computed anew, and what the receivers are given then is recorded. The base run with the receivers set to that has the path
patched. `--freeze_mlps` freezes MLPs too, so that only the direct path counts (Goldowsky-Dill et al. 2023), and `--direct` the
scales of norms as well: the direct term alone. With `--subspace` senders change along one direction only, that in which the two
texts differ (arXiv 2502.11806). Receivers are
"logits", "q.LAYER.HEAD", "k.LAYER.KV_HEAD", "v.LAYER.KV_HEAD", "mlp_in.LAYER" and "resid_pre.LAYER" (resid_mid, resid_post),
all set together; senders the embedding, every head (z.LAYER.HEAD) and every MLP (mlp_out.LAYER) that all receivers can hear.
`--pairs` takes every sender with every receiver, each pair by itself: for small models, or few receivers.

A path's effect is the mean change of the metric, patched - base, in percent of the mean of base: of a path that works for the
answer it is negative. Its 95% interval is the percentile bootstrap over pairs of texts, numerator and denominator drawn together.
The score beside it is the mean of (patched - base) over that of (source - base): 0 is the clean run and 1 the corrupt run.

`--positions` is where the sender is patched. At a named position it is at that token of either text; where one text lacks the
name (a corrupt text without S), at the token in the same place if the texts are equally long. Pairs of texts that do not
correspond so, or with `all` differ in number of tokens, are left out, counted and named. Receivers in several layers, with a
sender patched at a named position, are run the plain way, one path at a time.

Written to the folder OUT: patched.npy and effects.npy, in percent, [path prompt]; base.npy and source.npy [prompt]; paths.csv,
largest effect first, `row` being the row of the arrays; and heads.npy, mean effects [layer head], with others.csv, those of MLPs
and embedding; with `--pairs` instead matrix.npy [sender receiver], in the order of summary.json (NaN: no path); figures;
config.yaml (running it again gives the same); and summary.json, what was run. A run that was interrupted goes on where it
stopped when the same command is given again.
"""

from __future__ import annotations

import math
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from modelcards import n_heads, n_layers
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
from pyvene_ext.methods.patching.pairs import both_texts, patchable
from pyvene_ext.methods.patching.patch import Patched, all_paths, patch
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import Answers
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.runs.sweeps import discard
from pyvene_ext.specs.graph import Node, receivers, senders
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.stats.intervals import Interval, paired_bootstrap, ratio_of_means

SHOWN = 12  # paths in the table on the terminal
NAMED = 10  # pairs left out that the terminal names
RESAMPLES = 2000
CLIPPED = 0.995  # of the pairs' effects lie within the colour scale


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file with clean and corrupt, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the folder of what is written; by default outputs/path_patching/MODEL_DATASET"""
    receivers: tuple[str, ...] = ()
    """who is told, all together; by default logits, and with --pairs every q, k, v, MLP and the logits, each by itself"""
    pairs: bool = False
    """every sender with every receiver, one pair at a time"""
    positions: str = "all"
    """where the sender is patched: all, last, or a named position of the prompts (end, io, s1, s2, subject)"""
    freeze_mlps: bool = False
    """MLPs keep their clean value too"""
    direct: bool = False
    """the direct term alone: no MLPs, and the scales of norms frozen"""
    subspace: bool = False
    """senders change along the concept direction only (pyvene_ext.methods.patching.subspace)"""
    metric: Literal["logit_diff", "probability"] = "logit_diff"
    """what is read at the last token"""
    limit: int | None = None
    """only the first so many pairs of texts"""
    answers: Answers = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""
    memory: float | None = None
    """GiB of working memory besides the weights; by default half of what the weights take, at least 0.25"""
    batch_size: int = 16
    """prompts a forward pass, of what senders give; the paths' batches follow from --memory"""
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
    for receiver in config.receivers:
        Node.parse(receiver).check(model.config)
    clean, corrupt = both_texts(prompt_set, model, tokenizer, config.answers)
    for pair, (ours, theirs) in enumerate(zip(clean.positions, corrupt.positions, strict=True)):
        if config.positions not in ("all", *ours, *theirs):
            known = ", ".join(sorted({**ours, **theirs}))
            raise ValueError(
                f"--positions {config.positions}: pair {pair} has no such position; choose among all, {known}."
            )
    names = () if config.positions == "all" else (config.positions,)
    base, source, kept, dropped = patchable(clean, corrupt, names, config.dataset, config.positions)
    paths = [path for together in told(config, model.config) for path in paths_to(config, model.config, together)]
    for path in paths:
        path.check(model)

    # Every path on every pair of texts.
    shown = is_main_process()
    result = patch(
        model,
        paths,
        base,
        source,
        config.metric,
        memory=None if config.memory is None else int(config.memory * 2**30),
        batch_size=config.batch_size,
        store=folder / "unfinished",
        progress=shown,
    )
    if not shown:
        return
    effect = ratio_of_means(result.intervened - result.clean, result.clean, rng(config.seed, "effects"), RESAMPLES)
    effect = Interval(*(100 * values for values in effect))
    base_mean = paired_bootstrap(result.clean, np.zeros_like(result.clean), rng(config.seed, "base"), RESAMPLES)
    rows = table(paths, effect, result)

    # The files. The summary comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    for earlier in (*folder.glob("*.npy"), *folder.glob("*.csv"), *folder.glob("figures/*")):
        earlier.unlink()
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    how = f"positions: {config.positions}{told_how(config)}: {name}"
    label = f"mean effect (% of the clean {config.metric})"
    from_nodes, to_nodes = senders(model.config), [Node.parse(node) for (node, *_) in told(config, model.config)]
    if config.pairs:
        matrix = pair_matrix(paths, effect.mean, from_nodes, to_nodes)
        write_npy(folder / "matrix.npy", matrix.astype(np.float32))
        drawing = draw_pairs(matrix, from_nodes, to_nodes, f"Path patching, sender to receiver, {how}", label)
        figures.save(drawing, folder / "figures/pairs.png")
    else:
        heads = of_heads(paths, effect.mean, (n_layers(model.config), n_heads(model.config)))
        write_npy(folder / "heads.npy", heads.astype(np.float32))
        title = f"Path patching, heads to {'+'.join(paths[0].receivers)}, {how}"
        drawing = figures.head_heatmap(heads, title, label, diverging=True, missing="no path")
        figures.save(drawing, folder / "figures/heads.png")
        write_csv(folder / "others.csv", [row for row in rows if not row["sender"].startswith("z.")])
    write_csv(folder / "paths.csv", rows)
    write_npy(folder / "patched.npy", result.intervened)
    write_npy(folder / "effects.npy", effects(result))
    write_npy(folder / "base.npy", result.clean)
    write_npy(folder / "source.npy", result.source)
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        base_hash=base.hash,
        source_hash=source.hash,
        n=len(base),
        n_dropped=len(dropped),
        pairs_of_texts=kept,
        dropped=dropped,
        metric=config.metric,
        positions=config.positions,
        freeze_mlps=config.freeze_mlps,
        direct=config.direct,
        subspace=config.subspace,
        answers=config.answers,
        seed=config.seed,
        mean_base=base_mean.mean,
        base_low=finite(base_mean.low),
        base_high=finite(base_mean.high),
        mean_source=float(result.source.mean()),
        score_0="the clean run",
        score_1="the corrupt run",
        senders=list(map(str, from_nodes)),
        receivers=list(map(str, to_nodes)) if config.pairs else list(paths[0].receivers),
        paths=[path.name for path in paths],
        mean_effects=[finite(value) for value in effect.mean],
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")

    print(summary(config, facts, rows))
    print(f"\nwritten:\n  {folder}/ (effects, tables, figures, config, summary)")


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense, and for receivers that no model has."""
    for flag, value, fits, wanted in (
        ("limit", config.limit, config.limit is None or config.limit >= 1, "1 or more"),
        ("memory", config.memory, config.memory is None or 0 < config.memory < 2**20, "above 0, in GiB"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "1 or more"),
    ):
        if not fits:
            raise ValueError(f"--{flag} must be {wanted}, not {value}.")
    if config.direct and config.freeze_mlps:
        raise ValueError("--direct passes no MLP anyway: leave --freeze_mlps out.")
    if len(set(config.receivers)) < len(config.receivers):
        raise ValueError(f"--receivers names each receiver once, not {' '.join(config.receivers)}.")
    for together in [(node,) for node in config.receivers] if config.pairs else [config.receivers or ("logits",)]:
        PathPatch(sender="embed", receivers=together)  # the embedding comes before every receiver


def folder_of(config: Config) -> Path:
    """Where everything is written; a ValueError if that cannot be."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    return output_path(config.out, Path("outputs/path_patching") / name)


def told(config: Config, of_model: Any) -> list[tuple[str, ...]]:
    """The receivers, those that are set together in one tuple."""
    if not config.pairs:
        return [config.receivers or ("logits",)]
    return [(receiver,) for receiver in config.receivers or map(str, receivers(of_model))]


def paths_to(config: Config, of_model: Any, together: tuple[str, ...]) -> list[PathPatch]:
    """A path from every sender to these receivers."""
    how = {"freeze_mlps": config.freeze_mlps, "direct": config.direct, "subspace": config.subspace}
    return all_paths(of_model, together, positions=config.positions, **how)


def told_how(config: Config) -> str:
    """What else is frozen, in words."""
    chosen = (
        ("MLPs frozen", config.freeze_mlps),
        ("direct term", config.direct),
        ("along one direction", config.subspace),
    )
    return "".join(f", {what}" for what, on in chosen if on)


def effects(result: Patched) -> Float[np.ndarray, "path prompt"]:
    """Change of every prompt's metric in percent of the mean of base, so that their mean is the effect."""
    change = (result.intervened - result.clean).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (100 * change / result.clean.mean(dtype=np.float64)).astype(np.float32)


def table(paths: list[PathPatch], effect: Interval, result: Patched) -> list[dict[str, Any]]:
    """One row a path, largest effect first."""
    change, scores = (result.intervened - result.clean).mean(1, dtype=np.float64), result.mean_score
    rows = [
        {
            "path": path.name,
            "sender": path.sender,
            "receivers": "+".join(path.receivers),
            "effect": float(effect.mean[row]),
            "low": float(effect.low[row]),
            "high": float(effect.high[row]),
            "score": float(scores[row]),
            "change": float(change[row]),
            "row": row,
        }
        for row, path in enumerate(paths)
    ]
    return sorted(rows, key=lambda row: -abs(row["change"]))


def of_heads(
    paths: list[PathPatch], values: Float[np.ndarray, " path"], shape: tuple[int, int]
) -> Float[np.ndarray, "layer head"]:
    """The values of heads as senders; NaN where there is no path."""
    found = np.full(shape, math.nan)
    for path, value in zip(paths, values, strict=True):
        if path.sender_node.site == "z":
            found[path.sender_node.layer, path.sender_node.head] = value
    return found


def pair_matrix(
    paths: list[PathPatch], values: Float[np.ndarray, " path"], from_nodes: list[Node], to_nodes: list[Node]
) -> Float[np.ndarray, "sender receiver"]:
    """The values of pairs; NaN where there is no path."""
    row, column = ({node: i for i, node in enumerate(nodes)} for nodes in (from_nodes, to_nodes))
    found = np.full((len(row), len(column)), math.nan)
    for path, value in zip(paths, values, strict=True):
        found[row[path.sender_node], column[path.receiver_nodes[0]]] = value
    return found


@matplotlib.rc_context(figures.STYLE)
def draw_pairs(
    matrix: Float[np.ndarray, "sender receiver"], from_nodes: list[Node], to_nodes: list[Node], title: str, label: str
) -> Figure:
    """Senders down, receivers across; white at 0, grey where there is no path. A few largest effects may lie beyond the scale."""
    sizes = np.abs(matrix[np.isfinite(matrix)])
    limit = float(np.quantile(sizes, CLIPPED)) if sizes.size else 0.0
    beyond = bool(sizes.size and sizes.max() > limit > 0)
    cell = min(0.12, 9.0 / max(matrix.shape))
    width, height = max(3.0, matrix.shape[1] * cell), max(2.4, matrix.shape[0] * cell)
    figure = Figure(figsize=(width + 1.9, height + 1.3))
    axes = figure.add_subplot()
    axes.set_facecolor("#dcdcdc")
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        cmap=figures.DIVERGING,
        vmin=-(limit or 1.0),
        vmax=limit or 1.0,
        aspect="auto",
        interpolation="nearest",
    )
    node_ticks(axes.yaxis, from_nodes)
    node_ticks(axes.xaxis, to_nodes)
    axes.set_title(textwrap.fill(title, int(11 * (width + 1.9))))
    axes.set_xlabel("receiver (layer; in each q, k, v of its heads, then the MLP)")
    if len(to_nodes) <= SHOWN:
        axes.set_xlabel("receiver")
        axes.tick_params("x", rotation=45)
    axes.set_ylabel("sender (layer; in each its heads, then the MLP)")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=label, extend="both" if beyond else "neither", fraction=0.04)
    bar.outline.set_visible(False)
    return figure


def node_ticks(axis: Axis, nodes: list[Node]) -> None:
    """The names of a few nodes; of many a tick where a layer begins, and one at each node that belongs to none."""
    if len(nodes) <= SHOWN:
        axis.set_ticks(range(len(nodes)), labels=list(map(str, nodes)))
        return
    first: dict[str, int] = {}
    for place, node in enumerate(nodes):
        first.setdefault(node.site if node.layer is None else str(node.layer), place)
    axis.set_ticks(list(first.values()), labels=list(first))


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def summary(config: Config, facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What the terminal shows: the pairs of texts, what the numbers mean, and the paths with the largest effects."""
    lines = [
        f"{config.model} on {config.dataset}: {facts['n']} pairs, {len(rows)} paths, senders patched at: {config.positions}"
        + told_how(config)
    ]
    if left_out := facts["dropped"]:
        some = ", ".join(map(str, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        lines.append(f"{len(left_out)} pairs left out, whose texts differ in number of tokens: {some}")
    lines += [
        f"mean {config.metric}: clean run (base) {facts['mean_base']:.3f}, corrupt run (source) {facts['mean_source']:.3f}",
        "effect: mean change in % of the clean run's mean; score: 0 is the clean run, 1 the corrupt run",
    ]
    low, high = facts["base_low"], facts["base_high"]
    if low is None or high is None or low <= 0 <= high:
        lines.append(
            "the clean run's mean does not differ from 0 beyond chance (95% interval), so that effects mean little"
        )
    from_heads = [row for row in rows if row["sender"].startswith("z.")]
    others = [row for row in rows if row not in from_heads]
    width = max(20, *(len(row["path"]) for row in rows))
    tables = {"pairs": rows} if config.pairs else {"heads": from_heads, "MLPs and embedding": others}
    for kind, shown in tables.items():
        if shown:
            lines.append(f"\n  {kind:{width}}  effect %     95% interval    score")
        for row in shown[:SHOWN]:
            interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
            lines.append(f"  {row['path']:{width}} {row['effect']:9.2f} {interval:>16} {row['score']:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
