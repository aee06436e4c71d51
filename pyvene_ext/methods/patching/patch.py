"""Activation and path patching: base prompts run with something of their source prompts in it.

    clean, corrupt = prompts.tokenize(tokenizer), prompts.tokenize(tokenizer, text="corrupt")
    noised = patch(model, all_patches(model.config, "z"), base=clean, source=corrupt)
    denoised = patch(model, specs, base=corrupt, source=clean)
    paths = patch(model, all_paths(model.config, ("logits",)), base=clean, source=corrupt)

Base and source are two texts of the same pairs, with the same answers. Which is which is the direction: base clean asks what
breaks (noising), base corrupt what restores (denoising).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, n_heads, n_kv_heads, n_layers
from pyvene_ext.engine.metrics import last_logits
from pyvene_ext.engine.plain import METRICS, Result, check_metric, run_resolved
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.sweep.run import plan_resolved, sweep_resolved
from pyvene_ext.methods.patching.direct import run_direct_paths
from pyvene_ext.methods.patching.plain_paths import PlainPaths
from pyvene_ext.methods.patching.subspace import concept_directions
from pyvene_ext.methods.patching.sweep_paths import plan_paths, sweep_paths
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import check_projections
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.base import SiteEdit
from pyvene_ext.specs.graph import Node, reaches, senders
from pyvene_ext.specs.joint import Spec, as_specs, members, spec_name
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.specs.sources import Directions

if TYPE_CHECKING:
    import pandas as pd

Patch = Spec | PathPatch


@dataclass(frozen=True)
class Patched(Result):
    """What patches did to every base prompt; `clean` is the metric of the untouched base, `intervened` that of the patched one.

    Attributes:
        source: the metric of the untouched source prompts; NaN for kl, which compares with the base.
    """

    source: Float32[np.ndarray, " n_prompts"]

    @property
    def score(self) -> Float[np.ndarray, "n_interventions n_prompts"]:
        """(patched - base) / (source - base): 0 is the base and 1 the source, whichever of them is clean.

        So of denoising 1 is all restored, and of noising 1 all broken. NaN where base and source have the same value;
        average numerator and denominator by themselves over prompts where some differ little.
        """
        return _ratio(self.intervened - self.clean, self.source - self.clean)

    @property
    def mean_score(self) -> Float[np.ndarray, " n_interventions"]:
        """Mean over prompts of (patched - base) over the mean of (source - base)."""
        return _ratio((self.intervened - self.clean).mean(1), (self.source - self.clean).mean())

    def to_frame(self) -> pd.DataFrame:
        """One row a patch and prompt.

        Returns:
            A table as of `Result.to_frame`, with the columns source and score besides.
        """
        return super().to_frame().assign(source=np.tile(self.source, len(self.names)), score=self.score.ravel())


def _ratio(change: Float[np.ndarray, "*item"], gap: Any) -> Float[np.ndarray, "*item"]:
    """NaN where the gap is 0."""
    return np.divide(change, gap, out=np.full_like(change, np.nan), where=np.broadcast_to(gap != 0, change.shape))


def patch(
    model: PreTrainedModel,
    specs: Patch | Iterable[Patch],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    *,
    engine: Literal["sweep", "plain"] = "sweep",
    directions: Directions | None = None,
    memory: int | None = None,
    store: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Patched:
    """Run every patch on every base prompt and read one metric at its last token.

    Args:
        specs: one or more of `ActivationPatch`, a tuple of them (done together), and `PathPatch`.
        base, source: pairs by their order, with the same answers; of equal length where every position is patched.
        engine: plain is the definition, one intervention at a time through `IntervenableModel`; sweep gives the same, faster. A
            path with several receivers in different places and a sender patched at some positions runs plainly either way.
        directions: of patches with `subspace`; by default `concept_directions` of these very pairs.
        memory: as for `sweep`.
        store: a folder that keeps what the sweep engine has finished, a store for patches and one for each way of path patching.
            (What paths to the logits give, and what receivers are given, takes little time and is found out again.)
        batch_size: prompts a forward pass, of the source's activations and of the plain engine.

    Raises ValueError, before anything runs, for specs that do not fit the model, pairs that do not correspond (naming the pair),
    and what `run` refuses.
    """
    wanted: list[Patch] = [specs] if isinstance(specs, SiteEdit | PathPatch) else list(specs)
    at_path = [number for number, spec in enumerate(wanted) if isinstance(spec, PathPatch)]
    at_place = [number for number in range(len(wanted)) if number not in set(at_path)]
    if engine == "plain" and store is not None:
        raise ValueError("the plain engine keeps nothing: leave store out, or use engine='sweep'.")
    resolved = resolve_patches(model, wanted, base, source, metric, engine, directions)
    places = resolved.only(at_place)
    plan = plan_resolved(places, memory=memory) if engine == "sweep" and at_place else None
    groups: dict[_Way, list[int]] = {}
    for number in at_path:
        groups.setdefault(_Way.of(wanted[number], engine), []).append(number)  # type: ignore[arg-type]
    paths = {way: [wanted[number] for number in numbers] for way, numbers in groups.items()}
    plans = {way: plan_paths(resolved, paths[way], memory) for way in groups if way.fast}  # type: ignore[arg-type]
    # Everything is checked; from here on the model runs.
    resolved = resolved.measured(batch_size=batch_size, progress=progress)
    if directions is None:
        directions = concept_directions(model, resolved.specs, base, source, batch_size=batch_size, progress=progress)
    resolved = resolved.with_directions(directions)

    def kept(name: str) -> Path | None:
        return None if store is None else Path(store) / name

    clean: np.ndarray | None = None
    found = np.empty((len(wanted), len(base)), np.float32)

    def put(numbers: list[int], before: np.ndarray, after: np.ndarray) -> None:
        # In bfloat16 two ways to the same number round differently: each is held to the untouched run of its own way.
        nonlocal clean
        clean = before if clean is None else clean
        found[numbers] = after + (clean - before)

    if at_place:
        places = resolved.only(at_place)
        if plan is None:
            result = run_resolved(places, metric, batch_size=batch_size, progress=progress)
        else:
            result = sweep_resolved(places, metric, plan, store=kept("patches"), progress=progress)
        put(at_place, result.clean, result.intervened)
    for way, numbers in groups.items():
        some: list[PathPatch] = paths[way]  # type: ignore[assignment]
        options: dict[str, Any] = {"memory": memory, "progress": progress}
        if way.direct:
            options |= {"store": kept("direct"), "batch_size": batch_size, "engine": engine}
            put(numbers, *run_direct_paths(resolved, some, metric, **options))
        elif way.fast:
            held = kept("mlps_frozen" if way.freeze_mlps else "paths")
            put(numbers, *sweep_paths(resolved, some, metric, plans[way], store=held, **options))
        else:
            put(numbers, *_plain_paths(resolved, some, metric, batch_size, progress))
    assert clean is not None  # there is a patch
    of_source = np.full_like(clean, np.nan) if metric == "kl" else _metric_of(model, source, metric, batch_size)
    same = [ids == of_pair for ids, of_pair in zip(base.input_ids, source.input_ids, strict=True)]
    if metric != "kl":
        of_source[same] = clean[same]  # not a difference of rounding, of which scores would be made
    names = tuple(spec.name if isinstance(spec, PathPatch) else spec_name(spec) for spec in wanted)
    return Patched(names, metric, clean, found, of_source)


class _Way(NamedTuple):
    """How paths are run; those that are run alike are run together."""

    direct: bool
    fast: bool
    freeze_mlps: bool

    @classmethod
    def of(cls, path: PathPatch, engine: str) -> _Way:
        return cls(path.direct, engine == "sweep" and path.one_place and not path.direct, path.freeze_mlps)


def all_patches(config: Any, site: str, **fields: Any) -> list[ActivationPatch]:
    """One patch a layer, and a head where the site has heads (K/V heads of k and v), in their order."""
    if site not in ActivationPatch.sites:
        raise ValueError(f"no patch of {site!r}; choose among {', '.join(ActivationPatch.sites)}.")
    component = COMPONENTS[FIELD_NAMES[site]]
    if not component.per_layer:
        return [ActivationPatch(site=site, **fields)]
    count = {"n_head": n_heads(config), "n_kv_head": n_kv_heads(config), None: 1}[component.heads]
    heads = [None if component.heads is None else (head,) for head in range(count)]
    return [
        ActivationPatch(site=site, layer=layer, heads=head, **fields)
        for layer in range(n_layers(config))
        for head in heads
    ]


def all_paths(config: Any, receivers: Sequence[str], **fields: Any) -> list[PathPatch]:
    """One path to these receivers from every sender that all of them can hear: the embedding, heads and MLPs in their order."""
    if isinstance(receivers, str):
        raise ValueError(f"receivers are a tuple: write ({receivers!r},).")
    nodes = [Node.parse(receiver) for receiver in receivers]
    return [
        PathPatch(sender=str(sender), receivers=tuple(receivers), **fields)
        for sender in senders(config)
        if all(reaches(sender, node) for node in nodes)
    ]


def corresponding(
    clean: TokenizedPrompts, corrupt: TokenizedPrompts, names: Sequence[str]
) -> tuple[TokenizedPrompts, TokenizedPrompts, list[int]]:
    """The pairs whose texts correspond at these names (none: at every token), and which of all pairs they are.

    Texts of equal length correspond token by token, so that each takes over the names that only the other has. Of unequal
    length they correspond where both have the name.
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
    metric: str,
    engine: str,
    directions: Directions | None,
) -> Resolved:
    """The patches on the pairs, of paths the sender's; ValueError for whatever `patch` refuses but too little memory."""
    if not isinstance(base, TokenizedPrompts) or not isinstance(source, TokenizedPrompts):
        raise ValueError(
            "base and source must be tokenised: call .tokenize(tokenizer) on the set, with text= clean or corrupt."
        )
    if engine not in ("sweep", "plain"):
        raise ValueError(f"unknown engine {engine!r}; choose sweep or plain.")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose among {', '.join(METRICS)}.")
    if not specs or not len(base):
        raise ValueError("nothing to run: give at least one patch and one pair of prompts.")
    if len(base) != len(source):
        raise ValueError(
            f"there are {len(base)} base and {len(source)} source prompts; give each base prompt its source."
        )
    for pair, answers in enumerate(zip(base.answer_ids, source.answer_ids, strict=True)):
        if answers[0] != answers[1]:
            raise ValueError(
                f"the answers of pair {pair} are the tokens {answers[0]} of the base and {answers[1]} of the source prompt; "
                "compare the same two answers in both."
            )
    for spec in specs:
        if isinstance(spec, PathPatch):
            spec.check(model)
            refuse_latent_steps(model, (*base.input_ids, *source.input_ids))
            continue
        for edit in members(as_specs([spec])[0]):
            if not isinstance(edit, ActivationPatch):
                raise ValueError(f"{edit.name} is no patch; run it with pyvene_ext.run or sweep.")
            if edit.path is not None:
                raise ValueError(f"{edit.name}: path is set by path patching alone; give a PathPatch.")
    if any(isinstance(spec, PathPatch) and spec.direct for spec in specs):
        check_projections(model)
    check_metric(model, base, metric)
    activations: list[Spec] = [spec.sending if isinstance(spec, PathPatch) else spec for spec in specs]
    return resolve(activations, model, base, source, directions=directions)


def _plain_paths(
    resolved: Resolved,
    paths: list[PathPatch],
    metric: str,
    batch_size: int,
    progress: bool,
) -> tuple[Float32[np.ndarray, " prompt"], Float32[np.ndarray, "path prompt"]]:
    """The metric of the untouched base, and with each path patched."""
    model, base = resolved.model, resolved.prompts
    before, found = np.empty(len(base), np.float32), np.empty((len(paths), len(base)), np.float32)
    plain = PlainPaths(resolved)
    bar = tqdm(total=found.size, desc="paths", unit="prompt", disable=not progress)
    with bar, evaluating(model), no_gradients(model):
        for batch in base.batches(batch_size):
            batch = batch.to(input_device(model))
            clean = last_logits(model(**batch.inputs(), use_cache=False).logits, batch)
            before[batch.index] = METRICS[metric](clean, batch, clean).float().cpu().numpy()
            for number, path in enumerate(paths):
                found[number, batch.index] = (
                    METRICS[metric](plain.logits(path, batch), batch, clean).float().cpu().numpy()
                )
                bar.update(len(batch.index))
    return before, found


def _metric_of(
    model: PreTrainedModel, prompts: TokenizedPrompts, metric: str, batch_size: int
) -> Float32[np.ndarray, " prompt"]:
    """The metric of untouched prompts."""
    found = np.empty(len(prompts), np.float32)
    with evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size):
            batch = batch.to(input_device(model))
            logits = last_logits(model(**batch.inputs(), use_cache=False).logits, batch)
            found[batch.index] = METRICS[metric](logits, batch, logits).float().cpu().numpy()
    return found
