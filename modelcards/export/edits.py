"""Fixes of pyvene that are found by structure, a function and a statement in it, since the text around them differs by version.

Each takes a function that opens a file of the checkout, by its path or its family, and what the checkout's pyvene does, and edits
what it opens. It returns what its text should say of the change in this version, and raises a ValueError where it does not find
what it mends.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from transformers import LlamaConfig, Qwen2Config

from modelcards.export.behaviour import Behaviour, Question
from modelcards.export.source import Source

Open = Callable[[str], Source]
SourceEdit = Callable[[Open, Behaviour], str]

BASE, RESOLVER = "pyvene/models/intervenable_base.py", "pyvene/models/modeling_utils.py"

_HEAD = "hidden_size/num_attention_heads"
_OWN_SIZE, _OR_QUOTIENT = '("head_dim",)', f'("head_dim", "{_HEAD}")'
# Widths that are right whatever the size of a head: in families whose configs have one, and in those that may lack it.
_STATED = {
    "attention_value_output": '("num_attention_heads*head_dim",)',
    "query_output": '("num_attention_heads*head_dim",)',
    "key_output": '("num_key_value_heads*head_dim",)',
    "value_output": '("num_key_value_heads*head_dim",)',
    "head_value_output": _OWN_SIZE,
}
_OPTIONAL = {
    "attention_value_output": '("num_attention_heads*head_dim", "hidden_size")',
    "head_attention_value_output": _OR_QUOTIENT,
    "query_output": '("num_attention_heads*head_dim", "hidden_size")',
    "key_output": f'("num_key_value_heads*head_dim", "num_key_value_heads*{_HEAD}")',
    "value_output": f'("num_key_value_heads*head_dim", "num_key_value_heads*{_HEAD}")',
    "head_query_output": _OR_QUOTIENT,
    "head_key_output": _OR_QUOTIENT,
    "head_value_output": _OR_QUOTIENT,
}
_FAMILIES = {"gemma": _STATED, "gemma2": _STATED, "llama": _OPTIONAL, "mistral": _OPTIONAL}

_EVALUATE = '''def evaluate_dimension(proposal, model_config):
    """A config field, a number, or products and quotients of them from left to right,
    such as "num_attention_heads*head_dim"; None if the config does not have a field.
    """
    dimension, operator = 1, "*"
    for token in proposal.replace("*", " * ").replace("/", " / ").split():
        if token in {"*", "/"}:
            operator = token
            continue
        if token.isnumeric():
            factor = int(token)
        else:
            try:
                factor = getattr_for_torch_module(model_config, token)
            except AttributeError:
                factor = None
        if factor is None:
            return None
        dimension = dimension * factor if operator == "*" else dimension // factor
    return dimension


'''
_LOOP = """        dimension = evaluate_dimension(proposal, model_config)
        if dimension is not None:
            return dimension

    raise ValueError(
        f"{type(model_config).__name__} has none of {dimension_proposals}, the width of {component}."
    )
"""
_SILENT = """            for k in self._hooked_keys - self._reached_keys:
                if self.representations[k].moe_key is None:  # an expert may get no token
                    raise ValueError(
                        f"{k}: the module of {self.representations[k].component} did not run, "
                        "so that the intervention had no effect. GPT-2's attention_weight needs "
                        "attn_implementation='eager' and config.reorder_and_upcast_attn=True."
                    )
"""


_SIZES = (("hidden_size", 24), ("num_attention_heads", 4))
_PRODUCT = Question(LlamaConfig, (*_SIZES, ("head_dim", 10)), ("num_attention_heads*head_dim",))
_FALLBACK = Question(Qwen2Config, _SIZES, ("head_dim", _HEAD))
QUESTIONS = [_PRODUCT, _FALLBACK]
"""What is asked of a checkout."""


class NotNeeded(ValueError):
    """A checkout does not need a fix; says why."""


def spells_products(found: Behaviour) -> bool:
    """Whether the checkout's pyvene reads a product of two fields of a config."""
    return found.widths[_PRODUCT] == 40


def head_size(open_file: Open, found: Behaviour) -> str:
    """Defect 1: Qwen2's config has no `head_dim`."""
    source = open_file("qwen2")
    name = source.widths_name
    entries = {key: text for key, (_, _, text) in source.entries(name).items() if "head_dim" in text}
    if not entries:
        raise source.unknown(f"no entry of {name} names head_dim")
    if all(_HEAD in text for text in entries.values()):
        raise source.unknown(f"{name} falls back on {_HEAD} already, which fix 23 lets work")
    source.fill(name, dict.fromkeys(entries, f'("{_HEAD}",)'))
    return ""


def projection_widths(open_file: Open, found: Behaviour) -> str:
    """Defects 2 and 3: the width of projections is heads x head size."""
    for family, entries in _FAMILIES.items():
        source = open_file(family)
        source.fill(source.widths_name, entries)
    if spells_products(found):
        return ""
    source = open_file(RESOLVER)
    resolve = source.function("get_dimension_by_component")
    loop = _loop(source, resolve)
    source.insert(resolve.lineno - 1, _EVALUATE)
    source.replace(loop.body[0].lineno - 1, resolve.end_lineno or 0, _LOOP)
    return (
        "For that,\n`get_dimension_by_component` evaluates products and quotients of config fields, and passes over a proposal "
        "of which the config\nlacks a field."
    )


def missing_fields(open_file: Open, found: Behaviour) -> str:
    """Defect 23: a proposal of which the config lacks a field ends in an AttributeError."""
    # Needed where what a second proposal is for can be spelled, and the resolver stops at a missing field before it comes to it.
    if not spells_products(found) or found.widths[_FALLBACK] == 6:
        raise NotNeeded("its cards list no field that a config lacks")
    source = open_file(RESOLVER)
    body = _loop(source, source.function("get_dimension_by_component")).body
    start, end = body[0].lineno - 1, body[-1].end_lineno or 0
    indent = source.indent(body[0])
    own = "".join(f"    {line}" if line.strip() else line for line in source.lines[start:end])
    caught = f"{indent}except (AttributeError, TypeError):\n{indent}    continue  # the config has no such field, or None in it\n"
    source.replace(start, end, f"{indent}try:\n{own}{caught}")
    return ""


def _loop(source: Source, resolve: ast.FunctionDef) -> ast.For:
    loops = [node for node in resolve.body if isinstance(node, ast.For)]
    if len(loops) != 1:
        raise source.unknown(f"{resolve.name} should go through the proposals in one loop")
    return loops[0]


def attention_weight(open_file: Open, found: Behaviour) -> str:
    """Defect 7: GPT-2's attention weights have no hook that runs, and nothing says so."""
    source = open_file("gpt2")
    eager = [
        node
        for name in ("create_gpt2", "create_gpt2_lm")
        for node in ast.walk(source.function(name))
        if isinstance(node, ast.Assign) and ast.unparse(node).endswith("._attn_implementation = 'eager'")
    ]
    if not eager:
        raise source.unknown("create_gpt2 should choose eager attention")
    for node in eager:
        target, indent = ast.unparse(node.targets[0]).rpartition(".")[0], source.indent(node)
        comment = f"{indent}# only this path of GPT-2 runs the module at which attention_weight hooks\n"
        source.insert(node.end_lineno or 0, f"{comment}{indent}{target}.reorder_and_upcast_attn = True\n")

    source = open_file(BASE)
    reset = source.function("IntervenableModel._reset_hook_count")
    sets = "        # keys with a hook in this call, and those of them whose hook was called\n"
    first_loop = next((node for node in reset.body if isinstance(node, ast.For)), None)
    at = first_loop.lineno - 1 if first_loop else reset.end_lineno or 0
    source.insert(at, f"{sets}        self._hooked_keys, self._reached_keys = set(), set()\n")
    for name in ("_intervention_getter", "_intervention_setter"):
        made = source.function(f"IntervenableModel.{name}")
        hook = source.function(f"IntervenableModel.{name}.hook_callback")
        takes = [
            node
            for node in ast.walk(made)
            if isinstance(node, ast.Assign) and "self.intervention_hooks[key]" in ast.unparse(node)
        ]
        if len(takes) != 1:
            raise source.unknown(f"{name} should take one hook for each key")
        source.insert(takes[0].end_lineno or 0, f"{source.indent(takes[0])}self._hooked_keys.add(key)\n")
        source.insert(
            hook.body[0].lineno - 1 - source.comments_above(hook.body[0]),
            f"{source.indent(hook.body[0])}self._reached_keys.add(key)\n",
        )
    stateless = [
        node for node in source.function("IntervenableModel._output_validation").body if isinstance(node, ast.If)
    ]
    if len(stateless) != 1 or "is_model_stateless" not in ast.unparse(stateless[0].test):
        raise source.unknown("_output_validation should look at stateless models")
    source.insert(stateless[0].end_lineno or 0, _SILENT)
    return ""


EDITS: dict[int, SourceEdit] = {1: head_size, 2: projection_widths, 7: attention_weight, 23: missing_fields}
