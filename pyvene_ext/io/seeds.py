"""One seed a run, one generator a named use of it."""

from __future__ import annotations

import numpy as np
import xxhash


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """A generator for one named use of the run's one seed, so that a new draw somewhere never shifts another."""
    return np.random.default_rng([seed, *(xxhash.xxh32_intdigest(str(name).encode()) for name in names)])
