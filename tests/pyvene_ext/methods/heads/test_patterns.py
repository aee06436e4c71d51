"""Patterns as they go by against transformers' own eager ones; what is kept; and bad input."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modelcards import n_heads, n_layers
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.prompts.tokenized import Batch
from tests.random_prompts import random_prompts
from tests.tiny_random import FAMILIES, random_model
from tests.traces import traces

LENGTHS = (9, 6, 7, 12, 6)


def patterns(model: Any, prompts: Any, **options: Any) -> dict[tuple[int, int], Tensor]:
    """By layer and prompt, without padding."""
    found = {}

    def see(layer: int, batch: Batch, pattern: Tensor) -> None:
        for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            assert (layer, prompt) not in found
            found[layer, prompt] = pattern[row, :, -length:, -length:].clone()
            assert not pattern[row, :, -length:, :-length].any()  # nothing real looks at padding

    read_patterns(model, prompts, see, progress=False, **options)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_patterns_equal_eager_ones_of_one_prompt_at_a_time(family: str, batch_size: int) -> None:
    prompts = random_prompts(LENGTHS)
    eager, model = random_model(family, attn_implementation="eager"), random_model(family)
    found, of_eager = patterns(model, prompts, batch_size=batch_size), patterns(eager, prompts, batch_size=batch_size)
    assert len(found) == len(of_eager) == len(prompts) * n_layers(model.config)
    for prompt, ids in enumerate(prompts.input_ids):
        with torch.no_grad():
            wanted = eager(torch.tensor([ids]), output_attentions=True).attentions
        for layer in range(n_layers(model.config)):
            assert wanted[layer].shape[1] == n_heads(model.config)
            for some in (found, of_eager):
                torch.testing.assert_close(some[layer, prompt], wanted[layer][0], atol=1e-5, rtol=0)


def test_one_forward_pass_a_batch_and_no_pattern_is_kept() -> None:
    model, alive, calls = random_model("llama3_1"), [], []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))

    def see(layer: int, batch: Batch, pattern: Tensor) -> None:
        assert sum(ref() is not None for ref in alive) <= 1  # the last layer's at most
        alive.append(weakref.ref(pattern))

    read_patterns(model, random_prompts(LENGTHS), see, batch_size=2, progress=False)
    assert len(calls) == 3 and len(alive) == 3 * n_layers(model.config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_also_after_an_error(attention: str) -> None:
    model = random_model("gpt2", attn_implementation=attention).train()  # with dropout
    before = traces(model)
    whole, again = (patterns(model, random_prompts(LENGTHS)) for _ in range(2))
    assert all((whole[key] == again[key]).all() for key in whole)
    assert traces(model) == before

    def see(layer: int, *_: Any) -> None:
        if layer == 1:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        read_patterns(model, random_prompts(LENGTHS), see, progress=False)
    assert traces(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prompts: "text", "must be tokenised, not a str"),
        (lambda prompts: prompts.take([]), "no prompts to look at"),
        (lambda prompts: replace(prompts, input_ids=((), *prompts.input_ids[1:])), "prompt 0 has no tokens"),
        (lambda prompts: replace(prompts, input_ids=((4,) * 65,), positions=({},)), "65 tokens but the model takes 64"),
        (lambda prompts: replace(prompts, input_ids=((4, 61),), positions=({},)), "from 4 to 61 .* embeds 61 tokens"),
    ],
)
def test_bad_prompts_are_one_sentence_before_the_model_runs(change: Any, message: str) -> None:
    def see(*_: Any) -> None:
        raise AssertionError("the model has run")

    with pytest.raises(ValueError, match=message):
        read_patterns(random_model("mistral"), change(random_prompts((5,))), see, progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        read_patterns(random_model("mistral"), random_prompts((5,)), see, batch_size=0, progress=False)
