"""One spec on one batch, in pyvene's words: an `IntervenableConfig`, unit locations, and what is put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pyvene import IntervenableConfig, RepresentationConfig
from torch import Tensor

from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.models.devices import input_device
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, members


@dataclass(frozen=True)
class Compiled:
    """One spec on one batch, in pyvene's words.

    Attributes:
        config: a plain IntervenableConfig, one representation an edit.
        unit_locations: where in this batch.
        replacements: for every representation what is put in place, or None where the intervention needs nothing:
            `batch pos d` or `batch head pos d`.
    """

    config: IntervenableConfig
    unit_locations: dict[str, list]
    replacements: tuple[Tensor | None, ...]

    def source_representations(self, keys: Sequence[str]) -> dict[str, Tensor] | None:
        """The replacements by the keys of an IntervenableModel (`iv.sorted_keys`); new each time, as stock pyvene empties it."""
        return {k: r for k, r in zip(keys, self.replacements, strict=True) if r is not None} or None


def compile_spec(spec: Spec, batch: Batch, resolved: Resolved) -> Compiled:
    """Compile one spec, already resolved and measured, for one batch of its prompts.

    The config depends on the spec alone, never on the batch or the heads, so that one IntervenableModel serves many calls.
    Replacement tensors lie on the model's device. At positions "all" padded slots are edited too; no real token sees them.
    """
    representations, locations = [], []
    replacements: list[Tensor | None] = []
    device = input_device(resolved.model)
    width = batch.input_ids.shape[1]
    starts = [width - length if batch.padding_side == "left" else 0 for length in batch.lengths]
    for edit in members(spec):
        everywhere = edit.positions == "all"
        if everywhere:
            columns = [list(range(width))] * len(starts)
        else:
            tokens = resolved.tokens_of(edit, batch.index)
            columns = [[start + token for token in row] for start, row in zip(starts, tokens, strict=True)]
        heads = [list(edit.heads or ())] * len(starts)
        unit = "pos" if edit.heads is None else "h" if everywhere else "h.pos"
        locations.append({"pos": columns, "h": heads, "h.pos": [heads, columns]}[unit])
        representations.append(
            RepresentationConfig(edit.layer or 0, edit.component.name, unit, intervention_type=edit.intervention)
        )
        values = resolved.replacements(edit, batch.index)
        if values is None:
            replacements.append(None)
            continue
        values = [edit.to_columns(value, start) for value, start in zip(values, starts, strict=True)]
        replacement = values[0].new_zeros(len(values), len(columns[0]), *values[0].shape[1:])
        for row, start, value in zip(replacement, starts, values, strict=True):
            offset = start if everywhere else 0
            row[offset : offset + len(value)] = value
        replacements.append((replacement.transpose(1, 2) if edit.heads else replacement).to(device))
    return Compiled(IntervenableConfig(representations), {"base": locations}, tuple(replacements))


def for_new_tokens(compiled: Compiled, scope: str, new: int) -> Compiled:
    """The same for generation: replacements for the prompt, for `new` generated tokens, or both, as `scope` says.

    A new token gets what the prompt's last column gets, which is a token of every row; the first one may be padding.
    """
    if scope == "prompt":
        return compiled
    replacements = tuple(
        None if values is None else in_scope(beyond_prompt(values, new), scope, new) for values in compiled.replacements
    )
    return Compiled(compiled.config, compiled.unit_locations, replacements)


def beyond_prompt(values: Float[Tensor, "*batch pos d"], new: int) -> Float[Tensor, "*batch pos+new d"]:
    """Replacements for the prompt with those of its last column repeated for new tokens."""
    return torch.cat([values, values[..., -1:, :].expand(*values.shape[:-2], new, -1)], -2)


def in_scope(values: Float[Tensor, "*batch pos+new d"], scope: str, new: int) -> Float[Tensor, "*batch pos d"]:
    """Of replacements for the prompt and for new tokens, those that a scope asks for."""
    return values if scope == "both" else values[..., :-new, :] if scope == "prompt" else values[..., -new:, :]
