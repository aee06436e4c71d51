"""Prompts, curves, lag-CRP and sets of heads of the lag study, against sums written out and counted by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from pyvene_ext.methods.heads.lag import (
    LagCurves,
    RankedHeads,
    ablate_attention,
    curves_of,
    lag_crp,
    lag_prompts,
    lags_of,
    layers_of,
    plus_one,
    plus_one_bias,
    plus_one_first,
    rank_heads,
    recalled,
)
from pyvene_ext.methods.heads.lag_tables import lag_summary, lag_task
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.joint import members

POOL = np.arange(100, 160)


@pytest.mark.parametrize("n", [12, 13, 40])
def test_a_prompt_is_a_permutation_of_the_same_tokens_and_its_middle_one_again(n: int) -> None:
    prompts = lag_prompts(POOL, n, 7, 42)
    lists = [ids[:-1] for ids in prompts.input_ids]
    chosen = set(lists[0])
    assert len(lists) == 7 and len(chosen) == n and chosen <= set(POOL.tolist())
    assert all(set(ids) == chosen and len(ids) == n for ids in lists)
    assert len(set(lists)) == 7
    for ids, (after, cue) in zip(prompts.input_ids, prompts.answer_ids, strict=True):
        assert len(ids) == n + 1 and ids[-1] == ids[n // 2] == cue and ids[n // 2 + 1] == after
    lags = lags_of(n)
    assert len(lags) == n and lags[n // 2] == 0 and lags[0] == -(n // 2)


def test_tokens_and_permutations_are_numpys_with_the_seed() -> None:
    found = lag_prompts(np.array([5, 9, 9, *range(20, 40)]), 14, 3, 42)
    rng = np.random.default_rng(42)
    chosen = rng.choice(np.array([5, 9, *range(20, 40)]), 14, replace=False)
    for ids in found.input_ids:
        assert list(ids[:-1]) == rng.permutation(chosen).tolist()


def test_more_permutations_begin_with_the_same_ones_and_another_seed_gives_others() -> None:
    few, many, other = (lag_prompts(POOL, 20, n, seed) for n, seed in ((3, 42), (5, 42), (3, 43)))
    assert many.input_ids[:3] == few.input_ids and not set(few.input_ids) & set(other.input_ids)


def test_lists_that_are_too_short_and_pools_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens has no lags beyond 5 on both sides; take at least 12"):
        lag_prompts(POOL, 11, 3, 42)
    with pytest.raises(ValueError, match="60 distinct tokens are usable but 61 are wanted"):
        lag_prompts(np.concatenate([POOL, POOL]), 61, 3, 42)


def test_the_cue_at_the_end_is_dropped_and_the_numbers_are_read_at_their_lags() -> None:
    probabilities = np.random.default_rng(0).random((3, 4, 15)).astype(np.float32)
    curves = curves_of(probabilities)
    assert curves.shape == (3, 4, 14) and curves.dtype == np.float64
    far = [index for index in range(14) if abs(index - 7) > 5]
    assert far == [0, 1, 13]
    for i, j in np.ndindex(3, 4):
        row = [float(x) for x in probabilities[i, j, :14]]
        assert plus_one(curves)[i, j] == row[8]
        assert plus_one_bias(curves)[i, j] == pytest.approx(row[8] - sum(row[k] for k in far) / 3)
        assert recalled(curves)[i, j] == pytest.approx(sum(row) - row[7])


def test_a_start_token_comes_first_and_is_no_part_of_the_list() -> None:
    plain, with_bos = lag_prompts(POOL, 12, 3, 42), lag_prompts(POOL, 12, 3, 42, (7,))
    assert [(7, *ids) for ids in plain.input_ids] == list(with_bos.input_ids)
    assert plain.answer_ids == with_bos.answer_ids
    probabilities = np.random.default_rng(0).random((3, 14)).astype(np.float32)
    np.testing.assert_array_equal(curves_of(probabilities, 1), probabilities[:, 1:13].astype(np.float64))


def test_lag_1_comes_first_if_no_other_token_of_the_list_is_likelier() -> None:
    curves = np.array([[0.1, 0.1, 0.9, 0.2], [0.3, 0.1, 0.9, 0.2], [0.1, 0.0, 0.0, 0.2]])
    assert plus_one_first(curves).tolist() == [True, False, True]


def summary_of(own: np.ndarray, clean: np.ndarray, random: list[np.ndarray]) -> dict[str, Any]:
    heads = RankedHeads(((0, 0),), [((0, 1),), ((0, 2),)], {})
    return lag_summary(LagCurves(1, own, np.array(random)), clean, heads, "induction", 0)


def test_the_summary_says_which_measure_carries_the_effect() -> None:
    clean = np.full((20, 12), 1e-6)
    clean[:, 7] = 1e-4 * (1 + np.random.default_rng(3).random(20))
    gone = clean.copy()
    gone[:, 7] = 1e-6
    row = summary_of(gone, clean, [clean, 0.9 * clean])
    assert row["carried by"] == "p(+1) and lag-CRP(+1)"
    assert row["crp change"] == pytest.approx(lag_crp(gone)[7] - lag_crp(clean)[7])
    assert row["crp share as low"] == row["share as low"] == pytest.approx(1 / 3)
    # All of the list falls alike: lag-CRP is what it was. As much with random heads: neither.
    assert summary_of(0.01 * clean, clean, [clean, clean])["carried by"] == "p(+1)"
    assert summary_of(gone, clean, [clean, gone])["carried by"] == "neither"
    # With random heads p(+1) falls below that of far lags (of 12 tokens, -6), but it keeps more of the list.
    below = np.zeros_like(clean)
    below[:, 0], below[:, 7] = 2e-5, 1e-5
    assert summary_of(gone, clean, [below, below])["carried by"] == "lag-CRP(+1)"


def test_what_the_untouched_model_does_is_said_with_what_makes_it() -> None:
    noise = np.random.default_rng(4).random((16, 12)) * 1e-3
    assert lag_task(noise, 0)[0].startswith("THE MODEL DOES NOT DO THE TASK")
    one = noise.copy()
    one[5, 7] = 0.5
    assert "one permutation of 16 makes 98% of p(+1)" in lag_task(one, 0)[-1]
    does = noise.copy()
    does[:, 7] = 0.3
    (said,) = lag_task(does, 0)
    assert "likeliest token in 16 of 16 permutations (1.5 by chance)" in said and "makes" not in said


def test_lag_crp_is_that_of_recalls_counted() -> None:
    """With probabilities of 0 and 1 it is Kahana's count: transitions made by transitions possible, intrusions left out."""
    rng = np.random.default_rng(1)
    curves = np.zeros((200, 12))
    goes_on = rng.integers(-6, 8, 200)  # lags -6 to 5; 6 and 7 stand for tokens that are not in the list
    goes_on[goes_on == 0] = 1
    for row, lag in enumerate(goes_on):
        if lag < 6:
            curves[row, lag + 6] = 1
    made, possible = Counter(lag for lag in goes_on.tolist() if lag < 6), int((goes_on < 6).sum())
    crp = lag_crp(curves)
    for lag in range(-6, 6):
        assert np.isnan(crp[6]) if lag == 0 else crp[lag + 6] == pytest.approx(made[lag] / possible)


def test_what_is_given_to_the_cue_itself_does_not_count_in_lag_crp() -> None:
    curves = np.random.default_rng(2).random((5, 12))
    more = curves.copy()
    more[:, 6] += 3
    np.testing.assert_array_equal(lag_crp(curves), lag_crp(more))
    assert np.nansum(lag_crp(curves)) == pytest.approx(1)


@pytest.mark.parametrize(("n", "top"), [(6, [0, 1, 2]), (5, [0, 1, 2]), (1, [0]), (32, list(range(16)))])
def test_top_is_below_half_of_the_layers_and_bottom_the_rest(n: int, top: list[int]) -> None:
    assert list(layers_of("top", n)) == top == [layer for layer in range(n) if layer < n / 2]
    assert [*layers_of("top", n), *layers_of("bottom", n)] == list(layers_of("full", n)) == list(range(n))


SCORES = [(0.9, 3, 1), (0.8, 0, 2), (0.7, 3, 0), (0.6, 2, 4), (0.5, 1, 1), (0.4, 3, 5), (0.3, 0, 0)]


def test_heads_are_ranked_within_their_layers() -> None:
    assert rank_heads(SCORES, "full", 4, 3) == ((3, 1), (0, 2), (3, 0))
    assert rank_heads(SCORES, "top", 4, 3) == ((0, 2), (1, 1), (0, 0))
    assert rank_heads(SCORES, "bottom", 4, 2) == ((3, 1), (3, 0))
    with pytest.raises(ValueError, match=r"4 heads are asked for but there are scores for 3 in layers 0 to 1 \(top\)"):
        rank_heads(SCORES, "top", 4, 4)


def test_heads_are_ablated_together_by_their_scores() -> None:
    spec = ablate_attention([(2, 1), (0, 3), (2, 0)], "mean")
    assert members(spec) == (
        Ablation(kind="mean", site="scores", layer=0, heads=(3,)),
        Ablation(kind="mean", site="scores", layer=2, heads=(0, 1)),
    )
    assert spec == ablate_attention([(0, 3), (2, 0), (2, 1)], "mean")
