"""Metrics against float64 NumPy, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pyvene_ext.engine import metrics
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, answer_pairs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INDEX = [7, 3, 9, 1, 4]


def random_logits(seed: int = 0, batch: int = 5, vocab: int = 101, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (6 * torch.randn(batch, vocab, generator=generator)).to(dtype)


def batch_of(right: list[list[int]], wrong: list[list[int]], clean: Tensor | None = None) -> Batch:
    """Prompts of one token with these answers."""
    ids = torch.ones(len(right), 1, dtype=torch.long)
    return Batch(
        input_ids=ids,
        attention_mask=ids,
        position_ids=ids - 1,
        right_ids=torch.tensor(right),
        wrong_ids=torch.tensor(wrong),
        positions={},
        index=INDEX[: len(right)],
        lengths=[1] * len(right),
        padding_side="left",
        clean_logits=clean,
    )


# One answer each, and up to three.
PAIRS = batch_of([[5], [0], [17], [100], [64]], [[3], [1], [18], [0], [65]])
SEVERAL = batch_of(
    [[5, 7, -1], [0, -1, -1], [17, 18, 19], [100, 2, -1], [-1, 64, -1]],
    [[3, -1], [1, 2], [20, 21], [0, 1], [65, -1]],
)


def softmax(row: Tensor) -> np.ndarray:
    values = np.array(row.tolist(), dtype=np.float64)
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


SLOW: dict[str, Callable[[Tensor, list[int], list[int]], float]] = {
    "logit": lambda row, right, wrong: log_sum(row, right),
    "logit_diff": lambda row, right, wrong: log_sum(row, right) - log_sum(row, wrong),
    "probability": lambda row, right, wrong: sum(float(softmax(row)[token]) for token in right),
    "rank": lambda row, right, wrong: min(1 + sum(value > row[token] for value in row).item() for token in right),
    "accuracy": lambda row, right, wrong: float(all(i in right for i, x in enumerate(row.tolist()) if x == row.max())),
}


def log_sum(row: Tensor, tokens: list[int]) -> float:
    values = np.array([row[token].item() for token in tokens])
    return float(values[0]) if len(tokens) == 1 else float(np.log(np.exp(values).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prompts", [PAIRS, SEVERAL], ids=["one answer each", "several"])
@pytest.mark.parametrize("name", SLOW)
def test_a_metric_equals_its_slow_version_in_float32_whatever_the_dtype(
    name: str, prompts: Batch, dtype: torch.dtype
) -> None:
    logits = random_logits(dtype=dtype)
    logits[0, 5] = logits[0].max() + 1  # one right answer is the top
    value = getattr(metrics, name)(logits, prompts)
    assert value.dtype == torch.float32 and value.shape == (5,)
    slow = [
        SLOW[name](row, *([token for token in ids if token >= 0] for ids in answers))
        for row, *answers in zip(logits, prompts.right_ids.tolist(), prompts.wrong_ids.tolist(), strict=True)
    ]
    np.testing.assert_allclose(value.numpy(), slow, rtol=1e-5, atol=1e-6)


def test_the_logit_difference_of_two_answers_is_exactly_that() -> None:
    logits = random_logits()
    right, wrong = PAIRS.right_ids[:, 0], PAIRS.wrong_ids[:, 0]
    rows = torch.arange(5)
    assert torch.equal(metrics.logit_diff(logits, PAIRS), logits[rows, right] - logits[rows, wrong])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_equals_its_slow_version_and_has_a_direction(dtype: torch.dtype) -> None:
    clean, other = random_logits(0, dtype=dtype), random_logits(1, dtype=dtype)
    value = kl(clean, other)
    p, q = np.array([softmax(row) for row in clean]), np.array([softmax(row) for row in other])
    np.testing.assert_allclose(value.numpy(), (p * np.log(p / q)).sum(1), rtol=1e-5)
    assert value.dtype == torch.float32 and value.shape == (5,)
    assert not torch.allclose(value, kl(other, clean))
    assert kl(clean, clean).tolist() == [0.0] * 5


def kl(clean: Tensor, logits: Tensor) -> Tensor:
    return metrics.kl(logits, replace(PAIRS, clean_logits=clean))


def test_kl_resolves_the_effect_of_a_weak_head() -> None:
    clean = 20 + random_logits(vocab=50_000).double()
    nudge = 1e-5 * random_logits(1, vocab=50_000).double()
    p = softmax(clean[0])
    # To second order, KL is half the variance of the change under p.
    expected = 0.5 * (p * (nudge[0].numpy() - (p * nudge[0].numpy()).sum()) ** 2).sum()
    value = kl(clean, clean + nudge)
    assert expected < 1e-8
    assert value[0].item() == pytest.approx(expected, rel=1e-3)


def test_tied_logits_share_the_better_rank_and_are_no_success() -> None:
    logits = torch.tensor([[3.0, 3.0, 1.0, 1.0, 0.0]] * 4)
    prompts = batch_of([[0, -1], [2, -1], [4, -1], [1, 0]], [[1], [3], [0], [2]])
    assert metrics.rank(logits, prompts).tolist() == [1, 3, 5, 1]
    assert metrics.accuracy(logits, prompts).tolist() == [0, 0, 0, 1]  # in the last both of the tied tokens are right
    assert metrics.accuracy(logits, prompts, among="pair").tolist() == [0, 0, 0, 1]


def test_accuracy_asks_the_vocabulary_or_the_pair() -> None:
    logits = torch.tensor([[1.0, 0.0, 5.0], [9.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    prompts = batch_of([[0]] * 3, [[1]] * 3)
    assert metrics.accuracy(logits, prompts).tolist() == [0, 1, 0]
    assert metrics.accuracy(logits, prompts, among="pair").tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="among must be 'vocab' or 'pair', not 'all'"):
        metrics.accuracy(logits, prompts, among="all")


def test_a_prior_for_one_name_leaves_the_paired_logit_difference_alone() -> None:
    x_a, x_b = random_logits(0), random_logits(1)
    swapped = replace(PAIRS, right_ids=PAIRS.wrong_ids, wrong_ids=PAIRS.right_ids)
    prior = torch.zeros(5, 101).scatter_(1, PAIRS.right_ids, 7.0)
    pairs = torch.cat([PAIRS.right_ids, PAIRS.wrong_ids], 1).tolist()
    by_hand = [((x_a[i, a] - x_a[i, b]) + (x_b[i, b] - x_b[i, a])).item() / 2 for i, (a, b) in enumerate(pairs)]
    for shift in (0, prior):
        ld_a = metrics.logit_diff(x_a + shift, PAIRS)
        ld_b = metrics.logit_diff(x_b + shift, swapped)
        np.testing.assert_allclose(metrics.paired_logit_diff(ld_a, ld_b), by_hand, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"equal shapes, not \(5,\) and \(4,\)"):
        metrics.paired_logit_diff(ld_a, ld_b[:4])


TOKENIZED = TokenizedPrompts(
    input_ids=((5, 6, 7, 8), (5,), (5, 6)),
    answers=answer_pairs(((1, 2), (3, 4), (5, 6))),
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
    metric, logits = getattr(metrics, name), random_logits()
    for wrong in (logits[:4], logits[None], logits[0]):
        with pytest.raises(
            ValueError, match=r"do not belong to a batch of shape \(5, 1\); give those of the last token"
        ):
            metric(wrong, PAIRS)
    for outside in (101, -2):
        with pytest.raises(ValueError, match=rf"{outside}.* but the vocabulary has 101 tokens"):
            metric(logits, replace(PAIRS, right_ids=torch.tensor([[5], [0], [outside], [1], [1]])))
    for absent in (torch.tensor([[5], [0], [-1], [1], [1]]), torch.empty(5, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=f"prompt {INDEX[2] if absent.numel() else INDEX[0]} has no right answer"):
            metric(logits, replace(PAIRS, right_ids=absent))
    logits[3, 0] = torch.nan
    with pytest.raises(ValueError, match=f"the logits of prompts {INDEX[3]} are not finite; use dtype float32 or bfl"):
        metric(logits, PAIRS)


def test_kl_and_last_logits_refuse_what_does_not_fit() -> None:
    clean, other = random_logits(0), random_logits(1)
    with pytest.raises(ValueError, match=r"one shape, not \(5, 101\) and \(4, 101\)"):
        kl(clean, other[:4])
    with pytest.raises(ValueError, match=r"\(101,\) do not belong to a batch of shape \(5, 1\)"):
        kl(clean[0], other[0])
    with pytest.raises(ValueError, match=r'kl needs the logits of the untouched run.*needs=\("clean",\)'):
        metrics.kl(other, PAIRS)
    other[1, 4] = torch.inf
    for pair in ((clean, other), (other, clean)):
        with pytest.raises(ValueError, match=f"the logits of prompts {INDEX[1]} are not finite"):
            kl(*pair)
    for padding_side, kept in (("left", 2), ("right", 1)):
        with pytest.raises(
            ValueError, match=rf"\(3, {kept}, 9\) do not belong to a batch of shape \(3, 4\); give those of"
        ):
            metrics.last_logits(torch.zeros(3, kept, 9), next(TOKENIZED.batches(3, padding_side)))
