"""What all edits of one site share: their fields, their names, and the interface that the engines call.

    Ablation(kind="mean", site="z", layer=2, heads=(5,), positions="last")
    ActivationPatch(site="k", layer=2, heads=(0,), positions="subject")
    Addition(site="resid_post", layer=3, vector=direction, scale=4.0)
    ForcedAttention(shape="hub", layer=2, heads=(5,), block=("latent0", "latent5"), hub="latent2")

each specify one edit in one layer; a tuple of them is a joint intervention. Each kind defines in its own module what it needs,
what it checks, what replaces the activations and which pyvene intervention makes the edit; the engines know no kinds.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import BeforeValidator, StrictInt, StrictStr, field_validator, model_validator
from pyvene import VanillaIntervention
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import (
    COMPONENTS,
    FIELD_NAMES,
    Component,
    card_of,
    component_named,
    dimensions,
    n_heads,
    n_kv_heads,
    n_layers,
)
from modelcards.names import NAMES
from pyvene_ext.intervenable.statistics import Place, label
from pyvene_ext.io.records import Record
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.sources import Directions, Needs, Sources


def plain(value: Any, *, depth: int = 2) -> Any:
    """Convert numbers of NumPy and torch, their arrays, ranges and other iterables to Python's own numbers and to tuples."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return plain(value.tolist()) if value.ndim else value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        # No field is nested deeper, and YAML can make lists that hold themselves, or billions of lists.
        return tuple(plain(item, depth=depth - 1) for item in value) if depth else value
    return value


def _token(position: Any) -> str | int:
    if type(position) is not int and not isinstance(position, str):
        shown = f"a {type(position).__name__}" if isinstance(position, list | tuple | dict) else repr(position)
        raise ValueError(f"a position is a name or a whole number, not {shown}.")
    return position


def _tokens(positions: Any) -> Any:
    positions = plain(positions)
    if isinstance(positions, str):
        return positions
    return tuple(map(_token, positions if isinstance(positions, tuple) else (positions,)))


Token = Annotated[StrictStr | StrictInt, BeforeValidator(_token)]
"""One token of a prompt: a name of the prompt set, or a number."""
Tokens = Annotated[StrictStr | tuple[StrictStr | StrictInt, ...], BeforeValidator(_tokens)]
"""Tokens of a prompt, as the field `positions` names them: one or several."""
VECTORS = ("z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "embed")

OTHER_KINDS = {"q": "ActivationPatch", "mlp_in": "ActivationPatch", "pattern": "ForcedAttention", "scores": "Ablation"}
"""What edits the sites that most kinds do not, for messages."""


class ModelShape(NamedTuple):
    """What specs are checked against, read from a model once for many specs.

    Attributes:
        name: the model's class.
        components: those that its card maps.
        layers: number of layers.
        heads: query heads per layer.
        kv_heads: K/V heads per layer.
        sizes: `modelcards.dimensions` of its config.
    """

    name: str
    components: Collection[str]
    layers: int
    heads: int
    kv_heads: int
    sizes: dict[str, int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Read the shape of a model that has a card."""
        components, config = card_of(model).mapping(type(model)), model.config
        counts = n_layers(config), n_heads(config), n_kv_heads(config)
        return cls(type(model).__name__, components, *counts, dimensions(config))


class SiteEdit(Record):
    """One site of one layer, edited at some heads and positions; a kind of intervention is a subclass.

    Attributes:
        what: the kind in words, for messages.
        sites: the sites that the kind can edit.
        has_first_order: whether its effect has a first-order estimate.
        site: the site that is edited; pyvene's name of it means the same ("head_attention_value_output" is "z").
        layer: required, except for embed, which exists once; counted from 0.
        heads: required for sites with heads, and only for them: one or several query heads, or K/V heads for k and v, each of
            which serves several query heads. Kept as a sorted tuple.
        positions: "all", "last", a name of the prompt set, an integer, or several names and integers. An integer counts tokens
            from the prompt's first token; a negative one from its end (-1 is the last token), whatever the padding. For scores:
            positions of the query.

    Raises:
        ValueError: for an edit that no model could run.
    """

    what: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]
    has_first_order: ClassVar[bool] = True
    every_head: ClassVar[str] = "all_heads(model.config) makes an ablation of each"

    site: StrictStr
    layer: StrictInt | None = None
    heads: tuple[StrictInt, ...] | None = None
    positions: Tokens = "all"

    @field_validator("heads", mode="before")
    @classmethod
    def _one_or_several(cls, heads: Any) -> Any:
        if isinstance(heads, str):
            raise ValueError(
                f"heads are numbers, unlike {heads!r}; for all n heads of a layer write range(n), and for an ablation of each "
                "head of the model all_heads(model.config)."
            )
        return (heads,) if isinstance(heads, int) else heads  # `plain` has made tuples of the rest

    _plain = field_validator("*", mode="before")(plain)  # runs before those above

    @field_validator("site")
    @classmethod
    def _known_site(cls, site: str) -> str:
        if (known := NAMES.get(site)) is not None and known.site not in cls.sites:
            kind = f"{OTHER_KINDS[known.site]} edits it and " if known.site in OTHER_KINDS else ""
            raise ValueError(f"no {cls.what} of {site!r}; choose among {', '.join(cls.sites)} ({kind}read reads it).")
        return component_named(site, cls.sites, cls.what).site  # pyvene's name of a site is the same site

    @field_validator("layer")
    @classmethod
    def _counted_from_0(cls, layer: int | None) -> int | None:
        if layer is not None and layer < 0:
            raise ValueError(f"layers count from 0, unlike {layer}; the last is model.config.num_hidden_layers - 1.")
        return layer

    @field_validator("heads")
    @classmethod
    def _distinct_heads(cls, heads: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if heads is not None and (not heads or len(set(heads)) < len(heads) or min(heads) < 0):
            raise ValueError(f"name one or more heads, each once and counted from 0, not {list(heads)}.")
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
                f"a position's name is not a number and has no comma, unlike {odd[0]!r}; for a number write (0,)."
            )
        if len(positions) == 1 and isinstance(positions[0], str):
            return positions[0]  # one spelling for one name, so that equal specs compare equal
        return positions

    @model_validator(mode="after")
    def _fits_its_site(self) -> Self:
        component = self.component
        if component.per_layer != (self.layer is not None):
            raise ValueError(
                f"{self.site} {'needs a layer: layer=2' if component.per_layer else 'exists once: leave layer out'}."
            )
        if (component.heads is not None) != (self.heads is not None):
            if component.heads is None:
                raise ValueError(f"{self.site} has no heads: leave heads out.")
            raise ValueError(f"{self.site} needs heads: heads=3, or heads=range(8) for several; {self.every_head}.")
        return self

    @property
    def component(self) -> Component:
        """The component that the cards map this site to."""
        return COMPONENTS[FIELD_NAMES[self.site]]

    @property
    def place(self) -> Place:
        """Site and layer."""
        return self.site, self.layer

    @property
    def where(self) -> str:
        """A short label for site, layer, heads and positions: "z.2.5", "mlp_out.3@last"."""
        name = label(self.place) + ("" if self.heads is None else "." + ",".join(map(str, self.heads)))
        if self.positions == "all":
            return name
        positions = (self.positions,) if isinstance(self.positions, str) else self.positions
        return name + "@" + ",".join(map(str, positions))

    @property
    def name(self) -> str:
        """A short name, unique to the edit."""
        return self.where

    def check(self, model: PreTrainedModel | ModelShape) -> None:
        """Check that a model can be edited in this way.

        Args:
            model: a causal language model with a card, or its `ModelShape`.

        Raises:
            ValueError: the model lacks the site, the layer or a head; the message says what it has.
        """
        name, components, layers, heads, kv_heads, _ = model if isinstance(model, ModelShape) else ModelShape.of(model)
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

    # -- the interface of the engines; a kind overrides what differs ------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """The statistics of a reference set or of source prompts that the replacement is computed from: none by default."""
        return Needs()

    @property
    def acts_at(self) -> str:
        """The site at which the sweep engine makes the edit."""
        return self.site

    @property
    def first_order_place(self) -> Place:
        """Where a first-order estimate of the edit is taken."""
        return self.place

    @property
    def is_uniform(self) -> bool:
        """Whether the edit makes attention uniform, so that its first-order estimate needs the z of uniform attention."""
        return False

    @property
    def same_for_all(self) -> bool:
        """Whether prompts with the same tokens at the edited positions get the same replacement there."""
        return False

    @property
    def on_new_tokens(self) -> bool:
        """Whether the edit can also be made at generated tokens."""
        return False

    @property
    def prompt_key(self) -> Hashable:
        """Everything that `check_prompts` depends on: of several specs with equal keys only one is checked."""
        return self.positions

    @property
    def intervention(self) -> type:
        """The class of the pyvene intervention that makes the edit."""
        return VanillaIntervention

    def check_prompts(self, prompts: TokenizedPrompts, tokens: Sequence[Sequence[int]], sources: Sources) -> None:
        """Check that the edit can be made on these prompts.

        Args:
            prompts: the prompts that are intervened on.
            tokens: the edited tokens of each prompt, counted from its first token.
            sources: what replacements are computed from; statistics may still be missing.

        Raises:
            ValueError: it cannot, by default because two positions are the same token; the message names the prompt.
        """
        for prompt, edited in enumerate(tokens):
            if len(set(edited)) < len(edited):
                raise ValueError(f"{self.name}: two of these positions are the same token of prompt {prompt}.")

    def check_directions(self, directions: Directions, model_shape: ModelShape) -> None:
        """Check the concept direction of an edit along one; by default there is none to check.

        Args:
            directions: by place and positions.
            model_shape: of the model that is intervened on.

        Raises:
            ValueError: the direction is missing or does not fit the model.
        """

    def replacements(
        self, prompts: Sequence[int], tokens: Sequence[Sequence[int]], sources: Sources
    ) -> list[Tensor] | None:
        """The source values that the intervention receives.

        They depend on neither the batch nor the other heads and positions that are edited.

        Args:
            prompts: indices of the prompts.
            tokens: the edited tokens of each of them.
            sources: what replacements are computed from.

        Returns:
            For each of these prompts `pos d` or `pos head d` at its edited tokens; None if the intervention takes no source.
        """
        return None

    def first_edited(self, prompts: TokenizedPrompts, prompt: int, tokens: Sequence[int]) -> int:
        """The first token of a prompt at which the edit changes anything; earlier ones are those of the untouched model.

        Args:
            prompts: the prompts that are intervened on.
            prompt: index of the prompt.
            tokens: its edited tokens, counted from its first.

        Returns:
            The token, counted likewise; by default the first edited one.
        """
        return min(tokens)

    def to_columns(self, value: Tensor, start: int | Tensor) -> Tensor:
        """Convert a replacement from tokens of a prompt to columns of a batch; by default it does not depend on them.

        Args:
            value: the replacement, `pos d` or `pos head d`.
            start: the column at which the prompt begins; a tensor that can be broadcast to `value` if it differs.

        Returns:
            The replacement in the batch.
        """
        return value

    def apply(self, old: Tensor, values: Tensor | None) -> Tensor:
        """Apply the edit to activations directly, as `intervention` does inside a model.

        Args:
            old: the activations, `entry d`.
            values: their replacements, in the same order; None if the edit takes none.

        Returns:
            The edited activations, `entry d`.
        """
        assert values is not None
        return values.to(old.dtype)

    def select_heads(self, values: Tensor) -> Tensor:
        """Select the edited heads from values of all heads, `... head d`."""
        return values if self.heads is None else values[..., list(self.heads), :]
