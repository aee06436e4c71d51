"""Interventions during generation, by position, so that they mean the same with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Generation:
    """Which columns of a tensor to intervene on during generation.

    `apply` slices the columns of the prompt and of each new token out of whatever part of the sequence a forward pass covers, and
    runs the intervention on each slice as if it were the whole sequence: positions mean the same with and without a cache.
    """

    def __init__(
        self,
        prompt: int,
        batch: int,
        on_prompt: bool,
        on_new_tokens: bool,
        rows: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Describe one call of `generate`.

        Args:
            prompt: columns of the prompt.
            batch: examples of the prompt.
            on_prompt: intervene on the prompt.
            on_new_tokens: intervene on new tokens.
            rows: given a new token's index, 0 for the first, the examples to intervene on there (`batch`, bool); default all.
        """
        self.prompt, self.batch = prompt, batch
        self.on_prompt, self.on_new_tokens, self.rows = on_prompt, on_new_tokens, rows
        self.columns = self.total = prompt
        self._prompt_locations: dict[str, Any] = {}

    def count(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before each forward pass: record how many columns the sequence will have after it."""
        cache = kwargs.get("past_key_values")
        ids = kwargs.get("input_ids")
        ids = kwargs["inputs_embeds"] if ids is None else ids
        self.columns = ids.shape[1]
        self.total = self.columns + (int(cache.get_seq_length()) if cache is not None else 0)

    def check_columns(self, tensor: Tensor, key: str) -> None:
        """Refuse an activation that does not have a row for each column of this forward pass."""
        if tensor.ndim != 3 or tensor.shape[1] != self.columns:
            raise ValueError(
                f"{key} has shape {list(tensor.shape)} in a pass over {self.columns} tokens, so that generate cannot tell its "
                "tokens apart: intervene in forward passes."
            )

    def apply(
        self,
        intervene: Callable[[Tensor], None],
        tensor: Tensor,
        live: list[Any] | None,
        unit: str,
        activations: dict[str, Any],
        key: str,
    ) -> None:
        """Run an intervention on the columns of one forward pass, in place.

        Args:
            intervene: edits a slice of the tensor in place.
            tensor: the activation, `batch*beam pos d` or with heads.
            live: the list of locations that `intervene` reads, refilled for each slice; None if it takes none.
            unit: "pos", "h" or "h.pos".
            activations: sources by key; `activations[key]` is replaced by each slice's own part and restored.
            key: the intervention.

        Raises:
            ValueError: the source has too few positions for the tokens generated.
        """
        # A query-side tensor ends at the last column; a key-side one starts at the first (a static cache is longer still).
        first = max(self.total - tensor.shape[1], 0)
        locations = self._prompt_locations.setdefault(key, copy_nested(live))
        beams = tensor.shape[0] // self.batch
        source = activations.get(key)
        if beams > 1 and isinstance(source, Tensor):
            activations[key] = source.repeat_interleave(beams, 0)
        by_position: Any = activations.get(key)
        split = self.n_prompt_positions(locations, unit)
        sliced = self.on_new_tokens and n_source_positions(by_position) > 1  # the source has rows for new tokens too
        if self.on_prompt and first < self.prompt:
            part = slice(0, min(self.prompt, self.total) - first)
            if sliced:
                activations[key] = by_position[..., :split, :]
            if first and (locations is None or unit == "h") and n_source_positions(by_position) >= self.prompt:
                activations[key] = by_position[..., first : first + part.stop, :]  # a row for each column of the prompt
            self._at(intervene, tensor, part, live, _shifted(locations, unit, first, part.stop), beams)
        if self.on_new_tokens:
            for column in range(max(first, self.prompt), min(self.total, first + tensor.shape[1])):
                part = slice(column - first, column - first + 1)
                new = column - self.prompt
                if sliced:
                    if split + new >= by_position.shape[-2]:
                        raise ValueError(
                            f"{key} has a source for {by_position.shape[-2] - split} new tokens, but there are more; give a "
                            "longer source, or generate fewer."
                        )
                    activations[key] = by_position[..., split + new : split + new + 1, :]
                rows = None if self.rows is None else self.rows(new).to(tensor.device)
                self._at(intervene, tensor, part, live, _only_position(locations, unit, self.batch), beams, rows)
        if source is not None:
            activations[key] = source

    def n_prompt_positions(self, locations: Any, unit: str) -> int:
        """How many positions of the prompt are intervened on, and so how many rows of a source belong to the prompt."""
        if not self.on_prompt:
            return 0
        if locations is None or unit == "h":
            return self.prompt
        return len((locations if unit == "pos" else locations[1])[0])

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


def _shifted(locations: Any, unit: str, first: int, stop: int) -> Any:
    """Prompt locations relative to a tensor that starts at column `first`; None if it contains none of them."""
    if locations is None or unit == "h":
        return locations
    rows = locations if unit == "pos" else locations[1]
    shifted = [[column - first for column in row if first <= column < first + stop] for row in rows]
    if len({len(row) for row in shifted}) > 1:
        raise ValueError(
            "the examples have different numbers of intervened positions in this step; use one position each."
        )
    if not shifted[0]:
        return None
    return shifted if unit == "pos" else [locations[0], shifted]


def _only_position(locations: Any, unit: str, batch: int) -> Any:
    """The locations in a tensor of one new token."""
    if locations is None or unit == "h":
        return locations
    here = [[0]] * batch
    return here if unit == "pos" else [locations[0], here]


def _per_beam(locations: list[Any], beams: int) -> list[Any]:
    """Repeat each example's locations for every beam: [batch n] or [[batch n], [batch n]]."""
    if beams == 1:
        return locations
    if isinstance(locations[0][0], list):
        return [_per_beam(level, beams) for level in locations]
    return [row for row in locations for _ in range(beams)]


def n_source_positions(source: Any) -> int:
    """How many positions a source has rows for."""
    return source.shape[-2] if isinstance(source, Tensor) and source.ndim > 2 else 1


def copy_nested(locations: Any) -> Any:
    """Copy nested lists at every level."""
    return [copy_nested(item) for item in locations] if isinstance(locations, list) else locations
