"""Activation frequencies with early stopping: an intervention runs on more prompts until its interval is narrow enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel

from pyvene_ext.engine.measure import MetricLike, check_metric, first_tokens_note, first_tokens_said
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.results import Result, Shown, Summary, count, strongest
from pyvene_ext.engine.sweep.run import sweep as fast_sweep
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.seeds import rng
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
)
from pyvene_ext.stats.intervals import frequency_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Sequential(Shown):
    """Activation frequencies of interventions, each run on some of the prompts.

    Attributes:
        result: metric by intervention and prompt; NaN where an intervention was not run, and in `clean` where none was.
        frequency: share of an intervention's prompts on which it is active.
        low: lower end of its Wilson interval.
        high: upper end of its Wilson interval.
        n_prompts: how many prompts it was run on, the first ones of `order`.
        order: the prompts in the order in which they were taken.
        width: the width of interval that was asked for.
    """

    result: Result
    frequency: Float[np.ndarray, " n_interventions"]
    low: Float[np.ndarray, " n_interventions"]
    high: Float[np.ndarray, " n_interventions"]
    n_prompts: Int[np.ndarray, " n_interventions"]
    order: Int[np.ndarray, " n_prompts"]
    width: float

    @property
    def reached(self) -> Bool[np.ndarray, " n_interventions"]:
        """Which interventions have an interval of at most `width`; the others ran out of prompts."""
        return self.high - self.low <= self.width

    @property
    def facts(self) -> dict[str, float]:
        """How much was run, for the metadata of a study."""
        seen = float(self.n_prompts.mean())
        return {"width": self.width, "n_heads_reached": int(self.reached.sum()), "mean_prompts_a_head": seen}

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per intervention and prompt.

        Returns:
            That of `Result.to_frame`, with NaN where an intervention was not run, and of each intervention frequency, low, high
            and n_prompts.
        """
        columns = {name: getattr(self, name) for name in ("frequency", "low", "high", "n_prompts")}
        each = self.result.intervened.shape[1]
        return self.result.to_frame().assign(**{name: values.repeat(each) for name, values in columns.items()})

    def summarise(self) -> Summary:
        """The interventions that are active most often."""
        n = len(self.frequency)
        title = (
            f"Sequential of {self.result.metric}: {count(n, 'intervention')} on up to {count(len(self.order), 'prompt')}; "
            f"{int(self.reached.sum())} intervals are at most {self.width:g} wide"
        )
        rows = [
            (
                self.result.names[i],
                f"{self.frequency[i]:.2f}",
                f"[{self.low[i]:.2f}, {self.high[i]:.2f}]",
                str(self.n_prompts[i]),
            )
            for i in strongest(self.frequency)
        ]
        return Summary(title, ("most frequent", "frequency", "95% interval", "prompts"), rows)


def frequencies(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    tau: float,
    *,
    width: float,
    block: int = 16,
    absolute: bool = True,
    metric: MetricLike = "logit_diff",
    reference: Reference | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = True,
    sweep: Callable[..., Result] = fast_sweep,
) -> Sequential:
    """Measure how often each spec is active, |delta| > tau, on prompts in random order until its interval is narrow enough.

    After each block of prompts, specs whose Wilson interval is at most `width` wide stop; the others continue until no prompt is
    left. Intervals at such a stopping time keep their level as `width` goes to 0 (Chow & Robbins 1965; Frey 2010 compares such
    rules for proportions). Wilson's has a width of about z^2 / n even if nothing, or everything, has been active so far, so that
    a few equal outcomes do not stop a spec. Behaviour of 95% intervals at widths from 0.06 to 0.4, in blocks of 1 to 32, by exact
    recursion:

    - They cover 95% on average over all frequencies. At frequencies from 0.05 to 0.95 they cover at least 92% if the width is at
      most 0.1, 91% at 0.2 and 89% at 0.4; closer to 0 and 1 at worst 84%, like Wilson's with a fixed number of prompts.
    - The frequency itself is biased towards the nearer of 0 and 1, by at most a ninth of the width, because a share that happens
      to be extreme stops sooner. A mean over many specs would accumulate that bias, so take it from a run without stopping.

    The intervals refer to prompts like these, for each spec separately; specs share prompts, so their errors are correlated.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        prompts: the prompts to draw from.
        tau: the threshold of |delta|.
        width: of the interval, from end to end.
        block: prompts between two checks of the intervals.
        absolute: compare |delta| with tau, else delta.
        metric: as for `sweep`, except those with a value per token.
        reference: statistics that replacements are computed from; by default those of all prompts, where they are needed.
        seed: of the order of the prompts.
        confidence: level of the intervals.
        progress: show a bar.
        sweep: runs specs on some of the prompts: called like `sweep` with `subset`, the indices of these prompts; donors and
            noise must be those of the whole set.

    Returns:
        Frequencies, intervals, and the metric by intervention and prompt.

    Raises:
        ValueError: before the model runs, for a setting out of range, and for a spec that does not fit the model, the prompts or
            the reference set.
    """
    specs = as_specs(specs)
    for name, value, fits, wanted in (
        ("tau", tau, 0 <= tau < np.inf, "a finite number of 0 or more"),
        ("width", width, 0 < width <= 1, "above 0 and at most 1"),
        ("block", block, block >= 1, "at least 1"),
        ("confidence", confidence, 0 < confidence < 1, "between 0 and 1"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, not {value}.")
    metric = check_metric(model, prompts, metric, of_answers=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    reference = resolved.with_statistics(progress=progress).sources.reference

    n = len(prompts.input_ids)
    order = rng(seed, "sequential").permutation(n)
    clean = np.full(n, np.nan, np.float32)
    intervened = np.full((len(specs), n), np.nan, np.float32)
    frequency, low, high = np.empty((3, len(specs)))
    n_prompts = np.zeros(len(specs), int)
    going = np.arange(len(specs))
    left = intervened.size
    with progress_bar(left, "prompt", "frequencies", shown=progress) as bar, first_tokens_said():
        for start in range(0, n, block):
            taken, new = order[: start + block], order[start : start + block]
            part = sweep(
                model, [specs[i] for i in going], prompts, metric, reference, subset=new.tolist(), progress=False
            )
            clean[new] = part.baseline
            intervened[np.ix_(going, new)] = part.intervened
            delta = clean[taken] - intervened[np.ix_(going, taken)]
            active = (np.abs(delta) if absolute else delta) > tau
            frequency[going], low[going], high[going] = frequency_interval(active, confidence=confidence)
            n_prompts[going] = len(taken)
            stops = high[going] - low[going] <= width
            bar.update(len(going) * len(new))
            left -= int(stops.sum()) * (n - len(taken))
            bar.total = left
            going = going[~stops]
            if not going.size:
                break
        bar.refresh()
    result = Result(
        resolved.names, metric.label, clean, intervened, specs=resolved.specs, note=first_tokens_note(metric, prompts)
    )
    return Sequential(result, frequency, low, high, n_prompts, order, width)
