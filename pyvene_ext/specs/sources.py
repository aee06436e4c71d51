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
"""Unit vectors that patches are restricted to, by place and positions: `*head d`."""


class Needs(NamedTuple):
    """The statistics that specs need of a reference set or of source prompts: arguments of `Reference.compute`.

    Attributes:
        places: (site, layer) pairs.
        position_means: positions whose mean over prompts is needed.
        bank: positions whose activations are needed for every prompt.
    """

    places: tuple[Place, ...] = ()
    position_means: tuple[str | int, ...] = ()
    bank: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """Values that path patching has recorded at receivers, for the patches that set the receivers to them.

    Attributes:
        values: returns `pos *head d`, given a path's name, a place, the index of a prompt and the heads.
        prompts_hash: hash of the prompts that the values come from.
    """

    values: Callable[[str, Place, int, tuple[int, ...] | None], Float[Tensor, "pos *head d"]]
    prompts_hash: str


@dataclass(frozen=True)
class Sources:
    """Everything that replacements are computed from.

    Attributes:
        model: the model that is intervened on.
        prompts: the prompts that are intervened on.
        source_prompts: the reference set of ablations, or the source prompts of patches, one per prompt; None where neither is
            needed.
        reference: statistics of the source prompts; None until they are computed.
        directions: concept directions of patches with `subspace`.
        recorded: what path patching has recorded at receivers.
    """

    model: PreTrainedModel
    prompts: TokenizedPrompts
    source_prompts: TokenizedPrompts | None = None
    reference: Reference | None = None
    directions: Directions = field(default_factory=dict)
    recorded: Recorded | None = None

    @property
    def statistics(self) -> Reference:
        """The reference statistics. Raises ValueError if they have not been computed."""
        if self.reference is None:
            raise ValueError(
                "the specs need reference statistics; call `with_statistics()` on what `resolve` has returned."
            )
        return self.reference
