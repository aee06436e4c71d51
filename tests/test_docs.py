"""What is stored of the documentation; `make docs` builds it, runs the tutorial, and fails on a warning."""

from __future__ import annotations

import json
import re
from pathlib import Path

from modelcards import CARDS

ROOT = Path(__file__).resolve().parents[1]


def test_the_tutorial_is_stored_without_what_running_it_leaves() -> None:
    text = (ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert not re.search(r"/(home|root|Users|tmp|work)/", text)


def test_the_figures_of_the_readme_are_there_small_and_made_by_make() -> None:
    shown = set(re.findall(r"\((docs/figures/\w+\.png)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/figures").glob("*.png")}
    assert all(path.stat().st_size < 120_000 for path in (ROOT / "docs/figures").rglob("*.png"))
    made = re.findall(r"^\tcp \S+ (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(made) == shown


def test_the_reference_lists_every_public_module_once() -> None:
    families = {card.family for card in CARDS}
    public = {"pyvene_ext", "modelcards"}
    for package in tuple(public):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts) and not {*parts[1:2]} & families:
                public.add(".".join(parts))
    public.remove("modelcards.register")  # the function of that name stands in its place; on the page of modelcards
    listed = re.findall(
        r"^   ((?:pyvene_ext|modelcards)[\w.]*)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(public)
