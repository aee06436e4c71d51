"""Numbers as table cells: intervals in columns, one column per model, values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pyvene_ext.stats.intervals import Interval


def interval_columns(name: str, interval: Interval) -> dict[str, Any]:
    """The cells of a mean with its interval.

    Args:
        name: column of the mean.
        interval: the numbers.

    Returns:
        Cells by column: NAME, NAME_low and NAME_high.
    """
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def interval_in(row: Mapping[str, Any], name: str) -> Interval:
    """Read from a row what `interval_columns` wrote.

    Args:
        row: cells by column.
        name: column of the mean.

    Returns:
        Mean and ends of the interval.
    """
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


def side_by_side(rows: Sequence[dict[str, Any]], key: str, suffix: str, value: str) -> list[dict[str, Any]]:
    """Pivot rows of several models into one row per `key`, with a column MODEL_suffix for each model.

    Args:
        rows: one a model and key, with columns "model", `key` and `value`.
        key: first column of the new table.
        suffix: ending of the other columns' names.
        value: column of `rows` whose values fill the cells.

    Returns:
        The rows of the new table; NaN, written as an empty cell, where a model lacks a key.
    """
    models = dict.fromkeys(row["model"] for row in rows)
    found = {(row[key], row["model"]): row[value] for row in rows}
    keys = dict.fromkeys(row[key] for row in rows)
    return [{key: k, **{f"{model}_{suffix}": found.get((k, model), math.nan) for model in models}} for k in keys]


def exceeded_by_a_tenth(values: Float[np.ndarray, " value"]) -> float:
    """A threshold that a tenth of values exceed, so that being above it tells them apart whatever their scale.

    Args:
        values: finite numbers, at least one.

    Returns:
        Their 0.9 quantile, or 0 if that is below 0.
    """
    return max(0.0, float(np.quantile(values.astype(np.float64), 0.9)))


def threshold_grid(values: Float[np.ndarray, " value"], tau: float, n: int = 60) -> Float[np.ndarray, " tau"]:
    """Thresholds at which a curve is drawn.

    Args:
        values: what is compared with them.
        tau: one threshold that is among them, if it is above 0.
        n: how many others.

    Returns:
        Thresholds from a thousandth of the largest value's size up to it, evenly spaced by their ratio.
    """
    largest = float(np.abs(values).max()) or 1.0
    return np.unique([*np.geomspace(largest / 1000, largest, n), *([tau] if tau > 0 else [])])


def threshold_table(
    taus: Float[np.ndarray, " tau"], frequencies: Float[np.ndarray, "tau layer head"]
) -> list[dict[str, float]]:
    """Summarise frequencies over heads, one row per threshold.

    Args:
        taus: the thresholds.
        frequencies: frequency of each head at each threshold; NaN for heads that were not run.

    Returns:
        Rows of threshold, mean over heads, and the 10%, 50% and 90% quantiles over heads.
    """
    return [
        {"tau": float(tau), "mean": float(at.mean())}
        | {f"quantile_{q:g}": float(np.quantile(at, q)) for q in (0.1, 0.5, 0.9)}
        for tau, at in zip(taus, frequencies[:, np.isfinite(frequencies[0])], strict=True)
    ]


def filled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every row all columns that occur in any of them, with empty cells for missing values."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def finite(value: float) -> float | None:
    """Convert a number for JSON, which has no NaN: None if it is not finite."""
    return float(value) if math.isfinite(value) else None
