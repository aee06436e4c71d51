"""Activation frequencies with early stopping: an intervention takes no more prompts once its interval is narrow enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm
from transformers import PreTrainedModel

from pyvene_ext.engine.plain import Result, check_metric
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep.run import sweep as fast_sweep
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.seeds import rng
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
)
from pyvene_ext.stats.intervals import frequency_interval


@dataclass(frozen=True)
class Sequential:
    """Activation frequencies of interventions that saw some of the prompts each.

    Attributes:
        result: metric by intervention and prompt; NaN where an intervention was not run, and in `clean` where none was.
        frequency: share of an intervention's prompts on which it is active.
        low, high: its Wilson interval.
        n_prompts: how many prompts it saw, the first ones of `order`.
        order: the prompts as they were taken.
        width: how narrow an interval was asked for.
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
        """Whose interval is as narrow as asked; the others ran out of prompts."""
        return self.high - self.low <= self.width


def frequencies(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    tau: float,
    *,
    width: float,
    block: int = 16,
    absolute: bool = True,
    metric: str = "logit_diff",
    reference: Reference | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = True,
    sweep: Callable[..., Result] = fast_sweep,
) -> Sequential:
    """How often each spec is active, |delta| > tau, on prompts taken in random order until its interval is narrow enough.

    After each block of prompts the specs whose Wilson interval is at most `width` wide stop; the others go on until no prompt is
    left. Intervals at such a stopping time keep their level as `width` goes to 0 (Chow & Robbins 1965; Frey 2010 compares the
    rules for shares). Wilson's has a width of about z^2 / n even where nothing, or everything, was active so far, so that a few
    equal outcomes stop nobody. What 95% intervals do at widths from 0.06 to 0.4, in blocks of 1 to 32, by exact recursion:

    - They cover 95% on average over all frequencies. At frequencies from 0.05 to 0.95 they cover at least 92% where the width is
      at most 0.1, 91% at 0.2 and 89% at 0.4; nearer to 0 and 1 84% at the worst, as Wilson's does with a fixed number of prompts.
    - The frequency itself is biased towards the nearer of 0 and 1, by a ninth of the width at most: a share that happens to be
      extreme stops sooner. A mean over many specs shows that, and so should come from a run without stopping.

    The intervals are about prompts like these, each spec's by itself: specs share prompts and so err together.

    Args:
        tau: the threshold.
        width: of the interval, from end to end.
        block: prompts between two looks at the intervals.
        absolute: compare |delta| with tau, else delta.
        reference: statistics to replace by; if some are needed and none are given, those of all the prompts.
        seed: of the prompts' order.
        confidence: of the intervals.
        sweep: what runs specs on some of the prompts: called like `runner.run` with `subset`, the indices of the prompts to run;
            donors and noise must be those of the whole set.

    Raises ValueError, before the model runs, for a setting that makes no sense, and for a spec that does not fit the model, the
    prompts or the reference set.
    """
    specs = as_specs(specs)
    for name, value, fits, wanted in (
        ("tau", tau, 0 <= tau < np.inf, "a finite number from 0 on"),
        ("width", width, 0 < width <= 1, "above 0 and at most 1"),
        ("block", block, block >= 1, "at least 1"),
        ("confidence", confidence, 0 < confidence < 1, "between 0 and 1"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, not {value}.")
    check_metric(model, prompts, metric)
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
    with tqdm(total=left, desc="frequencies", unit="prompt", disable=not progress) as bar:
        for start in range(0, n, block):
            taken, new = order[: start + block], order[start : start + block]
            part = sweep(
                model, [specs[i] for i in going], prompts, metric, reference, subset=new.tolist(), progress=False
            )
            clean[new] = part.clean
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
    result = Result(resolved.names, metric, clean, intervened)
    return Sequential(result, frequency, low, high, n_prompts, order, width)
