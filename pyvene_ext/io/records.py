"""Immutable data that users build from fields, whose mistakes are one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pyvene_ext.io.errors import one_sentence


class Record(BaseModel):
    """A frozen pydantic model that answers wrong fields with a ValueError of one sentence.

    A class that takes fields it does not know sets `extra="ignore"` in its own `model_config`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, *unnamed: Any, **fields: Any) -> None:
        """Build a record from its fields, given by name."""
        if unnamed:
            names = ", ".join(f"{name}=..." for name in type(self).model_fields)
            raise ValueError(f"the fields of {type(self).__name__} are given by name: {type(self).__name__}({names}).")
        with _in_one_sentence(type(self)):
            super().__init__(**fields)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Build a record from a dict, as pydantic does."""
        with _in_one_sentence(cls):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Build a record from JSON, as pydantic does."""
        with _in_one_sentence(cls):
            return super().model_validate_json(json_data, **options)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the record with some fields changed; unlike pydantic's, the copy is checked like any other record."""
        return type(self)(**{**dict(self), **update}) if update else super().model_copy(deep=deep)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change a field."""
        with _in_one_sentence(type(self)):
            super().__setattr__(name, value)


@contextmanager
def _in_one_sentence(kind: type[BaseModel]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ValueError(one_sentence(error, kind.model_fields)) from None
