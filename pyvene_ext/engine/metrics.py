"""Metrics of the two answers, from the logits at each prompt's last token.

Every function takes logits `[batch vocab]` in any dtype and returns float32 `[batch]`, one number per prompt, never an average;
only `token_probabilities` reads the prompt's own tokens and returns one number for each of them.
Answer ids are `[batch 2]`: IO (correct), then S (incorrect). Wrong shapes, ids outside the vocabulary and logits that are not
finite raise ValueError. Definitions: Wang et al. 2022 (logit difference), Zhang & Nanda 2024 (the choice between these metrics).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyvene_ext.prompts.sets import Batch

Logits = Float[Tensor, "batch vocab"]
AnswerIds = Int[Tensor, "batch 2"]
PerPrompt = Float[Tensor, " batch"]


def last_logits(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> Logits:
    """Select the logits at each row's last real token.

    Args:
        logits: of every token of the batch, or of the last `Batch.logits_to_keep` columns.
        batch: the prompts, padded on either side.

    Returns:
        The logits at the last tokens, in their dtype.

    Raises:
        ValueError: the shapes do not match, or logits are not finite; the message names the prompts.
    """
    rows, columns = batch.input_ids.shape
    if logits.ndim != 3 or len(logits) != rows or logits.shape[1] not in (batch.logits_to_keep, columns):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not belong to a batch of shape {tuple(batch.input_ids.shape)}; give "
            "those of every token, [batch pos vocab]."
        )
    last = torch.tensor(batch.last_columns, device=logits.device) - (columns - logits.shape[1])
    chosen = logits[torch.arange(rows, device=logits.device), last]
    _check_finite(chosen, "prompts", batch.index)
    return chosen


def logit_diff(logits: Logits, answer_ids: AnswerIds) -> PerPrompt:
    """Logit difference, logit(IO) - logit(S) (Wang et al. 2022).

    Args:
        logits: at each prompt's last token.
        answer_ids: IO, then S.

    Returns:
        One number per prompt.
    """
    io, s = _answer_logits(logits, answer_ids)
    return io - s


def logit(logits: Logits, answer_ids: AnswerIds) -> PerPrompt:
    """Logit of the correct answer, IO.

    Args:
        logits: at each prompt's last token.
        answer_ids: IO, then S.

    Returns:
        One number per prompt.
    """
    return _answer_logits(logits, answer_ids)[0]


def paired_logit_diff(ld_a: PerPrompt, ld_b: PerPrompt) -> PerPrompt:
    """Paired logit difference: the mean of the logit differences of a prompt and its counterpart with IO and S swapped.

    1/2 {[l(a) - l(b)](x_a) + [l(b) - l(a)](x_b)}: a prior for one of the two names, whatever the prompt, cancels out.

    Args:
        ld_a: logit differences of the prompts.
        ld_b: logit differences of their counterparts.

    Returns:
        One number per pair.

    Raises:
        ValueError: the shapes differ.
    """
    if ld_a.shape != ld_b.shape:
        raise ValueError(
            f"paired logit differences need equal shapes, not {tuple(ld_a.shape)} and {tuple(ld_b.shape)}."
        )
    return (ld_a.float() + ld_b.float()) / 2


def probability(logits: Logits, answer_ids: AnswerIds) -> PerPrompt:
    """Probability of IO, over the whole vocabulary.

    Args:
        logits: at each prompt's last token.
        answer_ids: IO, then S.

    Returns:
        One number per prompt.
    """
    _answer_logits(logits, answer_ids)
    return logits.float().softmax(-1).gather(1, answer_ids[:, :1].to(logits.device)).squeeze(1)


def rank(logits: Logits, answer_ids: AnswerIds) -> PerPrompt:
    """Rank of IO in the whole vocabulary: 1 is the top; tokens with equal logits share the better rank.

    Args:
        logits: at each prompt's last token.
        answer_ids: IO, then S.

    Returns:
        One number per prompt.
    """
    io, _ = _answer_logits(logits, answer_ids)
    return 1 + (logits.float() > io[:, None]).sum(-1).float()


def accuracy(logits: Logits, answer_ids: AnswerIds, among: Literal["vocab", "pair"] = "vocab") -> PerPrompt:
    """1 where IO has the highest logit, else 0; a tie counts as 0.

    Args:
        logits: at each prompt's last token.
        answer_ids: IO, then S.
        among: compare with every other token ("vocab"), or with S alone ("pair").

    Returns:
        One number per prompt.

    Raises:
        ValueError: `among` is neither.
    """
    io, s = _answer_logits(logits, answer_ids)
    if among == "pair":
        return (io > s).float()
    if among == "vocab":
        return ((logits.float() >= io[:, None]).sum(-1) == 1).float()
    raise ValueError(f"among must be 'vocab' or 'pair', not {among!r}.")


def kl(clean_logits: Logits, logits: Logits) -> PerPrompt:
    """KL(clean || intervened) in nats, over the whole vocabulary.

    Args:
        clean_logits: of the untouched run.
        logits: of the run with the intervention.

    Returns:
        One number per prompt.

    Raises:
        ValueError: the shapes differ, or logits are not finite.
    """
    if clean_logits.shape != logits.shape or logits.ndim != 2:
        raise ValueError(
            f"kl needs two arrays [batch vocab] of one shape, not {tuple(clean_logits.shape)} and {tuple(logits.shape)}."
        )
    _check_finite(clean_logits, "clean rows")
    _check_finite(logits, "rows")
    # In float32 the rounding of log_softmax (1e-6 with usual logits) would mask the effect of a weak head, or make it negative.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    clean, intervened = (some.to(dtype).log_softmax(-1) for some in (clean_logits, logits))
    return (clean.exp() * (clean - intervened)).sum(-1).float()


def token_probabilities(logits: Logits, input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Probability that the next token is the one at each position of the prompt, over the whole vocabulary.

    Args:
        logits: at each prompt's last token.
        input_ids: the prompts' own tokens.

    Returns:
        One number per token.

    Raises:
        ValueError: the shapes do not match, or logits are not finite.
    """
    if logits.ndim != 2 or input_ids.ndim != 2 or len(input_ids) != len(logits):
        raise ValueError(
            f"expected logits [batch vocab] and input_ids [batch pos], not {tuple(logits.shape)} and {tuple(input_ids.shape)}."
        )
    _check_ids("token", input_ids, logits.shape[1])
    _check_finite(logits, "rows")
    return logits.float().softmax(-1).gather(1, input_ids.to(logits.device))


def _answer_logits(logits: Logits, answer_ids: AnswerIds) -> tuple[PerPrompt, PerPrompt]:
    """Float32 logits of IO and of S, once both arguments are found in order."""
    if logits.ndim != 2 or answer_ids.shape != (len(logits), 2):
        raise ValueError(
            f"expected logits [batch vocab] and answer_ids [batch 2], not {tuple(logits.shape)} and {tuple(answer_ids.shape)}."
        )
    answer_ids = answer_ids.to(logits.device)
    _check_ids("answer", answer_ids, logits.shape[1])
    _check_finite(logits, "rows")
    io, s = logits.gather(1, answer_ids).float().unbind(1)
    return io, s


def _check_ids(what: str, ids: Int[Tensor, "batch some"], n_vocab: int) -> None:
    if ids.numel() and not 0 <= ids.min() <= ids.max() < n_vocab:
        raise ValueError(
            f"{what} ids range from {ids.min()} to {ids.max()} but the vocabulary has {n_vocab} tokens; use the model's own "
            "tokenizer."
        )


def _check_finite(logits: Logits, what: str, names: list[int] | None = None) -> None:
    bad = (~logits.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        which = ", ".join(str(row if names is None else names[row]) for row in bad)
        raise ValueError(
            f"the logits of {what} {which} are not finite; use dtype float32 or bfloat16, or a weaker intervention."
        )
