"""Which method finds a circuit that is known? Methods on planted and trained circuits, and approximations on other models.

    python experiments/known_circuits.py
    python experiments/known_circuits.py --methods path_patching eap eap_ig_inputs --planted_prompts 16
    python experiments/known_circuits.py --models smollm2-135m-instruct --exact 1000

Method. Two kinds of models have a known circuit: planted ones, whose weights are set by hand (`tiny/planted_circuits.py`), and
tiny-circuit, which was trained to have it (`tiny/train_tiny_circuit.py`; SIIT, Gupta et al. 2024). Every method of
`pyvene_ext.methods.circuits.scoring` scores all of their edges on pairs of prompts, corrupt into clean, by the logit difference.
Each is judged by

    AUROC       the chance that an edge of the circuit has a larger |score| than another
    precision   the share of the circuit's edges among the k largest |scores|, k being their number
    CPR, CMD    areas under faithfulness by size (Mueller et al. 2025; `circuit_localization.py`), on as many other pairs, with
                bootstrap 95% intervals; undefined where the model's mean logit difference is that of the empty circuit

"known" is the circuit itself as a score, 1 or 0. CPR can be above its: circuits without the edges that hinder, such as those of a
negative head, do better than the model. Where a softmax is saturated or a backup waits, a linear method must fail.

No circuit of other trained models is known to this study, whichever `--models` names. They have the rank correlation (Spearman)
of approximations with the exact mean |effect|, over edges by path patching with EAP (Syed et al. 2023) and EAP-IG (Hanna et al.
2024), and over nodes (z, q, k, v of heads, MLPs) by activation patching with AtP (Nanda 2023) and AtP* (Kramar et al. 2024): over
all of them, or `--exact` at random, as each takes a run.

Written to the folder OUT: known.csv and trained.csv, the figure known, config.yaml (running it again gives the same), and
summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from annotated_types import Le
from jaxtyping import Float
from tqdm import tqdm

import pyvene_ext as px

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Pairs = tuple[px.TokenizedPrompts, px.TokenizedPrompts]

Method = Literal["path_patching", "eap", "eap_ig_inputs", "eap_ig_activations", "flow", "mask", "acdc", "random"]
Scores = Float[np.ndarray, "item prompt"]
Methods = Mapping[str, Callable[..., Scores]]
Rows = list[dict[str, Any]]
MANY = 200  # edges from which on a bar is shown
RESAMPLES = 2000
ALL: tuple[Method, ...] = get_args(Method)
MEASURES = {"auroc": "AUROC", "cpr": "CPR", "cmd": "CMD"}


@dataclass(frozen=True)
class Config(px.flags.Loading, px.flags.Prompts):
    models: px.flags.OneOrMore[px.flags.ModelName] = ("tiny-qwen2.5", "tiny-gemma2", "tiny-llama3.1")
    """shipped or fetched models, folders, or names on the hub, for the rank correlations"""
    exact: px.flags.Count | None = None
    """patch this many edges, and nodes, of each of them exactly, drawn at random; by default all"""
    limit: px.flags.Limit = 4
    """pairs of prompts of the trained models"""
    batch_size: px.flags.BatchSize = 8
    methods: px.flags.EachOnce[Method] = ALL
    """how edges of known circuits are scored, two or more; the evidence compares the first two"""
    planted_prompts: Annotated[px.flags.Count, Le(50)] = 8
    """pairs of prompts that score the edges of each known circuit, up to 50; as many others judge"""
    steps: px.flags.Count = 5
    """of the integrated gradients"""
    out: px.flags.Out = None
    seed: px.flags.Seed = 0
    """of the planted models' distractors and prompts, of random scores and masks"""

    def check_flags(self) -> None:
        if len(self.methods) < 2:
            raise ValueError("--methods takes two or more, as methods are compared.")


class Known(NamedTuple):
    """A model whose circuit is known, with pairs of prompts that show it."""

    circuit: str
    architecture: str
    model: PreTrainedModel
    pairs: Pairs
    edges: frozenset[str]


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
    known = list(known_circuits(config))
    costs.append((0.0, len(known) * sum(8.0 if method == "mask" else 0.4 for method in config.methods)))
    each, once = map(sum, zip(*costs, strict=True))
    work = f"{len(known)} known circuits, then {edges} edges and {nodes} nodes of {', '.join(trained)} patched exactly"
    if not run.announce(work, each + once, n=most, limit="exact", fixed=once):
        return

    # Known circuits: does the ranking of edges find them?
    on_known = [row for case in tqdm(known, desc="known circuits", unit="circuit") for row in judged(config, case)]

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
    print(summary(on_known, on_trained))
    with run.writing(facts | {"known": on_known, "trained": on_trained}, [evidence(config, on_known)]):
        run.table("known", on_known)
        run.table("trained", on_trained)
        cases, names, measures = tables(on_known)
        run.figure("known", px.figures.method_maps(measures, cases, names, "Methods on known circuits", lower=["CMD"]))


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


# -- known circuits ----------------------------------------------------------------------------------------------------


def known_circuits(config: Config) -> Iterator[Known]:
    """The planted models and tiny-circuit, with pairs that score and as many that judge."""
    from tiny import planted_circuits

    n = 2 * config.planted_prompts
    for name in planted_circuits.CASES:
        for architecture in planted_circuits.ARCHITECTURES:
            case = planted_circuits.planted(name, architecture, n_prompts=n, seed=config.seed)
            yield Known(name, architecture, case.model, (case.clean, case.corrupt), case.edges)
    model, tokenizer = config.load("tiny-circuit")
    file = px.models.loading.TINY_FOLDER / "tiny-circuit/circuit.json"
    pairs = config.tokenize_pairs(px.PromptSet.load("tiny_circuit")[:n], model, tokenizer)
    yield Known("tiny-circuit", "gpt2", model, pairs, px.circuits.load_circuit(file, model).edges)


def judged(config: Config, case: Known) -> Rows:
    """One row per method: how well its scores find the known circuit."""
    circuit = px.circuits.Circuit(case.edges)
    there, known = (each.matrix(case.model.config) for each in (px.circuits.Circuit.full(case.model.config), circuit))
    (base, source), half = case.pairs, len(case.pairs[0]) // 2
    scoring, judging = ((base.take(some), source.take(some)) for some in (range(half), range(half, 2 * half)))
    of_case = {"circuit": case.circuit, "architecture": case.architecture}
    seed = int(px.rng(config.seed, *of_case.values()).integers(2**32))  # random orders differ between circuits
    rows = []
    for method in ("known", *config.methods):
        how: dict[str, Any] = {"method": method, "steps": config.steps, "batch_size": config.batch_size, "seed": seed}
        scores = known.astype(float)
        if method != "known":
            scores = px.circuits.score(case.model, *scoring, **how, progress=False)
        sizes = np.abs(scores[there])
        row = {**of_case, "method": method, "n_known": len(circuit), "n_edges": len(sizes)}
        row["auroc"] = px.stats.auroc(sizes, known[there])
        row["precision"] = px.stats.precision_at_k(sizes, known[there])
        rows.append(row | areas(config, case.model, scores, judging))
    return rows


def areas(config: Config, model: PreTrainedModel, scores: Any, pairs: Pairs) -> dict[str, float | None]:
    """CPR and CMD with their intervals; None where they are undefined."""
    how: dict[str, Any] = {"shares": px.circuits.MIB_SHARES, "batch_size": config.batch_size, "progress": False}
    by_value = px.circuits.faithfulness_curve(model, scores, *pairs, by="value", **how)
    by_magnitude = px.circuits.faithfulness_curve(model, scores, *pairs, by="magnitude", **how)
    row = px.circuits.areas_row(by_value, by_magnitude, config.seed)
    return {name: px.stats.finite(x) for name, x in row.items()}


# -- trained models ----------------------------------------------------------------------------------------------------


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


# -- what is shown -----------------------------------------------------------------------------------------------------


def tables(on_known: Rows) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """The known circuits, the methods, and each measure `[circuit method]` by its name."""
    methods = list(dict.fromkeys(row["method"] for row in on_known))
    cases = list(dict.fromkeys(f"{row['circuit']}, {row['architecture']}" for row in on_known))
    values = {name: np.array([row[m] for row in on_known], float) for m, name in MEASURES.items()}
    return cases, methods, {name: column.reshape(len(cases), -1) for name, column in values.items()}


def summary(on_known: Rows, on_trained: Rows) -> str:
    """What the terminal shows: a table of each measure, and one of the trained models."""
    cases, methods, measures = tables(on_known)
    widths, lines = [max(9, len(method)) + 2 for method in methods], []
    for measure, values in measures.items():
        cells = [list(map(shown, row)) for row in values]
        for name, row in zip([measure, *cases], [methods, *cells], strict=True):
            lines.append(f"{name:24}" + "".join(f"{x:>{width}}" for x, width in zip(row, widths, strict=True)))
        lines.append("")
    width = max(16, *(len(row["model"]) for row in on_trained))
    lines += [
        "trained models, of which no circuit is known: rank correlation with patching each edge or node exactly (Spearman)",
        f"{'model':{width}}{'over':>16}  method",
    ]
    lines += [
        f"{r['model']:{width}}{r['n']:>10} {r['over']}  {r['method']:20}{shown(r['spearman']):>6}" for r in on_trained
    ]
    return "\n".join(lines)


def shown(value: float) -> str:
    """Three digits, or that there is no number."""
    return "undefined" if np.isnan(value) else f"{value:.3f}"


def evidence(config: Config, on_known: Rows) -> px.runs.Evidence:
    """How much better the first method finds known edges than the second, over the known circuits."""
    first, second = (np.array([row["auroc"] for row in on_known if row["method"] == m]) for m in config.methods[:2])
    found = px.stats.paired_bootstrap(first, second, px.rng(config.seed, "planted"), RESAMPLES)
    control = f"edges in random order, 0.5; {config.methods[1]} {second.mean():.2f}"
    effect = f"AUROC of {config.methods[0]} above that of {config.methods[1]}"
    return px.runs.Evidence(f"{len(first)} known circuits", effect, found, control, "a larger --planted_prompts")


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
