"""What places are called: either vocabulary everywhere, names of other libraries, and the table of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig
from pyvene.models.constants import CONST_INPUT_HOOK
from torch import Tensor
from transformers import LlamaForCausalLM

from modelcards import COMPONENTS, Component, card_of, component_named, dimensions, meant
from modelcards.names import NNTERP, TRANSFORMER_LENS
from modelcards.template import PREFIX
from pyvene_ext import verify_card
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.reading import read
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.patching.patch import all_patches
from pyvene_ext.models.sizes import has_heads
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.graph import Node
from tests.random_prompts import random_prompts
from tests.tiny_random import random_inputs, random_model

PAGE = Path(__file__).resolve().parents[2] / "docs/concepts/places.md"
PROMPTS = random_prompts((7, 7))
IN_BOTH = [(one.field, one.name) for one in COMPONENTS.values() if one.field]


# -- both vocabularies -------------------------------------------------------------------------------------------------


def test_every_name_is_one_place() -> None:
    for site, component in IN_BOTH:
        assert component_named(site) is component_named(component) is COMPONENTS[component]
        assert component_named(component).site == site
    assert component_named("attention_output").site == "attention_output"


def test_a_spec_takes_pyvenes_name_of_its_site() -> None:
    called = Ablation(kind="zero", site="head_attention_value_output", layer=1, heads=(2,))
    assert called == Ablation(kind="zero", site="z", layer=1, heads=(2,)) and called.name == "z.1.2"
    assert Ablation(kind="zero", site="block_output", layer=1).where == "resid_post.1"
    model = random_model("llama3_1")
    specs = [Ablation(kind="zero", site=site, layer=0) for site in ("attn_out", "attention_contribution")]
    zeroed, same = run(model, specs, PROMPTS, progress=False).intervened
    assert (zeroed == same).all()
    assert all_patches(model.config, "head_key_output") == all_patches(model.config, "k")
    assert Node.parse("head_value_output.1.0") == Node("v", 1, 0)
    assert has_heads("attention_pattern") and not has_heads("block_input")


def collected(name: str, unit: str) -> Tensor:
    config = IntervenableConfig(
        [RepresentationConfig(1, name, unit, intervention=CollectIntervention(keep_last_dim=True))]
    )
    ((_, (found,)), _) = IntervenableModel(config, random_model("llama3_1"))(random_inputs())
    assert config.representations[0].component == name  # the user's config is left alone
    return found


@pytest.mark.parametrize(("site", "component"), [pair for pair in IN_BOTH if pair[0] not in ("router", "expert")])
def test_a_representation_takes_the_name_of_a_site(site: str, component: str) -> None:
    unit = COMPONENTS[component].units[0]
    torch.testing.assert_close(collected(site, unit), collected(component, unit), atol=0, rtol=0, equal_nan=True)


def test_statistics_are_of_places_in_either_vocabulary() -> None:
    model = random_model("gpt2")
    by_site = Reference.compute(model, PROMPTS, [("z", 1), ("embed", None)], bank=("last",))
    by_component = Reference.compute(
        model, PROMPTS, [("head_attention_value_output", 1), ("embeddings", None)], bank=("last",)
    )
    assert by_component.places == by_site.places
    assert torch.equal(by_component.mean(("z", 1)), by_site.mean(("head_attention_value_output", 1)))
    by_site.require([("head_attention_value_output", 1)], (), ())
    with pytest.raises(
        ValueError, match=r"no x of 'mlp.hook_post'; that is 'mlp_neurons', and there are only z, mlp_out\."
    ):
        component_named("mlp.hook_post", ("z", "mlp_out"), "x")
    with pytest.raises(ValueError, match="no activation of 'hook_z'; did you mean 'z'"):
        Reference.compute(model, PROMPTS, [("hook_z", 1)])


def test_verify_checks_the_sites_that_are_named() -> None:
    model = random_model("gpt2")
    report = verify_card(
        model, layers=[1], implementations=["sdpa"], padding_sides=["left"], sites=("z", "block_output")
    )
    assert report.failures == 0
    assert [row.component for row in report.rows] == ["block_output", *["head_attention_value_output"] * 2]
    with pytest.raises(ValueError, match="did you mean 'pattern'"):
        verify_card(model, sites=("hook_pattern",))


# -- names of other libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.3.attn.hook_z", "z"),
        ("hook_resid_post", "resid_post"),
        ("hook_pattern", "pattern"),
        ("attn_scores", "scores"),
        ("blocks.0.hook_mlp_in", "resid_mid"),  # the stream before the norm, unlike our mlp_in
        ("mlp_post", "mlp_neurons"),
        ("layers_output[3]", "resid_post"),
        ("mlps_output", "mlp_output"),
        ("model.layers[3].self_attn", "attn_out"),
        ("model.layers[3].self_attn.o_proj.input", "z"),
        ("model.layers.3.mlp.output[0]", "mlp_out"),
        ("transformer.h[3].mlp.c_proj.input", "mlp_neurons"),
        ("resid_pst", "resid_post"),
        ("head_atention_value_output", "head_attention_value_output"),
        ("nonsense", None),
        (3, None),
    ],
)
def test_what_was_probably_meant(name: Any, site: str | None) -> None:
    assert meant(name) == site


def test_errors_suggest_the_site() -> None:
    model = random_model("gemma2")

    def represent(component: str) -> None:
        IntervenableModel(IntervenableConfig([RepresentationConfig(1, component, "h")]), model)

    with pytest.raises(ValueError, match=r"no ablation of 'blocks\.3\.attn\.hook_z'; did you mean 'z'\?"):
        Ablation(kind="zero", site="blocks.3.attn.hook_z", layer=3, heads=(0,))
    with pytest.raises(ValueError, match=r"must end in \.input or \.output; or did you mean the component 'z'\?"):
        represent("blocks.3.attn.hook_z")
    with pytest.raises(
        ValueError, match=r"unknown component 'hook_pattern' \(no card has it\); did you mean 'pattern'\?"
    ):
        represent("hook_pattern")
    # Of this very model, whose attention is followed by a norm.
    with pytest.raises(ValueError, match="did you mean 'attention_output'"):
        read(model, PROMPTS, "model.layers[1].self_attn")


# -- the table of the documentation ------------------------------------------------------------------------------------


def axes(one: Component) -> tuple[str, ...]:
    """The axes of one prompt's tensor."""
    if one.width is None:
        return str(one.heads), "n_query", "n_key"
    return ("pos", *filter(None, (one.heads,)), one.width)


def table() -> str:
    mapping = card_of(LlamaForCausalLM).mapping(LlamaForCausalLM)
    lines = [
        "| TransformerLens | nnsight, for Llama | nnterp | site | pyvene component | shape | what |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in COMPONENTS.values():
        path, side, *_ = mapping.get(one.name, (PREFIX, ""))
        there = f"{path.replace('%s', 'i')}.{'input' if side == CONST_INPUT_HOOK else 'output'}"
        layer = "[i]" if one.per_layer else ""
        cells = (
            [hook for hook, site in TRANSFORMER_LENS.items() if site == one.site],
            [there] if PREFIX not in path else [],
            [f"{name}{layer}" for name, site in NNTERP.items() if site == one.site],
            [one.field] if one.field else [],
            [one.name],
            [" ".join(axes(one))],
        )
        code = (", ".join(f"`{text}`" for text in texts) for texts in cells)
        lines.append(f"| {' | '.join((*code, one.meaning))} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_places_is_the_codes() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), (
        f"docs/concepts/places.md needs exactly this table:\n\n{table()}"
    )


@pytest.mark.parametrize("family", ["llama3_1", "gpt2", "mixtral"])
def test_the_shapes_of_the_table_are_those_that_are_read(family: str) -> None:
    model = random_model(family)
    sizes = dimensions(model.config) | {"pos": 7, "n_query": 7, "n_key": 7, "n_out": model.config.vocab_size}
    components = [COMPONENTS[name] for name in card_of(model).mapping(type(model))]
    acts = read(model, PROMPTS, [one.name for one in components], layers=1, progress=False)
    for one in components:
        expected = [torch.tensor([sizes[part] for part in axis.split("*")]).prod() for axis in axes(one)]
        assert list(acts[one.name, 1 if one.per_layer else None].shape) == [2, *expected], one.name
