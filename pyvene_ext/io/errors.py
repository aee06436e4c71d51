"""Validation errors of pydantic in one sentence."""

from __future__ import annotations

from pydantic import (
    ValidationError,
)


def one_sentence(error: ValidationError) -> str:
    """What pydantic found, without its line breaks, codes and links: "heads.0: Input should be a valid integer"."""
    found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{where}: {message}" if where else message for where, message in found)
