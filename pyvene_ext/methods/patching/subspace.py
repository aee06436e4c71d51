"""Concept directions: the direction of an activation along which the two texts of every pair differ in the same way.

arXiv 2502.11806 (after Xie et al. 2022): with the differences of all pairs, source minus base, as the columns of a matrix M, M'
is the mean column plus what the largest r singular vectors explain of the rest, and the direction is S / |S|, S = (M'^+)^T 1.
Along it all pairs differ by the same amount, as nearly as a single direction allows; what is particular to a pair counts little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.io.bounds import whole_number
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.specs.joint import Spec, members, needs
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.sources import Directions

RANK = 4


def concept_directions(
    model: PreTrainedModel,
    specs: Iterable[Spec],
    base: TokenizedPrompts,
    source: TokenizedPrompts,
    *,
    rank: int = RANK,
    missing: Literal["refuse", "zeros"] = "refuse",
    batch_size: int = 8,
    progress: bool = True,
) -> Directions:
    """Compute the directions that patches with `subspace` need, from the differences of these pairs.

    Every token of a patch's positions gives a difference of its own. To choose directions on some prompts and measure their
    effect on others, call this with some pairs and pass the result to `patching.patch` with the others.

    Args:
        model: a causal language model with a card.
        specs: single and joint specs; those without `subspace` are ignored.
        base: the base prompts.
        source: their source prompts.
        rank: r, the singular vectors kept.
        missing: what to do where the differences have nothing in common, so that there is no direction: refuse; or use zeros,
            along which a patch changes nothing.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        By place and positions `*head d` of length 1, one per head.

    Raises:
        ValueError: the rank is negative, the pairs do not correspond, or (by default) a place has no direction.
    """
    rank = whole_number("rank", rank, 0)
    if len(base) != len(source):
        raise ValueError(
            f"there are {len(base)} base and {len(source)} source prompts; give each base prompt its source."
        )
    patches = along_directions(specs)
    if not patches:
        return {}
    wanted = needs(patches)._asdict()
    of_base, of_source = (
        Reference.compute(model, prompts, **wanted, batch_size=batch_size, progress=progress)
        for prompts in (base, source)
    )
    directions: dict[tuple[Place, Positions], Tensor] = {}
    for patch in patches:
        place, positions = patch.place, patch.positions
        pairs = range(len(base))
        base_rows, source_rows = (
            torch.cat([kept.rows(place, i, positions) for i in pairs]) for kept in (of_base, of_source)
        )
        differences = source_rows.double() - base_rows.double()
        # Rounding differences between forward passes in different batches: some tens of units in the last place, in float32.
        noise = max(1e-5, 4 * torch.finfo(base_rows.dtype).eps) * base_rows.float().norm(dim=-1).amax(0)
        found = directions.setdefault((place, positions), torch.zeros(differences.shape[1:]))
        for head in patch.heads or (...,):
            try:
                found[head] = concept_direction(differences[:, head], rank, noise[head].item())
            except ValueError as error:
                if missing == "refuse":
                    raise ValueError(f"{patch.name}: {error}") from None
    return directions


def concept_direction(
    differences: Float[Tensor, "pair d"], rank: int = RANK, noise: float = 0.0
) -> Float[Tensor, " d"]:
    """Compute S / |S| from differences (arXiv 2502.11806).

    Args:
        differences: source minus base, one row per pair.
        rank: r, the singular vectors kept.
        noise: the size of differences that rounding alone can cause. Singular values of that size are dropped from M' and its
            inverse: if the pairs repeat a few differences, there are no more singular vectors than those, whatever the rank.

    Returns:
        The direction; zeros, along which a patch changes nothing, if all differences are 0.

    Raises:
        ValueError: the differences have nothing in common.
    """
    columns = differences.double().T
    least = max(noise * columns.shape[1] ** 0.5, 1e-9 * columns.norm().item())
    if not columns.norm() > least:
        return columns.new_zeros(len(columns))
    mean = columns.mean(1, keepdim=True)
    u, s, v = torch.linalg.svd(columns - mean, full_matrices=False)
    rank = min(rank, int((s > least).sum()))
    denoised = mean + u[:, :rank] * s[:rank] @ v[:rank]
    direction = torch.linalg.pinv(denoised, atol=least).sum(0)
    if not mean.norm() * columns.shape[1] ** 0.5 > least or not direction.norm() > 0:
        raise ValueError(
            "base and source differ there in a different way in every pair, and not at all on average, so that there is no "
            "direction to patch along."
        )
    return direction / direction.norm()


def along_directions(specs: Iterable[Spec]) -> list[ActivationPatch]:
    """Select the patches with `subspace` among the edits of specs."""
    edits = (edit for spec in specs for edit in members(spec))
    return [edit for edit in edits if isinstance(edit, ActivationPatch) and edit.subspace]
