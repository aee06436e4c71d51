"""Metrics against float64 NumPy, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvene_ext.engine import metrics
from pyvene_ext.prompts.sets import TokenizedPrompts

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_logits(seed: int = 0, batch: int = 5, vocab: int = 101, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (6 * torch.randn(batch, vocab, generator=generator)).to(dtype)


def random_answers(seed: int = 0, batch: int = 5, vocab: int = 101) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (batch, 2)))


def softmax(row: Tensor) -> np.ndarray:
    values = np.array(row.tolist(), dtype=np.float64)
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def slow_rank(row: Tensor, io: int) -> float:
    return 1 + sum(1 for value in row.tolist() if value > row[io].item())


SLOW: dict[str, Callable[[Tensor, int, int], float]] = {
    "logit": lambda row, io, s: row[io].item(),
    "logit_diff": lambda row, io, s: row[io].item() - row[s].item(),
    "probability": lambda row, io, s: float(softmax(row)[io]),
    "rank": lambda row, io, s: slow_rank(row, io),
    "accuracy": lambda row, io, s: float(row.argmax() == io and row.tolist().count(row[io].item()) == 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SLOW)
def test_a_metric_equals_its_slow_version_in_float32_whatever_the_dtype(name: str, dtype: torch.dtype) -> None:
    logits, answers = random_logits(dtype=dtype), random_answers()
    answers[0, 0] = logits[0].argmax()
    value = getattr(metrics, name)(logits, answers)
    assert value.dtype == torch.float32 and value.shape == (5,)
    slow = [SLOW[name](row, io, s) for row, (io, s) in zip(logits, answers.tolist(), strict=True)]
    np.testing.assert_allclose(value.numpy(), slow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_equals_its_slow_version_and_has_a_direction(dtype: torch.dtype) -> None:
    clean, other = random_logits(0, dtype=dtype), random_logits(1, dtype=dtype)
    value = metrics.kl(clean, other)
    p, q = np.array([softmax(row) for row in clean]), np.array([softmax(row) for row in other])
    np.testing.assert_allclose(value.numpy(), (p * np.log(p / q)).sum(1), rtol=1e-5)
    assert value.dtype == torch.float32 and value.shape == (5,)
    assert not torch.allclose(value, metrics.kl(other, clean))
    assert metrics.kl(clean, clean).tolist() == [0.0] * 5


def test_kl_resolves_the_effect_of_a_weak_head() -> None:
    clean = 20 + random_logits(vocab=50_000).double()
    nudge = 1e-5 * random_logits(1, vocab=50_000).double()
    p = softmax(clean[0])
    # To second order, KL is half the variance of the change under p.
    expected = 0.5 * (p * (nudge[0].numpy() - (p * nudge[0].numpy()).sum()) ** 2).sum()
    value = metrics.kl(clean, clean + nudge)
    assert expected < 1e-8
    assert value[0].item() == pytest.approx(expected, rel=1e-3)


def test_tied_logits_share_the_better_rank_and_are_no_success() -> None:
    logits = torch.tensor([[3.0, 3.0, 1.0, 1.0, 0.0]] * 3)
    answers = torch.tensor([[0, 1], [2, 3], [4, 0]])
    assert metrics.rank(logits, answers).tolist() == [1, 3, 5]
    assert metrics.accuracy(logits, answers).tolist() == [0, 0, 0]
    assert metrics.accuracy(logits, answers, among="pair").tolist() == [0, 0, 0]


def test_accuracy_asks_the_vocabulary_or_the_pair() -> None:
    logits = torch.tensor([[1.0, 0.0, 5.0], [9.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    answers = torch.tensor([[0, 1]] * 3)
    assert metrics.accuracy(logits, answers).tolist() == [0, 1, 0]
    assert metrics.accuracy(logits, answers, among="pair").tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="among must be 'vocab' or 'pair', not 'all'"):
        metrics.accuracy(logits, answers, among="all")


def test_a_prior_for_one_name_leaves_the_paired_logit_difference_alone() -> None:
    x_a, x_b = random_logits(0), random_logits(1)
    a_b = random_answers()
    prior = torch.zeros(5, 101).scatter_(1, a_b[:, :1], 7.0)
    by_hand = [((x_a[i, a] - x_a[i, b]) + (x_b[i, b] - x_b[i, a])).item() / 2 for i, (a, b) in enumerate(a_b.tolist())]
    for shift in (0, prior):
        ld_a = metrics.logit_diff(x_a + shift, a_b)
        ld_b = metrics.logit_diff(x_b + shift, a_b.flip(1))
        np.testing.assert_allclose(metrics.paired_logit_diff(ld_a, ld_b), by_hand, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"equal shapes, not \(5,\) and \(4,\)"):
        metrics.paired_logit_diff(ld_a, ld_b[:4])


TOKENIZED = TokenizedPrompts(
    input_ids=((5, 6, 7, 8), (5,), (5, 6)),
    answer_ids=((1, 2), (3, 4), (5, 6)),
    positions=({"end": -1}, {"end": -1}, {"end": -1}),
    pad_id=0,
)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_last_logits_are_read_at_each_last_real_token(padding_side: str) -> None:
    batch = next(TOKENIZED.batches(3, padding_side))
    logits = random_logits(batch=12, vocab=9).reshape(3, 4, 9)
    chosen = metrics.last_logits(logits, batch)
    assert torch.equal(chosen, metrics.last_logits(logits[:, -batch.logits_to_keep :], batch))
    for row, mask in enumerate(batch.attention_mask.tolist()):
        column = max(column for column, real in enumerate(mask) if real)
        assert torch.equal(chosen[row], logits[row, column])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_by_prompt(bad: float) -> None:
    batch = next(TOKENIZED.batches(3))
    logits = random_logits(batch=12, vocab=9).reshape(3, 4, 9)
    logits[0, 0, 0] = bad  # padding: nobody reads it
    assert metrics.last_logits(logits, batch).isfinite().all()
    logits[0, -1, 3] = bad
    logits[2, -1, 0] = bad
    with pytest.raises(ValueError, match="the logits of prompts 1, 0 are not finite"):
        metrics.last_logits(logits, batch)


@pytest.mark.parametrize("name", SLOW)
def test_metrics_refuse_what_they_cannot_measure(name: str) -> None:
    metric, logits, answers = getattr(metrics, name), random_logits(), random_answers()
    for wrong in (answers[:4], answers[:, :1], answers[0]):
        with pytest.raises(ValueError, match=r"expected logits \[batch vocab\] and answer_ids \[batch 2\], not"):
            metric(logits, wrong)
    with pytest.raises(ValueError, match=r"not \(1, 5, 101\)"):
        metric(logits[None], answers)
    for outside in (101, -1):
        answers[2, 1] = outside
        with pytest.raises(ValueError, match=rf"{outside}.* but the vocabulary has 101 tokens"):
            metric(logits, answers)
    logits[3, 0] = torch.nan
    with pytest.raises(ValueError, match="the logits of rows 3 are not finite; use dtype float32 or bfloat16"):
        metric(logits, random_answers())


def test_kl_and_last_logits_refuse_what_does_not_fit() -> None:
    clean, other = random_logits(0), random_logits(1)
    with pytest.raises(ValueError, match=r"one shape, not \(5, 101\) and \(4, 101\)"):
        metrics.kl(clean, other[:4])
    with pytest.raises(ValueError, match=r"one shape, not \(101,\) and \(101,\)"):
        metrics.kl(clean[0], other[0])
    other[1, 4] = torch.inf
    with pytest.raises(ValueError, match="the logits of rows 1 are not finite"):
        metrics.kl(clean, other)
    with pytest.raises(ValueError, match="the logits of clean rows 1 are not finite"):
        metrics.kl(other, clean)
    for padding_side, kept in (("left", 2), ("right", 1)):
        with pytest.raises(ValueError, match=rf"\(3, {kept}, 9\) do not belong to a batch of shape \(3, 4\)"):
            metrics.last_logits(torch.zeros(3, kept, 9), next(TOKENIZED.batches(3, padding_side)))
