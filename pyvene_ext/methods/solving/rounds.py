"""Problems in rounds: after each round, interventions whose cost is known well enough stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from typing_extensions import override

from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.stats.stopping import FEWEST, Stopped, Stopping

Rows = list[tuple[int, int]]  # of a spec and a problem each, by their numbers


@dataclass(frozen=True)
class Rounds:
    """Which problems the specs of an evaluation take: all of them, in one round.

    Attributes:
        sizes: how many problems each spec has.
    """

    sizes: Sequence[int]

    def rows(self) -> Iterator[Rows]:
        """What is written in each round; asked for when the texts of the rounds before are known."""
        yield [(spec, problem) for spec, size in enumerate(self.sizes) for problem in range(size)]

    def problems(self, spec: int) -> Sequence[int]:
        """The problems that a spec took, in ascending order."""
        return range(self.sizes[spec])

    def marked(self, spec: int, evaluation: Evaluation) -> Evaluation:
        """An evaluation of these problems, with where the spec stopped."""
        return evaluation


@dataclass(frozen=True)
class UntilDecided(Rounds):
    """Rounds until every spec has stopped, by the outcomes of the first problems in its order, whatever the rounds are.

    Attributes:
        stops: when each spec stops; None: after all problems, which are the first round.
        untouched: gives the untouched model's solutions of all problems, once the first round is over.
        judged: gives the solutions of some problems under a spec, whose texts are known.
        stopped: where each spec stopped, by its number.
    """

    stops: Sequence[Stopping | None]
    untouched: Callable[[], Evaluation]
    judged: Callable[[int, Sequence[int]], Evaluation]
    stopped: dict[int, Stopped] = field(default_factory=dict)

    @override
    def rows(self) -> Iterator[Rows]:
        n = self.sizes[0]  # the same for all
        full = [spec for spec, stop in enumerate(self.stops) if stop is None]
        if full:
            yield [(spec, problem) for problem in range(n) for spec in full]
        clean, start = self.untouched().correct, 0
        going = {spec: (stop, stop.order(n)) for spec, stop in enumerate(self.stops) if stop is not None}
        after: dict[int, list[bool]] = {spec: [] for spec in going}
        for end in round_ends(n):
            if not going:
                return
            yield [(spec, int(order[place])) for place in range(start, end) for spec, (_, order) in going.items()]
            for spec, (stop, order) in list(going.items()):
                after[spec] += self.judged(spec, order[start:end].tolist()).correct.tolist()
                if stopped := stop.judge(clean[order], np.array(after[spec])):
                    self.stopped[spec] = stopped
                    del going[spec]
            start = end

    @override
    def problems(self, spec: int) -> Sequence[int]:
        stop = self.stops[spec]
        if stop is None:
            return range(self.sizes[spec])
        return sorted(stop.order(self.sizes[spec])[: self.stopped[spec].problems].tolist())

    @override
    def marked(self, spec: int, evaluation: Evaluation) -> Evaluation:
        if spec not in self.stopped:
            return evaluation
        return replace(evaluation, index=tuple(self.problems(spec)), stopped=self.stopped[spec])


def round_ends(n: int) -> Iterator[int]:
    """After how many of n problems rules are checked: a round is half of what came before it, so at most a third is wasted."""
    end = FEWEST
    while end < n:
        yield end
        end += end // 2
    yield n


def checked_stops(
    stop: Stopping | Sequence[Stopping | None], specs: Sequence[Any], questions: Questions, baseline: Evaluation | None
) -> list[Stopping | None]:
    """When each spec stops; the untouched model never does.

    Args:
        stop: one for all specs, or one each.
        specs: the specs.
        questions: the problems.
        baseline: the untouched model's solutions.

    Returns:
        One a spec.

    Raises:
        ValueError: there is not one for each spec, or nothing to compare with.
    """
    stops = [stop] * len(specs) if isinstance(stop, Stopping) else list(stop)
    if len(stops) != len(specs):
        raise ValueError(f"stop has {len(stops)} rules for {len(specs)} specs; give one for all, or one each.")
    if baseline is None and all(spec is not None for spec in specs):
        raise ValueError(
            "stop compares with the untouched model: give None as one of the specs, or its evaluation as baseline."
        )
    gold = tuple(problem.answer for problem in questions.problems)
    if baseline is not None and (baseline.gold != gold or baseline.index is not None):
        raise ValueError(
            f"baseline must be an evaluation of these {len(gold)} problems, all of them and in this order."
        )
    return [None if spec is None else rule for spec, rule in zip(specs, stops, strict=True)]
