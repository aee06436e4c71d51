"""Forced attention against rows made by hand (tests/ground_truth/forced_attention.py), in both engines and in generation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyvene_ext.engine.compile import compile_spec
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.intervenable.interventions import ForcedRowsIntervention
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.tokenized import PaddingSide, TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.files import from_yaml, load_specs, save_specs
from pyvene_ext.specs.forced_attention import ForcedAttention, force
from pyvene_ext.specs.joint import Spec, members, spec_name
from tests.ground_truth import forced_attention as slow
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model
from tests.traces import traces

torch.set_num_threads(1)

LENGTHS = (12, 7, 9, 12, 7, 9)


def _with_blocks(prompts: TokenizedPrompts) -> TokenizedPrompts:
    """Blocks of another length and place in every prompt: "open" to "close", and "mid" in them."""
    positions = []
    for i, (ids, named) in enumerate(zip(prompts.input_ids, prompts.positions, strict=True)):
        first, last = i % 3, len(ids) - 1 - i % 2
        at = {"open": first, "close": last, "mid": (first + last) // 2}
        positions.append({**named, **{name: token - len(ids) for name, token in at.items()}})
    return replace(prompts, positions=tuple(positions))


PROMPTS = _with_blocks(random_prompts(LENGTHS))


@cache
def _model(family: str, implementation: str | None = None) -> Any:
    return random_model(family, attn_implementation=implementation)


def _specs() -> list[Spec]:
    """Windows are shorter than the blocks (4 tokens in Gemma 2 and Mistral, 5 in the last layer of Qwen 2.5)."""
    block = ("open", "close")
    shapes: list[dict[str, Any]] = [{"shape": shape} for shape in ("uniform", "sequential")]
    shapes += [{"shape": "hub", "hub": hub} for hub in ("open", "mid", "close", -3)]
    specs: list[Spec] = [
        ForcedAttention(layer=layer, heads=(1, 3), block=block, hard=hard, **shape)
        for shape in shapes
        for hard in (False, True)
        for layer in (0, 2)
    ]
    return [
        *specs,
        ForcedAttention(layer=1, heads=(0,), block=("mid", "mid"), shape="hub", hub="mid", hard=True),
        ForcedAttention(layer=1, heads=(2,), block=(2, -1), shape="uniform"),
        (
            ForcedAttention(layer=1, heads=(0,), block=block, shape="sequential"),
            ForcedAttention(layer=1, heads=(1, 2), block=(1, "mid"), shape="uniform", hard=True),
            ForcedAttention(layer=2, heads=(0, 1, 2), block=block, shape="hub", hub="mid"),
        ),
    ]


def _by_hand(spec: Spec, prompt: int) -> list[slow.Forced]:
    def token(place: Any) -> Any:
        return None if place is None else token_indices(PROMPTS, prompt, place)[0]

    return [
        slow.Forced(a.layer or 0, a.heads or (), a.shape, *map(token, (*a.block, a.hub)), a.hard)
        for a in members(spec)
        if isinstance(a, ForcedAttention)
    ]


@cache
def _expected(family: str, spec: Spec, prompt: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    return slow.logits(_model(family, "eager"), PROMPTS.input_ids[prompt], _by_hand(spec, prompt))


def _everywhere(config: Any) -> list[Spec]:
    block = ("open", "close")
    return [
        force(config, shape="hub", hub="mid", block=block),
        force(config, shape="sequential", block=block, hard=True),
        force(config, [0, 2], shape="uniform", block=block),
    ]


@pytest.mark.parametrize(
    ("family", "implementation", "padding_side"),
    [
        *((family, "eager", "left") for family in FAMILIES),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (("gemma2", "eager", "right"), ("mistral", "eager", "right"))
        ),
        *(pytest.param(family, None, "left", marks=pytest.mark.slow) for family in ("mistral", "gpt2")),  # sdpa
    ],
)
def test_logits_and_rows_equal_those_made_by_hand(
    family: str, implementation: str | None, padding_side: PaddingSide
) -> None:
    model, eager = _model(family, implementation), implementation == "eager"
    specs = _specs()
    specs = [*specs[FAMILIES.index(family) % 3 :: 3], specs[-1], *_everywhere(model.config)]
    resolved = resolve(specs, model, PROMPTS)
    for batch in PROMPTS.batches(4, padding_side):
        clean = model(**batch.inputs()).logits
        for spec in specs:
            compiled = compile_spec(spec, batch, resolved)
            iv = IntervenableModel(compiled.config, model)
            with torch.no_grad():
                _, output = iv(
                    {**batch.inputs(), "output_attentions": eager},
                    unit_locations=compiled.unit_locations,
                    source_representations=compiled.source_representations(iv.sorted_keys),
                )
            assert (output.logits - clean).abs().max() > 1e-3
            for row, prompt in enumerate(batch.index):
                logits, patterns = _expected(family, spec, prompt)
                real, where = batch.attention_mask[row].bool(), f"{spec_name(spec)}, prompt {prompt}"
                torch.testing.assert_close(output.logits[row][real], logits, atol=3e-5, rtol=1e-5, msg=where)
                for layer, pattern in patterns.items() if eager else ():
                    got = output.attentions[layer][row][:, real]
                    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:-1]), atol=1e-6, rtol=0, msg=where)
                    torch.testing.assert_close(got[..., real], pattern, atol=1e-5, rtol=0, msg=where)
                    assert ((pattern == 0) == (got[..., real] == 0)).all(), where


def test_some_blocks_are_longer_than_the_windows_and_some_heads_see_everything() -> None:
    """Else half of what is said above would not be tested."""

    def hides(family: str, layer: int) -> bool:
        spec = force(_model(family).config, [layer], shape="uniform", block=("open", "close"))
        pattern = _expected(family, spec, 0)[1][layer][0]
        return bool((pattern[11] == 0).any())

    found = {family: [hides(family, layer) for layer in (0, 1, 2)] for family in FAMILIES}
    assert found == {
        "qwen2_5": [False, False, True],
        "gemma2": [True, False, True],
        "llama3_1": [False, False, False],
        "mistral": [True, True, True],
        "gpt2": [False, False, False],
    }


@pytest.mark.parametrize("memory", [None, 500_000])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral/eager"])
def test_the_sweep_engine_gives_what_the_plain_one_gives(family: str, memory: int | None) -> None:
    name, _, implementation = family.partition("/")
    model = _model(name, implementation or None)
    ids = [list(row) for row in PROMPTS.input_ids]
    ids[3][:10] = ids[0][:10]  # a beginning in common, which is run once
    prompts = replace(PROMPTS, input_ids=tuple(map(tuple, ids)))
    noise = Ablation(kind="noise", noise="norm_matched", site="v", layer=0, heads=(0,), positions="open")
    specs = [*_specs(), *_everywhere(model.config), noise]
    specs += [(*force(model.config, [1], shape="uniform", block=("open", "close")), noise)]
    uniform = Ablation(kind="mean", site="scores", layer=1, heads=(1,), positions="last")
    specs += [(ForcedAttention(layer=1, heads=(0,), shape="uniform", block=(2, -1), hard=True), uniform)]
    plain = run(model, specs, prompts, progress=False)
    fast = sweep(model, specs, prompts, memory=memory, progress=False)
    assert fast.names == plain.names and (np.abs(plain.delta).max(1) > 1e-3).mean() > 0.7
    for spec, got, wanted in zip(fast.names, fast.intervened, plain.intervened, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5, err_msg=spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_step_by_step_without_one(family: str) -> None:
    model, new = _model(family), 4
    spec = force(model.config, shape="hub", hub="mid", block=("open", "close"))
    (batch,) = PROMPTS.batches(6)
    compiled = compile_spec(spec, batch, resolve([spec], model, PROMPTS))
    iv = IntervenableModel(compiled.config, model)
    _, tokens = iv.generate(
        batch.inputs(),
        unit_locations=compiled.unit_locations,
        source_representations=compiled.source_representations(iv.sorted_keys),
        intervene_on_prompt=True,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    eager = _model(family, "eager")
    for row, prompt in enumerate(batch.index):
        ids = list(PROMPTS.input_ids[prompt])
        for _ in range(new):
            logits = slow.logits(eager, ids, _by_hand(spec, prompt))[0][-1]
            end = model.generation_config.eos_token_id  # kept from ending by min_new_tokens
            logits[[] if end is None else end] = -torch.inf
            ids.append(int(logits.argmax()))
        assert tokens[row, batch.input_ids.shape[1] :].tolist() == ids[-new:]


def test_a_mass_that_rounds_to_nothing_is_still_moved_into_the_block() -> None:
    """Visible is what the mask shows, not where a peaked softmax has left something."""
    pattern = torch.tensor([[[[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]]], dtype=torch.float16)
    rows = torch.zeros(1, 1, 4, 5)
    rows[0, 0, 3] = torch.tensor([0.0, 2, 3, 2, 0.2])
    out = ForcedRowsIntervention()(pattern, rows)
    assert out.dtype == torch.float16 and torch.equal(out[..., :3, :], pattern[..., :3, :])
    torch.testing.assert_close(out[0, 0, 3].float(), torch.tensor([0.0, 0, 0.8, 0.2]), atol=1e-3, rtol=0)


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    model = random_model("mistral")
    spec = force(model.config, shape="uniform", block=("open", "close"))
    before = traces(model)
    run(model, [spec], PROMPTS, progress=False)
    assert traces(model) == before
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    before = traces(model)
    for engine in (run, sweep):
        with pytest.raises(ZeroDivisionError):
            engine(model, [spec], PROMPTS, progress=False)  # type: ignore[operator]
        assert traces(model) == before
    handle.remove()


def test_the_clean_pattern_is_what_mass_is_taken_from() -> None:
    """The definition in numbers: of a query that sees three tokens of the block and one before it."""
    model, seen = _model("llama3_1", "eager"), {}
    read_patterns(model, PROMPTS.take([1]), lambda layer, _, x: seen.update({layer: x[0].clone()}), progress=False)
    row = seen[0][1, 5]  # prompt 1: open is 1, close is 5, mid is 3
    spec = ForcedAttention(layer=0, heads=(1,), block=(3, 5), shape="hub", hub=4)
    forced = slow.Forced(0, (1,), "hub", 3, 5, 4, False)
    mass = row[3:6].sum()
    by_hand = torch.cat([row[:3], mass * torch.tensor([0.1, 0.8, 0.1]), row[6:]])
    torch.testing.assert_close(slow.forced_row(row, 5, forced), by_hand)
    got = run(model, [spec], PROMPTS.take([1]), progress=False).intervened[0, 0]
    logits = slow.logits(model, PROMPTS.input_ids[1], [forced])[0][-1]
    io, s = PROMPTS.answer_ids[1]
    assert got == pytest.approx(float(logits[io] - logits[s]), abs=1e-5)


# --- the spec ---

FIELDS: dict[str, Any] = {"shape": "hub", "layer": 1, "heads": (2, 0), "block": ("open", "close"), "hub": "mid"}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_specs_survive_a_file_and_have_names_of_their_own(tmp_path: Path, suffix: str) -> None:
    specs = [*_specs(), ForcedAttention(**FIELDS)]
    save_specs(tmp_path / f"specs.{suffix}", specs)
    assert load_specs(tmp_path / f"specs.{suffix}") == specs
    assert len({*map(spec_name, specs)}) == len(specs) == len({*specs})
    assert from_yaml("- {kind: force, shape: sequential, layer: 1, heads: [0], block: [2, -1], hard: true}") == [
        ForcedAttention(shape="sequential", layer=1, heads=(0,), block=(2, -1), hard=True)
    ]
    assert specs[-1].name == "pattern.1.0,2@open..close:hub@mid"  # type: ignore[union-attr]
    assert ForcedAttention(shape="uniform", layer=0, heads=(1,), block=(0, 3), hard=True).name == (
        "pattern.0.1@0..3:uniform/hard"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "ring"}, "shape must be 'hub', 'uniform' or 'sequential', not 'ring'"),
        ({"hub": None}, "hub attention needs a hub"),
        ({"shape": "uniform"}, "uniform attention has no hub: leave hub out"),
        (
            {"block": (3, 2), "hub": 3},
            "from its first token to its last, with the hub in it, unlike 3 to 2 with the hub at 3",
        ),
        ({"block": (3, 2), "shape": "uniform", "hub": None}, "unlike 3 to 2."),
        ({"block": (3, 6), "hub": 7}, "with the hub at 7"),
        ({"block": (-6, -3), "hub": -7}, "with the hub at -7"),
        ({"block": (3,)}, "block.1 is missing"),
        ({"block": ("open", "mid", "close")}, "at most 2 items"),
        ({"block": ("all", "close")}, "given by single tokens, not by 'all'"),
        ({"hub": "all"}, "given by single tokens, not by 'all'"),
        ({"positions": "last"}, "leave positions out"),
        ({"heads": None}, "several; px.specs.force(model.config, ...) forces every head of every layer."),
        ({"layer": None}, "pattern needs a layer"),
        ({"site": "scores"}, "no forced attention of 'scores'"),
    ],
)
def test_what_no_model_could_run_is_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ForcedAttention(**FIELDS | fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mixed_integers_wait_for_the_prompts() -> None:
    ForcedAttention(**FIELDS | {"block": (0, -1), "hub": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hub": 0}, r"pattern.1.0,2@open..close:hub@0: the hub of prompt 1 is token 0, outside its block, .* 1 to 5"),
        ({"hub": "end"}, "the hub of prompt 1 is token 6, outside its block, which has tokens 1 to 5"),
        (
            {"block": ("mid", 4)},
            "the block of prompt 0 is empty, because its first token is token 5 and its last token 4",
        ),
        (
            {"block": ("close", "open")},
            "the block of prompt 0 is empty, because its first token is token 11 and its last token 0",
        ),
        ({"block": ("open", 11)}, "position 11 lies outside prompt 1, which has 7 tokens"),
        ({"hub": "middle"}, "prompt 0 has no position 'middle'; choose among close, end"),
        ({"layer": 3}, "layer 3 is out of range"),
        ({"heads": (6,)}, "head 6 is out of range, the model has 6 query heads"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_runs(fields: dict[str, Any], message: str) -> None:
    model = random_model("llama3_1")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for engine in (run, sweep):
        with pytest.raises(ValueError, match=message):
            engine(model, [ForcedAttention(**FIELDS | fields)], PROMPTS, progress=False)  # type: ignore[operator]


def test_a_head_is_forced_once_and_screens_say_that_they_cannot() -> None:
    with pytest.raises(ValueError, match="each once"):
        members((ForcedAttention(**FIELDS), ForcedAttention(**FIELDS | {"block": (0, 1), "hub": 0})))
    with pytest.raises(ValueError, match="no first-order estimate; run it with sweep"):
        estimate(_model("llama3_1"), [ForcedAttention(**FIELDS)], PROMPTS, progress=False)
