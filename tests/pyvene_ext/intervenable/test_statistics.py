from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pyvene_ext.intervenable.statistics import Reference, label
from pyvene_ext.prompts.positions import token_indices
from tests.ground_truth import ablations as slow
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model

torch.set_num_threads(1)

PROMPTS = random_prompts((9, 6, 7, 9, 6))
EQUAL = random_prompts((8, 8, 8), seed=1)
PLACES = (
    ("z", 1),
    ("attn_out", 0),
    ("mlp_out", 2),
    ("resid_pre", 1),
    ("resid_mid", 1),
    ("resid_post", 2),
    ("embed", None),
)


class Forwards:
    """How often a model ran."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_the_statistics_of_every_place(family: str) -> None:
    model = random_model(family)
    forwards = Forwards(model)
    reference = Reference.compute(
        model, PROMPTS, PLACES, position_means=("s1", -2, 0), bank=("last", "s1"), batch_size=2
    )
    assert forwards.count == 3
    for place in PLACES:
        activations = [slow.activation(model, ids, *place) for ids in PROMPTS.input_ids]
        mean, std = slow.statistics(activations)
        torch.testing.assert_close(reference.mean(place), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reference.std(place), std, atol=1e-5, rtol=1e-5)
        for position in ("s1", -2, 0):
            rows = [rows[token_indices(PROMPTS, i, position)] for i, rows in enumerate(activations)]
            torch.testing.assert_close(
                reference.position_mean(place, position), torch.stack(rows).mean(0), atol=1e-5, rtol=1e-5
            )
        for prompt, rows in enumerate(activations):
            kept = reference.rows(place, prompt, ("s1", "last"))
            torch.testing.assert_close(kept, rows[token_indices(PROMPTS, prompt, ("s1", -1))], atol=1e-5, rtol=1e-5)


def test_means_of_every_token_need_prompts_of_equal_length() -> None:
    model = random_model("llama3_1")
    reference = Reference.compute(model, EQUAL, PLACES[:1], position_means=("all",))
    expected = torch.stack([slow.activation(model, ids, "z", 1) for ids in EQUAL.input_ids]).mean(0)
    torch.testing.assert_close(reference.position_mean(("z", 1), "all"), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="reference prompt 1 has 6 tokens and prompt 0 has 9"):
        Reference.compute(model, PROMPTS, PLACES[:1], position_means=("all",))


def test_a_model_in_bfloat16_is_summed_in_float64_and_banked_as_it_is() -> None:
    model = random_model("llama3_1").bfloat16()
    reference = Reference.compute(model, PROMPTS, [("z", 1)], bank=("all",), batch_size=1)
    rows = torch.cat([slow.activation(model, ids, "z", 1) for ids in PROMPTS.input_ids])
    assert reference.tensors["bank/z.1"].dtype == torch.bfloat16
    torch.testing.assert_close(reference.tensors["bank/z.1"], rows)
    torch.testing.assert_close(reference.mean(("z", 1)), rows.double().mean(0).float(), atol=0, rtol=1e-6)


def test_the_numbers_do_not_depend_on_batches() -> None:
    model = random_model("gemma2")
    one, many = (Reference.compute(model, PROMPTS, PLACES, batch_size=size) for size in (1, 5))
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, many.tensors[name], atol=1e-5, rtol=1e-5)


def test_a_second_call_reads_the_cache_and_runs_nothing(tmp_path: Path) -> None:
    model = random_model("qwen2_5")
    forwards = Forwards(model)

    def compute(**changes) -> Reference:
        return Reference.compute(
            model, **{"prompts": PROMPTS, "places": PLACES, "bank": ("last",), **changes}, cache_dir=tmp_path
        )

    first = compute()
    ran = forwards.count
    second = compute()
    assert forwards.count == ran
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]

    for change in ({"prompts": EQUAL}, {"places": PLACES[:2]}, {"bank": ("all",)}, {"position_means": (-1,)}):
        before = forwards.count
        compute(**change)
        assert forwards.count > before, change
    for edit in ("weight", "config"):  # a RoPE base is no weight
        if edit == "weight":
            with torch.no_grad():
                model.model.norm.weight.add_(1e-3)
        else:
            model.config.rms_norm_eps = 1e-3
        before = forwards.count
        compute()
        assert forwards.count > before, edit


@pytest.mark.parametrize("damage", ["half", "empty", "foreign"])
def test_a_damaged_cache_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    model = random_model("llama3_1")
    first = Reference.compute(model, PROMPTS, PLACES[:2], cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "foreign":
        Reference.compute(model, EQUAL, PLACES[:2], cache_dir=tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(whole[: len(whole) // 2 if damage == "half" else 0])
    again = Reference.compute(model, PROMPTS, PLACES[:2], cache_dir=tmp_path)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert path.read_bytes() == whole


def test_what_is_missing_is_named() -> None:
    reference = Reference.compute(random_model("llama3_1"), PROMPTS, [("z", 1)], bank=("last",))
    reference.require([("z", 1)], (), ("last",))
    with pytest.raises(ValueError, match=r"without z\.2 in places"):
        reference.require([("z", 1), ("z", 2)], (), ())
    with pytest.raises(ValueError, match="without s1 in bank"):
        reference.require([("z", 1)], (), ("s1",))
    with pytest.raises(ValueError, match="without -1 in position_means"):
        reference.require([("z", 1)], (-1,), ())


def test_activations_that_are_not_finite_are_refused() -> None:
    model = random_model("llama3_1")
    with torch.no_grad():
        model.model.embed_tokens.weight[PROMPTS.input_ids[0][0]] = torch.inf
    with pytest.raises(ValueError, match=r"activations of mlp_out\.0 are not finite"):
        Reference.compute(model, PROMPTS, [("mlp_out", 0)])


def test_collecting_leaves_the_model_as_it_was() -> None:
    model = random_model("gpt2").train()
    model.transformer.h[1].eval()
    Reference.compute(model, PROMPTS, PLACES)
    assert model.training and not model.transformer.h[1].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels() -> None:
    assert [label(place) for place in (("z", 3), ("embed", None))] == ["z.3", "embed"]


@pytest.mark.parametrize(("places", "rows"), [((("z", 0),), 1), ((("z", 0), ("logits", None)), 9)])
def test_the_vocabulary_is_computed_at_one_token_a_prompt_unless_logits_are_asked_for(places: tuple, rows: int) -> None:
    model = random_model("gpt2")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    Reference.compute(model, PROMPTS, places, batch_size=5, progress=False)
    assert seen == [rows]
