"""Cards in pyvene's own layout: a family that pyvene has is patched as text, one that it lacks is written out."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvene.models import constants
from torch import nn

from modelcards import Card
from modelcards.export.behaviour import Behaviour, behaviour
from modelcards.export.checkout import PACKAGE, REGISTRY, Checkout, Files
from modelcards.export.source import WIDTHS, Source
from modelcards.export.widths import Widths, chosen_widths, questions
from modelcards.template import PREFIX, Mapping

MODULES = "type_to_module_mapping"
UTILITIES = "tests/modelcard_utils.py"

# Classes that transformers 4.55, the oldest that pyvene supports, lacks; they are registered where they exist.
NEWER = frozenset(
    {
        "Gemma3TextForSequenceClassification",
        "MinistralForCausalLM",
        "MinistralForSequenceClassification",
        "MinistralModel",
        "Olmo2ForSequenceClassification",
    }
)

# Checkpoints that upstream loads by default and that look stale, as the families' publishers spell them otherwise.
STALE = frozenset({"Qwen/Qwen2-7B-beta", "google/gemma2-2b"})

_NAMES = {value: name for name, value in vars(constants).items() if name.startswith(("CONST_", "split_"))}

_NEW_FILE = '''"""
Each modeling file in this library is a mapping between
abstract naming of intervention anchor points and actual
model module defined in the huggingface library.

We also want to let the intervention library know how to
config the dimensions of intervention based on model config
defined in the huggingface library.

{covered}Left out, as no module of transformers outputs them:
{taps}.
"""


import torch
from ..constants import *


{modules} = {{
}}


{widths} = {{
}}


def create_{name}(
    name="{checkpoint}", cache_dir=None, dtype=torch.bfloat16
):
    """Creates a Causal LM model, config, and tokenizer from the given name and revision"""
    from transformers import AutoConfig, AutoTokenizer, {causal}

    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    model = {causal}.from_pretrained(
        name,
        config=config,
        cache_dir=cache_dir,
        torch_dtype=dtype,
    )
    print("loaded model")
    return config, tokenizer, model
'''

_CLASS_WITH_HEAD = '''"""{name} model with {what} head"""
{modules} = {{}}
for k, v in {bare_modules}.items():
    {modules}[k] = (f"{prefix}{{v[0]}}", ) + v[1:]
{logits}{widths} = {bare_widths}


'''

_OR_SKIP = """
try:
    {imports}
except ImportError:
    raise unittest.SkipTest("this transformers is older than {name}")
"""

_IF_THERE = f"""
try:
    {MODULES}[{{cls}}] = {{modules}}
    {WIDTHS}[{{cls}}] = {{widths}}
except AttributeError:
    pass  # this transformers is older than the class
"""

_TEST_CASE = """import unittest
{imports}
from ..modelcard_utils import *


class {case}(ModelCardTests, unittest.TestCase):
    config = {config}
    model_classes = {classes}
{more}

def suite():
    return unittest.defaultTestLoader.loadTestsFromTestCase({case})


if __name__ == "__main__":
    runner = unittest.TextTestRunner()
    runner.run(suite())
"""


@dataclass(frozen=True)
class Exported:
    """A card as it goes upstream.

    Attributes:
        card: ours.
        files: paths and contents, without the registry.
        names: of the module and the dimension mapping of each class.
        module: dotted path of the mapping file, relative to `pyvene.models`.
        test: path of the unit test.
        left_out: components that pyvene cannot have, and why.
        kept: components that upstream has and plain pyvene cannot run: left as they were, and not tested.
        widths: of the components.
        stale: the checkpoint that upstream loads by default, if it gives way to the card's.
    """

    card: Card
    files: Files
    names: dict[type[nn.Module], tuple[str, str]]
    module: str
    test: str
    left_out: dict[str, str]
    kept: list[str]
    widths: Widths
    stale: str | None


def export(checkout: Checkout, cards: list[Card]) -> tuple[list[Exported], Files]:
    """Put cards into the checkout's terms.

    Args:
        checkout: where they go.
        cards: which.

    Returns:
        The exported cards, and all files to be written, the registry among them.

    Raises:
        ValueError: for a checkout whose files have another form than pyvene's.
    """
    registry = Source(REGISTRY, checkout.committed(REGISTRY) or "")
    if not registry.star_imports or not (registry.dictionary(MODULES) and registry.dictionary(WIDTHS)):
        raise registry.unknown(f"it should import mappings and fill {MODULES} and {WIDTHS}")
    sources = [_source(checkout, card) for card in cards]
    asked = zip(cards, sources, strict=True)
    found = behaviour(
        checkout, [one for card, source in asked for one in questions(card, _places(card), source.widths)]
    )
    exported = [_export(checkout, card, source, found) for card, source in zip(cards, sources, strict=True)]
    package = Source(PACKAGE, checkout.committed(PACKAGE) or "")
    for one in exported:
        _register(registry, one)
        _export_create(package, one)
    files = {path: text for one in exported for path, text in one.files.items()}
    utilities = (Path(__file__).parent / "modelcard_utils.py").read_text(encoding="utf-8")
    return exported, {
        **files,
        REGISTRY: registry.edited(),
        PACKAGE: package.edited(),
        UTILITIES: utilities.removeprefix("# mypy: ignore-errors\n"),
    }


def _places(card: Card, *, shared: bool = True) -> Mapping:
    """The bare class's components that pyvene can have; `shared`: also inputs that another module reads as well."""
    bare = next(iter(card.plain))
    entries = {c: entry for c, entry in card.mappings[bare].items() if PREFIX not in entry[0]}
    return {c: entries[c] for c in (*card.plain[bare], *sorted(set(entries) - set(card.plain[bare])) * shared)}


def _taps(card: Card) -> set[str]:
    return {c for mapping in card.mappings.values() for c, entry in mapping.items() if PREFIX in entry[0]}


def _names(card: Card) -> dict[type[nn.Module], tuple[str, str]]:
    """Of the module and the dimension mapping of each class."""
    roles = zip(card.plain, ("", "_lm", "_classifier"))  # noqa: B905  (a family need not have a classifier)
    return {cls: (f"{card.name}{role}_{MODULES}", f"{card.name}{role}_{WIDTHS}") for cls, role in roles}


def _source(checkout: Checkout, card: Card) -> Source:
    """The family's file as it is committed, or as a new one begins."""
    path = checkout.mapping_file(card.name)
    (modules, widths), *_ = _names(card).values()
    new = _NEW_FILE.format(
        covered=f"For models with {card.covered}.\n\n" if card.covered else "",
        taps=textwrap.fill(", ".join(sorted(_taps(card))), 88),
        modules=modules,
        widths=widths,
        name=card.name,
        checkpoint=card.checkpoint,
        causal=list(card.plain)[1].__name__,
    )
    return Source(path, checkout.committed(path) or new)


def _export(checkout: Checkout, card: Card, source: Source, found: Behaviour) -> Exported:
    bare, *others = card.plain
    places, taps = _places(card, shared=found.edits_a_copy), _taps(card)
    widths = chosen_widths(card, places, source.widths, found)
    names = _names(card)
    (modules, dimensions), *_ = names.values()
    kept = sorted(set(source.entries(modules)) - set(places))
    source.fill(modules, {component: _spelled(entry) for component, entry in places.items()})
    spelled = {name: _spelled(proposals) for name, proposals in widths.mapping.items()}
    source.fill(dimensions, spelled, without=widths.missing)
    for model_class in others:
        own, own_widths = names[model_class]
        logits = card.plain[model_class].get("logits")
        entry = f'{own}["logits"] = {_spelled(logits)}\n' if logits else ""
        if own not in source.assigned:
            section = _CLASS_WITH_HEAD.format(
                name=card.name,
                what="LM" if model_class is others[0] else "classifier",
                modules=own,
                bare_modules=modules,
                prefix=card.plain[model_class]["block_input"][0].removesuffix(card.plain[bare]["block_input"][0]),
                logits=entry,
                widths=own_widths,
                bare_widths=dimensions,
            )
            source.insert(source.first_function, section)
        elif entry and entry not in source.lines:
            source.insert(source.last_line_of(own), entry)
    stale = source.change_default(f"create_{card.name}", "name", STALE, card.checkpoint)
    why = dict.fromkeys(sorted(taps - set(kept)), "no module of transformers outputs them")
    if not found.edits_a_copy:
        why |= dict.fromkeys(
            sorted(set(_places(card)) - set(places)),
            "another module reads their tensors as well, and pyvene edits in place",
        )

    case = "".join(word.capitalize() for word in card.name.split("_")) + "ModelCardTestCase"
    test = f"tests/integration_tests/{case}.py"
    path = source.path
    files = {path: source.edited(), test: _test_case(card, case, kept, widths)}
    initial = f"{path.rpartition('/')[0]}/__init__.py"
    if initial not in checkout.paths:
        files[initial] = ""
    module = path.removeprefix("pyvene/models/").removesuffix(".py").replace("/", ".")
    return Exported(card, files, names, module, test, why, kept, widths, stale)


def _register(registry: Source, one: Exported) -> None:
    """Add the lines that register a card's classes, where they are not registered."""
    if one.module not in registry.star_imports:
        registry.insert(max(registry.star_imports.values()), f"from .{one.module} import *\n")
    for which, mapping in enumerate((MODULES, WIDTHS)):
        there = registry.entries(mapping)
        lines = {_reference(cls): names[which] for cls, names in one.names.items() if cls.__name__ not in NEWER}
        registry.fill(mapping, {key: name for key, name in lines.items() if key not in there})
    end = registry.last_line_of(WIDTHS)
    for cls in (cls for cls in one.names if cls.__name__ in NEWER):
        if not any(_reference(cls) in line for line in registry.lines):
            modules, widths = one.names[cls]
            registry.insert(end, _IF_THERE.format(cls=_reference(cls), modules=modules, widths=widths))


def _export_create(package: Source, one: Exported) -> None:
    """Add the line that lets users import `create_<family>` from pyvene, where there is none."""
    imports = [node for node in package.tree.body if isinstance(node, ast.ImportFrom)]
    name = f"create_{one.card.name}"
    if not any(alias.name == name for node in imports for alias in node.names):
        last = max((node.end_lineno or 0 for node in imports if (node.module or "").startswith("models.")), default=0)
        package.insert(last, f"from .models.{one.module} import {name}\n")


def _reference(model_class: type[nn.Module]) -> str:
    """How the registry names a class of transformers."""
    return f"hf_models.{model_class.__module__.removeprefix('transformers.models.')}.{model_class.__name__}"


# -- entries -------------------------------------------------------------------------------------------------------------


def _spelled(part: Any) -> str:
    """An entry of a mapping as upstream writes it."""
    if isinstance(part, tuple):
        return f"({', '.join(map(_spelled, part))}{',' if len(part) == 1 else ''})"
    if part in _NAMES:
        return _NAMES[part]
    return f'"{part}"' if isinstance(part, str) else repr(part)


# -- the unit test -------------------------------------------------------------------------------------------------------


def _test_case(card: Card, case: str, unchecked: list[str], widths: Widths) -> str:
    bare: Any = next(iter(card.plain))
    config_class = bare.config_class.__name__
    classes = [model_class.__name__ for model_class in card.plain]
    old = [name for name in classes if name not in NEWER]
    imports = f"from transformers import {', '.join([config_class, *(old or classes)])}"
    listed = f"[{', '.join(old or classes)}]"
    if not old:
        imports = _OR_SKIP.format(imports=imports, name=card.name)
    elif newer := [name for name in classes if name in NEWER]:
        imports = f"import transformers\n{imports}"
        listed += f" + [getattr(transformers, name) for name in {newer!r} if hasattr(transformers, name)]"
    config = _config(config_class, widths.sizes)
    more = f"    no_width = {_spelled(tuple(widths.missing))}\n" if widths.missing else ""
    if widths.published:
        more += f"    published = {_config(config_class, {**widths.sizes, **widths.published})}\n"
    return _TEST_CASE.format(
        imports=imports,
        case=case,
        config=config,
        classes=listed,
        more=more + (f"    unchecked = {_spelled(tuple(unchecked))}\n" if unchecked else ""),
    )


def _config(name: str, sizes: dict[str, Any]) -> str:
    return f"{name}(\n" + "".join(f"        {size}={value!r},\n" for size, value in sizes.items()) + "    )"
