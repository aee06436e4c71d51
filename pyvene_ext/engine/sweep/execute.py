"""Run the waves of a plan: every layer once, on the clean prompts and on all rows that have entered so far."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Float32, Int
from torch import Tensor

from modelcards import n_heads, n_kv_heads
from modelcards.attention_taps import output_weight
from pyvene_ext.engine.measure import Metric, as_array
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.engine.sequences import AnswerTable
from pyvene_ext.engine.sweep.layout import (
    INSIDE_ATTENTION,
    STAGES,
    EditBatch,
    Group,
    Stage,
    Wave,
    shared_columns,
    wave_groups,
)
from pyvene_ext.engine.sweep.plan import METRIC_COPIES, ActivationSizes, Plan
from pyvene_ext.models.devices import empty_cache, input_device
from pyvene_ext.models.replay import Past, Replay
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, spec_name

Frozen = Literal["attention", "mlp"]  # keeps its clean output in every row, except where that is edited


@dataclass
class CleanLayer:
    """One layer of the clean run of a wave's prompts.

    Attributes:
        resid_pre: what enters the block.
        keys: of all columns.
        values: of all columns.
        first: the first column of z, attention and mlp; of the last layer only the columns that are read are run.
        z: concatenated heads.
        attention: output of the attention module.
        mlp: output of the MLP.
    """

    resid_pre: Float[Tensor, "prompt pos d_model"]
    keys: Float[Tensor, "prompt n_kv_head pos d_head"]
    values: Float[Tensor, "prompt n_kv_head pos d_head"]
    first: int
    z: Float[Tensor, "prompt pos d_z"]
    attention: Float[Tensor, "prompt pos d_model"]
    mlp: Float[Tensor, "prompt pos d_model"]


class BlockObserver(Protocol):
    """Reads activations of rows while blocks run.

    `column` is the first column that the rows hold; `rows` has each row's spec and prompt, as indices into the sweep's.
    """

    def before_block(self, layer: int, hidden: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """Read the input of a block.

        Args:
            layer: the block's.
            hidden: its input, `row pos d_model`.
            column: the first column of the rows.
            rows: the spec and prompt of each row.
        """

    def around_block(self, layer: int, column: int, rows: list[tuple[int, int]]) -> AbstractContextManager[Any]:
        """Make a context in which a block runs.

        Args:
            layer: the block's.
            column: the first column of the rows.
            rows: the spec and prompt of each row.

        Returns:
            The context manager.
        """

    def after_block(self, layer: int, out: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """Read the output of a block.

        Args:
            layer: the block's.
            out: its output, `row pos d_model`.
            column: the first column of the rows.
            rows: the spec and prompt of each row.
        """


class DeviceEdits:
    """A batch of edits with its indices and replacements as tensors on a device."""

    def __init__(self, batch: EditBatch, values: Tensor | None, device: torch.device) -> None:
        self.spec, self.order, self.device = batch.sources[0][0], batch.order, device
        self.row_numbers, self.column_numbers, self.head_numbers = batch.rows, batch.columns, batch.heads
        self.max_heads = max(len(spec.heads or ()) for spec, *_ in batch.sources)
        self.first_column = batch.columns.min()
        self.values = None if values is None else values.to(device)

    @cached_property
    def rows(self) -> Int[Tensor, " entry"]:
        """The row of every entry."""
        return torch.from_numpy(self.row_numbers).to(self.device)

    @cached_property
    def columns(self) -> Int[Tensor, " entry"]:
        """The column of every entry."""
        return torch.from_numpy(self.column_numbers).to(self.device)

    @cached_property
    def heads(self) -> Int[Tensor, " entry"] | None:
        """The head of every entry; None for sites without heads."""
        return torch.from_numpy(self.head_numbers).to(self.device) if self.head_numbers[0] >= 0 else None

    def entries(self, first: int, stop: int) -> slice:
        """Find the entries whose rows are in `[first, stop)`.

        Args:
            first: a row of the group.
            stop: one after the last row.

        Returns:
            A slice of the entries.
        """
        return slice(*np.searchsorted(self.row_numbers, [first, stop]))

    def edited(self, old: Float[Tensor, "entry d"], entries: slice | Tensor) -> Float[Tensor, "entry d"]:
        """Apply the edit to the activations of some entries.

        Args:
            old: their activations.
            entries: which entries these are.

        Returns:
            The edited activations.
        """
        return self.spec.apply(old, None if self.values is None else self.values[entries])

    def apply(self, x: Float[Tensor, "row pos d"], first: int, column: int, heads: int) -> None:
        """Edit rows in place.

        Args:
            x: activations of consecutive rows.
            first: the first of these rows.
            column: the first column that `x` holds.
            heads: number of heads side by side in `d`, for sites with heads.
        """
        of_rows = self.entries(first, first + len(x))
        if of_rows.start == of_rows.stop:
            return
        entries: slice | Tensor = of_rows
        # The last block's k and v at columns before those that are read were edited when they were computed.
        if self.first_column < column:
            entries = torch.arange(of_rows.start, of_rows.stop, device=x.device)[self.columns[of_rows] >= column]
        index = [self.rows[entries] - first, self.columns[entries] - column]
        if self.heads is not None:
            x = x.unflatten(-1, (heads, -1))
            index.append(self.heads[entries])
        x[tuple(index)] = self.edited(x[tuple(index)], entries)


class Executor:
    """Runs waves.

    Calls of a block are sized to the plan's memory, and halved for the rest of the sweep if memory runs out nevertheless.

    Args:
        resolved: the specs on the prompts, with the statistics they need.
        metric: the metric, checked (`check_metric`).
        plan: of these specs.
        freeze: what keeps its clean output in every row.
        observer: reads activations of rows.
    """

    def __init__(
        self,
        resolved: Resolved,
        metric: Metric,
        plan: Plan,
        freeze: Collection[Frozen] = (),
        observer: BlockObserver | None = None,
    ) -> None:
        self.freeze, self.observer = freeze, observer
        self.resolved, self.model, self.specs, self.metric = resolved, resolved.model, resolved.specs, metric
        self.prompts, self.edits, self.budget = resolved.sequences.prompts, plan.edits, plan.budget
        self.replay, self.sizes = Replay(self.model), ActivationSizes(self.model)
        self.heads, self.kv_heads = n_heads(self.model.config), n_kv_heads(self.model.config)
        # Lowered when memory runs out: the most rows of a wave; raised: the divisor of the number of rows per call.
        self.max_rows, self.call_divisor = len(self.specs) * len(self.prompts), 1

    def run(
        self, wave: Wave, advance: Callable[[float], object] = lambda interventions: None
    ) -> tuple[Float32[np.ndarray, " prompt *pos"], Float32[np.ndarray, "spec prompt *pos"]]:
        """Run a wave.

        Args:
            wave: some specs on some prompts.
            advance: called with the number of interventions (a fraction) that the work just done amounts to.

        Returns:
            The metric on the clean prompts, and under each spec.

        Raises:
            ValueError: logits are not finite, or a single intervention on one prompt does not fit in memory.
        """
        if len(wave.specs) * len(wave.prompts) > self.max_rows:
            return self._run_halves(wave, advance)
        try:
            return self._run(wave, advance)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            self.max_rows = len(wave.specs) * len(wave.prompts) // 2
            if not self.max_rows:
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
            return np.concatenate([clean for clean, _ in halves]), np.concatenate([found for _, found in halves], 1)
        middle = len(wave.specs) // 2
        halves = [self.run(Wave(wave.prompts, s), advance) for s in (wave.specs[:middle], wave.specs[middle:])]
        return halves[0][0], np.concatenate([found for _, found in halves])

    def _run(self, wave: Wave, advance: Callable[[float], object]) -> tuple[np.ndarray, np.ndarray]:
        replay, layers = self.replay, self.replay.n_layers
        ids = torch.tensor([self.prompts.input_ids[prompt] for prompt in wave.prompts], device=replay.device)
        length, first_read = ids.shape[1], self.resolved.sequences.first_read[wave.prompts[0]]
        shared = shared_columns(wave.prompts, self.prompts)
        groups = wave_groups(wave, self.edits, self.resolved, layers)
        states: dict[int, GroupState] = {}
        for group in groups:
            states[id(group)] = GroupState(
                self, wave, group, length, states[id(group.prefix)] if group.prefix else None
            )
        clean_tokens = shared + (length - shared) * len(ids)
        token_layers = clean_tokens * layers + sum(group.token_layers(first_read) for group in groups)
        share = len(wave.specs) * len(wave.prompts) / token_layers
        hidden = replay.embed(ids)
        for layer in range(layers):
            # In a model spread over devices the next block may be on another one.
            hidden = hidden.to(input_device(replay.module("block_output", layer)))
            hidden, clean = self._clean_layer(layer, hidden, shared, first_read)
            advance(clean_tokens * share)
            for state in states.values():
                state.run_layer(layer, clean, lambda done: advance(done * share))
        batch = self.prompts.batch(wave.prompts).to(hidden.device)
        try:
            read = self._read(np.arange(len(ids)), batch, lambda rows, ids: self.unembed(hidden[rows], ids))
        except _NotFiniteError as error:
            raise self._not_finite_error(wave.prompts[error.row], None) from None
        baseline, clean_logits = read
        intervened = np.repeat(baseline[None], len(wave.specs), 0)  # unchanged where no edit can reach the metric
        for state in states.values():
            state.finish(hidden)
            group = state.group
            if state.is_prefix:
                continue
            specs, rows = np.repeat(group.specs, len(group.prompts)), np.tile(group.prompts, len(group.specs))
            try:
                logits = partial(state.logits, clean_logits=clean_logits)
                intervened[specs, rows] = self._read(rows, batch, logits, clean_logits)[0]
            except _NotFiniteError as error:
                spec = self.specs[wave.specs[specs[error.row]]]
                raise self._not_finite_error(wave.prompts[rows[error.row]], spec) from None
        return baseline, intervened

    def _clean_layer(self, layer: int, hidden: Tensor, shared: int, first_read: int) -> tuple[Tensor, CleanLayer]:
        """One layer of the clean run: columns that all prompts share run once; the last layer runs the columns that are read."""
        first = first_read if layer == self.replay.n_layers - 1 else 0
        length, past, seen = hidden.shape[1], Past(), dict[str, Tensor]()
        if not shared:
            out, (keys, values) = self._columns_from(first, layer, hidden, (0, length), past, seen)
        else:
            of_shared = dict[str, Tensor]()
            shared_out, before = self._columns_from(first, layer, hidden[:1, :shared], (0, shared), Past(), of_shared)
            past.shared = (*before, False)
            out, after = self._columns_from(first, layer, hidden[:, shared:], (shared, length), past, seen)
            keys, values = (_append(*pair, 2) for pair in zip(before, after, strict=True))
            if of_shared:
                out = _append(shared_out, out, 1)
                seen = {name: _append(of_shared[name], own, 1) for name, own in seen.items()}
        return out, CleanLayer(hidden, keys, values, first, seen["z"], seen["attention"], seen["mlp"])

    def _columns_from(
        self, first: int, layer: int, x: Tensor, columns: tuple[int, int], past: Past, seen: dict[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run a block on some columns, of those before `first` only the keys and values; returns the output, and all of these."""
        start, stop = columns
        if first <= start:
            return self.replay.block(layer, x, columns, past, seen=seen), past.keys_values
        keys, values = self.replay.keys_values(layer, x, columns)
        if first >= stop:
            return x[:, :0], (keys, values)
        before = first - start
        past.before = keys[:, :, :before], values[:, :, :before]
        return self.replay.block(layer, x[:, before:], (first, stop), past, seen=seen), (keys, values)

    def _read(
        self,
        rows: np.ndarray,
        prompts: Batch,
        logits_of: Callable[[slice, Tensor | None], Tensor],
        clean_logits: Tensor | None = None,
    ) -> tuple[Float32[np.ndarray, " row *pos"], Tensor | None]:
        """The metric of rows, given the prompt of the wave that each has, and the clean run's logits; or these for the others."""
        metric, device = self.metric, prompts.input_ids.device
        pos = prompts.lengths[0] - self.resolved.sequences.first_read[prompts.index[0]]
        answers = (
            AnswerTable.of([self.prompts.answers[i] for i in prompts.index], pos, device) if metric.of_answers else None
        )
        ids, prompts = metric.narrowed(prompts)
        head = self.model.get_output_embeddings()
        width = head.weight.shape[0]
        if ids is not None and output_weight(head) is not None:
            # Each row multiplies with its own rows of the unembedding, or all with the same.
            width = self.sizes.token * ids.shape[1] if ids.ndim == 2 else self.sizes.token + len(ids)
        step = max(1, self.budget.call_memory // (4 * METRIC_COPIES * width * pos))
        compares = "clean" in metric.needs
        keeps_clean = clean_logits is None and (compares or metric.of_tokens)
        found, kept = [], []
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            which = torch.from_numpy(rows[some]).to(device)
            logits = logits_of(some, ids[which] if ids is not None and ids.ndim == 2 else ids)
            finite = logits.isfinite().flatten(1).all(-1)
            if not finite.all():
                raise _NotFiniteError(start + int((~finite).nonzero()[0]))
            if keeps_clean:
                kept.append(logits)
            if answers is not None:
                found.append(as_array(answers.take(which).log_probabilities(logits)))
                continue
            reference = clean_logits[which] if compares and clean_logits is not None else logits
            if not metric.of_tokens:
                logits, reference = logits[:, -1], reference[:, -1]
            batch = metric.with_clean(prompts.take(rows[some].tolist()), reference)
            found.append(as_array(metric.of_columns(logits, batch)))
        return np.concatenate(found), torch.cat(kept) if kept else None

    def _not_finite_error(self, sequence: int, spec: Spec | None) -> ValueError:
        under = "" if spec is None else f" under {spec_name(spec)}"
        return ValueError(
            f"the logits of prompt {self.resolved.sequences.prompt_of[sequence]}{under} are not finite; use dtype float32 or "
            "bfloat16, or a weaker intervention."
        )

    def unembed(
        self, final: Float[Tensor, "row pos d_model"], ids: Int[Tensor, "*row k"] | None
    ) -> Float[Tensor, "row pos k"]:
        """Compute the logits at some columns of rows.

        Args:
            final: what leaves the last block there.
            ids: the tokens wanted, of each row or of all alike; None: the whole vocabulary.

        Returns:
            The logits.
        """
        columns = final.shape[1]
        if ids is not None and ids.ndim == 2:
            ids = ids.repeat_interleave(columns, 0)
        return self.replay.logits(final.flatten(0, 1), ids).unflatten(0, (-1, columns)).to(final.device)

    def values(self, batch: EditBatch) -> Tensor | None:
        """Compute the replacements of a batch of edits.

        Args:
            batch: edits at one stage of one layer.

        Returns:
            Replacements, `entry d`; None if the intervention takes none.
        """
        found = []
        for spec, ids, kept in batch.sources:
            values = self.resolved.replacements(spec, ids)
            if values is None:  # and so for every spec of this intervention
                return None
            if kept is not None:
                values = [value[which] for value, which in zip(values, kept, strict=True)]
            found += [value.flatten(0, -2) for value in values]
        return torch.cat(found)


class GroupState:
    """The hidden states of a group's rows between layers."""

    def __init__(self, executor: Executor, wave: Wave, group: Group, length: int, prefix: GroupState | None) -> None:
        self.executor, self.wave, self.group, self.length, self.prefix = executor, wave, group, length, prefix
        self.is_prefix = group.stop < length
        self.width = group.stop - group.start
        self.first_read = executor.resolved.sequences.first_read[wave.prompts[0]]
        shape = len(group.specs) * len(group.prompts), self.width, executor.model.config.hidden_size
        self.hidden = torch.empty(shape, dtype=executor.replay.dtype, device=executor.replay.device)
        self.prompts = torch.from_numpy(group.prompts).to(executor.replay.device)
        self.prompt = self.prompts.repeat(len(group.specs))
        self.keys_values: list[tuple[Tensor, Tensor]] = []  # of a prefix group in the current layer, one pair per call

    @property
    def final(self) -> Float[Tensor, "row pos d_model"]:
        """What leaves the last block at the columns that are read."""
        return self.hidden[:, max(0, self.first_read - self.group.start) :]

    def run_layer(self, layer: int, clean: CleanLayer, advance: Callable[[float], object]) -> None:
        """Run a layer on all rows that have entered so far, including those that enter it now.

        Args:
            layer: its number.
            clean: the same layer of the clean run.
            advance: called with the number of tokens run.
        """
        entered, *_, stop = self.group.bounds[layer]
        self.keys_values = []
        if not stop:
            return
        executor, group, device = self.executor, self.group, clean.resid_pre.device
        self.hidden, self.prompt, self.prompts = (x.to(device) for x in (self.hidden, self.prompt, self.prompts))
        self.hidden[entered:stop] = clean.resid_pre[self.prompt[entered:stop], group.start : group.stop]
        edits: dict[Stage, list[DeviceEdits]] = {}
        for stage in STAGES:
            if batches := group.edits.get((layer, stage)):
                edits[stage] = [DeviceEdits(batch, executor.values(batch), device) for batch in batches]
        for batch_edits in edits.pop("resid_pre", ()):
            batch_edits.apply(self.hidden, 0, group.start, executor.heads)

        first = 0
        while first < stop:
            until = min(stop, first + self._call_rows())
            try:
                out = self._call(layer, clean, first, until, edits)
            except Exception as error:
                if not should_reduce_batch_size(error) or until - first == 1:
                    raise
                executor.call_divisor *= 2
            else:
                self.hidden[first:until, self.width - out.shape[1] :] = out
                advance((until - first) * out.shape[1])
                first = until
                continue
            empty_cache()  # here, because the traceback, which is gone now, kept the failed call's tensors alive

    def finish(self, clean: Float[Tensor, "prompt pos d_model"]) -> None:
        """Edit rows after the last block, where the metric is read.

        Args:
            clean: what leaves the last block in the clean run, at the columns that are read.
        """
        if self.group.stop <= self.first_read:
            return
        entered, *_, stop = self.group.bounds[-1]
        column = max(self.group.start, self.first_read)
        self.hidden, self.prompt = self.hidden.to(clean.device), self.prompt.to(clean.device)
        of_group = clean[:, column - self.first_read : self.group.stop - self.first_read]
        self.final[entered:stop] = of_group[self.prompt[entered:stop]]
        for batch in self.group.edits.get((len(self.group.bounds) - 1, "resid_pre"), ()):
            edits = DeviceEdits(batch, self.executor.values(batch), clean.device)
            edits.apply(self.final, 0, column, self.executor.heads)

    def logits(
        self, some: slice, ids: Int[Tensor, "*row k"] | None, clean_logits: Float[Tensor, "prompt pos k"] | None
    ) -> Float[Tensor, "row pos k"]:
        """The logits of rows at all columns that are read; before the first edited one they are the clean run's.

        Args:
            some: the rows.
            ids: as for `Executor.unembed`.
            clean_logits: of the clean run; None if all columns that are read come after an edited one.

        Returns:
            The logits.
        """
        parts = [self.executor.unembed(self.final[some], ids)]
        if self.prefix is not None and self.prefix.final.shape[1]:
            assert self.group.prefix_rows is not None
            rows = torch.from_numpy(self.group.prefix_rows.repeat(len(self.group.prompts))[some]).to(self.hidden.device)
            if ids is not None and ids.ndim == 2:
                parts.insert(0, self.executor.unembed(self.prefix.final[rows], ids))
            else:  # once for all prompts
                own, of_row = rows.unique(return_inverse=True)
                parts.insert(0, self.executor.unembed(self.prefix.final[own], ids)[of_row])
        missing = self.length - self.first_read - sum(part.shape[1] for part in parts)
        if missing:
            assert clean_logits is not None
            parts.insert(0, clean_logits[self.prompt[some], :missing])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _call_rows(self) -> int:
        executor, prompts = self.executor, len(self.group.prompts)
        by_memory = executor.budget.call_memory // executor.sizes.call(self.width, self.group.stop)
        rows = max(1, min(by_memory, executor.budget.call_tokens // self.width) // executor.call_divisor)
        # All prompts of a spec in one call, so that their rows can share keys.
        return max(rows - rows % prompts, min(rows, prompts))

    def _call(
        self, layer: int, clean: CleanLayer, first: int, until: int, edits: dict[Stage, list[DeviceEdits]]
    ) -> Float[Tensor, "row pos d_model"]:
        """Call a block on rows `[first, until)`; rows that enter it after attention or after the MLP come last."""
        replay, start, stop = self.executor.replay, self.group.start, self.group.stop
        _, through_attention, through_mlp, _ = self.group.bounds[layer]
        attending = 0 if "attention" in self.executor.freeze else min(max(through_attention - first, 0), until - first)
        in_mlp = 0 if "mlp" in self.executor.freeze else min(max(through_mlp - first, 0), until - first)
        x, prompt = self.hidden[first:until], self.prompt[first:until]
        # Of the columns before this one, which are in the last layer, only the keys and values are needed.
        column = min(max(start, clean.first), stop)
        past, keys_values = Past(), None
        if attending and column > start:
            hooks = self._hooks({at: edits[at] for at in ("k", "v") if at in edits}, first, attending, attending, start)
            keys_values = replay.keys_values(layer, x[:attending], (start, stop), hooks)
            before = column - start
            past.before = keys_values[0][:, :, :before], keys_values[1][:, :, :before]
        if column == stop:
            self.keys_values += [keys_values] if keys_values else []
            return x[:, :0]
        x = x[:, column - start :]
        if attending and start:
            self._set_past(past, clean, first, attending)

        attention = mlp = None
        if attending < until - first:
            attention = self._cached_attention(layer, clean, first + attending, until, column, edits.get("z", []))
        if in_mlp < until - first:
            mlp = clean.mlp[prompt[in_mlp:], column - clean.first : stop - clean.first]
        hooks = self._hooks(edits, first, until - first, attending, column)
        if observer := self.executor.observer:
            rows = self._rows(first, until)
            observer.before_block(layer, self.hidden[first:until], start, rows)
            with observer.around_block(layer, column, rows):
                out = replay.block(layer, x, (column, stop), past, attention=attention, mlp=mlp, edits=hooks)
            observer.after_block(layer, out, column, rows)
            return out
        out = replay.block(layer, x, (column, stop), past, attention=attention, mlp=mlp, edits=hooks)
        if self.is_prefix and attending:
            self.keys_values.append(keys_values or past.keys_values)
        return out

    def _rows(self, first: int, until: int) -> list[tuple[int, int]]:
        """The spec and the prompt of each row, as indices into the sweep's."""
        wave, each = self.wave, len(self.group.prompts)
        return [
            (wave.specs[self.group.specs[row // each]], wave.prompts[self.group.prompts[row % each]])
            for row in range(first, until)
        ]

    def _hooks(
        self, edits: dict[Stage, list[DeviceEdits]], first: int, count: int, attending: int, column: int
    ) -> dict[str, Callable[[Tensor], None]]:
        """Edits in place by stage, for `count` rows from `first` on, of which the first `attending` run through attention."""
        hooks: dict[str, Callable[[Tensor], None]] = {}
        for stage, at_stage in edits.items():
            reach = attending if stage in INSIDE_ATTENTION else count
            here = [edit for edit in at_stage if (part := edit.entries(first, first + reach)).start < part.stop]
            if here:
                heads = self.executor.kv_heads if stage in ("k", "v") else self.executor.heads
                hooks[stage] = _apply_all(here, first, column, heads)
        return hooks

    def _set_past(self, past: Past, clean: CleanLayer, first: int, count: int) -> None:
        """Set the keys and values of the columns before a group's: the clean prompt's, or those of its prefix group."""
        each, start = len(self.group.prompts), self.group.start
        aligned = not (first % each or count % each)
        if self.prefix is None:
            keys, values = clean.keys[:, :, :start], clean.values[:, :, :start]
            which = self.prompts if aligned else self.prompt[first : first + count]
            shared, alternating = (keys[which], values[which]), True
        else:
            specs = (
                np.arange(first, first + count, each) // each if aligned else np.arange(first, first + count) // each
            )
            shared, alternating = self._prefix_keys_values(clean, specs), False
        if aligned:
            past.shared = (*shared, alternating)
        elif past.before is None:
            past.before = shared
        else:
            past.before = tuple(torch.cat(pair, 2) for pair in zip(shared, past.before, strict=True))  # type: ignore[assignment]

    def _prefix_keys_values(self, clean: CleanLayer, specs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Keys and values before this group's columns, for some specs: the prefix group's, clean before its first column."""
        assert self.prefix is not None and self.group.prefix_rows is not None
        start, device = self.group.start, clean.keys.device
        rows = torch.from_numpy(self.group.prefix_rows[specs]).to(device)
        found = []
        for which, of_clean in enumerate((clean.keys, clean.values)):
            x = of_clean[self.prompts[:1], :, :start].repeat(len(specs), 1, 1, 1)
            if self.prefix.keys_values:
                of_prefix = torch.cat([pair[which] for pair in self.prefix.keys_values])
                entered = rows < len(of_prefix)
                x[entered, :, self.prefix.group.start :] = of_prefix[rows[entered]].to(device)
            found.append(x)
        return found[0], found[1]

    def _cached_attention(
        self, layer: int, clean: CleanLayer, first: int, until: int, column: int, edits: list[DeviceEdits]
    ) -> Float[Tensor, "row pos d_model"]:
        """Attention output of rows that enter after attention: the clean run's, plus what edits of z add to it."""
        executor, prompt = self.executor, self.prompt[first:until]
        parts = [(edit, edit.entries(first, until)) for edit in edits]
        parts = [(edit, entries) for edit, entries in parts if entries.start < entries.stop]
        weight = executor.replay.projection(layer)
        # The output is recomputed rather than updated if most heads change (the sum is close to 0 and mostly rounding error,
        # which a later norm may amplify), and in half precision, where the sum would be rounded twice.
        recompute = weight is None or weight.dtype.itemsize < 4
        recompute |= any(edit.order or 2 * edit.max_heads > executor.heads for edit, _ in parts)
        if parts and recompute:
            z = clean.z[prompt, column - clean.first : self.group.stop - clean.first]
            for edit, _ in parts:
                edit.apply(z, first, column, executor.heads)
            return executor.replay.module("attention_value_output", layer)(z)
        output = clean.attention[prompt, column - clean.first : self.group.stop - clean.first]
        flat, z = output.view(-1, output.shape[-1]), clean.z.reshape(-1, clean.z.shape[-1] // executor.heads)
        for edit, entries in parts:
            assert weight is not None
            order = np.argsort(edit.head_numbers[entries], kind="stable") + entries.start
            rows, columns, heads = (x[order] for x in (edit.row_numbers, edit.column_numbers, edit.head_numbers))
            counts = np.bincount(heads)
            which, counts = np.flatnonzero(counts), counts[counts > 0]
            prompts = self.group.prompts[rows % len(self.group.prompts)]
            of_clean = (prompts * clean.z.shape[1] + columns - clean.first) * executor.heads + heads
            target = (rows - first) * output.shape[1] + columns - column
            of_clean, target, order = (torch.from_numpy(x).to(z.device) for x in (of_clean, target, order))
            old = z[of_clean]
            change = edit.edited(old, order) - old
            by_head = weight.view(executor.heads, -1, weight.shape[-1])
            if (counts == counts[0]).all():  # one product for all heads
                own = by_head if len(which) == executor.heads else by_head[torch.from_numpy(which).to(z.device)]
                flat.index_add_(0, target, (change.view(len(which), -1, change.shape[-1]) @ own).flatten(0, 1))
                continue
            for head, some, at in zip(which, change.split(counts.tolist()), target.split(counts.tolist()), strict=True):
                flat.index_add_(0, at, some @ by_head[head])
        return output


class _NotFiniteError(Exception):
    def __init__(self, row: int) -> None:
        self.row = row


def _append(common: Tensor, own: Tensor, dim: int) -> Tensor:
    """Append each prompt's own columns to those that all prompts share, `1 ...`."""
    return torch.cat([common.expand(len(own), *common.shape[1:]), own], dim)


def _apply_all(edits: list[DeviceEdits], first: int, column: int, heads: int) -> Callable[[Tensor], None]:
    def edit(x: Tensor) -> None:
        for batch_edits in edits:
            batch_edits.apply(x, first, column, heads)

    return edit
