"""Learned masks: gates on all edges or nodes, optimised together so that the smallest circuits stay close to the model.

    mask = learn_mask(model, base, source, "logit_diff")                 # trained on these prompts
    mask.circuit                                                         # what is open at the end
    faithfulness_curve(model, mask.scores, held_out, its_source, metric="logit_diff", shares=MIB_SHARES)

Every edge (or node) has an open probability p = sigmoid(theta). Gates are drawn by uniform gradient sampling (UGS; Li & Janson
2024, section 4): with probability w = p (1 - p) uniform between 0 and 1, otherwise open or closed. p is their mean, and gradients
at gates that are partly open estimate that of p. Such a gate mixes what the sender adds in this run with the ablated value. Each
prompt of a batch has gates of its own.

In place of a penalty on the number of open gates, whose weight would have to be found by trial, the mean of p is held at a share
that falls geometrically from 1 to `share`: after each step all theta are shifted by one number, and the gradient is projected
onto shifts that keep the mean, which is a Lagrangian whose multiplier is solved for (Edge Pruning, Bhaskar et al. 2024, has a
falling target too, and learns the multiplier).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.engine.measure import METRICS, Metric, MetricLike, check_metric
from pyvene_ext.engine.results import Shown, Summary, count, table, three_digits
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.gradients import check_differentiable
from pyvene_ext.methods.attribution.senders import AblationKind, check_ablation
from pyvene_ext.methods.circuits import Level
from pyvene_ext.methods.circuits.choosing import chosen_edges
from pyvene_ext.methods.circuits.circuit import Circuit
from pyvene_ext.methods.circuits.edgewise import EdgewiseModel
from pyvene_ext.methods.circuits.running import AblatedValues, circuits_at_once, of_one_length
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.graph import Node, edge_exists, receivers, senders

if TYPE_CHECKING:
    import pandas as pd

SHARES: dict[Level, float] = {"edge": 0.02, "node": 0.1}  # open at the end
STEPS = 200
FALLING = 0.9  # of the steps; in the rest the share stays
SHOWN = 8  # steps in a repr


@dataclass(frozen=True, repr=False)
class Mask(Shown):
    """A learned mask.

    Attributes:
        scores: for `top_edges`, `top_nodes` and `faithfulness_curve`: the open probability of each edge, by `graph.senders` and
            `graph.receivers`, 0 where there is none; or of each node, by `graph.senders`, 1 for the embedding, which has no gate.
        circuit: of the edges or nodes with a probability above 0.5, pruned.
        loss: the mean distance of the prompts of each step from the model.
        open: how many edges or nodes were open on average in each step.
        metric: the name of the metric.
        settings: the other arguments that the result depends on, by name.
        senders: of the model's graph.
        receivers: of the model's graph.
    """

    scores: Float64[np.ndarray, sender * receiver]
    circuit: Circuit
    loss: Float32[np.ndarray, " step"]
    open: Float32[np.ndarray, " step"]
    metric: str
    settings: dict[str, str | int | float]
    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]

    @cached_property
    def matrix(self) -> Float[np.ndarray, "sender receiver"]:
        """The scores by sender and receiver, each node's of all edges that leave it; NaN where there is no edge."""
        there = edge_exists(self.senders, self.receivers)
        return np.where(there, self.scores.reshape(len(self.senders), -1), np.nan)

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per step.

        Returns:
            A table with the columns step, open and loss.
        """
        return table({"step": range(len(self.loss))}, {"open": self.open, "loss": self.loss})

    def summarise(self) -> Summary:
        """The loss at some steps."""
        some = np.unique(np.linspace(0, len(self.loss) - 1, SHOWN).round().astype(int))
        rows = [(str(step), f"{self.open[step]:.1f}", three_digits(self.loss[step])) for step in some]
        level = self.settings["level"]
        what = f"{count(int((self.scores > 0.5).sum()), str(level))} open, {count(len(self.circuit), 'edge')} after pruning"
        return Summary(f"Mask by {self.metric}: {what}", ("step", f"{level}s open", "loss"), rows)


def learn_mask(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "kl",
    *,
    level: Level = "edge",
    ablation: AblationKind = "patching",
    share: float | None = None,
    steps: int = STEPS,
    learning_rate: float = 0.3,
    seed: int = 0,
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> Mask:
    """Learn which edges or nodes a model needs, on prompts other than those that the circuit is then judged on.

    The loss is kl to the model itself or, of any other metric, the squared difference from the model's value, so that a circuit
    that does the task better than the model is no better than one that does it as much worse.

    Args:
        model: as for `run_circuits`; its weights stay as they are.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: kl, or one differentiable number per prompt, as for `edge_attribution`. Circuits are best judged by the same.
        level: edge: every edge has a gate. node: every head and MLP has one, for all edges that leave it.
        ablation: what closed edges carry, as for `run_circuits`.
        share: the share of the edges (or nodes) that is open at the end; by default 0.02 of the edges, 0.1 of the nodes.
        steps: how many times the gates are changed, each time by the prompts of one batch. Prompts are seen in a new order each
            time around.
        learning_rate: of Adam.
        seed: of the gates that are drawn and of the order of the prompts; on a CPU the same seed gives the same mask.
        batch_size: prompts per step, all of one length.
        memory: bytes besides the weights; the prompts of a step are taken one part after the other where they need more, which
            changes nothing. By default half of the weights, at least 512 MiB.
        progress: show a bar.

    Returns:
        The mask.

    Raises:
        ValueError: before the model runs, for what `run_circuits` refuses, a metric without a gradient, an unknown level, and
            numbers out of range; later for values and gradients that are not finite.
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be 'edge' or 'node', not {level!r}.")
    share = SHARES[level] if share is None else share
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, not {share!r}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be a finite number above 0, not {learning_rate!r}.")
    steps = whole_number("steps", steps, 1)
    check_ablation(model, base, source, ablation)
    metric = check_metric(model, base, metric)
    check_differentiable(metric, model.dtype, first_order=False)
    at_once = circuits_at_once(model, base, source, batch_size, memory, gradient=True)
    edgewise = EdgewiseModel(model)
    there = torch.from_numpy(edgewise.exists)
    gated = there if level == "edge" else torch.arange(len(there)) > 0  # all but the embedding
    draws = torch.Generator().manual_seed(int(rng(seed, "gates").integers(2**62)))
    losses = np.empty(steps, np.float32)
    n_gates = int(gated.sum())
    shares = np.maximum(share ** np.minimum(np.arange(1, steps + 1) / (FALLING * steps), 1), 1 / n_gates)
    bar = progress_bar(steps, "step", "mask", shown=progress)
    with bar, evaluating(model), torch.inference_mode(False), torch.no_grad():
        model.requires_grad_(False)
        values = AblatedValues(edgewise, source, ablation, at_once)
        theta = torch.zeros(n_gates, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([theta], lr=learning_rate, betas=(0.9, 0.95))
        for step, (index, weight) in enumerate(islice(_batches(base, batch_size, seed), steps)):
            theta += _shift(theta, float(shares[step]))
            uniform = torch.rand(len(index), n_gates, generator=draws, dtype=torch.float64)
            gradient, losses[step] = torch.zeros_like(theta), 0
            for first in range(0, len(index), at_once):
                part = index[first : first + at_once]
                batch = base.batch(part)
                plain = edgewise.plain(batch.input_ids)
                batch, ablated = edgewise.with_clean(batch, plain, metric), values.of(part, plain)
                clean = edgewise.read(plain.last, batch, metric)
                with torch.enable_grad():
                    gates = _placed(_sampled(theta, uniform[first : first + at_once]), gated)
                    kept = gates if level == "edge" else gates[..., None] * there
                    kept = kept[None].to(ablated.values.device, torch.float32)
                    last = edgewise.circuits(batch.input_ids, kept, ablated)[0]
                    distance = _distance(edgewise.read(last, batch, metric), clean, metric)
                    gradient += torch.autograd.grad(weight * distance.sum(), theta)[0]
                losses[step] += float(distance.sum()) / len(index)
            if not gradient.isfinite().all():
                raise ValueError(
                    f"the gradient of {metric.label} is not finite in step {step}; load the model in float32, or lower the "
                    "learning rate."
                )
            slope = torch.sigmoid(theta) * torch.sigmoid(-theta)
            theta.grad = gradient - slope * gradient.sum() / slope.sum()
            adam.step()
            bar.update()
        theta += _shift(theta, float(shares[-1]))
        scores = _placed(torch.sigmoid(theta)[None], gated)[0].numpy()
    settings: dict[str, str | int | float] = {
        "level": level,
        "ablation": ablation,
        "share": share,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "batch_size": batch_size,
    }
    n_open = int((scores[gated.numpy()] > 0.5).sum())
    circuit = Circuit.of(chosen_edges(scores, n_open, model.config), model.config)
    nodes = tuple(senders(model.config)), tuple(receivers(model.config))
    return Mask(scores, circuit, losses, (shares * n_gates).astype(np.float32), metric.label, settings, *nodes)


def _batches(prompts: TokenizedPrompts, batch_size: int, seed: int) -> Iterator[tuple[list[int], float]]:
    """Batches of prompts of one length without end, and what makes the sum over a batch an estimate of the mean over prompts."""
    draws = rng(seed, "batches")
    while True:
        order = draws.permutation(len(prompts))
        batches = [order[some].tolist() for some in of_one_length(prompts.take(order.tolist()), batch_size)]
        for number in draws.permutation(len(batches)):
            yield batches[number], len(batches) / len(prompts)


def _shift(theta: Float64[Tensor, " gate"], share: float) -> float:
    """What to add to all theta so that the mean of p is `share`, by bisection."""
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if float(torch.sigmoid(theta + middle).mean()) > share else (middle, high)
    return high


def _sampled(theta: Float64[Tensor, " gate"], uniform: Float64[Tensor, "batch gate"]) -> Float64[Tensor, "batch gate"]:
    """Gates by uniform gradient sampling: partly open where a draw falls within w = p (1 - p) around p."""
    p = torch.sigmoid(theta)
    window = (torch.sigmoid(theta) * torch.sigmoid(-theta)).detach()
    return ((p - uniform) / window + 0.5).clamp(0, 1)


def _placed(gates: Float64[Tensor, "batch gate"], gated: Tensor) -> Float64[Tensor, "batch sender *receiver"]:
    """Gates by sender and receiver, 0 where there is no edge; or by sender, 1 for the embedding."""
    placed = gates.new_full((len(gates), *gated.shape), float(gated.ndim == 1))
    placed[:, gated] = gates
    return placed


def _distance(
    values: Float[Tensor, " batch"], clean: Float[Tensor, " batch"], metric: Metric
) -> Float[Tensor, " batch"]:
    """How far prompts are from the untouched run."""
    return values if metric.function is METRICS["kl"].function else (values - clean).square()
