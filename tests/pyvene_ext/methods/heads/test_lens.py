"""The logit lens and the parts of a logit against formulas written out in float64, on activations that plain hooks read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import Gemma2ForCausalLM

from pyvene_ext.engine.plain import run
from pyvene_ext.methods.heads.lens import (
    Attribution,
    Lens,
    Parts,
    direct_logit_attribution,
    logit_lens,
)
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.specs.ablation import Ablation
from tests.ground_truth import ablations as slow
from tests.pretended_devices import PretendedDevices, spread
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, VOCAB, random_model, tiny_config

PROMPTS = random_prompts((9, 6, 7, 6, 11))
IOI = Path(__file__).parents[4] / "pyvene_ext/prompts/data/ioi_en.json"


# -- by hand -----------------------------------------------------------------------------------------------------------


def norm_by_hand(norm: Any, x: Tensor, scale_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a norm makes of x with the scale that `scale_of` (x itself by default) gives it, and the bias that it adds."""
    of = x if scale_of is None else scale_of
    if isinstance(norm, nn.LayerNorm):
        variance = ((of - of.mean()) ** 2).mean()
        return (x - x.mean()) / (variance + norm.eps).sqrt() * norm.weight.double(), norm.bias.double()
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = 1 + norm.weight.double() if "Gemma" in type(norm).__name__ else norm.weight.double()
    return x / ((of**2).mean() + eps).sqrt() * weight, torch.zeros_like(x)


def final_norm_of(model: Any) -> Any:
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


def head_by_hand(model: Any, hidden: Tensor) -> Tensor:
    """Logits `[vocab]` of a residual stream `[d]`."""
    normed, bias = norm_by_hand(final_norm_of(model), hidden.double())
    logits = model.lm_head.weight.double() @ (normed + bias)
    if model.lm_head.bias is not None:
        logits = logits + model.lm_head.bias.double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def lens_by_hand(model: Any, ids: tuple[int, ...], answers: tuple[int, int], token: int) -> np.ndarray:
    """For every depth: the logits of IO and S, the probability of IO, its rank."""
    places = [("embed", None), *(("resid_post", layer) for layer in range(3))]
    rows = []
    for place in places:
        logits = head_by_hand(model, slow.activation(model, ids, *place)[token])
        better = sum(float(logit) > float(logits[answers[0]]) for logit in logits)
        rows.append([*logits[list(answers)], logits.softmax(0)[answers[0]], 1 + better])
    return np.array(rows, dtype=float)


@torch.no_grad()
def parts_by_hand(model: Any, ids: tuple[int, ...], answer: int) -> dict[str, np.ndarray]:
    """Every part of the logit of one answer in front of any soft-cap."""

    def last(site: str, layer: int | None) -> Tensor:
        return slow.activation(model, ids, site, layer)[-1].double()

    final_norm, unembed = final_norm_of(model), model.lm_head.weight[answer].double()
    end = last("resid_post", 2)

    def share(x: Tensor) -> float:
        return float(norm_by_hand(final_norm, x, end)[0] @ unembed)

    bias = float(norm_by_hand(final_norm, end)[1] @ unembed)
    if model.lm_head.bias is not None:
        bias += float(model.lm_head.bias[answer])
    heads: list[list[float]] = []
    for layer in range(3):
        at = slow.parts(model, layer)
        weight = at.project.weight.double()
        by_head = (
            weight.view(5, 7, -1) if hasattr(model, "transformer") else weight.T.view((*last("z", layer).shape, -1))
        )
        added = [z @ own for z, own in zip(last("z", layer), by_head, strict=True)]
        own_bias = torch.zeros_like(end) if at.project.bias is None else at.project.bias.double()
        if hasattr(at.block, "post_feedforward_layernorm"):  # its scale is that of the whole attention output
            whole = sum(added) + own_bias
            added = [norm_by_hand(at.block.post_attention_layernorm, x, whole)[0] for x in added]
            own_bias = norm_by_hand(at.block.post_attention_layernorm, own_bias, whole)[0]
        heads.append([share(x) for x in added])
        bias += share(own_bias)
    if hasattr(model, "transformer"):
        embed = (model.transformer.wte.weight[ids[-1]] + model.transformer.wpe.weight[len(ids) - 1]).double()
    else:
        embed = last("embed", None)
    mlps = [share(last("mlp_out", layer)) for layer in range(3)]
    return {
        name: np.array(x) for name, x in (("heads", heads), ("mlps", mlps), ("embed", share(embed)), ("bias", bias))
    }


def compare(model: Any, found: Attribution, prompts: Any = PROMPTS) -> None:
    """Hold every part to its hand recomputation, and the sums to the model's own logits."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    for prompt, (ids, answers) in enumerate(zip(prompts.input_ids, prompts.answer_ids, strict=True)):
        io, s = (parts_by_hand(model, ids, answer) for answer in answers)
        own = slow.logits(model, ids)[-1][list(answers)].numpy()
        for name in io:
            np.testing.assert_allclose(getattr(found.logit, name)[..., prompt], io[name], atol=1e-5, err_msg=name)
            difference = getattr(found.logit_diff, name)[..., prompt]
            np.testing.assert_allclose(difference, io[name] - s[name], atol=1e-5, err_msg=name)
        sums = np.array([sum(part.sum() for part in answer.values()) for answer in (io, s)])
        assert found.logit.total[prompt] == pytest.approx(sums[0], abs=1e-5)
        assert found.logit_diff.total[prompt] == pytest.approx(sums[0] - sums[1], abs=1e-5)
        np.testing.assert_allclose(sums if cap is None else cap * np.tanh(sums / cap), own, atol=1e-5)
        assert found.logit.capped[prompt] == pytest.approx(own[0], abs=1e-5)
        assert found.logit_diff.capped[prompt] == pytest.approx(own[0] - own[1], abs=1e-5)


# -- the logit lens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position", ["last", "s1", 0])
def test_the_lens_equals_norm_and_unembedding_written_out(family: str, position: str | int) -> None:
    model = random_model(family)
    expected = []
    for ids, answers, named in zip(PROMPTS.input_ids, PROMPTS.answer_ids, PROMPTS.positions, strict=True):
        expected.append(lens_by_hand(model, ids, answers, named[position] if isinstance(position, str) else position))
    io, s, probability, rank = np.array(expected).transpose(2, 1, 0)
    for batch_size in (1, 3):
        lens = logit_lens(model, PROMPTS, position, batch_size=batch_size, progress=False)
        assert lens.logits.shape == (4, 2, len(PROMPTS)) and lens.logits.dtype == np.float32
        np.testing.assert_allclose(lens.logits, np.stack([io, s], 1), atol=2e-5)
        np.testing.assert_allclose(lens.logit_diff, io - s, atol=2e-5)
        np.testing.assert_allclose(lens.probability, probability, atol=1e-5)
        np.testing.assert_array_equal(lens.rank, rank)
    assert len(np.unique(rank)) > 3 and rank.min() >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_depth_is_what_the_model_says(family: str) -> None:
    model = random_model(family)
    lens = logit_lens(model, PROMPTS, batch_size=2, progress=False)
    for prompt, (ids, answers) in enumerate(zip(PROMPTS.input_ids, PROMPTS.answer_ids, strict=True)):
        own = slow.logits(model, ids)[-1]
        np.testing.assert_allclose(lens.logits[-1, :, prompt], own[list(answers)].numpy(), atol=1e-5)
        assert lens.probability[-1, prompt] == pytest.approx(float(own.softmax(0)[answers[0]]), abs=1e-6)


@pytest.mark.parametrize("measure", [logit_lens, direct_logit_attribution])
def test_logits_of_every_position_are_never_made(measure: Callable[..., Any]) -> None:
    model, made = random_model("gemma2"), []
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.numel()))
    measure(model, PROMPTS, batch_size=5, progress=False)
    assert made and max(made) <= 5 * VOCAB


def test_the_lens_of_an_offloaded_model_is_the_same() -> None:
    expected = logit_lens(random_model("gpt2"), PROMPTS, progress=False)
    offloaded = cpu_offload(random_model("gpt2"), execution_device=torch.device("cpu"))
    np.testing.assert_allclose(logit_lens(offloaded, PROMPTS, progress=False).logits, expected.logits, atol=1e-6)


@pytest.mark.parametrize(
    ("position", "told"),
    [
        ("all", "reads one position of every prompt, not 'all'"),
        (("s1", "s2"), "reads one position of every prompt"),
        ("verb", "prompt 0 has no position 'verb'; choose among end, last, s1, s2"),
        (6, "position 6 lies outside prompt 1, which has 6 tokens"),
    ],
)
def test_a_position_that_the_lens_cannot_read_is_one_sentence(position: Any, told: str) -> None:
    with never_running(random_model("qwen2_5")) as model, pytest.raises(ValueError, match=told):
        logit_lens(model, PROMPTS, position, progress=False)


# -- direct logit attribution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_part_equals_its_hand_recomputation_and_they_sum_to_the_logit(family: str, batch_size: int) -> None:
    model = random_model(family)
    found = direct_logit_attribution(model, PROMPTS, batch_size=batch_size, progress=False)
    n_heads = model.config.num_attention_heads
    for parts in (found.logit, found.logit_diff):
        assert {name: array.shape for name, array in vars(parts).items()} == {
            "heads": (3, n_heads, 5), "mlps": (3, 5), "embed": (5,), "bias": (5,), "total": (5,), "capped": (5,)
        }  # fmt: skip
        assert all(array.dtype == np.float32 for array in vars(parts).values())
    compare(model, found)
    # Each kind of part says something, else forgetting one would go unseen.
    assert min(np.abs(x).max() for x in (found.logit.heads, found.logit.mlps, found.logit.embed)) > 0.01
    assert np.abs(found.logit.bias).max() > 0.01 if family in ("gpt2", "llama3_1") else not found.logit.bias.any()


def test_the_bias_of_a_projection_goes_through_the_post_norm() -> None:
    config = tiny_config("gemma2")
    config.attention_bias = True
    torch.manual_seed(1)
    model = with_random_weights(Gemma2ForCausalLM(config))
    found = direct_logit_attribution(model, PROMPTS, progress=False)
    compare(model, found)
    assert np.abs(found.logit.bias).min() > 1e-3


def test_the_bias_of_the_unembedding_counts() -> None:
    model: Any = random_model("llama3_1")
    expected = direct_logit_attribution(model, PROMPTS, progress=False)
    model.lm_head.bias = nn.Parameter(torch.arange(VOCAB) / 10)
    found = direct_logit_attribution(model, PROMPTS, progress=False)
    compare(model, found)
    more = np.array([io for io, _ in PROMPTS.answer_ids]) / 10
    np.testing.assert_allclose(found.logit.bias, expected.logit.bias + more, atol=1e-5)
    np.testing.assert_allclose(found.logit_diff.bias, expected.logit_diff.bias + 0.1, atol=1e-5)


def test_the_soft_cap_is_behind_what_is_attributed() -> None:
    model = random_model("gemma2")
    found = direct_logit_attribution(model, PROMPTS, progress=False)
    np.testing.assert_allclose(found.logit.capped, 3 * np.tanh(found.logit.total / 3), atol=1e-5)
    assert np.abs(found.logit.capped - found.logit.total).max() > 0.1
    model = random_model("mistral")
    found = direct_logit_attribution(model, PROMPTS, progress=False)
    np.testing.assert_allclose(found.logit_diff.capped, found.logit_diff.total, atol=1e-5)


@pytest.mark.parametrize("name", first_only(["tiny-gemma2", "tiny-qwen2.5"]))
def test_the_total_on_shipped_prompts_is_the_clean_logit_difference_of_a_run(name: str) -> None:
    model, tokenizer = load_model(name)
    prompts = PromptSet.load(IOI).tokenize(tokenizer)
    clean = run(model, Ablation(kind="zero", site="z", layer=0, heads=(0,)), prompts, progress=False).baseline
    found = direct_logit_attribution(model, prompts, batch_size=16, progress=False).logit_diff
    assert len(prompts) == 100 and np.abs(clean).mean() > 1
    cap = model.config.final_logit_softcapping if name == "tiny-gemma2" else None
    np.testing.assert_allclose(found.capped, clean, rtol=1e-4, atol=1e-4)
    if cap is None:
        np.testing.assert_allclose(found.total, clean, rtol=1e-4, atol=1e-4)
    sums = found.heads.sum((0, 1)) + found.mlps.sum(0) + found.embed + found.bias
    np.testing.assert_allclose(found.total, sums, rtol=1e-4, atol=1e-4)
    lens = logit_lens(model, prompts, batch_size=16, progress=False)
    np.testing.assert_allclose(lens.logit_diff[-1], clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_model_is_taken_apart_in_float32_and_sums_to_its_own_rounding(family: str) -> None:
    model = random_model(family).bfloat16()
    found = direct_logit_attribution(model, PROMPTS, batch_size=1, progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    cap = getattr(model.config, "final_logit_softcapping", None)
    for prompt, (ids, (answer, _)) in enumerate(zip(PROMPTS.input_ids, PROMPTS.answer_ids, strict=True)):
        # Of the activations as they are, rounded; only the sum of heads that a post-norm sees is not rounded by hand.
        rtol = 4e-3 if family == "gemma2" else 1e-4
        for name, part in parts_by_hand(model, ids, answer).items():
            np.testing.assert_allclose(
                getattr(found.logit, name)[..., prompt], part, rtol=rtol, atol=1e-5, err_msg=name
            )
        own = float(slow.logits(model, ids)[-1][answer])
        total = float(found.logit.total[prompt])
        assert (total if cap is None else cap * np.tanh(total / cap)) == pytest.approx(own, abs=0.05)
        assert found.logit.capped[prompt] == pytest.approx(own, abs=0.02)


# -- what does not add up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-2, 1.0, float("nan")])
def test_what_something_else_adds_to_the_residual_stream_is_an_error(size: float) -> None:
    model: Any = random_model("mistral")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + size * output.abs())
    with pytest.raises(ValueError, match=r"the parts of prompt \d's logit sum to|finite activations"):
        direct_logit_attribution(model, PROMPTS, progress=False)


def test_what_something_else_adds_may_be_no_more_than_rounding() -> None:
    model: Any = random_model("mistral")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * (1 + 1e-6))
    compare(model, direct_logit_attribution(model, PROMPTS, progress=False))


def test_a_final_norm_that_is_not_linear_is_an_error() -> None:
    model: Any = random_model("qwen2_5")
    model.model.norm = nn.Sequential(model.model.norm, nn.Tanh())
    with pytest.raises(ValueError, match=r"the final norm \(Sequential\) is not linear once its scale is frozen"):
        direct_logit_attribution(model, PROMPTS, progress=False)


class Wrapped(nn.Linear):
    """As an adapter's projection would be."""


def test_weights_that_cannot_be_taken_apart_are_an_error_before_anything_runs() -> None:
    for where, told in (("o_proj", "layer 0's output projection"), ("lm_head", "the unembedding")):
        model: Any = random_model("qwen2_5")
        holder = model.model.layers[0].self_attn if where == "o_proj" else model
        plain = getattr(holder, where)
        wrapped = Wrapped(plain.in_features, plain.out_features, bias=False)
        setattr(holder, where, wrapped)
        with never_running(model), pytest.raises(ValueError, match=f"{told} .Wrapped. has no accessible weights"):
            direct_logit_attribution(model, PROMPTS, progress=False)
    offloaded = cpu_offload(random_model("gpt2"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="without quantisation and offloading"):
        direct_logit_attribution(offloaded, PROMPTS, progress=False)


# -- both --------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("measure", [logit_lens, direct_logit_attribution])


@BOTH
def test_bad_input_is_one_sentence_before_anything_runs(measure: Callable[..., Any]) -> None:
    outside = PROMPTS.with_answer_ids(((3, VOCAB), *PROMPTS.answer_ids[1:]))
    nothing = PROMPTS.take(())
    for prompts, options, told in (
        (["a text"], {}, "prompts must be tokenised, not a list"),
        (nothing, {}, "at least one prompt"),
        (PROMPTS, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (outside, {}, f"the answers of prompt 0 have the ids 3 and {VOCAB} but the vocabulary has {VOCAB} tokens"),
    ):
        with never_running(random_model("qwen2_5")) as model, pytest.raises(ValueError, match=told):
            measure(model, prompts, progress=False, **options)
    for cls in ("bare", "classifier"):
        with pytest.raises(ValueError, match="load the model as a causal language model"):
            measure(random_model("gpt2", cls), PROMPTS, progress=False)
    with pytest.raises(ValueError, match="no model card covers Linear"):
        measure(nn.Linear(2, 2), PROMPTS, progress=False)


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_it_was_after_a_run_and_after_an_exception(measure: Callable[..., Any], family: str) -> None:
    model: Any = random_model(family)
    expected = arrays(measure(model, PROMPTS, progress=False))
    model.train()  # GPT-2's dropout would show
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    again = arrays(measure(model, PROMPTS, progress=False))
    assert all(np.array_equal(x, y) for x, y in zip(expected, again, strict=True))
    assert not n_hooks(model) and model.training and all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not any(parameter.is_inference() for parameter in model.parameters())

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    handle = slow.parts(model, 2).block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(model, PROMPTS, progress=False)
    handle.remove()
    assert not n_hooks(model) and all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_spread_over_devices_gives_the_same_numbers(measure: Callable[..., Any], family: str) -> None:
    expected = arrays(measure(random_model(family), PROMPTS, progress=False))
    with PretendedDevices():
        found = arrays(measure(spread(random_model(family)), PROMPTS, progress=False))
    assert all(np.allclose(x, y, atol=1e-6) for x, y in zip(expected, found, strict=True))


@BOTH
def test_activations_that_are_not_finite_are_an_error(measure: Callable[..., Any]) -> None:
    model: Any = random_model("llama3_1")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        measure(model, PROMPTS, progress=False)
    assert not n_hooks(model)


def arrays(found: Lens | Attribution) -> list[np.ndarray]:
    """Everything measured."""
    return [
        array
        for value in vars(found).values()
        if not isinstance(value, str | int)  # where the lens was read
        for array in (vars(value).values() if isinstance(value, Parts) else [value])
        if isinstance(array, np.ndarray)
    ]


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def never_running(model: Any) -> Iterator[Any]:
    """A model whose blocks must not be called."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the model ran")

    handles = [layer.register_forward_pre_hook(refuse) for layer in model.model.layers]
    yield model
    for handle in handles:
        handle.remove()


def with_random_weights(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter))
    return model.eval()
