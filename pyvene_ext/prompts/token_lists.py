"""Lists of token ids from files: JSON, or pickles that hold nothing but lists of whole numbers.

A pickle can execute code only through what it imports, and here it cannot import anything.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from pyvene_ext.io.files import parse_json

PICKLES = (".pkl", ".pickle")
MOST = 10_000_000  # ids; a pickle can repeat a long list many times in a few bytes


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
        try:
            value = _WithoutImports(io.BytesIO(content)).load()
        except Exception as error:  # a damaged pickle raises anything
            reason = " ".join(str(error).split())[:80] or type(error).__name__
            raise ValueError(
                f"{path} is not a pickle of lists of whole numbers ({reason}), and nothing in it was run; write the ids as JSON."
            ) from None
    else:
        try:
            value = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); give a list of token ids.") from None
    lists = [entry if isinstance(entry, list) else [entry] for entry in value] if isinstance(value, list) else [[value]]
    if (total := sum(map(len, lists))) > MOST:
        raise ValueError(f"{path} holds {total} token ids; give at most {MOST}.")
    ids = [number for numbers in lists for number in numbers]
    if odd := [number for number in ids if type(number) is not int or not 0 <= number < 2**31]:
        plain = isinstance(odd[0], str | int | float | None)
        what = repr(str(odd[0])[:40]) if plain else f"a {type(odd[0]).__name__}"
        raise ValueError(f"{path} holds {what} where a token id belongs; give a list of whole numbers from 0.")
    return ids


# The version in Python: the one in C allocates as much memory as a number in the file asks for.
class _WithoutImports(pickle._Unpickler):
    """Reads plain data; code that a pickle executes must first be imported by name, which is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")
