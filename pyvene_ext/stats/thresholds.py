"""Points of accuracy that a verdict goes by; a module without SciPy, so that wrong flags are refused at once."""

from __future__ import annotations

import math

CAUSAL, REDUNDANT = 10.0, 2.0  # points of accuracy


def check_thresholds(decide: tuple[float, ...], name: str) -> tuple[float, float]:
    """Check an upper and a lower threshold of a drop.

    Args:
        decide: the two.
        name: what an error calls them.

    Returns:
        The same as floats.

    Raises:
        ValueError: they are not two numbers from 0 to 100, the upper one first.
    """
    above, below = (float(value) for value in decide) if len(decide) == 2 else (math.nan, math.nan)
    if not 0 <= below <= above < 100:
        raise ValueError(
            f"{name} takes an upper and a lower threshold in points, of at least 0 and less than 100, such as 10 2, not "
            f"{' '.join(f'{value:g}' for value in decide)}."
        )
    return above, below
