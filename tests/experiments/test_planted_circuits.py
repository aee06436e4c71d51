"""Planted circuits do what they are said to do, and brute-force path patching, itself held to a hand computation, finds them."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny.planted_circuits import ARCHITECTURES, CASES, NOISY, Architecture, Planted, planted
from torch import Tensor, nn

from pyvene_ext.intervenable.truth import Truth
from tests.ground_truth.paths import (
    every_path_by_hooks,
    path_patch_by_hooks,
    place,
    precedes,
    received_by_hooks,
    receivers,
    run_by_hooks,
    senders,
)
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, VOCAB, random_model

every_circuit = pytest.mark.parametrize(  # every other one on the other architecture too
    ("name", "architecture"),
    [
        case
        for number, name in enumerate(CASES)
        for case in first_only((name, architecture) for architecture in ARCHITECTURES[: 1 + number % 2])
    ],
)
both_architectures = pytest.mark.parametrize("architecture", first_only(ARCHITECTURES))
every_family = pytest.mark.parametrize("family", FAMILIES)


# --- The planted circuits ---


@cache
def circuit(name: str, architecture: Architecture) -> Planted:
    return planted(name, architecture)


def ids(case: Planted) -> tuple[Tensor, Tensor]:
    """Clean, then corrupt."""
    return torch.tensor(case.clean.input_ids), torch.tensor(case.corrupt.input_ids)


def logit_diff(case: Planted, logits: Tensor) -> Tensor:
    """Right minus wrong for every prompt."""
    right, wrong = torch.tensor(case.clean.answer_ids).unbind(1)
    row = torch.arange(len(right))
    return logits[row, right] - logits[row, wrong]


def clean_diff(case: Planted, put: dict[str, Tensor] | None = None, model: Any = None) -> Tensor:
    """The logit difference on clean, with places set."""
    return logit_diff(case, run_by_hooks(model or case.model, ids(case)[0], put=put)[0])


@cache
def edge_effects(name: str, architecture: Architecture) -> dict[str, float]:
    """Mean |change of the logit difference| of every edge."""
    case = circuit(name, architecture)
    return effects_of_edges(case, case.model)


def effects_of_edges(case: Planted, model: Any) -> dict[str, float]:
    before = clean_diff(case, model=model)
    paths = every_path_by_hooks(model, *ids(case), freeze_mlps=False)
    return {edge: float((logit_diff(case, logits) - before).abs().mean()) for edge, logits in paths.items()}


def found(effects: dict[str, float]) -> set[str]:
    """The edges above the widest gap, as a ratio; there must be one of more than ten."""
    order = sorted(effects, key=lambda edge: -effects[edge])
    cut = max(range(1, 12), key=lambda n: effects[order[n - 1]] / effects[order[n]])
    assert effects[order[cut - 1]] > 10 * effects[order[cut]]
    return set(order[:cut])


def precision(scores: dict[str, float], edges: frozenset[str]) -> float:
    """Share of planted edges among as many top-ranked ones."""
    top = sorted(scores, key=lambda edge: -scores[edge])[: len(edges)]
    return len(edges & set(top)) / len(edges)


def gradients(case: Planted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every z, receiver and embedding holds on clean, and the gradient of the summed logit difference there."""
    names = {*senders(case.model), *receivers(case.model)}
    values, leaves, handles = {}, {}, []
    for name in names:
        where = place(case.model, name)

        def add_leaf(x: Tensor, name: str = name, entries: slice = where.entries) -> Tensor:
            values[name] = x[..., entries].detach()
            leaves[name] = torch.zeros_like(values[name], requires_grad=True)
            added = torch.zeros_like(x)
            added[..., entries] = leaves[name]
            return x + added

        handles.append(hook(where.module, where.side, add_leaf))
    logit_diff(case, case.model(ids(case)[0]).logits[:, -1]).sum().backward()
    for handle in handles:
        handle.remove()
    return values, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def hook(module: nn.Module, side: str, change: Any) -> Any:
    if side == "out":
        return module.register_forward_hook(lambda _module, _args, output: change(output))

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


@cache
def linear_effects(name: str, architecture: Architecture) -> dict[str, float]:
    """`edge_effects` to first order: (what path patching records - clean) . gradient at the receiver."""
    case = circuit(name, architecture)
    values, gradient = gradients(case)
    scores = {}
    for sender in senders(case.model):
        ahead = tuple(receiver for receiver in receivers(case.model) if precedes(sender, receiver))
        recorded = received_by_hooks(case.model, sender, ahead, *ids(case), freeze_mlps=False)
        for receiver in ahead:
            estimate = ((recorded[receiver] - values[receiver]) * gradient[receiver]).sum((1, 2))
            scores[f"{sender}->{receiver}"] = float(estimate.abs().mean())
    return scores


@every_circuit
def test_the_answer_is_right_on_clean_and_the_other_one_on_corrupt(name: str, architecture: Architecture) -> None:
    case = circuit(name, architecture)
    clean, corrupt = ids(case)
    on_clean, on_corrupt = (run_by_hooks(case.model, each)[0] for each in (clean, corrupt))
    assert logit_diff(case, on_clean).min() > 5
    assert logit_diff(case, on_corrupt).max() < -5
    answers = torch.tensor(case.clean.answer_ids)
    assert torch.equal(on_clean.argmax(-1), answers[:, 0])
    assert torch.equal(on_corrupt.argmax(-1), answers[:, 1])


@every_circuit
def test_the_models_have_the_shapes_that_hide_mistakes(name: str, architecture: Architecture) -> None:
    case = circuit(name, architecture)
    config = case.model.config
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert not case.model.training
    assert {parameter.dtype for parameter in case.model.parameters()} == {torch.float32}
    assert config._attn_implementation == "eager"
    assert case.clean.answer_ids == case.corrupt.answer_ids
    assert case.clean.positions == case.corrupt.positions
    assert len(set(case.clean.input_ids)) == len(case.clean) > 1
    assert all(not layer.mlp.down_proj.weight.any() for layer in case.model.model.layers)


@every_circuit
def test_planted_heads_attend_where_they_should(name: str, architecture: Architecture) -> None:
    case = circuit(name, architecture)
    patterns = case.model(ids(case)[0], output_attentions=True).attentions
    assert set(case.looks) == set(case.heads)
    for role, (layer, head) in case.heads.items():
        for prompt, positions in enumerate(case.clean.positions):
            query, key = (positions[at] for at in case.looks[role])
            assert patterns[layer][prompt, head, query, key] > 0.95


@every_circuit
def test_norms_give_features_as_they_are(name: str, architecture: Architecture) -> None:
    case = circuit(name, architecture)
    final = run_by_hooks(case.model, ids(case)[0], read=["logits"])[1]["logits"]
    with torch.no_grad():
        normed = case.model.model.norm(final)
    torch.testing.assert_close(normed[..., NOISY], final[..., NOISY], rtol=2e-3, atol=0.0)


@every_circuit
def test_patching_z_matters_for_the_planted_heads_alone(name: str, architecture: Architecture) -> None:
    case = circuit(name, architecture)
    before = clean_diff(case)
    effects = {}
    for head in (sender for sender in senders(case.model) if sender.startswith("z.")):
        of_corrupt = run_by_hooks(case.model, ids(case)[1], read=[head])[1]
        effects[head] = float((clean_diff(case, of_corrupt) - before).abs().mean())
    dormant = {edge.split("->")[0] for edge in case.dormant}
    planted_heads = {f"z.{layer}.{head}" for layer, head in case.heads.values()} - dormant
    weakest = min(effects[head] for head in planted_heads)
    assert weakest > 5
    assert weakest > 10 * max(effect for head, effect in effects.items() if head not in planted_heads)


@pytest.mark.slow
@every_circuit
def test_path_patching_finds_exactly_the_planted_edges(name: str, architecture: Architecture) -> None:
    case = circuit(name, architecture)
    effects = edge_effects(name, architecture)
    assert found(effects) == case.edges
    weakest = min(effects[edge] for edge in case.edges)
    assert weakest > 5
    assert weakest > 50 * max(effect for edge, effect in effects.items() if edge not in case.edges)


@pytest.mark.parametrize("name", ["k_composition", "q_composition", "v_composition", "negative"])
@both_architectures
def test_a_soft_circuit_is_ranked_first_by_first_order_estimates_too(name: str, architecture: Architecture) -> None:
    assert precision(linear_effects(name, architecture), circuit(name, architecture).edges) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "edge"), [("saturated", "z.0.3->q.2.0"), ("saturated_k", "z.0.1->k.1.1")])
@both_architectures
def test_a_saturated_softmax_hides_an_edge_from_first_order_estimates_but_not_from_patching(
    name: str, edge: str, architecture: Architecture
) -> None:
    case = circuit(name, architecture)
    estimates, exact = linear_effects(name, architecture), edge_effects(name, architecture)
    assert estimates[edge] < 1e-4
    assert exact[edge] > 10
    assert precision(estimates, case.edges) < 1.0 == precision(exact, case.edges)
    sender, receiver = edge.split("->")
    flipped = path_patch_by_hooks(case.model, sender, (receiver,), *ids(case), freeze_mlps=False)
    assert logit_diff(case, flipped).max() < -5
    # Nor is there a gradient at the head's other input.
    layer, head = case.heads["find" if name == "saturated" else "induction"]
    _, gradient = gradients(case)
    for place_of_head in (f"q.{layer}.{head}", f"k.{layer}.{head // 2}"):
        assert gradient[place_of_head].abs().max() < 0.1
        assert gradient[f"v.{layer}.{head // 2}"].abs().max() > 1


@both_architectures
def test_the_negative_head_writes_against_the_answer(architecture: Architecture) -> None:
    case = circuit("negative", architecture)
    before = clean_diff(case)
    for role, sign in (("positive", -1), ("negative", 1)):
        head = "z.{}.{}".format(*case.heads[role])
        patched = path_patch_by_hooks(case.model, head, ("logits",), *ids(case), freeze_mlps=False)
        assert (sign * (logit_diff(case, patched) - before) > 5).all()


@both_architectures
def test_ablating_one_head_of_a_redundant_pair_shows_nothing_and_both_shows_all(architecture: Architecture) -> None:
    case = circuit("backup", architecture)
    values, gradient = gradients(case)
    primary, backup = (f"z.{layer}.{head}" for layer, head in (case.heads["primary"], case.heads["backup"]))
    before = clean_diff(case)

    def effect(*silent: str) -> Tensor:
        return before - clean_diff(case, {name: torch.zeros_like(values[name]) for name in silent})

    assert effect(primary).abs().max() < 0.5
    assert effect(backup).abs().max() < 0.5
    assert effect(primary, backup).min() > 5
    # To first order nobody takes over.
    assert (values[primary] * gradient[primary]).sum((1, 2)).min() > 5


@pytest.mark.slow
@both_architectures
def test_first_order_estimates_miss_how_the_backup_is_woken(architecture: Architecture) -> None:
    case = circuit("backup", architecture)
    estimates, exact = linear_effects("backup", architecture), edge_effects("backup", architecture)
    for edge in ("z.0.0->q.1.2", "embed->k.1.1"):
        assert edge in case.edges
        assert estimates[edge] < 0.01 * exact[edge]
    assert precision(estimates, case.edges) < 1.0 == precision(exact, case.edges)


@pytest.mark.slow
@both_architectures
def test_dormant_edges_are_found_once_the_first_head_is_silent(architecture: Architecture) -> None:
    case = circuit("backup", architecture)
    effects = edge_effects("backup", architecture)
    assert max(effects[edge] for edge in case.dormant) < 0.1
    silenced = copy.deepcopy(case.model)
    layer, head = case.heads["primary"]
    width = silenced.config.head_dim
    with torch.no_grad():
        projection = silenced.model.layers[layer].self_attn.o_proj
        projection.weight[:, head * width : (head + 1) * width] = 0.0
    assert found(effects_of_edges(case, silenced)) == case.dormant


def test_an_unknown_circuit_or_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no planted circuit is called 'induction'; there are k_composition, "):
        planted("induction", "llama")
    with pytest.raises(ValueError, match=r"no planted model has the architecture 'gpt2'; use llama or gemma2"):
        planted("k_composition", "gpt2")  # type: ignore[arg-type]


# --- Path patching by hooks, against a forward pass written out ---


def prompts() -> tuple[Tensor, Tensor]:
    """Base and source: two prompts each, as long as it takes for windows to bite."""
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randint(3, VOCAB, (2, 2, 7), generator=generator)
    return base, source


@cache
def family_model(family: str, with_mlps: bool = True) -> Any:
    model = random_model(family)
    if not with_mlps:
        with torch.no_grad():
            for block in modules(model):
                for parameter in block.mlp.parameters():
                    parameter.zero_()
    return model


def modules(model: Any) -> list[SimpleNamespace]:
    """The parts of every block by what they do; `post_attention` and `post_mlp` are identities but in Gemma 2."""
    if hasattr(model, "transformer"):
        return [
            SimpleNamespace(
                norm=block.ln_1,
                project=block.attn.c_proj,
                post_attention=nn.Identity(),
                mlp_norm=block.ln_2,
                mlp=block.mlp,
                post_mlp=nn.Identity(),
                qkv=lambda x, block=block: block.attn.c_attn(x).chunk(3, dim=-1),
            )
            for block in model.transformer.h
        ]
    gemma = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    return [
        SimpleNamespace(
            norm=block.input_layernorm,
            project=block.self_attn.o_proj,
            post_attention=block.post_attention_layernorm if gemma else nn.Identity(),
            mlp_norm=block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm,
            mlp=block.mlp,
            post_mlp=block.post_feedforward_layernorm if gemma else nn.Identity(),
            qkv=lambda x, block=block: [getattr(block.self_attn, f"{name}_proj")(x) for name in "qkv"],
        )
        for block in model.model.layers
    ]


@torch.no_grad()
def received_by_hand(model: Any, sender: str, receiver: str, freeze_mlps: bool) -> Tensor:
    """What a receiver gets when the residual stream is added up from base's parts and one of source."""
    base, source = ({"input_ids": each} for each in prompts())
    truth = Truth(model)
    config = model.config
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", heads)
    resid = truth.read(source if sender == "embed" else base, "embeddings", 0)
    for layer, block in enumerate(modules(model)):
        q, k, v = block.qkv(block.norm(resid))
        for kind, projected, count in (("q", q, heads), ("k", k, grouped), ("v", v, grouped)):
            for head, one in enumerate(projected.chunk(count, dim=-1)):
                if receiver == f"{kind}.{layer}.{head}":
                    return one
        z = truth.read(base, "head_attention_value_output", layer).clone()
        if sender.startswith(f"z.{layer}."):
            head = int(sender.split(".")[2])
            z[:, head] = truth.read(source, "head_attention_value_output", layer)[:, head]
        resid = resid + block.post_attention(block.project(z.transpose(1, 2).flatten(2)))
        if receiver == f"mlp_in.{layer}":
            return block.mlp_norm(resid)
        if sender == f"mlp_out.{layer}":
            resid = resid + truth.read(source, "mlp_contribution", layer)
        elif freeze_mlps:
            resid = resid + truth.read(base, "mlp_contribution", layer)
        else:
            resid = resid + block.post_mlp(block.mlp(block.mlp_norm(resid)))
    return resid


def patched_by_hand(model: Any, sender: str, receiver: str, freeze_mlps: bool) -> Tensor:
    """Logits at the last position with the receiver set to `received_by_hand`."""
    new = received_by_hand(model, sender, receiver, freeze_mlps)
    base = {"input_ids": prompts()[0]}
    if receiver == "logits":
        return Truth(model).run(base, "block_output", model.config.num_hidden_layers - 1, lambda _: new)[:, -1]
    kind, layer, *head = receiver.split(".")
    if kind == "mlp_in":
        return Truth(model).run(base, "mlp_input", int(layer), lambda _: new)[:, -1]

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, int(head[0])] = new
        return x

    component = {"q": "head_query_output", "k": "head_key_output", "v": "head_value_output"}[kind]
    return Truth(model).run(base, component, int(layer), put)[:, -1]


@every_family
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_path_patching_is_what_a_forward_pass_written_out_gives(family: str, freeze_mlps: bool) -> None:
    model = family_model(family)
    heads = model.config.num_attention_heads
    last_group = getattr(model.config, "num_key_value_heads", heads) - 1
    plain = run_by_hooks(model, prompts()[0])[0]
    for sender in ("embed", "z.0.0", f"z.1.{heads - 1}", "mlp_out.0"):
        for receiver in (f"q.2.{heads - 1}", f"k.1.{last_group}", f"v.2.{last_group}", "mlp_in.1", "logits"):
            patched = path_patch_by_hooks(model, sender, (receiver,), *prompts(), freeze_mlps=freeze_mlps)
            torch.testing.assert_close(
                patched, patched_by_hand(model, sender, receiver, freeze_mlps), atol=1e-5, rtol=1e-5
            )
            assert precedes(sender, receiver) == bool((patched - plain).abs().max() > 1e-4)


@every_family
def test_without_mlps_the_path_from_a_head_to_the_logits_is_its_direct_effect(family: str) -> None:
    model = family_model(family, with_mlps=False)
    base, source = prompts()
    final, unembed = place(model, "logits").module, model.lm_head
    for head in (name for name in senders(model) if name.startswith("z.")):
        layer, index = (int(number) for number in head.split(".")[1:])
        block = modules(model)[layer]
        truth = Truth(model)
        z, of_source, last = (
            truth.read({"input_ids": which}, component, at)
            for which, component, at in (
                (base, "head_attention_value_output", layer),
                (source, "head_attention_value_output", layer),
                (base, "block_output", 2),
            )
        )
        swapped = z.clone()
        swapped[:, index] = of_source[:, index]
        with torch.no_grad():
            was, becomes = (block.post_attention(block.project(x.transpose(1, 2).flatten(2))) for x in (z, swapped))
            direct = unembed(final(last + becomes - was))[:, -1]
            if cap := getattr(model.config, "final_logit_softcapping", None):
                direct = cap * torch.tanh(direct / cap)
        patched = path_patch_by_hooks(model, head, ("logits",), base, source, freeze_mlps=False)
        torch.testing.assert_close(patched, direct, atol=1e-5, rtol=1e-5)


@every_family
def test_a_sender_at_or_after_the_receiver_changes_not_one_bit(family: str) -> None:
    model = family_model(family)
    plain = run_by_hooks(model, prompts()[0])[0]
    pairs = [(s, r) for s in senders(model) for r in receivers(model) if not precedes(s, r)]
    assert ("z.1.0", "q.1.0") in pairs and ("mlp_out.1", "mlp_in.1") in pairs and ("mlp_out.0", "k.0.0") in pairs
    for sender, receiver in pairs[::23]:
        patched = path_patch_by_hooks(model, sender, (receiver,), *prompts(), freeze_mlps=False)
        assert torch.equal(patched, plain)


@every_family
def test_all_inputs_of_the_first_layer_from_source_are_its_heads_from_source(family: str) -> None:
    model = family_model(family)
    inputs = tuple(name for name in receivers(model) if name[:3] in ("q.0", "k.0", "v.0"))
    of_source = run_by_hooks(model, prompts()[1], read=[name for name in senders(model) if name[:3] == "z.0"])[1]
    patched = path_patch_by_hooks(model, "embed", inputs, *prompts(), freeze_mlps=False)
    expected = run_by_hooks(model, prompts()[0], put=of_source)[0]
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_every_path_is_each_path(family: str) -> None:
    model = family_model(family)
    paths = every_path_by_hooks(model, *prompts(), freeze_mlps=True)
    assert len(paths) == sum(precedes(s, r) for s in senders(model) for r in receivers(model))
    for edge in list(paths)[::40]:
        sender, receiver = edge.split("->")
        one = path_patch_by_hooks(model, sender, (receiver,), *prompts(), freeze_mlps=True)
        assert torch.equal(paths[edge], one)


def test_unknown_places_and_unequal_prompts_are_refused() -> None:
    model = family_model("llama3_1")
    base, source = prompts()
    with pytest.raises(ValueError, match=r"base has shape \(2, 7\) and source \(2, 6\); give equally long prompts"):
        path_patch_by_hooks(model, "embed", ("logits",), base, source[:, 1:], freeze_mlps=False)
    with pytest.raises(ValueError, match=r"'q.0.0' is no sender; there are embed, z.0.0"):
        path_patch_by_hooks(model, "q.0.0", ("logits",), base, source, freeze_mlps=False)
    with pytest.raises(ValueError, match=r"no place called 'k.0.3'; there are embed, z.0.0"):
        path_patch_by_hooks(model, "embed", ("k.0.3",), base, source, freeze_mlps=False)
