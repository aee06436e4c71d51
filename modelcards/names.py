"""Names of places: the literature's and pyvene's mean the same everywhere, and those of other libraries are recognised.

    component_named("z") is component_named("head_attention_value_output")
    meant("blocks.3.attn.hook_z")  # "z", what an error suggests

`docs/concepts/places.md` shows the table.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable
from typing import Any

from pyvene.models.constants import CONST_INPUT_HOOK

from modelcards.components import COMPONENTS, Component
from modelcards.template import PREFIX, Mapping

# Every name that may be written: a site ("z") or a component ("head_attention_value_output").
NAMES: dict[str, Component] = {name: one for one in COMPONENTS.values() for name in (one.name, one.field) if name}

# TransformerLens' hooks, within their block, by what they read.
TRANSFORMER_LENS: dict[str, str] = {
    "hook_embed": "embed",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_result": "result",
    "ln1.hook_normalized": "attention_input",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q_rot",
    "attn.hook_rot_k": "k_rot",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "ln2.hook_normalized": "mlp_in",
    "mlp.hook_pre": "mlp_gate",
    "mlp.hook_pre_linear": "mlp_up",
    "mlp.hook_post": "mlp_neurons",
    "ln_final.hook_normalized": "final_norm",
    # Copies of the residual stream before the norm, one for each reader.
    "hook_attn_in": "resid_pre",
    "hook_q_input": "resid_pre",
    "hook_k_input": "resid_pre",
    "hook_v_input": "resid_pre",
    "hook_mlp_in": "resid_mid",
}
# nnterp's accessors, without the layer.
NNTERP: dict[str, str] = {
    "token_embeddings": "embed",
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_input": "attention_input",
    "attentions_output": "attention_output",
    "attention_probabilities": "pattern",
    "mlps_input": "mlp_in",
    "mlps_output": "mlp_output",
    "logits": "logits",
}
_HOOKS: dict[str, str] = {}
for _hook, _site in TRANSFORMER_LENS.items():
    _last = _hook.rpartition(".")[2]
    for _spelling in (_hook, _last, _last.removeprefix("hook_"), _hook.replace(".hook_", "_")):
        _HOOKS.setdefault(_spelling, _site)
Modules = dict[
    tuple[str, str], dict[str, None]
]  # components in order, by the path of a module without layers, and its side
MODULES: Modules = {}  # of all families; `modelcards.register` fills it in


def component_named(name: Any, among: Collection[str] | None = None, what: str = "activation") -> Component:
    """Return the component that a site or a component names.

    Args:
        name: in either vocabulary.
        among: the sites to choose from; None for all.
        what: what there is none of, for the error.

    Returns:
        Its entry in the vocabulary.

    Raises:
        ValueError: there is none; suggests one.
    """
    found = NAMES.get(name) if isinstance(name, str) else None
    if found is not None and (among is None or found.site in among):
        return found
    known = [one.site for one in COMPONENTS.values()] if among is None else among
    close = meant(name, known)
    hint = f"did you mean {close!r}?" if close else f"choose among {', '.join(known)}."
    here = meant(name) if not close and "hook_" in str(name) else None
    if here:  # a name of TransformerLens that cannot be chosen here
        hint = f"that is {here!r}, and there are only {', '.join(known)}."
    raise ValueError(f"no {what} of {name!r}; {hint}")


def meant(name: Any, among: Collection[str] | None = None, places: Mapping | None = None) -> str | None:
    """Find the site that was probably meant by a name that is none.

    Args:
        name: a misspelt site or component, a hook of TransformerLens ("blocks.3.attn.hook_z", "hook_z"), an accessor of nnterp
            ("layers_output[3]") or the path of a module in nnsight ("model.layers[3].self_attn").
        among: the sites to choose from; None for all.
        places: the module mapping to look up a path in; None for those of all families.

    Returns:
        The site, or a component's name where that is what was misspelt; None if nothing comes close.
    """
    text = str(name)
    known = [one.site for one in COMPONENTS.values() if among is None or one.site in among]
    bare = re.sub(r"\[\w*\]|(?<=\.)\d+\.|\.\d+$", "", text)  # without layers and without nnsight's [0]
    found = [NAMES[text].site] if text in NAMES else []
    found += [site for names in (_HOOKS, NNTERP) if (site := names.get(bare.removeprefix("blocks.")))]
    found += _at_module(bare, MODULES if places is None else by_module([places]))
    for site in found:
        if site in known:
            return site
    spelt = [name for site in known for name in dict.fromkeys((site, NAMES[site].name))]
    return next(iter(difflib.get_close_matches(text.lower(), spelt, n=1, cutoff=0.72)), None)


def _at_module(path: str, modules: Modules) -> list[str]:
    """The sites at a module, by the end of its path; its output where no side is named."""
    path, _, side = path.rpartition(".") if re.search(r"\.(input|output)s?$", path) else (path, "", "output")
    found = [
        COMPONENTS[component]
        for (where, at), components in modules.items()
        if at == side.removesuffix("s") and f".{where}".endswith(f".{path}")
        for component in components
    ]
    return [one.site for one in sorted(found, key=lambda one: one.field is None)]


def by_module(mappings: Iterable[Mapping]) -> Modules:
    """List the components at every module; taps, which are no modules of a model, are left out.

    Args:
        mappings: pyvene's module mappings.

    Returns:
        Components by the module's path, without layers, and the side.
    """
    found: Modules = {}
    for component, (path, side, *_) in itertools.chain.from_iterable(mapping.items() for mapping in mappings):
        if PREFIX not in path:
            at = found.setdefault((path.replace("[%s]", ""), "input" if side == CONST_INPUT_HOOK else "output"), {})
            at[component] = None
    return found
