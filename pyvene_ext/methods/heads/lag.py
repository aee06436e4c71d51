"""Memory by lag: which token of a list a model expects after one of them is shown again.

A prompt is a list of distinct tokens in random order and then the one in its middle once more, the cue. The probability that the
next token is the one at some place of the list, by its distance from the cue's (the lag), is the model's counterpart of where
human free recall goes on; a model with induction heads goes on at lag +1 ("Temporal Dependencies in In-Context Learning: The Role
of Induction Heads", arXiv 2604.01094). Here are the prompts, the numbers read from the probabilities, and the heads to ablate.
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
FAR = 5  # lags farther than this, on either side, are what lag +1 is compared with
FEWEST = 2 * (FAR + 1)  # tokens of a list that has such lags on both sides


# -- prompts and curves ------------------------------------------------------------------------------------------------


def lag_prompts(pool: Int[np.ndarray, " token"], n_tokens: int, permutations: int, seed: int) -> TokenizedPrompts:
    """Prompts of `n_tokens` + 1: the same distinct tokens of `pool` in random order, then the one in the middle again. No BOS.

    More permutations begin with the same ones.

    Raises:
        ValueError: the pool has too few distinct tokens, or the list is too short to have far lags.
    """
    pool = np.unique(pool)
    if n_tokens < FEWEST:
        raise ValueError(f"a list of {n_tokens} tokens has no lags beyond {FAR} on both sides; take at least {FEWEST}.")
    if len(pool) < n_tokens:
        raise ValueError(
            f"{len(pool)} distinct tokens are usable and {n_tokens} are wanted; give a longer list or ask for fewer."
        )
    rng = np.random.default_rng(seed)
    chosen = rng.choice(pool, n_tokens, replace=False)
    middle = n_tokens // 2
    lists = [rng.permutation(chosen).tolist() for _ in range(permutations)]
    return TokenizedPrompts(
        input_ids=tuple((*ids, ids[middle]) for ids in lists),
        answer_ids=tuple((ids[middle + 1], ids[middle]) for ids in lists),
        positions=tuple({"end": -1, "last": -1} for _ in lists),
        pad_id=0,  # they are equally long
    )


def lags_of(n_tokens: int) -> Int[np.ndarray, " lag"]:
    """The lags of a list: index less that of the cue, which is in the middle."""
    return np.arange(n_tokens) - n_tokens // 2


def curves_of(probabilities: Float[np.ndarray, "*some pos"]) -> Float64[np.ndarray, "*some lag"]:
    """What `token_probabilities` gives, by lag: the last position is the cue, the same token as lag 0, and is dropped."""
    return probabilities[..., :-1].astype(np.float64)


def plus_one(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """The probability at lag +1."""
    return curves[..., curves.shape[-1] // 2 + 1]


def plus_one_bias(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """The probability at lag +1 less the mean over the lags beyond 5 on either side."""
    return plus_one(curves) - curves[..., np.abs(lags_of(curves.shape[-1])) > FAR].mean(-1)


def recalled(curves: Float[np.ndarray, "*some lag"]) -> Float[np.ndarray, "*some"]:
    """The probability that the next token is any of the list but the cue."""
    return curves[..., lags_of(curves.shape[-1]) != 0].sum(-1)


def lag_crp(curves: Float[np.ndarray, "permutation lag"]) -> Float[np.ndarray, " lag"]:
    """Lag-CRP (Kahana 1996): how often recall goes on at a lag, of the times it could have; NaN at lag 0.

    Of human recall it is the transitions counted at a lag by those that were possible. Here each permutation is one transition,
    from the cue; every lag but 0 is possible in each; and probabilities stand for counts (ours). Other tokens than the list's are
    no transitions, as intrusions are none, so that the curve adds up to 1.
    """
    crp = curves.mean(0) / recalled(curves).mean()
    crp[lags_of(len(crp)) == 0] = np.nan
    return crp


# -- heads -------------------------------------------------------------------------------------------------------------


def layers_of(which: Layers, n_layers: int) -> range:
    """top: the layers below n_layers / 2, nearer to the input; bottom: the rest; full: all."""
    half = (n_layers + 1) // 2
    return {"full": range(n_layers), "top": range(half), "bottom": range(half, n_layers)}[which]


def rank_heads(scores: Iterable[tuple[float, int, int]], which: Layers, n_layers: int, wanted: int) -> tuple[Head, ...]:
    """The `wanted` heads of some layers with the highest scores, highest first; `scores` are (score, layer, head), sorted.

    Raises ValueError if there are fewer.
    """
    layers = layers_of(which, n_layers)
    found = [(layer, head) for _, layer, head in scores if layer in layers]
    if len(found) < wanted:
        raise ValueError(
            f"{wanted} heads are asked for and there are scores of {len(found)} in layers {layers.start} to {layers.stop - 1} "
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
    """Controls for the prefixes of `ranked` up to `most` heads: each one's i-th head is of the i-th one's layer, not in `ranked`.

    So every prefix of a control has as many heads of each layer as the same prefix of `ranked`. Raises ValueError where a layer
    has too few heads left.
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
    """One joint intervention on the attention scores of these heads: none (zero) or uniform attention (mean)."""
    return heads_together(heads, mode, "scores")
