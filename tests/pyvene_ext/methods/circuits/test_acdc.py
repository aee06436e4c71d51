"""ACDC against the same one edge at a time, each test a whole run of one circuit, and against planted circuits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny.planted_circuits import ARCHITECTURES, Architecture, planted

from pyvene_ext.methods.circuits import acdc as module
from pyvene_ext.methods.circuits.acdc import Order, acdc, acdc_passes
from pyvene_ext.methods.circuits.acdc_run import AcdcRun
from pyvene_ext.methods.circuits.choosing import By
from pyvene_ext.methods.circuits.circuit import Circuit, exists
from pyvene_ext.methods.circuits.edgewise import Ablated, EdgewiseModel
from pyvene_ext.methods.circuits.running import AblationKind, run_circuits
from pyvene_ext.specs.graph import receivers
from tests.ground_truth.paths import precedes
from tests.ground_truth.paths import receivers as receiver_names
from tests.ground_truth.paths import senders as sender_names
from tests.live_tensors import Peak
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

LENGTHS = (7, 5, 7)
BASE, SOURCE = random_prompts(LENGTHS), random_prompts(LENGTHS, seed=1)
MEAN_OF = random_prompts((4, 8), seed=2)
PLANTED_CHAINS = ("k_composition", "q_composition", "v_composition", "saturated", "saturated_k")
found_by: Callable[..., AcdcRun] = partial(acdc, progress=False)


def in_order(model: Any, order: Order = "latest") -> list[str]:
    """All edges in the order in which they are tried: receivers from the last that reads, and senders."""
    those = sender_names(model)[:: -1 if order == "latest" else 1]
    return [f"{s}->{r}" for r in receiver_names(model)[::-1] for s in those if precedes(s, r)]


def one_at_a_time(
    model: Any,
    first: frozenset[str],
    found: AcdcRun,
    metric: str,
    tau: float,
    by: By | None = None,
    order: Order = "latest",
    ablation: AblationKind = "patching",
) -> tuple[frozenset[str], list[tuple[str, float, float, bool]]]:
    """The kept edges; and of each edge in turn the metric without it, the effect of its removal, and whether it stays.

    Each is tried in the circuit that what was found leaves until then: if the edges before it were decided rightly, that is the
    one in which it has to be tried, and the first that was not is seen.
    """
    source = {"patching": SOURCE, "mean": MEAN_OF, "zero": None}[ablation]
    edges = [edge for edge in in_order(model, order) if edge in first]
    now, tested = first, []
    for edge in edges:
        tested.append(now - {edge})
        now = now if edge in found.unpruned.edges else tested[-1]
    runs = run_circuits(model, map(Circuit, [first, *tested]), BASE, source, metric, ablation=ablation, progress=False)
    current, *values = runs.circuits.mean(1, dtype=np.float64).tolist()
    tried = []
    for edge, without in zip(edges, values, strict=True):
        effect = without - current if metric == "kl" else current - without
        keep = abs(effect) >= tau if by == "magnitude" else effect >= tau
        tried.append((edge, without, effect, keep))
        current = current if keep else without
    return frozenset(edge for edge, _, _, keep in tried if keep), tried


def check(found: AcdcRun, kept: frozenset[str], tried: list[tuple[str, float, float, bool]], tau: float) -> None:
    assert min(abs(abs(effect) - tau) for _, _, effect, _ in tried) > 1e-6  # no decision that rounding could turn
    assert found.unpruned.edges == kept
    tested = set(found.edges)
    for edge, _, effect, keep in tried:  # what was not run leads nowhere
        assert edge in tested or (abs(effect) < 1e-5 and not keep), edge
    run = [one for one in tried if one[0] in tested]
    edges, values, effects, stay = zip(*run, strict=True)
    assert found.edges == edges and tuple(found.kept.tolist()) == stay
    np.testing.assert_allclose(found.value, values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.effect, effects, rtol=1e-4, atol=1e-5)
    assert 5 < len(kept) < len(tried) - 5


def some(model: Any, n: int, seed: int = 0) -> Circuit:
    """Some edges of which all are on a path."""
    generator, full = np.random.default_rng(seed), sorted(Circuit.full(model.config).edges)
    circuit = Circuit(frozenset(generator.permutation(full)[: len(full) // 2].tolist())).pruned(model.config)
    while len(circuit) > n:
        gone = generator.choice(sorted(circuit.edges), max(1, (len(circuit) - n) // 4), replace=False)
        circuit = Circuit(circuit.edges - set(gone.tolist())).pruned(model.config)
    return circuit


def check_from_a_circuit(family: str, n: int) -> None:
    model = random_model(family)
    first = some(model, n)
    found = found_by(model, BASE, SOURCE, tau=0.003, start_from=first)
    check(found, *one_at_a_time(model, first.edges, found, "kl", 0.003), 0.003)
    assert found.circuit == found.unpruned.pruned(model.config)
    assert found.at_first > 0.01 and found.discarded > 0


def test_from_a_circuit_the_decisions_are_those_of_one_edge_at_a_time() -> None:
    check_from_a_circuit("gemma2", 40)


@pytest.mark.slow
def test_from_a_larger_circuit_they_are_too() -> None:
    check_from_a_circuit("gpt2", 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "metric", "by", "tau", "order", "ablation"),
    [
        ("llama3_1", "kl", None, 0.05, "earliest", "mean"),
        ("gemma2", "logit_diff", "magnitude", 0.03, "latest", "patching"),
        ("qwen2_5", "logit_diff", "value", 0.01, "latest", "zero"),
    ],
)
def test_from_the_whole_model_the_decisions_are_those_of_one_edge_at_a_time(
    family: str, metric: str, by: By | None, tau: float, order: Order, ablation: AblationKind
) -> None:
    model = random_model(family)
    source = {"patching": SOURCE, "mean": MEAN_OF, "zero": None}[ablation]
    found = found_by(model, BASE, source, metric, tau=tau, by=by, order=order, ablation=ablation)
    full = Circuit.full(model.config).edges
    check(found, *one_at_a_time(model, full, found, metric, tau, by, order, ablation), tau)


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("ablation", ["patching", "zero"])
def test_runs_that_start_where_circuits_differ_are_those_from_the_first_block(start: int, ablation: str) -> None:
    model = random_model("gemma2")
    config, there = model.config, exists(model.config)
    ids, of_source = (torch.tensor([prompts.input_ids[i] for i in (0, 2)]) for prompts in (BASE, SOURCE))
    edgewise, generator = EdgewiseModel(model), np.random.default_rng(0)
    later = np.array([node.layer is None or node.layer >= start for node in receivers(config)])
    with torch.no_grad():
        plain = edgewise.plain(ids)
        run = Ablated.by_run(edgewise.plain(of_source))
        ablated = run if ablation == "patching" else Ablated(torch.zeros_like(plain.added[:1, :, :1]), plain, False)
        for first, before in ((there, plain), (half := there & (generator.random(there.shape) < 0.5), None)):
            kept = np.stack([first & (~later | (generator.random(there.shape) < share)) for share in (0.1, 0.5, 0.9)])
            before = before or edgewise.one_circuit(ids, half, ablated)
            whole, late = (edgewise.circuits(ids, kept, ablated, before, at) for at in (0, start))
            torch.testing.assert_close(late, whole, rtol=1e-5, atol=1e-5)
            assert (whole[0] - whole[2]).abs().max() > 0.1


@pytest.mark.slow
def test_memory_batches_and_how_many_run_side_by_side_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("gpt2")
    found = partial(found_by, model, BASE, SOURCE, "logit_diff", tau=0.02, start_from=some(model, 60))
    full = found()
    rows: list[int] = []
    own = EdgewiseModel.circuits

    def watched(self: EdgewiseModel, ids: Any, kept: Any, *rest: Any) -> Any:
        rows.append(len(ids) * len(kept))
        return own(self, ids, kept, *rest)

    monkeypatch.setattr(EdgewiseModel, "circuits", watched)
    with pytest.raises(ValueError, match="do not hold the contributions") as caught:
        found(memory=1000)
    least = int(str(caught.value).rpartition("at least ")[2].split()[0])
    for options, most in (({"batch_size": 1}, None), ({"memory": (least + 1) * 2**20}, 8)):
        rows.clear()
        again = found(**options)
        assert again.edges == full.edges and np.array_equal(again.kept, full.kept)
        assert most is None or max(rows) <= most
    monkeypatch.setattr(module._Search, "_how_many", lambda *_: 1)
    alone = found()
    assert alone.edges == full.edges and np.array_equal(alone.kept, full.kept)
    np.testing.assert_allclose(alone.effect, full.effect, rtol=1e-4, atol=1e-6)
    assert alone.discarded == 0 < full.discarded < 0.5
    assert alone.passes == pytest.approx(full.passes * (1 - full.discarded))


@pytest.mark.slow
def test_no_more_memory_is_taken_than_is_given() -> None:
    model, lengths = random_model("llama3_1"), (50,) * 16
    base, source = random_prompts(lengths), random_prompts(lengths, seed=1)
    found = partial(found_by, model, base, source, tau=0.003, start_from=some(model, 6))
    with pytest.raises(ValueError, match="do not hold the contributions") as caught:
        found(memory=1000)
    memory = (1 + int(str(caught.value).rpartition("at least ")[2].split()[0])) * 2**20
    with Peak() as peak:
        found(memory=memory)
    assert memory / 3 < peak.bytes <= memory


@pytest.mark.slow
def test_the_cost_lies_within_the_bounds_that_are_told_before() -> None:
    model = random_model("llama3_1")
    for start_from, tau in ((None, 1e-6), (None, 100.0), (some(model, 60), 0.01)):
        least, one_by_one, most = acdc_passes(model.config, start_from)
        found = found_by(model, BASE, SOURCE, tau=tau, start_from=start_from)
        assert least <= found.passes <= most
        assert found.passes * (1 - found.discarded) <= one_by_one + 1e-9
    assert acdc_passes(model.config).one_by_one == found_by_hand(model)


def found_by_hand(model: Any) -> float:
    """A pass of base and of source, and for every edge the blocks from its receiver's on."""
    layers = model.config.num_hidden_layers
    at = [edge.partition("->")[2].split(".") for edge in in_order(model)]
    return pytest.approx(2 + sum(1 - int(layer[0]) / layers for _, *layer in at if layer))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["negative", *(pytest.param(name, marks=pytest.mark.slow) for name in PLANTED_CHAINS)])
@pytest.mark.parametrize(("metric", "tau"), [("kl", 0.1), ("logit_diff", 1.0)])
def test_a_planted_circuit_is_found_edge_by_edge(
    name: str, architecture: Architecture, metric: str, tau: float
) -> None:
    case = planted(name, architecture)
    found = found_by(case.model, case.clean, case.corrupt, metric, tau=tau)
    assert found.circuit.edges == found.unpruned.edges == case.edges
    others = [effect for edge, effect in zip(found.edges, found.effect, strict=True) if edge not in case.edges]
    assert np.abs(others).max() < tau / 2
    if name == "negative" and metric == "logit_diff":
        helpful = found_by(case.model, case.clean, case.corrupt, metric, tau=tau, by="value")
        assert helpful.circuit.edges == case.edges - {"z.2.2->logits", "z.0.2->v.2.1"}


@pytest.mark.slow
def test_heads_that_a_post_norm_ties_to_others_are_tested_and_heads_that_lead_nowhere_are_not() -> None:
    for family, tied in (("gemma2", True), ("llama3_1", False)):
        model = random_model(family)
        full = Circuit.full(model.config).edges
        first = Circuit(frozenset(edge for edge in full if not edge.startswith("z.1.0->")))
        found = found_by(model, BASE, SOURCE, tau=1e-4, start_from=first)
        assert any("->q.1.0" in edge for edge in found.edges) == tied
        gone = [edge for edge in found.unpruned.edges if edge.endswith("->q.1.0")]
        assert bool(gone) == tied


def test_the_model_is_left_as_it_was_and_the_table_says_what_was_tested() -> None:
    model = random_model("qwen2_5").train()
    first = some(model, 40)
    found = found_by(model, BASE, SOURCE, tau=0.01, start_from=first)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    frame = found.to_frame()
    assert list(frame) == ["edge", "value", "effect", "kept", "in_circuit"]
    assert set(frame.edge[frame.kept]) == found.unpruned.edges
    assert set(frame.edge[frame.in_circuit]) == found.circuit.edges
    assert np.isfinite(found.matrix).sum() == len(frame)
    at = found.edges[3]
    row, column = (list(map(str, nodes)) for nodes in (found.senders, found.receivers))
    assert found.matrix[row.index(at.split("->")[0]), column.index(at.split("->")[1])] == found.effect[3]
    removed = frame[~frame.kept]
    assert found.at_last == (removed.value.iloc[-1] if len(removed) else found.at_first)
    assert f"{len(found.circuit)} edges of {len(frame)} edges tested, tau 0.01" in repr(found)
    nothing = found_by(model, BASE, SOURCE, tau=99.0, order="earliest")
    assert nothing.edges[0] == "embed->logits" and nothing.edges[-1] == "mlp_out.2->logits"  # the rest leads nowhere
    assert nothing.passes == 2 and nothing.circuit.edges == frozenset()


def test_what_cannot_be_run_is_refused_in_a_sentence_before_the_model_runs() -> None:
    model = random_model("llama3_1")
    model.forward = None  # type: ignore[assignment]
    fewer = replace(SOURCE, input_ids=SOURCE.input_ids[:-1])
    for told, source, options in (
        ("tau must be a finite number above 0, not 0", SOURCE, {"tau": 0}),
        ("tau must be a finite number above 0, not 'a'", SOURCE, {"tau": "a"}),
        ("tau must be a finite number above 0, not nan", SOURCE, {"tau": float("nan")}),
        ("leave out by", SOURCE, {"tau": 1.0, "by": "value"}),
        ("by must be 'magnitude' or 'value', not 'size'", SOURCE, {"tau": 1.0, "metric": "logit_diff", "by": "size"}),
        ("order must be 'latest' or 'earliest'", SOURCE, {"tau": 1.0, "order": "random"}),
        ("unknown metric", SOURCE, {"tau": 1.0, "metric": "ld"}),
        ("unknown ablation 'noise'", SOURCE, {"tau": 1.0, "ablation": "noise"}),
        ("no edge into the logits", SOURCE, {"tau": 1.0, "start_from": Circuit("embed->q.0.0")}),
        ("layer 9 is out of range", SOURCE, {"tau": 1.0, "start_from": Circuit("embed->mlp_in.9")}),
        ("3 base prompts and 2 source prompts", fewer, {"tau": 1.0}),
        ("batch_size must be at least 1", SOURCE, {"tau": 1.0, "batch_size": 0}),
        ("memory must be a whole number", SOURCE, {"tau": 1.0, "memory": 0.5}),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            found_by(model, BASE, source, **options)  # type: ignore[arg-type]
        assert str(caught.value).endswith(".")
