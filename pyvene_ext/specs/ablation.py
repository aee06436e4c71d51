"""Ablations: a site's activations replaced by zero, a mean, another prompt's activations or noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import (
    Field,
    StrictInt,
    model_validator,
)
from pyvene import VanillaIntervention, ZeroIntervention
from torch import Tensor

from modelcards import component_named, config_of, dimensions, n_heads, n_layers
from pyvene_ext.intervenable.interventions import (
    MaskScoresIntervention,
    NormMatchedIntervention,
    UniformScoresIntervention,
)
from pyvene_ext.intervenable.statistics import Place
from pyvene_ext.io.seeds import rng
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.base import VECTORS, SiteEdit
from pyvene_ext.specs.sources import Needs, Sources

Kind = Literal["zero", "mean", "resample", "noise"]
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*VECTORS, "k", "v"), ("zero", "mean", "resample", "noise")),
    "scores": ("zero", "mean"),
}


class Ablation(SiteEdit):
    """Ablate one site of one layer.

    Attributes:
        kind: what replaces the activation. zero: zeros (for scores: attention to nothing, so that the head's output is 0);
            mean: the reference set's mean (for scores: uniform attention over the visible keys); resample: another prompt's
            activation; noise: random vectors.
        site: z, k, v (before RoPE; K/V heads), attn_out, mlp_out, resid_pre, resid_mid, resid_post, embed or scores.
        layer: as in `SiteEdit`.
        heads: as in `SiteEdit`.
        positions: as in `SiteEdit`.
        mean: over_tokens: over all real tokens of the reference set; per_position: over its prompts, at the position that is
            replaced.
        noise: gaussian: with the reference set's mean and standard deviation per dimension; norm_matched: isotropic, with the
            norm of the vector it replaces.
        seed: of the choice of donors and of noise.
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
                f"mean={self.mean!r} does not apply to a {self.kind} ablation of {self.site}: leave mean out."
            )
        if self.noise != "gaussian" and self.kind != "noise":
            raise ValueError(f"noise={self.noise!r} does not apply to a {self.kind} ablation: leave noise out.")
        return self

    @property
    def name(self) -> str:
        """A short name, unique to the ablation: "z.2.5", "mlp_out.3@last:mean", "z.0.1,4:noise/norm_matched"."""
        if self.kind == "zero" and not self.seed:  # mean and noise do not apply
            return self.where
        default = type(self).model_fields
        variants = [str(getattr(self, f)) for f in ("mean", "noise") if getattr(self, f) != default[f].default]
        variants += [f"seed{self.seed}"] if self.seed else []
        return "/".join([f"{self.where}:{self.kind}", *variants])

    @property
    def needs(self) -> Needs:
        """The reference set's statistics at the place, unless the replacement does not depend on them."""
        if self.site == "scores" or self.kind == "zero" or self.noise == "norm_matched":
            return Needs()
        named = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        return Needs(
            (self.place,),
            named if self.mean == "per_position" else (),
            named if self.kind == "resample" else (),
        )

    @property
    def acts_at(self) -> str:
        """The site, or z for scores set to zero, because a head that attends to nothing has a z of 0."""
        return "z" if self.site == "scores" and self.kind == "zero" else self.site

    @property
    def first_order_place(self) -> Place:
        """The place, or z for scores, because they act on the rest of the model through z alone."""
        return ("z", self.layer) if self.site == "scores" else self.place

    @property
    def is_uniform(self) -> bool:
        """Whether scores are replaced by their mean, which is uniform attention."""
        return self.site == "scores" and self.kind == "mean"

    @property
    def same_for_all(self) -> bool:
        """Zeros and means are the same for every prompt."""
        return self.kind in ("zero", "mean")

    @property
    def on_new_tokens(self) -> bool:
        """Zeros, the mean over tokens and another text's activations are defined at generated tokens too."""
        return self.kind != "noise" and self.mean == "over_tokens"

    @property
    def prompt_key(self) -> Hashable:
        """Positions, and everything that the choice of donors depends on."""
        return self.positions, self.kind, self.seed, self.mean

    @property
    def _aligned(self) -> bool:
        """Whether every token is replaced by the mean of the tokens at the same position."""
        return self.mean == "per_position" and self.positions == "all"

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        if self.site == "scores":
            return UniformScoresIntervention if self.is_uniform else MaskScoresIntervention
        if self.kind == "zero":
            return ZeroIntervention
        return NormMatchedIntervention if self.noise == "norm_matched" else VanillaIntervention

    def check_prompts(self, prompts: TokenizedPrompts, tokens: Sequence[Sequence[int]], sources: Sources) -> None:
        """Check that every prompt has a replacement at every edited token.

        Args:
            prompts: the prompts that are intervened on.
            tokens: the edited tokens of each of them.
            sources: holds the reference set, by default the prompts themselves.

        Raises:
            ValueError: positions coincide, or a prompt has no mean for each of its positions, or no donor; the message names the
                prompt. Or the mean is that of one prompt, which is replaced by itself.
        """
        super().check_prompts(prompts, tokens, sources)
        reference_set = prompts if sources.source_prompts is None else sources.source_prompts
        if self.mean == "per_position" and len(prompts) == 1 and reference_set.input_ids == prompts.input_ids:
            raise ValueError(
                f"{self.name}: the mean over one prompt at each position is the prompt's own activation, so nothing changes; "
                'add prompts, give another reference set, or use mean="over_tokens".'
            )
        if self._aligned:
            length = len(reference_set.input_ids[0])
            for prompt, ids in enumerate(prompts.input_ids):
                if len(ids) != length:
                    raise ValueError(
                        f"{self.name}: prompt {prompt} has {len(ids)} tokens and the reference prompts have {length}; use "
                        'mean="over_tokens" or named positions.'
                    )
        if self.kind == "resample":
            donors(prompts, reference_set, self.positions, self.seed)

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """Means, donors' activations or noise for each of these prompts at its edited tokens, `pos d` or `pos head d`."""
        if self.site == "scores" or self.kind == "zero":
            return None
        if self.noise == "norm_matched":
            return [self._drawn(prompt, edited, sources) for prompt, edited in zip(prompts, tokens, strict=True)]
        reference, place = sources.statistics, self.place
        if self.kind == "resample":
            donor_of = donors(sources.prompts, reference.prompts, self.positions, self.seed)
            return [self.select_heads(reference.rows(place, donor_of[prompt], self.positions)) for prompt in prompts]
        if self.mean == "per_position":
            named = self.positions if isinstance(self.positions, tuple) else (self.positions,)
            mean = self.select_heads(torch.cat([reference.position_mean(place, position) for position in named]))
            return [mean] * len(tokens)
        mean = self.select_heads(reference.mean(place))
        if self.kind == "mean":
            return [mean.expand(len(edited), *mean.shape) for edited in tokens]
        std = self.select_heads(reference.std(place))
        return [
            mean + std * self._drawn(prompt, edited, sources) for prompt, edited in zip(prompts, tokens, strict=True)
        ]

    def apply(self, old: Tensor, values: Tensor | None) -> Tensor:
        """Ablate activations, `entry d`, given their replacements."""
        if self.kind == "zero":
            return torch.zeros_like(old)
        if self.is_uniform:  # equal scores for all visible keys
            return old.masked_fill(old > -torch.inf, 0.0)
        assert values is not None
        return NormMatchedIntervention()(old, values) if self.noise == "norm_matched" else values.to(old.dtype)

    def _drawn(self, prompt: int, tokens: Sequence[int], sources: Sources) -> Float[Tensor, "pos *head d"]:
        """Standard normal noise.

        One generator per prompt and head draws for the whole prompt at once, so that a token's noise depends on neither the
        batch, the other heads, nor the other ablated positions.
        """
        width = dimensions(sources.model.config)["d_head" if self.heads else "d_model"]
        size = len(sources.prompts.input_ids[prompt]), width
        draws = [
            torch.from_numpy(
                rng(self.seed, "noise", *map(str, self.place), str(head), prompt).standard_normal(size)
            ).float()
            for head in self.heads or (None,)
        ]
        return (torch.stack(draws, 1) if self.heads else draws[0])[list(tokens)]


def all_heads(config: Any, kind: Kind = "zero", site: str = "z", **fields: Any) -> list[Ablation]:
    """Make one ablation per head of a model.

    Args:
        config: the model's config, or the model.
        kind: as in `Ablation`.
        site: a site with heads; k and v have K/V heads.
        **fields: further fields of `Ablation`.

    Returns:
        The ablations, ordered by layer and head.

    Raises:
        ValueError: the site has no heads, or the fields are wrong.
    """
    config = config_of(config)
    if given := fields.keys() & {"layer", "heads"}:
        raise ValueError(
            f"all_heads makes the heads of all layers and takes no {min(given)}; for some write "
            f'[Ablation(kind="{kind}", site="{site}", layer=2, heads=head) for head in range({n_heads(config)})].'
        )
    heads = component_named(site, Ablation.sites, Ablation.what).heads
    if heads is None:
        raise ValueError(
            f"{site} has no heads; for an ablation of each layer write "
            f'[Ablation(kind="{kind}", site="{site}", layer=layer) for layer in range({n_layers(config)})].'
        )
    return [
        Ablation(kind=kind, site=site, layer=layer, heads=(head,), **fields)
        for layer in range(n_layers(config))
        for head in range(dimensions(config)[heads])
    ]


def heads_together(
    heads: Iterable[tuple[int, int]], kind: Kind = "zero", site: str = "z", **fields: Any
) -> tuple[Ablation, ...]:
    """Make one joint ablation of several heads.

    Args:
        heads: (layer, head) pairs.
        kind: as in `Ablation`.
        site: a site with heads.
        **fields: further fields of `Ablation`.

    Returns:
        A tuple with one ablation per layer.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return tuple(
        Ablation(kind=kind, site=site, layer=layer, heads=tuple(here), **fields)
        for layer, here in sorted(by_layer.items())
    )


def donors(prompts: TokenizedPrompts, reference: TokenizedPrompts, positions: Positions, seed: int) -> list[int]:
    """Choose for every prompt the reference prompt whose activations replace its own.

    The choice depends on neither batches nor what is edited. Where the prompts are their own reference set it is a derangement:
    a random cycle in which each prompt is the donor of exactly one other. With another reference set each prompt's donor is drawn
    among those that differ from it.

    Args:
        prompts: the prompts that are resampled.
        reference: the reference set.
        positions: with "all" a donor must have as many tokens as the prompt.
        seed: of the draws.

    Returns:
        The index of each prompt's donor in the reference set.

    Raises:
        ValueError: a prompt, which the message names, has no possible donor.
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
