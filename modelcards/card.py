"""A card: what a family looks like to pyvene, class by class, and what its residual stream is."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from typing import Any

from pyvene.models.constants import CONST_OUTPUT_HOOK
from torch import Tensor, nn

from modelcards.attention_taps import PREFIX, at_layer
from modelcards.components import COMPONENTS, Component, dimensions
from modelcards.template import Mapping, within


@dataclass(frozen=True)
class Card:
    """What a family looks like to pyvene.

    Attributes:
        family: the card's folder.
        model_type: transformers' `config.model_type`.
        mappings: module mapping of each class the card covers.
        dimension_mapping: pyvene's dimension mapping, the same for all of them.
        checkpoint: a published model of the family.
        post_norm_scale: elementwise scale of a norm between attention's output projection and the residual, if there is one.
        residual_multiplier: what a model multiplies the outputs of attention and MLP with as it adds them to the residual, by its
            config; None: 1. `attention_contribution` and `mlp_contribution` are behind it.
        fused: where one projection makes queries, keys and values, these three as views `batch pos head d_head` of what it puts
            out, given that and the model's dimensions.
        sums_inside: what attention's module returns is the residual with what attention adds, not that alone.
        absent: why the family lacks components that others have, by name; ends a sentence that begins with the family.
        covers: whether a model with this config is what the card says; None: every one.
        covered: the same in words, for the sentence that refuses another.
    """

    family: str
    model_type: str
    mappings: dict[type[nn.Module], Mapping]
    dimension_mapping: Mapping
    checkpoint: str = ""
    post_norm_scale: Callable[[nn.Module, Tensor], Tensor] | None = None
    residual_multiplier: Callable[[Any], float] | None = None
    fused: Callable[[Tensor, dict[str, int]], tuple[Tensor, ...]] | None = None
    sums_inside: bool = False
    absent: AnyMapping[str, str] = field(default_factory=dict)
    covers: Callable[[Any], bool] | None = None
    covered: str = ""

    @classmethod
    def of(
        cls,
        family: str,
        model_type: str,
        classes: tuple[type[nn.Module], ...],
        places: Mapping,
        widths: Mapping,
        *,
        prefix: str = "model",
        own_logits: bool = False,
        **fields: Any,
    ) -> Card:
        """The card of a family from the places of its bare class.

        Args:
            classes: bare, causal language model and, if there is one, classifier.
            places: module mapping of the bare class.
            widths: pyvene's dimension mapping.
            prefix: what the other classes call the bare model in them.
            own_logits: the language model's forward changes what `lm_head` gives (soft-cap, scale) before it returns it.
            **fields: as the class has them.
        """
        heads = ("tap_logits" if own_logits else "lm_head", "score")
        mappings = {classes[0]: dict(places)}
        for model_class, head in zip(classes[1:], heads, strict=False):
            mappings[model_class] = {**within(prefix, places), "logits": (head, CONST_OUTPUT_HOOK)}
        return cls(family, model_type, mappings, widths, **fields)

    @property
    def components(self) -> frozenset[str]:
        """Every component that some class of the family has."""
        return frozenset().union(*self.mappings.values())

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream, so that none passes from one to the other."""
        return "resid_mid" not in self.components

    def mapping(self, model_class: type[nn.Module]) -> Mapping:
        """The module mapping of a class of this card or of a subclass of one."""
        return self.mappings[next(base for base in model_class.__mro__ if base in self.mappings)]

    def is_tap(self, model: nn.Module, name: str) -> bool:
        """Whether a component that the model has is no module's, but there within `Taps` only."""
        return PREFIX in self.mapping(type(model))[name][0]

    def times(self, config: Any) -> float:
        """What the outputs of attention and MLP are multiplied with as they are added to the residual."""
        return self.residual_multiplier(config) if self.residual_multiplier else 1.0

    def module(self, model: nn.Module, name: str, layer: int = 0) -> nn.Module:
        """The module at whose input or output a component lives; of what only `Taps` makes visible, while it does.

        Raises ValueError, naming the family and what it lacks, if there is no such module.
        """
        self.component(model, name)
        path = at_layer(self.mapping(type(model))[name][0], layer)
        try:
            return model.get_submodule(path)
        except AttributeError:
            why = "no module of the model puts it out" if PREFIX in path else f"layer {layer} has no such module"
            raise ValueError(f"{name} of {self.family} cannot be had here: {why}.") from None

    def component(self, model: nn.Module, name: str) -> Component:
        """The component called `name`; a ValueError says what there is if this model has none of that name."""
        mapping = self.mapping(type(model))
        if name in mapping:
            return COMPONENTS[name]
        from modelcards.register import CARDS  # which imports the cards, and so this module

        elsewhere = list(dict.fromkeys(card.family for card in CARDS if name in card.components and card is not self))
        there = f"only {', '.join(elsewhere)} and not {self.family} has it" if elsewhere else "no card has it"
        if len(elsewhere) > 3:
            there = f"{self.family} has none"
        if name in self.absent:
            there = f"{self.family} {self.absent[name]}"
        if name in self.components:
            there = f"{type(model).__name__} has none, other {self.family} classes do"
        close = difflib.get_close_matches(str(name), mapping, n=1)
        if close and name not in COMPONENTS:
            there += f"; did you mean {close[0]!r}?"
        known = ", ".join(sorted(mapping))
        raise ValueError(f"unknown component {name!r} ({there}); {type(model).__name__} has: {known}.")

    def width(self, model: Any, name: str) -> int | None:
        """Size of the last axis an intervention on `name` sees; None where it varies with the prompt."""
        named = self.component(model, name).width
        if named is None:
            return None
        if named == "n_out":
            path = self.mapping(type(model))["logits"][0]
            head = model.get_output_embeddings() if path.startswith(("lm_head", PREFIX)) else model.get_submodule(path)
            return head.weight.shape[0]
        sizes = dimensions(model.config)
        product = 1
        for factor in named.split("*"):
            product *= sizes[factor]
        return product
