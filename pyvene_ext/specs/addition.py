"""Steering: a given vector, times a scale, added to activations (Turner et al. 2023; Rimsky et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from pyvene import AdditionIntervention
from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.io.hashes import data_hash
from pyvene_ext.specs.base import VECTORS, Extent, SiteEdit
from pyvene_ext.specs.sources import Sources

Number = Annotated[float, Field(allow_inf_nan=False)]


class Addition(SiteEdit):
    """Add a vector, times a scale, to what a site holds.

    Attributes:
        site: z, attn_out, mlp_out, resid_pre, resid_mid, resid_post or embed.
        layer, heads, positions: as `SiteEdit` has them; every head named gets the same vector.
        vector: as many numbers as the site is wide: d_model, or d_head of z. A tensor or an array of one axis will do.
        scale: what it is multiplied by; the product is taken in float32 and added in the model's dtype.
    """

    what = "addition"
    sites = VECTORS

    kind: Literal["add"] = "add"
    vector: tuple[Number, ...]
    scale: Number = 1.0

    @field_validator("vector", mode="before")
    @classmethod
    def _numbers(cls, vector: Any) -> Any:
        if isinstance(vector, Tensor):
            vector = vector.detach().float().cpu().numpy()
        if isinstance(vector, np.ndarray):
            if vector.ndim != 1:
                raise ValueError(f"a vector has one axis, unlike an array of shape {vector.shape}.")
            vector = vector.tolist()
        return vector

    @model_validator(mode="after")
    def _has_a_vector(self) -> Self:
        if not self.vector:
            raise ValueError("a vector has one number or more.")
        return self

    @property
    def name(self) -> str:
        """A short name, different for different vectors: "resid_post.3@last:add/1f0c9a2e*4"."""
        times = "" if self.scale == 1 else f"*{self.scale:g}"
        return f"{self.where}:add/{data_hash(self.vector)[:8]}{times}"

    @property
    def same_for_all(self) -> bool:
        """Every prompt gets the same vector."""
        return True

    @property
    def on_new_tokens(self) -> bool:
        """The vector is given, and so exists at generated tokens too."""
        return True

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return AdditionIntervention

    def check(self, model: PreTrainedModel | Extent) -> None:
        """Raise ValueError, naming what the model has, if it has no such place or the vector does not fit it."""
        extent = model if isinstance(model, Extent) else Extent.of(model)
        super().check(extent)
        width = extent.sizes["d_head" if self.heads else "d_model"]
        if len(self.vector) != width:
            of = f"each head of {self.site}" if self.heads else self.site
            raise ValueError(f"{self.name}: the vector has {len(self.vector)} numbers, and {of} has {width}.")

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """The scaled vector at every edited token (and head), `pos d` or `pos head d`."""
        added = torch.tensor(self.vector, dtype=torch.float32) * self.scale
        heads = () if self.heads is None else (len(self.heads),)
        return [added.expand(len(edited), *heads, len(added)) for edited in tokens]

    def changed(self, old: Tensor, values: Tensor | None) -> Tensor:
        """Activations, `entry d`, with the vector added."""
        assert values is not None
        return old + values.to(old.dtype)
