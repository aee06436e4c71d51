"""The table of probes: how well targets are read off at every place, beside shuffled labels and the question's mean.

R^2 is of all problems together, each predicted without its fold. Places are compared with the same folds, shuffles and resamples:
the best of many is good by chance too, so that it is compared with the best of each shuffle (`p_best`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.probe_targets import ProbeTarget
from pyvene_ext.methods.reasoning.probes import ProbeFit, Residuals, cross_validated, deal_folds, shuffled
from pyvene_ext.stats.correlations import cluster_shares, q_values, r_squared

RESAMPLES = 2000
Row = dict[str, Any]


def probe_rows(
    residuals: Residuals,
    targets: Mapping[str, Sequence[ProbeTarget]],
    groups: Shaped[np.ndarray, " problem"],
    *,
    folds: int,
    shuffles: int,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Probe every place for every target at every token.

    Args:
        residuals: the residual stream.
        targets: by the name of the token, the targets of problems that have it.
        groups: the group of each problem: those of one are in one fold, and shuffled and resampled together.
        folds: of the cross-validation.
        shuffles: times that labels are shuffled.
        seed: of folds, shuffles and resamples.
        done: called after each probe.

    Returns:
        A row for each token, target and place; q with the false discovery rate over all of them.
    """
    rows: list[Row] = []
    for position, of_position in targets.items():
        # Targets of the same problems share fits.
        alike: dict[bytes, list[ProbeTarget]] = {}
        for target in of_position:
            alike.setdefault(target.which.tobytes(), []).append(target)
        for some in alike.values():
            found = _of_targets(residuals, position, some, groups[some[0].which], folds, shuffles, seed, done)
            rows += [{"position": position, **row} for row in found]
    q = q_values(np.array([row["p"] for row in rows]))
    return [{**row, "q": float(value)} for row, value in zip(rows, q, strict=True)]


def _of_targets(
    residuals: Residuals,
    position: str,
    targets: Sequence[ProbeTarget],
    names: Shaped[np.ndarray, " problem"],
    n_folds: int,
    shuffles: int,
    seed: int,
    done: Callable[[], object],
) -> list[Row]:
    """One row per target and place, of targets of the same problems."""
    which, groups = targets[0].which, np.unique(names, return_inverse=True)[1]
    folds = deal_folds(names.tolist(), n_folds, rng(seed, "folds"))
    shares = cluster_shares(groups, rng(seed, "resamples"), RESAMPLES)
    trials = []
    for target in targets:
        draws = [rng(seed, "shuffle", target.name, number) for number in range(shuffles)]
        trials.append(np.stack([target.y, *(shuffled(target.y, groups, draw) for draw in draws)]))
    found: dict[str, list[Row]] = {target.name: [] for target in targets}
    best = np.full((len(targets), shuffles), -np.inf)
    for depth, place in enumerate(residuals.places):
        fits = cross_validated(residuals.at[position][depth, which], trials, folds)
        baselines = cross_validated(residuals.question[depth, which], [some[:1] for some in trials], folds)
        about = {"depth": depth, "place": place, "problems": len(which), "groups": int(groups.max()) + 1}
        for number, (target, some, fit, baseline) in enumerate(zip(targets, trials, fits, baselines, strict=True)):
            row, random = row_of(target, some, fit, baseline, shares)
            best[number] = np.maximum(best[number], random)
            found[target.name].append({"target": target.name, **about, **row})
            done()
    rows = []
    for of_target, random in zip(found.values(), best, strict=True):
        highest = max(row["r2"] for row in of_target)
        rows += [{**row, "p_best": float((1 + (random >= highest).sum()) / (1 + len(random)))} for row in of_target]
    return rows


def row_of(
    target: ProbeTarget,
    trials: Float[np.ndarray, "trial problem column"],
    fit: ProbeFit,
    baseline: ProbeFit,
    shares: Float[np.ndarray, "resample problem"],
) -> tuple[Row, Float[np.ndarray, " shuffle"]]:
    """Make the row of a target at one place.

    Args:
        target: the target.
        trials: its labels, the real ones first, then shuffled ones.
        fit: the probes of the token.
        baseline: those of the question's mean, of the real labels.
        shares: how often each problem is in each resample (`cluster_shares`).

    Returns:
        The row, and the R^2 of each shuffle.
    """
    both = np.stack([fit.predicted[0], baseline.predicted[0]])
    (r2, question), resampled = r_squared(target.y, both), r_squared(target.y, both, shares)
    random = np.array([r_squared(y, at) for y, at in zip(trials[1:], fit.predicted[1:], strict=True)])
    fitted = np.array([r_squared(y, at) for y, at in zip(trials, fit.in_sample, strict=True)])
    row = {
        "in_sample": float(fitted[0]),
        "in_sample_shuffled": float(fitted[1:].mean()),
        **_named_interval("r2", float(r2), resampled[0]),
        "shuffled": float(random.mean()),
        "shuffled_lowest": float(random.min()),
        "shuffled_highest": float(random.max()),
        "p": float((1 + (random >= r2).sum()) / (1 + len(random))),
        **_named_interval("question", float(question), resampled[1]),
        **_named_interval("gain", float(r2 - question), resampled[0] - resampled[1]),
        "accuracy": target.accuracy(fit.predicted[0]),
        "accuracy_in_sample": target.accuracy(fit.in_sample[0]),
        "accuracy_question": target.accuracy(baseline.predicted[0]),
        "chance": target.chance,
        "alpha": float(np.median(fit.alphas[0])),
    }
    return row, random


def _named_interval(name: str, value: float, resampled: Float[np.ndarray, " resample"]) -> dict[str, float]:
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}
