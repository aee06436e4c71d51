"""Attribution patching as a screen: first-order estimates for every intervention, exact runs for those that could matter.

The estimate (Nanda 2023; the AtP of Kramar et al. 2024) takes the metric as linear around the clean run, so that all specs share
one forward and one backward pass. It is no bound: where the model is far from linear (a saturated softmax, a norm, effects that
cancel) an ablation may matter and its estimate be small. Zeroing a whole residual stream is the plainest case: a norm behind it
ignores its length, so that after the last block the estimate is 0. So `screened` also measures, on a random subset of what the
screen sets aside, what share of the interventions that matter it has caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.stats import hypergeom
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import FIELD_NAMES, Taps, card_of, dimensions
from pyvene_ext.engine.plain import (
    METRICS,
    Result,
    check_metric,
)
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.sweep.run import sweep as fast_sweep
from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.gradients import answer_logits, check_gradient, check_places
from pyvene_ext.models.devices import broadcast_from_main
from pyvene_ext.models.hooks import SIDE_BY_SIDE, record_activations, split_heads
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
    members,
)
from pyvene_ext.stats.intervals import Interval

BESIDE = ("attention_scores", "head_value_output")  # of which uniform attention is made
DIFFERENTIABLE = ("logit_diff", "probability", "logit")
LEAST_CHECKED = 20  # of what is set aside: fewer say next to nothing about the recall


def estimate(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: str = "logit_diff",
    reference: Reference | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "n_interventions n_prompts"]:
    """First-order estimates of `run(...).delta`, from one forward and one backward pass a batch, however many specs there are.

    delta = clean - intervened is estimated by the sum over the edited entries of (old - new) * d metric / d old, with old and the
    gradient from the clean run, products and sums in float32. A joint spec is the sum over its members. Ablated scores count
    where they act, in z: zero is a z of 0, mean the z of uniform attention. The arguments are those of `runner.run`. The model
    is left as it was and no parameter gets a gradient.

    Raises ValueError, before the model runs, for a metric without a useful first order, and for a spec that does not fit the
    model, the prompts or the reference set.
    """
    resolved = _resolved(model, specs, prompts, metric, reference)
    return estimate_resolved(resolved, metric, batch_size=batch_size, progress=progress)


def estimate_resolved(
    resolved: Resolved, metric: str, *, batch_size: int = 8, progress: bool = True
) -> Float32[np.ndarray, "n_interventions n_prompts"]:
    """`estimate` of what is resolved and checked already."""
    model, prompts = resolved.model, resolved.prompts
    resolved = resolved.measured(batch_size=batch_size, progress=progress)
    joint = [members(spec) for spec in resolved.specs]
    estimates = np.empty((len(joint), len(prompts)), np.float32)
    bar = tqdm(total=len(prompts), desc="estimates", unit="prompt", disable=not progress)
    with bar, evaluating(model), torch.inference_mode(False):
        # Nothing is kept for parameters, and a graph starts at the first place that is edited.
        model.requires_grad_(False)
        # Padded on the right: no real token sees padding, and no query is without a key, which could make a gradient NaN.
        for batch in prompts.batches(batch_size, "right"):
            line = _linearise(model, [edit for spec in joint for edit in spec], batch, metric)
            with torch.no_grad():
                for number, spec in enumerate(joint):
                    parts = [_first_order(edit, line, batch, resolved) for edit in spec]
                    estimates[number, batch.index] = torch.stack(parts).sum(0).numpy()
            bar.update(len(batch.index))
    return estimates


def _resolved(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: str,
    reference: Reference | None,
) -> Resolved:
    """The specs on the prompts, once it is known that they and the metric have a first order."""
    specs = as_specs(specs)
    if metric in METRICS and metric not in DIFFERENTIABLE:
        why = "kl to the clean run is of second order" if metric == "kl" else f"{metric!r} has no gradient"
        raise ValueError(f"{why}, so it has no first-order estimate; screen by {' or '.join(DIFFERENTIABLE)}.")
    for edit in (edit for spec in specs for edit in members(spec)):
        if not edit.has_first_order:
            raise ValueError(f"{edit.name}: {edit.what} has no first-order estimate; run it with sweep.")
    check_metric(model, prompts, metric)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    check_gradient(metric, model.dtype)
    check_places(model, specs)
    return resolved


@dataclass(frozen=True)
class _Line:
    """The clean run of one batch: what there is at every edited place, the metric's gradient there, and by layer uniform z."""

    old: dict[Place, Float[Tensor, "batch pos *head d"]]
    gradient: dict[Place, Float[Tensor, "batch pos *head d"]]
    uniform: dict[int, Float[Tensor, "batch pos head d_head"]]


def _linearise(model: PreTrainedModel, edits: list[OneSpec], batch: Batch, metric: str) -> _Line:
    """One forward and one backward pass."""
    card, sizes = card_of(model), dimensions(model.config)
    places = dict.fromkeys(edit.linear_place for edit in edits)
    uniform = dict.fromkeys(edit.layer or 0 for edit in edits if edit.is_uniform)
    # All heads side by side: a part of a tensor would be no part of the graph.
    named = {place: SIDE_BY_SIDE.get(place[0], FIELD_NAMES[place[0]]) for place in places}
    kept = [(component, place[1] or 0) for place, component in named.items()]
    with ExitStack() as hooks, torch.enable_grad():
        # Which keys a query may see is read where the edit itself would read it.
        beside = [(component, layer) for component in BESIDE for layer in uniform]
        hooks.enter_context(Taps(model, card, [*kept, *beside]))
        seen_beside = record_activations(model, beside, hooks)
        seen = record_activations(model, kept, hooks, graph=True)
        total = METRICS[metric](answer_logits(model, batch), batch, None).sum()
    old = [seen[named[place], place[1] or 0] for place in named]
    gradient = torch.autograd.grad(total, old)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, sizes["d_head"]))

    def uniform_z(layer: int) -> Tensor:
        scores, values = (split_heads(seen_beside[where, layer].detach(), where, model) for where in BESIDE)
        visible, values = (scores[:, 0] > -torch.inf).float(), values.float()  # visible: the same for every head
        mean = torch.einsum("bqk,bhkd->bqhd", visible / visible.sum(-1, keepdim=True), values)
        return mean.repeat_interleave(sizes["n_head"] // sizes["n_kv_head"], dim=2)

    def by_place(tensors: Iterable[Tensor]) -> dict[Place, Tensor]:
        parts = {p: split_heads(x.detach(), named[p], model) for p, x in zip(named, tensors, strict=True)}
        return {p: by_head(x) if p[0] in SIDE_BY_SIDE else x for p, x in parts.items()}

    return _Line(by_place(old), by_place(gradient), {layer: uniform_z(layer) for layer in uniform})


def _first_order(edit: OneSpec, line: _Line, batch: Batch, resolved: Resolved) -> Float[Tensor, " batch"]:
    """The sum of (old - new) * gradient over what one edit changes, on the CPU."""
    tokens = resolved.tokens_of(edit, batch.index)
    columns = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
    real = pad_sequence([torch.ones(len(row)) for row in tokens], batch_first=True)
    rows = torch.arange(len(tokens))[:, None]

    def edited(x: Float[Tensor, "batch pos *head d"]) -> Float[Tensor, "batch edited *head d"]:
        x = x[rows, columns]
        return (x if edit.heads is None else x[:, :, list(edit.heads)]).float()

    old = edited(line.old[edit.linear_place])
    if edit.is_uniform:
        new = edited(line.uniform[edit.layer or 0])
    else:
        values = resolved.replacements(edit, batch.index)
        given = None if values is None else pad_sequence([value.float() for value in values], batch_first=True)
        new = edit.changed(old, None if given is None else given.to(old.device))
    by_token = ((old - new) * edited(line.gradient[edit.linear_place])).flatten(2).sum(-1)
    return (by_token.cpu() * real).sum(-1)


@dataclass(frozen=True)
class Screen:
    """What a screen found; an intervention is active if |delta| > tau on at least one prompt.

    Attributes:
        result: of the interventions that were run exactly; NaN under `intervened` for the others.
        estimates: first-order estimates of delta, of all.
        could_matter: |estimate| > margin * tau on at least one prompt, or not a number: all of these were run exactly.
        checked: a random subset of the others, run exactly to measure what the screen misses.
        tau, margin: as given.
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
        """Which interventions are known to be active; of those not run exactly nothing is known, and they count as not."""
        return (np.abs(self.result.delta) > self.tau).any(1)  # NaN > tau is False

    @property
    def caught(self) -> int:
        """How many active interventions the screen caught."""
        return int((self.active & self.could_matter).sum())

    @property
    def missed(self) -> int:
        """How many of those checked are active."""
        return int(self.active[self.checked].sum())

    @property
    def recall(self) -> Interval | None:
        """The share of the active interventions that the screen caught, with a 95% interval; None where none was found active.

        caught / (caught + missed * n_aside / n_checked), where n_aside is how many the screen set aside. `caught` is counted;
        only how many of those set aside are active is estimated. The checked ones are drawn without replacement, so `missed` is
        hypergeometric, and the interval inverts its two tails (2.5% each): at least 95% of all draws cover the true recall for
        these specs on these prompts. It has width 0 where all were checked, and a width where no miss was found but not all
        were checked, which a bootstrap or a normal approximation would not give.
        """
        if not self.caught + self.missed:
            return None
        aside = int((~self.could_matter).sum())
        total = np.array(
            [self.missed * aside / max(1, len(self.checked)), *_count(self.missed, len(self.checked), aside)]
        )
        recall, high, low = self.caught / (self.caught + total) if self.caught else np.zeros(3)
        return Interval(float(recall), float(low), float(high))

    @property
    def precision(self) -> float | None:
        """The share of those that could matter that are active, counted; None where none could matter."""
        return float(self.active[self.could_matter].mean()) if self.could_matter.any() else None

    def summary(self) -> str:
        """What a report of the screen must say, in three lines."""
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
    metric: str = "logit_diff",
    reference: Reference | None = None,
    *,
    margin: float = 0.5,
    check: float = 0.1,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    sweep: Callable[..., Result] = fast_sweep,
) -> Screen:
    """Estimate every spec, run exactly those that could matter, and run a random subset of the others to measure the recall.

    Args:
        tau: a spec is active if |delta| > tau on at least one prompt.
        margin: a spec could matter if |estimate| > margin * tau on at least one prompt. Smaller catches more and costs more.
        check: share of the others that is run too, but at least 20 of them (all, if there are fewer).
        seed: of that choice.
        batch_size: of the estimates.
        sweep: what runs specs exactly, called like `runner.run`.

    The other arguments are those of `estimate`. Raises ValueError, before the model runs, for what `estimate` refuses and for a
    threshold, margin or share that makes no sense.
    """
    for name, value, highest in (("tau", tau, np.inf), ("margin", margin, np.inf), ("check", check, 1.0)):
        if not 0 <= value <= highest or value == np.inf:
            raise ValueError(
                f"{name} must be {'from 0 to 1' if highest == 1 else 'a finite number from 0 on'}, not {value}."
            )
    resolved = _resolved(model, specs, prompts, metric, reference).measured(batch_size=batch_size, progress=progress)
    specs, reference = resolved.specs, resolved.sources.reference
    # By one process for all: what is run exactly must not hang on a last bit that differs between two GPUs.
    estimates = broadcast_from_main(
        lambda: estimate_resolved(resolved, metric, batch_size=batch_size, progress=progress)
    )
    could_matter = ~(np.abs(estimates) <= margin * tau).all(1)  # an estimate that is not a number sets nothing aside
    aside = np.flatnonzero(~could_matter)
    n_checked = min(len(aside), max(LEAST_CHECKED, int(np.ceil(check * len(aside)))))
    checked = np.sort(rng(seed, "screen").permutation(aside)[:n_checked])
    chosen = np.sort(np.concatenate([np.flatnonzero(could_matter), checked]))
    exact = sweep(model, [specs[i] for i in chosen], prompts, metric, reference, progress=progress)
    intervened = np.full_like(estimates, np.nan)
    intervened[chosen] = exact.intervened
    result = Result(resolved.names, metric, exact.clean, intervened)
    return Screen(result, estimates, could_matter, checked, tau, margin)


def _count(found: int, drawn: int, population: int, confidence: float = 0.95) -> tuple[int, int]:
    """The exact interval of how many there are in a population, `found` of `drawn` without replacement being so."""
    tail = (1 - confidence) / 2
    if drawn == population:
        return found, found
    possible = np.arange(found, population - drawn + found + 1)
    at_least = hypergeom.sf(found - 1, population, possible, drawn)
    at_most = hypergeom.cdf(found, population, possible, drawn)
    plausible = possible[(at_least > tail) & (at_most > tail)]
    return int(plausible.min()), int(plausible.max())
