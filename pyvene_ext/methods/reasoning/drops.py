"""Rows of tables: what a set of heads costs, in percent of the problems, beside random sets of other heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.controls import mcnemar_p, share_as_large
from pyvene_ext.stats.intervals import Interval
from pyvene_ext.stats.stopping import Stopping, anytime_interval
from pyvene_ext.stats.tables import interval_columns

Row = dict[str, Any]
BESIDE_RANDOM = (
    "random_drop",
    "random_lowest",
    "random_highest",
    "excess",
    "excess_low",
    "excess_high",
    "share_as_large",
)


def drop_row(
    clean: Evaluation, own: Evaluation, others: Sequence[Evaluation], seed: int, rule: Stopping | None = None
) -> Row:
    """Accuracy in percent, its loss in points, and what random sets lose.

    Sets that stop by themselves took different problems, so that their drops cannot be averaged or ranked. They are compared by
    whether a drop is known to be above the upper threshold, by one rule for all. If the heads are like random ones, no set is
    more likely than another to be so, and `share_as_large` is a p-value.

    Args:
        clean: the untouched model's solutions of all problems.
        own: those with the heads ablated, or `clean` itself.
        others: those with each random set ablated.
        seed: of the bootstrap.
        rule: when random sets stop; None: all sets took all problems.

    Returns:
        Cells by column, NaN for what the problems cannot tell.
    """
    before = own.where_taken(clean).correct
    if own.stopped is not None:
        drop = own.stopped.drop
        solved = percent(anytime_interval(own.correct, low=0))
    else:
        drop = Interval(0.0, 0.0, 0.0)
        solved = accuracy.percent_correct(own.correct)
        if own is not clean:
            drop = accuracy.accuracy_drop(before, own.correct, seed, "drop")
    row: Row = {
        "problems": len(own),
        "accuracy": solved.mean,
        "low": solved.low,
        "high": solved.high,
        **interval_columns("drop", drop),
        "relative_drop": drop.mean / before.mean() if before.any() else np.nan,
        "lost": int((before & ~own.correct).sum()),
        "won": int((~before & own.correct).sum()),
        "mcnemar_p": np.nan if own.stopped else mcnemar_p(before, own.correct),
        "unparsed": int((~own.parsed).sum()),
        "cut": int((~own.ended).sum()),
        "random_sets": len(others),
    }
    row |= dict.fromkeys(BESIDE_RANDOM, np.nan)
    if rule is not None:
        above = [is_above(clean, other, rule) for other in others]
        row |= {
            "of": len(clean),
            "stopped": own.stopped.verdict if own.stopped else "",
            "random_above": sum(above),
            "random_problems": sum(map(len, others)),
        }
        if others:
            row["share_as_large"] = share_as_large(is_above(clean, own, rule), above)
    elif others:
        random = np.mean([other.correct for other in others], 0)
        drops = np.array([100 * (clean.accuracy - other.accuracy) for other in others])
        excess = accuracy.accuracy_drop(random, own.correct, seed, "excess")
        share = share_as_large(drop.mean, drops)
        row |= dict(zip(BESIDE_RANDOM, (drops.mean(), drops.min(), drops.max(), *excess, share), strict=True))
    return {name: float(value) if isinstance(value, float) else value for name, value in row.items()}


def random_set_row(clean: Evaluation, other: Evaluation) -> Row:
    """What one random set costs.

    Args:
        clean: the untouched model's solutions of all problems.
        other: those with the set ablated.

    Returns:
        Cells by column.
    """
    row: Row = {
        "drop": 100 * (other.where_taken(clean).accuracy - other.accuracy),
        "unparsed": int((~other.parsed).sum()),
    }
    if other.stopped is not None:
        row |= interval_columns("drop", other.stopped.drop)
        row |= {"problems": len(other), "stopped": other.stopped.verdict}
    return row


def is_above(clean: Evaluation, own: Evaluation, rule: Stopping) -> bool:
    """Whether a rule would have stopped a set, on the problems that it took, because its drop is above the upper threshold.

    Args:
        clean: the untouched model's solutions of all problems.
        own: those with the set ablated: of the first problems in the rule's order.
        rule: the rule.

    Returns:
        Whether it would.
    """
    order = rule.order(len(clean))
    after = own.spread(own.correct, len(clean))[order][: len(own)]
    stopped = rule.judge(clean.correct[order], after == 1)
    return stopped is not None and stopped.verdict == "above"


def percent(share: Interval) -> Interval:
    """A share with its interval in percent."""
    return Interval(*(100 * value for value in share))
