"""Cards in pyvene's own layout: mapping files, registry lines and unit tests, rendered from what our cards hold."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyvene.models import constants
from torch import Tensor, nn

from modelcards import COMPONENTS, Card, n_heads, n_kv_heads
from modelcards.export.checkout import REGISTRY, Checkout, Files
from modelcards.export.modelcard_utils import look_at

MODULES, WIDTHS = "type_to_module_mapping", "type_to_dimension_mapping"
UTILITIES = "tests/modelcard_utils.py"

Names = dict[type[nn.Module], tuple[str, str]]  # what the module and the dimension mapping of a class are called

_HOOKS = {constants.CONST_INPUT_HOOK: "CONST_INPUT_HOOK", constants.CONST_OUTPUT_HOOK: "CONST_OUTPUT_HOOK"}
_SPLITS = {"split_three", "split_half", "split_head_and_permute"}
_PARTS = {"split_three": 3, "split_half": 2}

_HEADER = '''"""
Each modeling file in this library is a mapping between
abstract naming of intervention anchor points and actual
model module defined in the huggingface library.

We also want to let the intervention library know how to
config the dimensions of intervention based on model config
defined in the huggingface library.
{notes}"""
'''

_CREATE = '''def create_{name}(
    name{default}, cache_dir=None, dtype=torch.bfloat16
):
    """Creates a Causal LM model, config, and tokenizer from the given name and revision"""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        cache_dir=cache_dir,
        torch_dtype=dtype,
    )
    print("loaded model")
    return config, tokenizer, model'''

_TEST_CASE = """import unittest
from transformers import {imports}
from ..modelcard_utils import *


PLACES = [
{places}
]


class {case}(ModelCardTests, unittest.TestCase):
    config = {config_class}(
{config}
    )
    cards = {{
{cards}
    }}


def suite():
    return unittest.defaultTestLoader.loadTestsFromTestCase({case})


if __name__ == "__main__":
    runner = unittest.TextTestRunner()
    runner.run(suite())
"""

# Sizes of the models in the tests, for those of them that a family's config has. Heads x head size is not the hidden size, and
# no two sizes are alike.
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
_HEAD_DIM = {"head_dim": 10}


@dataclass(frozen=True)
class Exported:
    """A card as it goes upstream.

    Attributes:
        card: ours.
        name: upstream's name of the family, which its mappings begin with.
        files: paths and contents, without the registry.
        names: of the mappings of each class.
        module: dotted path of the mapping file, relative to `pyvene.models`.
        test: path of the unit test.
        left_out: components that pyvene cannot carry, and why.
        kept: upstream's components that are left as they were.
        no_width: components that trainable interventions cannot be used on, as pyvene cannot spell their width.
    """

    card: Card
    name: str
    files: Files
    names: Names
    module: str
    test: str
    left_out: dict[str, str]
    kept: list[str]
    no_width: list[str]


def export(checkout: Checkout, cards: list[Card]) -> tuple[list[Exported], Files]:
    """The cards in the checkout's terms, and all files to be written, the registry among them.

    Raises:
        ValueError: for a checkout whose files are not as they are known.
    """
    registry = Registry(checkout)
    exported = [_export(checkout, registry, card) for card in cards]
    files = {path: text for one in exported for path, text in one.files.items()}
    files[REGISTRY] = registry.with_cards(exported)
    utilities = (Path(__file__).parent / "modelcard_utils.py").read_text(encoding="utf-8")
    files[UTILITIES] = utilities.removeprefix("# mypy: ignore-errors\n")
    return exported, files


# -- the registry ------------------------------------------------------------------------------------------------------


class Registry:
    """pyvene's intervenable_modelcard.py: which file a card is in and what its mappings are called."""

    def __init__(self, checkout: Checkout) -> None:
        self.text = checkout.committed(REGISTRY) or ""
        self.tree = _parsed(self.text, REGISTRY)
        self.imports = [
            node
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.names[0].name == "*" and node.module
        ]
        self.mappings = {
            node.targets[0].id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Dict)
        }
        if not self.imports or not {MODULES, WIDTHS} <= set(self.mappings):
            raise ValueError(
                f"{REGISTRY} of {checkout.root} is not as it is known here: it should import mappings and fill "
                f"{MODULES} and {WIDTHS}."
            )
        self.defined_in = {  # name of a module mapping -> dotted path of its file
            name: node.module
            for node in self.imports
            if node.module and (text := checkout.committed(_file(node.module))) is not None
            for name in _assigned(_parsed(text, _file(node.module)))
        }

    def registered(self, mapping: str, model_class: type[nn.Module]) -> str | None:
        """What a class's mapping is called; None if the class is not registered."""
        entries = self.mappings[mapping]
        for key, value in zip(entries.keys, entries.values, strict=True):
            if key is not None and ast.unparse(key) == _reference(model_class):
                return ast.unparse(value)
        return None

    def with_cards(self, exported: list[Exported]) -> str:
        """The file with the lines that are not there yet."""
        additions: list[tuple[int, str]] = []  # behind which line, and what
        modules = {node.module for node in self.imports}
        for one in exported:
            if one.module not in modules:
                additions.append((self.imports[-1].end_lineno or 0, f"from .{one.module} import *"))
            for which, mapping in enumerate((MODULES, WIDTHS)):
                entries = self.mappings[mapping]
                for model_class, names in one.names.items():
                    if self.registered(mapping, model_class) is None:
                        line = f"    {_reference(model_class)}: {names[which]},"
                        additions.append((self._behind(entries, model_class), line))
        lines = self.text.splitlines()
        in_order = sorted(additions, key=lambda addition: addition[0])
        for behind, text in reversed(in_order):  # from the end, so that the lines before keep their numbers
            if text.endswith(",") and not lines[behind - 1].rstrip().endswith(","):
                raise ValueError(f"{REGISTRY} of the checkout is not as it is known here: line {behind} has no comma.")
            lines.insert(behind, text)
        return "\n".join(lines) + "\n" if additions else self.text

    @staticmethod
    def _behind(entries: ast.Dict, model_class: type[nn.Module]) -> int:
        """The line of the last entry of the family, or of all."""
        family = _reference(model_class).rsplit(".", 1)[0] + "."
        ends = [
            value.end_lineno or 0
            for key, value in zip(entries.keys, entries.values, strict=True)
            if key is not None and ast.unparse(key).startswith(family)
        ]
        return ends[-1] if ends else entries.values[-1].end_lineno or 0


def _reference(model_class: type[nn.Module]) -> str:
    """How the registry names a class of transformers."""
    return f"hf_models.{model_class.__module__.removeprefix('transformers.models.')}.{model_class.__name__}"


def _file(module: str) -> str:
    return f"pyvene/models/{module.replace('.', '/')}.py"


def _parsed(text: str, path: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(
            f"{path} of the checkout is not as it is known here: line {error.lineno} is no Python."
        ) from None


def _assigned(tree: ast.Module) -> list[str]:
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


# -- one card ----------------------------------------------------------------------------------------------------------


def _export(checkout: Checkout, registry: Registry, card: Card) -> Exported:
    classes = list(card.mappings)
    bare = registry.registered(MODULES, classes[0])
    name = bare.removesuffix(f"_{MODULES}") if bare else classes[0].__module__.split(".")[2]
    names: Names = {}
    for model_class in classes:
        default = f"{name}{_role(model_class)}"
        module_mapping = registry.registered(MODULES, model_class) or f"{default}_{MODULES}"
        names[model_class] = (module_mapping, registry.registered(WIDTHS, model_class) or f"{default}_{WIDTHS}")
    folder = f"{name}.modelings_intervenable_{name}"
    module = registry.defined_in.get(names[classes[0]][0], folder)
    theirs = Theirs(checkout, _file(module))
    lost = theirs.mappings - {mapping for pair in names.values() for mapping in pair}
    lost |= theirs.further - card.components
    if lost:
        raise ValueError(f"{theirs.path} of the checkout is not as it is known here: {sorted(lost)[0]} would be lost.")

    tiny = Tiny(card)
    copies = "EDITED_IN_PLACE" in (checkout.committed("pyvene/models/intervenable_base.py") or "")
    places, left_out = {}, {}
    for component, entry in card.mappings[classes[0]].items():
        why = _not_carried(entry)
        if component in tiny.read_elsewhere and not copies:
            why = "their tensors are read elsewhere as well, and pyvene edits in place"
        places.update({} if why else {component: entry})
        left_out.update({component: why} if why else {})
    kept = {component: text for component, text in theirs.places.items() if component not in places}
    products = "def evaluate_dimension(" in (checkout.committed("pyvene/models/modeling_utils.py") or "")
    widths, no_width = _widths(card, places, tiny, products)
    widths.update({component: theirs.widths[component] for component in kept if component in theirs.widths})

    further: dict[type[nn.Module], tuple[str, dict[str, tuple]]] = {}
    for model_class in classes[1:]:
        prefix = _prefix(card, classes[0], model_class)
        more = {}
        for component, entry in card.mappings[model_class].items():
            if component not in card.mappings[classes[0]]:
                why = _not_carried(entry)
                more.update({} if why else {component: entry})
                left_out.update({component: why} if why else {})
        further[model_class] = (prefix, more)
    left_out = {component: why for component, why in left_out.items() if component not in kept}

    case = "".join(word.capitalize() for word in name.split("_")) + "ModelCardTestCase"
    test = f"tests/integration_tests/{case}.py"
    files = {
        theirs.path: _mapping_file(card, name, names, places, kept, widths, further, left_out, theirs),
        test: _test_case(card, case, places, further, tiny),
    }
    initial = f"{theirs.path.rsplit('/', 1)[0]}/__init__.py"
    if initial not in checkout.paths:
        files[initial] = ""
    return Exported(card, name, files, names, module, test, left_out, sorted(kept), no_width)


class Theirs:
    """What the checkout has of a family: functions, imports and entries, as they are written; nothing if it is new there."""

    def __init__(self, checkout: Checkout, path: str) -> None:
        self.path = path
        text = checkout.committed(path)
        tree = _parsed(text or "", path)
        self.mappings = {name for name in _assigned(tree) if name.endswith("_mapping")}
        self.imports, self.functions = [], []
        self.places: dict[str, str] = {}
        self.widths: dict[str, str] = {}
        self.further: set[str] = set()  # entries of single classes
        for node in tree.body:
            source = ast.get_source_segment(text or "", node) or ""
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports.append(source)
            elif isinstance(node, ast.FunctionDef):
                self.functions.append(source)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                mapping = node.targets[0].id
                if mapping not in self.mappings:
                    self._unknown(node)
                entries = self.widths if mapping.endswith(WIDTHS) else self.places
                if isinstance(node.value, ast.Dict) and not entries:  # the bare class's, which the others are made from
                    for key, value in zip(node.value.keys, node.value.values, strict=True):
                        if not isinstance(key, ast.Constant):
                            self._unknown(node)
                        else:
                            entries[str(key.value)] = " ".join(
                                (ast.get_source_segment(text or "", value) or "").split()
                            )
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                self.further.add(ast.unparse(node.targets[0].slice).strip("'"))
            # Strings stand between the mappings, loops make one from another.
            elif not (
                isinstance(node, ast.For) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            ):
                self._unknown(node)

    def _unknown(self, node: ast.stmt) -> None:
        raise ValueError(
            f"{self.path} of the checkout is not as it is known here: the export cannot tell what line {node.lineno} is for."
        )


def _role(model_class: type[nn.Module]) -> str:
    """What stands between the family and `_type_to_...` in the name of a class's mapping."""
    if "SequenceClassification" in model_class.__name__:
        return "_classifier"
    return "_lm" if model_class.__name__.endswith(("ForCausalLM", "LMHeadModel")) else ""


def _prefix(card: Card, bare: type[nn.Module], model_class: type[nn.Module]) -> str:
    """What comes before the bare class's paths in another class; they differ in nothing else."""
    ours, base = card.mappings[model_class], card.mappings[bare]
    prefix = next(iter(ours.values()))[0].removesuffix(base[next(iter(ours))][0])
    if any(ours.get(component) != (prefix + path, *rest) for component, (path, *rest) in base.items()):
        raise ValueError(
            f"{model_class.__name__} is not {bare.__name__} with something before its paths: it cannot go out."
        )
    return prefix


def _not_carried(entry: tuple) -> str | None:
    """Why pyvene cannot have an entry; None if it can."""
    path, hook, *splits = entry
    if path.split(".")[-1].startswith("tap_"):
        return "no module of transformers puts them out"
    if hook not in _HOOKS or any(_spelled(*split) is None for split in splits):
        return "pyvene cannot take a projection apart in this way"
    return None


def _spelled(split: Any, param: Any) -> tuple[str, Any] | None:
    """A split function and its parameter in pyvene's own; None if it has none that does the same."""
    own = next((name for name in _SPLITS if getattr(constants, name) is split), None)
    if own is not None:
        return own, param
    if isinstance(param, int):
        numbers = torch.arange(24).view(1, 2, 12)
        for name, parts in _PARTS.items():
            for index in range(parts):
                if torch.equal(split(numbers, param), getattr(constants, name)(numbers, index)):
                    return name, index
    return None


def _widths(card: Card, places: dict[str, tuple], tiny: Tiny, products: bool) -> tuple[dict[str, str], list[str]]:
    """The dimension mapping as text, and the components that have none.

    Args:
        products: whether the checkout can say "heads x head size" (`--fixes 2`). Without, a component for which that is needed
            has no entry: it is taken whole, but trainable interventions are told no width.
    """
    ours = card.dimension_mapping
    heads, hidden = ours["n_head"][0], ours["block_input"][0]
    kv_heads = ours.get("n_kv_head", ours["n_head"])[0]
    whole = f"{hidden}/{heads}"  # size of a head, where it is no field of its own
    numbers = {"d_head": "", "n_head*d_head": heads, "n_kv_head*d_head": kv_heads}

    def of_heads(number: str) -> tuple[str, ...]:
        without = hidden if number == heads else f"{number}*{whole}" if number else whole
        if products:
            return (f"{number}*head_dim" if number else "head_dim", without) if tiny.own_head_size else (without,)
        if tiny.own_head_size:
            return ("head_dim", whole) if not number and hasattr(tiny.default, "head_dim") else ()
        return () if "*" in without else (without,)

    parameters = {param for _, _, *splits in places.values() for _, param in splits if isinstance(param, str)}
    widths = {name: ours[name] for name in sorted({"n_head", "n_kv_head"} & set(ours) | parameters)}
    for component in places:
        number = numbers.get(COMPONENTS[component].width or "")
        widths[component] = ours.get(component, ()) if number is None else of_heads(number)
    no_width = [component for component, names in widths.items() if not names]
    return {component: _tuple(quoted(names)) for component, names in widths.items() if names}, no_width


def quoted(names: tuple[str, ...]) -> list[str]:
    """Strings as upstream quotes them."""
    return [f'"{name}"' for name in names]


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _entry(entry: tuple) -> str:
    """A place as upstream spells it."""
    path, hook, *splits = entry
    parts = []
    for name, param in filter(None, (_spelled(*split) for split in splits)):
        parts.append(f"({name}, {quoted((param,))[0] if isinstance(param, str) else param})")
    return _tuple([f'"{path}"', _HOOKS[hook], *parts])


def _mapping_file(
    card: Card,
    name: str,
    names: Names,
    places: dict[str, tuple],
    kept: dict[str, str],
    widths: dict[str, str],
    further: dict[type[nn.Module], tuple[str, dict[str, tuple]]],
    left_out: dict[str, str],
    theirs: Theirs,
) -> str:
    """The mapping file, with the functions and imports that are there."""
    (bare_modules, bare_widths), *_ = names.values()
    reasons: dict[str, list[str]] = {}
    for component, why in left_out.items():
        reasons.setdefault(why, []).append(component)
    said = f"\nFor models with {card.covered}.\n" if card.covered else ""
    said += "".join(f"\nLeft out, as {why}:\n{_filled(components)}.\n" for why, components in reasons.items())
    modules = {component: _entry(entry) for component, entry in places.items()} | kept
    create = _CREATE.format(name=name, default=f'="{card.checkpoint}"' if card.checkpoint else "")
    sections = [
        _HEADER.format(notes=said),
        "\n".join(theirs.imports or ["import torch", "from ..constants import *"]),
        _mapping(bare_modules, modules, theirs.places),
        _mapping(bare_widths, widths, theirs.widths),
    ]
    for model_class, (prefix, more) in further.items():
        own_modules, own_widths = names[model_class]
        what = "classifier" if _role(model_class) == "_classifier" else "LM"
        lines = [
            f'"""{name} model with {what} head"""',
            f"{own_modules} = {{}}",
            f"for k, v in {bare_modules}.items():",
            f'    {own_modules}[k] = (f"{prefix}{{v[0]}}", ) + v[1:]',
            *(f'{own_modules}["{component}"] = {_entry(entry)}' for component, entry in more.items()),
        ]
        sections += ["\n".join(lines), f"{own_widths} = {bare_widths}"]
    sections += theirs.functions or [create]
    return "\n\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def _filled(words: list[str], width: int = 88) -> str:
    lines = [""]
    for word in words:
        end = f"{word}, " if word != words[-1] else word
        if len(lines[-1]) + len(end.rstrip()) > width:
            lines.append("")
        lines[-1] += end
    return "\n".join(line.rstrip() for line in lines)


def _mapping(name: str, entries: dict[str, str], order: Iterable[str]) -> str:
    """A mapping as text, what is there already in its order, so that a diff shows what changes."""
    entries = {key: entries[key] for key in [*(key for key in order if key in entries), *entries]}
    return "\n".join([f"{name} = {{", *(f'    "{key}": {value},' for key, value in entries.items()), "}"])


# -- its unit test -----------------------------------------------------------------------------------------------------


class Tiny:
    """A quickly made model of a family, and what it shows.

    Attributes:
        default: the family's config as it comes.
        sizes: those that its config was given.
        config: the tiny model's.
        own_head_size: whether heads may have another size than hidden size / number of heads.
        read_elsewhere: components whose tensor something behind them reads as well.
    """

    def __init__(self, card: Card) -> None:
        model_class: Any = next(iter(card.mappings))
        self.default = model_class.config_class()
        self.sizes = {name: size for name, size in _SIZES.items() if _settable(self.default, name)}
        if getattr(self.default, "sliding_window", None) is None:
            self.sizes.pop("sliding_window", None)
        # Some models take a head size that their config does not declare.
        asked = (
            self.sizes
            if isinstance(getattr(type(self.default), "head_dim", None), property)
            else self.sizes | _HEAD_DIM
        )
        seen = _inputs(model_class(model_class.config_class(**asked)).eval(), card.mappings[model_class])
        width = seen["attention_value_output"].shape[-1]
        self.own_head_size = width != self.sizes["hidden_size"]
        self.sizes = self.sizes | _HEAD_DIM if self.own_head_size else self.sizes
        self.config = model_class.config_class(**self.sizes)

        def same(component: str, other: str) -> bool:
            return other in seen and seen[component].data_ptr() == seen[other].data_ptr()

        self.read_elsewhere = [
            component
            for component, others in (("attention_input", ("block_input", "mlp_input")), ("mlp_input", ("resid_mid",)))
            if component in seen and any(same(component, other) for other in others)
        ]


def _settable(config: Any, name: str) -> bool:
    """Whether a config has a field that can be set, under this name or as what it calls it."""
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def _inputs(model: nn.Module, mapping: dict[str, tuple]) -> dict[str, Tensor]:
    """What goes into the modules at whose input a component is, in the first layer."""
    seen: dict[str, Tensor] = {}
    handles = [
        look_at(model, path.replace("%s", "0"), "input", partial(seen.setdefault, component))
        for component, (path, hook, *_) in mapping.items()
        if hook == constants.CONST_INPUT_HOOK
    ]
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    for handle in handles:
        handle.remove()
    return seen


def _test_case(
    card: Card,
    case: str,
    places: dict[str, tuple],
    further: dict[type[nn.Module], tuple[str, dict[str, tuple]]],
    tiny: Tiny,
) -> str:
    bare = next(iter(card.mappings))
    config_class = bare.config_class  # type: ignore[attr-defined]
    heads = {"n_head": n_heads(tiny.config), "n_kv_head": n_kv_heads(tiny.config)}

    def place(component: str, entry: tuple) -> str:
        path, hook, *splits = entry
        side = "input" if hook == constants.CONST_INPUT_HOOK else "output"
        part, number = None, None
        for name, param in filter(None, (_spelled(*split) for split in splits)):
            if isinstance(param, str):
                number = heads[param]
            else:
                part = (param, _PARTS[name])
        return f'("{component}", "{path}", "{side}", {part}, {number})'

    cards = [f"        {bare.__name__}: PLACES,"]
    for model_class, (prefix, more) in further.items():
        cards.append(f"        {model_class.__name__}: [")
        cards.append(f'            (stream, "{prefix}" + module, *rest) for stream, module, *rest in PLACES')
        cards.append("        ]" + ("" if more else ","))
        if more:
            cards.append("        + [")
            cards += [f"            {place(component, entry)}," for component, entry in more.items()]
            cards.append("        ],")
    return _TEST_CASE.format(
        imports=", ".join([config_class.__name__, *(cls.__name__ for cls in card.mappings)]),
        places="\n".join(f"    {place(component, entry)}," for component, entry in places.items()),
        case=case,
        config_class=config_class.__name__,
        config="\n".join(f"        {name}={size!r}," for name, size in tiny.sizes.items()),
        cards="\n".join(cards),
    )
