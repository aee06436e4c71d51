"""Short name of `pyvene_ext.engine.metrics`: its public names."""

from pyvene_ext.engine.metrics import (
    accuracy,
    kl,
    last_logits,
    logit,
    logit_diff,
    paired_logit_diff,
    probability,
    rank,
    token_probabilities,
)

__all__ = [
    "accuracy",
    "kl",
    "last_logits",
    "logit",
    "logit_diff",
    "paired_logit_diff",
    "probability",
    "rank",
    "token_probabilities",
]
