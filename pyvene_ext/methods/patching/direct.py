"""The direct term of a path: what a sender's change adds to its receivers' inputs, with every scale on the path frozen.

Without other heads, MLPs and rescaling, nothing needs to be run between the two: the change passes through the output projection
(and a post-norm), the residual stream, the receiver's norm and its projection, each of them linear with its scale frozen at base.
So the direct terms of several senders add up. The effect of the receivers' changed inputs is run as usual, on either engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from modelcards import card_of, dimensions, n_heads, n_layers
from pyvene_ext.engine.measure import Metric, as_array
from pyvene_ext.engine.plain import run_resolved
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.sweep.run import plan_resolved, sweep_resolved
from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.methods.patching.plain_paths import patched_value
from pyvene_ext.models.devices import no_gradients
from pyvene_ext.models.hooks import check_projections
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.norms import FrozenNorm
from pyvene_ext.models.replay import Replay
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.joint import Spec
from pyvene_ext.specs.path import PathPatch
from pyvene_ext.specs.sources import Recorded

NORM_INPUT = {"q": "resid_pre", "k": "resid_pre", "v": "resid_pre", "mlp_in": "resid_mid", "logits": "resid_post"}
ROWS = 64  # paths whose logits over the whole vocabulary are computed at once


def run_direct_paths(
    resolved: Resolved,
    paths: Sequence[PathPatch],
    metric: Metric,
    *,
    engine: Literal["sweep", "plain"],
    memory: int | None,
    store: Path | None,
    batch_size: int,
    progress: bool,
) -> tuple[Float32[np.ndarray, " prompt"], Float32[np.ndarray, "path prompt"]]:
    """Patch each path's direct term.

    Args:
        resolved: the senders' patches on the pairs, with statistics.
        paths: the paths, all `direct`.
        metric: the metric.
        engine: runs the receivers' patches.
        memory: as for `sweep`.
        store: as for `sweep`.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        The metric of the untouched base, and with each path patched.

    Raises:
        ValueError: an output projection or a norm cannot be split into linear parts.
    """
    model, base = resolved.model, resolved.prompts
    clean, found = np.empty(len(base), np.float32), np.empty((len(paths), len(base)), np.float32)
    to_logits = [number for number, path in enumerate(paths) if path.receivers == ("logits",)]
    others = [number for number in range(len(paths)) if number not in set(to_logits)]
    with evaluating(model), no_gradients(model):
        terms = DirectTerms(resolved, paths, batch_size)
        prompts = range(len(base) if to_logits else 0)
        with progress_bar(len(prompts), "prompt", "direct terms", shown=progress) as bar:
            for prompt in prompts:
                clean[prompt], found[to_logits, prompt] = terms.metric([paths[i] for i in to_logits], prompt, metric)
                bar.update()
    if others:
        specs: list[Spec] = [
            paths[number].receiver_patches(receiver_positions(paths[number]), paths[number].name) for number in others
        ]
        # The terms depend on source prompts that the engines do not see.
        recorded = Recorded(terms.recorded, resolved.sources.statistics.prompts.hash)
        received = resolve(specs, model, base, recorded=recorded).with_directions(resolved.sources.directions)
        if engine == "plain":
            result = run_resolved(received, metric, batch_size=batch_size, progress=progress)
        else:
            plan = plan_resolved(received, metric, memory=memory)
            result = sweep_resolved(received, metric, plan, store=store, progress=progress)
        found[others] = result.intervened
        # Without the rounding difference between the two ways; a path that does nothing keeps a delta of exactly 0.
        found[to_logits] = result.baseline - (clean - found[to_logits])
        clean = result.baseline
    return clean, found


def receiver_positions(path: PathPatch) -> Positions:
    """Where a path's receivers are patched.

    Args:
        path: a direct path.

    Returns:
        The sender's positions; or every position (elsewhere to the base's own value) if one receiver could change another there.
    """
    return path.positions if path.has_independent_receivers else "all"


class DirectTerms:
    """The base's values at senders, receivers and before the receivers' norms, and what senders add there.

    Args:
        resolved: the senders' patches on the pairs, with statistics.
        paths: the paths, all `direct`.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: an output projection or a norm cannot be split into linear parts.
    """

    def __init__(
        self,
        resolved: Resolved,
        paths: Sequence[PathPatch],
        batch_size: int,
    ) -> None:
        self.resolved, self.model, self.base = resolved, resolved.model, resolved.prompts
        model, base, self.replay = self.model, self.base, Replay(resolved.model)
        self.paths, self.depth = {path.name: path for path in paths}, n_layers(model.config)
        check_projections(model)
        places = [path.sender_patch.place for path in paths]
        for node in (node for path in paths for node in path.receiver_nodes):
            places += (
                [self._stream_place(node)]
                if node.site == "logits"
                else [self._stream_place(node), (node.site, node.layer)]
            )
        at = dict.fromkeys(place for path in paths for place in _each(receiver_positions(path), path.positions))
        self.base_values = Reference.compute(
            model, base, dict.fromkeys(places), bank=(*at, "last"), batch_size=batch_size
        )
        self.direct_term = lru_cache(256)(self._direct_term)
        self.norm = lru_cache(None)(self._norm)

    def recorded(
        self, name: str, place: Place, prompt: int, heads: tuple[int, ...] | None
    ) -> Float[Tensor, "pos *head d"]:
        """Compute the patched input of a path's receivers: the base's own, plus the direct term where the sender is patched.

        Args:
            name: the path's.
            place: site and layer of the receivers.
            prompt: index of the pair.
            heads: which heads, for sites with heads.

        Returns:
            The values at the receivers' positions.
        """
        path = self.paths[name]
        own = self.base_values.rows(place, prompt, receiver_positions(path)).clone()
        if heads is not None:
            own = own[:, list(heads)]
        added = self.direct_term(name, place, prompt).to(own.device)
        if heads is not None:
            added = added.unflatten(-1, (-1, own.shape[-1]))[:, list(heads)]
        tokens = self._sender_tokens(path, prompt) if receiver_positions(path) != path.positions else slice(None)
        own[tokens] = (own[tokens].float() + added).to(own.dtype)
        return own

    def metric(
        self, paths: Sequence[PathPatch], prompt: int, metric: Metric
    ) -> tuple[np.float32, Float32[np.ndarray, " path"]]:
        """Compute the metric of paths to the logits, with each direct term added to the final norm's output at the last token.

        Args:
            paths: paths to the logits.
            prompt: index of the pair.
            metric: the metric.

        Returns:
            The metric of the untouched base prompt, and with each path patched.
        """
        place, last = ("resid_post", self.depth - 1), len(self.base.input_ids[prompt]) - 1
        x = self.base_values.rows(place, prompt, "last").to(self.replay.device)
        normed = self.replay.module("final_norm")(x[None])[0]
        clean = self.replay.unembed(normed)
        batch = metric.with_clean(self.base.batch([prompt]), clean)
        found = []
        tokens_of = [self._sender_tokens(path, prompt) for path in paths]
        changing = [number for number, tokens in enumerate(tokens_of) if last in tokens]
        of_rows = [None, *changing]  # the first is the untouched base
        for start in range(0, len(of_rows), ROWS):
            here = of_rows[start : start + ROWS]
            rows = [normed[0].float()] * len(here)
            for row, number in enumerate(here):
                if number is not None:
                    terms = self.direct_term(paths[number].name, ("logits", None), prompt)
                    rows[row] = rows[row] + terms[tokens_of[number].index(last)].to(normed.device)
            logits = self.replay.unembed(torch.stack(rows))
            found.append(as_array(metric(logits, batch.take([0] * len(rows)))))
        values = np.concatenate(found)
        of_paths = np.full(len(paths), values[0])
        of_paths[changing] = values[1:]
        return values[0], of_paths

    def _direct_term(self, name: str, place: Place, prompt: int) -> Float[Tensor, "pos d"]:
        """The direct term at a receiver's place, heads concatenated, at the positions where the sender is patched."""
        path, (site, layer) = self.paths[name], place
        added = self._sender_change(path, prompt)
        if site not in NORM_INPUT:
            return added
        at = self.base_values.rows(self._stream_place(Node(*place)), prompt, path.positions)
        added = self.norm(site, layer).change(at.to(added), added)
        if site in ("q", "k", "v"):
            assert layer is not None
            added, nothing = (x.to(self.model.dtype)[None] for x in (added, torch.zeros_like(added)))
            projected = (self.replay.projected(site, layer, x)[0].float() for x in (added, nothing))
            added = next(projected) - next(projected)  # without the bias
        return added

    def _sender_change(self, path: PathPatch, prompt: int) -> Float[Tensor, "pos d_model"]:
        """What the sender's change adds to the residual stream."""
        sender, (site, layer, head) = path.sender_patch, path.sender_node
        old = self.base_values.rows(sender.place, prompt, sender.positions)
        of_head = old if head is None else old[:, head]
        new = patched_value(sender, of_head, prompt, self.resolved)
        change = new.float() - of_head.float()
        if site != "z":
            return change.to(self.replay.device)
        assert layer is not None and head is not None
        weight = self.replay.projection(layer)
        assert weight is not None  # `check_projections` has checked it
        by_head = weight.unflatten(0, (n_heads(self.model.config), -1))[head].float()
        change = change.to(weight.device) @ by_head
        if (post_norm_scale := card_of(self.model).post_norm_scale) is not None:
            attention = self.replay.module("attention_value_output", layer)(old.flatten(1).to(weight))
            change = change * post_norm_scale(self.replay.module("attention_contribution", layer), attention)
        return change * card_of(self.model).residual_scale(self.model.config)

    def _sender_tokens(self, path: PathPatch, prompt: int) -> list[int]:
        """Where the sender is patched."""
        return list(self.resolved.tokens[path.positions][prompt])

    def _stream_place(self, node: Node) -> Place:
        """Where a receiver reads the stream: before its norm, or the receiver's own place in the stream."""
        return NORM_INPUT.get(node.site, node.site), self.depth - 1 if node.site == "logits" else node.layer

    def _norm(self, site: str, layer: int | None) -> FrozenNorm:
        width, of = dimensions(self.model.config)["d_model"], f"the norm before {site} of layer {layer}"
        if site == "logits":
            return FrozenNorm(self.replay.module("final_norm"), width, "the final norm")
        assert layer is not None
        norm = self.replay.attention_norm(layer)
        if site == "mlp_in":
            norm = self.replay.module("resid_mid", layer)
            if norm is self.replay.module("mlp_input", layer):
                norm = nn.Identity()  # OLMo 2: the MLP reads the stream as it is
        return FrozenNorm(norm, width, of)


def _each(*positions: Positions) -> list[str | int]:
    return [position for one in positions for position in (one if isinstance(one, tuple) else (one,))]
