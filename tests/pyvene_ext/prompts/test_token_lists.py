"""Token lists from JSON and from pickles: what they hold is read, anything else is refused, and nothing in a file is run."""

from __future__ import annotations

import array
import collections
import json
import pickle
import tracemalloc
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
    """Pickles that would leave a trace if they were loaded, or that make something else than plain data."""
    code = f"open({str(trace)!r}, 'w')"
    return {
        "GLOBAL": b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "STACK_GLOBAL": pickle.dumps(Reduced(exec, code), 4),
        "GLOBAL ": pickle.dumps(Reduced(touch, str(trace)), 2),
        "INST": b"(V" + code.encode() + b"\nibuiltins\nexec\n.",
        "OBJ": b"(cbuiltins\nexec\nV" + code.encode() + b"\no.",
        "NEWOBJ": b"\x80\x02](K\x01cbuiltins\nobject\n)\x81e.",
        "GLOBAL alone": b"\x80\x02](K\x01cos\nsystem\ne.",
        "GLOBAL dropped": b"](K\x01ecos\nsystem\n0.",
        "a name of two lines": b"\x80\x04\x8c\x03os\n\x8c\x06system\x93.",
        "in the list": pickle.dumps([1, 2, Reduced(touch, str(trace))]),
        "after a list": b"](K\x01e0cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "array": pickle.dumps(array.array("i", [1])),
        "numpy": pickle.dumps(np.arange(3)),
        "deque": pickle.dumps(collections.deque([1])),
    }


@pytest.mark.parametrize("name", malicious(Path("trace")))
def test_a_pickle_that_imports_anything_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = written(tmp_path / "ids.pkl", malicious(trace)[name])
    with pytest.raises(ValueError, match=r"ids.pkl is not a pickle of lists of whole numbers \(it imports ") as caught:
        read_token_list(path)
    assert not trace.exists() and "\n" not in str(caught.value)
    assert "nothing in it was run" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (["1"], "'1'"),
        ([1.0], "'1.0'"),
        ([1, True], "'True'"),
        ([None], "'None'"),
        ([(1, 2)], "a tuple"),
        ({1: 2}, "a dict"),
        (b"12", "a bytes"),
        ({1, 2}, "a set"),
        ([-1], "'-1'"),
        ([[[1]]], "a list"),
        ([[-5]], "'-5'"),
        ([2**31], "'2147483648'"),
        ([1, 2**90], f"'{2**90}'"),
    ],
)
def test_a_pickle_of_other_plain_data_is_refused_as_json_is(value: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"ids.pkl holds {what} where a token id belongs") as caught:
        read_token_list(written(tmp_path / "ids.pkl", pickle.dumps(value)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_these_pickles_do_run_something_when_they_are_loaded(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    for name in ("GLOBAL", "STACK_GLOBAL", "GLOBAL ", "INST", "OBJ", "in the list", "after a list"):
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
        b"K\x01K\x02a.",  # a number appended to a number
        b"](a.",
        b"(.",
        b"K\x01l.",
        b"\x80\x04\x8b\xff\xff\xff\x7f.",  # a number of 2 GB that is not there
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",  # as many bytes
        b"\x80\x02\x82\x01.",  # an extension code
        b"Pname\n.",
    ],
)
def test_a_damaged_pickle_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids.pkl is not a pickle of lists of whole numbers \(.+\), and") as caught:
        read_token_list(written(tmp_path / "ids.pkl", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[1, 2.5]", "holds '2.5' where a token id belongs"),
        ("[true]", "holds 'True'"),
        ('["1"]', "holds '1'"),
        ("[-1]", "holds '-1'"),
        ("[2147483648]", "holds '2147483648'"),
        ("[[[1]]]", "holds a list where"),
        ('[{"a": 1}]', "holds a dict"),
        ('{"a": "b"}', "holds 'b' where"),
        ("7.5", "holds '7.5'"),
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_json_of_anything_else_is_refused(value: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read_token_list(written(tmp_path / "ids.json", value.encode()))


def test_a_list_named_twice_is_read_twice_unless_that_fills_the_memory(tmp_path: Path) -> None:
    word = [5, 7]
    assert read_token_list(written(tmp_path / "ids.pkl", pickle.dumps([word, [9], word]))) == [5, 7, 9, 5, 7]
    text = list(range(20_000))
    with pytest.raises(ValueError, match=r"ids\.pkl holds 20000000 token ids; give at most 10000000"):
        read_token_list(written(tmp_path / "ids.pkl", pickle.dumps([text] * 1000)))
    for within_itself in (b"\x80\x02]q\x00h\x00a.", b"]" * 3000 + b"a" * 2999 + b"."):
        with pytest.raises(ValueError, match=r"ids\.pkl holds a list where a token id belongs"):
            read_token_list(written(tmp_path / "ids.pkl", within_itself))


def test_a_pickle_takes_no_more_memory_than_it_holds(tmp_path: Path) -> None:
    path = written(tmp_path / "ids.pkl", b"\x80\x02]r\xff\xff\xff\x7f(K\x01K\x02e.")  # a note under number 2**31
    tracemalloc.start()
    assert read_token_list(path) == [1, 2]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_long_list_of_the_oldest_kind_is_read(tmp_path: Path) -> None:
    assert read_token_list(written(tmp_path / "x.pkl", b"(" + b"K\x01" * 300_000 + b"l.")) == [1] * 300_000
