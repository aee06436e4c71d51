"""Information flow routes against loops over heads and sources, by hand, and against a brute-force search of the graph."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CodeGenConfig, CodeGenForCausalLM, PreTrainedModel

from pyvene_ext.intervenable.truth import Truth
from pyvene_ext.methods.heads import flow as flow_module
from pyvene_ext.methods.heads.flow import (
    Flow,
    FlowEdge,
    StreamState,
    flow_routes,
    importances,
    proximity,
    renormalise,
)
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from tests.pretended_devices import PretendedDevices, spread
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model
from tests.traces import traces

PROMPTS = random_prompts((9, 6, 7))
ARRAYS = ("attention", "attn_residual", "mlp", "mlp_residual")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def routes(model: PreTrainedModel, prompts: TokenizedPrompts = PROMPTS, **options: Any) -> Flow:
    return flow_routes(model, prompts, progress=False, **options)


def same(a: Flow, b: Flow) -> bool:
    return all(
        np.allclose(x, y, **CLOSE) for name in ARRAYS for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
    )


# -- ground truth ------------------------------------------------------------------------------------------------------


def near(part: Tensor, node: Tensor) -> float:
    """Proximity, word by word."""
    return max(float(node.abs().sum()) - float((node - part).abs().sum()), 0.0)


@torch.no_grad()
def by_hand(model: Any, ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The importances of one prompt: activations by plain hooks, every head and source by itself, in float64."""
    truth, inputs = Truth(model), {"input_ids": torch.tensor([ids])}
    heads, kv_heads, width = (truth.sizes[name] for name in ("n_head", "n_kv_head", "d_head"))
    layers, length = model.config.num_hidden_layers, len(ids)

    def read(component: str, layer: int) -> Tensor:
        return truth.read(inputs, component, layer)[0].double()

    found = {"attention": np.zeros((layers, heads, length, length))}
    found |= {name: np.zeros((layers, length)) for name in ARRAYS[1:]}
    for layer, block in enumerate(truth.blocks):
        pre, mid, post = (read(name, layer) for name in ("block_input", "resid_mid", "block_output"))
        values, pattern, mlp = (read(name, layer) for name in ("value_output", "attention_pattern", "mlp_contribution"))
        if hasattr(block, "attn"):
            weight, bias = block.attn.c_proj.weight.double(), block.attn.c_proj.bias.double()
        else:
            weight, bias = block.self_attn.o_proj.weight.T.double(), block.self_attn.o_proj.bias
            bias = torch.zeros(weight.shape[1]).double() if bias is None else bias.double()
        scale = torch.ones_like(mid)
        if hasattr(block, "post_feedforward_layernorm"):  # Gemma 2: frozen g / rms of what enters the norm
            entering, norm = read("attention_output", layer), block.post_attention_layernorm
            scale = (1 + norm.weight.double()) / (entering.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        for i in range(length):
            total, near_f = pre[i] + scale[i] * bias, np.zeros((heads, length))
            for h in range(heads):
                kv = h // (heads // kv_heads)
                for j in range(i + 1):
                    value = values[j, kv * width : (kv + 1) * width]
                    f = scale[i] * (pattern[h, i, j] * value @ weight[h * width : (h + 1) * width])
                    total = total + f
                    near_f[h, j] = near(f, mid[i])
            assert torch.allclose(total, mid[i], **CLOSE)  # else the parts by hand are not the parts
            near_pre = near(pre[i], mid[i])
            found["attention"][layer, :, i] = near_f / (near_f.sum() + near_pre)
            found["attn_residual"][layer, i] = near_pre / (near_f.sum() + near_pre)
            near_mlp, near_mid = near(mlp[i], post[i]), near(mid[i], post[i])
            found["mlp"][layer, i] = near_mlp / (near_mlp + near_mid)
            found["mlp_residual"][layer, i] = near_mid / (near_mlp + near_mid)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_importance_equals_its_recomputation_by_hand(family: str) -> None:
    model = random_model(family)
    found = routes(model, batch_size=3)
    for prompt, ids in enumerate(PROMPTS.input_ids):
        for name, expected in by_hand(model, ids).items():
            assert np.allclose(getattr(found, name)[prompt], expected, **CLOSE), (name, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_on_either_side_of_padding_and_alone_have_the_same_importances(family: str) -> None:
    model = random_model(family)
    alone = routes(model, batch_size=1)
    for side in ("left", "right"):
        assert same(routes(model, batch_size=3, padding_side=side), alone)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_eager_and_sdpa_attention_have_the_same_importances(family: str) -> None:
    eager, sdpa = (random_model(family, attn_implementation=name) for name in ("eager", "sdpa"))
    assert same(routes(eager), routes(sdpa))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", ["bare", "classifier"])
def test_the_other_classes_have_the_importances_of_the_same_blocks(family: str, cls: str) -> None:
    model = random_model(family, cls)
    ids = PROMPTS.input_ids[1]
    found = routes(model)
    for name, expected in by_hand(model, ids).items():
        assert np.allclose(getattr(found, name)[1], expected, **CLOSE), name


@pytest.mark.parametrize("family", FAMILIES)
def test_importances_of_a_node_add_up_to_one(family: str) -> None:
    found = routes(random_model(family))
    for prompt in range(len(PROMPTS)):
        attention = found.attention[prompt].sum((1, 3)) + found.attn_residual[prompt]
        assert np.allclose(attention, 1, atol=1e-6)
        assert np.allclose(found.mlp[prompt] + found.mlp_residual[prompt], 1, atol=1e-6)
        assert all((getattr(found, name)[prompt] >= 0).all() for name in ARRAYS)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_what_a_head_cannot_see_has_exactly_no_importance(family: str) -> None:
    model = random_model(family)
    window = model.config.sliding_window
    layers = [
        layer for layer in range(3) if getattr(model.config, "layer_types", ["sliding"] * 3)[layer][:7] == "sliding"
    ]
    target, source = np.indices((9, 9))
    attention = routes(model).attention[0]
    assert layers and window < 9
    assert (attention[:, :, source > target] == 0).all()
    assert (attention[layers][:, :, source <= target - window] == 0).all()
    assert attention[layers][:, :, source == target - window + 1].any()


@pytest.mark.parametrize(
    ("cells", "sent"), [(1, 1), (9, 4 * 9 * 42), (42 * 9, 2**24)]
)  # one head at a time, four of six, all
def test_the_size_of_a_chunk_changes_nothing(cells: int, sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen2_5")
    whole = routes(model)
    monkeypatch.setitem(flow_module.CELLS, "cpu", cells)
    monkeypatch.setattr(flow_module, "SENT", sent)
    assert same(routes(model), whole)


class Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor has that is computed meanwhile."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x._base is None:
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("few", [1, 16])
def test_no_more_is_held_at_once_than_a_chunk(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million entries of f, six thousand."""
    monkeypatch.setattr(flow_module, "FEW", few)
    generator, cells = torch.Generator().manual_seed(0), 6000
    pattern = torch.rand(4, 50, 50, generator=generator).tril()
    sent, node = torch.randn(4, 50, 96, generator=generator), torch.randn(50, 96, generator=generator)
    with Largest() as largest:
        flow_module._proximity_of_heads(pattern, sent, node, None, cells)
    assert largest.entries <= max(4 * cells, pattern.numel(), sent.numel()) < pattern.numel() * 96 / 30


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("few", [1, 16, 10**9])  # every part by single dimensions, most of them, none
def test_the_proximity_of_many_parts_is_that_of_each(few: int, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is mostly small, nodes with zeros and outliers, a dimension to which nothing is sent."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(flow_module, "FEW", few)
    pattern = (4 * torch.randn(3, 7, 11, generator=generator)).softmax(-1).tril(4)
    sent, node = torch.randn(3, 11, 80, generator=generator), 2 * torch.randn(7, 80, generator=generator)
    node[0], node[:, 3], node[:, 5], sent[:, :, 5], sent[:, :, 7] = 0, 0, 90, 40, 0
    scale = torch.randn(7, 80, generator=generator) if scaled else torch.ones(7, 80)
    scale[2:, 4] = 1 - scaled
    parts = pattern.double()[..., None] * sent[:, None] * scale[:, None]
    expected = [[[near(parts[h, t, s], node[t].double()) for s in range(11)] for t in range(7)] for h in range(3)]
    for cells in (1, 4096):
        found = flow_module._proximity_of_heads(pattern, sent, node, scale if scaled else None, cells)
        assert found.numpy() == pytest.approx(np.array(expected), rel=1e-5, abs=1e-5)
    assert np.count_nonzero(expected) > 50 and not np.array(expected)[:, 0].any()


def test_the_last_targets_alone_have_the_importances_they_have_among_all() -> None:
    model, first = random_model("gemma2"), [4, 0, 6]
    all_of_them = routes(model)
    found: dict[tuple[int, int], flow_module.LayerFlow] = {}
    flow_module.read_flow(
        model, PROMPTS, lambda layer, prompt, seen: found.update({(layer, prompt): seen}), first=first, progress=False
    )
    assert sorted(found) == [(layer, prompt) for layer in range(len(all_of_them.mlp[0])) for prompt in range(3)]
    for (layer, prompt), seen in found.items():
        for name in ARRAYS:
            expected = getattr(all_of_them, name)[prompt][layer]
            expected = expected[:, first[prompt] :] if name == "attention" else expected[first[prompt] :]
            assert getattr(seen, name) == pytest.approx(expected, abs=1e-6)


def test_a_layer_s_activations_are_forgotten_when_the_next_one_runs() -> None:
    model = random_model("llama3_1")
    first, last = model.model.layers[0], model.model.layers[2]
    kept: list[Any] = []
    first.post_attention_layernorm.register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0])))
    forgotten: list[bool] = []
    last.register_forward_pre_hook(lambda *_: forgotten.append(kept[-1]() is None))
    routes(model)
    assert forgotten == [True]


def test_the_bias_of_the_output_projection_is_no_part_and_that_of_the_values_is() -> None:
    model = random_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
        c_attn = model.transformer.h[1].attn.c_attn
        c_attn.weight[:, 70:] = (
            0  # values are their bias: the same from every source, so only the pattern tells them apart
        )
    assert model.transformer.h[0].attn.c_proj.bias.abs().min() > 0
    found = routes(model)
    assert (found.attention[0][0] == 0).all() and (found.attn_residual[0][0] == 1).all()
    expected = by_hand(model, PROMPTS.input_ids[0])
    assert np.allclose(found.attention[0], expected["attention"], **CLOSE)
    assert found.attention[0][1].max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gives_nearly_what_float32_gives(family: str) -> None:
    exact = routes(random_model(family))
    rough = routes(random_model(family).bfloat16())
    for name in ARRAYS:
        for a, b in zip(getattr(exact, name), getattr(rough, name), strict=True):
            assert b.dtype == np.float32 and np.abs(a - b).max() < 0.1 and np.abs(a - b).mean() < 0.01


def test_one_forward_pass_a_batch_without_the_unembedding() -> None:
    model, calls = random_model("llama3_1"), []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append("block"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("unembedding"))
    routes(model, batch_size=2)
    assert calls == ["block", "block"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was_and_dropout_is_off(family: str) -> None:
    model = random_model(family)
    expected = routes(model)
    model.train()
    before = traces(model)
    assert same(routes(model), expected)
    assert traces(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_spread_over_devices_has_the_same_importances(family: str) -> None:
    expected = routes(random_model(family))
    with PretendedDevices():
        assert same(routes(spread(random_model(family))), expected)


# -- one node ----------------------------------------------------------------------------------------------------------


def test_importances_of_the_worked_example() -> None:
    parts = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [2.0, 1.0]])
    node = torch.tensor([2.0, 2.0])
    assert torch.equal(parts.sum(0), node)
    assert proximity(parts, node).tolist() == [2.0, 0.0, 3.0]
    assert np.allclose(importances(parts, node), [0.4, 0.0, 0.6])


def test_parts_that_all_lead_away_have_no_importance() -> None:
    assert importances(torch.tensor([[10.0], [-9.9]]), torch.tensor([0.1])).tolist() == [0.0, 0.0]


def test_renormalisation_of_the_worked_example() -> None:
    blocks, residual = renormalise(np.array([0.05, 0.15]), np.array(0.8), 0.1)
    assert np.allclose(blocks, [0, 0.15789], atol=1e-5) and np.allclose(residual, 0.84211, atol=1e-5)


def test_renormalisation_keeps_nodes_apart_and_leaves_an_empty_one_empty() -> None:
    blocks, residual = renormalise(np.array([[0.3, 0.3], [0.1, 0.1]]), np.array([0.4, 0.1]), 0.2)
    assert np.allclose(blocks, [[0.3, 0.3], [0, 0]]) and np.allclose(residual, [0.4, 0])
    blocks, residual = renormalise(np.array([0.2, 0.5]), np.array(0.3), 0.4)
    assert np.allclose(blocks, [0, 1]) and residual == 0


# -- the graph ---------------------------------------------------------------------------------------------------------


def sparse_flow(seed: int, layers: int = 3, heads: int = 2, lengths: tuple[int, ...] = (4, 3)) -> Flow:
    """Importances of which many are small, so that at some thresholds much is out of reach."""
    rng = np.random.default_rng(seed)
    arrays: list[list[np.ndarray]] = [[], [], [], []]
    for length in lengths:
        raw = rng.exponential(size=(layers, heads, length, length)) ** 3 * np.tri(length)
        residual, mlp = rng.exponential(size=(2, layers, length)) ** 3
        total = raw.sum((1, 3)) + residual
        share = mlp / (1 + mlp)
        for array, values in zip(
            arrays, (raw / total[:, None, :, None], residual / total, share, 1 - share), strict=True
        ):
            array.append(values.astype(np.float32))
    return Flow(*map(tuple, arrays))


def all_edges(flow: Flow, prompt: int) -> list[tuple[str, str, str, float]]:
    """Every edge there could be, in words."""
    layers, heads, length, _ = flow.attention[prompt].shape
    edges = []
    for layer in range(layers):
        below = f"resid_post.{layer - 1}" if layer else "resid_pre.0"
        for i in range(length):
            mid, post = f"resid_mid.{layer}@{i}", f"resid_post.{layer}@{i}"
            edges.append((mid, post, "residual", flow.mlp_residual[prompt][layer, i]))
            edges.append((mid, post, "mlp", flow.mlp[prompt][layer, i]))
            edges.append((f"{below}@{i}", mid, "residual", flow.attn_residual[prompt][layer, i]))
            for h in range(heads):
                for j in range(length):
                    value = flow.attention[prompt][layer, h, i, j]
                    edges.append((f"{below}@{j}", mid, f"{layer}.{h}", value))
    return edges


def searched(flow: Flow, prompt: int, tau: float) -> set[tuple[str, str, str, float]]:
    """Edges above tau, found by following them again and again until nothing new comes."""
    layers, _, length, _ = flow.attention[prompt].shape
    kept = [edge for edge in all_edges(flow, prompt) if edge[3] > tau]
    reached = {f"resid_post.{layers - 1}@{length - 1}"}
    while more := {source for source, target, _, _ in kept if target in reached} - reached:
        reached |= more
    return {edge for edge in kept if edge[1] in reached}


def in_words(edges: tuple[FlowEdge, ...]) -> set[tuple[str, str, str, float]]:
    return {(str(e.source), str(e.target), e.via, np.float32(e.importance)) for e in edges}


@pytest.mark.parametrize("tau", [0.0, 0.04, 0.2, 0.4, 0.6, 0.9])
def test_the_graph_is_what_a_brute_force_search_reaches(tau: float) -> None:
    sizes = []
    for seed in range(5):
        flow = sparse_flow(seed)
        for prompt in range(2):
            edges = flow.graph(prompt, tau)
            assert in_words(edges) == searched(flow, prompt, tau)
            assert len(set(edges)) == len(edges)
            sizes.append((len(edges), sum(edge[3] > tau for edge in all_edges(flow, prompt))))
    assert tau in (0.0, 0.9) or any(reached < above for reached, above in sizes)  # something was out of reach


def test_an_importance_of_exactly_tau_is_not_above_it() -> None:
    half = np.full((1, 1), 0.5, np.float32)
    flow = Flow((half[None, None] * 0.5,), (half * 1.5,), (half,), (half,))
    assert [len(flow.graph(0, tau)) for tau in (0.24, 0.25, 0.5)] == [4, 3, 0]
    assert [flow.active_heads(tau).all() for tau in (0.24, 0.25)] == [True, False]


def test_edges_go_down_from_the_last_token_of_the_last_layer() -> None:
    edges = sparse_flow(0).graph(0)
    assert edges[0].target == StreamState("resid_post", 2, 3) and str(edges[0].target) == "resid_post.2@3"
    order = [(-edge.target.layer, edge.target.site != "resid_post") for edge in edges]
    assert order == sorted(order)
    assert edges[0].as_dict() == {
        "source": "resid_mid.2@3",
        "target": "resid_post.2@3",
        "via": edges[0].via,
        "importance": edges[0].importance,
    }


@pytest.mark.parametrize("tau", [0.0, 0.04, 0.3])
def test_renormalised_edges_are_the_same_and_add_up_to_one_at_every_node(tau: float) -> None:
    flow = sparse_flow(1)
    plain, renormalised = flow.graph(0, tau), flow.graph(0, tau, renormalise=True)
    assert [edge[:3] for edge in plain] == [edge[:3] for edge in renormalised]
    sums: dict[StreamState, list[float]] = {}
    for before, after in zip(plain, renormalised, strict=True):
        pair = sums.setdefault(after.target, [0.0, 0.0])
        pair[0] += before.importance
        pair[1] += after.importance
    for before, after in zip(plain, renormalised, strict=True):
        assert after.importance == pytest.approx(before.importance / sums[before.target][0], abs=1e-6)
    assert all(total == pytest.approx(1, abs=1e-5) for _, total in sums.values())


@pytest.mark.parametrize("tau", [0.0, 0.04, 0.2, 0.5])
def test_active_heads_are_the_heads_of_the_graph(tau: float) -> None:
    shares = []
    for seed in range(4):
        flow = sparse_flow(seed)
        active = flow.active_heads(tau)
        for prompt in range(2):
            expected = {via for _, _, via, _ in searched(flow, prompt, tau)} - {"mlp", "residual"}
            assert {f"{layer}.{head}" for layer, head in np.argwhere(active[prompt])} == expected
        shares.append(active.mean())
    assert tau == 0 or min(shares) < 1


def test_a_head_s_importance_is_the_sum_over_its_sources() -> None:
    flow = sparse_flow(2)
    every, last = flow.head_importance(), flow.head_importance("last")
    assert every.shape == last.shape == (2, 3, 2)
    assert every[1, 2, 0] == pytest.approx(flow.attention[1][2, 0].sum() / 3)
    assert last[1, 2, 0] == pytest.approx(flow.attention[1][2, 0, -1].sum())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [-0.01, 1.0, float("nan"), float("inf")])
def test_a_threshold_outside_of_the_shares_is_refused(tau: float) -> None:
    flow = sparse_flow(0)
    for asked in (flow.graph, lambda _, tau: flow.active_heads(tau), lambda _, tau: renormalise(*np.ones((2, 1)), tau)):
        with pytest.raises(ValueError, match="tau must be at least 0 and below 1"):
            asked(0, tau)


@pytest.mark.parametrize("prompt", [-1, 2])
def test_a_prompt_that_is_not_there_is_refused(prompt: int) -> None:
    with pytest.raises(ValueError, match=f"there is no prompt {prompt}; the flow has 2"):
        sparse_flow(0).graph(prompt)


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="'all' or 'last', not 'first'"):
        sparse_flow(0).head_importance("first")  # type: ignore[arg-type]


def test_bad_arguments_are_refused_before_the_model_runs() -> None:
    model, calls = random_model("mistral"), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    empty = TokenizedPrompts(())
    no_tokens = TokenizedPrompts(((3,), ()))
    for prompts, options, message in (
        (empty, {}, "there are no prompts"),
        (no_tokens, {}, "prompt 1 has no tokens"),
        ([[1, 2]], {}, "prompts must be tokenised, not a list"),
        (PROMPTS, {"batch_size": 0}, "batch_size must be at least 1"),
        (PROMPTS, {"padding_side": "top"}, "padding_side must be"),
    ):
        with pytest.raises(ValueError, match=message):
            routes(model, prompts, **options)  # type: ignore[arg-type]
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot be seen under the attention implementation 'flash_attention_2'"):
        routes(model)
    assert not calls


def test_a_model_without_a_card_is_refused() -> None:
    config = CodeGenConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=4, rotary_dim=2, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="no model card covers CodeGenForCausalLM"):
        routes(CodeGenForCausalLM(config))


def test_a_projection_that_cannot_be_split_is_refused() -> None:
    class Adapted(torch.nn.Linear):
        """What an adapter library puts in place of a projection."""

    model = random_model("mistral")
    model.model.layers[1].self_attn.o_proj = Adapted(24, 44, bias=False)
    with pytest.raises(ValueError, match=r"output projection of layer 1 is a Adapted .* merge adapters"):
        routes(model)


@pytest.mark.parametrize(
    ("path", "node"),
    [
        ("layers.1.self_attn.o_proj", r"resid_mid\.1 of prompt 1 at position 0"),
        ("layers.1", r"resid_post\.1 of prompt 1 at position 0"),
    ],
)
def test_parts_that_do_not_add_up_are_refused_and_the_model_is_left_as_it_was(path: str, node: str) -> None:
    model = random_model("qwen2_5")
    model.model.get_submodule(path).register_forward_hook(lambda _, __, output: output * 1.01)
    before = traces(model)
    with pytest.raises(ValueError, match=f"the parts of {node} miss it by .* remove hooks and adapters"):
        routes(model)
    assert traces(model) == before


def test_activations_that_are_not_numbers_are_refused() -> None:
    model = random_model("gpt2")
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"the parts of resid_post\.2 of prompt 1 at position 0 miss it by nan"):
        routes(model)
