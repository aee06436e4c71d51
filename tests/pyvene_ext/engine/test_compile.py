"""Every ablation, run through pyvene, equals the hand-written hooks of `tests/ground_truth/ablations.py`."""

from __future__ import annotations

from functools import cache

import pytest
import pyvene
import torch
from torch import Tensor

from modelcards import n_kv_heads
from pyvene_ext.engine.compile import compile_spec
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.seeds import rng
from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.tokenized import PaddingSide
from pyvene_ext.specs.ablation import Ablation, donors
from pyvene_ext.specs.joint import Spec, members, spec_name
from tests.ground_truth import ablations as slow
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, FEWER, random_model

torch.set_num_threads(1)

PROMPTS = random_prompts((9, 6, 7, 9, 6, 7))  # batches of 4 are padded, and every length has two prompts to resample
EQUAL = random_prompts((8, 8, 8), seed=1)
SETS = {"unequal": PROMPTS, "equal": EQUAL}
SITES = ("z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "embed")
EDITS = (
    {"kind": "zero"},
    {"kind": "mean"},
    {"kind": "resample", "seed": 3},
    {"kind": "noise", "seed": 5},
    {"kind": "noise", "noise": "norm_matched"},
)
# Positions that begin at the first real token are learned in GPT-2 and rotary in the others.
PADDED = [
    *((family, "left") for family in FAMILIES),
    ("gpt2", "right"),
    ("gemma2", "right"),
    *(pytest.param(family, "right", marks=pytest.mark.slow) for family in ("qwen2_5", "llama3_1", "mistral")),
]
POSITIONS = ("all", "last", ("s1", -2, 0))


def _at(site: str) -> dict:
    """A layer, and heads that lie in different groups; the last layer has a window wherever a family has any."""
    where: dict = {} if site == "embed" else {"layer": 2 if site == "scores" else 1}
    return where | ({"heads": (0, 3)} if site in ("z", "scores") else {})


def _specs() -> list[Spec]:
    specs: list[Spec] = [
        Ablation(site=site, positions=positions, **edit, **_at(site))
        for site in SITES
        for edit in EDITS
        for positions in POSITIONS
    ]
    specs += [
        Ablation(site=site, kind="mean", mean="per_position", positions=positions, **_at(site))
        for site in SITES
        for positions in POSITIONS[1:]
    ]
    specs += [
        Ablation(site="scores", kind=kind, positions=positions, **_at("scores"))
        for kind in ("zero", "mean")
        for positions in POSITIONS
    ]
    joint = (
        Ablation(kind="zero", site="z", layer=1, heads=(2,)),
        Ablation(kind="mean", site="z", layer=1, heads=(0,), positions="last"),
        Ablation(kind="mean", site="scores", layer=2, heads=(1,)),
        Ablation(kind="noise", noise="norm_matched", site="mlp_out", layer=0),
    )
    return [*specs, joint]


@cache
def _model(family: str):
    """The tiny model of a family; "family/eager" chooses the attention implementation."""
    name, _, implementation = family.partition("/")
    return random_model(name, attn_implementation=implementation or None)


@cache
def _activations(family: str, prompts: str, site: str, layer: int | None) -> list[Tensor]:
    return [slow.activation(_model(family), ids, site, layer) for ids in SETS[prompts].input_ids]


@cache
def _expected(family: str, prompts: str, spec: Spec) -> list[Tensor]:
    """Logits `[pos vocab]` of every prompt under a spec."""
    return [
        slow.logits(_model(family), ids, [_change(family, prompts, a, prompt) for a in members(spec)])
        for prompt, ids in enumerate(SETS[prompts].input_ids)
    ]


def _change(family: str, name: str, a: Ablation, prompt: int) -> tuple[str, int | None, slow.Change]:
    """What one ablation does to one prompt: a site, a layer and a function of the activation there."""
    prompts = SETS[name]
    ids = prompts.input_ids[prompt]
    tokens = token_indices(prompts, prompt, a.positions)
    if a.site == "scores":
        uniform_or_nothing = (lambda z, uniform: 0 * z) if a.kind == "zero" else (lambda z, uniform: uniform)
        return "scores", a.layer, slow.replaced(tokens, a.heads, uniform_or_nothing)
    everywhere = _activations(family, name, a.site, a.layer)
    mean, std = slow.statistics(everywhere)
    eps = torch.zeros_like(everywhere[prompt])
    for head in a.heads or (None,):
        draw = rng(a.seed, "noise", a.site, str(a.layer), str(head), prompt)
        own = slice(None) if head is None else (slice(None), head)
        eps[own] = torch.from_numpy(draw.standard_normal((len(ids), eps.shape[-1]))).float()

    def new(x: Tensor) -> Tensor:
        made = x.clone()
        match a.kind, a.noise, a.mean:
            case "zero", _, _:
                return torch.zeros_like(x)
            case "noise", "norm_matched", _:
                return eps / eps.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
            case "noise", "gaussian", _:
                return mean + std * eps
            case "mean", _, "over_tokens":
                return mean.expand_as(x)
            case "mean", _, "per_position":
                rows = [activation[token_indices(prompts, i, a.positions)] for i, activation in enumerate(everywhere)]
                made[tokens] = torch.stack(rows).mean(0)
            case "resample", _, _:
                giver = donors(prompts, prompts, a.positions, a.seed)[prompt]
                made[tokens] = everywhere[giver][token_indices(prompts, giver, a.positions)]
        return made

    return a.site, a.layer, slow.replaced(tokens, a.heads, new)


def _compare(
    family: str,
    name: str,
    specs: list[Spec],
    padding_side: PaddingSide,
    engine: type[pyvene.IntervenableModel] = IntervenableModel,
) -> None:
    model, prompts = _model(family), SETS[name]
    resolved = resolve(specs, model, prompts).with_statistics(progress=False)
    for batch in prompts.batches(4, padding_side):
        for spec in specs:
            compiled = compile_spec(spec, batch, resolved)
            iv = engine(compiled.config, model)
            with torch.no_grad():
                _, output = iv(
                    batch.inputs(),
                    unit_locations=compiled.unit_locations,
                    source_representations=compiled.source_representations(iv.sorted_keys),
                )
            for row, prompt in enumerate(batch.index):
                real = output.logits[row][batch.attention_mask[row].bool()]
                expected = _expected(family, name, spec)[prompt]
                where = f"{family} {spec_name(spec)}, prompt {prompt}, padding {padding_side}"
                torch.testing.assert_close(real, expected, atol=1e-5, rtol=1e-5, msg=lambda m, w=where: f"{w}: {m}")


@pytest.mark.parametrize("every", [pytest.param(4, marks=pytest.mark.slow), 11])
@pytest.mark.parametrize(("family", "padding_side"), PADDED)
def test_every_ablation_equals_hooks_on_single_prompts(family: str, padding_side: PaddingSide, every: int) -> None:
    """A quarter of them, in `make test` every eleventh, on each family and padding side others."""
    first = FAMILIES.index(family) + len(FAMILIES) * (padding_side == "right")
    specs = _specs()
    _compare(family, "unequal", [*specs[first % every :: every], specs[-1]], padding_side)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_under_eager_attention_equal_hooks(family: str) -> None:
    specs = [spec for spec in _specs() if isinstance(spec, tuple) or spec.site == "scores"]
    _compare(f"{family}/eager", "unequal", specs, "left")


def kv_specs(family: str) -> list[Spec]:
    """Every kind at k and v, in the last K/V head and in all; all of a position's keys and values at once."""
    count = n_kv_heads(_model(family).config)
    every = tuple(range(count))
    places: list[dict] = [{"layer": 2, "heads": (count - 1,)}, {"layer": 0, "heads": every}]
    specs: list[Spec] = [
        Ablation(site=site, positions=positions, **edit, **places[(number + (site == "k")) % 2])
        for site in ("k", "v")
        for number, edit in enumerate((*EDITS, {"kind": "mean", "mean": "per_position"}))
        for positions in (POSITIONS if "mean" not in edit else POSITIONS[1:])
    ]
    return [
        *specs,
        tuple(
            Ablation(kind="noise", site=site, layer=layer, heads=every, positions="s1", seed=1)
            for layer in range(3)
            for site in ("k", "v")
        ),
    ]


@pytest.mark.parametrize("every", [pytest.param(4, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(("family", "padding_side"), PADDED)
def test_keys_and_values_equal_hooks_on_single_prompts(family: str, padding_side: PaddingSide, every: int) -> None:
    _compare(family, "unequal", kv_specs(family)[FAMILIES.index(family) % every :: every], padding_side)


@pytest.mark.parametrize("family", FEWER)
def test_mean_per_position_over_all_positions_equals_hooks(family: str) -> None:
    specs: list[Spec] = [Ablation(kind="mean", mean="per_position", site=site, **_at(site)) for site in SITES]
    _compare(family, "equal", specs, "left")


def test_stock_pyvene_runs_the_compiled_configs_where_it_is_right() -> None:
    specs: list[Spec] = [
        Ablation(site="z", layer=1, heads=(0, 3), positions=positions, **edit)
        for edit in EDITS[:3]
        for positions in POSITIONS
    ]
    specs.append((specs[0], Ablation(kind="mean", site="z", layer=2, heads=(1,))))
    _compare("llama3_1", "unequal", specs, "right", pyvene.IntervenableModel)


@pytest.mark.slow
def test_each_ablation_changes_the_logits() -> None:
    """Otherwise the comparisons above would compare nothing."""
    model = _model("llama3_1")
    for spec in _specs():
        for ids, logits in zip(PROMPTS.input_ids, _expected("llama3_1", "unequal", spec), strict=True):
            assert (logits - slow.logits(model, ids)).abs().max() > 1e-3, spec


def test_donors_are_a_derangement_within_each_length() -> None:
    for seed in range(20):
        for positions in ("all", "last"):
            givers = donors(PROMPTS, PROMPTS, positions, seed)
            assert sorted(givers) == list(range(6)) and all(giver != i for i, giver in enumerate(givers))
        lengths = [len(ids) for ids in PROMPTS.input_ids]
        assert [lengths[giver] for giver in donors(PROMPTS, PROMPTS, "all", seed)] == lengths
    assert len({tuple(donors(PROMPTS, PROMPTS, "last", seed)) for seed in range(20)}) > 10


def test_donors_of_another_set_are_never_the_prompt_itself() -> None:
    overlapping = random_prompts((9, 6, 7, 9, 6, 7, 8))  # begins with the same six prompts
    for seed in range(20):
        givers = donors(PROMPTS, overlapping, "last", seed)
        assert all(overlapping.input_ids[giver] != ids for giver, ids in zip(givers, PROMPTS.input_ids, strict=True))


def test_a_prompt_without_a_donor_is_named_with_the_remedy() -> None:
    lonely = random_prompts((6, 6, 7))
    with pytest.raises(ValueError, match=r"prompt 2 cannot be resampled.*its length \(7 tokens\).*positions=\"last\""):
        donors(lonely, lonely, "all", 0)
    donors(lonely, lonely, "last", 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Ablation(kind="zero", site="mlp_out", layer=0, positions="verb"), "prompt 0 has no position 'verb'"),
        (Ablation(kind="zero", site="mlp_out", layer=0, positions=(6,)), "position 6 lies outside prompt 1"),
        (Ablation(kind="zero", site="mlp_out", layer=0, positions=("s2", -2)), "the same token of prompt 0"),
        (Ablation(kind="mean", mean="per_position", site="mlp_out", layer=0), "equal length"),
        (Ablation(kind="zero", site="mlp_out", layer=3), "layers 0 to 2"),
        (Ablation(kind="zero", site="z", layer=0, heads=(6,)), "6 query heads .* sharing 3 K/V heads"),
    ],
)
def test_what_cannot_run_is_refused_before_it_does(spec: Ablation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve([spec], _model("llama3_1"), PROMPTS)


def test_a_reference_set_of_another_length_is_refused_where_positions_are_aligned() -> None:
    spec = Ablation(kind="mean", mean="per_position", site="z", layer=0, heads=(0,))
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens and the reference prompts have 8"):
        resolve([spec], _model("llama3_1"), PROMPTS, EQUAL)
    resolve([spec], _model("llama3_1"), random_prompts((8, 8), seed=7), EQUAL)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_mean_by_position_over_the_prompt_itself_alone_is_refused(positions: str) -> None:
    fields = {"kind": "mean", "site": "mlp_out", "layer": 0, "positions": positions}
    other = Ablation(**fields)  # its check must not stand for the next one's
    spec, model, alone = Ablation(**fields, mean="per_position"), _model("llama3_1"), random_prompts((8,))
    for source in (None, alone):
        with pytest.raises(
            ValueError, match="the mean over one prompt at each position is the prompt's own activation"
        ):
            resolve([other, spec], model, alone, source)
    resolve([spec], model, alone, random_prompts((8,), seed=7))


def test_replacements_come_from_the_given_reference_set() -> None:
    model = _model("llama3_1")
    spec = Ablation(kind="mean", site="mlp_out", layer=1, positions="last")
    reference = Reference.compute(model, EQUAL, [("mlp_out", 1)])
    batch = next(PROMPTS.batches(2))
    (replacement,) = compile_spec(spec, batch, resolve([spec], model, PROMPTS, reference=reference)).replacements
    expected, _ = slow.statistics([slow.activation(model, ids, "mlp_out", 1) for ids in EQUAL.input_ids])
    assert replacement is not None
    torch.testing.assert_close(replacement[:, 0], expected.expand(2, -1))
    with pytest.raises(ValueError, match="need reference statistics"):
        compile_spec(spec, batch, resolve([spec], model, PROMPTS))
