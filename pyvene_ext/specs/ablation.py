"""Ablations: a site taken out and replaced by zero, a mean, another prompt's activation or noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    StrictInt,
    model_validator,
)

from modelcards import n_heads, n_layers
from pyvene_ext.specs.base import VECTORS, SiteEdit

Kind = Literal["zero", "mean", "resample", "noise"]
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*VECTORS, "k", "v"), ("zero", "mean", "resample", "noise")),
    "scores": ("zero", "mean"),
}


class Ablation(SiteEdit):
    """Take one site of one layer out.

    Attributes:
        kind: what comes in its place. zero: nothing (of scores: attention to nothing, so a head output of 0); mean: the reference
            set's mean (of scores: uniform attention over the visible keys); resample: another prompt's activation; noise.
        site: z, k, v (before RoPE; K/V heads), attn_out, mlp_out, resid_pre, resid_mid, resid_post, embed or scores.
        layer, heads, positions: as `SiteEdit` has them.
        mean: over_tokens: over all real tokens of the reference set; per_position: over its prompts, each at the position that
            is replaced.
        noise: gaussian: the reference set's mean and standard deviation per dimension; norm_matched: isotropic, each vector as
            long as the one it replaces.
        seed: of donors and noise.
    """

    what = "ablation"
    sites = tuple(KINDS)

    kind: Kind
    mean: Literal["over_tokens", "per_position"] = "over_tokens"
    noise: Literal["gaussian", "norm_matched"] = "gaussian"
    seed: Annotated[StrictInt, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Ablation:
        if self.kind not in KINDS[self.site]:
            raise ValueError(f"{self.site} has no {self.kind} ablation; choose {' or '.join(KINDS[self.site])}.")
        if self.mean != "over_tokens" and (self.kind != "mean" or self.site == "scores"):
            raise ValueError(
                f"mean={self.mean!r} says nothing about a {self.kind} ablation of {self.site}: leave mean out."
            )
        if self.noise != "gaussian" and self.kind != "noise":
            raise ValueError(f"noise={self.noise!r} says nothing about a {self.kind} ablation: leave noise out.")
        return self

    @property
    def name(self) -> str:
        """A short name, different for different ablations: "z.2.5", "mlp_out.3@last:mean", "z.0.1,4:noise/norm_matched"."""
        if self.kind == "zero" and not self.seed:  # to which mean and noise say nothing
            return self.where
        default = type(self).model_fields
        variants = [str(getattr(self, f)) for f in ("mean", "noise") if getattr(self, f) != default[f].default]
        variants += [f"seed{self.seed}"] if self.seed else []
        return "/".join([f"{self.where}:{self.kind}", *variants])

    @property
    def uses_reference(self) -> bool:
        """Whether statistics of a reference set are needed."""
        return self.site != "scores" and self.kind != "zero" and self.noise != "norm_matched"


def all_heads(config: Any, kind: Kind = "zero", site: str = "z", **fields: Any) -> list[Ablation]:
    """One ablation per query head of a model's config, by layer and head."""
    return [
        Ablation(kind=kind, site=site, layer=layer, heads=(head,), **fields)
        for layer in range(n_layers(config))
        for head in range(n_heads(config))
    ]


def heads_together(
    heads: Iterable[tuple[int, int]], kind: Kind = "zero", site: str = "z", **fields: Any
) -> tuple[Ablation, ...]:
    """One joint ablation of these heads, given as (layer, head)."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return tuple(
        Ablation(kind=kind, site=site, layer=layer, heads=tuple(here), **fields)
        for layer, here in sorted(by_layer.items())
    )
