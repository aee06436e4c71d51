"""From specs to pyvene: checks before anything runs, then one `IntervenableConfig` with its places and replacements per batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from pyvene import IntervenableConfig, RepresentationConfig, VanillaIntervention, ZeroIntervention
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import dimensions, window
from pyvene_ext.intervenable.interventions import (
    DirectionIntervention,
    ForcedRowsIntervention,
    MaskScoresIntervention,
    NormMatchedIntervention,
    UniformScoresIntervention,
)
from pyvene_ext.intervenable.statistics import Reference, check_reference_prompts
from pyvene_ext.io.seeds import rng
from pyvene_ext.models.devices import input_device
from pyvene_ext.prompts.positions import Positions, token_indices
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.base import Extent
from pyvene_ext.specs.forced_attention import ForcedAttention, block_tokens, forced_rows
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    members,
    needs,
)
from pyvene_ext.specs.patch import ActivationPatch


def donors(prompts: TokenizedPrompts, reference: TokenizedPrompts, positions: Positions, seed: int) -> list[int]:
    """For every prompt, the reference prompt whose activations replace its own; independent of batches and of what is edited.

    Where the prompts are their own reference set this is a derangement: a random cycle, so nobody gets itself and everybody gives
    once. With another reference set each prompt draws among those that differ from it. With positions "all" a donor must have as
    many tokens as the prompt. Raises ValueError naming a prompt without a possible donor.
    """
    return list(_donors(prompts, reference, positions, seed))


@lru_cache  # drawn once for all the specs of a sweep
def _donors(prompts: TokenizedPrompts, reference: TokenizedPrompts, positions: Positions, seed: int) -> tuple[int, ...]:
    draw = rng(seed, "donors")
    groups: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(reference.input_ids):
        groups[len(ids) if positions == "all" else 0].append(index)
    chosen: dict[int, int] = {}
    if reference.input_ids == prompts.input_ids:
        for group in groups.values():
            cycle = [group[i] for i in draw.permutation(len(group))]
            if len(cycle) > 1:
                chosen |= zip(cycle, cycle[1:] + cycle[:1], strict=True)
    else:
        for prompt, ids in enumerate(prompts.input_ids):
            group = groups[len(ids) if positions == "all" else 0]
            if others := [index for index in group if reference.input_ids[index] != ids]:
                chosen[prompt] = int(draw.choice(others))
    for prompt, ids in enumerate(prompts.input_ids):
        if prompt not in chosen:
            which = f" of its length ({len(ids)} tokens)" if positions == "all" else ""
            remedy = ', or resample at positions="last" or a named position' if which else ""
            raise ValueError(
                f"prompt {prompt} cannot be resampled, because the reference set has no other prompt{which}; "
                f"add prompts{remedy}."
            )
    return tuple(chosen[prompt] for prompt in range(len(prompts.input_ids)))


def check_specs(
    specs: Iterable[Spec], model: PreTrainedModel, prompts: TokenizedPrompts, reference_prompts: TokenizedPrompts
) -> None:
    """Raise ValueError for anything that would go wrong later: in this model, on these prompts, with this reference set."""
    specs = list(specs)
    wanted = needs(specs)
    if wanted["places"]:
        check_reference_prompts(reference_prompts, wanted["position_means"], wanted["bank"])
    seen: set[tuple] = set()
    extent = Extent.of(model)
    for ablation in (a for spec in specs for a in members(spec)):
        ablation.check(extent)
        if isinstance(ablation, ActivationPatch):
            if (ablation.positions, "patch") not in seen:
                _check_pairs(ablation, prompts, reference_prompts)
            seen.add((ablation.positions, "patch"))
            continue
        if isinstance(ablation, ForcedAttention):
            if (ablation.block, ablation.hub) not in seen:
                for prompt in range(len(prompts)):
                    block_tokens(ablation, prompts, prompt)
            seen.add((ablation.block, ablation.hub))
            continue
        aligned = ablation.mean == "per_position" and ablation.positions == "all"
        if (key := (ablation.positions, ablation.kind, ablation.seed, aligned)) in seen:
            continue
        seen.add(key)
        for prompt, ids in enumerate(prompts.input_ids):
            tokens = token_indices(prompts, prompt, ablation.positions)
            if len(set(tokens)) < len(tokens):
                raise ValueError(f"{ablation.name}: two of these positions are the same token of prompt {prompt}.")
            if aligned and len(ids) != len(reference_prompts.input_ids[0]):
                raise ValueError(
                    f"{ablation.name}: prompt {prompt} has {len(ids)} tokens and the reference prompts have "
                    f'{len(reference_prompts.input_ids[0])}; use mean="over_tokens" or named positions.'
                )
        if ablation.kind == "resample":
            donors(prompts, reference_prompts, ablation.positions, ablation.seed)


def _check_pairs(patch: ActivationPatch, base: TokenizedPrompts, source: TokenizedPrompts) -> None:
    """Raise ValueError, naming the pair, where a patch does not know which token of a source prompt belongs where."""
    if len(base.input_ids) != len(source.input_ids):
        raise ValueError(
            f"{patch.name}: there are {len(base.input_ids)} base prompts and {len(source.input_ids)} source prompts; give each "
            "base prompt its source."
        )
    for prompt, (ids, source_ids) in enumerate(zip(base.input_ids, source.input_ids, strict=True)):
        tokens = token_indices(base, prompt, patch.positions)
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"{patch.name}: two of these positions are the same token of prompt {prompt}.")
        if patch.positions == "all" and len(ids) != len(source_ids):
            raise ValueError(
                f"{patch.name}: the base prompt of pair {prompt} has {len(ids)} tokens and its source {len(source_ids)}, so that "
                "their tokens do not correspond; patch named positions, or leave the pair out."
            )
        token_indices(source, prompt, patch.positions)


@dataclass(frozen=True)
class Compiled:
    """One spec on one batch, in pyvene's words.

    Attributes:
        config: a plain IntervenableConfig, one representation an ablation.
        unit_locations: where in this batch.
        replacements: for every representation what is put in place, or None where the intervention knows by itself:
            `batch pos d` or `batch head pos d`.
    """

    config: IntervenableConfig
    unit_locations: dict[str, list]
    replacements: tuple[Tensor | None, ...]

    def source_representations(self, keys: Sequence[str]) -> dict[str, Tensor] | None:
        """The replacements by the keys of an IntervenableModel (`iv.sorted_keys`); new each time, as stock pyvene empties it."""
        return {k: r for k, r in zip(keys, self.replacements, strict=True) if r is not None} or None


def compile_specs(
    spec: Spec, batch: Batch, prompts: TokenizedPrompts, model: PreTrainedModel, reference: Reference | None = None
) -> Compiled:
    """Compile one spec, already checked, for one batch of `prompts`.

    The config depends on the spec alone, never on the batch or the heads, so that one IntervenableModel serves many calls.
    Replacement tensors lie on the model's device. At positions "all" padded slots are edited too; no real token sees them.
    """
    representations, locations, replacements = [], [], []
    device = input_device(model)
    width = batch.input_ids.shape[1]
    for ablation in members(spec):
        everywhere = ablation.positions == "all"
        tokens = [token_indices(prompts, prompt, ablation.positions) for prompt in batch.index]
        starts = [width - length if batch.padding_side == "left" else 0 for length in batch.lengths]
        columns = [[start + token for token in row] for start, row in zip(starts, tokens, strict=True)]
        if everywhere:
            columns = [list(range(width))] * len(tokens)
        heads = [list(ablation.heads or ())] * len(tokens)
        unit = "pos" if ablation.heads is None else "h" if everywhere else "h.pos"
        locations.append({"pos": columns, "h": heads, "h.pos": [heads, columns]}[unit])
        representations.append(
            RepresentationConfig(
                ablation.layer or 0, ablation.component.name, unit, intervention_type=intervention_of(ablation)
            )
        )
        replacement = None
        if ablation.site != "scores" and ablation.kind != "zero":
            values = replacements_of(ablation, batch.index, tokens, prompts, model, reference)
            if isinstance(ablation, ForcedAttention):
                # Keys are columns of this batch; the last number is none.
                shift = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
                values = [value + start * shift for value, start in zip(values, starts, strict=True)]
            replacement = values[0].new_zeros(len(values), len(columns[0]), *values[0].shape[1:])
            for row, start, value in zip(replacement, starts, values, strict=True):
                offset = start if everywhere else 0
                row[offset : offset + len(value)] = value
            replacement = (replacement.transpose(1, 2) if ablation.heads else replacement).to(device)
        replacements.append(replacement)
    return Compiled(IntervenableConfig(representations), {"base": locations}, tuple(replacements))


def intervention_of(ablation: OneSpec) -> type:
    """The class of the intervention that makes a spec's edit."""
    if isinstance(ablation, ActivationPatch):
        return DirectionIntervention if ablation.subspace else VanillaIntervention
    if isinstance(ablation, ForcedAttention):
        return ForcedRowsIntervention
    if ablation.site == "scores":
        return MaskScoresIntervention if ablation.kind == "zero" else UniformScoresIntervention
    if ablation.kind == "zero":
        return ZeroIntervention
    return NormMatchedIntervention if ablation.noise == "norm_matched" else VanillaIntervention


def replacements_of(
    ablation: OneSpec,
    batch: Sequence[int],
    tokens: Sequence[list[int]],
    prompts: TokenizedPrompts,
    model: PreTrainedModel,
    reference: Reference | None,
) -> list[Tensor]:
    """What replaces the activations of each prompt of a batch at its `tokens`, `pos d` or `pos head d`.

    Of a patch of one direction: the source's activations and the direction, side by side in `d`. Of forced attention: what its
    intervention is told, with keys counted from the prompt's first token.
    """
    place, positions = ablation.place, ablation.positions

    def own_heads(tensor: Tensor) -> Tensor:
        return tensor if ablation.heads is None else tensor[..., list(ablation.heads), :]

    if isinstance(ablation, ActivationPatch):
        if reference is None:
            raise ValueError(f"{ablation.name} needs source prompts; give their activations as reference.")
        if path := ablation.path:
            return [reference.recorded(path, place, prompt, ablation.heads) for prompt in batch]
        rows = [own_heads(reference.rows(place, prompt, positions)) for prompt in batch]
        if ablation.subspace:
            direction = own_heads(reference.direction(place, positions))
            rows = [torch.cat([value.float(), direction.expand_as(value)], -1) for value in rows]
        return rows

    if isinstance(ablation, ForcedAttention):
        reach = window(model.config, ablation.layer or 0)
        rows = [forced_rows(ablation, prompts, prompt, reach)[kept] for prompt, kept in zip(batch, tokens, strict=True)]
        return [of_prompt[:, None].expand(-1, len(ablation.heads or ()), -1) for of_prompt in rows]

    def drawn(prompt: int, kept: list[int]) -> Tensor:
        # One generator a vector's owner, and a whole prompt drawn at once: a token's noise depends on neither the batch, the
        # other heads, nor the other positions ablated.
        size = len(prompts.input_ids[prompt]), dimensions(model.config)["d_head" if ablation.heads else "d_model"]
        draws = [
            torch.from_numpy(
                rng(ablation.seed, "noise", *map(str, place), str(head), prompt).standard_normal(size)
            ).float()
            for head in ablation.heads or (None,)
        ]
        return (torch.stack(draws, 1) if ablation.heads else draws[0])[kept]

    if ablation.noise == "norm_matched":
        return [drawn(prompt, kept) for prompt, kept in zip(batch, tokens, strict=True)]
    if reference is None:
        raise ValueError(f"{ablation.name} needs reference statistics; compute them with reference_for.")
    if ablation.kind == "resample":
        givers = donors(prompts, reference.prompts, positions, ablation.seed)
        return [own_heads(reference.rows(place, givers[prompt], positions)) for prompt in batch]
    if ablation.kind == "noise":
        mean, std = own_heads(reference.mean(place)), own_heads(reference.std(place))
        return [mean + std * drawn(prompt, kept) for prompt, kept in zip(batch, tokens, strict=True)]
    if ablation.mean == "over_tokens":
        mean = own_heads(reference.mean(place))
        return [mean.expand(len(kept), *mean.shape) for kept in tokens]
    named = positions if isinstance(positions, tuple) else (positions,)
    mean = own_heads(torch.cat([reference.position_mean(place, position) for position in named]))
    return [mean] * len(tokens)
