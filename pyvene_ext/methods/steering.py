"""Steering vectors: the direction in which the activations of two sets of prompts differ.

    vector = steering_vector(model, positive, negative, "resid_post", 3)
    generate(model, Addition(site="resid_post", layer=3, vector=vector, scale=2.0), prompts)
    sweep(model, [Addition(site="resid_post", layer=3, vector=vector, scale=scale) for scale in (-2, -1, 1, 2)], prompts)

The difference of means is that of Turner et al. 2023 (ActAdd, one pair of prompts) and Rimsky et al. 2024 (CAA, many pairs); the
principal component of differences that of Zou et al. 2023 (RepE).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import component_named
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.prompts.positions import Positions, token_indices
from pyvene_ext.prompts.tokenized import TokenizedPrompts, check_tokenized
from pyvene_ext.specs.addition import Addition
from pyvene_ext.specs.patch import ActivationPatch

SteeringMethod = Literal["mean_difference", "pca"]


def steering_vector(
    model: PreTrainedModel,
    positive: TokenizedPrompts,
    negative: TokenizedPrompts,
    site: str,
    layer: int | None = None,
    *,
    method: SteeringMethod = "mean_difference",
    positions: Positions | int = "last",
    heads: int | None = None,
    paired: bool | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Float32[Tensor, " d"]:
    """Compute the vector that leads from the activations of some prompts to those of others, for `Addition(vector=...)`.

    Every prompt counts once: where `positions` names several tokens of it, with the mean of their activations. These are read in
    the model's dtype, and everything else is computed in float64.

    With either method, adding the vector with scale 1 moves the mean of the negative prompts' activations to that of the positive
    ones: wholly for the difference of means, along the component for pca. Divide it by its norm for a unit vector.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        positive: prompts towards which the vector leads; of any lengths.
        negative: prompts from which it leads away.
        site: a site of `Addition`, or pyvene's name of it.
        layer: the layer of the site; None for embed.
        method: mean_difference, the mean over `positive` minus the mean over `negative`; or pca, the first principal component of
            the differences of pairs, or of all activations, with the sign and the length of the difference of means along it, so
            that the mean projection of `positive` is the larger one. Activations are centred on their mean and differences are
            not, because the order within a pair is arbitrary (RepE shuffles it).
        positions: where activations are read, as in a spec.
        heads: the head, for z; other heads have vectors of their own.
        paired: whether prompts with the same index form a pair, for pca; by default if there are equally many.
        batch_size: prompts per forward pass.
        progress: show bars.

    Returns:
        The vector on the CPU, of d_model numbers, or d_head for z.

    Raises:
        ValueError: before the model runs: an unknown method, pairs that are none, a place or prompts that do not fit the model;
            afterwards: activations that do not differ, or whose component does not tell the sets apart.
    """
    check_tokenized(model, positive, negative)
    if method not in get_args(SteeringMethod):
        raise ValueError(f"unknown method {method!r}; choose {' or '.join(get_args(SteeringMethod))}.")
    if paired is not None and method != "pca":
        raise ValueError(f"paired={paired} does not apply to {method}: leave paired out.")
    site = component_named(site, Addition.sites, Addition.what).site
    where = ActivationPatch(site=site, layer=layer, heads=heads, positions=positions)  # type: ignore[arg-type]
    if where.heads and len(where.heads) > 1:
        raise ValueError(f"{where.where}: every head has a vector of its own; give one head, and add a vector to each.")
    where.check(model)
    for which, prompts in (("positive", positive), ("negative", negative)):
        if not len(prompts):
            raise ValueError(f"there are no {which} prompts; give at least one.")
        for prompt in range(len(prompts)):
            try:
                token_indices(prompts, prompt, where.positions)
            except ValueError as error:
                raise ValueError(f"in the {which} prompts, {error}") from None
    if paired and len(positive) != len(negative):
        raise ValueError(
            f"there are {len(positive)} positive and {len(negative)} negative prompts, which are no pairs; leave paired out."
        )
    ours, theirs = (_activations(model, prompts, where, batch_size, progress) for prompts in (positive, negative))
    difference = ours.mean(0) - theirs.mean(0)
    noise = 1e-6 * max(np.linalg.norm(rows, axis=1).max() for rows in (ours, theirs))  # of rounding
    if not np.linalg.norm(difference) > noise:
        raise ValueError(
            f"{where.where}: positive and negative prompts have the same mean activation, so nothing steers."
        )
    if method == "pca":
        pairs = len(ours) == len(theirs) if paired is None else paired
        pooled = np.concatenate([ours, theirs])
        component = np.linalg.svd(ours - theirs if pairs else pooled - pooled.mean(0), full_matrices=False)[2][0]
        if not abs(component @ difference) > noise:
            raise ValueError(
                f"{where.where}: positive and negative prompts have the same mean along their first principal component, so that "
                "it does not tell them apart; use method='mean_difference'."
            )
        difference = (component @ difference) * component
    return torch.from_numpy(difference).float()


def _activations(
    model: PreTrainedModel, prompts: TokenizedPrompts, where: ActivationPatch, batch_size: int, progress: bool
) -> Float64[np.ndarray, "prompt d"]:
    """The mean activation of every prompt at its positions."""
    kept = Reference.compute(model, prompts, **where.needs._asdict(), batch_size=batch_size, progress=progress)

    def mean_of(prompt: int) -> Float[Tensor, " d"]:
        rows = where.select_heads(kept.rows(where.place, prompt, where.positions))
        return rows.double().flatten(0, -2).mean(0)

    return torch.stack([mean_of(prompt) for prompt in range(len(prompts))]).numpy()
