"""Attention patterns of all heads of the studied layers on a few prompts, in one compact file of a run folder.

    write_views(folder, look(model, tokenizer, prompts.input_ids, heads[:HEADS]))

The file, attention.json, holds {"prompts": [{"name", "tokens": [...], "first": ["3.5", ...], "left_out": "...", "layers": {"3":
"H4sI..."}}]}. A layer is base64 of gzip of one byte per weight, round(255 x weight): head by head, the rows of its query tokens,
each with the key tokens up to and including itself. `report.attention` draws it.

A file holds at most `BYTES`. Where that is too little for all layers, only those of the heads named first are kept, and then
fewer prompts; `left_out` says what is missing.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_heads, n_layers
from pyvene_ext.io.files import atomic_path, read_as
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.models.hooks import attention_can_be_seen
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.stats.controls import Head, head_label

FILE = "attention.json"
HEADS, PROMPTS = 5, 10  # heads named first, and prompts, that a study shows by default
BYTES = 10_000_000  # of a file
CELLS = 3 * BYTES  # weights that are read for a file; compressed they mostly take less than a third of a byte each

Patterns = UInt8[np.ndarray, "head query key"]


@dataclass(frozen=True)
class View:
    """Attention patterns of the heads of some layers on one prompt.

    Attributes:
        name: the prompt's name in menus.
        tokens: the tokens as text.
        patterns: by layer, those of all its heads: round(255 x weight).
        first: (layer, head) of those to show first.
        left_out: what is not kept, as words for the page; empty if nothing is missing.
    """

    name: str
    tokens: Sequence[str]
    patterns: Mapping[int, Patterns]
    first: Sequence[Head] = ()
    left_out: str = ""


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    heads: Iterable[Head],
    *,
    which: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[View]:
    """Read the attention patterns of all heads on some prompts, one prompt per forward pass.

    Args:
        model: a model whose family has a card.
        tokenizer: the one that made the prompts.
        prompts: prompts to choose from, as token ids.
        heads: (layer, head) of those to show first; where not all layers fit, only those of these heads are kept.
        which: indices of the prompts to show; by default the first ten.
        names: names of all prompts; by default "prompt 0" and so on.

    Returns:
        One view a prompt; none if no heads are given or the family's attention patterns cannot be read.
    """
    heads = list(dict.fromkeys(heads))
    wanted = list(range(min(PROMPTS, len(prompts))) if which is None else which)
    if not heads or not wanted or not attention_can_be_seen(model):
        return []
    layers, chosen = _that_fit(model, {prompt: len(prompts[prompt]) for prompt in wanted}, heads)
    if not chosen:
        return []
    found: list[dict[int, Patterns]] = [{} for _ in chosen]

    def keep(layer: int, batch: Batch, pattern: Tensor) -> None:
        if layer in layers:
            found[batch.index[0]][layer] = quantised(pattern[0].float().cpu().numpy())

    ids = [tuple(prompts[prompt]) for prompt in chosen]
    read_patterns(model, TokenizedPrompts(tuple(ids)), keep, batch_size=1, progress=False)
    missing = [f"all layers but {', '.join(map(str, layers))}"] if len(layers) < n_layers(model.config) else []
    if len(chosen) < len(wanted):
        missing.append(f"{len(wanted) - len(chosen)} of {len(wanted)} prompts")
    return [
        View(
            names[prompt] if names else f"prompt {prompt}",
            [str(tokenizer.decode([token])) for token in ids[row]],
            found[row],
            heads,
            " and ".join(missing),
        )
        for row, prompt in enumerate(chosen)
    ]


def quantised(pattern: np.ndarray) -> Patterns:
    """Convert weights from 0 to 1 to bytes."""
    return np.rint(255 * np.clip(pattern, 0, 1)).astype(np.uint8)


def _that_fit(
    model: PreTrainedModel, lengths: Mapping[int, int], heads: Sequence[Head]
) -> tuple[Sequence[int], list[int]]:
    """The layers and prompts whose weights are few enough: all, else the layers of `heads`, else fewer prompts."""
    found: tuple[Sequence[int], list[int]] = ((), [])
    for layers in (range(n_layers(model.config)), sorted({layer for layer, _ in heads})):
        chosen, left = [], CELLS
        for prompt, length in lengths.items():
            needed = len(layers) * n_heads(model.config) * length * (length + 1) // 2
            if needed <= left:
                chosen.append(prompt)
                left -= needed
        found = layers, chosen
        if len(chosen) == len(lengths):
            break
    return found


def write_views(folder: Path, views: Sequence[View]) -> None:
    """Write views into a run folder, the last ones only as far as they fit; if there are none, remove an earlier run's file.

    Args:
        folder: the run folder.
        views: what `look` returns.

    Raises:
        ValueError: a pattern is not of the shape of its tokens.
    """
    path = folder / FILE
    if not views:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(as_json({"prompts": within(views)}) + "\n", encoding="utf-8")


def within(views: Sequence[View], limit: int = BYTES) -> list[dict[str, Any]]:
    """Convert views to the file's format, as many as fit; the first says how many do not.

    Args:
        views: the views.
        limit: bytes of JSON.

    Returns:
        Plain data of each view that is kept, at least one.

    Raises:
        ValueError: a pattern is not of the shape of its tokens.
    """
    kept: list[dict[str, Any]] = []
    for view in views:
        one = plain(view)
        limit -= len(as_json(one).encode())
        if limit < 0 and kept:
            break
        kept.append(one)
    if len(kept) < len(views):
        more = f"{len(views) - len(kept)} of {len(views)} prompts"
        told = [f"{one['left_out']} and {more}" if one["left_out"] else more for one in kept]
        kept = [one | {"left_out": words} for one, words in zip(kept, told, strict=True)]
    return kept


def as_json(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


HeadName = Annotated[str, Field(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}$")]
LayerName = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]


class _Prompt(BaseModel):
    name: str
    tokens: Annotated[list[str], Field(min_length=1)]
    first: list[HeadName]
    left_out: str
    layers: Annotated[dict[LayerName, str], Field(min_length=1)]


class _File(BaseModel):
    prompts: list[_Prompt]


def read_views(path: str | Path) -> list[View]:
    """Read what `write_views` wrote.

    Args:
        path: the file.

    Returns:
        One view a prompt, with square patterns.

    Raises:
        ValueError: the file is not of that form.
    """
    views, left = [], CELLS  # so that a small file cannot fill the memory
    for prompt in read_as(_File, path).prompts:
        patterns: dict[int, Patterns] = {}
        try:
            for layer, text in prompt.layers.items():
                patterns[int(layer)], left = _unpacked(text, len(prompt.tokens), left)
        except (ValueError, zlib.error, EOFError) as error:
            raise ValueError(
                f"{path}: the patterns of {prompt.name} are damaged ({error}); run the study again."
            ) from None
        view = View(prompt.name, prompt.tokens, patterns, left_out=prompt.left_out)
        heads = [(int(layer), int(head)) for layer, _, head in (name.partition(".") for name in prompt.first)]
        some = [(layer, head) for layer, head in heads if layer in patterns and head < len(patterns[layer])]
        views.append(replace(view, first=some))
    return views


def plain(view: View) -> dict[str, Any]:
    """Convert a view to the file's format; ValueError for a pattern that does not fit the tokens."""
    n = len(view.tokens)
    for pattern in view.patterns.values():
        if np.ndim(pattern) != 3 or np.shape(pattern)[1:] != (n, n):
            shape = np.shape(pattern)
            raise ValueError(f"{view.name}: the patterns of {n} tokens are [head {n} {n}], not of shape {shape}.")
    return {
        "name": view.name,
        "tokens": list(view.tokens),
        "first": [head_label(head) for head in view.first],
        "left_out": view.left_out,
        "layers": {str(layer): _packed(pattern) for layer, pattern in view.patterns.items()},
    }


def _packed(patterns: Patterns) -> str:
    rows, columns = np.tril_indices(patterns.shape[1])
    return base64.b64encode(gzip.compress(patterns[:, rows, columns].tobytes(), mtime=0)).decode()


def _unpacked(text: str, n: int, most: int) -> tuple[Patterns, int]:
    """The square patterns of a layer's heads on n tokens, and how many more weights may follow."""
    each = n * (n + 1) // 2
    inflate = zlib.decompressobj(wbits=31)
    weights = np.frombuffer(inflate.decompress(base64.b64decode(text, validate=True), most + 1), np.uint8)
    if weights.size > most:
        raise ValueError("too many weights")
    if not weights.size or weights.size % each or not inflate.eof:
        raise ValueError(f"{weights.size} weights are not those of whole heads on {n} tokens")
    patterns = np.zeros((weights.size // each, n, n), np.uint8)
    rows, columns = np.tril_indices(n)
    patterns[:, rows, columns] = weights.reshape(-1, each)
    return patterns, most - weights.size
