"""Results of the methods as tables and in a few lines: every row against the arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pyvene_ext.engine.results import Result, Shown
from pyvene_ext.engine.sweep.sequential import Sequential
from pyvene_ext.methods.attribution.edges import EdgeScores
from pyvene_ext.methods.attribution.screen import Screen
from pyvene_ext.methods.circuits.acdc_run import AcdcRun
from pyvene_ext.methods.circuits.circuit import Circuit
from pyvene_ext.methods.circuits.faithfulness import CircuitRuns, Curve
from pyvene_ext.methods.circuits.masks import Mask
from pyvene_ext.methods.heads.flow import Flow
from pyvene_ext.methods.heads.lens import Attribution, Lens, Parts
from pyvene_ext.methods.heads.scores import HeadScores
from pyvene_ext.specs.ablation import all_heads
from pyvene_ext.specs.graph import reaches, receivers, senders
from pyvene_ext.specs.joint import spec_name
from tests.tiny_random import random_model

LAYERS, HEADS, PROMPTS = 3, 4, 2
CONFIG: Any = random_model("llama3_1").config


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def head_result() -> Result:
    specs = tuple(all_heads(CONFIG))
    values = drawn(len(specs), PROMPTS)
    return Result(tuple(map(spec_name, specs)), "logit_diff", drawn(PROMPTS, seed=1), values, specs=specs)


def sequential() -> Sequential:
    result, n = head_result(), len(head_result().names)
    result.intervened[0, 1] = np.nan
    ends = np.linspace(0, 1, n)
    return Sequential(result, ends, ends - 0.1, ends + 0.1, np.arange(n), np.array([1, 0]), 0.3)


def screen() -> Screen:
    result = head_result()
    result.intervened[1] = np.nan
    flagged = np.arange(len(result.names)) != 1
    return Screen(result, drawn(*result.intervened.shape, seed=2), flagged, np.array([], int), 0.1, 0.5)


def head_scores() -> HeadScores:
    return HeadScores(*np.random.default_rng(0).random((4, 5, LAYERS, HEADS)))


def lens() -> Lens:
    rank = np.arange((LAYERS + 1) * PROMPTS).reshape(LAYERS + 1, PROMPTS)
    return Lens(drawn(LAYERS + 1, 2, PROMPTS), drawn(LAYERS + 1, PROMPTS), rank, "s2")


def parts(seed: int) -> Parts:
    one = (drawn(PROMPTS, seed=seed + at) for at in range(2, 6))
    return Parts(drawn(LAYERS, HEADS, PROMPTS, seed=seed), drawn(LAYERS, PROMPTS, seed=seed + 1), *one)


def attribution() -> Attribution:
    return Attribution(parts(0), parts(10), drawn(2, PROMPTS))


def flow() -> Flow:
    lengths = (3, 5)
    residual = [tuple(drawn(LAYERS, n, seed=seed) for n in lengths) for seed in (1, 2, 3)]
    return Flow(tuple(drawn(LAYERS, HEADS, n, n) for n in lengths), *residual)


def edges() -> EdgeScores:
    nodes = tuple(senders(CONFIG)), tuple(receivers(CONFIG))
    return EdgeScores(*nodes, drawn(*map(len, nodes), PROMPTS), "logit_diff", "eap")


def runs() -> CircuitRuns:
    return CircuitRuns("logit_diff", drawn(PROMPTS), drawn(PROMPTS, seed=1), drawn(3, PROMPTS, seed=2))


def curve() -> Curve:
    return Curve(
        np.array([1, 4, 9]), np.array([1, 3, 9]), np.array([0.1, 0.4, 0.9]), runs(), drawn(3, 2, PROMPTS, seed=3)
    )


def acdc_run() -> AcdcRun:
    edges = ("embed->logits", "z.0.1->logits")
    nodes = tuple(senders(CONFIG)), tuple(receivers(CONFIG))
    kept, circuit = np.array([True, False]), Circuit(edges[0])
    return AcdcRun(
        "kl", 0.1, None, circuit, circuit, edges, drawn(2), drawn(2), kept, 0.0, 0.2, PROMPTS, 3.5, 0.2, *nodes
    )


def mask() -> Mask:
    scores = np.random.default_rng(0).random(len(senders(CONFIG)))
    settings: dict[str, str | int | float] = {"level": "node"}
    nodes = tuple(senders(CONFIG)), tuple(receivers(CONFIG))
    return Mask(scores, Circuit("embed->logits"), drawn(9), drawn(9, seed=1), "kl", settings, *nodes)


MADE: dict[str, Callable[[], Shown]] = {
    made.__name__: made
    for made in (
        head_result,
        sequential,
        screen,
        head_scores,
        lens,
        attribution,
        flow,
        edges,
        acdc_run,
        mask,
        runs,
        curve,
    )
}


@pytest.mark.parametrize("name", MADE)
def test_a_repr_is_short_and_html_has_the_same_cells(name: str) -> None:
    result = MADE[name]()
    lines = repr(result).splitlines()
    assert 2 < len(lines) < 15 and all(len(line) <= 130 for line in lines)
    _, columns, rows = result.summarise()
    html = result._repr_html_()
    assert html.count("<th>") == len(columns) and html.count("<td>") == len(columns) * len(rows)
    assert len(result.to_frame())


def test_a_table_of_head_scores_has_a_row_for_each_sequence_and_head() -> None:
    found = head_scores()
    frame = found.to_frame()
    assert list(frame) == ["sequence", "layer", "head", "previous", "duplicate", "induction", "copying"]
    assert len(frame) == 5 * LAYERS * HEADS
    for row in frame.itertuples():
        at = row.sequence, row.layer, row.head
        assert (row.previous, row.copying) == (found.previous[at], found.copying[at])  # type: ignore[index]
    assert "copying" not in HeadScores(found.previous, found.duplicate, found.induction).to_frame()
    best = np.unravel_index(found.induction.mean(0).argmax(), (LAYERS, HEADS))
    assert f"induction  {best[0]}.{best[1]} {found.induction.mean(0).max():.2f}" in repr(found)


def test_a_table_of_a_lens_says_which_stream_was_read() -> None:
    found = lens()
    frame = found.to_frame()
    assert list(frame[["site", "layer"]].drop_duplicates().itertuples(index=False, name=None)) == [
        ("resid_pre", 0),
        ("resid_post", 0),
        ("resid_post", 1),
        ("resid_post", 2),
    ]
    assert set(frame["position"]) == {"s2"}
    for row in frame.itertuples():
        at = row.depth, row.prompt
        logits = found.logits[row.depth, :, row.prompt]
        assert (row.logit, row.logit_wrong, row.logit_diff) == (*logits, logits[0] - logits[1])
        assert (row.probability, row.rank) == (found.probability[at], found.rank[at])


def test_a_table_of_direct_logit_attribution_has_every_component_and_sums_to_the_total() -> None:
    found = attribution()
    frame = found.to_frame().set_index(["component", "prompt"])
    for part, column in ((found.logit_diff, "logit_diff"), (found.logit, "logit")):
        for prompt in range(PROMPTS):
            for layer in range(LAYERS):
                assert frame[column][f"mlp_out.{layer}", prompt] == part.mlps[layer, prompt]
                for head in range(HEADS):
                    assert frame[column][f"z.{layer}.{head}", prompt] == part.heads[layer, head, prompt]
            assert frame[column]["embed", prompt] == part.embed[prompt]
            assert frame[column]["bias", prompt] == part.bias[prompt]
    assert len(frame) == (LAYERS * (HEADS + 1) + 2) * PROMPTS
    assert tuple(frame.loc["z.1.2", 0][["site", "layer", "head"]]) == ("z", 1, 2)
    assert frame.loc["mlp_out.1", 0][["layer", "head"]].isna().tolist() == [False, True]


def test_a_table_of_flow_has_the_importance_of_heads_and_mlps() -> None:
    found = flow()
    frame = found.to_frame()
    assert len(frame) == PROMPTS * LAYERS * (HEADS + 1)
    for row in frame.itertuples():
        if row.site == "mlp_out":
            assert pd.isna(row.head)
            by_token = found.mlp[row.prompt][row.layer]
        else:
            by_token = found.attention[row.prompt][row.layer, row.head].sum(-1)
        np.testing.assert_allclose([row.importance, row.importance_last], [by_token.mean(), by_token[-1]], rtol=1e-5)


def test_a_table_of_edges_has_those_that_exist() -> None:
    found = edges()
    frame = found.to_frame().set_index(["edge", "prompt"])["score"]
    names = [f"{a}->{b}" for a in found.senders for b in found.receivers if reaches(a, b)]
    assert len(frame) == len(names) * PROMPTS
    for name in names[::7]:
        np.testing.assert_array_equal(frame[name], found.edge(name))
    assert f"  {found.ranked()[0][0]} " in repr(found)


def test_tables_of_circuits_have_clean_empty_and_random_ones() -> None:
    frame, found = runs().to_frame(), runs()
    for row in frame.itertuples():
        assert (row.clean, row.empty, row.value) == (
            found.clean[row.prompt],
            found.empty[row.prompt],
            found.circuits[row.circuit, row.prompt],
        )
    by_size = curve()
    frame = by_size.to_frame().set_index(["size", "circuit", "prompt"])
    assert frame["value"][4, "chosen", 1] == by_size.runs.circuits[1, 1]
    assert by_size.random is not None and frame["value"][9, "random 1", 0] == by_size.random[2, 1, 0]
    assert frame["n_edges"][4, "random 0", 0] == 3 and len(frame) == 3 * 3 * PROMPTS
    clean, source = by_size.runs.clean.mean(), by_size.runs.empty.mean()
    expected = (by_size.random[1, 0].mean() - source) / (clean - source)
    np.testing.assert_allclose(by_size.random_values[1, 0], expected, rtol=1e-5)


def test_tables_of_screens_and_frequencies_have_what_belongs_to_each_intervention() -> None:
    found = sequential()
    frame = found.to_frame()
    assert frame["frequency"].tolist() == found.frequency.repeat(PROMPTS).tolist()
    assert frame["n_prompts"].tolist() == found.n_prompts.repeat(PROMPTS).tolist()
    assert np.isnan(frame["delta"][1]) and frame["delta"].isna().sum() == 1
    screened = screen()
    frame = screened.to_frame()
    assert frame["estimate"].tolist() == screened.estimates.ravel().tolist()
    assert (
        not frame["could_matter"][PROMPTS : 2 * PROMPTS].any() and frame["could_matter"].sum() == len(frame) - PROMPTS
    )
