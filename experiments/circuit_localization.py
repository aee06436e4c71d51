"""Which circuit does a task, and how faithful is it? Circuits by several methods, with MIB's CPR and CMD on held-out prompts.

    python experiments/circuit_localization.py
    python experiments/circuit_localization.py --model gemma-3-270m --dataset ioi_zh --answers first_difference
    python experiments/circuit_localization.py --level node --ablation mean --share 0.05

Method. Pairs of a clean and a corrupt prompt, of equally many tokens; others are skipped and reported. Half of them, drawn at
random, score every edge (or node); the circuits that the scores choose are judged on the other half. To run a circuit is to
ablate every edge outside of it (`pyvene_ext.methods.circuits.running`): by patching, with its value on the corrupt prompt.
Faithfulness is (M(circuit) - M(empty circuit)) / (M(model) - M(empty circuit)) in means over prompts (Marks et al. 2024).

Scores (`pyvene_ext.methods.circuits.scoring`) of edges: eap (Syed et al. 2023), eap_ig_inputs, eap_ig_activations (Hanna et al.
2024), path_patching (exact, a run each), flow (Ferrando & Voita 2024), mask (learned, slow), acdc (Conmy et al. 2023, slow),
random. ACDC gives one circuit for each `--tau` and no scores: its edges rank by what their removal changed when it was tested, so
that those it keeps come first, and every method is judged at their number too. On large models it is affordable from the edges
that another method ranks highest: `--methods eap_ig_inputs acdc --acdc_from 0.02`. Nodes: atp (Nanda 2023), activation_patching
(exact, a run each), mask, random. Scores are of the ablation that circuits are run with; flow and random do not depend on it.

Following MIB, the Mechanistic Interpretability Benchmark (Mueller et al. 2025), circuits have 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50
and 100% of the edges (or nodes), before edges are dropped that lie on no path from the embedding to the logits. CPR is the area
under faithfulness over these shares, the highest scores being taken first: 0.999 is the model. CMD is the area between
faithfulness and 1, scores of the largest magnitude being taken first: 0 is best. Both have percentile bootstrap 95% intervals
over held-out prompts. Here grouped K/V heads are one receiver each; MIB's graphs have one a query head.

Of each method the circuit of `--share` of the edges is written (of acdc, those that it keeps), with its faithfulness; that of
random circuits with as many edges between the same layers and kinds; its completeness, the faithfulness of all other edges (or
nodes) together, near 0 if the circuit misses nothing; and minimality, the share of `--removed` of its edges (or nodes) without
which faithfulness changes by 0.01 or more.

`--compare` counts the edges that the first method's circuit shares with those of other runs, beside pairs of random circuits with
as many edges between the same layers and kinds, and runs those circuits on the held-out prompts of this run.

Written to the folder OUT: methods.csv, one row per method; curves.csv, faithfulness by share; shared.csv, with --compare;
scores_METHOD.npy, [sender receiver] or [sender]; circuit_METHOD.json, which `pyvene_ext.circuits.load_circuit` reads, .dot, and
.csv, its edges with their scores (or those of their senders), which `python -m pyvene_ext.report OUT` draws; figures; config.yaml
(running it again gives the same); and summary.json, what was run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le

import pyvene_ext as px
from pyvene_ext.methods.circuits import METHODS, Level, OfEdges, OfNodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pyvene_ext.methods.circuits.choosing import By, Scores
    from pyvene_ext.methods.circuits.circuit import Circuit
    from pyvene_ext.methods.circuits.faithfulness import Curve
    from pyvene_ext.methods.circuits.judging import Judgement

Method = OfEdges | OfNodes
Rows = list[dict[str, Any]]
RANKINGS: tuple[By, By] = ("value", "magnitude")


@dataclass(frozen=True)
class Config(px.flags.Model, px.flags.Prompts, px.flags.Memory):
    out: px.flags.Out = None
    batch_size: px.flags.BatchSize = 8
    level: Level = "edge"
    """what circuits are made of: edges, or heads and MLPs with all edges among them"""
    methods: px.flags.EachOnce[Method] = ()
    """how edges or nodes are scored; by default eap, eap_ig_inputs, flow and random, or atp and random"""
    ablation: Literal["patching", "mean", "zero"] = "patching"
    """what edges outside of a circuit carry: their value on the corrupt prompt, their mean over corrupt prompts, or nothing"""
    metric: Literal["logit_diff", "probability", "kl"] = "logit_diff"
    """what is read at the last token"""
    steps: px.flags.Count = 5
    """of integrated gradients"""
    tau: Annotated[float, Gt(0)] = 0.1
    """of acdc: edges whose removal changes the mean metric by less are removed, in units of the metric"""
    acdc_from: Annotated[float, Gt(0), Le(1)] = 1.0
    """acdc tests only this share of the edges, those that the first method ranks highest; the others are removed untested"""
    share: Annotated[float, Gt(0), Le(1)] = 0.01
    """share of the edges or nodes in the circuit that is written"""
    by: Literal["magnitude", "value"] = "magnitude"
    """magnitude: the scores of the largest magnitude, of either sign; value: the highest, of what helps most"""
    random_circuits: px.flags.Count = 20
    """random circuits beside it, of which p is (1 + those as faithful) / (1 + all)"""
    removed: px.flags.Count = 20
    """of its edges (or nodes) are removed, one at a time, for minimality"""
    compare: px.flags.EachOnce[str] = ()
    """circuit_METHOD.json of other runs, such as of another language: what it shares with the first method's, and does here"""
    other_weights: bool = False
    """--compare takes circuits of other weights too, such as those of an earlier checkpoint"""

    def check_flags(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS[self.level]]
        if unknown:
            raise ValueError(
                f"--methods {unknown[0]} does not score {self.level}s; choose among {', '.join(METHODS[self.level])}."
            )
        if self.metric == "kl" and set(self.chosen) & {"eap", "atp"}:
            raise ValueError(
                "--metric kl has no first-order term at the clean run: leave eap and atp out of --methods."
            )
        if self.acdc_from < 1 and self.chosen[0] in ("acdc", "random"):
            raise ValueError(
                "--acdc_from needs a method that ranks the edges, such as eap: name it first in --methods."
            )

    @property
    def chosen(self) -> tuple[Method, ...]:
        """--methods or its default."""
        return self.methods or (
            ("eap", "eap_ig_inputs", "flow", "random") if self.level == "edge" else ("atp", "random")
        )


def main(config: Config) -> None:
    if not px.is_main_process():
        return  # on one device
    # Everything that can be wrong is found before the scores are.
    run = px.RunFolder(config, "circuit_localization", config.model, config.dataset)
    prompt_set = config.load_prompts()
    model, tokenizer = config.load_model()
    others = {
        path: px.circuits.load_circuit(path, model, other_weights=config.other_weights) for path in config.compare
    }
    alone = config.ablation == "zero"  # needs no corrupt texts
    pairs = None if alone else config.tokenize_pairs(prompt_set, model, tokenizer)
    base, source = pairs or (config.tokenize(prompt_set, model, tokenizer), None)
    halves = px.circuits.halves(base, source, config.ablation, config.seed)
    scored, judged = halves.take(halves.scored), halves.take(halves.judged)
    for on in (scored, judged):
        px.circuits.check_scoring(model, *on, config.chosen, **options(config))
    work = f"{len(scored[0])} pairs score, {len(judged[0])} judge: {', '.join(config.chosen)}"
    a_pass = px.runs.seconds_a_pass(model, halves.base) / len(halves.base)
    each, fixed = (passes * a_pass for passes in cost(config, model))
    if not run.announce(work, each * len(halves.base) + fixed, n=len(prompt_set), fixed=fixed):
        return
    means = px.circuits.check_defined(model, *judged, seed=config.seed, **options(config))

    with px.engine.first_tokens_said():
        found: dict[str, Found] = {}
        for chosen in config.chosen:
            found[chosen] = found_by(config, model, chosen, scored, judged, found)
        rows = table_of(config, model, found, judged, a_pass * len(scored[0]))
        own = found[config.chosen[0]].circuit
        shared = px.circuits.compare(model, own, others, *judged, seed=config.seed, **options(config))

    facts = px.metadata(
        model,
        **settings(config, halves),
        shared=shared,
        n_all=px.circuits.count_all(model.config, config.level),
        n_acdc=found["acdc"].n if "acdc" in found else None,
        mean_clean=means[0],
        mean_empty=means[1],
        methods=rows,
    )
    print(summary(config, facts, rows))
    with run.writing(facts, evidence(config, facts, rows), replacing=("*.npy", "*.csv", "circuit_*", "figures/*")):
        run.table("methods", rows)
        if shared:
            run.table("shared", shared)
        curves = [(method, by, curve) for method, one in found.items() for by, curve in one.curves.items()]
        run.table(
            "curves", [{"method": method, "by": by, **row} for method, by, curve in curves for row in curve.table()]
        )
        for method, one in found.items():
            run.array(f"scores_{method}", one.scores)
            write_circuit(run, config, model, method, one, others)
        draw(run, config, model, found)


# -- what is run -------------------------------------------------------------------------------------------------------


def cost(config: Config, model: PreTrainedModel) -> tuple[float, float]:
    """About how many forward passes of a pair it takes to score and judge: for each pair, and whatever their number."""
    how = config.level, config.steps, config.ablation, config.batch_size, config.acdc_from
    each, fixed = zip(*(px.circuits.score_cost(model.config, method, *how) for method in config.chosen), strict=True)
    judging = 1.7 * (2 * 8 + config.random_circuits + config.removed)  # of two times ten sizes some are cheap
    return (sum(each) + len(each) * judging) / 2, sum(fixed)


def options(config: Config) -> dict[str, Any]:
    """What all runs of circuits share."""
    how = {name: getattr(config, name) for name in ("metric", "ablation", "batch_size")}
    return how | {"memory": config.memory_bytes}


@dataclass(frozen=True)
class Found:
    """What a method gave: scores, in how many seconds; circuits of ten sizes by either ranking; the one written, n at first."""

    scores: Scores
    seconds: float
    curves: Mapping[By, Curve]
    n: int
    circuit: Circuit
    judged: Judgement

    def row(self, seed: int, a_pass: float) -> dict[str, Any]:
        """Its row of the table; `a_pass` is what a forward pass over the pairs that scored takes."""
        areas = px.circuits.areas_row(self.curves["value"], self.curves["magnitude"], seed)
        own = {"n_chosen": self.n} | self.judged.row()
        return areas | own | {"seconds": self.seconds, "passes": self.seconds / a_pass}


def found_by(
    config: Config, model: PreTrainedModel, method: Method, on_scored: Any, on_judged: Any, earlier: Mapping[str, Found]
) -> Found:
    """Score every edge or node on one half of the pairs, and judge circuits on the other."""
    how: dict[str, Any] = {name: getattr(config, name) for name in ("level", "steps", "tau", "seed")} | options(config)
    n_all = px.circuits.count_all(model.config, config.level)
    how["by"] = None if config.metric == "kl" else config.by
    if method == "acdc" and config.acdc_from < 1:
        first, n = earlier[config.chosen[0]].scores, int(config.acdc_from * n_all)
        how["start_from"] = px.circuits.top_edges(first, n, model.config, config.by)
        if not how["start_from"]:
            none = f"none of the {n} edges that {config.chosen[0]} ranks highest leads from the embedding to the logits"
            raise ValueError(f"--acdc_from {config.acdc_from}: {none}; take a larger share.")
    start = time.perf_counter()
    base, source = on_scored
    scores = px.circuits.score(model, base, source, method, **how)
    seconds = time.perf_counter() - start
    how = options(config) | {"shares": px.circuits.MIB_SHARES}
    curves = {by: px.circuits.faithfulness_curve(model, scores, *on_judged, by=by, **how) for by in RANKINGS}
    effects = abs(scores) if config.by == "magnitude" else scores
    n = max(1, int(config.share * n_all)) if method != "acdc" else int((effects >= config.tau).sum())  # what it keeps
    chosen = px.circuits.top_edges if config.level == "edge" else px.circuits.top_nodes
    circuit = chosen(scores, n, model.config, config.by)
    # Is it more than its layers, does it miss anything, does it need all it has?
    how = options(config) | {"random": config.random_circuits, "removed": config.removed, "seed": config.seed}
    judged = px.circuits.judge(model, circuit, *on_judged, scores=scores, n=n, by=config.by, **how)
    return Found(scores, seconds, curves, n, circuit, judged)


def table_of(config: Config, model: PreTrainedModel, found: Mapping[str, Found], on_judged: Any, a_pass: float) -> Rows:
    """One row per method; if ACDC was asked for, with the faithfulness of as many edges as it keeps."""
    rows = []
    for method, one in found.items():
        rows.append({"method": method} | one.row(config.seed, a_pass))
        if "acdc" in found:
            how = options(config) | {"by": config.by, "sizes": [found["acdc"].n]}
            curve = px.circuits.faithfulness_curve(model, one.scores, *on_judged, **how)
            rows[-1]["as_many"] = float(curve.values[0])
    return rows


# -- what is written and shown -----------------------------------------------------------------------------------------


def settings(config: Config, halves: px.circuits.Halves) -> dict[str, Any]:
    """What was run, for the summary."""
    flags = ("model", "dataset", "level", "ablation", "metric", "share", "by", "tau", "acdc_from", "answers", "seed")
    prompts = {"n": len(halves.base), "dropped": halves.left_out, "why_dropped": halves.why}
    hashes = {"base_hash": halves.base.hash, "source_hash": halves.source and halves.source.hash}
    drawn = {"scored": halves.scored, "judged": halves.judged}
    return {name: getattr(config, name) for name in flags} | prompts | hashes | drawn


def write_circuit(
    run: px.RunFolder, config: Config, model: PreTrainedModel, method: str, one: Found, others: Mapping[str, Circuit]
) -> None:
    """The circuit of a method as JSON and DOT and, unless it is random, as a table, of the first method beside `others`."""
    facts = {"method": method, "level": config.level, "metric": config.metric, "dataset": config.dataset}
    px.circuits.save_circuit(one.circuit, run.path / f"circuit_{method}.json", model, **facts)
    weights = px.circuits.named_scores(one.scores, one.circuit, model.config)
    px.circuits.save_dot(one.circuit, run.path / f"circuit_{method}.dot", model.config, weights)
    if weights and method != "random":
        name = "score" if config.level == "edge" else "score_of_sender"
        run.table(
            f"circuit_{method}", px.circuits.edge_rows(weights, name, others if method == config.chosen[0] else {})
        )


def draw(run: px.RunFolder, config: Config, model: PreTrainedModel, found: Mapping[str, Found]) -> None:
    """Faithfulness by size, and the strongest edges of the first method's circuit."""
    by_size = {method: one.curves[config.by] for method, one in list(found.items())[:4]}
    of = {method: (100 * curve.shares, curve.runs.interval()) for method, curve in by_size.items()}
    title = f"Faithfulness by size, edges by {config.by}: {run.of}"
    run.figure("faithfulness", px.figures.faithfulness_curves(of, title=title, axis=f"% of {config.level}s allowed"))
    first = config.chosen[0]
    if config.level == "edge":
        weights = px.circuits.named_scores(found[first].scores, found[first].circuit, model.config)
        title = f"Circuit by {first}, strongest edges: {run.of}"
        run.figure("circuit", px.figures.edge_graph(weights, title, "score", nodes=px.specs.senders(model.config)))


def summary(config: Config, facts: dict[str, Any], rows: Rows) -> str:
    """What the terminal shows: one table over methods."""
    n_scored, n_judged = len(facts["scored"]), len(facts["judged"])
    lines = [
        f"{config.model} on {config.dataset}: {facts['n_all']} {config.level}s, scored on {n_scored} pairs, judged on {n_judged}",
        f"mean {config.metric}: model {facts['mean_clean']:.3f}, empty circuit ({config.ablation}) {facts['mean_empty']:.3f}",
    ]
    of_share = f"circuit of {100 * max(1 / facts['n_all'], config.share):.3g}%: faithfulness"
    lines += [
        f"{px.io.counted(len(facts['dropped']), 'pair')} left out: {facts['why_dropped']}" if facts["dropped"] else "",
        f"{'':20} CPR (higher is better)  CMD (lower is better)   {of_share:36}  random  complete  minimal",
    ]
    for row in rows:
        cpr, cmd = (f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for name in ("cpr", "cmd"))
        own = f"{row['n_edges']} edges, {row['faithfulness']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(
            f"{row['method']:20} {cpr:22}  {cmd:22}  {own:36} {row['random_mean']:7.2f} {row['completeness']:9.2f} "
            f"{row['minimality']:8.2f}"
        )
    lost = [f"{row['n_chosen']} by {row['method']}" for row in rows if not row["n_edges"]]
    if lost:
        lines.append(f"no edge lies on a path from the embedding to the logits, of {', '.join(lost)}: a larger --share")
    taken = ", ".join(f"{row['method']} {row['passes']:.0f}" for row in rows)
    lines.append(f"scoring took, by the clock, as long as this many forward passes over its pairs: {taken}")
    if facts["n_acdc"] is not None:
        same = ", ".join(f"{row['method']} {row['as_many']:.2f}" for row in rows)
        lines.append(f"faithfulness of as many edges as acdc keeps, {facts['n_acdc']}: {same}")
    for row in facts["shared"]:
        chance = (
            f"by chance {row['chance']:.2f} [{row['chance_low']:.2f}, {row['chance_high']:.2f}], p = {row['p']:.2g}"
        )
        lines.append(f"{row['n_shared']} edges shared with {row['circuit']}: Jaccard {row['jaccard']:.2f}, {chance}")
        does = f"{row['faithfulness']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"on these prompts that circuit, of {row['n_other']} edges, has a faithfulness of {does}")
    return "\n".join(lines)


def evidence(config: Config, facts: dict[str, Any], rows: Rows) -> list[px.runs.Evidence]:
    """The faithfulness of the first method's circuit beside random circuits, and its CPR and CMD beside random scores."""
    row, sample = rows[0], f"{len(facts['judged'])} held-out pairs"
    effect = (
        f"{px.io.counted(row['n_chosen'], config.level)} of {facts['n_all']} by {row['method']} have a faithfulness of"
    )
    circuits = px.io.counted(config.random_circuits, "random circuit")
    random = f"{circuits} of the same layers and kinds, mean {row['random_mean']:.2g}, p = {row['p']:.2g}"
    interval, sharpen = px.Interval(row["faithfulness"], row["low"], row["high"]), "a larger --limit"
    found = [px.runs.Evidence(sample, effect, interval, random, f"{sharpen} or --random_circuits")]
    chance = {other["method"]: other for other in rows[1:]}.get("random")
    for area in ("cpr", "cmd"):
        interval = px.Interval(row[area], row[f"{area}_low"], row[f"{area}_high"])
        control = f"random scores, {chance[area]:.2g}" if chance else "none; add random to --methods"
        found.append(
            px.runs.Evidence(sample, f"the {area.upper()} by {row['method']} is", interval, control, sharpen, None)
        )
    return found


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
