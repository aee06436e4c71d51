"""Recall by lag: which token of a list a model predicts when one of them is repeated as a cue.

A prompt is a list of distinct tokens in random order, followed by its middle token once more, the cue. The probability that the
next token is the one at some position of the list, by its distance from the cue's position (the lag), is the model's counterpart
of transitions in human free recall; a model with induction heads continues at lag +1 ("Temporal Dependencies in In-Context
Learning: The Role of Induction Heads", arXiv 2604.01094). This module has the prompts, the measures and the heads to ablate,
`lag_tables` what is shown of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_heads, n_layers, n_positions
from pyvene_ext.engine.results import Result
from pyvene_ext.methods.heads.scores import attention_scores, leading_bos, random_tokens, usable_tokens
from pyvene_ext.prompts.tokenized import TokenizedPrompts, answer_pairs
from pyvene_ext.specs.ablation import heads_together
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head, RandomHeads, first_of

Layers = Literal["full", "top", "bottom"]
Mode = Literal["zero", "mean"]
FAR = 5  # lag +1 is compared with lags beyond this on either side
BLOCK, REPEATS, EXAMPLES = 25, 2, 10  # of the random tokens for induction scores
FEWEST = 2 * (FAR + 1)  # tokens of the shortest list that has such lags on both sides

# Defaults. On a GPU a model of a billion parameters or more gets the published sizes. Smaller models rarely continue a list of
# 500 that they have seen only once; and where a set of heads takes seconds there are few permutations.
N_TOKENS, PERMUTATIONS = 500, 300
LARGE, FEW_TOKENS = 1e9, 20  # parameters from which on, on a GPU, these are the defaults; tokens of all other models
MIDDLING, FEW_PERMUTATIONS = 1e7, 40  # parameters from which on a set of heads takes seconds, and permutations then
TO_ABL, TINY_TO_ABL = "0-1-5-10-20-50", "0-1-2-3-4"


# -- prompts and curves ------------------------------------------------------------------------------------------------


def lag_prompts(
    pool: Int[np.ndarray, " token"], n_tokens: int, permutations: int, seed: int, bos: Sequence[int] = ()
) -> TokenizedPrompts:
    """Make prompts: the same distinct tokens in random order, followed by the middle one again.

    Args:
        pool: token ids to draw from.
        n_tokens: tokens of the list; prompts have one more, and `bos`.
        permutations: how many prompts; the first ones of a larger number are those of a smaller one.
        seed: of the draws, which do not depend on `bos`.
        bos: tokens before the list (`leading_bos`); the published prompts have none.

    Returns:
        The prompts; their answers are the token after the cue in the list, and the cue.

    Raises:
        ValueError: the pool has too few distinct tokens, or the list is too short to have far lags.
    """
    pool = np.unique(pool)
    if n_tokens < FEWEST:
        raise ValueError(f"a list of {n_tokens} tokens has no lags beyond {FAR} on both sides; take at least {FEWEST}.")
    if len(pool) < n_tokens:
        raise ValueError(
            f"{len(pool)} distinct tokens are usable but {n_tokens} are wanted; give a longer list or ask for fewer."
        )
    draws = np.random.default_rng(seed)
    chosen = draws.choice(pool, n_tokens, replace=False)
    middle = n_tokens // 2
    lists = [draws.permutation(chosen).tolist() for _ in range(permutations)]
    return TokenizedPrompts(
        input_ids=tuple((*bos, *ids, ids[middle]) for ids in lists),
        answers=answer_pairs((ids[middle + 1], ids[middle]) for ids in lists),
    )


def lags_of(n_tokens: int) -> Int[np.ndarray, " lag"]:
    """The lags of a list.

    Args:
        n_tokens: its length.

    Returns:
        Each index minus the cue's, which is the middle one.
    """
    return np.arange(n_tokens) - n_tokens // 2


def curves_of(probabilities: Float[np.ndarray, "*some pos"], first: int = 0) -> Float64[np.ndarray, "*some lag"]:
    """Convert `token_probabilities` to curves by lag.

    Args:
        probabilities: of the prompt's own tokens.
        first: tokens before the list (a start token).

    Returns:
        The same without those and without the last position, the cue, which repeats the token at lag 0.
    """
    return probabilities[..., first:-1].astype(np.float64)


def plus_one(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """Select the probability at lag +1.

    Args:
        curves: probabilities by lag.

    Returns:
        One number per curve.
    """
    return curves[..., curves.shape[-1] // 2 + 1]


def plus_one_bias(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """Bias for lag +1: its probability minus the mean over lags beyond 5 on either side.

    Args:
        curves: probabilities by lag.

    Returns:
        One number per curve.
    """
    return plus_one(curves) - curves[..., np.abs(lags_of(curves.shape[-1])) > FAR].mean(-1)


def plus_one_first(curves: Float[np.ndarray, "*some lag"]) -> Bool[np.ndarray, "*some"]:
    """Whether lag +1 is the likeliest of the list's tokens, the cue aside: unlike a mean, no single permutation can make it.

    Args:
        curves: probabilities by lag.

    Returns:
        One truth value per curve; one in n - 1 by chance.
    """
    others = np.where(lags_of(curves.shape[-1]) == 0, -np.inf, curves)
    return others.argmax(-1) == curves.shape[-1] // 2 + 1


def recalled(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """Probability of recall: that the next token is any token of the list except the cue.

    Args:
        curves: probabilities by lag.

    Returns:
        One number per curve.
    """
    return curves[..., lags_of(curves.shape[-1]) != 0].sum(-1)


def lag_crp(curves: Float[np.ndarray, "permutation lag"]) -> Float[np.ndarray, " lag"]:
    """Lag-CRP (Kahana 1996), the conditional response probability by lag.

    For human recall it is the number of transitions at a lag divided by the number of those that were possible. Here each
    permutation is one transition, from the cue; every lag except 0 is possible in each; and probabilities take the place of
    counts (ours). Tokens outside of the list do not count as transitions, like intrusions in recall, so the curve sums to 1.

    Args:
        curves: probabilities by lag.

    Returns:
        The mean curve, normalised; NaN at lag 0.
    """
    crp = curves.mean(0) / recalled(curves).mean()
    crp[lags_of(len(crp)) == 0] = np.nan
    return crp


# -- heads -------------------------------------------------------------------------------------------------------------


def layers_of(which: Layers, n_layers: int) -> range:
    """Select layers.

    Args:
        which: top: the layers below n_layers / 2, nearer to the input; bottom: the rest; full: all.
        n_layers: of the model.

    Returns:
        The layers, ascending.
    """
    half = (n_layers + 1) // 2
    return {"full": range(n_layers), "top": range(half), "bottom": range(half, n_layers)}[which]


def rank_heads(scores: Iterable[tuple[float, int, int]], which: Layers, n_layers: int, wanted: int) -> tuple[Head, ...]:
    """Select the heads of some layers with the highest scores.

    Args:
        scores: (score, layer, head), highest first.
        which: the layers (`layers_of`).
        n_layers: of the model.
        wanted: how many heads.

    Returns:
        The heads, highest first.

    Raises:
        ValueError: there are fewer.
    """
    layers = layers_of(which, n_layers)
    found = [(layer, head) for _, layer, head in scores if layer in layers]
    if len(found) < wanted:
        raise ValueError(
            f"{wanted} heads are asked for but there are scores for {len(found)} in layers {layers.start} to {layers.stop - 1} "
            f"({which}); ask for fewer."
        )
    return tuple(found[:wanted])


def ablate_attention(heads: Iterable[Head], mode: Mode) -> Spec:
    """Ablate the attention scores of several heads jointly.

    Args:
        heads: (layer, head) pairs.
        mode: zero: attention to nothing; mean: uniform attention.

    Returns:
        A joint spec.
    """
    return heads_together(heads, mode, "scores")


def cue_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generator: np.random.Generator,
    bos: Sequence[int] | None = None,
) -> Float[np.ndarray, "layer head"]:
    """Compute induction scores for lag prompts, on a block of random tokens that occurs twice.

    Two blocks, because the cue of a lag prompt has occurred once before: with more, heads that attend to several earlier
    occurrences would score low.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa).
        tokenizer: the model's.
        generator: source of randomness.
        bos: tokens before the first block, those of the lag prompts; by default what the tokenizer prepends.

    Returns:
        The mean induction score of every head.

    Raises:
        ValueError: the model takes fewer tokens.
    """
    bos, longest = leading_bos(tokenizer) if bos is None else bos, n_positions(model.config)
    if (needed := BLOCK * REPEATS + len(bos)) > longest:
        raise ValueError(
            f"induction scores are computed on {needed} tokens but the model takes {longest}; give scores."
        )
    tokens = usable_tokens(model, tokenizer)
    ids = random_tokens(tokens, BLOCK, REPEATS, examples=EXAMPLES, rng=generator, bos=bos)
    return attention_scores(model, ids, BLOCK, first=len(bos)).induction.mean(0)


@dataclass(frozen=True)
class RankedHeads:
    """Rankings of heads whose prefixes are ablated, so that larger sets contain the smaller ones.

    Attributes:
        ranked: the heads with the highest scores, highest first.
        random: control rankings that match it layer by layer (`random_rankings`).
        scores: of the heads that have one.
    """

    ranked: tuple[Head, ...]
    random: list[tuple[Head, ...]]
    scores: dict[Head, float]

    def random_sets(self, n: int) -> RandomHeads:
        """The different random sets of `n` heads, and how well they match."""
        return first_of(self.random, self.ranked, n)

    def sets(self, n: int, head_type: str) -> list[tuple[Head, ...]]:
        """List all sets of `n` heads that are ablated.

        Args:
            n: heads of a set.
            head_type: include the heads with the highest scores (induction), or random sets only (random).

        Returns:
            The sets.
        """
        return [*([self.ranked[:n]] if head_type == "induction" else []), *self.random_sets(n).sets]

    def mean_score(self, name: str, chosen: Iterable[Head]) -> dict[str, float]:
        """Average the scores of some heads for a table.

        Args:
            name: of the column.
            chosen: the heads.

        Returns:
            The column; nothing if one of the heads has no score.
        """
        chosen = list(chosen)
        known = [self.scores[head] for head in chosen if head in self.scores]
        return {name: float(np.mean(known))} if len(known) == len(chosen) else {}


# -- sizes -------------------------------------------------------------------------------------------------------------


class LagSizes(NamedTuple):
    """How many tokens a list has, and how many permutations of it there are."""

    n_tokens: int
    permutations: int


def parse_levels(text: str, most: int | None = None) -> list[int]:
    """Read ascending numbers of heads with dashes between them.

    Args:
        text: such as `TO_ABL`.
        most: how many heads the random sets leave alone (--max_heads_abl).

    Returns:
        The numbers.

    Raises:
        ValueError: it is something else, only 0, or larger than `most`.
    """
    parts = text.split("-")
    levels = [int(part) for part in parts if part.isdecimal() and len(part) < 7]
    if len(levels) < len(parts) or levels != sorted(set(levels)) or not any(levels):
        raise ValueError(
            f"--to_abl {text!r} must be ascending numbers of heads with dashes between them and not only 0, such as {TO_ABL}."
        )
    if most is not None and most < levels[-1]:
        raise ValueError(
            f"--to_abl asks for {levels[-1]} heads and --max_heads_abl allows {most}; raise it, or ask for fewer."
        )
    return levels


def check_usable(usable: int, n_tokens: int, where: str) -> None:
    """Check that there are tokens enough for a list.

    Args:
        usable: how many there are.
        n_tokens: how many are wanted.
        where: where they come from, for the error.

    Raises:
        ValueError: there are too few.
    """
    if usable < n_tokens:
        found = f"{where} has {usable} usable tokens (distinct, not special)"
        raise ValueError(f"{found} and {n_tokens} are wanted; give more, or a smaller --n_tokens.")


def lag_sizes(
    model: PreTrainedModel,
    n_bos: int,
    usable: int,
    n_tokens: int | None = None,
    permutations: int | None = None,
    *,
    name: str = "the model",
    where: str = "the tokenizer",
) -> LagSizes:
    """Choose the sizes that are not given.

    Args:
        model: the model.
        n_bos: tokens in front of a list.
        usable: tokens that lists are drawn from.
        n_tokens: of a list; None to choose.
        permutations: of the list; None to choose.
        name: the model's, for errors.
        where: the tokens come from, for errors.

    Returns:
        The sizes.

    Raises:
        ValueError: a list is longer than the context, or than there are tokens.
    """
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    large = n_parameters >= LARGE and model.device.type != "cpu"
    longest = n_positions(model.config)
    room = longest - 1 - n_bos
    n_tokens = n_tokens or max(FEWEST, min(N_TOKENS if large else FEW_TOKENS, room, usable))
    if n_tokens > room:
        raise ValueError(
            f"--n_tokens {n_tokens} makes prompts of {longest + n_tokens - room} tokens and {name} takes {longest}; take fewer."
        )
    check_usable(usable, n_tokens, where)
    few = n_parameters >= MIDDLING and not large
    return LagSizes(n_tokens, permutations or (FEW_PERMUTATIONS if few else PERMUTATIONS))


def levels_that_leave_others(
    levels: Sequence[int], model: PreTrainedModel, layers: Sequence[Layers], ranked: Sequence[tuple[float, int, int]]
) -> list[int]:
    """Leave out numbers of heads that are more than half of what there is to ablate.

    Args:
        levels: numbers of heads, ascending.
        model: the model.
        layers: the choices of layers, of which the smallest counts.
        ranked: (score, layer, head) of every head that has a score.

    Returns:
        The other numbers; a single head is always among them.
    """
    depth, heads = n_layers(model.config), n_heads(model.config)
    of_layers = [layers_of(which, depth) for which in layers]
    half = min(min(len(some) * heads // 2, sum(layer in some for _, layer, _ in ranked)) for some in of_layers)
    return [n for n in levels if n <= max(half, 1)]


# -- curves of sets ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LagCurves:
    """Probability by lag with a number of heads ablated.

    Attributes:
        n: how many heads.
        own: of the ranked heads; if only random sets are ablated, their mean.
        random: of each random set.
    """

    n: int
    own: Float[np.ndarray, "permutation lag"]
    random: Float[np.ndarray, "set permutation lag"]


def lag_curves(
    result: Result,
    rows: Mapping[tuple[tuple[Head, ...], Mode], int],
    heads: RankedHeads,
    mode: Mode,
    n: int,
    head_type: str,
    first: int = 0,
) -> LagCurves:
    """Collect the curves with `n` heads ablated.

    Args:
        result: of the metric `token_probabilities`, with one intervention per set of heads and mode.
        rows: of the result, by set of heads and mode.
        heads: the rankings.
        mode: of the ablation.
        n: how many heads.
        head_type: induction for the highest scores, random for random sets only.
        first: tokens before the list.

    Returns:
        The curves.
    """

    def of_set(chosen: tuple[Head, ...]) -> Float64[np.ndarray, "permutation lag"]:
        return curves_of(result.intervened[rows[chosen, mode]] if chosen else result.baseline, first)

    random = [of_set(chosen) for chosen in heads.random_sets(n).sets]
    own = of_set(heads.ranked[:n]) if head_type == "induction" else np.mean(random, 0)
    return LagCurves(n, own, np.reshape(random, (-1, *own.shape)))
