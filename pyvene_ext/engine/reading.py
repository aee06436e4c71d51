"""Reading activations: any sites at any layers, heads and positions of prompts, without padding.

    acts = read(model, prompts, ["pattern", "z", "resid_post"], layers=(0, 3))
    acts["z", 3]            # prompt pos head d_head; where lengths differ, a list with one tensor per prompt
    acts["pattern", 0][2]   # head query key, of prompt 2
    acts.save("activations.safetensors")

One forward pass per batch serves all sites, and ends after the last layer that is needed. Sites may be called by pyvene's names
too. `read_batches` gives one batch after the other, for sets whose activations do not fit in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Component, Taps, card_of, component_named, dimensions, meant, n_layers
from pyvene_ext.intervenable.statistics import Place, label, named
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.errors import counted
from pyvene_ext.io.files import atomic_path, parse_json
from pyvene_ext.models.devices import free_memory, input_device, no_gradients
from pyvene_ext.models.hooks import StopForward, hook_component, split_heads
from pyvene_ext.models.latent_steps import is_unrolling
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.positions import Positions, token_indices
from pyvene_ext.prompts.tokenized import Batch, PaddingSide, TokenizedPrompts, check_tokenized
from pyvene_ext.specs.base import plain

Values = Tensor | list[Tensor]  # of all prompts stacked, or of each prompt where shapes differ
Reduce = Callable[[Tensor], Tensor]
COUNTED = {"n_head": "query heads", "n_kv_head": "K/V heads", "n_expert": "experts"}


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Mapping[Place, Values]):
    """Activations by (site, layer); a site that exists once (embed, final_norm, logits) is its own key.

    A value is one tensor with an axis of prompts first where all prompts gave the same shape, and else a list with one tensor per
    prompt; `acts[key][0]` is prompt 0's either way. A prompt's tensor is `pos d`, for sites with heads or experts `pos head d`,
    and for scores and pattern `head query key`; or what `reduce` made of it.

    Attributes:
        values_at: the values by place, sites named as in `pyvene_ext.specs`.
        prompts: the prompts' indices in their set, in order.
        tokens: the tokens of each that were read (of the query, for scores and pattern), counted from its first.
        heads: the heads that were read, in the order of the axis; None for all.
    """

    values_at: dict[Place, Values]
    prompts: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...] | None = None

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping's would compare tensors

    def __getitem__(self, key: Place | str) -> Values:
        with suppress(ValueError, TypeError):  # a site that there is not was not read either
            if (place := named((key, None) if isinstance(key, str) else key)) in self.values_at:
                return self.values_at[place]
        site = meant(key[0] if isinstance(key, tuple) and key else key)
        if isinstance(key, str) and site and (layers := self.layers(site)):
            number = re.search(r"[.\[](\d+)", key)
            layer = int(number[1]) if number and int(number[1]) in layers else layers[0]
            raise KeyError(f"{key!r} has layers: acts[{site!r}, {layer}] is layer {layer}, acts.stack({site!r}) all")
        raise KeyError(f"{key!r} was not read; there are {self._places()}")

    def __iter__(self) -> Iterator[Place]:
        return iter(self.values_at)

    def __len__(self) -> int:
        return len(self.values_at)

    def __repr__(self) -> str:
        return f"Activations of {counted(len(self.prompts), 'prompt')}: {self._places()}"

    def _places(self) -> str:
        return "; ".join(self._site(site) for site in dict.fromkeys(site for site, _ in self.values_at))

    def _site(self, site: str) -> str:
        """A site, its layers and the axes of a prompt's tensor: "z 0-29 [pos head d]"."""
        layers, component = self.layers(site), component_named(site)
        several = ", ".join(map(str, layers))
        if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
            several = f"{layers[0]}-{layers[-1]}"
        axes = "pos head d" if component.heads else "pos d"
        axes = "head query key" if component.width is None else axes
        values = self[site, layers[0] if layers else None]
        unreduced = len(values) and values[0].ndim == len(axes.split())
        return " ".join([site, *([several] if several else []), *([f"[{axes}]"] if unreduced else [])])

    def layers(self, site: str) -> tuple[int, ...]:
        """The layers at which a site was read, in order.

        Args:
            site: in either vocabulary.

        Returns:
            Layers; none for a site that exists once or was not read.
        """
        wanted = component_named(site).site
        return tuple(layer for found, layer in self.values_at if found == wanted and layer is not None)

    def stack(self, site: str) -> Float[Tensor, "layer prompt *rest"]:
        """Stack the layers of a site.

        Args:
            site: in either vocabulary.

        Returns:
            The values at all of its layers that were read, in order.

        Raises:
            ValueError: the site was not read, or its values differ in shape.
        """
        found = [self[site, layer] for layer in self.layers(site)]
        if not found:
            raise ValueError(f"{site} was read at no layer; there are {self._places()}.")
        tensors = [values for values in found if isinstance(values, Tensor)]
        if len(tensors) < len(found) or len({values.shape for values in tensors}) > 1:
            raise ValueError(
                f"{site} differs in shape from prompt to prompt or layer to layer; read prompts of one length, or one position."
            )
        return torch.stack([values.to(tensors[0].device) for values in tensors])

    def residual_parts(self, layer: int, *, by_head: bool = False) -> dict[str, Values]:
        """Split the residual stream after a block into what was added to it, which sums to resid_post of that layer.

        Needs embed, and attn_out and mlp_out of every layer up to this one; for heads result too. A post-norm's scale is that of
        the run (site "result").

        Args:
            layer: the block.
            by_head: split attn_out by heads.

        Returns:
            By name, in order: "embed", and of every layer up to `layer` "attn_out.0" and "mlp_out.0". With heads, in place of
            "attn_out.0", "result.0.5" for each head that was read and "attn_rest.0" for what remains: the bias of attention's
            output, and heads that were not read.

        Raises:
            KeyError: something was not read.
        """
        parts = {"embed": self["embed"]}
        for i in range(layer + 1):
            attention = self["attn_out", i]
            if by_head:
                shares = self["result", i]
                heads = self.heads or range(shares[0].shape[-2])
                parts |= {
                    f"result.{i}.{head}": _each(lambda x, at=at: x[..., at, :], shares) for at, head in enumerate(heads)
                }
                parts[f"attn_rest.{i}"] = _each(lambda whole, x: whole - x.sum(-2), attention, shares)
            else:
                parts[f"attn_out.{i}"] = attention
            parts[f"mlp_out.{i}"] = self["mlp_out", i]
        return parts

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file, which is complete or absent; nothing is pickled.

        Args:
            path: the file; its folder is created if necessary.
        """
        tensors: dict[str, Tensor] = {}
        for place, values in self.items():
            if isinstance(values, Tensor):
                tensors[label(place)] = values.contiguous()
            else:
                tensors |= {f"{label(place)}/{i}": value.contiguous() for i, value in enumerate(values)}
        described = {"prompts": self.prompts, "tokens": self.tokens, "heads": self.heads, "places": list(self)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"activations": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Activations:
        """Read a file that `save` wrote.

        Args:
            path: the file.
            device: where to put the tensors.

        Returns:
            The activations.

        Raises:
            ValueError: the file is damaged, or another program's.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                described = parse_json((file.metadata() or {})["activations"])
                prompts, tokens = tuple(described["prompts"]), tuple(map(tuple, described["tokens"]))
                heads = None if described["heads"] is None else tuple(described["heads"])
                names, values_at = set(file.keys()), dict[Place, Values]()
                for site, layer in described["places"]:
                    name = label((site, layer))
                    parts = [f"{name}/{i}" for i in range(len(prompts))]
                    alone = name in names
                    values_at[site, layer] = file.get_tensor(name) if alone else list(map(file.get_tensor, parts))
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} is not a complete file of activations ({reason}); read and save them again."
            ) from None
        return cls(values_at, prompts, tokens, heads)


def read(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    sites: str | Iterable[str],
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    positions: Positions | int | Sequence[str | int] = "all",
    reduce: Reduce | Mapping[str, Reduce] | None = None,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> Activations:
    """Read the activations of prompts at some sites.

    Every component that the model's card maps can be read (`docs/concepts/places.md`): the residual stream ("resid_pre",
    "resid_mid", "resid_post"), what is added to it ("embed", "attn_out", "mlp_out", and by head "result"), attention ("q", "k",
    "v", "q_rot", "k_rot", "scores", "pattern", "z"), the MLP ("mlp_in", "mlp_gate", "mlp_up", "mlp_neurons"), experts ("router",
    "expert"), and the end ("final_norm", and "logits", the model's own in its dtype). "result" is z_h W_O^h, through a post-norm
    with the scale that the norm has in this run (Gemma 2 and 3, OLMo 2) and times Granite's residual multiplier: what the head
    adds.

    Args:
        model: a model with a card; used in eval mode and restored afterwards, also after an error. Attention is read under eager
            and sdpa.
        prompts: the prompts.
        sites: one or more sites, in either vocabulary.
        layers: one or more layers; None for all. Sites that exist once have none.
        heads: one or more heads, for the sites that have heads (K/V heads of k and v); None for all. The axis of heads has this
            order.
        positions: "all", "last", a name of the prompt set, an integer (negative: from the end), or several of these; for scores
            and pattern, positions of the query.
        reduce: called with each prompt's tensor of each site and layer, without padding, after `dtype` and on the model's
            device; what it returns is kept in its place. A dict by site reduces those sites only.
        batch_size: prompts per forward pass.
        padding_side: left or right; numbers do not depend on it.
        device: where activations are kept; None leaves them on the model's.
        dtype: to cast activations to, such as "bfloat16" or torch.bfloat16; None for the model's.
        progress: show a bar.

    Returns:
        The activations by (site, layer), prompts in the order of the set.

    Raises:
        ValueError: before the model runs, for a site, layer, head or position that there is not, and for activations that would
            not fit in memory.
    """
    reading = _ReadPlan.of(model, prompts, sites, layers, heads, positions, reduce, device, dtype)
    reading.check_memory()
    found: dict[Place, dict[int, Tensor]] = {place: {} for place in reading.places}
    for batch, kept in reading.run_all(prompts.batches(batch_size, padding_side), progress):
        for place, tensors in kept.items():
            found[place] |= zip(batch.index, tensors, strict=True)
    everyone = range(len(prompts))
    values_at = {place: _stacked([by_prompt.pop(i) for i in everyone]) for place, by_prompt in found.items()}
    return Activations(values_at, tuple(everyone), reading.tokens, reading.heads)


def read_batches(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    sites: str | Iterable[str],
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    positions: Positions | int | Sequence[str | int] = "all",
    reduce: Reduce | Mapping[str, Reduce] | None = None,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> Iterator[Activations]:
    """Read activations one batch after the other, so that only one batch is in memory.

    Between batches the model is as it was, and may be used.

    Args:
        model: as for `read`, and so are the others.
        prompts: the prompts.
        sites: one or more sites.
        layers: one or more layers; None for all.
        heads: one or more heads; None for all.
        positions: which tokens.
        reduce: what is kept of each prompt's tensor.
        batch_size: prompts per forward pass.
        padding_side: left or right.
        device: where activations are kept.
        dtype: to cast activations to.
        progress: show a bar.

    Returns:
        The activations of each batch, shortest prompts first; their `prompts` says which ones.

    Raises:
        ValueError: as for `read`, when it is called.
    """
    reading = _ReadPlan.of(model, prompts, sites, layers, heads, positions, reduce, device, dtype)
    batches = prompts.batches(batch_size, padding_side)

    def each() -> Iterator[Activations]:
        for batch, kept in reading.run_all(batches, progress):
            values_at = {place: _stacked(tensors) for place, tensors in kept.items()}
            tokens = tuple(reading.tokens[prompt] for prompt in batch.index)
            yield Activations(values_at, tuple(batch.index), tokens, reading.heads)

    return each()


@dataclass(frozen=True)
class _ReadPlan:
    """A checked request to read activations.

    Attributes:
        model: the model.
        prompts: the prompts.
        places: the component at each (site, layer).
        heads: the heads, for components with heads.
        tokens: the tokens of each prompt.
        whole: whether these are all tokens of each prompt.
        reduce: by site.
        device: where activations are kept; None for the model's.
        dtype: that they are cast to.
    """

    model: PreTrainedModel
    prompts: TokenizedPrompts
    places: dict[Place, Component]
    heads: tuple[int, ...] | None
    tokens: tuple[tuple[int, ...], ...]
    whole: bool
    reduce: dict[str, Reduce]
    device: torch.device | None
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        prompts: TokenizedPrompts,
        sites: str | Iterable[str],
        layers: int | Iterable[int] | None,
        heads: int | Iterable[int] | None,
        positions: Any,
        reduce: Reduce | Mapping[str, Reduce] | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
    ) -> _ReadPlan:
        """Check what is asked for; the model is not run."""
        check_tokenized(model, prompts)
        if not prompts.input_ids:
            raise ValueError("nothing to read: give at least one prompt.")
        if not isinstance(sites, str | Iterable):
            raise ValueError(f"sites are one or more names, such as 'z' or ['z', 'resid_post'], not {sites!r}.")
        card = card_of(model)
        components = [card.component(model, site) for site in ([sites] if isinstance(sites, str) else list(sites))]
        if not components:
            raise ValueError("nothing to read: name at least one site.")
        at = _numbers("layers", layers)
        _check_range("layer", at, n_layers(model.config), "the model has layers")
        if at is not None and not any(component.per_layer for component in components):
            raise ValueError(f"{components[0].site} exists once: leave layers out.")
        chosen, with_heads = _numbers("heads", heads), [component for component in components if component.heads]
        if chosen is not None and not with_heads:
            raise ValueError(f"{components[0].site} has no heads: leave heads out.")
        for component in with_heads:
            count = dimensions(model.config)[str(component.heads)]
            _check_range("head", chosen, count, f"{component.site} has {COUNTED[str(component.heads)]}")
        positions = plain(positions)
        if positions in ((), ""):
            raise ValueError("name one or more positions.")
        for position in positions if isinstance(positions, tuple) else (positions,):
            if not isinstance(position, str | int):
                raise ValueError(f"positions are names and whole numbers, such as range(3), not {position!r}.")
        tokens = tuple(tuple(token_indices(prompts, prompt, positions)) for prompt in range(len(prompts)))
        everywhere = range(n_layers(model.config)) if at is None else at
        places: dict[Place, Component] = {
            (component.site, layer): component
            for component in components
            for layer in (everywhere if component.per_layer else (None,))
        }
        reduced = reduce if isinstance(reduce, Mapping) else {one.site: reduce for one in components if reduce}
        by_site = {component_named(site).site: function for site, function in reduced.items()}
        if unread := [site for site in by_site if site not in {site for site, _ in places}]:
            raise ValueError(f"reduce has a function for {unread[0]}, which is not read; name it in sites.")
        with Taps(model, card, [(one.name, layer or 0) for (_, layer), one in places.items()]):
            pass  # raises for an attention implementation or a projection that cannot be tapped
        return cls(model, prompts, places, chosen, tokens, positions == "all", by_site, _device(device), _dtype(dtype))

    def run_all(self, batches: Iterable[Batch], progress: bool) -> Iterator[tuple[Batch, dict[Place, list[Tensor]]]]:
        """Run the model on each batch, with a bar; gives the batch and what is kept of it."""
        with progress_bar(len(self.prompts), "prompt", "reading", shown=progress) as bar:
            for batch in batches:
                kept = self.run(batch)
                bar.update(len(batch.index))
                yield batch, kept

    def run(self, batch: Batch) -> dict[Place, list[Tensor]]:
        """Run the model once; gives what is kept of each row's prompt."""
        model, card = self.model, card_of(self.model)
        found: dict[Place, list[Tensor]] = {}
        needed = [layer for _, layer in self.places if layer is not None]
        names = {component.name for component in self.places.values()}

        def stop(_: Tensor) -> None:
            if not is_unrolling(model):
                raise StopForward

        with evaluating(model), no_gradients(model), ExitStack() as hooks, suppress(StopForward):
            hooks.enter_context(Taps(model, card, [(one.name, layer or 0) for (_, layer), one in self.places.items()]))
            for place, component in self.places.items():
                keep = partial(self._keep, found, place, batch)
                hook_component(model, (component.name, place[1] or 0), keep, hooks)
            if not names & {"final_norm", "logits"}:
                # Last, because a module's hooks run in the order in which they were registered.
                hook_component(model, ("block_output", max(needed, default=0)), stop, hooks)
            whole = model if "logits" in names else model.base_model
            whole(**batch.inputs(input_device(model)), use_cache=False)
        return {place: found[place] for place in self.places}

    def _keep(self, found: dict[Place, list[Tensor]], place: Place, batch: Batch, x: Tensor) -> None:
        """Keep what is asked for of an activation, all heads side by side."""
        if is_unrolling(self.model):
            return
        component, reduce = self.places[place], self.reduce.get(place[0])
        x = split_heads(x, component.name, self.model)
        if component.heads and self.heads is not None:
            x = x[:, list(self.heads)]
        found[place] = []
        for row, start, length, prompt in zip(x, batch.starts, batch.lengths, batch.index, strict=True):
            own = row[..., start : start + length, :]
            own = own if self.whole else own[..., list(self.tokens[prompt]), :]
            if component.width is None:
                own = own[..., start : start + length]
            elif component.heads:
                own = own.transpose(0, 1)
            device = self.device or own.device
            # Copies, because the model may go on to change the tensor, and a part of it would keep the whole in memory; no
            # inference tensors, because those could not be trained on.
            with torch.inference_mode(False), torch.no_grad():
                own = own.to(self.dtype or own.dtype, copy=reduce is not None)
                if reduce is not None and not isinstance(own := reduce(own), Tensor):
                    raise ValueError(f"reduce gave a {type(own).__name__} for {label(place)}; return a tensor.")
                found[place].append(own.to(device, copy=True, memory_format=torch.contiguous_format))

    def check_memory(self) -> None:
        """Raise ValueError if what is kept exceeds the memory that is free."""
        device = self.device or input_device(self.model)
        free = free_memory(device)
        sizes: dict[str, int] = {}
        for (site, _), component in self.places.items():
            if site not in self.reduce:  # what a function returns is not known
                sizes[site] = sizes.get(site, 0) + self._bytes(component)
        if free is None or sum(sizes.values()) <= free:
            return
        largest = max(sizes, key=lambda site: sizes[site])
        raise ValueError(
            f"these activations take {sum(sizes.values()) / 2**30:.1f} GiB ({largest} {sizes[largest] / 2**30:.1f}), but "
            f"{free / 2**30:.1f} GiB are free on {device}: name fewer sites, layers, heads or positions, keep less of each with "
            "reduce, or take one batch at a time from read_batches."
        )

    def _bytes(self, component: Component) -> int:
        """The size of one component of one layer, of all prompts."""
        heads = 1
        if component.heads:
            heads = dimensions(self.model.config)[component.heads] if self.heads is None else len(self.heads)
        width = card_of(self.model).width(self.model, component.name)
        rows = zip(self.tokens, self.prompts.input_ids, strict=True)
        entries = sum(len(tokens) * (len(ids) if width is None else width) for tokens, ids in rows)
        return heads * entries * (self.dtype or self.model.dtype).itemsize


def _numbers(what: str, value: Any) -> tuple[int, ...] | None:
    """One or more whole numbers, each once; None for all."""
    if value is None:
        return None
    numbers = plain(value)
    numbers = numbers if isinstance(numbers, tuple) else (numbers,)
    if any(type(number) is not int for number in numbers):
        raise ValueError(f"{what} are whole numbers, such as 3 or (0, 3), not {value!r}.")
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"name one or more {what}, each once, not {list(numbers)}.")
    return numbers


def _check_range(what: str, numbers: tuple[int, ...] | None, count: int, there: str) -> None:
    """Raise ValueError for a number that is not from 0 to `count` - 1."""
    if outside := [number for number in numbers or () if not 0 <= number < count]:
        raise ValueError(f"{what} {outside[0]} is out of range: {there} 0 to {count - 1}.")


def _device(device: str | torch.device | None) -> torch.device | None:
    """A device that exists; ValueError for one that does not."""
    try:
        return None if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"activations cannot be kept on {device!r} ({reason}); give another device.") from None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name; ValueError for something else."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype | None):
        raise ValueError(f"unknown dtype {dtype!r}; give one such as 'float32' or torch.bfloat16.")
    return found


def _stacked(tensors: list[Tensor]) -> Values:
    """One tensor if all have the same shape, else the list."""
    alike = len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1
    return torch.stack(tensors) if alike else tensors


def _each(function: Callable[..., Tensor], *values: Values) -> Values:
    """Apply a function to the tensors of all prompts, or to those of each."""
    if all(isinstance(some, Tensor) for some in values):
        return function(*values)
    return [function(*some) for some in zip(*values, strict=True)]
