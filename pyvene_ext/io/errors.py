"""One-sentence messages for pydantic's validation errors."""

from __future__ import annotations

from pydantic import (
    ValidationError,
)


def one_sentence(error: ValidationError) -> str:
    """Word a validation error without pydantic's line breaks, codes and links.

    Args:
        error: the error.

    Returns:
        Such as "heads.0: Input should be a valid integer".
    """
    found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{where}: {message}" if where else message for where, message in found)
