"""The cards, found by model class and put into pyvene's two mappings."""

from __future__ import annotations

from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping
from torch import nn

from modelcards.bloom import modelings_intervenable_bloom as bloom
from modelcards.card import Card
from modelcards.cohere import modelings_intervenable_cohere as cohere
from modelcards.falcon import modelings_intervenable_falcon as falcon
from modelcards.gemma import modelings_intervenable_gemma as gemma
from modelcards.gemma2 import modelings_intervenable_gemma2 as gemma2
from modelcards.gemma3 import modelings_intervenable_gemma3 as gemma3
from modelcards.gpt2 import modelings_intervenable_gpt2 as gpt2
from modelcards.gpt_neox import modelings_intervenable_gpt_neox as gpt_neox
from modelcards.gptj import modelings_intervenable_gptj as gptj
from modelcards.granite import modelings_intervenable_granite as granite
from modelcards.llama3_1 import modelings_intervenable_llama3_1 as llama3_1
from modelcards.ministral import modelings_intervenable_ministral as ministral
from modelcards.mistral import modelings_intervenable_mistral as mistral
from modelcards.mixtral import modelings_intervenable_mixtral as mixtral
from modelcards.olmo2 import modelings_intervenable_olmo2 as olmo2
from modelcards.opt import modelings_intervenable_opt as opt
from modelcards.phi3 import modelings_intervenable_phi3 as phi3
from modelcards.qwen2_5 import modelings_intervenable_qwen2_5 as qwen2_5
from modelcards.qwen3 import modelings_intervenable_qwen3 as qwen3
from modelcards.qwen3_moe import modelings_intervenable_qwen3_moe as qwen3_moe
from modelcards.smollm3 import modelings_intervenable_smollm3 as smollm3
from modelcards.stablelm import modelings_intervenable_stablelm as stablelm
from modelcards.starcoder2 import modelings_intervenable_starcoder2 as starcoder2

CARDS: tuple[Card, ...] = (
    qwen2_5.card,
    gemma2.card,
    llama3_1.card,
    mistral.card,
    gpt2.card,
    qwen3.card,
    gemma.card,
    gemma3.card,
    phi3.card,
    ministral.card,
    olmo2.card,
    granite.card,
    smollm3.card,
    cohere.card,
    stablelm.card,
    gpt_neox.card,
    mixtral.card,
    qwen3_moe.card,
    gptj.card,
    opt.card,
    falcon.card,
    bloom.card,
    starcoder2.card,
)


def register(*model_classes: type[nn.Module]) -> None:
    """Make pyvene use our cards, for every class they cover and for the subclasses given. Idempotent.

    pyvene looks a model's class up by identity, so a user's subclass of a covered class must be named once; our
    `IntervenableModel` does it by itself.
    """
    for model_class in (*(cls for card in CARDS for cls in card.mappings), *model_classes):
        card = card_of(model_class)
        # New dicts, never an edit of pyvene's own, of which the bare and the language-model class share one.
        type_to_module_mapping[model_class] = dict(card.mapping(model_class))
        type_to_dimension_mapping[model_class] = dict(card.dimension_mapping)


def card_of(model: nn.Module | type[nn.Module]) -> Card:
    """The card of a model or a model class, found through its base classes.

    Raises ValueError, listing the families, if it has none; and for a model of a class that has one whose config says that it is
    built in a way that the card does not cover.
    """
    model_class = model if isinstance(model, type) else type(model)
    for base in model_class.__mro__:
        for card in CARDS:
            if base in card.mappings:
                if card.covers is not None and isinstance(model, nn.Module) and not card.covers(model.config):
                    raise ValueError(
                        f"the card of {card.family} covers models with {card.covered}; this {model_class.__name__} is built "
                        "in another way."
                    )
                return card
    raise ValueError(
        f"no model card covers {model_class.__name__}; there are cards for "
        f"{', '.join(card.family for card in CARDS)} (bare, CausalLM and SequenceClassification classes)."
    )
