"""Whether two circuits share more edges than circuits of the same layers and kinds would by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from pyvene_ext.io.bounds import whole_number
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.circuits.choosing import edge_groups
from pyvene_ext.methods.circuits.circuit import Circuit, exists
from pyvene_ext.stats.controls import share_as_large


@dataclass(frozen=True)
class Overlap:
    """What two circuits share.

    Attributes:
        jaccard: shared edges / edges of either.
        core: the shared edges.
        chance: the Jaccard index where the edges of both circuits are drawn anew, each keeping how many edges lead from each kind
            of sender in each layer to each kind of receiver in each layer.
        p: (1 + draws with at least the observed index) / (1 + draws).
    """

    jaccard: float
    core: Circuit
    chance: Float[np.ndarray, " draw"]
    p: float

    def row(self) -> dict[str, float]:
        """The numbers as a row of a table; of chance, its mean and the middle 95% of the draws."""
        low, high = np.quantile(self.chance, (0.025, 0.975))
        chance = {"chance": float(self.chance.mean()), "chance_low": float(low), "chance_high": float(high)}
        return {"n_shared": len(self.core), "jaccard": self.jaccard} | chance | {"p": self.p}


def jaccard(one: Circuit, other: Circuit) -> float:
    """Compute the Jaccard index of two circuits.

    Args:
        one: a circuit.
        other: another circuit of the same graph.

    Returns:
        Shared edges / edges of either; NaN if both are empty.
    """
    either = len(one.edges | other.edges)
    return len(one.edges & other.edges) / either if either else float("nan")


def overlap(one: Circuit, other: Circuit, config: Any, draws: int = 1000, seed: int = 0) -> Overlap:
    """Compare two circuits of one model, or of two with the same layers and heads, with chance.

    Chance keeps layers and kinds, so that two tasks which both use late heads do not overlap for that alone. It knows nothing of
    how often an edge is in any circuit: what every task uses counts as shared.

    Args:
        one: a circuit.
        other: another circuit.
        config: the model's config.
        draws: number of random pairs.
        seed: of the draws.

    Returns:
        The overlap.

    Raises:
        ValueError: the model lacks an edge, or there are no draws.
    """
    draws = whole_number("draws", draws, 1)
    there = exists(config)
    group = edge_groups(config)[there]
    matrices = [circuit.matrix(config)[there] for circuit in (one, other)]
    generator = rng(seed, "overlap")
    order = np.argsort(group, kind="stable")
    sizes = sum(int(x.sum()) for x in matrices)
    chance = np.empty(draws)
    for draw in range(draws):
        drawn = []
        for matrix in matrices:
            permuted = np.zeros_like(matrix)
            permuted[np.lexsort((generator.random(len(group)), group))] = matrix[order]
            drawn.append(permuted)
        shared = int((drawn[0] & drawn[1]).sum())
        chance[draw] = shared / (sizes - shared) if sizes else np.nan
    found = jaccard(one, other)
    return Overlap(found, Circuit(one.edges & other.edges), chance, share_as_large(found, chance))
