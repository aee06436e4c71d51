"""Head scores against loops over eager patterns and whole logits, patterns set by hand, planted OV circuits, and bad input."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from modelcards import n_heads, n_kv_heads, n_layers
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.scores import (
    attention_scores,
    leading_bos,
    pattern_scores,
    random_tokens,
    read_head_scores,
    usable_tokens,
    write_head_scores,
)
from pyvene_ext.models.loading import load_model
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer
from tests.tiny_random import FAMILIES, VOCAB, random_model, tiny_config

PERIOD = 7  # longer than the sliding windows
BOS = 1


def repeated(examples: int = 3, repeats: int = 3, bos: tuple[int, ...] = (BOS,)) -> Tensor:
    return random_tokens(np.arange(3, VOCAB), PERIOD, repeats, examples=examples, rng=np.random.default_rng(0), bos=bos)


def by_hand(pattern: np.ndarray, period: int, first: int, occurrences: str) -> dict[str, float]:
    """The scores of one pattern [query key], token by token."""
    previous, duplicate, induction = [], [], []
    for i in range(first, len(pattern)):
        if i > first:
            previous.append(pattern[i, i - 1])
        earlier = [j for j in range(first, i) if (i - j) % period == 0][::-1]
        if earlier:
            earlier = earlier if occurrences == "all" else earlier[:1]
            duplicate.append(sum(pattern[i, j] for j in earlier))
            induction.append(sum(pattern[i, j + 1] for j in earlier))
    return {name: float(np.mean(x)) for name, x in zip(SCORES, (previous, duplicate, induction), strict=True)}


SCORES = ("previous", "duplicate", "induction")


# -- attention scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("occurrences", ["last", "all"])
def test_attention_scores_equal_a_loop_over_eager_patterns(family: str, occurrences: Any) -> None:
    ids = repeated()
    with torch.no_grad():
        patterns = random_model(family, attn_implementation="eager")(ids, output_attentions=True).attentions
    found = attention_scores(
        random_model(family),  # sdpa, but for Gemma 2 which has none
        ids,
        PERIOD,
        first=1,
        occurrences=occurrences,
        batch_size=2,
        progress=False,
    )
    assert found.copying is None
    assert found.induction.shape == (3, 3, n_heads(tiny_config(family)))
    for sequence, layer, head in np.ndindex(found.induction.shape):
        wanted = by_hand(patterns[layer][sequence, head].numpy(), PERIOD, 1, occurrences)
        for name in SCORES:
            assert getattr(found, name)[sequence, layer, head] == pytest.approx(wanted[name], abs=1e-5), name


@pytest.mark.parametrize(("family", "local"), [("mistral", {0, 1, 2}), ("gemma2", {0, 2}), ("qwen2_5", {2})])
def test_what_is_behind_a_sliding_window_is_not_seen(family: str, local: set[int]) -> None:
    found = attention_scores(random_model(family), repeated(), PERIOD, first=1, occurrences="all", progress=False)
    for layer in range(3):
        assert (found.induction[:, layer] == 0).all() == (layer in local)
        assert (found.previous[:, layer] > 0).all()


def test_a_pattern_set_by_hand_has_its_score_exactly() -> None:
    """Four blocks of 3 behind one token; every head is one idea, uniform attention the last."""
    length, period, first = 13, 3, 1
    pattern = torch.zeros(1, 6, length, length)
    for i in range(length):
        back = (i - 1) // period  # blocks before this one
        pattern[0, 0, i, max(i - 1, 0)] = 1
        pattern[0, 1, i, i - 3 if i > 3 else 0] = 1
        pattern[0, 2, i, i - 2 if i > 3 else 0] = 1
        pattern[0, 3, i, i - 3 * back + 1 if back else 0] = 1  # what followed the first occurrence
        for block in range(1, back + 1):
            pattern[0, 4, i, i - 3 * block + 1] = 1 / back  # what followed any
        pattern[0, 5, i, : i + 1] = 1 / (i + 1)
    previous, duplicate, induction = pattern_scores(pattern, period, first)
    assert previous[0, :5].tolist() == pytest.approx([1, 0, 0, 0, 0])
    assert duplicate[0, :5].tolist() == pytest.approx([0, 1, 0, 0, 0])
    assert induction[0, :5].tolist() == pytest.approx([0, 0, 1, 1 / 3, (1 + 1 / 2 + 1 / 3) / 3])
    uniform = [1 / (i + 1) for i in range(length)]
    assert previous[0, 5].item() == pytest.approx(np.mean(uniform[2:]))
    assert duplicate[0, 5].item() == induction[0, 5].item() == pytest.approx(np.mean(uniform[4:]))
    _, duplicate, induction = pattern_scores(pattern, period, first, "all")
    assert duplicate[0, :5].tolist() == pytest.approx([0, 1, 0, 0, 0])
    assert induction[0, :5].tolist() == pytest.approx([0, 0, 1, 1, 1])
    # A block need not end: what is behind the last whole one counts too.
    _, _, induction = pattern_scores(pattern[..., :12, :12], period, first, "all")
    assert induction[0, :5].tolist() == pytest.approx([0, 0, 1, 1, 1])


@pytest.mark.parametrize("copying", [False, True])
def test_batches_do_not_matter_and_the_model_is_left_as_it_was(copying: bool) -> None:
    ids = repeated(examples=5)
    model = random_model("gpt2").train()  # with dropout
    attention = model.transformer.h[0].attn
    config, children = attention.config, [name for name, _ in model.named_modules()]
    options: dict[str, Any] = {"first": 1, "copying": copying, "progress": False}
    whole = attention_scores(model, ids, PERIOD, **options)
    for batch_size in (1, 3):
        parts = attention_scores(model, ids, PERIOD, batch_size=batch_size, **options)
        for name in (*SCORES, "copying") if copying else SCORES:
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)
    assert model.training and attention.config is config
    assert [name for name, _ in model.named_modules()] == children
    with pytest.raises(RuntimeError, match="broken"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.transformer.h[2].mlp, "forward", broken)
        attention_scores(model, ids, PERIOD, **options)
    assert model.training and attention.config is config
    assert [name for name, _ in model.named_modules()] == children
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def broken(*_: Any) -> None:
    raise RuntimeError("broken")


def test_one_forward_pass_a_batch_and_no_pattern_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama3_1")
    calls, alive = [], []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def watched(pattern: Tensor, *args: Any) -> Any:
        alive.append(weakref.ref(pattern))
        assert sum(ref() is not None for ref in alive) <= 2  # this layer's, and the last one's at most
        return pattern_scores(pattern, *args)

    monkeypatch.setattr("pyvene_ext.methods.heads.scores.pattern_scores", watched)
    attention_scores(model, repeated(examples=6), PERIOD, first=1, batch_size=2, copying=True, progress=False)
    assert len(calls) == 3 and len(alive) == 9


def test_bare_models_and_other_dtypes_have_attention_scores() -> None:
    ids = repeated()
    wanted = attention_scores(random_model("llama3_1"), ids, PERIOD, first=1, copying=True, progress=False)
    bare = attention_scores(random_model("llama3_1").model, ids, PERIOD, first=1, progress=False)
    np.testing.assert_allclose(bare.induction, wanted.induction, atol=1e-6)
    for family in ("llama3_1", "gemma2", "gpt2"):  # norms of which each treats its weights' dtype in another way
        wanted = attention_scores(random_model(family), ids, PERIOD, first=1, copying=True, progress=False)
        half = attention_scores(random_model(family).bfloat16(), ids, PERIOD, first=1, copying=True, progress=False)
        for name in SCORES:
            np.testing.assert_allclose(getattr(half, name), getattr(wanted, name), atol=0.05)
        np.testing.assert_allclose(half.copying, wanted.copying, atol=0.1)


# -- copying -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def copying_by_hand(family: str, ids: Tensor, first: int) -> np.ndarray:
    """Logits of the whole vocabulary, all scales frozen at the clean run (at the token itself), head by head."""
    model = random_model(family)
    config = model.config
    heads, group = n_heads(config), n_heads(config) // n_kv_heads(config)
    gpt2 = family == "gpt2"
    blocks = model.transformer.h if gpt2 else model.model.layers
    values, written, last, handles = [], [], [], []
    for block in blocks:
        attention: Any = block.attn if gpt2 else block.self_attn
        projected = attention.c_attn if gpt2 else attention.v_proj
        handles.append(
            projected.register_forward_hook(lambda _, __, x: values.append(x[..., -x.shape[-1] // 3 :] if gpt2 else x))
        )
        handles.append(attention.register_forward_hook(lambda _, __, x: written.append(x[0])))
    norm = model.transformer.ln_f if gpt2 else model.model.norm
    handles.append(norm.register_forward_pre_hook(lambda _, args: last.append(args[0])))
    model(ids)
    for handle in handles:
        handle.remove()
    scores = np.empty((len(ids), len(blocks), heads))
    for sequence, layer, head in np.ndindex(scores.shape):
        block = blocks[layer]
        shares = []
        for j in range(first, ids.shape[1]):
            v = values[layer][sequence, j].view(heads // group, -1)[head // group]
            if gpt2:
                part = v @ block.attn.c_proj.weight.view(heads, len(v), -1)[head]
            else:
                part = v @ block.self_attn.o_proj.weight.T.view(heads, len(v), -1)[head]
            x = last[0][sequence, j]
            if family == "gemma2":
                whole = written[layer][sequence, j]
                part = (
                    part
                    * (1 + block.post_attention_layernorm.weight)
                    / whole.square().mean().add(config.rms_norm_eps).sqrt()
                )
                direct = part * (1 + norm.weight) / x.square().mean().add(config.rms_norm_eps).sqrt()
            elif gpt2:
                direct = (part - part.mean()) * norm.weight / (x - x.mean()).square().mean().add(1e-5).sqrt()
            else:
                direct = part * norm.weight / x.square().mean().add(config.rms_norm_eps).sqrt()
            logits = model.lm_head.weight @ direct
            raised = (logits - logits.mean()).clamp(min=0)
            sample = sorted(set(ids[sequence, first:].tolist()))
            shares.append(float(raised[ids[sequence, j]] / (raised[sample].sum() or 1)))
        scores[sequence, layer, head] = np.mean([2 * share - 1 for share in shares])
    return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bos", [(), (BOS,)])
def test_copying_equals_whole_logits_with_frozen_scales(family: str, bos: tuple[int, ...]) -> None:
    ids = repeated(examples=2, repeats=2, bos=bos)
    found = attention_scores(random_model(family), ids, PERIOD, first=len(bos), copying=True, progress=False)
    wanted = copying_by_hand(family, ids, len(bos))
    assert found.copying is not None and np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found.copying, wanted, atol=1e-5)


def copier() -> LlamaForCausalLM:
    """One-hot tokens; head 0 writes what it reads, head 1 its negative, head 2 nothing, head 3 both tokens of a pair."""
    vocab = 16
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=vocab,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=vocab,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    eye = torch.eye(vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.zero_()
        model.model.embed_tokens.weight.copy_(eye)
        model.lm_head.weight.copy_(eye)
        model.model.layers[0].self_attn.v_proj.weight.copy_(torch.cat([eye, eye]))
        pairs = eye + eye[torch.arange(vocab) ^ 1]
        model.model.layers[0].self_attn.o_proj.weight.copy_(torch.cat([eye, -eye, 0 * eye, pairs], dim=1))
    return model


def test_planted_ov_circuits_have_their_score_exactly() -> None:
    ids = torch.tensor([[2, 3, 6, 7, 2, 3, 6, 7], [9, 8, 4, 5, 5, 4, 8, 9]])
    found = attention_scores(copier(), ids, 4, copying=True, batch_size=1, progress=False)
    assert found.copying is not None
    # The negative raises the three others alike, and not the token itself; of a pair both are in the block.
    np.testing.assert_allclose(found.copying[:, 0], [[1, -1, -1, 0]] * 2, atol=1e-6)
    # Of other pairs only one is: what a head raises outside of the block is not counted.
    alone = attention_scores(copier(), torch.tensor([[1, 3, 5, 1, 3, 5]]), 3, copying=True, progress=False)
    assert alone.copying is not None
    np.testing.assert_allclose(alone.copying[0, 0], [1, -1, -1, 1], atol=1e-6)


# -- shipped models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "induction", "previous"),
    [("tiny-llama3.1", (1,), (0,)), ("tiny-qwen2.5", (2, 3), (1,)), ("tiny-gemma2", (4, 5), (2, 3))],
)
def test_shipped_models_have_induction_and_previous_token_heads(
    name: str, induction: tuple[int, ...], previous: tuple[int, ...]
) -> None:
    """Induction heads score on repeated text alone, previous-token heads on any, and only in the layers where they are."""
    model, tokenizer = load_model(name)
    bos, tokens = leading_bos(tokenizer), usable_tokens(model, tokenizer)
    assert bos == (tokenizer.bos_token_id,) and len(tokens) == 399
    scores = []
    for length, repeats in ((25, 4), (100, 1)):
        ids = random_tokens(tokens, length, repeats, examples=4, rng=rng(0, "x"), bos=bos)
        scores.append(attention_scores(model, ids, 25, first=1, occurrences="all", copying=repeats > 1, progress=False))
    there, elsewhere = (found.induction.mean(0) for found in scores)
    layers = [layer for layer in range(len(there)) if there[layer].max() > 0.6]
    assert tuple(layers) == induction
    others = np.delete(there, induction, axis=0)
    assert there[induction[0]].min() > 0.6 and others.max() < 0.35
    assert elsewhere.max() < 0.35 and (there - elsewhere)[induction[0]].min() > 0.4
    of_previous = [found.previous.mean(0) for found in scores]
    assert of_previous[0].max() > 0.5 and of_previous[1].max() > 0.5
    assert {int(x.max(1).argmax()) for x in of_previous} <= set(previous)
    copying = scores[0].copying
    assert copying is not None  # induction heads copy more than the heads of the first layer
    assert copying.mean(0)[induction[0]].min() > copying.mean(0)[0].mean()


# -- random tokens -----------------------------------------------------------------------------------------------------

WORDS = ["the cat saw a dog and the dog saw the cat", "a bird sang"]


def test_usable_tokens_are_not_special_and_not_at_either_end_of_a_bpe_vocabulary() -> None:
    model = random_model("llama3_1")  # embeds 61 tokens
    words = word_tokenizer(WORDS)
    words.add_tokens(["added"])
    assert usable_tokens(model, words).tolist() == list(range(4, 12))
    assert usable_tokens(model, words, trim=0.25).tolist() == list(range(6, 10))
    bpe = bpe_tokenizer(WORDS)
    assert len(bpe) > VOCAB
    assert usable_tokens(model, bpe, trim=0).tolist() == list(range(4, VOCAB))
    assert usable_tokens(model, bpe).tolist() == list(range(9, VOCAB - 5))
    for trim in (-0.1, 0.5):
        with pytest.raises(ValueError, match="trim must be at least 0 and below"):
            usable_tokens(model, bpe, trim=trim)


def test_the_start_token_leads_where_the_tokenizer_puts_it() -> None:
    assert leading_bos(word_tokenizer(WORDS, bos=True, eos=True)) == (1,)
    assert leading_bos(word_tokenizer(WORDS, eos=True)) == leading_bos(bpe_tokenizer(WORDS)) == ()


def test_random_tokens_are_distinct_repeated_and_seeded() -> None:
    def draw(seed: int) -> Tensor:
        return random_tokens(np.arange(10, 18), 5, 3, examples=4, rng=rng(seed, "x"), bos=(1,))

    ids = draw(0)
    assert ids.shape == (4, 16) and ids.equal(draw(0)) and not ids.equal(draw(1))
    assert (ids[:, 0] == 1).all() and ids[:, 1:6].equal(ids[:, 6:11]) and ids[:, 1:6].equal(ids[:, 11:])
    assert all(len(set(row[1:].tolist())) == 5 for row in ids) and ids[:, 1:].min() >= 10
    assert len({tuple(row.tolist()) for row in ids}) > 1
    with pytest.raises(ValueError, match="9 distinct random tokens are needed but only 8 are usable"):
        random_tokens(np.arange(10, 18), 9, 2, examples=1, rng=rng(0, "x"))
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, not 0"):
            random_tokens(np.arange(9), *numbers[:2], examples=numbers[2], rng=rng(0, "x"))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"period": 0}, "period must be at least 2 and first at least 0, not 0 and 1"),
        ({"period": 1}, "period must be at least 2"),
        ({"first": -1}, "first at least 0, not 7 and -1"),
        ({"period": 21}, "longer than the first 1 tokens and one period of 21"),
        ({"ids": torch.empty(0, 22, dtype=torch.long)}, r"not of shape \(0, 22\)"),
        ({"ids": torch.arange(22)}, r"ids must be \[sequence pos\]"),
        ({"ids": torch.full((1, 65), 5)}, "65 tokens long but the model has 64 positions"),
        ({"ids": torch.full((1, 22), VOCAB)}, "range from 61 to 61 but the model embeds 61 tokens"),
        ({"ids": torch.full((1, 22), -1)}, "range from -1 to -1 but"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"occurrences": "first"}, "occurrences must be 'last' or 'all', not 'first'"),
        ({"ids": torch.arange(3, 25)[None], "copying": True}, "a repeated block of 7 distinct tokens after 1 others"),
        ({"ids": torch.full((1, 22), 5), "copying": True}, "a repeated block of 7 distinct tokens"),
    ],
)
def test_bad_input_is_told_before_the_model_runs(options: dict[str, Any], told: str) -> None:
    model = random_model("llama3_1")
    model.model.register_forward_pre_hook(broken)
    given = {"ids": repeated(), "period": PERIOD, "first": 1, "progress": False, **options}
    with pytest.raises(ValueError, match=told):
        attention_scores(model, **given)


def test_models_that_cannot_be_scored_are_told() -> None:
    ids = repeated()
    for model in (random_model("llama3_1").model, random_model("llama3_1", "classifier")):
        with pytest.raises(ValueError, match="no logits over a vocabulary; load the model as a causal language model"):
            attention_scores(model, ids, PERIOD, first=1, copying=True, progress=False)
    with pytest.raises(ValueError, match="no model card covers Linear"):
        attention_scores(nn.Linear(1, 1), ids, PERIOD, first=1)  # type: ignore[arg-type]
    for broken_up in ("model.layers.1.self_attn.o_proj", "model.norm", "lm_head"):
        offloaded = random_model("llama3_1")
        offloaded.get_submodule(broken_up).to("meta")
        with pytest.raises(ValueError, match="load the model without quantisation and offloading"):
            attention_scores(offloaded, ids, PERIOD, first=1, copying=True, progress=False)
    unseen = random_model("llama3_1")
    unseen.config._attn_implementation = "flex_attention"
    unseen.model.register_forward_pre_hook(broken)
    with pytest.raises(ValueError, match="cannot be seen under the attention implementation 'flex_attention'"):
        attention_scores(unseen, ids, PERIOD, first=1, progress=False)


@pytest.mark.parametrize("copying", [False, True])
def test_scores_that_are_not_finite_are_told(copying: bool) -> None:
    model = random_model("llama3_1")
    name = "v_proj" if copying else "k_proj"
    model.get_submodule(f"model.layers.2.self_attn.{name}").weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"a score of head 2\.0 on sequence 0 is not finite"):
        attention_scores(model, repeated(), PERIOD, first=1, copying=copying, progress=False)


# -- files -------------------------------------------------------------------------------------------------------------


def test_scores_come_back_from_their_file_highest_first(tmp_path: Path) -> None:
    config = tiny_config("llama3_1")
    scores = np.random.default_rng(0).standard_normal((n_layers(config), n_heads(config))).astype(np.float32)
    scores[2, 4] = scores[0, 5] = 9.0
    path = tmp_path / "new/scores.csv"
    write_head_scores(path, scores)
    assert path.read_text().startswith("scores,layer,head\n9.0,0,5\n9.0,2,4\n")
    found = read_head_scores(path, config)
    assert [row[0] for row in found] == sorted(scores.ravel().tolist(), reverse=True)
    assert all(scores[layer, head] == score for score, layer, head in found)
    assert len({row[1:] for row in found}) == scores.size
    assert list(path.parent.iterdir()) == [path]


def test_a_file_may_be_unsorted_and_name_some_heads(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("\ufeffhead,layer,scores,note\n1,0,-.5,x\n5,2,1e-3,\n0,0,-.5,\n", encoding="utf-8")
    assert read_head_scores(path, tiny_config("llama3_1")) == [(0.001, 2, 5), (-0.5, 0, 0), (-0.5, 0, 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "has no heads"),
        (b"layer,head\n1,0\n", "lacks the column scores"),
        (b"scores,layer\n1,0\n", "lacks the column head; its first line must be scores,layer,head"),
        (b"scores,layer,head\n", "has no heads"),
        (b"scores,layer,head\n1,0,0\n1,3,0\n", "row 2: head 3.0 is outside a model of 3 layers with 6 heads"),
        (b"scores,layer,head\n1,0,6\n", "row 1: head 0.6 is outside"),
        (b"scores,layer,head\n1,0,-1\n", "row 1: head 0.-1 is outside"),
        (b"scores,layer,head\n1,0,1\n2,0,1\n", "row 2: head 0.1 is listed twice"),
        (b"scores,layer,head\nnan,0,1\n", "row 1: the score of head 0.1 is nan"),
        (b"scores,layer,head\ninf,0,1\n", "row 1: the score of head 0.1 is inf"),
        (b"scores,layer,head\nx,0,1\n", "row 1: 'x,0,1' is not a number and two whole numbers"),
        (b"scores,layer,head\n1,0.5,1\n", "row 1: '1,0.5,1' is not"),
        (b"scores,layer,head\n1,0,\n", "row 1: '1,0,' is not"),
        (b"scores,layer,head\n1,0\n", "has rows of unequal length"),
        (b"scores,layer,head\n1,0,0,1\n", "has rows of unequal length"),
        (b"\x80\x02]q\x00.", "is not a CSV file"),
    ],
)
def test_a_file_that_is_none_of_the_model_is_told_by_name_and_row(tmp_path: Path, text: bytes, told: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"scores.csv.*{told}") as error:
        read_head_scores(path, tiny_config("llama3_1"))
    assert "\n" not in str(error.value)


def test_scores_that_are_no_matrix_of_finite_numbers_are_not_written(tmp_path: Path) -> None:
    for scores in (np.zeros(3), np.zeros((0, 2)), np.array([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="one finite number per head"):
            write_head_scores(tmp_path / "scores.csv", scores)
    assert not list(tmp_path.iterdir())
