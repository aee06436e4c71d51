"""Activation patches: the base prompt's activation replaced by its source prompt's."""

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
from pyvene_ext.specs.base import VECTORS, ModelShape, SiteEdit
from pyvene_ext.specs.sources import Directions, Needs, Sources


class ActivationPatch(SiteEdit):
    """Replace a base prompt's activation by its source prompt's (Meng et al. 2022; Wang et al. 2022).

    The source prompts are the `reference` of a run, one for each prompt; `pyvene_ext.patch` takes care of that.

    Attributes:
        kind: "patch".
        site: q, k, v (before RoPE), z, attn_out, mlp_in, mlp_out, resid_pre, resid_mid, resid_post or embed.
        layer: as in `SiteEdit`.
        heads: as in `SiteEdit`.
        positions: as in `SiteEdit`; a name is looked up in each of the two prompts.
        subspace: replace only the component along the concept direction (`pyvene_ext.methods.patching.subspace`), keep the rest.
        path: set by path patching only: the path whose recorded value replaces the activation instead
            (`pyvene_ext.methods.patching.patch`).
    """

    what = "patch"
    sites = ("q", "k", "v", "mlp_in", *VECTORS)

    kind: Literal["patch"] = "patch"
    subspace: bool = False
    path: StrictStr | None = None

    @property
    def name(self) -> str:
        """A short name: "k.2.0@subject:patch", "z.2.5:patch/subspace", or the path's name."""
        return self.path or f"{self.where}:patch" + ("/subspace" if self.subspace else "")

    @property
    def needs(self) -> Needs:
        """The source prompts' activations at the place; nothing for a path, whose value has been recorded."""
        named = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        return Needs() if self.path else Needs((self.place,), (), named)

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return DirectionIntervention if self.subspace else VanillaIntervention

    def check_prompts(self, prompts: TokenizedPrompts, tokens: Sequence[Sequence[int]], sources: Sources) -> None:
        """Check that base and source prompts are pairs whose tokens correspond.

        Args:
            prompts: the base prompts.
            tokens: the edited tokens of each of them.
            sources: holds the source prompts, or what was recorded for a path.

        Raises:
            ValueError: source prompts or recorded values are missing, their number differs, or (at positions "all") the lengths
                of a pair, which the message names.
        """
        super().check_prompts(prompts, tokens, sources)
        if self.path and sources.recorded is None:
            raise ValueError(
                f"nothing was recorded for the path {self.path}; path patching does that: pyvene_ext.patch."
            )
        if self.path:
            return
        source = sources.source_prompts
        if source is None:
            raise ValueError(
                f"{self.name} takes its activations from source prompts; call pyvene_ext.patch, which runs them."
            )
        if len(prompts) != len(source):
            raise ValueError(
                f"{self.name}: there are {len(prompts)} base prompts and {len(source)} source prompts; give each base prompt its "
                "source."
            )
        for pair, (ids, source_ids) in enumerate(zip(prompts.input_ids, source.input_ids, strict=True)):
            if self.positions == "all" and len(ids) != len(source_ids):
                raise ValueError(
                    f"{self.name}: the base prompt of pair {pair} has {len(ids)} tokens and its source {len(source_ids)}, so "
                    "that their tokens do not correspond; patch named positions, or leave the pair out."
                )

    def check_directions(self, directions: Directions, model_shape: ModelShape) -> None:
        """Check the concept direction of a patch with `subspace`.

        Args:
            directions: by place and positions, `*head d`.
            model_shape: of the model that is patched.

        Raises:
            ValueError: the direction is missing, has another shape, or has a length other than 1 (or 0) for a patched head.
        """
        if not self.subspace:
            return
        found, by_head = directions.get((self.place, self.positions)), self.component.heads
        shape = (
            (model_shape.sizes[by_head], model_shape.sizes["d_head"]) if by_head else (model_shape.sizes["d_model"],)
        )
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            what = "no tensor" if not isinstance(found, Tensor) else f"one of shape {tuple(found.shape)}"
            raise ValueError(
                f"{self.name}: directions has {what} under {(self.place, self.positions)!r}; give one of shape {shape}, or call "
                "pyvene_ext.patch without directions, which then computes them."
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
        """The source's activations, `pos d` or `pos head d`; with `subspace` the direction is concatenated to them along `d`."""
        if self.path:
            assert sources.recorded is not None  # `check_prompts` has checked it
            return [sources.recorded.values(self.path, self.place, prompt, self.heads) for prompt in prompts]
        rows = [self.select_heads(sources.statistics.rows(self.place, prompt, self.positions)) for prompt in prompts]
        if self.subspace:
            direction = self.select_heads(sources.directions[self.place, self.positions])
            rows = [torch.cat([value.float(), direction.expand_as(value)], -1) for value in rows]
        return rows

    def apply(self, old: Tensor, values: Tensor | None) -> Tensor:
        """Replace activations, `entry d`, by the source's, or only their component along the direction."""
        assert values is not None
        return DirectionIntervention()(old, values) if self.subspace else values.to(old.dtype)
