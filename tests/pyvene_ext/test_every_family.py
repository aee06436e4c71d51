"""Every family through everything that stands on its card: right to 1e-5 against plain hooks, or refused as the table says.

The truth is `pyvene_ext.intervenable.truth`, which knows no card: one prompt at a time, unpadded, plain hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelcards import FIELD_NAMES, card_of, dimensions
from pyvene_ext import Ablation, ActivationPatch, PathPatch, patch, run
from pyvene_ext.engine.plain import reference_for
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.intervenable.truth import Truth
from pyvene_ext.methods.attribution.atp import atp, atp_star
from pyvene_ext.methods.attribution.edges import edge_attribution
from pyvene_ext.methods.circuits.circuit import Circuit, exists
from pyvene_ext.methods.circuits.running import run_circuits
from pyvene_ext.methods.heads.flow import flow_routes
from pyvene_ext.methods.heads.lens import direct_logit_attribution, logit_lens
from pyvene_ext.prompts.tokenized import AnswerTokens
from pyvene_ext.specs.joint import members
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, MORE_FAMILIES, random_model

EVERY = (*FAMILIES, *MORE_FAMILIES)
PARALLEL = ("cohere", "gpt_neox", "gptj", "falcon")
WRITTEN_OUT = ("gptj", "falcon", "bloom")

# What is refused: family, part of the matrix, and what the sentence says. Everything else must be right.
REFUSED: dict[tuple[str, str], str] = {
    **{(family, "resid_mid"): "has no resid_mid" for family in PARALLEL},
    **{(family, "scores"): "has no scores" for family in WRITTEN_OUT},
    **{(family, "path to mlp_in"): "run attention and MLP side by side" for family in PARALLEL},
    **{(family, "circuits"): "run attention and MLP side by side" for family in PARALLEL},
    **{(family, "flow"): "run attention and MLP side by side" for family in PARALLEL},
    **{(family, "flow"): "attention does not go through" for family in WRITTEN_OUT},
    ("opt", "gradients at resid_mid"): "no gradient can be taken there",
    **{(family, "gradients at resid_mid"): "has no resid_mid" for family in PARALLEL},
}


@cache
def model_of(family: str) -> Any:
    return random_model(family)


BASE = random_prompts((6, 8), seed=1)
SOURCE = replace(random_prompts((6, 8), seed=2), answers=BASE.answers)


def inputs(ids: Sequence[int]) -> dict[str, Tensor]:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": torch.arange(len(ids))[None]}


def by_hooks(model: Any, edits_of: Callable[[int], list[tuple]]) -> np.ndarray:
    """The logit difference of every base prompt, by itself, with edits (component, layer, edit)."""
    found = []
    for prompt, ids in enumerate(BASE.input_ids):
        logits = Truth(model).run_with(inputs(ids), edits_of(prompt))[0, -1]
        io, s = BASE.answer_ids[prompt]
        found.append(float(logits[io] - logits[s]))
    return np.array(found)


def held(model: Any, prompts: Any, component: str, layer: int) -> list[Tensor]:
    """What a place holds in each prompt."""
    return [Truth(model).read(inputs(ids), component, layer) for ids in prompts.input_ids]


def near(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max())))


def put(new: Tensor | float, x: Tensor, heads: Sequence[int] | None = None, at: slice = slice(None)) -> Tensor:
    """A copy of `batch (head) pos d` with something else in some heads and positions."""
    x = x.clone()
    value = new if isinstance(new, float) or heads is None else new[:, heads][:, :, at]
    if heads is None:
        x[:, at] = value if isinstance(value, float) or value.ndim == 1 else value[:, at]
    else:
        x[:, heads, at] = value
    return x


def right_or_refused(family: str, part: str, check: Callable[[], None]) -> None:
    """Run a part of the matrix: it must be right, or refused in the words of the table."""
    if (said := REFUSED.get((family, part))) is None:
        check()
        return
    with pytest.raises(ValueError, match=said) as refusal:
        check()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", EVERY)
def test_ablations_by_both_engines_are_those_of_plain_hooks(family: str) -> None:
    model = model_of(family)
    head = dimensions(model.config)["n_head"] - 1
    mean = torch.cat([x[0] for x in held(model, BASE, "mlp_contribution", 0)]).mean(0)
    last = slice(-1, None)
    zero = partial(put, 0.0)
    closed = lambda x: x.index_fill(1, torch.tensor([head]), -torch.inf)  # noqa: E731
    cases: list[tuple[str, Ablation, tuple]] = [
        ("z", Ablation(kind="zero", site="z", layer=0, heads=(head,)), (0, partial(zero, heads=[head]))),
        (
            "z",
            Ablation(kind="zero", site="z", layer=1, heads=(0,), positions="last"),
            (1, partial(zero, heads=[0], at=last)),
        ),
        ("z", Ablation(kind="zero", site="z", layer=0, heads=tuple(range(head + 1))), (0, zero_all)),
        ("mlp_out", Ablation(kind="mean", site="mlp_out", layer=0), (0, partial(put, mean))),
        ("mlp_out", Ablation(kind="zero", site="mlp_out", layer=1, positions="last"), (1, partial(zero, at=last))),
        ("attn_out", Ablation(kind="zero", site="attn_out", layer=0, positions="last"), (0, partial(zero, at=last))),
        ("v", Ablation(kind="zero", site="v", layer=0, heads=(0,)), (0, partial(zero, heads=[0]))),
        ("k", Ablation(kind="zero", site="k", layer=1, heads=(0,)), (1, partial(zero, heads=[0]))),
        ("resid_mid", Ablation(kind="zero", site="resid_mid", layer=1, positions="last"), (1, partial(zero, at=last))),
        ("scores", Ablation(kind="zero", site="scores", layer=1, heads=(head,)), (1, closed)),
    ]
    right = []
    for part, spec, (layer, edit) in cases:
        if (family, part) in REFUSED:
            right_or_refused(family, part, lambda spec=spec: run(model, [spec], BASE, progress=False))
            right_or_refused(family, part, lambda spec=spec: sweep(model, [spec], BASE, progress=False))
        else:
            right.append((spec, by_hooks(model, lambda _, s=spec, e=edit, n=layer: [(FIELD_NAMES[s.site], n, e)])))
    specs, expected = [spec for spec, _ in right], np.stack([values for _, values in right])
    reference = reference_for(model, specs, BASE, progress=False)
    plain = run(model, specs, BASE, reference=reference, progress=False)
    swept = sweep(model, specs, BASE, reference=reference, progress=False)
    assert near(plain.baseline, by_hooks(model, lambda _: []))
    for number, spec in enumerate(specs):
        assert near(plain.intervened[number], expected[number]), f"{spec.name}, plain"
        assert near(swept.intervened[number], expected[number]), f"{spec.name}, swept"


@pytest.mark.parametrize("family", EVERY)
def test_whole_answers_and_the_loss_at_every_token_by_both_engines_are_those_of_plain_hooks(family: str) -> None:
    model = model_of(family)
    answers = (AnswerTokens(((5, 6, 7),), ((8,),)), AnswerTokens(((9,),), ((5, 4), (5, 3))))
    prompts = replace(BASE, answers=answers)
    specs = [
        Ablation(kind="zero", site="z", layer=0, heads=(1,)),
        Ablation(kind="zero", site="mlp_out", layer=1),
        (Ablation(kind="zero", site="v", layer=0, heads=(0,)), Ablation(kind="zero", site="z", layer=1, heads=(0,))),
    ]
    whole, losses = np.zeros((len(specs), 2)), np.full((len(specs), 2, 8), np.nan)
    for number, spec in enumerate(specs):
        for prompt, ids in enumerate(prompts.input_ids):

            def log_shares(sequence: tuple[int, ...], spec: Any = spec, length: int = len(ids)) -> Tensor:
                edits: list[tuple] = [
                    (FIELD_NAMES[a.site], a.layer, partial(put, 0.0, heads=a.heads and list(a.heads), at=slice(length)))
                    for a in members(spec)
                ]
                return Truth(model).run_with(inputs(sequence), edits)[0].log_softmax(-1)

            for sign, some in zip((1, -1), answers[prompt], strict=True):
                each = [sum(log_shares(ids + a[:-1])[len(ids) - 1 + at, t] for at, t in enumerate(a)) for a in some]
                whole[number, prompt] += sign * float(torch.tensor(each).logsumexp(0))
            losses[number, prompt, : len(ids) - 1] = -log_shares(ids)[range(len(ids) - 1), list(ids[1:])]
    for engine in (run, sweep):
        found = engine(model, specs, prompts, "answer_logprob_diff", progress=False)
        assert near(found.intervened, whole), engine.__name__
        at_tokens = engine(model, specs, prompts, "next_token_loss", progress=False).intervened
        np.testing.assert_allclose(at_tokens, losses, rtol=1e-5, atol=1e-5)


def zero_all(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


PATCHES = (
    ("resid_pre", 1, None),
    ("attn_out", 0, None),
    ("mlp_in", 1, None),
    ("mlp_out", 0, None),
    ("embed", None, None),
    ("q", 1, 1),
    ("k", 0, 0),
)


@pytest.mark.parametrize("family", EVERY)
def test_activation_patches_by_both_engines_are_those_of_plain_hooks(family: str) -> None:
    model = model_of(family)
    specs, expected = [], []
    for site, layer, head in PATCHES:
        heads = None if head is None else (head,)
        for positions, at in (("all", slice(None)), ("s2", slice(-2, -1))):
            specs.append(ActivationPatch(site=site, layer=layer, heads=heads, positions=positions))
            new = held(model, SOURCE, FIELD_NAMES[site], layer or 0)
            expected.append(
                by_hooks(
                    model,
                    lambda i, new=new, heads=heads, at=at, place=(FIELD_NAMES[site], layer or 0): [
                        (*place, partial(put, new[i], heads=None if heads is None else list(heads), at=at))
                    ],
                )
            )
    for engine in ("plain", "sweep"):
        found = patch(model, specs, base=BASE, source=SOURCE, engine=engine, progress=False)
        for spec, got, wanted in zip(specs, found.intervened, expected, strict=True):
            assert near(got, wanted), f"{spec.name}, {engine}"


def path_by_hooks(model: Any, sender: tuple, receiver: tuple | None, freeze_mlps: bool) -> np.ndarray:
    """Every head frozen to base (and MLPs), the sender from source; what the receiver then reads, put into base."""
    layers, found = range(model.config.num_hidden_layers), []
    frozen = [("head_attention_value_output", layer) for layer in layers]
    frozen += [("mlp_contribution", layer) for layer in layers] if freeze_mlps else []
    for prompt, ids in enumerate(BASE.input_ids):
        truth, base, source = Truth(model), inputs(ids), inputs(SOURCE.input_ids[prompt])
        component, layer, heads = sender
        edits = [(*place, partial(put, truth.read(base, *place))) for place in frozen if place != (component, layer)]
        of_source = partial(put, truth.read(source, component, layer), heads=heads)
        if (component, layer) in frozen:
            value = of_source(truth.read(base, component, layer))
            edits.append((component, layer, partial(put, value)))
        else:
            edits.append((component, layer, of_source))
        if receiver is None:
            logits = truth.run_with(base, edits)
        else:
            seen: list[Tensor] = []
            truth.run_with(base, [*edits, (*receiver[:2], lambda x, seen=seen: (seen.append(x.clone()), x)[1])])
            logits = truth.run_with(base, [(*receiver[:2], partial(put, seen[-1], heads=receiver[2]))])
        io, s = BASE.answer_ids[prompt]
        found.append(float(logits[0, -1, io] - logits[0, -1, s]))
    return np.array(found)


@pytest.mark.parametrize("family", EVERY)
def test_paths_by_both_engines_are_those_of_plain_hooks(family: str) -> None:
    model = model_of(family)
    z, mlp = ("head_attention_value_output", 0, [0]), ("mlp_contribution", 0, None)
    value, mlp_in = ("head_value_output", 1, [0]), ("mlp_input", 1, None)
    cases = []
    for part, sender, by_hand, receiver, place, freeze_mlps in (
        ("path", "z.0.0", z, "logits", None, False),
        ("path", "z.0.0", z, "logits", None, True),
        ("path", "mlp_out.0", mlp, "v.1.0", value, False),
        ("path to mlp_in", "z.0.0", z, "mlp_in.1", mlp_in, False),
    ):
        path = PathPatch(sender=sender, receivers=(receiver,), freeze_mlps=freeze_mlps)
        cases.append((part, path, path_by_hooks(model, by_hand, place, freeze_mlps)))
    for part, path, expected in cases:
        for engine in ("plain", "sweep"):

            def check(path: PathPatch = path, expected: np.ndarray = expected, engine: Any = engine) -> None:
                found = patch(model, [path], base=BASE, source=SOURCE, engine=engine, progress=False)
                assert near(found.intervened[0], expected), f"{path.name}, {engine}"

            swept = f"{part}, swept"
            right_or_refused(family, swept if engine == "sweep" and (family, swept) in REFUSED else part, check)


@pytest.mark.parametrize("family", EVERY)
def test_a_logit_is_the_sum_of_its_parts_and_the_lens_ends_at_the_logits(family: str) -> None:
    model = model_of(family)
    clean = by_hooks(model, lambda _: [])
    lens, parts = (
        logit_lens(model, BASE, progress=False),
        direct_logit_attribution(model, BASE, progress=False).logit_diff,
    )
    assert near(lens.logit_diff[-1], clean)
    assert near(parts.capped, clean)
    total = parts.heads.sum((0, 1)) + parts.mlps.sum(0) + parts.embed + parts.bias
    assert near(total, parts.total)


@pytest.mark.parametrize("family", EVERY)
def test_direct_terms_are_linear_with_every_scale_frozen(family: str) -> None:
    """What a sender's change comes to behind the final norm, worked out by hand and put there by a hook."""
    model = model_of(family)
    last = model.config.num_hidden_layers - 1
    norm = card_of(model).module(model, "final_norm")
    z, heads = "head_attention_value_output", [1]

    def changed(prompt: int, site: str) -> Tensor:
        """What the sender adds to the stream from source, less what it adds in base."""
        base, source = (inputs(prompts.input_ids[prompt]) for prompts in (BASE, SOURCE))
        truth = Truth(model)
        if site == "mlp_out":
            return truth.read(source, "mlp_contribution", last) - truth.read(base, "mlp_contribution", last)
        new, seen = truth.read(source, z, last), list[Tensor]()
        look = ("attention_output", last, lambda x: (seen.append(x), x)[1])
        truth.run_with(base, [look])
        truth.run_with(base, [(z, last, partial(put, new, heads=heads)), look])
        return (seen[1] - seen[0]) * truth.read(base, "attention_contribution", last) / seen[0]

    def behind_norm(prompt: int, site: str) -> Tensor:
        stream = Truth(model).read(inputs(BASE.input_ids[prompt]), "block_output", last)[0, -1]
        return frozen(norm, stream, changed(prompt, site)[0, -1])

    def added(new: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + new], 1)

    for site, name in (("z", f"z.{last}.1"), ("mlp_out", f"mlp_out.{last}")):
        path = PathPatch(sender=name, receivers=("logits",), direct=True)
        found = patch(model, [path], base=BASE, source=SOURCE, progress=False)
        new = [behind_norm(prompt, site) for prompt in range(len(BASE))]
        expected = by_hooks(model, lambda i, new=new: [("final_norm", 0, partial(added, new[i]))])
        assert near(found.intervened[0], expected, 1e-4), path.name


def frozen(norm: Any, at: Tensor, change: Tensor) -> Tensor:
    """What adding `change` to `at` adds behind a norm whose scale is that of `at`."""
    ones = torch.ones_like(at)
    with torch.no_grad():
        bias, behind, shifted = (norm(x[None])[0] for x in (0.0 * ones, at, at + 100.0 * ones))
        if torch.allclose(behind, shifted, atol=1e-3):  # it subtracts the mean
            at, change = at - at.mean(), change - change.mean()
        return change * (behind - bias) / at


@pytest.mark.parametrize("family", EVERY)
def test_circuits_carry_what_each_sender_adds(family: str) -> None:
    model = model_of(family)

    def check() -> None:
        there = exists(model.config)
        without = Circuit.full(model.config).edges - {"z.0.0->logits", "mlp_out.0->logits"}
        found = run_circuits(model, [there, there & False, Circuit(without)], BASE, SOURCE, progress=False)
        clean = by_hooks(model, lambda _: [])
        assert near(found.circuits[0], clean)
        last = model.config.num_hidden_layers - 1
        shares = [held(model, prompts, "head_contribution", 0) for prompts in (BASE, SOURCE)]
        mlps = [held(model, prompts, "mlp_contribution", 0) for prompts in (BASE, SOURCE)]
        change = [b[:, 0] - a[:, 0] + d - c for a, b, c, d in zip(*shares, *mlps, strict=True)]
        expected = by_hooks(model, lambda i: [("block_output", last, lambda x: x + change[i])])
        assert near(found.circuits[2], expected)

    right_or_refused(family, "circuits", check)


@pytest.mark.parametrize("family", EVERY)
def test_gradients_are_those_of_plain_hooks(family: str) -> None:
    model = model_of(family)
    exact = random_model(family).double()
    exact.config._experts_implementation = "eager"  # the only one for float64
    for site, layer, head in (
        ("z", 0, 0),
        ("mlp_out", 0, None),
        ("resid_pre", 1, None),
        ("resid_mid", 0, None),
        ("mlp_in", 1, None),
        ("q", 1, 0),
        ("v", 0, 0),
    ):
        heads = None if head is None else (head,)

        def check(site: str = site, layer: int = layer, heads: Any = heads) -> None:
            spec = ActivationPatch(site=site, layer=layer, heads=heads)
            estimate = atp(model, [spec], BASE, SOURCE, progress=False)[0]
            plain = atp_star(model, [spec], BASE, SOURCE, qk_fix=False, grad_drop=False, progress=False)[0]
            assert near(plain, estimate), spec.name
            new = held(exact, SOURCE, FIELD_NAMES[site], layer)
            own = None if heads is None else list(heads)

            def moved(share: float) -> np.ndarray:
                return by_hooks(
                    exact,
                    lambda i: [(FIELD_NAMES[site], layer, lambda x: x + share * (put(new[i], x, heads=own) - x))],
                )

            # Steps are not too small, as norms compute in float32 whatever they are given, nor so large that another expert is
            # chosen or a neuron switched off on the way.
            h = 0.003
            slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
            assert near(estimate, -slope, 2e-3), spec.name

        right_or_refused(family, f"gradients at {site}", check)


@pytest.mark.parametrize("family", EVERY)
def test_the_gradient_of_an_edge_is_that_of_the_mlps_own_input(family: str) -> None:
    model = model_of(family)

    def check() -> None:
        estimate = edge_attribution(model, BASE, SOURCE, progress=False).edge("z.0.0->mlp_in.0")
        exact = random_model(family).double()
        exact.config._experts_implementation = "eager"
        if family == "opt":  # no module of its own is given its resid_mid whole
            norm: Any = exact.model.decoder.layers[0].final_layer_norm
        else:
            norm, mlp = (card_of(exact).module(exact, place, 0) for place in ("resid_mid", "mlp_input"))
            norm = norm if norm is not mlp else torch.nn.Identity()
        mid = held(exact, BASE, "resid_mid", 0)
        ours, theirs = (held(exact, prompts, "head_contribution", 0) for prompts in (BASE, SOURCE))

        @torch.no_grad()
        def moved(share: float) -> np.ndarray:
            new = [norm(x + share * (b - a)[:, 0]) for x, a, b in zip(mid, ours, theirs, strict=True)]
            return by_hooks(exact, lambda i: [("mlp_input", 0, lambda _: new[i])])

        h = 0.003
        slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        assert near(estimate, -slope, 2e-3)

    right_or_refused(family, "circuits", check)


@pytest.mark.parametrize("family", EVERY)
def test_parts_of_the_stream_add_up(family: str) -> None:
    right_or_refused(family, "flow", lambda: flow_routes(model_of(family), BASE, progress=False) and None)
