"""Circuits as data: judged beside random ones, compared, written and read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pyvene_ext.methods.circuits.choosing import edge_groups, random_circuits, top_edges, top_nodes
from pyvene_ext.methods.circuits.circuit import Circuit, exists, parse_edge
from pyvene_ext.methods.circuits.files import load_circuit, save_circuit, save_dot
from pyvene_ext.methods.circuits.judging import check_defined, halves, jaccard, judge, overlap
from pyvene_ext.methods.circuits.running import completeness, faithfulness, faithfulness_curve
from pyvene_ext.specs.graph import receivers, senders
from tests.pyvene_ext.methods.circuits.test_circuits import BASE, SOURCE, chosen, close, some_edges
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model


def scores_of(model: torch.nn.Module) -> np.ndarray:
    return np.random.default_rng(0).normal(size=exists(model.config).shape)


def test_a_judgement_holds_what_each_run_by_itself_gives() -> None:
    model, options = random_model("qwen2_5"), {"progress": False}
    scores = scores_of(model)
    circuit, pairs = top_edges(scores, 60, model.config), [chosen(prompts, [0, 4]) for prompts in (BASE, SOURCE)]
    found = judge(model, circuit, *pairs, scores=scores, n=60, random=3, removed=len(circuit), **options)
    close(found.faithfulness.mean, faithfulness(model, circuit, *pairs, **options))
    close(found.completeness, completeness(model, circuit, *pairs, **options))
    chance = random_circuits(scores, 60, model.config, 3)
    close(found.random, [faithfulness(model, one, *pairs, **options) for one in chance])
    assert 2 < len(circuit) < 40
    without = sorted(faithfulness(model, Circuit(circuit.edges - {e}), *pairs, **options) for e in circuit.edges)
    close(np.sort(found.without), without)
    changed = [abs(float(found.faithfulness.mean) - value) >= 0.01 for value in without]
    assert found.minimality == pytest.approx(np.mean(changed)) and 0 < found.minimality <= 1
    at_least = sum(value >= found.faithfulness.mean for value in found.random)
    assert found.p == (1 + at_least) / 4
    assert found.row()["n_edges"] == len(circuit)
    model.forward = None  # type: ignore[assignment]
    for wrong in ({"n": 61}, {"n": 60, "by": "value"}):  # random circuits would be those of another circuit
        with pytest.raises(ValueError, match="do not make this circuit"):
            judge(model, circuit, *pairs, scores=scores, **wrong)


def test_a_circuit_of_nodes_is_judged_by_other_nodes_and_without_single_ones() -> None:
    model, options = random_model("qwen2_5"), {"progress": False}
    config, pairs = model.config, [chosen(prompts, [0, 4]) for prompts in (BASE, SOURCE)]
    scores = np.random.default_rng(0).normal(size=len(senders(config)))
    circuit, everything = top_nodes(scores, 9, config), Circuit.full(config).edges
    found = judge(model, circuit, *pairs, scores=scores, n=9, random=2, removed=99, **options)
    inside = {edge.partition("->")[0] for edge in circuit.edges} - {"embed"}
    # Keys and values are read by groups of three heads, and an edge into them belongs to each.
    group = {"q": 1, "k": 3, "v": 3}

    def among(nodes: set[str]) -> Circuit:
        entries = {"logits", *(node.replace("mlp_out", "mlp_in") for node in nodes)}
        for _, layer, head in (node.split(".") for node in nodes if node.startswith("z.")):
            entries |= {f"{site}.{layer}.{int(head) // size}" for site, size in group.items()}
        ends = (edge.partition("->") for edge in everything)
        return Circuit(
            frozenset(f"{one}->{other}" for one, _, other in ends if one in {"embed", *nodes} and other in entries)
        )

    outside = {str(node) for node in senders(config)} - inside - {"embed"}
    assert 5 < len(inside) < len(outside)
    close(found.completeness, faithfulness(model, among(outside), *pairs, **options))
    assert abs(found.completeness - completeness(model, circuit, *pairs, **options)) > 1e-3  # all other edges
    without = sorted(faithfulness(model, among(inside - {node}), *pairs, **options) for node in inside)
    close(np.sort(found.without), without)
    curve = faithfulness_curve(model, scores, *pairs, [9], complement=True, **options)
    close(curve.values, [found.completeness])


def test_a_metric_that_cannot_tell_the_model_from_the_empty_circuit_is_refused() -> None:
    model = random_model("llama3_1")
    twice = [chosen(prompts, [2, 2]) for prompts in (BASE, SOURCE)]
    clean, empty = check_defined(model, *twice)
    assert abs(clean - empty) > 1e-3
    with pytest.raises(ValueError, match="two or more pairs"):
        check_defined(model, *(chosen(prompts, [2]) for prompts in (BASE, SOURCE)))
    right, wrong = twice[0].answer_ids[0]
    flipped = twice[0].with_answer_ids([(right, wrong), (wrong, right)])  # the same difference, once with either sign
    with pytest.raises(ValueError, match="includes 0, so that faithfulness, CPR and CMD are undefined"):
        check_defined(model, flipped, twice[1])


def test_each_half_has_prompts_of_its_own_and_what_cannot_be_used_is_counted() -> None:
    base, source = random_prompts((8, 8, 8, 6, 7, 8)), random_prompts((8, 8, 8, 6, 8, 8), seed=1)
    base = replace(base, input_ids=(*base.input_ids[:5], base.input_ids[0]))
    source = replace(
        source, input_ids=(*source.input_ids[:3], base.input_ids[3], source.input_ids[4], source.input_ids[0])
    )
    found = halves(base.take([0, 1, 2, 3, 4, 5, 1, 2]), source.take([0, 1, 2, 3, 4, 5, 2, 1]), "patching", 0)
    assert sorted(found.scored + found.judged) == list(range(5)) and len(found.scored) == 2
    assert found.left_out == [3, 4, 5] and found.base.input_ids == tuple(base.input_ids[n] for n in (0, 1, 2, 1, 2))
    assert (
        found.why
        == "1 with the same text twice, 1 whose texts differ in number of tokens, 1 that repeat an earlier one"
    )
    of_judged = found.take(found.judged)
    assert of_judged[0].input_ids == tuple(found.base.input_ids[n] for n in found.judged)
    assert of_judged[1] is not None and of_judged[1].input_ids == tuple(found.source.input_ids[n] for n in found.judged)  # type: ignore[union-attr]
    assert halves(base, source, "mean", 0).left_out == [5]  # partners need not correspond
    assert halves(base, None, "zero", 0).left_out == [5] and halves(base, None, "zero", 0).take([0])[1] is None
    for some, told in (
        ([0], "1 prompt: too few to score edges on some and judge on others; give 3 or more"),
        ([0, 3, 4, 1], r"2 prompts: too few .* \(2 of 4 left out: 1 with the same text twice, 1 whose texts differ"),
    ):
        with pytest.raises(ValueError, match=told):
            halves(base.take(some), source.take(some), "patching", 0)


def test_overlap_is_beside_circuits_with_as_many_edges_between_the_same_layers_and_kinds() -> None:
    config = random_model("mistral").config
    one, other = (Circuit(some_edges(random_model("mistral"), 0.2, seed=seed)) for seed in (1, 2))
    found = overlap(one, other, config, draws=200)
    assert found.jaccard == jaccard(one, other) == len(one.edges & other.edges) / len(one.edges | other.edges)
    assert found.core.edges == one.edges & other.edges and 0.05 < found.p <= 1
    assert abs(found.chance.mean() - found.jaccard) < 0.1
    same = overlap(one, one, config, draws=99)
    assert same.jaccard == 1 and same.p == 0.01 and same.chance.max() < 1
    # Where a group is full in both, chance shares it too.
    groups, names = edge_groups(config), np.array([[f"{s}->{r}" for r in receivers(config)] for s in senders(config)])
    there = exists(config)
    largest, _ = Counter(groups[there].tolist()).most_common(1)[0]
    full = Circuit(frozenset(names[there & (groups == largest)].tolist()))
    assert overlap(full, full, config, draws=9).chance.tolist() == [1.0] * 9
    empty = Circuit(frozenset())
    assert np.isnan(jaccard(empty, empty)) and np.isnan(
        overlap(empty, empty, config, draws=9).p
    )  # nothing, not p = 0.1
    assert overlap(empty, one, config, draws=9).p == 1
    for group in np.unique(groups[there]):
        kinds = {
            tuple((node.site, node.layer) for node in parse_edge(name)) for name in names[there & (groups == group)]
        }
        assert len(kinds) == 1


def test_a_file_gives_the_circuit_back_to_its_model_only(tmp_path: Path) -> None:
    model, path = random_model("qwen2_5"), tmp_path / "circuit.json"
    circuit = Circuit(some_edges(model, 0.1))
    save_circuit(circuit, path, model, method="eap", n=np.int64(96))
    assert json.loads(path.read_text())["facts"] == {"method": "eap", "n": 96}
    assert load_circuit(path, model) == circuit
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match=r"a circuit of another model: its weight_hash is .*other_weights=True allows"):
        load_circuit(path, model)
    assert load_circuit(path, model, other_weights=True) == circuit
    with pytest.raises(ValueError, match="a circuit of another model: its model_type is qwen2, this model's gpt2"):
        load_circuit(path, random_model("gpt2"))
    for bad, match in (("{", "JSON"), ('{"edges": []}', "model_type"), ("[]", "dict of fields")):
        path.write_text(bad)
        with pytest.raises(ValueError, match=rf"circuit.json.*{match}.*; give a file that save_circuit wrote\.$"):
            load_circuit(path, model)
    save_circuit(circuit, path, model)
    path.write_text(path.read_text().replace('"edges": [', '"edges": ["embed->q.9.0",'))
    with pytest.raises(ValueError, match=r"circuit.json: q.9.0: layer 9 is out of range"):
        load_circuit(path, model)


def test_dot_names_every_edge_and_is_as_wide_as_its_score(tmp_path: Path) -> None:
    config = random_model("qwen2_5").config  # three query heads read the keys of a K/V head
    circuit = Circuit(
        frozenset({"embed->q.0.1", "z.0.1->k.1.1", "z.1.1->logits", "z.1.4->logits", "mlp_out.0->logits"})
    )
    save_dot(circuit, tmp_path / "x.dot", config)
    text = (tmp_path / "x.dot").read_text()
    for line in (
        '"embed" -> "z.0.1"',
        '"z.0.1" -> "k.1.1"',
        '"k.1.1" -> "z.1.4" [style="dashed"]',
        '"mlp_out.0" -> "logits"',
    ):
        assert line in text
    assert text.count("dashed") == 1  # heads 3 and 5 are not in the circuit, head 1 reads others
    circuit = Circuit(frozenset({"embed->logits", "embed->mlp_in.0"}))
    save_dot(circuit, tmp_path / "x.dot", config, {"embed->logits": -2.0})
    text = (tmp_path / "x.dot").read_text()
    assert '"logits" [ penwidth=4.00]' in text and '"mlp_out.0" [ penwidth=0.50]' in text
