"""Numbers as cells of tables: intervals in columns, one column a model, nothing that JSON lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pyvene_ext.stats.intervals import Interval


def interval_columns(name: str, interval: Interval) -> dict[str, Any]:
    """The cells of a mean with its interval: NAME, NAME_low and NAME_high."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def side_by_side(rows: Sequence[dict[str, Any]], key: str, suffix: str, value: str) -> list[dict[str, Any]]:
    """A table with one row a `key` and one column MODEL_suffix a model; a model without that key has an empty cell.

    Args:
        rows: one a model and key, with columns "model", `key` and `value`.
        key: the first column.
        suffix: of the other columns' names.
        value: what their cells hold.
    """
    models = dict.fromkeys(row["model"] for row in rows)
    found = {(row[key], row["model"]): row[value] for row in rows}
    keys = dict.fromkeys(row[key] for row in rows)
    return [{key: k, **{f"{model}_{suffix}": found.get((k, model), math.nan) for model in models}} for k in keys]


def threshold_table(
    taus: Float[np.ndarray, " tau"], frequencies: Float[np.ndarray, "tau layer head"]
) -> list[dict[str, float]]:
    """One row a threshold: the mean frequency over heads, and how it spreads over them. NaN is a head that was not run.

    Args:
        taus: the thresholds.
        frequencies: of each head at each of them.
    """
    return [
        {"tau": float(tau), "mean": float(at.mean())}
        | {f"quantile_{q:g}": float(np.quantile(at, q)) for q in (0.1, 0.5, 0.9)}
        for tau, at in zip(taus, frequencies[:, np.isfinite(frequencies[0])], strict=True)
    ]


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN: None in its place."""
    return float(value) if math.isfinite(value) else None
