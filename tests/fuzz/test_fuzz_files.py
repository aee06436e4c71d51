"""Files that are valid, broken in every way: each is read as what it says, or named in one sentence."""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import activation_frequencies_ifr
import information_flow_routes
import numpy as np
import pytest
import translation_heads
import yaml
from critical_heads import run_all
from hypothesis import example, given
from hypothesis import strategies as st

from pyvene_ext.io.files import read_head_matrix
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.prompts.parallel import load_pairs
from pyvene_ext.prompts.problems import load_problems
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.token_lists import read_token_list
from pyvene_ext.report import Run, write_report
from pyvene_ext.runs.translation import published
from pyvene_ext.specs.files import from_plain, load_specs, to_plain
from tests.fuzz.outcomes import command, few, outcome
from tests.tiny_random import tiny_config

PAIR = {
    "clean": "When Anna and Mark met, Mark gave the book to",
    "corrupt": "When Eve and Paul met, Tom gave the book to",
    "io_name": "Anna",
    "s_name": "Mark",
    "io_token": " Anna",
    "positions": {"verb": "gave", "start": [0, 4]},
}
OWN = {"text": "The capital of France is", "answer": ["Paris", "Lyon"], "wrong": "Rome", "positions": {"x": 1}}
CHAT = {"text": [{"role": "user", "content": "France?"}], "answer": "Paris", "corrupt_answer": "Rome"}
PROMPTS = {
    "n_examples": 4,
    "description": "two",
    "pairs": [PAIR, PAIR | {"clean": "Mark met Anna. Mark gave"}, OWN, CHAT],
}
PROBLEMS = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "1,000 less 1.5?", "answer": "#### 998.5"},
]
SENTENCES = [{"translation": {"en": "the cat", "fr": "le chat"}}, {"en": "a dog", "fr": "un chien", "de": "ein Hund"}]
SPECS = [
    {"kind": "mean", "site": "z", "layer": 2, "heads": [5], "positions": "last"},
    {"kind": "patch", "site": "k", "layer": 2, "heads": [0], "positions": ["s1", -2, 0]},
    {"kind": "force", "shape": "hub", "layer": 2, "heads": [5], "block": ["a", -1], "hub": "b", "hard": True},
    {"kind": "path", "sender": "z.0.1", "receivers": ["q.2.3", "k.1.0"], "freeze_mlps": True},
    [{"kind": "zero", "site": "z", "layer": 1, "heads": [0, 3]}, {"kind": "noise", "site": "mlp_out", "layer": 0}],
]
CONFIG = {"model": "tiny-qwen2.5", "dataset": "ioi_en", "out": "x.npy", "tau": 0.2, "abs": True, "width": None}
SETTINGS = {"ablate_heads": {"n_heads": [1, 2]}, "patch_hub": {"seed": 3}}
KNOWN = {"models": {"Tiny": {"heads": {"en-fr": ["1.2"]}, "thresholds": {"en": 0.3}}}}
HEADS = "scores,layer,head\n0.5,1,2\n-1e-3,0,0\n"
TSV = "en\tfr\tde\nthe cat\tle chat\tdie Katze\na dog\tun chien\tein Hund\n"


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def flags(path: Path) -> Any:
    """What `--config` makes of a file."""
    taken: list[Any] = []
    config = activation_frequencies_ifr.Config
    return taken[0] if command(taken.append, config, ["--config", str(path)], names=path) else None


def known(path: Path) -> Any:
    config = translation_heads.Config(model="some/tiny", known=path)
    return published(config)


# name of the file: what it holds as data (None: it is not data in JSON or YAML), as text, and who reads it
READERS: dict[str, tuple[Any, Callable[[Any], str], Callable[[Path], Any]]] = {
    "prompts.json": (PROMPTS, json.dumps, PromptSet.load),
    "prompts.jsonl": (PROMPTS["pairs"], lines, PromptSet.load),
    "problems.json": (PROBLEMS, json.dumps, load_problems),
    "problems.jsonl": (PROBLEMS, lines, load_problems),
    "text.jsonl": (SENTENCES, lines, lambda path: load_pairs(path, ("en", "fr"))),
    "text.tsv": (None, lambda _: TSV, lambda path: load_pairs(path, ("en", "fr"))),
    "ids.json": ([3, [5, 7], 11], json.dumps, read_token_list),
    "heads.csv": (None, lambda _: HEADS, lambda path: read_head_scores(path, tiny_config("gpt2"))),
    "specs.yaml": (SPECS, yaml.safe_dump, load_specs),
    "specs.json": (SPECS, json.dumps, load_specs),
    "config.yaml": (CONFIG, yaml.safe_dump, flags),
    "settings.yaml": (SETTINGS, yaml.safe_dump, run_all.read_settings),
    "known.json": (KNOWN, json.dumps, known),
}
DATA = [name for name, (value, *_) in READERS.items() if value is not None]

# -- ways to break what is valid ---------------------------------------------------------------------------------------

ODD = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            0,
            -1,
            10**30,
            0.5,
            math.nan,
            math.inf,
            -0.0,
            1e308,
            "",
            "\x00",
            "0",
            "1e999",
            "all",
            "a\nb",
        ]
    )
    | st.sampled_from(
        ["\r", "\u2028", "é", "\U0001f600", "\ud800", "x" * 5000, [], {}, [[]], {"": None}, "!!int", "*a"]
    ),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
).map(copy.deepcopy)  # what is drawn is put into data that is changed further


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Data with one to three places in it dropped, replaced, wrapped, doubled, or called otherwise."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(places(value))) or (None,)
        if key is None:
            value = draw(st.one_of(ODD, st.just([value]), st.just({"pairs": value})))
            continue
        inside = value
        for step in path:
            inside = inside[step]
        match draw(st.sampled_from(["drop", "replace", "replace", "replace", "wrap", "rename", "double"])):
            case "drop":
                del inside[key]
            case "replace":
                inside[key] = draw(ODD)
            case "wrap":
                inside[key] = draw(st.sampled_from([[inside[key]], {"a": inside[key]}, str(inside[key])]))
            case "rename" if isinstance(inside, dict):
                inside[draw(st.sampled_from([f"{key}s", f"{key}"[1:], f"{key}".upper(), "\ud800", ""]))] = inside.pop(
                    key
                )
            case "double" if isinstance(inside, list):
                inside.append(inside[key])
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut short, with bytes changed, put in or left out, of another encoding, or nothing like it."""
    at = draw(st.integers(0, len(content)))
    upto = draw(st.integers(at, len(content)))
    put = draw(
        st.one_of(
            st.binary(max_size=6),
            st.sampled_from(
                [b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\xff\xfe", b'"', b"\t", b",", b":", b"-", b"{", b"["]
            )
            | st.sampled_from([b"NaN", b"1e999", b"\\ud800", b"&a ", b"*a", b"!!int ''"])
            | st.sampled_from(
                [b"!!bool maybe", b"!!timestamp x", b"2001-99-99", b"!!float ''", b"!!binary x", b"? ", b"!!set"]
            )
            | st.sampled_from([b"[" * 3000, b"{a: " * 1500, b"- " * 1500, b"x" * 5000]),
        )
    )
    return draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + content[upto:],
                content[:at] + put + content[at:],
                content[:at] + put + content[upto:],
                put,
                content.replace(b"\n", b"\r\n"),
                content.decode("latin-1").encode("utf-16"),
                b"\xef\xbb\xbf" + content,
            ]
        )
    )


def check_read(name: str, content: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(content)
    *_, read = READERS[name]
    found = outcome(read, path, names=path)
    if found is None:
        return
    # What is read is whole: it can be written and read again.
    if isinstance(found, PromptSet):
        again = folder / f"again{path.suffix}"
        found.save(again)
        assert PromptSet.load(again).prompts == found.prompts
    elif name.startswith("specs"):
        assert from_plain(json.loads(json.dumps(to_plain(found)))) == found
    elif name == "ids.json":
        assert all(type(number) is int and 0 <= number < 2**31 for number in found)
    elif name == "heads.csv":
        assert found and all(math.isfinite(score) for score, *_ in found)
    elif name.startswith("problems"):
        assert found and all(problem.question.strip().encode() for problem in found)
    elif name.startswith("text"):
        assert all((pair.source + pair.target).encode() is not None for pair in found)
    elif name == "config.yaml":
        assert found.tau is None or type(found.tau) is float
        assert type(found.abs) is bool and type(found.model) is str


# -- files of data and text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_what_is_valid_is_read(name: str, tmp_path: Path) -> None:
    value, text, read = READERS[name]
    (tmp_path / name).write_text(text(value), encoding="utf-8")
    assert read(tmp_path / name)


@pytest.mark.parametrize("name", DATA)
@given(data=st.data())
def test_changed_data_is_read_or_named(name: str, data: st.DataObject, tmp_path: Path) -> None:
    value, text, _ = READERS[name]
    value = data.draw(changed(value))
    try:
        content = text(value)
    except (ValueError, TypeError):  # lines of what is no list; YAML has no half characters
        content = json.dumps(value)
    check_read(name, content.encode("utf-8", "surrogatepass"), tmp_path)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_damaged_bytes_are_read_or_named(name: str, data: st.DataObject, tmp_path: Path) -> None:
    value, text, _ = READERS[name]
    check_read(name, data.draw(damaged(text(value).encode())), tmp_path)


def bomb() -> bytes:
    """YAML of a few lines that would be gigabytes if it were written out."""
    inner = b"x"
    for level in b"bcdefghijk":
        name = bytes([level])
        inner = b"[&" + name + b" [" + inner + b"]" + b"".join(b", *" + name for _ in range(9)) + b"]"
    return inner


# Found by these tests: what once was another exception, or a sentence that named no file.
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.json", b"[" * 3000),
        ("problems.json", b"[" * 3000),
        ("problems.jsonl", b'{"question": "\\ud800?", "answer": "#### 1"}'),
        ("text.jsonl", b'{"en": "\\ud800", "fr": "b"}'),
        ("text.jsonl", b"[" * 3000),
        ("specs.yaml", b"- !!bool maybe"),
        ("specs.yaml", b"- !!int ''"),
        ("specs.yaml", b"- !!timestamp x"),
        ("specs.yaml", b"[" * 3000),
        ("config.yaml", b"tau: 2001-99-99"),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b"tau: &a [*a]"),
        ("config.yaml", b"model: &a [x]\ntau: " + bomb()),
        ("specs.yaml", b"&a [*a]"),
        ("specs.yaml", b"- {kind: zero, site: z, layer: 1, heads: &a [*a]}"),
        ("specs.yaml", b"- {kind: zero, site: z, layer: 1, heads: [0], positions: " + bomb() + b"}"),
        ("settings.yaml", b"ablate_heads: " + bomb()),
        ("settings.yaml", b"!!float ''"),
        ("known.json", b""),
        ("known.json", b"[]"),
        ("known.json", b'{"models": {"tiny": {"heads": {"en-fr": [1]}}}}'),
    ],
)
def test_what_was_found_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert outcome(READERS[name][2], tmp_path / name, names=tmp_path / name) is None


def test_cells_longer_than_csv_takes_are_named(tmp_path: Path) -> None:
    (tmp_path / "heads.csv").write_text(f'{HEADS}"{"1" * 200_000}",0,0\n')
    assert outcome(READERS["heads.csv"][2], tmp_path / "heads.csv", names=tmp_path / "heads.csv") is None


# -- arrays ------------------------------------------------------------------------------------------------------------

KINDS = ["f8", "f4", "f2", "i8", "u1", "?", "c8", "S3", "U2", ">f8", "M8[s]", "f8,i4"]


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, draw(st.sampled_from(KINDS))), allow_pickle=False)
    return buffer.getvalue()


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A .npy file whose header, which is Python, says something odd."""
    odd = st.sampled_from(
        [
            "(3, 4)",
            "(3, -4)",
            "(10**9,)",
            "(9223372036854775807, 9)",
            "(3.0, 4)",
            "3",
            "()",
            "None",
            "(3, 4",
            "'",
            "__import__('os')",
        ]
    )
    kind = st.sampled_from(
        ["'<f8'", "'|O'", "'O8'", "[('a', 'O')]", "'f'", "''", "None", "('<f8', (2,))", "'<f99'", "[]"]
    )
    order = draw(st.sampled_from(["True", "False", "0", "x"]))
    text = f"{{'descr': {draw(kind)}, 'fortran_order': {order}, 'shape': {draw(odd)}, }}"
    broken = [text[:-1], text + " " * 20_000, "(" * 500, "  " + text, text + "\n x\n  y", "\x00" + text]
    text = draw(st.sampled_from([text, *broken]))
    header = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + (len(header) % 65536).to_bytes(2, "little") + header + bytes(96)


NPY: dict[str, Callable[[Path], Any]] = {
    "matrix": read_head_matrix,
    "frequencies": information_flow_routes.read_frequencies,
}


@pytest.mark.parametrize("reader", NPY)
@given(content=st.one_of(arrays(), arrays().flatmap(damaged), headers()))
@example(content=b"\x93NUMPY\x01\x00\x06\x00{'a'\n ")
@example(content=b"\x93NUMPY\x01\x00\x08\x00(((((((\n")
@example(content=b"PK\x03\x04")
def test_arrays_are_read_or_named(reader: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    found = outcome(NPY[reader], path, names=path)
    if found is not None:
        assert found.ndim == 2 and found.dtype == np.float64


# -- folders of runs ---------------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {"verdicts": ["causal"], "command": "python x.py", "nested": [{"command": "python y.py"}]}
FACTS |= {"question": "Which?", "helps_if_negative": ["delta"]}
FACTS |= {
    "evidence": [
        {"sample": "2 prompts", "effect": "0.0", "interval": [0.5, None, None], "control": "none", "sharpen": "more"}
    ]
}
TABLE = "layer,head,delta,note\n0,0,0.5,a\n0,1,,b\n1,0,-1e-3,c\n"


def deltas() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[[0.5, np.nan]]]))
    return buffer.getvalue()


LAYER = base64.b64encode(gzip.compress(bytes([255, 64, 191]), mtime=0)).decode()  # one head on two tokens
ATTENTION = {
    "prompts": [{"name": "one", "tokens": ["a", "b"], "first": ["0.0"], "left_out": "", "layers": {"0": LAYER}}]
}
EDGE = {"source": "resid_pre.0@0", "target": "resid_mid.0@1", "via": "0.1", "importance": 0.5}
ROUTES = {"prompt": 0, "tokens": ["a", "b"], "tau": 0.04, "renormalised": False, "edges": [EDGE]}


def run_folder(folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    files = {
        "config.yaml": yaml.safe_dump({"model": "x", "tau": 0.1}).encode(),
        "summary.json": json.dumps(FACTS).encode(),
        "prompts.json": b'["one", "two"]',
        "heads.csv": TABLE.encode(),
        "deltas.npy": deltas(),
        "attention.json": json.dumps(ATTENTION).encode(),
        "routes.json": json.dumps(ROUTES).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


@given(data=st.data())
@few(2)
def test_a_run_with_a_damaged_file_is_shown_or_named(data: st.DataObject, tmp_path: Path) -> None:
    files = run_folder(tmp_path / "run")
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    plain = {"summary.json": FACTS, "attention.json": ATTENTION, "routes.json": ROUTES}
    if name in plain and data.draw(st.booleans()):
        content = json.dumps(data.draw(changed(plain[name]))).encode()
    else:
        content = data.draw(damaged(content))
    (tmp_path / "run" / name).write_bytes(content)
    page = tmp_path / "page.html"
    page.unlink(missing_ok=True)
    outcome(write_report, [tmp_path / "run"], page, names=tmp_path / "run")


def test_a_valid_run_is_shown(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    assert Run.read(tmp_path / "run").facts["summary.json"] == FACTS
    write_report([tmp_path / "run"], tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()
