"""Attention patterns of selected heads on selected prompts, in one small file of a run folder.

    write_views(folder, look(model, tokenizer, prompts.input_ids, heads[:HEADS]))

The file, attention.json, holds {"prompts": [{"name", "tokens": [...], "heads": {"3.5": [[1.0], [0.25, 0.75], ...]}}]}. Each row
is a query token, with one weight a key token up to and including itself, rounded to three decimals. `report.attention` draws it.
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
HEADS, PROMPTS = 5, 5  # that a study shows by default
CELLS = 400_000  # attention weights in a file, about two megabytes; of longer prompts fewer fit


@dataclass(frozen=True)
class View:
    """Attention patterns of some heads on one prompt.

    Attributes:
        name: the prompt's name in menus.
        tokens: the tokens as text.
        patterns: pattern of each head, by its label ("3.5").
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
    """Read the attention patterns of some heads on some prompts, one prompt a forward pass.

    Args:
        model: a model whose family has a card.
        tokenizer: the one that made the prompts.
        prompts: prompts to choose from, as token ids.
        heads: (layer, head), in the order of the menu.
        which: indices of the prompts to show; by default the first few, skipping those that would make the file too large.
        names: names of all prompts; by default "prompt 0" and so on.

    Returns:
        One view a prompt; none if the family's attention patterns cannot be read.
    """
    heads = list(dict.fromkeys(heads))
    which = list(which) if which is not None else _prompts_that_fit(prompts, len(heads))
    if not heads or not which or not can_be_seen(model):
        return []
    found: dict[tuple[int, Head], np.ndarray] = {}

    def keep(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        for head in heads:
            if head[0] == layer:
                found[batch.index[0], head] = pattern[0, head[1]].float().cpu().numpy()

    ids = [tuple(prompts[prompt]) for prompt in which]
    some = TokenizedPrompts(tuple(ids))
    read_patterns(model, some, keep, batch_size=1, progress=False)
    return [
        View(
            names[prompt] if names else f"prompt {prompt}",
            [str(tokenizer.decode([token])) for token in ids[row]],
            {f"{layer}.{head}": found[row, (layer, head)] for layer, head in heads},
        )
        for row, prompt in enumerate(which)
    ]


def _prompts_that_fit(prompts: Sequence[Sequence[int]], heads: int) -> list[int]:
    """The first few prompts, skipping those that would exceed the size of a file."""
    chosen: list[int] = []
    budget = CELLS
    for prompt, ids in enumerate(prompts):
        needed = heads * len(ids) * (len(ids) + 1) // 2
        if needed <= budget and len(chosen) < PROMPTS:
            chosen.append(prompt)
            budget -= needed
    return chosen


def write_views(folder: Path, views: Sequence[View]) -> None:
    """Write views into a run folder; if there are none, remove the file of an earlier run.

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
    """Read what `write_views` wrote.

    Args:
        path: the file.

    Returns:
        One view a prompt, with square patterns.

    Raises:
        ValueError: the file is not of that form.
    """
    views = []
    for prompt in read_as(_File, path).prompts:
        patterns = {}
        for head, rows in prompt.heads.items():
            if [len(row) for row in rows] != list(range(1, len(prompt.tokens) + 1)):
                raise ValueError(
                    f"{path}: head {head} on {prompt.name} must have rows of 1, 2 and so on up to {len(prompt.tokens)} "
                    "weights, one row a token."
                )
            patterns[head] = np.zeros((len(rows), len(rows)))
            for query, row in enumerate(rows):
                patterns[head][query, : query + 1] = row
        views.append(View(prompt.name, prompt.tokens, patterns))
    return views


def plain(view: View) -> dict[str, Any]:
    """Convert a view to the file's format; ValueError for a pattern that does not fit the tokens."""
    heads = {}
    for head, pattern in view.patterns.items():
        n = len(view.tokens)
        if np.shape(pattern) != (n, n):
            raise ValueError(f"{view.name}: the pattern of {n} tokens is [{n} {n}], not of shape {np.shape(pattern)}.")
        rounded = np.asarray(pattern, np.float64).round(3)
        heads[head] = [rounded[query, : query + 1].tolist() for query in range(n)]
    return {"name": view.name, "tokens": list(view.tokens), "heads": heads}
