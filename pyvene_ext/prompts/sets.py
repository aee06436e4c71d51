"""Prompt sets: one file format, named positions, answers tokenised in context, batches of unequal lengths.

A prompt set is a JSON file `{"n_examples", "description", "pairs": [...]}`, a bare JSON list of pairs, a JSONL file with one pair
per line, or a `datasets` dataset with one pair per row. A pair has the fields of `Prompt`; other fields are ignored, and null
counts as absent. `n_examples` is optional; if given, it must equal the number of pairs.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.files import atomic_path, parse_json, write_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import (
    Answers,
    Batch,
    PaddingSide,
    TokenizedPrompts,
    tokenize_prompt,
)

__all__ = ["Answers", "Batch", "PaddingSide", "Prompt", "PromptSet", "Text", "TokenizedPrompts"]

Text = Literal["clean", "corrupt"]
BUILT_IN_POSITIONS = ("end", "last", "io", "s1", "s2", "subject")


class Prompt(BaseModel):
    """One prompt with its right answer (IO), its wrong answer (S) and its named positions, as in IOI (Wang et al. 2022).

    A name is matched as a whole word in scripts with upper and lower case ("Mark" is not in "Market") and anywhere in others
    (Chinese has no spaces between words), but never inside the other, longer name.

    Attributes:
        clean: the text that `io_token` continues; mentions both names.
        corrupt: the contrast text of patching studies, if there is one.
        io_name: the indirect object, the right answer.
        s_name: the subject, the wrong answer.
        io_token: the right answer as appended to the prompt, ending with `io_name`; default a space and `io_name`. The wrong
            answer is the same text with `s_name` in place of `io_name`.
        positions: further named positions: a substring that occurs exactly once, or `[start, end)` in characters of `clean`.

    Raises:
        ValueError: a missing field, equal names, a name that `clean` does not mention, or a position that cannot be found
            (pydantic's ValidationError).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    clean: str
    corrupt: str | None = None
    io_name: str = Field(min_length=1)
    s_name: str = Field(min_length=1)
    io_token: str = Field(default_factory=lambda data: " " + data["io_name"])
    positions: dict[str, str | tuple[int, int]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        # In a `datasets` dataset every row has all columns, and all keys of a struct, with nulls where there is no value.
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        for name in data:  # other fields are the user's own, but a misspelt one of ours is an error
            close = difflib.get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.8)
            if name not in cls.model_fields and close and close[0] not in data:
                raise ValueError(f"unknown field {name!r}; did you mean {close[0]!r}?")
        if isinstance(data.get("positions"), dict):
            data["positions"] = {name: at for name, at in data["positions"].items() if at is not None}
        return data

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        if self.io_name == self.s_name:
            raise ValueError(f"io_name and s_name are both {self.io_name!r}; they must differ.")
        if not self.io_token.endswith(self.io_name):
            raise ValueError(f"io_token {self.io_token!r} must end with io_name {self.io_name!r}.")
        spans = self.spans("clean")
        for field, place in (("io_name", "io"), ("s_name", "s1")):
            if place not in spans:
                raise ValueError(
                    f"{field} {getattr(self, field)!r} does not occur as a word of its own in clean {_short(self.clean)}."
                )
        for name, at in self.positions.items():
            if name in BUILT_IN_POSITIONS:
                raise ValueError(f"position {name!r} has a built-in meaning; choose another name.")
            if name not in spans:
                raise ValueError(f"position {name!r}: {at!r} must occur exactly once in clean {_short(self.clean)}.")
            start, end = spans[name]
            if not 0 <= start < end <= len(self.clean):
                raise ValueError(
                    f"position {name!r}: [{start}, {end}) must be a non-empty part of the {len(self.clean)} characters of clean."
                )
        return self

    @property
    def answers(self) -> tuple[str, str]:
        """The texts that IO and S append to the prompt."""
        return self.io_token, self.io_token.removesuffix(self.io_name) + self.s_name

    def spans(self, text: Text) -> dict[str, tuple[int, int]]:
        """Find the named positions in one of the two texts.

        "io" is the first mention of IO, "s1" the first and "s2" the last mention of S. "subject" is "s2": in "..., Mark gave the
        book to" it is the subject of the last clause. Names that `corrupt` does not mention have no position there, and positions
        given in characters exist in `clean` only.

        Args:
            text: "clean" or "corrupt".

        Returns:
            `[start, end)` in characters by name, without "end" and "last".
        """
        string = self.clean if text == "clean" else self.corrupt or ""
        found = {}
        if io := _mentions(string, self.io_name, self.s_name):
            found["io"] = io[0]
        if s := _mentions(string, self.s_name, self.io_name):
            found |= {"s1": s[0], "s2": s[-1], "subject": s[-1]}
        for name, at in self.positions.items():
            if isinstance(at, str):
                start = string.find(at)
                if at and start >= 0 and start == string.rfind(at):
                    found[name] = (start, start + len(at))
            elif text == "clean":
                found[name] = at
        return found


@dataclass(frozen=True)
class PromptSet:
    """A named set of prompts.

    Attributes:
        prompts: one prompt or more.
        name: the set's name in messages and metadata.
        description: free text.

    Raises:
        ValueError: there are no prompts.
    """

    prompts: tuple[Prompt, ...]
    name: str = "prompts"
    description: str = ""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"{self.name} holds no prompts; give at least one pair.")

    @classmethod
    def load(cls, source: Any, split: str | None = None) -> PromptSet:
        """Load a prompt set.

        Args:
            source: the name of a shipped set ("ioi_en"), a path to a `.json` or `.jsonl` file or to a folder of
                `Dataset.save_to_disk`, a `datasets.Dataset` (or `DatasetDict`), or the id of a data set on the hub.
            split: the split, if a `datasets` source has several.

        Returns:
            The prompt set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the content is not a prompt set (says in which file and pair, counted from 0), or a near miss of a shipped
                name.
            TypeError: `source` is neither a path nor a data set.
            OSError: the hub id cannot be loaded.
        """
        if not isinstance(source, str | Path):
            return _from_dataset(source, "the dataset", split)
        path = Path(find_prompts(source) if isinstance(source, str) else source)
        if path.is_dir():
            return _from_dataset(_saved_dataset(path), str(path), split)
        if path.suffix.lower() in (".json", ".jsonl"):
            return _from_file(path)
        if path.is_file():
            raise ValueError(f"{path} is not named as a prompt set; give it the suffix .json or .jsonl.")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
            raise FileNotFoundError(f"there is no prompt file {path}; check the path.")
        return _from_dataset(_hub_dataset(str(source)), str(source), split)

    def save(self, path: str | Path) -> None:
        """Write the prompts so that `load` reads them back.

        Args:
            path: a `.json` file (pairs, their number and the description) or a `.jsonl` file (pairs only).

        Raises:
            ValueError: the name has another suffix.
        """
        path = Path(path)
        pairs = [prompt.model_dump(mode="json", exclude_defaults=True) for prompt in self]
        if path.suffix.lower() == ".json":
            write_json(path, {"n_examples": len(pairs), "description": self.description, "pairs": pairs})
        elif path.suffix.lower() == ".jsonl":
            with atomic_path(path) as temporary:
                lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
                temporary.write_text("".join(lines), encoding="utf-8")
        else:
            raise ValueError(f"cannot save prompts as {path}; end the name with .json or .jsonl.")

    @cached_property
    def hash(self) -> str:
        """Hash of the prompts in order, without name and description."""
        return data_hash([prompt.model_dump(mode="json") for prompt in self])

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def tokenize(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: Text = "clean",
        answers: Answers = "first_token",
        max_length: int | None = None,
    ) -> TokenizedPrompts:
        """Tokenise every prompt with its answers and positions.

        Prompts get the special tokens that the tokenizer prepends by default but not those it appends (an end token), since the
        prompt is to be continued. Answers are tokenised in context: the ids of prompt + answer must begin with the prompt's. A
        position of several tokens is its last token.

        Args:
            tokenizer: a fast one, which knows the characters of each token.
            text: which text of each prompt, "clean" or "corrupt".
            answers: "first_token" compares the first tokens of the two answers; "first_difference" appends the tokens that both
                answers begin with to the prompt (so that "end" is the last of those) and compares the first tokens that differ.
            max_length: the most tokens that a prompt may have.

        Returns:
            The tokenised prompts.

        Raises:
            ValueError: no corrupt text, a word that the tokenizer does not know, an answer that merges with the end of the
                prompt, answers that no token tells apart, or a prompt that is empty or too long; names the prompt.
        """
        if text not in ("clean", "corrupt"):
            raise ValueError(f"text must be 'clean' or 'corrupt', not {text!r}.")
        if answers not in ("first_token", "first_difference"):
            raise ValueError(f"answers must be 'first_token' or 'first_difference', not {answers!r}.")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which cannot locate names; load the fast one."
            )
        rows = []
        for index, prompt in enumerate(self):
            string = prompt.clean if text == "clean" else prompt.corrupt
            if string is None:
                raise ValueError(
                    f"prompt {index} of {self.name} has no corrupt text; add the field 'corrupt' to the pair."
                )
            where = f"prompt {index} of {self.name} ({_short(string)})"
            rows.append(
                tokenize_prompt(tokenizer, string, prompt.answers, prompt.spans(text), answers, max_length, where)
            )
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return TokenizedPrompts(
            input_ids=tuple(row.input_ids for row in rows),
            answer_ids=tuple(row.answer_ids for row in rows),
            positions=tuple(row.positions for row in rows),
            pad_id=next(pad for pad in pads if pad is not None),
        )


# --- names in a text -------------------------------------------------------------------------------------------------


def _mentions(text: str, name: str, other: str) -> list[tuple[int, int]]:
    """The mentions of `name` as a whole word and not inside a mention of `other`."""
    longer_first = sorted((name, other), key=len, reverse=True)
    matches = re.finditer("|".join(map(re.escape, longer_first)), text)
    return [match.span() for match in matches if match.group() == name and not _inside_word(text, *match.span())]


def _inside_word(text: str, start: int, end: int) -> bool:
    edges = ((text[start - 1 : start], text[start]), (text[end - 1], text[end : end + 1]))
    return any(_in_cased_word(left) and _in_cased_word(right) for left, right in edges)


def _in_cased_word(character: str) -> bool:
    # Scripts with case have spaces between words; others do not (Chinese, Thai), or attach particles to names (Korean).
    return character.lower() != character.upper() or character.isdigit()


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


# --- files and datasets ---------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> PromptSet:
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}; check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it in that encoding.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it should hold prompts as JSON.")
    if path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return _from_pairs([_parse(line, path, number) for number, line in lines], str(path), path.stem)
    content = _parse(text, path)
    if isinstance(content, list):
        return _from_pairs(content, str(path), path.stem)
    if not isinstance(content, dict) or not isinstance(content.get("pairs"), list):
        raise ValueError(f"{path} is not a prompt set; it should be a list of pairs, or an object with a list 'pairs'.")
    pairs, number = content["pairs"], content.get("n_examples")
    if number is not None and number != len(pairs):
        raise ValueError(
            f"{path} says n_examples is {number} but holds {len(pairs)} pairs; correct it, or leave it out."
        )
    return _from_pairs(pairs, str(path), path.stem, str(content.get("description") or ""))


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        at = f"{error.msg}, line {line or error.lineno} column {error.colno}"
        raise ValueError(f"{path} is not {'JSON' if line is None else 'one JSON object per line'} ({at}).") from None


def _saved_dataset(path: Path) -> Any:
    import datasets  # takes seconds to import

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError):
        raise ValueError(
            f"{path} is a folder but not a dataset; give a .json or .jsonl file, or a folder of Dataset.save_to_disk."
        ) from None


def _hub_dataset(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name)
    except Exception as error:  # the hub, the network and the readers of a dozen formats each raise their own kinds
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise OSError(
            f"{name} is not a file, and loading it as a data set of the hub failed ({reason}); check the name."
        ) from error


def _from_dataset(dataset: Any, where: str, split: str | None) -> PromptSet:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split is None and len(dataset) == 1:
            split = next(iter(dataset))
        if split not in dataset:
            raise ValueError(f"{where} has the splits {', '.join(dataset)}; choose one with split=.")
        dataset, where = dataset[split], f"{where} ({split})"
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"cannot read prompts from a {type(dataset).__name__}; give a path, a hub id or a Dataset.")
    return _from_pairs(list(dataset), where, Path(where).stem, dataset.info.description or "")


def _from_pairs(pairs: list[Any], where: str, name: str, description: str = "") -> PromptSet:
    if not pairs:
        raise ValueError(f"{where} holds no pairs; give at least one.")
    prompts = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, dict):
            raise ValueError(f"{where}, pair {index}: should be an object with the fields of a prompt, not {pair!r}.")
        try:
            prompts.append(Prompt.model_validate(pair))
        except ValidationError as error:
            raise ValueError(f"{where}, pair {index}: {_first_error(error)}") from None
    return PromptSet(tuple(prompts), name, description)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    field = ".".join(map(str, first["loc"][:2]))
    return f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}."
