"""The cards, found by model class and put into pyvene's two mappings."""

from __future__ import annotations

from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping
from torch import nn

from modelcards.bloom.card import card as bloom
from modelcards.card import FAMILIES_WITH, Card
from modelcards.cohere.card import card as cohere
from modelcards.falcon.card import card as falcon
from modelcards.gemma.card import card as gemma
from modelcards.gemma2.card import card as gemma2
from modelcards.gemma3.card import card as gemma3
from modelcards.gpt2.card import card as gpt2
from modelcards.gpt_neox.card import card as gpt_neox
from modelcards.gptj.card import card as gptj
from modelcards.granite.card import card as granite
from modelcards.llama3_1.card import card as llama3_1
from modelcards.ministral.card import card as ministral
from modelcards.mistral.card import card as mistral
from modelcards.mixtral.card import card as mixtral
from modelcards.names import MODULES, by_module
from modelcards.olmo2.card import card as olmo2
from modelcards.opt.card import card as opt
from modelcards.phi3.card import card as phi3
from modelcards.qwen2_5.card import card as qwen2_5
from modelcards.qwen3.card import card as qwen3
from modelcards.qwen3_moe.card import card as qwen3_moe
from modelcards.smollm3.card import card as smollm3
from modelcards.stablelm.card import card as stablelm
from modelcards.starcoder2.card import card as starcoder2
from modelcards.wrapped import refuse_mixed_batches, what_is_wrapped

CARDS: tuple[Card, ...] = (
    qwen2_5,
    gemma2,
    llama3_1,
    mistral,
    gpt2,
    qwen3,
    gemma,
    gemma3,
    phi3,
    ministral,
    olmo2,
    granite,
    smollm3,
    cohere,
    stablelm,
    gpt_neox,
    mixtral,
    qwen3_moe,
    gptj,
    opt,
    falcon,
    bloom,
    starcoder2,
)
MODULES.update(by_module(mapping for _card in CARDS for mapping in _card.mappings.values()))
for _card in CARDS:
    for _component in _card.components:
        FAMILIES_WITH.setdefault(_component, []).append(_card.family)


def register(*models: nn.Module | type[nn.Module]) -> None:
    """Put our cards into pyvene's mappings, for every class they cover and for what is given. Idempotent.

    pyvene looks up exactly a model's class, so a user's subclass of a covered class must be named once; our `IntervenableModel`
    does that by itself. It also takes widths by class, and cannot spell all of them: give it the model, and its class gets the
    widths of this model's config as numbers, so that pyvene trains interventions on every component of fixed width. Two models
    of one class with different sizes need a call each, before their interventions are made.

    Args:
        *models: subclasses of classes that a card covers, or models.

    Raises:
        ValueError: for a class that no card covers.
    """
    for model in (*(cls for card in CARDS for cls in card.mappings), *models):
        card, model_class = card_of(model), model if isinstance(model, type) else type(model)
        # New dicts, never an edit of pyvene's own, of which the bare and the language-model class share one.
        places, widths = dict(card.mapping(model_class)), dict(card.dimension_mapping)
        if isinstance(model, nn.Module):
            exact = {component: card.width(model, component) for component in places}
            widths |= {component: (str(width),) for component, width in exact.items() if width is not None}
        type_to_module_mapping[model_class], type_to_dimension_mapping[model_class] = places, widths


def card_of(model: nn.Module | type[nn.Module]) -> Card:
    """Return the card of a model or a model class, found through its base classes.

    Args:
        model: a model, whose config is looked at as well, or a class.

    Returns:
        The card.

    Raises:
        ValueError: if no card covers the class, and as for `find_card`.
    """
    card = find_card(model)
    if card is None:
        name = (model if isinstance(model, type) else type(model)).__name__
        raise ValueError(
            f"no model card covers {name}; there are cards for {', '.join(card.family for card in CARDS)} (bare, CausalLM and "
            "SequenceClassification classes)."
        )
    return card


def find_card(model: nn.Module | type[nn.Module]) -> Card | None:
    """Return the card of a model or a model class, if there is one.

    Args:
        model: a model, whose config is looked at as well, or a class.

    Returns:
        The card; None if none covers the class.

    Raises:
        ValueError: if it is no model, if the model's config has an option that its card does not cover, if it is compiled or
            wrapped, or if its numbers depend on what else is in a batch.
    """
    if not isinstance(model, nn.Module | type):
        raise ValueError(
            f"expected a model, not {type(model).__name__}; load one with model, tokenizer = pyvene_ext.load_model(NAME)."
        )
    model_class = model if isinstance(model, type) else type(model)
    if model_class.__name__ == "OptimizedModule":
        raise ValueError(
            "this model is compiled by torch.compile, and hooks do not reach into compiled code; give the model itself, which is "
            "the compiled one's _orig_mod."
        )
    for base in model_class.__mro__:
        for card in CARDS:
            if base in card.mappings:
                if card.covers is not None and isinstance(model, nn.Module) and not card.covers(model.config):
                    raise ValueError(
                        f"the card of {card.family} covers models with {card.covered}; the config of this "
                        f"{model_class.__name__} says otherwise."
                    )
                if isinstance(model, nn.Module):
                    refuse_mixed_batches(model)
                return card
    if isinstance(model, nn.Module) and (advice := what_is_wrapped(model)):
        raise ValueError(f"this {model_class.__name__} {advice}.")
    return None
