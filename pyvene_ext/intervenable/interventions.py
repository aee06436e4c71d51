"""Interventions that pyvene has no class for: norm-matched noise, directions, ablated scores, redistributed attention.

Zero ablation is pyvene's `ZeroIntervention`. Mean, resample and Gaussian-noise ablation and most patches insert a given tensor,
which is pyvene's `VanillaIntervention`. All classes here are localist: they see `batch pos d` (unit `pos`) or `batch head pos d`
(units `h`, `h.pos`) unflattened.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pyvene import ConstantSourceIntervention, LocalistRepresentationIntervention
from pyvene.models.interventions import Intervention
from torch import Tensor


class NormMatchedIntervention(Intervention, LocalistRepresentationIntervention):
    """Replace each vector by one of the same norm in the direction of the source's vector.

    With isotropic Gaussian sources the direction is uniform on the sphere. A source vector of zeros gives zeros, never NaN.
    """

    def forward(
        self, base: Float[Tensor, "*units d"], source: Float[Tensor, "*units d"], *_: Any, **__: Any
    ) -> Float[Tensor, "*units d"]:
        """Rescale the source's vectors to the norms of the base's."""
        direction = torch.nn.functional.normalize(source.to(base.device, torch.float32), dim=-1)
        return (direction * base.float().norm(dim=-1, keepdim=True)).to(base.dtype)


class DirectionIntervention(Intervention, LocalistRepresentationIntervention):
    """Replace the component along one direction and keep what is orthogonal to it: x + ((s - x) . w) w.

    The source is the concatenation of s and the unit vector w, so that each head can have its own direction. (pyvene's low-rank
    interventions have one set of directions for all heads.)
    """

    def forward(
        self, base: Float[Tensor, "*units d"], source: Float[Tensor, "*units 2*d"], *_: Any, **__: Any
    ) -> Float[Tensor, "*units d"]:
        """Move the base to the source's value along the direction."""
        value, direction = source.to(base.device, torch.float32).chunk(2, -1)
        change = ((value - base.float()) * direction).sum(-1, keepdim=True)
        return (base.float() + change * direction).to(base.dtype)


class MaskScoresIntervention(ConstantSourceIntervention, LocalistRepresentationIntervention):
    """Set every score to -inf: the head attends to nothing. The card's taps define the output of such a query as 0."""

    def forward(
        self, base: Float[Tensor, "batch head query key"], *_: Any, **__: Any
    ) -> Float[Tensor, "batch head query key"]:
        """Mask every score."""
        return torch.full_like(base, -torch.inf)


class UniformScoresIntervention(ConstantSourceIntervention, LocalistRepresentationIntervention):
    """Replace every unmasked score of a query by the query's mean unmasked score: uniform attention over its visible keys.

    Softmax is invariant to a shift of a row, so the mean of the row and that of the whole head give the same pattern; the row's
    is used so that other queries, padding among them, cannot matter. Masked entries are those at -inf.
    """

    def forward(
        self, base: Float[Tensor, "batch head query key"], *_: Any, **__: Any
    ) -> Float[Tensor, "batch head query key"]:
        """Average each query's unmasked scores."""
        visible = base > -torch.inf
        total = base.float().masked_fill(~visible, 0.0).sum(-1, keepdim=True)
        mean = total / visible.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(visible, mean.to(base.dtype), base)


class ForcedRowsIntervention(Intervention, LocalistRepresentationIntervention):
    """Redistribute the attention that a query pays to a range of keys: most to one key, the rest evenly to some others.

    The source has five numbers per query: the first key whose mass is taken, the first key that receives some, the last key of
    both ranges, the key that receives the peak, and the fraction of the mass for the other keys. Zeros change nothing.
    """

    def forward(
        self, base: Float[Tensor, "*units key"], source: Float[Tensor, "*units 5"], *_: Any, **__: Any
    ) -> Float[Tensor, "*units key"]:
        """Move each query's attention mass to the keys that the source names."""
        taken_from, first, last, peak, rest = source.to(base.device, torch.float32).unsqueeze(-2).unbind(-1)
        key, pattern = torch.arange(base.shape[-1], device=base.device), base.float()
        taken = (taken_from <= key) & (key <= last)
        share = torch.where(key == peak, 1 - rest, rest / (last - first).clamp(min=1))
        share = share.masked_fill((key < first) | (key > last), 0.0)
        mass = (pattern * taken).sum(-1, keepdim=True)
        return (pattern.masked_fill(taken, 0.0) + mass * share).to(base.dtype)
