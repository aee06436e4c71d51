"""Bounds of flags, declared in their types and checked in one place: `top: Annotated[int, Ge(1)] = 5`.

Bounds are those of `annotated_types` (Ge, Gt, Le, Lt, MinLen, Unit) and those below; bounds on the items of a tuple stand in the
type of an item. None is always accepted. A check of several flags together is a method `check_flags` of their dataclass, which
raises ValueError.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from operator import ge, gt, le, lt
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen, Unit

T = TypeVar("T")


@dataclass(frozen=True)
class Distinct:
    """No item occurs twice."""


@dataclass(frozen=True)
class Ascending:
    """Each item is larger than the one before it."""


@dataclass(frozen=True)
class Matches:
    """Text matches a pattern.

    Attributes:
        pattern: a regular expression for the whole text.
        words: the same in words, such as "heads as layer.head, such as 2.5".
    """

    pattern: str
    words: str


EachOnce = Annotated[tuple[T, ...], Distinct()]
OneOrMore = Annotated[tuple[T, ...], MinLen(1), Distinct()]


def whole_number(name: str, value: Any, least: int) -> int:
    """Check an argument that counts something.

    Args:
        name: the argument's.
        value: what was given; NumPy's integers count.
        least: the smallest that is allowed.

    Returns:
        The number.

    Raises:
        ValueError: it is not a whole number, or is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, not {value!r}.")
    return int(value)


def check(config: Any) -> None:
    """Check every flag of a dataclass against the bounds in its type, then call its `check_flags`, if it has one.

    Args:
        config: an instance of a dataclass of flags.

    Raises:
        ValueError: one sentence, such as "--limit must be 1 or more, not 0."
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        for complaint in complaints(field.name, getattr(config, field.name), hints[field.name]):
            raise ValueError(complaint)
    if hasattr(config, "check_flags"):
        config.check_flags()


def complaints(flag: str, value: Any, hint: Any) -> Iterator[str]:
    """List the bounds of a type that a value breaks.

    Args:
        flag: the flag's name.
        value: its value.
        hint: its type, with bounds in `Annotated`.

    Yields:
        str: one sentence for each broken bound.
    """
    if value is None:
        return
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        inner, *bounds = args
        yield from _complaint(flag, value, bounds)
        yield from complaints(flag, value, inner)
    elif origin is tuple and isinstance(value, tuple):
        of_items = args[:1] * len(value) if args[-1] is Ellipsis else args
        for item, of_item in zip(value, of_items, strict=False):
            yield from complaints(flag, item, of_item)
    else:  # the members of a union other than None
        for arg in args if origin is not typing.Literal else ():
            yield from complaints(flag, value, arg)


def _complaint(flag: str, value: Any, bounds: list[Any]) -> Iterator[str]:
    for bound in bounds:
        if isinstance(bound, Matches) and not re.fullmatch(bound.pattern, value):
            yield f"--{flag} names {bound.words}, not {value!r}."
    if isinstance(value, tuple):
        wanted = ["one or more"] if any(isinstance(bound, MinLen) for bound in bounds) else []
        wanted += ["each once"] if any(isinstance(bound, Distinct) for bound in bounds) else []
        if (not value and "one or more" in wanted) or ("each once" in wanted and len(set(value)) < len(value)):
            yield f"--{flag} names {', '.join(wanted)}, not {' '.join(map(str, value)) or 'nothing'}."
        if Ascending() in bounds and list(value) != sorted(set(value)):
            yield f"--{flag} takes ascending numbers, not {' '.join(map(str, value))}."
    limits = {type(bound): dataclasses.astuple(bound)[0] for bound in bounds if type(bound) in LIMITS}
    if limits and not (math.isfinite(value) and all(LIMITS[kind][1](value, end) for kind, end in limits.items())):
        unit = next((f", in {bound.unit}" for bound in bounds if isinstance(bound, Unit)), "")
        yield f"--{flag} must be {_in_words(limits)}{unit}, not {value}."


LIMITS = {Ge: ("at least", ge), Gt: ("above", gt), Le: ("at most", le), Lt: ("below", lt)}


def _in_words(limits: dict[type, Any]) -> str:
    if limits.keys() == {Ge}:
        return f"{limits[Ge]} or more"
    if limits.keys() == {Ge, Le}:
        return f"from {limits[Ge]} to {limits[Le]}"
    return " and ".join(f"{LIMITS[kind][0]} {end}" for kind, end in limits.items())
