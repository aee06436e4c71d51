"""Along which routes does a prediction come about? Information flow routes (Ferrando and Voita 2024), in one forward pass.

    python experiments/information_flow_routes.py
    python experiments/information_flow_routes.py --model Qwen/Qwen2.5-3B --dataset ioi_zh --answers first_difference
    python experiments/information_flow_routes.py --tau 0.01 --renormalise --prompt 3
    python experiments/information_flow_routes.py --compare outputs/activation_frequencies_ifr/tiny-qwen2.5_ioi_en.npy

Method. Every state of the residual stream is a sum of parts: the state before, what each head adds from each token, what the MLP
adds. A part's importance is how much nearer it brings the sum, in L1 norm, as a share of all parts' (`flow`). From the last
token's final state, edges with an importance above tau are followed down to the embeddings. A head is active on a prompt if one
of these edges is its own; its activation frequency is the share of prompts, with its 95% Wilson interval. How
large importances are differs from model to model, so that tau is by default chosen from them: a tenth of heads x prompts are
active. (The published tool's default is `--tau 0.04`.) One tau says little, so the frequency is shown against tau too.

Nothing is ablated: this is another estimator than the activation frequency of `activation_frequencies_ifr.py`, which asks what
the answer loses without a head. `--compare` plots one against the other, head by head, with Pearson's and Spearman's correlation.

Written to the folder OUT: frequency.npy and importance.npy, float32 [layer head] (a head's share of resid_mid, mean over tokens
and prompts); active.npy and importances.npy [prompt layer head]; heads.csv, prompts.csv, frequency_vs_tau.csv; routes.json, the
edges of one prompt (`--prompt`); attention.json, where the most active heads look; figures; config.yaml (running it again gives
the same); and summary.json, what was run.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Lt
from jaxtyping import Bool, Float

import pyvene_ext as px

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

SHOWN = 12  # heads in the table on the terminal
LOWEST, HIGHEST = 0.002, 0.99  # thresholds that are chosen
Matrix = Float[np.ndarray, "layer head"]


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts):
    out: px.flags.Out = None
    tau: Annotated[float, Ge(0), Lt(1)] | None = None
    """threshold on an edge's importance; by default that at which about a tenth of heads x prompts are active"""
    renormalise: bool = False
    """in the routes of one prompt, divide the importances that are kept by their sum at the node"""
    prompt: Annotated[int, Ge(0)] = 0
    """whose routes are drawn and listed; the first is 0"""
    compare: Path | None = None
    """.npy file of causal activation frequencies, [layer head], as activation_frequencies_ifr.py writes it"""


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # one pass over the prompts is no work to share
    # Everything that can be wrong is found before the first forward pass.
    run = px.RunFolder(config, "information_flow_routes", config.model, config.dataset)
    causal = None if config.compare is None else read_frequencies(config.compare)
    prompt_set = config.load_prompts()
    if config.prompt >= len(prompt_set):
        raise ValueError(f"--prompt {config.prompt} is not there: {config.dataset} has 0 to {len(prompt_set) - 1}.")
    model, tokenizer = config.load_model()
    check_compared(config, causal, model)
    prompts = config.tokenize(prompt_set, model, tokenizer)
    if not run.announce(
        f"routes to {px.io.counted(len(prompts), 'prediction')}", seconds_of(model, prompts), n=len(prompts)
    ):
        return

    # The importance of every edge in one pass, and the routes to each prediction.
    flow, shown = traced(config, model, prompts)
    widths = np.stack([one.widths.heads for one in flow])
    tau = config.tau
    if tau is None:
        tau = min(max(px.stats.exceeded_by_a_tenth(widths), LOWEST), HIGHEST)
    active = widths > tau
    routes = shown.graph(0, tau, config.renormalise)
    tokens = [str(tokenizer.decode([token])) for token in prompts.input_ids[config.prompt]]

    # How often a head is on a route, at this threshold and at others, and whether the causal frequencies agree.
    frequency = px.stats.frequency_interval(active, axis=0)
    taus = np.unique([*np.geomspace(0.002, 0.5, 30), *([tau] if tau > 0 else [])])
    curve = np.stack([(widths > at).mean(0) for at in taus])
    correlation = None if causal is None else px.stats.correlate_heads(frequency.mean, causal, config.seed)
    heads = head_table(frequency, flow, causal)
    facts = px.metadata(
        model,
        model=config.model,
        dataset=config.dataset,
        prompts_hash=prompts.hash,
        n=len(prompts),
        tau=tau,
        tau_is="exceeded by a tenth of heads x prompts" if config.tau is None else "given",
        answers=config.answers,
        seed=config.seed,
        share_active=float(active.mean()),
        n_edges_drawn=len(routes),
        compare=None if correlation is None else {"file": str(config.compare), **correlation.as_dict()},
    )

    print(summary(config, facts, heads, active, correlation))
    with run.writing(facts, evidence(config, facts, heads, correlation), replacing=("figures/compare.*",)):
        run.table("heads", heads)
        run.table("prompts", prompt_table(flow, tau))
        run.table("frequency_vs_tau", px.stats.threshold_table(taus, curve))
        for name, values in arrays(frequency, flow, active).items():
            run.array(name, values)
        run.json("routes", route_record(config, tau, tokens, routes))
        most_active = [(int(row["layer"]), int(row["head"])) for row in heads[: px.runs.HEADS]]
        run.views(px.runs.look(model, tokenizer, prompts.input_ids, most_active))
        for name, figure in drawn(tau, run.of, frequency.mean, flow, (taus, curve)).items():
            run.figure(name, figure)
        how = f"edges above {tau:.3g}{', renormalised' * config.renormalise}"
        title = f"Routes to the prediction of prompt {config.prompt}, {how}: {run.of}"
        run.figure("routes", px.figures.routes(routes, tokens, len(frequency.mean), title))
        if causal is not None and correlation is not None:
            run.figure("compare", comparison(run.of, frequency.mean, causal, correlation))


# -- what is traced ----------------------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """What is kept of a prompt's flow, which takes tokens squared: widths, a head's share of resid_mid, its largest edge."""

    widths: px.methods.Widths
    importance: Matrix
    at_last: Matrix
    largest_edge: Matrix
    tokens: int


def seconds_of(model: PreTrainedModel, prompts: px.TokenizedPrompts) -> float:
    """How long the routes of all prompts take, by the time that those of the first take."""
    start = time.perf_counter()
    px.methods.flow_routes(model, prompts.take([0]), progress=False)
    sizes = [len(ids) ** 2 for ids in prompts.input_ids]
    return (time.perf_counter() - start) * sum(sizes) / sizes[0]


def traced(
    config: Config, model: PreTrainedModel, prompts: px.TokenizedPrompts
) -> tuple[list[Traced], px.methods.Flow]:
    """What is kept of all prompts, a batch after the other, and the flow of `--prompt`."""
    found: list[Traced] = []
    lowest = LOWEST if config.tau is None else config.tau
    with px.io.progress_bar(len(prompts), "prompt", "routes") as bar:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts.take(range(start, min(start + config.batch_size, len(prompts))))
            flow = px.methods.flow_routes(model, batch, batch_size=len(batch), progress=False)
            shares = zip(flow.head_importance(), flow.head_importance("last"), strict=True)
            for number, (share, at_last) in enumerate(shares):
                widths, attention = flow.widths(number).above(lowest), flow.attention[number]
                found.append(Traced(widths, share, at_last, attention.max((2, 3)), attention.shape[-1]))
            if start <= config.prompt < start + len(batch):
                parts = (flow.attention, flow.attn_residual, flow.mlp, flow.mlp_residual)
                shown = px.methods.Flow(*((part[config.prompt - start],) for part in parts))
            bar.update(len(batch))
    return found, shown


# -- what it is compared with ------------------------------------------------------------------------------------------


def read_frequencies(path: Path) -> Matrix:
    """The causal frequencies; OSError or ValueError for a file without one real number per head."""
    try:
        return px.io.read_head_matrix(path)
    except ValueError as error:
        raise ValueError(f"--compare {error}") from None


def check_compared(config: Config, causal: Matrix | None, model: PreTrainedModel) -> None:
    """Raise ValueError for frequencies of another model's heads."""
    heads = px.models.n_layers(model.config), px.models.n_heads(model.config)
    if causal is not None and causal.shape != heads:
        raise ValueError(
            f"--compare {config.compare} is {causal.shape} and {config.model} has {heads} layers and heads; "
            "give frequencies of the same model."
        )


# -- statistics --------------------------------------------------------------------------------------------------------


def head_table(frequency: px.Interval, flow: list[Traced], causal: Matrix | None) -> list[dict[str, float]]:
    """One row per head, most active first; ties by importance."""
    importance, at_last = (np.mean([getattr(one, name) for one in flow], 0) for name in ("importance", "at_last"))
    largest_edge = np.max([one.largest_edge for one in flow], 0)
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
            "largest_edge": float(largest_edge[layer, head]),
            **({} if causal is None else {"compared": float(causal[layer, head])}),
        }
        for layer, head in np.ndindex(importance.shape)
    ]
    return sorted(rows, key=lambda row: (-row["frequency"], -row["importance"]))


def prompt_table(flow: list[Traced], tau: float) -> list[dict[str, int]]:
    """One row per prompt: how large its routes are."""
    rows = []
    for prompt, (widths, *_, tokens) in enumerate(flow):
        heads, edges, states = (int((found > tau).sum()) for found in widths)
        nodes = states + (edges > 0)  # with the prediction itself
        rows.append({"prompt": prompt, "tokens": tokens, "edges": edges, "nodes": nodes, "heads": heads})
    return rows


def arrays(
    frequency: px.Interval, flow: list[Traced], active: Bool[np.ndarray, "prompt layer head"]
) -> dict[str, np.ndarray]:
    """All arrays by file name."""
    importances = np.stack([one.importance for one in flow])
    means = {"importance": importances.mean(0).astype(np.float32), "frequency": frequency.mean.astype(np.float32)}
    return {"active": active, "importances": importances, **means}


def route_record(
    config: Config, tau: float, tokens: list[str], routes: tuple[px.methods.FlowEdge, ...]
) -> dict[str, Any]:
    """The routes of one prompt, for the report."""
    return {
        "prompt": config.prompt,
        "tokens": tokens,
        "tau": tau,
        "renormalised": config.renormalise,
        "edges": [edge.as_dict() for edge in routes],
    }


# -- what is shown -----------------------------------------------------------------------------------------------------


def drawn(
    tau: float,
    of: str,
    frequency: Matrix,
    flow: list[Traced],
    against_tau: tuple[Float[np.ndarray, " tau"], Float[np.ndarray, "tau layer head"]],
) -> dict[str, Figure]:
    """The figures of all prompts by name: maps of heads, and the frequency against the threshold."""
    title = f"Activation frequency by information flow: {of}"
    label = f"share of prompts with an edge above {tau:.3g} on a route"
    importance = np.mean([one.importance for one in flow], 0)
    return {
        "frequency": px.figures.head_heatmap(frequency, title, label, limits=(0, 1)),
        "importance": px.figures.head_heatmap(
            importance, f"Mean importance: {of}", "share of resid_mid (mean over tokens)"
        ),
        "frequency_vs_tau": px.figures.frequency_curve(
            *against_tau,
            tau=tau or None,
            title=f"Activation frequency by information flow against the threshold: {of}",
            threshold="threshold tau on the importance of an edge",
        ),
    }


def comparison(of: str, frequency: Matrix, causal: Matrix, correlation: px.stats.Correlation) -> Figure:
    """Both frequencies of every head."""
    return px.figures.scatter_heads(
        frequency,
        causal,
        name_a="information flow",
        name_b="ablation",
        quantity="activation frequency",
        correlation=correlation,
        title=f"Two estimators of activation frequency: {of}",
    )


def summary(
    config: Config,
    facts: dict[str, Any],
    heads: list[dict[str, float]],
    active: Bool[np.ndarray, "prompt layer head"],
    correlation: px.stats.Correlation | None,
) -> str:
    """What the terminal shows: how much is on a route, the most active heads, and how they agree with the compared ones."""
    often = sum(row["low"] > 0.5 for row in heads)
    chosen = "" if config.tau is not None else ", the tau at which about a tenth of heads x prompts are active"
    lines = [
        f"{config.model} on {config.dataset}: {px.io.counted(facts['n'], 'prompt')}, routes of edges above "
        f"{facts['tau']:.3g}{chosen}",
        f"active: {facts['share_active']:.1%} of heads x prompts; {often} of {len(heads)} heads on more "
        "than half of the prompts (95% interval)",
        f"routes of prompt {config.prompt}: {facts['n_edges_drawn']} edges through {active[config.prompt].sum()} heads",
        "",
        "  head  frequency  95% interval   importance  at last token" + ("   compared" if correlation else ""),
    ]
    for row in heads[:SHOWN]:
        head = px.stats.head_label((int(row["layer"]), int(row["head"])))
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        compared = f"{row['compared']:11.2f}" if correlation else ""
        lines.append(
            f"{head:>6} {row['frequency']:10.2f}  {interval:>13} {row['importance']:12.4f} {row['importance_at_last']:14.4f}"
            + compared
        )
    if correlation is not None:
        lines += ["", f"against {config.compare}: {in_words(correlation)}"]
    return "\n".join(lines)


def evidence(
    config: Config, facts: dict[str, Any], heads: list[dict[str, float]], correlation: px.stats.Correlation | None
) -> list[px.runs.Evidence]:
    """How often the most active head is on a route, beside all heads; and how the compared frequencies agree."""
    first, prompts, share = heads[0], px.io.counted(facts["n"], "prompt"), facts["share_active"]
    name = px.stats.head_label((int(first["layer"]), int(first["head"])))
    effect = f"share of prompts with {name} on a route, the most active of {len(heads)} heads,"
    interval, sharpen = px.Interval(first["frequency"], first["low"], first["high"]), "a larger --limit or --dataset"
    found = [px.runs.Evidence(prompts, effect, interval, f"all heads, {share:.2f}", sharpen, null=share)]
    if correlation is not None:
        rank = correlation.spearman
        effect = f"rank correlation with {config.compare} over {correlation.n} heads"
        control = f"heads permuted within layers, p = {rank.p_within_layers:.2g}"
        found.append(px.runs.Evidence(prompts, effect, px.Interval(rank.r, rank.low, rank.high), control, sharpen))
    return found


def in_words(correlation: px.stats.Correlation) -> str:
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
    sys.exit(px.io.run(main, Config))
