"""Activation and path patching are what plain torch hooks do, on either engine, and find what was planted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny.planted_circuits import ARCHITECTURES, CASES, Architecture, planted
from torch import Tensor, nn

from modelcards import n_heads, n_kv_heads, n_layers
from pyvene_ext.engine.measure import METRICS
from pyvene_ext.engine.plain import run
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.patching import patch as patch_module
from pyvene_ext.methods.patching import sweep_paths as sweep_paths_module
from pyvene_ext.methods.patching.patch import (
    Patch,
    Patched,
    all_patches,
    all_paths,
    patch,
    patch_passes,
)
from pyvene_ext.methods.patching.subspace import RANK, concept_direction, concept_directions
from pyvene_ext.models.replay import Replay
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs import graph
from pyvene_ext.specs.ablation import Ablation
from pyvene_ext.specs.files import from_yaml, to_yaml
from pyvene_ext.specs.graph import Node, query_heads, reaches
from pyvene_ext.specs.joint import (
    Spec,
    members,
    needs,
    spec_name,
)
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from tests.ground_truth.paths import every_path_by_hooks, path_patch_by_hooks
from tests.random_prompts import random_prompts
from tests.tiers import first_only
from tests.tiny_random import FAMILIES, random_model
from tests.traces import traces

torch.set_num_threads(1)

LENGTHS = (9, 6, 7, 6)
FIELDS = ("input_ids", "answers", "positions")  # of prompts, one entry each
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)
both_engines = pytest.mark.parametrize("engine", ["plain", "sweep"])


def _source(lengths: tuple[int, ...], seed: int = 5) -> TokenizedPrompts:
    """Other prompts with the answers of BASE."""
    return replace(random_prompts(lengths, seed=seed), answers=BASE.answers)


BASE = random_prompts(LENGTHS)
SOURCE = _source(LENGTHS)
UNEQUAL = _source((6, 8, 7, 9), seed=6)  # of other lengths than BASE, for named positions


@cache
def _model(family: str) -> Any:
    return random_model(family)


# --- The slow, obvious version: one unpadded prompt at a time, plain hooks ---

Change = Callable[[Tensor], Tensor]
SITES = ("q", "k", "v", "z", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_mid", "resid_post", "embed")
BY_HEAD = ("q", "k", "v", "z")
# Site, layer, head (None: whole) and the tokens of the base prompt: what is put there, `[token d]`, or made of what is there.
Put = tuple[str, int, int | None, list[int], Tensor | Change]


def _blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _head_size(model: Any) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _place(model: Any, site: str, layer: int) -> tuple[nn.Module, str]:
    """The module at which a site is, and whether it goes in or comes out; resid_mid is where it is read."""
    gpt2, blocks = hasattr(model, "transformer"), _blocks(model)
    block = blocks[layer]
    post_norms = hasattr(block, "post_feedforward_layernorm")
    final = model.transformer.ln_f if gpt2 else model.model.norm
    if site in ("q", "k", "v"):
        return (block.attn.c_attn if gpt2 else getattr(block.self_attn, f"{site}_proj")), "out"
    projection = block.attn.c_proj if gpt2 else block.self_attn.o_proj
    norm = "ln_2" if gpt2 else "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
    return {
        "z": (projection, "in"),
        "attn_out": (block.post_attention_layernorm if post_norms else projection, "out"),
        "mlp_in": (block.mlp, "in"),
        "mlp_out": (block.post_feedforward_layernorm if post_norms else block.mlp, "out"),
        "resid_mid": (getattr(block, norm), "in"),
        "embed": (blocks[0], "in"),
        "resid_pre": (block, "in"),
        "resid_post": (final if layer + 1 == len(blocks) else blocks[layer + 1], "in"),
    }[site]


def _entries(model: Any, site: str, head: int | None) -> slice:
    """Which entries of what a module gives or gets are a head's."""
    if head is None:
        return slice(None)
    size = _head_size(model)
    skipped = "qkv".index(site) * model.config.hidden_size if hasattr(model, "transformer") and site != "z" else 0
    return slice(skipped + head * size, skipped + (head + 1) * size)


def _hook(module: nn.Module, side: str, change: Change) -> Any:
    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(lambda _module, _args, output: change(output))


@torch.no_grad()
def _hooked(
    model: Any,
    ids: tuple[int, ...],
    puts: Iterable[Put] = (),
    reads: Iterable[tuple[str, int]] = (),
    norms: dict[nn.Module, Tensor] | None = None,
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Logits `[vocab]` at the last token of one prompt with some places set, and what others hold, `[token d]`.

    Norms given with an input keep the scale that they have on it.
    """
    seen: dict[tuple[str, int], Tensor] = {}
    with ExitStack() as stack:
        for norm, frozen_at in (norms or {}).items():
            stack.callback(norm.register_forward_hook(partial(_frozen, frozen_at)).remove)
        for site, layer, head, tokens, value in puts:
            where = _entries(model, site, head)

            def put(x: Tensor, where: slice = where, tokens: list[int] = tokens, value: Any = value) -> Tensor:
                x = x.clone()
                x[0, tokens, where] = value(x[0, tokens, where]) if callable(value) else value
                return x

            if site != "resid_mid":
                stack.callback(_hook(*_place(model, site, layer), put).remove)
                continue
            # The stream is no module's: attention is made to add what is missing from the stream before it.
            entered: list[Tensor] = []
            first_norm = _blocks(model)[layer].ln_1 if hasattr(model, "transformer") else None
            first_norm = first_norm or _blocks(model)[layer].input_layernorm
            stack.callback(_hook(first_norm, "in", lambda x, kept=entered: kept.append(x) or x).remove)

            def add(x: Tensor, kept: list = entered, put: Change = put) -> Tensor:
                return put(kept[-1] + x) - kept[-1]

            stack.callback(_hook(*_place(model, "attn_out", layer), add).remove)
        for site, layer in reads:

            def keep(x: Tensor, key: tuple[str, int] = (site, layer)) -> Tensor:
                seen[key] = x[0].clone()
                return x

            stack.callback(_hook(*_place(model, site, layer), keep).remove)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits, seen


def _spread(norm: Any, x: Tensor) -> Tensor:
    """What a norm divides by: the root of the mean square, of a LayerNorm about the mean."""
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _frozen(at: Tensor, norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A norm's output with the scale it has at another input."""
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else 0.0
    return (output - bias) * _spread(norm, args[0]) / _spread(norm, at) + bias


@torch.no_grad()
def _norm_inputs(model: Any, ids: tuple[int, ...]) -> dict[nn.Module, Tensor]:
    """Every norm of the model, and what it is given in an untouched run."""
    seen: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        for module in model.modules():
            if "Norm" in type(module).__name__:
                stack.callback(_hook(module, "in", lambda x, of=module: seen.setdefault(of, x.clone())).remove)
        model(torch.tensor([ids]), use_cache=False)
    return seen


def _direction(
    family: str, edit: ActivationPatch, head: int | None, base: TokenizedPrompts, source: TokenizedPrompts
) -> np.ndarray:
    """S / |S| of arXiv 2502.11806, of all pairs' differences at a place and its positions."""
    rows = []
    for prompt in range(len(base)):
        of_base, of_source = (
            _untouched(family, prompts, prompt)[1][edit.site, edit.layer or 0][_tokens(prompts, prompt, edit.positions)]
            for prompts in (base, source)
        )
        rows.append((of_source.double() - of_base.double())[:, _entries(_model(family), edit.site, head)])
    matrix = torch.cat(rows).numpy().T
    mean = matrix.mean(1, keepdims=True)
    u, s, v = np.linalg.svd(matrix - mean, full_matrices=False)
    s[RANK:] = 0
    direction = np.linalg.pinv(mean + u * s @ v, rcond=1e-9).T @ np.ones(matrix.shape[1])
    return direction / np.linalg.norm(direction)


def _given(
    family: str, edit: ActivationPatch, head: int | None, base: TokenizedPrompts, source: TokenizedPrompts, prompt: int
) -> Tensor | Change:
    """What a patch puts in place: the source's activation, or along one direction only."""
    model = _model(family)
    held = _untouched(family, source, prompt)[1][edit.site, edit.layer or 0]
    value = held[_tokens(source, prompt, edit.positions)][:, _entries(model, edit.site, head)]
    if not edit.subspace:
        return value
    w = torch.from_numpy(_direction(family, edit, head, base, source)).float()
    return lambda old: old + ((value - old) @ w)[:, None] * w


def _tokens(prompts: TokenizedPrompts, prompt: int, positions: Any) -> list[int]:
    length = len(prompts.input_ids[prompt])
    if positions == "all":
        return list(range(length))
    each = positions if isinstance(positions, tuple) else (positions,)
    named = prompts.positions[prompt]
    return [(named[position] if isinstance(position, str) else position) % length for position in each]


@cache
def _untouched(family: str, prompts: TokenizedPrompts, prompt: int) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Logits, and what every site of every layer holds."""
    model = _model(family)
    reads = [(site, layer) for site in SITES for layer in range(n_layers(model.config)) if site != "embed" or not layer]
    return _hooked(model, prompts.input_ids[prompt], reads=reads)


def _logits(family: str, spec: Patch, base: TokenizedPrompts, source: TokenizedPrompts, prompt: int) -> Tensor:
    """The logits of one base prompt under one patch, by definition."""
    if isinstance(spec, PathPatch):
        return _path_by_hooks(family, spec, base, source, prompt)
    model, puts = _model(family), []
    for edit in members(spec):
        for head in edit.heads or (None,):
            value = _given(family, edit, head, base, source, prompt)
            puts.append((edit.site, edit.layer or 0, head, _tokens(base, prompt, edit.positions), value))
    return _hooked(model, base.input_ids[prompt], puts)[0]


def _path_by_hooks(
    family: str, path: PathPatch, base: TokenizedPrompts, source: TokenizedPrompts, prompt: int
) -> Tensor:
    """Wang et al. (2022), appendix B, at some positions: all heads frozen but the sender's; then all receivers set throughout.

    Of the direct term, MLPs and the scales of norms are frozen too.
    """
    model, ids = _model(family), base.input_ids[prompt]
    everywhere = list(range(len(ids)))
    of_base = _untouched(family, base, prompt)[1]
    frozen = [("z", layer) for layer in range(n_layers(model.config))]
    frozen += [("mlp_out", layer) for layer in range(n_layers(model.config)) if path.freeze_mlps or path.direct]
    norms = _norm_inputs(model, ids) if path.direct else None
    site, layer, head = Node.parse(path.sender)
    value = _given(family, path.sender_patch, head, base, source, prompt)
    puts: list[Put] = [(kind, at, None, everywhere, of_base[kind, at]) for kind, at in frozen]
    puts.append((site, layer or 0, head, _tokens(base, prompt, path.positions), value))
    if path.receivers == ("logits",):
        return _hooked(model, ids, puts, norms=norms)[0]
    nodes = [Node.parse(receiver) for receiver in path.receivers]
    received = _hooked(model, ids, puts, [(node.site, node.layer or 0) for node in nodes], norms)[1]
    given: list[Put] = []
    for node in nodes:
        new = received[node.site, node.layer or 0][:, _entries(model, node.site, node.head)]
        given.append((node.site, node.layer or 0, node.head, everywhere, new))
    return _hooked(model, ids, given)[0]


def _by_hand(
    family: str, specs: Iterable[Patch], metric: str = "logit_diff", base: TokenizedPrompts = BASE, source: Any = SOURCE
) -> np.ndarray:
    """The metric of every base prompt under every patch, `patch prompt`."""
    found = []
    for spec in specs:
        rows = [
            _of_logits(family, _logits(family, spec, base, source, at), metric, base, at) for at in range(len(base))
        ]
        found.append(rows)
    return np.array(found)


def _of_logits(family: str, logits: Tensor, metric: str, prompts: TokenizedPrompts, prompt: int) -> float:
    right, wrong = prompts.answer_ids[prompt]
    log = logits.double().log_softmax(-1)
    clean = _untouched(family, prompts, prompt)[0].double().log_softmax(-1)
    return float(
        {
            "logit_diff": lambda: logits[right] - logits[wrong],
            "logit": lambda: logits[right],
            "probability": lambda: log[right].exp(),
            "rank": lambda: 1 + (logits > logits[right]).sum(),
            "accuracy": lambda: logits.argmax() == right,
            "kl": lambda: (clean.exp() * (clean - log)).sum(),
        }[metric]()
    )


def _patch(family: str, specs: Any, base: TokenizedPrompts = BASE, source: Any = SOURCE, **options: Any) -> Patched:
    return patch(_model(family), specs, base, source, progress=False, **options)


# --- Activation patching ---


def _every_patch(config: Any, positions: Iterable[Any]) -> list[ActivationPatch]:
    """Every site, first and last layer and the one between, two heads (the first and the last) at once."""
    found = []
    for site in SITES:
        count = n_kv_heads(config) if site in ("k", "v") else n_heads(config)
        heads = tuple(sorted({0, count - 1})) if site in BY_HEAD else None
        for layer in (None,) if site == "embed" else range(n_layers(config)):
            found += [ActivationPatch(site=site, layer=layer, heads=heads, positions=at) for at in positions]
    return found


def _joint(config: Any) -> list[Spec]:
    """Several patches at once: over layers, in one block at several sites, at one place at different positions."""
    last = n_heads(config) - 1
    return [
        (
            ActivationPatch(site="k", layer=1, heads=(0,), positions="s1"),
            ActivationPatch(site="q", layer=0, heads=(last,), positions="last"),
            ActivationPatch(site="mlp_out", layer=0, positions="last"),
        ),
        (
            ActivationPatch(site="z", layer=1, heads=(0,), positions="s2"),
            ActivationPatch(site="z", layer=1, heads=(last,), positions="s1"),
            ActivationPatch(site="mlp_in", layer=1, positions="last"),
            ActivationPatch(site="v", layer=2, heads=(0,), positions=(0, "s1")),
        ),
        (
            ActivationPatch(site="resid_pre", layer=2, positions="s1"),
            ActivationPatch(site="attn_out", layer=1, positions=(0,)),
            ActivationPatch(site="resid_post", layer=0, positions="last"),
        ),
        (
            ActivationPatch(site="embed", positions=(1,)),
            ActivationPatch(site="q", layer=2, heads=(0,)),
            ActivationPatch(site="mlp_out", layer=2, positions="last"),
        ),
    ]


@every_family
def test_activation_patches_are_what_hooks_do_at_every_site_on_either_engine(family: str) -> None:
    everywhere, specs, at_two = (_every_patch(_model(family).config, [at]) for at in ("all", "s1", (0, "last")))
    first = FAMILIES.index(family) % 2
    specs += everywhere[first::2] + at_two[1 - first :: 2]
    expected, untouched = _by_hand(family, specs), _untouched_metric(family, BASE)
    # Behind the keys and values of the last block only the last token counts.
    last = n_layers(_model(family).config) - 1
    dead = [
        spec.layer == last and spec.site not in ("k", "v", "resid_pre") and spec.positions == "s1" for spec in specs
    ]
    assert sum(dead) == 7
    np.testing.assert_array_equal(np.abs(expected - untouched).max(1) > 1e-3, np.logical_not(dead))
    for engine in ("plain", "sweep"):
        result = _patch(family, specs, engine=engine)
        np.testing.assert_allclose(result.intervened, expected, **CLOSE, err_msg=engine)
        np.testing.assert_allclose(result.baseline, untouched, **CLOSE)
        np.testing.assert_allclose(result.source, _untouched_metric(family, SOURCE), **CLOSE)


def _untouched_metric(family: str, prompts: TokenizedPrompts, metric: str = "logit_diff") -> np.ndarray:
    return np.array(
        [_of_logits(family, _untouched(family, prompts, at)[0], metric, prompts, at) for at in range(len(prompts))]
    )


@every_family
def test_a_position_is_looked_up_in_each_prompt_of_a_pair_however_long_they_are(family: str) -> None:
    specs = _every_patch(_model(family).config, ("last", ("s1", 0)))[:: 5 if family in ("qwen2_5", "mistral") else 3]
    expected = _by_hand(family, specs, source=UNEQUAL)
    for engine in ("plain", "sweep"):
        found = _patch(family, specs, source=UNEQUAL, engine=engine).intervened
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=engine)


@every_family
def test_joint_patches_are_what_hooks_do_together_on_either_engine(family: str) -> None:
    specs = _joint(_model(family).config)
    expected = _by_hand(family, specs)
    for engine in ("plain", "sweep"):
        np.testing.assert_allclose(_patch(family, specs, engine=engine).intervened, expected, **CLOSE, err_msg=engine)


@pytest.mark.parametrize(
    "metric", first_only(name for name, metric in METRICS.items() if not (metric.per_token or metric.of_answers))
)
@pytest.mark.parametrize("family", ["gemma2"])
def test_every_metric_is_read_as_by_hand_with_little_memory_too(family: str, metric: str) -> None:
    config = _model(family).config
    specs: list[Patch] = [*_every_patch(config, ("all", "s1"))[::19], *_joint(config)[:2]]
    specs += all_paths(config, ("logits",))[::8] + all_paths(config, ("v.2.0",), positions="s1")[::8]
    expected = _by_hand(family, specs, metric)
    for options in ({"engine": "plain", "batch_size": 3}, {}, {"memory": 400_000}):
        result = _patch(family, specs, metric=metric, **options)
        np.testing.assert_allclose(result.intervened, expected, **CLOSE, err_msg=str(options))
        np.testing.assert_allclose(result.baseline, _untouched_metric(family, BASE, metric), **CLOSE)
        if metric == "kl":
            assert np.isnan(result.source).all() and (result.baseline == 0).all()
        else:
            np.testing.assert_allclose(result.source, _untouched_metric(family, SOURCE, metric), **CLOSE)


@pytest.mark.parametrize("site", ["k", "v"])
@every_family
def test_a_kv_head_of_the_source_changes_exactly_the_query_heads_of_its_group(family: str, site: str) -> None:
    model, size = _model(family), _head_size(_model(family))
    pair = BASE.take((0,))
    of = replace(SOURCE.take((0,)), answers=pair.answers)
    for spec in all_patches(model.config, site):
        seen: list[Tensor] = []
        handle = _hook(*_place(model, "z", spec.layer or 0), lambda x, seen=seen: seen.append(x[0].clone()) or x)
        reference = Reference.compute(model, of, **needs([spec])._asdict())  # a hook belongs to the model
        run(model, spec, pair, reference=reference, progress=False)
        handle.remove()
        before, after = (x.unflatten(-1, (-1, size)) for x in seen[-2:])
        changed = [head for head in range(n_heads(model.config)) if not torch.equal(before[:, head], after[:, head])]
        assert changed == query_heads(Node(site, spec.layer, (spec.heads or (0,))[0]), model.config)


# --- Along a concept direction ---


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        *((family, ("last", 0)) for family in FAMILIES),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("gpt2", "all"), ("gemma2", "s1"))),
    ],
    ids=str,
)
def test_patches_along_a_direction_are_those_made_by_hand(family: str, positions: Any) -> None:
    patches = [spec.model_copy(update={"subspace": True}) for spec in _every_patch(_model(family).config, [positions])]
    joint = (
        ActivationPatch(site="z", layer=0, heads=(0, 2), positions=positions, subspace=True),
        ActivationPatch(site="z", layer=2, heads=(1,), positions=positions, subspace=True),
        ActivationPatch(site="mlp_out", layer=1, positions=positions),
    )
    specs = [*patches, joint]
    if positions == "all":  # at the first token base and source may hold the same, and s1 is no choice
        specs = specs[::3]
    expected = _by_hand(family, specs)
    for engine in ("plain", "sweep"):
        found = _patch(family, specs, engine=engine, batch_size=3).intervened
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5, err_msg=engine)
    whole = (
        _by_hand(family, patches[-1:])[0] - _by_hand(family, [patches[-1].model_copy(update={"subspace": False})])[0]
    )
    assert np.abs(whole).max() > 1e-4


@pytest.mark.parametrize(
    ("family", "how"), first_only([("gpt2", {}), ("gemma2", {"freeze_mlps": True}), ("gemma2", {"direct": True})])
)
def test_senders_along_a_direction_are_those_made_by_hand(family: str, how: dict[str, bool]) -> None:
    paths = _paths(PATHS[::2] + MANY_PLACES[:2], positions="s1", subspace=True, **how)
    paths += _paths(PATHS[:3], positions="s1", **how)  # the same senders, not along it
    expected = _by_hand(family, paths)
    for engine in ("plain", "sweep"):
        np.testing.assert_allclose(_patch(family, paths, engine=engine).intervened, expected, **CLOSE, err_msg=engine)


def test_a_concept_direction_is_what_all_differences_share() -> None:
    generator = np.random.default_rng(0)
    differences = torch.from_numpy(generator.standard_normal((50, 8)))
    np.testing.assert_allclose(
        concept_direction(differences, 0), differences.mean(0) / differences.mean(0).norm(), atol=1e-12
    )
    # Equal along one axis; peculiarities along three others, of which the mean knows nothing, but which tilt it.
    peculiar = generator.standard_normal((50, 3)) + 2
    basis = np.linalg.qr(generator.standard_normal((8, 4)))[0]
    shared, rest = basis[:, 0], basis[:, 1:]
    differences = torch.from_numpy(1.7 * shared + peculiar @ rest.T)
    np.testing.assert_allclose(abs(concept_direction(differences, 3).numpy() @ shared), 1, atol=1e-9)
    assert abs(concept_direction(differences, 0).numpy() @ shared) < 0.9


def test_a_concept_direction_does_not_hang_on_rounding_where_few_differences_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    three = torch.randn(3, 8, generator=generator).repeat(4, 1)  # the differences of 12 pairs
    rounded = [three + 1e-7 * torch.randn(12, 8, generator=generator) for _ in range(5)]
    expected = concept_direction(three, 2)
    for differences in rounded:
        assert abs(concept_direction(differences, 4, noise=1e-6) @ expected) > 1 - 1e-6
    assert min(abs(concept_direction(differences, 4) @ expected) for differences in rounded) < 0.99
    nearly_nothing = concept_direction(rounded[0] - three, 4, noise=1e-6)
    assert not nearly_nothing.any()
    # And patches say how large rounding is.
    told: list[float] = []
    spec = ActivationPatch(site="z", layer=1, heads=(2,), positions="last", subspace=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "pyvene_ext.methods.patching.subspace.concept_direction",
            lambda x, rank, noise: told.append(noise) or torch.zeros(x.shape[1]),
        )
        concept_directions(_model("gemma2"), [spec], BASE, SOURCE, progress=False)
    rows = [_untouched("gemma2", BASE, i)[1]["z", 1][-1, _entries(_model("gemma2"), "z", 2)] for i in range(len(BASE))]
    np.testing.assert_allclose(told, 1e-5 * max(row.norm().item() for row in rows), rtol=1e-4)


def test_directions_may_come_from_other_pairs_and_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    family = "llama3_1"
    spec = ActivationPatch(site="z", layer=1, heads=(2,), positions="last", subspace=True)
    other = (random_prompts((8, 5, 7), seed=8), random_prompts((8, 5, 7), seed=9))
    directions = concept_directions(_model(family), [spec], *other, progress=False)
    key = (("z", 1), "last")
    assert set(directions) == {key} and directions[key].shape == (6, _head_size(_model(family)))
    given = _patch(family, [spec], directions=directions).intervened
    assert np.abs(given - _patch(family, [spec]).intervened).max() > 1e-5
    flipped = {key: -directions[key]}
    np.testing.assert_allclose(_patch(family, [spec], directions=flipped).intervened, given, **CLOSE)
    monkeypatch.setattr(type(_model(family)), "forward", None)  # nothing runs any more
    for wrong, message in (
        ({}, "directions has no tensor under"),
        ({key: directions[key][0]}, "one of shape"),
        ({key: 2 * directions[key]}, "its direction has length 2; divide it by that"),
    ):
        with pytest.raises(ValueError, match=message):
            _patch(family, [spec], directions=wrong)


def test_where_base_and_source_do_not_differ_nothing_changes_and_where_not_alike_is_told() -> None:
    specs = [ActivationPatch(site="embed", positions=(0,), subspace=at) for at in (True, False)]
    same = replace(
        SOURCE, input_ids=tuple((b[0], *s[1:]) for b, s in zip(BASE.input_ids, SOURCE.input_ids, strict=True))
    )
    for engine in ("plain", "sweep"):
        result = _patch("qwen2_5", specs, source=same, engine=engine)
        np.testing.assert_allclose(result.intervened, [result.baseline] * 2, **CLOSE)
    with pytest.raises(ValueError, match="a different way in every pair"):
        concept_direction(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    two, turned = (replace(BASE, **{name: getattr(BASE, name)[1::2] for name in FIELDS}) for _ in range(2))
    turned = replace(turned, input_ids=turned.input_ids[::-1])
    with pytest.raises(
        ValueError, match=r"embed:patch/subspace: base and source differ there in a different way in every pair"
    ):
        _patch("qwen2_5", [ActivationPatch(site="embed", subspace=True)], two, turned)


def test_a_store_of_other_directions_is_refused(tmp_path: Any) -> None:
    family, specs = "qwen2_5", [ActivationPatch(site="z", layer=1, heads=(0,), positions="last", subspace=True)]
    first = _patch(family, specs, store=tmp_path / "kept")
    np.testing.assert_array_equal(_patch(family, specs, store=tmp_path / "kept").intervened, first.intervened)
    turned = torch.roll(
        concept_directions(_model(family), specs, BASE, SOURCE, progress=False)[("z", 1), "last"], 1, -1
    )
    with pytest.raises(ValueError, match="directions"):
        _patch(family, specs, directions={(("z", 1), "last"): turned}, store=tmp_path / "kept")


# --- Directions and scores ---


@every_family
@both_engines
def test_a_score_is_0_where_nothing_is_patched_and_1_where_everything_is(family: str, engine: str) -> None:
    last = n_layers(_model(family).config) - 1
    everything = [
        ActivationPatch(site="embed"),
        ActivationPatch(site="resid_pre", layer=0),
        ActivationPatch(site="resid_mid", layer=1),
        ActivationPatch(site="resid_post", layer=last, positions="last"),
        PathPatch(sender="embed", receivers=("resid_pre.0",)),
    ]
    nothing = [
        ActivationPatch(site="resid_post", layer=last, positions=(0,)),
        ActivationPatch(site="q", layer=last, heads=(0,), positions="s1"),
        ActivationPatch(site="mlp_out", layer=last, positions="s2"),
        PathPatch(sender=f"mlp_out.{last}", receivers=("logits",), positions="s1"),
    ]
    for base, source in ((BASE, SOURCE), (SOURCE, BASE)):  # noising and denoising
        result = _patch(family, [*everything, *nothing], base, source, engine=engine)
        np.testing.assert_allclose(result.intervened[: len(everything)], [result.source] * len(everything), **CLOSE)
        np.testing.assert_allclose(result.score[: len(everything)], 1, atol=1e-4)
        np.testing.assert_allclose(result.intervened[len(everything) :], [result.baseline] * len(nothing), **CLOSE)
        np.testing.assert_allclose(result.score[len(everything) :], 0, atol=1e-4)
        np.testing.assert_allclose(result.mean_score, [1] * len(everything) + [0] * len(nothing), atol=1e-4)


@both_engines
def test_scores_of_both_directions_are_those_of_the_definition(engine: str) -> None:
    family, specs = "mistral", all_patches(_model("mistral").config, "z")
    clean, corrupt = (_untouched_metric(family, prompts) for prompts in (BASE, SOURCE))
    noised = _by_hand(family, specs)
    result = _patch(family, specs, engine=engine)
    np.testing.assert_allclose(result.score, (noised - clean) / (corrupt - clean), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        result.mean_score, (noised - clean).mean(1) / (corrupt - clean).mean(), rtol=1e-4, atol=1e-5
    )
    assert result.delta.shape == result.score.shape == (len(specs), len(BASE))
    # Denoising is (patched - corrupt) / (clean - corrupt).
    denoised = _by_hand(family, specs, base=SOURCE, source=BASE)
    result = _patch(family, specs, SOURCE, BASE, engine=engine)
    np.testing.assert_allclose(result.score, (denoised - corrupt) / (clean - corrupt), rtol=1e-4, atol=1e-4)


def test_a_frame_of_patches_has_source_and_score() -> None:
    clean, source, after = (np.array(x, np.float32) for x in ([1, 2], [3, 2], [[2, 2.5], [1, 2]]))
    frame = Patched(("a", "b"), "logit_diff", clean, after, source).to_frame()
    place = ["site", "layer", "head", "position"]
    assert list(frame) == ["intervention", *place, "prompt", "baseline", "intervened", "delta", "source", "score"]
    assert frame[place].isna().all(axis=None)  # made by hand, without specs
    rows = [
        ["a", 0, 1, 2, -1, 3, 0.5],
        ["a", 1, 2, 2.5, -0.5, 2, np.nan],
        ["b", 0, 1, 1, 0, 3, 0],
        ["b", 1, 2, 2, 0, 2, np.nan],
    ]
    for found, row in zip(frame.drop(columns=place).to_numpy(), rows, strict=True):
        assert found[0] == row[0]
        np.testing.assert_array_equal(found[1:].astype(float), row[1:])


@pytest.mark.parametrize("engine", ["plain", "sweep"])
def test_a_pair_of_equal_texts_has_no_effect_and_is_reported(engine: str) -> None:
    source = replace(SOURCE, input_ids=(*SOURCE.input_ids[:2], BASE.input_ids[2], *SOURCE.input_ids[3:]))
    specs = [ActivationPatch(site="resid_pre", layer=1), PathPatch(sender="z.0.1", receivers=("logits",))]
    result = _patch("llama3_1", specs, source=source, engine=engine)
    assert result.identical == (2,) and "1 pair of two equal texts, without effect and score: 2" in repr(result)
    np.testing.assert_allclose(result.delta[:, 2], 0, atol=1e-5)
    assert np.isnan(result.score[:, 2]).all() and np.isfinite(np.delete(result.score, 2, 1)).all()
    assert np.isfinite(result.mean_score).all()
    whole = _patch("llama3_1", specs)
    assert not whole.identical and "equal texts" not in repr(whole)


def test_a_repr_of_patches_has_scores_with_the_interval_of_a_ratio_and_of_kl_the_effect() -> None:
    draw = np.random.default_rng(0)
    clean, source = draw.normal(0, 0.5, 40).astype(np.float32), draw.normal(5, 0.5, 40).astype(np.float32)
    after = (clean + np.array([[0.2], [0.7]]) * (source - clean) + draw.normal(0, 1, (2, 40))).astype(np.float32)
    result = Patched(("weak", "strong"), "logit_diff", clean, after, source)
    mean, low, high = result.effect_interval([1])
    again = draw.integers(40, size=(4000, 40))
    ratios = [(after[1, i] - clean[i]).mean() / (source[i] - clean[i]).mean() for i in again]
    np.testing.assert_allclose([low[0], high[0]], np.quantile(ratios, (0.025, 0.975)), atol=0.02)
    assert repr(result).splitlines()[2].split() == ["strong", f"{mean[0]:.3g}", f"[{low[0]:.3g},", f"{high[0]:.3g}]"]
    without = replace(result, source=np.full_like(source, np.nan))
    assert "mean delta" in repr(without) and "source -" in repr(without)


def test_a_mean_score_is_a_ratio_of_means_and_no_mean_of_ratios() -> None:
    clean, source, after = (np.array(x, np.float32) for x in ([1, 2], [3, 2.5], [[2, 2.5], [1, 2]]))
    result = Patched(("a", "b"), "logit_diff", clean, after, source)
    np.testing.assert_allclose(result.score, [[0.5, 1], [0, 0]])
    np.testing.assert_allclose(result.mean_score, [0.75 / 1.25, 0])
    same = Patched(("a",), "logit_diff", clean, after[:1], clean)
    assert np.isnan(same.score).all() and np.isnan(same.mean_score).all()


# --- Path patching ---

# Senders and receivers of every kind; heads beyond the K/V heads of every family are query heads'.
PATHS = [
    ("z.0.1", ("k.1.0",)),
    ("z.0.3", ("v.2.0", "q.2.1")),
    ("z.1.0", ("logits",)),
    ("z.1.3", ("mlp_in.1",)),
    ("z.0.0", ("resid_mid.2",)),
    ("z.0.2", ("resid_post.1",)),
    ("embed", ("q.2.1",)),
    ("embed", ("q.0.0", "q.0.3", "k.0.0", "v.0.0")),
    ("embed", ("mlp_in.2",)),
    ("embed", ("logits",)),
    ("mlp_out.0", ("q.2.0",)),
    ("mlp_out.0", ("resid_pre.1",)),
    ("mlp_out.1", ("mlp_in.2",)),
    ("mlp_out.0", ("logits",)),
    ("mlp_out.2", ("resid_post.2",)),
]
MANY_PLACES = [
    ("mlp_out.0", ("mlp_in.2", "q.2.0")),
    ("z.0.0", ("q.1.1", "v.2.0")),
    ("embed", ("k.1.0", "mlp_in.0", "resid_mid.2")),
    ("z.0.1", ("q.2.0", "resid_pre.2")),
]


def _paths(pairs: Iterable[tuple[str, tuple[str, ...]]], **fields: Any) -> list[PathPatch]:
    return [PathPatch(sender=sender, receivers=receivers, **fields) for sender, receivers in pairs]


@pytest.mark.parametrize("freeze_mlps", [False, True])
@every_family
def test_paths_are_those_of_the_ground_truth_on_either_engine(family: str, freeze_mlps: bool) -> None:
    of_truth = [(s, r) for s, r in PATHS + MANY_PLACES if not any(one.startswith("resid") for one in r)]
    paths = _paths(of_truth[freeze_mlps :: 2 if freeze_mlps else 1], freeze_mlps=freeze_mlps)
    equal = {at: [i for i, length in enumerate(LENGTHS) if length == at] for at in LENGTHS}
    expected = np.empty((len(paths), len(BASE)))
    for which in equal.values():
        base, source = (torch.tensor([prompts.input_ids[i] for i in which]) for prompts in (BASE, SOURCE))
        right, wrong = np.array([BASE.answer_ids[i] for i in which]).T
        for number, path in enumerate(paths):
            logits = path_patch_by_hooks(_model(family), path.sender, path.receivers, base, source, freeze_mlps).numpy()
            rows = np.arange(len(which))
            expected[number, which] = logits[rows, right] - logits[rows, wrong]
    assert (np.abs(expected - _untouched_metric(family, BASE)).max(1) > 1e-3).all()
    for engine in ("plain", "sweep"):
        found = _patch(family, paths, engine=engine, batch_size=3).intervened
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=engine)


@pytest.mark.parametrize(
    ("positions", "first", "freeze_mlps"),
    [("all", 0, False), ("s1", 1, False), ("s1", 0, True), (("last", 0), 1, True)],
)
@every_family
def test_paths_at_positions_are_those_made_by_hand_on_either_engine(
    family: str, positions: Any, first: int, freeze_mlps: bool
) -> None:
    paths = _paths(PATHS[first::2], positions=positions, freeze_mlps=freeze_mlps)
    expected = _by_hand(family, paths)
    for engine in ("plain", "sweep"):
        found = _patch(family, paths, engine=engine).intervened
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=engine)
    # The sweep engine makes these paths itself, all of them.
    assert all(path.has_independent_receivers for path in paths)


@pytest.mark.parametrize("family", ["llama3_1", "gpt2"])
def test_paths_between_prompts_of_unequal_lengths_are_those_made_by_hand(family: str) -> None:
    paths = _paths(PATHS[::2], positions="s1") + _paths(MANY_PLACES, positions=("last", 0))
    expected = _by_hand(family, paths, source=UNEQUAL)
    for engine in ("plain", "sweep"):
        found = _patch(family, paths, source=UNEQUAL, engine=engine).intervened
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=engine)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        *((family, "s1") for family in FAMILIES),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("gemma2", "all"), ("gpt2", ("last", 0)))),
    ],
    ids=str,
)
def test_direct_terms_are_those_made_by_hand_with_every_norm_frozen(family: str, positions: Any) -> None:
    paths = _paths(PATHS + MANY_PLACES, positions=positions, direct=True)
    expected = _by_hand(family, paths)
    for engine in ("plain", "sweep"):
        found = _patch(family, paths, engine=engine, batch_size=3).intervened
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=engine)
    if positions == "all":
        assert (np.abs(expected - _by_hand(family, _paths(PATHS + MANY_PLACES, freeze_mlps=True))).max(1) > 1e-4).any()


@pytest.mark.parametrize("metric", ["probability", "rank", "kl"])
def test_direct_terms_are_measured_by_every_metric(metric: str) -> None:
    paths = _paths([("z.0.1", ("logits",)), ("mlp_out.0", ("logits",)), ("z.0.1", ("v.2.0",))], direct=True)
    expected = _by_hand("gemma2", paths, metric)
    for engine in ("plain", "sweep"):
        np.testing.assert_allclose(_patch("gemma2", paths, metric=metric, engine=engine).intervened, expected, **CLOSE)


@pytest.mark.slow
def test_direct_terms_between_prompts_of_unequal_lengths_are_those_made_by_hand() -> None:
    paths = _paths(PATHS[::2] + MANY_PLACES, positions=("last", "s1"), direct=True)
    expected = _by_hand("gemma2", paths, source=UNEQUAL)
    for engine in ("plain", "sweep"):
        found = _patch("gemma2", paths, source=UNEQUAL, engine=engine).intervened
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=engine)


@pytest.mark.parametrize("family", ["qwen2_5", "gpt2"])
def test_direct_terms_of_all_senders_add_up_to_that_of_the_whole_stream(family: str) -> None:
    """Without a soft-cap behind the unembedding."""
    model = _model(family)
    senders = all_paths(model.config, ("logits",), direct=True, positions="last")
    result = _patch(family, senders)
    changes = (result.intervened - result.baseline).sum(0)
    last = n_layers(model.config) - 1
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    for prompt, (right, wrong) in enumerate(BASE.answer_ids):
        of_base, of_source = (
            _untouched(family, prompts, prompt)[1]["resid_post", last][-1:] for prompts in (BASE, SOURCE)
        )
        with torch.no_grad():
            frozen = _frozen(of_base, norm, (of_source,), norm(of_source)) - norm(of_base)
            unembedding = model.get_output_embeddings().weight
        expected = (frozen @ (unembedding[right] - unembedding[wrong])).item()
        # Attention's output bias and the position embedding are the same in both, so that nothing else differs.
        np.testing.assert_allclose(changes[prompt], expected, rtol=1e-4, atol=1e-5)


@every_family
def test_receivers_in_several_places_are_set_throughout_and_run_plainly_at_some_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = _paths(MANY_PLACES, positions="s1", freeze_mlps=True)
    everywhere = _paths(MANY_PLACES)
    assert not any(path.has_independent_receivers for path in some) and all(
        path.has_independent_receivers for path in everywhere
    )
    expected = _by_hand(family, [*some, *everywhere])
    np.testing.assert_allclose(_patch(family, [*some, *everywhere]).intervened, expected, **CLOSE)
    monkeypatch.setattr(
        "pyvene_ext.methods.patching.patch.sweep_paths", lambda *_, **__: pytest.fail("not on this engine")
    )
    np.testing.assert_allclose(_patch(family, some).intervened, expected[: len(some)], **CLOSE)


def test_patches_of_all_kinds_in_one_call_keep_their_order_and_names() -> None:
    family, config = "qwen2_5", _model("qwen2_5").config
    specs: list[Patch] = [
        *_paths(MANY_PLACES[:1], positions="s1"),
        ActivationPatch(site="z", layer=1, heads=(3,)),
        *_paths(PATHS[2:3], freeze_mlps=True),
        _joint(config)[0],
        *_paths(PATHS[:1]),
        ActivationPatch(site="mlp_in", layer=2, positions="last"),
        *_paths(PATHS[8:9], freeze_mlps=True, positions="last"),
    ]
    result = _patch(family, specs)
    np.testing.assert_allclose(result.intervened, _by_hand(family, specs), **CLOSE)
    assert result.names == (
        "mlp_out.0@s1->mlp_in.2+q.2.0",
        "z.1.3:patch",
        "z.1.0->logits, MLPs frozen",
        spec_name(_joint(config)[0]),
        "z.0.1->k.1.0",
        "mlp_in.2@last:patch",
        "embed@last->mlp_in.2, MLPs frozen",
    )


def _all_pairs(config: Any, **fields: Any) -> list[PathPatch]:
    """Every sender to every receiver that it reaches, one at a time."""
    return [
        PathPatch(sender=str(sender), receivers=(str(receiver),), **fields)
        for sender in graph.senders(config)
        for receiver in graph.receivers(config)
        if reaches(sender, receiver)
    ]


@pytest.mark.parametrize(("family", "freeze_mlps", "little"), [("llama3_1", False, 400_000), ("gemma2", True, 200_000)])
def test_a_matrix_of_all_pairs_is_that_of_the_ground_truth_in_one_piece_or_many(
    family: str, freeze_mlps: bool, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, length, count = _model(family), 7, 3
    base = random_prompts((length,) * count)
    source = replace(random_prompts((length,) * count, seed=9), answers=base.answers)
    by_name = every_path_by_hooks(model, torch.tensor(base.input_ids), torch.tensor(source.input_ids), freeze_mlps)
    paths = _all_pairs(model.config, freeze_mlps=freeze_mlps)
    assert {f"{path.sender}->{path.receivers[0]}" for path in paths} == set(by_name)
    (right, wrong), rows = torch.tensor(base.answer_ids).T, torch.arange(count)
    logits = torch.stack([by_name[f"{path.sender}->{path.receivers[0]}"] for path in paths])
    expected = (logits[:, rows, right] - logits[:, rows, wrong]).numpy()
    pieces: list[int] = []
    chunks = sweep_paths_module._chunks

    def counted(*args: Any) -> Iterable[list[int]]:
        for chunk in chunks(*args):
            pieces.append(len(chunk))
            yield chunk

    monkeypatch.setattr(sweep_paths_module, "_chunks", counted)
    for memory in (None, little):
        pieces.clear()
        result = patch(model, paths, base, source, memory=memory, progress=False)
        np.testing.assert_allclose(result.intervened, expected, **CLOSE)
        assert sum(pieces) == count and (len(pieces) > 1) == (memory == little)


@pytest.mark.parametrize("receivers", first_only(["q.2.0 k.2.0 v.2.0", "mlp_in.1 q.2.1", "resid_post.1"]))
def test_all_paths_lead_from_every_sender_that_all_receivers_hear(receivers: str) -> None:
    for family in ("mistral", "gpt2"):
        config = _model(family).config
        paths = all_paths(config, receivers.split(), positions="all", freeze_mlps=True)
        nodes = [Node.parse(receiver) for receiver in receivers.split()]
        expected = [str(s) for s in graph.senders(config) if all(reaches(s, node) for node in nodes)]
        assert [path.sender for path in paths] == expected and len(expected) > 3
        assert all(set(path.receivers) == set(receivers.split()) and path.freeze_mlps for path in paths)
        np.testing.assert_allclose(_patch(family, paths).intervened, _by_hand(family, paths), **CLOSE)


@every_family
def test_all_patches_are_one_a_layer_and_head(family: str) -> None:
    config = _model(family).config
    layers, heads, kv = n_layers(config), n_heads(config), n_kv_heads(config)
    expected = {
        "q": layers * heads,
        "z": layers * heads,
        "k": layers * kv,
        "v": layers * kv,
        "mlp_in": layers,
        "embed": 1,
    }
    for site, count in expected.items():
        specs = all_patches(config, site, positions="last")
        assert len(specs) == len({spec.name for spec in specs}) == count
        assert {(spec.site, spec.positions) for spec in specs} == {(site, "last")}
        resolve(specs, _model(family), BASE, SOURCE)
        order = [(spec.layer or 0, spec.heads or ()) for spec in specs]
        assert order == sorted(order)


# --- What must be equal, exactly, whatever the weights ---


@every_family
@both_engines
def test_paths_that_leave_nothing_out_are_activation_patches(family: str, engine: str) -> None:
    config = _model(family).config
    last, heads, kv = n_layers(config) - 1, range(n_heads(config)), range(n_kv_heads(config))
    inputs = tuple(f"{site}.0.{head}" for site in "qkv" for head in (heads if site == "q" else kv))
    whole_head = ActivationPatch(site="z", layer=0, heads=tuple(heads))
    equal: list[tuple[Patch, Patch]] = [
        (PathPatch(sender=f"z.{last}.1", receivers=("logits",)), ActivationPatch(site="z", layer=last, heads=(1,))),
        (PathPatch(sender=f"mlp_out.{last}", receivers=("logits",)), ActivationPatch(site="mlp_out", layer=last)),
        (PathPatch(sender="z.0.1", receivers=("resid_post.0",)), ActivationPatch(site="z", layer=0, heads=(1,))),
        (PathPatch(sender="z.0.1", receivers=("resid_pre.1",)), ActivationPatch(site="z", layer=0, heads=(1,))),
        (PathPatch(sender="mlp_out.0", receivers=("resid_pre.1",)), ActivationPatch(site="mlp_out", layer=0)),
        # All inputs of a layer's heads from the source are its heads from the source.
        (PathPatch(sender="embed", receivers=inputs), whole_head),
        # Frozen or not is the same where no MLP lies between.
        *(
            (PathPatch(sender=s, receivers=(r,)), PathPatch(sender=s, receivers=(r,), freeze_mlps=True))
            for s, r in (("z.1.0", "mlp_in.1"), ("mlp_out.0", "q.1.0"), ("embed", "k.0.0"), ("embed", "mlp_in.0"))
        ),
    ]
    found = _patch(family, [spec for pair in equal for spec in pair], engine=engine)
    np.testing.assert_allclose(found.intervened[::2], found.intervened[1::2], **CLOSE)
    assert (np.abs(found.delta).max(1) > 1e-3).all()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # its post-norms mix heads
@both_engines
def test_without_a_final_norm_the_direct_paths_of_all_senders_add_up_to_the_whole_effect(
    family: str, engine: str
) -> None:
    model: Any = random_model(family)
    if family == "gpt2":
        model.transformer.ln_f = nn.Identity()
    else:
        model.model.norm = nn.Identity()
    paths = all_paths(model.config, ("logits",), freeze_mlps=True)
    result = patch(model, paths, BASE, SOURCE, engine=engine, progress=False)
    assert len(paths) == 1 + n_layers(model.config) * (n_heads(model.config) + 1)
    whole = result.source - result.baseline
    # The terms cancel one another in part, so that their rounding counts.
    assert (np.abs(-result.delta.sum(0) - whole) < 1e-5 * np.abs(result.delta).sum(0)).all()
    assert np.abs(whole).min() > 0.1


# --- Planted circuits ---


@pytest.mark.parametrize("architecture", first_only(ARCHITECTURES))
@pytest.mark.parametrize("name", list(CASES))
def test_the_planted_edges_stand_out_of_all_paths(name: str, architecture: Architecture) -> None:
    case = planted(name, architecture, n_prompts=4)
    paths = _all_pairs(case.model.config)
    result = patch(case.model, paths, case.clean, case.corrupt, progress=False)
    effects = dict(zip(result.names, np.abs(result.delta).mean(1), strict=True))
    weakest = min(effects[edge] for edge in case.edges)
    strongest = max(effect for edge, effect in effects.items() if edge not in case.edges)
    assert weakest > 10 * strongest > 0


# --- As data ---


def test_patches_are_written_to_yaml_and_read_back_beside_ablations() -> None:
    specs: list[Spec] = [
        ActivationPatch(site="k", layer=2, heads=(1, 0), positions="s1"),
        ActivationPatch(site="embed", positions=(0, "s2")),
        (ActivationPatch(site="mlp_in", layer=0), Ablation(kind="zero", site="z", layer=1, heads=(2,))),
        ActivationPatch(site="mlp_out", layer=0, positions="last"),
    ]
    text = to_yaml(specs)
    assert from_yaml(text) == specs and to_yaml(from_yaml(text)) == text
    assert text.startswith("- kind: patch\n  site: k\n  layer: 2\n")
    assert [type(spec) for spec in from_yaml(text)] == [ActivationPatch, ActivationPatch, tuple, ActivationPatch]
    with pytest.raises(ValueError, match=r"^spec 0: site: no patch of 'scores'; choose among q, k, v, mlp_in, z"):
        from_yaml("- {kind: patch, site: scores, layer: 0, heads: [1]}")
    with pytest.raises(ValueError, match=r"^spec 0: there is no field '(mean|seed)'"):
        from_yaml("- {kind: patch, site: z, layer: 0, heads: [1], seed: 3}")


def test_paths_are_written_to_yaml_and_read_back_and_stand_by_themselves() -> None:
    specs: list[Patch] = [
        PathPatch(sender="z.0.1", receivers=("v.1.0", "q.1.2"), positions=("s1", 0), freeze_mlps=True),
        PathPatch(sender="embed", receivers=("logits",), direct=True, subspace=True, positions="last"),
        ActivationPatch(site="z", layer=0, heads=(1,), subspace=True),
    ]
    text = to_yaml(specs)
    assert from_yaml(text) == specs
    assert text.startswith("- kind: path\n  sender: z.0.1\n  receivers:\n")
    with pytest.raises(ValueError, match=r"^spec 1: the path z.1.0->q.1.0 is empty"):
        from_yaml("- {kind: zero, site: z, layer: 0, heads: [1]}\n- {kind: path, sender: z.1.0, receivers: [q.1.0]}")
    with pytest.raises(
        ValueError, match=r"^spec 0: z.1.0->logits is a path, which is run alone and with pyvene_ext.patch"
    ):
        from_yaml("- [{kind: path, sender: z.1.0, receivers: [logits]}, {kind: zero, site: z, layer: 0, heads: [1]}]")
    turned = PathPatch(sender="z.0.1", receivers=("q.1.2", "v.1.0"), positions=("s1", 0), freeze_mlps=True)
    assert turned == specs[0]


def test_different_patches_have_different_names() -> None:
    config = _model("llama3_1").config
    positions = ("all", "last", "s1", (0,), (-1,), ("s1", 0), (0, "s1"))
    specs: list[Patch] = [*_every_patch(config, positions), *_joint(config)]
    specs += [
        path for at in positions for frozen in (False, True) for path in _paths(PATHS, positions=at, freeze_mlps=frozen)
    ]
    names = [spec.name if isinstance(spec, PathPatch) else spec_name(spec) for spec in specs]
    assert len(set(names)) == len(specs)
    ablated = Ablation(kind="resample", site="z", layer=0, heads=(0,))
    assert ActivationPatch(site="z", layer=0, heads=(0,)).name == "z.0.0:patch" != ablated.name


# --- What is refused ---

A = ActivationPatch
HEAD = {"site": "z", "layer": 0, "heads": (0,)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "mlp_uot", "layer": 0}, "no patch of 'mlp_uot'; did you mean 'mlp_out'"),
        ({"site": "hook_k", "layer": 0, "heads": (0,)}, "no patch of 'hook_k'; did you mean 'k'"),
        ({"site": "pattern", "layer": 0}, "no patch of 'pattern'; choose among q, k, v"),
        ({"site": "k", "layer": 0}, "k needs heads"),
        ({"site": "mlp_in", "layer": 0, "heads": (0,)}, "mlp_in has no heads: leave heads out"),
        ({"site": "mlp_in"}, "mlp_in needs a layer"),
        ({"site": "embed", "layer": 0}, "embed exists once: leave layer out"),
        ({**HEAD, "heads": (1, 1)}, "each once"),
        ({**HEAD, "heads": ()}, "name one or more heads"),
        ({**HEAD, "positions": ()}, "name one or more positions"),
        ({**HEAD, "positions": ("all", 0)}, 'for every position write positions: "all"'),
        ({**HEAD, "kind": "zero"}, "kind must be 'patch', not 'zero'"),
        ({**HEAD, "mean": "over_tokens"}, "there is no field 'mean'"),
    ],
)
def test_a_patch_that_no_model_could_run_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationPatch(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sender": "z.1", "receivers": ("logits",)}, "there is no node 'z.1'"),
        ({"sender": "z.1.0", "receivers": ("attn_out.1",)}, "there is no node 'attn_out.1'"),
        (
            {"sender": "q.0.0", "receivers": ("logits",)},
            "q.0.0 is not a sender; a sender is embed, z.LAYER.HEAD or mlp_out",
        ),
        ({"sender": "z.0.0", "receivers": ("z.1.0",)}, "z.1.0 is not a receiver"),
        (
            {"sender": "z.1.0", "receivers": ("k.1.0",)},
            "the path z.1.0->k.1.0 is empty: k.1.0 reads before z.1.0 writes",
        ),
        ({"sender": "mlp_out.1", "receivers": ("q.2.0", "mlp_in.1")}, "the path mlp_out.1->mlp_in.1 is empty"),
        ({"sender": "z.1.0", "receivers": ("resid_pre.1",)}, "the path z.1.0->resid_pre.1 is empty"),
        (
            {"sender": "z.0.0", "receivers": ("logits", "q.1.0")},
            "logits cannot be patched jointly with other receivers",
        ),
        ({"sender": "z.0.0", "receivers": ()}, r"name one or more receivers, each once, not \[\]"),
        ({"sender": "z.0.0", "receivers": ("q.1.0", "q.1.0")}, "each once"),
        ({"sender": "z.0.0", "receivers": ("q.1.0", "q.01.0")}, "each once|no node"),
        ({"sender": "z.0.0", "receivers": ("logits",), "positions": ("all", 0)}, "a list of positions holds names"),
        ({"sender": "z.0.0", "receivers": ("logits",), "positions": ()}, "name one or more positions"),
        (
            {"sender": "z.0.0", "receivers": ("logits",), "heads": (0,)},
            "there is no field 'heads'; choose among kind, sender",
        ),
    ],
)
def test_a_path_that_no_model_could_run_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathPatch(**fields)


def _first(count: int, prompts: TokenizedPrompts) -> TokenizedPrompts:
    return prompts.take(range(count))


def _without_names(prompts: TokenizedPrompts) -> TokenizedPrompts:
    return replace(prompts, positions=tuple({"last": -1} for _ in prompts.positions))


LONGER = _source((9, 6, 8, 6))
NONE = _first(0, BASE)
PATH = {"sender": "z.0.0", "receivers": ("q.2.0",)}
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "layer": (lambda: A(site="z", layer=3, heads=(0,)), {}, "layer 3 .*is out of range.*layers 0 to 2"),
    "query head": (lambda: A(site="q", layer=0, heads=(6,)), {}, r"6 query heads \(0 to 5\) sharing 3 K/V heads"),
    "K/V head": (
        lambda: A(site="k", layer=0, heads=(4,)),
        {},
        r"k.0.4:patch: k counts K/V heads, of which the model has 3 \(0 to 2\), each for 2 query heads: query head h reads "
        r"K/V head h // 2",
    ),
    "sender's head": (lambda: PathPatch(**PATH | {"sender": "z.0.6"}), {}, "z counts query heads, 0 to 5"),
    "receiver's head": (
        lambda: PathPatch(**PATH | {"receivers": ("k.1.3",)}),
        {},
        "k counts K/V heads, each for 2 query heads, 0 to 2",
    ),
    "receiver's layer": (lambda: PathPatch(**PATH | {"receivers": ("mlp_in.3",)}), {}, "the model has layers 0 to 2"),
    "lengths": (
        lambda: A(**HEAD),
        {"source": LONGER},
        "the base prompt of pair 2 has 7 tokens and its source 8.*patch named positions",
    ),
    "lengths of a path": (lambda: PathPatch(**PATH), {"source": LONGER}, "pair 2 has 7 tokens and its source 8"),
    "count": (lambda: A(**HEAD), {"source": _first(3, SOURCE)}, "there are 4 base and 3 source prompts"),
    "answers": (
        lambda: A(**HEAD),
        {"source": random_prompts(LENGTHS, seed=5)},
        r"base and source of pair 0 have other answers, right \(\(\d+,\),\) and \(\(\d+,\),\), wrong .*; compare the same",
    ),
    "the same texts": (
        lambda: A(**HEAD),
        {"source": BASE},
        "base and source are the same texts, so that no patch changes",
    ),
    "position": (lambda: A(**HEAD, positions="s3"), {}, "no position 's3'; choose among end, last, s1, s2"),
    "position of the base": (lambda: A(**HEAD, positions="s1"), {"base": _without_names(BASE)}, "no position 's1'"),
    "position of the source": (
        lambda: A(**HEAD, positions="s1"),
        {"source": _without_names(SOURCE)},
        "no position 's1'",
    ),
    "position of a path": (lambda: PathPatch(**PATH, positions="s3"), {}, "no position 's3'"),
    "position outside": (lambda: A(**HEAD, positions=(7,)), {}, "position 7 lies outside prompt 1, which has 6 tokens"),
    "position twice": (
        lambda: A(**HEAD, positions=("last", -1)),
        {},
        "two of these positions are the same token of prompt 0",
    ),
    "ablation": (
        lambda: [Ablation(kind="zero", **HEAD)],
        {},
        "z.0.0 is not a patch; run it with pyvene_ext.run or sweep",
    ),
    "single ablation": (lambda: Ablation(kind="zero", **HEAD), {}, "z.0.0 is not a patch"),
    "ablation among patches": (
        lambda: [(A(**HEAD), Ablation(kind="mean", site="mlp_out", layer=1))],
        {},
        "mlp_out.1:mean is not a patch",
    ),
    "path in a joint patch": (lambda: [(A(site="mlp_in", layer=0), PathPatch(**PATH))], {}, "path"),
    "place twice": (lambda: [(A(**HEAD), A(**HEAD))], {}, "each once"),
    "no source": (lambda: A(**HEAD), {"source": None}, "base and source must be tokenised"),
    "no patch": (lambda: [], {}, "nothing to run"),
    "empty joint patch": (lambda: [()], {}, "one or more places"),
    "no prompts": (lambda: A(**HEAD), {"base": NONE, "source": NONE}, "nothing to run"),
    "engine": (lambda: A(**HEAD), {"engine": "fast"}, "unknown engine 'fast'; choose sweep or plain"),
    "metric": (lambda: A(**HEAD), {"metric": "loss"}, "unknown metric 'loss'; choose among logit_diff, probability"),
    "memory": (lambda: A(**HEAD), {"memory": 0}, "memory must be a whole number of bytes above 0"),
    "memory of a path": (lambda: PathPatch(**PATH), {"memory": 0}, "memory must be a whole number of bytes above 0"),
    "batch size": (lambda: A(**HEAD), {"batch_size": 0}, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_patched_is_refused_in_one_sentence_before_the_model_runs(case: str) -> None:
    specs, options, message = REFUSED[case]
    model, before = _model("llama3_1"), traces(_model("llama3_1"))
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message) as refused:
            _patch("llama3_1", specs(), **options)
    finally:
        handle.remove()
    assert "\n" not in str(refused.value) and traces(model) == before
    assert not calls, "the model ran first"


@pytest.mark.parametrize("spec", [A(**HEAD), PathPatch(**PATH)], ids=["patch", "path"])
def test_a_model_without_a_vocabulary_is_refused_before_it_runs(spec: Patch) -> None:
    model = random_model("qwen2_5", "classifier")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran first"))
    with pytest.raises(ValueError, match="has no logits over a vocabulary"):
        patch(model, spec, BASE, SOURCE, progress=False)


@pytest.mark.parametrize("run_it", [run, sweep])
def test_a_patch_without_source_prompts_is_sent_to_patch(run_it: Callable[..., Any]) -> None:
    for specs in (A(**HEAD), [(A(**HEAD), Ablation(kind="zero", site="mlp_out", layer=1))]):
        with pytest.raises(
            ValueError, match=r"z.0.0:patch takes its activations from source prompts; call .*pyvene_ext.patch"
        ):
            run_it(_model("gpt2"), specs, BASE, progress=False)


@pytest.mark.parametrize("run_it", [run, sweep])
def test_a_path_is_no_spec_of_a_run(run_it: Callable[..., Any]) -> None:
    for specs in (PathPatch(**PATH), [PathPatch(**PATH)]):
        with pytest.raises(ValueError, match="patch"):
            run_it(_model("gpt2"), specs, BASE, progress=False)


def test_an_unknown_site_has_no_patches() -> None:
    config = _model("gpt2").config
    with pytest.raises(ValueError, match="'foo'"):
        all_patches(config, "foo")
    with pytest.raises(ValueError, match="no patch of 'scores'"):
        all_patches(config, "scores")
    with pytest.raises(ValueError, match="there is no node 'foo'"):
        all_paths(config, ("foo",))
    with pytest.raises(ValueError, match="name one or more receivers"):
        all_paths(config, ())


@pytest.mark.parametrize("name", ["0", "-1", "s1,s2"])
def test_a_position_s_name_cannot_be_taken_for_a_number(name: str) -> None:
    for make in (
        lambda: A(site="resid_pre", layer=1, positions=name),
        lambda: PathPatch(sender="z.0.0", receivers=("resid_pre.1",), positions=name),
    ):
        with pytest.raises(ValueError, match="a position's name is not a number and has no comma"):
            make()


def test_a_path_that_does_nothing_has_a_delta_of_0_whatever_else_is_run_in_bfloat16() -> None:
    model = random_model("qwen2_5").to(torch.bfloat16)
    nothing = PathPatch(sender="z.0.0", receivers=("logits",), positions="s1", direct=True)
    others = [ActivationPatch(site="z", layer=1, heads=(0,)), *_paths(PATHS[:3], positions="s1")]
    for engine in ("plain", "sweep"):
        for beside in (others, _paths(PATHS[:1], positions="s1", direct=True), []):
            result = patch(model, [*beside, nothing], BASE, SOURCE, engine=engine, progress=False)
            np.testing.assert_array_equal(result.delta[-1], 0)


def test_pairs_of_equal_texts_have_no_score_made_of_rounding() -> None:
    source = replace(SOURCE, input_ids=(BASE.input_ids[0], *SOURCE.input_ids[1:]))
    for engine in ("plain", "sweep"):
        result = _patch("gpt2", all_patches(_model("gpt2").config, "z"), source=source, engine=engine, batch_size=3)
        assert result.source[0] == result.baseline[0] and np.isnan(result.score[:, 0]).all()
        assert np.isfinite(result.score[:, 1:]).all()


# --- What is kept ---

STORED: list[Patch] = [
    ActivationPatch(site="z", layer=1, heads=(0,), positions="last", subspace=True),
    ActivationPatch(site="k", layer=1, heads=(0,), positions="s1"),
    *_paths([("z.0.1", ("k.1.0",)), ("mlp_out.0", ("q.2.0",)), ("z.0.1", ("logits",))], positions="s1"),
    *_paths([("z.0.1", ("v.2.0",))], positions="s1", freeze_mlps=True),
    *_paths([("z.0.1", ("v.2.0",))], positions="s1", direct=True),
]


def test_what_is_finished_is_kept_and_not_run_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _patch("gemma2", STORED, store=tmp_path / "kept")
    np.testing.assert_allclose(first.intervened, _by_hand("gemma2", STORED), **CLOSE)
    monkeypatch.setattr("pyvene_ext.engine.sweep.run.Executor", lambda *_: pytest.fail("run again"))
    again = _patch("gemma2", STORED, store=tmp_path / "kept")
    np.testing.assert_array_equal(again.intervened, first.intervened)


@pytest.mark.parametrize("which", range(len(STORED)))
def test_a_store_of_another_source_is_not_taken_for_this_one(tmp_path: Any, which: int) -> None:
    _patch("gemma2", STORED[which], store=tmp_path / "kept")
    other, folder = _source(LENGTHS, seed=9), tmp_path / "kept"
    try:
        found = _patch("gemma2", STORED[which], source=other, store=folder).intervened
    except ValueError as error:
        assert "reference set" in str(error) or "directions" in str(error)
    else:
        np.testing.assert_allclose(found, _by_hand("gemma2", STORED[which : which + 1], source=other), **CLOSE)


def test_the_plain_engine_keeps_nothing(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="the plain engine saves nothing"):
        _patch("gemma2", STORED, engine="plain", store=tmp_path / "kept")


# --- What is left behind ---

MIXED: list[Patch] = [A(**HEAD), *_paths(PATHS[:4]), *_paths(MANY_PLACES, positions="s1", freeze_mlps=True)]


@every_family
@both_engines
def test_nothing_is_left_on_the_model(family: str, engine: str) -> None:
    model = random_model(family).train()
    before = traces(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    patch(model, MIXED, BASE, SOURCE, engine=engine, progress=False)
    assert traces(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("target", ["plain", "block", "received"])
def test_nothing_is_left_on_the_model_after_an_error(
    family: str, target: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(family).train()
    before, count = traces(model), [0]
    owner: Any = IntervenableModel if target == "plain" else Replay
    name = {"plain": "forward", "block": "block", "received": "projected"}[target]
    original = getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        count[0] += 1
        if count[0] == calls:
            raise RuntimeError("out of luck")
        return result

    monkeypatch.setattr(owner, name, fails)
    specs = [*MIXED, *_paths([("embed", ("q.1.0", "k.1.0", "v.1.0")), ("embed", ("q.2.0", "k.2.0", "v.2.0"))])]
    with pytest.raises(RuntimeError, match="out of luck"):
        patch(model, specs, BASE, SOURCE, engine="plain" if target == "plain" else "sweep", progress=False)
    assert traces(model) == before


def test_logits_that_are_not_finite_are_said_and_leave_nothing() -> None:
    model: Any = random_model("llama3_1")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    before = traces(model)
    for engine in ("plain", "sweep"):
        with pytest.raises(ValueError, match="not finite"):
            patch(model, MIXED, BASE, SOURCE, engine=engine, progress=False)
        assert traces(model) == before


# --- What it costs ---

LAYER_2 = ("q.2.0", "k.2.0")
COSTS: dict[str, Callable[[Any], list[Patch]]] = {
    "patches": lambda config: [*all_patches(config, "z"), *all_patches(config, "mlp_out", positions="last")],
    "paths": lambda config: [*all_paths(config, "logits"), *all_paths(config, LAYER_2)],
    "direct paths": lambda config: all_paths(config, LAYER_2, direct=True),
    "paths to several layers": lambda config: all_paths(config, ("q.1.0", "q.2.0"), positions="last")[:3],
}


@pytest.mark.parametrize("case", COSTS)
def test_the_cost_in_passes_is_about_what_is_run(case: str) -> None:
    model = _model("llama3_1")
    specs = COSTS[case](model.config)
    tokens = 0

    def count(_: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal tokens
        tokens += args[0].shape[:-1].numel()

    expected = patch_passes(model, specs, BASE, SOURCE)
    with ExitStack() as stack:
        for block in model.model.layers:
            stack.callback(block.mlp.register_forward_pre_hook(count).remove)
        patch(model, specs, BASE, SOURCE, progress=False)
    passes = tokens / (sum(LENGTHS) * len(model.model.layers))
    assert passes / 1.5 <= expected <= 1.5 * passes


def test_some_of_very_many_patches_tell_what_all_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama3_1")
    specs = all_patches(model.config, "z")
    whole = patch_passes(model, specs, BASE, SOURCE)
    monkeypatch.setattr(patch_module, "PLANNED", len(specs) // 2)
    planned: list[int] = []
    original = patch_module.plan_resolved
    monkeypatch.setattr(
        patch_module,
        "plan_resolved",
        lambda resolved, *args, **how: planned.append(len(resolved.specs)) or original(resolved, *args, **how),
    )
    assert whole / 1.5 < patch_passes(model, specs, BASE, SOURCE) < 1.5 * whole and planned[0] < len(specs)


def test_the_cost_of_what_cannot_be_patched_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        patch_passes(_model("llama3_1"), [], BASE, SOURCE)
    with pytest.raises(ValueError, match="source prompts"):
        patch_passes(_model("llama3_1"), all_patches(_model("llama3_1").config, "z"), BASE, SOURCE.take([0]))
