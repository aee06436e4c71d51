"""Statistics of any arrays: what SciPy or the obvious loop says, NaN where nothing is defined, or one sentence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as scipy_stats

from pyvene_ext import stats
from tests.fuzz.outcomes import few, outcome

ORDINARY = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0])
ANY = ORDINARY | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324])
SHAPE = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
VALUES = hnp.arrays(np.float64, SHAPE, elements=ANY)


def between(low: float, high: float, *numbers: float) -> bool:
    return all(math.isnan(number) or low <= number <= high for number in numbers)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=4))
    elements = draw(st.sampled_from([ORDINARY, ANY, st.integers(0, 2).map(float)]))
    return tuple(draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in range(2))  # type: ignore[return-value]


@given(pair=matrices() | st.tuples(VALUES, VALUES))
@example(pair=(np.array([[1e308, -1e308, 0.0]]), np.array([[1.0, 2.0, 3.0]])))
@example(pair=(np.array([[5e-324, 0.0, 1.0]]), np.array([[5e-324, 0.0, 0.0]])))
@example(pair=(np.zeros((0, 3)), np.zeros((0, 3))))
def test_correlations(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    found = outcome(lambda: stats.correlate_heads(a, b, n_resamples=20))
    if a.ndim != 2 or a.shape != b.shape:
        assert found is None
        return
    kept = np.isfinite(a) & np.isfinite(b)
    assert (found.n, found.dropped) == (kept.sum(), (~kept).sum())
    for name in ("pearson", "spearman"):
        coefficient = getattr(found, name)
        assert between(-1, 1, coefficient.r, coefficient.low, coefficient.high)
        assert between(0, 1, coefficient.p, coefficient.p_within_layers)
        assert not math.isnan(coefficient.r) or found.note
        if not math.isnan(coefficient.r):
            expected = getattr(scipy_stats, f"{name}r")(a[kept], b[kept])
            few = kept.sum() <= 7  # whose p is exact
            p = coefficient.p if few else expected[1]
            np.testing.assert_allclose([coefficient.r, coefficient.p], [expected[0], p], rtol=1e-9)
            assert not few or 1 / math.factorial(int(kept.sum())) - 1e-12 <= p <= 1
    assert len(stats.correlate_layers(a, b, n_resamples=5)) == len(a)


@given(p=hnp.arrays(np.float64, hnp.array_shapes(max_dims=1, min_side=0), elements=st.floats(0, 1) | st.just(math.nan)))
def test_q_values(p: np.ndarray) -> None:
    q = stats.q_values(p)
    tested = ~np.isnan(p)
    assert np.isnan(q[~tested]).all() and (q[tested] >= p[tested] - 1e-15).all() and (q[tested] <= 1).all()
    if tested.any():
        ranked = np.sort(p[tested])
        by_hand = [
            min(1, *(ranked[j] * len(ranked) / (j + 1) for j in range(i, len(ranked)))) for i in range(len(ranked))
        ]
        np.testing.assert_allclose(np.sort(q[tested]), by_hand)


@given(
    active=hnp.arrays(np.float64, SHAPE, elements=st.sampled_from([0.0, 1.0])) | VALUES,
    axis=st.integers(-2, 2),
    confidence=st.floats(0.01, 0.999),
)
@example(active=np.array(1.0), axis=-1, confidence=0.95)
@example(active=np.zeros((2, 0)), axis=0, confidence=0.95)
def test_frequencies(active: np.ndarray, axis: int, confidence: float) -> None:
    found = outcome(lambda: stats.frequency_interval(active, axis, confidence))
    possible = -active.ndim <= axis < active.ndim and active.shape[axis] > 0 and ((active == 0) | (active == 1)).all()
    assert (found is not None) == bool(possible)
    if found is None:
        return
    for at in np.ndindex(found.mean.shape):
        row = np.moveaxis(active, axis, -1)[at]
        expected = scipy_stats.binomtest(int(row.sum()), len(row)).proportion_ci(confidence, "wilson")
        np.testing.assert_allclose([found.mean[at], found.low[at], found.high[at]], [row.mean(), *expected], atol=1e-12)


@given(x=VALUES, y=VALUES, same=st.booleans())
@example(x=np.array([1e308, 1e308]), y=np.array([-1e308, -1e308]), same=False)
def test_paired_differences(x: np.ndarray, y: np.ndarray, same: bool) -> None:
    y = x[..., ::-1] if same and x.ndim else y
    found = outcome(lambda: stats.paired_bootstrap(x, y, np.random.default_rng(0), n_resamples=20))
    with np.errstate(all="ignore"):
        possible = x.ndim == 1 and x.shape == y.shape and x.size > 1 and np.isfinite(x - y).all()
    assert possible or found is None
    if found is not None and np.abs(x - y).max() < 1e300:
        np.testing.assert_allclose(found.mean, (x - y).mean())
        slack = 1e-9 * np.abs(x - y).max()
        assert (x - y).min() - slack <= found.low <= found.high <= (x - y).max() + slack


@given(data=st.data(), n=st.integers(0, 6))
def test_mcnemar(data: st.DataObject, n: int) -> None:
    kinds = st.sampled_from([bool, bool, bool, np.int64, np.float64])
    before, after = (data.draw(hnp.arrays(data.draw(kinds), n + data.draw(st.integers(0, 4)) // 4)) for _ in range(2))
    found = outcome(lambda: stats.mcnemar_p(before, after))
    if before.shape != after.shape or before.dtype != bool or after.dtype != bool:
        assert found is None
        return
    lost, won = (before & ~after).sum(), (~before & after).sum()
    tail = sum(math.comb(int(lost + won), k) for k in range(min(lost, won) + 1)) / 2 ** int(lost + won)
    np.testing.assert_allclose(found, min(1.0, 2 * tail))


HEAD = st.tuples(st.integers(-1, 3), st.integers(-1, 4))


@given(a=st.lists(HEAD, max_size=6), b=st.lists(HEAD, max_size=6))
def test_overlaps(a: list[Any], b: list[Any]) -> None:
    found = stats.head_overlap(a, b, 20)
    assert (
        found.shared == len({*a} & {*b})
        and between(0, 1, found.jaccard, found.chance)
        and -1e-12 <= found.p <= 1 + 1e-12
    )


@given(heads=st.lists(HEAD, max_size=5), exclude=st.lists(HEAD, max_size=4), n_sets=st.integers(0, 30))
@few(1)
def test_random_heads_match_or_are_refused(heads: list[Any], exclude: list[Any], n_sets: int) -> None:
    found = outcome(lambda: stats.random_heads(heads, 3, 4, n_sets, np.random.default_rng(0), exclude))
    inside = all(0 <= layer < 3 and 0 <= head < 4 for layer, head in [*heads, *exclude])
    if found is None:
        return
    assert inside and len(found.sets) == len({*found.sets}) <= n_sets
    for drawn in found.sets:
        assert len(drawn) == len({*drawn}) == len(heads) and {*drawn} != {*heads}
        assert not {*drawn} & {*exclude} and (found.shared or not {*drawn} & {*heads})
