"""Prompt sets: one file format, named positions, answers tokenised in context, batches of unequal lengths.

    PromptSet([Prompt("The capital of France is", "Paris", "Rome"), Prompt("The capital of Italy is", "Rome", "Paris")])
    PromptSet.load("ioi_en")        # a shipped set; or "mine.json", "mine.jsonl", a table, a data set

A prompt set is a JSON file `{"n_examples", "description", "pairs": [...]}`, a bare JSON list of pairs, a JSONL file with one
pair per line, a `datasets` dataset or a pandas table with one pair per row, or a Python list. A pair has the fields of `Prompt`;
other fields are ignored, and null counts as absent. A mere text is a prompt without answers. `n_examples` is optional; if given,
it must equal the number of pairs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.files import atomic_path, parse_json, write_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.prompts.encoding import Answers, tokenize_prompt
from pyvene_ext.prompts.prompt import Prompt, Text, as_prompt, short
from pyvene_ext.prompts.shipped import find_prompts
from pyvene_ext.prompts.tokenized import Batch, PaddingSide, TokenizedPrompts, collect

__all__ = ["Answers", "Batch", "PaddingSide", "Prompt", "PromptSet", "Text", "TokenizedPrompts"]


@dataclass(frozen=True)
class PromptSet:
    """A named set of prompts.

    `len(prompts)` counts them, `prompts[3]` is one of them and `prompts[:20]` a set of the first.

    Attributes:
        prompts: one prompt or more.
        name: the set's name in messages and metadata.
        description: free text.

    Raises:
        ValueError: there are no prompts, or something is wrong with one of them.
        TypeError: what is given is not a list.
    """

    prompts: tuple[Prompt, ...]
    name: str
    description: str

    def __init__(
        self, prompts: Iterable[Prompt | Mapping[str, Any] | str], name: str = "prompts", description: str = ""
    ) -> None:
        """Take a list of prompts, of their fields, or of their texts."""
        # Iterating over a text, a table or one prompt would give letters, columns or fields.
        if (
            isinstance(prompts, str | Mapping | Prompt)
            or hasattr(prompts, "columns")
            or not isinstance(prompts, Iterable)
        ):
            raise TypeError(
                f"PromptSet takes a list of prompts, not a {type(prompts).__name__}; put a prompt in a list, and read a shipped "
                "set, a file or a table with PromptSet.load."
            )
        own = tuple(as_prompt(item, f"prompt {index} of {name}") for index, item in enumerate(prompts))
        if not own:
            raise ValueError(f"{name} holds no prompts; give at least one.")
        for field, value in (("prompts", own), ("name", name), ("description", description)):
            object.__setattr__(self, field, value)

    @classmethod
    def load(cls, source: Any, split: str | None = None) -> PromptSet:
        """Load a prompt set.

        Args:
            source: the name of a shipped set ("ioi_en"), a path to a `.json` or `.jsonl` file or to a folder of
                `Dataset.save_to_disk`, a pandas table, a `datasets.Dataset` (or `DatasetDict`), the id of a data set on the hub
                ("owner/name"), or a list of prompts, of their fields or of texts.
            split: the split, if a `datasets` source has several.

        Returns:
            The prompt set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the content is not a prompt set (says in which file and pair, counted from 0), or there is no shipped set
                of this name.
            TypeError: `source` is nothing that holds prompts.
            OSError: the hub id cannot be loaded.
        """
        rows, where, name, description = _read_source(source, split)
        prompts = [as_prompt(row, f"{where}, pair {index}") for index, row in enumerate(rows)]
        if not prompts:
            raise ValueError(f"{where} holds no pairs; give at least one.")
        return cls(prompts, name, description)

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

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        return replace(self, prompts=self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __repr__(self) -> str:
        text = self.prompts[0].text
        first = short(text if isinstance(text, str) else text[-1]["content"])
        return f"<PromptSet {self.name}: {len(self)} prompt{'s' * (len(self) > 1)}, the first {first}>"

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
        if not hasattr(tokenizer, "is_fast"):
            raise ValueError(
                f"expected a tokenizer, not {type(tokenizer).__name__}; load one with model, tokenizer = "
                "pyvene_ext.load_model(NAME)."
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which cannot locate names; load the fast one."
            )
        rows = []
        for index, prompt in enumerate(self):
            where, given = f"prompt {index} of {self.name}", prompt.text if text == "clean" else prompt.corrupt
            if given is None:
                raise ValueError(f"{where} has no corrupt text; add the field 'corrupt' to the pair.")
            try:
                prompt = prompt.rendered(tokenizer)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            string = prompt.string(text)
            rows.append(
                tokenize_prompt(
                    tokenizer,
                    string,
                    prompt.answers(text),
                    prompt.spans(text),
                    answers,
                    max_length,
                    f"{where} ({short(string)})",
                    chat=not isinstance(given, str),
                )
            )
        return collect(rows, tokenizer)


# -- files, tables and data sets ---------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """What a source holds.

    Attributes:
        rows: one entry per prompt.
        where: what messages call the source.
        name: the set's name.
        description: what the source says about itself.
    """

    rows: Iterable[Any]
    where: str
    name: str
    description: str = ""


def _read_source(source: Any, split: str | None = None) -> _Source:
    """Read what `PromptSet.load` takes, without checking each prompt."""
    if not isinstance(source, str | Path):
        return _from_object(source, split)
    path = Path(find_prompts(source) if isinstance(source, str) else source)
    if path.is_dir():
        return _from_object(_saved_dataset(path), split, str(path))
    if path.suffix.lower() in (".json", ".jsonl"):
        return _from_file(path)
    if path.is_file():
        raise ValueError(f"{path} is not named as a prompt set; give it the suffix .json or .jsonl.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"there is no prompt file {path}; check the path.")
    return _from_object(_hub_dataset(str(source)), split, str(source))


def _from_object(source: Any, split: str | None, where: str = "") -> _Source:
    # Whoever has a table or a data set has imported its package, which takes seconds.
    pandas, datasets = (sys.modules.get(name) for name in ("pandas", "datasets"))
    if datasets and isinstance(source, datasets.DatasetDict):
        where = where or "the dataset"
        if split is None and len(source) == 1:
            split = next(iter(source))
        if split not in source:
            raise ValueError(f"{where} has the splits {', '.join(source)}; choose one with split=.")
        return _from_object(source[split], None, f"{where} ({split})")
    if datasets and isinstance(source, datasets.Dataset):
        where = where or "the dataset"
        return _Source(source, where, Path(where).stem, source.info.description or "")
    if pandas and isinstance(source, pandas.DataFrame):
        return _Source(source.astype(object).where(source.notna(), None).to_dict("records"), "the table", "table")
    if isinstance(source, Mapping):
        return _from_content(source, "the object", "prompts")
    if isinstance(source, Iterable) and not hasattr(source, "model_fields_set"):
        return _Source(source, "the list", "prompts")
    raise TypeError(
        f"cannot read prompts from a {type(source).__name__}; give a list of prompts, a path, a hub id, a table or a Dataset."
    )


def _from_file(path: Path) -> _Source:
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
        return _Source([_parse(line, path, number) for number, line in lines], str(path), path.stem)
    return _from_content(_parse(text, path), str(path), path.stem)


def _from_content(content: Any, where: str, name: str) -> _Source:
    if isinstance(content, list):
        return _Source(content, where, name)
    if not isinstance(content, Mapping) or not isinstance(content.get("pairs"), list):
        raise ValueError(
            f"{where} is not a prompt set; it should be a list of pairs, or an object with a list 'pairs'."
        )
    pairs, number = content["pairs"], content.get("n_examples")
    if number is not None and number != len(pairs):
        raise ValueError(
            f"{where} says n_examples is {number} but holds {len(pairs)} pairs; correct it, or leave it out."
        )
    return _Source(pairs, where, name, str(content.get("description") or ""))


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
