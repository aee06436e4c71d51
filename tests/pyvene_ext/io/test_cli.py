"""Flags whose values are choices: a near miss is answered with the choice that was meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from pyvene_ext.io.bounds import OneOrMore
from pyvene_ext.io.cli import run


@dataclass(frozen=True)
class Config:
    site: Literal["resid_pre", "resid_post"] = "resid_pre"
    kinds: Annotated[OneOrMore[Literal["zero", "mean"]], "several"] = ("zero",)
    mean: Literal["over_tokens"] | None = None
    where: Literal["all"] | str = "all"
    n_heads: int = 3


def ran(config: Config) -> int:
    """A study."""
    return 7


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--site", "resid_prr"], "--site cannot be 'resid_prr'; did you mean 'resid_pre'?"),
        (["--site=resid_pots"], "--site cannot be 'resid_pots'; did you mean 'resid_post'?"),
        (["--n-heads", "2", "--kinds", "zero", "maen"], "--kinds cannot be 'maen'; did you mean 'mean'?"),
        (["--mean", "over_token"], "--mean cannot be 'over_token'; did you mean 'over_tokens'?"),
    ],
)
def test_a_near_miss_of_a_choice_is_answered_with_it(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ran, Config, flags) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    "flags", [["--where", "al"], ["--kinds", "mean", "zero", "--site", "resid_post"], ["--mean", "None"]]
)
def test_other_values_are_left_to_the_flag(flags: list[str]) -> None:
    assert run(ran, Config, flags) == 7


@dataclass(frozen=True)
class Models:
    models: OneOrMore[str] = ("a",)


@dataclass(frozen=True)
class Published:
    model_name: str = "a"


def test_model_is_another_name_of_the_flag_that_names_models() -> None:
    for flags in (["--model", "b", "c"], ["--models", "b", "c"]):
        assert run(lambda config: len(config.models), Models, flags) == 2
    for flag in ("--model", "--model_name"):
        assert run(lambda config: ord(config.model_name), Published, [flag, "b"]) == ord("b")


def test_a_value_that_is_close_to_no_choice_gets_them_all(capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit):
        run(ran, Config, ["--site", "nonsense"])
    said = capsys.readouterr().err
    assert "invalid choice 'nonsense'" in said and "'resid_post'" in said
