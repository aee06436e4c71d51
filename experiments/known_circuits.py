"""Which method finds a circuit that is known? Path patching and attribution on planted circuits, and on the shipped models.

    python experiments/known_circuits.py
    python experiments/known_circuits.py --models tiny-qwen2.5 tiny-llama3.1 --limit 16 --steps 20
    python experiments/known_circuits.py --models smollm2-135m-instruct --exact 1000

Method. Planted models (`tiny/planted_circuits.py`) have weights set by hand, so that their edges are known. Every edge is scored
by its mean |effect| on the logit difference, corrupt into clean: exactly, by path patching with MLPs frozen, and to first order
by EAP (Syed et al. 2023) and EAP-IG of inputs and of activations (Hanna et al. 2024). A score is as good as its ranking: AUROC,
the chance that a planted edge ranks above another, and precision at k, the share of planted edges among the k highest, k being
their number. Where a softmax is saturated or a backup waits, a linear method must fail.

No circuit of a trained model is known to this study, whichever `--models` names. They have the rank correlation (Spearman) of
each method with the exact value, over edges by path patching, and over nodes (z, q, k, v of heads, MLPs) by activation patching,
with AtP (Nanda 2023) and AtP* (Kramar et al. 2024): over all of them, or `--exact` at random, as each takes a run.

Written to the folder OUT: planted.csv, trained.csv, config.yaml (running it again gives the same), and summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = Float[np.ndarray, "item prompt"]
Methods = Mapping[str, Callable[..., Scores]]
Rows = list[dict[str, Any]]
MANY = 200  # edges from which on a bar is shown
RESAMPLES = 2000


@dataclass(frozen=True)
class Config(px.flags.Loading, px.flags.Prompts):
    models: px.flags.OneOrMore[px.flags.ModelName] = ("tiny-qwen2.5", "tiny-gemma2", "tiny-llama3.1")
    """shipped or fetched models, folders, or names on the hub, for the rank correlations"""
    exact: px.flags.Count | None = None
    """patch so many edges, and nodes, of each of them exactly, drawn at random; by default all"""
    limit: px.flags.Limit = 4
    """pairs of prompts of the trained models"""
    batch_size: px.flags.BatchSize = 8
    planted_prompts: px.flags.Count = 4
    """pairs of prompts of each planted circuit"""
    steps: px.flags.Count = 5
    """of the integrated gradients"""
    out: px.flags.Out = None
    seed: px.flags.Seed = 0
    """of the planted models' distractors and prompts"""


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # small models, and few prompts
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "known_circuits")
    prompt_set = config.load_prompts()
    trained = {name: config.load(name) for name in config.models}
    pairs = {name: config.tokenize_pairs(prompt_set, *loaded) for name, loaded in trained.items()}
    of_edges, of_nodes = edge_methods(config), node_methods(config)
    items = {
        name: {"edges": drawn(config, all_edges(model)), "nodes": drawn(config, all_nodes(model))}
        for name, (model, _) in trained.items()
    }
    most = max(len(all_edges(model)) for model, _ in trained.values())
    edges, nodes = (sum(len(of_model[over]) for of_model in items.values()) for over in ("edges", "nodes"))
    costs = [cost(config, model, items[name], *pairs[name]) for name, (model, _) in trained.items()]
    each, once = map(sum, zip(*costs, strict=True))
    work = f"planted circuits, then {edges} edges and {nodes} nodes of {', '.join(trained)} patched exactly"
    if not run.announce(work, each + once, n=most, limit="exact", fixed=once):
        return

    # Planted circuits: does the ranking of edges find them?
    on_planted = planted_table(of_edges, config.planted_prompts, config.seed)

    # Trained models: does an approximation rank edges and nodes as the exact values do?
    on_trained: Rows = []
    for name in tqdm(trained, desc="trained models", unit="model"):
        model, _ = trained[name]
        for over, methods in (("edges", of_edges), ("nodes", of_nodes)):
            some = items[name][over]
            found = agreement(methods, model, some, *pairs[name])
            on_trained += [{"model": name, "over": over, "n": len(some), **row} for row in found]

    model, _ = trained[config.models[0]]
    facts = px.metadata(model, models=list(config.models), seed=config.seed)
    print(summary(on_planted, on_trained, list(of_edges)))
    with run.writing(facts | {"planted": on_planted, "trained": on_trained}, [evidence(config, on_planted)]):
        run.table("planted", on_planted)
        run.table("trained", on_trained)


def drawn(config: Config, items: list[Any]) -> list[Any]:
    """`--exact` of them at random, in their order; by default all."""
    if config.exact is None or config.exact >= len(items):
        return items
    chosen = px.rng(config.seed, "exact").permutation(len(items))[: config.exact]
    return [items[number] for number in sorted(chosen.tolist())]


def cost(
    config: Config,
    model: PreTrainedModel,
    items: Mapping[str, list[Any]],
    clean: px.TokenizedPrompts,
    corrupt: px.TokenizedPrompts,
) -> tuple[float, float]:
    """About how many seconds exact patching of a trained model takes, and the rest."""
    layers = px.models.n_layers(model.config)
    gradients = 20 + 2 * layers + 3 * config.steps * (2 * layers + 2)  # a backward pass counts as two passes
    exact = sum(
        px.methods.patch_passes(model, specs, clean, corrupt) for specs in (paths_of(items["edges"]), items["nodes"])
    )
    a_pass = px.runs.seconds_a_pass(model, clean)
    return exact * a_pass, gradients * a_pass


def planted_table(methods: Methods, n_prompts: int, seed: int) -> Rows:
    """One row a circuit, architecture and method: how well the ranking of edges finds the planted ones."""
    from tiny import planted_circuits

    rows = []
    for name in tqdm(planted_circuits.CASES, desc="planted circuits", unit="circuit"):
        for architecture in planted_circuits.ARCHITECTURES:
            case = planted_circuits.planted(name, architecture, n_prompts=n_prompts, seed=seed)
            edges = all_edges(case.model)
            known = np.array([edge in case.edges for edge in edges])
            for method, score in methods.items():
                sizes = np.abs(score(case.model, edges, case.clean, case.corrupt)).mean(1)
                row = {"circuit": name, "architecture": architecture, "method": method, "n_planted": int(known.sum())}
                found = {"auroc": px.stats.auroc(sizes, known), "precision": px.stats.precision_at_k(sizes, known)}
                rows.append(row | found)
    return rows


def agreement(
    methods: Methods,
    model: PreTrainedModel,
    items: Sequence[Any],
    clean: px.TokenizedPrompts,
    corrupt: px.TokenizedPrompts,
) -> Rows:
    """The rank correlation of each method with the exact values, which come first."""
    sizes = {method: np.abs(score(model, items, clean, corrupt)).mean(1) for method, score in methods.items()}
    exact, *others = sizes.items()
    return [{"method": m, "spearman": px.stats.rank_correlation(exact[1], of_method)} for m, of_method in others]


# -- scores of edges and nodes: delta of every one of them on every prompt ---------------------------------------------


def all_edges(model: PreTrainedModel) -> list[str]:
    """Every edge by its name."""
    senders, receivers = px.specs.senders(model.config), px.specs.receivers(model.config)
    return [f"{s}->{r}" for s in senders for r in receivers if px.specs.reaches(s, r)]


def paths_of(edges: Sequence[str]) -> list[px.PathPatch]:
    """The path along each edge, which no MLP between its ends takes part in."""
    ends = [edge.split("->") for edge in edges]
    return [px.PathPatch(sender=sender, receivers=(receiver,), freeze_mlps=True) for sender, receiver in ends]


def all_nodes(model: PreTrainedModel) -> list[px.ActivationPatch]:
    """A patch of every head's z, q, k and v and every MLP."""
    return [spec for site in ("z", "q", "k", "v", "mlp_out") for spec in px.all_patches(model.config, site)]


def edge_methods(config: Config) -> Methods:
    """The exact one first: path patching with MLPs frozen."""

    def exact(
        model: PreTrainedModel, edges: Sequence[str], clean: px.TokenizedPrompts, corrupt: px.TokenizedPrompts
    ) -> Scores:
        shown = len(edges) > MANY  # the longest part
        paths = paths_of(edges)
        return px.patch(model, paths, clean, corrupt, batch_size=config.batch_size, progress=shown).delta

    def by_gradient(
        model: PreTrainedModel,
        edges: Sequence[str],
        clean: px.TokenizedPrompts,
        corrupt: px.TokenizedPrompts,
        method: Any = "eap",
    ) -> Scores:
        options: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size, "progress": False}
        found = px.methods.edge_attribution(model, clean, corrupt, method=method, **options)
        return np.stack([found.edge(edge) for edge in edges])

    return {
        "exact": exact,
        "EAP": by_gradient,
        "EAP-IG inputs": partial(by_gradient, method="eap_ig_inputs"),
        "EAP-IG activations": partial(by_gradient, method="eap_ig_activations"),
    }


def node_methods(config: Config) -> Methods:
    """The exact one first: activation patching."""
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": False}

    def exact(
        model: PreTrainedModel,
        nodes: Sequence[px.ActivationPatch],
        clean: px.TokenizedPrompts,
        corrupt: px.TokenizedPrompts,
    ) -> Scores:
        return px.patch(model, nodes, clean, corrupt, **options).delta

    return {
        "exact": exact,
        "AtP": partial(px.methods.atp, **options),
        "AtP, QK-fix": partial(px.methods.atp_star, grad_drop=False, **options),
        "AtP*": partial(px.methods.atp_star, **options),
    }


def summary(on_planted: Rows, on_trained: Rows, methods: list[str]) -> str:
    """What the terminal shows: both tables."""
    lines = ["AUROC / precision at k of the planted edges", f"{'circuit':26}" + "".join(f"{m:>20}" for m in methods)]
    rows = {(r["circuit"], r["architecture"], r["method"]): r for r in on_planted}
    for circuit, architecture in dict.fromkeys((r["circuit"], r["architecture"]) for r in on_planted):
        cells = [rows[circuit, architecture, method] for method in methods]
        lines.append(
            f"{circuit + ', ' + architecture:26}" + "".join(f"{c['auroc']:13.3f} / {c['precision']:.2f}" for c in cells)
        )
    width = max(16, *(len(row["model"]) for row in on_trained))
    lines += [
        "",
        "trained models, of which no circuit is known: rank correlation with patching each edge or node exactly (Spearman)",
        f"{'model':{width}}{'over':>16}  method",
    ]
    lines += [f"{r['model']:{width}}{r['n']:>10} {r['over']}  {r['method']:20}{r['spearman']:6.3f}" for r in on_trained]
    return "\n".join(lines)


def evidence(config: Config, on_planted: Rows) -> px.runs.Evidence:
    """How much better the exact method finds planted edges than the first that estimates, over the planted circuits."""
    exact, eap, *_ = edge_methods(config)
    first, second = (np.array([row["auroc"] for row in on_planted if row["method"] == m]) for m in (exact, eap))
    found = px.stats.paired_bootstrap(first, second, px.rng(config.seed, "planted"), RESAMPLES)
    control = f"edges in random order, 0.5; {eap} {second.mean():.2f}"
    effect = f"AUROC of exact path patching above that of {eap}"
    return px.runs.Evidence(f"{len(first)} planted circuits", effect, found, control, "a larger --planted_prompts")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
