"""stats.py against slow, obvious loops and cases worked by hand."""

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pyvene_ext import stats
from pyvene_ext.io.seeds import rng
from pyvene_ext.stats import intervals
from tests.tiers import first_only


@pytest.fixture(autouse=True)
def no_warning_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def loop_pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y))


def loop_ranks(values):
    """Rank = 1 + how many are smaller + half of the other equal ones."""
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def loop_spearman(x, y):
    return loop_pearson(loop_ranks(x), loop_ranks(y))


def exact_p_within_layers(a, b, coefficient):
    """Every within-layer permutation, one by one; as far from the mean of all as the observed."""
    orders = itertools.product(*(list(itertools.permutations(range(a.shape[1]))) for _ in a))
    flat = list(a.ravel())
    every = [coefficient(flat, [b[i, h] for i, order in enumerate(rows) for h in order]) for rows in orders]
    mean = sum(every) / len(every)
    observed = coefficient(flat, list(b.ravel()))
    return sum(abs(r - mean) >= abs(observed - mean) - 1e-9 for r in every) / len(every)


# Five pairs, two of b tied.
HAND_A = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
HAND_B = np.array([[1.0, 1.0, 3.0, 5.0, 2.0]])


def test_coefficients_of_a_case_worked_by_hand():
    found = stats.correlate_heads(HAND_A, HAND_B, n_resamples=200)
    # Pearson: mean b 2.4, squares 1.96 + 1.96 + .36 + 6.76 + .16 = 11.2, covariance 2.8 + 1.4 + 0 + 2.6 - .8 = 6.
    assert found.pearson.r == pytest.approx(6 / math.sqrt(10 * 11.2))
    # Spearman: ranks of b 1.5 1.5 4 5 3, squares 2.25 + 2.25 + 1 + 4 + 0 = 9.5, covariance 3 + 1.5 + 0 + 2 + 0 = 6.5.
    assert found.spearman.r == pytest.approx(6.5 / math.sqrt(10 * 9.5))
    assert (found.n, found.dropped) == (5, 0)


def test_coefficients_and_p_values_are_scipys_in_float64():
    generator = np.random.default_rng(1)
    a = generator.random((24, 16)).astype(np.float32)
    b = (a + 0.5 * generator.random((24, 16))).astype(np.float32).round(2)
    found = stats.correlate_heads(a, b, n_resamples=10)
    x, y = list(a.ravel().astype(float)), list(b.ravel().astype(float))
    assert found.pearson.r == pytest.approx(loop_pearson(x, y), abs=1e-12)
    assert found.spearman.r == pytest.approx(loop_spearman(x, y), abs=1e-12)
    assert found.pearson.p == scipy_stats.pearsonr(x, y).pvalue
    assert found.spearman.p == scipy_stats.spearmanr(x, y).pvalue
    assert 0 < found.pearson.p < 1e-60  # in float32 it would be 0


@pytest.mark.parametrize("coefficient", first_only(["pearson", "spearman"]))
def test_permutation_p_is_the_exact_one_up_to_sampling(coefficient):
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 4, (3, 4)).astype(float), generator.integers(0, 4, (3, 4)).astype(float)
    b += 0.7 * a + np.array([[0], [5], [10]])
    a += np.array([[0], [3], [6]])
    exact = exact_p_within_layers(a, b, {"pearson": loop_pearson, "spearman": loop_spearman}[coefficient])
    assert 0.001 < exact < 0.5
    n = 20_000
    found = getattr(stats.correlate_heads(a, b, n_resamples=n), coefficient).p_within_layers
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / n) + 1 / n


def test_layer_alone_is_correlated_but_not_within_layers():
    generator = np.random.default_rng(0)
    depth = np.arange(12.0)[:, None]
    a, b = depth + generator.random((12, 8)), depth + generator.random((12, 8))
    found = stats.correlate_heads(a, b, n_resamples=2000)
    assert found.pearson.r > 0.98 and found.pearson.p < 1e-50
    assert found.pearson.p_within_layers > 0.05 and found.spearman.p_within_layers > 0.05


def test_association_within_layers_is_found_in_either_direction_under_any_depth_trend():
    generator = np.random.default_rng(0)
    a = generator.random((12, 8))
    trend = 3 * np.arange(12.0)[:, None]
    for sign in (1, -1):
        found = stats.correlate_heads(a + trend, sign * a + trend, n_resamples=999)
        assert found.pearson.p_within_layers == 1 / 1000  # nothing as far: (1 + 0) / (1 + 999)
        assert found.spearman.p_within_layers < 0.05


def test_permutation_p_counts_ties_with_the_observed_value():
    a = np.array([[0.1, 0.1, 0.1, 0.7]])
    b = np.array([[0.3, 0.3, 0.3, 0.9]])
    # Only where the odd one goes matters: a quarter of all permutations give exactly r = 1.
    found = stats.correlate_heads(a, b, n_resamples=4000)
    assert found.pearson.p_within_layers == found.pearson.p == 0.25
    assert found.spearman.p_within_layers == pytest.approx(0.25, abs=0.03)
    # One head a layer: nothing can be permuted.
    assert stats.correlate_heads(a.T, b.T, n_resamples=50).pearson.p_within_layers == 1.0


@pytest.mark.slow
def test_permutation_p_is_uniform_under_its_null():
    generator = np.random.default_rng(5)
    depth = np.arange(4.0)[:, None]
    p = []
    for seed in range(200):
        a, b = depth + generator.normal(size=(4, 6)), depth**2 + generator.normal(size=(4, 6))
        p.append(stats.correlate_heads(a, b, seed, n_resamples=199).pearson.p_within_layers)
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.slow
def test_bootstrap_interval_matches_a_loop():
    generator = np.random.default_rng(7)
    a = generator.random((4, 6)).round(1)
    b = (a + generator.random((4, 6))).round(1)
    x, y = a.ravel(), b.ravel()
    pearson, spearman = [], []
    for _ in range(3000):
        picked = generator.integers(24, size=24)
        pearson.append(loop_pearson(x[picked], y[picked]))
        spearman.append(scipy_stats.spearmanr(x[picked], y[picked]).statistic)
    found = stats.correlate_heads(a, b, n_resamples=3000)
    for coefficient, resampled in ((found.pearson, pearson), (found.spearman, spearman)):
        assert (coefficient.low, coefficient.high) == pytest.approx(np.quantile(resampled, (0.025, 0.975)), abs=0.03)
        assert coefficient.low < coefficient.r < coefficient.high


def test_bootstrap_in_many_small_blocks_gives_the_same_interval(monkeypatch):
    generator = np.random.default_rng(7)
    a, b = generator.random((2, 4, 6))
    whole = stats.correlate_heads(a, b, n_resamples=100)
    monkeypatch.setattr(intervals, "AT_ONCE", 24 * 7)
    assert stats.correlate_heads(a, b, n_resamples=100) == whole


def test_constant_resamples_are_left_out_and_counted():
    a = np.zeros((2, 4))
    a[1, 3] = 1.0
    b = np.arange(8.0).reshape(2, 4)
    found = stats.correlate_heads(a, b, n_resamples=2000)
    left_out = int(found.note.split()[0])
    assert found.note == f"{left_out} of 2000 bootstrap resamples were constant and left out"
    assert left_out / 2000 == pytest.approx((7 / 8) ** 8, abs=0.04)
    # The one head that is not 0 is the highest in b too, so every correlation that exists is positive.
    assert 0.1 < found.pearson.low < found.pearson.high <= 1
    assert 0.1 < found.spearman.low < found.spearman.high <= 1


def test_resamples_that_differ_by_rounding_only_are_left_out_of_both_coefficients():
    a = np.full((2, 4), 0.3)
    a[0], a[1, 3] = 0.1 + 0.2, 1.0  # 0.1 + 0.2 is not 0.3, so it has a rank of its own
    b = np.array([[3.0, 3.1, 3.2, 3.3], [0.0, 0.1, 0.2, 9.0]])
    found = stats.correlate_heads(a, b, n_resamples=2000)
    assert found.note
    kept = np.random.default_rng(0).integers(8, size=(2000, 8))
    kept = kept[(kept == 7).any(axis=1) & (kept != 7).any(axis=1)]
    x, y = a.ravel(), b.ravel()
    expected = [scipy_stats.spearmanr(x[picked], y[picked]).statistic for picked in kept]
    assert (found.spearman.low, found.spearman.high) == pytest.approx(np.quantile(expected, (0.025, 0.975)), abs=0.03)


def test_the_interval_never_passes_one():
    a = np.random.default_rng(0).random((3, 8))
    found = stats.correlate_heads(a, 3 * a + 0.1, n_resamples=200)
    assert found.pearson.high <= 1 and found.spearman.high <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pairs_that_are_not_finite_are_dropped_and_counted(bad):
    a, b = np.random.default_rng(0).random((2, 3, 4))
    a_bad, b_bad = a.copy(), b.copy()
    a_bad[0, 1], b_bad[0, 1], b_bad[2, 3] = bad, bad, bad
    found = stats.correlate_heads(a_bad, b_bad, n_resamples=50)
    assert (found.n, found.dropped) == (10, 2)
    keep = np.isfinite(a_bad) & np.isfinite(b_bad)
    assert found.pearson.r == pytest.approx(loop_pearson(a[keep], b[keep]))
    assert found.spearman.r == pytest.approx(loop_spearman(list(a[keep]), list(b[keep])))


def test_dropped_heads_do_not_shift_the_others_into_another_layer():
    """With the layers' numbers wrong by one head, permuting would mix layers and p would be small."""
    a = np.repeat(np.arange(4.0)[:, None], 4, axis=1)
    b = a.copy()
    a[0, 0] = np.nan
    found = stats.correlate_heads(a, b, n_resamples=100)
    assert found.pearson.r == pytest.approx(1)
    assert found.pearson.p_within_layers == 1.0


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_a_constant_side_gives_nan_and_a_note(value):
    varied = np.random.default_rng(0).random((3, 4))
    constant = np.full((3, 4), value)
    for a, b, note in (
        (constant, varied, "constant input: a"),
        (varied, constant, "constant input: b"),
        (constant, constant, "constant input: a and b"),
        (constant + varied * 1e-17 * abs(value), varied, "constant input: a"),  # only rounding differs
    ):
        found = stats.correlate_heads(a, b, n_resamples=20)
        assert found.note == note and found.n == 12
        for coefficient in (found.pearson, found.spearman):
            assert all(math.isnan(v) for v in vars(coefficient).values())


def test_small_but_real_differences_are_not_called_constant():
    a = np.array([[1e-9, 2e-9, 3e-9, 5e-9]])
    assert stats.correlate_heads(a, a**2, n_resamples=20).pearson.r > 0.9


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_pairs_give_nan_and_a_note(n):
    a, b = np.full((2, 2, 3), np.nan)
    a.flat[:n] = b.flat[:n] = np.arange(n)
    found = stats.correlate_heads(a, b, n_resamples=20)
    assert (found.n, found.dropped, found.note) == (n, 6 - n, "fewer than 3 pairs")
    assert math.isnan(found.pearson.r) and math.isnan(found.spearman.p_within_layers)


@pytest.mark.parametrize("n", [3, 4, 5, 7])
def test_of_few_pairs_p_is_that_of_all_permutations(n):
    """SciPy's formula gives 0 for four pairs in the same order."""
    rng = np.random.default_rng(n)
    pairs = [(np.arange(n, dtype=float), np.arange(n) ** 2.0), tuple(rng.random((2, n)))]
    pairs.append((np.round(pairs[1][0], 1), np.repeat([0.0, 1.0], [1, n - 1])))
    for a, b in pairs:
        found = stats.correlate_heads(a[None], b[None], n_resamples=10)
        for name, x, y in (("pearson", a, b), ("spearman", scipy_stats.rankdata(a), scipy_stats.rankdata(b))):
            here = getattr(found, name)
            orders, (x_, y_) = np.array([*itertools.permutations(y)]), (v - v.mean() for v in (x, y))
            as_large = abs((orders - y.mean()) @ x_) / np.sqrt(x_ @ x_ * (y_ @ y_)) >= abs(here.r) - 1e-9
            assert here.r == pytest.approx(np.corrcoef(x, y)[0, 1])
            assert here.p == here.p_within_layers == pytest.approx(np.mean(as_large)) and here.p >= 1 / math.factorial(
                n
            )
            assert np.isnan([here.low, here.high]).all()
        assert stats.spearman(a, b) == (pytest.approx(found.spearman.r), found.spearman.p)
        assert found.note.startswith(f"{n} pairs: exact p")
    assert stats.correlate_heads(np.eye(3, 2), np.eye(3, 2), n_resamples=10).note.startswith("6 pairs"), (
        "of layers together"
    )
    more = np.arange(8.0), np.arange(8.0) ** 2
    assert stats.spearman(*more)[1] == scipy_stats.spearmanr(*more).pvalue
    assert stats.correlate_heads(*(x[None] for x in more), n_resamples=50).pearson.low > 0


def test_three_pairs_are_enough():
    found = stats.correlate_heads(HAND_A[:, 1:4], HAND_B[:, 1:4], n_resamples=500)
    assert found.pearson.r == pytest.approx(1) and found.spearman.r == pytest.approx(1)
    assert np.isnan([found.pearson.low, found.pearson.high]).all(), "no interval of three"


def test_integers_and_booleans_are_taken_as_numbers():
    a = np.array([[1, 2, 3, 4]])
    assert stats.correlate_heads(a, a > 2, n_resamples=20) == stats.correlate_heads(
        a * 1.0, (a > 2) * 1.0, n_resamples=20
    )


def test_same_seed_same_numbers_other_seed_others():
    a, b = np.random.default_rng(0).random((2, 3, 8))
    first = stats.correlate_heads(a, b, seed=1, n_resamples=200)
    other = stats.correlate_heads(a, b, seed=2, n_resamples=200)
    assert first == stats.correlate_heads(a, b, seed=1, n_resamples=200)
    assert first.pearson.r == other.pearson.r
    assert first.pearson.low != other.pearson.low and first.pearson.p_within_layers != other.pearson.p_within_layers


def test_a_layers_numbers_do_not_depend_on_the_other_layers():
    a, b = np.random.default_rng(0).random((2, 5, 8))
    a[3] = 0
    every = stats.correlate_layers(a, b, seed=4, n_resamples=100)
    assert [c.note for c in every] == ["", "", "", "constant input: a", ""]
    assert every[1:3] == stats.correlate_layers(a[1:3], b[1:3], seed=4, n_resamples=100)
    assert every[2].pearson.r == pytest.approx(loop_pearson(a[2], b[2]))


@pytest.mark.parametrize("function", [stats.correlate_heads, stats.correlate_layers])
def test_wrong_shapes_are_refused_with_both_named(function):
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        function(np.ones((3, 4)), np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        function(np.ones(4), np.ones(4))


def test_no_resamples_is_refused():
    with pytest.raises(ValueError, match="n_resamples is 0"):
        stats.correlate_heads(HAND_A, HAND_B, n_resamples=0)


def test_as_dict_has_none_for_nan():
    record = stats.correlate_heads(np.zeros((2, 4)), np.zeros((2, 4)), n_resamples=5).as_dict()
    assert record["pearson"] == record["spearman"] == dict.fromkeys(("r", "p", "low", "high", "p_within_layers"))
    assert (record["n"], record["dropped"], record["note"]) == (8, 0, "constant input: a and b")
    record = stats.correlate_heads(HAND_A, HAND_B, n_resamples=5).as_dict()
    assert record["pearson"]["r"] == pytest.approx(6 / math.sqrt(112))


def test_q_values_by_hand_with_a_missing_test():
    # Three tests: 0.01 x 3/1, 0.02 x 3/2, 0.9 x 3/3; the nan is no test.
    assert stats.q_values(np.array([0.9, np.nan, 0.01, 0.02])) == pytest.approx([0.9, np.nan, 0.03, 0.03], nan_ok=True)
    assert np.isnan(stats.q_values(np.array([np.nan, np.nan]))).all()


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_frequency_interval_is_scipys_wilson_interval_for_every_count(n):
    active = np.tril(np.ones((n + 1, n)), -1)  # row k holds k ones
    mean, low, high = stats.frequency_interval(active, axis=1)
    for k in range(n + 1):
        expected = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert mean[k] == pytest.approx(k / n)
        assert (low[k], high[k]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert low[0] == 0 and high[0] > 0 and high[n] == 1 and low[n] < 1


def test_frequency_interval_takes_any_axis_and_confidence():
    active = np.random.default_rng(0).random((3, 10, 4)) < 0.3
    found = stats.frequency_interval(active, axis=1, confidence=0.8)
    expected = scipy_stats.binomtest(int(active[2, :, 1].sum()), 10).proportion_ci(0.8, method="wilson")
    assert found.mean.shape == found.low.shape == (3, 4)
    assert (found.low[2, 1], found.high[2, 1]) == pytest.approx((expected.low, expected.high))


def test_frequency_interval_counts_what_it_is_told_to_and_knows_nothing_of_nothing():
    active = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    counted = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    found = stats.frequency_interval(active, counted=counted)
    for row, values in enumerate(([1, 0, 1], [0])):
        assert [end[row] for end in found] == list(stats.frequency_interval(np.array(values)))
    assert np.isnan([end[2] for end in found]).all()


@pytest.mark.parametrize("bad", [0.5, np.nan, 2, -1])
def test_frequency_interval_refuses_what_is_not_zero_or_one(bad):
    with pytest.raises(ValueError, match="zeros and ones"):
        stats.frequency_interval(np.array([0, 1, bad]))


def test_frequency_interval_refuses_an_empty_axis():
    with pytest.raises(ValueError, match=r"axis 1 .*\(4, 0\)"):
        stats.frequency_interval(np.ones((4, 0), dtype=bool), axis=1)


def test_paired_bootstrap_matches_a_loop_and_uses_the_pairing():
    generator = np.random.default_rng(2)
    x = 100 * generator.normal(size=60)
    y = x - 1 - 0.5 * generator.normal(size=60)
    found = stats.paired_bootstrap(x, y, np.random.default_rng(0))
    means = [(x - y)[generator.integers(60, size=60)].mean() for _ in range(10_000)]
    assert found.mean == pytest.approx(x.mean() - y.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)
    assert found.high - found.low < 0.5  # unpaired it would be about 70
    assert found == stats.paired_bootstrap(x, y, np.random.default_rng(0))


def test_paired_bootstrap_of_a_constant_difference_has_no_width():
    assert stats.paired_bootstrap(np.array([1, 2, 3]), np.array([0, 1, 2]), np.random.default_rng(0)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"\(2,\) and \(3,\)"),
        ([1.0], [2.0], "at least 2"),
        ([1.0, np.nan], [1.0, 2.0], "NaN or infinite"),
        ([np.inf, 1.0], [1.0, 2.0], "NaN or infinite"),
    ],
)
def test_paired_bootstrap_refuses_what_it_cannot_compare(x, y, message):
    with pytest.raises(ValueError, match=message):
        stats.paired_bootstrap(np.array(x), np.array(y), np.random.default_rng(0))


GIVEN = [(2, 1), (0, 3), (2, 0)]


def test_random_heads_match_the_layers_and_avoid_the_given_and_excluded():
    exclude = [(2, 5), (0, 0), (1, 1)]
    control = stats.random_heads(GIVEN, 4, 8, 30, np.random.default_rng(0), exclude)
    assert len(control.sets) == len(set(control.sets)) == 30
    assert (control.distance, control.shared) == (0, 0)
    assert control.strength == "30 random sets of the same layers; least p 0.032"
    for heads in control.sets:
        assert Counter(layer for layer, _ in heads) == {0: 1, 2: 2}
        assert not {*heads} & {*GIVEN, *exclude}
        assert list(heads) == sorted(set(heads))
        assert all(0 <= h < 8 and type(h) is int for _, h in heads)


@pytest.mark.parametrize("n_sets", [5, 12])
def test_every_allowed_set_is_equally_likely(n_sets):
    """5 of the 12 possible sets are drawn at random, 12 go through the listing: each set must be as frequent as any other."""
    generator = np.random.default_rng(0)
    count = Counter()
    for _ in range(600):
        count.update(stats.random_heads([(0, 0), (1, 0), (1, 1)], 2, 5, n_sets, generator).sets)
    # Layer 0: 4 others; layer 1: 3 pairs of 3 others.
    assert len(count) == 12
    assert scipy_stats.chisquare(list(count.values())).pvalue > 0.001


def test_what_a_layer_lacks_comes_from_the_nearest_layers():
    """Layer 3 of 18 has one head left for three: each set holds it, and two heads of layers 2 and 4."""
    control = stats.random_heads([(3, 0), (3, 1), (3, 2)], 18, 4, 20, np.random.default_rng(0))
    assert len(set(control.sets)) == 20 and control.shared == 0
    for heads in control.sets:
        assert (3, 3) in heads and all(abs(layer - 3) <= 1 for layer, _ in heads)
    assert control.distance == pytest.approx(2 / 3) and "0.7 layers away on average" in control.strength


def test_a_model_without_other_heads_lends_the_given_ones_but_never_the_same_set():
    given = [(layer, head) for layer in range(3) for head in range(3)]
    control = stats.random_heads(given, 3, 4, 10, np.random.default_rng(0))
    assert len(control.sets) == 10 and tuple(given) not in control.sets
    assert control.shared == pytest.approx(np.mean([head in given for heads in control.sets for head in heads]))
    assert "of whose heads are among those tested" in control.strength
    everything = [(layer, head) for layer in range(2) for head in range(2)]
    control = stats.random_heads(everything, 2, 2, 5, np.random.default_rng(0))
    assert not control.sets and control.strength == "no control: the model has no other heads"


def test_there_are_fewer_sets_only_where_the_model_has_no_more():
    assert stats.random_heads([(0, 0)], 1, 2, 3, np.random.default_rng(0)).sets == [((0, 1),)]


def test_random_heads_repeat_with_the_seed():
    draws = [stats.random_heads(GIVEN, 4, 8, 9, np.random.default_rng(s)).sets for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_rankings_of_the_only_other_heads_of_a_layer_begin_with_each_of_them() -> None:
    """Else a set of few heads would have no more controls than the largest one, which here has a single one."""
    ranked = [(0, head) for head in (3, 0, 5, 6)]
    rankings = stats.random_rankings(ranked, 4, 1, 8, 20, np.random.default_rng(0))
    assert len(rankings) == 20 and {frozenset(ranking) for ranking in rankings} == {
        frozenset({(0, 1), (0, 2), (0, 4), (0, 7)})
    }
    assert [len(stats.first_of(rankings, ranked, n).sets) for n in (1, 2, 3, 4)] == [4, 6, 4, 1]


def test_every_prefix_of_a_random_ranking_matches_that_of_the_ranked_heads():
    ranked = ((3, 0), (1, 2), (3, 5), (0, 1), (2, 2))
    rankings = stats.random_rankings(ranked, 4, 4, 8, 20, np.random.default_rng(0))
    assert len(rankings) == 20
    for ranking in rankings:
        assert [layer for layer, _ in ranking] == [3, 1, 3, 0] and not {*ranking} & {*ranked}
    control = stats.first_of(rankings, ranked, 1)
    assert control.heads == ((3, 0),) and len(set(control.sets)) == len(control.sets) <= 6


def test_a_random_ranking_takes_the_nearest_layer_where_one_has_too_few_heads():
    ranked = ((2, 0), (2, 1), (1, 0))
    rankings = stats.random_rankings(ranked, 3, 4, 3, 5, np.random.default_rng(0))
    for ranking in rankings:
        assert sorted(abs(a - b) for (a, _), (b, _) in zip(ranked, ranking, strict=True)) == [0, 0, 1]


@pytest.mark.parametrize(
    ("heads", "exclude", "message"),
    [
        ([(2, 0)], [], r"head 2\.0 is outside a model of 2 layers with 4 heads"),
        ([(0, 4)], [], r"head 0\.4 is outside"),
        ([(0, -1)], [], r"head 0\.-1 is outside"),
        ([(0, 1)], [(5, 0)], r"head 5\.0 is outside"),
        ([], [], "at least one"),
        ([(0, 1), (0, 1)], [], "each named once"),
    ],
)
def test_random_heads_that_cannot_be_drawn_are_refused(heads, exclude, message):
    with pytest.raises(ValueError, match=message):
        stats.random_heads(heads, 2, 4, 3, np.random.default_rng(0), exclude)


def test_head_overlap_is_that_of_all_random_sets_counted_one_by_one() -> None:
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    a = heads[:3]
    for b in ([heads[1], heads[2], heads[7]], heads[5:7], heads[:3], []):
        drawn = [set(some) for some in itertools.combinations(heads, len(b))]
        shared = [len(set(a) & some) for some in drawn]
        found = stats.head_overlap(a, b, len(heads))
        assert found.shared == len(set(a) & set(b))
        assert found.jaccard == pytest.approx(found.shared / len(set(a) | set(b)))
        assert found.chance == pytest.approx(np.mean([n / (len(a) + len(b) - n) for n in shared]))
        assert found.p == pytest.approx(np.mean([n >= found.shared for n in shared]))
    nothing = stats.head_overlap([], [], 8)
    assert nothing.shared == 0 and math.isnan(nothing.jaccard) and nothing.p == 1


# -- predictions, and strata -------------------------------------------------------------------------------------------


def test_r_squared_of_a_case_worked_by_hand() -> None:
    y = np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]])
    assert stats.r_squared(y, y) == 1 and stats.r_squared(y, np.broadcast_to(y.mean(0), y.shape)) == 0
    # About the means 3 and 2: 4 + 0 + 4 and 4 + 4 + 16 are 32 in all. Missed: 1 and 4.
    off = y + np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    both = np.stack([off, y])
    np.testing.assert_allclose(stats.r_squared(y, both), [1 - 5 / 32, 1])
    # The second item twice, the first not; about the same means: 0 and 4 twice, 4 and 16.
    found = stats.r_squared(y, both, np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
    there = 2 * 4 + 4 + 16
    np.testing.assert_allclose(found, np.array([[1 - 8 / there, 1 - 5 / 32], [1.0, 1.0]]))
    assert np.isnan(stats.r_squared(np.full((3, 1), 0.1), y[:, :1]))


@pytest.mark.parametrize("n", [6, 12, 40])
def test_r_squared_lies_in_the_middle_of_its_resamples(n: int) -> None:
    """Of predictions near the mean, which tell nothing: about half of the resamples score more, whatever the number of items."""
    for seed in range(20):
        draw = rng(seed, "values")
        y = draw.normal(size=(n, 1))
        predicted = y.mean(0) + 0.3 * draw.normal(size=(n, 1))
        value = stats.r_squared(y, predicted)
        resampled = stats.r_squared(y, predicted, stats.cluster_shares(np.arange(n), rng(seed, "shares"), 500))
        low, high = np.quantile(resampled, (0.025, 0.975))
        assert low <= value <= high and 0.3 < (resampled > value).mean() < 0.7


def test_cluster_shares_take_whole_groups() -> None:
    groups = np.array([4, 7, 4, 9, 7, 4])
    shares = stats.cluster_shares(groups, rng(0, "shares"), 500)
    assert shares.shape == (500, 6)
    assert (shares[:, groups == 4] == shares[:, :1]).all() and (shares[:, groups == 7] == shares[:, 1:2]).all()
    assert (shares[:, 0] + shares[:, 1] + shares[:, 3] == 3).all()
    assert shares[:, 3].mean() == pytest.approx(1, abs=0.1) and set(shares[:, 3]) == {0, 1, 2, 3}


def test_the_strata_test_is_that_of_all_permutations() -> None:
    values, strata = np.array([1.0, 0.0, 3.0, 1.0, 0.0, 2.0]), ["a", "a", "b", "b", "b", "c"]

    def distances(x: np.ndarray) -> list[float]:
        means = [x[:2].mean(), x[2:5].mean(), x[5:].mean()]
        each = [abs(mean - x.mean()) for mean in means]
        return [*each, sum(n * distance**2 for n, distance in zip((2, 3, 1), each, strict=True))]

    observed = distances(values)
    every = np.array([distances(np.array(order)) for order in itertools.permutations(values)])
    exact = (every >= np.array(observed) - 1e-12).mean(0)
    found = stats.strata_test(values, strata, rng(0, "strata"), 20_000)
    assert list(found.each) == ["a", "b", "c"]
    np.testing.assert_allclose(np.array([*found.each.values(), found.p]), exact, atol=0.015)


def test_strata_that_differ_are_told_from_those_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    strata = ["low"] * 60 + ["high"] * 60
    other = (generator.random(120) < np.repeat([0.9, 0.3], 60)).astype(float)
    found = stats.strata_test(other, strata, rng(0, "strata"), 999)
    assert found.p == found.each["low"] == found.each["high"] == 0.001
    alike = [stats.strata_test((generator.random(120) < 0.5), strata, rng(n, "strata"), 199).p for n in range(60)]
    assert 0.3 < np.mean(alike) < 0.75 and np.mean(np.array(alike) <= 0.05) < 0.15
    assert stats.strata_test(other, ["all"] * 120, rng(0, "strata"), 99).p == 1
    monkeypatch.setattr(intervals, "AT_ONCE", 240)  # in many small blocks
    assert stats.strata_test(other, strata, rng(0, "strata"), 99).p == 0.01


def test_a_standard_error_is_that_of_a_sample() -> None:
    values = rng(0, "standard error").normal(size=(5, 2))
    np.testing.assert_allclose(intervals.standard_error(values), scipy_stats.sem(values))


def test_a_ratio_of_means_has_an_interval_over_the_resamples_that_define_it():
    below = np.array([0.0, 0.0, 0.0, 2.0])
    mean, low, high = intervals.ratio_of_means(np.array([[0.0, 0.0, 0.0, 1.0]]), below, rng(0, "ratio"))
    assert (mean, low, high) == (0.5, 0.5, 0.5)  # in a third of the resamples the mean below is 0
    undefined = intervals.ratio_of_means(np.ones((1, 4)), np.zeros(4), rng(0, "ratio"))
    assert all(np.isnan(value) for value in undefined)
