"""Interventions as data: validated, immutable, written to YAML or JSON and back without loss, compiled to plain pyvene configs.

    Ablation(kind="mean", site="z", layer=2, heads=(5,), positions="last")
    ActivationPatch(site="k", layer=2, heads=(0,), positions="subject")
    ForcedAttention(shape="hub", layer=2, heads=(5,), block=("latent0", "latent5"), hub="latent2")

name one edit in one layer. Several at once are a tuple of them. `pyvene_ext.spec_files` keeps lists of them in files;
`pyvene_ext.compile` turns one into an `IntervenableConfig`, and `pyvene_ext.runner` runs a list.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Component, card_of, n_heads, n_kv_heads, n_layers
from pyvene_ext.reference import Place, label
from pyvene_ext.runs import parse_json

Model = TypeVar("Model", bound=BaseModel)

Kind = Literal["zero", "mean", "resample", "noise"]


def plain(value: Any) -> Any:
    """NumPy's integers and arrays of them, as np.argsort gives them, are as good as Python's own."""
    if isinstance(value, tuple | list):
        return tuple(int(number) if isinstance(number, np.integer) else number for number in value)
    return value.tolist() if isinstance(value, np.integer | np.ndarray) else value


VECTORS = ("z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "embed")
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*VECTORS, "k", "v"), ("zero", "mean", "resample", "noise")),
    "scores": ("zero", "mean"),
}


class Extent(NamedTuple):
    """What of a model a spec is checked against, read once for many specs."""

    name: str
    components: Collection[str]
    layers: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Extent:
        components, config = card_of(model).mapping(type(model)), model.config
        return cls(type(model).__name__, components, n_layers(config), n_heads(config), n_kv_heads(config))


class SiteEdit(BaseModel):
    """One site of one layer, at some heads and positions: what an ablation and a patch have in common.

    Attributes:
        site: what is edited.
        layer: needed but for embed, which exists once.
        heads: needed exactly for sites of single heads. Query heads, but of k and v K/V heads, each of which serves several query
            heads. Kept sorted.
        positions: "all", "last", a name of the prompt set, or a tuple of names and integers. An integer counts tokens from the
            prompt's first, a negative one from behind its last, whatever the padding. For scores: positions of the query.

    Raises pydantic's ValidationError (a ValueError; `one_sentence` shortens it) for what no model could run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    what: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]

    site: StrictStr
    layer: Annotated[StrictInt, Field(ge=0)] | None = None
    heads: tuple[Annotated[StrictInt, Field(ge=0)], ...] | None = None
    positions: StrictStr | tuple[StrictStr | StrictInt, ...] = "all"

    _plain = field_validator("*", mode="before")(plain)

    @field_validator("site")
    @classmethod
    def _known_site(cls, site: str) -> str:
        if site not in cls.sites:
            close = difflib.get_close_matches(site, cls.sites, n=1) or [
                s for s, c in FIELD_NAMES.items() if c == site and s in cls.sites
            ]
            hint = f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(cls.sites)}."
            raise ValueError(f"no {cls.what} of {site!r}; {hint}")
        return site

    @field_validator("heads")
    @classmethod
    def _distinct_heads(cls, heads: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if heads is not None and (not heads or len(set(heads)) < len(heads)):
            raise ValueError(f"name one or more heads, each once, not {list(heads)}.")
        return heads and tuple(sorted(heads))

    @field_validator("positions")
    @classmethod
    def _some_positions(cls, positions: str | tuple[str | int, ...]) -> str | tuple[str | int, ...]:
        if not positions or (isinstance(positions, tuple) and len(set(positions)) < len(positions)):
            raise ValueError(f"name one or more positions, each once, not {positions!r}.")
        if isinstance(positions, tuple) and ("all" in positions or "" in positions):
            raise ValueError('a list of positions holds names and integers; for every position write positions: "all".')
        names = [name for name in ([positions] if isinstance(positions, str) else positions) if isinstance(name, str)]
        if odd := [name for name in names if "," in name or name.removeprefix("-").isdecimal()]:
            raise ValueError(
                f"a position's name is no number and has no comma, unlike {odd[0]!r}; for a number write (0,)."
            )
        if len(positions) == 1 and isinstance(positions[0], str):
            return positions[0]  # one name has one spelling, so that equal specs compare equal
        return positions

    @model_validator(mode="after")
    def _fits_its_site(self) -> Self:
        component = self.component
        if component.per_layer != (self.layer is not None):
            raise ValueError(
                f"{self.site} {'needs a layer' if component.per_layer else 'exists once: leave layer out'}."
            )
        if (component.heads is not None) != (self.heads is not None):
            raise ValueError(f"{self.site} {'needs heads' if component.heads else 'has no heads: leave heads out'}.")
        return self

    @property
    def component(self) -> Component:
        """The place in the cards' vocabulary."""
        return COMPONENTS[FIELD_NAMES[self.site]]

    @property
    def place(self) -> Place:
        """Site and layer."""
        return self.site, self.layer

    @property
    def where(self) -> str:
        """Site, layer, heads and positions in short: "z.2.5", "mlp_out.3@last"."""
        name = label(self.place) + ("" if self.heads is None else "." + ",".join(map(str, self.heads)))
        if self.positions == "all":
            return name
        positions = (self.positions,) if isinstance(self.positions, str) else self.positions
        return name + "@" + ",".join(map(str, positions))

    @property
    def name(self) -> str:
        """A short name, different for different edits."""
        return self.where

    def check(self, model: PreTrainedModel | Extent) -> None:
        """Raise ValueError, naming what the model has, if this cannot be done in it."""
        name, components, layers, heads, kv_heads = model if isinstance(model, Extent) else Extent.of(model)
        if self.component.name not in components:
            raise ValueError(f"{self.name}: the card of {name} has no {self.site}.")
        if self.layer is not None and self.layer >= layers:
            raise ValueError(
                f"{self.name}: layer {self.layer} is out of range, the model has layers 0 to {layers - 1}."
            )
        if self.heads and self.component.heads == "n_head" and self.heads[-1] >= heads:
            raise ValueError(
                f"{self.name}: head {self.heads[-1]} is out of range, the model has {heads} query heads (0 to {heads - 1}) "
                f"sharing {kv_heads} K/V heads; {self.site} counts query heads."
            )
        if self.heads and self.component.heads == "n_kv_head" and self.heads[-1] >= kv_heads:
            raise ValueError(
                f"{self.name}: {self.site} counts K/V heads, of which the model has {kv_heads} (0 to {kv_heads - 1}), each for "
                f"{heads // kv_heads} query heads: query head h reads K/V head h // {heads // kv_heads}."
            )


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


class ActivationPatch(SiteEdit):
    """Put a source prompt's activation in place of the base prompt's own (Meng et al. 2022; Wang et al. 2022).

    Attributes:
        site: q, k, v (before RoPE), z, attn_out, mlp_in, mlp_out, resid_pre, resid_mid, resid_post or embed.
        layer, heads, positions: as `SiteEdit` has them; a name is looked up in each of the two prompts.
        subspace: replace only the component along the concept direction (`pyvene_ext.subspace`), leave the rest.
        path: set by path patching alone: the path whose recorded value is put here instead (`pyvene_ext.patching`).

    The source prompts are the `reference` of a run, one for each prompt (`pyvene_ext.patching.patch` arranges it).
    """

    what = "patch"
    sites = ("q", "k", "v", "mlp_in", *VECTORS)
    uses_reference: ClassVar[bool] = True

    kind: Literal["patch"] = "patch"
    subspace: bool = False
    path: StrictStr | None = None

    @property
    def name(self) -> str:
        """A short name: "k.2.0@subject:patch", "z.2.5:patch/subspace", or that of the path."""
        return self.path or f"{self.where}:patch" + ("/subspace" if self.subspace else "")


class ForcedAttention(SiteEdit):
    """Give the queries of a block of tokens a pattern by hand; what they attend to before the block stays as it is.

    A query of the block gives the block's tokens a mass m of its attention, which is shared out anew among those of them that it
    may see (itself and earlier ones, in a sliding window the near ones). Rows go on summing to 1.

    Attributes:
        shape: hub: 0.8 m to the hub and 0.2 m evenly to the others; all of m to the hub where no other is visible, and evenly to
            all where the hub is not. uniform: m evenly to all. sequential: all of m to the token before, and to the query itself
            where that one is outside the block or the window.
        layer, heads: as `SiteEdit` has them; query heads. `forced_attention.force` makes the joint spec of many.
        block: its first and its last token, both in it, each a name of the prompt set or an integer as in `positions`.
        hub: a token of the block, named likewise; needed exactly for the shape hub.
        hard: move the whole mass of a row into the block, also what is on earlier tokens.
    """

    what = "forced attention"
    sites = ("pattern",)
    uses_reference: ClassVar[bool] = False

    kind: Literal["force"] = "force"
    site: StrictStr = "pattern"
    shape: Literal["hub", "uniform", "sequential"]
    block: tuple[StrictStr | StrictInt, StrictStr | StrictInt]
    hub: StrictStr | StrictInt | None = None
    hard: bool = False

    @model_validator(mode="after")
    def _has_a_block(self) -> Self:
        if self.positions != "all":
            raise ValueError("the queries are those of the block: leave positions out.")
        if "all" in (*self.block, self.hub):
            raise ValueError("a block and its hub are named by single tokens, unlike 'all'.")
        if (self.shape == "hub") != (self.hub is not None):
            raise ValueError(
                f"{self.shape} attention {'needs a hub' if self.hub is None else 'has no hub: leave hub out'}."
            )
        known = [place for place in (self.block[0], self.hub, self.block[1]) if isinstance(place, int)]
        if known != sorted(known) and (min(known) >= 0 or max(known) < 0):
            raise ValueError(
                f"a block goes from its first token to its last, with the hub in it, unlike {self.block[0]} to {self.block[1]}"
                + ("." if self.hub is None else f" with the hub at {self.hub}.")
            )
        return self

    @property
    def name(self) -> str:
        """A short name: "pattern.2.5@latent0..latent5:hub@latent2/hard"."""
        shape = self.shape if self.hub is None else f"hub@{self.hub}"
        return f"{self.where}@{self.block[0]}..{self.block[1]}:{shape}" + ("/hard" if self.hard else "")


OneSpec = Ablation | ActivationPatch | ForcedAttention
Spec = OneSpec | tuple[OneSpec, ...]


def members(spec: Spec) -> tuple[OneSpec, ...]:
    """The edits of one spec: itself, or those of a joint one, which must not edit one place twice."""
    if isinstance(spec, SiteEdit):
        return (spec,)
    edits = tuple(spec)
    edited = [(a.place, head, a.positions) for a in edits for head in a.heads or (None,)]
    if not edits or len(set(edited)) < len(edited):
        raise ValueError(f"a joint intervention names one or more places, each once, not [{spec_name(edits)}].")
    return edits


def as_specs(specs: OneSpec | Iterable[Spec]) -> list[Spec]:
    """A list of specs, also of a single one. Raises ValueError for what is none."""
    if not isinstance(specs, Iterable) or isinstance(specs, SiteEdit | str):
        specs = [specs]
    found = list(specs)
    for spec in found:
        for edit in spec if isinstance(spec, tuple) else (spec,):
            if not isinstance(edit, SiteEdit):
                raise ValueError(
                    f"{edit!r} is no ablation, activation patch or forced attention, nor a tuple of them (paths are run by "
                    "pyvene_ext.patching.patch)."
                )
    return found


def spec_name(spec: Spec) -> str:
    """The name of one edit, or those of a joint one with plus signs: "z.2.5+z.3.1"."""
    return "+".join(edit.name for edit in ((spec,) if isinstance(spec, SiteEdit) else spec))


def all_heads(config: Any, kind: Kind = "zero", site: str = "z", **fields: Any) -> list[Ablation]:
    """One ablation per query head of a model's config, by layer and head."""
    return [
        Ablation(kind=kind, site=site, layer=layer, heads=(head,), **fields)
        for layer in range(n_layers(config))
        for head in range(n_heads(config))
    ]


def heads_together(heads: Iterable[tuple[int, int]], kind: Kind = "zero", site: str = "z", **fields: Any) -> Spec:
    """One joint ablation of these heads, given as (layer, head)."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return tuple(
        Ablation(kind=kind, site=site, layer=layer, heads=tuple(here), **fields)
        for layer, here in sorted(by_layer.items())
    )


def one_sentence(error: ValidationError) -> str:
    """What pydantic found, without its line breaks, codes and links: "heads.0: Input should be a valid integer"."""
    found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{where}: {message}" if where else message for where, message in found)


def read_as(kind: type[Model], path: str | Path) -> Model:
    """A JSON file as one of pydantic's models. Raises ValueError, naming the file and what is wrong first, for any other."""
    try:
        return kind.model_validate(parse_json(Path(path).read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{path}: {one_sentence(error).partition(';')[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None


def needs(specs: Iterable[Spec]) -> dict[str, tuple]:
    """What specs need of a reference set, as keywords of `Reference.compute` and `Reference.require`."""
    used = [a for spec in specs for a in members(spec) if a.uses_reference]

    def positions(ablations: Iterable[OneSpec]) -> tuple[str | int, ...]:
        named = (a.positions if isinstance(a.positions, tuple) else (a.positions,) for a in ablations)
        return tuple(dict.fromkeys(position for group in named for position in group))

    return {
        "places": tuple(dict.fromkeys(a.place for a in used)),
        "position_means": positions(a for a in used if isinstance(a, Ablation) and a.mean == "per_position"),
        "bank": positions(a for a in used if a.kind in ("resample", "patch")),
    }
