"""Forced attention the slow, obvious way: one prompt at a time, every row of an eager pattern made by hand, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Forced(NamedTuple):
    """What is forced in one layer of one prompt; tokens are counted from the first, and `last` is in the block."""

    layer: int
    heads: Sequence[int]
    shape: str
    first: int
    last: int
    hub: int | None
    hard: bool


def forced_row(row: Tensor, query: int, forced: Forced) -> Tensor:
    """The pattern `[key]` of a query of the block, made anew. What is not visible has exactly 0 in an eager float32 pattern."""
    old = row.tolist()  # an element of a tensor takes a hundred times as long as a number
    visible = [key for key in range(forced.first, forced.last + 1) if old[key] > 0]
    new = [0.0] * len(old) if forced.hard else list(old)
    for key in visible:
        new[key] = 0.0
    mass = sum(old) if forced.hard else sum(old[key] for key in visible)
    if forced.shape == "sequential":
        new[query - 1 if query - 1 in visible else query] += mass
    elif forced.shape == "hub" and forced.hub in visible and len(visible) > 1:
        for key in visible:
            new[key] += 0.8 * mass if key == forced.hub else 0.2 * mass / (len(visible) - 1)
    else:
        for key in visible:
            new[key] += mass / len(visible)
    return torch.tensor(new, dtype=row.dtype)


def attentions(model: Any) -> list[nn.Module]:
    return [block.attn if hasattr(block, "attn") else block.self_attn for block in blocks(model)]


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def logits(model: Any, ids: Sequence[int], edits: Sequence[Forced]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits `[pos vocab]` of one prompt of an eager model, and by layer the patterns `[head query key]` that were used."""
    heads, used, handles = model.config.num_attention_heads, {}, []

    def hang(layer: int, mine: list[Forced]) -> None:
        attention: Any = attentions(model)[layer]
        gpt2, seen = hasattr(attention, "c_attn"), {}

        def keep_values(module: nn.Module, args: tuple, output: Tensor) -> None:
            v = output[0].chunk(3, -1)[2] if gpt2 else output[0]
            v = v.view(len(v), heads if gpt2 else model.config.num_key_value_heads, -1)
            seen["v"] = v.repeat_interleave(heads // v.shape[1], 1)

        def attend_again(module: nn.Module, args: tuple, output: tuple) -> tuple:
            pattern = output[1][0].clone()
            for forced in mine:
                for head in forced.heads:
                    for query in range(forced.first, forced.last + 1):
                        pattern[head, query] = forced_row(pattern[head, query], query, forced)
            used[layer] = pattern
            z = torch.einsum("hqk,khd->qhd", pattern, seen["v"]).flatten(1)
            return ((attention.c_proj if gpt2 else attention.o_proj)(z)[None], *output[1:])

        handles.append((attention.c_attn if gpt2 else attention.v_proj).register_forward_hook(keep_values))
        handles.append(attention.register_forward_hook(attend_again))

    for layer in sorted({forced.layer for forced in edits}):
        hang(layer, [forced for forced in edits if forced.layer == layer])
    try:
        return model(torch.tensor([list(ids)])).logits[0], used
    finally:
        for handle in handles:
            handle.remove()
