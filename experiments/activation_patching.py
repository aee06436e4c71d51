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
config.yaml (running it again gives the same); and summary.json, what was run. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# pyvene's names mean the same: head_attention_value_output is z, block_input resid_pre.
Site = Literal[
    "z", "q", "k", "v", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post",
    "head_attention_value_output", "head_query_output", "head_key_output", "head_value_output", "attention_contribution",
    "mlp_input", "mlp_contribution", "block_input", "block_output",
]  # fmt: skip
Maps = Mapping[str, Float[np.ndarray, "position layer head"]]
SHOWN = 12  # patches of a site in the table on the terminal
NAMED = 10  # pairs left out that the terminal names
RESAMPLES = 2000


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts, px.flags.Memory):
    out: px.flags.Out = None
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean activations into the corrupt run; noise: corrupt ones into the clean run"""
    site: px.flags.OneOrMore[Site] = ("z", "mlp_out", "resid_pre")
    """what is patched, in every layer; z, q, k and v head by head (k and v: K/V heads)"""
    positions: str = "each"
    """where: each named position of the prompts by itself, one of them (last, io, s1, s2, ...), or all tokens at once"""
    subspace: bool = False
    """only the component along the concept direction is replaced (pyvene_ext.methods.patching.subspace)"""
    metric: Literal["logit_diff", "probability", "rank", "accuracy"] = "logit_diff"
    """what is read at the last token"""

    @property
    def sites(self) -> list[str]:
        """Each site once, by its name in specs."""
        return list(dict.fromkeys(map(px.models.site_named, self.site)))

    @property
    def runs(self) -> tuple[str, str]:
        """Which text is base and which source."""
        return ("clean", "corrupt") if self.direction == "noise" else ("corrupt", "clean")


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "activation_patching", config.model, config.dataset)
    prompt_set = config.load_prompts()
    model, tokenizer = config.load_model()
    clean, corrupt = config.tokenize_pairs(prompt_set, model, tokenizer)
    names = wanted_names(clean, corrupt, config.positions)
    clean, corrupt, kept, dropped = px.methods.patchable(clean, corrupt, names, config.dataset, config.positions)
    base, source = (clean, corrupt) if config.direction == "noise" else (corrupt, clean)
    positions = distinct(names, base, source) if names else ("all",)
    specs = [
        spec
        for site in config.sites
        for position in positions
        for spec in px.all_patches(model.config, site, positions=position, subspace=config.subspace)
    ]
    passes = px.methods.patch_passes(model, specs, base, source, config.metric, memory=config.memory_bytes)
    work = f"{len(specs)} patches x {len(base)} pairs ({', '.join(config.sites)} at {', '.join(positions)})"
    if not run.announce(work, passes * px.runs.seconds_a_pass(model, base), n=len(prompt_set)):
        return

    # Every patch on every pair.
    result = px.patch(
        model,
        specs,
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

    # Mean scores over pairs, with intervals.
    change, gap = result.intervened - result.baseline, result.source - result.baseline
    score = px.stats.ratio_of_means(change, gap, px.rng(config.seed, "scores"), RESAMPLES)
    rows = table(specs, score, change)
    maps = maps_of(specs, score.mean, config.sites, len(positions))
    facts = px.metadata(
        model,
        **settings(config, base, source, kept, dropped, positions),
        **differences(result, config.seed),
        patches=[spec.where for spec in specs],
        mean_scores=score.mean.tolist(),
    )

    print(summary(config, facts, rows))
    with run.writing(facts, [evidence(config, facts, rows)], replacing=("*.npy", "figures/*")):
        run.table("patches", rows)
        for name, values in arrays(result, positions, maps).items():
            run.array(name, values)
        for name, figure in drawn(config, run.of, positions, maps).items():
            run.figure(name, figure)
        heads = list(dict.fromkeys((row["layer"], row["head"]) for row in rows if row["site"] == "z"))[: px.runs.HEADS]
        pairs = [f"pair {pair}" for pair in kept]
        run.views(px.runs.look(model, tokenizer, clean.input_ids, heads, names=pairs))


# -- what is run -------------------------------------------------------------------------------------------------------


def wanted_names(clean: px.TokenizedPrompts, corrupt: px.TokenizedPrompts, positions: str) -> tuple[str, ...]:
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


def distinct(names: tuple[str, ...], base: px.TokenizedPrompts, source: px.TokenizedPrompts) -> tuple[str, ...]:
    """The names in the order of their tokens (on average); of those at the same tokens of every pair, the first."""
    by_tokens: dict[tuple[int, ...], str] = {}
    for name in names:
        by_tokens.setdefault(tuple(at[name] for some in (base, source) for at in some.positions), name)
    where = {name: np.mean(tokens) for tokens, name in by_tokens.items()}
    return tuple(sorted(where, key=lambda name: where[name]))


def settings(
    config: Config,
    base: px.TokenizedPrompts,
    source: px.TokenizedPrompts,
    kept: list[int],
    dropped: list[int],
    positions: tuple[str, ...],
) -> dict[str, Any]:
    """What was run, for the summary."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "base_hash": base.hash,
        "source_hash": source.hash,
        "n": len(base),
        "n_dropped": len(dropped),
        "pairs": kept,
        "dropped": dropped,
        "direction": config.direction,
        "score_0": f"the {config.runs[0]} run",
        "score_1": f"the {config.runs[1]} run",
        "subspace": config.subspace,
        "metric": config.metric,
        "positions": list(positions),
        "answers": config.answers,
        "seed": config.seed,
        "helps_if_negative": ["change"] if config.direction == "noise" else [],
    }


# -- statistics --------------------------------------------------------------------------------------------------------


def differences(result: px.Patched, seed: int) -> dict[str, float | None]:
    """How far apart the two runs are, of which scores are shares."""
    gap = px.stats.paired_bootstrap(result.source, result.baseline, px.rng(seed, "gap"), RESAMPLES)
    return {
        "mean_base": float(result.baseline.mean()),
        "mean_source": float(result.source.mean()),
        "gap_low": px.stats.finite(gap.low),
        "gap_high": px.stats.finite(gap.high),
    }


def table(
    specs: list[px.ActivationPatch], score: px.Interval, change: Float[np.ndarray, "patch prompt"]
) -> list[dict[str, Any]]:
    """One row per patch, largest mean change of the metric first, which is the order of the scores' sizes."""
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


def maps_of(
    specs: list[px.ActivationPatch], scores: Float[np.ndarray, " patch"], sites: list[str], n_positions: int
) -> Maps:
    """The mean scores of each site."""
    layers = 1 + max(spec.layer or 0 for spec in specs)
    of_site = {site: scores[[spec.site == site for spec in specs]] for site in sites}
    return {site: values.reshape(n_positions, layers, -1) for site, values in of_site.items()}


def arrays(result: px.Patched, positions: tuple[str, ...], maps: Maps) -> dict[str, np.ndarray]:
    """All arrays by file name: for a site of heads one [layer head] per position, for any other site one [layer position]."""
    found: dict[str, np.ndarray] = {}
    for site, values in maps.items():
        if not px.models.has_heads(site):
            found[site] = values[..., 0].T
        elif len(positions) == 1:
            found[site] = values[0]
        else:
            found |= {f"{site}_{position}": of_heads for position, of_heads in zip(positions, values, strict=True)}
    found = {name: values.astype(np.float32) for name, values in found.items()}
    scores = result.score.astype(np.float32)
    return found | {"patched": result.intervened, "scores": scores, "base": result.baseline, "source": result.source}


# -- what is shown -----------------------------------------------------------------------------------------------------


def drawn(config: Config, of: str, positions: tuple[str, ...], maps: Maps) -> dict[str, Figure]:
    """One figure per site (and per position, for sites of heads)."""
    base, source = config.runs
    title = f"Activation patching ({config.direction})"
    label = f"mean score (0: {base} run, 1: {source} run)"
    return px.figures.site_maps(maps, positions, title=title, of=of, label=label)


def summary(config: Config, facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What the terminal shows: the pairs, what 0 and 1 are, and of every site the patches with the largest effect."""
    base, source = config.runs
    lines = [
        f"{config.model} on {config.dataset}: {facts['n']} pairs, {config.direction} ({source} activations into the {base} "
        f"run{', along one direction' * config.subspace}), positions: {', '.join(facts['positions'])}"
    ]
    if left_out := facts["dropped"]:
        some = ", ".join(map(str, left_out[:NAMED])) + (", ..." if len(left_out) > NAMED else "")
        lines.append(f"{px.io.counted(len(left_out), 'pair')} left out, whose texts differ in number of tokens: {some}")
    lines += [
        f"mean {config.metric}: {base} run {facts['mean_base']:.3f}, {source} run {facts['mean_source']:.3f}",
        f"score: 0 is the {base} run, 1 the {source} run",
    ]
    low, high = facts["gap_low"], facts["gap_high"]
    if low is None or high is None or low <= 0 <= high:
        lines.append("the two runs do not differ beyond chance (95% interval), so that scores mean little")
    for site in config.sites:
        lines.append(f"\n{site:>24}    score     95% interval    change")
        for row in [row for row in rows if row["site"] == site][:SHOWN]:
            interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"{row['patch']:>24} {row['score']:8.3f} {interval:>16} {row['change']:9.3f}")
    return "\n".join(lines)


def evidence(config: Config, facts: dict[str, Any], rows: list[dict[str, Any]]) -> px.runs.Evidence:
    """The largest score of the first site, heads where they were patched, beside the patch in the middle."""
    of_site = [row for row in rows if row["site"] == config.sites[0]]
    largest, scores = of_site[0], [abs(row["score"]) for row in of_site]
    effect = f"score of {largest['patch']}, the largest of {len(of_site)} patches,"
    control = f"the other patches, whose median |score| is {np.median(scores[1:]) if scores[1:] else np.nan:.2g}"
    interval = px.Interval(largest["score"], largest["low"], largest["high"])
    return px.runs.Evidence(f"{facts['n']} pairs", effect, interval, control, "a larger --limit or --dataset")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
