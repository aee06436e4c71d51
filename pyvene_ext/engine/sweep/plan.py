"""What a sweep will do and what it costs: waves that fit a budget of memory.

A wave is some specs on some prompts of one length (`layout.py` says how it runs). The plan depends on specs, prompts, sizes of
the model and budget alone, so that a second start, and every process of several, makes the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedModel

from modelcards import dimensions, n_layers
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.engine.sweep.layout import (
    Columns,
    Edit,
    Wave,
    edits_of,
    shared_columns,
    wave_groups,
)
from pyvene_ext.models.devices import input_device, weights_on_a_device
from pyvene_ext.prompts.tokenized import TokenizedPrompts

MIB = 2**20
CLEAN_TOKENS = (
    4096  # more prompts in a wave than make this many tokens save nothing and lose more when a process is killed
)


@dataclass(frozen=True)
class Budget:
    """What a plan is made to fit.

    Attributes:
        memory: working memory in bytes, besides the weights.
        call_tokens: the most tokens in one call of a block; more make it no faster on that kind of device.
    """

    memory: int
    call_tokens: int

    @property
    def call_memory(self) -> int:
        """The part of the memory for one call of a block; the rest is for what stays from layer to layer."""
        return self.memory // 4


def default_budget(model: PreTrainedModel, memory: int | None) -> Budget:
    """The budget for a model; memory is half of what the weights take unless given, at least 256 MiB.

    So a sweep takes no more than about one and a half times what a plain forward pass does, the same on every machine. Of a model
    spread over several devices the part on one of them counts, because the work goes through them one after the other.
    """
    if memory is not None and (type(memory) is not int or memory <= 0):
        raise ValueError(f"memory must be a whole number of bytes above 0, not {memory!r}.")
    if memory is None:
        memory = max(256 * MIB, weights_on_a_device(model) // 2)
    if input_device(model).type != "cpu":
        return Budget(memory, 65536)
    # Of a small model the calls themselves take longest: more tokens in each, as long as the MLP's activations stay in cache.
    return Budget(memory, max(2048, 2 * MIB // (dimensions(model.config)["d_mlp"] * model.dtype.itemsize)))


@dataclass(frozen=True)
class Plan:
    """The waves of a sweep, in the order in which they run, and what they cost.

    Attributes:
        waves: indices into `edits` and `prompts`.
        budget: what each of them fits.
        edits: of every spec.
        resolved: the specs on all prompts of the sweep.
        layers: blocks of the model.
        which: the prompts that are run, in the order of the result's columns.
    """

    waves: tuple[Wave, ...]
    budget: Budget
    edits: Sequence[list[Edit]]
    resolved: Resolved
    layers: int
    which: tuple[int, ...]

    @property
    def prompts(self) -> TokenizedPrompts:
        """The prompts of the sweep, run or not."""
        return self.resolved.prompts

    @cached_property
    def token_layers(self) -> int:
        """How many times one token goes through one block, whole or in part; of the last block only the last token counts."""
        total = 0
        for wave in self.waves:
            shared, length = shared_columns(wave.prompts, self.prompts), len(self.prompts.input_ids[wave.prompts[0]])
            clean = shared + (length - shared) * len(wave.prompts)
            total += clean * (self.layers - 1) + len(wave.prompts)
            groups = wave_groups(wave, self.edits, self.resolved, self.layers)
            total += sum(group.token_layers(length) for group in groups)
        return total

    @cached_property
    def plain_token_layers(self) -> int:
        """The same with one forward pass an intervention and prompt."""
        return len(self.edits) * self.layers * sum(len(self.prompts.input_ids[prompt]) for prompt in self.which)

    def summary(self) -> str:
        """The plan in a few lines."""
        share = self.token_layers / self.plain_token_layers
        return (
            f"{len(self.edits)} interventions x {len(self.which)} prompts in {len(self.waves)} batches\n"
            f"arithmetic: {self.token_layers:.3g} token-layers, {share:.1%} of one forward pass an intervention and prompt\n"
            f"memory: up to {self.budget.memory / MIB:.0f} MiB besides the weights"
        )


class Sizes:
    """Bytes of the activations of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        d = dimensions(model.config)
        self.layers = n_layers(model.config)
        self._item = model.dtype.itemsize
        self._kv, self._z = d["n_kv_head"] * d["d_head"], d["n_head"] * d["d_head"]
        self._d, self._mlp, self._heads = d["d_model"], d["d_mlp"], d["n_head"]
        self.token = d["d_model"] * self._item  # of a row's hidden state
        self.clean_token = (5 * self._d + 4 * self._kv + 3 * self._z + 3 * self._mlp) * self._item
        self._scores = 0 if model.config._attn_implementation == "sdpa" else 3 * d["n_head"] * max(4, self._item)

    def call(self, columns: int, length: int) -> int:
        """What one call of a block needs for a row of so many columns, of a prompt of that length."""
        of_tokens = columns * (6 * self._d + 4 * self._z + 4 * self._kv + 3 * self._mlp) * self._item
        of_keys = 2 * length * (2 * self._kv + (self._z if columns > 1 else 0)) * self._item
        return of_tokens + of_keys + columns * length * self._scores


def make_plan(resolved: Resolved, which: Sequence[int], budget: Budget) -> Plan:
    """Cut the sweep of some prompts into waves that fit the budget: as many prompts at once as do, or one and some of the specs.

    Raises ValueError if the memory does not suffice for one intervention on the longest prompt.
    """
    prompts, specs, sizes = resolved.prompts, resolved.specs, Sizes(resolved.model)
    buckets: dict[int, list[int]] = defaultdict(list)
    # By their tokens, so that prompts with a common beginning run together.
    for prompt in sorted(which, key=lambda prompt: prompts.input_ids[prompt]):
        buckets[len(prompts.input_ids[prompt])].append(prompt)
    edits = [edits_of(spec, sizes.layers) for spec in specs]
    by_entry = sorted(range(len(specs)), key=lambda spec: edits[spec][0].layer)
    waves: list[Wave] = []
    for length, bucket in sorted(buckets.items()):
        at = Columns(bucket, resolved, sizes.layers)
        carried = np.zeros((len(specs), len(bucket)), int)  # bytes of every row
        for spec in by_entry:
            for (start, *_), mine in at.entries(at.placed(edits[spec])).items():
                carried[spec, mine] = (length - start) * sizes.token
        clean = length * sizes.clean_token
        room = budget.memory - budget.call_memory - clean
        if min(room, 3 * budget.call_memory - 4 * sizes.call(length, length)) < carried.max(initial=0):
            needed = max(4 * sizes.call(length, length), 4 * (clean + int(carried.max())) // 3) / MIB
            raise ValueError(
                f"{budget.memory / MIB:.1f} MiB of working memory are too little for prompts of {length} tokens; allow at least "
                f"{needed + 0.1:.1f} MiB."
            )
        # All prompts of a spec go through a block together.
        most = max(1, min(CLEAN_TOKENS // length, budget.call_memory // sizes.call(length, length)))
        # As many prompts together as fit with all specs; where not even one does, one prompt with some of the specs.
        alone = carried.sum(0)
        start = 0
        while start < len(bucket):
            stop = start + 1
            while stop < len(bucket) and stop - start < most and _belongs(bucket[start : stop + 1], prompts):
                if alone[start : stop + 1].sum() + clean * (stop - start) > room:
                    break
                stop += 1
            together = tuple(bucket[start:stop])
            waves += [Wave(together, part) for part in _parts(by_entry, carried[:, start:stop].sum(1), room)]
            start = stop
    return Plan(tuple(waves), budget, edits, resolved, sizes.layers, tuple(which))


def _belongs(some: list[int], prompts: TokenizedPrompts) -> bool:
    """Whether the last of some prompts begins like the others do, if those begin alike."""
    return shared_columns(some, prompts) >= shared_columns(some[:-1], prompts) // 2


def _parts(specs: list[int], sizes: np.ndarray, room: int) -> list[tuple[int, ...]]:
    """The specs in their order, cut where the room is full."""
    parts, full = [[specs[0]]], sizes[specs[0]]
    for spec in specs[1:]:
        if full + sizes[spec] > room:
            parts.append([])
            full = 0
        parts[-1].append(spec)
        full += sizes[spec]
    return [tuple(part) for part in parts]
