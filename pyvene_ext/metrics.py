"""Short name of `pyvene_ext.engine.metrics`: its public names."""

from pyvene_ext.engine.metrics import (
    accuracy,
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
