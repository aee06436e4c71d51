"""The map of the house from its imports: rooms in their order, arrows one way, no circles (`python tests/test_rooms.py`)."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pyvene", "modelcards", "pyvene_ext", "experiments")  # arrows point to the left
ROOMS = ("io", "models", "prompts", "stats", "intervenable", "specs", "engine", "methods", "runs", "report")
METHODS = ("patching", "heads", "solving", "attribution", "circuits", "reasoning")  # the order within methods
MOST_MODULES = 11  # in a room


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    statements: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in statements:  # without what is inside expressions, which is most
        inner = (ast.stmt, ast.excepthandler, ast.match_case)
        statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, inner)]
    return [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]


@cache
def imports(package: str) -> dict[str, set[str]]:
    """What each module of a package imports of that package, wherever in the file: at the top, late, or for types only."""
    known = modules(package)
    arrows: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in import_statements(path):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    arrows[name].add(whole if whole in known else node.module)
            elif isinstance(node, ast.Import):
                arrows[name] |= {alias.name for alias in node.names}
        arrows[name] &= known.keys() - {name}
    return arrows


def room_of(module: str) -> str:
    """The room of a module of pyvene_ext; "" for the short names and commands beside the rooms."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def between_rooms() -> dict[str, Counter[str]]:
    """How many imports go from each room to each other one."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for module, targets in imports("pyvene_ext").items():
        for target in targets:
            if room_of(module) != room_of(target):
                found[room_of(module)][room_of(target)] += 1
    return found


@pytest.mark.parametrize("package", ["modelcards", "pyvene_ext", "experiments"])
def test_no_module_imports_what_only_unix_has(package: str) -> None:
    unix = {"fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty"}
    for path in modules(package).values():
        for node in import_statements(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not unix & {*names, getattr(node, "module", None)}, path


@pytest.mark.parametrize("package", ["modelcards", "pyvene_ext", "experiments"])
def test_no_modules_import_one_another_in_a_circle(package: str) -> None:
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_rooms_import_only_rooms_before_them() -> None:
    back = [
        (room, other)
        for room, others in between_rooms().items()
        for other in others
        if room and (not other or ROOMS.index(other) > ROOMS.index(room))
    ]
    assert not back


def test_methods_import_only_methods_before_them() -> None:
    folders = {path.parent.name for path in (ROOT / "pyvene_ext" / "methods").glob("*/__init__.py")}
    assert folders == set(METHODS)
    back = [
        (module, target)
        for module, targets in imports("pyvene_ext").items()
        for target in targets
        if (ends := [name.split(".")[2:3] for name in (module, target) if name.startswith("pyvene_ext.methods.")])
        and len(ends) == 2
        and all(end and end[0] in METHODS for end in ends)
        and METHODS.index(ends[1][0]) > METHODS.index(ends[0][0])
    ]
    assert not back


def test_every_sub_package_is_a_room_that_says_what_belongs_there() -> None:
    folders = {path.parent.name for path in (ROOT / "pyvene_ext").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    for path in (ROOT / "pyvene_ext").rglob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        assert len([other for other in path.parent.glob("*.py") if other != path]) <= MOST_MODULES, path


def test_no_public_function_or_class_shares_its_name_with_a_module_beside_it() -> None:
    # Importing a module sets it as an attribute of its package, in place of what is loaded lazily under that name.
    for stub in (ROOT / "pyvene_ext").rglob("__init__.pyi"):
        public = {
            alias.name
            for node in ast.parse(stub.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            if not (stub.parent / node.module.replace(".", "/") / alias.name).with_suffix(".py").exists()
            and not (stub.parent / node.module.replace(".", "/") / alias.name).is_dir()
        }
        assert not public & {path.stem for path in stub.parent.iterdir()}, stub


def test_packages_import_only_packages_before_them() -> None:
    for package in PACKAGES[1:]:
        later = PACKAGES[PACKAGES.index(package) + 1 :]
        for name, path in modules(package).items():
            for node in import_statements(path):
                named = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not {one.split(".")[0] for one in named} & set(later), name


def draw() -> str:
    """The rooms, their lines and modules, and where their imports go."""
    lines = []
    rooms = between_rooms()
    for room in (*ROOMS, ""):
        inside = [path for name, path in modules("pyvene_ext").items() if room_of(name) == room]
        size = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in inside)
        arrows = ", ".join(f"{other or 'beside the rooms'} {n}" for other, n in rooms[room].most_common())
        lines.append(f"{room or 'beside the rooms':<17}{len(inside):>3} modules {size:>6} lines  -> {arrows}")
    for package in ("modelcards", "pyvene_ext", "experiments"):
        try:
            TopologicalSorter(imports(package)).prepare()
            lines.append(f"{package}: no circle")
        except CycleError as error:
            lines.append(f"{package}: a circle, {' -> '.join(error.args[1])}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(draw())
