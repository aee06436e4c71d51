"""Tables of the lag study: the curve by lag, p(+1) and lag-CRP(+1) with heads ablated, and what they say in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lag import (
    FAR,
    LagCurves,
    RankedHeads,
    lag_crp,
    lags_of,
    plus_one,
    plus_one_bias,
    plus_one_first,
    recalled,
)
from pyvene_ext.stats.controls import against_random
from pyvene_ext.stats.intervals import (
    bootstrap_mean,
    change_of_ratio,
    paired_bootstrap,
    ratio_of_means,
    standard_error,
)


def lag_table(curves: Float[np.ndarray, "permutation lag"]) -> list[dict[str, Any]]:
    """Make the table by lag.

    Args:
        curves: probabilities by lag.

    Returns:
        One row per lag: the mean probability with its standard error over permutations, and lag-CRP.
    """
    columns = (lags_of(curves.shape[1]).tolist(), curves.mean(0), standard_error(curves), lag_crp(curves))
    names = ("Lag", "Mean Probability", "Standard Error", "Conditional Response Probability")
    return [dict(zip(names, (row[0], *map(float, row[1:])), strict=True)) for row in zip(*columns, strict=True)]


def lag_summary(
    at: LagCurves, clean: Float[np.ndarray, "permutation lag"], heads: RankedHeads, head_type: str, seed: int
) -> dict[str, Any]:
    """Make one row of the summary: p(+1) and lag-CRP(+1), their changes with intervals, and the random sets for comparison.

    The change of p(+1) is that of its bias. A measure carries the effect if the interval of its change lies below 0 and no random
    set lowers it as much.

    Args:
        at: the curves with a number of heads ablated.
        clean: those of the untouched run.
        heads: the rankings that were ablated.
        head_type: as for `lag_curves`.
        seed: of the bootstrap.

    Returns:
        The row.
    """
    bias, before = plus_one_bias(at.own), plus_one_bias(clean)
    change = paired_bootstrap(bias, before, rng(seed, "bias", at.n))
    of_next, of_any = plus_one(at.own), recalled(at.own)
    p = bootstrap_mean(of_next, rng(seed, "p(+1)", at.n))
    crp = ratio_of_means(of_next[None], of_any, rng(seed, "crp", at.n))
    untouched = plus_one(clean), recalled(clean)
    crp_change = change_of_ratio((of_next, of_any), untouched, rng(seed, "crp change", at.n))
    row: dict[str, Any] = {
        "heads": at.n,
        "p(+1)": p.mean,
        "standard error": standard_error(of_next),
        "p(+1) low": p.low,
        "p(+1) high": p.high,
        "first": plus_one_first(at.own).mean(),
        "recalled": of_any.mean(),
        "bias": bias.mean(),
        "change": change.mean,
        "change low": change.low,
        "change high": change.high,
        "crp(+1)": crp.mean[0],
        # Of a ratio of means, to first order.
        "crp standard error": standard_error(of_next - crp.mean[0] * of_any) / of_any.mean(),
        "crp low": crp.low[0],
        "crp high": crp.high[0],
        "crp change": crp_change.mean,
        "crp change low": crp_change.low,
        "crp change high": crp_change.high,
    }
    falls = {"p(+1)": change.high < 0, "lag-CRP(+1)": crp_change.high < 0}
    if at.n and len(at.random):
        changes = plus_one_bias(at.random).mean(1) - before.mean()
        crps = plus_one(at.random).mean(1) / recalled(at.random).mean(1) - untouched[0].mean() / untouched[1].mean()
        control = heads.random_sets(at.n)
        row |= {"random sets": len(changes), "random change": changes.mean()}
        row |= {"random lowest": changes.min(), "random highest": changes.max()}
        row |= {"random crp change": crps.mean(), "random crp lowest": crps.min(), "random crp highest": crps.max()}
        row |= heads.mean_score("random score", itertools.chain(*control.sets))
        if head_type == "induction":
            row |= heads.mean_score("score", heads.ranked[: at.n])
            row["share as low"] = against_random(change.mean, changes).p
            as_low = crp_change.mean + 1e-12  # equal but for rounding, since the sums are in another order
            row["crp share as low"] = against_random(as_low, crps).p
            falls["p(+1)"] &= change.mean < changes.min()
            falls["lag-CRP(+1)"] &= as_low < crps.min()
        row["control"] = control.strength
    if at.n and head_type == "induction":
        row["carried by"] = " and ".join(name for name, fell in falls.items() if fell) or "neither"
    return {name: value if isinstance(value, int | str) else float(value) for name, value in row.items()}


def lag_text(rows: Iterable[dict[str, Any]]) -> str:
    """Format a summary as aligned text: a table of p(+1), and one of lag-CRP(+1).

    Args:
        rows: those of `lag_summary`.

    Returns:
        One line per row and measure, after a header each; how strong the controls are, and which measure carries the effect.
    """
    rows = list(rows)
    text = f"{_measure_text(rows, 'p(+1)', 'bias change', '')}\n\n{_measure_text(rows, 'crp(+1)', 'change', 'crp ')}"
    if strengths := dict.fromkeys(row["control"] for row in rows if "control" in row):
        text += f"\ncontrol: {'; '.join(strengths)}"
    carried: dict[str, list[str]] = {}
    for row in rows:
        if "carried by" in row:
            carried.setdefault(row["carried by"], []).append(str(row["heads"]))
    if carried:
        found = "; ".join(f"{by} (heads: {', '.join(levels)})" for by, levels in carried.items())
        text += f"\nfalls by its interval, and further than with any random set: {found}"
    return text


def _measure_text(rows: list[dict[str, Any]], name: str, change: str, prefix: str) -> str:
    """The table of one measure, whose columns begin with a prefix."""
    controlled = any("random change" in row for row in rows)
    lines = [
        f"heads {name.upper() if prefix else name:>8} {'± se':>9} {'95% interval':>18} {change:>12} {'95% interval':>18}"
        + ("   random sets: mean change [range], score" if controlled else "")
    ]
    low, high = ("crp low", "crp high") if prefix else ("p(+1) low", "p(+1) high")
    for row in rows:
        line = f"{row['heads']:5d} {row[name]:8.4f} {row[f'{prefix}standard error']:9.4f} {_ends(row, low, high)} "
        line += f"{row[f'{prefix}change']:12.4f} {_ends(row, f'{prefix}change low', f'{prefix}change high')}"
        if "random change" in row:
            line += f"   {row['random sets']:2d}: {row[f'random {prefix}change']:7.4f} "
            line += _ends(row, f"random {prefix}lowest", f"random {prefix}highest")
            line += f", {row['random score']:.2f}" if "random score" in row else ""
        if "share as low" in row:
            line += f" (own {row['score']:.2f})" if "score" in row else ""
            line += f", share as low {row[f'{prefix}share as low']:.3f}"
        lines.append(line)
    return "\n".join(lines)


def _ends(row: dict[str, Any], low: str, high: str) -> str:
    return f"[{row[low]:7.4f}, {row[high]:7.4f}]"


def lag_task(clean: Float[np.ndarray, "permutation lag"], seed: int) -> list[str]:
    """Say how well the untouched model does the task, and first of all if it does not.

    Args:
        clean: the curves of the untouched run.
        seed: of the bootstrap.

    Returns:
        One sentence, or two.
    """
    n, lags = clean.shape
    p, first = plus_one(clean), int(plus_one_first(clean).sum())
    by_chance = float(binomtest(first, n, 1 / (lags - 1), alternative="greater").pvalue)
    bias = bootstrap_mean(plus_one_bias(clean), rng(seed, "task"))
    crp = ratio_of_means(p[None], recalled(clean), rng(seed, "crp", 0))
    said = (
        f"untouched: p(+1) {p.mean():.4f} ± {standard_error(p):.4f}, beyond lag {FAR} {p.mean() - bias.mean:.4f}, and any token "
        f"of the list {recalled(clean).mean():.4f}; lag-CRP(+1) {crp.mean[0]:.3f} [{crp.low[0]:.3f}, {crp.high[0]:.3f}]; lag +1 "
        f"is the list's likeliest token in {first} of {n} permutations ({n / (lags - 1):.1f} by chance)"
    )
    if p.max() > p.sum() / 2:
        said += f"; one permutation of {n} makes {p.max() / p.sum():.0%} of p(+1)"
    if bias.low > 0 and by_chance < 0.05:
        return [said]
    return ["THE MODEL DOES NOT DO THE TASK: p(+1) is not above chance, so that no ablation can lower it.", said]
