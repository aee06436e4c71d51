"""The shipped models by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

TINY_FOLDER = Path(__file__).parents[2] / "tiny"
SHIPPED_MODELS = tuple(sorted(path.parent.name for path in TINY_FOLDER.glob("*/config.json")))
# One knows a task of its own, and none of those of the others.
TINY_MODELS = tuple(name for name in SHIPPED_MODELS if name != "tiny-circuit")


def listed(words: Iterable[str]) -> str:
    """List words in a sentence.

    Args:
        words: such as names of models.

    Returns:
        The words, with commas between them.
    """
    return ", ".join(words) or "none"
