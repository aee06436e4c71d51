"""Models without a card run as pyvene's own mappings describe them, and equal plain hooks; so does what pyvene's own tests do.

Among them are pyvene's MLP and GRU, a family that pyvene maps and we do not, and one that a user adds to its mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import pyvene
import torch
from pyvene import (
    AdditionIntervention,
    CollectIntervention,
    IntervenableConfig,
    LowRankRotatedSpaceIntervention,
    RepresentationConfig,
    RotatedSpaceIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from pyvene.models.constants import split_half, split_head_and_permute
from pyvene.models.mlp.modelings_mlp import MLPConfig
from torch import Tensor, nn
from transformers import (
    EsmConfig,
    EsmModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pyvene_ext import IntervenableModel, verify_card
from tests.tiny_random import random_inputs, random_model

BATCH = 3


def place(component: str, unit: str = "pos", kind: Any = ZeroIntervention, **fields: Any) -> RepresentationConfig:
    return RepresentationConfig(component=component, unit=unit, intervention_type=kind, **fields)


def edited(
    model: nn.Module, module: nn.Module, edit: Callable[[Tensor], None], inputs: dict[str, Tensor], **how: Any
) -> Any:
    """What a model gives if a module's output, or its input, is edited in place on a copy."""

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        edit(first := first.clone())
        return (first, *rest) if isinstance(output, tuple) else first

    def before(_: nn.Module, args: Any) -> Any:
        edit(first := args[0].clone())
        return (first, *args[1:])

    handle = module.register_forward_pre_hook(before) if how.get("before") else module.register_forward_hook(after)
    try:
        return model(**inputs)[0]
    finally:
        handle.remove()


def activation(model: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What a module gives."""
    seen: list[Tensor] = []
    edited(model, module, lambda tensor: seen.append(tensor.clone()), inputs)
    return seen[0]


def hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def same(ours: Tensor, golden: Tensor, base: Tensor) -> bool:
    """Equal to what plain hooks give, and not to a run without an edit."""
    return torch.allclose(ours, golden, atol=1e-5, rtol=0) and not torch.allclose(golden, base, atol=1e-5, rtol=0)


# -- the MLP: the cases of pyvene's own tests ----------------------------------------------------------------------------


@pytest.fixture
def mlp() -> Any:
    torch.manual_seed(0)
    sizes = MLPConfig(h_dim=3, n_layer=1, pdrop=0.0, num_classes=5, include_bias=False, squeeze_output=False)
    return pyvene.create_mlp_classifier(sizes)[2].eval()


def vectors(seed: int, batch: int = 10) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.rand(batch, 1, 3, generator=torch.Generator().manual_seed(seed))}


def two(kind: Any, parts: list[list[int]], **fields: Any) -> IntervenableConfig:
    item = place("mlp_activation", kind=None, subspace_partition=parts, **fields)
    return IntervenableConfig([item, item], intervention_types=kind)


PLACES = [[0]] * 10
LINKED = partial(two, VanillaIntervention, [[1, 3], [0, 1]], intervention_link_key=0)


def test_the_models_own_output_is_a_clean_run_without_sources(mlp: Any) -> None:
    with pytest.warns(UserWarning, match=r"no sources are given: .*mlp_activation.* left out"):
        original, outcome = IntervenableModel(LINKED(), mlp)(vectors(0), output_original_output=True)
    golden = mlp(**vectors(0))[0]
    assert torch.equal(original[0], golden) and torch.equal(outcome[0], golden)
    with pytest.raises(ValueError, match="needs a source and has none"):
        IntervenableModel(LINKED(), mlp)(vectors(0))


def with_subspaces(mlp: Any, base: dict[str, Tensor], swaps: list[tuple[dict[str, Tensor], slice]]) -> Tensor:
    act = mlp.mlp.h[0].act
    sources = [(activation(mlp, act, source), part) for source, part in swaps]

    def swap(tensor: Tensor) -> None:
        for source, part in sources:
            tensor[..., part] = source[..., part]

    return edited(mlp, act, swap, base)


FIRST, REST = slice(0, 1), slice(1, 3)


@pytest.mark.parametrize(
    ("config", "chosen", "swapped"),
    [
        (LINKED, (0, 0), [(2, REST)]),  # the second of two that are linked edits what the first has edited
        (LINKED, (0, 1), [(1, REST), (2, FIRST)]),
        (partial(two, VanillaIntervention, [[0, 1], [1, 3]]), (0, 0), [(2, FIRST)]),
        (partial(two, VanillaIntervention, [[0, 1], [1, 3]]), (0, 1), [(1, FIRST), (2, REST)]),
    ],
)
def test_two_interventions_swap_subspaces_of_one_place(mlp: Any, config: Any, chosen: Any, swapped: Any) -> None:
    sources = [vectors(1), vectors(2)]
    _, outcome = IntervenableModel(config(), mlp)(
        vectors(0),
        sources,
        {"sources->base": ([PLACES, PLACES], [PLACES, PLACES])},
        subspaces=[[[part]] * 10 for part in chosen],
    )
    golden = with_subspaces(mlp, vectors(0), [(sources[number - 1], part) for number, part in swapped])
    assert same(outcome[0], golden, mlp(**vectors(0))[0])


@pytest.mark.parametrize("which", [0, 1])
def test_an_intervention_without_source_and_places_is_left_out(mlp: Any, which: int) -> None:
    def only(value: Any) -> list[Any]:
        return [value if number == which else None for number in range(2)]

    _, outcome = IntervenableModel(LINKED(), mlp)(
        vectors(0), only(vectors(1)), {"sources->base": (only(PLACES), only(PLACES))}, subspaces=only(PLACES)
    )
    assert same(outcome[0], with_subspaces(mlp, vectors(0), [(vectors(1), REST)]), mlp(**vectors(0))[0])
    with pytest.raises(ValueError, match="needs a source and has none"):
        both = ([PLACES, PLACES], [PLACES, PLACES])
        IntervenableModel(LINKED(), mlp)(vectors(0), only(vectors(1)), {"sources->base": both})


def test_what_has_a_source_is_not_left_out(mlp: Any) -> None:
    intervenable = IntervenableModel(place("mlp_activation", kind=VanillaIntervention), mlp)
    key = intervenable.sorted_keys[0]
    for locations in ({"sources->base": ([None], [None])}, {"sources->base": (None, [None])}):
        with pytest.raises(ValueError, match="the location of mlp_activation at layer 0 is None"):
            intervenable(vectors(0), unit_locations=locations, source_representations={key: torch.ones(3)})
        with pytest.raises(ValueError, match="is None"):
            intervenable(vectors(0), [vectors(1)], locations)


@pytest.mark.parametrize("error", [IndexError, ValueError])
def test_places_for_one_of_two_are_an_index_error_as_in_pyvene(mlp: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="lists locations for 1 representation, but there are 2"):
        IntervenableModel(LINKED(), mlp)(vectors(0), [vectors(1)], {"sources->base": ([PLACES], [PLACES])}, subspaces=0)


def test_rotations_of_one_place_train(mlp: Any) -> None:
    config = two(LowRankRotatedSpaceIntervention, [[0, 1], [1, 2]], low_rank_dimension=2)
    intervenable = IntervenableModel(config, mlp)
    locations = {"sources->base": ([PLACES, PLACES], [PLACES, PLACES])}
    outcome = intervenable(vectors(0), [vectors(1), vectors(2)], locations, subspaces=[PLACES, [[1]] * 10])[1]
    outcome[0].sum().backward()
    assert all(parameter.grad is not None for parameter in intervenable.get_trainable_parameters())


def test_vectors_are_taken_whole_without_locations(mlp: Any) -> None:
    """As pyvene does where it knows of no positions."""
    item = IntervenableModel(place("block_output"), mlp)
    golden = edited(mlp, mlp.mlp.h[0], Tensor.zero_, vectors(0))
    assert same(item(vectors(0))[1][0], golden, mlp(**vectors(0))[0])


# -- the GRU: one edit for each step asked for ---------------------------------------------------------------------------


@pytest.fixture
def gru() -> Any:
    torch.manual_seed(0)
    return pyvene.create_gru_classifier(pyvene.GRUConfig(h_dim=8, pdrop=0.0))[2].eval()


def sequences(seed: int, batch: int = BATCH) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.rand(batch, 6, 8, generator=torch.Generator().manual_seed(seed))}


CELLS: dict[str, tuple[str, slice]] = {
    "cell_output": ("", slice(None)),
    "h2h_output": ("h2h", slice(None)),
    "update_x2h_output": ("x2h", slice(8, 16)),
    "reset_gate_output": ("reset_act", slice(None)),
}


def at_steps(gru: Any, component: str, edit: Callable[[Tensor, int], None], inputs: dict[str, Tensor]) -> Tensor:
    """Call `edit` on the component in each step of layer 1."""
    path, part = CELLS[component]
    steps = iter(range(6))
    module = gru.gru.cells[1].get_submodule(path)
    return edited(gru, module, lambda tensor: edit(tensor[:, part], next(steps)), inputs)


ROWS = [[[3]] * BATCH, [[1, 4]] * BATCH, [[0, 2], [1, 3], [2, 5]]]


@pytest.mark.parametrize("component", list(CELLS))
@pytest.mark.parametrize("rows", ROWS)
def test_a_recurrent_model_is_edited_at_its_steps_and_no_others(
    gru: Any, component: str, rows: list[list[int]]
) -> None:
    def zero(tensor: Tensor, step: int) -> None:
        for example, row in enumerate(rows):
            if step in row:
                tensor[example] = 0

    base = sequences(0)
    intervenable = IntervenableModel(place(component, "t", layer=1), gru)
    ours = intervenable(base, unit_locations={"base": [rows]})[1][0]
    assert same(ours, at_steps(gru, component, zero, base), gru(**base)[0])


@pytest.mark.parametrize("component", list(CELLS))
@pytest.mark.parametrize("rows", ROWS)
def test_steps_of_a_source_are_swapped_into_steps_of_the_base(gru: Any, component: str, rows: list[list[int]]) -> None:
    base, source, seen = sequences(0), sequences(1), []
    at_steps(gru, component, lambda tensor, _: seen.append(tensor.clone()), source)
    froms = [[step + 1 if step < 5 else 3 for step in row] if len(row) == 1 else [0, 5] for row in rows]

    def swap(tensor: Tensor, step: int) -> None:
        for example, (of_source, of_base) in enumerate(zip(froms, rows, strict=True)):
            if step in of_base:
                tensor[example] = seen[of_source[of_base.index(step)]][example]

    intervenable = IntervenableModel(place(component, "t", VanillaIntervention, layer=1), gru)
    ours = intervenable(base, [source], {"sources->base": ([froms], [rows])})[1][0]
    assert same(ours, at_steps(gru, component, swap, base), gru(**base)[0])
    again = intervenable(base, [source], {"sources->base": ([froms], [rows])})[1][0]
    assert torch.equal(ours, again)


def test_steps_are_read_as_asked_or_all_of_them(gru: Any) -> None:
    seen: list[Tensor] = []
    at_steps(gru, "cell_output", lambda tensor, _: seen.append(tensor.clone()), sequences(0))
    intervenable = IntervenableModel(place("cell_output", "t", CollectIntervention, layer=1), gru)
    for locations, steps in (({"base": 3}, [3]), ({"base": [1, 2, -1]}, [1, 2, 5]), (None, range(6))):
        (_, found), _ = intervenable(sequences(0), unit_locations=locations)
        assert all(torch.equal(own, seen[step]) for own, step in zip(found, steps, strict=True))


def test_a_vector_goes_into_a_step_and_a_rotation_trains(gru: Any) -> None:
    base, vector = sequences(0), torch.arange(8.0)

    def add(tensor: Tensor, step: int) -> None:
        if step == 2:
            tensor += vector

    adding = IntervenableModel(place("cell_output", "t", AdditionIntervention, layer=1), gru)
    ours = adding(base, unit_locations={"base": 2}, source_representations=vector)[1][0]
    assert same(ours, at_steps(gru, "cell_output", add, base), gru(**base)[0])
    rotating = IntervenableModel(place("cell_output", "t", RotatedSpaceIntervention, layer=1), gru)
    outcome = rotating(
        base, [sequences(1)], {"sources->base": ([[[1, 3]] * BATCH], [[[2, 4]] * BATCH])}, subspaces=[[[0]] * BATCH]
    )
    outcome[1][0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in rotating.get_trainable_parameters())


# -- families that pyvene, or a user, maps -------------------------------------------------------------------------------


SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}


def esm() -> EsmModel:
    return EsmModel(EsmConfig(**SIZES, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary"))


def gpt_neo() -> GPTNeoForCausalLM:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 20}
    return GPTNeoForCausalLM(
        GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], max_position_embeddings=32)
    )


def olmo() -> OlmoForCausalLM:
    return OlmoForCausalLM(OlmoConfig(**SIZES, num_key_value_heads=2, pad_token_id=1))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4))


@pytest.fixture(autouse=True)
def users_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"mlp_output": ("encoder.block[%s].layer[1]", "register_forward_hook")}
    monkeypatch.setitem(pyvene.type_to_module_mapping, T5ForConditionalGeneration, places)
    monkeypatch.setitem(pyvene.type_to_dimension_mapping, T5ForConditionalGeneration, {"mlp_output": ("d_model",)})


# The component, where it is, and which slice of its last axis each head is (None: it has no heads).
AT: list[tuple[Callable[[], Any], str, str, bool, int | None]] = [
    (esm, "block_output", "encoder.layer.1", False, None),
    (esm, "query_output", "encoder.layer.1.attention.self.query", False, None),
    (esm, "attention_value_output", "encoder.layer.1.attention.output", True, None),
    (gpt_neo, "mlp_output", "transformer.h.1.mlp", False, None),
    (gpt_neo, "attention_output", "transformer.h.1.attn", False, None),
    (olmo, "block_output", "model.layers.1", False, None),
    (olmo, "key_output", "model.layers.1.self_attn.k_proj", False, None),
    (olmo, "head_value_output", "model.layers.1.self_attn.v_proj", False, 4),
    (olmo, "head_attention_value_output", "model.layers.1.self_attn.o_proj", True, 4),
    (t5, "mlp_output", "encoder.block.1.layer.1", False, None),
]


def tokens(seed: int, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 30, (BATCH, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0], [4], [5]])
    return inputs


@pytest.mark.parametrize(("make", "component", "path", "before", "d_head"), AT)
def test_what_pyvene_maps_equals_plain_hooks(
    make: Any, component: str, path: str, before: bool, d_head: int | None
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    base, source, module = tokens(0, model), tokens(1, model), model.get_submodule(path)
    seen: list[Tensor] = []
    for inputs in (source, base):
        edited(model, module, lambda tensor: seen.append(tensor.clone()), inputs, before=before)
    heads, froms, rows = [[1], [0], [1]], [[1, 2], [3, 0], [4, 5]], [[2, 6], [0, 1], [3, 5]]

    def parts(tensor: Tensor, positions: list[list[int]]) -> Iterator[tuple[int, int, slice]]:
        for example, row in enumerate(positions):
            for position in row:
                head = heads[example][0]
                yield example, position, slice(None) if d_head is None else slice(head * d_head, (head + 1) * d_head)

    def zero(tensor: Tensor) -> None:
        for where in parts(tensor, rows):
            tensor[where] = 0

    def swap(tensor: Tensor) -> None:
        for at, to in zip(parts(tensor, froms), parts(tensor, rows), strict=True):
            tensor[to] = seen[0][at]

    def locations(positions: list[list[int]]) -> list[Any]:
        return [positions] if d_head is None else [[heads, positions]]

    unit = "pos" if d_head is None else "h.pos"
    clean = model(**base)[0]
    intervenable = IntervenableModel(place(component, unit, layer=1), model)
    ours = intervenable(base, unit_locations={"base": locations(rows)})[1][0]
    assert same(ours, edited(model, module, zero, base, before=before), clean)
    intervenable = IntervenableModel(place(component, unit, VanillaIntervention, layer=1), model)
    ours = intervenable(base, [source], {"sources->base": (locations(froms), locations(rows))})[1][0]
    assert same(ours, edited(model, module, swap, base, before=before), clean)
    intervenable = IntervenableModel(place(component, unit, CollectIntervention, layer=1), model)
    (_, (found,)), _ = intervenable(base, unit_locations={"base": locations(rows)})
    golden = torch.stack([seen[1][where] for where in parts(seen[1], rows)]).reshape(BATCH, 2, -1)
    assert torch.equal(found.reshape(BATCH, 2, -1), golden)


def test_a_rotation_trains_where_pyvene_has_the_width() -> None:
    model = olmo().eval()
    rows = [[[2]] * BATCH]
    intervenable = IntervenableModel(place("block_output", kind=RotatedSpaceIntervention, layer=1), model)
    outcome = intervenable(
        tokens(0, model), [tokens(1, model)], {"sources->base": (rows, rows)}, subspaces=[[[0, 1]] * BATCH]
    )
    outcome[1].logits.sum().backward()
    assert all(parameter.grad is not None for parameter in intervenable.get_trainable_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("use_cache", [True, False])
def test_new_tokens_are_steered_with_and_without_a_cache(use_cache: bool) -> None:
    torch.manual_seed(0)
    model = gpt_neo().eval()
    prompt, vector = tokens(0, model), 3 * torch.randn(16)
    adding = IntervenableModel(
        [place("mlp_output", kind=AdditionIntervention, layer=layer) for layer in range(2)], model
    )
    settings = {"do_sample": False, "max_new_tokens": 5, "use_cache": use_cache, "pad_token_id": 1}
    _, ours = adding.generate(prompt, source_representations=vector, **settings)
    ids = prompt["input_ids"]
    for _ in range(5):

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :7], output[:, 7:] + vector], 1)

        handles = [block.mlp.register_forward_hook(add) for block in model.transformer.h]
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        for handle in handles:
            handle.remove()
    assert torch.equal(ours, ids)
    assert not torch.equal(ours, model.generate(**prompt, **settings))


def test_a_module_of_any_model_is_named_by_its_path() -> None:
    class Images(nn.Module):
        """Neither tokens nor an entry in any mapping."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.first, self.last = None, nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)

        def forward(self, pixels: Tensor) -> tuple[Tensor]:
            return (self.last(self.first(pixels).relu()),)

    model, base = Images(), {"pixels": torch.rand(2, 1, 8, 8)}
    item = RepresentationConfig(component="first.output", intervention=lambda base, source: base * 2)
    ours = IntervenableModel(item, model)(base)[1][0]
    assert same(ours, edited(model, model.first, lambda tensor: tensor.mul_(2), base), model(**base)[0])


def test_a_static_location_holds_for_the_whole_batch_as_with_use_fast() -> None:
    model, base, source = random_model("gpt2"), random_inputs((9,) * 10), random_inputs((9,) * 10, seed=1)
    intervenable = IntervenableModel(place("block_output", kind=VanillaIntervention), model, use_fast=True)
    once = intervenable(base, [source], {"sources->base": ([[[4]]], [[[5]]])})[1].logits
    each = intervenable(base, [source], {"sources->base": ([[[4]] * 10], [[[5]] * 10])})[1].logits
    assert torch.equal(once, each) and not torch.equal(once, model(**base).logits)


# -- the model afterwards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True])
def test_hooks_and_flags_are_as_before(raises: bool, gru: Any) -> None:
    seen: list[int] = []
    gru.gru.cells[0].register_forward_hook(lambda *_: seen.append(1))
    gru.train()
    before = hooks(gru), [module.training for module in gru.modules()]

    def fail(base: Tensor, source: Any) -> Tensor:
        if raises:
            raise RuntimeError("in the middle")
        return base * 0

    item = RepresentationConfig(1, "cell_output", "t", intervention=fail)
    intervenable = IntervenableModel(item, gru)
    for _ in range(2):
        if raises:
            with pytest.raises(RuntimeError, match="in the middle"):
                intervenable(sequences(0), unit_locations={"base": 2})
        else:
            intervenable(sequences(0), unit_locations={"base": 2})
        assert (hooks(gru), [module.training for module in gru.modules()]) == before
    assert seen and all(parameter.requires_grad for parameter in gru.parameters())


def test_what_is_saved_comes_back(gru: Any, tmp_path: Any) -> None:
    intervenable = IntervenableModel(place("cell_output", "t", RotatedSpaceIntervention, layer=1), gru)
    intervenable.save(str(tmp_path))
    loaded = IntervenableModel.load(str(tmp_path), gru)
    call = (sequences(0), [sequences(1)], {"sources->base": 2})
    assert torch.equal(intervenable(*call)[1][0], loaded(*call)[1][0])


# -- what is refused -----------------------------------------------------------------------------------------------------

WRONG_PLACES: list[tuple[Callable[[], Any], RepresentationConfig, str]] = [
    (esm, place("nothing"), "no model card covers EsmModel, and pyvene's .* has only block_input, .*not 'nothing'"),
    (lambda: nn.Linear(2, 2), place("weight"), "type_to_module_mapping has nothing for it, not 'weight': name .* by its path"),
    (esm, place("block_output", layer=2), r"EsmModel has no block_output at layer 2: .* at encoder.layer\[%s\]"),
    (esm, place("block_output", layer=None), "EsmModel has no block_output at layer None"),
    (esm, place("encoder.layer[7].output"), r"EsmModel has no module 'encoder.layer\[7\]'"),
    (esm, place("encoder.layer[1]"), r"must end in .input or .output"),
    (esm, place("block_output", "t"), "unit 't' of block_output is wrong for EsmModel; use 'pos' or 'h' or 'h.pos'"),
    (gpt_neo, place("query_output"), r"has no query_output at layer 0: .* at transformer.h\[%s\].attn.q_proj, which print"),
    (esm, place("block_output", kind=RotatedSpaceIntervention), "needs a component of known width, which block_output of EsmM"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "item", "message"), WRONG_PLACES)
def test_wrong_places_are_refused_before_anything_runs(make: Any, item: RepresentationConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntervenableModel(item, make())


WRONG_LOCATIONS: list[tuple[RepresentationConfig, Any, str]] = [
    (place("block_output"), {"base": 7}, r"position 7 of block_output of OlmoForCausalLM is out of range: .*\[3, 7, 16\]"),
    (place("block_output"), {"base": -1}, "position -1 of block_output at layer 0: only in a model with a card"),
    (place("block_output"), {"base": [[[1]] * 2]}, "locations for 2 examples, but base has 3"),
    (place("block_output"), {"base": [None]}, "the location of block_output at layer 0 is None"),
    (place("block_output", "h"), {"base": [[[1]] * 3]}, r"unit 'h' needs an activation \[batch head pos d\], and block_output"),
    (place("head_key_output"), {"base": 1}, r"unit 'pos' needs an activation \[batch pos d\], and head_key_output"),
    (place("head_key_output", "h"), {"base": [[[2]] * 3]}, r"head 2 of head_key_output .*\[3, 2, 7, 4\]"),
    (place("head_key_output", "h.pos"), {"base": [[[[1]] * 3, [[9]] * 3]]}, "position 9 of head_key_output"),
    (place("key_output", kind=RotatedSpaceIntervention), {"base": 1}, "needs a source and has none"),
]  # fmt: skip


@pytest.mark.parametrize(("item", "locations", "message"), WRONG_LOCATIONS)
def test_wrong_locations_are_refused_in_one_sentence(item: RepresentationConfig, locations: Any, message: str) -> None:
    model = olmo().eval()
    before = hooks(model)
    with pytest.raises(ValueError, match=message):
        IntervenableModel(item, model)(tokens(0, model), unit_locations=locations)
    assert hooks(model) == before


def test_a_width_that_is_wrong_in_pyvene_is_said_to_be() -> None:
    model = olmo().eval()
    rotating = IntervenableModel(place("key_output", kind=RotatedSpaceIntervention, layer=1), model)
    with pytest.raises(
        ValueError, match=r"key_output of OlmoForCausalLM has width 8, and pyvene's .* says 16: correct"
    ):
        rotating(tokens(0, model), [tokens(1, model)], {"sources->base": 1})


def test_a_part_of_a_modules_output_needs_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stateless(nn.Module):
        """With an entry for half of what a layer gives."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.layer = None, nn.Linear(3, 4)

        def forward(self, inputs_embeds: Tensor) -> tuple[Tensor]:
            return (self.layer(inputs_embeds),)

    places: dict[str, Any] = {"half": ("layer", "register_forward_hook", (split_half, 1))}
    places["heads"] = ("layer", "register_forward_hook", (split_head_and_permute, "n_head"))
    monkeypatch.setitem(pyvene.type_to_module_mapping, Stateless, places)
    model, base = Stateless(), {"inputs_embeds": torch.rand(2, 5, 3)}
    with pytest.raises(ValueError, match="half of Stateless is a part of what its module gives: list its places"):
        IntervenableModel(place("half"), model)(base)
    ours = IntervenableModel(place("half"), model)(base, unit_locations={"base": [[[1], [4]]]})[1][0]
    golden = model(**base)[0].clone()
    golden[0, 1, 2:] = golden[1, 4, 2:] = 0
    assert torch.equal(ours, golden)
    with pytest.raises(ValueError, match=r"heads of Stateless is split by n_head, which .* does not give: set"):
        IntervenableModel(place("heads", "h"), model)


@pytest.mark.parametrize(
    ("kind", "locations", "message"),
    [
        (ZeroIntervention, {"base": 6}, "position 6 of cell_output at layer 1 is out of range"),
        (ZeroIntervention, {"base": [[[2, 1]] * 3]}, r"the steps \[2, 1\] of cell_output at layer 1 must ascend"),
        (CollectIntervention, {"base": [[[1], [2], [1]]]}, "is collected at other steps in other examples"),
    ],
)
def test_wrong_steps_are_refused(gru: Any, kind: type, locations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntervenableModel(place("cell_output", "t", kind, layer=1), gru)(sequences(0), unit_locations=locations)


def test_wrong_batches_and_generation_are_refused() -> None:
    model = t5().eval()
    intervenable = IntervenableModel(place("mlp_output"), model)
    with pytest.raises(ValueError, match="base must be a dict of the tensors that the model's forward takes"):
        intervenable({}, unit_locations={"base": 1})
    with pytest.raises(ValueError, match="generate of T5ForConditionalGeneration needs a card"):
        intervenable.generate(tokens(0, model), intervene_on_prompt=True, unit_locations={"base": 1})


def test_there_is_nothing_to_verify() -> None:
    with pytest.raises(ValueError, match="EsmModel has no model card, so that there is nothing to verify"):
        verify_card(esm())
