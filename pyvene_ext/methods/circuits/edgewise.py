"""A model in which every receiver reads a residual stream of its own.

    stream that a receiver reads = sum over senders that reach it of
        what the sender adds in this run     if the edge is kept
        the edge's ablated value             if not

computed for each receiver in the order in which they read, so that an ablated edge affects everything downstream. The receiver's
own norm and projection, attention and MLPs are the model's code.

`methods.attribution.senders` says what a sender adds and what an ablated edge carries. Biases of attention's output projection
belong to no sender and are those of the current run.

Only what a circuit can change is computed. Where a layer's heads (or its MLP) send nothing that is kept, or read nothing that is
kept while ablated edges carry what another run adds, their output is known from that run. Receivers are given their streams from
the senders they keep or from those they miss, whichever are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, head_shares, n_heads
from pyvene_ext.engine.measure import Metric
from pyvene_ext.methods.attribution.receivers import TOGETHER
from pyvene_ext.methods.circuits.circuit import exists
from pyvene_ext.models.devices import Workspace
from pyvene_ext.models.hooks import hook_component
from pyvene_ext.models.replay import PROJECTIONS, Past, Replay
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.graph import receiver_slices

Ids = Int[Tensor, "batch pos"]
Added = Float[Tensor, "batch sender pos d_model"]


@dataclass(frozen=True)
class PlainRun:
    """A run without ablated edges, or of one circuit.

    Attributes:
        added: what each sender adds, in float32.
        hidden: what enters each block, then what leaves the last.
        attention: the output of each attention module; empty for a circuit.
        mlp: the output of each MLP; empty for a circuit.
        projected: queries, keys and values of each layer before rotation, heads side by side, by site; empty for a circuit.
    """

    added: Added
    hidden: list[Float[Tensor, "batch pos d_model"]]
    attention: list[Float[Tensor, "batch pos d_model"]]
    mlp: list[Float[Tensor, "batch pos d_model"]]
    projected: list[dict[str, Float[Tensor, "batch pos d"]]]

    @property
    def last(self) -> Float[Tensor, "batch d_model"]:
        """The last block's output at the last token."""
        return self.hidden[-1][:, -1]


@dataclass(frozen=True)
class Ablated:
    """What ablated edges carry.

    Attributes:
        values: what each sender is taken to add; batch and pos may be 1 if it is the same everywhere.
        known: a run on the same prompts, whose activations stand where a circuit cannot change them or does not use them.
        is_run: whether the values are what the senders add in that run.
    """

    values: Float[Tensor, "#batch sender #pos d_model"]
    known: PlainRun
    is_run: bool
    _sums: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def summed(self, senders: slice) -> Float[Tensor, "#batch #pos d_model"]:
        """Sum the values of some senders, once for all circuits."""
        key = senders.start, senders.stop
        if key not in self._sums:
            self._sums[key] = self.values[:, senders].sum(1)
        return self._sums[key]

    @classmethod
    def by_run(cls, source: PlainRun) -> Ablated:
        """Take the values of another run, as activation patching does."""
        return cls(source.added, source, is_run=True)


class EdgewiseModel:
    """Runs circuits of a model on prompts of one length."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model; `evaluating` is the caller's."""
        self.replay, self.config = Replay(model), model.config
        self.exists = exists(model.config)
        self.heads = n_heads(model.config)
        outputs: list[Any] = [
            self.replay.module("attention_value_output", layer) for layer in range(self.replay.n_layers)
        ]
        self.biased = any(output.bias is not None for output in outputs)  # these biases belong to no sender
        self.blocks_run = 0  # rows x blocks, of all runs so far
        self.changes = Workspace()  # of one run of circuits
        self.readers = receiver_slices(model.config)

    def senders_of(self, layer: int) -> tuple[slice, slice]:
        """Where the senders of a layer are: its heads, its MLP."""
        first = 1 + layer * (self.heads + 1)
        return slice(first, first + self.heads), slice(first + self.heads, first + self.heads + 1)

    def plain(self, ids: Ids, *, recorded: bool = True) -> PlainRun:
        """Run prompts as the model does.

        Args:
            ids: the prompts, all of one length.
            recorded: keep what senders add and what blocks compute; without, only `last` and what enters blocks are there.

        Returns:
            The run.
        """
        hidden = self.replay.embed(ids.to(self.replay.device))
        if not recorded:
            run = PlainRun(hidden.new_empty(len(hidden), 0, *hidden.shape[1:]), [hidden], [], [], [])
            for layer in range(self.replay.n_layers):
                run.hidden.append(self.replay.block(layer, run.hidden[-1], (0, ids.shape[1]), Past()))
            self.blocks_run += len(hidden) * self.replay.n_layers
            return run
        added = hidden.new_empty(len(hidden), len(self.exists), *hidden.shape[1:], dtype=torch.float32)
        added[:, 0] = hidden
        run = PlainRun(added, [hidden], [], [], [])
        for layer in range(self.replay.n_layers):
            seen: dict[str, Tensor] = {}
            edits = {"mlp_out": _keep(seen, "mlp_contribution"), **{site: _keep(seen, site) for site in PROJECTIONS}}
            hidden = self.replay.block(layer, hidden, (0, ids.shape[1]), Past(), edits=edits, seen=seen)
            self.blocks_run += len(hidden)
            heads, mlp = self.senders_of(layer)
            added[:, heads], added[:, mlp] = self._shares(layer, seen), seen["mlp_contribution"][:, None]
            run.hidden.append(hidden)
            run.attention.append(seen["attention"])
            run.mlp.append(seen["mlp"])
            run.projected.append({site: seen[site] for site in PROJECTIONS})
        return run

    def one_circuit(self, ids: Ids, kept: Bool[np.ndarray, "sender receiver"], ablated: Ablated) -> PlainRun:
        """Run prompts through one circuit, for runs of others that start where they come to differ from it.

        Args:
            ids: the prompts, all of one length.
            kept: True for the edges of the circuit.
            ablated: what other edges carry.

        Returns:
            The run, with what senders add and what enters blocks.
        """
        state = _State(self, ids, kept[None], ablated)
        hidden = [self.replay.embed(ids.to(self.replay.device))]
        state.write(hidden[0][:, None])
        for layer in range(self.replay.n_layers):
            hidden.append(self._block(layer, hidden[-1], state))
        return PlainRun(state.values + state.changes[0], hidden, [], [], [])

    def circuits(
        self,
        ids: Ids,
        kept: Float[Tensor, "circuit sender receiver"] | Bool[np.ndarray, "circuit sender receiver"],
        ablated: Ablated,
        clean: PlainRun | None = None,
        start: int = 0,
    ) -> Float[Tensor, "circuit batch d_model"]:
        """Run prompts through circuits side by side.

        Args:
            ids: the prompts, all of one length.
            kept: True for the edges of each circuit. Or a share from 0 to 1 of each edge: as much of what the sender adds in this
                run, the rest being the ablated value; gradients with respect to it can be taken. With a further axis,
                `circuit batch sender receiver`, each prompt has circuits of its own.
            ablated: what other edges carry.
            clean: the plain run on these prompts; needed if `start` is not 0. Or the run of a circuit (`one_circuit`) from which
                these differ at receivers of block `start` and later only.
            start: the first block whose receivers miss edges, or others than in `clean`; blocks before it are not run again. The
                number of blocks, if only edges into the logits do.

        Returns:
            The stream that the logits read, at the last token, before the final norm.
        """
        state = _State(self, ids, kept, ablated)
        if start:
            assert clean is not None
            hidden = state.repeat(clean.hidden[start])
            state.write(state.repeat(clean.added[:, : self.senders_of(start)[0].start]))
        else:
            hidden = state.repeat(self.replay.embed(ids.to(self.replay.device)))
            state.write(hidden[:, None])
        for layer in range(start, self.replay.n_layers):
            hidden = self._block(layer, hidden, state)
        stream = state.streams(hidden[:, -1:], self.readers["logits", None])
        last = hidden[:, -1] if stream is None else stream[:, 0, 0]
        return last.unflatten(0, (-1, len(ids)))

    def with_clean(self, batch: Batch, plain: PlainRun, metric: Metric) -> Batch:
        """Give a batch the logits of its plain run, if a metric reads them; otherwise they are not computed.

        Args:
            batch: the prompts.
            plain: their plain run.
            metric: one number per prompt.

        Returns:
            The batch.
        """
        return metric.with_clean(batch, self.replay.logits(plain.last) if "clean" in metric.needs else None)

    def read(self, last: Float[Tensor, "batch d_model"], batch: Batch, metric: Metric) -> Float[Tensor, " batch"]:
        """Compute a metric from the stream that the logits read at the last token; only the logits that it reads are computed.

        Args:
            last: as `circuits` returns it for one circuit.
            batch: the prompts.
            metric: one number per prompt.

        Returns:
            The metric.
        """
        ids, narrowed = metric.narrowed(batch)
        if ids is None or batch.clean_logits is not None:
            return metric(self.replay.logits(last), batch)
        return metric.of_columns(self.replay.logits(last, ids), narrowed)

    def _block(self, layer: int, hidden: Float[Tensor, "row pos d_model"], state: _State) -> Tensor:
        """One block: queries, keys, values and the MLP's input from separate streams; the rest is the model's code."""
        heads, mlp = self.senders_of(layer)
        into_heads = slice(self.readers["q", layer].start, self.readers["v", layer].stop)
        attends, thinks = state.is_live(heads, into_heads), state.is_live(mlp, self.readers["mlp_in", layer])
        known = state.ablated.known
        if not attends and not thinks:
            state.write_known(slice(heads.start, mlp.stop))
            return hidden + state.repeat((known.hidden[layer + 1] - known.hidden[layer]).to(hidden.device))
        self.blocks_run += len(hidden)
        seen: dict[str, Tensor] = {}
        edits: dict[str, Callable[[Tensor], Any]] = {}
        given: dict[str, Tensor] = {}
        projected: dict[str, Tensor] = {}
        if attends:
            projected = self._projections(layer, hidden, into_heads, state)
        else:
            given["attention"] = state.repeat(known.attention[layer].to(hidden.device))
        if thinks:
            edits["mlp_out"] = _keep(seen, "mlp_contribution")
        else:
            given["mlp"] = state.repeat(known.mlp[layer].to(hidden.device))

        def read_by_mlp(stream: Tensor) -> Tensor:
            if attends:
                state.write(self._shares(layer, seen))
            else:
                state.write_known(heads)
            own = state.streams(stream, self.readers["mlp_in", layer]) if thinks else None
            return stream if own is None else own[:, 0]

        at, card = ("resid_mid", layer), self.replay.card
        watched = seen if attends else None
        with Taps(self.replay.model, card, [at]), ExitStack() as hooks:
            hook_component(self.replay.model, at, read_by_mlp, hooks, card)
            if projected:
                hooks.enter_context(self.replay.projections_replaced(layer, projected))
            columns = (0, hidden.shape[1])
            hidden = self.replay.block(layer, hidden, columns, Past(), edits=edits, seen=watched, **given)
        if thinks:
            state.write(seen["mlp_contribution"][:, None])
        else:
            state.write_known(mlp)
        return hidden

    def _projections(
        self, layer: int, hidden: Float[Tensor, "row pos d_model"], readers: slice, state: _State
    ) -> dict[str, Float[Tensor, "row pos d"]]:
        """q, k and v of all heads, each from its own stream; none if all edges into the heads are kept."""
        live = state.live_readers(readers)
        streams = state.streams(hidden, readers, live)
        if streams is None:
            return {}
        normed = self.replay.attention_input(layer, streams.flatten(0, 1), (0, hidden.shape[1]))
        by_reader = normed.unflatten(0, streams.shape[:2])
        projected = {}
        for site in PROJECTIONS:
            own = self.readers[site, layer]
            heads = [at - own.start for at in live if own.start <= at < own.stop]
            first = sum(at < own.start for at in live)
            if heads:
                of_heads = by_reader[:, first : first + len(heads)]
                new = self.replay.projected_by_head(site, layer, of_heads, heads)
            if len(heads) < own.stop - own.start:  # the others read what they read in the known run
                known = state.repeat(state.ablated.known.projected[layer][site]).unflatten(
                    -1, (own.stop - own.start, -1)
                )
                if heads:
                    known = known.index_copy(2, torch.tensor(heads, device=known.device), new.to(known))
                new = known
            projected[site] = new.flatten(2)
        return projected

    def _shares(self, layer: int, seen: dict[str, Tensor]) -> Float[Tensor, "batch head pos d_model"]:
        """What each head adds to the stream, in float32."""
        projection = self.replay.module("attention_value_output", layer)
        shares = head_shares(seen["z"].float(), projection, self.heads)
        scale = self.replay.card.post_norm_scale
        if scale is not None:
            norm = self.replay.module("attention_contribution", layer)
            shares = shares * scale(norm, seen["attention"].float())[:, :, None]
        multiplier = self.replay.card.residual_scale(self.config)
        return (shares if multiplier == 1 else multiplier * shares).transpose(1, 2)


class _State:
    """What senders have added so far in a run of circuits, and what that makes each receiver read.

    A row is a prompt in a circuit; those of the first circuit come first.
    """

    def __init__(self, model: EdgewiseModel, ids: Ids, kept: Any, ablated: Ablated) -> None:
        self.ablated, self.copies = ablated, len(kept)
        device = ablated.values.device
        self.soft = isinstance(kept, Tensor) and kept.requires_grad
        shares = torch.as_tensor(kept, dtype=torch.float32, device=device)
        self.kept = shares.flatten(0, 1) if shares.ndim == 4 else shares.repeat_interleave(len(ids), 0)
        hard = np.asarray(kept.detach().cpu() if isinstance(kept, Tensor) else kept).reshape(-1, *model.exists.shape)
        self.used: Any = (hard > 0).any(0)  # by a circuit
        self.missed: Any = (hard < 1).any(0) & model.exists
        self.reads: Any = self.used.any(0)  # which receivers keep an edge
        self.values = self.repeat(ablated.values) if len(ablated.values) > 1 else ablated.values
        # Whether a receiver without a kept edge reads what it reads in the known run.
        self.known_reads = ablated.is_run and not (model.biased and model.replay.card.post_norm_scale is not None)
        shape = len(ids) * self.copies, len(model.exists), ids.shape[1], ablated.values.shape[-1]
        # What each sender adds minus its ablated value; in a run whose gradient is taken, as written.
        self.changes: list[Tensor] = [] if self.soft else [model.changes.take(shape, device)]
        self.count = 0
        self.ahead: _Ahead | None = None
        # Sums over senders of ablated values, and of what was added if the stream holds more than that.
        self.sum_of_values: Any = 0.0
        self.sum_added: Any = 0.0 if model.biased else None

    def repeat(self, x: Tensor) -> Tensor:
        """Give every circuit a copy of what belongs to the prompts."""
        return x if self.copies == 1 else x.repeat(self.copies, *[1] * (x.ndim - 1))

    def is_live(self, senders: slice, readers: slice) -> bool:
        """Whether what these senders add must be computed: it is used, and differs from that of the known run."""
        if self.soft:
            return True
        return bool(self.used[senders].any() and (not self.ablated.is_run or self.used[:, readers].any()))

    def live_readers(self, readers: slice) -> list[int]:
        """The receivers whose streams must be computed: all, or where a known run is read without a kept edge, those with one."""
        every = self.soft or not self.known_reads
        return [at for at in range(readers.start, readers.stop) if every or self.reads[at]]

    def write(self, added: Float[Tensor, "row some pos d_model"]) -> None:
        """Add what the next senders write."""
        those = slice(self.count, self.count + added.shape[1])
        added = added.to(self.values)
        of_values = self.ablated.summed(those)
        self.sum_of_values = self.sum_of_values + (self.repeat(of_values) if len(of_values) > 1 else of_values)
        if self.sum_added is not None:
            self.sum_added = self.sum_added + added.sum(1)
        self.count = those.stop
        if self.soft:
            self.changes.append(added - self.values[:, those])
        else:
            torch.sub(added, self.values[:, those], out=self.changes[0][:, those])

    def write_known(self, senders: slice) -> None:
        """Add what the next senders write in the known run."""
        self.write(self.repeat(self.ablated.known.added[:, senders]))

    def streams(
        self, stream: Float[Tensor, "row pos d_model"], readers: slice, live: Sequence[int] | None = None
    ) -> Float[Tensor, "row receiver pos d_model"] | None:
        """The stream as each receiver reads it; None if it reads the stream as it is.

        Args:
            stream: the sum of everything added so far.
            readers: the receivers.
            live: those of them whose streams are wanted; by default all.
        """
        missed = self.missed[: self.count, readers]
        if not missed.any() and not self.soft:
            return None
        those = list(range(readers.start, readers.stop) if live is None else live)
        last = -stream.shape[1]
        whole = stream.float().to(self.values.device)
        if self.soft:
            weights, own = self.kept[:, : self.count, readers].transpose(1, 2), self.parts(whole)[:, None]
            for change, of_part in zip(self.changes, weights.split([x.shape[1] for x in self.changes], 2), strict=True):
                own = own + _weighted(of_part, change[:, :, last:])
        elif stream.shape[1] < self.changes[0].shape[2]:  # the logits, of the last token only
            own = _Ahead(self, those, slice(last, None)).streams(self, whole, those)
        else:
            if self.ahead is None or not set(those) <= set(self.ahead.readers):
                self.ahead = _Ahead(self, self.next(those), slice(None))
            own = self.ahead.streams(self, whole, those)
        return own.expand(-1, len(those), -1, -1).to(stream.dtype).to(stream.device)

    def parts(self, whole: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """The stream of a receiver without an edge: ablated values, and what belongs to no sender."""
        last = -whole.shape[1]
        found = self.sum_of_values[:, last:] + (0.0 if self.sum_added is None else whole - self.sum_added[:, last:])
        return found.expand(whole.shape)

    def next(self, those: Sequence[int]) -> list[int]:
        """These receivers and those that read next, as many as are worth one product."""
        coming = self.live_readers(slice(those[0], self.used.shape[1] - 1))
        return sorted({*those, *coming[:TOGETHER]})


class _Ahead:
    """Weighted sums of changes for receivers that read one after the other: thinner products would be slower."""

    def __init__(self, state: _State, readers: list[int], columns: slice) -> None:
        self.readers, self.columns, self.count = readers, columns, state.count
        used, missed = (x[: self.count, readers].any(1).sum() for x in (state.used, state.missed))
        # Summed from its parts, a receiver without an edge reads its ablated value and no rounding error, which a norm would
        # make large where that value is 0.
        self.by_parts = bool(used <= missed)
        self.sums = self._product(state, readers, slice(0, self.count))

    def streams(
        self, state: _State, whole: Float[Tensor, "row pos d_model"], those: list[int]
    ) -> Float[Tensor, "row receiver pos d_model"]:
        """The streams of some of the receivers, to which senders may have been added meanwhile."""
        at = [self.readers.index(one) for one in those]
        found = (state.parts(whole) if self.by_parts else whole)[:, None] + self.sums[:, at[0] : at[-1] + 1]
        if self.count < state.count:
            found += self._product(state, those, slice(self.count, state.count))
        return found

    def _product(self, state: _State, readers: list[int], senders: slice) -> Float[Tensor, "row receiver pos d_model"]:
        shares = state.used if self.by_parts else state.missed
        some = senders.start + np.flatnonzero(shares[senders][:, readers].any(1))
        changes = state.changes[0][:, :, self.columns]
        if 2 * len(some) < senders.stop - senders.start:  # a copy of few is cheaper than a product with many zeros
            index = torch.from_numpy(some).to(changes.device)
            weights, changes = (
                state.kept[:, index[:, None], torch.tensor(readers, device=index.device)],
                changes[:, index],
            )
        else:
            weights, changes = state.kept[:, senders, readers], changes[:, senders]
        return _weighted((weights if self.by_parts else weights - 1).transpose(1, 2), changes)


def _weighted(
    weights: Float[Tensor, "row receiver sender"], changes: Float[Tensor, "row sender pos d_model"]
) -> Float[Tensor, "row receiver pos d_model"]:
    return (weights @ changes.flatten(2)).unflatten(2, changes.shape[2:])


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """An edit that only reads."""
    return lambda x: seen.__setitem__(name, x.clone())
