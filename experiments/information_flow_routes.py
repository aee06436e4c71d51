"""Along which routes does a prediction come about? Information flow routes (Ferrando and Voita 2024), in one forward pass.

    python experiments/information_flow_routes.py
    python experiments/information_flow_routes.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/information_flow_routes.py --tau 0.01 --renormalise --prompt 3
    python experiments/information_flow_routes.py --compare outputs/activation_frequencies_ifr/tiny-qwen2.5_ioi_en.npy

Method. Every state of the residual stream is a sum of parts: what was there before, what each head brings from each token, what
the MLP adds. A part's importance is how much nearer it brings the sum, in L1 norm, as a share of all parts' (`flow`).
From the last token's final state, edges with an importance above tau are followed down to the embeddings. A head is active on a
prompt if one of these edges is its own; its activation frequency is the share of prompts, with its 95% Wilson interval. One tau
says little, so the frequency is shown against tau too.

Nothing is ablated: this is another estimator than the activation frequency of `activation_frequencies_ifr.py`, which asks what
the answer loses without a head. `--compare` plots one against the other, head by head, with Pearson's and Spearman's correlation.

Written to the folder OUT: frequency.npy and importance.npy, float32 [layer head] (a head's share of resid_mid, mean over tokens
and prompts); active.npy and importances.npy [prompt layer head]; heads.csv, prompts.csv, frequency_vs_tau.csv; routes.json, the
edges of one prompt (`--prompt`); attention.json, where the most active heads look; figures; config.yaml (running it again gives
the same); and summary.json, what was run.
"""

from __future__ import annotations

import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from modelcards import n_heads, n_layers, n_positions
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import (
    output_path,
    read_npy,
    remove_leftovers,
    write_csv,
    write_json,
    write_npy,
)
from pyvene_ext.methods.heads.flow import (
    Flow,
    FlowEdge,
    StreamState,
    check_tau,
    flow_routes,
)
from pyvene_ext.models.devices import choose_device, is_main_process
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import Answers
from pyvene_ext.runs import figures
from pyvene_ext.runs.attention import HEADS, look, write_views
from pyvene_ext.runs.facts import metadata
from pyvene_ext.stats.correlations import Correlation, correlate_heads
from pyvene_ext.stats.intervals import Interval, frequency_interval

SHOWN = 12  # heads in the table on the terminal
NAMED = 60  # lines of attention between tokens that are named in a drawing, if there are no more


@dataclass(frozen=True)
class Config:
    model: str = "tiny-qwen2.5"
    """a shipped tiny model, a folder, or a name on the hub"""
    dataset: str = "ioi_en"
    """ioi_en, ioi_zh, a .json or .jsonl file, a saved `datasets` folder, or a name on the hub"""
    out: Path | None = None
    """the folder of what is written; by default outputs/information_flow_routes/MODEL_DATASET"""
    tau: float = 0.04
    """threshold on an edge's importance"""
    renormalise: bool = False
    """in the routes of one prompt, divide the importances that are kept by their sum at the node"""
    prompt: int = 0
    """whose routes are drawn and listed; the first is 0"""
    compare: Path | None = None
    """.npy file of causal activation frequencies, [layer head], as activation_frequencies_ifr.py writes it"""
    answers: Answers = "first_token"
    """first_difference for names of several tokens that begin alike: the shared tokens join the prompt"""
    batch_size: int = 16
    """prompts a forward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of the bootstrap and the permutations of --compare"""


def main(config: Config) -> None:
    if not is_main_process():
        return  # one pass over the prompts is no work to share

    # What is run. Everything that can be wrong is found before the first forward pass.
    check_tau(config.tau)
    folder = folder_of(config)
    if config.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more, not {config.batch_size}.")
    causal = None if config.compare is None else read_frequencies(config.compare)
    prompt_set = PromptSet.load(find_prompts(config.dataset))
    if not 0 <= config.prompt < len(prompt_set):
        raise ValueError(f"--prompt {config.prompt} is not there: {config.dataset} has 0 to {len(prompt_set) - 1}.")
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=choose_device(config.device))
    heads = n_layers(model.config), n_heads(model.config)
    if causal is not None and causal.shape != heads:
        raise ValueError(
            f"--compare {config.compare} is {causal.shape} and {config.model} has {heads} layers and heads; "
            "give frequencies of the same model."
        )
    prompts = prompt_set.tokenize(tokenizer, answers=config.answers, max_length=n_positions(model.config))

    # One pass over the prompts, and the heads that the routes to each prediction go through.
    flow = flow_routes(model, prompts, batch_size=config.batch_size)
    active = flow.active_heads(config.tau)
    frequency = frequency_interval(active, axis=0)
    importances = flow.head_importance()
    routes = flow.graph(config.prompt, config.tau, config.renormalise)
    taus = np.unique([*np.geomspace(0.002, 0.5, 30), *([config.tau] if config.tau > 0 else [])])
    curve = np.stack([flow.active_heads(tau).mean(0) for tau in taus])
    correlation = None if causal is None else correlate_heads(frequency.mean, causal, config.seed)

    # The files. The summary comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    name = f"{Path(config.model).name}, {Path(config.dataset).stem}"
    how = f"edges above {config.tau:g}{', renormalised' * config.renormalise}"
    tokens = [str(tokenizer.decode([token])) for token in prompts.input_ids[config.prompt]]
    for drawing, file in (
        (
            figures.head_heatmap(
                frequency.mean,
                f"Activation frequency by information flow: {name}",
                f"share of prompts with an edge above {config.tau:g} on a route",
                limits=(0, 1),
            ),
            "frequency",
        ),
        (
            figures.head_heatmap(
                importances.mean(0), f"Mean importance: {name}", "share of resid_mid (mean over tokens)"
            ),
            "importance",
        ),
        (
            figures.frequency_curve(
                taus,
                curve,
                tau=config.tau or None,
                title=f"Activation frequency by information flow against the threshold: {name}",
                threshold="threshold tau on the importance of an edge",
            ),
            "frequency_vs_tau",
        ),
        (
            draw_routes(routes, tokens, heads[0], f"Routes to the prediction of prompt {config.prompt}, {how}: {name}"),
            "routes",
        ),
    ):
        figures.save(drawing, folder / f"figures/{file}.png")
    for earlier in folder.glob("figures/compare.*"):
        earlier.unlink()
    if causal is not None and correlation is not None:
        scatter = figures.scatter_heads(
            frequency.mean,
            causal,
            name_a="information flow",
            name_b="ablation",
            quantity="activation frequency",
            correlation=correlation,
            title=f"Two estimators of activation frequency: {name}",
        )
        figures.save(scatter, folder / "figures/compare.png")
    rows = head_table(frequency, flow, causal)
    write_csv(folder / "heads.csv", rows)
    write_csv(folder / "prompts.csv", prompt_table(flow, active, config.tau))
    write_csv(folder / "frequency_vs_tau.csv", curve_table(taus, curve))
    write_npy(folder / "active.npy", active)
    write_npy(folder / "importances.npy", importances)
    write_npy(folder / "importance.npy", importances.mean(0).astype(np.float32))
    write_npy(folder / "frequency.npy", frequency.mean.astype(np.float32))
    write_json(
        folder / "routes.json",
        {
            "prompt": config.prompt,
            "tokens": tokens,
            "tau": config.tau,
            "renormalised": config.renormalise,
            "edges": [edge.as_dict() for edge in routes],
        },
    )
    most_active = [(int(row["layer"]), int(row["head"])) for row in rows[:HEADS]]
    write_views(folder, look(model, tokenizer, prompts.input_ids, most_active))
    write_config(folder / "config.yaml", config)
    facts = metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        prompts_hash=prompts.hash,
        n=len(prompts),
        tau=config.tau,
        answers=config.answers,
        seed=config.seed,
        share_active=float(active.mean()),
        n_edges_drawn=len(routes),
        compare=None if correlation is None else {"file": str(config.compare), **correlation.as_dict()},
    )
    write_json(folder / "summary.json", facts)
    remove_leftovers(*folder.rglob("*"))

    print(summary(config, frequency, flow, active, len(routes), causal, correlation))
    print("\nwritten:", f"{folder}/ (frequencies, importances, routes, tables, figures, summary)", sep="\n  ")


def folder_of(config: Config) -> Path:
    """Where everything is written; a ValueError if that cannot be."""
    name = f"{Path(config.model).name}_{Path(config.dataset).stem}"
    return output_path(config.out, Path("outputs/information_flow_routes") / name)


def read_frequencies(path: Path) -> Float[np.ndarray, "layer head"]:
    """A matrix of real numbers from a .npy file; OSError or ValueError if it is none."""
    try:
        matrix = read_npy(path)
    except ValueError as error:
        raise ValueError(f"--compare {error}") from None
    if matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
        raise ValueError(f"--compare {path} does not hold one real number a head, [layer head].")
    return matrix.astype(np.float64)


def head_table(
    frequency: Interval, flow: Flow, causal: Float[np.ndarray, "layer head"] | None
) -> list[dict[str, float]]:
    """One row a head, most active first; ties by importance."""
    importance, at_last = flow.head_importance().mean(0), flow.head_importance("last").mean(0)
    rows = [
        {
            "layer": layer,
            "head": head,
            "n_prompts": len(flow),
            "frequency": float(frequency.mean[layer, head]),
            "low": float(frequency.low[layer, head]),
            "high": float(frequency.high[layer, head]),
            "importance": float(importance[layer, head]),
            "importance_at_last": float(at_last[layer, head]),
            "largest_edge": max(float(attention[layer, head].max()) for attention in flow.attention),
            **({} if causal is None else {"compared": float(causal[layer, head])}),
        }
        for layer, head in np.ndindex(importance.shape)
    ]
    return sorted(rows, key=lambda row: (-row["frequency"], -row["importance"]))


def prompt_table(flow: Flow, active: Bool[np.ndarray, "prompt layer head"], tau: float) -> list[dict[str, int]]:
    """One row a prompt: how large its routes are."""
    rows = []
    for prompt, attention in enumerate(flow.attention):
        edges = flow.graph(prompt, tau)
        nodes = {node for edge in edges for node in (edge.source, edge.target)}
        heads, tokens = int(active[prompt].sum()), attention.shape[-1]
        rows.append({"prompt": prompt, "tokens": tokens, "edges": len(edges), "nodes": len(nodes), "heads": heads})
    return rows


def curve_table(taus: Float[np.ndarray, " tau"], curve: Float[np.ndarray, "tau layer head"]) -> list[dict[str, float]]:
    """One row a threshold: the mean frequency over all heads, and how it spreads over them."""
    return [
        {"tau": float(tau), "mean": float(at.mean())}
        | {f"quantile_{q:g}": float(np.quantile(at, q)) for q in (0.1, 0.5, 0.9)}
        for tau, at in zip(taus, curve, strict=True)
    ]


def draw_routes(edges: tuple[FlowEdge, ...], tokens: list[str], layers: int, title: str) -> Figure:
    """One prompt's routes: tokens from left to right, layers upwards, every edge as wide as it is important.

    Heads that carry between the same two states are one line, as wide as their sum; it names them where there is room.
    """
    residual, mlp = {}, {}
    attention: dict[tuple[StreamState, StreamState], list[FlowEdge]] = defaultdict(list)
    for edge in edges:
        pair = edge.source, edge.target
        if edge.via == "residual":
            residual[pair] = edge.importance
        elif edge.via == "mlp":
            mlp[pair] = edge.importance
        else:
            attention[pair].append(edge)
    between = {pair for pair in attention if pair[0].pos != pair[1].pos}
    named = between if len(between) <= NAMED else set()
    written: list[tuple[float, float]] = []
    labels = [token.strip() or repr(token)[1:-1] for token in tokens]
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(min(18.0, 1.8 + 0.5 * len(tokens)), min(16.0, 1.9 + 0.75 * layers)))
        axes = figure.add_subplot()
        for pair, importance in residual.items():
            axes.plot(*bow(*pair, 0), color=figures.LIGHT, linewidth=0.4 + 3 * importance, zorder=1)
        for pair, importance in mlp.items():
            axes.plot(*bow(*pair, 0.22), color=figures.ORANGE, linewidth=0.4 + 3 * importance, zorder=2)
        for pair, parts in attention.items():
            line = bow(*pair, 0 if pair in between else -0.22)
            width = 0.4 + 3 * sum(part.importance for part in parts)
            axes.plot(*line, color=figures.BLUE, linewidth=width, alpha=0.8, zorder=3)
            if pair in named:
                at = min(10, max(1, 24 // (pair[1].pos - pair[0].pos)))  # near the source: lines meet at their target
                (x, y), words = np.transpose(line)[at], ", ".join(part.via for part in parts)
                if any(abs(x - taken[0]) < 0.8 and abs(y - taken[1]) < 0.14 for taken in written):
                    continue
                written.append((x, y))
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4}
                axes.text(x, y, words, fontsize=5.5, ha="center", va="center", bbox=box, zorder=5)
        nodes = {node for edge in edges for node in (edge.source, edge.target)}
        x, y = zip(*map(place, nodes | {StreamState("resid_post", layers - 1, len(tokens) - 1)}), strict=True)
        axes.scatter(x, y, s=9, color="black", zorder=4)
        axes.set_title(textwrap.fill(title, int(11 * figure.get_figwidth())))
        axes.set_xlabel("token")
        axes.set_ylabel("residual stream after layer")
        shown = [label if figures.drawable(label) else f"({number})" for number, label in enumerate(labels)]
        axes.set_xticks(range(len(tokens)), shown, rotation=60)
        axes.set_xlim(-0.6, len(tokens) - 0.4)
        step = -(-layers // 16)
        axes.set_yticks([0, *range(1, layers + 1, step)], ["embed", *map(str, range(0, layers, step))])
        axes.set_ylim(-0.3, layers + 0.3)
        heads = "attention (heads named where there is room)" if named else "attention (heads: routes.json)"
        kinds = (("residual", figures.LIGHT), ("MLP", figures.ORANGE), (heads, figures.BLUE))
        lines = [Line2D([], [], color=colour, linewidth=2, label=label) for label, colour in kinds]
        figure.legend(handles=lines, loc="outside lower center", ncols=3)
    return figure


def place(node: StreamState) -> tuple[float, float]:
    """Where a node is drawn: resid_mid half-way up its layer, resid_post at its end."""
    return node.pos, node.layer + {"resid_pre": 0.0, "resid_mid": 0.5, "resid_post": 1.0}[node.site]


def bow(
    source: StreamState, target: StreamState, by: float
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """A line from node to node, bent to the right by so many tokens."""
    (x0, y0), (x1, y1) = place(source), place(target)
    along = np.linspace(0, 1, 21)
    return x0 + (x1 - x0) * along + by * 4 * along * (1 - along), y0 + (y1 - y0) * along


def summary(
    config: Config,
    frequency: Interval,
    flow: Flow,
    active: Bool[np.ndarray, "prompt layer head"],
    n_edges: int,
    causal: Float[np.ndarray, "layer head"] | None,
    correlation: Correlation | None,
) -> str:
    """What the terminal shows: how much is on a route, the most active heads, and how they go with the compared ones."""
    lines = [
        f"{config.model} on {config.dataset}: {len(flow)} prompts, routes of edges above {config.tau:g}",
        f"active: {active.mean():.1%} of heads x prompts; {(frequency.low > 0.5).sum()} of {frequency.mean.size} heads on more "
        "than half of the prompts (95% interval)",
        f"routes of prompt {config.prompt}: {n_edges} edges through {active[config.prompt].sum()} heads",
        "",
        "  head  frequency  95% interval   importance  at last token" + ("" if causal is None else "   compared"),
    ]
    for row in head_table(frequency, flow, causal)[:SHOWN]:
        head, interval = f"{row['layer']}.{row['head']}", f"[{row['low']:.2f}, {row['high']:.2f}]"
        compared = "" if causal is None else f"{row['compared']:11.2f}"
        lines.append(
            f"{head:>6} {row['frequency']:10.2f}  {interval:>13} {row['importance']:12.4f} {row['importance_at_last']:14.4f}"
            + compared
        )
    if correlation is not None:
        lines += ["", f"against {config.compare}: {in_words(correlation)}"]
    return "\n".join(lines)


def in_words(correlation: Correlation) -> str:
    """Both coefficients with their intervals, or why there are none."""
    kept = f"{correlation.n} heads, {correlation.dropped} dropped"
    if np.isnan(correlation.pearson.r):
        return f"no correlation ({correlation.note}), {kept}"
    found: list[tuple[str, Any]] = [("Pearson", correlation.pearson), ("Spearman", correlation.spearman)]
    words = [
        f"{name} {c.r:.3f} [{c.low:.3f}, {c.high:.3f}], p within layers {c.p_within_layers:.2g}" for name, c in found
    ]
    return f"{'; '.join(words)}; {kept}"


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
