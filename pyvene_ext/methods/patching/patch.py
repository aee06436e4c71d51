"""Activation and path patching: base prompts run with activations of their source prompts.

    clean, corrupt = prompts.tokenize(tokenizer), prompts.tokenize(tokenizer, text="corrupt")
    noised = patch(model, all_patches(model.config, "z"), base=clean, source=corrupt)
    denoised = patch(model, specs, base=corrupt, source=clean)
    paths = patch(model, all_paths(model.config, ("logits",)), base=clean, source=corrupt)

Base and source are the two texts of the same pairs, with the same answers. With the clean text as base, patching measures what
breaks the behaviour (noising); with the corrupt text as base, what restores it (denoising).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from transformers import PreTrainedModel

from modelcards import component_named, config_of, n_heads, n_kv_heads, n_layers
from pyvene_ext.engine.measure import (
    Metric,
    MetricLike,
    as_array,
    as_metric,
    check_metric,
    first_tokens_note,
    first_tokens_said,
)
from pyvene_ext.engine.plain import answer_logits, measured, run_resolved
from pyvene_ext.engine.resolve import Resolved, check_pairs_differ, identical_pairs, resolve
from pyvene_ext.engine.results import Result, count, finite_mean, three_digits
from pyvene_ext.engine.sweep.run import plan_resolved, sweep_resolved
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.patching.direct import receiver_positions, run_direct_paths
from pyvene_ext.methods.patching.plain_paths import PlainPaths
from pyvene_ext.methods.patching.subspace import concept_directions
from pyvene_ext.methods.patching.sweep_paths import plan_paths, sweep_paths
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import check_projections
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.graph import Node, reaches, senders
from pyvene_ext.specs.joint import Spec, as_specs, listed, members, spec_name
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.specs.sources import Directions, Recorded
from pyvene_ext.stats.intervals import Interval, ratio_of_means

if TYPE_CHECKING:
    import pandas as pd

Patch = Spec | PathPatch

PLANNED = 1000  # specs that tell what more of them cost


@dataclass(frozen=True, repr=False)
class Patched(Result):
    """The effect of patches on every base prompt.

    Attributes:
        names: the patches' names.
        metric: name of the metric.
        baseline: the metric of the untouched base prompts, be they clean or corrupt.
        intervened: the metric of the patched base prompts.
        source: the metric of the untouched source prompts, with the base's answers; NaN for kl, which compares with the base.
        specs: the patches themselves; empty if unknown.
        identical: pairs whose two texts are the same tokens: no patch has an effect on them, and their score is NaN.
    """

    source: Float32[np.ndarray, " n_prompts"]
    identical: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def score(self) -> Float[np.ndarray, "n_interventions n_prompts"]:
        """(patched - base) / (source - base): 0 is the base and 1 the source, whichever of them is clean.

        So 1 means fully restored when denoising, and fully broken when noising. NaN where base and source have the same value;
        if some prompts differ little, average numerator and denominator separately (`mean_score`).
        """
        return _ratio(self.intervened - self.baseline, self.source - self.baseline)

    @property
    def mean_score(self) -> Float[np.ndarray, " n_interventions"]:
        """The mean over prompts of (patched - base), divided by the mean of (source - base)."""
        return _ratio((self.intervened - self.baseline).mean(1), (self.source - self.baseline).mean())

    @property
    def effect(self) -> tuple[str, Float[np.ndarray, " n_interventions"]]:
        """What `repr` and `plot` show: `mean_score`, or the mean of `delta` where there is no score."""
        if np.isfinite(score := self.mean_score).any():
            return "mean score", score
        return super().effect

    def effect_interval(self, some: Sequence[int] | Int[np.ndarray, " some"]) -> Interval:
        """Compute 95% intervals of what `repr` and `plot` show: of scores by a bootstrap over pairs.

        Args:
            some: indices of patches.

        Returns:
            The means and their intervals.
        """
        if self.effect[0] != "mean score" or len(self.baseline) < 2:
            return super().effect_interval(some)
        change = self.intervened[list(some)] - self.baseline
        return ratio_of_means(change, self.source - self.baseline, rng(0, "mean score"))

    def to_frame(self) -> pd.DataFrame:
        """One row per patch and prompt.

        Returns:
            A table as of `Result.to_frame`, with the columns source and score besides.
        """
        return super().to_frame().assign(source=np.tile(self.source, len(self.names)), score=self.score.ravel())

    @property
    def _title(self) -> str:
        title = f"{super()._title}, source {three_digits(finite_mean(self.source))}"
        if not self.identical:
            return title
        some = ", ".join(map(str, self.identical[:10])) + (" ..." if len(self.identical) > 10 else "")
        return f"{title}\n{count(len(self.identical), 'pair')} of two equal texts, without effect and score: {some}"


def _ratio(change: Float[np.ndarray, "*item"], gap: Any) -> Float[np.ndarray, "*item"]:
    """NaN where the gap is 0."""
    return np.divide(change, gap, out=np.full_like(change, np.nan), where=np.broadcast_to(gap != 0, change.shape))


def patch(
    model: PreTrainedModel,
    specs: Patch | Iterable[Patch],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    engine: Literal["sweep", "plain"] = "sweep",
    directions: Directions | None = None,
    memory: int | None = None,
    store: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Patched:
    """Run every patch on every base prompt and read one metric at its last token.

    Definitions: Meng et al. 2022 (activation patching), Wang et al. 2022, appendix B (path patching).

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one or more of `ActivationPatch`, a tuple of them (made jointly), and `PathPatch`.
        base: the prompts that are patched.
        source: the prompts that activations are taken from, paired with `base` by order; with the same answers, and of equal
            length where every position is patched.
        metric: as for `run`, one number per prompt; kl is to the untouched base.
        engine: plain is the definition, one intervention at a time through `IntervenableModel`; sweep gives the same, faster. A
            path with several receivers in different places and a sender patched at some positions runs plainly on both.
        directions: concept directions of patches with `subspace`; by default `concept_directions` of these pairs.
        memory: as for `sweep`.
        store: a folder in which the sweep engine saves what is finished: one store for patches and one per kind of path
            patching. (Paths to the logits, and the receivers' values, take little time and are computed again.)
        batch_size: prompts per forward pass, for the source's activations and on the plain engine.
        progress: show bars.

    Returns:
        The metric by patch and prompt, of the untouched base, and of the source.

    Raises:
        ValueError: before anything runs, for specs that do not fit the model, pairs that do not correspond (naming the pair), and
            what `run` refuses.
    """
    wanted: list[Patch] = listed(specs)
    at_path = [number for number, spec in enumerate(wanted) if isinstance(spec, PathPatch)]
    at_place = [number for number in range(len(wanted)) if number not in set(at_path)]
    if engine == "plain" and store is not None:
        raise ValueError("the plain engine saves nothing: leave store out, or use engine='sweep'.")
    metric = as_metric(metric)
    resolved = resolve_patches(model, wanted, base, source, metric, engine, directions)
    if store is not None:
        metric.facts()  # refuses a metric without a name before anything runs
    places = resolved.select(at_place)
    plan = plan_resolved(places, metric, memory=memory) if engine == "sweep" and at_place else None
    groups = _path_kinds(wanted, engine)
    paths = {kind: [wanted[number] for number in numbers] for kind, numbers in groups.items()}
    plans = {kind: plan_paths(resolved, paths[kind], memory) for kind in groups if kind.swept}  # type: ignore[arg-type]
    # Everything is checked; from here on the model runs.
    resolved = resolved.with_statistics(batch_size=batch_size, progress=progress)
    if directions is None:
        directions = concept_directions(model, resolved.specs, base, source, batch_size=batch_size, progress=progress)
    resolved = resolved.with_directions(directions)

    def substore(name: str) -> Path | None:
        return None if store is None else Path(store) / name

    clean: np.ndarray | None = None
    found = np.empty((len(wanted), len(base)), np.float32)

    def put(numbers: list[int], baseline: np.ndarray, patched: np.ndarray) -> None:
        # In bfloat16 different computations of one number round differently: each is compared with its own untouched run.
        nonlocal clean
        clean = baseline if clean is None else clean
        found[numbers] = patched + (clean - baseline)

    if at_place:
        places = resolved.select(at_place)
        if plan is None:
            result = run_resolved(places, metric, batch_size=batch_size, progress=progress)
        else:
            result = sweep_resolved(places, metric, plan, store=substore("patches"), progress=progress)
        put(at_place, result.baseline, result.intervened)
    for kind, numbers in groups.items():
        some: list[PathPatch] = paths[kind]  # type: ignore[assignment]
        options: dict[str, Any] = {"memory": memory, "progress": progress}
        if kind.direct:
            options |= {"store": substore("direct"), "batch_size": batch_size, "engine": engine}
            put(numbers, *run_direct_paths(resolved, some, metric, **options))
        elif kind.swept:
            options["store"] = substore("mlps_frozen" if kind.freeze_mlps else "paths")
            put(numbers, *sweep_paths(resolved, some, metric, plans[kind], **options))
        else:
            put(numbers, *_plain_paths(resolved, some, metric, batch_size, progress))
    assert clean is not None  # there is a patch
    same = identical_pairs(base, source)
    if "clean" in metric.needs:
        of_source = np.full_like(clean, np.nan)
    else:
        of_source = measured(model, replace(source, answers=base.answers), metric, batch_size=batch_size)
        of_source[same] = clean[same]  # a rounding difference would give scores where there are none
    names = tuple(spec.name if isinstance(spec, PathPatch) else spec_name(spec) for spec in wanted)
    note = first_tokens_note(metric, base, of_answers=not at_path)
    return Patched(names, metric.label, clean, found, of_source, specs=tuple(wanted), identical=tuple(same), note=note)


class _PathKind(NamedTuple):
    """How a path is run; paths of one kind are run together."""

    direct: bool
    swept: bool
    freeze_mlps: bool

    @classmethod
    def of(cls, path: PathPatch, engine: str) -> _PathKind:
        swept = engine == "sweep" and path.has_independent_receivers and not path.direct
        return cls(path.direct, swept, path.freeze_mlps)


def _path_kinds(specs: Sequence[Patch], engine: str) -> dict[_PathKind, list[int]]:
    """The numbers of the paths among specs, by how they are run."""
    groups: dict[_PathKind, list[int]] = {}
    for number, spec in enumerate(specs):
        if isinstance(spec, PathPatch):
            groups.setdefault(_PathKind.of(spec, engine), []).append(number)
    return groups


def patch_passes(
    model: PreTrainedModel,
    specs: Patch | Iterable[Patch],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    memory: int | None = None,
) -> float:
    """Estimate what `patch` on the sweep engine costs; nothing is run. Of very many specs, some tell what all of them cost.

    Args:
        model: as for `patch`.
        specs: as for `patch`.
        base: as for `patch`.
        source: as for `patch`.
        metric: as for `patch`.
        memory: as for `patch`.

    Returns:
        The cost in forward passes over all base prompts.

    Raises:
        ValueError: for whatever `patch` refuses.
    """
    wanted: list[Patch] = listed(specs)
    if len(wanted) >= 2 * PLANNED:
        some = wanted[:: len(wanted) // PLANNED]
        return len(wanted) / len(some) * patch_passes(model, some, base, source, metric, memory=memory)
    metric = as_metric(metric)
    resolved = resolve_patches(model, wanted, base, source, metric, "sweep", None)
    passes = 2.0  # the untouched source, for its activations and for its metric
    if at_place := [number for number, spec in enumerate(wanted) if not isinstance(spec, PathPatch)]:
        passes += plan_resolved(resolved.select(at_place), metric, memory=memory).passes
    for kind, numbers in _path_kinds(wanted, "sweep").items():
        paths = [path for number in numbers if isinstance(path := wanted[number], PathPatch)]
        if not kind.swept and not kind.direct:
            passes += 3 * len(paths)  # one to freeze what is frozen, one with the sender, one with the receivers
            continue
        passes += kind.direct  # the base, for what direct terms are added to
        if kind.swept:
            passes += sum(plan.passes * len(plan.subset) for plan in plan_paths(resolved, paths, memory)) / len(base)
        received = [
            path.receiver_patches(receiver_positions(path), path.name)
            for path in paths
            if path.receivers != ("logits",)
        ]
        if received:
            recorded = Recorded(_nothing_yet, source.hash)
            passes += plan_resolved(resolve(received, model, base, recorded=recorded), metric, memory=memory).passes
    return passes


def _nothing_yet(*_: Any) -> Any:
    raise AssertionError("a plan reads no values")


def all_patches(config: Any, site: str, **fields: Any) -> list[ActivationPatch]:
    """Make one patch per layer, and per head where the site has heads (K/V heads for k and v).

    Args:
        config: the model's config, or the model.
        site: the site that is patched.
        **fields: further fields of `ActivationPatch`.

    Returns:
        The patches, ordered by layer and head.

    Raises:
        ValueError: the site cannot be patched.
    """
    component = component_named(site, ActivationPatch.sites, ActivationPatch.what)
    if not component.per_layer:
        return [ActivationPatch(site=site, **fields)]
    config = config_of(config)
    count = {"n_head": n_heads(config), "n_kv_head": n_kv_heads(config), None: 1}[component.heads]
    heads = [None if component.heads is None else (head,) for head in range(count)]
    return [
        ActivationPatch(site=site, layer=layer, heads=head, **fields)
        for layer in range(n_layers(config))
        for head in heads
    ]


def all_paths(config: Any, receivers: str | Sequence[str], **fields: Any) -> list[PathPatch]:
    """Make one path to these receivers from every sender that reaches all of them.

    Args:
        config: the model's config, or the model.
        receivers: name of the receiver, as in `PathPatch`, or of several, which are patched jointly.
        **fields: further fields of `PathPatch`.

    Returns:
        The paths, in the order of `graph.senders`: the embedding, then heads and MLP of each layer.

    Raises:
        ValueError: a receiver that does not exist.
    """
    config, receivers = config_of(config), (receivers,) if isinstance(receivers, str) else tuple(receivers)
    nodes = [Node.parse(receiver) for receiver in receivers]
    return [
        PathPatch(sender=str(sender), receivers=receivers, **fields)
        for sender in senders(config)
        if all(reaches(sender, node) for node in nodes)
    ]


def corresponding(
    clean: TokenizedPrompts, corrupt: TokenizedPrompts, names: Sequence[str]
) -> tuple[TokenizedPrompts, TokenizedPrompts, list[int]]:
    """Select the pairs whose texts correspond at some positions.

    Texts of equal length correspond token by token, so that each adopts the names that only the other has. Texts of unequal
    length correspond at the names that both have.

    Args:
        clean: the clean text of every pair.
        corrupt: the corrupt text of every pair.
        names: the positions; none for every token.

    Returns:
        The clean and the corrupt texts of these pairs, and the indices of these pairs.
    """
    kept, of_clean, of_corrupt = [], [], []
    for pair, (ours, theirs) in enumerate(zip(clean.positions, corrupt.positions, strict=True)):
        if len(clean.input_ids[pair]) == len(corrupt.input_ids[pair]):
            ours, theirs = {**theirs, **ours}, {**ours, **theirs}
        elif not names or any(name not in ours or name not in theirs for name in names):
            continue
        kept.append(pair)
        of_clean.append(ours)
        of_corrupt.append(theirs)

    pairs = [
        replace(prompts.take(kept), positions=tuple(positions))
        for prompts, positions in ((clean, of_clean), (corrupt, of_corrupt))
    ]
    return pairs[0], pairs[1], kept


def resolve_patches(
    model: PreTrainedModel,
    specs: list[Patch],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike,
    engine: str,
    directions: Directions | None,
) -> Resolved:
    """Resolve patches on pairs; a path stands for its sender's patch.

    Args:
        model: as for `patch`.
        specs: patches, tuples of them, and paths.
        base: as for `patch`.
        source: as for `patch`.
        metric: as for `patch`.
        engine: as for `patch`.
        directions: as for `patch`.

    Returns:
        The patches on the pairs, without statistics.

    Raises:
        ValueError: for whatever `patch` refuses, except too little memory.
    """
    if not isinstance(base, TokenizedPrompts) or not isinstance(source, TokenizedPrompts):
        raise ValueError(
            "base and source must be tokenised: call .tokenize(tokenizer) on the set, with text= clean or corrupt."
        )
    if engine not in ("sweep", "plain"):
        raise ValueError(f"unknown engine {engine!r}; choose sweep or plain.")
    metric = as_metric(metric)
    if not specs or not len(base):
        raise ValueError("nothing to run: give at least one patch and one pair of prompts.")
    if len(base) != len(source):
        raise ValueError(
            f"there are {len(base)} base and {len(source)} source prompts; give each base prompt its source."
        )
    for pair, (own, other) in enumerate(zip(base.answers, source.answers, strict=True)):
        if own != other and {"right", "wrong"} & set(metric.needs):
            raise ValueError(
                f"base and source of pair {pair} have other answers, right {own.right} and {other.right}, wrong {own.wrong} and "
                f"{other.wrong}; compare the same in both, such as with dataclasses.replace(source, answers=base.answers)."
            )
    for spec in specs:
        if isinstance(spec, PathPatch):
            spec.check(model)
            refuse_latent_steps(model, (*base.input_ids, *source.input_ids))
            continue
        for edit in members(as_specs([spec])[0]):
            if not isinstance(edit, ActivationPatch):
                raise ValueError(f"{edit.name} is not a patch; run it with pyvene_ext.run or sweep.")
            if edit.path is not None:
                raise ValueError(f"{edit.name}: path is set by path patching only; give a PathPatch.")
    if any(isinstance(spec, PathPatch) and spec.direct for spec in specs):
        check_projections(model)
    of_answers = not any(isinstance(spec, PathPatch) for spec in specs)
    check_metric(model, base, metric, of_answers=of_answers)
    with first_tokens_said():
        check_metric(model, replace(source, answers=base.answers), metric, of_answers=of_answers)
    check_pairs_differ(base, source)
    activations: list[Spec] = [spec.sender_patch if isinstance(spec, PathPatch) else spec for spec in specs]
    return resolve(activations, model, base, source, directions=directions)


def _plain_paths(
    resolved: Resolved,
    paths: list[PathPatch],
    metric: Metric,
    batch_size: int,
    progress: bool,
) -> tuple[Float32[np.ndarray, " prompt"], Float32[np.ndarray, "path prompt"]]:
    """The metric of the untouched base, and with each path patched."""
    model, base = resolved.model, resolved.prompts
    baseline, found = np.empty(len(base), np.float32), np.empty((len(paths), len(base)), np.float32)
    plain = PlainPaths(resolved)
    bar = progress_bar(found.size, "prompt", "paths", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        for batch in base.batches(batch_size):
            batch = batch.to(input_device(model))
            clean = answer_logits(model, batch)
            batch = metric.with_clean(batch, clean)
            baseline[batch.index] = as_array(metric(clean, batch))
            for number, path in enumerate(paths):
                found[number, batch.index] = as_array(metric(plain.logits(path, batch), batch))
                bar.update(len(batch.index))
    return baseline, found
