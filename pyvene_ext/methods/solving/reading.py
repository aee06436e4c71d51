"""Prompts read under specs (prefill); the layers and tokens before a spec's first edit, which it leaves alone, are run once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from modelcards import card_of, n_layers
from pyvene_ext.engine.compile import Compiled
from pyvene_ext.engine.decode.past import KeysValues
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.methods.solving.decoding import Beginning
from pyvene_ext.models.hooks import hook_component, replace_forward
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, members


class Untouched(NamedTuple):
    """Prompts as the untouched model reads them; the tokens of each stand in the first columns.

    Attributes:
        keys_values: by layer.
        logits: at the prompts' last tokens.
        streams: what enters some of the blocks, by layer.
    """

    keys_values: list[KeysValues]
    logits: Float[Tensor, "prompt vocab"]
    streams: dict[int, Float[Tensor, "prompt pos d_model"]]


class Unedited(NamedTuple):
    """What of the prompts of a batch a spec leaves as it is.

    Attributes:
        layer: the first layer that is edited.
        column: the first column of the batch, padded on the left, that is edited in any row.
    """

    layer: int
    column: int

    @classmethod
    def of(cls, spec: Spec, resolved: Resolved, batch: Batch) -> Unedited:
        """Find the first edits of a spec."""
        columns = [
            start + edit.first_edited(resolved.prompts, prompt, tokens)
            for edit in members(spec)
            for prompt, start, tokens in zip(
                batch.index, batch.starts, resolved.tokens_of(edit, batch.index), strict=True
            )
        ]
        return cls(min(edit.layer or 0 for edit in members(spec)), max(0, min(columns)))

    def left(self, model: PreTrainedModel, batch: Batch) -> float:
        """The share of the work of reading the batch that is left."""
        return (1 - self.layer / n_layers(model.config)) * (1 - self.column / batch.input_ids.shape[1])


def read_untouched(
    model: PreTrainedModel, batch: Batch, layers: Collection[int] = (), beginning: Beginning | None = None
) -> Untouched:
    """Let the untouched model read prompts.

    Args:
        model: the model.
        batch: the prompts, padded on the left.
        layers: the blocks whose inputs are recorded.
        beginning: what all prompts begin with, if that has been read; nothing can be recorded then.

    Returns:
        What later readings take from it.
    """
    inputs, past, shared = batch.inputs(), DynamicCache(), 0  # without a config: no layer drops what has left a window
    if beginning is not None:
        inputs, past, shared = beginning.rest, beginning.past, beginning.length
    columns = _columns_of_tokens(batch, shared)
    streams: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def record(x: Tensor, layer: int = layer) -> None:
                streams[layer] = _gathered(x, columns)

            hook_component(model, ("block_input", layer), record, hooks)
        out = model(**inputs, past_key_values=past, use_cache=True, logits_to_keep=1)
    return Untouched(_first_columns(out.past_key_values, columns), out.logits[:, -1], streams)


def read_edited(
    model: PreTrainedModel,
    batch: Batch,
    compiled: Compiled,
    unedited: Unedited,
    untouched: tuple[Untouched, Sequence[int]] | None,
    beginning: Beginning | None = None,
) -> tuple[list[KeysValues], Float[Tensor, "prompt vocab"]]:
    """Let the model read prompts with an intervention in place.

    Args:
        model: the model.
        batch: the prompts, padded on the left.
        compiled: the intervention.
        unedited: what it leaves as it is.
        untouched: where that is taken from: an earlier reading, and in which of its rows each prompt is.
        beginning: what all prompts begin with, if that has been read and is not edited.

    Returns:
        Keys and values by layer, the tokens of each prompt in the first columns; and the logits at the last tokens.
    """
    inputs, past, shared = batch.inputs(), DynamicCache(), 0
    outputs: list[Any] = []
    if beginning is not None:
        inputs, past, shared = beginning.rest, beginning.past, beginning.length
    with ExitStack() as hooks:
        if untouched is not None:
            layer, column = unedited
            read, rows = untouched
            tokens = (torch.arange(batch.input_ids.shape[1]) - torch.tensor(batch.starts)[:, None]).clamp(min=0)
            if column:
                for number, (keys, values) in enumerate(read.keys_values):
                    past.update(*(_gathered(x, tokens[:, :column], rows) for x in (keys, values)), number)  # type: ignore[arg-type]
                inputs = {name: x if name == "attention_mask" else x[:, column:] for name, x in inputs.items()}
            if layer:
                stream = _gathered(read.streams[layer], tokens[:, column:], rows)
                for earlier in range(layer):
                    hooks.enter_context(
                        replace_forward(card_of(model).module(model, "block_output", earlier), _skipped)
                    )
                hook_component(model, ("block_input", layer), lambda _: stream, hooks)  # before the spec's own hooks

        def run(**_: Tensor) -> None:
            outputs.append(model(**inputs, past_key_values=past, use_cache=True, logits_to_keep=1))

        iv = IntervenableModel(compiled.config, model)
        iv.generate(
            batch.inputs(),
            unit_locations=compiled.unit_locations,
            source_representations=compiled.source_representations(iv.sorted_keys),
            intervene_on_prompt=True,
            intervene_on_new_tokens=False,
            decode=run,
        )
    known: list[KeysValues] = []
    if untouched is not None:
        longest = max(batch.lengths)
        known = [
            (keys[rows, :, :longest], values[rows, :, :longest]) for keys, values in read.keys_values[: unedited.layer]
        ]
    made = _first_columns(outputs[0].past_key_values, _columns_of_tokens(batch, shared), len(known))
    return [*known, *made], outputs[0].logits[:, -1]


def _skipped(entering: Tensor | tuple[Tensor], *_: Any, **__: Any) -> tuple[Tensor]:
    """A block that does nothing: some models take the first entry of what it returns, the others pass the tuple on."""
    (hidden,) = entering if isinstance(entering, tuple) else (entering,)
    return (hidden,)


def _columns_of_tokens(batch: Batch, shared: int) -> Int[Tensor, "prompt pos"]:
    """The column of each token: the first ones, which all prompts share, come before the padding, the others after it."""
    width = batch.input_ids.shape[1]
    token = torch.arange(width)
    return torch.where(token < shared, token, (token + torch.tensor(batch.starts)[:, None]).clamp(max=width - 1))


def _first_columns(cache: Any, columns: Tensor, first_layer: int = 0) -> list[KeysValues]:
    """Bring each prompt's tokens to the first columns, layer by layer, and empty the cache."""
    found = []
    for layer in cache.layers[first_layer:]:
        found.append((_gathered(layer.keys, columns), _gathered(layer.values, columns)))
        layer.keys = layer.values = None
    return found


def _gathered(x: Tensor, columns: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Take columns of `prompt n_kv_head pos d` or `prompt pos d`, which differ from prompt to prompt."""
    columns = columns.to(x.device)
    row = torch.arange(len(x), device=x.device) if rows is None else torch.tensor(rows, device=x.device)
    if x.ndim == 3:
        return x[row[:, None], columns]
    return x[row[:, None, None], torch.arange(x.shape[1], device=x.device)[:, None], columns[:, None]]
