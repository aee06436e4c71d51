"""The run-time defects of pyvene 0.1.8, each shown on plain pyvene (strict xfail) and absent from ours; and what we refuse.

Numbers are those of the project's list of pyvene defects.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import pyvene
import torch
from pyvene import (
    CollectIntervention,
    IntervenableConfig,
    RepresentationConfig,
    RotatedSpaceIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from pyvene.models import interventions
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from modelcards import card_of, dimensions
from pyvene_ext import IntervenableModel
from tests.tiers import first_only
from tests.tiny_random import CORE_FAMILIES, FAMILIES, MORE_FAMILIES, UNLIKE, random_inputs, random_model

BOTH = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(pyvene.IntervenableModel, id="plain", marks=pytest.mark.xfail(strict=True)),
        pytest.param(IntervenableModel, id="ours"),
    ],
)
Z = "head_attention_value_output"


def config(*representations: RepresentationConfig, **kwargs: Any) -> IntervenableConfig:
    return IntervenableConfig(list(representations), **kwargs)


def zero(component: str = "block_output", unit: str = "pos", layer: int = 1) -> RepresentationConfig:
    return RepresentationConfig(layer, component, unit, 1, intervention_type=ZeroIntervention)


def swap(component: str = "block_output", unit: str = "pos", layer: int = 1) -> RepresentationConfig:
    return RepresentationConfig(layer, component, unit, 1, intervention_type=VanillaIntervention)


def collect(component: str = "block_output", unit: str = "pos", layer: int = 1) -> RepresentationConfig:
    return RepresentationConfig(layer, component, unit, 1, intervention_type=CollectIntervention)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return random_model("llama3_1")


@pytest.fixture
def base() -> dict[str, Tensor]:
    return random_inputs()


def zeroed_by_hook(model: Any, base: dict[str, Tensor], rows: list[list[int]], layer: int = 1) -> Tensor:
    """Logits with the block's output zeroed at `rows[example]`."""

    def edit(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for example, columns in enumerate(rows):
            output[example, columns] = 0.0
        return output

    handle = model.model.layers[layer].register_forward_hook(edit)
    with torch.no_grad():
        logits = model(**base).logits
    handle.remove()
    return logits


def close(found: Tensor, expected: Tensor, base: dict[str, Tensor]) -> bool:
    real = base["attention_mask"].bool()
    return torch.allclose(found[real], expected[real], atol=1e-5)


# -- defects cured ----------------------------------------------------------------------------------------------------


@BOTH
def test_09_output_hidden_states_still_work_after_a_call(engine: Any, model: Any, base: Any) -> None:
    model(**base, output_hidden_states=True)
    engine(config(zero()), model)(base, unit_locations={"base": 8})
    assert len(model(**base, output_hidden_states=True).hidden_states) == 4


@BOTH
def test_10_the_users_own_hooks_survive(engine: Any, model: Any, base: Any) -> None:
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    engine(config(zero()), model)(base, unit_locations={"base": 8})
    calls.clear()
    model(**base)
    assert calls == [1]


@BOTH
def test_11_one_short_location_does_not_change_later_ones(engine: Any, model: Any, base: Any) -> None:
    intervenable = engine(config(zero()), model)
    intervenable(base, unit_locations={"base": 8})
    rows = [[3], [5], [6]]
    _, found = intervenable(base, unit_locations={"base": [rows]})
    assert close(found.logits, zeroed_by_hook(model, base, rows), base)


@BOTH
def test_12_source_representations_can_be_used_twice(engine: Any, model: Any, base: Any) -> None:
    intervenable = engine(config(swap()), model)
    given = {intervenable.sorted_keys[0]: torch.zeros(3, 1, model.config.hidden_size)}
    first = intervenable(base, unit_locations={"base": 8}, source_representations=given)[1].logits
    second = intervenable(base, unit_locations={"base": 8}, source_representations=given)[1].logits
    assert torch.equal(first, second)
    assert close(second, zeroed_by_hook(model, base, [[8]] * 3), base)


@BOTH
def test_15_editing_a_block_input_leaves_inputs_embeds_alone(engine: Any, model: Any, base: Any) -> None:
    embeds = model.model.embed_tokens(base.pop("input_ids")).detach()
    before = embeds.clone()
    with torch.no_grad():
        engine(config(zero("block_input", layer=0)), model)(
            {"inputs_embeds": embeds, **base}, unit_locations={"base": 8}
        )
    assert torch.equal(embeds, before)


@BOTH
def test_15_editing_a_block_input_leaves_the_hidden_states_below_alone(engine: Any, model: Any, base: Any) -> None:
    clean = model(**base, output_hidden_states=True).hidden_states
    intervenable = engine(config(zero("block_input", layer=1)), model)
    _, found = intervenable({**base, "output_hidden_states": True}, unit_locations={"base": 8})
    assert torch.equal(found.hidden_states[0], clean[0])


@BOTH
@pytest.mark.parametrize("component", ["attention_value_output", "block_input"])
def test_16_gradients_flow_through_an_edit(engine: Any, component: str, model: Any, base: Any) -> None:
    embeds = model.model.embed_tokens(base.pop("input_ids")).detach().requires_grad_()
    intervenable = engine(config(zero(component, layer=0)), model)
    _, found = intervenable({"inputs_embeds": embeds, **base}, unit_locations={"base": 8})
    found.logits[:, -1].sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


@BOTH
def test_18_the_list_of_sources_does_not_grow(engine: Any, model: Any, base: Any) -> None:
    sources = [random_inputs(seed=1)]
    engine(config(swap(), swap(layer=2)), model)(base, sources, {"sources->base": 8})
    assert len(sources) == 1


@BOTH
def test_18_a_missing_source_is_an_error(engine: Any, model: Any, base: Any) -> None:
    with pytest.raises(ValueError, match="needs a source and has none"):
        engine(config(swap()), model)(base, unit_locations={"base": 8})


@BOTH
def test_18_str_works(engine: Any, model: Any) -> None:
    assert "layer_1_comp_block_output" in str(engine(config(zero()), model))


@BOTH
def test_18_construction_changes_no_flag(engine: Any, model: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    engine(config(zero()), model)
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])


def test_trainable_parameters_are_the_interventions_alone(model: Any) -> None:
    representation = RepresentationConfig(1, "block_output", "pos", 1, intervention_type=RotatedSpaceIntervention)
    intervenable = IntervenableModel(config(representation), model)
    own = {id(p) for p in intervenable.interventions.parameters()}
    assert own and {id(p) for p in intervenable.get_trainable_parameters()} == own
    intervenable.enable_model_gradients()
    assert len(intervenable.get_trainable_parameters()) == len(own) + len(list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_interventions_fit_every_component(family: str) -> None:
    """A rotation is its own inverse around a swap with itself: the logits must come out unchanged, whatever the width."""
    model, base = random_model(family), random_inputs()
    clean = model(**base).logits
    card = card_of(model)
    for component in sorted(card.mapping(type(model))):
        if card.width(model, component) is None:
            continue  # as wide as the prompt is long
        one_level = card.component(model, component).units[0]
        representation = RepresentationConfig(0, component, one_level, 1, intervention_type=RotatedSpaceIntervention)
        intervenable = IntervenableModel(config(representation), model)
        places = {"sources->base": ([[[0]] * 3], [[[0]] * 3])} if one_level == "h" else {"sources->base": (-1, -1)}
        with torch.no_grad():
            _, found = intervenable(base, [base], places)
        assert close(found.logits, clean, base), component


def test_what_is_saved_comes_back_the_same(model: Any, base: Any, tmp_path: Any) -> None:
    source = random_inputs(seed=1)
    items = [
        RepresentationConfig(1, "block_output", "pos", 1, intervention_type=RotatedSpaceIntervention),
        swap("attention_value_output", layer=2),
        RepresentationConfig(
            0, "mlp_output", "pos", 1, None, VanillaIntervention, source_representation=torch.ones(42)
        ),
        collect("head_contribution", "h"),
    ]
    groups = [item._replace(group_key=group) for group, item in enumerate(items)]
    places = [[[8]] * 3, [[8]] * 3, [[8]] * 3, [[1, 2]] * 3]
    arguments = (base, [source, source, None, None], {"sources->base": ([*places[:2], None, None], places)})
    intervenable = IntervenableModel(config(*groups), model)
    intervenable.save(str(tmp_path))
    again = IntervenableModel.load(str(tmp_path), model)
    assert isinstance(again, IntervenableModel)
    (_, collected), found = intervenable(*arguments)
    (_, collected_again), found_again = again(*arguments)
    assert torch.equal(found.logits, found_again.logits)
    assert torch.equal(collected[0], collected_again[0]) and collected[0].shape == (3, 2, 9, 42)


def test_only_known_intervention_classes_are_loaded(model: Any, tmp_path: Any) -> None:
    IntervenableModel(config(zero()), model).save(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("pyvene.models.interventions.ZeroIntervention", "os.system"))
    with pytest.raises(ValueError, match=r"os.system.* is not an intervention of pyvene"):
        IntervenableModel.load(str(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "cls", ["SigmoidMask", "JumpReLUAutoencoder", "RotatedSpace", "LowRankRotatedSpace", "Vanilla"]
)
def test_an_intervention_in_float32_edits_a_model_in_half_precision(model: Any, cls: str, dtype: torch.dtype) -> None:
    intervention = getattr(interventions, f"{cls}Intervention")(embed_dim=42, low_rank_dimension=7)
    for parameter in intervention.parameters():
        if parameter.ndim:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = model.to(dtype)
    item = RepresentationConfig(1, "block_output", "pos", 1, intervention=intervention)
    inputs, seen = (random_inputs(), random_inputs(seed=1)), []
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    for batch in inputs:
        model(**batch)
    handle.remove()
    base, source = (output[:, 5:6].float() for output in seen)
    expected = seen[0].clone()
    flat = base if cls in ("SigmoidMask", "JumpReLUAutoencoder", "Vanilla") else base.flatten(1)
    expected[:, 5:6] = intervention(flat.clone(), source.view_as(flat)).view_as(base).to(dtype)
    places = {"sources->base": ([[[5]] * 3], [[[5]] * 3])}
    handle = model.model.layers[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    IntervenableModel(config(item), model)(*inputs, places)
    handle.remove()
    assert seen[-1].dtype == dtype and torch.equal(seen[-1], expected)
    assert not torch.equal(expected, seen[0])


# -- bit for bit the user's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_the_users_own_after_a_run(family: str, raises: bool) -> None:
    model, base = random_model(family), random_inputs()
    clean = model(**base).logits
    names, configs = (
        [n for n, _ in model.named_modules()],
        [id(m.config) for m in model.modules() if hasattr(m, "config")],
    )
    components = ["attention_pattern", "head_contribution", "resid_mid", "logits"]
    units = {"attention_pattern": "h", "head_contribution": "h"}
    intervenable = IntervenableModel(config(*(zero(c, units.get(c, "pos")) for c in components)), model)

    def run() -> None:
        intervenable(base, unit_locations={"base": [[[0]] * 3, [[0]] * 3, [[8]] * 3, [[8]] * 3]})

    if raises:
        handle = model.get_submodule(
            "model.norm" if hasattr(model, "model") else "transformer.ln_f"
        ).register_forward_hook(
            lambda *_: 1 / 0  # type: ignore[arg-type, return-value]
        )
        with pytest.raises(ZeroDivisionError):
            run()
        handle.remove()
    else:
        run()
    assert torch.equal(model(**base).logits, clean)
    assert [n for n, _ in model.named_modules()] == names
    assert [id(m.config) for m in model.modules() if hasattr(m, "config")] == configs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def test_two_models_sharing_a_config_do_not_touch_each_other(base: Any) -> None:
    one = random_model("llama3_1")
    two = LlamaForCausalLM(one.config).eval()
    calls = []
    two.model.layers[1].self_attn.register_forward_hook(lambda m, *_: calls.append(m.config._attn_implementation))
    handle = one.lm_head.register_forward_hook(lambda *_: two(**base) and None)
    IntervenableModel(config(zero("attention_pattern", "h")), one)(base, unit_locations={"base": [[[0]] * 3]})
    handle.remove()
    assert calls == ["sdpa"]


# -- locations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_negative_positions_count_from_the_last_real_token(side: str, model: Any) -> None:
    base = random_inputs((9, 6, 7), padding_side=side)
    _, found = IntervenableModel(config(zero()), model)(base, unit_locations={"base": -1})
    last = {"left": [[8], [8], [8]], "right": [[8], [5], [6]]}[side]
    assert close(found.logits, zeroed_by_hook(model, base, last), base)


def test_all_the_forms_of_a_location_mean_the_same(model: Any, base: Any) -> None:
    intervenable = IntervenableModel(config(zero()), model)
    rows = [[8], [8], [8]]
    forms = [8, [8], torch.tensor([8]), [rows], [torch.tensor(rows)], [[[8]]]]  # the last as with use_fast
    outputs = [intervenable(base, unit_locations={"base": form})[1].logits for form in forms]
    outputs.append(intervenable(base, unit_locations={"sources->base": (None, [[[8]] * 3])})[1].logits)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_a_pair_of_numbers_is_source_then_base_when_it_is_a_tuple(model: Any, base: Any) -> None:
    source = random_inputs(seed=1)
    intervenable = IntervenableModel(config(swap()), model)
    short = intervenable(base, [source], {"sources->base": (7, 8)})[1].logits
    full = intervenable(base, [source], {"sources->base": ([[[7]] * 3], [[[8]] * 3])})[1].logits
    assert torch.equal(short, full)
    assert not torch.equal(short, model(**base).logits)


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("kind", first_only([VanillaIntervention, ZeroIntervention]))
def test_no_location_means_every_position_and_head(family: str, kind: type) -> None:
    """For each component: as if every place had been written out, and what is read comes split into heads."""
    model, base, source = random_model(family), random_inputs(), random_inputs(seed=1)
    card = card_of(model)
    real = base["attention_mask"].bool()
    swapped = kind is VanillaIntervention
    for component in sorted(card.mapping(type(model))):
        described = card.component(model, component)
        count = dimensions(model.config)[described.heads] if described.heads else 9
        rows = [[list(range(count))] * 3]
        item = RepresentationConfig(1, component, described.units[0], 1, intervention_type=kind)
        intervenable = IntervenableModel(config(item), model)
        with torch.no_grad():
            _, short = intervenable(base, [source] if swapped else None)
            _, full = intervenable(
                base, [source] if swapped else None, {"sources->base": (rows if swapped else None, rows)}
            )
        assert torch.equal(short.logits, full.logits), component
        assert not torch.allclose(short.logits[real], model(**base).logits[real], atol=1e-3), component


def test_everything_on_a_head_component_is_not_head_0(model: Any, base: Any) -> None:
    whole = IntervenableModel(config(zero("attention_value_output")), model)(base)[1].logits
    heads = IntervenableModel(config(zero(Z, "h")), model)(base)[1].logits
    assert torch.allclose(whole, heads, atol=1e-6)


REFUSED: list[tuple[str, Any, Any, str]] = [
    ("two numbers", zero(), {"base": [3, 5]}, "ambiguous"),
    ("a pair under base", zero(), {"base": (3, 5)}, "ambiguous"),
    ("a None location", zero(), {"base": [None]}, "is None"),
    ("a position too far", zero(), {"base": 9}, "position 9 of block_output at layer 1 is out of range: example 0"),
    ("a position too far back", zero(), {"base": -7}, "example 1 of base has 6 tokens in 9 columns"),
    ("padding only", zero(), {"base": [[[8], [1], [8]]]}, "is padding in example 1"),
    ("ragged rows", zero(), {"base": [[[8], [7, 8], [8]]]}, "the same number"),
    ("too few rows", zero(), {"base": [[[8], [8]]]}, "2 examples, but base has 3"),
    ("a float", zero(), {"base": 1.5}, "whole number"),
    ("an unknown entry", zero(), {"bases": 3}, "'bases'; use 'base'"),
    ("two entries", zero(), {"base": 7, "sources->base": 8}, "one entry"),
    ("no entry", zero(), {}, "one entry"),
    ("no dict", zero(), [8], "must be a dict"),
    ("None under base", zero(), {"base": None}, "list places, or leave unit_locations out"),
    ("a query head too many", zero(Z, "h"), {"base": [[[6]] * 3]}, "query head 6 .* heads 0 to 5 .*share 3 K/V heads"),
    ("a K/V head too many", zero("head_key_output", "h"), {"base": [[[3]] * 3]}, "K/V head 3 .* heads 0 to 2 .*2 each"),
    ("a negative head", zero(Z, "h"), {"base": [[[-1]] * 3]}, "query head -1"),
    ("no heads for h.pos", zero(Z, "h.pos"), {"base": 3}, "needs heads and positions"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("representation", "locations", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_refused_locations(representation: Any, locations: Any, message: str, model: Any, base: Any) -> None:
    with pytest.raises(ValueError, match=message):
        IntervenableModel(config(representation), model)(base, unit_locations=locations)


WRONG_CONFIGS: list[tuple[str, list[RepresentationConfig], dict[str, Any], str]] = [
    ("pos on heads", [zero(Z, "pos")], {}, "unit 'pos' is wrong for head_attention_value_output .* use 'h' or 'h.pos'"),
    ("h elsewhere", [zero("block_output", "h")], {}, "unit 'h' is wrong for block_output"),
    ("unknown component", [zero("residual")], {}, "unknown component 'residual' .no card has it.; LlamaForCausalLM has"),
    ("of another family", [zero("attention_weight", "h")], {}, "only gpt2 and not llama3_1 has it"),
    ("layer too high", [zero(layer=3)], {}, "layer 3 of block_output is out of range: .* 0 to 2"),
    ("group gap", [zero()._replace(group_key=1)], {}, "group keys must be 0 .. n-1"),
    ("nothing", [], {}, "names no representation"),
    ("a float layer", [zero(layer=1.7)], {}, "layer of block_output must be a whole number"),
    ("no layer", [zero()._replace(layer=None)], {}, "layer of block_output must be a whole number"),
    ("no component", [zero()._replace(component=None)], {}, "a component is a name"),
    ("a raw path's side", [zero("model.layers[0].mlp")], {}, "must end in .input or .output"),
    ("a mode", [zero()], {"mode": "banana"}, "mode must be 'parallel' or 'serial'"),
    ("no fixed width", [zero("attention_pattern", "h")._replace(intervention_type=RotatedSpaceIntervention)], {}, "known width"),
    ("serial group of two", [swap()._replace(group_key=0), swap(layer=2)._replace(group_key=0)], {"mode": "serial"}, "serial"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("items", "kwargs", "message"), [case[1:] for case in WRONG_CONFIGS], ids=[c[0] for c in WRONG_CONFIGS]
)
def test_refused_configs(items: Any, kwargs: Any, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        IntervenableModel(config(*items, **kwargs), model)


def test_a_component_of_another_class_is_named() -> None:
    with pytest.raises(ValueError, match="LlamaModel has none, other llama3_1 classes do"):
        IntervenableModel(config(zero("logits")), random_model("llama3_1", "bare"))


def test_an_intervention_that_never_fires_is_an_error(model: Any, base: Any) -> None:
    embeds = model.model.embed_tokens(base.pop("input_ids")).detach()
    with pytest.raises(ValueError, match=r"comp_embeddings.* never fired"):
        IntervenableModel(config(zero("embeddings")), model)(
            {"inputs_embeds": embeds, **base}, unit_locations={"base": 8}
        )


def test_refused_sources(model: Any, base: Any) -> None:
    source = random_inputs(seed=1)
    intervenable = IntervenableModel(config(swap()), model)
    with pytest.raises(ValueError, match="2 sources were given for 1 group of"):
        intervenable(base, [source, source], {"sources->base": 8})
    with pytest.raises(ValueError, match="source 0 has 2 examples and base 3"):
        intervenable(base, [random_inputs((9, 9))], {"sources->base": 8})
    with pytest.raises(ValueError, match="only base locations are given"):
        intervenable(base, [source], {"base": 8})
    with pytest.raises(ValueError, match="source_representations names nonsense"):
        intervenable(base, unit_locations={"base": 8}, source_representations={"nonsense": torch.zeros(1)})
    with pytest.raises(ValueError, match="not both"):
        key = intervenable.sorted_keys[0]
        intervenable(base, [source], {"sources->base": 8}, source_representations={key: torch.zeros(42)})
    grouped = config(swap()._replace(group_key=0), collect(layer=2)._replace(group_key=0))
    with pytest.raises(ValueError, match="collects in a group that has a source"):
        IntervenableModel(grouped, model)(base, [source], {"sources->base": 8})


def test_a_lambda_that_returns_nothing_has_not_fired(model: Any, base: Any) -> None:
    item = RepresentationConfig(1, "block_output", "pos", 1, intervention=lambda base, source: source)
    with pytest.raises(ValueError, match="never fired"):
        IntervenableModel(config(item), model)(base, unit_locations={"base": 8})


def test_a_lambda_edits(model: Any, base: Any) -> None:
    item = RepresentationConfig(1, "block_output", "pos", 1, intervention=lambda base, source: base * 0.0)
    _, found = IntervenableModel(config(item), model)(base, unit_locations={"base": 8})
    assert close(found.logits, zeroed_by_hook(model, base, [[8]] * 3), base)


def test_bad_batches_are_refused(model: Any, base: Any) -> None:
    intervenable = IntervenableModel(config(zero()), model)
    for wrong, message in (
        (base["input_ids"], "must be a tokenised batch"),
        ({"input_ids": base["input_ids"][0]}, "must be a tokenised batch"),
        ({**base, "attention_mask": base["attention_mask"][:2]}, r"attention_mask of base is \(2, 9\)"),
        ({**base, "attention_mask": base["attention_mask"][:, 1:]}, r"attention_mask of base is \(3, 8\)"),
        ({**base, "past_key_values": (1, 2)}, "must be a transformers Cache"),
    ):
        with pytest.raises(ValueError, match=message):
            intervenable(wrong, unit_locations={"base": 8})


def in_subspaces(model: Any, kind: Any, **config: Any) -> Any:
    item = pyvene.RepresentationConfig(layer=1, component="block_output", unit="pos", **config)
    return IntervenableModel(pyvene.IntervenableConfig(representations=[item], intervention_types=kind), model)


@pytest.mark.filterwarnings("ignore:the subspace_partition")
@pytest.mark.parametrize(
    ("kind", "config", "subspaces", "told"),
    [
        (
            pyvene.RotatedSpaceIntervention,
            {"subspace_partition": [[0, 1], [1, 4]]},
            [[0], [1], [0]],
            "of 1 and 3 dimensions",
        ),
        (
            pyvene.LowRankRotatedSpaceIntervention,
            {"subspace_partition": [[0, 1], [1, 4]], "low_rank_dimension": 4},
            [[0], [1], [0]],
            "of 1 and 3 dimensions",
        ),
        (
            pyvene.LowRankRotatedSpaceIntervention,
            {"low_rank_dimension": 4},
            [[0], [1], [0]],
            "only with a subspace_partition",
        ),
        (
            pyvene.LowRankRotatedSpaceIntervention,
            {"low_rank_dimension": 4},
            [[1, 1]] * 3,
            r"\[1, 1\] of .* a dimension twice",
        ),
        (pyvene.AdditionIntervention, {"subspace_partition": [[0, 3], [2, 4]]}, [[0, 1]] * 3, "a dimension twice"),
        (pyvene.RotatedSpaceIntervention, {}, [[0], [1000], [0]], r"\[1000\] of .* are out of range"),
        (pyvene.BoundlessRotatedSpaceIntervention, {}, [[0]] * 3, r"has no subspaces, and pyvene would ignore \[0\]"),
        (pyvene.SigmoidMaskIntervention, {}, [[0]] * 3, "has no subspaces"),
    ],
)
def test_subspaces_that_end_in_errors_of_torch_or_in_nothing_are_refused(
    model: Any, base: Any, kind: Any, config: dict[str, Any], subspaces: list[list[int]], told: str
) -> None:
    intervenable = in_subspaces(model, kind, **config)
    with pytest.raises(ValueError, match=told):
        intervenable(base, [random_inputs(seed=1)], {"sources->base": 8}, subspaces=[subspaces])


@pytest.mark.parametrize(
    ("subspaces", "told"),
    [
        ([[0], [1, 2], [0]], "of 1 and 2 dimensions"),
        ([[1000]] * 3, r"\[1000\] of .* out of range: there are subspaces 0 to 41"),
        ([[-1]] * 3, r"\[-1\] of .* out of range"),
    ],
)
def test_collected_subspaces_are_checked_too(model: Any, base: Any, subspaces: list[list[int]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        in_subspaces(model, pyvene.CollectIntervention)(base, unit_locations={"base": 8}, subspaces=[subspaces])


def test_different_subspaces_of_one_size_are_swapped_in_their_examples(model: Any, base: Any) -> None:
    intervenable = in_subspaces(
        model, pyvene.LowRankRotatedSpaceIntervention, subspace_partition=[[0, 1], [1, 2]], low_rank_dimension=4
    )
    with torch.no_grad():
        source, rows = random_inputs(seed=1), [[0], [1], [0]]
        found = intervenable(base, [source], {"sources->base": 8}, subspaces=[rows])[1].logits
        for example, row in enumerate(rows):
            alone = intervenable(base, [source], {"sources->base": 8}, subspaces=[[row] * 3])[1].logits
            torch.testing.assert_close(found[example], alone[example])
            assert (found[example] - intervenable.model(**base).logits[example]).abs().max() > 1e-4


def test_two_numbers_that_do_not_adjoin_the_next_part_are_said_to_be_a_range(model: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"\[1, 2\] as dimension 1 and \[3, 7\] as dimensions 3 to 6; a set of dimensions is"
    ):
        intervenable = in_subspaces(model, pyvene.VanillaIntervention, subspace_partition=[[3, 7], [1, 2]])
    (intervention,) = intervenable.interventions.values()
    assert intervention.subspace_partition == [[3, 4, 5, 6], [1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in ([[0, 2], [2, 4]], [[4, 8], [0, 4]], [[3, 7]], [[3, 7, 9], [1, 2, 4]]):
            in_subspaces(model, pyvene.VanillaIntervention, subspace_partition=fine)


def test_a_place_that_is_listed_twice_is_refused_where_it_would_be_edited_once(model: Any, base: Any) -> None:
    source = random_inputs(seed=1)
    swap = in_subspaces(model, pyvene.AdditionIntervention)
    with pytest.raises(
        ValueError, match="position 8 of block_output at layer 1 is listed twice in example 0, and some"
    ):
        swap(base, [source], {"sources->base": [[[8, 8]] * 3]})
    with pytest.raises(ValueError, match=r"position 8 .* listed twice"):  # -1 is the same column
        swap(base, [source], {"sources->base": [[[8, -1]] * 3]})
    # Filling up the rows of examples with fewer places is fine: those are edited once.
    with torch.no_grad():
        filled = swap(base, [source], {"sources->base": [[[7, 8], [8, 8], [8, 8]]]})[1].logits
        alone = swap(base, [source], {"sources->base": 8})[1].logits
        torch.testing.assert_close(filled[1:], alone[1:])
    # One place of the source may go to two of base, and two readings of a place are two.
    swap(base, [source], {"sources->base": ([[[8, 8]] * 3], [[[7, 8]] * 3])})
    collect = in_subspaces(model, pyvene.CollectIntervention)
    (read,) = collect(base, unit_locations={"base": [[[8, 8]] * 3]})[0][1]
    first, second = read.reshape(3, 2, -1).unbind(1)
    assert torch.equal(first, second)
    heads = pyvene.RepresentationConfig(layer=1, component="head_attention_value_output", unit="h.pos")
    by_head = IntervenableModel(
        pyvene.IntervenableConfig(representations=[heads], intervention_types=pyvene.ZeroIntervention), model
    )
    with pytest.raises(
        ValueError, match="head 1 of head_attention_value_output at layer 1 is listed twice in example 0"
    ):
        by_head(base, unit_locations={"base": [[[[1, 1]] * 3, [[8]] * 3]]})


def test_subspaces_that_pyvene_mixes_up_are_refused(model: Any, base: Any) -> None:
    item = RepresentationConfig(1, "block_output", "pos", 1, None, VanillaIntervention, None, [[0, 10], [10, 42]])
    intervenable = IntervenableModel(config(item), model)
    source = random_inputs(seed=1)
    with pytest.raises(ValueError, match="different subspaces per example"):
        intervenable(base, [source], {"sources->base": 8}, subspaces=[[[0], [1], [0]]])
    with pytest.raises(ValueError, match="subspaces for 2 examples, but base has 3"):
        intervenable(base, [source], {"sources->base": 8}, subspaces=[[[0], [0]]])
    _, found = intervenable(base, [source], {"sources->base": 8}, subspaces=[[[0]] * 3])

    expected = model(**source, output_hidden_states=True).hidden_states[2][:, 8, :10]
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: _put(out, expected))
    assert close(found.logits, model(**base).logits, base)
    handle.remove()


def _put(output: Tensor, values: Tensor) -> Tensor:
    output = output.clone()
    output[:, 8, :10] = values
    return output


def test_a_rotation_needs_as_many_places_as_it_has_units(model: Any, base: Any) -> None:
    item = RepresentationConfig(1, "block_output", "pos", 1, intervention_type=RotatedSpaceIntervention)
    rows = [[[7, 8]] * 3]
    with pytest.raises(ValueError, match="2 units for an intervention made for 1: set max_number_of_units=2"):
        IntervenableModel(config(item), model)(base, [base], {"sources->base": (rows, rows)})
    two = item._replace(max_number_of_units=2)
    _, found = IntervenableModel(config(two), model)(base, [base], {"sources->base": (rows, rows)})
    assert close(found.logits, model(**base).logits, base)


def test_gradient_checkpointing_in_train_mode_is_refused(model: Any, base: Any) -> None:
    model.train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        IntervenableModel(config(zero()), model)(base, unit_locations={"base": 8})


def test_gemma_logits_and_labels_are_refused_together(base: Any) -> None:
    intervenable = IntervenableModel(config(zero("logits")), random_model("gemma2"))
    with pytest.raises(ValueError, match="computed before its soft-capped or scaled logits"):
        intervenable(base, unit_locations={"base": 8}, labels=base["input_ids"])


def test_a_projection_that_is_not_a_plain_matrix_is_not_split(model: Any, base: Any) -> None:
    class Adapted(torch.nn.Linear):
        pass

    attention = model.model.layers[1].self_attn
    attention.o_proj.__class__ = Adapted
    with pytest.raises(ValueError, match="plain output projection to split by heads, not Adapted"):
        IntervenableModel(config(zero("head_contribution", "h")), model)(base, unit_locations={"base": [[[0]] * 3]})


def test_a_model_that_is_running_is_not_started_again(model: Any, base: Any) -> None:
    intervenable = IntervenableModel(config(zero()), model)
    model.lm_head.register_forward_hook(lambda *_: intervenable(base, unit_locations={"base": 8}) and None)
    with pytest.raises(RuntimeError, match="running already"):
        intervenable(base, unit_locations={"base": 8})


def test_the_original_output_is_the_users_own(model: Any, base: Any) -> None:
    intervenable = IntervenableModel(config(zero("attention_pattern", "h")), model)
    original, _ = intervenable(base, unit_locations={"base": [[[0]] * 3]}, output_original_output=True)
    assert torch.equal(original.logits, model(**base).logits)
    as_dict = intervenable(base, unit_locations={"base": [[[0]] * 3]}, output_original_output=True, return_dict=True)
    assert torch.equal(as_dict.original_outputs.logits, original.logits)


def test_tapped_layers_do_not_shift_output_attentions(base: Any) -> None:
    for implementation, count in (("eager", 3), ("sdpa", 0)):
        model = random_model("llama3_1", attn_implementation=implementation)
        intervenable = IntervenableModel(config(collect("attention_pattern", "h")), model)
        _, found = intervenable({**base, "output_attentions": True}, unit_locations={"base": [[[0]] * 3]})
        assert len([a for a in found.attentions or () if a is not None]) == count


def test_an_intervenable_model_cannot_be_copied(model: Any) -> None:
    with pytest.raises(TypeError, match="build a new one from the config"):
        copy.deepcopy(IntervenableModel(config(zero()), model))


def test_a_cache_is_not_appended_to_twice(model: Any, base: Any) -> None:
    cache = DynamicCache()
    with pytest.raises(ValueError, match="share one past_key_values"):
        IntervenableModel(config(swap()), model)(
            {**base, "past_key_values": cache}, [{**base, "past_key_values": cache}], {"sources->base": 8}
        )
    with pytest.raises(ValueError, match="would grow twice"):
        IntervenableModel(config(zero()), model)(
            {**base, "past_key_values": cache}, unit_locations={"base": 8}, output_original_output=True
        )


def test_collecting_beside_a_swap_works_in_a_group_of_its_own(model: Any, base: Any) -> None:
    source = random_inputs(seed=1)
    both = config(swap()._replace(group_key=0), collect(layer=1)._replace(group_key=1))
    (_, collected), _ = IntervenableModel(both, model)(
        base, [source, None], {"sources->base": ([[[8]] * 3, None], [[[8]] * 3, [[8]] * 3])}
    )
    expected = model(**source, output_hidden_states=True).hidden_states[2][:, 8:9]
    assert torch.allclose(collected[0], expected, atol=1e-6)


# -- generation --------------------------------------------------------------------------------------------------------

NEW = 4


def generated_by_hand(
    model: Any, base: dict[str, Tensor], component: str, on_prompt: list[int], on_new: bool, heads: list[int]
) -> Tensor:
    """Greedy decoding without a cache, everything recomputed at every step with the edit by a plain hook."""
    ids, mask = base["input_ids"], base["attention_mask"]
    prompt = ids.shape[1]
    layer = (model.model.layers if hasattr(model, "model") else model.transformer.h)[1]
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
    module = {"block_output": layer, Z: getattr(attention, "o_proj", None) or getattr(attention, "c_proj", None)}[
        component
    ]
    for _ in range(NEW):
        columns = on_prompt + (list(range(prompt, ids.shape[1])) if on_new else [])

        def edit(x: Tensor, columns: list[int] = columns) -> Tensor:
            x = x.clone()
            if component == Z:
                split = x.unflatten(-1, (model.config.num_attention_heads, -1))
                for head in heads:
                    split[:, columns, head] = 0.0
                return split.flatten(-2)
            x[:, columns] = 0.0
            return x

        if component == Z:
            handle = module.register_forward_pre_hook(lambda _m, args, edit=edit: (edit(args[0]),))
        else:
            handle = module.register_forward_hook(lambda _m, _a, out, edit=edit: edit(out))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        handle.remove()
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("on_prompt", "on_new"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("component", ["block_output", Z])
def test_generation_equals_step_by_step_recomputation(
    family: str, use_cache: bool, on_prompt: bool, on_new: bool, component: str
) -> None:
    model = random_model(family)
    base = {name: value for name, value in random_inputs().items() if name != "position_ids"}
    heads = [0, 2]
    unit = "h.pos" if component == Z else "pos"
    places: Any = [[[[0, 2]] * 3, [[6, 8]] * 3]] if component == Z else [[[6, 8]] * 3]
    _, found = IntervenableModel(config(zero(component, unit)), model).generate(
        base,
        unit_locations={"base": places},
        intervene_on_prompt=on_prompt,
        intervene_on_new_tokens=on_new,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=-1,
    )
    expected = generated_by_hand(model, base, component, [6, 8] if on_prompt else [], on_new, heads)
    assert found.tolist() == expected.tolist()
    untouched = model.generate(**base, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    if on_prompt:
        assert found.tolist() != untouched.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_whole_heads_on_prompt_and_new_tokens(use_cache: bool, model: Any) -> None:
    base = {name: value for name, value in random_inputs().items() if name != "position_ids"}
    _, found = IntervenableModel(config(zero(Z, "h")), model).generate(
        base,
        unit_locations={"base": [[[0, 1, 2, 3]] * 3]},
        intervene_on_prompt=True,
        intervene_on_new_tokens=True,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=-1,
    )
    expected = generated_by_hand(model, base, Z, list(range(9)), True, [0, 1, 2, 3])
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("component", ["head_key_rotated", "attention_pattern", "head_contribution"])
def test_taps_generate_the_same_with_and_without_cache(component: str, model: Any) -> None:
    base = {name: value for name, value in random_inputs().items() if name != "position_ids"}
    both = [
        IntervenableModel(config(zero(component, "h")), model)
        .generate(
            base,
            unit_locations={"base": [[[0, 2]] * 3]},
            intervene_on_prompt=True,
            intervene_on_new_tokens=True,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=-1,
        )[1]
        .tolist()
        for use_cache in (True, False)
    ]
    assert both[0] == both[1]


def test_beams_with_other_places_in_every_example(model: Any) -> None:
    base = {name: value for name, value in random_inputs().items() if name != "position_ids"}
    rows = [[8], [7], [6]]
    options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    _, found = IntervenableModel(config(zero()), model).generate(
        base, unit_locations={"base": [rows]}, intervene_on_prompt=True, **options
    )

    def edit(_m: Any, _a: Any, output: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return output
        output = output.clone()
        for row in range(output.shape[0]):
            output[row, rows[row // (output.shape[0] // 3)]] = 0.0
        return output

    handle = model.model.layers[1].register_forward_hook(edit)
    expected = model.generate(**base, **options)
    handle.remove()
    assert found.tolist() == expected.tolist()


def test_a_swapped_source_on_the_prompt_and_on_new_tokens(model: Any) -> None:
    base = {name: value for name, value in random_inputs().items() if name != "position_ids"}
    source = {name: value for name, value in random_inputs(seed=1).items() if name != "position_ids"}
    intervenable = IntervenableModel(config(swap()), model)
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": -1,
        "intervene_on_prompt": True,
    }
    with_cache, without = (
        intervenable.generate(
            base, [source], {"sources->base": (8, 8)}, intervene_on_new_tokens=True, use_cache=use_cache, **options
        )[1].tolist()
        for use_cache in (True, False)
    )
    assert with_cache == without
    assert with_cache != model.generate(**base, max_new_tokens=NEW, do_sample=False, eos_token_id=-1).tolist()
    with pytest.raises(ValueError, match="source of 2 positions, and every new token takes exactly one"):
        rows = [[[7, 8]] * 3]
        intervenable.generate(base, [source], {"sources->base": (rows, rows)}, intervene_on_new_tokens=True, **options)


def test_generating_one_token_with_nothing_to_intervene_on_is_an_error(model: Any, base: Any) -> None:
    base = {name: value for name, value in base.items() if name != "position_ids"}
    intervenable = IntervenableModel(config(zero()), model)
    with pytest.raises(ValueError, match="never fired"):
        intervenable.generate(base, unit_locations={"base": 8}, max_new_tokens=1)
    with pytest.raises(ValueError, match="nothing to intervene on"):
        intervenable.generate(base, intervene_on_prompt=False, intervene_on_new_tokens=False)


def swapped_by_position(model: Any, base: dict, source: dict, **options: Any) -> Any:
    """Put the second to last state of the source there in the base, which may be padded."""
    places = [[[-2]] * len(base["input_ids"])]
    return IntervenableModel(config(swap()), model)(base, source, {"sources->base": (places, places)}, **options)


def without_position_ids(seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in random_inputs(seed=seed).items() if name != "position_ids"}


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *sorted({*MORE_FAMILIES} - {*CORE_FAMILIES})])
def test_padding_on_the_left_changes_nothing_without_position_ids(family: str) -> None:
    model, base, source = random_model(family), without_position_ids(), without_position_ids(seed=1)
    original, changed = swapped_by_position(model, base, source, output_original_output=True)
    for row, mask in enumerate(base["attention_mask"].bool()):
        one, other = ({"input_ids": x["input_ids"][row, mask][None]} for x in (base, source))
        own, expected = swapped_by_position(model, one, other, output_original_output=True)
        torch.testing.assert_close(original.logits[row, -1], own.logits[0, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(changed.logits[row, -1], expected.logits[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_in_the_cache_is_not_counted_either(family: str) -> None:
    model, base, source = random_model(family), without_position_ids(), without_position_ids(seed=1)
    _, expected = swapped_by_position(model, base, source)
    cache = DynamicCache(config=model.config)
    model(**{name: tensor[:, :5] for name, tensor in random_inputs().items()}, past_key_values=cache)
    _, changed = swapped_by_position(
        model, {**base, "input_ids": base["input_ids"][:, 5:], "past_key_values": cache}, source
    )
    torch.testing.assert_close(changed.logits[:, -1], expected.logits[:, -1], atol=1e-5, rtol=1e-5)


def test_the_users_config_object_is_left_alone(model: Any) -> None:
    wanted = config(zero())
    before = copy.deepcopy(wanted.representations)
    IntervenableModel(wanted, model)
    assert wanted.representations == before


# -- serial mode -------------------------------------------------------------------------------------------------------


def with_block_output(model: Any, inputs: Any, layer: int, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block outputs of layer 1 at column 8 and the logits, with layer `layer`'s block output at column 8 set to `values`."""
    seen: list[Tensor] = []

    def put(_m: Any, _a: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if values is not None:
            output[:, 8] = values
        return output

    handles = [model.model.layers[layer].register_forward_hook(put)]
    handles.append(model.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out[:, 8]) and None))
    logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return seen[0], logits


def test_serial_mode_swaps_from_source_to_source_to_base(model: Any, base: Any) -> None:
    first, second = random_inputs(seed=1), random_inputs(seed=2)
    serial = config(swap(layer=0)._replace(group_key=0), swap(layer=1)._replace(group_key=1), mode="serial")
    intervenable = IntervenableModel(serial, model)
    _, found = intervenable(base, [first, second], {"source_0->source_1": (8, 8), "source_1->base": (8, 8)})
    one = model(**first, output_hidden_states=True).hidden_states[1][:, 8]
    two, _ = with_block_output(model, second, 0, one)
    _, expected = with_block_output(model, base, 1, two)
    assert close(found.logits, expected, base)
    assert not close(found.logits, model(**base).logits, base)


def test_serial_mode_refuses_what_it_would_skip(model: Any, base: Any) -> None:
    source = random_inputs(seed=1)
    serial = config(swap(layer=0)._replace(group_key=0), zero(layer=1)._replace(group_key=1), mode="serial")
    intervenable = IntervenableModel(serial, model)
    steps = {"source_0->source_1": (8, 8), "source_1->base": (8, 8)}
    with pytest.raises(ValueError, match="serial mode skips such a group"):
        intervenable(base, [source, None], steps)
    with pytest.raises(ValueError, match="serial mode needs unit_locations"):
        intervenable(base, [source, source])
    with pytest.raises(ValueError, match="one entry per step"):
        intervenable(base, [source, source], {"source_0->base": (8, 8)})
