"""Edits of generated tokens: every row has its own, and one hook per site and layer makes those of all rows."""

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
from pyvene_ext.models.hooks import on_input, on_output
from pyvene_ext.specs.joint import OneSpec


class TokenEdit(NamedTuple):
    """One edit of every token that a row writes.

    Attributes:
        spec: the edit; its heads apply, its positions do not.
        values: what replaces the activation at each token, `*head new d`, with 1 in the place of an axis along which it is the
            same; None if the edit takes no source. Keys among them are counted from the prompt's first token.
    """

    spec: OneSpec
    values: Float[Tensor, "*head new d"] | None


@dataclass
class _EntryLists:
    """Edits of one kind at one place, flattened to entries."""

    spec: OneSpec
    rows: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # `new d` each
    value_of: list[int] = field(default_factory=list)  # which of these is an entry's

    def add(self, row: int, heads: Sequence[int], values: Tensor | None) -> None:
        each = max(1, len(heads))
        self.rows += [row] * each
        self.heads += heads
        if values is not None:
            own = list(values) if heads else [values]
            self.value_of += [len(self.values) + (which if len(own) > 1 else 0) for which in range(each)]
            self.values += own

    def ready(self, device: torch.device) -> _Entries:
        rows, heads, value_of = (torch.tensor(some, device=device) for some in (self.rows, self.heads, self.value_of))
        values = (torch.stack(self.values).to(device), value_of) if self.values else None
        return _Entries(self.spec, rows, heads if len(heads) else None, values)


class _Entries(NamedTuple):
    spec: OneSpec
    rows: Int[Tensor, " entry"]
    heads: Int[Tensor, " entry"] | None
    values: tuple[Float[Tensor, "value new d"], Int[Tensor, " entry"]] | None

    def edit(self, x: Tensor, which: Tensor | None, past: RowPast) -> None:
        """Edit some entries in place.

        Args:
            x: the activations, `row *head d`.
            which: the rows that are edited, ` row` bool; None: all.
            past: the rows.
        """
        entry = torch.arange(len(self.rows), device=self.rows.device)
        if which is not None:
            entry = entry[which.to(self.rows.device)[self.rows]]
        if not len(entry):
            return
        rows = self.rows[entry]
        values = None
        if self.values is not None:
            of_value, value_of = self.values
            steps = past.written.to(rows.device)[rows] if of_value.shape[1] > 1 else 0
            values = self.spec.to_columns(of_value[value_of[entry], steps], past.padding.to(rows.device)[rows, None])
            values = values.to(x.device)
        index = tuple(
            part.to(x.device) for part in (rows, None if self.heads is None else self.heads[entry]) if part is not None
        )
        x[index] = self.spec.apply(x[index], values)


class RowEdits:
    """The edits of rows that write, ready for hooks.

    Args:
        model: the model.
        rows: the edits of each row, in the order in which they are made.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[TokenEdit]]) -> None:
        self.model = model
        found: dict[tuple[str, int], dict[tuple[int, str, int], _EntryLists]] = defaultdict(dict)
        for row, edits in enumerate(rows):
            earlier: dict[tuple[str, int], int] = defaultdict(int)  # edits of this row at the same place
            for spec, values in edits:
                where = COMPONENTS[FIELD_NAMES[spec.acts_at]].name, spec.layer or 0
                heads = spec.heads or ()
                key = earlier[where], spec.intervention.__name__, 0 if values is None else values.shape[-2]
                found[where].setdefault(key, _EntryLists(spec)).add(row, heads, values)
                earlier[where] += 1
        device, card = input_device(model), card_of(model)
        mapping, sizes = card.mapping(type(model)), dimensions(model.config)
        self._attention: dict[str, dict[int, list[_Entries]]] = {"attention_scores": {}, "attention_pattern": {}}
        self._places: list[tuple[Any, str, list[Any], list[_Entries], bool]] = []
        self._past: RowPast | None = None
        self._which: Tensor | None = None
        places = []
        for (component, layer), batches in found.items():
            entries = [batch.ready(device) for _, batch in sorted(batches.items(), key=lambda item: item[0])]
            if component in self._attention:
                self._attention[component][layer] = entries
                continue
            places.append((component, layer))
            # A tap notices an edit by its returning another tensor; but the stream itself goes on beside the tap at its norm.
            copied = card.is_tap(model, component) and component != "resid_mid"
            on = on_input if mapping[component][1] == CONST_INPUT_HOOK else on_output
            splits = [(split, sizes.get(part, part)) for split, part in mapping[component][2:]]
            self._places.append((on, at_layer(mapping[component][0], layer), splits, entries, copied))
        self._taps = Taps(model, card, places)

    @contextmanager
    def hooked(self, past: RowPast, which: Tensor | None) -> Iterator[None]:
        """Inside the block, edit the tokens that the rows of `past` take.

        Args:
            past: the rows.
            which: the rows that are edited, ` row` bool; None: all.
        """
        self._past, self._which = past, which
        with ExitStack() as stack:
            stack.callback(self._let_go, past)
            for component, edits in (("attention_scores", past.edit_scores), ("attention_pattern", past.edit_pattern)):
                edits.update((layer, partial(self._make, some)) for layer, some in self._attention[component].items())
            stack.enter_context(self._taps)
            for on, path, splits, entries, copied in self._places:
                stack.enter_context(on(self.model.get_submodule(path), partial(self._edited, splits, entries, copied)))
            yield

    def _let_go(self, past: RowPast) -> None:
        """Forget the rows, which would otherwise be held in memory until garbage is collected."""
        self._past = self._which = None
        past.edit_scores.clear()
        past.edit_pattern.clear()

    def _edited(self, splits: list[Any], entries: list[_Entries], copied: bool, x: Tensor) -> Tensor | None:
        seen = x = x.clone() if copied else x
        for split, part in splits:
            seen = split(seen, part)  # views: `row head 1 d`, or without heads `row 1 d`
        self._make(entries, seen.squeeze(-2))
        return x if copied else None

    def _make(self, entries: list[_Entries], x: Tensor) -> None:
        assert self._past is not None
        for some in entries:
            some.edit(x, self._which, self._past)
