"""Name movers and translation heads of real models against plain hooks and eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyvene_ext as px
from pyvene_ext.methods.heads.copying import copy_ranks
from pyvene_ext.methods.heads.lens import direct_logit_attribution
from pyvene_ext.methods.heads.name_movers import attention_to, copied_names, find_names, head_projections
from pyvene_ext.methods.heads.translation import translation_scores
from pyvene_ext.prompts.parallel import load_pairs, tokenize_pairs
from pyvene_ext.prompts.shipped import PROMPTS
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")
N = 3  # prompts


@contextmanager
def eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def run(model: Any, ids: tuple[int, ...], layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention [head query key], what enters the layer [pos d_model], z at the end, and what enters the final norm there."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args, kwargs: seen.__setitem__(name, (args or tuple(kwargs.values()))[0][0].clone())

    block = model.model.layers[layer]
    places = {"resid_pre": block, "z": block.self_attn.o_proj, "end": model.model.norm}
    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in places.items()]
    with torch.no_grad():
        attention = model(torch.tensor([ids]), output_attentions=True).attentions[layer][0]
    for handle in handles:
        handle.remove()
    return attention, seen["resid_pre"], seen["z"][-1], seen["end"][-1]


@pytest.mark.parametrize(
    ("fixture", "dataset", "head", "least"),
    [
        ("gemma3", "ioi_en", (12, 1), 0.9),
        ("gemma3", "ioi_zh", (11, 2), 0.9),
        ("smollm2", "ioi_en", (23, 0), 0.9),
    ],
)
def test_name_movers_look_at_names_copy_and_write_them(
    request: pytest.FixtureRequest, fixture: str, dataset: str, head: tuple[int, int], least: float
) -> None:
    """Those of Gemma 3 copy from their own input, but not from the stream after block 0."""
    real: Real = request.getfixturevalue(fixture)
    model, (layer, number) = real.model, head
    names = find_names(px.PromptSet.load(dataset)[:N], real.tokenizer)
    prompts = names.tokenize(real.tokenizer)
    assert len(prompts) == N and bool(names.several) == (dataset == "ioi_zh")
    attention = attention_to(model, prompts, names.tokens, progress=False)[0]
    projection = head_projections(model, prompts, names.ids, progress=False)
    ranks = copy_ranks(model, prompts.take(range(1)), *one_prompt(names), progress=False)
    attribution = direct_logit_attribution(model, prompts, progress=False).logit_diff.heads

    block, width = model.model.layers[layer], model.config.head_dim
    own = slice(number * width, (number + 1) * width)
    group = number // (model.config.num_attention_heads // model.config.num_key_value_heads)
    weight, unembed = block.self_attn.o_proj.weight[:, own], model.lm_head.weight
    post = block.post_attention_layernorm if fixture == "gemma3" else lambda x: x
    for prompt, ids in enumerate(prompts.input_ids):
        with eager(model):
            pattern, resid, z, end = run(model, ids, layer)
        io, s = names.ids[:2, prompt]
        for kind, tokens in enumerate(names.tokens[prompt]):
            assert attention[kind, layer, number, prompt] == pytest.approx(
                float(pattern[number, -1, list(tokens)].sum()), abs=1e-5
            )
        with torch.no_grad():
            whole = block.self_attn.o_proj(z)
            written = weight @ z[own] * (post(whole) / whole)
            wanted = [float(written @ unembed[name]) for name in (io, s)]
            np.testing.assert_allclose(projection[:2, layer, number, prompt], wanted, rtol=1e-4, atol=1e-3)
            direct = written * (model.model.norm(end) / end)
            added = float(direct @ (unembed[io] - unembed[s]))
            assert attribution[layer, number, prompt] == pytest.approx(added, abs=1e-3)
            if prompt == 0:
                for place, kind in enumerate(copied_names(names)[0]):
                    at = names.at[0][names.kinds.index(kind)]
                    value = block.self_attn.v_proj(block.input_layernorm(resid[at])).unflatten(-1, (-1, width))[group]
                    logits = model.lm_head(model.model.norm(post(weight @ value)))
                    rank = int((logits >= logits[names.ids[names.kinds.index(kind), 0]]).sum())
                    assert ranks[2, 0, 0, layer, number, place, 0] == min(rank, 101)
    assert attention[0, layer, number].mean() > 0.2 and attribution[layer, number].mean() > 0.5
    assert (ranks[2, 0, 0, layer, number] <= 5).mean() >= least
    if fixture == "gemma3":
        assert (ranks[0, 0, 0, layer, number] > 5).all()


def one_prompt(names: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """What `copied_names` gives for the first prompt alone."""
    places, asked = copied_names(names)
    return places, asked[..., :1]


def test_translation_heads_of_gemma_attend_along_the_diagonals(gemma3: Real) -> None:
    pairs = load_pairs(PROMPTS / "sentences.tsv", ("en", "fr"))[:N]
    prompts = tokenize_pairs(gemma3.tokenizer, pairs, ("en", "fr"))
    scores = translation_scores(gemma3.model, prompts, progress=False)
    for prompt, ids in enumerate(prompts.input_ids):
        with eager(gemma3.model):
            pattern = run(gemma3.model, ids, 5)[0][3].numpy()
        places = prompts.positions[prompt]
        crop = pattern[places["label"] :, places["first"] + len(ids) : places["label"]]
        wanted = np.mean([np.diagonal(crop, offset).mean() for offset in (0, 1, -1)])
        assert scores[prompt, 5, 3] == pytest.approx(float(wanted), abs=1e-5)
    assert scores[:, 5, 3].mean() > 0.08 and scores[:, 2, 0].mean() < 0.08
