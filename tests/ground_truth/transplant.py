"""Head transplants the slow, obvious way: one prompt at a time, attention written out, no cards, taps, padding or cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyvene_ext.io.seeds import rng


class Move(NamedTuple):
    """A transplant in plain words; `a` and `b` are x -> x A + offset and c -> c B."""

    head: tuple[int, int]
    donor: Any
    donor_head: tuple[int, int]
    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def normed(model: Any, block: Any, x: Tensor) -> Tensor:
    """The norm before attention."""
    if hasattr(model, "transformer"):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + block.ln_1.eps).sqrt()
        return scaled * block.ln_1.weight + block.ln_1.bias
    gain = block.input_layernorm.weight + (1 if model.config.model_type == "gemma2" else 0)
    return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * gain


def rotated(model: Any, x: Tensor) -> Tensor:
    """Rotary embedding of `pos d_head`, positions counted from 0; nothing in GPT-2."""
    if hasattr(model, "transformer"):
        return x
    angles = torch.arange(len(x))[:, None] * model.model.rotary_emb.inv_freq
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def contribution(model: Any, head: tuple[int, int], x: Tensor) -> Tensor:
    """What a head adds to the residual stream if that is `x` [pos d_model] before its block: [pos d_model]."""
    layer, wanted = head
    config, block = model.config, blocks_of(model)[layer]
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    y = normed(model, block, x)
    if hasattr(model, "transformer"):
        q, k, v = (y @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)
        output = block.attn.c_proj.weight  # [heads*d_head, d_model]
    else:
        attention = block.self_attn
        q, k, v = (
            y @ p.weight.T + (0 if p.bias is None else p.bias)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        output = attention.o_proj.weight.T
    width = q.shape[-1] // heads
    scale = getattr(config, "query_pre_attn_scalar", width) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    types = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) if types is None or types[layer] == "sliding_attention" else None
    parts = {}
    for at in range(heads) if config.model_type == "gemma2" else [wanted]:
        kv = at // (heads // kv_heads)
        mine = rotated(model, q[:, at * width : (at + 1) * width])
        keys = rotated(model, k[:, kv * width : (kv + 1) * width])
        values = v[:, kv * width : (kv + 1) * width]
        rows = []
        for i in range(len(x)):
            first = max(0, i - sliding + 1) if sliding else 0
            scores = scale * keys[first : i + 1] @ mine[i]
            if cap:
                scores = cap * torch.tanh(scores / cap)
            weights = (scores - scores.max()).exp()
            rows.append(weights / weights.sum() @ values[first : i + 1])
        parts[at] = torch.stack(rows) @ output[at * width : (at + 1) * width]
    found = parts[wanted]
    if config.model_type == "gemma2":
        total = torch.stack(list(parts.values())).sum(0)
        rms = (total.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        found = found / rms * (1 + block.post_attention_layernorm.weight)
    return found


@torch.no_grad()
def logits(host: Any, ids: Sequence[int], moves: Sequence[Move], upto: int | None = None) -> Tensor:
    """Logits [pos vocab] of one prompt with heads transplanted at its first `upto` tokens."""
    handles = []
    before: dict[int, Tensor] = {}
    upto = len(ids) if upto is None else upto

    def hang(layer: int) -> None:
        block = blocks_of(host)[layer]
        gpt2, gemma2 = hasattr(host, "transformer"), host.config.model_type == "gemma2"

        def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
            before[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        def put(_: nn.Module, args: tuple, output: Any) -> Any:
            total = (output if gemma2 else output[0]).clone()
            x = before[layer]
            for move in moves:
                if move.head[0] == layer:
                    new = move.b(contribution(move.donor, move.donor_head, move.a(x)))
                    total[0, :upto] += (new - contribution(host, move.head, x))[:upto]
            return total if gemma2 else (total, *output[1:])

        adds = block.post_attention_layernorm if gemma2 else block.attn if gpt2 else block.self_attn
        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        handles.append(adds.register_forward_hook(put))

    for layer in {move.head[0] for move in moves}:
        hang(layer)
    try:
        return host(torch.tensor([list(ids)])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def streams(model: Any, ids: Sequence[int], layer: int) -> tuple[Tensor, Tensor]:
    """The residual stream of one prompt before a layer and behind its attention, [pos d_model]."""
    block = blocks_of(model)[layer]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook

    names = ("ln_2", "pre_feedforward_layernorm", "post_attention_layernorm")  # Gemma 2 has the last two
    behind = next(getattr(block, name) for name in names if hasattr(block, name))
    handles = [
        part.register_forward_pre_hook(keep(name), with_kwargs=True) for part, name in ((block, "x"), (behind, "y"))
    ]
    with torch.no_grad():
        model(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return seen["x"].double(), seen["y"].double()


def split(
    rows: Sequence[Sequence[int]], n_test: int, seed: int = 0
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(prompt, token) for training and for the test: every context once, training first."""
    order = rng(seed, "maps").permutation(len(rows)).tolist()
    seen: set[tuple[int, ...]] = set()
    found: list[list[tuple[int, int]]] = []
    for some in (order[n_test:], order[:n_test]):
        mine = []
        for prompt in some:
            for at in range(len(rows[prompt])):
                context = tuple(rows[prompt][: at + 1])
                if context not in seen:
                    mine.append((prompt, at))
                seen.add(context)
        found.append(mine)
    return found[0], found[1]
