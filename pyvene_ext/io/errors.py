"""Errors in one sentence: pydantic's, and near misses of a name."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import (
    ValidationError,
)

SHOWN = 3  # of an error's parts; a vector of NaN has one for each number
# What pydantic asks for, in plainer words.
EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "string_type": "a string",
    "tuple_type": "a list or tuple",
    "model_type": "a dict of fields",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def counted(number: int, noun: str, *, grouped: bool = False) -> str:
    """A number and its noun: "1 batch", "2 batches"; `grouped`: "1,200 batches"."""
    plural = noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")
    return f"{number:{',' if grouped else 'd'}} {noun if number == 1 else plural}"


def with_article(noun: str) -> str:
    """A noun and its article: "a list", "an Ablation"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name.

    Args:
        name: what was given.
        known: the names that there are.

    Returns:
        "did you mean 'heads'?" if one of them is close, or alone begins so, else "choose among ..." with all of them.
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    begun = [one for one in known if name and one.startswith(str(name))]
    close = close or (begun if len(begun) == 1 else [])
    return f"did you mean {close[0]!r}?" if close else f"choose among {', '.join(known)}."


def one_sentence(error: ValidationError, fields: Iterable[str] = ()) -> str:
    """Word a validation error without pydantic's line breaks, codes and links.

    Args:
        error: the error.
        fields: the names of all fields, to suggest one in place of an unknown one.

    Returns:
        Such as "heads.0 must be a whole number, not 'a'."
    """
    # A default that is computed from other fields is not computed if one of these is wrong, which is said already.
    errors = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
    found = [_in_words(e, list(fields)) for e in errors]
    found[SHOWN:] = [f"and {len(found) - SHOWN} more."] if len(found) > SHOWN else []
    return "; ".join([*(part.rstrip(".") for part in found[:-1]), found[-1]])


def _in_words(error: Any, fields: list[str]) -> str:
    where, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing."
    if error["type"] == "extra_forbidden":
        return f"there is no field {where!r}" + (f"; {did_you_mean(where, fields)}" if fields else ".")
    if error["type"] == "frozen_instance":
        return f"{where} cannot be changed; make a changed copy with .model_copy(update={{{where!r}: ...}})."
    if message.startswith("Input should be "):
        given = " ".join(reprlib.repr(error["input"]).split())
        expected = EXPECTED.get(error["type"], message.removeprefix("Input should be "))
        message = f"must be {expected}, not {given}"
        if error["type"] == "literal_error" and isinstance(error["input"], str):
            close = difflib.get_close_matches(error["input"], error["ctx"]["expected"].split("'")[1::2], n=1)
            message += f"; did you mean {close[0]!r}?" if close else ""
        return f"{where or 'it'} {message}" + ("" if message.endswith("?") else ".")
    return f"{where}: {message}" if where else message
