"""What do gradients say of activation patching, and how right are they? AtP, AtP*, EAP and EAP-IG against exact values.

    python experiments/attribution_patching.py
    python experiments/attribution_patching.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/attribution_patching.py --direction denoise --metric probability
    python experiments/attribution_patching.py --edges eap eap_ig_inputs eap_ig_activations --steps 10

Method. Pairs of a clean and a corrupt prompt; those whose token lengths differ are left out and counted. `noise` puts corrupt
activations into the clean run, `denoise` clean ones into the corrupt run; delta = M(base) - M(patched), M being the logit
difference of the two answers. Every head's z, q, k and v and every MLP's output is patched by itself at all positions, exactly
(`sweep`), and estimated three ways (`atp`, `edges`): AtP (Nanda 2023), AtP with the
softmax recomputed for q and k (QK-fix), and AtP* (Kramar et al. 2024), which adds GradDrop and has no sign. Estimates are held
to the exact values by rank over nodes: signed means over prompts, and means of the absolute values. The edges of the graph have
scores by EAP (Syed et al. 2023) and EAP-IG (Hanna et al. 2024); their sums over receivers are held to the exact values of the
senders.

Written to the folder OUT: exact.npy, atp.npy, qk_fix.npy and atp_star.npy [patch prompt], and nodes.csv, which names the patches;
for every method of `--edges` an array [sender receiver prompt] (NaN: no edge), and edges.csv, their means by name;
agreement.csv, the correlations; figures; config.yaml (running it again gives the same); and summary.json, what was run. An exact
sweep that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jaxtyping import Float, Float32
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from modelcards import n_layers
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import (
    output_path,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.methods.attribution.atp import atp, atp_star, resolve_patches
from pyvene_ext.methods.attribution.edges import (
    EdgeMethod,
    EdgeScores,
    check_edges,
    edge_attribution,
)
from pyvene_ext.methods.patching.pairs import both_texts
from pyvene_ext.methods.patching.patch import all_patches
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import Answers
from pyvene_ext.runs import figures
from pyvene_ext.runs.facts import metadata
from pyvene_ext.runs.sweeps import discard, unfinished_in
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.joint import needs
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.stats.correlations import correlate_heads

SITES = ("z", "q", "k", "v", "mlp_out")
ESTIMATES = ("atp", "qk_fix", "atp_star")
LABELS = {"exact": "patched", "atp": "AtP", "qk_fix": "AtP with QK-fix", "atp_star": "AtP*"}
SHOWN = 10  # edges on the terminal
CLIPPED = 0.995  # of the edges' sizes lie within the colour scale

Scores = Float32[np.ndarray, "patch prompt"]


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file with clean and corrupt, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the folder of what is written; by default outputs/attribution_patching/MODEL_DATASET"""
    direction: Literal["noise", "denoise"] = "noise"
    """noise: corrupt activations into the clean run; denoise: clean ones into the corrupt run"""
    metric: Literal["logit_diff", "probability"] = "logit_diff"
    """what is read at the last token"""
    edges: tuple[EdgeMethod, ...] = ("eap", "eap_ig_inputs")
    """how edges are scored; eap_ig_activations takes 2 x layers + 1 times as long as eap_ig_inputs"""
    steps: int = 5
    """of integrated gradients"""
    answers: Answers = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""
    memory: float | None = None
    """GiB of working memory of the exact sweep, besides the weights; by default half of what the weights take, at least 0.25"""
    batch_size: int = 8
    """prompts a forward and backward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of the bootstrap and the permutations of correlations"""


def main(config: Config) -> None:
    # What is run. Everything that can be wrong is found before the first forward pass.
    if not config.edges or len(set(config.edges)) < len(config.edges):
        raise ValueError("--edges names one or more methods, each once.")
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more, not {config.batch_size}.")
    if config.memory is not None and not 0 < config.memory < float("inf"):
        raise ValueError(f"--memory must be above 0, not {config.memory}.")
    if config.steps < 1:
        raise ValueError(f"--steps must be a whole number from 1 on, not {config.steps}.")
    folder = folder_of(config)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    clean, corrupt = both_texts(prompt_set, model, tokenizer, config.answers)
    kept = [i for i, ids in enumerate(clean.input_ids) if len(ids) == len(corrupt.input_ids[i])]
    if not kept:
        raise ValueError(f"no pair of {config.dataset} has prompts of equal length in tokens; edges need such pairs.")
    base, source = (some.take(kept) for some in (clean, corrupt)[:: 1 if config.direction == "noise" else -1])
    patches = [spec for site in SITES for spec in all_patches(model.config, site)]
    resolve_patches(model, patches, base, source, config.metric, qk_fix=True)
    for method in config.edges:
        check_edges(model, base, source, config.metric, method, config.steps)

    # Every patch exactly, then by gradients.
    wanted = needs(patches)._asdict()
    memory = None if config.memory is None else int(config.memory * 2**30)
    with unfinished_in(folder / "unfinished", model, patches, base, config.metric, memory=memory) as sweep:
        reference = Reference.compute(model, source, **wanted, batch_size=config.batch_size, cache_dir=None)
        result = sweep(model, patches, base, config.metric, reference)
    if not is_main_process():
        return
    common: dict[str, Any] = {"metric": config.metric, "batch_size": config.batch_size}
    scores: dict[str, Scores] = {
        "exact": result.delta,
        "atp": atp(model, patches, base, source, **common),
        "qk_fix": atp_star(model, patches, base, source, grad_drop=False, **common),
        "atp_star": atp_star(model, patches, base, source, **common),
    }
    edges = {
        method: edge_attribution(model, base, source, method=method, steps=config.steps, **common)
        for method in config.edges
    }
    agreement = agreement_table(model.config, patches, scores, edges, config.seed)

    # The files. The summary comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    for earlier in (*folder.glob("eap*.npy"), *folder.glob("figures/*")):
        earlier.unlink()
    for method, found in edges.items():
        write_npy(folder / f"{method}.npy", found.per_prompt)
    for estimate, values in scores.items():
        write_npy(folder / f"{estimate}.npy", values.astype(np.float32))
    write_csv(folder / "nodes.csv", node_table(patches, scores))
    write_csv(folder / "edges.csv", edge_table(edges))
    write_csv(folder / "agreement.csv", agreement)
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    draw_nodes(folder / "figures", name, model.config, patches, scores, config)
    for method, found in edges.items():
        drawing = edge_matrix(found, f"Edges by {method}: {name}", f"mean estimate of delta ({config.metric})")
        figures.save(drawing, folder / f"figures/{method}.png")
    write_config(folder / "config.yaml", config)
    first = next(iter(edges.values()))
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        base_hash=base.hash,
        source_hash=source.hash,
        n=len(base),
        n_dropped=len(clean) - len(kept),
        pairs=kept,
        direction=config.direction,
        metric=config.metric,
        steps=config.steps,
        answers=config.answers,
        seed=config.seed,
        mean_base=float(result.clean.mean()),
        patches=[patch.name for patch in patches],
        senders=list(map(str, first.senders)),
        receivers=list(map(str, first.receivers)),
        agreement=[{key: None if value != value else value for key, value in row.items()} for row in agreement],
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")

    print(summary(config, result.clean, len(clean) - len(kept), agreement, edges))
    print("\nwritten:", f"{folder}/ (scores, edges, tables, figures, summary)", sep="\n  ")


def folder_of(config: Config) -> Path:
    """Where everything is written; a ValueError if that cannot be."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    return output_path(config.out, Path("outputs/attribution_patching") / name)


def of_site(
    site: str, patches: list[ActivationPatch], values: Float[np.ndarray, " patch"]
) -> Float[np.ndarray, "layer head"]:
    """The values of one site, or of "all" sites side by side."""
    parts = []
    for wanted in SITES if site == "all" else (site,):
        chosen = [i for i, patch in enumerate(patches) if patch.site == wanted]
        layers = 1 + max(patches[i].layer or 0 for i in chosen)
        parts.append(values[chosen].reshape(layers, -1))
    return np.concatenate(parts, 1)


def agreement_table(
    config: Any,
    patches: list[ActivationPatch],
    scores: dict[str, Scores],
    edges: dict[EdgeMethod, EdgeScores],
    seed: int,
) -> list[dict[str, Any]]:
    """One row for each estimate, site and comparison ("signed": means over prompts; "size": means of absolute values)."""

    def row(estimate: str, site: str, of: str, a: Float[np.ndarray, "layer head"], b: Any) -> dict[str, Any]:
        found = correlate_heads(a, b, seed, n_resamples=1000)
        rank, line = found.spearman, found.pearson
        return {
            "estimate": estimate,
            "site": site,
            "of": of,
            "n": found.n,
            "spearman": rank.r,
            "low": rank.low,
            "high": rank.high,
            "pearson": line.r,
        }

    rows = []
    for estimate in ESTIMATES:
        for of in ("signed", "size"):
            if (estimate, of) == ("atp_star", "signed"):
                continue  # it has no sign
            guess, exact = (
                (values if of == "signed" else np.abs(values)).mean(1, dtype=np.float64)
                for values in (scores[estimate], scores["exact"])
            )
            for site in ("all", *SITES):
                rows.append(row(estimate, site, of, of_site(site, patches, guess), of_site(site, patches, exact)))
    exact = scores["exact"].mean(1, dtype=np.float64)
    for method, found in edges.items():
        sums = np.nansum(found.per_prompt, 1, dtype=np.float64).mean(1)
        for site in ("z", "mlp_out"):
            chosen = [i for i, node in enumerate(found.senders) if node.site == site]
            by_layer = sums[chosen].reshape(n_layers(config), -1)
            rows.append(row(f"{method}, summed", site, "signed", by_layer, of_site(site, patches, exact)))
    return rows


def node_table(patches: list[ActivationPatch], scores: dict[str, Scores]) -> list[dict[str, Any]]:
    """One row a patch, in the order of the arrays: means over prompts, of the values and of their sizes."""
    rows = []
    for number, patch in enumerate(patches):
        row: dict[str, Any] = {"patch": patch.where, "site": patch.site, "layer": patch.layer}
        row["head"] = "" if patch.heads is None else patch.heads[0]
        for name, values in scores.items():
            if name != "atp_star":  # it has no sign
                row[name] = float(values[number].mean())
            row[f"abs_{name}"] = float(np.abs(values[number]).mean())
        rows.append(row)
    return rows


def edge_table(edges: dict[EdgeMethod, EdgeScores]) -> list[dict[str, Any]]:
    """One row an edge with its mean by every method, the largest of the last method first."""
    *_, last = edges.values()
    means = {method: dict(found.ranked()) for method, found in edges.items()}
    return [{"edge": name, **{method: values[name] for method, values in means.items()}} for name, _ in last.ranked()]


def draw_nodes(
    folder: Path, name: str, config: Any, patches: list[ActivationPatch], scores: dict[str, Scores], flags: Config
) -> None:
    """A heat map for every site of heads and score, and a scatter plot of every estimate against the exact values."""
    for score, values in scores.items():
        size = score == "atp_star"
        mean = np.abs(values).mean(1) if size else values.mean(1)
        for site in ("q", "k") if score == "qk_fix" else ("z", "q", "k", "v"):
            drawing = figures.head_heatmap(
                of_site(site, patches, mean),
                f"{LABELS[score]}, {site}: {name}",
                f"mean {'|delta|' if size else 'delta'} ({flags.metric})",
                diverging=not size,
            )
            figures.save(drawing, folder / f"{score}_{site}.png")
        if score != "exact":
            exact = np.abs(scores["exact"]).mean(1) if size else scores["exact"].mean(1)
            a, b = of_site("all", patches, mean), of_site("all", patches, exact)
            scatter = figures.scatter_heads(
                a,
                b,
                name_a=LABELS[score],
                name_b=LABELS["exact"],
                quantity=f"mean {'|delta|' if size else 'delta'} ({flags.metric})",
                correlation=correlate_heads(a, b, flags.seed, n_resamples=1000),
                title=f"{LABELS[score]} against activation patching, every node: {name}",
            )
            figures.save(scatter, folder / f"{score}_against_exact.png")


def edge_matrix(scores: EdgeScores, title: str, label: str) -> Figure:
    """Senders down, receivers across, both in the order of the model's layers; grey where there is no edge."""
    matrix = scores.matrix
    limit = float(np.quantile(np.abs(matrix[scores.exists]), CLIPPED)) or 1.0
    beyond = np.abs(matrix[scores.exists]).max() > limit
    with matplotlib.rc_context(figures.STYLE):
        cell = min(0.09, 9.0 / max(matrix.shape))
        figure = Figure(figsize=(max(4.5, matrix.shape[1] * cell + 1.9), max(3.2, matrix.shape[0] * cell + 1.3)))
        axes = figure.add_subplot()
        axes.set_facecolor("#dcdcdc")
        image = axes.imshow(
            np.ma.masked_invalid(matrix),
            cmap=figures.DIVERGING,
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
        )
        layer_ticks(axes.yaxis, scores.senders)
        layer_ticks(axes.xaxis, scores.receivers)
        axes.set_title(title)
        axes.set_xlabel("receiver (layer; in each q, k, v of its heads, then the MLP)")
        axes.set_ylabel("sender (layer; in each its heads, then the MLP)")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, label=label, extend="both" if beyond else "neither", fraction=0.04)
        bar.outline.set_visible(False)
    return figure


def layer_ticks(axis: Axis, nodes: tuple[Node, ...]) -> None:
    """A tick where a layer's nodes begin, and one at the node that belongs to none."""
    first = {("" if n.layer is None else str(n.layer)) or n.site: i for i, n in reversed(list(enumerate(nodes)))}
    axis.set_ticks(list(first.values()), labels=list(first))


def summary(
    config: Config,
    clean: Float[np.ndarray, " prompt"],
    dropped: int,
    agreement: list[dict[str, Any]],
    edges: dict[EdgeMethod, EdgeScores],
) -> str:
    """What the terminal shows: the pairs, how estimates agree with exact values, and the largest edges."""
    lines = [
        f"{config.model} on {config.dataset}: {len(clean)} pairs, {dropped} left out for unequal lengths; {config.direction}",
        f"base: mean {config.metric} {clean.mean():.2f}",
        "",
        "Spearman's correlation with exact patching, over nodes",
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


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
