"""Tables of input attributions: contributions of the tokens of word problems to a head by tag, compared with random heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.attribution.inputs import InputAttribution, Target
from pyvene_ext.prompts.token_tags import TAGS, tag_tokens
from pyvene_ext.stats import accuracy
from pyvene_ext.stats.controls import Head, head_label
from pyvene_ext.stats.intervals import Interval, bootstrap_mean
from pyvene_ext.stats.tables import interval_columns

Row = dict[str, Any]


@dataclass(frozen=True)
class AttributedHead:
    """Input attributions of one head and its controls on some problems.

    Attributes:
        model: the model's name.
        head: (layer, head).
        own: the attributions of the head.
        controls: those of random heads of the same layer.
        hub: the token of the block that is attended to; None for a projection, and where each problem has its own.
        target: the scalar that is attributed.
        problems: the problems, by their numbers in the set.
        tags: of the tokens of each problem, "special" for those without attribution.
        texts: the tokens of each problem as text.
    """

    model: str
    head: Head
    own: InputAttribution
    controls: dict[Head, InputAttribution]
    hub: int | None
    target: Target
    problems: tuple[int, ...]
    tags: list[list[str]]
    texts: list[list[str]]


def tagged_prompts(
    input_ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[str]], list[list[str]]]:
    """Tag the tokens of prompts.

    Args:
        input_ids: the prompts' tokens.
        tokenizer: the model's.

    Returns:
        The tags of each prompt's tokens, "special" for special ones, and their texts.
    """
    tags, texts = [], []
    for ids in input_ids:
        of_tokens, words = tag_tokens(ids, tokenizer)
        names = tokenizer.convert_ids_to_tokens(list(ids))
        special = [token in tokenizer.all_special_ids for token in ids]
        tags.append(["special" if at else tag for at, tag in zip(special, of_tokens, strict=True)])
        texts.append([name if at else word for at, name, word in zip(special, names, words, strict=True)])
    return tags, texts


def tag_rows(found: AttributedHead, seed: int) -> list[Row]:
    """Make the table of a head by tag.

    Args:
        found: the attributions.
        seed: of the bootstrap.

    Returns:
        One row per tag.
    """
    own = _shares(found.tags, found.own)
    of_tokens = np.array([_tag_shares(tags, np.ones(len(tags))) for tags in found.tags])
    others = np.array([_shares(found.tags, control) for control in found.controls.values()])
    # The mean over the controls that are complete for a problem.
    counted = np.isfinite(others).sum(0) if len(others) else np.zeros_like(own)
    with np.errstate(invalid="ignore"):
        random = (np.nansum(others, 0) if len(others) else np.zeros_like(own)) / np.where(counted, counted, math.nan)
    rows = []
    for number, tag in enumerate(TAGS):
        columns = {
            "share": own[:, number],
            "more_than_tokens": (own - of_tokens)[:, number],
            "random_share": random[:, number],
            "more_than_random": (own - random)[:, number],
        }
        row: Row = {"model": found.model, "head": head_label(found.head), "hub": found.hub, "tag": tag}
        row["problems"] = int(np.isfinite(own[:, number]).sum())
        row["token_share"] = (
            float(of_tokens[np.isfinite(own[:, number]), number].mean()) if row["problems"] else math.nan
        )
        for name, values in columns.items():
            # The same draws of problems for every tag and difference.
            row |= interval_columns(name, _mean(values, seed, "shares"))
        rows.append(row)
    return rows


def head_rows(found: AttributedHead, seed: int) -> list[Row]:
    """Make the table of a head and its controls: the attributed scalar in the prompts and at the baseline.

    Args:
        found: the attributions.
        seed: of the bootstrap.

    Returns:
        One row per head.
    """
    rows = []
    for head, some in ((found.head, found.own), *found.controls.items()):
        finite = some.error[np.isfinite(some.error)]
        rows.append(
            {
                "model": found.model,
                "head": head_label(head),
                "control_of": "" if head == found.head else head_label(found.head),
                "hub": found.hub,
                "problems": len(some.value),
                "complete": int(some.complete.sum()),
                "median_error": float(np.median(finite)) if len(finite) else math.nan,
                "largest_error": float(finite.max()) if len(finite) else math.nan,
                "value": float(some.value.mean()),
                "at_baseline": float(some.at_baseline.mean()),
                **interval_columns("change", _mean(some.value - some.at_baseline, seed, "change")),
                "hub_share": _hub_share(found, some),
            }
        )
    return rows


def _hub_share(found: AttributedHead, some: InputAttribution) -> float:
    """The share of the hub's own token in the sum of |attribution|, averaged over complete problems."""
    if found.target.hubs is None or not some.complete.any():
        return math.nan
    sizes = [np.abs(tokens) for tokens in some.tokens]
    own = [size[hub] / size.sum() for size, hub in zip(sizes, found.target.hubs, strict=True)]
    return float(np.array(own)[some.complete].mean())


def problem_rows(found: AttributedHead) -> list[Row]:
    """Make the table by problem.

    Args:
        found: the attributions.

    Returns:
        One row per problem, for the head and for each of its controls.
    """
    return [
        {
            "model": found.model,
            "head": head_label(head),
            "control_of": "" if head == found.head else head_label(found.head),
            "problem": found.problems[number],
            "hub_token": None if found.target.hubs is None else found.target.hubs[number],
            "value": float(some.value[number]),
            "at_baseline": float(some.at_baseline[number]),
            "attributed": float(some.tokens[number].sum()),
            "error": float(some.error[number]),
            "complete": bool(some.complete[number]),
            "steps": int(some.steps[number]),
        }
        for head, some in ((found.head, found.own), *found.controls.items())
        for number in range(len(found.problems))
    ]


def token_rows(found: AttributedHead) -> list[Row]:
    """Make the table by token.

    Args:
        found: the attributions.

    Returns:
        One row per token of the head's problems.
    """
    return [
        {
            "model": found.model,
            "head": head_label(found.head),
            "problem": problem,
            "token": token,
            "text": text,
            "tag": tag,
            "attribution": float(value),
            "complete": bool(complete),
        }
        for problem, texts, tags, values, complete in zip(
            found.problems, found.texts, found.tags, found.own.tokens, found.own.complete, strict=True
        )
        for token, (text, tag, value) in enumerate(zip(texts, tags, values, strict=True))
    ]


def _shares(tags: Sequence[Sequence[str]], found: InputAttribution) -> Float[np.ndarray, "problem tag"]:
    """The share of each tag in the sum of |attribution| over a problem's tokens; NaN for a problem that is not complete."""
    rows = [_tag_shares(of_tokens, np.abs(some)) for of_tokens, some in zip(tags, found.tokens, strict=True)]
    return np.where(found.complete[:, None], np.array(rows), math.nan)


def _tag_shares(tags: Sequence[str], sizes: Float[np.ndarray, " token"]) -> Float[np.ndarray, " tag"]:
    """The share of each tag in the sum over the tokens that have one."""
    sums = np.array([sum(size for size, at in zip(sizes, tags, strict=True) if at == tag) for tag in TAGS])
    return sums / sums.sum() if sums.sum() else np.full(len(TAGS), math.nan)


def _mean(values: Float[np.ndarray, " problem"], seed: int, *names: str | int) -> Interval:
    """Mean and bootstrap interval over the problems that have a value; NaN if fewer than two have one."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_mean(values, rng(seed, *names), accuracy.RESAMPLES)
