"""How well a ranking finds what is known, and how far two rankings agree."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata, spearmanr


def auroc(scores: Float[np.ndarray, " item"], known: Bool[np.ndarray, " item"]) -> float:
    """The chance that a known item scores above another; ties count half (Mann-Whitney's U over the number of pairs)."""
    n = int(known.sum())
    return float((rankdata(scores)[known].sum() - n * (n + 1) / 2) / (n * (len(known) - n)))


def precision_at_k(scores: Float[np.ndarray, " item"], known: Bool[np.ndarray, " item"]) -> float:
    """The share of known items among as many of the highest scores."""
    return float(known[np.argsort(-scores, kind="stable")[: known.sum()]].mean())


def rank_correlation(a: Float[np.ndarray, " item"], b: Float[np.ndarray, " item"]) -> float:
    """Spearman's correlation; NaN where one side is constant."""
    return float(spearmanr(a, b)[0])
