"""Several processes share a sweep: the bits of one process, with and without a store, and no hang when something goes wrong."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import activation_frequencies_ifr as study
import numpy as np
import pytest
from accelerate import PartialState

from pyvene_ext.engine.sweep import plan_sweep, sweep
from pyvene_ext.engine.sweep.execute import Executor
from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.io.cli import run as run_study
from pyvene_ext.models.devices import (
    all_gather,
    broadcast_from_main,
    is_main_process,
    on_all_ranks,
    processes,
)
from pyvene_ext.prompts import shipped
from pyvene_ext.specs.ablation import all_heads
from pyvene_ext.specs.joint import Spec
from tests.processes import start
from tests.random_prompts import random_prompts
from tests.tiny_random import random_model

ROOT = Path(__file__).resolve().parents[4]
PROMPTS = random_prompts((9, 6, 7, 9, 6, 7, 8, 9))
PATIENCE = 60  # seconds, after which a process counts as hung
MEMORY = 600_000  # makes several waves


@cache
def model_and_specs(family: str = "llama3_1") -> tuple[Any, list[Spec]]:
    model = random_model(family)
    return model, [*all_heads(model.config), *all_heads(model.config, "mean", positions="last")]


def swept(store: Path | None = None, family: str = "llama3_1", metric: str = "logit_diff") -> dict[str, np.ndarray]:
    model, specs = model_and_specs(family)
    result = sweep(model, specs, PROMPTS, metric, memory=MEMORY, store=store, progress=False)
    return {"clean": result.baseline, "intervened": result.intervened}


def as_rank(rank: int, port: int, folder: Path, target: Callable[..., Any], *args: Any) -> None:
    """One process of a launch of two: what `target` gives, or the sentence it ends with, is left in `folder`."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    try:
        np.savez(folder / f"{rank}.npz", **target(*args))
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error), encoding="utf-8")


class Launch:
    """What two processes have done."""

    def __init__(self, folder: Path, target: Callable[..., Any], *args: Any) -> None:
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [start(as_rank, rank, port, folder, target, *args) for rank in (0, 1)]
        for rank in ranks:
            rank.join(PATIENCE)
        self.hung = [rank.is_alive() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        self.exitcodes = [rank.exitcode for rank in ranks]
        self.results = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
        self.sentences = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
        assert not any(self.hung), "a process waits for the other in vain"

    @property
    def both(self) -> list[dict[str, np.ndarray]]:
        """What both processes gave."""
        assert len(self.results) == 2, (self.exitcodes, self.sentences)
        return self.results


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Launch]:
    numbers = iter(range(100))
    return lambda target, *args: Launch(tmp_path / f"launch-{next(numbers)}", target, *args)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].tobytes() == expected[name].tobytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_few_waves(store: Path, most: int, then: Callable[[], Any]) -> dict[str, np.ndarray]:
    """A sweep in which a process does something after `most` waves."""
    own, done = Executor.run, 0

    def run(self: Executor, *args: Any) -> Any:
        nonlocal done
        if done == most:
            then()
        done += 1
        return own(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executor, "run", run)
        return swept(store)


def stop() -> None:
    raise KeyboardInterrupt


# -- the same bits -----------------------------------------------------------------------------------------------------


def test_there_is_enough_to_share() -> None:
    model, specs = model_and_specs()
    assert len(plan_sweep(model, specs, PROMPTS, memory=MEMORY).waves) >= 4


@pytest.mark.parametrize("family", ["gemma2", "llama3_1"])
def test_two_processes_give_the_bits_of_one(family: str, launch: Any, tmp_path: Path) -> None:
    expected = swept(family=family)
    for store in (None, tmp_path / "store"):
        for found in launch(swept, store, family).both:
            assert_same_bits(found, expected)
    swept(tmp_path / "alone", family)
    assert files(tmp_path / "store") == files(tmp_path / "alone")
    for found in launch(swept, tmp_path / "store", family).both:  # read, not run
        assert_same_bits(found, expected)


def test_each_process_does_its_share(launch: Any) -> None:
    def counted() -> dict[str, np.ndarray]:
        own, count = Executor.run, [0]

        def run(self: Executor, *args: Any) -> Any:
            count[0] += 1
            return own(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Executor, "run", run)
            swept()
        return {"count": np.array(count)}

    model, specs = model_and_specs()
    waves = len(plan_sweep(model, specs, PROMPTS, memory=MEMORY).waves)
    counts = [int(found["count"][0]) for found in launch(counted).both]
    assert counts == [waves - waves // 2, waves // 2]


def test_a_store_of_one_process_is_finished_by_two_and_the_other_way_round(launch: Any, tmp_path: Path) -> None:
    expected = swept()
    with pytest.raises(KeyboardInterrupt):
        run_few_waves(tmp_path / "by two", 1, stop)
    with Store(tmp_path / "other", {}, {}) as store:
        assert not store.finished
    for found in launch(swept, tmp_path / "by two").both:
        assert_same_bits(found, expected)
    launch(run_few_waves, tmp_path / "by one", 1, lambda: os._exit(1))
    assert len(list((tmp_path / "by one").glob("waves-*/*.npz"))) == 2
    assert_same_bits(swept(tmp_path / "by one"), expected)
    assert files(tmp_path / "by one") == files(tmp_path / "by two")


def test_what_the_first_process_finds_in_the_store_counts(launch: Any, tmp_path: Path) -> None:
    """On a network file system another one may see fewer files, and a wave must not fall between two chairs."""
    expected = swept()
    with pytest.raises(KeyboardInterrupt):
        run_few_waves(tmp_path / "store", 1, stop)

    def half_blind() -> dict[str, np.ndarray]:
        if not is_main_process():
            Store.finished = property(lambda self: {})  # type: ignore[assignment, method-assign]
        return swept(tmp_path / "store")

    for found in launch(half_blind).both:
        assert_same_bits(found, expected)


# -- when something goes wrong -----------------------------------------------------------------------------------------


def test_a_store_of_something_else_is_refused_by_both_processes(launch: Any, tmp_path: Path) -> None:
    swept(tmp_path / "store")
    before = files(tmp_path / "store")
    done = launch(swept, tmp_path / "store", "llama3_1", "probability")
    sentence = (
        f'{tmp_path}/store holds a finished run that differs in metric ("logit_diff" there, "probability" now); '
        "choose another folder, or delete this one."
    )
    assert done.sentences == [sentence] * 2 and done.exitcodes == [0, 0]
    (tmp_path / "store" / "clean.npy").write_bytes(b"damaged")
    assert all("clean.npy is missing or damaged" in said for said in launch(swept, tmp_path / "store").sentences)
    assert files(tmp_path / "store").keys() == before.keys()


def test_a_store_in_use_is_refused_by_both_processes(launch: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_few_waves(tmp_path / "store", 1, stop)

    def hold() -> None:
        (tmp_path / "holding").touch()
        signal.pause()

    holder = start(run_few_waves, tmp_path / "store", 1, hold)
    try:
        while not (tmp_path / "holding").exists():
            assert holder.is_alive()
            time.sleep(0.01)
        done = launch(swept, tmp_path / "store")
    finally:
        holder.kill()
        holder.join()
    said = f"{tmp_path}/store is in use by another process (pid {holder.pid} on {socket.gethostname()}); wait until it ends"
    assert len(done.sentences) == 2 and all(sentence.startswith(said) for sentence in done.sentences)


def test_what_stops_only_the_second_process_stops_both(launch: Any, tmp_path: Path) -> None:
    """Such as a folder that is not shared by two machines."""

    def elsewhere() -> dict[str, np.ndarray]:
        return swept(tmp_path / ("store" if is_main_process() else "nothing here"))

    done = launch(elsewhere)
    assert len(done.sentences) == 2 and len(set(done.sentences)) == 1 and "holds no store yet" in done.sentences[0]
    assert_same_bits(swept(tmp_path / "store"), swept())


def test_too_little_memory_leaves_no_store_behind(tmp_path: Path) -> None:
    model, specs = model_and_specs()
    with pytest.raises(ValueError, match="too little for prompts of"):
        sweep(model, specs, PROMPTS, memory=1000, store=tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_when_one_process_is_killed_the_other_ends_and_the_store_resumes(launch: Any, tmp_path: Path) -> None:
    expected = swept()

    def die() -> None:
        if not is_main_process():
            os.kill(os.getpid(), signal.SIGKILL)

    done = launch(run_few_waves, tmp_path / "store", 1, die)
    assert done.exitcodes[1] == -signal.SIGKILL and done.exitcodes[0] != 0 and not done.results
    assert list((tmp_path / "store").glob("waves-*/*.npz"))
    for found in launch(swept, tmp_path / "store").both:
        assert_same_bits(found, expected)


def test_a_process_may_be_slower_than_the_launchs_time_limit(launch: Any) -> None:
    expected = swept()

    def dawdle() -> dict[str, np.ndarray]:
        PartialState(cpu=True, timeout=timedelta(seconds=1))
        if not is_main_process():
            run = Executor.run
            Executor.run = lambda *args: (time.sleep(1.5), run(*args))[1]  # type: ignore[method-assign, assignment, func-returns-value]
        return swept()

    for found in launch(dawdle).both:
        assert_same_bits(found, expected)


# -- the helpers -------------------------------------------------------------------------------------------------------


def test_values_are_gathered_in_the_order_of_processes(launch: Any) -> None:
    def exchange() -> dict[str, np.ndarray]:
        rank = processes().process_index
        return {"all": np.array(all_gather(rank * 10)), "first": np.array(broadcast_from_main(lambda: rank * 10 + 1))}

    for found in launch(exchange).both:
        assert found["all"].tolist() == [0, 10] and found["first"] == 1
    assert all_gather("one") == ["one"] and broadcast_from_main(lambda: "one") == "one"


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_process_is_raised_in_all(who: int, launch: Any) -> None:
    def refuse() -> None:
        if processes().process_index == who:
            raise ValueError(f"process {who} cannot.")

    assert launch(lambda: on_all_ranks(refuse)).sentences == [f"process {who} cannot."] * 2


# -- as a user launches it ---------------------------------------------------------------------------------------------

SCRIPT = """
    import os, runpy, signal, sys
    from pathlib import Path
    import numpy as np
    from pyvene_ext.models.devices import processes
    from pyvene_ext.engine.sweep.execute import Executor
    from tests.pyvene_ext.engine.sweep.test_processes import swept, run_few_waves

    folder, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    rank = processes().process_index
    assert processes().num_processes == 2
    np.savez(folder / f"plain-{rank}.npz", **swept())
    np.savez(folder / f"stored-{rank}.npz", **swept(folder / "store"))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        assert not left.code, left.code
    def die():
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
    run_few_waves(folder / "killed", 1, die)
"""


def accelerate_launch(*command: Any) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    # The same number of threads in all, for sums of floats depend on it; no GPU, also where there is one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "experiments")])
    return subprocess.run(
        [*launcher, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )


# -- the study ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = json.loads((shipped.PROMPTS / "ioi_en.json").read_text(encoding="utf-8"))["pairs"][:9]
    path = tmp_path_factory.mktemp("data") / "few.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


def numbers(folder: Path) -> dict[str, bytes]:
    """What a study has written, without the times and commands of the metadata."""
    return {name: content for name, content in files(folder).items() if name.endswith((".npy", ".csv"))}


def run_here(*flags: Any) -> dict[str, np.ndarray]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = run_study(study.main, study.Config, list(map(str, flags)))
    return {"code": np.array(code), "said": np.array(said.getvalue())}


MODES = {"all": (), "screen": ("--screen", "atp", "--tau", 1), "width": ("--tau", 0.1, "--width", 0.6, "--block", 3)}


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_of_the_study_write_what_one_does(mode: str, few: Path, launch: Any, tmp_path: Path) -> None:
    flags = ("--dataset", few, "--memory", 0.004, *MODES[mode], "--out")
    assert run_here(*flags, tmp_path / "one" / "f.npy")["code"] == 0
    done = launch(run_here, *flags, tmp_path / "two" / "f.npy")
    assert [int(found["code"]) for found in done.both] == [0, 0]
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    assert files(tmp_path / "two").keys() == files(tmp_path / "one").keys()


def test_accelerate_launch_of_sweeps_and_the_study_gives_what_one_process_does_and_ends_when_one_dies(
    few: Path, tmp_path: Path
) -> None:
    expected = swept()
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    script = ROOT / "experiments" / "activation_frequencies_ifr.py"
    flags = ("--dataset", few, "--memory", 0.004, "--out")
    done = accelerate_launch(tmp_path / "script.py", tmp_path, script, *flags, tmp_path / "two" / "f.npy")
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    for name in ("plain-0", "plain-1", "stored-0", "stored-1"):
        assert_same_bits(dict(np.load(tmp_path / f"{name}.npz")), expected)
    assert list((tmp_path / "killed").glob("waves-*/*.npz"))
    assert_same_bits(swept(tmp_path / "killed"), expected)
    assert files(tmp_path / "killed") == files(tmp_path / "store")
    assert done.stdout.count("active (|delta| > ") == 1
    assert run_here(*flags, tmp_path / "one" / "f.npy")["code"] == 0
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    assert files(tmp_path / "two").keys() == files(tmp_path / "one").keys()


def test_a_study_in_use_is_refused_by_both_processes(few: Path, launch: Any, tmp_path: Path) -> None:
    flags = ("--dataset", few, "--memory", 0.004, "--out", tmp_path / "f.npy")
    (tmp_path / "f" / "unfinished").mkdir(parents=True)
    with (tmp_path / "f" / "unfinished" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = launch(run_here, *flags)
    assert [int(found["code"]) for found in done.both] == [2, 2]
    assert [str(found["said"]).count("is in use by another process") for found in done.both] == [1, 1]
    assert files(tmp_path / "f").keys() == {"unfinished/lock"}
