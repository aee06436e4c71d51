"""What all edits of one site have in common: their fields, their names, and what an engine asks of them.

    Ablation(kind="mean", site="z", layer=2, heads=(5,), positions="last")
    ActivationPatch(site="k", layer=2, heads=(0,), positions="subject")
    Addition(site="resid_post", layer=3, vector=direction, scale=4.0)
    ForcedAttention(shape="hub", layer=2, heads=(5,), block=("latent0", "latent5"), hub="latent2")

name one edit in one layer. Several at once are a tuple of them. Each kind says in its own module what it needs, what it checks,
what replaces the activations and which pyvene intervention makes the edit; the engines know no kinds.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Hashable, Sequence
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
from pyvene import VanillaIntervention
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Component, card_of, dimensions, n_heads, n_kv_heads, n_layers
from pyvene_ext.intervenable.statistics import Place, label
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.sources import Directions, Needs, Sources


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
    sizes: dict[str, int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Extent:
        components, config = card_of(model).mapping(type(model)), model.config
        counts = n_layers(config), n_heads(config), n_kv_heads(config)
        return cls(type(model).__name__, components, *counts, dimensions(config))


class SiteEdit(BaseModel):
    """One site of one layer, edited at some heads and positions; a kind of intervention is a subclass.

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
    """the kind in words, for messages"""
    sites: ClassVar[tuple[str, ...]]
    """the sites that the kind can edit"""
    has_first_order: ClassVar[bool] = True
    """whether its effect has a first-order estimate"""

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
        name, components, layers, heads, kv_heads, _ = model if isinstance(model, Extent) else Extent.of(model)
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

    # -- what an engine asks; a kind overrides what differs ---------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """What must be known of a reference set or of source prompts before this can be done: by default nothing."""
        return Needs()

    @property
    def acts_at(self) -> str:
        """The site at which the sweep engine makes the edit."""
        return self.site

    @property
    def linear_place(self) -> Place:
        """Where a first-order estimate of the edit is taken."""
        return self.place

    @property
    def is_uniform(self) -> bool:
        """Whether attention becomes uniform, so that a first-order estimate needs the z of uniform attention."""
        return False

    @property
    def same_for_all(self) -> bool:
        """Whether prompts with the same tokens at the edited positions get the same replacement there."""
        return False

    @property
    def on_new_tokens(self) -> bool:
        """Whether the edit can also be made at tokens while they are generated."""
        return False

    @property
    def prompt_key(self) -> Hashable:
        """All that `check_prompts` depends on: of specs with equal keys one is checked."""
        return self.positions

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return VanillaIntervention

    def check_prompts(self, prompts: TokenizedPrompts, tokens: Sequence[Sequence[int]], sources: Sources) -> None:
        """Raise ValueError, naming the prompt, where this cannot be done on prompts whose edited tokens are these."""
        for prompt, edited in enumerate(tokens):
            if len(set(edited)) < len(edited):
                raise ValueError(f"{self.name}: two of these positions are the same token of prompt {prompt}.")

    def check_directions(self, directions: Directions, extent: Extent) -> None:
        """Raise ValueError unless there is the direction that this edit follows, if it follows one."""

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """What the intervention is given for each of these prompts at its edited tokens, `pos d` or `pos head d`.

        None if it needs nothing. Values depend on neither the batch nor the other heads and positions that are edited.
        """
        return None

    def in_columns(self, value: Tensor, start: int) -> Tensor:
        """A prompt's replacement in a batch where the prompt begins at column `start`."""
        return value

    def changed(self, old: Tensor, values: Tensor | None) -> Tensor:
        """What `intervention` makes of activations, `entry d`, given replacements for them in the same order."""
        assert values is not None
        return values.to(old.dtype)

    def own_heads(self, values: Tensor) -> Tensor:
        """Of values of all heads, `... head d`, those of the edited ones."""
        return values if self.heads is None else values[..., list(self.heads), :]
