"""The dimension mapping of a card in what a checkout's pyvene can spell, and the sizes of the models that test it.

A width belongs to a class there, not to a model. So what a family's default config needs counts first: an entry of upstream's
that is right for it stays, to the letter, unless another is right for heads of every size as well. One that is wrong gives way
to a right one, or goes if this pyvene cannot spell one. Nothing new is written that is too small for some config of the family,
as pyvene would then read and edit vectors in part without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelcards import COMPONENTS, Card, dimensions
from modelcards.export.behaviour import Behaviour, Question
from modelcards.template import Mapping

# Sizes of the models in the tests, where the family's config has them. No two are alike.
_SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "intermediate_size": 44,
    "ffn_dim": 44,
    "ffn_hidden_size": 44,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rotary_dim": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "sliding_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# All heads together are wider, or less wide, than the hidden size.
_LARGE_HEADS, _SMALL_HEADS = {"head_dim": 10}, {"hidden_size": 48, "head_dim": 10}

Sizes = dict[str, Any]
Proposals = tuple[str, ...]


@dataclass(frozen=True)
class Widths:
    """What a card says of widths upstream.

    Attributes:
        mapping: the dimension mapping.
        missing: components without a width, so that trainable interventions cannot be used on them.
        by_default: components whose width is right in the default config, but not for heads of every size or number.
        sizes: of the config in the unit test, for which everything is read and written exactly.
        published: what differs from these in the config whose widths are tested; empty if nothing.
    """

    mapping: Mapping
    missing: list[str]
    by_default: list[str]
    sizes: Sizes
    published: Sizes


def sizes_of_test(card: Card) -> Sizes:
    """Choose the sizes of the config in a card's unit test, but for that of a head."""
    config_class = _config_class(card)
    default = config_class()
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if hasattr(default, name) and not isinstance(getattr(config_class, name, None), property)
    }
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    return sizes


def questions(card: Card, places: Mapping, there: Mapping) -> list[Question]:
    """List what `chosen_widths` has to know of a checkout.

    Args:
        card: ours.
        places: the components that pyvene gets.
        there: the family's dimension mapping upstream.

    Returns:
        Every proposal for every component, for each config that counts.
    """
    return [
        Question(_config_class(card), tuple(sizes.items()), proposals)
        for component in places
        for proposals in _candidates(card, component, there)
        for sizes in _configs(card)
    ]


def chosen_widths(card: Card, places: Mapping, there: Mapping, found: Behaviour) -> Widths:
    """Choose for each component the proposals that are right in most configs, first of all in the default one.

    Args:
        card: ours.
        places: the components that pyvene gets.
        there: the family's dimension mapping upstream.
        found: answers to `questions`.

    Returns:
        The mapping, and how to test it.
    """
    config_class, configs = _config_class(card), _configs(card)
    made = {tuple(sizes.items()): config_class(**sizes) for sizes in configs}  # among them the default one, of no sizes

    def true(component: str, sizes: Sizes) -> int:
        return _true(component, made[tuple(sizes.items())])

    def width(proposals: Proposals, sizes: Sizes) -> int | None:
        return found.widths[Question(config_class, tuple(sizes.items()), proposals)]

    def cuts(component: str, proposals: Proposals) -> bool:
        """Whether a vector of some config is longer than this, so that it would be read and edited in part, silently."""
        return any((width(proposals, sizes) or 0) < true(component, sizes) for sizes in configs)

    def serves(component: str, proposals: Proposals) -> bool:
        right = width(proposals, {}) == true(component, {})
        return right and (proposals == there.get(component) or not cuts(component, proposals))

    counts = sorted({param for _, _, *splits in places.values() for _, param in splits if isinstance(param, str)})
    mapping: Mapping = {count: card.plain_widths[count] for count in counts}
    missing, by_default, cut = [], [], False
    for component in places:
        right = {
            proposals: sum(width(proposals, sizes) == true(component, sizes) for sizes in configs)
            for proposals in _candidates(card, component, there)
            if serves(component, proposals)
        }
        if not right:
            missing.append(component)
            continue
        mapping[component] = max(right, key=lambda proposals: right[proposals])  # the first of the best
        if right[mapping[component]] < len(configs):
            by_default.append(component)
            cut |= cuts(component, mapping[component])
    sizes = {**sizes_of_test(card), **(_SMALL_HEADS if cut else _LARGE_HEADS if _own_head_size(card) else {})}
    published = _default_proportions(card, sizes) if by_default else {}
    return Widths(mapping, missing, by_default, sizes, published)


def _config_class(card: Card) -> Any:
    bare: Any = next(iter(card.plain))
    return bare.config_class


def _own_head_size(card: Card) -> bool:
    """Whether heads may have another size than hidden size / number of heads."""
    return card.plain_widths.get("head_attention_value_output", ("head_dim",))[0] == "head_dim"


def _configs(card: Card) -> list[Sizes]:
    """The default config, one with fewer key/value heads than heads, and one with heads of another size, if there is such."""
    sizes = sizes_of_test(card)
    return [{}, sizes, *([{**sizes, **_LARGE_HEADS}] if _own_head_size(card) else [])]


def _default_proportions(card: Card, sizes: Sizes) -> Sizes:
    """What makes a config of the test have heads as the default config has: their size, and as many key/value heads."""
    default, d = dimensions(_config_class(card)()), sizes
    found: Sizes = {}
    if "head_dim" in d:
        found["head_dim"] = d["hidden_size"] // d["num_attention_heads"]
    if default["n_head"] == default["n_kv_head"] and "num_key_value_heads" in d:
        found["num_key_value_heads"] = d["num_attention_heads"]
    return found


def _true(component: str, config: Any) -> int:
    sizes = dimensions(config)
    return math.prod(sizes[factor] for factor in (COMPONENTS[component].width or "").split("*"))


def _candidates(card: Card, component: str, there: Mapping) -> Sequence[Proposals]:
    """Spellings of a component's width, upstream's first."""
    ours = card.plain_widths
    n_head, n_kv_head, hidden = ours["n_head"][0], ours["n_kv_head"][0], ours["block_input"][0]
    head = f"{hidden}/{n_head}"
    spellings: dict[str, list[Proposals]] = {
        "d_head": [("head_dim", head), ("head_dim",), (head,)],
        "n_head*d_head": [(f"{n_head}*head_dim", hidden), (f"{n_head}*head_dim",), (hidden,)],
        "n_kv_head*d_head": [
            (f"{n_kv_head}*head_dim", f"{n_kv_head}*{head}"),
            (f"{n_kv_head}*head_dim",),
            (f"{n_kv_head}*{head}",),
            (hidden,),
        ],
    }
    known = [mapping[component] for mapping in (there, ours) if component in mapping]
    return list(dict.fromkeys([*known, *spellings.get(COMPONENTS[component].width or "", [])]))
