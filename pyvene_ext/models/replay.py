"""A model's own blocks, called one by one on chosen rows and columns, with the arguments of the model's own forward.

Nothing here depends on an architecture. A block's arguments other than the hidden state (masks, rotary tables) are recorded while
the model's forward runs with its blocks skipped. What need not be recomputed (attention of a row that is edited after attention,
the MLP of a row that is edited after the MLP) is passed in as the module's output, and the rest of the block, norms and residual
sums, is the model's own code.

A row is one prompt under one intervention, a column is a token counted from the prompt's first. All rows of a call have the same
length and no padding, so the arguments are those of a single prompt and fit any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from modelcards import card_of, dimensions, n_layers
from modelcards.attention_taps import Taps, output_weight
from modelcards.template import at_layer
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import (
    HookFn,
    StopForward,
    attention_can_be_seen,
    on_input,
    on_output,
    replace_forward,
)
from pyvene_ext.models.modes import logits_in_float32, unembedding_only, unembeds_in_half
from pyvene_ext.models.shared_past import shared_past

Hidden = Float[Tensor, "row pos d_model"]
ADDED = {"attn_out": "attention_contribution", "mlp_in": "mlp_input", "mlp_out": "mlp_contribution"}
PROJECTIONS = {"q": "query_output", "k": "key_output", "v": "value_output"}
InPlace = Callable[[Tensor], None]  # changes an activation in place


@dataclass
class Past:
    """A block's cache: it prepends the keys and values of earlier columns, and keeps those that the block computes.

    Attributes:
        before: keys and values `row n_kv_head earlier d_head` of the columns before the call's, None if there are none.
        shared: keys and values `prompt n_kv_head earlier d_head` of the columns before those, each shared by several rows, and
            whether the prompts alternate from row to row (`models.shared_past`).
        only: stop the block as soon as it has computed its keys and values.
        made: the keys and values that it computed, `row n_kv_head pos d_head` each.
    """

    before: tuple[Tensor, Tensor] | None = None
    shared: tuple[Tensor, Tensor, bool] | None = None
    only: bool = False
    made: tuple[Tensor, Tensor] | None = None

    @property
    def keys_values(self) -> tuple[Tensor, Tensor]:
        """The block's own keys and values, `row n_kv_head pos d_head` each, once it has run."""
        assert self.made is not None
        return self.made

    def expand(self, rows: int) -> None:
        """Copy the shared keys and values for each of the rows."""
        assert self.shared is not None
        *shared, alternating = self.shared
        copies = rows // len(shared[0])
        own = [x.repeat(copies, 1, 1, 1) if alternating else x.repeat_interleave(copies, 0) for x in shared]
        if self.before is not None:
            own = [torch.cat(pair, 2) for pair in zip(own, self.before, strict=True)]
        self.before, self.shared = (own[0], own[1]), None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values from the model's attention and return all of them, as a transformers cache does."""
        self.made = keys, values
        if self.only:
            raise StopForward
        if self.before is None:
            return keys, values
        return tuple(
            torch.cat([old.to(new.device), new], 2) for old, new in zip(self.before, (keys, values), strict=True)
        )  # type: ignore[return-value]


class Replay:
    """A model's blocks and unembedding with their recorded arguments; every call leaves the model unchanged."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model whose family has a card; nothing runs yet."""
        self.model, self.card = model, card_of(model)
        bare = getattr(model, model.base_model_prefix)
        self.bare = getattr(bare, "decoder", bare)  # OPT's language model calls the bare model's decoder
        self.n_layers = n_layers(model.config)
        self.dtype = model.dtype
        self.device = input_device(model)
        self._token = int(model.config.pad_token_id == 0)  # any but the padding token, which some models warn about
        self._arguments: dict[tuple[int, int], list[tuple[tuple, dict]]] = {}
        self._modules: dict[tuple[str, int], nn.Module] = {}
        self._adders: dict[int, nn.Module] = {}

    def module(self, component: str, layer: int = 0) -> nn.Module:
        """The module whose input or output is a component.

        Args:
            component: pyvene's name of the component.
            layer: its layer; 0 for a component without layers.

        Returns:
            The module.
        """
        if (component, layer) not in self._modules:
            self._modules[component, layer] = self.card.module(self.model, component, layer)
        return self._modules[component, layer]

    def embed(self, ids: Int[Tensor, "row pos"]) -> Hidden:
        """Embed tokens.

        Args:
            ids: token ids, unpadded.

        Returns:
            The input of the first block.
        """
        (first, *_), _ = self._record(ids, 0)[0]
        return first

    def projection(self, layer: int) -> Float[Tensor, "d_in d_model"] | None:
        """The weight of a layer's output projection.

        Args:
            layer: the layer.

        Returns:
            The weight, or None if it cannot be split by heads.
        """
        return output_weight(self.module("attention_value_output", layer))

    def block(
        self,
        layer: int,
        hidden: Hidden,
        columns: tuple[int, int],
        past: Past,
        *,
        attention: Hidden | None = None,
        mlp: Hidden | None = None,
        edits: Mapping[str, InPlace] | None = None,
        seen: dict[str, Tensor] | None = None,
    ) -> Hidden:
        """Run one block.

        Args:
            layer: the block.
            hidden: the block's input.
            columns: the columns `[start, stop)` that the positions of `hidden` have in their prompts.
            past: the keys and values of earlier columns.
            attention: known outputs of the attention module for the last rows, on which it is then not run; without the residual,
                if the module adds it.
            mlp: known outputs of the MLP for the last rows, likewise.
            edits: by site (q, k, v, scores, pattern, z, attn_out, resid_mid, mlp_in, mlp_out), functions that change an
                activation in place: that of all rows at attn_out and later sites, that of the rows whose attention runs at
                earlier ones.
            seen: filled with z, and the outputs of the attention module and of the MLP, by "z", "attention" and "mlp".

        Returns:
            The block's output.
        """
        edits = edits or {}
        inside = [(f"attention_{site}", edits[site]) for site in ("scores", "pattern") if site in edits]
        # An activation that is neither input nor output of a module of the model is edited at its tap.
        shown: list[tuple[str, HookFn]] = [*inside]
        shown += [(name, _on_a_copy(edits[at])) for at, name in ADDED.items() if at in edits and self._is_tap(name)]
        if "resid_mid" in edits and self._is_tap("resid_mid"):
            shown.append(("resid_mid", edits["resid_mid"]))
        attention_module = self.module("attention_input", layer)
        with ExitStack() as stack:
            if self.arguments(*columns)[layer][1].get("alibi") is not None:
                stack.enter_context(replace_forward(attention_module, _with_alibi(attention_module.forward)))
            if attention is not None and len(attention):
                if self.card.sums_inside:
                    attention = attention + hidden[len(hidden) - len(attention) :]
                partly = _partly(attention_module.forward, attention)
                stack.enter_context(replace_forward(attention_module, lambda *a, **k: _with_pattern(partly(*a, **k))))
            if mlp is not None and len(mlp):
                if self._is_tap("mlp_output"):
                    known = mlp
                    shown.insert(0, ("mlp_output", lambda x: torch.cat([x[: len(x) - len(known)], known.to(x)])))
                else:
                    mlp_module = self.module("mlp_output", layer)
                    stack.enter_context(replace_forward(mlp_module, _partly(mlp_module.forward, mlp)))
            if past.shared is not None:
                if inside or not attention_can_be_seen(self.model):
                    past.expand(len(hidden) - (0 if attention is None else len(attention)))
                else:
                    stack.enter_context(shared_past(attention_module, *past.shared))
            for site in ("q", "k", "v"):
                if site in edits:
                    stack.enter_context(self._on_projection(site, layer, edits[site]))
            if seen is not None and self._is_tap("mlp_output"):
                shown.append(("mlp_output", lambda x: seen.__setitem__("mlp", x.clone())))
            if shown:
                stack.enter_context(Taps(self.model, self.card, [(component, layer) for component, _ in shown]))
            for component, fn in shown:
                stack.enter_context(on_output(self.card.module(self.model, component, layer), fn))
            if "z" in edits:
                stack.enter_context(on_input(self.module("attention_value_output", layer), edits["z"]))
            if "attn_out" in edits and not self._is_tap("attention_contribution"):
                edit = edits["attn_out"]
                of_sum = _less(hidden, edit) if self.card.sums_inside else edit
                stack.enter_context(on_output(self._attention_adder(layer), of_sum))
            if "resid_mid" in edits and not self._is_tap("resid_mid"):
                stack.enter_context(on_input(self.module("resid_mid", layer), edits["resid_mid"]))
            if "mlp_in" in edits and not self._is_tap("mlp_input"):
                # On a copy, because other modules may get the same tensor.
                stack.enter_context(on_input(self.module("mlp_input", layer), _on_a_copy(edits["mlp_in"])))
            if "mlp_out" in edits and not self._is_tap("mlp_contribution"):
                stack.enter_context(on_output(self.module("mlp_contribution", layer), edits["mlp_out"]))
            if seen is not None:
                keep = seen.__setitem__
                stack.enter_context(
                    on_input(self.module("attention_value_output", layer), lambda x: keep("z", x.clone()))
                )
                adds = self.module("attention_contribution", layer) if self.card.sums_inside else attention_module
                stack.enter_context(on_output(adds, lambda x: keep("attention", x.clone())))
                if not self._is_tap("mlp_output"):
                    stack.enter_context(on_output(self.module("mlp_output", layer), lambda x: keep("mlp", x.clone())))
            return _call(self.module("block_output", layer), hidden, self.arguments(*columns)[layer], past)

    def keys_values(
        self, layer: int, hidden: Hidden, columns: tuple[int, int], edits: Mapping[str, InPlace] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the keys and values of a block and stop there.

        Args:
            layer: the block.
            hidden: the block's input.
            columns: the columns `[start, stop)` of its positions.
            edits: functions that change k or v in place.

        Returns:
            Keys (rotated) and values, `row n_kv_head pos d_head` each.
        """
        past = Past(only=True)
        with ExitStack() as stack, suppress(StopForward):
            for site, edit in (edits or {}).items():
                stack.enter_context(self._on_projection(site, layer, edit))
            _call(self.module("block_output", layer), hidden, self.arguments(*columns)[layer], past)
        return past.keys_values

    def attention_input(self, layer: int, hidden: Hidden, columns: tuple[int, int]) -> Hidden:
        """Compute the input of a block's attention, after the norm, and stop there.

        Args:
            layer: the block.
            hidden: the block's input.
            columns: the columns `[start, stop)` of its positions.

        Returns:
            The input of the attention module.
        """
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise StopForward

        with replace_forward(self.module("attention_input", layer), stop), suppress(StopForward):
            _call(self.module("block_output", layer), hidden, self.arguments(*columns)[layer], Past())
        return found[0]

    def attention_norm(self, layer: int) -> nn.Module:
        """The module that a block runs before its attention, which is its norm.

        Args:
            layer: the block.

        Returns:
            The module; an identity if there is none.
        """
        called: list[nn.Module] = [nn.Identity()]
        with ExitStack() as stack:
            for module in self.module("block_output", layer).children():
                stack.enter_context(on_output(module, lambda _, module=module: called.append(module)))  # type: ignore[misc]
            width = dimensions(self.model.config)["d_model"]
            self.attention_input(layer, torch.zeros(1, 1, width, dtype=self.dtype, device=self.device), (0, 1))
        return called[-1]

    def projected(self, site: str, layer: int, normed: Hidden) -> Float[Tensor, "row pos d"]:
        """Compute q, k or v before rotation.

        Args:
            site: "q", "k" or "v".
            layer: the block.
            normed: what `attention_input` returns.

        Returns:
            The projection of all heads, side by side.
        """
        return self.own_part(site, self.projection_of(site, layer)(normed))

    def projected_by_head(
        self, site: str, layer: int, normed: Float[Tensor, "row head pos d_model"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "row pos head d_head"]:
        """Compute q, k or v before rotation, where every head reads an input of its own.

        Args:
            site: "q", "k" or "v".
            layer: the block.
            normed: as `attention_input` returns it, for each query head or K/V head.
            heads: which heads these are; by default all.

        Returns:
            The projection of each head.
        """
        module: Any = self.projection_of(site, layer)
        weight = splittable(module)
        sizes = dimensions(self.model.config)
        n = sizes["n_head" if site == "q" else "n_kv_head"]
        chosen = list(range(n) if heads is None else heads)
        if weight is None:
            of_all = [self.projected(site, layer, normed[:, at].contiguous()) for at in range(len(chosen))]
            pairs = zip(chosen, of_all, strict=True)
            return torch.stack([x.unflatten(-1, (n, -1))[:, :, head] for head, x in pairs], 2)
        # Columns of the weight, and the bias, are split as the activations are.
        by_head = self.own_part(site, weight[None]).unflatten(-1, (n, -1))[0]
        every = len(chosen) == n
        found = torch.einsum("rhpd,dhe->rphe", normed.to(weight.device), by_head if every else by_head[:, chosen])
        if module.bias is not None:
            bias = self.own_part(site, module.bias[None, None]).unflatten(-1, (n, -1))
            found = found + (bias if every else bias[:, :, chosen])
        return found

    @contextmanager
    def projections_replaced(self, layer: int, new: Mapping[str, Float[Tensor, "row pos d"]]) -> Iterator[None]:
        """Put new q, k and v in the place of a block's own, which are not computed; gradients reach them.

        Args:
            layer: the block.
            new: the values before rotation, heads side by side, of all three.

        Yields:
            Nothing; inside, the block computes with them.
        """
        with ExitStack() as stack:
            for module, sites in self.projections(layer).items():
                whole = new[sites[0]]
                if len(sites) > 1:
                    places = torch.arange(sum(new[site].shape[-1] for site in sites), device=whole.device)[None, None]
                    order = torch.cat([self.own_part(site, places)[0, 0] for site in sites])
                    whole = torch.cat([new[site] for site in sites], -1)[..., order.argsort()]
                stack.enter_context(on_output(module, lambda _, whole=whole: whole))  # type: ignore[misc] # after hooks of others
                stack.enter_context(replace_forward(module, lambda *_, whole=whole, **__: whole))
            yield

    def projections(self, layer: int) -> dict[nn.Module, list[str]]:
        """The modules that compute q, k and v, each with the sites that it computes.

        Args:
            layer: the block.

        Returns:
            One module, or three.
        """
        found: dict[nn.Module, list[str]] = {}
        for site in PROJECTIONS:
            found.setdefault(self.projection_of(site, layer), []).append(site)
        return found

    def projection_of(self, site: str, layer: int) -> nn.Module:
        """The module that computes q, k or v, maybe with others.

        Args:
            site: "q", "k" or "v".
            layer: the block.

        Returns:
            The module.
        """
        return self._fused(layer) if self.card.fused is not None else self.module(PROJECTIONS[site], layer)

    def own_part(self, site: str, x: Float[Tensor, "row pos d_out"]) -> Float[Tensor, "row pos d"]:
        """Take q, k or v out of the output of the module that computes it, maybe with others.

        Args:
            site: "q", "k" or "v".
            x: the output, or anything of its last axis.

        Returns:
            q, k or v, heads side by side.
        """
        if self.card.fused is not None:
            return self._out_of_fused(site, x).flatten(2)
        for split, which in self.card.mapping(type(self.model))[PROJECTIONS[site]][
            2:
        ]:  # GPT-2 projects all three at once
            x = split(x, which)
        return x

    def logits(self, hidden: Float[Tensor, "row d_model"], ids: Int[Tensor, "*row k"] | None = None) -> Tensor:
        """Compute logits from the output of the last block, through the final norm and the model's own scale or soft-cap.

        Args:
            hidden: the last block's output at one position of each row.
            ids: the tokens wanted of all rows, or of each: only their rows of the unembedding are used, in float32. None: all.

        Returns:
            Logits, `row k` or `row vocab`.
        """
        return self.unembed(self.module("final_norm")(hidden[:, None])[:, 0], ids)

    def unembed(self, normed: Float[Tensor, "row d_model"], ids: Int[Tensor, "*row k"] | None = None) -> Tensor:
        """Compute logits from the output of the final norm.

        Args:
            normed: the final norm's output at one position of each row, in the model's dtype or in float32.
            ids: as for `logits`.

        Returns:
            Logits, `row k` or `row vocab`.
        """
        if not unembeds_in_half(self.model.get_output_embeddings()):
            normed = normed.to(self.dtype)
        with ExitStack() as stack:
            stack.enter_context(logits_in_float32(self.model))
            done: Any = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=normed[:, None])
            done.router_logits = None  # models with experts read it
            stack.enter_context(replace_forward(self.bare, lambda *_, **__: done))
            narrow = ids is not None and stack.enter_context(unembedding_only(self.model, ids))
            logits = self.model(input_ids=torch.full((1, 1), self._token, device=self.device)).logits[:, 0]
        if ids is None or narrow:
            return logits
        ids = ids.to(logits.device)
        return logits[:, ids] if ids.ndim == 1 else logits.gather(1, ids)

    def arguments(self, start: int, stop: int) -> list[tuple[tuple, dict]]:
        """The arguments of every block for a prompt's columns `[start, stop)`, earlier ones being in the cache.

        Args:
            start: the first column.
            stop: one past the last column.

        Returns:
            For each block, positional and keyword arguments; the first is a hidden state to be replaced, `Past` stands for a
            cache.
        """
        if (start, stop) not in self._arguments:
            ids = torch.full((1, stop - start), self._token, device=self.device)
            self._arguments[start, stop] = self._record(ids, start)
        return self._arguments[start, stop]

    @contextmanager
    def compiled_mlps(self) -> Iterator[None]:
        """Within the context, run the MLPs through torch.compile; one graph serves all layers and any number of rows.

        Whole blocks do not compile: which rows run through attention, and over which keys, differs from call to call.
        """
        with ExitStack() as stack:
            for layer in range(self.n_layers):
                mlp = self.module("mlp_output", layer)
                stack.enter_context(replace_forward(mlp, torch.compile(mlp.forward, dynamic=True)))
            yield

    def _on_projection(self, site: str, layer: int, edit: InPlace) -> AbstractContextManager[None]:
        """Edit q, k or v of all heads side by side, `row pos d`, at the output of their projection."""
        component = PROJECTIONS[site]
        if self.card.fused is not None:

            def of_fused(x: Tensor) -> None:
                own = self._out_of_fused(site, x)
                flat = own.flatten(2)  # a copy if heads are not adjacent
                edit(flat)
                if flat.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
                    own.copy_(flat.view(own.shape))

            return on_output(self._fused(layer), of_fused)
        _, _, *splits = self.card.mapping(type(self.model))[component]

        def part(x: Tensor) -> None:
            for split, which in splits:  # GPT-2 projects all three at once
                x = split(x, which)
            edit(x)

        return on_output(self.module(component, layer), part)

    def _fused(self, layer: int) -> nn.Module:
        """The module that computes q, k and v in one projection."""
        path, _, _ = self.card.mapping(type(self.model))["query_output"][0].rpartition(".")
        return self.model.get_submodule(at_layer(path, layer))

    def _out_of_fused(self, site: str, x: Tensor) -> Float[Tensor, "row pos head d_head"]:
        assert self.card.fused is not None
        return self.card.fused(x, dimensions(self.model.config))[tuple(PROJECTIONS).index(site)]

    def _is_tap(self, component: str) -> bool:
        return self.card.is_tap(self.model, component)

    def _attention_adder(self, layer: int) -> nn.Module:
        """The module whose output attention adds to the residual stream."""
        if layer not in self._adders:
            attention, adder = self.module("attention_input", layer), self.module("attention_contribution", layer)
            # Rows that skip attention would not reach a module inside it.
            self._adders[layer] = attention if any(module is adder for module in attention.modules()) else adder
        return self._adders[layer]

    def _record(self, ids: Int[Tensor, "row pos"], start: int) -> list[tuple[tuple, dict]]:
        """Run the model's forward with every block skipped.

        Returns how each block was called, its hidden state first, with `Past` in place of the cache.
        """
        cache = DynamicCache()  # without a config, so that no layer drops what has left a sliding window
        if start:
            nothing = torch.empty(len(ids), 1, start, 1, device=self.device)
            cache.update(nothing, nothing, 0)
        calls: list[tuple[tuple, dict]] = []

        def skipped(entering: Tensor | tuple[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor]:
            (hidden_states,) = entering if isinstance(entering, tuple) else (entering,)
            swap = {id(cache): Past}
            args = tuple(swap.get(id(value), value) for value in args)
            calls.append(((hidden_states, *args), {name: swap.get(id(v), v) for name, v in kwargs.items()}))
            if len(calls) == self.n_layers:
                raise StopForward
            return (hidden_states,)  # some models take the first entry, the others pass the tuple to the next block

        with ExitStack() as stack, suppress(StopForward):
            for layer in range(self.n_layers):
                stack.enter_context(replace_forward(self.module("block_output", layer), skipped))
            self.bare(input_ids=ids, past_key_values=cache, use_cache=False)
        return calls


def splittable(projection: Any) -> Float[Tensor, "d_in d_out"] | None:
    """The weight of a projection whose heads can be computed one by one.

    Args:
        projection: a module that computes q, k or v.

    Returns:
        The weight; None if something else takes part in what the module does, such as an adapter or a hook.
    """
    return None if projection._forward_hooks or projection._forward_pre_hooks else output_weight(projection)


def _call(block: nn.Module, hidden: Tensor, recorded: tuple[tuple, dict], past: Past) -> Tensor:
    """Call a block with its recorded arguments, on another hidden state and cache."""
    (_, *args), kwargs = recorded
    swapped = (past if value is Past else value for value in args)
    output = block(hidden, *swapped, **{name: past if value is Past else value for name, value in kwargs.items()})
    return output[0] if isinstance(output, tuple) else output


def _partly(forward: Callable[..., Any], known: Tensor) -> Callable[..., Any]:
    """Run `forward` on the first rows only; the outputs of the last rows are known."""

    def partly(*args: Any, **kwargs: Any) -> Any:
        name = "" if args else "hidden_states"
        x = kwargs.pop(name) if name else args[0]
        here, first = known.to(x.device), x[: len(x) - len(known)]
        if not len(first):
            return here
        # Other arguments with these rows: the residual, where attention adds it (BLOOM).
        others = [a[: len(first)] if isinstance(a, Tensor) and a.shape == x.shape else a for a in args[1:]]
        output = forward(**{name: first}, **kwargs) if name else forward(first, *others, **kwargs)
        if isinstance(output, tuple):
            return torch.cat([output[0], here]), *output[1:]
        return torch.cat([output, here])

    return partly


def _with_alibi(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Repeat an attention's ALiBi bias, which was recorded for one row, for as many rows as it is called with."""

    def repeated(*args: Any, alibi: Tensor, **kwargs: Any) -> Any:
        return forward(*args, alibi=alibi.repeat(len(args[0]), 1, 1), **kwargs)

    return repeated


def _on_a_copy(edit: InPlace) -> HookFn:
    """Turn an edit in place into one that returns an edited copy."""

    def edited(x: Tensor) -> Tensor:
        x = x.clone()
        edit(x)
        return x

    return edited


def _less(residual: Tensor, edit: InPlace) -> HookFn:
    """Edit what a module adds to the residual, where the module returns the sum."""

    def edited(x: Tensor) -> Tensor:
        added = x - residual
        edit(added)
        return residual + added

    return edited


def _with_pattern(output: Any) -> tuple:
    """An attention module's return value: its output, then the pattern or None."""
    return output if isinstance(output, tuple) else (output, None)
