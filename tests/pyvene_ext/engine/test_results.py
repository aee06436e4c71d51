"""Results as tables, in a few lines and in HTML: values by hand, places of every kind of intervention, and how long it takes."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

import pyvene_ext as px
from pyvene_ext import Ablation, ActivationPatch, Addition, ForcedAttention, PathPatch, Result
from pyvene_ext.engine.results import EditLocation, finite_mean
from pyvene_ext.stats.intervals import student_interval
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

ZERO = Ablation(kind="zero", site="z", layer=1, heads=(3,))
PLACES = [
    (ZERO, ("z", 1, 3, "all")),
    (Ablation(kind="mean", site="z", layer=1, heads=(0, 3), positions=("s1", -1)), ("z", 1, None, "s1,-1")),
    (Ablation(kind="mean", site="mlp_out", layer=0, positions="last"), ("mlp_out", 0, None, "last")),
    (Addition(site="embed", vector=(1.0,)), ("embed", None, None, "all")),
    (ForcedAttention(layer=2, heads=(1,), shape="uniform", block=(0, 2)), ("pattern", 2, 1, "all")),
    ((ZERO, Ablation(kind="zero", site="z", layer=2, heads=(3,))), ("z", None, 3, "all")),
    ((ZERO, Ablation(kind="zero", site="mlp_out", layer=1, positions="last")), (None, 1, None, None)),
    (ActivationPatch(site="k", layer=2, heads=(0,), positions=(4,)), ("k", 2, 0, "4")),
    (PathPatch(sender="z.0.1", receivers=("q.2.3", "k.2.0")), ("z", 0, 1, "all", "k.2.0+q.2.3")),
    (PathPatch(sender="embed", receivers=("logits",), positions="last"), ("embed", None, None, "last", "logits")),
]


@pytest.mark.parametrize(("spec", "place"), PLACES, ids=lambda x: None)
def test_a_place_is_what_all_edits_of_an_intervention_share(spec: object, place: tuple) -> None:
    assert EditLocation.of(spec) == EditLocation(*place)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", [px.run, px.sweep])
def test_the_table_of_a_run_has_the_place_of_each_intervention_and_the_values_of_the_arrays(engine: object) -> None:
    model = random_model("llama3_1")
    specs = [*px.all_heads(model.config), (ZERO, Ablation(kind="zero", site="mlp_out", layer=0))]
    result = engine(model, specs, random_prompts((5, 7, 6)), progress=False)  # type: ignore[operator]
    frame = result.to_frame()
    assert len(frame) == len(specs) * 3 and list(frame["prompt"][:4]) == [0, 1, 2, 0]
    for row in frame.itertuples():
        number = result.names.index(row.intervention)
        after = result.intervened[number, row.prompt]
        assert (row.baseline, row.intervened) == (result.baseline[row.prompt], after)
        assert row.delta == np.float32(row.baseline) - np.float32(row.intervened)
        if number < len(specs) - 1:
            spec = specs[number]
            assert (row.site, row.layer, row.head, row.position) == ("z", spec.layer, spec.heads[0], "all")
        else:
            assert pd.isna(row.site) and pd.isna(row.layer) and pd.isna(row.head)
    by_head = frame.groupby(["layer", "head"])["delta"].mean()
    np.testing.assert_allclose(by_head[1, 3], result.delta[specs.index(ZERO)].mean(), rtol=1e-6)


def test_a_result_from_a_store_knows_its_places(tmp_path: object) -> None:
    model, prompts = random_model("llama3_1"), random_prompts((5, 5))
    for _ in range(2):  # the second time from the store
        result = px.sweep(model, [ZERO], prompts, store=f"{tmp_path}/store", progress=False)
        assert list(result.to_frame()["head"]) == [3, 3]


def test_a_repr_has_the_strongest_interventions_with_student_intervals() -> None:
    baseline = np.array([3, 4, 5], np.float32)
    intervened = baseline - np.array([[1, 1, 1], [-4, -5, -6], [np.nan] * 3, [2, np.nan, np.nan]], np.float32)
    shown = repr(Result(("one", "five", "nothing", "two"), "logit_diff", baseline, intervened))
    # Half of the interval: t with two degrees of freedom, 4.3027, times 1 / sqrt(3).
    assert shown.splitlines() == [
        "Result of logit_diff: 4 interventions x 3 prompts; baseline 4",
        "  strongest  mean delta    95% interval",
        "  five               -5  [-7.48, -2.52]",
        "  two                 2               -",
        "  one                 1          [1, 1]",
    ]


def test_values_of_tokens_count_each_prompt_the_same_and_nothing_after_its_end() -> None:
    baseline = np.array([[1, 1, 1], [5, np.nan, np.nan]], np.float32)
    result = Result(("a",), "loss", baseline, baseline[None] - np.float32(2))
    result.intervened[0, 1, 0] = 1
    assert list(result.mean_delta) == [3]  # of 2 and 4
    assert len(result.to_frame()) == 4
    assert list(result.to_frame()["token"]) == [0, 1, 2, 0]


def test_html_is_a_table_whose_text_is_escaped() -> None:
    baseline = np.ones(2, np.float32)
    found = Result(("z<script>",), "a & b", baseline, baseline[None])._repr_html_()
    assert found.startswith("<p>Result of a &amp; b: 1 intervention x 2 prompts; baseline 1</p><table>")
    assert "z&lt;script&gt;" in found and "<script>" not in found


def test_a_large_result_is_shown_at_once() -> None:
    names = tuple(f"z.{number // 100}.{number % 100}" for number in range(10_000))
    values = np.zeros((10_000, 1000), np.float32)
    values[77] = -1
    started = time.process_time()
    result = Result(names, "logit_diff", values[0], values)
    assert "z.0.77" in repr(result) and len(repr(result).splitlines()) < 15 and "z.0.77" in result._repr_html_()
    assert time.process_time() - started < 2


def test_a_finite_mean_leaves_out_what_is_missing() -> None:
    values = np.array([[1, np.nan, 3], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(finite_mean(values, -1), [2, np.nan])
    assert finite_mean(values) == 2 and finite_mean(np.array([1.0, 4.0])) == 2.5


def test_students_interval_is_that_of_scipy() -> None:
    from scipy import stats

    values = np.random.default_rng(0).normal(size=(2, 7))
    mean, low, high = student_interval(np.concatenate([values, [[np.nan], [np.inf]]], 1))
    for row, *ends in zip(values, low, high, strict=True):
        np.testing.assert_allclose(ends, stats.ttest_1samp(row, 0).confidence_interval(0.95))
    np.testing.assert_allclose(mean, values.mean(1))
    assert np.isnan(student_interval(np.ones((1, 1))).low).all()
