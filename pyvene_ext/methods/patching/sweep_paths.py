"""Path patching on the sweep engine: all senders of a batch in one run with attention frozen, then all receivers in another.

With attention frozen, a sender's change stays in the columns where it is patched and propagates through MLPs and norms alone.
These rows are recorded at the receivers, and the recorded values become the patches of an ordinary sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from modelcards import FIELD_NAMES, Taps, dimensions
from pyvene_ext.engine.measure import Metric
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.sweep.execute import Executor, Frozen
from pyvene_ext.engine.sweep.plan import Plan, default_budget, make_plan
from pyvene_ext.engine.sweep.run import SweepBar, plan_resolved, sweep_resolved
from pyvene_ext.intervenable.statistics import Place
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.hooks import hook_component
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.replay import Replay
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.joint import Spec, members
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.specs.sources import Recorded


def sweep_paths(
    resolved: Resolved,
    paths: Sequence[PathPatch],
    metric: Metric,
    plans: Sequence[Plan],
    *,
    memory: int | None,
    store: Path | None,
    progress: bool,
) -> tuple[Float32[np.ndarray, " prompt"], Float32[np.ndarray, "path prompt"]]:
    """Patch paths: all of them freeze MLPs or none does, none is `direct`, and the receivers of each are independent.

    The sweep of the receivers' patches is saved in `store`; a resumed run computes the patches' values again.

    Args:
        resolved: the senders' patches on the pairs, with statistics.
        paths: the paths.
        metric: the metric.
        plans: of the senders' runs (`plan_paths`).
        memory: as for `sweep`.
        store: a folder for the stores of the receivers' sweeps.
        progress: show a bar.

    Returns:
        The metric of the untouched base, and with each path patched.
    """
    (freeze_mlps,) = {path.freeze_mlps for path in paths}
    model, base = resolved.model, resolved.prompts
    clean, found = np.empty(len(base), np.float32), np.empty((len(paths), len(base)), np.float32)
    senders = {path.sender_name: path.sender_patch for path in paths}
    sending = replace(resolved, specs=tuple(senders.values()))
    row = {name: n for n, name in enumerate(senders)}
    at_end = [n for n, path in enumerate(paths) if path.receivers == ("logits",)]
    others = [n for n in range(len(paths)) if n not in set(at_end)]
    for number, plan in enumerate(plans):
        subset = list(plan.subset)
        recorder = Recorder(Replay(model), sending, list(senders))
        for path in paths:
            recorder.add([node for node in path.receiver_nodes if node.site != "logits"])
        frozen: tuple[Frozen, ...] = ("attention", "mlp") if freeze_mlps else ("attention",)
        executor = Executor(sending, metric, plan, frozen, recorder)
        to_logits = np.empty((len(senders), len(base)), np.float32)
        waves = range(len(plan.waves))
        with evaluating(model), no_gradients(model), SweepBar(plan, waves, "senders", progress) as bar:
            for at, wave in enumerate(plan.waves):
                here = np.ix_(wave.specs, wave.prompts)
                clean[list(wave.prompts)], to_logits[here] = executor.run(wave, bar.advance)
                bar.finish(at)
        found[np.ix_(at_end, subset)] = to_logits[[row[paths[n].sender_name] for n in at_end]][:, subset]
        if others:
            specs: list[Spec] = [paths[n].receiver_patches(paths[n].positions, paths[n].sender_name) for n in others]
            recorded = Recorded(recorder.recorded, resolved.sources.statistics.prompts.hash)
            received = resolve(specs, model, base, recorded=recorded).with_directions(resolved.sources.directions)
            through = sweep_resolved(
                received,
                metric,
                plan_resolved(received, metric, memory=memory, subset=subset),
                store=None if store is None else store / str(number),
                progress=progress,
            )
            found[np.ix_(others, subset)] = through.intervened
    return clean, found


def plan_paths(resolved: Resolved, paths: Sequence[PathPatch], memory: int | None) -> list[Plan]:
    """Plan the senders' runs, on some prompts at a time, so that what is recorded fits the memory.

    Args:
        resolved: the senders' patches on the pairs.
        paths: the paths.
        memory: as for `sweep`.

    Returns:
        One plan per chunk of prompts.

    Raises:
        ValueError: the model takes latent steps on these prompts, or the memory does not suffice.
    """
    refuse_latent_steps(resolved.model, resolved.prompts.input_ids)
    sending = replace(resolved, specs=tuple({path.sender_name: path.sender_patch for path in paths}.values()))
    budget = default_budget(resolved.model, memory)
    return [make_plan(sending, subset, budget) for subset in _chunks(resolved, paths, budget.memory)]


def _chunks(resolved: Resolved, paths: Sequence[PathPatch], memory: int) -> Iterator[list[int]]:
    """Cut the prompts into chunks for which the recorded values fit the memory."""
    model, base = resolved.model, resolved.prompts
    d = dimensions(model.config)
    wanted = {(path.sender_name, node) for path in paths for node in path.receiver_nodes if node.site != "logits"}
    a_token = sum(d["d_model"] if node.head is None else d["d_head"] for _, node in wanted) * model.dtype.itemsize
    chunk: list[int] = []
    full = 0
    for prompt in sorted(range(len(base)), key=lambda prompt: base.input_ids[prompt]):
        size = a_token * max(len(resolved.tokens[path.positions][prompt]) for path in paths)
        if chunk and full + size > memory:
            yield chunk
            chunk, full = [], 0
        chunk.append(prompt)
        full += size
    yield chunk


class Recorder:
    """Records the inputs of receivers, in rows with one patched sender each, at the positions where it is patched.

    `values` holds, by sender, place and prompt, `pos d`, or `pos head d` for the heads that `receivers` lists at that place.

    Args:
        replay: the model's blocks.
        senders: the senders' patches on the pairs.
        names: of the senders.
    """

    def __init__(self, replay: Replay, senders: Resolved, names: Sequence[str]) -> None:
        self.replay, self.senders, self.names = replay, senders, names
        self.receivers: dict[Place, list[int | None]] = {}
        self.values: dict[tuple[str, Place, int], Tensor] = {}

    def add(self, nodes: Sequence[Node]) -> None:
        """Record these receivers too."""
        for site, layer, head in nodes:
            heads = self.receivers.setdefault((site, layer), [])
            if head not in heads:
                heads.append(head)

    def recorded(self, path: str, place: Place, prompt: int, heads: tuple[int, ...] | None) -> Tensor:
        """Look up the recorded input of receivers.

        Args:
            path: the name of the sender's run.
            place: site and layer of the receivers.
            prompt: index of the pair.
            heads: which heads, for sites with heads.

        Returns:
            `pos head d`, or `pos d` without heads, at the sender's positions.
        """
        value = self.values[path, place, prompt]
        return value if heads is None else value[:, [self.receivers[place].index(head) for head in heads]]

    def before_block(self, layer: int, hidden: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """Record what enters a block, and its queries, keys and values.

        Args:
            layer: the block's.
            hidden: what enters it, `row pos d_model`.
            column: the first column that the rows hold.
            rows: each row's sender and prompt.
        """
        self._keep("resid_pre", layer, hidden, column, rows)
        sites = [site for site in ("q", "k", "v") if (site, layer) in self.receivers]
        if sites:
            normed = self.replay.attention_input(layer, hidden, (column, column + hidden.shape[1]))
        for site in sites:
            by_head = self.replay.projected(site, layer, normed).unflatten(-1, (-1, self._d_head))
            self._keep(site, layer, by_head[:, :, self.receivers[site, layer]], column, rows)

    @contextmanager
    def around_block(self, layer: int, column: int, rows: list[tuple[int, int]]) -> Iterator[None]:
        """Record the MLP's input, and the stream between attention and MLP.

        Args:
            layer: the block's.
            column: the first column that the rows hold.
            rows: each row's sender and prompt.

        Yields:
            None: while the block runs.
        """
        sites = [site for site in ("mlp_in", "resid_mid") if (site, layer) in self.receivers]
        model, card = self.replay.model, self.replay.card
        with ExitStack() as stack, Taps(model, card, [(FIELD_NAMES[site], layer) for site in sites]):
            for site in sites:
                keep = partial(self._keep, site, layer, column=column, rows=rows)
                hook_component(model, (FIELD_NAMES[site], layer), keep, stack)
            yield

    def after_block(self, layer: int, out: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """Record what leaves a block.

        Args:
            layer: the block's.
            out: what leaves it, `row pos d_model`.
            column: the first column that the rows hold.
            rows: each row's sender and prompt.
        """
        self._keep("resid_post", layer, out, column, rows)

    @property
    def _d_head(self) -> int:
        return dimensions(self.replay.model.config)["d_head"]

    def _keep(self, site: str, layer: int, x: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        if (site, layer) not in self.receivers:
            return
        for row, (spec, prompt) in zip(x, rows, strict=True):
            (sender,) = members(self.senders.specs[spec])
            at = np.array(self.senders.tokens[sender.positions][prompt]) - column
            there = torch.from_numpy(at >= 0)  # the last block runs the last column only, and no other matters there
            value = x.new_zeros(len(at), *row.shape[1:])
            value[there] = row[at[at >= 0]]
            self.values[self.names[spec], (site, layer), prompt] = value.cpu()
