"""Edits of the tokens that rows write: every row has its own, and one hook a place makes those of all rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pyvene.models.constants import CONST_INPUT_HOOK
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Taps, card_of, dimensions
from modelcards.template import at_layer
from pyvene_ext.engine.decode.past import RowPast
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import HookFn, on_input, on_output
from pyvene_ext.specs.joint import OneSpec


class TokenEdit(NamedTuple):
    """One edit of every token that a row writes.

    Attributes:
        spec: the edit; its heads apply, its positions do not.
        values: what replaces the activation at each token, `*head new d`, or `*head 1 d` if it is the same at all of them; None
            if the edit takes no source.
    """

    spec: OneSpec
    values: Float[Tensor, "*head new d"] | None


@dataclass
class _Batch:
    """Edits of one kind at one place, flattened to entries."""

    spec: OneSpec
    rows: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # `new d` each

    def ready(self, device: torch.device) -> _Entries:
        rows, heads = (torch.tensor(numbers, device=device) for numbers in (self.rows, self.heads))
        return _Entries(
            self.spec, rows, heads if len(heads) else None, torch.stack(self.values) if self.values else None
        )


class _Entries(NamedTuple):
    spec: OneSpec
    rows: Int[Tensor, " entry"]
    heads: Int[Tensor, " entry"] | None
    values: Float[Tensor, "entry new d"] | None

    def edit(self, x: Tensor, which: Tensor | None, written: Int[Tensor, " row"]) -> None:
        """Edit `row *head d` in place: all entries, or those of the rows that are true in `which`."""
        _, rows, heads, values = self
        if which is not None:
            wanted = which.to(rows.device)[rows]
            rows = rows[wanted]
            heads = None if heads is None else heads[wanted]
            values = None if values is None else values[wanted]
        if not len(rows):
            return
        if values is not None:
            steps = written.to(rows.device)[rows]
            values = (
                values[:, 0] if values.shape[1] == 1 else values[torch.arange(len(rows), device=rows.device), steps]
            )
            values = values.to(x.device)
        index = tuple(part.to(x.device) for part in (rows, heads) if part is not None)
        x[index] = self.spec.apply(x[index], values)


class RowEdits:
    """The edits of rows that write, ready for hooks.

    Args:
        model: the model.
        rows: the edits of each row, in the order in which they are made.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[TokenEdit]]) -> None:
        self.model = model
        found: dict[tuple[str, int], dict[tuple[int, str, int], _Batch]] = defaultdict(dict)
        for row, edits in enumerate(rows):
            earlier: dict[tuple[str, int], int] = defaultdict(int)  # edits of this row at the same place
            for spec, values in edits:
                where = COMPONENTS[FIELD_NAMES[spec.acts_at]].name, spec.layer or 0
                heads = spec.heads or ()
                key = earlier[where], spec.intervention.__name__, 0 if values is None else values.shape[-2]
                batch = found[where].setdefault(key, _Batch(spec))
                batch.rows += [row] * max(1, len(heads))
                batch.heads += heads
                if values is not None:
                    batch.values += list(values) if heads else [values]
                earlier[where] += 1
        device, card = input_device(model), card_of(model)
        mapping, sizes = card.mapping(type(model)), dimensions(model.config)
        self._scores: dict[int, list[_Entries]] = {}
        self._hooks: list[tuple[Any, str, HookFn]] = []
        self._past: RowPast | None = None
        self._which: Tensor | None = None
        places = []
        for (component, layer), batches in found.items():
            entries = [batch.ready(device) for _, batch in sorted(batches.items(), key=lambda item: item[0])]
            if component == "attention_scores":
                self._scores[layer] = entries
                continue
            places.append((component, layer))
            # A tap notices an edit by its returning another tensor; but the stream itself goes on beside the tap at its norm.
            copied = card.is_tap(model, component) and component != "resid_mid"
            on = on_input if mapping[component][1] == CONST_INPUT_HOOK else on_output
            splits = [(split, sizes.get(part, part)) for split, part in mapping[component][2:]]
            edit = partial(self._edited, splits, entries, copied)
            self._hooks.append((on, at_layer(mapping[component][0], layer), edit))
        self._taps = Taps(model, card, places)

    @contextmanager
    def hooked(self, past: RowPast, which: Tensor | None) -> Iterator[None]:
        """Inside the block, edit the tokens that the rows of `past` take.

        Args:
            past: the rows.
            which: the rows that are edited, ` row` bool; None: all.
        """
        self._past, self._which = past, which
        past.edit_scores = {layer: partial(self._make, entries) for layer, entries in self._scores.items()}
        with ExitStack() as stack:
            stack.enter_context(self._taps)
            for on, path, edit in self._hooks:
                stack.enter_context(on(self.model.get_submodule(path), edit))
            yield

    def _edited(self, splits: list[Any], entries: list[_Entries], copied: bool, x: Tensor) -> Tensor | None:
        seen = x = x.clone() if copied else x
        for split, part in splits:
            seen = split(seen, part)  # views: `row head 1 d`, or without heads `row 1 d`
        self._make(entries, seen.squeeze(-2))
        return x if copied else None

    def _make(self, entries: list[_Entries], x: Tensor) -> None:
        assert self._past is not None
        for some in entries:
            some.edit(x, self._which, self._past.written)
