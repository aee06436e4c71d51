"""What is stored of the documentation; `make docs` builds it, runs its notebooks, and fails on a warning."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import pyvene_ext as px

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    path
    for ending in ("md", "ipynb")
    for path in sorted(DOCS.rglob(f"*.{ending}"))
    if not {"generated", "_build"} & {*path.relative_to(DOCS).parts}
]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *sorted((ROOT / "modelcards").glob("*/README.md"))]


def test_the_tutorial_is_stored_without_what_running_it_leaves() -> None:
    text = (DOCS / "tutorial.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert not re.search(r"/(home|root|Users|tmp|work)/", text)


# -- figures ---------------------------------------------------------------------------------------------------------


def test_the_gallery_shows_every_figure_and_make_draws_those_of_the_shipped_models() -> None:
    drawn = {path.relative_to(DOCS).as_posix() for path in (DOCS / "figures").rglob("*.png")}
    assert all((DOCS / path).stat().st_size < 120_000 for path in drawn)
    assert set(re.findall(r"\]\((figures/[\w./-]+\.png)\)", (DOCS / "gallery.md").read_text("utf-8"))) == drawn
    made = re.findall(r"^\tcp \S+ docs/(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(made) == {path for path in drawn if path.count("/") == 1}
    # docs/results.py draws those of the real models, and shows each on its page.
    shown = re.findall(r"\]\((figures/real/[\w./-]+\.png)\)", (DOCS / "real_models.md").read_text("utf-8"))
    assert set(shown) == drawn - {*made}


def test_each_figure_of_the_gallery_of_shipped_models_stands_over_a_command_that_make_runs() -> None:
    text = (DOCS / "gallery.md").read_text("utf-8").partition("## Real models")[0]
    commands = re.findall(r"`(python [^`]+)`", text)
    assert len(commands) == len(re.findall(r"\[!\[", text))
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("$(BIN)/", "")
    ablation = re.search(r"^ABLATION := (.*)$", makefile, re.MULTILINE)
    assert ablation
    for command in commands:
        assert re.search(
            rf"^\t{re.escape(command)} --\w+ outputs/", makefile.replace("$(ABLATION)", ablation[1]), re.MULTILINE
        )


def test_cells_show_their_figures() -> None:
    # Figures are made without pyplot, so that a semicolon would hide them.
    assert [page for page in PAGES if re.search(r"\.plot\(.*\);", page.read_text("utf-8"))] == []


# -- the reference ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """docs/reference.py, which writes the pages of the reference."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def exported(path: str, module: ModuleType) -> Iterator[str]:
    for name in getattr(module, "__all__", ()):
        if isinstance(value := getattr(module, name), ModuleType):
            yield from exported(f"{path}.{name}", value)
        else:
            yield f"{path}.{name}"


@pytest.mark.docs
def test_the_reference_has_every_public_name_once_and_no_other(reference: ModuleType) -> None:
    text = "\n".join(reference.written_pages().values())
    entries = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, re.MULTILINE)
    entries += [f"{module}.{name}" for name, module in re.findall(r"py:data:: (\S+)\n   :module: (\S+)", text)]
    assert len(entries) == len({*entries})
    also = {
        name for line in re.findall(r"^   Also (.*)\.$", text, re.MULTILINE) for name in re.findall(r"[\w.]+", line)
    }
    import modelcards  # here, as it imports pyvene

    public = {*exported("pyvene_ext", px), *exported("modelcards", modelcards)}
    assert {"pyvene_ext.run", "pyvene_ext.circuits.top_edges", "modelcards.register"} <= public & {*entries}
    assert public <= {*entries} | also
    # Beyond these only modules without a list, such as pyvene_ext.reasoning, whose own functions are public.
    rest = [name for name in entries if name not in public]
    assert all(
        not hasattr(sys.modules[name.module], "__all__") for name in reference.public_names() if name.path in rest
    )
    assert not any(part.startswith("_") for name in entries for part in name.split("."))


# -- links, paths, commands ------------------------------------------------------------------------------------------


def prose(path: Path) -> str:
    """The Markdown of a page or notebook, without fenced code."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What GitHub and the built pages call the headings of a page."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()).strip().replace(" ", "-")
        found[plain] = found.get(plain, -1) + 1
    return {name if not number else f"{name}-{number}" for name, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = unquote(target).partition("#")
        aim = (page.parent / name).resolve() if name else page
        if "generated" in aim.parts:  # written by the build, which checks them
            continue
        assert aim.exists(), target
        assert not anchor or anchor in anchors(aim), target


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(
        r"(?<![\w/.])((?:experiments|benchmarks|tests|docs(?!/_build)|pyvene_ext|modelcards)/[\w./-]*\w\.\w+)", text
    ):
        assert (ROOT / name).exists(), name


def commands(page: Path) -> Iterator[list[str]]:
    text = page.read_text("utf-8").replace("\\\n", " ")
    for line in re.findall(
        r"(?:python|accelerate launch|torchrun)[^`\n]* ?((?:experiments|benchmarks)/[\w/]+\.py[^`\n]*)", text
    ):
        yield shlex.split(re.split(r" #| && |[;:]$| \.\.\.|\)|, | → ", line)[0])


def flags_of(script: str) -> set[str]:
    path = str(ROOT / script)
    sys.path.insert(0, str(Path(path).parent))
    try:
        config = runpy.run_path(path)["Config"]
    finally:
        sys.path.pop(0)
    return {field.name for field in dataclasses.fields(config)} | {"config", "help"}


def test_commands_on_the_pages_have_flags_that_the_scripts_know() -> None:
    used: dict[str, set[str]] = {}
    for page in (ROOT / "README.md", *PAGES):
        for script, *arguments in commands(page):
            flags = {argument.partition("=")[0] for argument in arguments if re.match(r"--[a-z]", argument)}
            used.setdefault(script, set()).update(flag.removeprefix("--") for flag in flags)
    assert len(used) > 15
    for script, flags in used.items():
        if "class Config" in (ROOT / script).read_text("utf-8"):
            known = flags_of(script)
            assert {flag for flag in flags if flag not in known and flag.removeprefix("no_") not in known} == set(), (
                script
            )


EXCERPT = re.compile(
    r"^```\{literalinclude\} (\S+)\n:language: text\n:start-after: \"(.*)\"\n:lines: (\d+)(?:-(\d+))?\n```$",
    re.MULTILINE,
)


def test_excerpts_are_lines_that_a_study_printed() -> None:
    found = 0
    for page in (DOCS / "studies").glob("*.md"):
        excerpts = EXCERPT.findall(page.read_text("utf-8"))
        assert len(excerpts) == page.read_text("utf-8").count("{literalinclude}")
        for name, start, first, last in excerpts:
            lines = (page.parent / name).read_text("utf-8").splitlines()
            (begin,) = [number for number, line in enumerate(lines) if start in line]
            fences = [line for line in lines[: begin + int(first)] if line.startswith("```")]
            excerpt = lines[begin + int(first) : begin + int(last or first) + 1]
            assert fences[-1] == "```text", start
            assert excerpt[0].strip() and excerpt[-1].strip() and "```" not in excerpt, start
            found += 1
    assert found >= 8


def test_the_study_whose_name_misleads_says_so_on_top() -> None:
    script = (ROOT / "experiments/activation_frequencies_ifr.py").read_text("utf-8")
    for top in (script[:500], (DOCS / "studies/head_effects.md").read_text("utf-8")[:800]):
        assert "ausal ablation" in top and "information_flow_routes.py" in top
