"""Real weights: what is loaded, cards, and known heads, against transformers alone and plain hooks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import pyvene_ext as px
from pyvene_ext import Ablation, PromptSet
from pyvene_ext.intervenable import verification
from tests.real.conftest import Real

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest) -> Real:
    return request.getfixturevalue(request.param)


def next_word(real: Real, text: str) -> str:
    with torch.no_grad():
        logits = real.model(**real.tokenizer(text, return_tensors="pt")).logits
    return real.tokenizer.decode(logits[0, -1].argmax())


def test_the_models_are_those_that_they_are_called(smollm2: Real, gemma3: Real) -> None:
    assert smollm2.model.config.model_type == "llama" and gemma3.model.config.model_type == "gemma3_text"
    assert [sum(p.numel() for p in real.model.parameters()) for real in (smollm2, gemma3)] == [134_515_008, 268_098_176]
    assert smollm2.tokenizer.tokenize("In 2024 there") == ["In", "Ġ", "2", "0", "2", "4", "Ġthere"]
    assert smollm2.tokenizer("In")["input_ids"][0] != smollm2.tokenizer.bos_token_id and smollm2.tokenizer.chat_template
    assert gemma3.tokenizer("In")["input_ids"][0] == gemma3.tokenizer.bos_token_id == 2
    for real in (smollm2, gemma3):
        assert next_word(real, "When Lisa and David went to the store, David gave the book to") == " Lisa"
        assert next_word(real, "Paris is the capital of France, and Rome is the capital of") == " Italy"
    french = "Paris est la capitale de la France, et Rome est la capitale de l'"
    assert next_word(gemma3, french) == "Italie"


def test_logits_are_those_of_transformers_reader_to_the_bit(real: Real) -> None:
    original = AutoModelForCausalLM.from_pretrained(real.file.parent, gguf_file=real.file.name, dtype=torch.float32)
    inputs = real.tokenizer("The quick brown fox, 小明 and Lisa", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(real.model(**inputs).logits, original.eval()(**inputs).logits)
    del original
    gc.collect()


def test_the_card_is_exact(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one layer; of Gemma without the unembedding, which has most of its weights."""
    monkeypatch.setattr(verification, "LENGTHS", (6, 5))
    monkeypatch.setattr(verification, "OPERATIONS", {name: verification.OPERATIONS[name] for name in ("read", "swap")})
    smol = real.model.config.model_type == "llama"
    part, layer, attention, side = (
        (real.model, 17, "sdpa", "left") if smol else (real.model.base_model, 11, "eager", "right")
    )
    report = px.verify_card(part, layers=[layer], implementations=[attention], padding_sides=[side])
    assert not report.failures, report.table()
    assert report.checks == report.planned == (80 if smol else 78)


# -- known heads -------------------------------------------------------------------------------------------------------

Edit = Callable[[Tensor], Tensor]  # z of one head, [pos d_head], of one prompt


def with_hook(model: Any, layer: int, head: int, edit: Edit, ids: list[int]) -> Tensor:
    """Logits at the last token of one prompt, with an edit of what one head sends to the output projection."""
    projection = model.model.layers[layer].self_attn.o_proj
    width = model.config.head_dim

    def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[0, :, head * width : (head + 1) * width] = edit(z[0, :, head * width : (head + 1) * width])
        return (z,)

    with ExitStack() as stack, torch.no_grad():
        stack.callback(projection.register_forward_pre_hook(hook).remove)
        return model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]


def z_of(model: Any, layer: int, head: int, ids: list[int]) -> Tensor:
    seen: list[Tensor] = []
    with_hook(model, layer, head, lambda z: seen.append(z.clone()) or z, ids)  # type: ignore[func-returns-value]
    return seen[0]


def check_heads(
    real: Real,
    prompts: Any,
    heads: dict[tuple[int, int], float],
    spec: Callable[..., Ablation],
    edit_of: Callable[[int, int], Edit],
) -> None:
    """Compare the sweep with hooks, prompt by prompt, and both with the published effects.

    Args:
        heads: about how much each lowers the logit difference.
        spec: the ablation of a layer and heads.
        edit_of: the same edit, for a hook.
    """
    result = px.sweep(real.model, [spec(layer=layer, heads=(head,)) for layer, head in heads], prompts, progress=False)
    for column, (ids, (right, wrong)) in enumerate(zip(prompts.input_ids, prompts.answer_ids, strict=True)):
        clean = with_hook(real.model, 0, 0, lambda z: z, list(ids))
        assert result.baseline[column] == pytest.approx(float(clean[right] - clean[wrong]), abs=1e-4)
        for row, (layer, head) in enumerate(heads):
            edited = with_hook(real.model, layer, head, edit_of(layer, head), list(ids))
            assert result.intervened[row, column] == pytest.approx(float(edited[right] - edited[wrong]), abs=1e-4)
    np.testing.assert_allclose(result.mean_delta, list(heads.values()), atol=0.6)


def test_heads_of_english_ioi_are_those_that_hooks_find(smollm2: Real) -> None:
    prompts = PromptSet.load("ioi_en").tokenize(smollm2.tokenizer).take(range(4))
    heads = {(23, 3): 2.15, (20, 0): 2.0, (12, 5): 0.0}
    check_heads(smollm2, prompts, heads, partial(Ablation, kind="zero", site="z"), lambda *_: torch.zeros_like)


def test_heads_of_chinese_ioi_are_those_that_hooks_find(gemma3: Real) -> None:
    """Names of several tokens, told apart by the first that differs; heads replaced by their mean at the last token."""
    texts = PromptSet.load("ioi_zh")
    prompts = texts.tokenize(gemma3.tokenizer, answers="first_difference").take(range(4))
    plain = [gemma3.tokenizer(prompt.text)["input_ids"] for prompt in texts.prompts[:4]]
    assert any(len(ids) < len(longer) for ids, longer in zip(plain, prompts.input_ids, strict=True))

    @cache
    def mean_at_the_end(layer: int, head: int) -> Edit:
        mean = torch.cat([z_of(gemma3.model, layer, head, list(ids)) for ids in prompts.input_ids]).mean(0)
        return lambda z: torch.cat([z[:-1], mean[None]])

    spec = partial(Ablation, kind="mean", positions="last", site="z")
    check_heads(gemma3, prompts, {(11, 3): 4.7, (5, 3): 4.3, (2, 0): 0.0}, spec, mean_at_the_end)
