"""What is distributed: wheel and source archive hold what they should, work far from here, and say what they need and are."""

from __future__ import annotations

import ast
import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pyvene_ext
from pyvene_ext.io.cli import run
from pyvene_ext.io.packages import EXTRAS
from pyvene_ext.runs.facts import metadata
from tests.tiny_random import random_model

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modelcards", "pyvene_ext")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = ("dev", "docs")  # extras that no module of the packages needs
NOT_OURS = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "*.egg-info",
    "build",
    "_build",
    "generated",
    "dist",
    "outputs",
    "shared",
)


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def build(what: str, tree: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone has, for builds leave folders behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "pyvene-ext", ignore=NOT_OURS))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


# -- what is in them ---------------------------------------------------------------------------------------------------


def test_the_wheel_holds_both_packages_whole_and_nothing_else(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {f"{package}/{name}" for package in PACKAGES for name in files(tree / package)}
    assert packed == there
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert {f"pyvene_ext/tiny/{name}/model.safetensors" for name in (*pyvene_ext.TINY_MODELS, "tiny-circuit")} <= packed


def test_the_metadata_say_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        said = email.message_from_string(archive.read(f"pyvene_ext-{PROJECT['version']}.dist-info/METADATA").decode())
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("pyvene-ext", PROJECT["version"], "MIT")
    assert said.get_all("License-File") == PROJECT["license-files"]
    assert said["Author"] == citation()["authors"][0]["name"]
    assert said["Requires-Python"] == ">=3.11" and said["Summary"] and said["Keywords"]
    assert "Typing :: Typed" in said.get_all("Classifier")
    assert said["Description-Content-Type"] == "text/markdown" and said.get_payload() == readme()
    assert set(said.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_the_source_archive_holds_everything_and_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    ours = {name for name in files(tree) if "egg-info/" not in name and not name.startswith("build/")}
    assert files(unpacked) >= ours - {".gitignore"}
    assert {name for name in files(unpacked) - ours if "egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}
    again = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted((file.filename, file.CRC) for file in one.infolist()) == sorted(
            (file.filename, file.CRC) for file in other.infolist()
        )


# -- installed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it, and for the rest the packages of this one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return home / "bin" / "python"


def away(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command far from the source tree."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_installed_wheel_works_where_no_extra_is(installed: Path, tmp_path: Path) -> None:
    absent = [*EXTRAS.values(), "pytest", "hypothesis"]
    without = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); runpy.run_path(sys.argv[1])"
    done = away([str(installed), "-c", without, str(ROOT / ".ci" / "first_use.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    place, number = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert Path(place).parent == installed.parents[1] / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    assert number == PROJECT["version"]


def test_a_script_of_a_user_sees_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from modelcards import n_layers\n"
        "from pyvene_ext import TINY_MODELS\n"
        "from pyvene_ext.engine.sweep import sweep\n"
        "reveal_type(n_layers)\n"
        "reveal_type(TINY_MODELS)\n"
        "number: int = sweep\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n"
        "[mypy-numpy.*,pydantic.*,pyvene.*,scipy.*,torch.*,transformers.*]\n"
        "follow_imports = skip\n"  # only to be quick
        "follow_imports_for_stubs = True\n"
    )
    checker = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", str(installed)]
    said = away([*checker, "--cache-dir", os.devnull, "mine.py"], tmp_path).stdout
    assert "py.typed" not in said and "Cannot find implementation" not in said
    assert re.search(r'mine.py:4: note: Revealed type is "def \(config: .*\) -> (builtins\.)?int"', said), said
    assert re.search(r'mine.py:5: note: Revealed type is "(builtins\.)?tuple\[(builtins\.)?str, ', said), said
    assert re.search(r"mine.py:6: error: Incompatible types in assignment", said), said
    assert said.splitlines()[-1].startswith("Found 1 error in 1 file"), said


# -- what it needs -----------------------------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports from elsewhere, and whether at once, when it is imported itself."""
    body = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(body):
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        ):
            if (top := name.split(".")[0]) not in sys.stdlib_module_names and top not in PACKAGES:
                yield {"yaml": "pyyaml"}.get(top, canonicalize_name(top)), node in body.body


def test_every_import_is_a_declared_dependency_and_no_other_is_declared() -> None:
    seen = {found for package in PACKAGES for path in (ROOT / package).rglob("*.py") for found in imports(path)}
    core = names(PROJECT["dependencies"])
    assert {name for name, _ in seen} == core | set(EXTRAS.values())
    assert {name for name, at_once in seen if at_once} <= core


def test_each_extra_brings_the_package_that_it_is_for() -> None:
    extras = {extra: names(asked) for extra, asked in PROJECT["optional-dependencies"].items()}
    dev = next(Requirement(text) for text in PROJECT["optional-dependencies"]["dev"] if text.startswith("pyvene-ext["))
    assert dev.extras >= set(EXTRAS)
    assert {extra: asked for extra, asked in extras.items() if extra not in FOR_DEVELOPERS} == {
        extra: {package} for extra, package in EXTRAS.items()
    }


STUDIES = {
    "translation_heads": "report",
    "critical_heads.run_all": "report",
    "critical_heads.attribute_inputs": "input-attribution",
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_whose_extra_is_not_there_says_so_and_writes_nothing(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = importlib.import_module(study)
    package = EXTRAS[STUDIES[study]]
    monkeypatch.setitem(sys.modules, package, None)
    assert run(module.main, module.Config, ["--out", str(tmp_path / "out")]) == 2
    sentence = f"error: {package} is not installed; pip install 'pyvene-ext[{STUDIES[study]}]' brings it.\n"
    assert capsys.readouterr() == ("", sentence)
    assert not list(tmp_path.iterdir())


def test_so_does_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = importlib.import_module("pyvene_ext.report.__main__")
    (tmp_path / "config.yaml").write_text("model: tiny-qwen2.5\n")
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert run(module.main, module.Config, [str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert capsys.readouterr().err == "error: plotly is not installed; pip install 'pyvene-ext[report]' brings it.\n"
    assert files(tmp_path) == {"config.yaml"}


# -- one version -------------------------------------------------------------------------------------------------------


def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_version_is_that_of_pyproject_wherever_it_is_said() -> None:
    assert pyvene_ext.__version__ == PROJECT["version"], "pyproject.toml has changed; install again: make"
    assert metadata(random_model("gpt2"))["versions"]["pyvene-ext"] == pyvene_ext.__version__
    assert citation()["version"] == PROJECT["version"]
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == PROJECT["version"]
    assert citation()["license"] == PROJECT["license"] and citation()["title"].endswith(PROJECT["description"][1:])


# -- licences ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", ROOT / ".ci" / "licences.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_of_licences_names_every_direct_dependency(licences: ModuleType) -> None:
    asked = [*PROJECT["dependencies"]]
    for extra, more in PROJECT["optional-dependencies"].items():
        asked += more if extra not in FOR_DEVELOPERS else []
    listed = dict(re.findall(r"^\| (\S+) \| .+ \| (.+) \|$", licences.FILE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name, needed in listed.items() if needed.startswith("pyvene-ext")} == names(asked)


def test_the_list_of_licences_is_what_the_metadata_say(licences: ModuleType) -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    known = {
        canonicalize_name(name): number for name, _, number in (line.partition("==") for line in pinned if "==" in line)
    }
    here = {name: version(name).split("+")[0] for name in licences.brought()}
    if others := {name: number for name, number in here.items() if known.get(name) != number}:
        pytest.skip(f"the list is of the versions of constraints.txt, and here are {others}")
    assert licences.FILE.read_text(encoding="utf-8") == licences.text(), "write it again: make licences"


@pytest.mark.parametrize("name", ["GPL-3.0-or-later", "MIT AND LGPL-2.1", "By permit"])
def test_a_licence_that_asks_for_more_than_a_notice_needs_a_word(
    name: str, licences: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert licences.explained("accelerate") is None
    named = dict.fromkeys(licences.brought(), name)
    monkeypatch.setattr(licences, "licences", lambda: named)
    with pytest.raises(ValueError, match=f"accelerate is under {name}; say in EXPLAINED"):
        licences.text()
