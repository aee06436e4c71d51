"""Activations read in batches against independent hooks on one prompt at a time; sums; what is kept, saved and refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BatchEncoding

import pyvene_ext as px
from modelcards import COMPONENTS, FIELD_NAMES, card_of, n_layers
from pyvene_ext.engine import reading
from pyvene_ext.engine.reading import Activations, read, read_batches
from pyvene_ext.intervenable.truth import Truth
from tests.random_prompts import random_prompts
from tests.tiny_random import CORE_FAMILIES, MORE_FAMILIES, random_model
from tests.traces import traces

PROMPTS = random_prompts((9, 6, 7))
EQUAL = random_prompts((7, 7, 7), seed=1)
EVERY_FAMILY = (*CORE_FAMILIES, *(family for family in MORE_FAMILIES if family not in CORE_FAMILIES))


def truth(model: Any, prompt: int, component: str, layer: int) -> Tensor:
    """What plain hooks see of one prompt, alone and so without padding: `pos d`, `pos head d`, `head query key`."""
    ids = torch.tensor([PROMPTS.input_ids[prompt]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
    }
    (seen,) = Truth(model).read(inputs, component, layer)
    has_heads = COMPONENTS[component].heads and COMPONENTS[component].width
    return seen.transpose(0, 1) if has_heads else seen


def close(found: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest value; masked scores are -inf in both."""
    largest = max(1.0, float(expected[expected.isfinite()].abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_component_of_every_family_equals_plain_hooks_on_one_prompt_at_a_time(family: str) -> None:
    model = random_model(family)
    components, last = list(card_of(model).mapping(type(model))), n_layers(model.config) - 1
    sides = [
        read(model, PROMPTS, components, batch_size=2, padding_side=side, progress=False) for side in ("left", "right")
    ]
    for component in components:
        for layer in (0, last) if COMPONENTS[component].per_layer else (None,):
            for prompt in range(len(PROMPTS)):
                expected = truth(model, prompt, component, layer or 0)
                for acts in sides:
                    close(acts[component, layer][prompt], expected)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_parts_of_the_residual_stream_sum_to_it(family: str) -> None:
    model = random_model(family)
    acts = read(model, PROMPTS, ("embed", "attn_out", "result", "mlp_out", "resid_post"), batch_size=2, progress=False)
    for layer in range(n_layers(model.config)):
        for by_head in (False, True):
            parts = acts.residual_parts(layer, by_head=by_head)
            assert len(parts) == 1 + (layer + 1) * (2 + by_head * model.config.num_attention_heads)
            for prompt in range(len(PROMPTS)):
                close(sum(part[prompt] for part in parts.values()), acts["resid_post", layer][prompt])
    for prompt in range(len(PROMPTS)):  # a bias of the output projection is the same at every token, as is none
        rest = acts.residual_parts(0, by_head=True)["attn_rest.0"][prompt]
        if card_of(model).post_norm_scale is None:
            close(rest, rest[:1].expand_as(rest))


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["last", "s1", 0, (-1, "s1", 2), ("s2",)])
def test_positions_are_those_of_specs(positions: Any) -> None:
    model = random_model("qwen2_5")
    whole = read(model, PROMPTS, ("z", "resid_mid", "scores", "logits"), batch_size=2, progress=False)
    some = read(
        model, PROMPTS, ("z", "resid_mid", "scores", "logits"), positions=positions, batch_size=2, progress=False
    )
    for prompt, ids in enumerate(PROMPTS.input_ids):
        names = positions if isinstance(positions, tuple) else (positions,)
        wanted = [PROMPTS.positions[prompt][name] if isinstance(name, str) else name for name in names]
        assert some.tokens[prompt] == tuple(token % len(ids) for token in wanted)
        for place in some:
            expected = whole[place][prompt]
            expected = expected[:, wanted] if place[0] == "scores" else expected[wanted]
            torch.testing.assert_close(some[place][prompt], expected, atol=0, rtol=0)


def test_heads_and_layers_are_selected_in_the_order_given() -> None:
    model = random_model("llama3_1")  # six query heads on three K/V heads
    sites = ("z", "k", "pattern", "result", "mlp_out")
    whole = read(model, PROMPTS, sites, progress=False)
    some = read(model, PROMPTS, sites, layers=(2, 0), heads=(2, 0), progress=False)
    assert some.heads == (2, 0) and some.layers("z") == (2, 0)
    assert len(some) == 2 * len(sites)
    for site, layer in some:
        for prompt in range(len(PROMPTS)):
            expected = whole[site, layer][prompt]
            if site != "mlp_out":
                expected = expected[[2, 0]] if site == "pattern" else expected[:, [2, 0]]
            close(some[site, layer][prompt], expected)
    assert read(model, PROMPTS, "v", layers=1, heads=1, progress=False)["v", 1][0].shape == (9, 1, 12)


def test_prompts_of_one_length_are_stacked_and_others_are_not() -> None:
    model = random_model("gpt2")
    equal = read(model, EQUAL, ("z", "pattern", "embed"), progress=False)
    assert equal["z", 0].shape == (3, 7, 5, 7) and equal["pattern", 2].shape == (3, 5, 7, 7)
    assert equal.stack("z").shape == (3, 3, 7, 5, 7)
    torch.testing.assert_close(equal.stack("pattern")[1], equal["pattern", 1])
    ragged = read(model, PROMPTS, ("z", "pattern"), positions="last", progress=False)
    assert ragged.stack("z").shape == (3, 3, 1, 5, 7)
    assert [pattern.shape for pattern in ragged["pattern", 0]] == [(5, 1, 9), (5, 1, 6), (5, 1, 7)]
    with pytest.raises(ValueError, match="pattern differs in shape from prompt to prompt"):
        ragged.stack("pattern")


@pytest.mark.parametrize("name", sorted({name for one in COMPONENTS.values() for name in (one.name, one.site)}))
def test_both_vocabularies_name_a_place(name: str) -> None:
    model = random_model(
        "mixtral" if name in {"router", "router_logits", "expert", "expert_contribution"} else "llama3_1"
    )
    if name == "attention_weight":
        model = random_model("gpt2")
    acts = read(model, EQUAL, name, layers=None, progress=False)
    (site, layer), *_ = acts
    assert FIELD_NAMES.get(site, site) == FIELD_NAMES.get(name, name)
    for other in (site, FIELD_NAMES.get(site, site)):
        assert acts[other, layer] is acts[site, layer]
        assert layer is None or acts.layers(other) == tuple(range(n_layers(model.config)))


def test_a_place_that_was_not_read_is_named() -> None:
    acts = read(random_model("gpt2"), EQUAL, ("z", "embed"), layers=(0, 2), progress=False)
    assert repr(acts) == "Activations of 3 prompts: z 0, 2 [pos head d]; embed [pos d]"
    assert ("z", 1) not in acts and ("nonsense", 1) not in acts and "embed" in acts
    with pytest.raises(KeyError, match=r"\('z', 1\) was not read; there are z 0, 2 \[pos head d\]; embed"):
        acts["z", 1]
    with pytest.raises(ValueError, match="pattern was read at no layer"):
        acts.stack("pattern")
    with pytest.raises(KeyError, match="attn_out"):
        acts.residual_parts(0)


# -- how it is read ----------------------------------------------------------------------------------------------------


def test_one_pass_a_batch_serves_all_sites_and_ends_after_the_last_layer_needed() -> None:
    model, ran = random_model("gemma2"), Counter[str]()
    for name, module in {"model": model, "bare": model.model, **dict(enumerate(model.model.layers))}.items():
        module.register_forward_pre_hook(lambda *_, name=name: ran.update([str(name)]))
    model.model.norm.register_forward_pre_hook(lambda *_: ran.update(["norm"]))
    read(model, PROMPTS, ("pattern", "z", "result", "resid_post"), layers=(0, 1), batch_size=2, progress=False)
    assert ran == {"bare": 2, "0": 2, "1": 2}
    ran.clear()
    read(model, PROMPTS, ("final_norm", "embed"), batch_size=3, progress=False)
    assert ran == {"bare": 1, "0": 1, "1": 1, "2": 1, "norm": 1}
    ran.clear()
    read(model, PROMPTS, "logits", batch_size=3, progress=False)
    assert ran["model"] == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_also_between_batches_and_after_an_error(attention: str) -> None:
    model = random_model("gpt2", attn_implementation=attention).train()  # with dropout
    before = traces(model)
    whole = read(model, PROMPTS, ("pattern", "result"), batch_size=1, progress=False)
    assert traces(model) == before
    for acts in read_batches(model, PROMPTS, ("pattern", "result"), batch_size=1, progress=False):
        assert traces(model) == before
        (prompt,) = acts.prompts
        assert acts.tokens == (tuple(range(len(PROMPTS.input_ids[prompt]))),)
        for place in acts:
            torch.testing.assert_close(acts[place][0], whole[place][prompt], atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"reduce gave a str for pattern\.0; return a tensor"):
        read(model, PROMPTS, "pattern", reduce=lambda x: "text", progress=False)
    assert traces(model) == before


def test_every_prompt_is_in_one_batch() -> None:
    model = random_model("mistral")
    found = [acts.prompts for acts in read_batches(model, PROMPTS, "z", batch_size=2, layers=0, progress=False)]
    assert found == [(1, 2), (0,)]  # the shortest first


def first_key(pattern: Tensor) -> Tensor:
    """The last query's look at the first key, from a pattern that it spoils."""
    kept = pattern[:, -1, 0].clone()
    pattern.zero_()
    return kept


def test_reduce_sees_each_prompt_without_padding_and_decides_what_is_kept() -> None:
    model = random_model("llama3_1").bfloat16()
    whole = read(model, PROMPTS, ("z", "pattern"), dtype=torch.float32, progress=False)
    means = read(
        model, PROMPTS, ("z", "pattern"), reduce=lambda x: x.mean(-1), dtype="float32", batch_size=2, progress=False
    )
    last = read(model, PROMPTS, ("z", "pattern"), reduce={"attention_pattern": first_key}, progress=False)
    for prompt in range(len(PROMPTS)):
        close(means["z", 1][prompt], whole["z", 1][prompt].mean(-1))
        close(means["pattern", 1][prompt], whole["pattern", 1][prompt].mean(-1))
        close(last["pattern", 1][prompt].float(), whole["pattern", 1][prompt][:, -1, 0])
        close(last["z", 1][prompt].float(), whole["z", 1][prompt])
    part = read(model, PROMPTS, "z", layers=0, reduce=lambda x: x[: len(x) // 2], progress=False)["z", 0][0]
    assert (
        part.shape == (4, 6, 12) and part.untyped_storage().nbytes() == part.nbytes
    )  # not the whole that it is part of
    assert last["pattern", 1].shape == (3, 6) and last["z", 1][0].dtype == torch.bfloat16


def test_what_is_kept_is_a_copy_that_can_be_trained_on() -> None:
    model = random_model("falcon")  # whose blocks add attention's output to the MLP's in place
    acts = read(model, EQUAL, ("mlp_out", "attn_out", "resid_pre", "resid_post"), progress=False)
    close(acts["resid_pre", 1] + acts["attn_out", 1] + acts["mlp_out", 1], acts["resid_post", 1])
    weight = torch.ones(acts["resid_post", 1].shape[-1], requires_grad=True)
    (acts["resid_post", 1] @ weight).sum().backward()
    close(weight.grad, acts["resid_post", 1].sum((0, 1)))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["unequal", "equal"])
def test_saved_activations_are_read_back(prompts: Any, tmp_path: Path) -> None:
    model = random_model("gpt2").bfloat16()
    acts = read(model, prompts, ("z", "pattern", "embed", "attention_output"), heads=(3, 1), progress=False)
    acts.save(tmp_path / "new" / "acts.safetensors")
    again = Activations.load(tmp_path / "new" / "acts.safetensors")
    assert list(again) == list(acts)
    assert (again.prompts, again.tokens, again.heads) == (acts.prompts, acts.tokens, (3, 1))
    for place in acts:
        assert isinstance(again[place], Tensor) == isinstance(acts[place], Tensor)
        assert all(torch.equal(*pair) for pair in zip(again[place], acts[place], strict=True))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["acts.safetensors"]


def test_a_file_that_is_not_whole_or_not_ours_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "acts.safetensors"
    read(random_model("gpt2"), EQUAL, "z", progress=False).save(path)
    whole = path.read_bytes()
    for content in (whole[:-100], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"acts.safetensors is not a complete file of activations \(.*\); read"):
            Activations.load(path)
    save_file({"z.0": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a complete file of activations"):
        Activations.load(path)
    with pytest.raises(FileNotFoundError):
        Activations.load(tmp_path / "none.safetensors")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_activations_beyond_the_free_memory_are_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama3_1")
    asked: dict[str, Any] = {"sites": ("z", "pattern", "k", "embed"), "heads": (0, 2), "positions": (0, -1)}
    acts = read(model, PROMPTS, **asked, progress=False)
    size = sum(tensor.nbytes for values in acts.values() for tensor in values)
    monkeypatch.setattr(reading, "free_memory", lambda device: size)
    read(model, PROMPTS, **asked, progress=False)
    monkeypatch.setattr(reading, "free_memory", lambda device: size - 1)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model has run"))
    with pytest.raises(
        ValueError, match=r"take 0\.0 GiB \(z 0\.0\), but 0\.0 GiB are free on cpu: .* from read_batches"
    ):
        read(model, PROMPTS, **asked, progress=False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sites": "hook_resid_post"}, "unknown component 'hook_resid_post' .*did you mean 'resid_post'"),
        ({"sites": ()}, "name at least one site"),
        ({"layers": 3}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"layers": "all"}, "layers are whole numbers, such as 3 or"),
        ({"layers": (1, 1)}, "name one or more layers, each once"),
        ({"heads": 6}, "head 6 is out of range: z has query heads 0 to 5"),
        ({"sites": ("z", "v"), "heads": 4}, "head 4 is out of range: v has K/V heads 0 to 2"),
        ({"sites": "mlp_out", "heads": 0}, "mlp_out has no heads: leave heads out"),
        ({"sites": "logits", "layers": 0}, "logits exists once: leave layers out"),
        ({"positions": "verb"}, "prompt 0 has no position 'verb'"),
        ({"positions": ()}, "name one or more positions"),
        ({"positions": 8}, "position 8 lies outside prompt 1"),
        ({"reduce": {"q": torch.mean}}, "reduce has a function for q, which is not read"),
        ({"device": "abacus"}, "activations cannot be kept on 'abacus'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"prompts": PROMPTS.take([])}, "give at least one prompt"),
        ({"prompts": "text"}, "prompts must be tokenised, not a str"),
        ({"prompts": torch.tensor([[5]])}, r"not a Tensor: TokenizedPrompts.of\(ids, attention_mask\) takes tokens"),
        ({"prompts": BatchEncoding({"input_ids": [[5]]})}, r"not a BatchEncoding: TokenizedPrompts.of"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_before_the_model_runs(asked: dict[str, Any], message: str) -> None:
    model = random_model("llama3_1")
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model has run"))
    for function in (read, read_batches):
        with pytest.raises(ValueError, match=message) as caught:
            function(model, **{"prompts": PROMPTS, "sites": "z", **asked})
        assert "\n" not in str(caught.value)


def test_a_family_without_patterns_says_why() -> None:
    with pytest.raises(ValueError, match="bloom has none, as its attention does not go through"):
        read(random_model("bloom"), PROMPTS, "pattern")


# -- a first hour ------------------------------------------------------------------------------------------------------


def test_patterns_z_head_norms_and_who_looks_at_a_token_take_ten_lines() -> None:
    # -- the ten lines
    model, tokenizer = px.load_model("tiny-gemma2")
    text = "When Lisa and David went to the store, David gave the book to"
    prompt = px.PromptSet([text]).tokenize(tokenizer)
    acts = px.read(model, prompt, ["pattern", "z", "result"], progress=False)
    patterns, z = acts.stack("pattern")[:, 0], acts.stack("z")[:, 0]  # layer head query key, layer pos head d_head
    norms = acts.stack("result")[:, 0, -1].norm(dim=-1)  # layer head
    top = patterns[:, :, -1, 3].flatten().topk(3).indices
    heads = [divmod(int(index), patterns.shape[1]) for index in top]
    # -- the same with hooks, and transformers' own patterns
    seen: dict[Any, Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, at=layer: seen.update({("z", at): args[0][0]}))
        norm = block.post_attention_layernorm
        norm.register_forward_hook(lambda _, args, out, at=layer: seen.update({at: (args[0][0, -1], out[0, -1])}))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor(prompt.input_ids), output_attentions=True)
    close(patterns, torch.cat(out.attentions))
    for layer, block in enumerate(model.model.layers):
        close(z[layer].flatten(1), seen["z", layer])
        before, after = seen[layer]
        by_head, weights = seen["z", layer][-1].chunk(8), block.self_attn.o_proj.weight.detach().chunk(8, 1)
        for head, (own, weight) in enumerate(zip(by_head, weights, strict=True)):
            close(norms[layer, head], (weight @ own * after / before).norm())
    looks = {(layer, head): float(out.attentions[layer][0, head, -1, 3]) for layer in range(6) for head in range(8)}
    assert heads == sorted(looks, key=lambda head: -looks[head])[:3]
