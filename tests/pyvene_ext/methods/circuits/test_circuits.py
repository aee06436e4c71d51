"""Circuits against plain hooks, one receiver at a time, and against planted circuits, whose edges are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tiny.planted_circuits import ARCHITECTURES, Architecture, Planted, planted
from torch import Tensor, nn
from transformers import Gemma2ForCausalLM

from pyvene_ext.engine.measure import METRICS
from pyvene_ext.engine.plain import run
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.circuits import edgewise
from pyvene_ext.methods.circuits.choosing import random_circuits, top_edges, top_nodes
from pyvene_ext.methods.circuits.circuit import Circuit, exists, named_scores
from pyvene_ext.methods.circuits.faithfulness import CircuitRuns, Curve
from pyvene_ext.methods.circuits.running import (
    MIB_SHARES,
    completeness,
    faithfulness,
    faithfulness_curve,
    run_circuit,
    run_circuits,
)
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.graph import receivers as receiver_nodes
from pyvene_ext.specs.graph import senders as sender_nodes
from tests.ground_truth.paths import place, precedes, receivers, run_by_hooks, senders
from tests.live_tensors import Peak
from tests.pretended_devices import PretendedDevices, spread
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, VOCAB, random_model, tiny_config

LENGTHS = (9, 6, 7, 6, 9, 6)
BASE, SOURCE = random_prompts(LENGTHS), random_prompts(LENGTHS, seed=1)
every_family = pytest.mark.parametrize("family", FAMILIES)
both_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
runs_of: Callable[..., CircuitRuns] = partial(run_circuits, progress=False)
curve_of: Callable[..., Curve] = partial(faithfulness_curve, progress=False)


# -- by hand -----------------------------------------------------------------------------------------------------------


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def norm_in_front(model: Any, receiver: str) -> nn.Module:
    """The norm between the residual stream and a receiver."""
    if receiver == "logits":
        return place(model, "logits").module
    block: Any = blocks_of(model)[int(receiver.split(".")[1])]
    before_mlp = receiver.startswith("mlp_in")
    if hasattr(block, "ln_1"):
        return block.ln_2 if before_mlp else block.ln_1
    if not before_mlp:
        return block.input_layernorm
    return getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)


def contributions(model: Any, ids: Tensor, put: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What every sender adds to the residual stream, `batch pos d_model`, in a run with places set."""
    normed: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    gemma = hasattr(blocks_of(model)[0], names[1])
    with ExitStack() as stack:
        for layer, block in enumerate(blocks_of(model)) if gemma else ():
            for name in names:

                def keep(_: Any, args: tuple, out: Tensor, key: tuple[int, str] = (layer, name)) -> None:
                    normed[key] = args[0], out

                stack.callback(getattr(block, name).register_forward_hook(keep).remove)
        _, seen = run_by_hooks(model, ids, put=put, read=senders(model))
    added = {}
    for sender, value in seen.items():
        kind, *numbers = sender.split(".")
        added[sender] = value
        if kind == "z":
            where = place(model, sender)
            weight: Any = where.module.weight
            rows = weight[where.entries] if hasattr(model, "transformer") else weight.T[where.entries]
            added[sender] = value @ rows
            if gemma:
                entering, _ = normed[int(numbers[0]), names[0]]
                norm: Any = getattr(blocks_of(model)[int(numbers[0])], names[0])
                rms = (entering.square().mean(-1, keepdim=True) + norm.eps).sqrt()
                added[sender] = added[sender] * (1 + norm.weight) / rms
        elif kind == "mlp_out" and gemma:
            added[sender] = normed[int(numbers[0]), names[1]][1]
    return {sender: x.detach() for sender, x in added.items()}


def received(model: Any, ids: Tensor, put: dict[str, Tensor], receiver: str, change: Tensor) -> Tensor:
    """What a receiver holds when the stream in front of its norm is changed; of the logits, these."""

    def moved(_: Any, args: tuple) -> tuple:
        return (args[0] + change, *args[1:])

    handle = norm_in_front(model, receiver).register_forward_pre_hook(moved)
    try:
        logits, seen = run_by_hooks(model, ids, put=put, read=() if receiver == "logits" else (receiver,))
    finally:
        handle.remove()
    return logits if receiver == "logits" else seen[receiver]


def circuit_by_hooks(model: Any, edges: Collection[str], base: Tensor, source: Tensor) -> Tensor:
    """Logits at the last position, every receiver's stream being made anew from what the senders add at that time."""
    of_source = contributions(model, source)
    put: dict[str, Tensor] = {}
    for receiver in receivers(model):
        now = contributions(model, base, put)
        missed = [s for s in senders(model) if precedes(s, receiver) and f"{s}->{receiver}" not in edges]
        change = torch.zeros_like(now["embed"])
        for sender in missed:
            change = change + of_source[sender] - now[sender]
        put[receiver] = received(model, base, put, receiver, change)
    return put["logits"]


def patched_edge_by_hooks(model: Any, edge: str, base: Tensor, source: Tensor) -> Tensor:
    """Logits of base with one sender's contribution to one receiver's stream taken from source."""
    sender, receiver = edge.split("->")
    change = contributions(model, source)[sender] - contributions(model, base)[sender]
    value = received(model, base, {}, receiver, change)
    return value if receiver == "logits" else run_by_hooks(model, base, put={receiver: value})[0]


def every_edge(model: Any) -> list[str]:
    return [f"{s}->{r}" for r in receivers(model) for s in senders(model) if precedes(s, r)]


def logit_diff(logits: Tensor, answers: Iterable[tuple[int, int]]) -> np.ndarray:
    right, wrong = torch.tensor(list(answers)).unbind(1)
    row = torch.arange(len(logits))
    return (logits[row, right] - logits[row, wrong]).numpy()


def chosen(prompts: TokenizedPrompts, index: Iterable[int]) -> TokenizedPrompts:
    return prompts.take(index)


def of_length(length: int) -> tuple[list[int], Tensor, Tensor]:
    """Which pairs have it, and their ids."""
    index = [i for i, own in enumerate(LENGTHS) if own == length]
    base, source = (torch.tensor(chosen(prompts, index).input_ids) for prompts in (BASE, SOURCE))
    return index, base, source


def by_hand(model: Any, edges: Collection[str]) -> np.ndarray:
    found = np.empty(len(LENGTHS))
    for length in set(LENGTHS):
        index, *ids = of_length(length)
        found[index] = logit_diff(circuit_by_hooks(model, edges, *ids), chosen(BASE, index).answer_ids)
    return found


def some_edges(model: Any, share: float, seed: int = 0) -> frozenset[str]:
    generator = np.random.default_rng(seed)
    return frozenset(edge for edge in every_edge(model) if generator.random() < share)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def gemma2_with_biases() -> Any:
    """Gemma 2 whose output projections have biases, which a post-norm scales."""
    config: Any = tiny_config("gemma2")
    config.attention_bias = True
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter))
    return model.eval()


# -- running a circuit -------------------------------------------------------------------------------------------------


@every_family
def test_a_random_circuit_is_what_hooks_on_one_receiver_after_the_other_give(family: str) -> None:
    model = random_model(family)
    edges = some_edges(model, 0.5)
    found = run_circuit(model, Circuit(edges), BASE, SOURCE, batch_size=2, progress=False)
    close(found, by_hand(model, edges))
    assert np.median(abs(found - runs_of(model, [Circuit.full(model.config)], BASE, SOURCE).clean)) > 0.1


@pytest.mark.parametrize("share", first_only([0.9, 0.1]))
def test_sparse_and_dense_circuits_are_what_hooks_give_where_a_post_norm_scales_a_bias(share: float) -> None:
    model = gemma2_with_biases()
    edges = some_edges(model, share, seed=1)
    close(run_circuit(model, Circuit(edges), BASE, SOURCE, progress=False), by_hand(model, edges))


@pytest.mark.parametrize("ablation", ["patching", "zero"])
def test_circuits_do_not_depend_on_split_weights_nor_on_how_many_streams_are_summed_at_once(
    ablation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("mistral")
    circuits = [Circuit(some_edges(model, share)) for share in (0.02, 0.3, 0.95)]
    found = runs_of(model, circuits, BASE, SOURCE if ablation == "patching" else None, ablation=ablation).circuits
    for block in model.model.layers:  # a hook might change what the projection gives, so that its weights are not split
        block.self_attn.q_proj.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(edgewise, "TOGETHER", 3)
    close(runs_of(model, circuits, BASE, SOURCE if ablation == "patching" else None, ablation=ablation).circuits, found)


@every_family
def test_a_circuit_that_misses_one_edge_is_the_model_with_that_edge_patched(family: str) -> None:
    model = random_model(family)
    order = np.random.default_rng(0).permutation(every_edge(model)).tolist()
    sites = [(edge.split(".")[0].split("->")[0], edge.split("->")[1].split(".")[0]) for edge in order]
    first = {pair: edge for pair, edge in reversed(list(zip(sites, order, strict=True)))}
    assert len(first) == 15  # a sender of each kind into a receiver of each
    some = list(dict.fromkeys([*first.values(), *order[:10]]))
    three, base, source = of_length(6)
    answers = chosen(BASE, three).answer_ids
    full = Circuit.full(model.config).edges
    runs = runs_of(model, [Circuit(full - {edge}) for edge in some], BASE, SOURCE, batch_size=2)
    clean = logit_diff(run_by_hooks(model, base)[0], answers)
    effects = []
    for edge, found in zip(some, runs.circuits[:, three], strict=True):
        expected = logit_diff(patched_edge_by_hooks(model, edge, base, source), answers)
        close(found, expected)
        effects.append(abs(expected - clean).max())
    assert np.median(effects) > 1e-2


@every_family
def test_the_full_graph_is_the_model_on_base_and_the_empty_one_the_model_on_source(family: str) -> None:
    model = random_model(family)
    full = Circuit.full(model.config)
    runs = runs_of(model, [full, Circuit(frozenset())], BASE, SOURCE)
    nothing = Ablation(kind="zero", site="z", layer=0, heads=(0,))
    of_base = run(model, nothing, BASE, progress=False).baseline
    of_source = run(model, nothing, replace(SOURCE, answers=BASE.answers), progress=False).baseline
    assert np.array_equal(runs.circuits[0], runs.clean)
    close(runs.clean, of_base)
    close(runs.circuits[1], runs.empty)
    close(runs.empty, of_source)
    assert abs(of_base - of_source).min() > 1e-2


def test_every_metric_is_read_from_the_circuits_logits_with_the_answers_of_base() -> None:
    model = random_model("llama3_1")
    edges = some_edges(model, 0.7)
    three, base, source = of_length(6)
    pairs = chosen(BASE, three), chosen(SOURCE, three)
    clean, of_source = run_by_hooks(model, base)[0], run_by_hooks(model, source)[0]
    by_circuit = circuit_by_hooks(model, edges, base, source)
    batch = replace(next(pairs[0].batches(3)), clean_logits=clean)
    for metric in (name for name, it in METRICS.items() if not (it.per_token or it.of_answers)):
        runs = runs_of(model, [Circuit(edges)], *pairs, metric)
        for logits, found in ((clean, runs.clean), (of_source, runs.empty), (by_circuit, runs.circuits[0])):
            close(found, METRICS[metric].function(logits, batch).numpy())


def test_batches_of_any_size_and_prompts_in_any_order_give_the_same() -> None:
    model = random_model("mistral")
    circuits = [Circuit(some_edges(model, share)) for share in (0.2, 0.6)]
    expected = runs_of(model, circuits, BASE, SOURCE).circuits
    order = [3, 0, 5, 2, 4, 1]
    base, source = chosen(BASE, order), chosen(SOURCE, order)
    for batch_size in (1, 2, 9):
        close(runs_of(model, circuits, base, source, batch_size=batch_size).circuits, expected[:, order])


def test_a_matrix_and_its_names_are_the_same_circuit() -> None:
    model = random_model("qwen2_5")
    circuit = Circuit(some_edges(model, 0.4))
    matrix = circuit.matrix(model.config)
    assert Circuit.of(matrix, model.config) == circuit and matrix.sum() == len(circuit)
    for row, sender in enumerate(sender_nodes(model.config)):
        for column, receiver in enumerate(receiver_nodes(model.config)):
            assert matrix[row, column] == (f"{sender}->{receiver}" in circuit.edges)
    assert circuit.complement(model.config).edges == set(every_edge(model)) - circuit.edges
    assert Circuit.full(model.config).edges == set(every_edge(model))
    runs = runs_of(model, [circuit, matrix], BASE, SOURCE)
    assert np.array_equal(*runs.circuits)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_in_bfloat16_full_and_empty_graphs_are_still_the_two_runs(family: str) -> None:
    model = random_model(family).to(torch.bfloat16)
    runs = runs_of(model, [Circuit.full(model.config), Circuit(frozenset())], BASE, SOURCE)
    assert np.array_equal(runs.circuits[0], runs.clean)
    np.testing.assert_allclose(runs.circuits[1], runs.empty, atol=0.1)


@every_family
def test_a_model_spread_over_devices_gives_the_same_numbers(family: str) -> None:
    edges = Circuit(some_edges(random_model(family), 0.5))
    expected = runs_of(random_model(family), [edges], BASE, SOURCE)
    with PretendedDevices():
        found = runs_of(spread(random_model(family)), [edges], BASE, SOURCE)
    close(found.circuits, expected.circuits)
    close(found.empty, expected.empty)


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = random_model("gemma2").train()
    next(model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    forwards = [module.forward for module in model.modules()]
    circuit = Circuit(some_edges(model, 0.5))
    run_circuit(model, circuit, BASE, SOURCE, progress=False)
    list(model.parameters())[-1].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        run_circuit(model, circuit, BASE, SOURCE, progress=False)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before and model.training
    assert [module.forward for module in model.modules()] == forwards
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- what ablated edges carry ------------------------------------------------------------------------------------------


def constant_circuit_by_hooks(model: Any, edges: Collection[str], base: Tensor, values: dict[str, Tensor]) -> Tensor:
    """As `circuit_by_hooks`, but ablated edges carry one value per sender; the stream is summed from its parts."""
    put: dict[str, Tensor] = {}
    for receiver in receivers(model):
        now = contributions(model, base, put)
        stream, all_added = torch.zeros_like(now["embed"]), torch.zeros_like(now["embed"])
        for sender in (s for s in senders(model) if precedes(s, receiver)):
            stream = stream + (now[sender] if f"{sender}->{receiver}" in edges else values[sender])
            all_added = all_added + now[sender]

        def read(_: Any, args: tuple, stream: Tensor = stream, all_added: Tensor = all_added) -> tuple:
            biases = args[0] - all_added if hasattr(model, "transformer") else 0.0
            return (stream + biases, *args[1:])

        handle = norm_in_front(model, receiver).register_forward_pre_hook(read)
        try:
            logits, seen = run_by_hooks(model, base, put=put, read=() if receiver == "logits" else (receiver,))
        finally:
            handle.remove()
        put[receiver] = logits if receiver == "logits" else seen[receiver]
    return put["logits"]


@pytest.mark.parametrize(("family", "ablation"), [("qwen2_5", "zero"), ("gemma2", "mean"), ("gpt2", "mean")])
@pytest.mark.parametrize("share", [0.15, pytest.param(0.6, marks=pytest.mark.slow)])
def test_mean_and_zero_ablation_are_what_hooks_give_without_pairs_of_prompts(
    family: str, ablation: str, share: float
) -> None:
    model = random_model(family)
    edges = some_edges(model, share)
    source = random_prompts((5, 8), seed=3)  # no pairs
    of_source = [contributions(model, torch.tensor([ids])) for ids in source.input_ids]
    weight = 0.0 if ablation == "zero" else 1 / 13
    values = {name: weight * sum(x[name].sum((0, 1)) for x in of_source) for name in senders(model)}
    given = None if ablation == "zero" else source
    runs = runs_of(model, [Circuit(edges)], BASE, given, ablation=ablation, batch_size=2)
    for length in (6, 7):
        index, base, _ = of_length(length)
        for kept, found in ((edges, runs.circuits[0]), ((), runs.empty)):
            logits = constant_circuit_by_hooks(model, kept, base, values)
            close(found[index], logit_diff(logits, chosen(BASE, index).answer_ids))


# -- pruning and choosing ----------------------------------------------------------------------------------------------


def on_some_path(edges: Collection[str], heads_of_group: int) -> set[str]:
    """The edges that some path from embed to logits uses: all paths, walked one by one."""
    found: set[str] = set()

    def walk(sender: str, path: tuple[str, ...]) -> None:
        for edge in edges:
            if edge.split("->")[0] != sender:
                continue
            receiver = Node.parse(edge.split("->")[1])
            if receiver.site == "logits":
                found.update((*path, edge))
            elif receiver.site == "mlp_in":
                walk(f"mlp_out.{receiver.layer}", (*path, edge))
            else:
                assert receiver.head is not None
                first, count = (
                    (receiver.head, 1) if receiver.site == "q" else (receiver.head * heads_of_group, heads_of_group)
                )
                for head in range(first, first + count):
                    walk(f"z.{receiver.layer}.{head}", (*path, edge))

    walk("embed", ())
    return found


CHAIN = {"embed->v.0.0", "z.0.0->q.1.1", "z.1.1->mlp_in.1", "mlp_out.1->logits"}


@pytest.mark.parametrize("seed", range(6))
def test_pruning_keeps_what_lies_on_some_path(seed: int) -> None:
    model = random_model("llama3_1")
    edges = some_edges(model, 0.06, seed) | CHAIN
    kept = Circuit(edges).pruned(model.config).edges
    assert kept == on_some_path(edges, 2)
    assert len(CHAIN) < len(kept) < len(edges) or seed


def test_pruning_drops_dead_ends_orphans_and_nothing_else() -> None:
    config = tiny_config("llama3_1")
    chain = {"embed->k.0.1", "z.0.3->mlp_in.1", "mlp_out.1->q.2.0", "z.2.0->logits"}  # K/V head 1 serves heads 2 and 3
    dead = {"embed->v.0.0", "mlp_out.0->q.1.5", "z.0.2->q.1.1", "z.0.4->logits", "embed->mlp_in.2"}
    assert Circuit(frozenset(chain | dead)).pruned(config).edges == chain
    assert Circuit(frozenset(chain - {"embed->k.0.1"})).pruned(config).edges == set()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_what_is_pruned_makes_no_difference_without_a_norm_over_all_heads(family: str) -> None:
    model = random_model(family)
    circuits = [Circuit(some_edges(model, 0.08, seed) | CHAIN) for seed in range(4)]
    pruned = [circuit.pruned(model.config) for circuit in circuits]
    assert all(0 < len(small) < len(large) for small, large in zip(pruned, circuits, strict=True))
    runs = runs_of(model, [*circuits, *pruned], BASE, SOURCE)
    close(runs.circuits[4:], runs.circuits[:4])
    assert abs(runs.circuits[:4] - runs.empty).max() > 1e-2


def test_the_top_edges_are_those_with_the_largest_scores_by_size_less_dead_ends() -> None:
    model = random_model("qwen2_5")
    config, generator = model.config, np.random.default_rng(0)
    scores = generator.normal(size=exists(config).shape)
    by_name = {
        f"{sender}->{receiver}": abs(scores[row, column])
        for row, sender in enumerate(sender_nodes(config))
        for column, receiver in enumerate(receiver_nodes(config))
        if f"{sender}->{receiver}" in set(every_edge(model))
    }
    order = sorted(by_name, key=lambda edge: -by_name[edge])
    scores[~exists(config)] = np.nan
    for n in (0, 1, 30, 80, len(order)):
        assert top_edges(scores, n, config) == Circuit(frozenset(order[:n])).pruned(config)
    into_logits = np.zeros_like(scores)
    into_logits[:, -1] = 1.0  # equal: the first in the order of senders, of which embed alone comes from somewhere
    assert top_edges(into_logits, 3, config).edges == {"embed->logits"}


def kind_of(edge: str) -> tuple[str, ...]:
    """From which sort of sender in which layer an edge leads to which sort of receiver in which layer."""
    return tuple(".".join(node.split(".")[:2]) for node in edge.split("->"))


def test_random_circuits_keep_how_many_edges_lead_from_where_to_where() -> None:
    model = random_model("qwen2_5")
    config, there = model.config, exists(model.config)
    scores = np.random.default_rng(0).normal(size=there.shape)
    every = Circuit.full(config).edges
    # All edges but four, which is too few for dead ends: what is left out lies where the scores left it out.
    n = len(every) - 4
    left_out = Counter(map(kind_of, every - top_edges(scores, n, config).edges))
    drawn = random_circuits(scores, n, config, 30)
    assert all(Counter(map(kind_of, every - circuit.edges)) == left_out for circuit in drawn)
    seen = Counter(edge for circuit in drawn for edge in every - circuit.edges)
    for kind, count in left_out.items():  # each edge of a kind is as likely as any other
        alike = [edge for edge in every if kind_of(edge) == kind]
        p = binomtest(max(seen[edge] for edge in alike), 30, count / len(alike)).pvalue * len(alike)
        assert p > 1e-3, kind
    anywhere = random_circuits(scores, n, config, 30, within="anywhere")
    assert min(len(every - circuit.edges) for circuit in anywhere) == 4  # more where one of them kept a node alive
    assert len({frozenset(map(kind_of, every - circuit.edges)) for circuit in anywhere}) > 20


def test_random_circuits_are_pruned_and_repeatable() -> None:
    model = random_model("gemma2")
    config, there = model.config, exists(model.config)
    scores = np.random.default_rng(1).normal(size=there.shape)
    drawn = random_circuits(scores, 60, config, 5)
    assert all(circuit == circuit.pruned(config) for circuit in drawn)
    assert 0 < min(map(len, drawn)) < 60 >= max(map(len, drawn))
    assert len(set(drawn)) == 5
    assert random_circuits(scores, 60, config, 3) == drawn[:3]
    assert set(random_circuits(scores, 60, config, 5, seed=1)).isdisjoint(drawn)
    for count in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"count must be a whole number of 1 or more, not {count!r}"):
            random_circuits(scores, 60, config, count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within must be 'layers' or 'anywhere', not 'heads'"):
        random_circuits(scores, 60, config, 1, within="heads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 0 to \d+ edges, not -1"):
        random_circuits(scores, -1, config, 1)


# -- planted circuits --------------------------------------------------------------------------------------------------


@cache
def case(name: str, architecture: Architecture) -> Planted:
    return planted(name, architecture)


@both_architectures
@pytest.mark.parametrize("name", ["k_composition", "q_composition", "v_composition", "saturated", "saturated_k"])
def test_a_planted_chain_is_faithful_and_complete_and_dead_without_any_one_edge(
    name: str, architecture: Architecture
) -> None:
    planted_case = case(name, architecture)
    model, prompts = planted_case.model, (planted_case.clean, planted_case.corrupt)
    circuit = Circuit(planted_case.edges)
    assert faithfulness(model, circuit, *prompts, progress=False) == pytest.approx(1, abs=0.02)
    assert completeness(model, circuit, *prompts, progress=False) == pytest.approx(0, abs=0.02)
    without = [Circuit(planted_case.edges - {edge}) for edge in sorted(planted_case.edges)]
    assert abs(runs_of(model, without, *prompts).faithfulness).max() < 0.02


@both_architectures
def test_a_planted_negative_head_shows_as_more_than_faithful_without_it(architecture: Architecture) -> None:
    planted_case = case("negative", architecture)
    prompts = planted_case.clean, planted_case.corrupt
    edges = planted_case.edges
    circuits = [Circuit(edges), Circuit(edges - {"z.2.2->logits"}), Circuit(edges - {"z.2.1->logits"})]
    # It writes -0.5 beside 1.5, so that the others alone make 1.5 of their difference of 1.
    found = runs_of(planted_case.model, circuits, *prompts).faithfulness
    np.testing.assert_allclose(found, [1, 1.5, -0.5], atol=0.03)


@both_architectures
def test_scores_of_a_planted_circuit_give_a_curve_that_is_one_from_its_size_on(architecture: Architecture) -> None:
    planted_case = case("v_composition", architecture)
    model, prompts = planted_case.model, (planted_case.clean, planted_case.corrupt)
    scores = edge_attribution(model, *prompts, progress=False).matrix
    curve = curve_of(model, scores, *prompts)
    assert top_edges(scores, 3, model.config).edges == planted_case.edges
    total = 190
    assert curve.sizes.tolist() == [1, 2, 4, 8, 16, 32, 64, 128, total]
    # The planted edges are three, and without any of them there is nothing.
    np.testing.assert_allclose(curve.values, [0, 0, *[1] * (len(curve.sizes) - 2)], atol=0.03)
    assert curve.n_edges[:3].tolist()[:2] == [0, 0] and curve.n_edges[2] in (3, 4) and curve.n_edges[-1] == total
    rest = curve_of(model, scores, *prompts, sizes=[3, 1], complement=True)
    np.testing.assert_allclose(rest.values, [1, 0], atol=0.03)  # ascending: one edge leads nowhere and leaves all


# -- curves ------------------------------------------------------------------------------------------------------------


def test_a_curve_has_the_faithfulness_of_each_top_circuit_and_of_what_it_leaves_out() -> None:
    model = random_model("gemma2")
    scores = np.random.default_rng(3).normal(size=exists(model.config).shape)
    sizes = [150, 0, 90]
    curve, rest = (curve_of(model, scores, BASE, SOURCE, sizes, complement=flag) for flag in (False, True))
    circuits = [top_edges(scores, n, model.config) for n in (0, 90, 150)]
    assert curve.sizes.tolist() == [0, 90, 150] and curve.n_edges.tolist() == [len(c) for c in circuits]
    one_by_one = [faithfulness(model, circuit, BASE, SOURCE, progress=False) for circuit in circuits]
    left_out = [completeness(model, circuit, BASE, SOURCE, progress=False) for circuit in circuits]
    np.testing.assert_allclose(curve.values, one_by_one, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rest.values, left_out, rtol=1e-6, atol=1e-6)
    assert curve.values[0] == pytest.approx(0, abs=1e-5) and rest.values[0] == pytest.approx(1)


def test_a_curve_with_random_circuits_has_those_of_each_size() -> None:
    model = random_model("llama3_1")
    config, scores = model.config, np.random.default_rng(3).normal(size=exists(model.config).shape)
    found = curve_of(model, scores, BASE, SOURCE, [60, 90], random=2, seed=5)
    alone = curve_of(model, scores, BASE, SOURCE, [60, 90])
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-6)
    for at, n in enumerate((60, 90)):
        drawn = random_circuits(scores, n, config, 2, seed=5)
        one_by_one = [faithfulness(model, circuit, BASE, SOURCE, progress=False) for circuit in drawn]
        np.testing.assert_allclose(found.random_values[at], one_by_one, rtol=1e-5)
    assert alone.random_values.shape == (2, 0) and "random" not in repr(alone)


def test_random_circuits_of_a_circuit_are_those_of_scores_that_choose_it() -> None:
    config = random_model("llama3_1").config
    scores = np.random.default_rng(3).normal(size=exists(config).shape)
    chosen = top_edges(scores, 60, config)
    found = random_circuits(chosen, len(chosen), config, 3)
    assert found == random_circuits(chosen.matrix(config).astype(float), len(chosen), config, 3)
    with pytest.raises(
        ValueError, match=f"the circuit has {len(chosen)} edges, so that random ones have as many, not 7"
    ):
        random_circuits(chosen, 7, config, 3)


def test_the_interval_of_faithfulness_is_that_of_prompts_drawn_again() -> None:
    draw = np.random.default_rng(0)
    clean, source = draw.normal(5, 1, 40).astype(np.float32), draw.normal(0, 1, 40).astype(np.float32)
    circuits = (clean * np.array([[0.9], [0.2]]) + draw.normal(0, 0.5, (2, 40))).astype(np.float32)
    runs = CircuitRuns("logit_diff", clean, source, circuits)
    again = [CircuitRuns("logit_diff", clean[i], source[i], circuits[:, i]) for i in draw.integers(40, size=(4000, 40))]
    mean, low, high = runs.interval(n_resamples=4000)
    np.testing.assert_allclose(mean, runs.faithfulness, rtol=1e-6)
    ends = np.quantile([some.faithfulness for some in again], (0.025, 0.975), axis=0)
    np.testing.assert_allclose([low, high], ends, atol=0.006)
    assert np.isnan(replace(runs, empty=clean).interval()).all()


def test_faithfulness_is_a_ratio_of_means_and_the_area_their_mean_along_either_axis() -> None:
    clean, source = np.array([3.0, 5.0], np.float32), np.array([-1.0, 1.0], np.float32)
    circuits = np.array([[0.0, 0.0], [1.0, 3.0], [6.0, 4.0]], np.float32)
    runs = CircuitRuns("logit_diff", clean, source, circuits)
    assert runs.faithfulness.tolist() == [0.0, 0.5, 1.25]  # clean 4, source 0
    curve = Curve(np.array([1, 4, 16]), np.array([1, 4, 16]), np.array([0.0625, 0.25, 1.0]), runs)
    assert curve.values.tolist() == [0.0, 0.5, 1.25]
    assert curve.area() == pytest.approx((0.25 + 0.875) / 2)
    assert curve.area("linear") == pytest.approx((3 * 0.25 + 12 * 0.875) / 15)
    assert np.isnan(replace(runs, clean=source).faithfulness).all()
    with pytest.raises(ValueError, match="scale must be 'log' or 'linear', not 'sqrt'"):
        curve.area("sqrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two sizes or more"):
        replace(curve, sizes=np.array([4])).area()
    with pytest.raises(ValueError, match="size 0 has no place on a logarithmic scale"):
        replace(curve, sizes=np.array([0, 4, 16])).area()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        (["z.0.1"], "no edge 'z.0.1'; write it"),
        ("z.0.1->logits, ", "no edge 'z.0.1->logits, '"),
        (["z.0->logits"], "there is no node 'z.0'"),
        (["q.0.1->logits"], "leads from embed, z.LAYER.HEAD or mlp_out.LAYER to q, k, v, mlp_in or logits"),
        (["z.0.1->resid_pre.1"], "leads from embed"),
        (["z.1.0->q.1.0"], "q.1.0 reads before z.1.0 writes"),
    ],
)
def test_a_name_that_no_edge_has_is_refused(edges: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Circuit(edges)


def test_what_cannot_be_run_is_refused_in_a_sentence_before_the_model_runs() -> None:
    model = random_model("llama3_1")
    there = exists(model.config)
    circuit, scores = Circuit(frozenset({"embed->logits"})), np.where(there, 1.0, np.nan)
    model.forward = None  # type: ignore[assignment]
    shorter = replace(SOURCE, input_ids=(*SOURCE.input_ids[:2], SOURCE.input_ids[2][1:], *SOURCE.input_ids[3:]))
    outside = BASE.with_answer_ids((*BASE.answer_ids[:1], (3, VOCAB), *BASE.answer_ids[2:]))
    fewer = random_prompts(LENGTHS[:-1])
    with_nan = scores.copy()
    with_nan[0, 0] = np.nan
    for told, bad, base, source, options in (
        ("layer 3 is out of range", Circuit(frozenset({"embed->q.3.0"})), BASE, SOURCE, {}),
        ("head 3 is out of range; k counts K/V heads", Circuit(frozenset({"embed->k.1.3"})), BASE, SOURCE, {}),
        ("not one of float64", scores, BASE, SOURCE, {}),
        ("not one of bool and shape", there[:-1], BASE, SOURCE, {}),
        ("a circuit is a Circuit or a boolean matrix", circuit.edges, BASE, SOURCE, {}),
        ("no edge z.0.0->q.0.0: q.0.0 reads before", ~there, BASE, SOURCE, {}),
        ("unknown metric 'ld'", circuit, BASE, SOURCE, {"metric": "ld"}),
        ("pair 2 has 7 tokens and its source 6", circuit, BASE, shorter, {}),
        ("6 base prompts and 5 source prompts", circuit, BASE, fewer, {}),
        ("must be tokenised", circuit, BASE, ["a text"], {}),
        ("answers of prompt 1 have ids from 3 to 61", circuit, outside, SOURCE, {}),
        ("batch_size must be at least 1", circuit, BASE, SOURCE, {"batch_size": 0}),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            run_circuit(model, bad, base, source, progress=False, **options)  # type: ignore[arg-type]
        assert str(caught.value).endswith(".")
    for told, some, sizes in (
        ("has 0 to 352 edges, not 10000", scores, [5, 10_000]),
        ("not -1", scores, [-1]),
        ("not 2.5", scores, [2.5]),
        ("each once", scores, [3, 3]),
        ("one or more sizes", scores, []),
        ("the score of edge embed->q.0.0 is NaN", with_nan, [1]),
        ("take the mean over prompts first", scores[..., None], [1]),
        ("the matrix of what edge_attribution or learn_mask returns", circuit, [1]),
    ):
        with pytest.raises(ValueError, match=told):
            curve_of(model, some, BASE, SOURCE, sizes)
    with pytest.raises(ValueError, match="at least one circuit"):
        runs_of(model, [], BASE, SOURCE)
    with pytest.raises(ValueError, match=r"shape \(22, 40\) or, of nodes, \(22,\), not \(40, 22\)"):
        named_scores(scores.T, circuit, model.config)


def test_a_circuit_of_nodes_has_every_edge_among_them_the_embedding_and_the_logits() -> None:
    config = tiny_config("llama3_1")
    names = [str(node) for node in sender_nodes(config)]
    scores = np.zeros(len(names))
    chosen_nodes = ["z.0.1", "mlp_out.0", "z.1.3"]
    scores[[names.index(name) for name in chosen_nodes]] = (-3.0, 2.0, 1.0)
    scores[0] = np.nan  # the embedding is always in
    group = config.num_attention_heads // config.num_key_value_heads
    owners: dict[str, Collection[str]] = {}
    for node in receiver_nodes(config):
        heads = [node.head] if node.site == "q" else range((node.head or 0) * group, ((node.head or 0) + 1) * group)
        owners[str(node)] = [f"z.{node.layer}.{head}" for head in heads] if node.head is not None else []
        if node.site == "mlp_in":
            owners[str(node)] = [f"mlp_out.{node.layer}"]

    def by_hand_of(kept: Collection[str]) -> set[str]:
        return {
            f"{s}->{r}"
            for s in ["embed", *kept]
            for r in map(str, receiver_nodes(config))
            if (r == "logits" or set(owners[r]) & set(kept)) and precedes(s, r)
        }

    assert top_nodes(scores, 3, config).edges == on_some_path(by_hand_of(chosen_nodes), group)
    assert top_nodes(scores, 2, config, by="value").edges == on_some_path(by_hand_of(chosen_nodes[1:]), group)
    assert top_nodes(scores, 0, config).edges == {"embed->logits"}
    assert top_nodes(scores, len(names) - 1, config) == Circuit.full(config)
    with pytest.raises(ValueError, match=f"0 to {len(names) - 1} nodes"):
        top_nodes(scores, len(names), config)
    for one in random_circuits(scores, 3, config, 5):
        nodes = {edge.split("->")[0] for edge in one.edges} - {"embed"}
        assert Counter(node.rsplit(".", 1)[0] for node in nodes if node[0] == "z") <= Counter(["z.0", "z.1"])


def test_cpr_and_cmd_are_areas_by_the_trapezoidal_rule_over_the_shares_of_edges() -> None:
    clean, empty = np.array([4.0, 6.0], np.float32), np.array([0.0, 2.0], np.float32)  # 4 apart
    faithful = np.array([-0.5, 0.5, 1.5, 1.0], np.float32)
    runs = CircuitRuns("logit_diff", clean, empty, empty + 4 * faithful[:, None])
    curve = Curve(np.array([0, 1, 5, 10]), np.array([0, 1, 5, 10]), np.array([0.001, 0.1, 0.5, 1.0]), runs)
    assert curve.cpr() == pytest.approx(0.099 * 0.0 + 0.4 * 1.0 + 0.5 * 1.25)
    assert curve.cmd() == pytest.approx(0.099 * 1.0 + 0.4 * 0.5 + 0.5 * 0.25)
    areas = curve.areas(n_resamples=50)
    assert areas["cpr"].mean == pytest.approx(curve.cpr()) and areas["cmd"].mean == pytest.approx(curve.cmd())
    # Every prompt has the same faithfulness, so that resampling changes nothing.
    assert areas["cpr"].low == pytest.approx(curve.cpr()) and areas["cmd"].high == pytest.approx(curve.cmd())
    # A pair whose texts do the same has no faithfulness: resamples of it alone, 1 in 4, are left out.
    clean[0] = empty[0] = 3
    runs = CircuitRuns("logit_diff", clean, empty, np.stack([empty, empty, (clean + empty) / 2, clean]))
    area = replace(curve, runs=runs).areas(n_resamples=50)["cpr"]
    assert area.low == area.mean == area.high == pytest.approx(0.4 * 0.25 + 0.5 * 0.75)


def test_sizes_given_as_shares_are_rounded_down_and_a_size_may_occur_twice() -> None:
    model = random_model("mistral")
    scores = np.random.default_rng(0).normal(size=exists(model.config).shape)
    n_all = int(exists(model.config).sum())
    curve = curve_of(model, scores, BASE, SOURCE, shares=MIB_SHARES, by="value", batch_size=6)
    assert curve.sizes.tolist() == [int(share * n_all) for share in MIB_SHARES] and curve.sizes[0] == curve.sizes[1]
    assert curve.values[-1] == 1 and curve.shares.tolist() == list(MIB_SHARES)
    best = top_edges(scores, int(curve.sizes[-3]), model.config, by="value")
    close(curve.runs.circuits[-3], run_circuit(model, best, BASE, SOURCE, progress=False))
    with pytest.raises(ValueError, match="sizes or shares, not both"):
        curve_of(model, scores, BASE, SOURCE, sizes=[1], shares=[0.5])
    with pytest.raises(ValueError, match="at most 1"):
        curve_of(model, scores, BASE, SOURCE, shares=[0.5, 1.5])


def test_an_infinite_score_is_chosen_first_and_counts_as_an_edge() -> None:
    config = tiny_config("llama3_1")
    scores = np.random.default_rng(0).normal(size=exists(config).shape)
    scores[0, -1] = np.inf
    assert top_edges(scores, 1, config).edges == {"embed->logits"}
    assert top_edges(scores, int(exists(config).sum()), config) == Circuit.full(config)


@pytest.mark.parametrize("ablation", first_only(["mean", "patching", "zero"]))
def test_circuits_take_no_more_memory_than_they_are_given_for_means_either(ablation: Any) -> None:
    model, memory = random_model("gemma2"), 400_000
    base, source = random_prompts((9,) * 12), None if ablation == "zero" else random_prompts((9,) * 12, seed=1)
    every_second = Circuit(frozenset(sorted(Circuit.full(model.config).edges)[::2]))
    found, taken = {}, {}
    for allowed in (None, memory):
        with Peak() as peak:
            found[allowed] = run_circuits(
                model, [every_second], base, source, ablation=ablation, memory=allowed, batch_size=12, progress=False
            )
        taken[allowed] = peak.bytes
    assert taken[memory] <= memory < 2 * memory < taken[None]
    np.testing.assert_allclose(found[memory].circuits, found[None].circuits, atol=1e-5)
