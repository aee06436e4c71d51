"""Running circuits, and how much of the model's behaviour they explain on their own.

    scores = edge_attribution(model, clean, corrupt).matrix           # or any other [sender receiver]
    circuit = top_edges(scores, 100, model.config)
    faithfulness(model, circuit, base=clean, source=corrupt)          # 1: the circuit does what the model does
    curve = faithfulness_curve(model, scores, clean, corrupt)         # curve.sizes, curve.values, curve.area()
    curve = faithfulness_curve(model, scores, clean, corrupt, shares=MIB_SHARES)    # curve.cpr(), curve.cmd()
    chance = random_circuits(scores, 100, model.config, count=20)     # controls

To run a circuit is to run the base prompts with every edge outside of it ablated (Conmy et al. 2023; Hanna et al. 2024), as
`methods.circuits.edgewise` computes it. `methods.attribution.senders` defines what an ablated edge carries: by patching, mean or
zero ablation.

With the full circuit every receiver reads what it reads in the run on the base prompts, with the empty one nothing but ablated
values: by patching, what it reads in the run on the source prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from transformers import PreTrainedModel

from modelcards import dimensions, n_layers
from pyvene_ext.engine.measure import MetricLike, as_array, check_metric
from pyvene_ext.engine.sweep.plan import prompts_at_once
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.methods.attribution.receivers import TOGETHER
from pyvene_ext.methods.attribution.senders import AblationKind, Senders, check_ablation
from pyvene_ext.methods.circuits import Level
from pyvene_ext.methods.circuits.choosing import By, chosen_edges, count_all, left_out, random_edges
from pyvene_ext.methods.circuits.circuit import Circuit, Edges, exists, matrix_of
from pyvene_ext.methods.circuits.edgewise import Ablated, EdgewiseModel, PlainRun
from pyvene_ext.methods.circuits.faithfulness import CircuitRuns, Curve
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def run_circuit(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    **options: Any,
) -> Float32[np.ndarray, " prompt"]:
    """Run one circuit, as `run_circuits` does.

    Args:
        model: as for `run_circuits`.
        circuit: a `Circuit` or a boolean matrix.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        **options: further arguments of `run_circuits`.

    Returns:
        The metric of every base prompt.
    """
    return run_circuits(model, [circuit], base, source, metric, **options).circuits[0]


def run_circuits(
    model: PreTrainedModel,
    circuits: Iterable[Circuit | Edges],
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    *,
    ablation: AblationKind = "patching",
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> CircuitRuns:
    """Run the base prompts through circuits.

    This takes one forward pass of base and of source, and for each circuit at most one and the sums that make its receivers'
    streams: edges x tokens x d_model multiplications. It is less where a circuit leaves layers or receivers alone, and nothing
    for a circuit that occurs twice, the full one, and, by patching, the empty one; `docs/howto/circuits.md` has figures. Sums
    over senders are in float32 whatever the model's dtype; the contributions of all senders are held twice, senders x tokens x
    d_model per prompt.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        circuits: each a `Circuit` or a boolean matrix by `graph.senders` and `graph.receivers`; they are not pruned.
        base: the prompts that are run; the metric is read with their answers.
        source: what ablated edges are set to: for patching, prompts paired with `base` by order and of equal length; for mean,
            the prompts over whose tokens the mean is taken; for zero, None.
        metric: as for `run`, one number per prompt; kl is to the clean run.
        ablation: what ablated edges carry, as the module's docstring defines it.
        batch_size: prompts per forward pass, all of one length.
        memory: bytes besides the weights; fewer prompts are taken at once where `batch_size` of them need more. By default half
            of the weights, at least 512 MiB.
        progress: show a bar.

    Returns:
        The metric of base, of the empty circuit, and of each circuit.

    Raises:
        ValueError: before the model runs, for an edge that the model lacks, an unknown metric or ablation, prompts that are not
            pairs, a pair of unequal lengths (naming it), answers outside of the vocabulary, or output projections that cannot be
            split by heads.
    """
    config = model.config
    if isinstance(circuits, Circuit) or (isinstance(circuits, np.ndarray) and circuits.ndim == 2):
        raise ValueError("circuits are a list: put the one in brackets, or use run_circuit.")
    matrices = [matrix_of(circuit, config) for circuit in circuits]
    check_ablation(model, base, source, ablation)
    metric = check_metric(model, base, metric)
    batch_size = circuits_at_once(model, base, source, batch_size, memory)
    if not matrices:
        raise ValueError("nothing to run: give at least one circuit.")
    there = exists(config)
    run = {matrix.tobytes(): matrix for matrix in (np.zeros_like(there), *matrices)}
    found = {key: np.empty(len(base), np.float32) for key in run}
    edgewise = EdgewiseModel(model)
    bar = progress_bar(len(run) * len(base), "prompt", "circuits", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        values = AblatedValues(edgewise, source, ablation, batch_size)
        for index in of_one_length(base, batch_size):
            batch = base.batch(index)
            plain = edgewise.plain(batch.input_ids, recorded=ablation != "patching")
            batch, ablated = edgewise.with_clean(batch, plain, metric), values.of(index, plain)
            for key, matrix in run.items():
                if np.array_equal(matrix, there):
                    last = plain.last
                elif ablated.is_run and not matrix.any():
                    last = ablated.known.last
                else:
                    last = edgewise.circuits(batch.input_ids, matrix[None], ablated)[0]
                found[key][index] = as_array(edgewise.read(last, batch, metric))
                bar.update(len(index))
            clean_values = as_array(edgewise.read(plain.last, batch, metric))
            found.setdefault(there.tobytes(), np.empty(len(base), np.float32))[index] = clean_values
    of = [found[matrix.tobytes()] for matrix in (there, np.zeros_like(there), *matrices)]
    return CircuitRuns(metric.label, of[0], of[1], np.stack(of[2:]))


class AblatedValues:
    """What ablated edges carry in the runs of some prompts, whatever the kind of ablation."""

    def __init__(
        self, edgewise: EdgewiseModel, source: TokenizedPrompts | None, ablation: AblationKind, batch_size: int
    ) -> None:
        """Take a model, and for mean ablation run the source prompts.

        Args:
            edgewise: the model.
            source: as for `run_circuits`.
            ablation: as for `run_circuits`.
            batch_size: prompts per forward pass.
        """
        self._edgewise, self._source = edgewise, source
        constant = Senders(edgewise.replay.model).constant(source, ablation, batch_size)
        self._constant = None if constant is None else constant[None, :, None]

    def of(self, index: Sequence[int], plain: PlainRun) -> Ablated:
        """Give the values for some prompts.

        Args:
            index: the numbers of the prompts, all of one length.
            plain: their plain run; for patching it need not be recorded.

        Returns:
            The values.
        """
        if self._constant is not None:
            return Ablated(self._constant, plain, is_run=False)
        assert self._source is not None
        return Ablated.by_run(self._edgewise.plain(self._source.batch(index).input_ids))


def circuits_at_once(
    model: PreTrainedModel,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    batch_size: int,
    memory: int | None,
    *,
    gradient: bool = False,
) -> int:
    """Count the prompts that fit: contributions of all senders twice, and streams and activations of receivers.

    Args:
        model: as for `run_circuits`.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        batch_size: as for `run_circuits`.
        memory: as for `run_circuits`.
        gradient: the gradient with respect to the edges is taken, for which activations of all receivers are kept.

    Returns:
        The number of prompts, so that all batches are about as large; with `gradient`, all parts of one batch.

    Raises:
        ValueError: a wrong size, and where not even one fits.
    """
    base.batches(batch_size)  # refuses a wrong size
    layers, (n_senders, n_receivers) = n_layers(model.config), exists(model.config).shape
    tensors = 2 * n_senders + 12 * (n_senders // layers) + 7 * layers + min(TOGETHER, n_receivers)
    if gradient:
        tensors += 2 * n_senders + 10 * n_receivers + 24 * layers
    length = max(len(ids) for some in (base, source) if some is not None for ids in some.input_ids)
    each = 4 * tensors * length * dimensions(model.config)["d_model"]
    n_prompts = min(batch_size, len(base)) if gradient else len(base)
    return prompts_at_once(model, n_prompts, each, batch_size, memory)


def faithfulness(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    **options: Any,
) -> float:
    """Faithfulness of a circuit: the share of the difference between base and source that it recovers (Marks et al. 2024).

    Args:
        model: as for `run_circuits`.
        circuit: a `Circuit` or a boolean matrix.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        **options: further arguments of `run_circuits`.

    Returns:
        `CircuitRuns.faithfulness` of the circuit.
    """
    return float(run_circuits(model, [circuit], base, source, metric, **options).faithfulness[0])


def completeness(
    model: PreTrainedModel,
    circuit: Circuit | Edges,
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    metric: MetricLike = "logit_diff",
    *,
    level: Level = "edge",
    **options: Any,
) -> float:
    """Completeness of a circuit: the faithfulness of its complement, near 0 if the circuit misses nothing (Marks et al. 2024).

    Args:
        model: as for `run_circuits`.
        circuit: a `Circuit` or a boolean matrix.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        metric: as for `run_circuits`.
        level: edge: the complement is all other edges. node: for a circuit that `top_nodes` made, all other nodes with the edges
            among them.
        **options: further arguments of `run_circuits`.

    Returns:
        `CircuitRuns.faithfulness` of the complement.
    """
    others = left_out(matrix_of(circuit, model.config), model.config, level)
    return faithfulness(model, others, base, source, metric, **options)


def faithfulness_curve(
    model: PreTrainedModel,
    scores: Float[np.ndarray, sender * receiver],
    base: TokenizedPrompts,
    source: TokenizedPrompts | None,
    sizes: Collection[int] | None = None,
    metric: MetricLike = "logit_diff",
    *,
    shares: Collection[float] | None = None,
    by: By = "magnitude",
    complement: bool = False,
    random: int = 0,
    seed: int = 0,
    **options: Any,
) -> Curve:
    """Measure the faithfulness of the circuits that `top_edges` or `top_nodes` makes, by their size.

    Args:
        model: as for `run_circuits`.
        scores: of edges, as for `top_edges`; or of nodes, one per sender, as for `top_nodes`.
        base: as for `run_circuits`.
        source: as for `run_circuits`.
        sizes: numbers of edges (or nodes) before pruning; by default 1, 2, 4, ... and all.
        metric: as for `run_circuits`.
        shares: the sizes as shares of all edges (or nodes), above 0 and up to 1, rounded down; `MIB_SHARES` are those of Mueller
            et al. 2025. In place of `sizes`.
        by: whether scores are chosen by their magnitude, or the highest first, as for `top_edges`.
        complement: run each circuit's complement instead, the other edges or nodes, so that the values are completeness.
        random: how many `random_circuits` of each size are run too, as controls.
        seed: of their draws.
        **options: further arguments of `run_circuits`.

    Returns:
        The curve.

    Raises:
        ValueError: for what `top_edges`, `top_nodes` and `run_circuits` refuse, for no size, for a size given twice, and for
            both sizes and shares.
    """
    config, random = model.config, whole_number("random", random, 0)
    scores = np.asarray(scores)
    level: Level = "node" if scores.ndim == 1 else "edge"
    n_all = count_all(config, level)
    if shares is not None:
        if sizes is not None:
            raise ValueError("give sizes or shares, not both.")
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares must be above 0 and at most 1, not {list(shares)}.")
        given = sorted(shares)
        ascending = [int(share * n_all) for share in given]
    else:
        if sizes is None:
            sizes = [*(2**power for power in range((n_all - 1).bit_length())), n_all]
        ascending = sorted(sizes)
        given = [n / n_all for n in ascending]
    if not given or len(set(given)) < len(given):
        raise ValueError(f"give one or more sizes, each once, not {list(shares or sizes or ())}.")
    kept = [chosen_edges(scores, n, config, by) for n in ascending]
    n_edges = np.array([int(matrix.sum()) for matrix in kept])
    for n in ascending if random else ():
        kept += random_edges(scores, n, config, random, by=by, seed=seed)
    run = [left_out(matrix, config, level) for matrix in kept] if complement else kept
    runs = run_circuits(model, run, base, source, metric, **options)
    own, others = np.split(runs.circuits, [len(ascending)])
    of_random = others.reshape(len(ascending), random, len(base))
    return Curve(np.array(ascending), n_edges, np.array(given), replace(runs, circuits=own), of_random)


def of_one_length(prompts: TokenizedPrompts, batch_size: int) -> Iterator[list[int]]:
    """The prompts of each length, `batch_size` at a time.

    Args:
        prompts: prompts of any lengths.
        batch_size: the most at a time.

    Yields:
        The numbers of some prompts of one length.
    """
    lengths = [len(ids) for ids in prompts.input_ids]
    for length in sorted(set(lengths)):
        those = [prompt for prompt, own in enumerate(lengths) if own == length]
        yield from (those[start : start + batch_size] for start in range(0, len(those), batch_size))
