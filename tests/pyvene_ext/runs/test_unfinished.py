"""The unfinished work of a study: several sweeps in one folder, refused, resumed, and killed while it is removed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyvene_ext.engine.plain import run
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.runs.folder import discard, unfinished_in
from pyvene_ext.specs.ablation import all_heads
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

PROMPTS = random_prompts((5, 7, 5))
FORK = multiprocessing.get_context("fork")


@cache
def _model() -> Any:
    torch.set_num_threads(1)
    return random_model("llama3_1")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was run."""
    seen: list[Any] = []
    original = Executor.run

    def noted(executor: Executor, wave: Any, *args: Any) -> Any:
        seen.append(wave)
        return original(executor, wave, *args)

    monkeypatch.setattr(Executor, "run", noted)
    return seen


def study(folder: Path) -> tuple[Result, Result]:
    """Two sweeps, the second on what might have come out of the first."""
    specs = all_heads(_model().config)
    with unfinished_in(folder, _model(), specs, PROMPTS) as sweep:
        first = sweep(_model(), specs, PROMPTS, "logit_diff", None, subset=[2, 0], progress=False)
        return first, sweep(_model(), specs[3:5], PROMPTS, progress=False)


def test_every_sweep_of_a_study_is_found_again(tmp_path: Path, batches: list[Any]) -> None:
    first, second = study(tmp_path / "unfinished")
    expected = run(_model(), all_heads(_model().config), PROMPTS, progress=False)
    assert np.allclose(first.intervened, expected.intervened[:, [2, 0]], atol=1e-4)
    assert np.allclose(second.intervened, expected.intervened[3:5], atol=1e-4)
    n_batches = len(batches)
    again = study(tmp_path / "unfinished")
    assert len(batches) == n_batches > 1, "nothing is run again"
    assert all(np.array_equal(a.intervened, b.intervened) for a, b in zip(again, (first, second), strict=True))
    discard(tmp_path / "unfinished")
    assert not list(tmp_path.iterdir())
    discard(tmp_path / "unfinished")  # nothing to do, as when two processes end together


def test_work_on_something_else_is_refused_even_where_its_sweeps_have_other_names(tmp_path: Path) -> None:
    specs = all_heads(_model().config)
    with unfinished_in(tmp_path, _model(), specs, PROMPTS):
        pass
    for changed, (its_specs, prompts, metric) in {
        "specs": (specs[1:], PROMPTS, "logit_diff"),
        "prompts": (specs, random_prompts((5, 5)), "logit_diff"),
        "metric": (specs, PROMPTS, "kl"),
    }.items():
        with (
            pytest.raises(ValueError, match=f"holds an unfinished run that differs in .*{changed}"),
            unfinished_in(tmp_path, _model(), its_specs, prompts, metric),
        ):
            pass


def test_one_study_at_a_time(tmp_path: Path) -> None:
    specs = all_heads(_model().config)
    with (
        unfinished_in(tmp_path, _model(), specs, PROMPTS),
        pytest.raises(ValueError, match=f"is in use by another process .pid {os.getpid()}"),
        unfinished_in(tmp_path, _model(), specs, PROMPTS),
    ):
        pass


def discard_until(folder: Path, step: int) -> None:
    """Killed just before file removal number `step`."""
    done = 0

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal done
        if event in ("os.remove", "os.rmdir"):
            done += 1
            if done > step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    discard(folder)


def test_a_study_killed_before_each_removal_can_be_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    expected = [result.intervened for result in study(folder)]
    for step in range(100):
        process = FORK.Process(target=discard_until, args=(folder, step))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        found = [result.intervened for result in study(folder)]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), f"killed before removal {step}"
    assert not folder.exists() and step > 5
