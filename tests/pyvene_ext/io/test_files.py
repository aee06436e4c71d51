"""Files are replaced at once or left alone; tables in CSV files against the standard library's writer, byte for byte."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pyvene_ext.io.files import atomic_path, read_csv, write_csv

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
CELL = st.one_of(
    st.integers(),
    st.floats(),
    st.floats(width=32).map(np.float32),
    st.integers(-9, 9).map(np.int64),
    st.booleans(),
    st.booleans().map(np.bool_),
    st.none(),
    TEXT,
    st.sampled_from(["NA", "nan", "", " ", '"', "a,b", "a\nb", "\r", "0.10", 0.1, 1e-300, -0.0, 10**30]),
)
NAMES = st.lists(TEXT, min_size=1, max_size=4, unique=True)
ROWS = NAMES.flatmap(lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, CELL)), min_size=1, max_size=4))
SETTINGS = settings(
    max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def by_hand(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    for row in rows:
        empty = {name for name, cell in row.items() if isinstance(cell, float | np.floating) and math.isnan(cell)}
        writer.writerow({name: "" if name in empty else cell for name, cell in row.items()})
    return file.getvalue().encode()


def test_a_file_is_replaced_at_once_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert reader.read() == "old", "who had it open has it whole"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@given(rows=ROWS)
@example(rows=[{"a": 1, "b": None}, {"a": 0.5, "b": True}, {"a": math.nan, "b": 3}])
@example(rows=[{"a": 1, "b": 2.0}, {"a": 3}])
@SETTINGS
def test_tables_are_written_as_the_standard_library_writes_them(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_csv(tmp_path / "new/a.csv", rows)
    read = read_csv(tmp_path / "new/a.csv")
    assert [list(row) for row in read] == [list(rows[0])] * len(rows)
    assert (tmp_path / "new/a.csv").read_bytes() == by_hand(rows)


@pytest.mark.parametrize("text", ["a,b\n1\n", "a,b\n1,2\n1\n", "a,b\n1,2,3\n", "a,b\n1,2\n1,2,3\n", "a\n1,2\n"])
def test_rows_of_unequal_length_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=r"a\.csv has rows of unequal length"):
        read_csv(tmp_path / "a.csv")


def test_pandas_is_imported_with_the_first_table_only() -> None:
    code = "import sys, pyvene_ext, pyvene_ext.io.cli, pyvene_ext.io.files; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
