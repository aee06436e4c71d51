"""The API reference: which names are public, where each is defined, and on which page it stands.

Public is what `pyvene_ext` and `modelcards` export, and what the modules that `pyvene_ext` exports do. All else is internal: it
has no page, because it may change without notice and would hide the public names in every search. Contributors read it in the
sources.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGES = ("pyvene_ext", "modelcards")
# Base classes whose members are not repeated; those of a result's base class are.
NOT_OURS = "BaseModel, Exception, IntervenableModel, Module, dict, object, tuple"


class Page(NamedTuple):
    """A page of the reference: the public names of some modules."""

    title: str
    about: str
    modules: tuple[str, ...]  # and those in them


# In the order in which data flows. A module belongs to the first page that names it or a package it is in, and stands there in
# the order of these names.
PAGES: Mapping[str, Page] = {
    "models": Page(
        "Models",
        "Load a model, place it on a device, ask for its sizes, and verify its card.",
        ("pyvene_ext.models.loading", "pyvene_ext.models", "pyvene_ext.intervenable.verification"),
    ),
    "prompts": Page(
        "Prompts",
        "Prompt sets, shipped or one's own; their tokens and named positions; word problems and parallel text.",
        tuple(f"pyvene_ext.prompts{part}" for part in (".prompt", ".sets", ".tokenized", "")),
    ),
    "interventions": Page(
        "Interventions",
        "Ablations, patches, paths, forced attention and steering, as validated data that is saved and loaded.",
        ("pyvene_ext.specs.ablation", "pyvene_ext.specs.addition", "pyvene_ext.methods.steering", "pyvene_ext.specs"),
    ),
    "running": Page(
        "Run, sweep, read, generate",
        "Run interventions on prompts, one at a time or all heads at once; read activations; generate text; metrics and results.",
        (
            *(f"pyvene_ext.engine{part}" for part in (".plain", ".sweep.run", ".reading", ".generate", "")),
            "pyvene_ext.intervenable",
        ),
    ),
    "patching": Page(
        "Patching and paths",
        "Activations of one text in the run of another, at one place or along a path.",
        ("pyvene_ext.methods.patching",),
    ),
    "attribution": Page(
        "Attribution",
        "Gradient-based estimates for nodes, edges and input tokens.",
        ("pyvene_ext.methods.attribution",),
    ),
    "circuits": Page(
        "Circuits",
        "Circuits from scores of edges or nodes, run on their own, and how faithful they are.",
        ("pyvene_ext.methods.circuits",),
    ),
    "heads": Page(
        "What heads do",
        "Logit lens and direct effects, information flow, induction and lag, name movers, translation heads.",
        ("pyvene_ext.methods.heads.lens", "pyvene_ext.methods.heads"),
    ),
    "reasoning": Page(
        "Reasoning",
        "Word problems solved under an intervention: ablation, noise, forced attention, transplants, probes, difficulty.",
        ("pyvene_ext.methods.solving", "pyvene_ext.methods.reasoning"),
    ),
    "statistics": Page(
        "Statistics",
        "Intervals, correlations, tests, and random sets of heads as a control.",
        ("pyvene_ext.stats.intervals", "pyvene_ext.stats"),
    ),
    "figures": Page(
        "Figures",
        "Functions that take numbers and return a matplotlib figure in the style of the studies.",
        ("pyvene_ext.runs.figures", "pyvene_ext.runs.plotting"),
    ),
    "runs": Page(
        "Studies and run folders",
        "What a study is built from: flags, run folders, metadata, evidence, and steps that several studies share.",
        ("pyvene_ext.runs.folder", "pyvene_ext.runs.flags", "pyvene_ext.runs"),
    ),
    "report": Page(
        "Reports",
        "One HTML page for finished runs, which opens without a network.",
        ("pyvene_ext.report",),
    ),
    "files": Page(
        "Files, seeds, progress",
        "Files that are complete or absent, hashes, seeds, progress bars, and the command line.",
        ("pyvene_ext.io",),
    ),
    "modelcards": Page(
        "Model cards in code",
        "Where the components of each family are found, their shapes and units, and how pyvene learns of them.",
        ("modelcards.register", "modelcards"),
    ),
}


@dataclass(frozen=True)
class Name:
    """A public name: the shortest path by which it is imported, other paths, and where it is defined."""

    path: str
    others: tuple[str, ...]
    module: str
    is_data: bool

    @property
    def home(self) -> str:
        """The full name at its definition."""
        return f"{self.module}.{self.path.rpartition('.')[2]}"

    @property
    def page(self) -> str:
        """The page on which it stands."""
        for key, page in PAGES.items():
            if _place(self.module, page) is not None:
                return key
        raise ValueError(
            f"no page of the reference has the module {self.module}; name it in PAGES of docs/reference.py."
        )


@cache
def public_names() -> tuple[Name, ...]:
    """All public names, by the module that defines them and in its order."""
    paths: dict[tuple[str, str], list[str]] = {}
    for package in PACKAGES:
        for path in _exported(package, importlib.import_module(package)):
            paths.setdefault(_definition(*path.rsplit(".", 1)), []).append(path)
    names = []
    for (module, name), found in paths.items():
        # Of equally short paths the first: `pyvene_ext.circuits` rather than `pyvene_ext.methods`.
        path, *others = sorted(found, key=lambda path: (path.count("."), path))
        defined = getattr(importlib.import_module(module), name)
        names.append(Name(path, tuple(others), module, not (inspect.isclass(defined) or inspect.isfunction(defined))))
    return tuple(sorted(names, key=lambda name: (name.module, _lines(name.module)[name.path.rpartition(".")[2]][0])))


def _exported(path: str, module: ModuleType) -> Iterator[str]:
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    for name in listed:
        if isinstance(value := getattr(module, name), ModuleType):
            yield from _exported(f"{path}.{name}", value)
        elif not name.startswith("_"):
            yield f"{path}.{name}"


def _definition(path: str, name: str) -> tuple[str, str]:
    """The module that defines a name, found by following imports: constants do not say where they are from."""
    module = importlib.import_module(path) if path in PACKAGES else _module_at(path)
    assert module.__file__
    source = Path(module.__file__)
    stub = source.with_suffix(".pyi")
    for node in ast.parse((stub if stub.exists() else source).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
                    return _definition(package, alias.name)
    return module.__name__, name


def _module_at(path: str) -> ModuleType:
    package, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:  # a module by its short name, such as pyvene_ext.figures
        return getattr(_module_at(package), name)


@cache
def _lines(module: str) -> dict[str, tuple[int, str]]:
    """Each name that a module defines: the line, and the source of a constant."""
    source = inspect.getsource(importlib.import_module(module))
    defined = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = (node.lineno, "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = ast.unparse(node.value) if node.value else ""
            named = [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
            defined |= {name: (node.lineno, value if len(named) == 1 else "") for name in named}
    return defined


def written_pages() -> dict[str, str]:
    """The text of every page, in reStructuredText."""
    return {key: _page(page, [name for name in public_names() if name.page == key]) for key, page in PAGES.items()}


def list_of_pages() -> str:
    """The list of the pages, in Markdown, and the entry of each in the sidebar."""
    lines = [f"- [{page.title}](generated/api/{key}): {page.about}" for key, page in PAGES.items()]
    entries = "\n".join(f"generated/api/{key}" for key in PAGES)
    return "\n".join(lines) + f"\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def _page(page: Page, names: list[Name]) -> str:
    paths = {name.path for name in names}
    modules = sorted({name.module for name in names}, key=lambda module: (_place(module, page), module))
    listed = "".join(
        f"   {name.path}\n" for module in modules for name in names if name.module == module and not name.is_data
    )
    parts = [_heading(page.title, "="), page.about, f".. autosummary::\n   :signatures: none\n\n{listed}"]
    for module in modules:
        title = module.rpartition(".")[2].replace("_", " ")
        parts += [
            _heading(title[0].upper() + title[1:], "-"),
            f".. automodule:: {module}" + "\n   :no-index:" * (module in paths),
        ]
        parts += [_entry(name) for name in names if name.module == module]
    return "\n\n".join(parts) + "\n"


def _place(module: str, page: Page) -> int | None:
    """Which of a page's modules a module is or is in."""
    return next((n for n, part in enumerate(page.modules) if f"{module}.".startswith(f"{part}.")), None)


def _heading(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}"


def _entry(name: Name) -> str:
    also = f"   Also {', '.join(f'``{path}``' for path in name.others)}." if name.others else ""
    if name.is_data:
        last = name.path.rpartition(".")[2]
        value = _lines(name.module)[last][1] or repr(getattr(importlib.import_module(name.module), last))
        shown = value if len(value) < 200 else f"{value[:80]} ..."
        package = name.path.rpartition(".")[0]
        return f".. py:data:: {last}\n   :module: {package}\n\n   ``= {shown}``\n\n{also}"
    if inspect.isclass(getattr(importlib.import_module(name.module), name.path.rpartition(".")[2])):
        return f".. autoclass:: {name.path}\n   :members:\n   :inherited-members: {NOT_OURS}\n\n{also}"
    return f".. autofunction:: {name.path}\n\n{also}"
