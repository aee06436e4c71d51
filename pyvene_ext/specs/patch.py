"""Activation patches: a source prompt's activation in place of the base prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import (
    StrictStr,
)
from pyvene import VanillaIntervention
from torch import Tensor

from pyvene_ext.intervenable.interventions import DirectionIntervention
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.base import VECTORS, Extent, SiteEdit
from pyvene_ext.specs.sources import Directions, Needs, Sources


class ActivationPatch(SiteEdit):
    """Put a source prompt's activation in place of the base prompt's own (Meng et al. 2022; Wang et al. 2022).

    Attributes:
        site: q, k, v (before RoPE), z, attn_out, mlp_in, mlp_out, resid_pre, resid_mid, resid_post or embed.
        layer, heads, positions: as `SiteEdit` has them; a name is looked up in each of the two prompts.
        subspace: replace only the component along the concept direction (`pyvene_ext.methods.patching.subspace`), leave the rest.
        path: set by path patching alone: the path whose recorded value is put here instead (`pyvene_ext.methods.patching.patch`).

    The source prompts are the `reference` of a run, one for each prompt (`pyvene_ext.patch` arranges it).
    """

    what = "patch"
    sites = ("q", "k", "v", "mlp_in", *VECTORS)

    kind: Literal["patch"] = "patch"
    subspace: bool = False
    path: StrictStr | None = None

    @property
    def name(self) -> str:
        """A short name: "k.2.0@subject:patch", "z.2.5:patch/subspace", or that of the path."""
        return self.path or f"{self.where}:patch" + ("/subspace" if self.subspace else "")

    @property
    def needs(self) -> Needs:
        """The source prompts' activations at the place; of a path nothing, because its value was recorded."""
        named = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        return Needs() if self.path else Needs((self.place,), (), named)

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return DirectionIntervention if self.subspace else VanillaIntervention

    def check_prompts(self, prompts: TokenizedPrompts, tokens: Sequence[Sequence[int]], sources: Sources) -> None:
        """Raise ValueError, naming the pair, where it is unknown which token of a source prompt belongs where."""
        super().check_prompts(prompts, tokens, sources)
        if self.path and sources.recorded is None:
            raise ValueError(
                f"nothing was recorded for the path {self.path}; path patching does that: pyvene_ext.patch."
            )
        if self.path:
            return
        given = sources.given
        if given is None:
            raise ValueError(
                f"{self.name} takes its activations from source prompts; call pyvene_ext.patch, which has them run."
            )
        if len(prompts) != len(given):
            raise ValueError(
                f"{self.name}: there are {len(prompts)} base prompts and {len(given)} source prompts; give each base prompt its "
                "source."
            )
        for pair, (ids, of_source) in enumerate(zip(prompts.input_ids, given.input_ids, strict=True)):
            if self.positions == "all" and len(ids) != len(of_source):
                raise ValueError(
                    f"{self.name}: the base prompt of pair {pair} has {len(ids)} tokens and its source {len(of_source)}, so that "
                    "their tokens do not correspond; patch named positions, or leave the pair out."
                )

    def check_directions(self, directions: Directions, extent: Extent) -> None:
        """Raise ValueError unless there is a direction of length 1 (or 0) for the place, or for each head patched."""
        if not self.subspace:
            return
        found, by_head = directions.get((self.place, self.positions)), self.component.heads
        shape = (extent.sizes[by_head], extent.sizes["d_head"]) if by_head else (extent.sizes["d_model"],)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            what = "no tensor" if not isinstance(found, Tensor) else f"one of shape {tuple(found.shape)}"
            raise ValueError(
                f"{self.name}: directions has {what} under {(self.place, self.positions)!r}; give one of shape {shape}, or call "
                "pyvene_ext.patch without directions, which finds them."
            )
        for head in self.heads or (...,):
            length = found[head].double().norm().item()
            if not (abs(length - 1) < 1e-3 or length == 0):
                raise ValueError(
                    f"{self.name}: its direction has length {length:.3g}; divide it by that, so that it is 1."
                )

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """The source's activations, `pos d` or `pos head d`; along one direction, that direction beside them in `d`."""
        if self.path:
            assert sources.recorded is not None  # `check_prompts` has seen to it
            return [sources.recorded.values(self.path, self.place, prompt, self.heads) for prompt in prompts]
        rows = [self.own_heads(sources.measured.rows(self.place, prompt, self.positions)) for prompt in prompts]
        if self.subspace:
            direction = self.own_heads(sources.directions[self.place, self.positions])
            rows = [torch.cat([value.float(), direction.expand_as(value)], -1) for value in rows]
        return rows

    def changed(self, old: Tensor, values: Tensor | None) -> Tensor:
        """The source's activations in place of these, `entry d`, or along the direction alone."""
        assert values is not None
        return DirectionIntervention()(old, values) if self.subspace else values.to(old.dtype)
