"""Edits that pyvene has no class for: norm-matched noise, patches of one direction, the two ablations of attention scores, and
attention shared out anew.

Zero ablation is pyvene's `ZeroIntervention`; mean, resample and Gaussian noise put a given tensor in place, which is pyvene's
`VanillaIntervention`; so do patches, but those of one direction. All are localist: they see `batch pos d` (unit `pos`) or
`batch head pos d` (units `h`, `h.pos`) as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pyvene import ConstantSourceIntervention, LocalistRepresentationIntervention
from pyvene.models.interventions import Intervention
from torch import Tensor


class NormMatchedIntervention(Intervention, LocalistRepresentationIntervention):
    """Replace each vector by one of the same length in the direction of the source's vector.

    With isotropic Gaussian sources the direction is uniform on the sphere. A source vector of zeros gives zeros, never NaN.
    """

    def forward(
        self, base: Float[Tensor, "*units d"], source: Float[Tensor, "*units d"], *_: Any, **__: Any
    ) -> Float[Tensor, "*units d"]:
        direction = torch.nn.functional.normalize(source.to(base.device, torch.float32), dim=-1)
        return (direction * base.float().norm(dim=-1, keepdim=True)).to(base.dtype)


class DirectionIntervention(Intervention, LocalistRepresentationIntervention):
    """Replace the component along one direction and leave what is orthogonal to it: x + ((s - x) . w) w.

    The source holds s and w, a vector of length 1, side by side. (pyvene's low-rank interventions hold their directions
    themselves, one for all heads.)
    """

    def forward(
        self, base: Float[Tensor, "*units d"], source: Float[Tensor, "*units 2*d"], *_: Any, **__: Any
    ) -> Float[Tensor, "*units d"]:
        value, direction = source.to(base.device, torch.float32).chunk(2, -1)
        change = ((value - base.float()) * direction).sum(-1, keepdim=True)
        return (base.float() + change * direction).to(base.dtype)


class MaskScoresIntervention(ConstantSourceIntervention, LocalistRepresentationIntervention):
    """Every score -inf: the head attends to nothing. The card's scores define such a row's head output as 0."""

    def forward(
        self, base: Float[Tensor, "batch head query key"], *_: Any, **__: Any
    ) -> Float[Tensor, "batch head query key"]:
        return torch.full_like(base, -torch.inf)


class UniformScoresIntervention(ConstantSourceIntervention, LocalistRepresentationIntervention):
    """Every unmasked score of a query replaced by that query's mean unmasked score: uniform attention over what it may see.

    Softmax does not change when a row is shifted, so the mean of the row and the mean of the whole head give the same pattern;
    the row's is used because other queries, padded ones among them, then cannot matter. Masked entries are those at -inf.
    """

    def forward(
        self, base: Float[Tensor, "batch head query key"], *_: Any, **__: Any
    ) -> Float[Tensor, "batch head query key"]:
        visible = base > -torch.inf
        total = base.float().masked_fill(~visible, 0.0).sum(-1, keepdim=True)
        mean = total / visible.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(visible, mean.to(base.dtype), base)


class ForcedRowsIntervention(Intervention, LocalistRepresentationIntervention):
    """Take the attention that a query gives to a run of keys, and share it out anew: most to one key, the rest to some others.

    The source holds five numbers a query: the first key whose mass is taken, the first key that gets some, the last key of both
    runs, the key that gets the peak, and what part of the mass is left for the others, to be shared evenly. Zeros change nothing.
    """

    def forward(
        self, base: Float[Tensor, "*units key"], source: Float[Tensor, "*units 5"], *_: Any, **__: Any
    ) -> Float[Tensor, "*units key"]:
        taken_from, first, last, peak, rest = source.to(base.device, torch.float32).unsqueeze(-2).unbind(-1)
        key, pattern = torch.arange(base.shape[-1], device=base.device), base.float()
        taken = (taken_from <= key) & (key <= last)
        share = torch.where(key == peak, 1 - rest, rest / (last - first).clamp(min=1))
        share = share.masked_fill((key < first) | (key > last), 0.0)
        mass = (pattern * taken).sum(-1, keepdim=True)
        return (pattern.masked_fill(taken, 0.0) + mass * share).to(base.dtype)
