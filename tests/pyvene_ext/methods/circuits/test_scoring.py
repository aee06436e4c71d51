"""Scores of edges and nodes by each method, against the engines that they come from and against hand computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny.planted_circuits import planted

from pyvene_ext.engine.plain import reference_for
from pyvene_ext.engine.sweep.run import sweep
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.methods.circuits import scoring
from pyvene_ext.methods.circuits.acdc import acdc, acdc_passes
from pyvene_ext.methods.circuits.choosing import top_edges
from pyvene_ext.methods.circuits.circuit import Circuit, exists, named_scores
from pyvene_ext.methods.circuits.scoring import METHODS, check_scoring, score, score_cost
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.graph import receivers, senders
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.stats.rankings import auroc
from tests.ground_truth.paths import precedes
from tests.live_tensors import Peak
from tests.pyvene_ext.methods.circuits.test_circuits import BASE, chosen, close, contributions, norm_in_front
from tests.pyvene_ext.methods.circuits.test_circuits import SOURCE as OTHER
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

SOURCE = replace(OTHER, answers=BASE.answers)


def test_scores_are_means_over_prompts_in_the_order_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MASK_STEPS", 2)
    model, base, source = random_model("llama3_1"), *(chosen(prompts, [0, 4]) for prompts in (BASE, SOURCE))
    names = [[str(node) for node in nodes(model.config)] for nodes in (senders, receivers)]
    options = {"batch_size": 3, "progress": False}
    exact = score(model, base, source, "path_patching", batch_size=3, progress=False)
    for edge in ("embed->k.0.1", "z.0.2->mlp_in.1", "mlp_out.0->logits"):
        sender, receiver = edge.split("->")
        path = PathPatch(sender=sender, receivers=(receiver,), freeze_mlps=True)
        close(
            exact[names[0].index(sender), names[1].index(receiver)],
            patch(model, [path], base, source, **options).delta.mean(),  # type: ignore[arg-type]
        )
    estimated = score(model, base, source, "eap", batch_size=3, progress=False)
    close(estimated, np.nan_to_num(edge_attribution(model, base, source, progress=False).matrix))
    nodes = score(model, base, source, "activation_patching", level="node", batch_size=3, progress=False)
    spec = ActivationPatch(site="z", layer=1, heads=(3,))
    close(nodes[names[0].index("z.1.3")], patch(model, [spec], base, source, progress=False).delta.mean())
    assert nodes.shape == (len(names[0]),) and nodes[0] == 0
    for level, methods in METHODS.items():
        shape = exists(model.config).shape[: 2 if level == "edge" else 1]
        for method in set(methods) - {"path_patching", "activation_patching", "eap_ig_activations", "acdc"}:
            found = score(model, base, source, method, level=level, steps=1, progress=False)  # type: ignore[arg-type]
            assert found.shape == shape and np.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "tau"), [("logit_diff", 0.05), pytest.param("kl", 0.005, marks=pytest.mark.slow)])
def test_by_scores_of_acdc_a_circuit_of_as_many_edges_as_it_keeps_is_its_own(metric: str, tau: float) -> None:
    model, base, source = random_model("llama3_1"), *(chosen(prompts, [0, 4]) for prompts in (BASE, SOURCE))
    found = acdc(model, base, source, metric, tau=tau, progress=False)
    scores = score(model, base, source, "acdc", metric, tau=tau, progress=False)
    kept = np.abs(scores) >= tau
    assert np.array_equal(kept, found.unpruned.matrix(model.config))
    assert top_edges(scores, int(kept.sum()), model.config) == found.circuit
    effects = dict(zip(found.edges, found.effect, strict=True))
    for edge, value in named_scores(scores, Circuit.full(model.config), model.config).items():
        assert value == (max(effects.get(edge, 0), 0) if metric == "kl" else effects.get(edge, 0))
    assert 5 < kept.sum() < len(effects) - 5 and (metric == "kl" or min(effects.values()) < 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama3_1", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_is_lost_without_an_edge_or_node_is_by_patching_the_patched_path_or_activation(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, source = random_model(family), *(chosen(prompts, [0, 4]) for prompts in (BASE, SOURCE))
    monkeypatch.setattr(scoring, "AT_ONCE", 50)
    for level, method in (("edge", "path_patching"), ("node", "activation_patching")):
        patched = score(model, base, source, method, level=level, progress=False)  # type: ignore[arg-type]
        left_out = scoring._left_out(model, base, source, "logit_diff", level, progress=False)  # type: ignore[arg-type]
        close(left_out, patched)
        assert np.abs(patched).max() > 0.05


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_under_other_ablations_nodes_have_what_is_lost_without_them(kind: Literal["zero", "mean"]) -> None:
    model = random_model("llama3_1")
    nodes = score(model, BASE, SOURCE, "activation_patching", level="node", ablation=kind, progress=False)
    names = [str(node) for node in senders(model.config)]
    for name, spec in (
        ("z.1.3", Ablation(kind=kind, site="z", layer=1, heads=(3,))),
        ("mlp_out.0", Ablation(kind=kind, site="mlp_out", layer=0)),
    ):
        lost = sweep(
            model, spec, BASE, reference=Reference.compute(model, SOURCE, [(spec.site, spec.layer)]), progress=False
        ).delta.mean()
        close(nodes[names.index(name)], lost)
    assert nodes[0] == 0


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_under_other_ablations_atp_is_the_first_order_estimate_of_what_is_lost_without_a_node(
    kind: Literal["zero", "mean"],
) -> None:
    model = random_model("llama3_1")
    nodes = score(model, BASE, SOURCE, "atp", level="node", ablation=kind, progress=False)
    specs = [
        Ablation(kind=kind, site=node.site, layer=node.layer, heads=node.heads) for node in senders(model.config)[1:]
    ]
    reference = reference_for(model, specs, SOURCE, progress=False)
    close(nodes[1:], estimate(model, specs, BASE, reference=reference, progress=False).mean(1))
    assert nodes[0] == 0


def test_every_method_that_knows_of_ablations_scores_under_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MASK_STEPS", 2)
    model, base, source = random_model("llama3_1"), *(chosen(prompts, [0, 4]) for prompts in (BASE, SOURCE))
    for method in ("mask", "eap_ig_inputs"):
        by = [
            score(model, base, source, method, steps=2, ablation=kind, progress=False)  # type: ignore[arg-type]
            for kind in ("patching", "zero")
        ]
        assert not np.array_equal(*by)


@pytest.mark.parametrize(
    ("level", "method"), [("edge", "eap_ig_inputs"), ("edge", "path_patching"), ("node", "activation_patching")]
)
def test_by_kl_too_what_helps_has_a_score_above_0(level: Literal["edge", "node"], method: Any) -> None:
    case = planted("k_composition", "llama", n_prompts=3)
    scores, by_diff = (
        score(case.model, case.clean, case.corrupt, method, metric, level=level, steps=8, progress=False)
        for metric in ("kl", "logit_diff")
    )
    strong = by_diff > 0.5 * by_diff.max()
    assert strong.any() and (scores[strong] > 0).all()
    without = (case.clean, case.corrupt, "kl")
    names = [[str(node) for node in nodes(case.model.config)] for nodes in (senders, receivers)]
    if method == "activation_patching":
        at = int(scores.argmax())
        node = senders(case.model.config)[at]
        spec = ActivationPatch(site=node.site, layer=node.layer, heads=node.heads)
        close(scores[at], -patch(case.model, [spec], *without, progress=False).delta.mean())
    if method == "path_patching":
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        path = PathPatch(sender=names[0][row], receivers=(names[1][column],), freeze_mlps=True)
        close(scores[row, column], -patch(case.model, [path], *without, progress=False).delta.mean())


@pytest.mark.parametrize("methods", [["eap"], ["mask"], ["acdc"]])
def test_what_does_not_fit_into_memory_is_refused_before_anything_runs(methods: list[str]) -> None:
    model = random_model("llama3_1")
    check_scoring(model, BASE, SOURCE, methods)
    check_scoring(model, BASE, SOURCE, methods, memory=2**30)
    with pytest.raises(ValueError, match="do not hold"):
        check_scoring(model, BASE, SOURCE, methods, memory=10_000)
    with pytest.raises(ValueError, match="takes its values from source prompts"):
        check_scoring(model, BASE, None, methods)


def test_costs_are_told_before() -> None:
    config = random_model("llama3_1").config
    assert score_cost(config, "random") == (0, 0)
    assert score_cost(config, "mask", batch_size=2).fixed == score_cost(config, "mask", batch_size=4).fixed / 2 > 0
    assert score_cost(config, "eap_ig_inputs", steps=9).each > score_cost(config, "eap_ig_inputs").each
    for one, other in (("acdc", "eap"), ("path_patching", "eap"), ("eap", "random")):
        assert score_cost(config, one).each > score_cost(config, other).each
    passes = [score_cost(config, "acdc", start_share=share).each for share in (0.5, 1)]
    assert passes == [(2 + acdc_passes(config).one_by_one) / 2, acdc_passes(config).one_by_one]
    assert score_cost(config, "path_patching", ablation="zero").each > score_cost(config, "path_patching").each
    heads = score_cost(config, "activation_patching", "node").each
    assert score_cost(config, "path_patching").each > heads == (len(senders(config)) - 1) / 2


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_flow_is_the_proximity_of_what_is_added_to_the_stream_in_front_of_the_receivers_norm(family: str) -> None:
    model = random_model(family)
    found = score(model, BASE, SOURCE, "flow", batch_size=2)
    names = [[str(node) for node in nodes(model.config)] for nodes in (senders, receivers)]
    expected = {receiver: np.zeros(len(names[0])) for receiver in ("q.1.0", "mlp_in.0", "logits")}
    for ids in BASE.input_ids:
        tokens = torch.tensor([ids])
        added = contributions(model, tokens)
        for receiver, sums in expected.items():
            streams: list[torch.Tensor] = []
            handle = norm_in_front(model, receiver).register_forward_pre_hook(
                lambda _, args, s=streams: s.append(args[0])
            )
            with torch.no_grad():
                model(tokens)
            handle.remove()
            stream = streams[0][:, -1:] if receiver == "logits" else streams[0]
            near = {}
            for sender in (s for s in names[0] if precedes(s, receiver)):
                part = added[sender][:, -stream.shape[1] :]
                near[sender] = (stream.abs().sum(-1) - (stream - part).abs().sum(-1)).clamp(min=0)
            total = sum(near.values())
            for sender, value in near.items():
                sums[names[0].index(sender)] += float((value / total).mean())
    for receiver, sums in expected.items():
        np.testing.assert_allclose(found[:, names[1].index(receiver)], sums / len(BASE), atol=2e-5)


def test_flow_takes_no_more_memory_than_it_is_given() -> None:
    model, base = random_model("llama3_1"), random_prompts((50,) * 8)
    given = 2 * 2**20
    with Peak() as most:
        free = score(model, base, base, "flow")
    with Peak() as peak:
        close(score(model, base, base, "flow", memory=given), free)
    assert given / 5 < peak.bytes <= given < most.bytes


@pytest.mark.parametrize("method", ["eap", "path_patching"])
def test_a_planted_circuit_has_the_highest_scores(method: str) -> None:
    case = planted("v_composition", "llama", n_prompts=3)
    found = np.abs(score(case.model, case.clean, case.corrupt, method, progress=False))  # type: ignore[arg-type]
    there = exists(case.model.config)
    names = np.array([[f"{s}->{r}" for r in receivers(case.model.config)] for s in senders(case.model.config)])
    assert auroc(found[there], np.isin(names[there], list(case.edges))) == 1


def test_a_method_of_the_other_level_is_refused() -> None:
    model = random_model("llama3_1")
    with pytest.raises(ValueError, match="no method 'atp' scores edges; choose among eap, "):
        score(model, BASE, SOURCE, "atp", progress=False)
    with pytest.raises(ValueError, match="no method 'flow' scores nodes; choose among atp, "):
        score(model, BASE, SOURCE, "flow", level="node", progress=False)
    with pytest.raises(ValueError, match="no prompts to read edges on"):
        score(model, BASE.take([]), None, "flow", progress=False)
    with pytest.raises(ValueError, match="level must be"):
        score(model, BASE, SOURCE, "eap", level="neuron", progress=False)  # type: ignore[arg-type]
