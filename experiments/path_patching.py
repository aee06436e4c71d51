"""Through which paths does a model compute its answer? Path patching: what one sender writes into chosen receivers.

    python experiments/path_patching.py
    python experiments/path_patching.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference --positions last
    python experiments/path_patching.py --receivers q.4.0 q.4.2
    python experiments/path_patching.py --receivers v.4.0 --positions s2 --freeze_mlps
    python experiments/path_patching.py --positions last --direct --subspace
    python experiments/path_patching.py --pairs --limit 10
    python experiments/path_patching.py --pairs --receivers q.4.0 k.4.0 v.4.0 logits

Method (Wang et al. 2022, appendix B). Base is the clean and source the corrupt text of a pair, with the same two answers. Every
head's z is frozen at its value in the base run, except the sender's, which takes its value from the source run; MLPs and norms
are recomputed, and the inputs of the receivers are recorded. The base run with the receivers' inputs set to the recorded ones has
the path patched. `--freeze_mlps` freezes MLPs too, so that only the direct path counts (Goldowsky-Dill et al. 2023), and
`--direct` the scales of norms as well: the direct term alone. With `--subspace` senders change along one direction only, that in
which the two texts differ (arXiv 2502.11806). Receivers are "logits", "q.LAYER.HEAD", "k.LAYER.KV_HEAD", "v.LAYER.KV_HEAD",
"mlp_in.LAYER" and "resid_pre.LAYER" (resid_mid, resid_post), all patched jointly; senders the embedding, every head
(z.LAYER.HEAD) and every MLP (mlp_out.LAYER) upstream of all receivers. `--pairs` takes every sender with every receiver, each
pair by itself: for small models, or few receivers.

A path's effect is the mean change of the metric, patched - base, in percent of the mean of base: negative for a path that
supports the answer. Its 95% interval is the percentile bootstrap over pairs of texts, numerator and denominator drawn together.
The score beside it is the mean of (patched - base) over that of (source - base): 0 is the clean run and 1 the corrupt run.

`--positions` is where the sender is patched. At a named position it is at that token of either text; where one text lacks the
name (a corrupt text without S), at the token in the same place if the texts are equally long. Pairs whose texts do not
correspond in this way, or with `all` differ in number of tokens, are skipped and reported. Receivers in several layers, with a
sender patched at a named position, run on the plain engine, one path at a time.

Written to the folder OUT: patched.npy and effects.npy, in percent, [path prompt]; base.npy and source.npy [prompt]; paths.csv,
largest effect first, `row` being the row of the arrays; and heads.npy, mean effects [layer head], with others.csv, those of MLPs
and embedding; with `--pairs` instead matrix.npy [sender receiver], in the order of summary.json (NaN: no path); figures;
config.yaml (running it again gives the same); and summary.json, what was run. The same command resumes an interrupted run.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedConfig

SHOWN = 12  # paths in the table on the terminal
NAMED = 10  # skipped pairs that the terminal names
RESAMPLES = 2000


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts, px.flags.Memory):
    out: px.flags.Out = None
    receivers: px.flags.EachOnce[str] = ()
    """patched jointly; by default the logits, and with --pairs every q, k, v, MLP and the logits, each by itself"""
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

    def check_flags(self) -> None:
        if self.direct and self.freeze_mlps:
            raise ValueError("--direct passes no MLP anyway: leave --freeze_mlps out.")
        together = [(node,) for node in self.receivers] if self.pairs else [self.receivers or ("logits",)]
        for receivers in together:
            px.PathPatch(sender="embed", receivers=receivers)  # the embedding is upstream of every receiver


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "path_patching", config.model, config.dataset)
    prompt_set = config.load_prompts()
    model, tokenizer = config.load_model()
    clean, corrupt = config.tokenize_pairs(prompt_set, model, tokenizer)
    names = position_names(clean, corrupt, config.positions)
    base, source, kept, dropped = px.methods.patchable(clean, corrupt, names, config.dataset, config.positions)
    groups = receiver_groups(config, model.config)
    paths = [path for group in groups for path in paths_to(config, model.config, group)]
    passes = px.methods.patch_passes(model, paths, base, source, config.metric, memory=config.memory_bytes)
    work = f"{len(paths)} paths x {len(base)} pairs of texts, senders patched at {config.positions}"
    if not run.announce(work, passes * px.runs.seconds_a_pass(model, base), n=len(prompt_set)):
        return

    # Every path on every pair of texts.
    result = px.patch(
        model,
        paths,
        base,
        source,
        config.metric,
        memory=config.memory_bytes,
        store=run.unfinished,
        batch_size=config.batch_size,
        progress=px.is_main_process(),
    )
    if not px.is_main_process():
        return

    # Mean effects over pairs in percent of the base run, with intervals; as a map of heads, or of senders and receivers.
    change = result.intervened - result.baseline
    ratio = px.stats.ratio_of_means(change, result.baseline, px.rng(config.seed, "effects"), RESAMPLES)
    effect = px.Interval(*(100 * values for values in ratio))
    rows = table(paths, effect, result)
    senders, receivers = px.specs.senders(model.config), [px.specs.Node.parse(first) for first, *_ in groups]
    if config.pairs:
        matrix = pair_matrix(paths, effect.mean, senders, receivers)
    else:
        matrix = head_matrix(paths, effect.mean, model.config)
    facts = px.metadata(
        model,
        **settings(config, base, source, kept, dropped),
        **run_means(result, config.seed),
        senders=list(map(str, senders)),
        receivers=list(map(str, receivers)) if config.pairs else list(paths[0].receivers),
        paths=[path.name for path in paths],
        mean_effects=effect.mean.tolist(),
    )

    print(summary(config, facts, rows))
    with run.writing(facts, [evidence(facts, rows)], replacing=("*.npy", "*.csv", "figures/*")):
        run.table("paths", rows)
        if not config.pairs:
            run.table("others", [row for row in rows if not row["sender"].startswith("z.")])
        run.array("matrix" if config.pairs else "heads", matrix.astype(np.float32))
        for name, values in arrays(result).items():
            run.array(name, values)
        for name, figure in drawn(config, run.of, senders, receivers, paths, effect.mean, matrix).items():
            run.figure(name, figure)


# -- what is run -------------------------------------------------------------------------------------------------------


def position_names(clean: px.TokenizedPrompts, corrupt: px.TokenizedPrompts, positions: str) -> tuple[str, ...]:
    """The named position of the senders, none for "all". Raises ValueError for a name that a pair has in neither of its texts."""
    for pair, (ours, theirs) in enumerate(zip(clean.positions, corrupt.positions, strict=True)):
        if positions not in ("all", *ours, *theirs):
            known = ", ".join(sorted({**ours, **theirs}))
            raise ValueError(f"--positions {positions}: pair {pair} has no such position; choose among all, {known}.")
    return () if positions == "all" else (positions,)


def receiver_groups(config: Config, of_model: PreTrainedConfig) -> list[tuple[str, ...]]:
    """The receivers, those that are patched jointly in one tuple."""
    if not config.pairs:
        return [config.receivers or ("logits",)]
    return [(receiver,) for receiver in config.receivers or map(str, px.specs.receivers(of_model))]


def paths_to(config: Config, of_model: PreTrainedConfig, receivers: tuple[str, ...]) -> list[px.PathPatch]:
    """A path from every sender to these receivers."""
    how = {"freeze_mlps": config.freeze_mlps, "direct": config.direct, "subspace": config.subspace}
    return px.all_paths(of_model, receivers, positions=config.positions, **how)


def settings(
    config: Config, base: px.TokenizedPrompts, source: px.TokenizedPrompts, kept: list[int], dropped: list[int]
) -> dict[str, Any]:
    """What was run, for the summary."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "base_hash": base.hash,
        "source_hash": source.hash,
        "n": len(base),
        "n_dropped": len(dropped),
        "pairs_of_texts": kept,
        "dropped": dropped,
        "metric": config.metric,
        "positions": config.positions,
        "freeze_mlps": config.freeze_mlps,
        "direct": config.direct,
        "subspace": config.subspace,
        "answers": config.answers,
        "seed": config.seed,
        "helps_if_negative": ["effect", "change"],
    }


# -- statistics --------------------------------------------------------------------------------------------------------


def run_means(result: px.Patched, seed: int) -> dict[str, Any]:
    """The mean metric of the two runs, and which of them a score of 0 and 1 stands for."""
    base = px.stats.bootstrap_mean(result.baseline, px.rng(seed, "base"), RESAMPLES)
    return {
        "mean_base": base.mean,
        "base_low": px.stats.finite(base.low),
        "base_high": px.stats.finite(base.high),
        "mean_source": float(result.source.mean()),
        "score_0": "the clean run",
        "score_1": "the corrupt run",
    }


def table(paths: list[px.PathPatch], effect: px.Interval, result: px.Patched) -> list[dict[str, Any]]:
    """One row per path, largest effect first."""
    change, scores = (result.intervened - result.baseline).mean(1, dtype=np.float64), result.mean_score
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


def arrays(result: px.Patched) -> dict[str, np.ndarray]:
    """The metric of every run by file name, and each prompt's change in percent of the mean of base: their mean is the effect."""
    change = (result.intervened - result.baseline).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        effects = (100 * change / result.baseline.mean(dtype=np.float64)).astype(np.float32)
    return {"patched": result.intervened, "effects": effects, "base": result.baseline, "source": result.source}


def head_matrix(
    paths: list[px.PathPatch], values: Float[np.ndarray, " path"], of_model: PreTrainedConfig
) -> Float[np.ndarray, "layer head"]:
    """The values of heads as senders; NaN where there is no path."""
    found = np.full((px.models.n_layers(of_model), px.models.n_heads(of_model)), math.nan)
    for path, value in zip(paths, values, strict=True):
        if path.sender_node.site == "z":
            found[path.sender_node.layer, path.sender_node.head] = value
    return found


def pair_matrix(
    paths: list[px.PathPatch],
    values: Float[np.ndarray, " path"],
    senders: list[px.specs.Node],
    receivers: list[px.specs.Node],
) -> Float[np.ndarray, "sender receiver"]:
    """The values of pairs; NaN where there is no path."""
    row, column = ({node: i for i, node in enumerate(nodes)} for nodes in (senders, receivers))
    found = np.full((len(row), len(column)), math.nan)
    for path, value in zip(paths, values, strict=True):
        found[row[path.sender_node], column[path.receiver_nodes[0]]] = value
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------


def variant(config: Config) -> str:
    """How the paths differ from the default, for titles."""
    chosen = (
        ("MLPs frozen", config.freeze_mlps),
        ("direct term", config.direct),
        ("along one direction", config.subspace),
    )
    return "".join(f", {what}" for what, on in chosen if on)


def drawn(
    config: Config,
    of: str,
    senders: list[px.specs.Node],
    receivers: list[px.specs.Node],
    paths: list[px.PathPatch],
    effects: Float[np.ndarray, " path"],
    matrix: Float[np.ndarray, "row column"],
) -> dict[str, Figure]:
    """The figure by name: mean effects of heads, or of senders on receivers."""
    how = f"positions: {config.positions}{variant(config)}: {of}"
    label = f"mean effect (% of the clean {config.metric})"
    if config.pairs:
        title = f"Path patching, sender to receiver, {how}"
        strong = {path.name: float(value) for path, value in zip(paths, effects, strict=True)}
        return {
            "pairs": px.figures.edge_matrix(matrix, senders, receivers, title, label, helpful="negative"),
            "edges": px.figures.edge_graph(strong, title, label, nodes=senders, helpful="negative"),
        }
    title = f"Path patching, heads to {'+'.join(paths[0].receivers)}, {how}"
    return {
        "heads": px.figures.head_heatmap(matrix, title, label, diverging=True, helpful="negative", missing="no path")
    }


def summary(config: Config, facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What the terminal shows: the pairs of texts, what the numbers mean, and the paths with the largest effects."""
    lines = [
        f"{config.model} on {config.dataset}: {facts['n']} pairs, {len(rows)} paths, senders patched at: {config.positions}"
        + variant(config)
    ]
    if left_out := facts["dropped"]:
        some = ", ".join(map(str, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        lines.append(f"{px.io.counted(len(left_out), 'pair')} left out, whose texts differ in number of tokens: {some}")
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


def evidence(facts: dict[str, Any], rows: list[dict[str, Any]]) -> px.runs.Evidence:
    """The largest effect, beside that of the path in the middle."""
    largest, sizes = rows[0], [abs(row["effect"]) for row in rows[1:]]
    effect = f"{largest['path']}, the largest of {len(rows)} paths, changes {facts['metric']} in percent by"
    control = f"the other paths, whose median |effect| is {np.median(sizes) if sizes else math.nan:.2g}%"
    interval = px.Interval(largest["effect"], largest["low"], largest["high"])
    return px.runs.Evidence(f"{facts['n']} pairs", effect, interval, control, "a larger --limit or --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
