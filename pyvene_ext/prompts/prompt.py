"""A prompt: a text, its answers and its named positions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictStr, model_validator
from transformers import PreTrainedTokenizerBase

from pyvene_ext.io.records import Record
from pyvene_ext.prompts.encoding import RESERVED_POSITIONS, AnswerTexts, render_chat

Text = Literal["clean", "corrupt"]
NAME_POSITIONS = ("io", "s1", "s2", "subject")


def _texts(value: Any) -> Any:
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(text, str) and text for text in several):
        raise ValueError(f"{value!r} should be a text or several, none of them empty.")
    return value if isinstance(value, str) else tuple(several)


def _messages(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{value!r} should be a text, or a list of chat messages.")
    for message in value:
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else []
        if not fields or not all(isinstance(field, str) for field in fields):
            raise ValueError(f"{message!r} should be a chat message with the texts 'role' and 'content'.")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _place(value: Any) -> Any:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, str) or (len(numbers) <= 2 and all(type(number) is int for number in numbers)):
        return value
    raise ValueError(f"{value!r} should be a substring, [start, end) in characters, or the index of a token.")


Answer = Annotated[str | tuple[str, ...], BeforeValidator(_texts)]
PositionInText = Annotated[str | int | tuple[int, int], BeforeValidator(_place)]
TextOrMessages = Annotated[str | tuple[dict[str, str], ...], BeforeValidator(_messages)]


class Prompt(Record):
    """A text, the answers that are compared after it, and its named positions.

        Prompt("The capital of France is", "Paris", "Rome")
        Prompt("The keys to the cabinet", ["are", "were"], ["is", "was"], positions={"subject": "keys"})

    A text may be a list of chat messages, `[{"role": "user", "content": "..."}]`, which the tokenizer's chat template turns into
    text when the prompt is tokenised (`rendered`).

    An answer is what follows the text. Where the text ends and the answer begins with a letter or digit of a script with upper
    and lower case, a space is put between them ("is" + "Paris" gives "is Paris"). Otherwise nothing is: Chinese has no spaces,
    and in Korean or Arabic the answer must begin with one where it is a word of its own.

    Prompts of indirect object identification (Wang et al. 2022) may give two names instead: `io_name` is the right answer,
    `s_name` the wrong one, and where they occur in the text is named. A name is matched as a whole word in scripts with upper and
    lower case ("Mark" is not in "Market") and anywhere in others, but never inside the other, longer name.

    Attributes:
        text: the text, or chat messages; `clean` is another name for it.
        answer: the right answer, or several, any of which counts.
        wrong: the wrong answer, or several.
        corrupt: the contrast text of patching studies, or chat messages.
        corrupt_answer: the right answer after `corrupt`, if it is another one.
        corrupt_wrong: the wrong answer after `corrupt`, if it is another one.
        positions: named positions: a substring that occurs exactly once, `[start, end)` in characters of `text` (as
            rendered), or the index of a token (negative: from the last).
        io_name: the indirect object, the right answer unless there is `answer`.
        s_name: the subject, the wrong answer unless there is `wrong`.
        io_token: the right answer just as it is appended to the text, ending with `io_name`; default a space and `io_name`. The
            wrong answer is the same text with `s_name` in place of `io_name`.

    Raises:
        ValueError: no text, a field of another type, an answer that is both right and wrong, or a position that cannot be found.
    """

    model_config = ConfigDict(extra="ignore")

    text: TextOrMessages
    answer: Answer | None = None
    wrong: Answer | None = None
    corrupt: TextOrMessages | None = None
    corrupt_answer: Answer | None = None
    corrupt_wrong: Answer | None = None
    positions: dict[str, PositionInText] = Field(default_factory=dict)
    io_name: StrictStr | None = Field(default=None, min_length=1)
    s_name: StrictStr | None = Field(default=None, min_length=1)
    io_token: StrictStr | None = Field(
        default_factory=lambda data: f" {data['io_name']}" if data.get("io_name") else None
    )

    def __init__(
        self,
        text: str | Sequence[Mapping[str, str]] | None = None,
        answer: str | Sequence[str] | None = None,
        wrong: str | Sequence[str] | None = None,
        corrupt: str | Sequence[Mapping[str, str]] | None = None,
        corrupt_answer: str | Sequence[str] | None = None,
        corrupt_wrong: str | Sequence[str] | None = None,
        positions: Mapping[str, Any] | None = None,
        /,
        **fields: Any,
    ) -> None:
        by_place = (text, answer, wrong, corrupt, corrupt_answer, corrupt_wrong, positions)
        # The first fields of the class are the arguments, in this order.
        given = zip(type(self).model_fields, by_place, strict=False)
        super().__init__(**{name: value for name, value in given if value is not None}, **fields)

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Show what was given."""
        return ((name, getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set)

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, data: Any) -> Any:
        # In a `datasets` dataset every row has all columns, and all keys of a struct, with nulls where there is no value; a
        # table has arrays in place of lists.
        data = {
            name: value.tolist() if hasattr(value, "tolist") else value
            for name, value in data.items()
            if value is not None
        }
        if "clean" in data and "text" not in data:
            data["text"] = data.pop("clean")
        for name in data:  # other fields are the user's own, but a misspelt one of ours is an error
            close = difflib.get_close_matches(str(name), (*cls.model_fields, "clean"), n=1, cutoff=0.8)
            if name not in cls.model_fields and close and close[0] not in data:
                raise ValueError(f"unknown field {name!r}; did you mean {close[0]!r}?")
        if "text" not in data:
            found = f" among {', '.join(map(str, data))}" if data else ""
            raise ValueError(f"there is no field 'text'{found}; give the text of the prompt.")
        if isinstance(data.get("positions"), dict):
            data["positions"] = {name: at for name, at in data["positions"].items() if at is not None}
        return data

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        if self.io_name is not None and self.io_name == self.s_name:
            raise ValueError(f"io_name and s_name are both {self.io_name!r}; they must differ.")
        if self.io_token is not None and not (self.io_name and self.io_token.endswith(self.io_name)):
            raise ValueError(f"io_token {self.io_token!r} must end with io_name {self.io_name!r}.")
        for name in self.positions:
            if name in RESERVED_POSITIONS or (name in NAME_POSITIONS and (self.io_name or self.s_name)):
                raise ValueError(f"position {name!r} has a built-in meaning; choose another name.")
        # Messages are checked once they are rendered.
        given: dict[Text, Any] = {"clean": self.text, "corrupt": self.corrupt}
        for text in (text for text, string in given.items() if isinstance(string, str)):
            right, wrong = self.answers(text)
            if same := set(right) & set(wrong):
                raise ValueError(
                    f"{same.pop().strip()!r} is both a right and a wrong answer of the {text} text; use different answers."
                )
        for name, at in self.positions.items():
            if not isinstance(self.text, str):
                break
            if name not in self.spans("clean"):
                raise ValueError(f"position {name!r}: {at!r} must occur exactly once in the text {short(self.text)}.")
            if isinstance(at, tuple) and not 0 <= at[0] < at[1] <= len(self.text):
                raise ValueError(
                    f"position {name!r}: [{at[0]}, {at[1]}) must be a non-empty part of the {len(self.text)} characters of the "
                    "text."
                )
        return self

    @property
    def clean(self) -> str | tuple[dict[str, str], ...]:
        """The text, or the messages."""
        return self.text

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Turn messages into text, as the tokenizer's chat template does.

        Messages that end with one of the assistant's are continued there; after others the assistant's turn begins.

        Args:
            tokenizer: the model's.

        Returns:
            The prompt with texts only; itself if it has no messages.

        Raises:
            ValueError: the tokenizer has no chat template, it refuses the messages, or the text lacks a position.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        messages = {
            name: value for name, value in given.items() if name in ("text", "corrupt") and not isinstance(value, str)
        }
        if not messages:
            return self
        return Prompt(**given | {name: render_chat(value, tokenizer) for name, value in messages.items()})

    def string(self, text: Text) -> str:
        """One of the two texts; ValueError if it is still a list of messages."""
        string = self.text if text == "clean" else self.corrupt or ""
        if not isinstance(string, str):
            raise ValueError("chat messages have no text before a template makes it; call rendered(tokenizer) first.")
        return string

    def answers(self, text: Text = "clean") -> AnswerTexts:
        """Find what the answers append to one of the two texts.

        Args:
            text: "clean" or "corrupt".

        Returns:
            The right and the wrong answers, with the space that separates them from the text.
        """
        string = self.string(text)
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
        string = self.string(text)
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
    """The beginning of a text, quoted, for messages."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def as_prompt(item: Any, where: str) -> Prompt:
    """Make a prompt of what stands in a list of prompts.

    Args:
        item: a prompt, its fields, or its text.
        where: what messages call it.

    Returns:
        The prompt.

    Raises:
        ValueError: something is wrong with the fields, or it is neither.
    """
    if isinstance(item, Prompt):
        return item
    if not isinstance(item, str | Mapping):
        raise ValueError(f"{where}: should be an object with the fields of a prompt, not {item!r}.")
    try:
        return Prompt(item) if isinstance(item, str) else Prompt(**{str(name): value for name, value in item.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
