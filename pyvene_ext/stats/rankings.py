"""How well a ranking recovers known items, and how closely two rankings agree."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata, spearmanr


def auroc(scores: Float[np.ndarray, " item"], known: Bool[np.ndarray, " item"]) -> float:
    """Area under the ROC curve: the probability that a known item scores above another (Mann-Whitney's U / number of pairs).

    Args:
        scores: one score per item.
        known: which items should rank high; at least one, and not all.

    Returns:
        The probability, with ties counted half.
    """
    n = int(known.sum())
    return float((rankdata(scores)[known].sum() - n * (n + 1) / 2) / (n * (len(known) - n)))


def precision_at_k(scores: Float[np.ndarray, " item"], known: Bool[np.ndarray, " item"]) -> float:
    """Precision at k, with k the number of known items: the share of known items among the k highest scores.

    Args:
        scores: one score per item.
        known: which items should rank high; at least one.

    Returns:
        The share.
    """
    return float(known[np.argsort(-scores, kind="stable")[: known.sum()]].mean())


def rank_correlation(a: Float[np.ndarray, " item"], b: Float[np.ndarray, " item"]) -> float:
    """Spearman's rank correlation of two score vectors.

    Args:
        a: one score per item.
        b: the same items in the same order.

    Returns:
        The coefficient; NaN if either vector is constant.
    """
    return float(spearmanr(a, b)[0])
