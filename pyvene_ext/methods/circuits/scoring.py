"""Scores of every edge or node by one of several methods, with one signature: what circuits are chosen from.

Of edges, `[sender receiver]`: eap, eap_ig_inputs and eap_ig_activations are estimates from gradients (`edge_attribution`).
path_patching is exact and takes a run each: the edge's contribution is taken from source, MLPs between its ends are frozen
(Goldowsky-Dill et al. 2023). flow is how near what a sender adds is to what a receiver reads (`flow_scores`), mask how often a
learned mask keeps the edge (`learn_mask`), random a draw from a normal distribution.

acdc finds a set in place of scores (`acdc`, Conmy et al. 2023). An edge has by how much its removal lowered the mean metric (of
kl, raised it) when it was tested, 0 if it was removed untested. By magnitude (or by value, if ACDC compared so), the edges that
ACDC keeps come first, so that a circuit of as many is its own; then those it removed, the ones that changed most first.

Of nodes, `[sender]`: atp is an estimate from gradients (Nanda 2023), activation_patching is exact and takes a run each; mask and
random are as for edges.

Scores estimate delta = M(base) - M(base, ablated), and of kl, which is 0 in the model, -delta: positive where the edge or node
helps. flow, mask and random have no sign, and flow and random do not depend on the kind of ablation. Under ablations other than
patching, path_patching and activation_patching run the circuit of all other edges, and atp is the sum over a node's edges, by
eap. By patching both would be the same (but for heads that a norm follows, as in Gemma 2, whose share a circuit scales as in the
run that it is from).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_layers
from pyvene_ext.engine.measure import METRICS, MetricLike, as_metric
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.atp import atp
from pyvene_ext.methods.attribution.edges import EdgeMethod, edge_attribution, edges_at_once
from pyvene_ext.methods.attribution.senders import AblationKind, check_ablation, check_edges_of
from pyvene_ext.methods.circuits import METHODS, Level, OfEdges, OfNodes
from pyvene_ext.methods.circuits.acdc import acdc, acdc_passes, batch_sizes
from pyvene_ext.methods.circuits.choosing import By, Scores, count_all
from pyvene_ext.methods.circuits.circuit import Circuit, Edges, exists
from pyvene_ext.methods.circuits.edgewise import EdgewiseModel, PlainRun
from pyvene_ext.methods.circuits.masks import STEPS as MASK_STEPS
from pyvene_ext.methods.circuits.masks import learn_mask
from pyvene_ext.methods.circuits.running import circuits_at_once, of_one_length, run_circuits
from pyvene_ext.methods.heads.flow import proximity
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.graph import receivers, senders
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch

AT_ONCE = 256  # circuits without an edge or node that are given to `run_circuits` together, as matrices
TAU = 0.1  # of ACDC
# In forward passes of SmolLM2 135M; both take about four of tiny-qwen2.5, most of whose time is overhead.
CIRCUIT = 2  # that a circuit of nearly all edges takes
REMOVAL = 1  # that a removal of ACDC's takes, and less where many are run side by side
MASK_STEP = 14  # forward passes that a step of `learn_mask` took on tiny-qwen2.5, and fewer on larger models


class Cost(NamedTuple):
    """What scoring costs, in forward passes of one pair of prompts.

    Attributes:
        each: for each pair.
        fixed: however many there are.
    """

    each: float
    fixed: float = 0.0


def score_cost(
    config: Any,
    method: str,
    level: Level = "edge",
    steps: int = 5,
    ablation: AblationKind = "patching",
    batch_size: int = 8,
    start_share: float = 1.0,
) -> Cost:
    """Estimate the cost of `score` before it runs.

    Args:
        config: the model's config.
        method: as for `score`.
        level: as for `score`.
        steps: as for `score`.
        ablation: as for `score`.
        batch_size: as for `score`.
        start_share: share of all edges in the circuit that ACDC starts from.

    Returns:
        About as many passes as it took, or more: a step of a mask and flow on tiny-qwen2.5, the others on SmolLM2 135M.
    """
    if method == "mask":
        return Cost(0.0, float(MASK_STEP * MASK_STEPS * batch_size))
    if method == "acdc":
        of_all = acdc_passes(config)
        return Cost(of_all.least + REMOVAL * start_share * (of_all.one_by_one - of_all.least))
    runs = float(count_all(config, level))
    passes = {
        "random": 0.0,
        "flow": 6.0,
        "atp": 4.5,
        "eap": 4.5,
        "eap_ig_inputs": 1.0 + 3.5 * steps,
        "eap_ig_activations": 1.0 + 3.5 * steps * (2 * n_layers(config) + 1),
    }
    # Others take a run each: by patching one that begins at its layer, else one of a circuit.
    return Cost(passes.get(method, runs * (0.5 if ablation == "patching" else CIRCUIT)))


def check_scoring(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    methods: Iterable[str],
    metric: MetricLike = "logit_diff",
    *,
    ablation: AblationKind = "patching",
    batch_size: int = 8,
    memory: int | None = None,
) -> None:
    """Check that methods can score, and circuits be run, on some prompts and in some memory; nothing is run.

    Args:
        model: as for `score`.
        base: as for `score`.
        source: as for `score`.
        methods: those that will score.
        metric: as for `score`.
        ablation: as for `score`.
        batch_size: as for `score`.
        memory: as for `score`.

    Raises:
        ValueError: for prompts that `run_circuits` refuses, and where one prompt, or all for ACDC, do not fit.
    """
    check_ablation(model, base, source, ablation)
    circuits_at_once(model, base, source, batch_size, memory, gradient="mask" in methods)
    edges_at_once(model, base, source, batch_size, memory)
    if "acdc" in methods:
        batch_sizes(model, base, as_metric(metric), batch_size, memory)


def score(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    method: OfEdges | OfNodes,
    metric: MetricLike = "logit_diff",
    *,
    level: Level = "edge",
    steps: int = 5,
    tau: float = TAU,
    by: By | None = None,
    start_from: Circuit | Edges | None = None,
    ablation: AblationKind = "patching",
    seed: int = 0,
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> Scores:
    """Score every edge or node of a model.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards.
        base: the prompts on which the model does its task.
        source: as for `run_circuits`.
        method: one of `METHODS[level]`, as the module's docstring lists them.
        metric: as for `run`, one number per prompt; not read by flow and random.
        level: edge or node.
        steps: of integrated gradients.
        tau: the threshold of acdc, in units of the metric.
        by: how acdc compares a change with `tau`, by magnitude by default; not for kl.
        start_from: acdc tests the edges of this circuit only, the others being removed from the start; they get 0.
        ablation: what ablated edges carry, as for `run_circuits`.
        seed: of random scores and of a mask's draws.
        batch_size: prompts per forward pass.
        memory: bytes besides the weights, as for what the method is from.
        progress: show a bar.

    Returns:
        The mean over prompts, `[sender receiver]` of edges (0 where there is none) or `[sender]` of nodes (0 for the embedding),
        as `top_edges`, `top_nodes` and `faithfulness_curve` take them.

    Raises:
        ValueError: the level has no such method, or for what the method refuses.
    """
    if level not in METHODS:
        raise ValueError(f"level must be 'edge' or 'node', not {level!r}.")
    if method not in METHODS[level]:
        raise ValueError(f"no method {method!r} scores {level}s; choose among {', '.join(METHODS[level])}.")
    there = exists(model.config)
    options: dict[str, Any] = {"batch_size": batch_size, "memory": memory, "progress": progress}
    if method == "random":
        shape = there.shape if level == "edge" else there.shape[:1]
        return rng(seed, "random scores").normal(size=shape)
    if method == "flow":
        check_edges_of(model, base)
        return flow_scores(model, base, circuits_at_once(model, base, None, batch_size, memory))
    check_ablation(model, base, source, ablation)
    if method == "mask":
        options |= {"level": level, "steps": MASK_STEPS, "seed": seed}
        return learn_mask(model, base, source, metric, ablation=ablation, **options).scores
    if method == "acdc":
        options |= {"by": by, "start_from": start_from, "ablation": ablation}
        pruned = acdc(model, base, source, metric, tau=tau, **options)
        effects = np.nan_to_num(pruned.matrix)
        return effects if pruned.by else np.maximum(effects, 0)  # kl's rule is one-sided
    exact = method in ("path_patching", "activation_patching")
    if ablation == "patching" and source is not None and (exact or method == "atp"):
        found = _by_patches(model, base, source, metric, method, **options)
    elif exact:
        found = _left_out(model, base, source, metric, level, ablation=ablation, **options)
    else:
        gradient: EdgeMethod = "eap" if method == "atp" else method  # type: ignore[assignment]
        edges = edge_attribution(model, base, source, metric, gradient, ablation=ablation, steps=steps, **options)
        found = np.where(there, edges.per_prompt.mean(-1, dtype=np.float64), 0.0)
        if level == "node":
            found = found.sum(1)
            found[0] = 0.0  # the embedding is no node that can be left out
    return -found if as_metric(metric) == METRICS["kl"] else found


def _by_patches(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike,
    method: str,
    **options: Any,
) -> Scores:
    """Mean effects of patching each edge or node from source, exact or estimated."""
    reading, writing = receivers(model.config), senders(model.config)
    if method == "path_patching":
        there = exists(model.config)
        paths = [
            PathPatch(sender=str(writing[row]), receivers=(str(reading[column]),), freeze_mlps=True)
            for row, column in np.argwhere(there)
        ]
        found = np.zeros(there.shape)
        found[there] = patch(model, paths, base, source, metric, **options).delta.mean(1, dtype=np.float64)
        return found
    patches = [ActivationPatch(site=node.site, layer=node.layer, heads=node.heads) for node in writing[1:]]
    delta = (
        atp(model, patches, base, source, metric, **options)
        if method == "atp"
        else patch(model, patches, base, source, metric, **options).delta
    )
    return np.concatenate([[0.0], delta.mean(1, dtype=np.float64)])


def _left_out(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike,
    level: Level,
    **options: Any,
) -> Scores:
    """By how much the metric is lower in the circuit of all edges but one, or all but those that leave a node."""
    there = exists(model.config)
    found = np.zeros(there.shape[: 2 if level == "edge" else 1])
    places = np.argwhere(there) if level == "edge" else np.arange(1, len(there))[:, None]
    for some in np.array_split(places, -(-len(places) // AT_ONCE)):
        circuits = np.repeat(there[None], len(some), 0)
        for circuit, place in zip(circuits, some, strict=True):
            circuit[tuple(place)] = False
        runs = run_circuits(model, circuits, base, source, metric, **options)
        found[tuple(some.T)] = (runs.clean - runs.circuits).mean(1, dtype=np.float64)
    return found


def flow_scores(
    model: PreTrainedModel, prompts: TokenizedPrompts, batch_size: int = 8
) -> Float[np.ndarray, "sender receiver"]:
    """Score every edge by information flow: the proximity of what the sender adds to the stream that the receiver reads.

    Proximity (Ferrando & Voita 2024) is max(0, |stream| - |stream - added|) in the 1-norm, here divided by its sum over the
    stream's senders, and averaged over tokens, of the logits' stream over the last token. It does not know of the receiver's own
    weights, so that all heads of a layer read alike; Mueller et al. (2025) use it as a baseline.

    Args:
        model: as for `score`.
        prompts: the prompts.
        batch_size: prompts per forward pass.

    Returns:
        Shares from 0 to 1; 0 where there is no edge.
    """
    check_edges_of(model, prompts)
    edgewise = EdgewiseModel(model)
    total = np.zeros(edgewise.exists.shape)
    with evaluating(model), no_gradients(model):
        for index in of_one_length(prompts, batch_size):
            run = edgewise.plain(prompts.batch(index).input_ids)
            for (site, layer), readers in edgewise.readers.items():
                stream, n_added = _stream_read(edgewise, run, site, layer)
                shares = _shares_of(run.added[:, :n_added, -stream.shape[1] :], stream.float())
                total[:n_added, readers] += shares.sum(0).cpu().numpy()[:, None]
    return total / len(prompts)


def _stream_read(
    edgewise: EdgewiseModel, run: PlainRun, site: str, layer: int | None
) -> tuple[Float[Tensor, "batch pos d_model"], int]:
    """What receivers of a kind read, and how many senders have written by then."""
    if layer is None:
        return run.hidden[-1][:, -1:], len(edgewise.exists)
    heads, mlp = edgewise.senders_of(layer)
    if site == "mlp_in":
        return run.hidden[layer + 1] - run.added[:, mlp.start].to(run.hidden[layer]), mlp.start
    return run.hidden[layer], heads.start


def _shares_of(
    added: Float[Tensor, "batch sender pos d_model"], stream: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch sender"]:
    near = torch.stack([proximity(added[:, sender], stream) for sender in range(added.shape[1])], 1)
    return (near / near.sum(1, keepdim=True).clamp(min=1e-12)).mean(-1)
