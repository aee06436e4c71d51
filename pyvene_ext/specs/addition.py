"""Steering: a given vector, times a scale, added to activations (Turner et al. 2023; Rimsky et al. 2024)."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from pyvene import AdditionIntervention
from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.io.errors import counted
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.specs.base import VECTORS, ModelShape, SiteEdit, plain
from pyvene_ext.specs.sources import Sources

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Addition(SiteEdit):
    """Add a vector, times a scale, to the activations of a site.

    Attributes:
        kind: "add".
        site: z, attn_out, mlp_out, resid_pre, resid_mid, resid_post or embed.
        layer: as in `SiteEdit`.
        heads: as in `SiteEdit`; every head named gets the same vector.
        positions: as in `SiteEdit`.
        vector: d_model numbers, or d_head for z, as a list, an array or a tensor of any dtype on any device, whose values are
            copied; `steering_vector` computes one from prompts.
        scale: factor of the vector; the product is taken in float32 and added in the model's dtype.
    """

    what = "addition"
    sites = VECTORS

    kind: Literal["add"] = "add"
    vector: tuple[Number, ...]
    scale: Number = 1.0

    @field_validator("vector", mode="before")
    @classmethod
    def _numbers(cls, vector: Any) -> Any:
        numbers = plain(vector)
        if not isinstance(numbers, tuple) or not numbers or any(isinstance(number, tuple) for number in numbers):
            shape = getattr(vector, "shape", None)
            given = reprlib.repr(vector) if shape is None else f"an array of shape {tuple(shape)}"
            raise ValueError(f"a vector has one axis and one number or more, unlike {given}.")
        wrong = [
            at for at, number in enumerate(numbers) if type(number) not in (int, float) or not abs(number) < math.inf
        ]
        if wrong:
            raise ValueError(f"number {wrong[0]} of {len(numbers)} must be a finite number, not {numbers[wrong[0]]!r}.")
        return numbers

    @property
    def name(self) -> str:
        """A short name, unique to the vector: "resid_post.3@last:add/1f0c9a2e*4"."""
        times = "" if self.scale == 1 else f"*{self.scale:g}"
        return f"{self.where}:add/{data_hash(self.vector)[:8]}{times}"

    @property
    def same_for_all(self) -> bool:
        """Every prompt gets the same vector."""
        return True

    @property
    def on_new_tokens(self) -> bool:
        """The vector is given, so it can be added at generated tokens too."""
        return True

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return AdditionIntervention

    def check(self, model: PreTrainedModel | ModelShape) -> None:
        """Check that a model has the site and that the vector fits it.

        Args:
            model: a causal language model with a card, or its `ModelShape`.

        Raises:
            ValueError: the site, layer or a head is missing, or the vector has another width; the message says what there is.
        """
        model_shape = model if isinstance(model, ModelShape) else ModelShape.of(model)
        super().check(model_shape)
        width = model_shape.sizes["d_head" if self.heads else "d_model"]
        if len(self.vector) != width:
            of = f"each head of {self.site}" if self.heads else self.site
            raise ValueError(
                f"{self.name}: the vector has {counted(len(self.vector), 'number')}, and {of} has {width}."
            )

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """The scaled vector for every edited token (and head), `pos d` or `pos head d`."""
        added = torch.tensor(self.vector, dtype=torch.float32) * self.scale
        heads = () if self.heads is None else (len(self.heads),)
        return [added.expand(len(edited), *heads, len(added)) for edited in tokens]

    def apply(self, old: Tensor, values: Tensor | None) -> Tensor:
        """Add the vector to activations, `entry d`."""
        assert values is not None
        return old + values.to(old.dtype)
