"""Which method finds a circuit that is known? Path patching and attribution on planted circuits, and on the shipped models.

    python experiments/known_circuits.py
    python experiments/known_circuits.py --models tiny-qwen2.5 tiny-llama3.1 --pairs 16 --steps 20

Method. Planted models (`planted_circuits.py`) have weights set by hand, so that their edges are known. Every edge is scored by
its mean |effect| on the logit difference, corrupt into clean: exactly, by path patching with MLPs frozen, and to first order by
EAP (Syed et al. 2023) and EAP-IG of inputs and of activations (Hanna et al. 2024). A score is as good as its ranking: AUROC, the
chance that a planted edge ranks above another, and precision at k, the share of planted edges among the k highest, k being
their number. Where a softmax is saturated or a backup waits, a linear method must fail.

On trained models no circuit is known; there, the rank correlation (Spearman) of each method with the exact value, over all edges
by path patching, and over all nodes (z, q, k, v of heads, MLPs) by activation patching, with AtP (Nanda 2023) and AtP* (Kramar
et al. 2024).

Written to the folder OUT: planted.csv, trained.csv, config.yaml (running it again gives the same), and summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata, spearmanr
from tiny.planted_circuits import ARCHITECTURES, CASES, planted
from tqdm import tqdm
from transformers import PreTrainedModel

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import remove_leftovers, write_csv, write_json
from pyvene_ext.methods.attribution.atp import atp, atp_star
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.patching.pairs import both_texts
from pyvene_ext.methods.patching.patch import all_patches, patch
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs.facts import metadata
from pyvene_ext.specs.graph import reaches, receivers, senders
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch

PROMPTS = "ioi_en"
Scores = Float[np.ndarray, "edge prompt"]


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("tiny-qwen2.5", "tiny-gemma2", "tiny-llama3.1")
    """shipped tiny models, folders, or names on the hub, for the rank correlations; every edge is patched exactly"""
    planted_prompts: int = 4
    """pairs of prompts of each planted circuit"""
    pairs: int = 4
    """first pairs of ioi_en for the trained models"""
    steps: int = 5
    """of the integrated gradients"""
    out: Path = Path("outputs/known_circuits")
    """the folder that is written"""
    device: str | None = None
    """cpu or cuda ...; by default a GPU if there is one"""
    seed: int = 0
    """of the planted models' distractors and prompts"""


def main(config: Config) -> None:
    if not is_main_process():
        return
    for flag in ("planted_prompts", "pairs", "steps"):
        if getattr(config, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, not {getattr(config, flag)}.")
    prompt_set = PromptSet.load(find_prompts(PROMPTS))
    if config.pairs > len(prompt_set):
        raise ValueError(f"--pairs {config.pairs} is more than the {len(prompt_set)} pairs of {PROMPTS}.")
    trained = [load_model(name, device=choose_device(config.device)) for name in config.models]
    methods = edge_methods(config.steps)

    # Planted circuits: does the ranking of edges find them?
    on_planted = []
    for name in tqdm(CASES, desc="planted circuits", unit="circuit"):
        for architecture in ARCHITECTURES:
            case = planted(name, architecture, n_prompts=config.planted_prompts, seed=config.seed)
            edges = edges_of(case.model)
            known = np.array([edge in case.edges for edge in edges])
            for method, score in methods.items():
                ranking = np.abs(score(case.model, edges, case.clean, case.corrupt)).mean(1)
                row = {"circuit": name, "architecture": architecture, "method": method, "n_planted": int(known.sum())}
                on_planted.append(row | {"auroc": auroc(ranking, known), "precision": precision(ranking, known)})

    # Trained models: does an approximation rank edges and nodes as the exact values do?
    on_trained: list[dict[str, Any]] = []
    for name, (model, tokenizer) in zip(config.models, tqdm(trained, desc="trained models", unit="model"), strict=True):
        clean, corrupt = (text.take(range(config.pairs)) for text in both_texts(prompt_set, model, tokenizer))
        edges = edges_of(model)
        nodes = [spec for site in ("z", "q", "k", "v", "mlp_out") for spec in all_patches(model.config, site)]
        for over, names, scores in (
            ("edges", edges, {m: score(model, edges, clean, corrupt) for m, score in methods.items()}),
            ("nodes", nodes, {m: score(model, nodes, clean, corrupt) for m, score in NODE_METHODS.items()}),
        ):
            exact, *others = (np.abs(values).mean(1) for values in scores.values())
            on_trained += [
                {"model": name, "over": over, "n": len(names), "method": m, "spearman": float(spearmanr(exact, o)[0])}
                for m, o in zip(list(scores)[1:], others, strict=True)
            ]

    write_csv(config.out / "planted.csv", on_planted)
    write_csv(config.out / "trained.csv", on_trained)
    write_config(config.out / "config.yaml", config)
    facts = metadata(trained[0][0], models=list(config.models), seed=config.seed)
    write_json(config.out / "summary.json", facts | {"planted": on_planted, "trained": on_trained})
    remove_leftovers(*config.out.rglob("*"))
    print(summary(on_planted, on_trained, list(methods)))
    print(f"\nwritten:\n  {config.out}/ (tables, config, summary)")


# -- scores of edges and nodes: delta of every one of them on every prompt ----------------------------------------------------


def edges_of(model: PreTrainedModel) -> list[str]:
    """Every edge by its name."""
    return [f"{s}->{r}" for s in senders(model.config) for r in receivers(model.config) if reaches(s, r)]


def exactly(model: PreTrainedModel, edges: Sequence[str], clean: TokenizedPrompts, corrupt: TokenizedPrompts) -> Scores:
    """Path patching, MLPs frozen."""
    ends = [edge.split("->") for edge in edges]
    paths = [PathPatch(sender=sender, receivers=(receiver,), freeze_mlps=True) for sender, receiver in ends]
    return patch(model, paths, clean, corrupt, progress=False).delta


def by_gradient(
    model: PreTrainedModel, edges: Sequence[str], clean: TokenizedPrompts, corrupt: TokenizedPrompts, **options: Any
) -> Scores:
    """EAP and its kin."""
    found = edge_attribution(model, clean, corrupt, progress=False, **options)
    return np.stack([found.edge(edge) for edge in edges])


def edge_methods(steps: int) -> dict[str, Callable[..., Scores]]:
    """The exact one first."""
    return {
        "exact": exactly,
        "EAP": by_gradient,
        "EAP-IG inputs": partial(by_gradient, method="eap_ig_inputs", steps=steps),
        "EAP-IG activations": partial(by_gradient, method="eap_ig_activations", steps=steps),
    }


def exact_nodes(
    model: PreTrainedModel, nodes: Sequence[ActivationPatch], clean: TokenizedPrompts, corrupt: TokenizedPrompts
) -> Scores:
    """Activation patching."""
    return patch(model, nodes, clean, corrupt, progress=False).delta


NODE_METHODS: dict[str, Callable[..., Scores]] = {
    "exact": exact_nodes,
    "AtP": partial(atp, progress=False),
    "AtP, QK-fix": partial(atp_star, grad_drop=False, progress=False),
    "AtP*": partial(atp_star, progress=False),
}


# -- how good a ranking is ----------------------------------------------------------------------------------------------------


def auroc(scores: Float[np.ndarray, " edge"], known: Bool[np.ndarray, " edge"]) -> float:
    """The chance that a planted edge scores above another; ties count half (Mann-Whitney's U over the number of pairs)."""
    n = int(known.sum())
    return float((rankdata(scores)[known].sum() - n * (n + 1) / 2) / (n * (len(known) - n)))


def precision(scores: Float[np.ndarray, " edge"], known: Bool[np.ndarray, " edge"]) -> float:
    """The share of planted edges among as many of the highest scores."""
    return float(known[np.argsort(-scores, kind="stable")[: known.sum()]].mean())


def summary(on_planted: list[dict[str, Any]], on_trained: list[dict[str, Any]], methods: list[str]) -> str:
    """The two tables of the terminal."""
    lines = ["AUROC / precision at k of the planted edges", f"{'circuit':26}" + "".join(f"{m:>20}" for m in methods)]
    rows = {(r["circuit"], r["architecture"], r["method"]): r for r in on_planted}
    for circuit, architecture in dict.fromkeys((r["circuit"], r["architecture"]) for r in on_planted):
        cells = [rows[circuit, architecture, method] for method in methods]
        lines.append(
            f"{circuit + ', ' + architecture:26}" + "".join(f"{c['auroc']:13.3f} / {c['precision']:.2f}" for c in cells)
        )
    lines += ["", "rank correlation with the exact values", f"{'model':16}{'over':>16}  method"]
    lines += [f"{r['model']:16}{r['n']:>10} {r['over']}  {r['method']:20}{r['spearman']:6.3f}" for r in on_trained]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
