"""Lists of token ids from files: JSON, and pickles that hold nothing but lists of whole numbers.

Loading a pickle runs whatever it says. Here none is loaded: its opcodes are read one by one, those that build lists of whole
numbers are followed, and any other ends it.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

from pyvene_ext.io.files import parse_json

PICKLES = (".pkl", ".pickle")
WHOLE_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
FETCHES = ("GET", "BINGET", "LONG_BINGET")
NO_EFFECT = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")  # what is put into the memo is never fetched


def read_token_list(path: str | Path) -> list[int]:
    """Read token ids from a file, without executing anything in it.

    Args:
        path: a pickle if the name ends in .pkl or .pickle, else JSON; it holds a list of whole numbers, or a list of such lists
            (the tokens of several words).

    Returns:
        The ids in order, nested lists concatenated.

    Raises:
        ValueError: the file holds anything else.
    """
    content = Path(path).read_bytes()
    if Path(path).suffix.lower() in PICKLES:
        value = _unpickled(content, path)
    else:
        try:
            value = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); give a list of token ids.") from None
    lists = [entry if isinstance(entry, list) else [entry] for entry in value] if isinstance(value, list) else [[value]]
    ids = [number for numbers in lists for number in numbers]
    if odd := [number for number in ids if type(number) is not int or not 0 <= number < 2**31]:
        nested, huge = isinstance(odd[0], list | dict), isinstance(odd[0], int) and odd[0].bit_length() > 64
        what = f"a {type(odd[0]).__name__}" if nested else "a huge number" if huge else repr(str(odd[0])[:40])
        raise ValueError(f"{path} holds {what} where a token id belongs; give a list of whole numbers from 0.")
    return ids


class _Mark:
    """Where on the stack a list's entries begin."""


def _unpickled(content: bytes, path: str | Path) -> Any:
    """What a pickle of lists of whole numbers holds."""
    stack: list[Any] = []

    def to_mark() -> list[Any]:
        at = len(stack) - 1
        while not isinstance(stack[at], _Mark):
            at -= 1
            if at < 0:
                raise IndexError("a list without a beginning")
        entries = stack[at + 1 :]
        del stack[at:]
        if any(isinstance(entry, _Mark) for entry in entries):
            raise IndexError("a mark within a list")
        return entries

    try:
        for opcode, argument, at in pickletools.genops(content):
            name = opcode.name
            if name in WHOLE_NUMBERS and type(argument) is int:
                stack.append(argument)
            elif name == "MARK":
                stack.append(_Mark())
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "LIST":
                stack.append(to_mark())
            elif name == "APPEND":
                entry = stack.pop()
                if isinstance(entry, _Mark):
                    raise IndexError("a mark within a list")
                stack[-1].append(entry)
            elif name == "APPENDS":
                entries = to_mark()
                stack[-1].extend(entries)
            elif name == "STOP":
                (value,) = stack
                if isinstance(value, _Mark):
                    raise IndexError("a list without entries")
                return value
            elif name in FETCHES:
                raise _Refused(
                    f"{path} refers to one list twice (at byte {at}), and nothing of it was run; write the ids as JSON."
                )
            elif name not in NO_EFFECT:
                said = name if argument is None else f"{name} {str(argument)[:40]!r}"
                raise _Refused(
                    f"{path} holds more than lists of whole numbers ({said} at byte {at}), and nothing of it was run; write the "
                    "ids as JSON."
                )
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except Exception:  # of a stream that is damaged, or made to look like lists
        raise ValueError(f"{path} is not a whole pickle of lists; write the ids as JSON.") from None


class _Refused(Exception):
    """A pickle that holds something else."""
