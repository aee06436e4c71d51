"""Lists of token ids from files: JSON, or pickles that hold nothing but lists of whole numbers.

A pickle can execute code only through what it imports, and here it cannot import anything. Ids mean nothing without their
tokenizer, and those of another one are mostly in range. A JSON object of texts and ids, such as {" cat": 4937}, tells them apart.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.files import parse_json

PICKLES = (".pkl", ".pickle")
MOST = 10_000_000  # ids; a pickle can repeat a long list many times in a few bytes
UNUSED = re.compile(r"\W*(unused|reserved|extra_id|placeholder|padding)\w*\W*", re.IGNORECASE)
ODD = 0.1  # share of ids that are no text, above which a list is probably of another tokenizer


def read_token_list(path: str | Path) -> list[int]:
    """Read token ids from a file, without executing anything in it.

    Args:
        path: a pickle if the name ends in .pkl or .pickle, else JSON; it holds a list of whole numbers, or a list of such lists
            (the tokens of several words). JSON may also hold an object of texts and ids.

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
        value = list(value.values()) if isinstance(value, dict) else value
    lists = [entry if isinstance(entry, list) else [entry] for entry in value] if isinstance(value, list) else [[value]]
    if (total := sum(map(len, lists))) > MOST:
        raise ValueError(f"{path} holds {total} token ids; give at most {MOST}.")
    ids = [number for numbers in lists for number in numbers]
    if odd := [number for number in ids if type(number) is not int or not 0 <= number < 2**31]:
        plain = isinstance(odd[0], str | int | float | None)
        what = repr(str(odd[0])[:40]) if plain else f"a {type(odd[0]).__name__}"
        raise ValueError(f"{path} holds {what} where a token id belongs; give a list of whole numbers from 0.")
    return ids


def check_token_list(path: str | Path, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Compare what the ids of a file are in a tokenizer with what they should be.

    Args:
        path: the file, which `read_token_list` has read.
        ids: the ids of the file.
        tokenizer: of the model that they are for.

    Returns:
        A warning if more than a tenth of the ids are special, unused or parts of characters; else None.

    Raises:
        ValueError: the file has a text for an id that stands for another one here.
    """
    distinct = sorted(set(ids))
    texts = dict(zip(distinct, tokenizer.batch_decode([[token] for token in distinct]), strict=True))
    value = None if Path(path).suffix.lower() in PICKLES else parse_json(Path(path).read_bytes())
    if isinstance(value, dict):
        # A decoder may drop the space before the first word.
        wrong = [(said, token) for said, token in value.items() if texts[token].strip() != said.strip()]
        if wrong:
            said, token = wrong[0]
            raise ValueError(
                f"{path} was written for another tokenizer: the token {token} is {said!r} there and {texts[token]!r} here, and "
                f"{len(wrong)} of {len(value)} differ; give ids of this model's tokenizer."
            )
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    odd = [
        token
        for token, text in texts.items()
        if token in special or not text or "\ufffd" in text or UNUSED.fullmatch(text)
    ]
    if len(odd) <= ODD * len(distinct):
        return None
    return (
        f"{len(odd)} of {len(distinct)} tokens of {path} are special, unused or parts of characters in this tokenizer, such as "
        f"{odd[0]} ({texts[odd[0]]!r}): it was probably written for another one."
    )


# The version in Python: the one in C allocates as much memory as a number in the file asks for.
class _WithoutImports(pickle._Unpickler):
    """Reads plain data; code that a pickle executes must first be imported by name, which is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")
