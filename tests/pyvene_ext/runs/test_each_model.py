"""Studies of several models: what is loaded when, what is announced, and which flags are said to be short enough."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pyvene_ext.io.cli import run_shortened
from pyvene_ext.runs import plans
from pyvene_ext.runs.folder import RunFolder, each_model
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("a", "b", "c")
    out: Path | None = None
    limit: int | None = None
    dry_run: bool = False
    sets: int | None = 20
    levels: tuple[int, ...] = (1, 2, 4)


class Model:
    """A model; no two are in memory at once."""

    alive: ClassVar[weakref.WeakSet[Model]] = weakref.WeakSet()

    def __init__(self, name: str) -> None:
        self.name = name
        assert not len(Model.alive), "two models are in memory"
        Model.alive.add(self)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loads(config: Config, made: list[str], **options: Any) -> Any:
    Model.alive.clear()

    def load(number: int) -> Model:
        made.append(config.models[number])
        return Model(made[-1])

    options = {"seconds": lambda flags, model, n: 1.0, "n": 32, **options}
    return each_model(RunFolder(config, "study", *config.models), load, "work", **options)


@pytest.mark.parametrize(("models", "expected"), [("a", "a"), ("abc", "cbabc")])
def test_all_models_are_checked_before_the_first_is_run_which_is_loaded_once(models: str, expected: str) -> None:
    made: list[str] = []
    seen = []
    for model in loads(Config(tuple(models)), made):
        assert "".join(made).startswith("".join(reversed(models)))
        seen.append(model.name)
        del model
    assert "".join(seen) == models and "".join(made) == expected


def test_a_dry_run_and_a_model_that_is_refused_run_none(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []
    assert not list(loads(Config(dry_run=True), made)) and made == ["c", "b", "a"]
    assert capsys.readouterr().out == "work: under a minute\n"

    def refuses(number: int) -> Model:
        if number == 2:
            raise ValueError("c has no heads.")
        raise AssertionError("it is loaded last")

    with pytest.raises(ValueError, match="c has no heads"):
        next(each_model(RunFolder(Config(), "study"), refuses, "work", None, 4))


def seconds(flags: Config, model: Model, n: int) -> float:
    """10 for whatever is done, and so much for each set and level."""
    return 10 + ((flags.sets or 0) + 1) * len(flags.levels) * (1 + n / 4)


def test_the_largest_values_that_are_short_enough_are_named() -> None:
    shorter = {"sets": 20, "levels": (1, 2, 4)}
    with pytest.raises(ValueError, match="all 32 take about 29 minutes here: ") as error:
        next(loads(Config(), [], seconds=seconds, shorter=shorter))
    assert ": --sets 6 or --levels 1 or --limit 8 takes less, and --limit 32 takes all." in str(error.value)
    assert 3 * (10 + 7 * 3 * 9) <= 600 < 3 * (10 + 8 * 3 * 9)
    assert 3 * (10 + 21 * 1 * 9) <= 600 < 3 * (10 + 21 * 2 * 9)
    assert 3 * (10 + 63 * (1 + 8 / 4)) <= 600 < 3 * (10 + 63 * (1 + 9 / 4))
    for kept in Path().rglob("shortened.json"):  # from which the same flags would go on
        kept.unlink()
    with pytest.raises(ValueError, match="run: --sets 6 or --levels 1 takes about 10 minutes, and --limit 32 takes"):
        next(loads(Config(), [], seconds=seconds, shorter=shorter, least=9))
    assert next(loads(Config(limit=32), [], seconds=seconds, shorter=shorter)).name == "a"
    with pytest.raises(ValueError, match="run: no smaller --limit takes about 10 minutes, and --limit 32 takes all"):
        next(loads(Config(), [], seconds=lambda *_: 1000.0))


def test_what_no_number_of_problems_makes_short_enough_takes_fewer_sets_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(flags: Config, model: Model, n: int) -> float:
        return 2.0 * n * (1 + (20 if flags.sets is None else flags.sets))

    def study(config: Config) -> tuple[int, int | None]:
        n = config.limit or 32
        next(loads(config, [], seconds=slow, n=n, shorter={"sets": config.sets or 20}, spare="sets"))
        return n, config.sets

    # 3 models: 48 s for each set on 8 problems, of which 12 fit, but no 7 problems with 20 random sets.
    assert run_shortened(study, Config(sets=None)) == (8, 10)
    said = capsys.readouterr().out
    assert "to keep within ten minutes 8 of 32 are taken, with --sets 10; --limit 32 takes all" in said
    # It goes on with as many when the machine is idle.
    monkeypatch.setattr("pyvene_ext.runs.folder.LONGEST", 1e6)
    assert run_shortened(study, Config(sets=None)) == (8, 10)


def test_a_time_of_a_model_that_is_gone_is_not_that_of_another_at_its_address() -> None:
    prompts, taken = random_prompts((7,)), iter([1.0, 2.0])
    with plans.kept(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "_best_time", lambda _: next(taken))
        patch.setattr(plans, "id", lambda _: 0, raising=False)  # as if every model had the same address
        found = []
        for _ in range(2):
            model = copy.deepcopy(random_model("gpt2"))
            found += [plans.seconds_a_pass(model, prompts) for _ in range(2)]
            del model
            gc.collect()
    assert found == [1.0, 1.0, 2.0, 2.0]
