"""Scores of translation heads: the difference from the control, with its interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pyvene_ext.runs.translation import Scores


@pytest.mark.parametrize("n_control", [9, 6])
def test_the_difference_from_the_control_is_paired_only_if_every_sentence_has_one(n_control: int) -> None:
    """Neighbours with one translation have no control; then the two means are independent."""
    draw = np.random.default_rng(0)
    translation, control = draw.normal(0.2, 0.1, (9, 2, 3)), draw.normal(0.1, 0.3, (n_control, 2, 3))
    found = Scores(translation, control, np.zeros((2, 3)), 0.05, []).difference
    for head in np.ndindex(2, 3):
        a, b = translation[:, *head], control[:, *head]
        if n_control == 9:
            interval = stats.ttest_rel(a, b).confidence_interval()
            half = (interval.high - interval.low) / 2
        else:
            half = np.hypot(*(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 for x in (a, b)))
        mean = a.mean() - b.mean()
        assert (found.mean[head], found.low[head], found.high[head]) == pytest.approx((mean, mean - half, mean + half))


def test_the_difference_and_its_interval_are_of_the_same_sentences() -> None:
    """One sentence is skipped in the translations and another in the controls."""
    draw = np.random.default_rng(0)
    translation, control = draw.normal(0.2, 0.1, (9, 2, 3)), draw.normal(0.1, 0.3, (9, 2, 3))
    translation[2], control[5] = np.nan, np.nan
    found = Scores(translation, control, np.zeros((2, 3)), 0.05, [])
    both = [0, 1, 3, 4, 6, 7, 8]
    for head in np.ndindex(2, 3):
        a, b = translation[both, *head], control[both, *head]
        interval = stats.ttest_rel(a, b).confidence_interval()
        assert (found.difference.low[head], found.difference.high[head]) == pytest.approx((interval.low, interval.high))
        assert found.difference.mean[head] == pytest.approx(a.mean() - b.mean())
        assert [means[head] for means in found.means] == pytest.approx([a.mean(), b.mean()])
    # Where some sentences have no control, each mean is of all that were scored.
    alone = Scores(translation, control[:6], np.zeros((2, 3)), 0.05, [])
    assert alone.means[0] == pytest.approx(np.nanmean(translation, 0))
