"""Copy scores against matrices written out in float64, heads whose copying is known, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny.planted_circuits import ARCHITECTURES, LENGTH, SYMBOLS, planted, token
from torch import Tensor, nn

from pyvene_ext.methods.heads import copying
from pyvene_ext.methods.heads.copying import copy_ranks, copy_scores
from tests.ground_truth import ablations as slow
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, VOCAB, random_model

PROMPTS = random_prompts((9, 6, 7, 6, 11))
PLACES = ("s1", "last")
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, len(PLACES), len(PROMPTS)))


# -- by hand -----------------------------------------------------------------------------------------------------------


def norm(module: Any, x: Tensor) -> Tensor:
    """A norm written out in float64."""
    x = x.double()
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean()
        return centred / (centred.square().mean() + module.eps).sqrt() * module.weight + module.bias
    gemma = "Gemma" in type(module).__name__
    eps = module.eps if gemma else module.variance_epsilon
    return x / (x.square().mean() + eps).sqrt() * (1 + module.weight if gemma else module.weight)


def behind_first_mlp(model: Any, embed: Tensor) -> Tensor:
    """W_E + MLP0, of what the model embeds."""
    block = slow.parts(model, 0).block
    if hasattr(model, "transformer"):
        return embed + block.mlp(norm(block.ln_2, embed).float()).double()
    if hasattr(block, "post_feedforward_layernorm"):
        return embed + norm(
            block.post_feedforward_layernorm, block.mlp(norm(block.pre_feedforward_layernorm, embed).float())
        )
    return embed + block.mlp(norm(block.post_attention_layernorm, embed).float())


def written(model: Any, layer: int, head: int, x: Tensor) -> Tensor:
    """The residual contribution of one head that looks at x alone, all matrices cut out by hand."""
    config, block = model.config, slow.parts(model, layer).block
    heads = config.num_attention_heads
    if hasattr(model, "transformer"):
        size = config.n_embd // heads
        own = slice(2 * config.n_embd + head * size, 2 * config.n_embd + (head + 1) * size)
        value = norm(block.ln_1, x) @ block.attn.c_attn.weight[:, own].double() + block.attn.c_attn.bias[own]
        return value @ block.attn.c_proj.weight[head * size : (head + 1) * size].double()
    attention = block.self_attn
    size, kv_head = attention.head_dim, head // (heads // config.num_key_value_heads)
    own = slice(kv_head * size, (kv_head + 1) * size)
    value = attention.v_proj.weight[own].double() @ norm(block.input_layernorm, x)
    if attention.v_proj.bias is not None:
        value = value + attention.v_proj.bias[own]
    out = attention.o_proj.weight[:, head * size : (head + 1) * size].double() @ value
    return norm(block.post_attention_layernorm, out) if hasattr(block, "post_feedforward_layernorm") else out


@torch.no_grad()
def ranks_by_hand(model: Any, prompt: int, place: str) -> np.ndarray:
    """`[input sign asked layer head]`, the token's place in the sorted logits."""
    ids, at = PROMPTS.input_ids[prompt], PROMPTS.positions[prompt][place]
    resid = slow.activation(model, ids, "resid_post", 0)[at].double()
    embed = slow.activation(model, ids, "embed", None)[at].double()
    final_norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    found = np.empty((3, 2, 2, 3, model.config.num_attention_heads), int)
    for which, x_after_0 in enumerate((resid, behind_first_mlp(model, embed), None)):
        for layer, head in np.ndindex(found.shape[3:]):
            x = slow.activation(model, ids, "resid_pre", layer)[at].double() if x_after_0 is None else x_after_0
            out = written(model, layer, head, x)
            for minus, sign in enumerate((1, -1)):
                logits = model.lm_head.weight.double() @ norm(final_norm, sign * out)
                if model.lm_head.bias is not None:
                    logits = logits + model.lm_head.bias
                order = logits.argsort(descending=True).tolist()
                for asked in (0, 1):
                    token_id = IDS[asked, PLACES.index(place), prompt]
                    found[which, minus, asked, layer, head] = 1 + order.index(token_id)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2 with a bias"])
def test_ranks_equal_matrices_written_out(family: str) -> None:
    model: Any = random_model(family.split()[0])
    if "bias" in family:
        model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, VOCAB))
    found = copy_ranks(model, PROMPTS, PLACES, IDS, batch_size=3, progress=False)
    assert found.shape[:5] == (3, 2, 2, 3, model.config.num_attention_heads)
    for number, place in enumerate(PLACES):
        for prompt in range(len(PROMPTS)):
            np.testing.assert_array_equal(found[..., number, prompt], ranks_by_hand(model, prompt, place))


def test_batches_and_chunks_of_the_vocabulary_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen2_5").train()
    whole = copy_ranks(model, PROMPTS, PLACES, IDS, progress=False)
    for chunk in (1, 7, VOCAB):
        monkeypatch.setattr(copying, "VOCABULARY_AT_ONCE", chunk)
        np.testing.assert_array_equal(copy_ranks(model, PROMPTS, PLACES, IDS, batch_size=1, progress=False), whole)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_ranks_that_nobody_asks_for_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("gpt2")
    whole = copy_ranks(model, PROMPTS, PLACES, IDS, progress=False)
    for most, chunk in ((20, 7), (5, 13), (20, VOCAB)):
        monkeypatch.setattr(copying, "VOCABULARY_AT_ONCE", chunk)
        monkeypatch.setattr(copying, "MOST", most)
        found = copy_ranks(model, PROMPTS, PLACES, IDS, progress=False)
        assert found.max() == most + 1 and (found < most).any()
        np.testing.assert_array_equal(found, whole.clip(max=most + 1))


def test_the_score_is_the_share_of_ranks_up_to_the_top() -> None:
    ranks = np.array([[[1, 6], [5, 100]], [[5, 5], [1, 2]]])
    assert copy_scores(ranks).tolist() == [0.5, 1.0]
    assert copy_scores(ranks, top=1).tolist() == [0.25, 0.25]


# -- heads whose copying is known --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "place", "signs"),
    [
        ("k_composition", "right", {"induction": 0}),
        ("q_composition", "right", {"find": 0}),
        ("negative", "after", {"positive": 0, "negative": 1}),
    ],
)
def test_planted_heads_copy_and_no_other_does(architecture: Any, name: str, place: str, signs: dict[str, int]) -> None:
    case = planted(name, architecture)
    # The answer is the symbol that a head copies from there; another one is as likely for heads that do not copy.
    ids = np.array([[[answers[which] for answers in case.clean.answer_ids]] for which in (0, 1)])
    scores = copy_scores(copy_ranks(case.model, case.clean, (place,), ids, progress=False), top=1)
    for role, minus in signs.items():
        layer, head = case.heads[role]
        assert scores[0, minus, 0, layer, head] == 1 and scores[0, 1 - minus, 0, layer, head] == 0
        assert scores[0, minus, 1, layer, head] == 0
        assert scores[2, minus, 0, layer, head] == 1 and scores[2, 1 - minus, 0, layer, head] == 0
    others = np.ones(scores.shape[3:], bool)
    others[tuple(np.transpose([case.heads[role] for role in signs]))] = False
    assert scores[0, :, 0, others].max() <= 0.75 and scores[0, :, 0, others].mean() < 0.2


def test_a_head_that_writes_nothing_copies_nothing() -> None:
    model: Any = random_model("llama3_1")
    size = model.config.head_dim
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0.0
    ranks = copy_ranks(model, PROMPTS, PLACES, IDS, progress=False)
    assert (ranks[:, :, :, 1, 2] == VOCAB).all() and (ranks[:, :, :, 1, 3] < VOCAB).any()


def test_scores_of_half_precision_are_close() -> None:
    for family in ("gemma2", "gpt2"):
        wanted = copy_ranks(random_model(family), PROMPTS, PLACES, IDS, progress=False)
        half = copy_ranks(random_model(family).bfloat16(), PROMPTS, PLACES, IDS, progress=False)
        assert np.abs(half - wanted).mean() < 1.5


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_told_before_the_model_runs() -> None:
    model: Any = random_model("llama3_1")
    for ids, told in (
        (IDS[:, :1], r"ids must be \[asked 2 5\] for these places, not \(2, 1, 5\)."),
        (IDS + VOCAB, "but the vocabulary has 61 tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            copy_ranks(model, PROMPTS, PLACES, ids, progress=False)
    with pytest.raises(ValueError, match="has no position 'verb'; choose among"):
        copy_ranks(model, PROMPTS, ("s1", "verb"), IDS, progress=False)
    with pytest.raises(
        ValueError, match="the unembedding of LlamaModel has no accessible weights; load a causal language"
    ):
        copy_ranks(model.model, PROMPTS, PLACES, IDS, progress=False)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0] = torch.nan
    with pytest.raises(ValueError, match="a logit of a head of layer 2 is not finite"):
        copy_ranks(model, PROMPTS, PLACES, IDS, progress=False)


def test_the_symbols_of_planted_prompts_are_told_apart() -> None:
    """The tests above would pass for a head that raises all answers alike, were there only one."""
    case = planted("negative", "llama")
    assert len({answers[0] for answers in case.clean.answer_ids}) > 3
    assert all(token(0, LENGTH) <= answers[0] < token(0, LENGTH) + SYMBOLS for answers in case.clean.answer_ids)
