"""Compile one spec on one batch for pyvene: an `IntervenableConfig`, unit locations and source representations."""

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
    """One spec on one batch, as pyvene runs it.

    Attributes:
        config: a plain IntervenableConfig with one representation per edit.
        unit_locations: the edited heads and columns of this batch.
        replacements: for every representation its source, `batch pos d` or `batch head pos d`; None where the intervention takes
            none.
    """

    config: IntervenableConfig
    unit_locations: dict[str, list]
    replacements: tuple[Tensor | None, ...]

    def source_representations(self, keys: Sequence[str]) -> dict[str, Tensor] | None:
        """The replacements as an IntervenableModel takes them.

        Args:
            keys: its `sorted_keys`.

        Returns:
            A new dict with each call, because stock pyvene empties it; None if there are no replacements.
        """
        return {k: r for k, r in zip(keys, self.replacements, strict=True) if r is not None} or None


def compile_spec(spec: Spec, batch: Batch, resolved: Resolved) -> Compiled:
    """Compile one spec for one batch of its prompts.

    The config depends on the spec alone, never on the batch or the heads, so that one IntervenableModel serves many calls.
    Replacements are on the model's device. At positions "all" padding is edited too; no real token sees it. If answers follow the
    prompts, only the prompts' own tokens are edited.

    Args:
        spec: a single or joint spec.
        batch: some of the sequences that are run, padded on either side.
        resolved: the spec on the prompts, with the statistics it needs.

    Returns:
        What an IntervenableModel needs to run the spec on the batch.
    """
    representations, locations = [], []
    replacements: list[Tensor | None] = []
    device = input_device(resolved.model)
    width, starts = batch.input_ids.shape[1], batch.starts
    for edit in members(spec):
        everywhere = edit.positions == "all" and resolved.sequences.prompts is resolved.prompts
        if everywhere:
            columns = [list(range(width))] * len(starts)
        else:
            tokens = resolved.tokens_of(edit, batch.index)
            most = max(map(len, tokens))
            # Every row needs as many columns: a shorter prompt's last one is repeated, and set to one value more than once.
            tokens = [row + row[-1:] * (most - len(row)) for row in tokens]
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
            if not everywhere:
                row[len(value) :] = value[-1]
        replacements.append((replacement.transpose(1, 2) if edit.heads else replacement).to(device))
    return Compiled(IntervenableConfig(representations), {"base": locations}, tuple(replacements))


def for_generation(compiled: Compiled, scope: str, new: int) -> Compiled:
    """Convert a compiled spec for generation.

    A new token gets the replacement of the prompt's last column, which is a real token in every row; the first may be padding.

    Args:
        compiled: the spec on a batch that is padded on the left.
        scope: "prompt", "new" or "both": which tokens get replacements.
        new: how many tokens are generated at most.

    Returns:
        The same config and locations with replacements for the tokens in scope.
    """
    if scope == "prompt":
        return compiled
    replacements = tuple(
        None if values is None else select_scope(extend_to_new_tokens(values, new), scope, new)
        for values in compiled.replacements
    )
    return Compiled(compiled.config, compiled.unit_locations, replacements)


def extend_to_new_tokens(values: Float[Tensor, "*batch pos d"], new: int) -> Float[Tensor, "*batch pos+new d"]:
    """Extend replacements for the prompt to new tokens, which get those of the prompt's last column.

    Args:
        values: replacements for the prompt.
        new: number of new tokens.

    Returns:
        Replacements for prompt and new tokens.
    """
    return torch.cat([values, values[..., -1:, :].expand(*values.shape[:-2], new, -1)], -2)


def select_scope(values: Float[Tensor, "*batch pos+new d"], scope: str, new: int) -> Float[Tensor, "*batch pos d"]:
    """Select the replacements in scope.

    Args:
        values: replacements for the prompt and for new tokens.
        scope: "prompt", "new" (or another that excludes the prompt) or "both".
        new: number of new tokens.

    Returns:
        The replacements for the tokens in scope.
    """
    return values if scope == "both" else values[..., :-new, :] if scope == "prompt" else values[..., -new:, :]
