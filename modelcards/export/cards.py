"""Cards in pyvene's own layout: a family that pyvene has is patched as text, one that it lacks is written out."""

from __future__ import annotations

import ast
import fnmatch
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvene.models import constants
from torch import nn

from modelcards import COMPONENTS, Card
from modelcards.export.checkout import REGISTRY, Checkout, Files
from modelcards.template import PREFIX, Mapping

MODULES, WIDTHS = "type_to_module_mapping", "type_to_dimension_mapping"
UTILITIES = "tests/modelcard_utils.py"

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

_TEST_CASE = """import unittest
from transformers import {imports}
from ..modelcard_utils import *


class {case}(ModelCardTests, unittest.TestCase):
    config = {config_class}(
{config}
    )
    model_classes = [{classes}]
    unchecked = {unchecked}


def suite():
    return unittest.defaultTestLoader.loadTestsFromTestCase({case})


if __name__ == "__main__":
    runner = unittest.TextTestRunner()
    runner.run(suite())
"""

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
_HEAD_DIM = {"head_dim": 10}  # heads x head size is not the hidden size


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
        no_width: components without a width, so that trainable interventions cannot be used on them.
    """

    card: Card
    files: Files
    names: dict[type[nn.Module], tuple[str, str]]
    module: str
    test: str
    left_out: dict[str, str]
    kept: list[str]
    no_width: list[str]


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
    exported = [_export(checkout, card) for card in cards]
    for one in exported:
        _register(registry, one)
    files = {path: text for one in exported for path, text in one.files.items()}
    utilities = (Path(__file__).parent / "modelcard_utils.py").read_text(encoding="utf-8")
    return exported, {
        **files,
        REGISTRY: registry.edited(),
        UTILITIES: utilities.removeprefix("# mypy: ignore-errors\n"),
    }


def _export(checkout: Checkout, card: Card) -> Exported:
    bare, *others = card.plain
    path = f"pyvene/models/{card.name}/modelings_intervenable_{card.name}.py"
    spelled = fnmatch.filter(checkout.paths, path.replace("modelings", "model*ings"))  # Mistral's: modellings
    path = spelled[0] if spelled else path
    copies = "EDITED_IN_PLACE" in (checkout.committed("pyvene/models/intervenable_base.py") or "")
    products = "def evaluate_dimension(" in (checkout.committed("pyvene/models/modeling_utils.py") or "")
    taps = {c for mapping in card.mappings.values() for c, entry in mapping.items() if PREFIX in entry[0]}
    shared = {c for c in card.mappings[bare] if c not in card.plain[bare]} - taps
    places = {c: card.mappings[bare][c] for c in (*card.plain[bare], *(sorted(shared) if copies else ()))}
    widths, no_width = _widths(card, places, products)

    roles = zip(card.plain, ("", "_lm", "_classifier"), strict=False)
    names = {cls: (f"{card.name}{role}_{MODULES}", f"{card.name}{role}_{WIDTHS}") for cls, role in roles}
    (modules, dimensions), *_ = names.values()
    new = _NEW_FILE.format(
        covered=f"For models with {card.covered}.\n\n" if card.covered else "",
        taps=textwrap.fill(", ".join(sorted(taps)), 88),
        modules=modules,
        widths=dimensions,
        name=card.name,
        checkpoint=card.checkpoint,
        causal=others[0].__name__,
    )
    source = Source(path, checkout.committed(path) or new)
    kept = sorted(set(source.entries(modules)) - set(places))
    source.fill(modules, {component: _spelled(entry) for component, entry in places.items()})
    source.fill(dimensions, {name: _spelled(proposals) for name, proposals in widths.items()}, without=no_width)
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
    why = dict.fromkeys(sorted(taps - set(kept)), "no module of transformers outputs them")
    if not copies:
        why |= dict.fromkeys(sorted(shared), "another module reads their tensors as well, and pyvene edits in place")

    case = "".join(word.capitalize() for word in card.name.split("_")) + "ModelCardTestCase"
    test = f"tests/integration_tests/{case}.py"
    files = {path: source.edited(), test: _test_case(card, case, kept)}
    initial = f"{path.rpartition('/')[0]}/__init__.py"
    if initial not in checkout.paths:
        files[initial] = ""
    module = path.removeprefix("pyvene/models/").removesuffix(".py").replace("/", ".")
    return Exported(card, files, names, module, test, why, kept, no_width)


def _register(registry: Source, one: Exported) -> None:
    """Add the lines that register a card's classes, where they are not registered."""
    if one.module not in registry.star_imports:
        registry.insert(max(registry.star_imports.values()), f"from .{one.module} import *\n")
    for which, mapping in enumerate((MODULES, WIDTHS)):
        there = registry.entries(mapping)
        lines = {_reference(model_class): names[which] for model_class, names in one.names.items()}
        registry.fill(mapping, {key: name for key, name in lines.items() if key not in there})


def _reference(model_class: type[nn.Module]) -> str:
    """How the registry names a class of transformers."""
    return f"hf_models.{model_class.__module__.removeprefix('transformers.models.')}.{model_class.__name__}"


# -- a file of the checkout, changed line by line ------------------------------------------------------------------------


class Source:
    """A Python file and the edits to be made in it, so that what they do not touch stays as it is, to the letter.

    Args:
        path: for messages.
        text: the file's.

    Raises:
        ValueError: if it is no Python, here; if an edit finds another form than pyvene's, in the methods.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path, self.lines = path, text.splitlines(keepends=True)
        try:
            self.tree = ast.parse(text)
        except SyntaxError as error:
            raise self.unknown(f"line {error.lineno} is no Python") from None
        self._edits: list[tuple[int, int, str]] = []  # lines [start, end) and what replaces them

    def unknown(self, what: str) -> ValueError:
        """The error for a file that cannot be edited."""
        return ValueError(f"{self.path} of the checkout has another form than pyvene's: {what}.")

    @property
    def star_imports(self) -> dict[str, int]:
        """Modules that the file imports everything of, relative to its package, and the lines that do."""
        imports = (node for node in self.tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*")
        return {node.module or "": node.lineno for node in imports}

    @property
    def assigned(self) -> dict[str, ast.expr]:
        """Names bound at module level, and to what."""
        return {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    @property
    def first_function(self) -> int:
        """The line before the first function, or the last."""
        functions = (node.lineno - 1 for node in self.tree.body if isinstance(node, ast.FunctionDef))
        return next(functions, len(self.lines))

    def last_line_of(self, name: str) -> int:
        """The last line of the last statement that uses a name."""
        using = (
            node for node in self.tree.body if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
        )
        return [node.end_lineno or 0 for node in using][-1]

    def dictionary(self, name: str) -> ast.Dict | None:
        """The dictionary literal that a name is bound to."""
        value = self.assigned.get(name)
        return value if isinstance(value, ast.Dict) else None

    def entries(self, name: str) -> dict[str, tuple[int, int, str]]:
        """Entries of a dictionary literal: key -> first line, line after the last, normalised value."""
        found = self.dictionary(name)
        if found is None:
            raise self.unknown(f"{name} should be a dictionary")
        entries, end = {}, found.lineno
        for key, value in zip(found.keys, found.values, strict=True):
            if key is None or key.lineno <= end:
                raise self.unknown(f"line {value.lineno} should hold one entry")
            end = value.end_lineno or 0
            text = str(key.value) if isinstance(key, ast.Constant) else ast.unparse(key)
            entries[text] = (key.lineno - 1, end, ast.unparse(value))
        return entries

    def fill(self, name: str, entries: dict[str, str], without: list[str] | None = None) -> None:
        """Make a dictionary literal hold entries, beside its others; new ones go after the last of their kind.

        Args:
            name: of the dictionary.
            entries: keys (strings, or dotted names of classes) and values, as text.
            without: keys to be removed.
        """
        there = self.entries(name)
        for key, (start, end, value) in there.items():
            if key in (without or ()):
                self._edits.append((start, end, ""))
            elif key in entries and value != ast.unparse(ast.parse(entries[key], mode="eval")):
                self._edits.append((start, end, _line(key, entries[key])))
        opening = self.dictionary(name)
        for key, text in entries.items():
            if key in there:
                continue
            same = [end for other, (_, end, _) in there.items() if other.rpartition(".")[0] == key.rpartition(".")[0]]
            last = (same or [end for _, end, _ in there.values()] or [opening.lineno if opening else 0])[-1]
            if there and not self.lines[last - 1].split("#")[0].rstrip().endswith(","):
                raise self.unknown(f"line {last} has no comma")
            self.insert(last, _line(key, text))

    def insert(self, line: int, text: str) -> None:
        """Insert text after a line."""
        self._edits.append((line, line, text))

    def edited(self) -> str:
        """The file with all edits."""
        lines = list(self.lines)
        # From the end, so that the lines before keep their numbers; at one line what is inserted last is put there first.
        for start, end, text in sorted(reversed(self._edits), key=lambda edit: (-edit[0], edit[0] == edit[1])):
            lines[start:end] = [text]
        return "".join(lines)


def _line(key: str, text: str) -> str:
    return f"    {key}: {text},\n" if "." in key else f'    "{key}": {text},\n'


# -- entries -------------------------------------------------------------------------------------------------------------


def _spelled(part: Any) -> str:
    """An entry of a mapping as upstream writes it."""
    if isinstance(part, tuple):
        return f"({', '.join(map(_spelled, part))}{',' if len(part) == 1 else ''})"
    if part in _NAMES:
        return _NAMES[part]
    return f'"{part}"' if isinstance(part, str) else repr(part)


def own_head_size(card: Card) -> bool:
    """Whether heads may have another size than hidden size / number of heads."""
    return card.plain_widths.get("head_attention_value_output", ("head_dim",))[0] == "head_dim"


def _widths(card: Card, places: Mapping, products: bool) -> tuple[Mapping, list[str]]:
    """Give the dimension mapping, and the components without a width.

    Args:
        card: ours.
        places: the components that pyvene gets.
        products: whether the checkout can spell "heads x head size" (`--fixes 2`). Without, a component that needs it has no
            entry: it is read and written whole, but trainable interventions on it fail.

    Returns:
        Both.
    """
    ours, own = card.plain_widths, own_head_size(card)
    n_head, hidden = ours["n_head"][0], ours["block_input"][0]
    head = f"{hidden}/{n_head}"

    def proposed(component: str) -> tuple[str, ...]:
        factor, _, of = (COMPONENTS[component].width or "").partition("*")
        if factor == "d_head":
            return ("head_dim", head) if own and products else ours.get(component, ())
        if of != "d_head":
            return ours.get(component, ())
        number = ours[factor][0]
        whole = hidden if number == n_head else f"{number}*{head}"
        proposals = (f"{number}*head_dim", whole) if own else (whole,)
        return proposals if products or "*" not in "".join(proposals) else ()

    counts = sorted({param for _, _, *splits in places.values() for _, param in splits if isinstance(param, str)})
    widths = {count: ours[count] for count in counts} | {component: proposed(component) for component in places}
    return {name: some for name, some in widths.items() if some}, [name for name, some in widths.items() if not some]


# -- the unit test -------------------------------------------------------------------------------------------------------


def _test_case(card: Card, case: str, unchecked: list[str]) -> str:
    bare: Any = next(iter(card.plain))
    config_class = bare.config_class
    default = config_class()
    sizes = {
        name: size
        for name, size in _SIZES.items()
        if hasattr(default, name) and not isinstance(getattr(config_class, name, None), property)
    }
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    sizes |= _HEAD_DIM if own_head_size(card) else {}
    classes = [model_class.__name__ for model_class in card.plain]
    return _TEST_CASE.format(
        imports=", ".join([config_class.__name__, *classes]),
        case=case,
        config_class=config_class.__name__,
        config="\n".join(f"        {name}={size!r}," for name, size in sizes.items()),
        classes=", ".join(classes),
        unchecked=_spelled(tuple(unchecked)),
    )
