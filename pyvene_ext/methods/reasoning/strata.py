"""Effects of interventions by difficulty of the problems: strata by confidence, by steps of the solution, or by both."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.drops import percent
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.prompts.problems import Problem
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.controls import strata_test, verdict
from pyvene_ext.stats.correlations import q_values
from pyvene_ext.stats.intervals import Interval
from pyvene_ext.stats.stopping import anytime_interval
from pyvene_ext.stats.thresholds import CAUSAL, REDUNDANT

Split = Literal["confidence", "steps", "both"]
SPLITS: tuple[Split, ...] = ("confidence", "steps", "both")
UNPARSED = "unparsed"
Row = dict[str, Any]


@dataclass(frozen=True)
class ProblemEffects:
    """The effect of an intervention on each problem.

    Attributes:
        name: of the model.
        what: the intervention, in words.
        first: the untouched run from the question on, for all problems.
        which: indices of the problems that are compared, to which the arrays refer.
        clean: whether solved without the intervention.
        after: whether solved with it; with several seeds, the share of them.
        unparsed: whether there is no answer with it; likewise.
        random: whether solved with each random set of heads ablated; None if there are none.
        facts: metadata of the run.
        stopped: whether the outcomes have decided how many problems there are; intervals then are such that hold nevertheless.
        thresholds: points above which a drop is causal, and below which it is redundant.
    """

    name: str
    what: str
    first: Evaluation
    which: Int[np.ndarray, " problem"]
    clean: Bool[np.ndarray, " problem"]
    after: Float[np.ndarray, " problem"]
    unparsed: Float[np.ndarray, " problem"]
    random: Bool[np.ndarray, "set problem"] | None
    facts: Row
    stopped: bool = False
    thresholds: tuple[float, float] = (CAUSAL, REDUNDANT)


def difficulty_strata(
    untouched: Evaluation, problems: Sequence[Problem], quantiles: int
) -> tuple[dict[Split, list[str]], list[float]]:
    """Assign every problem to a stratum of each split.

    Args:
        untouched: the untouched run, which gives the confidence; problems without an answer are a stratum of their own,
            "unparsed".
        problems: the same problems, in its order.
        quantiles: parts by confidence, q1 being the least confident; fewer if many problems have the same confidence.

    Returns:
        The stratum of each problem by split, and the edges of the parts by confidence.
    """
    known = untouched.confidence[np.isfinite(untouched.confidence)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, quantiles + 1))) if known.size else known
    parts = np.searchsorted(edges[1:-1], untouched.confidence, side="right") + 1
    confidence = [
        f"q{part}" if np.isfinite(value) else UNPARSED for part, value in zip(parts, untouched.confidence, strict=True)
    ]
    steps = [str(problem.steps) for problem in problems]
    both = [f"{part}, {number}" for part, number in zip(confidence, steps, strict=True)]
    return {"confidence": confidence, "steps": steps, "both": both}, edges.tolist()


def stratum_order(stratum: str) -> tuple[bool, list[int]]:
    """A sort key for strata.

    Args:
        stratum: its name.

    Returns:
        A key that puts q2 before q10, and unparsed last.
    """
    return stratum.startswith(UNPARSED), [int(number) for number in re.findall(r"\d+", stratum)]


def split_by(
    found: ProblemEffects, split: Split, names: Sequence[str], min_problems: int, seed: int
) -> tuple[list[Row], Row]:
    """Make the table of a split.

    Args:
        found: the effects.
        split: confidence, steps or both.
        names: the stratum of each problem.
        min_problems: strata with fewer get no interval and no test.
        seed: of bootstrap and permutations.

    Returns:
        One row per stratum, and a row with the test of their differences.
    """
    strata = sorted(set(names), key=stratum_order)
    at = {stratum: np.array([name == stratum for name in names]) for stratum in strata}
    enough = [stratum for stratum in strata if at[stratum].sum() >= min_problems]
    tested = np.any([at[stratum] for stratum in enough], 0) if enough else np.zeros(len(names), bool)
    of_tested = [name for name, there in zip(names, tested, strict=True) if there]

    def test(gain: Float[np.ndarray, " problem"], what: str) -> tuple[float, dict[str, float]]:
        if len(enough) < 2:
            return math.nan, {}
        return strata_test(gain[tested], of_tested, rng(seed, "strata", split, what), accuracy.RESAMPLES)

    p, each = test(found.clean - found.after, "drop")
    excess_p = math.nan
    if found.random is not None:
        excess_p, _ = test(found.random.mean(0) - found.after, "excess")
    q = q_values(np.array([each.get(stratum, math.nan) for stratum in strata]))
    rows = [
        row_of(found, split, stratum, at[stratum], stratum in enough, seed)
        | {"p": each.get(stratum, math.nan), "q": float(of_stratum)}
        for stratum, of_stratum in zip(strata, q, strict=True)
    ]
    about = {"model": found.name, "split": split, "problems": int(tested.sum()), "strata": len(enough)}
    return rows, {**about, "p": p, "excess_p": excess_p}


def row_of(
    found: ProblemEffects, split: Split, stratum: str, here: Bool[np.ndarray, " problem"], enough: bool, seed: int
) -> Row:
    """Make the row of a stratum.

    Args:
        found: the effects.
        split: the stratum's split.
        stratum: its name.
        here: which problems it has.
        enough: whether these suffice for intervals.
        seed: of the bootstrap.

    Returns:
        The row.
    """
    clean, after, names = found.clean[here], found.after[here], (split, stratum)
    before, then = accuracy.percent_correct(clean), mean_of(after, seed, *names)
    if found.stopped:
        before, then = (percent(anytime_interval(right, low=0)) for right in (clean, after))
    nothing = Interval(math.nan, math.nan, math.nan)

    def lost(right: Float[np.ndarray, " problem"], what: str) -> Interval:
        """What is lost of a share of solved problems, with an interval where there are enough."""
        if not enough:
            return nothing
        if found.stopped:
            return percent(anytime_interval(right - after))
        return accuracy.accuracy_drop(right, after, seed, what, *names)

    drop = lost(clean.astype(np.float64), "drop")
    random, excess = math.nan, nothing
    if found.random is not None:
        by_set = found.random[:, here]
        random = 100 * float(clean.mean() - by_set.mean())
        excess = lost(by_set.mean(0), "excess")
    mean = 100 * float(clean.mean() - after.mean())
    return {
        "model": found.name,
        "split": split,
        "stratum": stratum,
        "problems": int(here.sum()),
        "clean_accuracy": before.mean,
        "clean_low": before.low,
        "clean_high": before.high,
        "accuracy": then.mean,
        "low": then.low,
        "high": then.high,
        "unparsed": 100 * float(found.unparsed[here].mean()),
        "drop": mean,
        "drop_low": float(drop.low),
        "drop_high": float(drop.high),
        "relative_drop": mean / float(clean.mean()) if clean.any() else math.nan,
        "random_drop": random,
        "excess": float(excess.mean),
        "excess_low": float(excess.low),
        "excess_high": float(excess.high),
        "verdict": verdict(drop, *found.thresholds, unparsed=found.unparsed[here].mean()) if enough else "",
    }


def effect_rows(found: ProblemEffects, problems: Sequence[Problem], strata: Sequence[str]) -> list[Row]:
    """Make the table of the problems.

    Args:
        found: the effects.
        problems: all problems.
        strata: the stratum of each problem that is compared.

    Returns:
        One row per problem that is compared.
    """
    rows = []
    for i, which in enumerate(found.which.tolist()):
        row: Row = {
            "problem": which,
            "gold": problems[which].answer,
            "confidence": float(found.first.confidence[which]),
            "steps": problems[which].steps,
            "stratum": strata[i],
            "clean": int(found.clean[i]),
            "after": float(found.after[i]),
            "unparsed": float(found.unparsed[i]),
        }
        if found.random is not None:
            row["random"] = float(found.random[:, i].mean())
        rows.append(row)
    return rows


def mean_of(right: Float[np.ndarray, " problem"], seed: int, *names: str) -> Interval:
    """Accuracy in percent with an interval.

    Args:
        right: whether each problem is solved, or for what share of the seeds.
        seed: of the bootstrap.
        *names: which draws of the seed.

    Returns:
        Wilson's interval, or the bootstrap's if some problems are solved for some seeds only.
    """
    if np.isin(right, (0, 1)).all():
        return accuracy.percent_correct(right.astype(bool))
    mean = accuracy.accuracy_drop(right, np.zeros_like(right), seed, "accuracy", *names)
    return Interval(mean.mean, max(mean.low, 0.0), min(mean.high, 100.0))
