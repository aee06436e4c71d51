"""Stopping a comparison of accuracies as soon as it is decided: an interval that may be looked at after every problem.

An interval for a fixed number of problems, checked after each of them until it says what one hopes for, is wrong far more often
than it claims. The interval here is a confidence sequence: it covers at all numbers of problems simultaneously, so that one may
stop at any. It is that of betting (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by
betting", JRSS B 86(1), section 4): against "the mean of x in [-1, 1] is at most m", the capital

    prod_i (1 + c (x_i - m) / (1 + m)),   0 < c < 1,

does not grow on average if that is true, so that by Ville's inequality it ever reaches 1/a with a probability of at most a. The
lower end is the least m against which it has not reached 1/a; the upper end is that of -x. The stake c is not chosen by the data:
the capital is the mean over a fixed set of stakes (as in Cover's universal portfolios, 1991), a quarter of it on the largest,
which needs the fewest problems to show that nothing changes. So the capital depends on how often each value occurred, not on
their order, and a larger x_i makes it larger: what the problems that are left can still show is seen from their best and worst
outcomes.

The mean is that over problems like these, as in the other intervals of `stats`: the problems are taken in a random order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from pyvene_ext.io.bounds import whole_number
from pyvene_ext.io.seeds import rng
from pyvene_ext.stats.intervals import Interval
from pyvene_ext.stats.thresholds import check_thresholds

FEWEST = 16  # problems, unless there are fewer: before them, nothing is given up as undecided
EVEN, LARGEST = 32, 0.999  # stakes evenly spaced between 0 and 1, and the largest
STAKES = np.array([*(np.arange(EVEN) + 0.5) / EVEN, LARGEST])
WEIGHTS = np.array([*np.full(EVEN, 0.75 / EVEN), 0.25])
HALVINGS = 32  # of an interval of length 2 when an end is searched for
MANY = 10_000  # problems, more than which no threshold is said to need

Verdict = Literal["above", "below", "narrow", "undecided"]


def anytime_interval(
    values: Num[np.ndarray, " problem"], low: float = -1.0, high: float = 1.0, confidence: float = 0.95
) -> Interval:
    """The mean of bounded values with an interval that stays valid when it decides how many values are taken.

    Args:
        values: one number per problem, in random order; at least one.
        low: the least value that is possible.
        high: the largest.
        confidence: with which the intervals after 1, 2, 3 ... values all hold the mean.

    Returns:
        Mean and ends of the interval, in the values' unit.

    Raises:
        ValueError: no values, or one outside the bounds.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not ((low <= values) & (values <= high)).all():
        raise ValueError(
            f"values must be a vector of one or more numbers from {low:g} to {high:g}, not {values.tolist()[:5]} ..."
        )
    support, counts = np.unique((2 * values - low - high) / (high - low), return_counts=True)
    ends = _ends(support, counts.astype(np.float64), confidence)
    return Interval(float(values.mean()), *(float(low + (end + 1) * (high - low) / 2) for end in ends))


@dataclass(frozen=True)
class Stopped:
    """Where a comparison stopped.

    Attributes:
        verdict: above or below, if the whole interval of the drop is above or below a threshold of `decide`; narrow, if it is
            narrower than `width`; undecided, if the problems that were left could not have decided it, or there were none.
        problems: how many problems it took.
        of: how many there were.
        drop: loss of accuracy on these problems in points, with its interval (`anytime_interval`).
    """

    verdict: Verdict
    problems: int
    of: int
    drop: Interval

    def __str__(self) -> str:
        """One line, such as "above after 12 of 400 problems: 91.7 points [18.3, 99.9]"."""
        mean, low, high = self.drop
        return f"{self.verdict} after {self.problems} of {self.of} problems: {mean:.1f} points [{low:.1f}, {high:.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Stopped:
        """Convert back what `as_dict` returned."""
        return cls(**{**record, "drop": Interval(*record["drop"])})


@dataclass(frozen=True)
class Stopping:
    """When an intervention needs no more problems, because what it costs is known well enough.

    The number of problems is the least after which one of these holds: the interval of the drop is above the upper threshold, or
    below the lower one; it is narrower than `width`; or, without `width`, no outcomes of the problems that are left would bring
    the interval above or below a threshold.

    Attributes:
        decide: an upper and a lower threshold, in points of accuracy; they may be equal.
        width: of the interval from end to end, in points.
        most: take at most this many problems.
        seed: of the order of the problems.
        confidence: of each interval.

    Raises:
        ValueError: a value out of range, or nothing by which to stop.
    """

    decide: tuple[float, float] | None = None
    width: float | None = None
    most: int | None = None
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.decide is None and self.width is None and self.most is None:
            raise ValueError("there is nothing by which to stop; give decide, width or most.")
        if self.decide is not None:
            object.__setattr__(self, "decide", check_thresholds(self.decide, "decide"))
        if self.width is not None and not 0 < self.width <= 200:
            raise ValueError(f"width must be above 0 and at most 200 points, not {self.width}.")
        if self.most is not None:
            whole_number("most", self.most, 2)
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, not {self.confidence}.")

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data, as a condition of kept results."""
        return asdict(self)

    def order(self, n: int) -> Int[np.ndarray, " problem"]:
        """The order in which problems are taken, the same for all that have this seed.

        Args:
            n: how many there are.

        Returns:
            Their indices.
        """
        return rng(self.seed, "order of problems").permutation(n)

    def judge(self, clean: Bool[np.ndarray, " problem"], after: Bool[np.ndarray, " first"]) -> Stopped | None:
        """Look at what is known so far.

        Args:
            clean: whether the untouched model solved each problem, all of them in the order in which they are taken.
            after: whether the first ones were solved under the intervention.

        Returns:
            Where the comparison stopped, which may be before the last of these problems; None if it needs more.
        """
        clean = np.asarray(clean, np.int64)[: self.most]
        after = np.asarray(after, np.int64)[: len(clean)]
        known, total = len(after), len(clean)
        drops = clean[:known] - after
        for n, verdict in self._decided(drops):
            return self._stopped(verdict, drops[:n], total)
        if self.decide is not None and self.width is None and not self._reachable(clean, drops):
            # What cannot be reached after some problems cannot be reached after more.
            least, most = min(FEWEST, total), known
            while least < most:
                middle = (least + most) // 2
                least, most = (middle + 1, most) if self._reachable(clean, drops[:middle]) else (least, middle)
            if least <= known:
                return self._stopped("undecided", drops[:least], total)
        return self._stopped("undecided", drops, total) if known == total else None

    def least(self) -> tuple[float, float]:
        """How many problems the thresholds of `decide` need at least.

        Returns:
            Problems that are all lost, before the drop is above the upper threshold; and problems of which none changes, before
            it is below the lower one, or infinity.
        """
        assert self.decide is not None
        lost, same = np.ones(MANY, np.int64), np.zeros(MANY, np.int64)
        above, below = (int(at.argmax()) + 1 if at.any() else np.inf for at in (self._above(lost), self._below(same)))
        return above, below

    def _decided(self, drops: Int[np.ndarray, " first"]) -> list[tuple[int, Verdict]]:
        """The least number of problems after which the interval stops the comparison, and why; empty if it does not."""
        reasons: list[tuple[Verdict, Bool[np.ndarray, " first"]]] = []
        if self.decide is not None:
            reasons += [("above", self._above(drops)), ("below", self._below(drops))]
        if self.width is not None:
            low, high = _ends(VALUES, _counts(drops), self.confidence)
            reasons.append(("narrow", 100 * (high - low) <= self.width))
        found = [(int(at.argmax()) + 1, verdict) for verdict, at in reasons if at.any()]
        return [min(found, key=lambda one: one[0])] if found else []

    def _above(self, drops: Int[np.ndarray, " first"]) -> Bool[np.ndarray, " first"]:
        assert self.decide is not None
        return _log_capital(VALUES, _counts(drops), np.array(self.decide[0] / 100)) >= self._enough

    def _below(self, drops: Int[np.ndarray, " first"]) -> Bool[np.ndarray, " first"]:
        assert self.decide is not None
        return _log_capital(-VALUES, _counts(drops), np.array(-self.decide[1] / 100)) >= self._enough

    @property
    def _enough(self) -> float:
        return float(np.log(2 / (1 - self.confidence)))

    def _reachable(self, clean: Int[np.ndarray, " problem"], drops: Int[np.ndarray, " first"]) -> bool:
        """Whether some outcomes of the other problems would decide: all lost, or all solved."""
        rest, known = clean[len(drops) :], len(drops)
        return bool(
            self._above(np.concatenate([drops, rest]))[known:].any()
            or self._below(np.concatenate([drops, rest - 1]))[known:].any()
        )

    def _stopped(self, verdict: Verdict, drops: Int[np.ndarray, " first"], of: int) -> Stopped:
        interval = anytime_interval(drops, confidence=self.confidence)
        return Stopped(verdict, len(drops), of, Interval(*(100 * end for end in interval)))


VALUES = np.array([-1.0, 0.0, 1.0])  # of a problem: solved only under the intervention; the same; solved only without


def _counts(drops: Int[np.ndarray, " first"]) -> Float[np.ndarray, "first 3"]:
    """How often each of `VALUES` occurs among the first 1, 2, 3 ... problems."""
    return np.cumsum(drops[:, None] == VALUES, 0).astype(np.float64)


def _log_capital(
    support: Float[np.ndarray, " value"], counts: Float[np.ndarray, "*at value"], m: Float[np.ndarray, "*#at"]
) -> Float[np.ndarray, "*at"]:
    """Log of the capital against "the mean is at most m", from how often each value occurred."""
    m = np.maximum(m, -1 + 1e-12)[..., None, None]
    grown = np.einsum("...v,...vs->...s", counts, np.log1p(STAKES * ((support[:, None] - m) / (1 + m))))
    most = grown.max(-1)
    return most + np.log(np.exp(grown - most[..., None]) @ WEIGHTS)


def _ends(
    support: Float[np.ndarray, " value"], counts: Float[np.ndarray, "*at value"], confidence: float
) -> tuple[Float[np.ndarray, "*at"], Float[np.ndarray, "*at"]]:
    """Lower and upper ends of the interval of a mean in [-1, 1], each found by halving."""
    enough = np.log(2 / (1 - confidence))

    def least(support: Float[np.ndarray, " value"]) -> Float[np.ndarray, "*at"]:
        # The capital falls with m, and is at most 1 at the mean.
        low, high = np.full(counts.shape[:-1], -1.0), counts @ support / counts.sum(-1)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            refuted = _log_capital(support, counts, middle) >= enough
            low, high = np.where(refuted, middle, low), np.where(refuted, high, middle)
        return low

    return least(support), -least(-support)
