"""Recall by lag: which token of a list a model predicts when one of them is repeated as a cue.

A prompt is a list of distinct tokens in random order, followed by its middle token once more, the cue. The probability that the
next token is the one at some position of the list, by its distance from the cue's position (the lag), is the model's counterpart
of transitions in human free recall; a model with induction heads continues at lag +1 ("Temporal Dependencies in In-Context
Learning: The Role of Induction Heads", arXiv 2604.01094). This module has the prompts, the measures and the heads to ablate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int

from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.ablation import heads_together
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head, layer_matched_random_heads

Layers = Literal["full", "top", "bottom"]
Mode = Literal["zero", "mean"]
FAR = 5  # lag +1 is compared with lags beyond this on either side
FEWEST = 2 * (FAR + 1)  # tokens of the shortest list that has such lags on both sides


# -- prompts and curves ------------------------------------------------------------------------------------------------


def lag_prompts(pool: Int[np.ndarray, " token"], n_tokens: int, permutations: int, seed: int) -> TokenizedPrompts:
    """Make prompts without BOS: the same distinct tokens in random order, followed by the middle one again.

    Args:
        pool: token ids to draw from.
        n_tokens: tokens of the list; prompts have one more.
        permutations: how many prompts; the first ones of a larger number are those of a smaller one.
        seed: of the draws.

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
    rng = np.random.default_rng(seed)
    chosen = rng.choice(pool, n_tokens, replace=False)
    middle = n_tokens // 2
    lists = [rng.permutation(chosen).tolist() for _ in range(permutations)]
    return TokenizedPrompts(
        input_ids=tuple((*ids, ids[middle]) for ids in lists),
        answer_ids=tuple((ids[middle + 1], ids[middle]) for ids in lists),
        positions=tuple({"end": -1, "last": -1} for _ in lists),
        pad_id=0,  # not used, because they have equal lengths
    )


def lags_of(n_tokens: int) -> Int[np.ndarray, " lag"]:
    """The lags of a list of `n_tokens`: each index minus the cue's, which is the middle one."""
    return np.arange(n_tokens) - n_tokens // 2


def curves_of(probabilities: Float[np.ndarray, "*some pos"]) -> Float64[np.ndarray, "*some lag"]:
    """Convert `token_probabilities` to curves by lag.

    Args:
        probabilities: of the prompt's own tokens.

    Returns:
        The same without the last position, the cue, which repeats the token at lag 0.
    """
    return probabilities[..., :-1].astype(np.float64)


def plus_one(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """The probability at lag +1."""
    return curves[..., curves.shape[-1] // 2 + 1]


def plus_one_bias(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """The probability at lag +1 minus the mean over lags beyond 5 on either side."""
    return plus_one(curves) - curves[..., np.abs(lags_of(curves.shape[-1])) > FAR].mean(-1)


def recalled(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """The probability that the next token is any token of the list except the cue."""
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


def random_rankings(
    ranked: Sequence[Head],
    most: int,
    n_layers: int,
    n_heads: int,
    draws: int,
    rng: np.random.Generator,
) -> list[tuple[Head, ...]]:
    """Draw random control rankings: the i-th head of a control is in the layer of the i-th ranked head, but is not ranked.

    So every prefix of a control has as many heads of each layer as the same prefix of `ranked`.

    Args:
        ranked: heads, highest first.
        most: length of the controls.
        n_layers: of the model.
        n_heads: of each layer.
        draws: how many controls.
        rng: source of randomness.

    Returns:
        The control rankings.

    Raises:
        ValueError: a layer has too few heads left.
    """
    matched = ranked[:most]
    sets = layer_matched_random_heads(matched, n_layers, n_heads, draws, rng, exclude=ranked)
    rankings = []
    for heads in sets:
        left: dict[int, list[Head]] = defaultdict(list)
        for i in rng.permutation(len(heads)):
            left[heads[i][0]].append(heads[i])
        rankings.append(tuple(left[layer].pop() for layer, _ in matched))
    return rankings


def ablate_attention(heads: Iterable[Head], mode: Mode) -> Spec:
    """Ablate the attention scores of several heads jointly.

    Args:
        heads: (layer, head) pairs.
        mode: zero: attention to nothing; mean: uniform attention.

    Returns:
        A joint spec.
    """
    return heads_together(heads, mode, "scores")
