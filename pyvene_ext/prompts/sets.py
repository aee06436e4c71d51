"""Prompt sets: one file format, named positions, answers tokenised in context, batches of unequal lengths.

A prompt set is a JSON file `{"n_examples", "description", "pairs": [...]}`, a bare JSON list of pairs, a JSONL file with one pair
per line, or a `datasets` dataset with one pair per row. A pair has the fields of `Prompt`; other fields are ignored, and null
counts as absent. `n_examples` is optional; if given, it must equal the number of pairs.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.files import atomic_path, parse_json, write_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import (
    Answers,
    AnswerTexts,
    Batch,
    PaddingSide,
    TokenizedPrompts,
    collect,
    tokenize_prompt,
)

__all__ = ["Answers", "Batch", "PaddingSide", "Prompt", "PromptSet", "Text", "TokenizedPrompts"]

Text = Literal["clean", "corrupt"]
BUILT_IN_POSITIONS = ("end", "last", "io", "s1", "s2", "subject")


FIELDS = (
    "text",
    "answer",
    "wrong",
    "corrupt",
    "corrupt_answer",
    "corrupt_wrong",
    "positions",
)  # in the order of arguments


def _texts(value: Any) -> Any:
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(text, str) and text for text in several):
        raise ValueError(f"{value!r} should be a text or several, none of them empty.")
    return value if isinstance(value, str) else tuple(several)


Answer = Annotated[str | tuple[str, ...], BeforeValidator(_texts)]


class Prompt(BaseModel):
    """A text, the answers that are compared after it, and its named positions.

        Prompt("The capital of France is", "Paris", "Rome")
        Prompt("The keys to the cabinet", ["are", "were"], ["is", "was"], positions={"subject": "keys"})

    An answer is what follows the text. Where the text ends and the answer begins with a letter or digit of a script with upper
    and lower case, a space is put between them ("is" + "Paris" gives "is Paris"; Chinese has no spaces); else nothing is.

    Prompts of indirect object identification (Wang et al. 2022) may give two names instead: `io_name` is the right answer,
    `s_name` the wrong one, and where they occur in the text is named. A name is matched as a whole word in scripts with upper and
    lower case ("Mark" is not in "Market") and anywhere in others, but never inside the other, longer name.

    Attributes:
        text: the text; `clean` is another name for it.
        answer: the right answer, or several, any of which counts.
        wrong: the wrong answer, or several.
        corrupt: the contrast text of patching studies.
        corrupt_answer: the right answer after `corrupt`, if it is another one.
        corrupt_wrong: the wrong answer after `corrupt`, if it is another one.
        positions: named positions: a substring that occurs exactly once, `[start, end)` in characters of `text`, or the index of
            a token (negative: from the last).
        io_name: the indirect object, the right answer unless there is `answer`.
        s_name: the subject, the wrong answer unless there is `wrong`.
        io_token: the right answer just as it is appended to the text, ending with `io_name`; default a space and `io_name`. The
            wrong answer is the same text with `s_name` in place of `io_name`.

    Raises:
        ValueError: no text, a field of another type, an answer that is both right and wrong, or a position that cannot be found.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: StrictStr
    answer: Answer | None = None
    wrong: Answer | None = None
    corrupt: StrictStr | None = None
    corrupt_answer: Answer | None = None
    corrupt_wrong: Answer | None = None
    positions: dict[str, StrictStr | StrictInt | tuple[int, int]] = Field(default_factory=dict)
    io_name: StrictStr | None = Field(default=None, min_length=1)
    s_name: StrictStr | None = Field(default=None, min_length=1)
    io_token: StrictStr | None = Field(
        default_factory=lambda data: f" {data['io_name']}" if data.get("io_name") else None
    )

    def __init__(
        self,
        text: str | None = None,
        answer: str | Iterable[str] | None = None,
        wrong: str | Iterable[str] | None = None,
        corrupt: str | None = None,
        corrupt_answer: str | Iterable[str] | None = None,
        corrupt_wrong: str | Iterable[str] | None = None,
        positions: Mapping[str, Any] | None = None,
        /,
        **fields: Any,
    ) -> None:
        by_place = (text, answer, wrong, corrupt, corrupt_answer, corrupt_wrong, positions)
        try:
            super().__init__(
                **{name: value for name, value in zip(FIELDS, by_place, strict=True) if value is not None}, **fields
            )
        except ValidationError as error:
            raise ValueError(_first_error(error)) from None

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Show what was given."""
        return ((name, getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set)

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        # In a `datasets` dataset every row has all columns, and all keys of a struct, with nulls where there is no value.
        data = {name: value for name, value in data.items() if value is not None}
        if "clean" in data and "text" not in data:
            data["text"] = data.pop("clean")
        for name in data:  # other fields are the user's own, but a misspelt one of ours is an error
            close = difflib.get_close_matches(str(name), (*cls.model_fields, "clean"), n=1, cutoff=0.8)
            if name not in cls.model_fields and close and close[0] not in data:
                raise ValueError(f"unknown field {name!r}; did you mean {close[0]!r}?")
        if "text" not in data:
            raise ValueError("there is no field 'text'; give the text of the prompt.")
        if isinstance(data.get("positions"), dict):
            data["positions"] = {name: at for name, at in data["positions"].items() if at is not None}
        return data

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        if self.io_name is not None and self.io_name == self.s_name:
            raise ValueError(f"io_name and s_name are both {self.io_name!r}; they must differ.")
        if self.io_token is not None and not (self.io_name and self.io_token.endswith(self.io_name)):
            raise ValueError(f"io_token {self.io_token!r} must end with io_name {self.io_name!r}.")
        for text in ("clean", "corrupt") if self.corrupt is not None else ("clean",):
            right, wrong = self.answers(text)
            if same := set(right) & set(wrong):
                raise ValueError(
                    f"{same.pop().strip()!r} is both a right and a wrong answer of the {text} text; use different answers."
                )
        spans = self.spans("clean")
        for name, at in self.positions.items():
            if name in ("end", "last") or (name in BUILT_IN_POSITIONS and (self.io_name or self.s_name)):
                raise ValueError(f"position {name!r} has a built-in meaning; choose another name.")
            if name not in spans:
                raise ValueError(f"position {name!r}: {at!r} must occur exactly once in the text {short(self.text)}.")
            if isinstance(at, tuple) and not 0 <= at[0] < at[1] <= len(self.text):
                raise ValueError(
                    f"position {name!r}: [{at[0]}, {at[1]}) must be a non-empty part of the {len(self.text)} characters of the "
                    "text."
                )
        return self

    @property
    def clean(self) -> str:
        """The text."""
        return self.text

    def answers(self, text: Text = "clean") -> AnswerTexts:
        """Find what the answers append to one of the two texts.

        Args:
            text: "clean" or "corrupt".

        Returns:
            The right and the wrong answers, with the space that separates them from the text.
        """
        string = self.text if text == "clean" else self.corrupt or ""
        right, wrong = self.answer, self.wrong
        if text == "corrupt":
            right, wrong = self.corrupt_answer or right, self.corrupt_wrong or wrong
        before = (self.io_token or " ").removesuffix(self.io_name or "")
        names = (self.io_token, None if self.s_name is None else before + self.s_name)
        return AnswerTexts(
            *(
                _continue(string, given) if given is not None else () if name is None else (name,)
                for given, name in zip((right, wrong), names, strict=True)
            )
        )

    def spans(self, text: Text) -> dict[str, tuple[int, int] | int]:
        """Find the named positions in one of the two texts.

        "io" is the first mention of IO, "s1" the first and "s2" the last mention of S. "subject" is "s2": in "..., Mark gave the
        book to" it is the subject of the last clause. Names and substrings that a text does not mention have no position there,
        and positions given in characters exist in `text` only.

        Args:
            text: "clean" or "corrupt".

        Returns:
            `[start, end)` in characters, or the index of a token, by name, without "end" and "last".
        """
        string = self.text if text == "clean" else self.corrupt or ""
        found: dict[str, tuple[int, int] | int] = {}
        if self.io_name and (io := _mentions(string, self.io_name, self.s_name)):
            found["io"] = io[0]
        if self.s_name and (s := _mentions(string, self.s_name, self.io_name)):
            found |= {"s1": s[0], "s2": s[-1], "subject": s[-1]}
        for name, at in self.positions.items():
            if isinstance(at, str):
                start = string.find(at)
                if at and start >= 0 and start == string.rfind(at):
                    found[name] = (start, start + len(at))
            elif text == "clean" or isinstance(at, int):
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
        pairs = [prompt.model_dump(mode="json", exclude_unset=True) for prompt in self]
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
        always = ("text", "corrupt", "io_name", "s_name", "io_token", "positions")  # the fields of earlier versions
        return data_hash(
            [
                {
                    "clean" if name == "text" else name: value
                    for name, value in prompt.model_dump(mode="json").items()
                    if name in always or value is not None
                }
                for prompt in self
            ]
        )

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
        prompt is to be continued. Answers are tokenised in context: the ids of prompt + answer must begin with the prompt's. An
        answer that begins with another answer of the same side adds nothing to it and is dropped. A position of several tokens is
        its last token.

        Args:
            tokenizer: a fast one, which knows the characters of each token.
            text: which text of each prompt, "clean" or "corrupt".
            answers: "first_token" keeps the prompt as it is; metrics of one token compare the first tokens of the answers, which
                must differ. "first_difference" appends the tokens that all right and wrong answers begin with to the prompt (so
                that "end" is the last of those).
            max_length: the most tokens that a prompt may have.

        Returns:
            The tokenised prompts.

        Raises:
            ValueError: no corrupt text, a word that the tokenizer does not know, an answer that merges with the end of the
                prompt, answers that no token tells apart (with "first_difference"), or a prompt that is empty or too long; names
                the prompt.
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
            string = prompt.text if text == "clean" else prompt.corrupt
            if string is None:
                raise ValueError(
                    f"prompt {index} of {self.name} has no corrupt text; add the field 'corrupt' to the pair."
                )
            where = f"prompt {index} of {self.name} ({short(string)})"
            rows.append(
                tokenize_prompt(tokenizer, string, prompt.answers(text), prompt.spans(text), answers, max_length, where)
            )
        return collect(rows, tokenizer)


# --- answers and names in a text ------------------------------------------------------------------------------------------


def _continue(text: str, answers: str | tuple[str, ...]) -> tuple[str, ...]:
    """The answers, each after a space if it would be glued to the text's last word without one."""
    several = (answers,) if isinstance(answers, str) else answers
    glued = text != "" and _in_cased_word(text[-1])
    return tuple(f" {answer}" if glued and _in_cased_word(answer[0]) else answer for answer in several)


def _mentions(text: str, name: str, other: str | None) -> list[tuple[int, int]]:
    """The mentions of `name` as a whole word and not inside a mention of `other`."""
    longer_first = sorted(filter(None, (name, other)), key=len, reverse=True)
    matches = re.finditer("|".join(map(re.escape, longer_first)), text)
    return [match.span() for match in matches if match.group() == name and not _inside_word(text, *match.span())]


def _inside_word(text: str, start: int, end: int) -> bool:
    edges = ((text[start - 1 : start], text[start]), (text[end - 1], text[end : end + 1]))
    return any(_in_cased_word(left) and _in_cased_word(right) for left, right in edges)


def _in_cased_word(character: str) -> bool:
    # Scripts with case have spaces between words; others do not (Chinese, Thai), or attach particles to names (Korean).
    return character.lower() != character.upper() or character.isdigit()


def short(text: str) -> str:
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
            prompts.append(Prompt(**pair))
        except ValueError as error:
            raise ValueError(f"{where}, pair {index}: {error}") from None
    return PromptSet(tuple(prompts), name, description)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"][:2]))
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}" if field else str(first["ctx"]["error"])
    return f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}."
