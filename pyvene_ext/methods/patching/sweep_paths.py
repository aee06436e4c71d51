"""Path patching on the sweep engine: all senders of a batch in one run with attention frozen, then all receivers in another.

With attention frozen, what a sender changes stays in the columns where it is patched and goes up through MLPs and norms alone.
Such rows are recorded at the receivers, and the receivers' values go in as patches of an ordinary sweep.
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
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.sweep.execute import Executor, Frozen
from pyvene_ext.engine.sweep.plan import Plan, default_budget, make_plan
from pyvene_ext.engine.sweep.run import plan_resolved, sweep_resolved
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
    metric: str,
    plans: Sequence[Plan],
    *,
    memory: int | None,
    store: Path | None,
    progress: bool,
) -> tuple[Float32[np.ndarray, " prompt"], Float32[np.ndarray, "path prompt"]]:
    """The metric of the untouched base, and with each path patched; `resolved` holds the senders' patches, measured.

    What receivers do with what they are given is kept in `store`; what they are given is found out again.

    All paths freeze MLPs or none does, none is `direct`, and each has `one_place`.
    """
    (freeze_mlps,) = {path.freeze_mlps for path in paths}
    model, base = resolved.model, resolved.prompts
    clean, found = np.empty(len(base), np.float32), np.empty((len(paths), len(base)), np.float32)
    senders = {path.source_name: path.sending for path in paths}
    sending = replace(resolved, specs=tuple(senders.values()))
    row = {name: n for n, name in enumerate(senders)}
    at_end = [n for n, path in enumerate(paths) if path.receivers == ("logits",)]
    others = [n for n in range(len(paths)) if n not in set(at_end)]
    for number, plan in enumerate(plans):
        subset = list(plan.which)
        recorder = Recorder(Replay(model), sending, list(senders))
        for path in paths:
            recorder.want([node for node in path.nodes if node.site != "logits"])
        frozen: tuple[Frozen, ...] = ("attention", "mlp") if freeze_mlps else ("attention",)
        executor = Executor(sending, metric, plan, frozen, recorder)
        to_logits = np.empty((len(senders), len(base)), np.float32)
        with evaluating(model), no_gradients(model):
            for wave in plan.waves:
                clean[list(wave.prompts)], to_logits[np.ix_(wave.specs, wave.prompts)] = executor.run(wave)
        found[np.ix_(at_end, subset)] = to_logits[[row[paths[n].source_name] for n in at_end]][:, subset]
        if others:
            specs: list[Spec] = [paths[n].received(paths[n].positions, paths[n].source_name) for n in others]
            recorded = Recorded(recorder.recorded, resolved.sources.measured.prompts.hash)
            received = resolve(specs, model, base, recorded=recorded).with_directions(resolved.sources.directions)
            through = sweep_resolved(
                received,
                metric,
                plan_resolved(received, memory=memory, subset=subset),
                store=None if store is None else store / str(number),
                progress=progress,
            )
            found[np.ix_(others, subset)] = through.intervened
    return clean, found


def plan_paths(resolved: Resolved, paths: Sequence[PathPatch], memory: int | None) -> list[Plan]:
    """The senders' runs, some prompts at a time, so that what is recorded of these fits the memory; ValueError for too little."""
    refuse_latent_steps(resolved.model, resolved.prompts.input_ids)
    sending = replace(resolved, specs=tuple({path.source_name: path.sending for path in paths}.values()))
    budget = default_budget(resolved.model, memory)
    return [make_plan(sending, subset, budget) for subset in _chunks(resolved, paths, budget.memory)]


def _chunks(resolved: Resolved, paths: Sequence[PathPatch], memory: int) -> Iterator[list[int]]:
    """The prompts, cut so that what is recorded of some fits the memory."""
    model, base = resolved.model, resolved.prompts
    d = dimensions(model.config)
    wanted = {(path.source_name, node) for path in paths for node in path.nodes if node.site != "logits"}
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
    """Keeps what receivers are given in rows with one sender patched each, at the positions where it is patched.

    `values` has by sender, place and prompt `pos d`, or `pos head d` of the heads `wanted` at that place.
    """

    def __init__(self, replay: Replay, senders: Resolved, names: Sequence[str]) -> None:
        self.replay, self.senders, self.names = replay, senders, names
        self.wanted: dict[Place, list[int | None]] = {}
        self.values: dict[tuple[str, Place, int], Tensor] = {}

    def want(self, nodes: Sequence[Node]) -> None:
        """Have these receivers recorded."""
        for site, layer, head in nodes:
            heads = self.wanted.setdefault((site, layer), [])
            if head not in heads:
                heads.append(head)

    def recorded(self, path: str, place: Place, prompt: int, heads: tuple[int, ...] | None) -> Tensor:
        """What these heads of a place (or the place) were given, `pos head d` or `pos d`."""
        value = self.values[path, place, prompt]
        return value if heads is None else value[:, [self.wanted[place].index(head) for head in heads]]

    def before(self, layer: int, hidden: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """What enters a block, and its queries, keys and values."""
        self._keep("resid_pre", layer, hidden, column, rows)
        sites = [site for site in ("q", "k", "v") if (site, layer) in self.wanted]
        if sites:
            normed = self.replay.attention_input(layer, hidden, (column, column + hidden.shape[1]))
        for site in sites:
            by_head = self.replay.projected(site, layer, normed).unflatten(-1, (-1, self._d_head))
            self._keep(site, layer, by_head[:, :, self.wanted[site, layer]], column, rows)

    @contextmanager
    def during(self, layer: int, column: int, rows: list[tuple[int, int]]) -> Iterator[None]:
        """What the MLP is given, and the stream in the middle of a block."""
        sites = [site for site in ("mlp_in", "resid_mid") if (site, layer) in self.wanted]
        model, card = self.replay.model, self.replay.card
        with ExitStack() as stack, Taps(model, card, [(FIELD_NAMES[site], layer) for site in sites]):
            for site in sites:
                keep = partial(self._keep, site, layer, column=column, rows=rows)
                hook_component(model, (FIELD_NAMES[site], layer), keep, stack)
            yield

    def behind(self, layer: int, out: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        """What leaves a block."""
        self._keep("resid_post", layer, out, column, rows)

    @property
    def _d_head(self) -> int:
        return dimensions(self.replay.model.config)["d_head"]

    def _keep(self, site: str, layer: int, x: Tensor, column: int, rows: list[tuple[int, int]]) -> None:
        if (site, layer) not in self.wanted:
            return
        for row, (spec, prompt) in zip(x, rows, strict=True):
            (sender,) = members(self.senders.specs[spec])
            at = np.array(self.senders.tokens[sender.positions][prompt]) - column
            there = torch.from_numpy(at >= 0)  # the last block makes no more than the last column, and no more matters
            value = x.new_zeros(len(at), *row.shape[1:])
            value[there] = row[at[at >= 0]]
            self.values[self.names[spec], (site, layer), prompt] = value.cpu()
