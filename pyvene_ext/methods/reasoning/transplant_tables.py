"""The table of transplants: how much of the accuracy lost without the host's heads a donor's restore, beside random heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.controls import mcnemar_p, share_as_large
from pyvene_ext.stats.tables import interval_columns

Row = dict[str, Any]
OF_RANDOM = (
    "random_accuracy",
    "random_lowest",
    "random_highest",
    "excess",
    "excess_low",
    "excess_high",
    "share_as_good",
)


def transplant_row(
    clean: Evaluation, zero: Evaluation, answers: Evaluation, others: Sequence[Evaluation], seed: int, *names: str | int
) -> Row:
    """Make the row of one condition.

    Args:
        clean: the untouched host.
        zero: the host with nothing in the place of its heads.
        answers: the host under the condition.
        others: the host with random heads of the donor in these places, if that is the control of this condition.
        seed: of the bootstrap.
        *names: which draws of the seed.

    Returns:
        Accuracy in percent, its loss and gain in points; NaN in the columns of random heads if there are none.
    """
    share = accuracy.percent_correct(answers.correct)
    row: Row = {
        "problems": len(answers),
        "accuracy": share.mean,
        "low": share.low,
        "high": share.high,
        "unparsed": int((~answers.parsed).sum()),
        "changed": sum(a != b for a, b in zip(answers.ids, clean.ids, strict=True)),
        "clean_accuracy": 100 * clean.accuracy,
        **interval_columns("drop", accuracy.accuracy_drop(clean.correct, answers.correct, seed, *names)),
        "mcnemar_p": mcnemar_p(clean.correct, answers.correct),
        **interval_columns("gain", accuracy.accuracy_drop(answers.correct, zero.correct, seed, *names, "gain")),
        "random_sets": len(others),
        **dict.fromkeys(OF_RANDOM, math.nan),
    }
    if others:
        of_random = np.array([100 * other.accuracy for other in others])
        mean = np.mean([other.correct for other in others], 0)
        excess = accuracy.accuracy_drop(answers.correct, mean, seed, *names[1:], "excess")
        as_good = share_as_large(share.mean, of_random)
        values = (of_random.mean(), of_random.min(), of_random.max(), *excess, as_good)
        row |= {name: float(value) for name, value in zip(OF_RANDOM, values, strict=True)}
    return row
