"""Steering vectors on every family: both engines, generation and direct attribution against plain hooks, one prompt at a time."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelcards import FIELD_NAMES, dimensions
from pyvene_ext import Ablation, Addition, generate, load_specs, run, save_specs
from pyvene_ext.engine.sweep import sweep
from pyvene_ext.intervenable.truth import Truth
from pyvene_ext.methods.attribution.screen import estimate
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.specs.joint import Spec, members
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, MORE_FAMILIES, random_model

EVERY = (*FAMILIES, *MORE_FAMILIES)
PARALLEL = ("cohere", "gpt_neox", "gptj", "falcon")
PROMPTS = random_prompts((6, 8), seed=1)


@cache
def model_of(family: str) -> Any:
    return random_model(family)


def vector(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def specs_of(family: str) -> list[Spec]:
    """Every site, single and together, at all and at some positions."""
    d = dimensions(model_of(family).config)
    add = partial(Addition, scale=1.5)
    specs: list[Spec] = [
        add(site="resid_pre", layer=0, vector=vector(d["d_model"], 0)),
        add(site="resid_pre", layer=1, vector=vector(d["d_model"], 1), positions="s1"),
        add(site="resid_post", layer=0, vector=vector(d["d_model"], 2), positions=(0, "last")),
        add(site="resid_post", layer=1, vector=vector(d["d_model"], 3)),
        add(site="embed", vector=vector(d["d_model"], 4), positions="last"),
        add(site="attn_out", layer=1, vector=vector(d["d_model"], 5), positions="last"),
        add(site="mlp_out", layer=0, vector=vector(d["d_model"], 6)),
        add(site="z", layer=1, heads=(0, 3), vector=vector(d["d_head"], 7), positions="last"),
    ]
    if family not in PARALLEL:
        specs.append(add(site="resid_mid", layer=1, vector=vector(d["d_model"], 8), positions="last"))
    return [*specs, tuple(members(specs[3]) + members(specs[7]))]


def inputs(ids: Any) -> dict[str, Tensor]:
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": torch.arange(row.shape[1])[None]}


def edits_of(spec: Spec, prompt: int, length: int, new: bool = False) -> list[tuple]:
    """The additions as plain hooks; `new`: also at every token after the prompt's own."""
    found = []
    for edit in members(spec):
        names = edit.positions if isinstance(edit.positions, tuple) else (edit.positions,)
        own = len(PROMPTS.input_ids[prompt])
        at = [PROMPTS.positions[prompt].get(name, 0) if isinstance(name, str) else name for name in names]
        columns = list(range(own)) if edit.positions == "all" else [one % own for one in at]
        columns += list(range(own, length)) if new else []

        def added(x: Tensor, edit: Any = edit, columns: list[int] = columns) -> Tensor:
            x, value = x.clone(), torch.tensor(edit.vector) * edit.scale
            for head in edit.heads or (None,):
                for column in columns:
                    x[(0, column) if head is None else (0, head, column)] += value
            return x

        found.append((FIELD_NAMES[edit.site], edit.layer or 0, added))
    return found


def logits_by_hooks(model: Any, spec: Spec, prompt: int, ids: Any, new: bool = False) -> Tensor:
    return Truth(model).run_with(inputs(ids), edits_of(spec, prompt, len(ids), new))[0, -1]


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_both_engines_add_what_plain_hooks_add(family: str) -> None:
    model, specs = model_of(family), specs_of(family)
    expected = np.array(
        [
            [
                float(logits[io] - logits[s])
                for prompt, (ids, (io, s)) in enumerate(zip(PROMPTS.input_ids, PROMPTS.answer_ids, strict=True))
                for logits in [logits_by_hooks(model, spec, prompt, ids)]
            ]
            for spec in specs
        ]
    )
    found = run(model, specs, PROMPTS, progress=False)
    # Every spec does something on some prompt, but a position that nothing later can see.
    assert (np.abs(found.delta).max(1) > 1e-4).all()
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found.intervened / scale, expected / scale, atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        sweep(model, specs, PROMPTS, progress=False).intervened, found.intervened, atol=2e-5 * scale
    )


@pytest.mark.parametrize("scope", ["prompt", "new", "both"])
@pytest.mark.parametrize("family", EVERY)
def test_generated_tokens_are_those_of_plain_hooks_step_by_step_without_a_cache(family: str, scope: str) -> None:
    model, new = model_of(family), 3
    d = dimensions(model.config)
    spec = (
        Addition(site="resid_post", layer=0, vector=vector(d["d_model"], 2), scale=20.0),
        Addition(site="z", layer=1, heads=(1,), vector=vector(d["d_head"], 3), scale=2.0),
    )
    options = {"max_new_tokens": new, "min_new_tokens": new}
    found = generate(model, spec, PROMPTS, scope=scope, **options)  # type: ignore[arg-type]
    ends = model.generation_config.eos_token_id
    for prompt, ids in enumerate(PROMPTS.input_ids):
        text, own = list(ids), len(ids)
        for _ in range(new):
            edits = edits_of(spec, prompt, len(text), new=scope != "prompt")
            if scope == "new":
                edits = [(site, layer, partial(_after, change=change, own=own)) for site, layer, change in edits]
            logits = Truth(model).run_with(inputs(text), edits)[0, -1]
            if ends is not None and ends < len(logits):
                logits[ends] = -torch.inf
            text.append(int(logits.argmax()))
        assert found[prompt] == text[own:]
    assert generate(model, None, PROMPTS, **options) != found  # type: ignore[arg-type]


def _after(x: Tensor, change: Any, own: int) -> Tensor:
    """An edit at the columns after the prompt's own alone."""
    changed = change(x)
    changed[..., :own, :] = x[..., :own, :]
    return changed


@pytest.mark.parametrize("family", EVERY)
def test_direct_attribution_of_a_steered_run_sums_to_its_logits_and_says_what_the_vector_adds(family: str) -> None:
    model = model_of(family)
    for spec in specs_of(family):
        found = direct_logit_attribution(model, PROMPTS, spec, progress=False)
        for prompt, (ids, (io, s)) in enumerate(zip(PROMPTS.input_ids, PROMPTS.answer_ids, strict=True)):
            logits = logits_by_hooks(model, spec, prompt, ids)
            assert found.logit.capped[prompt] == pytest.approx(float(logits[io]), abs=2e-5, rel=2e-5)
            assert found.logit_diff.capped[prompt] == pytest.approx(float(logits[io] - logits[s]), abs=4e-5, rel=2e-5)
        parts = found.logit_diff
        total = parts.heads.sum((0, 1)) + parts.mlps.sum(0) + parts.embed + parts.bias
        np.testing.assert_allclose(total, parts.total, atol=1e-4, rtol=1e-4)
        sites = {edit.site for edit in members(spec)}
        reaches_last = any(edit.positions != "s1" for edit in members(spec))
        assert (np.abs(found.added).max() > 0) == (reaches_last and sites != {"embed"})
    clean = direct_logit_attribution(model, PROMPTS, progress=False)
    assert not clean.added.any()


@torch.no_grad()
def test_what_a_vector_adds_is_what_vanishes_with_it_at_the_end_of_the_stream() -> None:
    """After the last block nothing comes but the norm, whose scale is frozen at the steered run."""
    model = model_of("llama3_1")
    last, width = model.config.num_hidden_layers - 1, model.config.hidden_size
    spec = Addition(site="resid_post", layer=last, vector=vector(width, 0), scale=2.0)
    found = direct_logit_attribution(model, PROMPTS, spec, progress=False)
    for prompt, (ids, (io, s)) in enumerate(zip(PROMPTS.input_ids, PROMPTS.answer_ids, strict=True)):
        stream = Truth(model).read(inputs(ids), "block_output", last)[0, -1] + 2 * torch.tensor(spec.vector)
        scale = (stream.square().mean() + model.model.norm.variance_epsilon).rsqrt()
        term = 2 * torch.tensor(spec.vector) * model.model.norm.weight * scale
        unembedding = model.lm_head.weight
        assert found.added[0, prompt] == pytest.approx(float(term @ (unembedding[io] - unembedding[s])), abs=1e-5)
        assert found.added[1, prompt] == pytest.approx(float(term @ unembedding[io]), abs=1e-5)


def test_estimates_are_first_order_and_exact_where_the_model_is_linear() -> None:
    model = model_of("gpt2")
    d = dimensions(model.config)["d_model"]
    spec = Addition(site="mlp_out", layer=1, vector=vector(d, 0), scale=1e-3, positions="last")
    delta = run(model, spec, PROMPTS, progress=False).delta
    np.testing.assert_allclose(estimate(model, spec, PROMPTS, progress=False), delta, rtol=0.02, atol=1e-5)


def test_additions_are_kept_in_files_without_loss(tmp_path: Path) -> None:
    spec = Addition(site="z", layer=2, heads=(1, 0), vector=np.float32([0.1, -2.5e-7]), scale=-3, positions=("s1", -2))
    for name in ("specs.yaml", "specs.json"):
        save_specs(tmp_path / name, [spec, (spec, spec.model_copy(update={"layer": 1}))])
        assert load_specs(tmp_path / name) == [spec, (spec, spec.model_copy(update={"layer": 1}))]
    assert spec.heads == (0, 1) and spec.name.startswith("z.2.0,1@s1,-2:add/") and spec.name.endswith("*-3")
    other = Addition(site="z", layer=2, heads=(1, 0), vector=(0.1, 0.0), scale=-3, positions=("s1", -2))
    assert other.name != spec.name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vector": torch.zeros(3)}, "the vector has 3 numbers, and resid_post has 42"),
        ({"site": "z", "heads": (0,), "vector": torch.zeros(42)}, "has 42 numbers, and each head of z has 12"),
        ({"layer": 9}, "layer 9 is out of range"),
        ({"positions": "verb"}, "has no position 'verb'"),
        ({"site": "resid_past"}, "no addition of 'resid_past'; did you mean 'resid_post'"),
        ({"vector": torch.zeros(2, 42)}, "one number or more, unlike an array of shape"),
        ({"vector": ()}, "one number or more, unlike"),
        ({"vector": (float("nan"),) * 42}, "finite number"),
        ({"scale": float("inf")}, "finite number"),
    ],
)
def test_an_addition_that_does_not_fit_is_refused_in_a_sentence(fields: dict[str, Any], said: str) -> None:
    wanted = {"site": "resid_post", "layer": 0, "vector": torch.zeros(42)} | fields
    with pytest.raises(ValueError, match=said):
        run(model_of("llama3_1"), Addition(**wanted), PROMPTS, progress=False)


@pytest.mark.parametrize("scope", ["prompt", "new", "both"])
def test_texts_that_end_with_their_first_token_are_empty(scope: str) -> None:
    model = random_model("llama3_1")
    spec = Addition(site="mlp_out", layer=1, vector=vector(42, 0), scale=1e-3)
    model.generation_config.eos_token_id = [tokens[0] for tokens in generate(model, None, PROMPTS, max_new_tokens=2)]
    assert generate(model, spec, PROMPTS, scope=scope, batch_size=1) == [[], []]  # type: ignore[arg-type]


def test_generation_refuses_what_has_no_meaning_at_new_tokens() -> None:
    model = model_of("llama3_1")
    with pytest.raises(ValueError, match="this intervention is not defined at generated tokens"):
        generate(model, Ablation(kind="noise", site="mlp_out", layer=0), PROMPTS)
    with pytest.raises(ValueError, match="unknown scope 'all'"):
        generate(model, None, PROMPTS, scope="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the only new token depends on edits of the prompt alone"):
        generate(model, Ablation(kind="zero", site="mlp_out", layer=0), PROMPTS, scope="new", max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, not 0"):
        generate(model, Ablation(kind="zero", site="mlp_out", layer=0), PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match="prompts must be tokenised, not a NoneType"):
        generate(model, PROMPTS, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not an addition"):
        direct_logit_attribution(model, PROMPTS, Ablation(kind="zero", site="mlp_out", layer=0), progress=False)
