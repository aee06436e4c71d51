"""Bars and summaries: silenced once for all, honoured by every function, one line in a notebook."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pyvene_ext as px
from pyvene_ext.attribution import atp
from pyvene_ext.edges import edge_attribution
from pyvene_ext.io import bars
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

PACKAGE = Path(px.__file__).parent


def frequencies(model: Any, pairs: Any) -> object:
    return px.frequencies(model, px.all_heads(model.config), pairs[0], 0.1, width=0.5, block=2)


CALLS: dict[str, Callable[[Any, Any], object]] = {
    "run": lambda model, pairs: px.run(model, px.all_heads(model.config)[:2], pairs[0]),
    "sweep": lambda model, pairs: px.sweep(model, px.all_heads(model.config, kind="mean"), pairs[0]),
    "frequencies": frequencies,
    "patch": lambda model, pairs: px.patch(model, px.all_patches(model.config, "z"), *pairs),
    "paths": lambda model, pairs: px.patch(model, px.all_paths(model.config, ("logits",)), *pairs),
    "atp": lambda model, pairs: atp(model, px.all_patches(model.config, "z"), *pairs),
    "edges": lambda model, pairs: edge_attribution(model, *pairs),
    "lens": lambda model, pairs: px.methods.logit_lens(model, pairs[0]),
    "attribution": lambda model, pairs: px.methods.direct_logit_attribution(model, pairs[0]),
    "flow": lambda model, pairs: px.methods.flow_routes(model, pairs[0]),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama3_1")


@pytest.fixture(scope="module")
def pairs() -> Any:
    base = random_prompts((6, 6, 6))
    return base, replace(base, input_ids=random_prompts((6, 6, 6), seed=1).input_ids)


@pytest.mark.parametrize("name", CALLS)
def test_progress_false_silences_what_shows_a_bar_otherwise(
    name: str, model: Any, pairs: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    CALLS[name](model, pairs)
    assert capfd.readouterr().err
    with px.progress(False):
        CALLS[name](model, pairs)
    assert not capfd.readouterr().err


def test_loading_a_model_is_silenced_too_and_the_bars_of_transformers_come_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with px.progress(False):
        px.load_model("tiny-gemma2")
    assert not capfd.readouterr().err
    px.load_model("tiny-gemma2")
    assert "Loading weights" in capfd.readouterr().err


def test_silence_holds_until_it_is_lifted_and_a_block_gives_back_what_was_before() -> None:
    assert bars.is_shown()
    px.progress(False)
    try:
        with px.progress(True):
            assert bars.is_shown()
        assert not bars.is_shown()
    finally:
        px.progress(True)
    with pytest.raises(KeyError), px.progress(False):
        raise KeyError
    assert bars.is_shown()


def test_every_bar_of_the_package_is_made_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "bars.py" or not {"tqdm", "trange"} & {*re.findall(r"\w+", text)}:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("tqdm", "trange", "tqdm.write"), f"{path}:{node.lineno}"


def test_a_notebook_keeps_one_line_of_a_sweep(
    model: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    specs = px.all_heads(model.config)
    px.sweep(model, specs, pairs[0])
    assert "arithmetic" in capfd.readouterr().err
    monkeypatch.setattr(bars, "in_notebook", lambda: True)
    px.sweep(model, specs, pairs[0])
    shown = capfd.readouterr().err.rpartition("\r")[2]  # what a bar leaves is overwritten from the start of its line
    assert shown.strip().count("\n") == 0 and "interventions x 3 prompts in" in shown


@pytest.mark.parametrize(("app", "found"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_is_known_by_its_kernel(app: dict, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config=app))
    monkeypatch.setitem(bars.sys.modules, "IPython", kernel)
    assert bars.in_notebook() is found


def test_only_true_and_false_silence_or_show() -> None:
    with pytest.raises(ValueError, match="takes True, which shows bars, or False, which silences them, not 'no'"):
        px.progress("no")  # type: ignore[arg-type]
    assert bars.is_shown()
