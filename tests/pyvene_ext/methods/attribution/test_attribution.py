"""Attribution patching equals derivatives through hand-written hooks, one prompt at a time; integrated gradients add up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelcards import n_heads, n_kv_heads
from pyvene_ext.engine.plain import run
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.attribution import receivers
from pyvene_ext.methods.attribution.atp import atp, atp_star
from pyvene_ext.methods.attribution.edges import EdgeScores, edge_attribution
from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.joint import needs
from pyvene_ext.specs.patch import ActivationPatch
from tests.ground_truth import ablations as slow
from tests.ground_truth import paths
from tests.live_tensors import Peak
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, FEWER, random_model

torch.set_num_threads(1)

LAYERS = 3
BASE, SOURCE = random_prompts((8, 6, 7)), random_prompts((8, 6, 7), seed=5)
OTHER = random_prompts((7, 8, 6), seed=6)  # partners of other lengths, whose named tokens stand elsewhere
INSIDE = ("q", "k", "v", "z")  # sites of heads


@cache
def _model(family: str, implementation: str | None = None) -> Any:
    return random_model(family, attn_implementation=implementation)


def _patches(
    family: str, sites: tuple[str, ...] = ActivationPatch.sites, positions: Any = "all"
) -> list[ActivationPatch]:
    """Every site of the first and the last layer, there at the last and at the first head."""
    found = []
    for site in sites:
        for layer in (None,) if site == "embed" else (0, LAYERS - 1):
            count = (n_kv_heads if site in "kv" else n_heads)(_model(family).config)
            heads = (0 if layer else count - 1,) if site in INSIDE else None
            found.append(ActivationPatch(site=site, layer=layer, heads=heads, positions=positions))
    return found


# --- the slow versions ----------------------------------------------------------------------------------------------------

Change = Callable[[Tensor], Tensor]


def _hooks(model: Any, patch: ActivationPatch, change: Change) -> list[Any]:
    """Put `change`, of `[pos width]` of the patched head or the whole site, at a patch's place."""
    if patch.site in ("q", "k", "v", "mlp_in"):
        where = paths.place(model, patch.where.partition("@")[0])
        return [paths._hook(where, lambda x: change(x[0])[None])]
    if patch.site == "z":

        def one_head(z: Tensor) -> Tensor:
            return torch.cat([z[:, :h], change(z[:, h])[:, None], z[:, h + 1 :]], 1)

        (h,) = patch.heads
        return slow.hooks(model, "z", patch.layer, one_head)
    return slow.hooks(model, patch.site, patch.layer, change)


@cache
def _read(model: Any, patch: ActivationPatch, ids: tuple[int, ...]) -> Tensor:
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x

    handles = _hooks(model, patch, keep)
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen[0]


def _new(
    model: Any, patch: ActivationPatch, prompt: int, source: TokenizedPrompts, base: TokenizedPrompts = BASE
) -> Tensor:
    """The base prompt's activation with the source's at the patched positions."""
    new = _read(model, patch, base.input_ids[prompt]).clone()
    there = _read(model, patch, source.input_ids[prompt])
    columns = zip(
        token_indices(base, prompt, patch.positions), token_indices(source, prompt, patch.positions), strict=True
    )
    for column, from_column in columns:
        new[column] = there[from_column]
    return new


def _metric(logits: Tensor, prompt: int, metric: str = "logit_diff") -> Tensor:
    io, s = BASE.answer_ids[prompt]
    return logits.softmax(-1)[io] if metric == "probability" else logits[io] - logits[s]


def _slope(
    model: Any, patch: ActivationPatch, new: Tensor, prompt: int, dropped: int | None = None, metric="logit_diff"
):
    """Minus the derivative of the metric along a patch: the activation becomes x + t (new - x), at t = 0."""
    t = torch.zeros((), requires_grad=True)

    def edits() -> list[Any]:
        return _hooks(model, patch, lambda x: x + t * (new - x).detach())

    def drops() -> list[Any]:
        if dropped is None:
            return []
        at = slow.parts(model, dropped)
        return [slow.on_output(module, Tensor.detach) for module in (at.adds_attention, at.adds_mlp)]

    # `ablations.hooks` edits resid_mid by way of what attention adds, which is not what is dropped.
    handles = drops() + edits() if patch.site == "resid_mid" else edits() + drops()
    value = _metric(model(torch.tensor([BASE.input_ids[prompt]])).logits[0, -1], prompt, metric)
    for handle in handles:
        handle.remove()
    (slope,) = torch.autograd.grad(value, t, allow_unused=True) if value.requires_grad else (None,)
    return 0.0 if slope is None else -slope.item()


def _z_under(family: str, patch: ActivationPatch, prompt: int, head: int, source: TokenizedPrompts) -> Tensor:
    """z of one query head with its pattern recomputed under a patch of q or k, by transformers' eager attention."""
    model, ids = _model(family, "eager"), torch.tensor([BASE.input_ids[prompt]])
    new = _new(model, patch, prompt, source)
    with torch.no_grad(), ExitStack() as stack:
        for handle in _hooks(model, patch, lambda _: new):
            stack.callback(handle.remove)
        pattern = model(ids, output_attentions=True).attentions[patch.layer][0, head]
    kv_head = head * n_kv_heads(model.config) // n_heads(model.config)
    values = _read(model, ActivationPatch(site="v", layer=patch.layer, heads=(kv_head,)), BASE.input_ids[prompt])
    return pattern @ values


def _qk_slope(family: str, patch: ActivationPatch, prompt: int, source: TokenizedPrompts, dropped: int | None = None):
    """The QK-fix through z: (A - A') . dM/dA = (A v - A' v) . dM/dz, for every query head that the patch reaches, in turn."""
    model = _model(family)
    group = 1 if patch.site == "q" else n_heads(model.config) // n_kv_heads(model.config)
    total = 0.0
    for head in range(patch.heads[0] * group, (patch.heads[0] + 1) * group):
        at_z = ActivationPatch(site="z", layer=patch.layer, heads=(head,))
        total += _slope(model, at_z, _z_under(family, patch, prompt, head, source), prompt, dropped)
    return total


def _close(got: np.ndarray, expected: Any, what: str = "") -> None:
    """To 1e-5 of the largest: a small number may be the difference of large ones, also by hand."""
    expected = np.array(expected)
    scale = 1 + np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=1e-5, err_msg=what)


# --- nodes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_atp_is_the_derivative_along_every_patch(family: str) -> None:
    patches, model = _patches(family), _model(family)
    got = atp(model, patches, BASE, SOURCE, batch_size=2, progress=False)
    assert got.dtype == np.float32 and (np.abs(got).max(1) > 1e-3).mean() > 0.9
    plain = atp_star(model, patches, BASE, SOURCE, qk_fix=False, grad_drop=False, batch_size=2, progress=False)
    for number, patch in enumerate(patches):
        expected = [_slope(model, patch, _new(model, patch, i, SOURCE), i) for i in range(len(BASE))]
        _close(got[number], expected, patch.name)
        _close(plain[number], expected, patch.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_named_positions_the_source_may_be_of_another_length(family: str) -> None:
    patches, model = _patches(family, ("k", "z", "resid_mid"), ("s1", "last")), _model(family)
    got = atp(model, patches, BASE, OTHER, "probability", progress=False)
    star = atp_star(model, patches[2:], BASE, OTHER, "probability", qk_fix=False, grad_drop=False, progress=False)
    for number, patch in enumerate(patches):
        new = [_new(model, patch, i, OTHER) for i in range(len(BASE))]
        expected = [_slope(model, patch, new[i], i, metric="probability") for i in range(len(BASE))]
        _close(got[number] * 100, np.array(expected) * 100, patch.name)
    np.testing.assert_allclose(star, got[2:], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_atp_is_the_limit_of_finite_differences(family: str) -> None:
    """Source activations are moved towards the base's; the exact effect over the share left tends to the estimate."""
    model, patches, step = _model(family), _patches(family), 0.005
    wanted = needs(patches)._asdict()
    of_base, of_source = (Reference.compute(model, some, **wanted) for some in (BASE, SOURCE))
    differences = []
    for share in (step, -step):
        moved = {
            name: bank + share * (of_source.tensors[name] - bank) if name.startswith("bank") else bank
            for name, bank in of_base.tensors.items()
        }
        near = Reference(SOURCE, of_source.places, (), of_source.bank, of_source.model, moved)
        differences.append(run(model, patches, BASE, reference=near, progress=False).delta)
    slopes = (differences[0] - differences[1]) / (2 * step)
    got = atp(model, patches, BASE, SOURCE, progress=False)
    error = np.abs(got - slopes).max(1) / (0.1 + np.abs(got).max(1))
    assert np.median(error) < 1e-3 and error.max() < 0.02  # what is left is the third derivative


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["all", ("s1", "last")])
def test_qk_fix_recomputes_the_softmax_with_the_patched_queries_or_keys(family: str, positions: Any) -> None:
    patches = _patches(family, ("q", "k"), positions)
    source = SOURCE if positions == "all" else OTHER
    got = atp_star(_model(family), patches, BASE, source, grad_drop=False, batch_size=2, progress=False)
    for number, patch in enumerate(patches):
        _close(got[number, 1:], [_qk_slope(family, patch, i, source) for i in (1, 2)], patch.name)
    plain = atp(_model(family), patches, BASE, source, progress=False)
    assert (np.abs(got - plain).max(1) > 1e-3).mean() > 0.8  # else nothing was fixed


def test_qk_fix_sees_through_a_saturated_softmax_where_atp_is_blind() -> None:
    model = random_model("llama3_1")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(60)
            layer.self_attn.q_proj.bias.mul_(60)
    patches = [ActivationPatch(site="q", layer=2, heads=(h,), positions="last") for h in range(6)]
    reference = Reference.compute(model, SOURCE, **needs(patches)._asdict())  # type: ignore[arg-type]
    exact = run(model, patches, BASE, reference=reference, progress=False).delta
    fixed = atp_star(model, patches, BASE, SOURCE, grad_drop=False, progress=False)
    plain = atp(model, patches, BASE, SOURCE, progress=False)
    matters = np.abs(exact) > 0.1
    assert matters.sum() >= 6
    assert np.median(np.abs(plain[matters])) < 1e-3 * np.median(np.abs(exact[matters]))
    assert np.median(np.abs(fixed - exact)[matters]) < 0.5 * np.median(np.abs(exact[matters]))


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_drop_detaches_one_layer_after_the_other(family: str) -> None:
    patches, model = _patches(family), _model(family)
    got = atp_star(model, patches, BASE, SOURCE, qk_fix=False, batch_size=2, progress=False)
    for number, patch in enumerate(patches):
        new = [_new(model, patch, i, SOURCE) for i in (0, 1)]
        slopes = np.array([[_slope(model, patch, new[i], i, layer) for i in (0, 1)] for layer in range(LAYERS)])
        if patch.site not in ("embed", "resid_pre", "resid_mid", "resid_post"):
            assert not slopes[patch.layer].any()  # in its own layer
        _close(got[number, :2], np.abs(slopes).sum(0) / (LAYERS - 1), patch.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_drop_and_qk_fix_go_together(family: str) -> None:
    patches = _patches(family, ("q", "k"))
    got = atp_star(_model(family), patches, BASE, SOURCE, progress=False)
    for number, patch in enumerate(patches):
        slopes = [[_qk_slope(family, patch, 0, SOURCE, layer)] for layer in range(LAYERS)]
        _close(got[number, :1], np.abs(slopes).sum(0) / (LAYERS - 1), patch.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_heads_and_joint_patches_are_sums(family: str) -> None:
    model = _model(family)
    one, two = (ActivationPatch(site="q", layer=1, heads=(h,)) for h in (0, 2))
    both = ActivationPatch(site="q", layer=1, heads=(0, 2))
    mlp = ActivationPatch(site="mlp_out", layer=0, positions="s1")
    for fix in (True, False):
        parts = atp_star(model, [one, two, mlp], BASE, SOURCE, qk_fix=fix, grad_drop=False, progress=False)
        sums = atp_star(model, [both, (one, mlp)], BASE, SOURCE, qk_fix=fix, grad_drop=False, progress=False)
        np.testing.assert_allclose(sums, [parts[0] + parts[1], parts[0] + parts[2]], atol=1e-5)


# --- edges ----------------------------------------------------------------------------------------------------------------


def _norms(model: Any, layer: int) -> tuple[nn.Module, nn.Module]:
    """The norms in front of attention and of the MLP."""
    if hasattr(model, "transformer"):
        return model.transformer.h[layer].ln_1, model.transformer.h[layer].ln_2
    block = model.model.layers[layer]
    return block.input_layernorm, getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)


@cache
@torch.no_grad()
def _added(model: Any, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """What every sender adds to the stream, `[pos d_model]`, by the names of `ground_truth/paths.py`."""
    found = {"embed": slow.activation(model, ids, "embed", None)}
    for layer in range(LAYERS):
        z = slow.activation(model, ids, "z", layer)
        project = slow.parts(model, layer).project
        bias = 0 if getattr(project, "bias", None) is None else project.bias
        scale: Any = 1.0
        if hasattr(getattr(model, "model", None) and model.model.layers[layer], "post_feedforward_layernorm"):
            norm, out = model.model.layers[layer].post_attention_layernorm, project(z.flatten(1))
            scale = (1 + norm.weight) / (out.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        for head in range(z.shape[1]):
            alone = torch.zeros_like(z)
            alone[:, head] = z[:, head]
            found[f"z.{layer}.{head}"] = (project(alone.flatten(1)) - bias) * scale
        found[f"mlp_out.{layer}"] = slow.activation(model, ids, "mlp_out", layer)
    return found


@cache
def _ablated(model: Any, prompt: int, ablation: str) -> dict[str, Tensor]:
    """What ablated edges of every sender carry, `[pos d_model]`, where the mean is over all tokens of `OTHER`."""
    if ablation == "patching":
        return _added(model, SOURCE.input_ids[prompt])
    zeros = {name: torch.zeros_like(x) for name, x in _added(model, BASE.input_ids[prompt]).items()}
    if ablation == "zero":
        return zeros
    of_others = [_added(model, ids) for ids in OTHER.input_ids]
    return {name: x + torch.cat([some[name] for some in of_others]).mean(0) for name, x in zeros.items()}


def _edges_by_hand(
    model: Any,
    prompt: int,
    moved: tuple[str, int | None, Tensor] | None = None,
    at: dict[str, Tensor] | None = None,
    metric: str = "logit_diff",
    ablation: str = "patching",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The metric of base when every receiver reads norm(stream + sum of t x change of each sender), and the t of each receiver.

    `moved`: a site whose activation is shifted first. `at`: the t, by default zeros to differentiate at.
    """
    ids = BASE.input_ids[prompt]
    base, ablated = _added(model, ids), _ablated(model, prompt, ablation)
    changes = {name: ablated[name] - base[name] for name in base}
    senders = {r: [s for s in changes if paths.precedes(s, r)] for r in paths.receivers(model)}
    ts = at or {r: torch.zeros(len(those), requires_grad=True) for r, those in senders.items()}
    stream: dict[str, Tensor] = {}

    def extra(receiver: str) -> Tensor:
        return torch.einsum("s,spd->pd", ts[receiver], torch.stack([changes[s] for s in senders[receiver]]))

    def keep(name: str) -> Change:
        def kept(x: Tensor) -> Tensor:
            stream[name] = x
            return x

        return kept

    with ExitStack() as stack:
        if moved is not None:
            site, layer, shift = moved
            for handle in slow.hooks(model, site, layer, lambda x: x + shift):
                stack.callback(handle.remove)
        for layer in range(LAYERS):
            block, (_, before_mlp) = slow.parts(model, layer).block, _norms(model, layer)
            stack.callback(slow.on_input(block, keep(f"pre.{layer}")).remove)
            stack.callback(slow.on_input(before_mlp, keep(f"mid.{layer}")).remove)
        for receiver in senders:
            where = paths.place(model, receiver)
            site, layer = receiver.split(".")[0], int((receiver + ".0").split(".")[1])
            before_attention, before_mlp = _norms(model, layer)

            def read(x, receiver=receiver, where=where, site=site, layer=layer, norms=(before_attention, before_mlp)):
                if site == "logits":
                    return x + extra(receiver)
                if site == "mlp_in":
                    return norms[1].forward(stream[f"mid.{layer}"] + extra(receiver))[None]
                normed = norms[0].forward((stream[f"pre.{layer}"] + extra(receiver))[None])
                return where.module.forward(normed)[..., where.entries]

            stack.callback(paths._hook(where, read).remove)
        logits = model(torch.tensor([ids])).logits[0, -1]
    return _metric(logits, prompt, metric), ts


def _slow_edges(model: Any, prompt: int, moved: Any = None, ablation: str = "patching") -> dict[str, Tensor]:
    """Minus the derivative along every edge, for each receiver those of its senders."""
    value, ts = _edges_by_hand(model, prompt, moved, ablation=ablation)
    return dict(zip(ts, [-g for g in torch.autograd.grad(value, list(ts.values()))], strict=True))


def _compare(scores: EdgeScores, model: Any, prompt: int, expected: dict[str, Tensor]) -> None:
    for column, receiver in enumerate(scores.receivers):
        got = scores.per_prompt[:, column, prompt]
        there = [paths.precedes(str(sender), str(receiver)) for sender in scores.senders]
        assert (np.isfinite(got) == there).all() and (scores.exists[:, column] == there).all()
        _close(got[there], expected[str(receiver)].detach().numpy(), f"{receiver} of prompt {prompt}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edge_is_the_derivative_along_it(family: str) -> None:
    model = _model(family)
    scores = edge_attribution(model, BASE, SOURCE, batch_size=2, progress=False)
    assert tuple(map(str, scores.senders)) == paths.senders(model)
    assert tuple(map(str, scores.receivers)) == paths.receivers(model)
    assert scores.per_prompt.dtype == np.float32
    assert (np.abs(scores.per_prompt[scores.exists]) > 1e-4).mean() > 0.9
    for prompt in range(len(BASE)):
        _compare(scores, model, prompt, _slow_edges(model, prompt))


@pytest.mark.parametrize("family", FEWER)
@pytest.mark.parametrize(("ablation", "source"), [("mean", OTHER), ("zero", None)])
def test_under_other_ablations_every_edge_is_the_derivative_towards_what_it_then_carries(
    ablation: Any, source: TokenizedPrompts | None, family: str
) -> None:
    model, steps = _model(family), 2
    scores = edge_attribution(model, BASE, source, ablation=ablation, batch_size=2, progress=False)
    by_inputs = edge_attribution(
        model, BASE, source, method="eap_ig_inputs", steps=steps, ablation=ablation, progress=False
    )
    for prompt in range(len(BASE)):
        at_base = _slow_edges(model, prompt, ablation=ablation)
        _compare(scores, model, prompt, at_base)
        embedded = _ablated(model, prompt, ablation)["embed"] - _added(model, BASE.input_ids[prompt])["embed"]
        half_way = _slow_edges(model, prompt, ("embed", None, embedded / steps), ablation)
        _compare(by_inputs, model, prompt, {r: (at_base[r] + half_way[r]) / steps for r in at_base})


@pytest.mark.parametrize(
    "how",
    [{}, {"ablation": "mean"}, pytest.param({"method": "eap_ig_activations", "steps": 2}, marks=pytest.mark.slow)],
)
def test_edges_take_no_more_memory_than_they_are_given(how: dict[str, Any]) -> None:
    model, base, source = _model("gemma2"), random_prompts((9,) * 6), random_prompts((9,) * 6, seed=1)
    given = 500_000
    with Peak() as most:
        free = edge_attribution(model, base, source, batch_size=6, progress=False, **how)
    with Peak() as peak:
        scores = edge_attribution(model, base, source, batch_size=6, memory=given, progress=False, **how)
    assert given / 3 < peak.bytes <= given < most.bytes
    _close(scores.per_prompt[scores.exists], free.per_prompt[scores.exists])
    with pytest.raises(ValueError, match=r"do not hold what one prompt takes; allow at least 0\.3 MiB"):
        edge_attribution(model, base, source, memory=10_000, progress=False)


@pytest.mark.parametrize("measure", first_only([atp, atp_star]))
def test_patches_take_no_more_memory_than_they_are_given_besides_what_is_kept_of_source(measure: Any) -> None:
    model, base, source = _model("llama3_1"), random_prompts((30,) * 12), random_prompts((30,) * 12, seed=1)
    patches = [ActivationPatch(site=site, layer=layer, heads=(0,)) for site in "zq" for layer in range(LAYERS)]
    reference = Reference.compute(model, source, **needs(patches)._asdict(), progress=False)
    kept = sum(x.nbytes for x in reference.tensors.values())
    given = 2_000_000
    with Peak() as most:
        free = measure(model, patches, base, source, batch_size=12, progress=False)
    with Peak() as peak:
        _close(measure(model, patches, base, source, batch_size=12, memory=given, progress=False), free)
    assert given / 3 < peak.bytes - kept <= given < most.bytes
    with pytest.raises(ValueError, match="do not hold what one prompt takes"):
        measure(model, patches, base, source, memory=10_000, progress=False)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen2_5"])
def test_an_edge_is_the_limit_of_finite_differences_of_one_receivers_input(family: str) -> None:
    model, eps = _model(family), 0.03
    scores = edge_attribution(model, BASE, SOURCE, progress=False)
    for sender, receiver in (
        ("embed", "q.2.0"),
        ("z.0.1", "k.1.0"),
        ("mlp_out.0", "mlp_in.2"),
        ("z.2.3", "mlp_in.2"),
        ("mlp_out.2", "logits"),
    ):
        at = {r: torch.zeros(sum(paths.precedes(s, r) for s in paths.senders(model))) for r in paths.receivers(model)}
        values = []
        for step in (eps, -eps):
            at[receiver][paths.senders(model).index(sender)] = step
            with torch.no_grad():
                values.append(_edges_by_hand(model, 0, at=at)[0].item())
        got = scores.edge(f"{sender}->{receiver}")[0]
        assert got == pytest.approx(-(values[0] - values[1]) / (2 * eps), abs=2e-3, rel=5e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edges_of_a_sender_add_up_to_its_atp_and_those_into_the_logits_to_that_of_the_final_stream(
    family: str,
) -> None:
    model = _model(family)
    scores = edge_attribution(model, BASE, SOURCE, progress=False)
    # Behind Gemma's post-norm an edge has the norm's scale frozen in each run, and z moves it.
    nodes = [n for n in scores.senders if family != "gemma2" or n.site != "z"]
    patches = [ActivationPatch(site=n.site, layer=n.layer, heads=n.heads) for n in nodes]
    got = np.nansum(scores.per_prompt, 1)[[scores.senders.index(n) for n in nodes]]
    _close(got, atp(model, patches, BASE, SOURCE, progress=False))
    final = ActivationPatch(site="resid_post", layer=LAYERS - 1)
    _close(scores.per_prompt[:, -1].sum(0), atp(model, final, BASE, SOURCE, progress=False)[0])


def _shift(model: Any, prompt: int, stage: str, share: float) -> tuple[str, int | None, Tensor]:
    """A part of the way from base to source at one stage: "embed", "attn_out.1", "mlp_out.2"."""
    site, _, layer = stage.partition(".")
    at = int(layer) if layer else None
    old, new = (slow.activation(model, s.input_ids[prompt], site, at) for s in (BASE, SOURCE))
    return site, at, share * (new - old)


@pytest.mark.parametrize("family", FAMILIES)
def test_eap_ig_inputs_averages_the_derivatives_along_interpolated_embeddings(family: str) -> None:
    model, steps = _model(family), 3
    scores = edge_attribution(model, BASE, SOURCE, method="eap_ig_inputs", steps=steps, progress=False)
    for prompt in (1,):
        runs = [_slow_edges(model, prompt, _shift(model, prompt, "embed", 1 - k / steps)) for k in range(1, steps + 1)]
        _compare(scores, model, prompt, {r: sum(run[r] for run in runs) / steps for r in runs[0]})


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama3_1"])
def test_eap_ig_activations_interpolates_what_each_sender_adds(family: str) -> None:
    model, steps = _model(family), 2
    scores = edge_attribution(model, BASE, SOURCE, method="eap_ig_activations", steps=steps, progress=False)
    expected: dict[str, Tensor] = {}
    for stage in ("embed", *(f"{site}.{layer}" for layer in range(LAYERS) for site in ("attn_out", "mlp_out"))):
        runs = [_slow_edges(model, 1, _shift(model, 1, stage, 1 - k / steps)) for k in range(1, steps + 1)]
        own = stage.replace("attn_out", "z") + ("." if stage.startswith("attn") else "")
        for receiver, first in runs[0].items():
            those = [s for s in paths.senders(model) if paths.precedes(s, receiver)]
            mean = sum(run[receiver].detach() for run in runs) / steps
            filled = expected.setdefault(receiver, torch.full_like(first, torch.nan).detach())
            for place, sender in enumerate(those):
                if sender == own or (own.endswith(".") and sender.startswith(own)):
                    filled[place] = mean[place]
    _compare(scores, model, 1, expected)


def test_gradients_that_float16_would_round_to_0_are_refused() -> None:
    model = random_model("qwen2_5").to(torch.float16)
    patches = [ActivationPatch(site="z", layer=0, heads=(0,))]
    for measure in (
        lambda: atp(model, patches, BASE, SOURCE, "probability"),
        lambda: atp_star(model, patches, BASE, SOURCE, "probability"),
        lambda: edge_attribution(model, BASE, SOURCE, "probability"),
        lambda: edge_attribution(model, BASE, SOURCE, "kl", method="eap_ig_inputs"),
    ):
        with pytest.raises(ValueError, match="too small for float16; load the model in bfloat16 or float32"):
            measure()
    for metric in ("logit_diff", "logit"):
        assert np.isfinite(atp(model, patches, BASE, SOURCE, metric, progress=False)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_of_integrated_gradients_is_eap(family: str) -> None:
    plain = edge_attribution(_model(family), BASE, SOURCE, progress=False).per_prompt
    for method in ("eap_ig_inputs", "eap_ig_activations"):
        one = edge_attribution(_model(family), BASE, SOURCE, method=method, steps=1, progress=False)  # type: ignore[arg-type]
        np.testing.assert_allclose(one.per_prompt, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "metric"), [("qwen2_5", "logit_diff"), ("gemma2", "kl"), ("gpt2", "probability")])
def test_with_many_steps_the_edges_of_the_embedding_add_up_to_the_whole_effect(family: str, metric: str) -> None:
    """Completeness (Sundararajan et al. 2017): everything that differs goes out from the embedding."""
    model = _model(family)
    two, partners = (_first_two(some) for some in (BASE, SOURCE))
    everything = ActivationPatch(site="embed")
    reference = Reference.compute(model, partners, **needs([everything])._asdict())  # type: ignore[arg-type]
    exact = run(model, everything, two, metric, reference, progress=False).delta[0]
    errors = []
    for steps in (10, 60):
        scores = edge_attribution(model, two, partners, metric, "eap_ig_inputs", steps=steps, progress=False)
        errors.append(np.abs(np.nansum(scores.per_prompt[0], 0) - exact).max())
    assert errors[1] < 0.1 * np.abs(exact).max() and errors[1] < errors[0] / 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_with_many_steps_the_edges_of_a_stage_add_up_to_its_exact_effect(family: str) -> None:
    model = _model(family)
    two, partners = (_first_two(some) for some in (BASE, SOURCE))
    stages = [(site, layer) for layer in range(LAYERS) for site in ("attn_out", "mlp_out")]
    patches = [ActivationPatch(site=site, layer=layer) for site, layer in stages]
    reference = Reference.compute(model, partners, **needs(patches)._asdict())  # type: ignore[arg-type]
    exact = run(model, patches, two, reference=reference, progress=False).delta
    scores = edge_attribution(model, two, partners, method="eap_ig_activations", steps=16, progress=False)
    sites = {"attn_out": "z", "mlp_out": "mlp_out"}
    for (site, layer), delta in zip(stages, exact, strict=True):
        rows = [i for i, node in enumerate(scores.senders) if node[:2] == (sites[site], layer)]
        got = np.nansum(scores.per_prompt[rows], (0, 1))
        np.testing.assert_allclose(got, delta, atol=0.06 * np.abs(exact).max(), err_msg=f"{site}.{layer}")
    plain = edge_attribution(model, two, partners, progress=False)
    assert np.abs(np.nansum(plain.per_prompt[1:], (0, 1)) - exact.sum(0)).max() > 0.1  # what the steps are for


def _first_two(prompts: TokenizedPrompts) -> TokenizedPrompts:
    return prompts.take((0, 1))


def test_edges_are_found_by_name_and_ranked_by_size() -> None:
    scores = edge_attribution(_model("llama3_1"), BASE, SOURCE, progress=False)
    row, column = scores.senders.index(Node("z", 0, 1)), scores.receivers.index(Node("k", 2, 0))
    np.testing.assert_array_equal(scores.edge("z.0.1->k.2.0"), scores.per_prompt[row, column])
    ranked = scores.ranked()
    assert len(ranked) == scores.exists.sum() == len(dict(ranked))
    sizes = [abs(value) for _, value in ranked]
    assert sizes == sorted(sizes, reverse=True)
    assert all(value == pytest.approx(scores.edge(name).mean(), abs=1e-6) for name, value in ranked[:20])
    for name in ("z.0.1->k.0.0", "z.0.1", "z.9.0->logits", "head->logits"):
        with pytest.raises(ValueError, match=r"there is no (edge|node)"):
            scores.edge(name)


# --- both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batches_nor_padding_nor_what_else_is_asked_matter(family: str) -> None:
    model, patches = _model(family), _patches(family)
    together = atp_star(model, patches, BASE, SOURCE, batch_size=3, progress=False)
    alone = [atp_star(model, patch, BASE, SOURCE, batch_size=1, progress=False)[0] for patch in patches[::4]]
    np.testing.assert_allclose(together[::4], alone, atol=1e-5, rtol=1e-5)
    edges = [edge_attribution(model, BASE, SOURCE, batch_size=size, progress=False) for size in (3, 1)]
    _close(*(some.per_prompt[some.exists] for some in edges))


def test_a_pair_of_the_same_text_twice_has_edges_of_0_and_the_others_are_as_without_it() -> None:
    ids = BASE.input_ids[0], *SOURCE.input_ids[1:]
    found = edge_attribution(_model("gemma2"), BASE, replace(SOURCE, input_ids=ids), batch_size=1, progress=False)
    others = edge_attribution(_model("gemma2"), BASE.take([1, 2]), SOURCE.take([1, 2]), batch_size=1, progress=False)
    np.testing.assert_allclose(found.per_prompt[found.exists][:, 0], 0, atol=1e-6)
    np.testing.assert_array_equal(found.per_prompt[..., 1:], others.per_prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(family: str) -> None:
    patches = _patches(family, ("q", "k"))
    found = [atp_star(_model(family, how), patches, BASE, SOURCE, progress=False) for how in (None, "eager")]
    np.testing.assert_allclose(*found, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama3_1"])
def test_a_bfloat16_model_gives_float32_scores_near_those_of_its_own_weights_in_float32(family: str) -> None:
    half = random_model(family).to(torch.bfloat16)
    full = random_model(family).to(torch.bfloat16).float()
    patches = _patches(family)
    for measure in (
        lambda m: atp_star(m, patches, BASE, SOURCE, progress=False),
        lambda m: edge_attribution(m, BASE, SOURCE, progress=False).per_prompt[..., :],
    ):
        got, expected = measure(half), measure(full)
        there = np.isfinite(expected)
        assert got.dtype == np.float32 and (np.isfinite(got) == there).all()
        assert np.corrcoef(got[there], expected[there])[0, 1] > 0.97
        exactly_bf16 = torch.from_numpy(got[there]).bfloat16().float().numpy() == got[there]
        assert (exactly_bf16 & (got[there] != 0)).mean() < 0.1  # summed wider than the model's dtype


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1"])
def test_what_heads_add_is_multiplied_in_float32_in_a_bfloat16_model(family: str) -> None:
    model = random_model(family).to(torch.bfloat16)
    scores = edge_attribution(model, BASE, SOURCE, batch_size=1, progress=False)
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x * 1)  # of its own, as the hook writes into what it was cut from
        return seen[0]

    handle = paths._hook(paths.place(model, "logits"), keep)
    logits = model(torch.tensor([BASE.input_ids[0]])).logits[0, -1].float()
    handle.remove()
    (gradient,) = torch.autograd.grad(_metric(logits, 0), seen[0])
    for layer in range(LAYERS):
        z, new = (slow.activation(model, some.input_ids[0], "z", layer).detach().float() for some in (BASE, SOURCE))
        weight = slow.parts(model, layer).project.weight.detach().float().T.unflatten(0, z.shape[1:])
        expected = -torch.einsum("phd,hdm,pm->h", new - z, weight, gradient[0].float())
        got = [scores.edge(f"z.{layer}.{head}->logits")[0] for head in range(z.shape[1])]
        _close(np.array(got), expected.numpy())


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = random_model(family).train()
    next(model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    modules = [name for name, _ in model.named_modules()]
    atp_star(model, _patches(family), BASE, SOURCE, progress=False)
    edge_attribution(model, BASE, SOURCE, method="eap_ig_inputs", steps=2, progress=False)
    with pytest.raises(ValueError, match="not finite"):
        list(model.parameters())[-1].data.fill_(torch.nan)
        edge_attribution(model, BASE, SOURCE, progress=False)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert [name for name, _ in model.named_modules()] == modules and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_done_is_refused_in_a_sentence_before_the_model_runs() -> None:
    model = random_model("llama3_1")
    model.forward = None  # type: ignore[assignment]
    z = ActivationPatch(site="z", layer=1, heads=(2,))

    for measure in (atp, atp_star):
        for match, patches, source, more in (
            ("rank", z, SOURCE, {"metric": "rank"}),
            ("accuracy", z, SOURCE, {"metric": "accuracy"}),
            ("kl to the base run has no first-order term there", z, SOURCE, {"metric": "kl"}),
            ("unknown metric 'ld'", z, SOURCE, {"metric": "ld"}),
            ("pair 0 has 8 tokens and its source 7", z, OTHER, {}),
            ("is not a patch", Ablation(kind="zero", site="z", layer=1, heads=(2,)), SOURCE, {}),
            ("layer 7 is out of range", ActivationPatch(site="mlp_out", layer=7), SOURCE, {}),
            ("nothing to run", [], SOURCE, {}),
            ("must be tokenised", z, "prompts", {}),
            ("batch_size must be at least 1", z, SOURCE, {"batch_size": 0}),
            ("3 base prompts and 2 source prompts", z, _first_two(SOURCE), {}),
            ("base and source are the same texts", z, BASE, {}),
        ):
            with pytest.raises(ValueError, match=match):
                measure(model, patches, BASE, source, progress=False, **more)  # type: ignore[operator]

    for match, source, more in (
        ("rank", SOURCE, {"metric": "rank"}),
        ("kl to the base run", SOURCE, {"metric": "kl"}),
        ("kl to the base run", SOURCE, {"metric": "kl", "method": "eap_ig_inputs", "steps": 1}),
        ("unknown metric", SOURCE, {"metric": "ld"}),
        ("unknown method 'ig'", SOURCE, {"method": "ig"}),
        ("steps must be a whole number", SOURCE, {"method": "eap_ig_inputs", "steps": 0}),
        ("pair 0 has 8 tokens and its source 7", OTHER, {}),
        ("3 base prompts and 2 source prompts", _first_two(SOURCE), {}),
        ("base and source are the same texts", BASE, {}),
        ("'patching' takes its values from source prompts", None, {}),
        ("unknown ablation 'median'; choose among patching, mean, zero", SOURCE, {"ablation": "median"}),
        ("batch_size must be at least 1", SOURCE, {"batch_size": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            edge_attribution(model, BASE, source, progress=False, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no logits"):
        edge_attribution(random_model("llama3_1", "bare"), BASE, SOURCE, progress=False)


def test_qk_fix_needs_an_attention_that_can_be_seen_and_grad_drop_a_second_layer() -> None:
    model = random_model("llama3_1")
    patch = ActivationPatch(site="q", layer=1, heads=(2,))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot be seen"):
        atp_star(model, patch, BASE, SOURCE, progress=False)
    shallow = random_model("llama3_1")
    shallow.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="grad_drop=False"):
        atp_star(shallow, ActivationPatch(site="mlp_out", layer=0), BASE, SOURCE, progress=False)


def test_a_projection_that_cannot_be_split_is_refused() -> None:
    model = random_model("llama3_1")
    model.model.layers[1].self_attn.o_proj = type("Adapted", (nn.Linear,), {})(72, 42)
    with pytest.raises(ValueError, match="layer 1 is a Adapted"):
        edge_attribution(model, BASE, SOURCE, progress=False)


def _with_a_hook_that_does_nothing(model: Any) -> Any:
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj") if hasattr(model, "model") else ("c_attn",):
            attention = (
                model.model.layers[layer].self_attn if hasattr(model, "model") else model.transformer.h[layer].attn
            )
            getattr(attention, name).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("family", FEWER)
def test_heads_whose_weights_cannot_be_split_give_the_same_edges(family: str) -> None:
    split = edge_attribution(_model(family), BASE, SOURCE, progress=False)
    whole = edge_attribution(_with_a_hook_that_does_nothing(random_model(family)), BASE, SOURCE, progress=False)
    _close(split.per_prompt[split.exists], whole.per_prompt[whole.exists])


@pytest.mark.parametrize("together", [1, 7])
def test_edges_do_not_depend_on_how_many_receivers_are_multiplied_at_once(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = edge_attribution(_model("llama3_1"), BASE, SOURCE, progress=False)
    monkeypatch.setattr(receivers, "TOGETHER", together)
    others = edge_attribution(_model("llama3_1"), BASE, SOURCE, progress=False)
    _close(scores.per_prompt[scores.exists], others.per_prompt[others.exists])


def test_edges_take_a_run_of_source_and_one_of_base_and_unembed_the_answers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama3_1")
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape)))
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    edge_attribution(model, BASE, SOURCE, progress=False)
    assert [shape[-1] for shape in seen] == [2], "the answers of base; source is not unembedded"
    assert passes.count(len(BASE)) == 2, "source and base"
