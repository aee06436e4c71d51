"""Attribution patching: the effect of activation patches, estimated from gradients instead of runs.

    atp(model, patches, base, source)                one number per patch and prompt, to first order (Nanda 2023)
    atp_star(model, patches, base, source)           the same with softmaxes recomputed and cancellation accounted for

Patches are `ActivationPatch`es; base and source are two prompt sets, paired by their order. All functions estimate
delta = M(base) - M(base, patched) for a metric M, which `patch` measures with `result.delta`. The cost does not depend on the
number of patches, apart from a sum at the end.

All read one graph: a forward pass on base that keeps the tensors at the cards' components, and backward passes through it.
Products and sums are in float32 whatever the model's dtype. The model is restored afterwards, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Taps, card_of, dimensions, n_heads, n_layers
from pyvene_ext.engine.measure import Metric, MetricLike, as_metric, check_metric
from pyvene_ext.engine.resolve import Resolved, check_pairs_differ, resolve
from pyvene_ext.engine.sweep.plan import ActivationSizes, prompts_at_once
from pyvene_ext.intervenable.statistics import Place
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.methods.attribution.gradients import (
    ADDS,
    check_differentiable,
    check_places,
    gradients_at,
    metric_total,
)
from pyvene_ext.methods.attribution.screen import estimate_resolved
from pyvene_ext.models.hooks import (
    SIDE_BY_SIDE,
    Where,
    head_entries,
    hook_component,
    record_activations,
    record_call,
    split_heads,
)
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized
from pyvene_ext.specs.joint import (
    Spec,
    as_specs,
    members,
)
from pyvene_ext.specs.patch import ActivationPatch

Patches = ActivationPatch | Iterable[Spec]


def atp(
    model: PreTrainedModel,
    patches: Patches,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> Float32[np.ndarray, "n_patches n_prompts"]:
    """Estimate every patch's delta by AtP (Nanda 2023): (a_base - a_source) . dM/da, summed over the patched entries.

    This takes one forward pass on source, and one forward and one backward pass on base. A joint patch (a tuple) is the sum over
    its members.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        patches: one `ActivationPatch`, or a list of them and of tuples of them (made jointly).
        base: the prompts that are patched.
        source: the prompts that activations are taken from, paired with `base` by order.
        metric: as for `run`, one differentiable number per prompt: logit_diff, probability, logit, or a function.
        batch_size: prompts per forward and backward pass.
        memory: bytes besides the weights, and besides the activations of the source prompts, which are read first and kept; fewer
            prompts are taken at once where `batch_size` of them need more. By default half of the weights, at least 512 MiB.
        progress: show a bar.

    Returns:
        The estimates.

    Raises:
        ValueError: before the model runs, for a metric without a gradient (rank, accuracy, kl), anything but an
            `ActivationPatch`, and what `patch` refuses, such as pairs of unequal lengths at positions "all".
    """
    metric = as_metric(metric)
    resolved = resolve_patches(model, patches, base, source, metric)
    batch_size = _fitting(resolved, _groups(resolved, qk_fix=False), batch_size, memory)
    return estimate_resolved(resolved, metric, batch_size=batch_size, progress=progress)


def atp_star(
    model: PreTrainedModel,
    patches: Patches,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    qk_fix: bool = True,
    grad_drop: bool = True,
    batch_size: int = 8,
    memory: int | None = None,
    progress: bool = True,
) -> Float32[np.ndarray, "n_patches n_prompts"]:
    """Estimate every patch's delta by AtP* (Kramar et al. 2024): AtP with two fixes; without both it equals `atp`.

    QK-fix (section 3.1.1), for patches of q and k: a saturated softmax has no gradient. The pattern is recomputed with the
    patched queries or keys by the model's own attention (soft-cap, mask and window included), and delta is approximated by
    (pattern_base - pattern_patched) . dM/dpattern, summed over all queries and keys, and over the query heads of a K/V head. A
    patched key affects every later query; a patch of several positions replaces them all at once, as the patch itself does.

    GradDrop (section 3.1.2), for every site: direct and indirect effects may cancel. For each layer l' the gradient is taken
    again with the outputs of its attention and its MLP detached (the residual stream passes), and the result is the sum over l'
    of |estimate| divided by L - 1, because in its own layer a node's gradient is 0. The result is unsigned. (The stream's own
    sites belong to no layer, so that all L terms count: their values reach up to L / (L - 1) times those of AtP.)

    This takes one forward pass on source, one on base, a call of the attention module for every layer and choice of positions at
    which q or k is patched, and one backward pass, or L with GradDrop.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        patches: one `ActivationPatch`, or a list of them and of tuples of them (made jointly).
        base: the prompts that are patched.
        source: the prompts that activations are taken from, paired with `base` by order.
        metric: as for `run`, one differentiable number per prompt: logit_diff, probability, logit, or a function.
        qk_fix: recompute the pattern for patches of q and k.
        grad_drop: drop one layer's gradient at a time.
        batch_size: prompts per forward and backward pass.
        memory: bytes besides the weights, and besides the activations of the source prompts, which are read first and kept; fewer
            prompts are taken at once where `batch_size` of them need more. By default half of the weights, at least 512 MiB.
        progress: show a bar.

    Returns:
        The estimates; with `grad_drop` without a sign.

    Raises:
        ValueError: before the model runs, for what `atp` refuses; for QK-fix in a model whose attention pattern cannot be read
            (not eager or sdpa), and for GradDrop in a model of one layer.
    """
    metric = as_metric(metric)
    resolved = resolve_patches(model, patches, base, source, metric, qk_fix=qk_fix)
    specs = resolved.specs
    layers = n_layers(model.config)
    if grad_drop and layers == 1:
        raise ValueError("GradDrop drops one layer of several, but the model has only one; pass grad_drop=False.")
    groups = _groups(resolved, qk_fix)
    batch_size = _fitting(resolved, groups, batch_size, memory)
    places = [where for group in groups for where in (group.edited, group.reads)]
    if grad_drop:
        places += [(component, layer) for component in ADDS for layer in range(layers)]
    taps = Taps(model, card_of(model), places)
    with taps:  # raises here, before the source prompts run, if the attention pattern cannot be read
        pass
    resolved = resolved.with_statistics(batch_size=batch_size, progress=progress)
    estimates = np.empty((len(specs), len(base)), np.float32)
    bar = progress_bar(len(base), "prompt", "estimates", shown=progress)
    with bar, evaluating(model), torch.inference_mode(False), taps:
        # No gradients of parameters: the graph starts at the first place that is read.
        model.requires_grad_(False)
        for batch in base.batches(batch_size, "right"):
            found = _effects(resolved, groups, batch, metric, grad_drop)
            for number, spec in enumerate(specs):
                parts = [
                    found[_PatchGroup.of(patch, qk_fix)][:, :, list(patch.heads or (0,))] for patch in members(spec)
                ]
                total = torch.stack([part.sum(-1) for part in parts]).sum(0)  # dropped batch
                total = total.abs().sum(0) / (layers - 1) if grad_drop else total[0]
                estimates[number, batch.index] = total.numpy()
            bar.update(len(batch.index))
    return estimates


class _PatchGroup(NamedTuple):
    """Patches that differ only in heads; they are estimated for all heads at once."""

    place: Place
    positions: Positions
    recomputes_pattern: bool  # by the QK-fix

    @classmethod
    def of(cls, patch: Any, qk_fix: bool) -> _PatchGroup:
        return cls(patch.place, patch.positions, qk_fix and patch.site in ("q", "k"))

    @property
    def edited(self) -> Where:
        """The component that is edited, all heads concatenated: a slice of it would not be part of the graph."""
        site, layer = self.place
        return SIDE_BY_SIDE.get(site, FIELD_NAMES[site]), layer or 0

    @property
    def reads(self) -> Where:
        """The component whose gradient is taken."""
        return ("attention_pattern", self.edited[1]) if self.recomputes_pattern else self.edited


def _groups(resolved: Resolved, qk_fix: bool) -> list[_PatchGroup]:
    """The groups of all patches."""
    return list(dict.fromkeys(_PatchGroup.of(patch, qk_fix) for spec in resolved.specs for patch in members(spec)))


def _fitting(resolved: Resolved, groups: list[_PatchGroup], batch_size: int, memory: int | None) -> int:
    """Count the prompts that fit: the graph, and what is edited, its gradient, replacement and copies for each group."""
    resolved.prompts.batches(batch_size)  # refuses a wrong size
    model, lengths = resolved.model, [*map(len, resolved.prompts.input_ids)]
    length = max(lengths)
    patterns = sum(group.recomputes_pattern for group in groups) * n_heads(model.config) * length
    width = sum(card_of(model).width(model, group.edited[0]) or 0 for group in groups)
    each = ActivationSizes(model).graph(length) + 4 * length * 6 * (width + patterns)
    return prompts_at_once(model, len(lengths), each, batch_size, memory)


def _effects(
    resolved: Resolved,
    groups: list[_PatchGroup],
    batch: Batch,
    metric: Metric,
    grad_drop: bool,
) -> dict[_PatchGroup, Float[Tensor, "dropped batch head"]]:
    """The first-order effect of every group on one batch, for each layer dropped in turn (or none), on the CPU.

    "head" has one entry for a site without heads.
    """
    model = resolved.model
    dropped: set[int] = set()  # the layer whose attention and MLP no gradient passes through
    calls: dict[int, tuple[tuple, dict]] = {}
    with ExitStack() as hooks, torch.enable_grad():
        seen = record_activations(
            model, {where for group in groups for where in (group.edited, group.reads)}, hooks, graph=True
        )
        for layer in {group.edited[1] for group in groups if group.recomputes_pattern}:
            record_call(model, layer, calls, hooks)
        for layer in range(n_layers(model.config)) if grad_drop else ():
            for component in ADDS:  # hooked after the tensors that are kept, so that their own gradient is 0
                hook_component(model, (component, layer), _gate(dropped, layer), hooks)
        total = metric_total(metric, model, batch)
    changes = {}
    with torch.no_grad():
        for group in groups:
            new = _patched(seen[group.edited], group, batch, resolved)
            if group.recomputes_pattern:
                new = _pattern(model, group, new, calls)
            changes[group] = seen[group.reads].float() - new.float()

    effects: dict[_PatchGroup, list[Tensor]] = {group: [] for group in groups}
    places = list(dict.fromkeys(group.reads for group in groups))
    for layer in range(n_layers(model.config)) if grad_drop else (-1,):
        dropped.clear()
        dropped.add(layer)
        found = gradients_at(total, [seen[where] for where in places], retain_graph=True)
        gradients = dict(zip(places, found, strict=True))
        for group in groups:
            effects[group].append(_by_head(changes[group] * gradients[group.reads].float(), group, model).cpu())
    return {group: torch.stack(values) for group, values in effects.items()}


def _patched(
    old: Float[Tensor, "batch pos width"],
    group: _PatchGroup,
    batch: Batch,
    resolved: Resolved,
) -> Float[Tensor, "batch pos width"]:
    """A module's tensor with all heads' activations replaced by the source's, at the positions of a group."""
    new = old.clone()
    entries = head_entries(resolved.model, FIELD_NAMES[group.place[0]], old.shape[-1]).flatten().to(old.device)
    for row, prompt in enumerate(batch.index):
        columns = torch.tensor(resolved.tokens[group.positions][prompt], device=old.device)
        values = resolved.sources.statistics.rows(group.place, prompt, group.positions)
        new[row, columns[:, None], entries] = values.flatten(1).to(old)
    return new


def _pattern(
    model: PreTrainedModel, group: _PatchGroup, new: Tensor, calls: dict[int, tuple[tuple, dict]]
) -> Float[Tensor, "batch n_query n_head*n_key"]:
    """The attention pattern with patched queries or keys: the attention module is called again with the same arguments."""
    component, layer = group.edited
    args, kwargs = calls[layer]
    with ExitStack() as hooks:
        hook_component(model, (component, layer), lambda _: new, hooks)
        seen = record_activations(model, {group.reads}, hooks)
        card_of(model).module(model, "attention_input", layer)(*args, **kwargs)
    return seen[group.reads]


def _by_head(product: Tensor, group: _PatchGroup, model: PreTrainedModel) -> Float[Tensor, "batch head"]:
    """Sum the entries of each head of the edited site; for a K/V head, the patterns of all query heads that read it."""
    component = COMPONENTS[FIELD_NAMES[group.place[0]]]
    if component.heads is None:
        return product.flatten(1).sum(1, keepdim=True)
    read = "attention_pattern" if group.recomputes_pattern else component.name
    by_head = split_heads(product, read, model).flatten(2).sum(-1)
    return by_head.unflatten(1, (dimensions(model.config)[component.heads], -1)).sum(-1)


def _gate(dropped: Collection[int], layer: int) -> Callable[[Tensor], Tensor]:
    """An identity that passes no gradient while its layer is dropped."""

    def through(x: Tensor) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: torch.zeros_like(gradient) if layer in dropped else gradient)
        return x

    return through


def resolve_patches(
    model: PreTrainedModel,
    patches: Patches,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    qk_fix: bool = False,
) -> Resolved:
    """Resolve patches on pairs for attribution; the model is not run.

    Args:
        model: as for `atp`.
        patches: as for `atp`.
        base: as for `atp`.
        source: as for `atp`.
        metric: as for `atp`.
        qk_fix: check for the QK-fix too.

    Returns:
        The patches on the pairs, without statistics.

    Raises:
        ValueError: for whatever `atp` (or, with `qk_fix`, `atp_star`) refuses.
    """
    specs = as_specs(patches)
    for patch in (patch for spec in specs for patch in members(spec)):
        if not isinstance(patch, ActivationPatch):
            raise ValueError(
                f"{patch.name} is not a patch; attribution patching takes ActivationPatch (screen.estimate ablations too)."
            )
        if qk_fix and patch.site in ("q", "k"):
            card_of(model).component(model, "attention_pattern")
        if patch.subspace:
            raise ValueError(f"{patch.name}: attribution patching takes whole activations; leave subspace out.")
    check_tokenized(model, base, source)
    refuse_latent_steps(model, (*base.input_ids, *source.input_ids))
    check_differentiable(check_metric(model, base, metric), model.dtype)
    resolved = resolve(specs, model, base, source)
    check_pairs_differ(base, source)
    check_places(model, specs)
    return resolved
