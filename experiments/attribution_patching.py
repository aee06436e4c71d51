"""How well do gradients predict patching? AtP, AtP*, EAP and EAP-IG against exact values.

    python experiments/attribution_patching.py
    python experiments/attribution_patching.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/attribution_patching.py --direction denoise --metric probability
    python experiments/attribution_patching.py --edges eap eap_ig_inputs eap_ig_activations --steps 10

Method. Pairs of a clean and a corrupt prompt; those whose token lengths differ are skipped and reported. `noise` puts corrupt
activations into the clean run, `denoise` clean ones into the corrupt run; delta = M(base) - M(patched), M being the logit
difference of the two answers. The effect of patching each head's z, q, k and v and each MLP's output by itself at all positions
is estimated three ways (`atp`, `edges`): AtP (Nanda 2023), AtP with the softmax recomputed for q and k (QK-fix), and AtP* (Kramar
et al. 2024), which adds GradDrop and has no sign. Nodes are patched exactly too (`patch`), which takes a run each: all of them in
a model that has no more than `--exact`, else a random sample of `--exact` of them, balanced over sites. Estimates are compared
with the exact values by rank over these nodes: signed means over prompts, and means of the absolute values. The edges of the
graph are scored by EAP (Syed et al. 2023) and EAP-IG (Hanna et al. 2024); their sums over receivers are compared with the exact
values of the senders.

Written to the folder OUT: exact.npy (NaN: not patched exactly), atp.npy, qk_fix.npy and atp_star.npy [patch prompt], and
nodes.csv, which names the patches; for every method of `--edges` an array [sender receiver prompt] (NaN: no edge), and edges.csv,
their means by name; agreement.csv, the correlations; figures; config.yaml (running it again gives the same); and summary.json,
what was run. The same command resumes an interrupted exact sweep.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float, Float32

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES = ("z", "q", "k", "v", "mlp_out")
ESTIMATES = ("atp", "qk_fix", "atp_star")
LABELS = {"exact": "patched", "atp": "AtP", "qk_fix": "AtP with QK-fix", "atp_star": "AtP*"}
UNSIGNED = "atp_star"
SHOWN = 10  # edges on the terminal
RESAMPLES = 1000
CELL = 0.09  # inches an edge takes in a figure

EdgeMethod = Literal["eap", "eap_ig_inputs", "eap_ig_activations"]
Scores = Mapping[str, Float32[np.ndarray, "patch prompt"]]
if TYPE_CHECKING:
    Edges = Mapping[EdgeMethod, px.methods.EdgeScores]


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts, px.flags.Memory):
    out: px.flags.Out = None
    batch_size: px.flags.BatchSize = 8
    direction: Literal["noise", "denoise"] = "noise"
    """noise: corrupt activations into the clean run; denoise: clean ones into the corrupt run"""
    metric: Literal["logit_diff", "probability"] = "logit_diff"
    """what is read at the last token"""
    edges: px.flags.OneOrMore[EdgeMethod] = ("eap", "eap_ig_inputs")
    """how edges are scored; eap_ig_activations takes 2 x layers + 1 times as long as eap_ig_inputs"""
    steps: px.flags.Count = 5
    """of integrated gradients"""
    exact: Annotated[int, Ge(3 * len(SITES))] = 150
    """nodes that are patched exactly, for comparison; a model with fewer has all of them patched"""


def main(config: Config) -> None:
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "attribution_patching", config.model, config.dataset)
    prompt_set = config.load_prompts()
    model, tokenizer = config.load_model()
    clean, corrupt = config.tokenize_pairs(prompt_set, model, tokenizer)
    kept = px.methods.pairs_of_equal_length(clean, corrupt, config.dataset)
    clean, corrupt = clean.take(kept), corrupt.take(kept)
    base, source = (clean, corrupt) if config.direction == "noise" else (corrupt, clean)
    patches = [spec for site in SITES for spec in px.all_patches(model.config, site)]
    px.methods.resolve_patches(model, patches, base, source, config.metric, qk_fix=True)
    for method in config.edges:
        px.methods.check_edges(model, base, source, config.metric, method, config.steps)
    checked = sampled(patches, config.exact, config.seed)
    nodes = [patches[number] for number in checked]
    passes = px.methods.patch_passes(model, nodes, base, source, config.metric, memory=config.memory_bytes)
    passes += gradient_passes(config, px.models.n_layers(model.config))
    work = f"{px.io.counted(len(base), 'pair')}: {len(patches)} nodes and all edges estimated, {len(nodes)} nodes patched exactly"
    if not run.announce(work, passes * px.runs.seconds_a_pass(model, base), n=len(prompt_set)):
        return

    # The effect of patches, exactly, and as gradients estimate it; the effect of every edge, as they estimate it.
    common: dict[str, Any] = {"metric": config.metric, "batch_size": config.batch_size}
    sweep: dict[str, Any] = {"memory": config.memory_bytes, "store": run.unfinished, "progress": px.is_main_process()}
    result = px.patch(model, nodes, base, source, **common, **sweep)
    if not px.is_main_process():
        return
    exact = np.full((len(patches), len(base)), np.nan, np.float32)
    exact[checked] = result.delta
    scores = {
        "exact": exact,
        "atp": px.methods.atp(model, patches, base, source, **common),
        "qk_fix": px.methods.atp_star(model, patches, base, source, grad_drop=False, **common),
        "atp_star": px.methods.atp_star(model, patches, base, source, **common),
    }
    edges = {
        method: px.methods.edge_attribution(model, base, source, method=method, steps=config.steps, **common)
        for method in config.edges
    }

    # How well the estimates agree with the exact effects.
    agreement = agreement_table(patches, scores, edges, config.seed)
    facts = px.metadata(
        model,
        **settings(config, base, source, kept, n_dropped=len(prompt_set) - len(kept)),
        mean_base=float(result.baseline.mean()),
        n_exact=len(checked),
        patches=[patch.name for patch in patches],
        **node_names(edges),
        agreement=[{key: None if value != value else value for key, value in row.items()} for row in agreement],
    )

    print(summary(config, facts, agreement, edges))
    with run.writing(facts, [evidence(facts, agreement)], replacing=("eap*.npy", "figures/*")):
        for name, values in arrays(scores, edges).items():
            run.array(name, values)
        run.table("nodes", node_table(patches, scores))
        run.table("edges", edge_table(edges))
        run.table("agreement", agreement)
        for name, figure in drawn(config, run.of, patches, scores, edges).items():
            run.figure(name, figure)


# -- what is run -------------------------------------------------------------------------------------------------------


def sampled(patches: list[px.ActivationPatch], n: int, seed: int) -> list[int]:
    """The indices of a random sample of `n` patches, balanced over sites; of all if there are no more."""
    by_site: dict[str, list[int]] = {}
    for number in px.rng(seed, "exact").permutation(len(patches)).tolist():
        by_site.setdefault(patches[number].site, []).append(number)
    in_turn = (of_turn for turn in zip_longest(*by_site.values()) for of_turn in turn if of_turn is not None)
    return sorted(islice(in_turn, n))


def gradient_passes(config: Config, layers: int) -> float:
    """What the estimates cost in forward passes over all pairs, a backward pass counted as two."""
    steps = {"eap": 1, "eap_ig_inputs": config.steps, "eap_ig_activations": config.steps * (2 * layers + 1)}
    atp, qk_fix, atp_star = 4, 5, 3 + 2 * layers  # each reads the source too; the last takes a backward pass a layer
    return atp + qk_fix + atp_star + sum(2 + 3 * steps[method] for method in config.edges)


def settings(
    config: Config, base: px.TokenizedPrompts, source: px.TokenizedPrompts, kept: list[int], n_dropped: int
) -> dict[str, Any]:
    """What was run, for the summary."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "base_hash": base.hash,
        "source_hash": source.hash,
        "n": len(base),
        "n_dropped": n_dropped,
        "pairs": kept,
        "direction": config.direction,
        "metric": config.metric,
        "steps": config.steps,
        "answers": config.answers,
        "seed": config.seed,
        "helps_if_negative": ["exact", "atp", "qk_fix", *config.edges] if config.direction == "denoise" else [],
    }


def node_names(edges: Edges) -> dict[str, list[str]]:
    """The rows and columns of the edges' arrays, for the summary."""
    first = next(iter(edges.values()))
    return {"senders": list(map(str, first.senders)), "receivers": list(map(str, first.receivers))}


# -- statistics --------------------------------------------------------------------------------------------------------


def site_matrix(
    site: str, patches: list[px.ActivationPatch], values: Float[np.ndarray, " patch"]
) -> Float[np.ndarray, "layer head"]:
    """The values of one site, or of "all" sites side by side."""
    parts = []
    for wanted in SITES if site == "all" else (site,):
        chosen = [i for i, patch in enumerate(patches) if patch.site == wanted]
        layers = 1 + max(patches[i].layer or 0 for i in chosen)
        parts.append(values[chosen].reshape(layers, -1))
    return np.concatenate(parts, 1)


def means(scores: Scores, name: str, of: str, dtype: type[np.floating] | None = None) -> Float[np.ndarray, " patch"]:
    """Means over prompts: "signed", or "size" of the absolute values."""
    values = scores[name]
    return (values if of == "signed" else np.abs(values)).mean(1, dtype=dtype)


def agreement_table(patches: list[px.ActivationPatch], scores: Scores, edges: Edges, seed: int) -> list[dict[str, Any]]:
    """One row for each estimate, site and comparison ("signed": means over prompts; "size": means of absolute values)."""

    def row(estimate: str, site: str, of: str, a: Float[np.ndarray, "layer head"], b: Any) -> dict[str, Any]:
        found = px.stats.correlate_heads(a, b, seed, n_resamples=RESAMPLES)
        rank, line = found.spearman, found.pearson
        return {
            "estimate": estimate,
            "site": site,
            "of": of,
            "n": found.n,
            "spearman": rank.r,
            "low": rank.low,
            "high": rank.high,
            "p_within_layers": rank.p_within_layers,
            "pearson": line.r,
        }

    rows = []
    for estimate in ESTIMATES:
        for of in ("size",) if estimate == UNSIGNED else ("signed", "size"):
            guess, exact = (means(scores, name, of, np.float64) for name in (estimate, "exact"))
            for site in ("all", *SITES):
                rows.append(
                    row(estimate, site, of, site_matrix(site, patches, guess), site_matrix(site, patches, exact))
                )
    exact = means(scores, "exact", "signed", np.float64)
    for method, found in edges.items():
        sums = np.nansum(found.per_prompt, 1, dtype=np.float64).mean(1)
        for site in ("z", "mlp_out"):
            of_nodes = site_matrix(site, patches, exact)
            by_layer = sums[[node.site == site for node in found.senders]].reshape(len(of_nodes), -1)
            rows.append(row(f"{method}, summed", site, "signed", by_layer, of_nodes))
    return rows


def node_table(patches: list[px.ActivationPatch], scores: Scores) -> list[dict[str, Any]]:
    """One row per patch, in the order of the arrays: means over prompts, of the values and of their sizes."""
    rows = []
    for number, patch in enumerate(patches):
        row: dict[str, Any] = {"patch": patch.where, "site": patch.site, "layer": patch.layer}
        row["head"] = "" if patch.heads is None else patch.heads[0]
        for name, values in scores.items():
            if name != UNSIGNED:
                row[name] = float(values[number].mean())
            row[f"abs_{name}"] = float(np.abs(values[number]).mean())
        rows.append(row)
    return rows


def edge_table(edges: Edges) -> list[dict[str, Any]]:
    """One row per edge with its mean by every method, the largest of the last method first."""
    *_, last = edges.values()
    by_method = {method: dict(found.ranked()) for method, found in edges.items()}
    return [{"edge": name, **{method: found[name] for method, found in by_method.items()}} for name, _ in last.ranked()]


def arrays(scores: Scores, edges: Edges) -> dict[str, np.ndarray]:
    """All arrays by file name."""
    of_nodes = {name: values.astype(np.float32) for name, values in scores.items()}
    return {**{method: found.per_prompt for method, found in edges.items()}, **of_nodes}


# -- what is shown -----------------------------------------------------------------------------------------------------


def drawn(
    config: Config, of: str, patches: list[px.ActivationPatch], scores: Scores, edges: Edges
) -> dict[str, Figure]:
    """By name: a map for every score and site of heads, every estimate against the exact values, and the edges."""
    figures = {}
    helpful: Any = "positive" if config.direction == "noise" else "negative"  # of base - patched
    for name in scores:
        kind = "size" if name == UNSIGNED else "signed"
        mean, quantity = means(scores, name, kind), f"mean {'|delta|' if kind == 'size' else 'delta'} ({config.metric})"
        for site in ("q", "k") if name == "qk_fix" else ("z", "q", "k", "v"):
            heads, title = site_matrix(site, patches, mean), f"{LABELS[name]}, {site}: {of}"
            figures[f"{name}_{site}"] = px.figures.head_heatmap(
                heads, title, quantity, diverging=kind == "signed", helpful=helpful, missing="not patched"
            )
        if name != "exact":
            estimated, exact = (site_matrix("all", patches, x) for x in (mean, means(scores, "exact", kind)))
            figures[f"{name}_against_exact"] = px.figures.scatter_heads(
                estimated,
                exact,
                name_a=LABELS[name],
                name_b=LABELS["exact"],
                quantity=quantity,
                correlation=px.stats.correlate_heads(estimated, exact, config.seed, n_resamples=RESAMPLES),
                title=f"{LABELS[name]} against activation patching: {of}",
            )
    for method, found in edges.items():
        title, label = f"Edges by {method}: {of}", f"mean estimate of delta ({config.metric})"
        nodes = found.senders, found.receivers
        figures[method] = px.figures.edge_matrix(found.matrix, *nodes, title, label, cell=CELL, helpful=helpful)
        look: dict[str, Any] = {"nodes": nodes[0], "helpful": helpful}
        figures[f"{method}_edges"] = px.figures.edge_graph(dict(found.ranked()), title, label, **look)
    return figures


def summary(config: Config, facts: dict[str, Any], agreement: list[dict[str, Any]], edges: Edges) -> str:
    """What the terminal shows: the pairs, how estimates agree with exact values, and the largest edges."""
    lines = [
        f"{config.model} on {config.dataset}: {px.io.counted(facts['n'], 'pair')}, {facts['n_dropped']} left out for unequal "
        f"lengths; {config.direction}",
        f"base: mean {config.metric} {facts['mean_base']:.2f}",
        "",
        f"Spearman's correlation with exact patching, over {facts['n_exact']} of {len(facts['patches'])} nodes",
        f"{'':36}" + "".join(f"{site:>9}" for site in ("all", *SITES)),
    ]
    found = {(row["estimate"], row["of"], row["site"]): row["spearman"] for row in agreement}
    for estimate, of in dict.fromkeys((row["estimate"], row["of"]) for row in agreement):
        cells = [found.get((estimate, of, site)) for site in ("all", *SITES)]
        lines.append(f"{f'{estimate} ({of})':36}" + "".join(f"{'' if c is None else f'{c:.3f}':>9}" for c in cells))
    for method, scores in edges.items():
        lines += ["", f"largest edges by {method}"]
        lines += [f"  {name:28} {value:9.4f}" for name, value in scores.ranked()[:SHOWN]]
    return "\n".join(lines)


def evidence(facts: dict[str, Any], agreement: list[dict[str, Any]]) -> px.runs.Evidence:
    """How well AtP ranks the nodes of all sites, beside nodes that trade places within their layer."""
    row = next(row for row in agreement if (row["estimate"], row["site"], row["of"]) == ("atp", "all", "signed"))
    n, of = facts["n_exact"], len(facts["patches"])
    effect = f"rank correlation of AtP with patching, over {n} of {of} nodes,"
    control = f"nodes permuted within layers, p = {row['p_within_layers']:.2g}"
    interval = px.Interval(row["spearman"], row["low"], row["high"])
    sharpen = "a larger --exact" if n < of else "a larger --limit or --dataset"
    return px.runs.Evidence(px.io.counted(facts["n"], "pair"), effect, interval, control, sharpen)


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
