"""Token lists from JSON and from pickles: what they hold is read, anything else is refused, and nothing in a file is run."""

from __future__ import annotations

import array
import collections
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvene_ext.prompts.token_lists import read_token_list

IDS = [128000, 0, 255, 256, 65535, 65536, 2**31 - 1]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [IDS, [[i] for i in IDS], [[128000, i] for i in IDS], [5], [[1, 2, 3], 4], []])
def test_pickles_of_every_protocol_are_read_as_pickle_reads_them(tmp_path: Path, protocol: int, value: list) -> None:
    flat = [number for entry in value for number in (entry if isinstance(entry, list) else [entry])]
    path = written(tmp_path / "ids.pkl", pickle.dumps(value, protocol))
    assert read_token_list(path) == flat
    assert read_token_list(written(tmp_path / "ids.json", json.dumps(value).encode())) == flat


def test_long_lists_come_in_several_parts(tmp_path: Path) -> None:
    value = [[1, i] for i in range(5000)]  # pickle appends a thousand at a time
    assert read_token_list(written(tmp_path / "ids.pickle", pickle.dumps(value)))[1::2] == list(range(5000))


class Reduced:
    """Runs a function when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.made = function, args

    def __reduce__(self) -> Any:
        return self.made


def touch(path: str) -> None:
    Path(path).touch()


def malicious(trace: Path) -> dict[str, bytes]:
    """Pickles that would leave a trace if they were loaded, or that hold something else than lists of whole numbers."""
    code = f"open({str(trace)!r}, 'w')"
    return {
        "GLOBAL": b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "STACK_GLOBAL": pickle.dumps(Reduced(exec, code), 4),
        "GLOBAL ": pickle.dumps(Reduced(touch, str(trace)), 2),
        "INST": b"(V" + code.encode() + b"\nibuiltins\nexec\n.",
        "OBJ": b"(cbuiltins\nexec\nV" + code.encode() + b"\no.",
        "NEWOBJ": b"\x80\x02](K\x01cbuiltins\nobject\n)\x81e.",
        "BUILD": b"\x80\x02]}b.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Pname\n.",
        "GLOBAL alone": b"\x80\x02](K\x01cos\nsystem\ne.",
        "POP": b"\x80\x02](K\x01K\x020e.",
        "in the list": pickle.dumps([1, 2, Reduced(touch, str(trace))]),
        "behind a list": b"](K\x01e0cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "str": pickle.dumps(["1"]),
        "float": pickle.dumps([1.0]),
        "bool": pickle.dumps([1, True], 2),
        "bool of protocol 0": pickle.dumps([1, True], 0),
        "None": pickle.dumps([None]),
        "tuple": pickle.dumps([(1, 2)]),
        "dict": pickle.dumps({1: 2}),
        "bytes": pickle.dumps(b"12"),
        "array": pickle.dumps(array.array("i", [1])),
        "numpy": pickle.dumps(np.arange(3)),
        "set": pickle.dumps({1, 2}),
        "deque": pickle.dumps(collections.deque([1])),
        "a list within itself": b"\x80\x02]q\x00h\x00a.",
        "a memo": pickle.dumps([shared := [1], shared]),
    }


@pytest.mark.parametrize("name", malicious(Path("trace")))
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = written(tmp_path / "ids.pkl", malicious(trace)[name])
    with pytest.raises(ValueError, match=r"ids.pkl (holds|is|refers to) ") as caught:
        read_token_list(path)
    assert not trace.exists() and "\n" not in str(caught.value)
    assert any(why in str(caught.value) for why in ("more than lists of whole numbers", "refers to one list twice"))
    assert "nothing of it was run" in str(caught.value)


def test_these_pickles_do_run_something_when_they_are_loaded(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    for name in ("GLOBAL", "STACK_GLOBAL", "GLOBAL ", "INST", "OBJ", "in the list", "behind a list"):
        trace = tmp_path / f"trace {name}"
        pickle.loads(malicious(trace)[name])
        assert trace.exists(), name


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(IDS)[:-3],
        b"",
        b"not a pickle",
        b"\x80\x04e.",  # a stack that is too short
        b"\x80\x04](K\x01.",  # one that is too long
        b"K\x01K\x02a.",  # a number appended to a number
        b"\x80\x04\x8b\xff\xff\xff\x7f.",  # a number of 2 GB that is not there
        b"I" + b"9" * 10_000 + b"\n.",
    ],
)
def test_a_damaged_pickle_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids.pkl (is not a whole pickle|holds more than lists)"):
        read_token_list(written(tmp_path / "ids.pkl", content))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[1, 2.5]", "holds '2.5' where a token id belongs"),
        ("[true]", "holds 'True'"),
        ('["1"]', "holds '1'"),
        ("[-1]", "holds '-1'"),
        ("[2147483648]", "holds '2147483648'"),
        ("[[[1]]]", "holds a list where"),
        ('{"a": 1}', "holds a dict"),
        ("7.5", "holds '7.5'"),
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_json_of_anything_else_is_refused(value: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read_token_list(written(tmp_path / "ids.json", value.encode()))


def test_a_pickle_of_a_negative_number_or_of_deeper_lists_is_refused(tmp_path: Path) -> None:
    for value in ([-1], [[[1]]], [[-5]], [2**31], [2**90]):
        with pytest.raises(ValueError, match="where a token id belongs"):
            read_token_list(written(tmp_path / "ids.pkl", pickle.dumps(value)))


def pickled(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"]" * 3000 + b"a" * 2999 + b".", "holds a list where a token id belongs"),
        (pickle.dumps([1, 2**20000]), "holds a huge number where a token id belongs"),
        (pickle.dumps([[1, 2]] * 2), r"refers to one list twice \(at byte \d+\), and nothing of it was run"),
        (b"](a.", "is not a whole pickle of lists"),
        (b"]((K\x01ee.", "is not a whole pickle of lists"),
        (b"(.", "is not a whole pickle of lists"),
        (b"K\x01l.", "is not a whole pickle of lists"),
    ],
)
def test_streams_made_to_look_like_lists_are_refused_in_one_sentence(
    content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_token_list(pickled(tmp_path / "x.pkl", content))
    assert "\n" not in str(caught.value) and "_Mark" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_long_list_of_the_oldest_kind_is_read(tmp_path: Path) -> None:
    assert read_token_list(pickled(tmp_path / "x.pkl", b"(" + b"K\x01" * 300_000 + b"l.")) == [1] * 300_000
