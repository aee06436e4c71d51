"""The README: short, its links lead somewhere, and its code runs; `tests/real` compares what it prints on the real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_at_most_700_words() -> None:
    assert len(README.split()) <= 700


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert len(links) > 15
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


def test_the_number_of_checks_is_the_sum_of_the_page_on_models() -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    by_class = re.findall(r"^\| .+? \| (\d+) \| (\d+) \| (\d+) \| 0 \|", page, re.MULTILINE)
    by_family = [
        (count, len(re.sub(r"\(.*?\)", "", families).split(",")) if "," not in counts else 1)
        for counts, families in re.findall(r"^\| ([\d, ]+) \| (.+) \|$", page, re.MULTILINE)
        for count in map(int, counts.split(","))
    ]
    total = sum(int(count) for row in by_class for count in row) + sum(
        count * families for count, families in by_family
    )
    families = len(by_class) + sum(families for _, families in by_family)
    assert f"[{families} families]" in README and f"{total:,} checks" in README


def test_its_code_runs_offline_on_a_shipped_model_and_prompts_of_its_vocabulary(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.split("\n")) <= 13
    for there, here in {
        '"smollm2-135m-instruct"': '"tiny-qwen2.5"', "layers=23": "layers=3", '["pattern", 23]': '["pattern", 3]',
        **{f"The capital of {country} is": "When Lisa and David went to the store, David gave the book to"
           for country in ("France", "Italy", "Germany", "England")},
        **{city: name for cities, name in ((("Paris", "Berlin"), "Lisa"), (("Rome", "London"), "David")) for city in cities},
    }.items():  # fmt: skip
        assert there in code
        code = code.replace(there, here)
    names: dict[str, Any] = {}
    exec(code, names)
    assert "48 interventions x 4 prompts" in capsys.readouterr().out and names["pattern"].shape == (4, 1, 1, 15)
