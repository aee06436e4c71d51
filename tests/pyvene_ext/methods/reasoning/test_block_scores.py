"""Scores of heads inside a block against plain loops over queries and keys, one prompt at a time."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from pyvene_ext.methods.heads.flow import flow_routes
from pyvene_ext.methods.reasoning import block_scores as module
from pyvene_ext.methods.reasoning.block_scores import BlockScores, block_scores, check_scores, pattern_scores
from pyvene_ext.methods.solving.results import Results
from pyvene_ext.prompts.problems import Problem, Questions
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model

LENGTHS = (9, 12, 7, 12)
BLOCKS = (range(3, 7), range(2, 11), range(4, 5), range(5, 8))  # one of a single token


def questions() -> Questions:
    problem = Problem(question="?", solution="", answer=0, steps=1)
    starts = tuple(block.start for block in BLOCKS)
    return Questions((problem,) * 4, random_prompts(LENGTHS), starts, BLOCKS, (0, 1, 2, 3))


def by_hand(attention: np.ndarray, block: range, head: int) -> tuple[float, int, float]:
    """Hub, where it is, and skip of one head from its pattern `[head query key]`."""
    tokens = attention.shape[1]
    queries = [at for at in range(tokens) if at > block[0]]
    received = [sum(attention[head, query, key] for query in queries if query > key) for key in block]
    looks_back = [sum(attention[head, query, key] for key in range(1, block[0])) for query in queries]
    return max(received) / len(queries), int(np.argmax(received)), sum(looks_back) / len(queries)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_plain_loops_over_tokens(family: str) -> None:
    model, given = random_model(family), questions()
    eager: Any = random_model(family, attn_implementation="eager")
    found = block_scores(model, given, batch_size=3)
    for which, ids in enumerate(given.prompts.input_ids):
        with torch.no_grad():
            attentions = eager(torch.tensor([ids]), output_attentions=True).attentions
        (flow,) = flow_routes(model, given.prompts.take([which]), progress=False).attention
        block = BLOCKS[which]
        for layer, attention in enumerate(attentions):
            for head in range(attention.shape[1]):
                hub, at, skip = by_hand(attention[0].double().numpy(), block, head)
                assert found.hub[which, layer, head] == pytest.approx(hub, abs=1e-5)
                assert found.skip[which, layer, head] == pytest.approx(skip, abs=1e-5)
                received = attention[0, head, block[0] + 1 :, block[0] : block[-1] + 1].tril().sum(0)
                assert received[found.hub_at[which, layer, head]] == pytest.approx(float(received[at]), abs=1e-5)
                shares = [
                    sum(flow[layer, head, query, key] for key in block if key < query)
                    for query in range(block[0] + 1, len(ids))
                ]
                assert found.flow[which, layer, head] == pytest.approx(np.mean(shares), abs=1e-5)
    assert found.flow.max() > 0.01 and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def one_head(rows: dict[int, dict[int, float]], tokens: int = 8) -> np.ndarray:
    pattern = np.zeros((1, tokens, tokens))
    for query, keys in rows.items():
        for key, mass in keys.items():
            pattern[0, query, key] = mass
    return pattern


def test_patterns_that_are_known() -> None:
    """Tokens 0 to 2 are the question, 3 to 6 the block, 7 stands behind it."""
    block = range(3, 7)
    hub = one_head({query: {4: 1.0} for query in range(4, 8)})  # its own look at itself is none from a later one
    assert [float(x[0]) for x in pattern_scores(hub, block)] == [0.75, 1, 0]
    before = one_head({query: {query - 1: 1.0} for query in range(4, 8)})
    assert [float(x[0]) for x in pattern_scores(before, block)] == [0.25, 0, 0]
    skips = one_head({query: {0: 0.5, 2: 0.5} for query in range(3, 8)})
    assert [float(x[0]) for x in pattern_scores(skips, block)] == [0, 0, 0.5]
    itself = one_head({query: {query: 1.0} for query in range(8)})
    assert [float(x[0]) for x in pattern_scores(itself, block)] == [0, 0, 0]
    # What the block's first token sees, and the question's tokens, does not count.
    aside = one_head({1: {1: 1.0}, 2: {1: 1.0}, 3: {2: 1.0}})
    assert [float(x[0]) for x in pattern_scores(aside, block)] == [0, 0, 0]


def test_composite_is_the_mean_rank_and_the_usual_hub_the_most_frequent() -> None:
    generator = np.random.default_rng(0)
    flow, hub, skip = generator.random((3, 5, 2, 3)).astype(np.float32)
    hub_at = np.array([[[1, 0, 2], [3, 3, 0]], [[1, 2, 2], [3, 0, 0]], [[0, 2, 1], [3, 0, 0]]])
    scores = BlockScores(flow, hub, skip, hub_at)
    ranks = [rankdata(-x.mean(0, dtype=np.float64)) for x in (flow, hub, skip)]
    expected = 1 - (np.mean(ranks, 0) - 1) / 5
    np.testing.assert_allclose(scores.of("composite").ravel(), expected)
    np.testing.assert_allclose(scores.of("hub"), hub.mean(0), rtol=1e-6)
    first = BlockScores(flow, flow, flow, hub_at).of("composite")
    assert first.max() == 1 and first.min() == 0 and first.argmax() == flow.mean(0).argmax()
    fewer = BlockScores(flow[:3], hub[:3], skip[:3], hub_at)
    assert fewer.usual_hub().tolist() == [[1, 2, 2], [3, 0, 0]]


def test_patterns_and_importances_are_reduced_layer_by_layer() -> None:
    """Arrays never hold more than one layer of one prompt at a time, with its copies."""
    model, length = random_model("llama3_1"), 60
    one = Problem(question="?", solution="", answer=0, steps=1)
    given = Questions((one,) * 8, random_prompts((length,) * 8), (4,) * 8, (range(4, 50),) * 8, tuple(range(8)))
    config = model.config
    tracemalloc.start()
    block_scores(model, given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * config.num_attention_heads * length**2 < 4 * config.num_hidden_layers * 8 * length**2


def test_without_flow_no_flow_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = random_model("llama3_1"), questions()
    expected = block_scores(model, given)
    monkeypatch.setattr(module, "read_flow", None)
    found = block_scores(model, given, flow=False)
    assert found.flow is None
    for name in ("hub", "skip", "hub_at"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.of("hub") == expected.of("hub")).all()
    for score in ("flow", "composite"):
        with pytest.raises(ValueError, match=f"there is no {score}, as flow was not computed"):
            found.of(score)  # type: ignore[arg-type]


def test_hub_and_skip_need_patterns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise ValueError("no routes; sorry.")

    monkeypatch.setattr(module, "check_routes", refuse)
    check_scores(random_model("llama3_1"), "hub")
    with pytest.raises(ValueError, match="heads cannot be ranked here: no routes; give heads"):
        check_scores(random_model("llama3_1"), "composite")


@pytest.mark.parametrize("flow", [True, False])
def test_an_interrupted_run_goes_on_with_the_prompts_that_are_missing(
    flow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, results = random_model("llama3_1"), questions(), Results(tmp_path, {"model": "a"})
    expected = block_scores(model, given, flow=flow)
    reader = "read_flow" if flow else "read_patterns"
    own, run = getattr(module, reader), []

    def stops(*args: Any, **options: Any) -> None:
        if len(run) == 1:
            raise KeyboardInterrupt
        run.append(args[1].input_ids)
        own(*args, **options)

    monkeypatch.setattr(module, reader, stops)
    with pytest.raises(KeyboardInterrupt):
        block_scores(model, given, flow=flow, batch_size=3, results=results)
    assert run.pop() == given.prompts.input_ids[:3]
    found = block_scores(model, given, flow=flow, batch_size=3, results=results)
    assert run == [given.prompts.input_ids[3:]]
    for name in ("flow", "hub", "skip", "hub_at"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and np.allclose(a, b, atol=1e-6))
    # Of other blocks, and with or without flow, they are computed.
    run.clear()
    block_scores(model, replace(given, blocks=(range(2, 7), *BLOCKS[1:])), flow=flow, batch_size=3, results=results)
    assert run == [given.prompts.input_ids[:3]]
    assert (block_scores(model, given, flow=not flow, results=results).flow is None) == flow


@pytest.mark.parametrize("block", [range(0), range(0, 3), range(5, 9)])
def test_prompts_without_a_block_are_refused_before_the_model_runs(
    block: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama3_1")
    monkeypatch.setattr(type(model.base_model), "forward", None)
    with pytest.raises(ValueError, match="prompt 0 has no block with tokens before and after it"):
        block_scores(model, replace(questions(), blocks=(block, *BLOCKS[1:])))
