"""The studies of critical heads the slow way: one problem at a time, no cache."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyvene_ext.io.seeds import rng
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.tiny_tasks import draw

Logits = Callable[[Sequence[int]], torch.Tensor]  # ids of a problem -> logits [vocab] behind them


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def written(model: Any, tokenizer: Any, ids: Sequence[int], logits: Logits, new: int) -> list[int]:
    """What is written behind some tokens, greedily, until the end token."""
    out: list[int] = []
    while len(out) < new:
        token = int(logits([*ids, *out]).argmax())
        if token == tokenizer.eos_token_id:
            break
        out.append(token)
    return out


def number(text: str) -> float | None:
    """The last whole number behind the first ####; the tiny models know no other, and no new line."""
    found = re.findall(r"\d+", text.partition("####")[2])
    return float(found[-1]) if found else None


@cache
def blocks(name: str, count: int, **options: Any) -> tuple[Any, Any, list[tuple[list[int], range, float]]]:
    """A model, its tokenizer, and of each tiny problem the tokens up to its ####, which of them are the block, the answer."""
    model, tokenizer = load_model(name, **options)
    generator, found = rng(0, "word problems"), []
    mark = tokenizer.convert_tokens_to_ids("####")

    @torch.no_grad()
    def untouched(ids: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([list(ids)])).logits[0, -1]

    for _ in range(count):
        example = draw("arithmetic", generator, held_out=True)
        ids = tokenizer(example.prompt)["input_ids"]
        solution = written(model, tokenizer, ids, untouched, 32)
        before = solution.index(mark)
        found.append(
            ([*ids, *solution[: before + 1]], range(len(ids), len(ids) + before), float(example.answer.split()[-1]))
        )
    return model, tokenizer, found
