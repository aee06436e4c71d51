"""A card: where each component of a family lives, class by class, and how its blocks add to the residual stream."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from pyvene.models.constants import CONST_OUTPUT_HOOK
from torch import Tensor, nn

from modelcards.components import COMPONENTS, Component, dimensions
from modelcards.names import NAMES, meant
from modelcards.template import PREFIX, Mapping, at_layer, within

# Families that have a component, by its name. `modelcards.register`, which alone knows all cards, fills it in.
FAMILIES_WITH: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Card:
    """What a family looks like to pyvene.

    Attributes:
        family: the card's folder.
        name: pyvene's name of the family, with which its dictionaries begin.
        plain: module mapping of each class the card covers, as plain pyvene can take it.
        plain_widths: pyvene's dimension mapping for these.
        mappings: the same with the overlay: taps, and places where plain pyvene's edits in place do harm.
        dimension_mapping: the same for these.
        create: loads a checkpoint of the family: (config, tokenizer, model).
        post_norm_scale: elementwise scale of the norm between attention's output projection and the residual, if there is one.
        residual_multiplier: the factor with which attention's and the MLP's outputs are added to the residual, from the config;
            None for 1. `attention_contribution` and `mlp_contribution` include it.
        fused: where one projection makes queries, keys and values, takes its output apart: given that and the model's dimensions,
            returns the three as views `batch pos head d_head`.
        sums_inside: whether the attention module returns the residual stream with what it adds, not that alone.
        counts_padding: whether positions are learned and count the padding on the left unless position ids are given.
        absent: why the family lacks components that others have, by name; ends a sentence that begins with the family.
        covers: whether the card holds for a model with this config; None if it holds for all.
        covered: the same in words, for the error.
    """

    family: str
    name: str
    plain: dict[type[nn.Module], Mapping]
    plain_widths: Mapping
    mappings: dict[type[nn.Module], Mapping]
    dimension_mapping: Mapping
    create: Callable[..., tuple[Any, Any, Any]]
    post_norm_scale: Callable[[nn.Module, Tensor], Tensor] | None = None
    residual_multiplier: Callable[[Any], float] | None = None
    fused: Callable[[Tensor, dict[str, int]], tuple[Tensor, ...]] | None = None
    sums_inside: bool = False
    counts_padding: bool = False
    absent: AnyMapping[str, str] = field(default_factory=dict)
    covers: Callable[[Any], bool] | None = None
    covered: str = ""

    @classmethod
    def of(
        cls,
        declared: ModuleType,
        classes: tuple[type[nn.Module], ...],
        overlay: Mapping,
        *,
        overlay_widths: Mapping | None = None,
        own_logits: bool = False,
        **fields: Any,
    ) -> Card:
        """Make the card of a family from its dictionaries and an overlay.

        Args:
            declared: the family's `modelings_intervenable_<family>`.
            classes: bare, causal language model and, if there is one, classifier.
            overlay: entries for the bare class that plain pyvene cannot take.
            overlay_widths: widths of these that no other component has, and counts that their split functions name.
            own_logits: whether the language model's forward changes the output of `lm_head` (soft-cap, scale), so that its logits
                are a tap.
            **fields: as the class has them.

        Returns:
            The card, with a mapping for each class.
        """
        name = classes[0].__module__.split(".")[2]  # transformers' folder, after which pyvene names its own
        plain = {
            model_class: getattr(declared, f"{name}{role}_type_to_module_mapping")
            for model_class, role in zip(classes, ("", "_lm", "_classifier"), strict=False)
        }
        plain_widths = getattr(declared, f"{name}_type_to_dimension_mapping")
        mappings = {}
        for model_class, places in plain.items():
            prefix = places["block_input"][0].removesuffix(plain[classes[0]]["block_input"][0]).rstrip(".")
            mappings[model_class] = {**places, **(within(prefix, overlay) if prefix else overlay)}
        if own_logits:
            mappings[classes[1]]["logits"] = (f"{PREFIX}logits", CONST_OUTPUT_HOOK)
        # A component of the overlay is as wide as one of the dictionaries of the same width.
        known = {COMPONENTS[key].width: names for key, names in plain_widths.items() if key in COMPONENTS}
        derived = {key: known[COMPONENTS[key].width] for key in overlay if COMPONENTS[key].width in known}
        return cls(
            family=declared.__name__.split(".")[-2],
            name=name,
            plain=plain,
            plain_widths=plain_widths,
            mappings=mappings,
            dimension_mapping={**plain_widths, **derived, **(overlay_widths or {})},
            create=getattr(declared, f"create_{name}"),
            **fields,
        )

    @property
    def model_type(self) -> str:
        """The `config.model_type` of transformers."""
        bare: Any = next(iter(self.mappings))
        return bare.config_class.model_type

    @property
    def checkpoint(self) -> str:
        """The published model for which the card was written."""
        return inspect.signature(self.create).parameters["name"].default

    @property
    def components(self) -> frozenset[str]:
        """Every component that some class of the family has."""
        return frozenset().union(*self.mappings.values())

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream, so that the MLP does not see what attention adds."""
        return "resid_mid" not in self.components

    def mapping(self, model_class: type[nn.Module]) -> Mapping:
        """Return the module mapping of a class of this card, or of a subclass of one."""
        return self.mappings[next(base for base in model_class.__mro__ if base in self.mappings)]

    def is_tap(self, model: nn.Module, name: str) -> bool:
        """Return whether a component lives at a tap, which exists only within `Taps`."""
        return PREFIX in self.mapping(type(model))[name][0]

    def residual_scale(self, config: Any) -> float:
        """Return the factor with which the outputs of attention and MLP are added to the residual stream."""
        return self.residual_multiplier(config) if self.residual_multiplier else 1.0

    def module(self, model: nn.Module, name: str, layer: int = 0) -> nn.Module:
        """Return the module at whose input or output a component lives.

        Args:
            model: a model of the family; for a component at a tap, within `Taps`.
            name: the component.
            layer: ignored for a component that exists once.

        Returns:
            The module.

        Raises:
            ValueError: if the family or this model has no such module.
        """
        self.component(model, name)
        path = at_layer(self.mapping(type(model))[name][0], layer)
        try:
            return model.get_submodule(path)
        except AttributeError:
            why = "no module of the model outputs it" if PREFIX in path else f"layer {layer} has no such module"
            raise ValueError(f"{name} of {self.family} is not available here: {why}.") from None

    def component(self, model: nn.Module, name: str) -> Component:
        """Return the component called `name`.

        Args:
            model: a model of the family.
            name: the component, or the site that it is.

        Returns:
            Its entry in the vocabulary.

        Raises:
            ValueError: if this model has none of that name; the error suggests one, or lists those it has.
        """
        mapping, known = self.mapping(type(model)), NAMES.get(name)
        if known is not None and known.name in mapping:
            return known
        wanted = name if known is None else known.name
        elsewhere = FAMILIES_WITH.get(wanted, [])
        if wanted in self.components:
            there = f"{type(model).__name__} has none, other {self.family} classes do"
        elif wanted in self.absent:
            there = f"{self.family} {self.absent[wanted]}"
        elif len(elsewhere) > 3:
            there = f"{self.family} has none"
        else:
            there = f"only {', '.join(elsewhere)} and not {self.family} has it" if elsewhere else "no card has it"
        close = meant(name, [COMPONENTS[component].site for component in mapping], mapping)
        if known is None and close:
            raise ValueError(f"unknown component {name!r} ({there}); did you mean {close!r}?")
        raise ValueError(
            f"unknown component {name!r} ({there}); {type(model).__name__} has: {', '.join(sorted(mapping))}."
        )

    def width(self, model: Any, name: str) -> int | None:
        """Return the size of the last axis that an intervention on a component sees.

        Args:
            model: a model of the family.
            name: the component.

        Returns:
            The size; None where it varies with the prompt.

        Raises:
            ValueError: if this model has no such component.
        """
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
