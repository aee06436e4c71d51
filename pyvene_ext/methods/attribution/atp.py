"""Attribution patching: what putting the source prompts' activations in would do, from gradients instead of runs.

    atp(model, patches, base, source)                one number a patch and prompt, to first order (Nanda 2023)
    atp_star(model, patches, base, source)           the same with softmaxes recomputed and cancellation looked for

Patches are `ActivationPatch`es; base and source are two prompt sets, prompt i of one being the partner of prompt i of the other.
Everything estimates delta = M(base) - M(base, patched), M being the metric: the numbers of `runner.run(...).delta` and of the
sweep engine for the same patches. The cost does not hang on the number of patches, but for a sum at the end.

All read one graph: a forward pass on base in which the tensors at the cards' components are kept, and backward passes through it.
Products and sums are float32 whatever the model's dtype. The model is left as it was, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Taps, card_of, dimensions, n_layers
from pyvene_ext.engine.plain import METRICS, check_metric
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.intervenable.statistics import Place
from pyvene_ext.methods.attribution.gradients import (
    ADDS,
    answer_logits,
    check_differentiable,
    check_places,
)
from pyvene_ext.methods.attribution.screen import DIFFERENTIABLE, estimate_resolved
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
    metric: str = "logit_diff",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "n_patches n_prompts"]:
    """AtP (Nanda 2023): delta of every patch is about (a_base - a_source) . dM/da, summed over the patched entries.

    One forward pass on source, one forward and one backward pass on base. A joint patch (a tuple) is the sum over its members.

    Raises ValueError, before the model runs, for a metric without a first order (rank, accuracy, kl), anything that is no
    `ActivationPatch`, and what `runner.run` refuses: a place that the model lacks, pairs of unequal lengths at positions "all".
    """
    resolved = resolve_patches(model, patches, base, source, metric)
    base.batches(batch_size)
    return estimate_resolved(resolved, metric, batch_size=batch_size, progress=progress)


def atp_star(
    model: PreTrainedModel,
    patches: Patches,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    *,
    qk_fix: bool = True,
    grad_drop: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[np.ndarray, "n_patches n_prompts"]:
    """AtP* (Kramar et al. 2024): AtP with two repairs, each of which can be left out; without both it is `atp`.

    QK-fix (section 3.1.1), for patches of q and k: a saturated softmax has no gradient. The pattern is recomputed with the
    patched queries or keys by the model's own attention (soft-cap, mask and window as they are), and delta is about
    (pattern_base - pattern_patched) . dM/dpattern, summed over all queries and keys, and over the query heads of a K/V head. A
    patched key is seen by every query behind it; a patch of several positions swaps these together, as the patch itself does.

    GradDrop (section 3.1.2), for every site: direct and indirect effects may cancel. For each layer l' the gradient is taken
    again with what its attention and its MLP add detached (the residual stream passes), and the result is the sum over l' of
    |estimate| over L - 1: in its own layer a node's gradient is 0. It has no sign any more. (The stream's own sites belong to no
    layer, so that all L terms count: their values run up to L / (L - 1) of those of AtP.)

    One forward pass on source, one on base, a call of the attention module for every layer and choice of positions at which q or
    k is patched, and one backward pass, or L with GradDrop.

    Raises ValueError, before the model runs, for what `atp` refuses; for QK-fix in a model whose attention cannot be seen (not
    eager or sdpa), and GradDrop in one of a single layer.
    """
    resolved = resolve_patches(model, patches, base, source, metric, qk_fix=qk_fix)
    specs = resolved.specs
    base.batches(batch_size)
    layers = n_layers(model.config)
    if grad_drop and layers == 1:
        raise ValueError("GradDrop drops one layer of several, and the model has a single one; pass grad_drop=False.")
    edits = dict.fromkeys(_PatchGroup.of(patch, qk_fix) for spec in specs for patch in members(spec))
    places = [where for edit in edits for where in (edit.edits, edit.reads)]
    if grad_drop:
        places += [(component, layer) for component in ADDS for layer in range(layers)]
    taps = Taps(model, card_of(model), places)
    with taps:  # raises now, not after the source prompts have run, where attention cannot be seen
        pass
    resolved = resolved.measured(batch_size=batch_size, progress=progress)
    estimates = np.empty((len(specs), len(base)), np.float32)
    bar = tqdm(total=len(base), desc="estimates", unit="prompt", disable=not progress)
    with bar, evaluating(model), torch.inference_mode(False), taps:
        model.requires_grad_(
            False
        )  # nothing is kept for parameters, and the graph starts at the first place that is read
        for batch in base.batches(batch_size, "right"):
            found = _effects(resolved, list(edits), batch, metric, grad_drop)
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
    """What patches that differ in heads only have in common; it is worked out for all heads at once."""

    place: Place
    positions: Positions
    recomputes: bool  # the pattern, by the QK-fix

    @classmethod
    def of(cls, patch: Any, qk_fix: bool) -> _PatchGroup:
        return cls(patch.place, patch.positions, qk_fix and patch.site in ("q", "k"))

    @property
    def edits(self) -> Where:
        """The component that is edited, all heads side by side: a part of a tensor would be no part of the graph."""
        site, layer = self.place
        return SIDE_BY_SIDE.get(site, FIELD_NAMES[site]), layer or 0

    @property
    def reads(self) -> Where:
        """The component whose gradient counts."""
        return ("attention_pattern", self.edits[1]) if self.recomputes else self.edits


def _effects(
    resolved: Resolved,
    edits: list[_PatchGroup],
    batch: Batch,
    metric: str,
    grad_drop: bool,
) -> dict[_PatchGroup, Float[Tensor, "dropped batch head"]]:
    """The first-order effect of every edit on one batch, for each layer dropped in turn (or none), on the CPU.

    "head" has one entry for a site without heads.
    """
    model = resolved.model
    shut: set[int] = set()  # the layer whose contributions no gradient passes
    calls: dict[int, tuple[tuple, dict]] = {}
    with ExitStack() as hooks, torch.enable_grad():
        seen = record_activations(
            model, {where for edit in edits for where in (edit.edits, edit.reads)}, hooks, graph=True
        )
        for layer in {edit.edits[1] for edit in edits if edit.recomputes}:
            record_call(model, layer, calls, hooks)
        for layer in range(n_layers(model.config)) if grad_drop else ():
            for component in ADDS:  # behind what is kept, so that its own gradient is 0
                hook_component(model, (component, layer), _gate(shut, layer), hooks)
        total = METRICS[metric](answer_logits(model, batch), batch, None).sum()
    changes = {}
    with torch.no_grad():
        for edit in edits:
            new = _patched(seen[edit.edits], edit, batch, resolved)
            if edit.recomputes:
                new = _pattern(model, edit, new, calls)
            changes[edit] = seen[edit.reads].float() - new.float()

    effects: dict[_PatchGroup, list[Tensor]] = {edit: [] for edit in edits}
    places = list(dict.fromkeys(edit.reads for edit in edits))
    for layer in range(n_layers(model.config)) if grad_drop else (-1,):
        shut.clear()
        shut.add(layer)
        found = torch.autograd.grad(total, [seen[where] for where in places], retain_graph=True)
        gradients = dict(zip(places, found, strict=True))
        for edit in edits:
            effects[edit].append(_by_head(changes[edit] * gradients[edit.reads].float(), edit, model).cpu())
    return {edit: torch.stack(values) for edit, values in effects.items()}


def _patched(
    old: Float[Tensor, "batch pos width"],
    edit: _PatchGroup,
    batch: Batch,
    resolved: Resolved,
) -> Float[Tensor, "batch pos width"]:
    """A module's tensor with every head's source activations put in, at the positions of an edit."""
    new = old.clone()
    entries = head_entries(resolved.model, FIELD_NAMES[edit.place[0]], old.shape[-1]).flatten().to(old.device)
    for row, prompt in enumerate(batch.index):
        columns = torch.tensor(resolved.tokens[edit.positions][prompt], device=old.device)
        values = resolved.sources.measured.rows(edit.place, prompt, edit.positions)
        new[row, columns[:, None], entries] = values.flatten(1).to(old)
    return new


def _pattern(
    model: PreTrainedModel, edit: _PatchGroup, new: Tensor, calls: dict[int, tuple[tuple, dict]]
) -> Float[Tensor, "batch n_query n_head*n_key"]:
    """The attention pattern with patched queries or keys: the attention module called again as it was in this run."""
    component, layer = edit.edits
    args, kwargs = calls[layer]
    with ExitStack() as hooks:
        hook_component(model, (component, layer), lambda _: new, hooks)
        seen = record_activations(model, {edit.reads}, hooks)
        card_of(model).module(model, "attention_input", layer)(*args, **kwargs)
    return seen[edit.reads]


def _by_head(product: Tensor, edit: _PatchGroup, model: PreTrainedModel) -> Float[Tensor, "batch head"]:
    """The sum over what belongs to each head of the edited site: of a K/V head the patterns of all that read it."""
    component = COMPONENTS[FIELD_NAMES[edit.place[0]]]
    if component.heads is None:
        return product.flatten(1).sum(1, keepdim=True)
    read = "attention_pattern" if edit.recomputes else component.name
    by_head = split_heads(product, read, model).flatten(2).sum(-1)
    return by_head.unflatten(1, (dimensions(model.config)[component.heads], -1)).sum(-1)


def _gate(shut: Collection[int], layer: int) -> Callable[[Tensor], Tensor]:
    """The identity, through which no gradient passes while its layer is shut."""

    def through(x: Tensor) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: torch.zeros_like(gradient) if layer in shut else gradient)
        return x

    return through


def resolve_patches(
    model: PreTrainedModel,
    patches: Patches,
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    metric: str = "logit_diff",
    *,
    qk_fix: bool = False,
) -> Resolved:
    """The patches on the pairs; raises ValueError for whatever `atp` refuses (or `atp_star` with `qk_fix`), and runs nothing."""
    specs = as_specs(patches)
    for patch in (patch for spec in specs for patch in members(spec)):
        if not isinstance(patch, ActivationPatch):
            raise ValueError(
                f"{patch.name} is no patch; attribution patching takes ActivationPatch (screen.estimate ablations too)."
            )
        if qk_fix and patch.site in ("q", "k"):
            card_of(model).component(model, "attention_pattern")
        if patch.subspace:
            raise ValueError(f"{patch.name}: attribution patching takes whole activations; leave subspace out.")
    check_tokenized(model, base, source)
    refuse_latent_steps(model, (*base.input_ids, *source.input_ids))
    check_differentiable(metric, DIFFERENTIABLE, model.dtype)
    check_metric(model, base, metric)
    resolved = resolve(specs, model, base, source)
    check_places(model, specs)
    return resolved
