"""Run the waves of a plan: every layer once, on the clean prompts and on all rows that have entered by then."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Float32, Int
from torch import Tensor

from modelcards import n_heads, n_kv_heads
from modelcards.attention_taps import output_weight
from pyvene_ext.engine.plain import ANSWERS_ONLY, measure
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.engine.sweep.layout import (
    INTO_ATTENTION,
    STAGES,
    EditBatch,
    Group,
    Stage,
    Wave,
    shared_columns,
    wave_groups,
)
from pyvene_ext.engine.sweep.plan import Plan, Sizes
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.replay import Past, Replay
from pyvene_ext.specs.joint import Spec, spec_name

Frozen = Literal["attention", "mlp"]  # what keeps its clean output in every row, but where that is edited


@dataclass
class Clean:
    """One layer of the clean run of a wave's prompts; `first` is the column that z, attention and mlp begin with."""

    resid_pre: Float[Tensor, "prompt pos d_model"]
    keys: Float[Tensor, "prompt n_kv_head pos d_head"]
    values: Float[Tensor, "prompt n_kv_head pos d_head"]
    first: int
    z: Float[Tensor, "prompt pos d_z"]
    attention: Float[Tensor, "prompt pos d_model"]
    mlp: Float[Tensor, "prompt pos d_model"]


class Record(Protocol):
    """What wants to see rows on their way: given with them the first column they hold, and which (spec, prompt) each is."""

    def before(self, layer: int, hidden: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """What enters a block."""

    def during(self, layer: int, column: int, rows: list[tuple[int, int]]) -> AbstractContextManager[Any]:
        """While a block runs."""

    def behind(self, layer: int, out: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """What leaves it."""


class DeviceEdits:
    """A batch of edits with its indices and values as tensors on a device."""

    def __init__(self, batch: EditBatch, values: Tensor | None, device: torch.device) -> None:
        self.spec, self.round, self.device = batch.sources[0][0], batch.round, device
        self.row_numbers, self.column_numbers, self.head_numbers = batch.rows, batch.columns, batch.heads
        self.most_heads = max(len(spec.heads or ()) for spec, *_ in batch.sources)
        self.first_column = batch.columns.min()
        self.values = None if values is None else values.to(device)

    @cached_property
    def rows(self) -> Int[Tensor, " entry"]:
        return torch.from_numpy(self.row_numbers).to(self.device)

    @cached_property
    def columns(self) -> Int[Tensor, " entry"]:
        return torch.from_numpy(self.column_numbers).to(self.device)

    @cached_property
    def heads(self) -> Int[Tensor, " entry"] | None:
        return torch.from_numpy(self.head_numbers).to(self.device) if self.head_numbers[0] >= 0 else None

    def part(self, first: int, stop: int) -> slice:
        """The entries whose rows are in `[first, stop)`."""
        return slice(*np.searchsorted(self.row_numbers, [first, stop]))

    def new(self, old: Float[Tensor, "entry d"], part: slice | Tensor) -> Float[Tensor, "entry d"]:
        """What comes in place of `old`."""
        return self.spec.apply(old, None if self.values is None else self.values[part])

    def apply(self, x: Float[Tensor, "row pos d"], first: int, column: int, heads: int) -> None:
        """Edit rows `first` and following, of which `x` holds the columns from `column` on, in place."""
        mine = self.part(first, first + len(x))
        if mine.start == mine.stop:
            return
        part: slice | Tensor = mine
        if self.first_column < column:  # earlier columns' keys and values, which were edited where they were made
            part = torch.arange(mine.start, mine.stop, device=x.device)[self.columns[mine] >= column]
        index = [self.rows[part] - first, self.columns[part] - column]
        if self.heads is not None:
            x = x.unflatten(-1, (heads, -1))
            index.append(self.heads[part])
        x[tuple(index)] = self.new(x[tuple(index)], part)


class Executor:
    """Runs waves. Calls of a block are cut to the plan's memory, and halved for good when memory runs out all the same."""

    def __init__(
        self,
        resolved: Resolved,
        metric: str,
        plan: Plan,
        freeze: Collection[Frozen] = (),
        record: Record | None = None,
    ) -> None:
        self.freeze, self.record = freeze, record
        self.resolved, self.model, self.specs, self.metric = resolved, resolved.model, resolved.specs, metric
        self.prompts, self.edits, self.budget = resolved.prompts, plan.edits, plan.budget
        self.replay, self.sizes = Replay(self.model), Sizes(self.model)
        self.heads, self.kv_heads = n_heads(self.model.config), n_kv_heads(self.model.config)
        # What running out of memory has taught: how many rows at most make a wave, and by how much to cut the calls.
        self.most, self.shrunk = len(self.specs) * len(self.prompts), 1

    def run(
        self, wave: Wave, advance: Callable[[float], object] = lambda interventions: None
    ) -> tuple[Float32[np.ndarray, " prompt *pos"], Float32[np.ndarray, "spec prompt *pos"]]:
        """The metric on the clean prompts of a wave and under each of its specs.

        `advance` is told how many of its interventions the work just done amounts to. Raises ValueError where logits are not
        finite, and where a single intervention on one prompt does not fit in memory.
        """
        if len(wave.specs) * len(wave.prompts) > self.most:
            return self._run_halves(wave, advance)
        try:
            return self._run(wave, advance)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            self.most = len(wave.specs) * len(wave.prompts) // 2
            if not self.most:
                length = len(self.prompts.input_ids[wave.prompts[0]])
                raise ValueError(
                    f"one intervention on a prompt of {length} tokens does not fit in memory; use shorter prompts, a smaller "
                    "dtype or another device."
                ) from error
        empty_cache()
        return self._run_halves(wave, advance)

    def _run_halves(self, wave: Wave, advance: Callable[[float], object]) -> tuple[np.ndarray, np.ndarray]:
        if len(wave.prompts) > 1:
            middle = len(wave.prompts) // 2
            halves = [self.run(Wave(p, wave.specs), advance) for p in (wave.prompts[:middle], wave.prompts[middle:])]
            return np.concatenate([clean for clean, _ in halves]), np.concatenate([after for _, after in halves], 1)
        middle = len(wave.specs) // 2
        halves = [self.run(Wave(wave.prompts, s), advance) for s in (wave.specs[:middle], wave.specs[middle:])]
        return halves[0][0], np.concatenate([after for _, after in halves])

    def _run(self, wave: Wave, advance: Callable[[float], object]) -> tuple[np.ndarray, np.ndarray]:
        replay, layers = self.replay, self.replay.n_layers
        ids = torch.tensor([self.prompts.input_ids[prompt] for prompt in wave.prompts], device=replay.device)
        length = ids.shape[1]
        shared = shared_columns(wave.prompts, self.prompts)
        groups = wave_groups(wave, self.edits, self.resolved, layers)
        states: dict[int, State] = {}
        for group in groups:
            states[id(group)] = State(self, wave, group, length, states[id(group.trunk)] if group.trunk else None)
        of_clean = shared + (length - shared) * len(ids)
        token_layers = of_clean * layers + sum(group.token_layers(length) for group in groups)
        share = len(wave.specs) * len(wave.prompts) / token_layers
        hidden = replay.embed(ids)
        for layer in range(layers):
            # All tensors of a layer are where its block is; of a model spread over devices that is not where the last one was.
            hidden = hidden.to(input_device(replay.module("block_output", layer)))
            hidden, clean = self._clean_layer(layer, hidden, shared)
            advance(of_clean * share)
            for state in states.values():
                state.layer(layer, clean, lambda done: advance(done * share))
        final = hidden[:, -1]
        try:
            before, clean_logits = self._read(final, np.arange(len(ids)), wave, None)
        except _NotFinite as error:
            raise _not_finite(wave.prompts[error.row], None) from None
        after = np.repeat(before[None], len(wave.specs), 0)  # an edit that cannot reach what is read changes nothing
        for state in states.values():
            if state.is_trunk:
                continue
            state.finish(final)
            group = state.group
            specs, rows = np.repeat(group.specs, len(group.prompts)), np.tile(group.prompts, len(group.specs))
            try:
                after[specs, rows] = self._read(state.final, rows, wave, clean_logits)[0]
            except _NotFinite as error:
                raise _not_finite(wave.prompts[rows[error.row]], self.specs[wave.specs[specs[error.row]]]) from None
        return before, after

    def _clean_layer(self, layer: int, hidden: Tensor, shared: int) -> tuple[Tensor, Clean]:
        """One layer of the untouched run: the columns that all prompts share once, and of the last layer only the last token."""
        replay, length = self.replay, hidden.shape[1]
        last = layer == replay.n_layers - 1
        past, seen = Past(), dict[str, Tensor]()
        trunk, seen_of_trunk, out_of_trunk = Past(), dict[str, Tensor](), hidden[:1, :0]
        if shared:
            if last:
                trunk.made = replay.keys_values(layer, hidden[:1, :shared], (0, shared))
            else:
                out_of_trunk = replay.block(layer, hidden[:1, :shared], (0, shared), trunk, seen=seen_of_trunk)
            past.shared = (*trunk.keys_values, False)
        first, x, before = shared, hidden[:, shared:], None
        if last and first < length - 1:
            before = replay.keys_values(layer, x, (shared, length))
            past.before = before[0][:, :, :-1], before[1][:, :, :-1]
            first, x = length - 1, x[:, -1:]
        out = replay.block(layer, x, (first, length), past, seen=seen)
        keys, values = before or past.keys_values
        if shared:
            keys, values = (_behind(*pair, 2) for pair in zip(trunk.keys_values, (keys, values), strict=True))
            if not last:
                out = _behind(out_of_trunk, out, 1)
                seen = {name: _behind(seen_of_trunk[name], own, 1) for name, own in seen.items()}
        start = length - 1 if last else 0
        return out, Clean(hidden, keys, values, start, seen["z"], seen["attention"], seen["mlp"])

    def _read(
        self, final: Float[Tensor, "row d_model"], rows: np.ndarray, wave: Wave, clean_logits: Tensor | None
    ) -> tuple[Float32[np.ndarray, " row *pos"], Tensor | None]:
        """The metric of rows, given which prompt of the wave each is; and the logits, for the clean run."""
        answers = torch.tensor([self.prompts.answer_ids[prompt] for prompt in wave.prompts], device=final.device)
        tokens = torch.tensor([self.prompts.input_ids[prompt] for prompt in wave.prompts], device=final.device)
        of_row = torch.from_numpy(rows).to(final.device)
        narrow = self.metric in ANSWERS_ONLY
        head = self.model.get_output_embeddings()
        width = 2 * self.sizes.token if narrow and output_weight(head) is not None else head.weight.shape[0]
        step = max(1, self.budget.call_memory // (40 * width))
        found, kept = [], []
        for start in range(0, len(rows), step):
            which = of_row[start : start + step]
            ids = answers[which]
            logits = self.replay.logits(final[start : start + step], ids if narrow else None).to(final.device)
            finite = logits.isfinite().all(-1)
            if not finite.all():
                raise _NotFinite(start + int((~finite).nonzero()[0]))
            if clean_logits is None:
                kept.append(logits)
            reference = logits if clean_logits is None else clean_logits[which]
            names = torch.tensor([[0, 1]], device=ids.device).expand(len(ids), 2) if narrow else ids
            batch: Any = SimpleNamespace(answer_ids=names, input_ids=tokens[which])
            found.append(measure(self.metric, logits, batch, reference))
        return np.concatenate(found), torch.cat(kept) if kept else None

    def values(self, batch: EditBatch) -> Tensor | None:
        """What a batch of edits puts in place, `entry d`."""
        found = []
        for spec, ids, kept in batch.sources:
            made = self.resolved.replacements(spec, ids)
            if made is None:  # and so for every spec of this intervention
                return None
            if kept is not None:
                made = [value[which] for value, which in zip(made, kept, strict=True)]
            found += [value.flatten(0, -2) for value in made]
        return torch.cat(found)


class State:
    """The hidden states of a group's rows on their way through the layers."""

    def __init__(self, executor: Executor, wave: Wave, group: Group, length: int, trunk: State | None) -> None:
        self.executor, self.wave, self.group, self.length, self.trunk = executor, wave, group, length, trunk
        self.is_trunk = group.stop < length
        self.width = group.stop - group.start
        shape = len(group.specs) * len(group.prompts), self.width, executor.model.config.hidden_size
        self.hidden = torch.empty(shape, dtype=executor.replay.dtype, device=executor.replay.device)
        self.final = self.hidden[:, -1]
        self.prompts = torch.from_numpy(group.prompts).to(executor.replay.device)
        self.prompt = self.prompts.repeat(len(group.specs))
        self.made: list[tuple[Tensor, Tensor]] = []  # keys and values of one layer, if this is a trunk

    def layer(self, layer: int, clean: Clean, advance: Callable[[float], object]) -> None:
        """Take all rows that have entered, and those that enter now, through a layer."""
        before, *_, stop = self.group.bounds[layer]
        self.made = []
        if not stop:
            return
        executor, group, device = self.executor, self.group, clean.resid_pre.device
        self.hidden, self.prompt, self.prompts = (x.to(device) for x in (self.hidden, self.prompt, self.prompts))
        self.hidden[before:stop] = clean.resid_pre[self.prompt[before:stop], group.start : group.stop]
        edits: dict[Stage, list[DeviceEdits]] = {}
        for stage in STAGES:
            if batches := group.edits.get((layer, stage)):
                edits[stage] = [DeviceEdits(batch, executor.values(batch), device) for batch in batches]
        for ready in edits.pop("resid_pre", ()):
            ready.apply(self.hidden, 0, group.start, executor.heads)

        last = layer == executor.replay.n_layers - 1
        if last:
            self.final = self.hidden.new_empty(len(self.hidden), self.hidden.shape[-1])
        first = 0
        while first < stop:
            until = min(stop, first + self._call_rows())
            try:
                out = self._call(layer, clean, first, until, edits, last)
            except Exception as error:
                if not should_reduce_batch_size(error) or until - first == 1:
                    raise
                executor.shrunk *= 2
            else:
                if not last:
                    self.hidden[first:until] = out
                elif not self.is_trunk:
                    self.final[first:until] = out[:, -1]
                advance((until - first) * out.shape[1])
                first = until
                continue
            empty_cache()  # here, where the failed call's tensors are gone with its traceback

    def finish(self, final: Float[Tensor, "prompt d_model"]) -> None:
        """Edit rows behind the last block, where the metric is read."""
        before, *_, stop = self.group.bounds[-1]
        self.final, self.prompt = self.final.to(final.device), self.prompt.to(final.device)
        self.final[before:stop] = final[self.prompt[before:stop]]
        for batch in self.group.edits.get((len(self.group.bounds) - 1, "resid_pre"), ()):
            ready = DeviceEdits(batch, self.executor.values(batch), self.final.device)
            ready.apply(self.final[:, None], 0, self.length - 1, self.executor.heads)

    def _call_rows(self) -> int:
        executor, prompts = self.executor, len(self.group.prompts)
        by_memory = executor.budget.call_memory // executor.sizes.call(self.width, self.group.stop)
        rows = max(1, min(by_memory, executor.budget.call_tokens // self.width) // executor.shrunk)
        # All prompts of a spec together, so that their rows can share keys.
        return max(rows - rows % prompts, min(rows, prompts))

    def _call(
        self, layer: int, clean: Clean, first: int, until: int, edits: dict[Stage, list[DeviceEdits]], last: bool
    ) -> Float[Tensor, "row pos d_model"]:
        """One call of a block: rows `[first, until)`, those that enter behind attention or behind the MLP at their end."""
        replay, start, stop = self.executor.replay, self.group.start, self.group.stop
        _, whole, mid, _ = self.group.bounds[layer]
        attending = 0 if "attention" in self.executor.freeze else min(max(whole - first, 0), until - first)
        in_mlp = 0 if "mlp" in self.executor.freeze else min(max(mid - first, 0), until - first)
        x, prompt = self.hidden[first:until], self.prompt[first:until]
        past, column = Past(), start
        if last:
            if attending and (self.is_trunk or self.width > 1):
                hooks = self._hooks(
                    {at: edits[at] for at in ("k", "v") if at in edits}, first, attending, attending, start
                )
                keys, values = replay.keys_values(layer, x[:attending], (start, stop), hooks)
                past.before = keys[:, :, :-1], values[:, :, :-1]
                if self.is_trunk:
                    self.made.append((keys, values))
            if self.is_trunk:
                return x[:, :0]  # of the last layer its keys and values are all that is wanted
            column, x = self.length - 1, x[:, -1:]
        if attending and start:
            self._put_before(past, clean, first, attending)

        attention = mlp = None
        if attending < until - first:
            attention = self._known_attention(layer, clean, first + attending, until, column, edits.get("z", []))
        if in_mlp < until - first:
            mlp = clean.mlp[prompt[in_mlp:], column - clean.first : stop - clean.first]
        hooks = self._hooks(edits, first, until - first, attending, column)
        if record := self.executor.record:
            rows = self._rows(first, until)
            record.before(layer, self.hidden[first:until], start, rows)
            with record.during(layer, column, rows):
                out = replay.block(layer, x, (column, stop), past, attention=attention, mlp=mlp, edits=hooks)
            record.behind(layer, out, column, rows)
            return out
        out = replay.block(layer, x, (column, stop), past, attention=attention, mlp=mlp, edits=hooks)
        if self.is_trunk and attending:
            self.made.append(past.keys_values)
        return out

    def _rows(self, first: int, until: int) -> list[tuple[int, int]]:
        """Which spec and prompt of the sweep each row is."""
        wave, each = self.wave, len(self.group.prompts)
        return [
            (wave.specs[self.group.specs[row // each]], wave.prompts[self.group.prompts[row % each]])
            for row in range(first, until)
        ]

    def _hooks(
        self, edits: dict[Stage, list[DeviceEdits]], first: int, count: int, attending: int, column: int
    ) -> dict[str, Callable[[Tensor], None]]:
        """What changes rows `first` and following, by stage: `count` of them, of which the first ones run through attention."""
        hooks: dict[str, Callable[[Tensor], None]] = {}
        for stage, ready in edits.items():
            reach = attending if stage in INTO_ATTENTION else count
            here = [r for r in ready if (part := r.part(first, first + reach)).start < part.stop]
            if here:
                heads = self.executor.kv_heads if stage in ("k", "v") else self.executor.heads
                hooks[stage] = _in_turn(here, first, column, heads)
        return hooks

    def _put_before(self, past: Past, clean: Clean, first: int, count: int) -> None:
        """Give rows the keys and values in front of their own: those of the clean prompt, or of the trunk they continue."""
        each, start = len(self.group.prompts), self.group.start
        aligned = not (first % each or count % each)
        if self.trunk is None:
            keys, values = clean.keys[:, :, :start], clean.values[:, :, :start]
            which = self.prompts if aligned else self.prompt[first : first + count]
            shared, alternating = (keys[which], values[which]), True
        else:
            specs = (
                np.arange(first, first + count, each) // each if aligned else np.arange(first, first + count) // each
            )
            shared, alternating = self._trunk_keys_values(clean, specs), False
        if aligned:
            past.shared = (*shared, alternating)
        elif past.before is None:
            past.before = shared
        else:
            past.before = tuple(torch.cat(pair, 2) for pair in zip(shared, past.before, strict=True))  # type: ignore[assignment]

    def _trunk_keys_values(self, clean: Clean, specs: np.ndarray) -> tuple[Tensor, Tensor]:
        """The columns in front of this group's, for some of its specs: as the trunk made them, clean where it has not begun."""
        assert self.trunk is not None and self.group.trunk_rows is not None
        start, device = self.group.start, clean.keys.device
        rows = torch.from_numpy(self.group.trunk_rows[specs]).to(device)
        found = []
        for which, of_clean in enumerate((clean.keys, clean.values)):
            x = of_clean[self.prompts[:1], :, :start].repeat(len(specs), 1, 1, 1)
            if self.trunk.made:
                made = torch.cat([pair[which] for pair in self.trunk.made])
                there = rows < len(made)
                x[there, :, self.trunk.group.start :] = made[rows[there]].to(device)
            found.append(x)
        return found[0], found[1]

    def _known_attention(
        self, layer: int, clean: Clean, first: int, until: int, column: int, edits: list[DeviceEdits]
    ) -> Float[Tensor, "row pos d_model"]:
        """What the attention module gives for rows that enter behind it: the clean run's output, and what edits of z add."""
        executor, prompt = self.executor, self.prompt[first:until]
        parts = [(ready, ready.part(first, until)) for ready in edits]
        parts = [(ready, part) for ready, part in parts if part.start < part.stop]
        weight = executor.replay.projection(layer)
        # A change of most heads leaves next to nothing but rounding, which a norm behind it may blow up: made anew, not added.
        anew = weight is None or any(ready.round or 2 * ready.most_heads > executor.heads for ready, _ in parts)
        if parts and anew:
            z = clean.z[prompt, column - clean.first : self.group.stop - clean.first]
            for ready, _ in parts:
                ready.apply(z, first, column, executor.heads)
            return executor.replay.module("attention_value_output", layer)(z)
        known = clean.attention[prompt, column - clean.first : self.group.stop - clean.first]
        flat, z = known.view(-1, known.shape[-1]), clean.z.reshape(-1, clean.z.shape[-1] // executor.heads)
        for ready, part in parts:
            assert weight is not None
            order = np.argsort(ready.head_numbers[part], kind="stable") + part.start
            rows, columns, heads = (x[order] for x in (ready.row_numbers, ready.column_numbers, ready.head_numbers))
            counts = np.bincount(heads)
            which, counts = np.flatnonzero(counts), counts[counts > 0]
            prompts = self.group.prompts[rows % len(self.group.prompts)]
            of_clean = (prompts * clean.z.shape[1] + columns - clean.first) * executor.heads + heads
            where = (rows - first) * known.shape[1] + columns - column
            of_clean, where, order = (torch.from_numpy(x).to(z.device) for x in (of_clean, where, order))
            old = z[of_clean]
            change = ready.new(old, order) - old
            by_head = weight.view(executor.heads, -1, weight.shape[-1])
            if (counts == counts[0]).all():  # one product for all heads
                own = by_head if len(which) == executor.heads else by_head[torch.from_numpy(which).to(z.device)]
                flat.index_add_(0, where, (change.view(len(which), -1, change.shape[-1]) @ own).flatten(0, 1))
                continue
            for head, some, at in zip(which, change.split(counts.tolist()), where.split(counts.tolist()), strict=True):
                flat.index_add_(0, at, some @ by_head[head])
        return known


def empty_cache() -> None:
    """Give back what a failed call has left in a GPU's cache."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _not_finite(prompt: int, spec: Spec | None) -> ValueError:
    under = "" if spec is None else f" under {spec_name(spec)}"
    return ValueError(
        f"the logits of prompt {prompt}{under} are not finite; use dtype float32 or bfloat16, or a weaker intervention."
    )


class _NotFinite(Exception):
    def __init__(self, row: int) -> None:
        self.row = row


def _behind(common: Tensor, own: Tensor, dim: int) -> Tensor:
    """What all prompts have in common, `1 ...`, and behind it each one's own."""
    return torch.cat([common.expand(len(own), *common.shape[1:]), own], dim)


def _in_turn(edits: list[DeviceEdits], first: int, column: int, heads: int) -> Callable[[Tensor], None]:
    def edit(x: Tensor) -> None:
        for ready in edits:
            ready.apply(x, first, column, heads)

    return edit
