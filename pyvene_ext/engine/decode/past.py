"""The cache of keys and values during decoding: each prompt's, stored once for all its rows, and each row's own.

A row is one prompt under one intervention. Inside `with row_attention(past)` every attention module of the model runs
through `attend`, registered once with transformers' AttentionInterface, and the model takes one new token of every row at a time:

    past = RowPast(model, new=40)
    past.enter([keys_values], lengths, prompt_of)     # prompts that the model has read, and the rows that continue them
    with row_attention(past):
        model(ids, position_ids=past.positions[:, None], attention_mask=past.no_mask, past_key_values=past)
    past.keep(rows)                                   # drops the others
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from modelcards import card_of, n_layers, window
from modelcards.attention_taps import redirect

IMPLEMENTATION = "pyvene_rows"
KeysValues = tuple[Float[Tensor, "prompt n_kv_head pos d_head"], Float[Tensor, "prompt n_kv_head pos d_head"]]
# In place. Keys that a row does not see have the score -inf, and 0 in a pattern.
EditAttention = Callable[[Float[Tensor, "row n_head key"]], None]


class RowPast:
    """The cache of rows being decoded, in the form that transformers models take.

    Args:
        model: the model.
        new: most tokens that a row writes.
    """

    def __init__(self, model: PreTrainedModel, new: int) -> None:
        self.new, self.layers = new, n_layers(model.config)
        self.windows = [window(model.config, layer) for layer in range(self.layers)]
        self.prompts: list[KeysValues] = []  # by layer; a prompt's tokens stand in its first columns
        self.own: list[KeysValues] = []
        self.device = torch.device("cpu")
        self.lengths = self.prompt_of = self.written = torch.zeros(0, dtype=torch.long)
        self.copies = 0  # the most rows of a prompt
        self.edit_scores: dict[int, EditAttention] = {}
        self.edit_pattern: dict[int, EditAttention] = {}
        card = card_of(model)
        self.attentions: list[Any] = [card.module(model, "attention_input", layer) for layer in range(self.layers)]

    def __len__(self) -> int:
        return len(self.prompt_of)

    @property
    def width(self) -> int:
        """Columns of the prompts' keys."""
        return self.prompts[0][0].shape[2] if self.prompts else 0

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """The position of each row's next token in its text."""
        return self.lengths[self.prompt_of] + self.written

    @property
    def no_mask(self) -> Tensor:
        """What keeps a model from making a mask of its own: `attend` knows what a row sees."""
        return torch.zeros(1, 1, 1, 1, device=self.device)

    @property
    def padding(self) -> Int[Tensor, " row"]:
        """How many columns come between the keys of each row's prompt and those of its own tokens."""
        return self.width - self.lengths[self.prompt_of]

    def enter(self, reads: Sequence[list[KeysValues]], lengths: Sequence[int], prompt_of: Sequence[int]) -> None:
        """Add rows.

        One layer after the other is copied, and taken out of `reads`, so that little is held twice.

        Args:
            reads: keys and values of new prompts, by layer; the tokens of each prompt stand in its first columns.
            lengths: tokens of each of these prompts.
            prompt_of: the prompt of each new row, as an index into these.
        """
        self.device = reads[0][0][0].device
        held = len(self.lengths)
        added = [torch.tensor(some, dtype=torch.long, device=self.device) for some in (lengths, prompt_of)]
        for layer in range(self.layers):
            parts = [read[layer] for read in reads]
            blank: Any = tuple(_blank(x, len(prompt_of), self.new) for x in parts[0])
            for read in reads:
                read[layer] = None  # type: ignore[call-overload]
            if held:
                self.prompts[layer] = _joined([self.prompts[layer], *parts])
                self.own[layer] = _joined([self.own[layer], blank])
            else:
                self.prompts.append(_joined(parts))
                self.own.append(blank)
            del parts
        self.lengths = torch.cat([self.lengths.to(self.device), added[0]])
        self.prompt_of = torch.cat([self.prompt_of.to(self.device), added[1] + held])
        self.written = torch.cat([self.written.to(self.device), torch.zeros_like(added[1])])
        self._arrange()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some rows, and the prompts that these continue.

        Args:
            rows: their indices, in order.
        """
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        used, self.prompt_of = self.prompt_of[index].unique(return_inverse=True)
        self.written = self.written[index]
        fewer = len(used) < len(self.lengths)
        self.lengths = self.lengths[used]
        longest = int(self.lengths.max()) if len(used) else 0
        for layer in range(len(self.own)):  # one after the other, so that little is held twice
            self.own[layer] = _taken(self.own[layer], index)
            if fewer:
                self.prompts[layer] = _taken(self.prompts[layer], used, longest)
        self._arrange()

    def step(self) -> None:
        """Prepare one token of every row: what each sees, and where its key and value go."""
        self._visible.clear()
        self._columns = int(self.written.max()) + 1

    def stepped(self) -> None:
        """Count the token that every row has taken; rows that have ended may stay, and write over their last."""
        self.written = (self.written + 1).clamp(max=self.new - 1)

    # -- what a transformers model asks of its cache -----------------------------------------------------------------------

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new key and value of every row; returns the rows' own keys and values so far."""
        own = self.own[layer_idx]
        rows = torch.arange(len(self), device=keys.device)
        at = self.written.to(keys.device)
        for held, new in zip(own, (keys, values), strict=True):
            held[rows, :, at] = new[:, :, 0]
        return own[0][:, :, : self._columns], own[1][:, :, : self._columns]

    def get_seq_length(self, *_: Any) -> int:
        """The largest number of tokens that any row has run so far."""
        return int(self.positions.max())

    # -- attention ---------------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Number the places of a table `prompt copy`, in which every prompt has room for as many rows as the one with most."""
        counts = torch.bincount(self.prompt_of, minlength=len(self.lengths))
        self.copies = int(counts.max()) if len(self) else 0
        order = torch.argsort(self.prompt_of, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(self), device=self.device) - (counts.cumsum(0) - counts)[self.prompt_of[order]]
        self.places = self.prompt_of * self.copies + rank
        full = len(self) == len(self.lengths) * self.copies
        self.in_order = full and bool((self.places == torch.arange(len(self), device=self.device)).all())
        self._visible: dict[int | None, Bool[Tensor, "row key"]] = {}
        self._columns = 0

    def by_prompt(self, x: Float[Tensor, "row n_kv_head each d"]) -> Float[Tensor, "prompt n_kv_head copy_each d"]:
        """Arrange rows by their prompts, with zeros where a prompt has fewer rows than another."""
        if not self.in_order:
            table = x.new_zeros(len(self.lengths) * self.copies, *x.shape[1:])
            table[self.places.to(x.device)] = x
            x = table
        x = x.unflatten(0, (-1, self.copies)).transpose(1, 2)
        return x.flatten(2, 3)

    def by_row(self, x: Float[Tensor, "prompt n_kv_head copy_each d"]) -> Float[Tensor, "row n_kv_head each d"]:
        """Undo `by_prompt`."""
        x = x.unflatten(2, (self.copies, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.in_order else x[self.places.to(x.device)]

    def visible(self, layer: int, device: torch.device) -> Bool[Tensor, "row key"]:
        """Which keys each row sees in a layer: those of its prompt, then its own."""
        reach = self.windows[layer]
        if reach not in self._visible:
            columns = torch.arange(self.width, device=self.device)
            own = torch.arange(self._columns, device=self.device)
            lengths, here = self.lengths[self.prompt_of, None], self.positions[:, None]
            prompt = columns < lengths
            written = own <= self.written[:, None]
            if reach is not None:
                prompt &= columns > here - reach
                written &= lengths + own > here - reach
            self._visible[reach] = torch.cat([prompt, written], 1)
        return self._visible[reach].to(device)


def _blank(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_zeros(rows, x.shape[1], columns, x.shape[3])


def _joined(parts: Sequence[KeysValues]) -> KeysValues:
    """Concatenate along the first axis, padded to the same number of columns."""
    if len(parts) == 1:
        return parts[0]
    rows, most = sum(len(keys) for keys, _ in parts), max(keys.shape[2] for keys, _ in parts)
    found = []
    for which, x in enumerate(parts[0]):
        joined, row = x.new_zeros(rows, x.shape[1], most, x.shape[3]), 0
        for part in parts:
            some = part[which]
            joined[row : row + len(some), :, : some.shape[2]] = some
            row += len(some)
        found.append(joined)
    return found[0], found[1]


def _taken(pair: KeysValues, index: Tensor, columns: int | None = None) -> KeysValues:
    keys, values = (x[index.to(x.device), :, :columns] for x in pair)
    return keys, values


@contextmanager
def row_attention(past: RowPast) -> Iterator[None]:
    """Inside the block, let the model's attention run over the rows of `past`.

    Args:
        past: the cache of a model whose `attention_can_be_seen`.
    """
    with ExitStack() as stack:
        for layer, attention in enumerate(past.attentions):
            own = redirect(attention, IMPLEMENTATION)
            stack.callback(setattr, attention, "config", own)
            attention.config.row_past = past, layer
        yield


def attend(
    module: Any,
    query: Float[Tensor, "row n_head 1 d_head"],
    key: Float[Tensor, "row n_kv_head own d_head"],
    value: Float[Tensor, "row n_kv_head own d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "row 1 n_head d_head"], None]:
    """Compute attention as transformers does in eval mode: of each row's new token to its prompt and to what the row has written.

    Args:
        module: the attention module; `module.config.row_past` holds the cache and the layer.
        query: of the new token, rotated.
        key: what `RowPast.update` returned.
        value: likewise.
        attention_mask: ignored.
        scaling: factor of the scores; default 1 / sqrt(d_head).
        dropout: ignored, as in eval mode.
        softcap: cap of the scores (Gemma 2); None for no cap.

    Returns:
        The mixed values, and None for the pattern.
    """
    past, layer = module.config.row_past
    keys, values = (x.to(query.device) for x in past.prompts[layer])
    rows, heads, _one, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    # In float32, as in transformers' sdpa; half precision would round scores that differ little to the same number.
    query = query.float().reshape(rows, key.shape[1], -1, width) * scaling
    to_prompt = past.by_row(past.by_prompt(query) @ keys.float().transpose(2, 3))
    scores = torch.cat([to_prompt, query @ key.float().transpose(2, 3)], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = past.visible(layer, query.device)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if layer in past.edit_scores:
        past.edit_scores[layer](scores.view(rows, heads, -1))
    pattern = torch.softmax(scores, -1).to(value.dtype)
    if layer in past.edit_pattern:
        past.edit_pattern[layer](pattern.view(rows, heads, -1))
        pattern = pattern.masked_fill(~visible[:, None, None], 0.0)
    to_prompt, to_own = pattern.split([keys.shape[2], key.shape[2]], -1)
    mixed = past.by_row(past.by_prompt(to_prompt) @ values) + to_own @ value
    return mixed.reshape(rows, 1, heads, width), None


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
