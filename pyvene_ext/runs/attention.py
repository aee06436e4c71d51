"""Where heads look, as a study leaves it: patterns of some heads on some prompts, in one small file beside the others.

    write_views(folder, look(model, tokenizer, prompts.input_ids, heads[:HEADS]))

The file, attention.json, holds {"prompts": [{"name", "tokens": [...], "heads": {"3.5": [[1.0], [0.25, 0.75], ...]}}]}. A row is a
token that looks, with a weight for every token before it and for itself, rounded to three places. `report.attention` draws it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.io.files import atomic_path, read_as
from pyvene_ext.methods.heads.patterns import can_be_seen, read_patterns
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.stats.controls import Head

FILE = "attention.json"
HEADS, PROMPTS = 5, 5  # that a study shows if not told otherwise
CELLS = 400_000  # weights in a file, two megabytes or so; longer prompts are fewer


@dataclass(frozen=True)
class View:
    """Some heads on one prompt.

    Attributes:
        name: what menus call the prompt.
        tokens: as they are to be shown.
        patterns: where each token (row) looks, by head ("3.5").
    """

    name: str
    tokens: Sequence[str]
    patterns: Mapping[str, Float[np.ndarray, "query key"]]


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    heads: Iterable[Head],
    *,
    which: Iterable[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[View]:
    """The patterns of some heads on some prompts, one prompt a forward pass; nothing if the model's attention cannot be seen.

    Args:
        model: with a card.
        tokenizer: the prompts'.
        prompts: to choose from, as ids.
        heads: (layer, head), in the order of the menu.
        which: the prompts; by default the first few, without those that would make the file too large.
        names: of all prompts; by default "prompt 0" and so on.
    """
    heads = list(dict.fromkeys(heads))
    which = list(which) if which is not None else _that_fit(prompts, len(heads))
    if not heads or not which or not can_be_seen(model):
        return []
    found: dict[tuple[int, Head], np.ndarray] = {}

    def see(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        for head in heads:
            if head[0] == layer:
                found[batch.index[0], head] = pattern[0, head[1]].float().cpu().numpy()

    ids = [tuple(prompts[prompt]) for prompt in which]
    nowhere = ({"end": -1, "last": -1},) * len(ids)
    some = TokenizedPrompts(tuple(ids), ((0, 0),) * len(ids), nowhere, pad_id=0)  # not padded: one a batch
    read_patterns(model, some, see, batch_size=1, progress=False)
    return [
        View(
            names[prompt] if names else f"prompt {prompt}",
            [str(tokenizer.decode([token])) for token in ids[row]],
            {f"{layer}.{head}": found[row, (layer, head)] for layer, head in heads},
        )
        for row, prompt in enumerate(which)
    ]


def _that_fit(prompts: Sequence[Sequence[int]], heads: int) -> list[int]:
    """The first few prompts, without those that would take a file beyond its size."""
    chosen: list[int] = []
    room = CELLS
    for prompt, ids in enumerate(prompts):
        needed = heads * len(ids) * (len(ids) + 1) // 2
        if needed <= room and len(chosen) < PROMPTS:
            chosen.append(prompt)
            room -= needed
    return chosen


def write_views(folder: Path, views: Sequence[View]) -> None:
    """Write the views into the folder of a run; if there are none, leave no file of an earlier run there."""
    path = folder / FILE
    if not views:
        path.unlink(missing_ok=True)
        return
    text = json.dumps({"prompts": [plain(view) for view in views]}, ensure_ascii=False, separators=(",", ":"))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


Weight = Annotated[float, Field(ge=0, le=1.001, allow_inf_nan=False)]
HeadName = Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]


class _Prompt(BaseModel):
    name: str
    tokens: list[str]
    heads: Annotated[dict[HeadName, list[list[Weight]]], Field(min_length=1)]


class _File(BaseModel):
    prompts: list[_Prompt]


def read_views(path: str | Path) -> list[View]:
    """What `write_views` has written. Raises ValueError, naming the file, for anything else."""
    views = []
    for prompt in read_as(_File, path).prompts:
        patterns = {}
        for head, rows in prompt.heads.items():
            if [len(row) for row in rows] != list(range(1, len(prompt.tokens) + 1)):
                raise ValueError(
                    f"{path}: head {head} on {prompt.name} must have a row of 1, one of 2 and so on up to "
                    f"{len(prompt.tokens)} weights, as many as there are tokens."
                )
            patterns[head] = np.zeros((len(rows), len(rows)))
            for query, row in enumerate(rows):
                patterns[head][query, : query + 1] = row
        views.append(View(prompt.name, prompt.tokens, patterns))
    return views


def plain(view: View) -> dict[str, Any]:
    """A view as the file has it; ValueError for a pattern that does not belong to the tokens."""
    heads = {}
    for head, pattern in view.patterns.items():
        n = len(view.tokens)
        if np.shape(pattern) != (n, n):
            raise ValueError(f"{view.name}: {n} tokens have no pattern of shape {np.shape(pattern)}.")
        rounded = np.asarray(pattern, np.float64).round(3)
        heads[head] = [rounded[query, : query + 1].tolist() for query in range(n)]
    return {"name": view.name, "tokens": list(view.tokens), "heads": heads}
