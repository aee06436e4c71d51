"""Short name of `pyvene_ext.engine.metrics`: its public names."""

from pyvene_ext.engine.metrics import (
    accuracy,
    answer_logprob,
    answer_logprob_diff,
    entropy,
    kl,
    last_logits,
    logit,
    logit_diff,
    next_token_loss,
    paired_logit_diff,
    probability,
    rank,
    token_kl,
    token_probabilities,
)

__all__ = [
    "accuracy",
    "answer_logprob",
    "answer_logprob_diff",
    "entropy",
    "kl",
    "last_logits",
    "logit",
    "logit_diff",
    "next_token_loss",
    "paired_logit_diff",
    "probability",
    "rank",
    "token_kl",
    "token_probabilities",
]
