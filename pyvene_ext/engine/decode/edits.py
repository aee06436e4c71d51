"""Edits of the tokens that rows write: every row has its own, and one hook a place makes those of all rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import COMPONENTS, FIELD_NAMES, Taps, card_of
from pyvene_ext.engine.decode.past import RowPast
from pyvene_ext.models.hooks import hook_component, split_heads
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
            wanted = which[rows]
            rows = rows[wanted]
            heads = None if heads is None else heads[wanted]
            values = None if values is None else values[wanted]
        if not len(rows):
            return
        if values is not None:
            values = values[:, 0] if values.shape[1] == 1 else values[torch.arange(len(rows)), written[rows]]
            values = values.to(x.device)
        index = (rows,) if heads is None else (rows, heads)
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
        device = model.device
        self._at = {
            where: [batch.ready(device) for _, batch in sorted(batches.items(), key=lambda item: item[0])]
            for where, batches in found.items()
        }

    @contextmanager
    def hooked(self, past: RowPast, which: Tensor | None) -> Iterator[None]:
        """Inside the block, edit the tokens that the rows of `past` take.

        Args:
            past: the rows.
            which: the rows that are edited, ` row` bool; None: all.
        """
        card = card_of(self.model)
        at = {where: entries for where, entries in self._at.items() if where[0] != "attention_scores"}
        past.edit_scores = {}
        for (component, layer), entries in self._at.items():
            if component == "attention_scores":
                past.edit_scores[layer] = partial(_make, entries, which=which, past=past)
        with ExitStack() as stack:
            stack.enter_context(Taps(self.model, card, list(at)))
            for where, entries in at.items():
                # A tap notices an edit by its returning another tensor; but the stream itself goes on beside the tap at its norm.
                copied = card.is_tap(self.model, where[0]) and where[0] != "resid_mid"

                def edited(
                    x: Tensor, component: str = where[0], entries: list = entries, copied: bool = copied
                ) -> Tensor | None:
                    x = x.clone() if copied else x
                    seen = split_heads(x, component, self.model)  # views: `row head 1 d` or `row 1 d`
                    _make(entries, seen.squeeze(-2), which=which, past=past)
                    return x if copied else None

                hook_component(self.model, where, edited, stack)
            yield


def _make(entries: Sequence[_Entries], x: Tensor, *, which: Tensor | None, past: RowPast) -> None:
    for some in entries:
        some.edit(x, which, past.written)
