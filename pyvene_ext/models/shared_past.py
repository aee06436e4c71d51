"""Attention of many rows over the same earlier keys, which are stored once and not copied for every row.

Rows continue a few prompts, and all rows of a prompt share its earlier columns. Inside `with shared_past(attention, keys, values,
alternating)` that module's attention runs through `shared_past_attention`, registered once with transformers' AttentionInterface,
which prepends those keys and values to each row's own.
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
NARROW = 8  # a matrix product with fewer columns than this is several times faster when computed transposed


@contextmanager
def shared_past(attention: nn.Module, keys: Tensor, values: Tensor, alternating: bool) -> Iterator[None]:
    """Inside the block, let the rows of a call attend to the earlier keys of P prompts.

    Args:
        attention: the attention module; restored after the block.
        keys: `prompt n_kv_head earlier d_head`, rotated, of the columns before the call's.
        values: `prompt n_kv_head earlier d_head`.
        alternating: rows 0, P, 2P ... continue the first prompt, rows 1, P+1 ... the second, and so on; else the rows of a prompt
            are adjacent, first all those of the first prompt.
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
    """Compute attention as transformers does in eval mode, over the shared keys and then each row's own.

    Args:
        module: the attention module; `module.config.shared_past` holds the arguments of `shared_past`.
        query: `row n_head n_query d_head`, rotated.
        key: `row n_kv_head own d_head`, rotated.
        value: `row n_kv_head own d_head`.
        attention_mask: over all keys, `1 1 n_query earlier+own`, as built for one prompt: None (plain causal), bool or float.
        scaling: factor of the scores; default 1 / sqrt(d_head).
        dropout: ignored, as in eval mode.
        softcap: cap of the scores (Gemma 2); None for no cap.
        is_causal: as in transformers; default the module's.

    Returns:
        `row n_query n_head d_head`, and None for the pattern.
    """
    config: Any = module.config
    *past, alternating = config.shared_past
    past_keys, past_values = (some.to(query.device) for some in past)
    prompts, groups, earlier, width = past_keys.shape
    rows, heads, n_query = query.shape[:3]
    own, each = key.shape[2], heads // groups  # own keys of a row; query heads that share a K/V head
    copies = rows // prompts  # rows of a prompt

    def by_prompt(x: Tensor) -> Tensor:  # row*group each*query w -> prompt*group copy*each*query w
        if alternating:
            x = x.view(copies, prompts, groups, each * n_query, x.shape[-1]).permute(1, 2, 0, 3, 4)
        else:
            x = x.view(prompts, copies, groups, each * n_query, x.shape[-1]).transpose(1, 2)
        return x.reshape(prompts * groups, copies * each * n_query, x.shape[-1])

    def by_row(x: Tensor) -> Tensor:
        x = x.view(prompts, groups, copies, each * n_query, x.shape[-1])
        x = x.permute(2, 0, 1, 3, 4) if alternating else x.transpose(1, 2)
        return x.reshape(rows * groups, each * n_query, x.shape[-1])

    scaling = width**-0.5 if scaling is None else scaling
    key, past_keys = key * scaling, past_keys * scaling  # keys are fewer than queries
    query = query.reshape(rows * groups, each * n_query, width)
    key, value = key.reshape(rows * groups, own, width), value.reshape(rows * groups, own, width)
    past_keys, past_values = (x.reshape(prompts * groups, earlier, width) for x in (past_keys, past_values))
    to_own = by_prompt(query @ key.transpose(1, 2))
    if own == 1:  # leave a column for its score in the product with the shared keys, which saves a copy
        past_keys, past_values = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (past_keys, past_values))
        scores = by_prompt(query) @ past_keys.transpose(1, 2)
        scores[..., -1:] = to_own
    else:
        scores = torch.cat([by_prompt(query) @ past_keys.transpose(1, 2), to_own], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None or n_query > 1:
        by_query = scores.view(-1, copies * each, n_query, earlier + own)
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
