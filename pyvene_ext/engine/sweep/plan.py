"""The plan of a sweep: waves that fit a memory budget, and what they cost.

A wave is some specs on some prompts of one length (`layout.py` says how it runs). The plan depends only on the specs, the
prompts, the sizes of the model and the budget, so that a resumed run, and every process of several, arrives at the same plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from numbers import Integral

import numpy as np
from transformers import PreTrainedModel

from modelcards import dimensions, n_layers
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.engine.sweep.layout import (
    EditLocator,
    StagedEdit,
    Wave,
    edits_of,
    shared_columns,
    wave_groups,
)
from pyvene_ext.io.errors import counted
from pyvene_ext.models.devices import input_device, weights_on_a_device
from pyvene_ext.prompts.tokenized import TokenizedPrompts

MIB = 2**20
# Most tokens of a wave's clean prompts: more save nothing, and lose more work when a process is killed.
CLEAN_TOKENS = 4096
METRIC_COPIES = 10  # of the logits that it reads, in float32, at worst: kl in float64


@dataclass(frozen=True)
class Budget:
    """What a plan has to fit.

    Attributes:
        memory: working memory in bytes, besides the weights.
        call_tokens: most tokens in one call of a block; beyond that a call is no faster on this kind of device.
    """

    memory: int
    call_tokens: int

    @property
    def call_memory(self) -> int:
        """Memory for one call of a block; the rest holds what is kept between layers."""
        return self.memory // 4


def default_budget(model: PreTrainedModel, memory: int | None, columns: int = 1) -> Budget:
    """Choose the budget for a model.

    By default a sweep takes no more than about one and a half times the memory of a plain forward pass, the same on every
    machine. If a model is spread over several devices, the weights on one of them count, because the work passes through the
    devices one after the other.

    Args:
        model: the model that is swept.
        memory: working memory in bytes; by default half of what the weights take, at least 256 MiB, and more if a metric reads
            many tokens of a prompt.
        columns: most tokens of a prompt that are read.

    Returns:
        Memory, and tokens per call for the model's device.

    Raises:
        ValueError: `memory` is not a positive whole number.
    """
    check_memory(memory)
    if memory is None:
        reading = 2 * METRIC_COPIES * ActivationSizes(model).logits(columns)
        memory = max(256 * MIB, weights_on_a_device(model) // 2, reading)
    if input_device(model).type != "cpu":
        return Budget(int(memory), 65536)
    # In a small model the overhead of calls dominates: more tokens in each, as long as the MLP's activations stay in cache.
    return Budget(int(memory), max(2048, 2 * MIB // (dimensions(model.config)["d_mlp"] * model.dtype.itemsize)))


def check_memory(memory: int | None) -> None:
    """Refuse a memory that is no whole number of bytes.

    Args:
        memory: bytes, or None for a default.

    Raises:
        ValueError: it is something else.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, Integral) or memory <= 0):
        raise ValueError(f"memory must be a whole number of bytes above 0, not {memory!r}.")


def prompts_at_once(model: PreTrainedModel, n_prompts: int, each: int, batch_size: int, memory: int | None) -> int:
    """Choose the size of batches: at most `batch_size`, as many as fit into memory, and all about as large.

    Args:
        model: the model that is run.
        n_prompts: number of prompts, at least 1.
        each: bytes that a prompt takes.
        batch_size: the largest number of prompts.
        memory: bytes besides the weights; by default half of what the weights take, at least 512 MiB, so that small models are
            given batches that keep a processor busy; or one prompt if that takes more.

    Returns:
        The number of prompts.

    Raises:
        ValueError: `memory` is not a positive whole number, or does not hold one prompt; says how much that takes.
    """
    check_memory(memory)
    if memory is None:
        memory = max(each, 512 * MIB, weights_on_a_device(model) // 2)
    if each > memory:
        raise ValueError(
            f"{memory / MIB:.1f} MiB of working memory do not hold what one prompt takes; allow at least "
            f"{ceil(10 * each / MIB) / 10:.1f} MiB ({each / MIB / 1024 + 5e-4:.3f} GiB)."
        )
    n_batches = ceil(n_prompts / min(batch_size, memory // each))
    return ceil(n_prompts / n_batches)


@dataclass(frozen=True)
class Plan:
    """The waves of a sweep, in the order in which they run, and their cost.

    Attributes:
        waves: specs and prompts, as indices into `edits` and `prompts`.
        budget: what each wave fits.
        edits: of every spec.
        resolved: the specs on all prompts of the sweep.
        layers: number of blocks of the model.
        subset: the prompts that are run, in the order of the result's columns.
    """

    waves: tuple[Wave, ...]
    budget: Budget
    edits: Sequence[list[StagedEdit]]
    resolved: Resolved
    layers: int
    subset: tuple[int, ...]

    @property
    def prompts(self) -> TokenizedPrompts:
        """All sequences of the sweep, including those of prompts outside of `subset`."""
        return self.resolved.sequences.prompts

    @cached_property
    def columns(self) -> list[int]:
        """The sequences of the prompts of `subset`, in their order."""
        return [sequence for prompt in self.subset for sequence in self.resolved.sequences.of_prompt[prompt]]

    @cached_property
    def token_layers(self) -> int:
        """How many times one token goes through one block, whole or in part; in the last block only what is read counts."""
        total = 0
        for wave in self.waves:
            shared, length = shared_columns(wave.prompts, self.prompts), len(self.prompts.input_ids[wave.prompts[0]])
            first_read = self.resolved.sequences.first_read[wave.prompts[0]]
            # In all blocks but the last one, and in that.
            for layers, first in ((self.layers - 1, 0), (1, first_read)):
                own = (length - max(shared, first)) * len(wave.prompts)
                total += layers * (max(0, shared - first) + own)
            groups = wave_groups(wave, self.edits, self.resolved, self.layers)
            total += sum(group.token_layers(first_read) for group in groups)
        return total

    @cached_property
    def plain_token_layers(self) -> int:
        """The same with one forward pass per intervention and prompt."""
        return len(self.edits) * self.layers * sum(len(self.prompts.input_ids[prompt]) for prompt in self.columns)

    @property
    def passes(self) -> float:
        """The cost in forward passes over all prompts of `subset`."""
        return len(self.edits) * self.token_layers / self.plain_token_layers

    def summary(self) -> str:
        """Describe the plan in a few lines."""
        share = self.token_layers / self.plain_token_layers
        return (
            f"{counted(len(self.edits), 'intervention')} x {counted(len(self.subset), 'prompt')} in "
            f"{counted(len(self.waves), 'batch')}\n"
            f"arithmetic: {self.token_layers:.3g} token-layers, {share:.1%} of one forward pass per intervention and prompt\n"
            f"memory: up to {self.budget.memory / MIB:.0f} MiB besides the weights"
        )


class ActivationSizes:
    """Bytes that the activations of a model take."""

    def __init__(self, model: PreTrainedModel) -> None:
        d = dimensions(model.config)
        self.layers = n_layers(model.config)
        self._item = model.dtype.itemsize
        self._kv, self._z = d["n_kv_head"] * d["d_head"], d["n_head"] * d["d_head"]
        self._d, self._mlp, self._heads = d["d_model"], d["d_mlp"], d["n_head"]
        self.token = d["d_model"] * self._item  # one token of a row between layers
        self.clean_token = (5 * self._d + 4 * self._kv + 3 * self._z + 3 * self._mlp) * self._item
        self._logits = model.get_output_embeddings().weight.shape[0] * max(4, self._item)
        self._scores = 0 if model.config._attn_implementation == "sdpa" else 3 * d["n_head"] * max(4, self._item)

    def call(self, columns: int, length: int) -> int:
        """Bytes that one call of a block needs for one row.

        Args:
            columns: tokens of the row that are run.
            length: tokens of its prompt.

        Returns:
            An upper estimate.
        """
        tokens = columns * (6 * self._d + 4 * self._z + 4 * self._kv + 3 * self._mlp) * self._item
        keys = 2 * length * (2 * self._kv + (self._z if columns > 1 else 0)) * self._item
        return tokens + keys + columns * length * self._scores

    def graph(self, length: int) -> int:
        """Bytes that a forward pass of one row keeps for the backward pass, in all layers, with the last column's logits.

        Args:
            length: tokens of the row.

        Returns:
            An upper estimate.
        """
        token = (12 * self._d + 4 * self._z + 4 * self._kv + 3 * self._mlp) * self._item
        patterns = 3 * self._heads * length * max(4, self._item)
        return self.layers * length * (token + patterns) + METRIC_COPIES * self._logits

    def logits(self, columns: int) -> int:
        """Bytes that the logits of one row take, besides those of the last column.

        Args:
            columns: tokens of the row that are read.

        Returns:
            The bytes; a metric needs up to `METRIC_COPIES` times as many.
        """
        return (columns - 1) * self._logits


def make_plan(resolved: Resolved, which: Sequence[int], budget: Budget) -> Plan:
    """Cut a sweep into waves that fit the budget.

    A wave has all specs on as many prompts as fit, or, if not even one prompt fits with all specs, one prompt with some of them.

    Args:
        resolved: the specs on the prompts.
        which: indices of the prompts that are run.
        budget: what each wave has to fit.

    Returns:
        The plan.

    Raises:
        ValueError: the memory does not suffice for one intervention on the longest prompt.
    """
    prompts, specs, sizes = resolved.sequences.prompts, resolved.specs, ActivationSizes(resolved.model)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    # Sorted by their tokens, so that prompts that share a prefix run together.
    sequences = [sequence for prompt in which for sequence in resolved.sequences.of_prompt[prompt]]
    for prompt in sorted(sequences, key=lambda prompt: prompts.input_ids[prompt]):
        buckets[len(prompts.input_ids[prompt]), resolved.sequences.first_read[prompt]].append(prompt)
    edits = [edits_of(spec, sizes.layers) for spec in specs]
    by_entry = sorted(range(len(specs)), key=lambda spec: edits[spec][0].layer)
    waves: list[Wave] = []
    for (length, first_read), bucket in sorted(buckets.items()):
        locator = EditLocator(bucket, resolved, sizes.layers)
        row_bytes = np.zeros((len(specs), len(bucket)), int)
        for spec in by_entry:
            for (start, *_), columns in locator.entry_points(locator.locate(edits[spec])).items():
                row_bytes[spec, columns] = (length - start) * sizes.token
        logits = sizes.logits(length - first_read)
        clean = length * sizes.clean_token + logits
        most_bytes = int(row_bytes.max(initial=0))
        reading = METRIC_COPIES * logits + most_bytes
        available = budget.memory - budget.call_memory - clean
        blocks = min(available, 3 * budget.call_memory - 4 * sizes.call(length, length))
        if blocks < most_bytes or budget.memory < reading:
            needed = max(4 * (max(4 * sizes.call(length, length), clean) + most_bytes) // 3, reading) / MIB
            raise ValueError(
                f"{budget.memory / MIB:.1f} MiB of working memory are too little for prompts of {length} tokens; allow at least "
                f"{needed + 0.1:.1f} MiB."
            )
        # All prompts of a spec go through a block together.
        most = max(1, min(CLEAN_TOKENS // length, budget.call_memory // sizes.call(length, length)))
        prompt_bytes = row_bytes.sum(0)
        start = 0
        while start < len(bucket):
            stop = start + 1
            while stop < len(bucket) and stop - start < most and _shares_prefix(bucket[start : stop + 1], prompts):
                if prompt_bytes[start : stop + 1].sum() + clean * (stop - start) > available:
                    break
                stop += 1
            together = tuple(bucket[start:stop])
            spec_bytes = row_bytes[:, start:stop].sum(1)
            waves += [Wave(together, part) for part in _split_specs(by_entry, spec_bytes, available)]
            start = stop
    return Plan(tuple(waves), budget, edits, resolved, sizes.layers, tuple(which))


def _shares_prefix(some: list[int], prompts: TokenizedPrompts) -> bool:
    """Whether the last of some prompts has at least half of the prefix that the others share, if they share one."""
    return shared_columns(some, prompts) >= shared_columns(some[:-1], prompts) // 2


def _split_specs(specs: list[int], sizes: np.ndarray, available: int) -> list[tuple[int, ...]]:
    """Split specs, in their order, into parts of at most `available` bytes."""
    parts, used = [[specs[0]]], sizes[specs[0]]
    for spec in specs[1:]:
        if used + sizes[spec] > available:
            parts.append([])
            used = 0
        parts[-1].append(spec)
        used += sizes[spec]
    return [tuple(part) for part in parts]
