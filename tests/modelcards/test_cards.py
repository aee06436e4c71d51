"""Every card, class and component against independent hooks; what pyvene's own cards get wrong; and that verify can fail."""

from __future__ import annotations

import ast
import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import pyvene
import torch
from pyvene import CollectIntervention, IntervenableConfig, RepresentationConfig, ZeroIntervention
from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2ForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import modelcards
from modelcards import CARDS, COMPONENTS, FIELD_NAMES, card_of, n_layers, n_positions
from pyvene_ext import IntervenableModel, load_model, verify, verify_card
from pyvene_ext.intervenable import verification
from pyvene_ext.intervenable.truth import Truth
from tests.pyvenes_cards import PLAIN_DIMENSIONS, PLAIN_MODULES
from tests.tiny_random import CLASSES, FAMILIES, MORE_FAMILIES, UNLIKE, random_inputs, random_model, tiny_config

Z = "head_attention_value_output"
EVERY = (*MORE_FAMILIES, *FAMILIES)
EVERY_CLASS = [
    (family, cls) for family in FAMILIES for cls in CLASSES[family] if family in UNLIKE or cls == "causal_lm"
]
OTHER_CLASSES = [(family, cls) for family in EVERY for cls in CLASSES[family] if cls != "causal_lm"]


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_exact_in_one_layer(family: str) -> None:
    # One layer, padding side and implementation, not the same ones for all; the READMEs count them all.
    number, model = EVERY.index(family), random_model(family)
    implementation = ["eager", "sdpa"][number % 2] if model._supports_sdpa else "eager"
    report = verify_card(
        model,
        layers=[number // 2 % n_layers(model.config)],
        implementations=[implementation],
        padding_sides=[["left", "right"][number % 2]],
    )
    assert report.failures == 0, report.table()
    assert {row.component for row in report.rows} == set(card_of(model).mapping(type(model)))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cls"), EVERY_CLASS, ids=[f"{f}-{c}" for f, c in EVERY_CLASS])
def test_every_component_is_exact(family: str, cls: str) -> None:
    # The language models at every layer, two of them in settings that share nothing and the others in one of these; the other
    # classes have the same card and differ only in the prefix.
    model = random_model(family, cls)
    layers: Any = "all" if cls == "causal_lm" else [1]
    settings = [(["eager"], ["left"]), (["sdpa" if model._supports_sdpa else "eager"], ["right"])]
    if layers != "all" or family not in UNLIKE:
        settings = settings[FAMILIES.index(family) % 2 :][:1]
    for implementations, padding_sides in settings:
        report = verify_card(model, layers, implementations, padding_sides)
        assert report.failures == 0, report.table()
        assert {row.component for row in report.rows} == set(
            card_of(CLASSES[family][cls]).mapping(CLASSES[family][cls])
        )


@pytest.mark.parametrize(("family", "cls"), OTHER_CLASSES, ids=[f"{f}-{c}" for f, c in OTHER_CLASSES])
def test_other_classes_have_the_same_places(family: str, cls: str) -> None:
    model, inputs, truth = random_model(family, cls), random_inputs(), Truth(random_model(family, cls))
    card, real = card_of(model), inputs["attention_mask"].bool()
    whole = set(card.mapping(CLASSES[family]["causal_lm"])) - {"logits"}
    assert set(card.mapping(type(model))) == whole | ({"logits"} if cls == "classifier" else set())
    for component in {"block_output", "attention_value_output", "final_norm", "logits"} & set(
        card.mapping(type(model))
    ):
        layer = 1 if COMPONENTS[component].per_layer else 0
        config = IntervenableConfig([RepresentationConfig(layer, component, "pos", intervention_type=ZeroIntervention)])
        found = IntervenableModel(config, model)(inputs, unit_locations={"base": [[[-1]] * 3]})[1][0]
        last = real.sum(-1) - 1 + (~real).sum(-1)  # of left-padded rows
        expected = truth.run(inputs, component, layer, lambda x, at=last: x.index_fill(1, at[:1], 0.0))
        found, expected = (x[real] if x.ndim == 3 else x for x in (found, expected))
        assert torch.allclose(found, expected, atol=1e-5), component


@pytest.mark.parametrize("family", FAMILIES)
def test_cards_and_vocabulary_name_the_same_components(family: str) -> None:
    card = next(card for card in CARDS if card.family == family)
    assert card.components <= set(COMPONENTS)
    assert set(FIELD_NAMES.values()) <= set(COMPONENTS)
    # What the studies stand on is there in every family.
    fields = {"embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "scores"}
    fields |= {"pattern", "result", "mlp_up", "mlp_neurons", "final_norm", "logits"}
    assert {FIELD_NAMES[name] for name in fields} <= card.components


def test_every_component_pyvene_names_today_is_kept() -> None:
    for card in CARDS:
        for model_class, mapping in card.mappings.items():
            assert set(PLAIN_MODULES.get(model_class, {})) <= set(mapping), model_class.__name__


def test_register_is_idempotent() -> None:
    before = {
        cls: (dict(type_to_module_mapping[cls]), dict(type_to_dimension_mapping[cls])) for cls in type_to_module_mapping
    }
    modelcards.register()
    modelcards.register()
    assert before == {
        cls: (type_to_module_mapping[cls], type_to_dimension_mapping[cls]) for cls in type_to_module_mapping
    }


def test_no_two_classes_share_a_dict() -> None:
    ours = [cls for card in CARDS for cls in card.mappings]
    assert len({id(type_to_dimension_mapping[cls]) for cls in ours}) == len(ours)


class MyLlama(LlamaForCausalLM):
    """A user's subclass."""


def test_subclasses_of_a_covered_class_work() -> None:
    model, sites = MyLlama(random_model("llama3_1").config).eval(), ("resid_mid", "z", "pattern", "logits")
    report = verify_card(model, layers=[0], implementations=["sdpa"], sites=sites)
    assert report.failures == 0, report.table()


@pytest.mark.parametrize(
    ("family", "setting", "sentence"),
    [
        ("stablelm", {"use_parallel_residual": True}, "covers models with use_parallel_residual=False"),
        ("gpt_neox", {"use_parallel_residual": False}, "covers models with use_parallel_residual=True"),
        ("opt", {"do_layer_norm_before": False}, "covers models with do_layer_norm_before=True"),
        ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim equal to hidden_size"),
        ("falcon", {"new_decoder_architecture": True}, "and no new_decoder_architecture"),
        ("falcon", {"multi_query": False}, "covers models with parallel_attn and multi_query"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=False"),
    ],
)
def test_models_built_in_another_way_are_refused(family: str, setting: dict[str, Any], sentence: str) -> None:
    config = tiny_config(family)
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"the card of {family} .*{sentence}"):
        card_of(CLASSES[family]["causal_lm"](config))


def test_experts_are_counted_as_experts() -> None:
    config = IntervenableConfig(
        [RepresentationConfig(0, "expert_contribution", "h", intervention_type=ZeroIntervention)]
    )
    with pytest.raises(ValueError, match=r"expert 5 of .* is out of range: there are experts 0 to 4\.$"):
        IntervenableModel(config, random_model("mixtral"))(random_inputs(), unit_locations={"base": [[[5]] * 3]})


def test_a_layer_without_experts_says_so() -> None:
    config = tiny_config("qwen3_moe")
    config.mlp_only_layers = [0]
    model = CLASSES["qwen3_moe"]["causal_lm"](config)
    item = RepresentationConfig(0, "router_logits", "pos", intervention_type=ZeroIntervention)
    with pytest.raises(ValueError, match="layer 0 of this model has no router_logits"):
        IntervenableModel(IntervenableConfig([item]), model)


def test_a_model_without_a_card_is_named() -> None:
    with pytest.raises(ValueError, match="no model card covers Linear; there are cards for qwen2_5, gemma2"):
        card_of(torch.nn.Linear)


def test_no_imports_in_a_circle() -> None:
    root = Path(modelcards.__file__).parent
    graph: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                package = name.rsplit(".", node.level)[0] + "." if node.level else ""
                modules = {f"{package}{node.module}", *(f"{package}{node.module}.{alias.name}" for alias in node.names)}
                graph[name] |= {module for module in modules if module.startswith("modelcards.")}
    assert "modelcards.template" in graph["modelcards.bloom.modelings_intervenable_bloom"]
    TopologicalSorter(graph).prepare()  # raises CycleError


# -- defects of pyvene's own cards, by number --------------------------------------------------------------------------


def collected(model: Any, component: str, unit: str, rows: list[list[int]], engine: Any = None) -> torch.Tensor:
    config = IntervenableConfig([RepresentationConfig(1, component, unit, 1, intervention_type=CollectIntervention)])
    intervenable = (engine or pyvene.IntervenableModel)(config, model)
    (_, values), _ = intervenable(random_inputs(), unit_locations={"base": [rows]})
    return torch.stack(list(values))


def qwen_as_published() -> Qwen2ForCausalLM:
    """Qwen2.5's configs have no head_dim."""
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 33}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=61, num_hidden_layers=2, **sizes)).eval()


CARD_DEFECTS = {
    "1: heads of Qwen2 cannot be named": lambda: collected(qwen_as_published(), Z, "h", [[0]] * 3).shape[-1] == 6,
    "2: z is cut at the hidden size": lambda: collected(
        random_model("gemma2"), "attention_value_output", "pos", [[8]] * 3
    ).shape[-1] == 4 * 14,
    "6: classifiers and subclasses are unknown": lambda: collected(
        random_model("gemma2", "classifier"), "block_output", "pos", [[8]] * 3
    ).shape[-1] == 36 and collected(MyLlama(random_model("llama3_1").config), "block_output", "pos", [[8]] * 3) is not None,
}  # fmt: skip


@pytest.mark.parametrize("defect", CARD_DEFECTS)
def test_a_defect_of_pyvenes_own_cards(defect: str, plain_cards: None) -> None:
    try:
        right = CARD_DEFECTS[defect]()
    except Exception:
        right = False
    assert not right


def test_5_two_positions_come_back_as_pieces_of_one_in_plain_pyvene_only() -> None:
    model = random_model("llama3_1")
    assert collected(model, "block_output", "pos", [[7, 8]] * 3).squeeze(0).shape != (3, 2, 42)
    ours = collected(model, "block_output", "pos", [[7, 8]] * 3, IntervenableModel).squeeze(0)
    assert torch.equal(ours, model(**random_inputs(), output_hidden_states=True).hidden_states[2][:, 7:])


def pyvenes_width(model_class: type, config: Any, component: str) -> int | None:
    return pyvene.models.modeling_utils.get_dimension_by_component(model_class, config, component)


def product(config: Any, width: str) -> int:
    return math.prod(modelcards.dimensions(config)[factor] for factor in width.split("*"))


@pytest.mark.parametrize("family", EVERY)
def test_widths_in_pyvenes_dimension_mapping_are_whole_vectors_of_the_default_config(family: str) -> None:
    model_class = CLASSES[family]["causal_lm"]
    config = model_class.config_class()
    for component in card_of(model_class).mapping(model_class):
        width = COMPONENTS[component].width
        if component in type_to_dimension_mapping[model_class] and width != "n_out":
            assert pyvenes_width(model_class, config, component) == product(config, width), component


@pytest.mark.parametrize("family", EVERY)
def test_no_width_that_pyvene_has_right_is_dropped(family: str) -> None:
    """Right for the family's default config, as most checkpoints are; whatever pyvene cannot name there is no loss."""
    model_class = CLASSES[family]["causal_lm"]
    config = model_class.config_class()
    for component, proposals in PLAIN_DIMENSIONS.get(model_class, {}).items():
        width = COMPONENTS[component].width if component in COMPONENTS else None
        with contextlib.suppress(AttributeError), pytest.MonkeyPatch.context() as patch:
            ours = pyvenes_width(model_class, config, component)
            patch.setitem(type_to_dimension_mapping, model_class, {component: proposals})
            theirs = pyvenes_width(model_class, config, component)
            if width and theirs == product(config, width):
                assert ours == theirs, component


@pytest.fixture
def named_widths() -> Iterator[None]:
    """Afterwards the classes have the widths of no model."""
    yield
    modelcards.register()


def trained_in_plain_pyvene(model: Any, component: str) -> None:
    """A rotation of the whole vector, interchanged with itself, changes nothing; and it has a gradient."""
    base, unit = random_inputs(), COMPONENTS[component].units[0]
    item = RepresentationConfig(1, component, unit, 1, intervention_type=pyvene.RotatedSpaceIntervention)
    intervenable = pyvene.IntervenableModel(IntervenableConfig([item]), model)
    at = 8 if unit == "pos" else 0
    _, found = intervenable(base, [base], {"sources->base": ([[[at]] * 3], [[[at]] * 3])})
    assert torch.allclose(found.logits, model(**base).logits, atol=1e-5), component


PROJECTIONS = ("query_output", "key_output", "value_output", "attention_value_output", "mlp_activation", "mlp_neurons")


@pytest.mark.parametrize("family", EVERY)
def test_every_projection_trains_in_plain_pyvene_once_the_model_is_registered(family: str, named_widths: None) -> None:
    model = random_model(family)
    card = card_of(model)
    modelcards.register(model)
    for component in card.plain[type(model)]:
        if (width := card.width(model, component)) is not None:
            assert pyvenes_width(type(model), model.config, component) == width, component
        if component in PROJECTIONS:
            trained_in_plain_pyvene(model, component)


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_as_published_they_train_in_plain_pyvene_as_before(model_class: Any) -> None:
    """Without naming the model: as many key/value heads as heads, whose sizes add up to the hidden size."""
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 33}
    model = model_class(model_class.config_class(vocab_size=61, num_hidden_layers=2, **sizes)).eval()
    for component in ("block_output", *PROJECTIONS):
        trained_in_plain_pyvene(model, component)


@pytest.mark.parametrize("defect", CARD_DEFECTS)
def test_our_cards_mend_it_in_plain_pyvene(defect: str) -> None:
    modelcards.register(MyLlama)
    assert CARD_DEFECTS[defect]()


def test_7_gpt2_attention_weight_is_a_silent_no_op_in_pyvenes_card(plain_cards: None) -> None:
    model, base = random_model("gpt2"), random_inputs()
    config = IntervenableConfig(
        [RepresentationConfig(1, "attention_weight", "h", 1, intervention_type=ZeroIntervention)]
    )
    _, found = pyvene.IntervenableModel(config, model)(base, unit_locations={"base": [[[0]] * 3]})
    assert torch.equal(found.logits, model(**base).logits)


def test_7_ours_zeroes_the_head() -> None:
    model, base = random_model("gpt2"), random_inputs()
    outputs = []
    for component in ("attention_weight", Z):
        config = IntervenableConfig([RepresentationConfig(1, component, "h", 1, intervention_type=ZeroIntervention)])
        outputs.append(IntervenableModel(config, model)(base, unit_locations={"base": [[[0]] * 3]})[1].logits)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[0], model(**base).logits, atol=1e-3)


# -- verify itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "wrong"),
    [
        ("resid_mid", ("model.layers[%s].pre_feedforward_layernorm", "register_forward_hook")),
        ("attention_contribution", ("model.layers[%s].self_attn", "register_forward_hook")),
        ("mlp_neurons", ("model.layers[%s].mlp.act_fn", "register_forward_hook")),
        ("logits", ("lm_head", "register_forward_hook")),
        ("block_output", ("model.layers[%s].mlp.nothing", "register_forward_hook")),
    ],
)
def test_verify_finds_a_wrong_card(component: str, wrong: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("gemma2")
    monkeypatch.setitem(card_of(model).mappings[Gemma2ForCausalLM], component, wrong)
    try:
        report = verify_card(model, layers=[1], padding_sides=["left"], sites=[component, "resid_pre"])
    finally:
        monkeypatch.undo()
        modelcards.register()
    bad = {row.component for row in report.rows if row.failures}
    assert component in bad and report.failures
    assert component in report.table().split("failures, largest error")[1]


def test_verify_notices_what_is_left_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # What plain pyvene does: freeze the user's model at construction.
    monkeypatch.setattr("pyvene_ext.intervenable.model.restoring_flags", contextlib.nullcontext)
    only = {"layers": [1], "implementations": ["sdpa"], "padding_sides": ["left"], "sites": ["resid_mid"]}
    report = verify_card(random_model("llama3_1"), **only)
    assert any("the checks changed the model" in problem for problem in report.problems)
    assert report.failures == 1


def test_verify_does_not_pass_what_it_did_not_check() -> None:
    assert verify_card(random_model("gemma2"), implementations=["sdpa"]).failures
    assert verify_card(random_model("llama3_1"), padding_sides=[]).failures
    with pytest.raises(ValueError, match="there is no layer 99"):
        verify_card(random_model("llama3_1"), layers=[99])


def test_verify_forgives_what_rounding_explains_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between implementations of attention, a tolerance of 1e-9 is below rounding in float32."""
    model = random_model("llama3_1")
    sites = ("z", "mlp_neurons")
    how = {"layers": [1], "implementations": ["sdpa"], "padding_sides": ["left"], "tolerance": 1e-9, "sites": sites}
    report = verify_card(model, **how)
    assert not report.failures and sum(row.by_rounding for row in report.rows) > report.checks / 4
    assert "due to rounding" in report.table()
    monkeypatch.setattr(verification, "SAFETY", 0.0)
    assert verify_card(model, **how).failures
    monkeypatch.undo()
    monkeypatch.setattr(ZeroIntervention, "forward", lambda _, base, *__, **___: 1e-3 * base)
    report = verify_card(model, **how)
    assert report.failures > report.checks / 4  # a third of them zero


def test_verify_checks_every_component_before_any_again_and_says_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama3_1")
    visited: list[tuple[Any, ...]] = []

    def checked(model: Any, truth: Any, component: str, *others: Any) -> None:
        visited.append((component, others[-1]))
        rows = others[-2]
        rows[component, "pos"] = verification.Row(component, "pos", checks=1, effect=1.0)

    clock = itertools.count()
    monkeypatch.setattr(verification, "_check_component", checked)
    monkeypatch.setattr(verification.time, "monotonic", lambda: next(clock))
    components = len(card_of(model).mapping(type(model)))
    report = verify_card(model, seconds=10)
    assert len({component for component, _ in visited}) == len(visited) == 10 - 1
    assert len({where for _, where in visited}) > 4
    assert len(report.unreached) == components - 9 and "not reached: " in report.table()
    visited.clear()
    report = verify_card(model, seconds=2 * components + 1)
    assert len(visited) == 2 * components == len(set(visited)) and not report.unreached
    assert len({component for component, _ in visited[:components]}) == components
    assert "every component at least once" in report.table()
    visited.clear()
    verify_card(model)
    whole = len(visited)
    visited.clear()
    verify_card(model, seconds=10**6)
    assert len(visited) == len(set(visited)) == whole


def test_verify_leaves_train_modes_alone_and_takes_half_precision() -> None:
    model = random_model("llama3_1").bfloat16().train()
    model.model.layers[0].eval()
    sites = ("resid_mid", "z", "pattern", "mlp_neurons", "logits")
    report = verify_card(model, [1], implementations=["eager"], padding_sides=["left"], tolerance=0.2, sites=sites)
    assert not report.problems and report.checks
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


@pytest.mark.slow
def test_the_command_proves_a_model_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model("tiny-qwen2.5")
    del model.model.layers[1:]  # of several layers it takes a minute
    model.config.num_hidden_layers, model.config.layer_types = 1, model.config.layer_types[:1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert verify.main(verify.Options(model=str(tmp_path))) == 0
    shown = capsys.readouterr().out
    assert "Qwen2ForCausalLM (qwen2_5)" in shown and "Qwen2Model (qwen2_5)" in shown and ", 0 failures" in shown


# -- identities that need no second implementation ---------------------------------------------------------------------


def read_all(model: Any, base: Any, *components: str, layer: int = 1) -> list[torch.Tensor]:
    """Whole components, `batch pos d` or `batch head pos d`."""
    representations, locations = [], []
    for name in components:
        unit = COMPONENTS[name].units[0]
        representations.append(RepresentationConfig(layer, name, unit, 1, intervention_type=CollectIntervention))
        count = modelcards.dimensions(model.config)[COMPONENTS[name].heads or "n_head"] if unit == "h" else 9
        locations.append([list(range(count))] * 3)
    intervenable = IntervenableModel(IntervenableConfig(representations), model)
    (_, values), _ = intervenable(base, unit_locations={"base": locations})
    return list(values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_contributions_sum_to_the_residual_stream(family: str, layer: int) -> None:
    model, base = random_model(family), random_inputs()
    pre, mid, post, attn, mlp, heads = read_all(
        model, base, "block_input", "resid_mid", "block_output", "attention_contribution", "mlp_contribution",
        "head_contribution", layer=layer,
    )  # fmt: skip
    real = base["attention_mask"].bool()
    assert torch.allclose((pre + attn)[real], mid[real], atol=1e-5)
    assert torch.allclose((mid + mlp)[real], post[real], atol=1e-5)
    projection = model.get_submodule(
        f"transformer.h.{layer}.attn.c_proj" if family == "gpt2" else f"model.layers.{layer}.self_attn.o_proj"
    )
    bias = projection.bias if projection.bias is not None else 0.0
    assert torch.allclose((heads.sum(1) + bias)[real], attn[real], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pattern_is_the_softmax_of_the_scores_and_causal(family: str) -> None:
    model, base = random_model(family), random_inputs()
    scores, pattern = read_all(model, base, "attention_scores", "attention_pattern", layer=2)
    real = base["attention_mask"].bool()[:, None, :].expand(pattern.shape[:3])
    assert torch.allclose(scores.softmax(-1)[real], pattern[real], atol=1e-6)
    assert torch.allclose(pattern.sum(-1)[real], torch.ones(()))
    assert torch.equal(pattern.triu(1), torch.zeros_like(pattern))
    assert not pattern.isnan().any()
    eager = random_model(family, attn_implementation="eager")
    by_transformers = eager(**base, output_attentions=True).attentions[2]
    assert torch.allclose(pattern[real], by_transformers[real], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", ["attention_scores", "attention_pattern"])
def test_an_edit_cannot_look_ahead(family: str, component: str) -> None:
    """Scores or pattern set to a constant everywhere: a later token must still change nothing before it."""
    model = random_model(family)

    class Ones(pyvene.ConstantSourceIntervention):
        def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None) -> torch.Tensor:
            return torch.ones_like(base)

    config = IntervenableConfig([RepresentationConfig(1, component, "h", 1, intervention_type=Ones)])
    intervenable = IntervenableModel(config, model)
    base = random_inputs((8,))
    changed = {**base, "input_ids": base["input_ids"].clone()}
    changed["input_ids"][0, -1] = (changed["input_ids"][0, -1] + 1) % 61
    one, other = (intervenable(x, unit_locations={"base": [[[0, 1, 2, 3]]]})[1].logits for x in (base, changed))
    assert torch.allclose(one[:, :-1], other[:, :-1], atol=1e-6)
    assert not torch.allclose(one[:, -1], other[:, -1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_scores_minus_infinity_is_a_zero_head_and_never_nan(family: str) -> None:
    model, base = random_model(family), random_inputs()

    class Closed(pyvene.ConstantSourceIntervention):
        def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None) -> torch.Tensor:
            return torch.full_like(base, -torch.inf)

    def logits(component: str, kind: type) -> torch.Tensor:
        config = IntervenableConfig([RepresentationConfig(1, component, "h", 1, intervention_type=kind)])
        return IntervenableModel(config, model)(base, unit_locations={"base": [[[1, 2]] * 3]})[1].logits

    closed, zeroed = logits("attention_scores", Closed), logits(Z, ZeroIntervention)
    assert not closed.isnan().any()
    real = base["attention_mask"].bool()
    assert torch.allclose(closed[real], zeroed[real], atol=1e-5)


def test_only_the_named_layers_are_touched() -> None:
    model, base = random_model("llama3_1"), random_inputs()
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda m, _a, _o, i=index: seen.update({i: m.config._attn_implementation})
        )
    config = IntervenableConfig(
        [RepresentationConfig(1, "attention_pattern", "h", 1, intervention_type=ZeroIntervention)]
    )
    IntervenableModel(config, model)(base, unit_locations={"base": [[[0]] * 3]})
    assert seen == {0: "sdpa", 1: "pyvene_taps", 2: "sdpa"}
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_implementations_are_refused_for_taps_only() -> None:
    model, base = random_model("llama3_1"), random_inputs()
    model.config._attn_implementation_internal = "flex_attention"
    config = IntervenableConfig(
        [RepresentationConfig(1, "attention_scores", "h", 1, intervention_type=ZeroIntervention)]
    )
    with pytest.raises(ValueError, match="cannot be seen under the attention implementation 'flex_attention'"):
        IntervenableModel(config, model)(base, unit_locations={"base": [[[0]] * 3]})


def test_the_bare_class_is_registered_apart() -> None:
    assert type_to_module_mapping[LlamaModel]["block_output"][0] == "layers[%s]"
    assert type_to_module_mapping[LlamaForCausalLM]["block_output"][0] == "model.layers[%s]"


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=100), 100),
        (
            Qwen2Config(
                max_position_embeddings=100, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
            ),
            400,
        ),
        (
            Qwen2Config(
                max_position_embeddings=400,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 100,
                },
            ),
            400,
        ),
        (
            LlamaConfig(
                max_position_embeddings=100, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            ),
            200,
        ),
        (BloomConfig(), sys.maxsize),
        (FalconConfig(alibi=True), sys.maxsize),
        (GPT2Config(n_positions=30), 30),
    ],
)
def test_scaled_rotary_positions_reach_further(config: Any, positions: int) -> None:
    assert n_positions(config) == positions
