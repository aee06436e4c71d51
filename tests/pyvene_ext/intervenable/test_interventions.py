from __future__ import annotations

import torch

from pyvene_ext.intervenable.interventions import (
    MaskScoresIntervention,
    NormMatchedIntervention,
    UniformScoresIntervention,
)

NOTHING = -torch.inf


def test_norm_matched_noise_keeps_each_vectors_norm_and_takes_the_sources_direction() -> None:
    base, source = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    out = NormMatchedIntervention()(base, source)
    torch.testing.assert_close(out.norm(dim=-1), base.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(out, source, dim=-1), torch.ones(2, 3, 4))


def test_norm_matched_noise_keeps_the_models_dtype_and_makes_no_nan_of_zeros() -> None:
    base = torch.full((1, 2, 300), 300.0, dtype=torch.float16)  # the sum of squares would overflow in float16
    out = NormMatchedIntervention()(base, torch.ones(1, 2, 300))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, base)
    assert NormMatchedIntervention()(base, torch.zeros(1, 2, 300)).eq(0).all()


def test_masked_scores_are_all_minus_infinity() -> None:
    assert MaskScoresIntervention()(torch.randn(1, 2, 3, 3)).eq(NOTHING).all()


def test_uniform_scores_are_the_mean_of_what_a_query_may_see() -> None:
    scores = torch.tensor([[[[1.0, NOTHING, NOTHING], [2.0, 4.0, NOTHING], [NOTHING, 0.0, -6.0], [NOTHING] * 3]]])
    expected = torch.tensor([[[[1.0, NOTHING, NOTHING], [3.0, 3.0, NOTHING], [NOTHING, -3.0, -3.0], [NOTHING] * 3]]])
    torch.testing.assert_close(UniformScoresIntervention()(scores), expected)
