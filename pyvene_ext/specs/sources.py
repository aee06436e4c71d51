"""What replacements are computed from: statistics of a reference set or source prompts, directions, recorded values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pyvene_ext.intervenable.statistics import Place, Reference
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.tokenized import TokenizedPrompts

Directions = Mapping[tuple[Place, Positions], Tensor]
"""of patches along one direction, by place and positions: `*head d`, of length 1"""


class Needs(NamedTuple):
    """What specs need of a reference set or of source prompts, in the words of `Reference.compute`."""

    places: tuple[Place, ...] = ()
    position_means: tuple[str | int, ...] = ()
    bank: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """What path patching has recorded at receivers, for patches that put it there.

    Attributes:
        values: gives `pos *head d` for a path, a place, a prompt and its heads.
        made_from: hash of the prompts that the values come from.
    """

    values: Callable[[str, Place, int, tuple[int, ...] | None], Float[Tensor, "pos *head d"]]
    made_from: str


@dataclass(frozen=True)
class Sources:
    """Everything that replacements are computed from.

    Attributes:
        model: the model that is intervened on.
        prompts: the prompts that are intervened on.
        given: the reference set or, of patches, the source prompts, one a prompt; None where neither is needed.
        reference: what was measured on them; None as long as nothing was.
        directions: concept directions of patches with `subspace`.
        recorded: of path patching.
    """

    model: PreTrainedModel
    prompts: TokenizedPrompts
    given: TokenizedPrompts | None = None
    reference: Reference | None = None
    directions: Directions = field(default_factory=dict)
    recorded: Recorded | None = None

    @property
    def measured(self) -> Reference:
        """The statistics; ValueError if they were not computed."""
        if self.reference is None:
            raise ValueError(
                "the specs need reference statistics; compute them with `measured()` on what `resolve` has returned."
            )
        return self.reference
