"""Metrics: functions of the logits and the prompts that give one number per prompt, or one per token of a prompt.

Every function takes logits in any dtype and the `Batch` of prompts that they belong to, and returns float32. Most take the logits
at each prompt's last token, `[batch vocab]`, and return `[batch]`, never an average. `next_token_loss`, `entropy` and `token_kl`
take the logits at every token, `[batch pos vocab]`, and return `[batch pos]`; values at padding mean nothing.

A prompt's answers are read by their first tokens. Several answers count as one: their probability is the sum, and their logit
is the logsumexp of the tokens' logits, so that the logit difference is the log-odds of the right against the wrong ones. Wrong
shapes, ids outside the vocabulary, missing answers and logits that are not finite raise ValueError. Definitions: Wang et al. 2022
(logit difference), Zhang & Nanda 2024 (the choice between these metrics).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from pyvene_ext.prompts.tokenized import Batch

Logits = Float[Tensor, "batch vocab"]
TokenLogits = Float[Tensor, "batch pos vocab"]
PerPrompt = Float[Tensor, " batch"]
PerToken = Float[Tensor, "batch pos"]


def last_logits(logits: TokenLogits, batch: Batch) -> Logits:
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
    if logits.ndim != 3 or len(logits) != rows or logits.shape[1] != batch.logits_to_keep:
        _check_shape(logits, batch, of_tokens=True)
    last = torch.tensor(batch.last_columns, device=logits.device) - (columns - logits.shape[1])
    chosen = logits[torch.arange(rows, device=logits.device), last]
    check_finite(chosen, batch)
    return chosen


def logit_diff(logits: Logits, prompts: Batch) -> PerPrompt:
    """Logit difference, logit(right) - logit(wrong) (Wang et al. 2022).

    Args:
        logits: at each prompt's last token.
        prompts: the prompts, with right and wrong answers.

    Returns:
        One number per prompt.
    """
    right, wrong = (_answer_logits(logits, prompts, which) for which in ("right", "wrong"))
    return right.logsumexp(1) - wrong.logsumexp(1)


def logit(logits: Logits, prompts: Batch) -> PerPrompt:
    """Logit of the right answer.

    Args:
        logits: at each prompt's last token.
        prompts: the prompts, with right answers.

    Returns:
        One number per prompt.
    """
    return _answer_logits(logits, prompts, "right").logsumexp(1)


def paired_logit_diff(ld_a: PerPrompt, ld_b: PerPrompt) -> PerPrompt:
    """Paired logit difference: the mean of the logit differences of a prompt and its counterpart with the answers swapped.

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


def probability(logits: Logits, prompts: Batch) -> PerPrompt:
    """Probability of the right answer, over the whole vocabulary.

    Args:
        logits: at each prompt's last token.
        prompts: the prompts, with right answers.

    Returns:
        One number per prompt.
    """
    _answer_logits(logits, prompts, "right")
    ids = prompts.right_ids.to(logits.device)
    return logits.float().softmax(-1).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).sum(1)


def rank(logits: Logits, prompts: Batch) -> PerPrompt:
    """Rank of the best right answer in the whole vocabulary: 1 is the top; tokens with equal logits share the better rank.

    Args:
        logits: at each prompt's last token.
        prompts: the prompts, with right answers.

    Returns:
        One number per prompt.
    """
    best = _answer_logits(logits, prompts, "right").amax(1)
    return 1 + (logits.float() > best[:, None]).sum(-1).float()


def accuracy(logits: Logits, prompts: Batch, among: Literal["vocab", "pair"] = "vocab") -> PerPrompt:
    """1 where a right answer has the highest logit, else 0; a tie with another token counts as 0.

    Args:
        logits: at each prompt's last token.
        prompts: the prompts, with right answers.
        among: compare with every other token ("vocab"), or with the wrong answers alone ("pair").

    Returns:
        One number per prompt.

    Raises:
        ValueError: `among` is neither.
    """
    right = _answer_logits(logits, prompts, "right")
    best = right.amax(1, keepdim=True)
    if among == "pair":
        return (best[:, 0] > _answer_logits(logits, prompts, "wrong").amax(1)).float()
    if among == "vocab":
        return ((logits.float() >= best).sum(-1) == (right == best).sum(-1)).float()
    raise ValueError(f"among must be 'vocab' or 'pair', not {among!r}.")


def kl(logits: Logits, prompts: Batch) -> PerPrompt:
    """KL(clean || intervened) in nats, over the whole vocabulary.

    Args:
        logits: of the run with the intervention, at each prompt's last token.
        prompts: the prompts, with `clean_logits` of the untouched run.

    Returns:
        One number per prompt.
    """
    return _kl(logits, prompts, of_tokens=False)


def answer_logprob(right: PerPrompt, wrong: PerPrompt) -> PerPrompt:
    """Log-probability of the whole right answer: the sum of its tokens', each given the prompt and the tokens before it.

    Edits are made in the prompt only and the answer's tokens run untouched, so that this is the log-probability with which
    `generate(scope="prompt")` would write the answer. Of several right answers it is the log of the summed probability.

    Args:
        right: log-probability of each prompt's right answers.
        wrong: not used.

    Returns:
        One number per prompt.
    """
    return right


def answer_logprob_diff(right: PerPrompt, wrong: PerPrompt) -> PerPrompt:
    """Log-probability of the whole right answer minus that of the wrong one (`answer_logprob`).

    Args:
        right: log-probability of each prompt's right answers.
        wrong: log-probability of its wrong answers.

    Returns:
        One number per prompt.
    """
    return right - wrong


def token_probabilities(logits: Logits, prompts: Batch) -> PerToken:
    """Probability that the next token is the one at each position of the prompt, over the whole vocabulary.

    Args:
        logits: at each prompt's last token.
        prompts: the prompts.

    Returns:
        One number per token.
    """
    _check_shape(logits, prompts)
    ids = prompts.input_ids.to(logits.device)
    _check_ids("token", ids, logits.shape[1])
    check_finite(logits, prompts)
    return logits.float().softmax(-1).gather(1, ids)


def next_token_loss(logits: TokenLogits, prompts: Batch) -> PerToken:
    """Cross-entropy of the next token of the prompt, in nats.

    Args:
        logits: at every token.
        prompts: the prompts.

    Returns:
        At each token minus the log-probability of the token that follows; NaN at a prompt's last, which nothing follows.
    """
    _check_shape(logits, prompts, of_tokens=True)
    check_finite(logits, prompts)
    ids, mask = (x.to(logits.device) for x in (prompts.input_ids, prompts.attention_mask.bool()))
    loss = -logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return pad(loss.masked_fill(~(mask[:, :-1] & mask[:, 1:]), torch.nan), (0, 1), value=torch.nan)


def entropy(logits: TokenLogits, prompts: Batch) -> PerToken:
    """Entropy of the prediction at every token, in nats.

    Args:
        logits: at every token.
        prompts: the prompts.

    Returns:
        One number per token.
    """
    _check_shape(logits, prompts, of_tokens=True)
    check_finite(logits, prompts)
    log_probabilities = logits.float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def token_kl(logits: TokenLogits, prompts: Batch) -> PerToken:
    """KL(clean || intervened) in nats at every token, over the whole vocabulary.

    Args:
        logits: of the run with the intervention, at every token.
        prompts: the prompts, with `clean_logits` of the untouched run.

    Returns:
        One number per token.
    """
    return _kl(logits, prompts, of_tokens=True)


def check_finite(logits: Logits | TokenLogits, batch: Batch) -> None:
    """Check that logits are finite; those at padding may have any value.

    Args:
        logits: at the last token of each prompt of the batch, or at every token.
        batch: the prompts.

    Raises:
        ValueError: some logits are not; the message names the prompts.
    """
    finite = logits.isfinite().all(-1)
    if logits.ndim == 3:
        finite = (finite | (batch.attention_mask.to(finite.device) == 0)).all(-1)
    if not finite.all():
        which = ", ".join(str(batch.index[row]) for row in (~finite).nonzero().flatten().tolist())
        raise ValueError(
            f"the logits of prompts {which} are not finite; use dtype float32 or bfloat16, or a weaker intervention."
        )


def _kl(logits: Float[Tensor, "batch *pos vocab"], prompts: Batch, *, of_tokens: bool) -> Float[Tensor, " batch *pos"]:
    clean = prompts.clean_logits
    if clean is None:
        raise ValueError(
            "kl needs the logits of the untouched run in prompts.clean_logits; in a metric of your own, ask for them by "
            'Metric(..., needs=("clean",)).'
        )
    if clean.shape != logits.shape:
        raise ValueError(f"kl needs two arrays of one shape, not {tuple(clean.shape)} and {tuple(logits.shape)}.")
    _check_shape(logits, prompts, of_tokens=of_tokens)
    check_finite(clean, prompts)
    check_finite(logits, prompts)
    # In float32 the rounding of log_softmax (1e-6 with usual logits) would mask the effect of a weak head, or make it negative.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64

    def of_rows(*rows: Tensor) -> Tensor:
        before, after = (row.to(dtype).log_softmax(-1) for row in rows)
        return (before.exp() * (before - after)).sum(-1).float()

    if of_tokens:  # one prompt at a time, because float64 of a whole batch could take more memory than the model
        return torch.stack([of_rows(*pair) for pair in zip(clean, logits, strict=True)])
    return of_rows(clean, logits)


def _answer_logits(
    logits: Logits, prompts: Batch, which: Literal["right", "wrong"]
) -> Float[Tensor, "batch n_answers"]:
    """Float32 logits of the answers, once both arguments are found in order; -inf where a prompt has fewer."""
    _check_shape(logits, prompts)
    ids: Int[Tensor, "batch n_answers"] = (prompts.right_ids if which == "right" else prompts.wrong_ids).to(
        logits.device
    )
    _check_ids("answer", ids[ids != -1], logits.shape[1])
    missing = (ids < 0).all(1)
    if missing.any():
        prompt = prompts.index[int(missing.nonzero()[0])]
        raise ValueError(f"prompt {prompt} has no {which} answer; give it one, or use a metric that needs none.")
    check_finite(logits, prompts)
    return logits.gather(1, ids.clamp(min=0)).float().masked_fill(ids < 0, -torch.inf)


def _check_shape(logits: Tensor, prompts: Batch, *, of_tokens: bool = False) -> None:
    wanted = prompts.input_ids.shape if of_tokens else prompts.input_ids.shape[:1]
    if logits.shape[:-1] != wanted:
        named = "[batch pos vocab]" if of_tokens else "[batch vocab]"
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not belong to a batch of shape {tuple(prompts.input_ids.shape)}; give "
            f"those of {'every' if of_tokens else 'the last'} token, {named}."
        )


def _check_ids(what: str, ids: Int[Tensor, " *shape"], n_vocab: int) -> None:
    if ids.numel() and not 0 <= ids.min() <= ids.max() < n_vocab:
        raise ValueError(
            f"{what} ids range from {ids.min()} to {ids.max()} but the vocabulary has {n_vocab} tokens; use the model's own "
            "tokenizer."
        )
