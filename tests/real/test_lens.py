"""Logit lens and direct logit attribution on real weights, against hidden states and one head's output by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pyvene_ext as px
from pyvene_ext import PromptSet
from tests.real.conftest import Real
from tests.real.test_real_models import z_of

N = 12
DIRECT = {(23, 3): 2.1, (29, 1): 1.9, (24, 4): -1.4, (29, 0): -1.3}  # about; `known heads` of the model


def final_stream(model: Any, ids: list[int]) -> Tensor:
    """What enters the final norm at the last token."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_the_lens_is_the_unembedded_stream_and_a_heads_share_what_its_output_writes(smollm2: Real) -> None:
    model, prompts = smollm2.model, PromptSet.load("ioi_en")[:N].tokenize(smollm2.tokenizer)
    lens = px.methods.logit_lens(model, prompts)
    found = px.methods.direct_logit_attribution(model, prompts)
    norm, unembed = model.model.norm, model.lm_head.weight
    width = model.config.head_dim
    for column, (ids, (right, wrong)) in enumerate(zip(prompts.input_ids, prompts.answer_ids, strict=True)):
        out = model(torch.tensor([ids]), output_hidden_states=True)
        for depth, stream in enumerate(out.hidden_states[:-1]):  # the last one is behind the final norm
            expected = norm(stream[0, -1]) @ unembed[[right, wrong]].T
            assert torch.allclose(torch.tensor(lens.logits[depth, :, column]), expected, atol=1e-3), depth
        last = out.logits[0, -1, [right, wrong]]
        assert torch.allclose(torch.tensor(lens.logits[-1, :, column]), last, atol=1e-3)
        if column >= 3:
            continue
        # The scale of the final norm is that of the untouched run.
        scale = norm.weight / (final_stream(model, list(ids)).pow(2).mean() + norm.variance_epsilon).sqrt()
        for layer, head in DIRECT:
            z = z_of(model, layer, head, list(ids))[-1]
            output = model.model.layers[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width] @ z
            share = float((output * scale) @ (unembed[right] - unembed[wrong]))
            assert found.logit_diff.heads[layer, head, column] == pytest.approx(share, abs=1e-3)
    for (layer, head), about in DIRECT.items():
        assert found.logit_diff.heads[layer, head].mean() == pytest.approx(about, abs=0.9), (layer, head)
