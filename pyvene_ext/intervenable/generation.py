"""Interventions while tokens are generated: by position, so that they mean the same with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Generation:
    """Which columns of a tensor to intervene on while tokens are generated.

    `apply` cuts the columns of the prompt and of each new token out of whatever part of the sequence a forward pass covers, and
    lets the intervention work on each cut as if it were the whole: positions mean the same with and without a cache.

    Args:
        prompt, batch: columns and examples of the prompt.
        on_prompt, on_new_tokens: where to intervene.
        rows: given a new token's number, 0 being the first, which examples to intervene on there; by default all.
    """

    def __init__(
        self,
        prompt: int,
        batch: int,
        on_prompt: bool,
        on_new_tokens: bool,
        rows: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.prompt, self.batch = prompt, batch
        self.on_prompt, self.on_new_tokens, self.rows = on_prompt, on_new_tokens, rows
        self.total = prompt
        self._given: dict[str, Any] = {}

    def count(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each forward pass: how many columns the sequence has after it."""
        cache = kwargs.get("past_key_values")
        ids = kwargs.get("input_ids")
        ids = kwargs["inputs_embeds"] if ids is None else ids
        self.total = ids.shape[1] + (int(cache.get_seq_length()) if cache is not None else 0)

    def apply(
        self,
        intervene: Callable[[Tensor], None],
        tensor: Tensor,
        live: list[Any] | None,
        unit: str,
        activations: dict[str, Any],
        key: str,
    ) -> None:
        # A query-side tensor ends at the last column; a key-side one starts at the first (a static cache is longer still).
        first = max(self.total - tensor.shape[1], 0)
        given = self._given.setdefault(key, own_copy(live))
        beams = tensor.shape[0] // self.batch
        source = activations.get(key)
        if beams > 1 and isinstance(source, Tensor):
            activations[key] = source.repeat_interleave(beams, 0)
        by_position: Any = activations.get(key)  # of a source with rows for new tokens too, each place gets its part
        split = self.given_positions(given, unit)
        apart = self.on_new_tokens and positions_of(by_position) > 1
        if self.on_prompt and first < self.prompt:
            part = slice(0, min(self.prompt, self.total) - first)
            if apart:
                activations[key] = by_position[..., :split, :]
            self._at(intervene, tensor, part, live, _shifted(given, unit, first, part.stop), beams)
        if self.on_new_tokens:
            for column in range(max(first, self.prompt), min(self.total, first + tensor.shape[1])):
                part = slice(column - first, column - first + 1)
                new = column - self.prompt
                if apart:
                    if split + new >= by_position.shape[-2]:
                        raise ValueError(
                            f"{key} has a source for {by_position.shape[-2] - split} new tokens, and there are more; give it "
                            "longer ones, or generate fewer."
                        )
                    activations[key] = by_position[..., split + new : split + new + 1, :]
                rows = None if self.rows is None else self.rows(new).to(tensor.device)
                self._at(intervene, tensor, part, live, _only_position(given, unit, self.batch), beams, rows)
        if source is not None:
            activations[key] = source

    def given_positions(self, given: Any, unit: str) -> int:
        """How many positions of the prompt are intervened on, which is how many rows of a source belong to it."""
        if not self.on_prompt:
            return 0
        if given is None or unit == "h":
            return self.prompt
        return len((given if unit == "pos" else given[1])[0])

    @staticmethod
    def _at(
        intervene: Callable[[Tensor], None],
        tensor: Tensor,
        part: slice,
        live: list[Any] | None,
        locations: list[Any] | None,
        beams: int,
        rows: Tensor | None = None,
    ) -> None:
        if live is not None:
            if locations is None:
                return
            live[:] = _per_beam(locations, beams)
        piece = tensor[:, part].clone(memory_format=torch.contiguous_format)
        intervene(piece)
        if rows is not None:
            untouched = ~rows.repeat_interleave(beams)
            piece[untouched] = tensor[:, part][untouched]
        tensor[:, part] = piece


def _shifted(given: Any, unit: str, first: int, stop: int) -> Any:
    """Prompt locations seen from a tensor that starts at column `first`; None if it holds none of them."""
    if given is None or unit == "h":
        return given
    rows = given if unit == "pos" else given[1]
    shifted = [[column - first for column in row if first <= column < first + stop] for row in rows]
    if len({len(row) for row in shifted}) > 1:
        raise ValueError(
            "the examples have different numbers of intervened positions in this step; use one position each."
        )
    if not shifted[0]:
        return None
    return shifted if unit == "pos" else [given[0], shifted]


def _only_position(given: Any, unit: str, batch: int) -> Any:
    """The locations for a tensor that holds one new token."""
    if given is None or unit == "h":
        return given
    here = [[0]] * batch
    return here if unit == "pos" else [given[0], here]


def _per_beam(locations: list[Any], beams: int) -> list[Any]:
    """Each example's locations once a beam: [batch n] or [[batch n], [batch n]]."""
    if beams == 1:
        return locations
    if isinstance(locations[0][0], list):
        return [_per_beam(level, beams) for level in locations]
    return [row for row in locations for _ in range(beams)]


def positions_of(source: Any) -> int:
    """How many positions a source has rows for."""
    return source.shape[-2] if isinstance(source, Tensor) and source.ndim > 2 else 1


def own_copy(locations: Any) -> Any:
    """Nested lists copied at every level."""
    return [own_copy(item) for item in locations] if isinstance(locations, list) else locations
