"""Attention of many rows over the same earlier keys, which are held once and not copied for every row.

Rows are continuations of a few prompts: what stands before them is the same for all rows of a prompt. While a
`with shared_past(attention, keys, values)` lasts, that module's attention runs through `shared_past_attention`, registered once
with transformers' AttentionInterface, which puts those keys and values in front of each row's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from modelcards.attention_taps import redirect, visible_keys

IMPLEMENTATION = "pyvene_shared_past"
NARROW = 8  # a product whose result has fewer columns is several times faster on its side


@contextmanager
def shared_past(attention: nn.Module, keys: Tensor, values: Tensor, alternating: bool) -> Iterator[None]:
    """Let the rows of a call continue P prompts: rows 0, P, 2P ... the first, rows 1, P+1 ... the second, and so on.

    Args:
        attention: the attention module; as it was afterwards.
        keys, values: `prompt n_kv_head earlier d_head`, rotated, of the columns in front of the call's.
        alternating: as above; else the rows of a prompt stand together, first all those of the first prompt.
    """
    own = redirect(attention, IMPLEMENTATION)
    attention.config.shared_past = keys, values, alternating  # type: ignore[union-attr]
    try:
        yield
    finally:
        attention.config = own


def shared_past_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers computes it, in eval mode, over the shared keys and then each row's own.

    Args:
        query: `row n_head n_query d_head`, rotated.
        key, value: `row n_kv_head own d_head`, rotated.
        attention_mask: over all keys, `1 1 n_query earlier+own`, as made for one prompt: None (plain causal), bool or float.

    Returns `row n_query n_head d_head`.
    """
    config: Any = module.config
    *past, alternating = config.shared_past
    past_keys, past_values = (some.to(query.device) for some in past)
    prompts, groups, earlier, width = past_keys.shape
    rows, heads, n_query = query.shape[:3]
    own, each = key.shape[2], heads // groups  # own keys of a row; query heads that share a K/V head
    times = rows // prompts

    def by_prompt(x: Tensor) -> Tensor:  # row*group each*query w -> prompt*group time*each*query w
        if alternating:
            x = x.view(times, prompts, groups, each * n_query, x.shape[-1]).permute(1, 2, 0, 3, 4)
        else:
            x = x.view(prompts, times, groups, each * n_query, x.shape[-1]).transpose(1, 2)
        return x.reshape(prompts * groups, times * each * n_query, x.shape[-1])

    def by_row(x: Tensor) -> Tensor:
        x = x.view(prompts, groups, times, each * n_query, x.shape[-1])
        x = x.permute(2, 0, 1, 3, 4) if alternating else x.transpose(1, 2)
        return x.reshape(rows * groups, each * n_query, x.shape[-1])

    scaling = width**-0.5 if scaling is None else scaling
    key, past_keys = key * scaling, past_keys * scaling  # of which there are fewer than of queries
    query = query.reshape(rows * groups, each * n_query, width)
    key, value = key.reshape(rows * groups, own, width), value.reshape(rows * groups, own, width)
    past_keys, past_values = (x.reshape(prompts * groups, earlier, width) for x in (past_keys, past_values))
    to_own = by_prompt(query @ key.transpose(1, 2))
    if own == 1:  # room for its score in what the product with the shared keys gives, instead of a copy behind that
        past_keys, past_values = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (past_keys, past_values))
        scores = by_prompt(query) @ past_keys.transpose(1, 2)
        scores[..., -1:] = to_own
    else:
        scores = torch.cat([by_prompt(query) @ past_keys.transpose(1, 2), to_own], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None or n_query > 1:
        by_query = scores.view(-1, times * each, n_query, earlier + own)
        visible, bias = visible_keys(module, by_query, attention_mask, is_causal)
        by_query = by_query if bias is None else by_query + bias
        scores = by_query.masked_fill(~visible, -torch.inf).view_as(scores)
    pattern = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    to_past = pattern[..., : past_values.shape[1]]
    if width < NARROW:
        from_past = (past_values.transpose(1, 2) @ to_past.transpose(1, 2)).transpose(1, 2)
    else:
        from_past = to_past @ past_values
    from_past, to_own = by_row(from_past), by_row(pattern[..., earlier:])
    output = torch.addcmul(from_past, to_own, value) if own == 1 else torch.baddbmm(from_past, to_own, value)
    return output.reshape(rows, heads, n_query, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, shared_past_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
