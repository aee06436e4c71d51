"""Interventions as data: validated, immutable, written to YAML or JSON and back without loss, compiled to plain pyvene configs.

    Ablation(kind="mean", site="z", layer=2, heads=(5,), positions="last")
    ActivationPatch(site="k", layer=2, heads=(0,), positions="subject")
    ForcedAttention(shape="hub", layer=2, heads=(5,), block=("latent0", "latent5"), hub="latent2")

name one edit in one layer. Several at once are a tuple of them. `pyvene_ext.specs.files` keeps lists of them in files;
`pyvene_ext.engine.compile` turns one into an `IntervenableConfig`, and `pyvene_ext.engine.plain` runs a list.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Component, card_of, n_heads, n_kv_heads, n_layers
from pyvene_ext.intervenable.statistics import Place, label


def plain(value: Any) -> Any:
    """NumPy's integers and arrays of them, as np.argsort gives them, are as good as Python's own."""
    if isinstance(value, tuple | list):
        return tuple(int(number) if isinstance(number, np.integer) else number for number in value)
    return value.tolist() if isinstance(value, np.integer | np.ndarray) else value


VECTORS = ("z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "embed")


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
