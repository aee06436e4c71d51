"""Kept results: each condition is computed once, whatever is asked for again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyvene_ext.methods.solving.results import Results


@dataclass(frozen=True)
class Made:
    value: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Made:
        return cls(**record)


def test_equal_conditions_are_computed_once_and_kept_ones_never(tmp_path: Path) -> None:
    calls: list[list[int]] = []
    conditions = [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 3}, {"a": 2}]

    def measure(missing: list[int]) -> list[Made]:
        calls.append(missing)
        return [Made(10 * conditions[number]["a"]) for number in missing]

    results = Results(tmp_path, {"model": "x"})
    assert results.get({"a": 2}, lambda: Made(20), Made) == Made(20)  # type: ignore[type-var]
    for _ in range(2):
        found = results.get_all(conditions, measure, Made)  # type: ignore[type-var]
        assert [made.value for made in found] == [10, 20, 10, 30, 20]
    assert calls == [[0, 3]]
