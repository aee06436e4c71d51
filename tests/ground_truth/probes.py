"""Ridge probes the slow way: normal equations, and the penalty by refitting without every pair of folds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ridge(x: np.ndarray, y: np.ndarray, alpha: float, new: np.ndarray) -> np.ndarray:
    """Fit to `x`, `y` ([problem d], [problem column]) with penalty alpha times the problems; predict for `new`."""
    mean, spread = x.mean(0), x.std(0)
    varies = spread > 1e-9
    a = (x[:, varies] - mean[varies]) / spread[varies]
    b = (new[:, varies] - mean[varies]) / spread[varies]
    weights = np.linalg.solve(a.T @ a + alpha * len(x) * np.eye(a.shape[1]), a.T @ (y - y.mean(0)))
    return y.mean(0) + b @ weights


def nested(x: np.ndarray, y: np.ndarray, folds: np.ndarray, alphas: Sequence[float]) -> tuple[np.ndarray, list[float]]:
    """Each fold predicted without it, with the penalty that does best on the others, each left out in turn; the penalties."""
    predicted, chosen = np.empty_like(y), []
    for fold in np.unique(folds):
        losses = []
        for alpha in alphas:
            loss = 0.0
            for other in np.unique(folds):
                if other != fold:
                    train = (folds != fold) & (folds != other)
                    here = folds == other
                    loss += float(((ridge(x[train], y[train], alpha, x[here]) - y[here]) ** 2).sum())
            losses.append(loss)
        chosen.append(alphas[int(np.argmin(losses))])
        train = folds != fold
        predicted[~train] = ridge(x[train], y[train], chosen[-1], x[~train])
    return predicted, chosen


def r_squared(y: np.ndarray, predicted: np.ndarray) -> float:
    """The share of the squared distances from the mean that a prediction does away with."""
    missed = sum(float(np.sum((row - at) ** 2)) for row, at in zip(y, predicted, strict=True))
    there = sum(float(np.sum((row - y.mean(0)) ** 2)) for row in y)
    return 1 - missed / there
