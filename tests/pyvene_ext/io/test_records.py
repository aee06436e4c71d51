"""Records are pydantic models but for their errors: a ValueError of one sentence, however they are built."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from pyvene_ext.io.records import Record


class Edit(Record):
    kind: Literal["zero", "mean"] = "zero"
    heads: tuple[int, ...] = ()


class Study(Record):
    edits: tuple[Edit, ...]


class Plain(BaseModel):
    edit: Edit


EDIT = Edit(kind="mean", heads=[1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Edit(kind="men"), "kind must be 'zero' or 'mean', not 'men'; did you mean 'mean'?"),
        (lambda: Edit(head=3), "there is no field 'head'; did you mean 'heads'?"),
        (lambda: Edit(other=3), "there is no field 'other'; choose among kind, heads."),
        (lambda: Edit(heads=0), "heads must be a list or tuple, not 0."),
        (lambda: Edit(heads=list("abcde")), "heads.0 must be a whole number, not 'a'; "),
        (lambda: Study(), "edits is missing."),
        (lambda: Study(edits=[{"kind": "zro"}]), "edits.0: kind must be 'zero' or 'mean', not 'zro'; did you mean 'zero'?"),
        (lambda: Edit.model_validate(3), "it must be a dict of fields, not 3."),
        (lambda: Edit.model_validate_json('{"heads": 3}'), "heads must be a list or tuple, not 3."),
        (lambda: EDIT.model_copy(update={"kind": None}), "kind must be 'zero' or 'mean', not None."),
        (lambda: setattr(EDIT, "kind", "zero"), "kind cannot be changed; make a changed copy with"),
    ],
)  # fmt: skip
def test_whatever_is_wrong_with_a_record_is_one_sentence(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert type(caught.value) is ValueError and str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_many_errors_are_counted() -> None:
    with pytest.raises(ValueError, match=r"heads.2 must be a whole number, not 'c'; and 2 more\.$"):
        Edit(heads=list("abcde"))  # type: ignore[arg-type]


def test_records_are_compared_hashed_copied_pickled_and_nested_like_other_pydantic_models() -> None:
    for same in (
        copy.deepcopy(EDIT),
        pickle.loads(pickle.dumps(EDIT)),
        Edit.model_validate(EDIT.model_dump(mode="json")),
        Edit.model_validate_json(EDIT.model_dump_json()),
        Edit().model_copy(update={"kind": "mean", "heads": (1, 2)}),
        EDIT.model_copy(),
        Plain.model_validate({"edit": {"kind": "mean", "heads": [1, 2]}}).edit,
        Study(edits=[EDIT]).edits[0],  # type: ignore[arg-type]
    ):
        assert same == EDIT and hash(same) == hash(EDIT) and type(same) is Edit
    assert Edit() != EDIT and EDIT.model_fields_set == {"kind", "heads"}
