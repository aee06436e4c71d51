"""One seed per run, one generator per named use."""

from __future__ import annotations

import numpy as np
import xxhash


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """Derive a generator from the run's seed, so that a new draw somewhere never changes another.

    Args:
        seed: the run's one seed.
        *names: what the generator is for; other names give an independent generator.

    Returns:
        The generator.
    """
    return np.random.default_rng([seed, *(xxhash.xxh32_intdigest(str(name).encode()) for name in names)])
