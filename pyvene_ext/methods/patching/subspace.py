"""Concept directions: the one direction of an activation in which two texts of a pair differ alike.

arXiv 2502.11806 (after Xie et al. 2022): with the differences of all pairs, source minus base, as the columns of a matrix M, M'
is the mean column plus what the largest r singular vectors explain of the rest, and the direction is S / |S|, S = (M'^+)^T 1.
Along it all pairs differ by the same amount, as nearly as one direction can have it; their own peculiarities weigh little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.intervenable.statistics import Place, Reference
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
    """The directions that the patches with `subspace` need, by place and positions: `*head d` of length 1, one a head.

    They are found on these pairs, with every token of `positions` as a difference of its own. To choose directions and measure
    their effect on different prompts, call this with some pairs and give the result to `patching.patch` with the others.

    Where differences have nothing in common there is no direction: with `missing="zeros"` zeros stand for it, and a patch along
    them changes nothing.

    Raises ValueError for a rank below 0, pairs that do not correspond, and, unless told otherwise, a place without a direction.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank must be a whole number from 0 on, not {rank!r}.")
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
        # Forward passes in other batches differ by so much: some tens of units in the last place, in float32.
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
    """S / |S| of differences; zeros, which changes nothing, if all are 0. ValueError if they have nothing in common.

    Args:
        noise: how large a difference may be by rounding. Singular values that noise could make are left out of M' and of its
            inverse: where pairs repeat a few differences, there are no more than those, whatever the rank.
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
            "base and source differ there in every pair in another way, on average not at all, so that there is no direction to "
            "patch along."
        )
    return direction / direction.norm()


def along_directions(specs: Iterable[Spec]) -> list[ActivationPatch]:
    """The patches of one direction among the specs."""
    edits = (edit for spec in specs for edit in members(spec))
    return [edit for edit in edits if isinstance(edit, ActivationPatch) and edit.subspace]
