"""The store of a sweep: resumed, refused, shared, damaged, and killed at any moment, against a run that nothing disturbed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pyvene_ext.engine.sweep.store import Store
from pyvene_ext.io.hashes import data_hash

FACTS = {"weights": "0123456789abcdef" * 2, "dtype": "float32", "metric": "logit_diff", "prompts": "fedcba98" * 4}
PLAN = {"waves": [[0, 4], [4, 7]], "memory": 1 << 20}
FORK = multiprocessing.get_context("fork")  # real processes, without the time that importing torch takes


def wave(number: int, width: int = 3) -> dict[str, np.ndarray]:
    values = np.random.default_rng(number).standard_normal((width, 2)).astype(np.float32)
    return {"clean": values[0], "intervened": values[1:]}


def sweep_into(folder: Path, n_waves: int, seconds: float = 0.0) -> None:
    """What the engine does, the obvious way: the missing waves one after another, then the merged arrays."""
    with Store(folder, FACTS, PLAN) as store:
        if store.result is not None:
            return
        finished = store.finished
        for number in range(n_waves):
            if number not in finished:
                time.sleep(seconds)
                store.add(number, wave(number))
        waves = store.finished
        store.complete(
            {name: np.concatenate([waves[i][name] for i in range(n_waves)]) for name in ("clean", "intervened")}
        )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


def only_waves_folder(folder: Path) -> Path:
    (found,) = folder.glob("waves-*")
    return found


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_finished_waves_come_back_bit_by_bit(tmp_path: Path) -> None:
    odd = {
        "clean": np.array([np.nan, -0.0, np.inf]),
        "intervened": np.zeros((0, 3), np.float32),
        "n": np.array(7),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    with Store(tmp_path / "a/b", FACTS, PLAN) as store:
        assert store.finished == {} and store.result is None
        for number in (0, 3):
            store.add(number, wave(number))
        store.add(1_234_567, odd)
        assert sorted(store.finished) == [0, 3, 1_234_567]
    with Store(tmp_path / "a/b", FACTS, PLAN) as store:
        finished = store.finished
    assert sorted(finished) == [0, 3, 1_234_567]
    assert_equal(finished[3], wave(3))
    for name, array in odd.items():
        found = finished[1_234_567][name]
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_a_wave_added_again_replaces_the_first(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN) as store:
        store.add(0, wave(1))
        store.add(0, wave(0))
        assert_equal(store.finished[0], wave(0))


def test_a_resumed_run_keeps_the_plan_it_began_with(tmp_path: Path) -> None:
    plan = {"waves": [(0, 4), (4, 7)], "share": 0.1}
    as_json = {"waves": [[0, 4], [4, 7]], "share": 0.1}
    with Store(tmp_path, FACTS, plan) as store:
        assert store.plan == as_json, "the first run sees what a resumed one will see"
        store.add(0, wave(0))
    with Store(tmp_path, FACTS, {"waves": [[0, 7]]}) as store:
        assert store.plan == as_json and list(store.finished) == [0]


def test_facts_are_compared_as_json_has_them(tmp_path: Path) -> None:
    with Store(tmp_path, {"shape": (1, 2), "metric": None}, PLAN) as store:
        store.add(0, wave(0))
    with Store(tmp_path, {"shape": [1, 2]}, PLAN) as store:
        assert list(store.finished) == [0]


def test_a_complete_store_holds_the_arrays_and_the_manifest_alone(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    sweep_into(folder, 3)
    assert sorted(files(folder)) == ["clean.npy", "intervened.npy", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files(folder))
    expected = {name: np.concatenate([wave(i)[name] for i in range(3)]) for name in ("clean", "intervened")}
    assert_equal({name: np.load(folder / f"{name}.npy") for name in expected}, expected)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["complete"] is True and manifest["facts"] == FACTS and manifest["plan"] == PLAN
    assert {name: about["shape"] for name, about in manifest["arrays"].items()} == {"clean": [6], "intervened": [6, 2]}
    before = files(folder)
    with Store(folder, FACTS, {"other": "plan"}) as store, Store(folder, FACTS, PLAN) as beside:
        assert store.plan == PLAN and store.finished == {}
        assert store.result is not None and beside.result is not None, "reading needs no lock"
        assert_equal(store.result, expected)
    assert files(folder) == before


def test_the_result_is_there_as_soon_as_the_store_is_complete(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN) as store:
        store.complete(wave(0))
        assert store.result is not None
        assert_equal(store.result, wave(0))


def test_waves_of_a_deleted_manifest_are_not_taken_for_ours(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN) as store:
        store.add(0, wave(0))
    (tmp_path / "manifest.json").unlink()
    with Store(tmp_path, FACTS | {"metric": "rank"}, PLAN) as store:
        assert store.finished == {}
    (tmp_path / "manifest.json").unlink()
    with Store(tmp_path, FACTS, {"waves": [[0, 7]]}) as store:
        assert store.finished == {}


# -- refusing ----------------------------------------------------------------------------------------------------------

LONG = "f" * 32
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "a short value": (FACTS | {"dtype": "bfloat16"}, 'differs in dtype ("float32" there, "bfloat16" now);'),
    "a hash": (FACTS | {"weights": LONG}, "differs in weights;"),
    "a new fact": (FACTS | {"tau": 0.25}, "differs in tau (null there, 0.25 now);"),
    "a fact missing": ({k: v for k, v in FACTS.items() if k != "metric"}, '("logit_diff" there, null now);'),
    "several": (FACTS | {"weights": LONG, "dtype": "float64"}, '("float32" there, "float64" now), weights;'),
    "a nested value": (FACTS | {"metric": {"name": "kl", "of": [1, 2, 3, 4, 5]}}, "differs in metric;"),
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("member", [False, True])
@pytest.mark.parametrize("case", DIFFERENCES)
def test_other_facts_are_refused_by_name_and_change_nothing(
    case: str, member: bool, complete: bool, tmp_path: Path
) -> None:
    facts, expected = DIFFERENCES[case]
    with Store(tmp_path, FACTS, PLAN) as store:
        store.add(0, wave(0))
        if complete:
            store.complete(wave(0))
    before = files(tmp_path)
    with pytest.raises(ValueError, match="run that differs in") as refusal:
        Store(tmp_path, facts, PLAN, member=member)
    text = str(refusal.value)
    assert expected in text and str(tmp_path) in text and "choose another folder, or delete this one." in text
    assert ("holds a finished run" in text) == complete and ("finish that run" in text) != complete
    assert "\n" not in text and files(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": 2, "waves": 3}', "\x00\xff"]
)
def test_a_manifest_that_is_not_ours_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest.json is damaged, or not of format 1; choose another folder"):
        Store(tmp_path, FACTS, PLAN)
    assert files(tmp_path) == {"manifest.json": text.encode("latin-1")}


def test_a_manifest_changed_by_hand_and_waves_under_other_names_are_noticed(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN) as store:
        for number in range(3):
            store.add(number, wave(number))
        folder = only_waves_folder(tmp_path)
        (folder / "000000.npz").rename(folder / "spare")
        (folder / "000001.npz").rename(folder / "000000.npz")
        (folder / "spare").rename(folder / "000001.npz")
        (folder / "1x.npz").write_bytes((folder / "000002.npz").read_bytes())
        assert list(store.finished) == [2]
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"plan": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Store(tmp_path, FACTS, PLAN)


def test_a_folder_with_arrays_of_something_else_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "clean.npy", np.zeros(3))
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"clean\.npy does not belong to a store, which could overwrite it"):
        Store(tmp_path, FACTS, PLAN)
    assert files(tmp_path) == before


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN):
        pass
    changed = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) | {"format": 2}
    del changed["hash"]
    (tmp_path / "manifest.json").write_text(json.dumps(changed | {"hash": data_hash(changed)}), encoding="utf-8")
    with pytest.raises(ValueError, match="not of format 1"):
        Store(tmp_path, FACTS, PLAN)


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("member", [False, True])
def test_a_folder_that_is_a_file_is_one_sentence(name: str, member: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot hold a store: Not a directory; choose another folder\."):
        Store(tmp_path / name, FACTS, PLAN, member=member)
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=f"cannot hold a store: {os.strerror(number)}; choose another folder"):
        Store(tmp_path, FACTS, PLAN)


def test_a_system_that_opens_no_folder_keeps_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def no_folder(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))  # as on Windows
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", no_folder)
    sweep_into(tmp_path / "store", 2)
    with Store(tmp_path / "store", FACTS, PLAN) as store:
        assert store.result is not None


def test_facts_that_json_cannot_say_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Store(tmp_path / "store", FACTS | {"tau": float("nan")}, PLAN)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing below `folder` may be written; a superuser, whom modes do not stop, is somebody else for the while."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_read_only_folder_gives_a_result_but_holds_no_new_store() -> None:
    # Not in tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory() as name:
        folders = {state: Path(name) / state for state in ("empty", "unfinished", "complete")}
        folders["empty"].mkdir()
        with Store(folders["unfinished"], FACTS, PLAN) as store:
            store.add(0, wave(0))
        sweep_into(folders["complete"], 2)
        (folders["complete"] / "lock").touch()  # as a process killed at the very end leaves it
        before = files(Path(name))
        with read_only(Path(name)):
            for folder in (folders["empty"], folders["unfinished"], folders["empty"] / "below"):
                with pytest.raises(ValueError, match="cannot hold a store: Permission denied; choose another folder"):
                    Store(folder, FACTS, PLAN)
            with Store(folders["complete"], FACTS, PLAN) as store:
                assert store.result is not None and sorted(store.result) == ["clean", "intervened"]
        assert files(Path(name)) == before


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_wave_with_any_byte_changed_or_missing_counts_as_absent(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN) as store:
        store.add(0, wave(0))
        store.add(1, wave(1))
        path = only_waves_folder(tmp_path) / "000001.npz"
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            assert list(store.finished) == [0]
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert list(store.finished) == [0]
        store.add(1, wave(1))
        assert path.read_bytes() == whole and list(store.finished) == [0, 1]


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("unpickled",))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(tmp_path / "store", FACTS, PLAN) as store:
        store.add(0, wave(0))
        buffer = io.BytesIO()
        np.savez(buffer, clean=np.array([Bomb()], dtype=object))
        for content in (pickle.dumps(Bomb()), buffer.getvalue()):
            path = only_waves_folder(tmp_path / "store") / "000001.npz"
            path.write_bytes(content)
            assert list(store.finished) == [0]
            # Even under a digest that fits, which no disk makes by itself.
            path.write_bytes(content + xxhash.xxh3_128_digest(content, seed=1))
            with pytest.raises(ValueError, match="pickle"):
                _ = store.finished
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_damaged_or_missing_result_is_refused(tmp_path: Path) -> None:
    sweep_into(tmp_path, 2)
    path = tmp_path / "intervened.npy"
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:40], whole[:-1] + bytes([whole[-1] ^ 1]), None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with (
            pytest.raises(ValueError, match=r"intervened.npy is missing or damaged; delete .* and run again\."),
            Store(tmp_path, FACTS, PLAN) as store,
        ):
            _ = store.result
    path.write_bytes(whole)
    with Store(tmp_path, FACTS, PLAN) as store:
        assert store.result is not None


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path, FACTS, PLAN) as store:
        store.add(0, wave(0))
        before = files(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                store.add(1, wave(1))
            with pytest.raises(OSError, match="No space left"):
                store.complete(wave(0))
        assert files(tmp_path) == before and store.result is None and list(store.finished) == [0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="cannot hold a store: No space left on device"):
            Store(tmp_path / "new", FACTS, PLAN)
    with Store(tmp_path / "new", FACTS, PLAN):
        pass


def test_leftovers_of_dead_writers_go_and_files_of_others_stay(tmp_path: Path) -> None:
    with Store(tmp_path, FACTS, PLAN) as store:
        store.add(0, wave(0))
    waves = only_waves_folder(tmp_path).name
    leftovers = [".manifest-ab_d3fgh.json", ".clean-abcdefgh.npy", f"{waves}/.000001-abcdefgh.npz"]
    others = ["notes.txt", ".hidden", ".my-settings.json", "waves-of-mine/000000.npz", f"{waves}/notes.npz"]
    for name in leftovers + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    with Store(tmp_path, FACTS, PLAN, member=True) as store:
        assert list(store.finished) == [0]
        assert all((tmp_path / name).exists() for name in leftovers), "they may belong to another member"
    with Store(tmp_path, FACTS, PLAN) as store:
        assert list(store.finished) == [0]
        assert not any((tmp_path / name).exists() for name in leftovers)
        assert all((tmp_path / name).exists() for name in others)
        store.complete(wave(0))
    assert sorted(files(tmp_path)) == sorted(["manifest.json", "clean.npy", "intervened.npy", *others[:-1]])


# -- several processes -------------------------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    with Store(folder, {"dtype": "float32"}, {}):
        folder.with_name("held").touch()
        signal.pause()


def ask(folder: Path, said: Path) -> None:
    try:
        Store(folder, {"dtype": "float32"}, {})
    except ValueError as error:
        said.write_text(str(error), encoding="utf-8")


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder, said = tmp_path / "store", tmp_path / "said"
    first = start(hold, folder)
    try:
        while not (tmp_path / "held").exists():
            assert first.is_alive()
            time.sleep(0.01)
        before = files(folder)
        sentence = f"{folder} is in use by another process (pid {first.pid} on "
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}.+\\); wait"):
            Store(folder, {"dtype": "float32"}, {})
        second = start(ask, folder, said)
        second.join()
        assert second.exitcode == 0 and said.read_text(encoding="utf-8").startswith(sentence)
        assert files(folder) == before, "who was refused changed nothing"
    finally:
        first.kill()
        first.join()
    with Store(folder, {"dtype": "float32"}, {}) as store, pytest.raises(ValueError, match=f"pid {os.getpid()} on"):
        Store(store.folder, {"dtype": "float32"}, {})


def test_a_block_left_by_an_error_lets_go_of_the_lock_even_with_forked_children_alive(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Store(tmp_path, FACTS, PLAN) as store:
        child = FORK.Process(target=time.sleep, args=(60,))  # such as a data loader's worker
        child.start()
        store.add(0, wave(0))
        raise KeyboardInterrupt
    try:
        with Store(tmp_path, FACTS, PLAN) as store:
            assert list(store.finished) == [0]
    finally:
        child.kill()
        child.join()


def test_who_waited_for_the_lock_of_a_run_that_just_finished_finds_it_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Store(tmp_path, FACTS, PLAN)
    take_lock = Store._take_lock

    def just_too_late(store: Store) -> None:
        first.complete(wave(0))
        first.close()
        take_lock(store)

    monkeypatch.setattr(Store, "_take_lock", just_too_late)
    with Store(tmp_path, FACTS, PLAN) as second:
        assert second.result is not None
    assert sorted(files(tmp_path)) == ["clean.npy", "intervened.npy", "manifest.json"]


def add_as_member(folder: Path, numbers: range) -> None:
    with Store(folder, FACTS, {}, member=True) as store:
        assert store.plan == PLAN
        for number in numbers:
            store.add(number, wave(number))


def test_members_of_one_group_add_waves_beside_the_holder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no store yet; the first rank must open it"):
        Store(tmp_path / "store", FACTS, PLAN, member=True)
    assert list(tmp_path.iterdir()) == []
    with Store(tmp_path / "store", FACTS, PLAN) as store:
        members = [FORK.Process(target=add_as_member, args=(store.folder, range(rank, 30, 3))) for rank in (1, 2)]
        for member in members:
            member.start()
        for number in range(0, 30, 3):
            store.add(number, wave(number))
        for member in members:
            member.join()
            assert member.exitcode == 0
        waves = store.finished
        assert list(waves) == list(range(30))
        for number, arrays in waves.items():
            assert_equal(arrays, wave(number))
        store.complete(wave(0))
    with Store(tmp_path / "store", FACTS, PLAN, member=True) as store:
        assert store.result is not None


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    def run(n_waves: int) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("undisturbed")
        sweep_into(folder, n_waves)
        return files(folder)

    return run


def test_kills_at_random_moments_end_in_the_same_files(
    tmp_path: Path, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    n_waves, kills, rounds = 40, 0, 0
    expected, moments = undisturbed(n_waves), np.random.default_rng(0)
    while kills < 30:  # a run that finishes between two kills is compared, and another begins
        folder, rounds = tmp_path / str(rounds), rounds + 1
        finished: set[int] = set()
        while True:
            process = start(sweep_into, folder, n_waves, 0.002)
            process.join(moments.uniform(0, 0.06))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            if (folder / "manifest.json").exists() and not (folder / "clean.npy").exists():
                with Store(folder, FACTS, PLAN) as store:
                    found = store.finished
                assert finished <= found.keys(), "what was finished stays"
                finished = set(found)
        assert files(folder) == expected


def sweep_until_step(folder: Path, n_waves: int, step: int) -> None:
    """Sweep, killed just before its file operation number `step`."""
    done = 0

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal done
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"):
            done += 1
            if done > step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sweep_into(folder, n_waves)


def test_a_kill_before_each_single_file_operation_ends_in_the_same_files(
    tmp_path: Path, undisturbed: Callable[[int], dict[str, bytes]]
) -> None:
    expected = undisturbed(2)
    for step in range(1000):
        folder = tmp_path / str(step)
        process = start(sweep_until_step, folder, 2, step)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (folder / "clean.npy").exists():
            complete = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["complete"]
            assert complete or len(list(folder.glob("waves-*/[0-9]*.npz"))) == 2, "waves stay until nothing needs them"
        again = start(sweep_until_step, folder, 2, step // 2)  # killed a second time, somewhere else
        again.join()
        sweep_into(folder, 2)
        assert files(folder) == expected, f"killed before file operation {step}"
    assert process.exitcode == 0 and step > 30, "every operation was met"
    assert files(folder) == expected
