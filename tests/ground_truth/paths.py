"""Path patching the slow, obvious way: plain torch hooks, whole forward passes, nothing shared with the package.

Places are named as edges are written: the senders "embed" (what enters block 0), "z.L.H" (query head H of layer L) and
"mlp_out.L"; the receivers "q.L.H", "k.L.G" and "v.L.G" (what the projection gives for query head H or K/V head G, before any
rotation), "mlp_in.L" (what enters the MLP, after its norm) and "logits" (the final residual stream, before the final norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Place(NamedTuple):
    """Where a named place is: entries `entries` of the last axis of what goes into or comes out of a module."""

    module: nn.Module
    side: str
    entries: slice


def place(model: Any, name: str) -> Place:
    """The place called `name`; ValueError if the model has none."""
    if name not in (*senders(model), *receivers(model)):
        raise ValueError(f"no place called {name!r}; there are {', '.join((*senders(model), *receivers(model)))}.")
    gpt2 = hasattr(model, "transformer")
    blocks: Any = model.transformer.h if gpt2 else model.model.layers
    everything = slice(None)
    if name == "embed":
        return Place(blocks[0], "in", everything)
    if name == "logits":
        return Place(model.transformer.ln_f if gpt2 else model.model.norm, "in", everything)
    kind, layer, *head = name.split(".")
    block = blocks[int(layer)]
    if kind in ("mlp_in", "mlp_out"):
        return Place(block.mlp, kind.removeprefix("mlp_"), everything)
    width = _head_size(model)
    entries = slice(int(head[0]) * width, (int(head[0]) + 1) * width)
    if kind == "z":
        return Place(block.attn.c_proj if gpt2 else block.self_attn.o_proj, "in", entries)
    if gpt2:  # queries, keys and values side by side
        skipped = "qkv".index(kind) * width * _counts(model)["q"]
        return Place(block.attn.c_attn, "out", slice(entries.start + skipped, entries.stop + skipped))
    return Place(getattr(block.self_attn, f"{kind}_proj"), "out", entries)


def senders(model: Any) -> tuple[str, ...]:
    """Every sender of a model, in the order of computation."""
    return _senders(model.config.num_hidden_layers, _counts(model)["q"])


@cache
def _senders(layers: int, heads: int) -> tuple[str, ...]:
    names = ["embed"]
    for layer in range(layers):
        names += [f"z.{layer}.{head}" for head in range(heads)] + [f"mlp_out.{layer}"]
    return tuple(names)


def receivers(model: Any) -> tuple[str, ...]:
    """Every receiver of a model, in the order of computation."""
    return _receivers(model.config.num_hidden_layers, *_counts(model).values())


@cache
def _receivers(layers: int, q: int, k: int, v: int) -> tuple[str, ...]:
    names = []
    for layer in range(layers):
        names += [
            f"{kind}.{layer}.{head}" for kind, count in zip("qkv", (q, k, v), strict=True) for head in range(count)
        ]
        names += [f"mlp_in.{layer}"]
    return (*names, "logits")


def precedes(sender: str, receiver: str) -> bool:
    """Whether what a sender gives can reach a receiver at all."""
    if sender == "embed" or receiver == "logits":
        return True
    sends, sends_from = sender.split(".")[:2]
    receives, receives_at = receiver.split(".")[:2]
    return int(sends_from) < int(receives_at) or (sends_from == receives_at and (sends, receives) == ("z", "mlp_in"))


@torch.no_grad()
def run_by_hooks(
    model: Any, ids: Int[Tensor, "batch pos"], put: Mapping[str, Tensor] | None = None, read: Iterable[str] = ()
) -> tuple[Float[Tensor, "batch vocab"], dict[str, Tensor]]:
    """Logits at the last position with the places of `put` set, and what the places of `read` hold, `[batch pos width]`."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, new in (put or {}).items():
            stack.callback(_hook(place(model, name), partial(_replaced, new)).remove)
        for name in read:
            stack.callback(_hook(place(model, name), partial(_kept, seen, name)).remove)
        logits = model(ids).logits[:, -1]
    return logits, seen


def path_patch_by_hooks(
    model: Any,
    sender: str,
    receivers: tuple[str, ...],
    base_ids: Int[Tensor, "batch pos"],
    source_ids: Int[Tensor, "batch pos"],
    freeze_mlps: bool,
) -> Float[Tensor, "batch vocab"]:
    """Logits at the last position of base when the receivers see the sender's source, and nothing else of source.

    Wang et al. (2022), appendix B: in a run on base every head but the sender keeps its z of base (and with `freeze_mlps` every
    MLP but the sender its output), the sender has its value of source, and what the receivers get is recorded; then base
    runs as usual with the receivers set to that. Norms are recomputed. "logits" beside other receivers overrides them. Prompts
    are unpadded and equally long.
    """
    recorded = received_by_hooks(model, sender, receivers, base_ids, source_ids, freeze_mlps)
    return run_by_hooks(model, base_ids, put=recorded)[0]


def every_path_by_hooks(
    model: Any, base_ids: Int[Tensor, "batch pos"], source_ids: Int[Tensor, "batch pos"], freeze_mlps: bool
) -> dict[str, Float[Tensor, "batch vocab"]]:
    """`path_patch_by_hooks` for every sender and every receiver that it precedes, by the edge's name "sender->receiver"."""
    logits = {}
    untouched = [run_by_hooks(model, ids, read=senders(model))[1] for ids in (base_ids, source_ids)]
    for sender in senders(model):
        ahead = tuple(receiver for receiver in receivers(model) if precedes(sender, receiver))
        recorded = received_by_hooks(model, sender, ahead, base_ids, source_ids, freeze_mlps, untouched)
        for receiver in ahead:
            put = {receiver: recorded[receiver]}
            logits[f"{sender}->{receiver}"] = run_by_hooks(model, base_ids, put=put)[0]
    return logits


def received_by_hooks(
    model: Any,
    sender: str,
    receivers: tuple[str, ...],
    base_ids: Tensor,
    source_ids: Tensor,
    freeze_mlps: bool,
    untouched: Sequence[dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """What the receivers get in the run that is frozen to base but for the sender; `untouched` is all of base and of source."""
    if base_ids.shape != source_ids.shape:
        raise ValueError(
            f"base has shape {tuple(base_ids.shape)} and source {tuple(source_ids.shape)}; give equally long prompts."
        )
    if sender not in senders(model):
        raise ValueError(f"{sender!r} is no sender; there are {', '.join(senders(model))}.")
    kinds = ("z.", "mlp_out.") if freeze_mlps else ("z.",)
    frozen = [name for name in senders(model) if name.startswith(kinds)]
    if untouched is None:
        untouched = [run_by_hooks(model, ids, read=senders(model))[1] for ids in (base_ids, source_ids)]
    put = {name: untouched[0][name] for name in frozen} | {sender: untouched[1][sender]}
    return run_by_hooks(model, base_ids, put=put, read=receivers)[1]


def _counts(model: Any) -> dict[str, int]:
    heads = model.config.num_attention_heads
    grouped = getattr(model.config, "num_key_value_heads", heads)
    return {"q": heads, "k": grouped, "v": grouped}


def _head_size(model: Any) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _replaced(new: Tensor, _: Tensor) -> Tensor:
    return new


def _kept(seen: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    seen[name] = x.clone()
    return x


def _hook(where: Place, change: Callable[[Tensor], Tensor]) -> Any:
    """Change some entries of what goes into a module or comes out of it, out of place."""

    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., where.entries] = change(x[..., where.entries])
        return x

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    if where.side == "in":
        return where.module.register_forward_pre_hook(before, with_kwargs=True)
    return where.module.register_forward_hook(lambda _module, _args, output: changed(output))
