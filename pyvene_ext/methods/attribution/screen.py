"""Attribution patching as a screen: first-order estimates for every intervention, exact runs for those that could matter.

The estimate (Nanda 2023; AtP in Kramar et al. 2024) linearises the metric around the clean run, so that all specs share one
forward and one backward pass. It is not a bound: where the model is far from linear (a saturated softmax, a norm, effects that
cancel) an ablation may matter although its estimate is small. The clearest case is zeroing the whole residual stream: the norm
that follows ignores its length, so that after the last block the estimate is 0. Therefore `screened` also measures, on a random
subset of what the screen rejects, what share of the interventions that matter it has caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.stats import hypergeom
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from modelcards import FIELD_NAMES, Taps, card_of, dimensions
from pyvene_ext.engine.measure import Metric, MetricLike, check_metric, first_tokens_said
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.results import Result, Shown, Summary
from pyvene_ext.engine.sweep.run import sweep as fast_sweep
from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.gradients import check_differentiable, check_places, gradients_at, metric_total
from pyvene_ext.models.devices import broadcast_from_main
from pyvene_ext.models.hooks import SIDE_BY_SIDE, record_activations, split_heads
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
    members,
)
from pyvene_ext.stats.intervals import Interval
from pyvene_ext.stats.tables import interval_columns

if TYPE_CHECKING:
    import pandas as pd

UNIFORM_Z_INPUTS = ("attention_scores", "head_value_output")  # what the z of uniform attention is computed from
MIN_CHECKED = 20  # rejected interventions run exactly; fewer say next to nothing about the recall


def estimate(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    reference: Reference | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "n_interventions n_prompts"]:
    """Estimate `run(...).delta` to first order, from one forward and one backward pass per batch, whatever the number of specs.

    delta = clean - intervened is estimated by the sum over the edited entries of (old - new) * d metric / d old, with old and the
    gradient from the clean run, products and sums in float32. A joint spec is the sum over its members. Ablated scores count
    where they act, in z: zero is a z of 0, mean is the z of uniform attention. No parameter gets a gradient.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        prompts: the prompts that are intervened on.
        metric: as for `run`, one differentiable number per prompt: logit_diff, probability, logit, or a function.
        reference: statistics that replacements are computed from; by default those of `prompts`, where they are needed.
        batch_size: prompts per forward and backward pass.
        progress: show a bar.

    Returns:
        The estimates.

    Raises:
        ValueError: before the model runs, for a metric without a useful gradient, and for a spec that does not fit the model, the
            prompts or the reference set.
    """
    metric, resolved = _resolve(model, specs, prompts, metric, reference)
    return estimate_resolved(resolved, metric, batch_size=batch_size, progress=progress)


def estimate_resolved(
    resolved: Resolved, metric: Metric, *, batch_size: int = 8, progress: bool = True
) -> Float32[np.ndarray, "n_interventions n_prompts"]:
    """Estimate specs that are already resolved and checked, as `estimate` does.

    Args:
        resolved: the specs on the prompts.
        metric: the metric, checked.
        batch_size: prompts per forward and backward pass.
        progress: show a bar.

    Returns:
        The estimates.
    """
    model, prompts = resolved.model, resolved.prompts
    resolved = resolved.with_statistics(batch_size=batch_size, progress=progress)
    joint = [members(spec) for spec in resolved.specs]
    estimates = np.empty((len(joint), len(prompts)), np.float32)
    bar = progress_bar(len(prompts), "prompt", "estimates", shown=progress)
    with bar, evaluating(model), torch.inference_mode(False):
        # No gradients of parameters: the graph starts at the first place that is edited.
        model.requires_grad_(False)
        # Padded on the right: no real token sees padding, and every query sees a key (else gradients could be NaN).
        for batch in prompts.batches(batch_size, "right"):
            linearisation = _linearise(model, [edit for spec in joint for edit in spec], batch, metric)
            with torch.no_grad():
                for number, spec in enumerate(joint):
                    parts = [_first_order(edit, linearisation, batch, resolved) for edit in spec]
                    estimates[number, batch.index] = torch.stack(parts).sum(0).numpy()
            bar.update(len(batch.index))
    return estimates


def _resolve(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike,
    reference: Reference | None,
) -> tuple[Metric, Resolved]:
    """Resolve specs after checking that they and the metric have a first-order estimate."""
    specs, metric = as_specs(specs), check_metric(model, prompts, metric)
    check_differentiable(metric, model.dtype)
    for edit in (edit for spec in specs for edit in members(spec)):
        if not edit.has_first_order:
            raise ValueError(f"{edit.name}: {edit.what} has no first-order estimate; run it with sweep.")
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    check_places(model, specs)
    return metric, resolved


@dataclass(frozen=True)
class _Linearisation:
    """The clean run of one batch: activations and the metric's gradient by place, and the z of uniform attention by layer."""

    old: dict[Place, Float[Tensor, "batch pos *head d"]]
    gradient: dict[Place, Float[Tensor, "batch pos *head d"]]
    uniform: dict[int, Float[Tensor, "batch pos head d_head"]]
    _kept: dict[tuple[Place, Positions], _Edited] = field(default_factory=dict)

    def edited(self, edit: OneSpec, tokens: Sequence[Sequence[int]]) -> _Edited:
        """What belongs to the tokens that an edit changes, once for the edits of all heads."""
        key = edit.first_order_place, edit.positions
        if key not in self._kept:
            columns = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
            real = pad_sequence([torch.ones(len(row)) for row in tokens], batch_first=True)
            rows = torch.arange(len(tokens))[:, None]
            of_both = (x[key[0]][rows, columns].float() for x in (self.old, self.gradient))
            self._kept[key] = _Edited(rows, columns, real, *of_both)
        return self._kept[key]


class _Edited(NamedTuple):
    """Rows and columns of the edited tokens, which of them are not padding, and activations and gradient there."""

    rows: Int[Tensor, "batch 1"]
    columns: Int[Tensor, "batch edited"]
    real: Float[Tensor, "batch edited"]
    old: Float[Tensor, "batch edited *head d"]
    gradient: Float[Tensor, "batch edited *head d"]


def _linearise(model: PreTrainedModel, edits: list[OneSpec], batch: Batch, metric: Metric) -> _Linearisation:
    """One forward and one backward pass."""
    card, sizes = card_of(model), dimensions(model.config)
    places = dict.fromkeys(edit.first_order_place for edit in edits)
    uniform = dict.fromkeys(edit.layer or 0 for edit in edits if edit.is_uniform)
    # All heads concatenated: a slice would not be part of the graph.
    named = {place: SIDE_BY_SIDE.get(place[0], FIELD_NAMES[place[0]]) for place in places}
    kept = [(component, place[1] or 0) for place, component in named.items()]
    with ExitStack() as hooks, torch.enable_grad():
        # Which keys are visible is read where the edit itself would read it.
        inputs = [(component, layer) for component in UNIFORM_Z_INPUTS for layer in uniform]
        hooks.enter_context(Taps(model, card, [*kept, *inputs]))
        seen_inputs = record_activations(model, inputs, hooks)
        seen = record_activations(model, kept, hooks, graph=True)
        total = metric_total(metric, model, batch)
    old = [seen[named[place], place[1] or 0] for place in named]
    gradient = gradients_at(total, old)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, sizes["d_head"]))

    def uniform_z(layer: int) -> Tensor:
        scores, values = (split_heads(seen_inputs[where, layer].detach(), where, model) for where in UNIFORM_Z_INPUTS)
        visible, values = (scores[:, 0] > -torch.inf).float(), values.float()  # visible: the same for every head
        mean = torch.einsum("bqk,bhkd->bqhd", visible / visible.sum(-1, keepdim=True), values)
        return mean.repeat_interleave(sizes["n_head"] // sizes["n_kv_head"], dim=2)

    def by_place(tensors: Iterable[Tensor]) -> dict[Place, Tensor]:
        parts = {p: split_heads(x.detach(), named[p], model) for p, x in zip(named, tensors, strict=True)}
        return {p: by_head(x) if p[0] in SIDE_BY_SIDE else x for p, x in parts.items()}

    return _Linearisation(by_place(old), by_place(gradient), {layer: uniform_z(layer) for layer in uniform})


def _first_order(
    edit: OneSpec, linearisation: _Linearisation, batch: Batch, resolved: Resolved
) -> Float[Tensor, " batch"]:
    """The sum of (old - new) * gradient over what one edit changes, on the CPU."""
    found = linearisation.edited(edit, resolved.tokens_of(edit, batch.index))
    old, gradient = (x if edit.heads is None else x[:, :, list(edit.heads)] for x in (found.old, found.gradient))
    if edit.is_uniform:
        uniform = linearisation.uniform[edit.layer or 0][found.rows, found.columns].float()
        new = uniform if edit.heads is None else uniform[:, :, list(edit.heads)]
    else:
        values = resolved.replacements(edit, batch.index)
        padded = None if values is None else pad_sequence([value.float() for value in values], batch_first=True)
        new = edit.apply(old, None if padded is None else padded.to(old.device))
    by_token = ((old - new) * gradient).flatten(2).sum(-1)
    return (by_token.cpu() * found.real).sum(-1)


@dataclass(frozen=True, repr=False)
class Screen(Shown):
    """The result of a screen; an intervention is active if |delta| > tau on at least one prompt.

    Attributes:
        result: of the interventions that were run exactly; for the others `intervened` is NaN.
        estimates: first-order estimates of delta, for all interventions.
        could_matter: |estimate| > margin * tau on at least one prompt, or NaN: all of these were run exactly.
        checked: a random subset of the others, run exactly to measure what the screen misses.
        tau: the threshold of |delta|.
        margin: the threshold of |estimate|, as a share of tau.
    """

    result: Result
    estimates: Float32[np.ndarray, "n_interventions n_prompts"]
    could_matter: Bool[np.ndarray, " n_interventions"]
    checked: Int[np.ndarray, " n_checked"]
    tau: float
    margin: float

    @property
    def exact(self) -> Bool[np.ndarray, " n_interventions"]:
        """Which interventions were run exactly."""
        run_exactly = self.could_matter.copy()
        run_exactly[self.checked] = True
        return run_exactly

    @cached_property
    def active(self) -> Bool[np.ndarray, " n_interventions"]:
        """Which interventions are known to be active; those not run exactly are unknown and count as inactive."""
        return (np.abs(self.result.delta) > self.tau).any(1)  # NaN > tau is False

    @property
    def caught(self) -> int:
        """How many active interventions the screen caught."""
        return int((self.active & self.could_matter).sum())

    @property
    def missed(self) -> int:
        """How many of the checked interventions are active."""
        return int(self.active[self.checked].sum())

    @property
    def recall(self) -> Interval | None:
        """The share of the active interventions that the screen caught, with a 95% interval; None if none was found active.

        caught / (caught + missed * n_rejected / n_checked), where n_rejected is how many the screen rejected. `caught` is
        counted; only the number of active ones among the rejected is estimated. The checked ones are drawn without replacement,
        so `missed` is hypergeometric, and the interval inverts its two tails (2.5% each): at least 95% of all draws cover the
        true recall for these specs on these prompts. Its width is 0 if all were checked, and positive if no miss was found but
        not all were checked, which a bootstrap or a normal approximation would not give.
        """
        if not self.caught + self.missed:
            return None
        rejected = int((~self.could_matter).sum())
        total = np.array(
            [
                self.missed * rejected / max(1, len(self.checked)),
                *_hypergeometric_interval(self.missed, len(self.checked), rejected),
            ]
        )
        recall, high, low = self.caught / (self.caught + total) if self.caught else np.zeros(3)
        return Interval(float(recall), float(low), float(high))

    @property
    def precision(self) -> float | None:
        """The share of active ones among the interventions that could matter; None if none could matter."""
        return float(self.active[self.could_matter].mean()) if self.could_matter.any() else None

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per intervention and prompt.

        Returns:
            That of `Result.to_frame`, with NaN where an intervention was not run, the estimate of delta, and could_matter.
        """
        flagged = self.could_matter.repeat(self.estimates.shape[1])
        return self.result.to_frame().assign(estimate=self.estimates.ravel(), could_matter=flagged)

    def summarise(self) -> Summary:
        """What the screen caught and missed, and the strongest interventions of those that were run."""
        of_result = self.result.summarise()
        return of_result._replace(title=f"{self.summary()}\n{of_result.title}")

    @property
    def facts(self) -> dict[str, float | None]:
        """How much was run, and what the screen caught, for the metadata of a study."""
        recall = self.recall or Interval(None, None, None)  # None: nothing is active
        return {
            "margin": self.margin,
            "n_heads_run": int(self.exact.sum()),
            "n_could_matter": int(self.could_matter.sum()),
            "n_caught": self.caught,
            "n_checked": len(self.checked),
            "n_missed": self.missed,
            **interval_columns("recall", recall),
        }

    def summary(self) -> str:
        """Summarise the screen in three lines."""
        n, flagged, checked = len(self.could_matter), int(self.could_matter.sum()), len(self.checked)
        recall = (
            "not measurable: nothing that was run exactly is active"
            if (r := self.recall) is None
            else f"{r.mean:.3f} (95% interval {r.low:.3f} to {r.high:.3f})"
        )
        largest = np.abs(self.result.delta[self.checked]).max(initial=0.0)
        return (
            f"screen: |estimate| > {self.margin:g} x {self.tau:g} on some prompt for {flagged} of {n} interventions, of which "
            f"{self.caught} are active (|delta| > {self.tau:g})\n"
            f"check: {checked} of the other {n - flagged} run too, of which {self.missed} are active; their largest |delta| is "
            f"{largest:.3g}\n"
            f"recall: {recall}"
        )


def screened(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    tau: float,
    metric: MetricLike = "logit_diff",
    reference: Reference | None = None,
    *,
    margin: float = 0.5,
    check: float = 0.1,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    sweep: Callable[..., Result] = fast_sweep,
) -> Screen:
    """Estimate every spec, run those that could matter exactly, and run a random subset of the others to measure the recall.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        prompts: the prompts that are intervened on.
        tau: a spec is active if |delta| > tau on at least one prompt.
        metric: as for `run`, one differentiable number per prompt: logit_diff, probability, logit, or a function.
        reference: statistics that replacements are computed from; by default those of `prompts`, where they are needed.
        margin: a spec could matter if |estimate| > margin * tau on at least one prompt. Smaller catches more and costs more.
        check: share of the others that is run too, but at least 20 of them (or all, if there are fewer).
        seed: of that choice.
        batch_size: prompts per forward and backward pass of the estimates.
        progress: show bars.
        sweep: runs specs exactly; called like `sweep`.

    Returns:
        Estimates, exact results, and what the screen caught and missed.

    Raises:
        ValueError: before the model runs, for what `estimate` refuses, and for a threshold, margin or share out of range.
    """
    for name, value, highest in (("tau", tau, np.inf), ("margin", margin, np.inf), ("check", check, 1.0)):
        if not 0 <= value <= highest or value == np.inf:
            raise ValueError(
                f"{name} must be {'from 0 to 1' if highest == 1 else 'a finite number of 0 or more'}, not {value}."
            )
    metric, resolved = _resolve(model, specs, prompts, metric, reference)
    resolved = resolved.with_statistics(batch_size=batch_size, progress=progress)
    specs, reference = resolved.specs, resolved.sources.reference
    # Computed by one process for all: which specs run exactly must not depend on a last bit that differs between two GPUs.
    estimates = broadcast_from_main(
        lambda: estimate_resolved(resolved, metric, batch_size=batch_size, progress=progress)
    )
    could_matter = ~(np.abs(estimates) <= margin * tau).all(1)  # also true for NaN
    rejected = np.flatnonzero(~could_matter)
    n_checked = min(len(rejected), max(MIN_CHECKED, int(np.ceil(check * len(rejected)))))
    checked = np.sort(rng(seed, "screen").permutation(rejected)[:n_checked])
    chosen = np.sort(np.concatenate([np.flatnonzero(could_matter), checked]))
    with first_tokens_said():
        exact = sweep(model, [specs[i] for i in chosen], prompts, metric, reference, progress=progress)
    intervened = np.full_like(estimates, np.nan)
    intervened[chosen] = exact.intervened
    result = Result(resolved.names, metric.label, exact.baseline, intervened, specs=resolved.specs, note=exact.note)
    return Screen(result, estimates, could_matter, checked, tau, margin)


def _hypergeometric_interval(found: int, drawn: int, population: int, confidence: float = 0.95) -> tuple[int, int]:
    """The exact interval for the number of positives in a population, given `found` among `drawn` without replacement."""
    tail = (1 - confidence) / 2
    if drawn == population:
        return found, found
    possible = np.arange(found, population - drawn + found + 1)
    at_least = hypergeom.sf(found - 1, population, possible, drawn)
    at_most = hypergeom.cdf(found, population, possible, drawn)
    plausible = possible[(at_least > tail) & (at_most > tail)]
    return int(plausible.min()), int(plausible.max())
