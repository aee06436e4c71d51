"""Runs that are stopped anywhere, any number of times, and whose files are damaged: they end in the same bits, or refuse."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import activation_frequencies_ifr as study
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep import (
    frequencies,
    store,
    sweep,
)
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io import files as io_files
from pyvene_ext.io.files import write_json
from pyvene_ext.methods.attribution.screen import screened
from pyvene_ext.methods.patching.patch import patch
from pyvene_ext.methods.solving.results import Results
from pyvene_ext.runs import figures
from pyvene_ext.runs.folder import unfinished_in
from pyvene_ext.specs.ablation import Ablation, all_heads
from pyvene_ext.specs.graph import (
    Node,
    reaches,
    receivers,
    senders,
)
from pyvene_ext.specs.patch import ActivationPatch
from pyvene_ext.specs.path import PathPatch
from tests.fuzz.outcomes import command, few, outcome
from tests.random_prompts import random_prompts
from tests.saved_models import save_random_model
from tests.tiny_random import random_model

PROMPTS = random_prompts((9, 6, 9, 6))
MEMORY = 200_000  # little enough for several waves


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@contextmanager
def killed_at(operation: int, after: bool) -> Iterator[None]:
    """The process dies at its n-th replacement of a file, just before it or just after."""
    left = [operation]
    real = io_files.os.replace

    def replace(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            if after and left[0] == -1:
                real(*args)
            raise Killed
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io_files.os, "replace", replace)
        yield


@cache
def _model() -> Any:
    return random_model("qwen2_5")


SPECS = [
    *all_heads(random_model("gpt2").config),
    Ablation(kind="noise", site="mlp_out", layer=1),
    Ablation(kind="resample", site="k", layer=0, heads=(1,)),
]


def swept(folder: Path | None) -> Result:
    return sweep(_model(), SPECS, PROMPTS, memory=MEMORY, store=folder, progress=False)


@cache
def _undisturbed() -> Result:
    return swept(None)


def same(found: Result) -> bool:
    expected = _undisturbed()
    return (
        found.baseline.tobytes() == expected.baseline.tobytes()
        and found.intervened.tobytes() == expected.intervened.tobytes()
    )


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(data: st.DataObject, folder: Path) -> None:
    """One file of a folder changed in one byte, cut short, emptied, doubled, put in another's place, or gone."""
    path = data.draw(st.sampled_from(files(folder)))
    content = path.read_bytes()
    at = data.draw(st.integers(0, max(0, len(content) - 1)))
    match data.draw(st.sampled_from(["byte", "byte", "byte", "cut", "empty", "double", "swap", "gone"])):
        case "byte" if content:
            path.write_bytes(content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :])
        case "cut":
            path.write_bytes(content[:at])
        case "empty":
            path.write_bytes(b"")
        case "double":
            path.write_bytes(content + content)
        case "swap":
            path.write_bytes(data.draw(st.sampled_from(files(folder))).read_bytes())
        case "gone":
            path.unlink()


def test_the_sweep_has_several_waves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.Store, "complete", lambda *_: None)
    swept(tmp_path / "store")
    assert len(list(tmp_path.rglob("*.npz"))) >= 3


@given(kills=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=3), data=st.data())
@few(2)
def test_a_sweep_killed_anywhere_and_damaged_ends_in_the_same_bits(kills: list[tuple[int, bool]], data: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        for operation, after in kills:
            with contextlib.suppress(Killed), killed_at(operation, after):
                assert same(swept(folder))
        if kills and files(folder) and data.draw(st.booleans()):
            damage(data, folder)
            found = outcome(swept, folder, names=folder)
            assert found is None or same(found)
        else:
            assert same(swept(folder))
            assert same(swept(folder)), "and is read as it was written"


@given(data=st.data())
@few(4)
def test_waves_that_are_damaged_are_run_again(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        with pytest.raises(Killed), killed_at(3, after=False):  # behind the manifest and two waves
            swept(folder)
        (waves,) = folder.glob("waves-*")
        assert len(files(waves)) >= 2
        damage(data, waves)
        assert same(swept(folder))


@given(data=st.data())
@few(2)
def test_a_finished_store_that_is_damaged_is_refused_or_right(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        swept(folder)
        damage(data, folder)
        found = outcome(swept, folder, names=folder)
        assert found is None or same(found)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 3000,
        b"[]",
        b"null",
        b'{"hash": "\\ud800"}',
        b'{"\\ud800": 1, "hash": "x"}',
        b'{"a": NaN, "hash": 1}',
        b"1" * 5000,
        b"\xff",
    ],
)
def test_a_manifest_of_anything_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert outcome(store.Store, tmp_path, {}, {}, names=tmp_path / "manifest.json") is None


# -- patches and paths, and runs of several sweeps ---------------------------------------------------------------------

SOURCE = replace(random_prompts((9, 6, 9, 6), seed=1), answers=PROMPTS.answers)
KILLS = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=3)


def ends_in_the_same_bits(run: Callable[[Path], tuple[np.ndarray, ...]], kills: list[tuple[int, bool]]) -> None:
    """Killed at these operations, and damaged nowhere, a run ends as it does undisturbed."""
    with tempfile.TemporaryDirectory() as name:
        expected = [array.tobytes() for array in run(Path(name) / "undisturbed")]
        for operation, after in kills:
            with contextlib.suppress(Killed), killed_at(operation, after):
                assert [array.tobytes() for array in run(Path(name) / "store")] == expected
        for _ in range(2):  # as it is resumed, and as it is read again
            assert [array.tobytes() for array in run(Path(name) / "store")] == expected


@st.composite
def paths(draw: st.DrawFn) -> PathPatch:
    config = _model().config
    sender = draw(st.sampled_from([node for node in senders(config) if node.layer != 2]))
    streams = [Node(site, layer) for site in ("resid_pre", "resid_mid", "resid_post") for layer in range(3)]
    reached = [node for node in (*receivers(config), *streams) if reaches(sender, node) and node.site != "logits"]
    chosen = (
        [Node("logits")]
        if draw(st.integers(0, 4)) == 0
        else draw(st.lists(st.sampled_from(reached), min_size=1, max_size=2, unique=True))
    )
    direct = draw(st.booleans())
    return PathPatch(
        sender=str(sender),
        receivers=tuple(map(str, chosen)),
        positions=draw(st.sampled_from(["all", "all", "last", ("s1", -2)])),
        freeze_mlps=not direct and draw(st.booleans()),
        direct=direct,
        subspace=draw(st.integers(0, 3)) == 0,
    )


@given(specs=st.lists(paths(), min_size=1, max_size=4), kills=KILLS, places=st.booleans())
@few(4)
def test_paths_killed_anywhere_end_in_the_same_bits(specs: list[PathPatch], kills: Any, places: bool) -> None:
    also = [ActivationPatch(site="z", layer=layer, heads=(1,), positions="last") for layer in range(3)] * places

    def patched(folder: Path) -> tuple[np.ndarray, ...]:
        found = patch(_model(), [*specs, *also], PROMPTS, SOURCE, memory=MEMORY, store=folder, progress=False)
        return found.baseline, found.intervened, found.source

    ends_in_the_same_bits(patched, kills)


@given(kills=KILLS, tau=st.sampled_from([0.0, 0.01, 0.1]), seed=st.integers(0, 9))
@few(6)
def test_a_screen_killed_anywhere_ends_in_the_same_bits(kills: Any, tau: float, seed: int) -> None:
    def run(folder: Path) -> tuple[np.ndarray, ...]:
        options = {"memory": MEMORY}
        with unfinished_in(folder, _model(), SPECS, PROMPTS, **options) as kept:
            found = screened(_model(), SPECS, PROMPTS, tau, check=0.2, seed=seed, progress=False, sweep=kept)
        return found.result.baseline, found.result.intervened, found.estimates, found.checked

    ends_in_the_same_bits(run, kills)


@given(kills=KILLS, tau=st.sampled_from([0.01, 0.1]), width=st.sampled_from([0.5, 0.8]), block=st.integers(1, 3))
@few(6)
def test_a_run_that_stops_early_killed_anywhere_ends_in_the_same_bits(
    kills: Any, tau: float, width: float, block: int
) -> None:
    def run(folder: Path) -> tuple[np.ndarray, ...]:
        with unfinished_in(folder, _model(), SPECS, PROMPTS, memory=MEMORY) as kept:
            found = frequencies(_model(), SPECS, PROMPTS, tau, width=width, block=block, progress=False, sweep=kept)
        return found.result.baseline, found.result.intervened, found.frequency, found.n_prompts

    ends_in_the_same_bits(run, kills)


# -- statistics kept between runs --------------------------------------------------------------------------------------


@given(data=st.data())
@few(2)
def test_damaged_statistics_are_computed_again(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:

        def computed() -> list[bytes]:
            found = Reference.compute(_model(), PROMPTS, [("z", 1), ("mlp_out", 0)], bank=("last",), cache_dir=name)
            return [tensor.numpy().tobytes() for _, tensor in sorted(found.tensors.items())]

        first = computed()
        damage(data, Path(name))
        assert computed() == first


# -- results of single conditions --------------------------------------------------------------------------------------


class Number:
    """What can be kept between runs."""

    def as_dict(self) -> dict[str, Any]:
        return {"number": [0.1, 7], "text": "é"}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Any:
        return record


@given(data=st.data())
@few(1)
def test_a_damaged_result_is_measured_again(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        results = Results(name, {"model": "x"})
        first = results.get({"spec": None}, Number, Number)
        damage(data, Path(name))
        assert results.get({"spec": None}, Number, Number) == first == Number().as_dict()


@pytest.mark.parametrize(
    "content", [b"[" * 3000, b"[]", b"null", b'{"facts": 1}', b"1" * 5000, b"\xff", b'{"facts": {"a": "\\ud800"}}']
)
def test_a_result_of_anything_is_measured_again(content: bytes, tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    results.get({}, Number, Number)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert results.get({}, Number, Number) == Number().as_dict()


def test_a_result_with_another_number_is_measured_again(tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    results.get({}, Number, Number)
    (file,) = tmp_path.iterdir()
    changed = file.read_text().replace("0.1", "0.2")
    assert "0.2" in changed
    file.write_text(changed)
    assert results.get({}, Number, Number) == Number().as_dict()


# -- a whole study -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_random_model("gpt2", folder)
    names = [("Anna", "Mark"), ("Mary", "John"), ("Paul", "Emma")]
    pairs = [{"clean": f"When {a} and {b} met , {b} gave the book to", "io_name": a, "s_name": b} for a, b in names]
    write_json(folder / "pairs.json", pairs)
    return folder


def test_the_study_killed_at_any_file_ends_in_the_same_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, path: write_json(path, "a figure"))
    flags = ["--model", str(saved), "--dataset", str(saved / "pairs.json"), "--kind", "mean", "--memory", "0.001"]

    def written(out: Path) -> dict[str, bytes]:
        folder = out.with_suffix("")
        kept = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in files(folder)
            if path.suffix in (".npy", ".csv") and "unfinished" not in path.parts
        }
        return kept | {"out": out.read_bytes()}

    def whole(out: Path) -> bool:
        return command(study.main, study.Config, [*flags, "--out", str(out)])

    assert whole(tmp_path / "whole.npy")
    expected = written(tmp_path / "whole.npy")
    rng = np.random.default_rng(0)
    out = tmp_path / "killed.npy"
    finished = 0
    for _ in range(8):
        with contextlib.suppress(Killed), killed_at(int(rng.integers(0, 14)), bool(rng.integers(2))):
            finished += whole(out)
        if out.exists():
            assert written(out) == expected
    assert finished < 8 and whole(out)
    assert written(out) == expected and not list(tmp_path.rglob("unfinished")) and not list(tmp_path.rglob(".*"))
