"""The two axes of the scatter by plain hooks on every family; which prompts have names of one token; and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny.planted_circuits import planted
from torch import Tensor, nn

from pyvene_ext.methods.heads.name_movers import (
    attention_to,
    find_names,
    head_projections,
    named_places,
)
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.sets import Prompt, PromptSet
from tests.ground_truth import ablations as slow
from tests.pyvene_ext.tokenizers_for_tests import bpe_tokenizer, word_tokenizer
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, VOCAB, random_model

PROMPTS = random_prompts((9, 6, 7, 6, 11))
GROUPS = [[[0], [1, 3], [length - 1, 2, length - 2], []] for length in (9, 6, 7, 6, 11)]
IDS = np.random.default_rng(0).integers(0, VOCAB, (3, len(PROMPTS)))


# -- where heads look --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_attention_is_summed_over_the_tokens_of_a_group(family: str, batch_size: int) -> None:
    eager: Any = random_model(family, attn_implementation="eager")
    found = attention_to(random_model(family), PROMPTS, GROUPS, batch_size=batch_size, progress=False)
    assert found.shape[:3] == (2, 4, 3)
    for prompt, ids in enumerate(PROMPTS.input_ids):
        with torch.no_grad():
            patterns = eager(torch.tensor([ids]), output_attentions=True).attentions
        for layer, pattern in enumerate(patterns):
            for number, query in enumerate((len(ids) - 1, len(ids) - 2)):
                for group, tokens in enumerate(GROUPS[prompt]):
                    wanted = [sum(float(row[query, token]) for token in tokens) for row in pattern[0]]
                    np.testing.assert_allclose(found[number, group, layer, :, prompt], wanted, atol=1e-5)


def test_planted_heads_look_where_they_were_told() -> None:
    case = planted("v_composition", "gemma2")
    groups = [[[positions["after"] + 6], [positions["symbol"] + 6]] for positions in case.clean.positions]
    found = attention_to(case.model, case.clean, groups, queries=(-1,), progress=False)
    layer, head = case.heads["copy"]
    assert (found[0, 0, layer, head] > 0.95).all() and (found[0, 1, layer, head] < 0.05).all()


# -- what heads write --------------------------------------------------------------------------------------------------


def norm_scale(norm: Any, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A norm as a linear map, its scale that of x, and its bias."""
    if isinstance(norm, nn.LayerNorm):
        sd = ((x - x.mean()).square().mean() + norm.eps).sqrt()
        return lambda part: (part - part.mean()) / sd * norm.weight.double(), norm.bias.double()
    gemma = "Gemma" in type(norm).__name__
    rms = (x.square().mean() + (norm.eps if gemma else norm.variance_epsilon)).sqrt()
    weight = 1 + norm.weight.double() if gemma else norm.weight.double()
    return lambda part: part / rms * weight, torch.zeros_like(x)


@torch.no_grad()
def projections_by_hand(model: Any, ids: tuple[int, ...], tokens: list[int], fold: bool) -> np.ndarray:
    """`[kind layer head]`, in float64, from z at the last token of one unpadded prompt."""
    heads = model.config.num_attention_heads
    found = np.empty((len(tokens), 3, heads))
    final_norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    folded, _ = norm_scale(final_norm, slow.activation(model, ids, "resid_post", 2)[-1].double())
    for layer in range(3):
        at = slow.parts(model, layer)
        z = slow.activation(model, ids, "z", layer)[-1].double()
        weight = at.project.weight.double()
        weight = weight if hasattr(model, "transformer") else weight.T
        parts = [z[head] @ weight[head * z.shape[1] : (head + 1) * z.shape[1]] for head in range(heads)]
        if hasattr(at.block, "post_feedforward_layernorm"):
            post, _ = norm_scale(at.block.post_attention_layernorm, torch.stack(parts).sum(0))
            parts = [post(part) for part in parts]
        for head, part in enumerate(parts):
            x = folded(part) if fold else part
            found[:, layer, head] = [float(x @ model.lm_head.weight[token].double()) for token in tokens]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold", [False, True])
def test_projections_equal_contributions_times_unembeddings_written_out(family: str, fold: bool) -> None:
    model: Any = random_model(family)
    for batch_size in (1, 3):
        found = head_projections(model, PROMPTS, IDS, fold_norm=fold, batch_size=batch_size, progress=False)
        for prompt, ids in enumerate(PROMPTS.input_ids):
            wanted = projections_by_hand(model, ids, IDS[:, prompt].tolist(), fold)
            np.testing.assert_allclose(found[..., prompt], wanted, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_projections_need_ids_and_an_unembedding() -> None:
    model: Any = random_model("llama3_1")
    for ids in (IDS[:, :2], IDS[0], IDS + VOCAB, IDS - VOCAB):
        with pytest.raises(ValueError, match=r"ids must be \[kind 5\] tokens of the model, one for each prompt."):
            head_projections(model, PROMPTS, ids, progress=False)
    with pytest.raises(ValueError, match="LlamaModel has no logits over a vocabulary"):
        head_projections(model.model, PROMPTS, IDS, progress=False)


# -- names -------------------------------------------------------------------------------------------------------------

TEXTS = [
    "When Lisa and Mark met Paul, Mark said that Lisa gave the pen to",
    "Then Mark and Lisa saw Paul and Mark gave the pen to",
]


def prompt(text: str, io: str = "Lisa", s: str = "Mark", **fields: Any) -> Prompt:
    return Prompt(clean=text, io_name=io, s_name=s, **fields)


@pytest.mark.parametrize("bos", [False, True])
def test_names_are_found_at_all_their_occurrences(bos: bool) -> None:
    tokenizer = word_tokenizer(TEXTS, bos=bos, eos=True)
    prompts = PromptSet(tuple(prompt(text, positions={"earlier": "Paul"}) for text in TEXTS))
    found = find_names(prompts, tokenizer, ("earlier",))
    assert found.kinds == ("io", "s", "s1", "s2", "earlier") and not found.dropped and found.whole == (0, 1, 4)
    lisa, mark, paul = tokenizer.convert_tokens_to_ids(["Lisa", "Mark", "Paul"])
    assert found.ids.T.tolist() == [[lisa, mark, mark, mark, paul]] * 2
    first = int(bos)
    wanted = (((1, 10), (3, 7), (3,), (7,), (5,)), ((3,), (1, 7), (1,), (7,), (5,)))
    assert found.tokens == tuple(tuple(tuple(first + token for token in kind) for kind in of) for of in wanted)
    tokenized = found.prompts.tokenize(tokenizer)
    places, groups = named_places(found, tokenized)
    assert places == ("io", "s1", "s2", "earlier", "first", "end-1", "end", "other")
    for ids, of_prompt in zip(tokenized.input_ids, groups, strict=True):
        assert sorted(token for tokens in of_prompt for token in tokens) == list(range(len(ids)))
    n = len(tokenized.input_ids[0])
    assert groups[0][:3] == [[1 + first, 10 + first], [3 + first], [7 + first]]
    assert groups[0][4:7] == [[0], [n - 2], [n - 1]]


def test_a_token_with_two_names_is_in_the_first_of_its_groups() -> None:
    text = "Lisa and Mark ran . Mark"
    tokenizer = word_tokenizer([text])
    found = find_names(PromptSet((prompt(text),)), tokenizer)
    places, (groups,) = named_places(found, found.prompts.tokenize(tokenizer))
    assert places == ("io", "s1", "s2", "first", "end-1", "end", "other")
    assert groups == [[0], [2], [5], [], [4], [], [1, 3]]


def test_of_names_of_several_tokens_the_one_that_differs_counts() -> None:
    tokenizer = bpe_tokenizer([" ".join(TEXTS)] * 50, vocab_size=400)
    text = TEXTS[1].replace("Lisa", "Ermintrude").replace("Paul", "Zbigniew")
    named = prompt(text, io="Ermintrude", positions={"earlier": "Zbigniew"})
    found = find_names(PromptSet((prompt(TEXTS[1], positions={"earlier": "Paul"}), named)), tokenizer, ("earlier",))
    assert found.several == (1,) and not found.dropped
    ids = tokenizer(text)["input_ids"]
    for kind, name in ((0, "Ermintrude"), (4, "Zbigniew")):
        own = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        other = tokenizer(" Ermintrude" if kind else " Mark", add_special_tokens=False)["input_ids"]
        first = next(i for i, (mine, its) in enumerate(zip(own, other, strict=False)) if mine != its)
        assert len(own) > 1 and found.ids[kind, 1] == own[first]
        assert [ids[token] for token in found.tokens[1][kind]] == own
    # Of "Ermintrude" a lone space differs from " Mark", which is no part of the name: read at its end; of "Zbigniew" the Z.
    assert tokenizer.convert_ids_to_tokens(found.ids[[0, 4], 1].tolist()) == ["Ġ", "Z"]
    assert found.at[1] == (13, 1, 1, 25, 16)
    # IO and S that begin alike: what they share belongs to the prompt.
    text = "Then Mark Lisa and Mark Paul saw them and Mark Lisa gave the pen to"
    alike = prompt(text, io="Mark Paul", s="Mark Lisa")
    found = find_names(PromptSet((alike,)), tokenizer)
    mark, lisa, paul = (
        tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in ("Mark", "Lisa", "Paul")
    )
    assert len(mark) == len(lisa) == len(paul) == 1
    assert found.ids[:2, 0].tolist() == [*paul, *lisa]
    (row,) = found.tokenize(tokenizer).input_ids
    assert list(row) == [*tokenizer(text)["input_ids"], *mark]
    (positions,) = found.tokenize(tokenizer).positions
    assert [row[positions[kind]] for kind in found.kinds] == [*paul, *lisa, *lisa, *lisa]


def test_a_name_that_begins_another_is_dropped_and_told() -> None:
    tokenizer = word_tokenizer(["Then Mark Lisa and Mark saw Mark Lisa"])
    with pytest.raises(
        ValueError, match=r"has names that tokens tell apart \(prompt 0: the tokens of one of 'Mark Lisa' and"
    ):
        find_names(PromptSet((prompt("Then Mark Lisa and Mark saw Mark Lisa", io="Mark Lisa", s="Mark"),)), tokenizer)
    odd = prompt(TEXTS[1], io_token="Lisa")  # merges with the end of the prompt
    tokenizer = bpe_tokenizer(["Then Mark and Lisa saw Paul and Mark gave the pen to"] * 50, vocab_size=400)
    found = find_names(PromptSet((odd, prompt(TEXTS[1]))), tokenizer)
    assert found.dropped.keys() <= {0}


def test_a_name_at_the_start_of_a_text_is_read_at_its_last_token() -> None:
    """There a byte-level BPE has other tokens for a name than as an answer."""
    tokenizer = bpe_tokenizer(["Then Mark and Lisa saw Paul and Mark gave the pen to"] * 50, vocab_size=400)
    text = "Mark and Lisa saw Paul and Mark gave the pen to"
    found = find_names(PromptSet((prompt(TEXTS[1]), prompt(text))), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"][:2]) == ["Ma", "rk"]
    assert not found.dropped and found.several == (1,) and found.ids[1, 0] == found.ids[1, 1]
    assert found.tokens[1][1:] == ((0, 1, 7), (0, 1), (7,)) and found.at[1][1:] == (1, 1, 7)


def test_a_name_that_the_tokenizer_leaves_out_is_told() -> None:
    with pytest.raises(ValueError, match=r"\(prompt 0: 'Lisa' is in the text as no token\)"):
        find_names(PromptSet((prompt(TEXTS[0]),)), word_tokenizer(TEXTS, drop="Lisa"))


def test_both_forms_of_a_name_count_as_its_occurrences() -> None:
    both = "Mark and Lisa saw Paul and Mark gave the pen to"
    tokenizer = bpe_tokenizer([both, "Mark"] * 50, vocab_size=400)
    found = find_names(PromptSet((prompt(both),)), tokenizer)
    own, spaced = (tokenizer(name, add_special_tokens=False)["input_ids"] for name in ("Mark", " Mark"))
    assert len(own) == len(spaced) == 1 and own != spaced
    assert found.ids[1, 0] == spaced[0] and found.tokens[0][1] == (0, 6) and found.tokens[0][2:] == ((0,), (6,))


def test_bad_names_are_told() -> None:
    tokenizer = word_tokenizer(TEXTS)
    with pytest.raises(
        ValueError, match="prompt 0 of prompts has no position 'earlier' for a name; it has none of its"
    ):
        find_names(PromptSet((prompt(TEXTS[0]),)), tokenizer, ("earlier",))
    positioned = prompt(TEXTS[0], positions={"friend": "Paul"})
    with pytest.raises(ValueError, match="has no position 'earlier' for a name; its own are friend"):
        find_names(PromptSet((positioned,)), tokenizer, ("earlier",))
    with pytest.raises(ValueError, match=r"prompt 0 of prompts: the tokenizer does not know 'Zoe'"):
        find_names(PromptSet((prompt(TEXTS[0].replace("Lisa", "Zoe"), io="Zoe"),)), tokenizer)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is a slow tokenizer"):
        find_names(PromptSet((prompt(TEXTS[0]),)), Slow())  # type: ignore[arg-type]


def test_chinese_names_are_single_tokens_of_the_shipped_tokenizer() -> None:
    _, tokenizer = load_model("tiny-qwen2.5")
    text = "当小丽和小云去商店时，小丽把书给了"
    found = find_names(PromptSet((prompt(text, io="小云", s="小丽", io_token="小云"),)), tokenizer)
    assert found.tokens == (((4,), (2, 9), (2,), (9,)),) and not found.dropped
