"""Write THIRD_PARTY_LICENSES.md from the metadata of what is installed: `make licences`.

Every package that `pip install 'pyvene-ext[report,input-attribution,gguf]'` brings, with the licence that its metadata name. A
licence that asks more than to keep a notice stops it until `EXPLAINED` has a word on it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = Path(__file__).resolve().parents[1] / "THIRD_PARTY_LICENSES.md"
US = "pyvene-ext"
EXTRAS = ("report", "input-attribution", "gguf")
PERMISSIVE = re.compile(r"\b(Apache|MIT|0?BSD|BSL-1\.0|ISC|PSF|Python Software Foundation|CNRI-Python|Zlib|CC0)\b")
EXPLAINED = {
    "tqdm": "MPL-2.0 binds changes to tqdm's own files, and these are not changed or distributed here.",
    "certifi": "MPL-2.0 binds changes to certifi's own files, and these are not changed or distributed here.",
}

# The text is wrapped where it is read, in Markdown.
HEAD = """# Licences

pyvene-ext is under the [MIT licence](LICENSE). Its wheel and source archive hold its own code and data and nothing of the
packages below, which pip fetches from their authors, with one exception: the patches in `modelcards/export/patches/` quote the
lines of [pyvene](https://github.com/stanfordnlp/pyvene) (the Stanford NLP Group; Apache License 2.0, `LICENSE` beside them) that
they change. A page written by `pyvene_ext.report` contains plotly.js (MIT).

## Data that ships

All of it is MIT, like the code:

* `pyvene_ext/tiny/` (weights, tokenizers, losses) was trained here by `experiments/tiny/train_tiny_models.py`, on text that
  `pyvene_ext/prompts/tiny_tasks.py` makes, and by `experiments/tiny/train_tiny_circuit.py`, on its own; no weight, tokenizer or
  text of others went into it;
* `pyvene_ext/prompts/data/` was made by `experiments/make_prompts.py` from its own templates and word lists;
* `pyvene_ext/methods/heads/known_heads.json` lists numbers of heads as published, which are facts.

Models, tokenizers and data sets that you name on a hub are fetched when a study runs, and come under their own licences.

## Packages

What `pip install 'pyvene-ext[report,input-attribution,gguf]'` brings with the versions of `constraints.txt` (Linux, Python 3.11,
torch for CPUs), and the licence that the metadata of each name. `make licences` writes this file again.
"""
FOOT = """
## What asks for more than a notice

{explained}
* Wheels of numpy and scipy contain libgfortran (GPL 3 with the GCC runtime library exception) and libquadmath (LGPL 2.1), those
  of torch libgomp (GPL 3 with the same exception). Who passes on these wheels does so on those terms; programs that use them are
  free of them.
* Wheels of torch for GPUs, which pip takes on Linux unless told otherwise, bring NVIDIA's libraries (`nvidia-*`), which are
  proprietary: NVIDIA's licences allow their use, and let them be passed on under conditions only. With them come
  cuda-bindings and cuda-pathfinder (Apache-2.0) and triton (MIT). None of them is distributed here, and torch for CPUs does
  without.

All of these may be used by MIT-licensed code that does not contain them.
"""


def direct() -> dict[str, str]:
    """What pyproject.toml asks for, by name, and with which extra: `pyvene-ext[report]`."""
    asked: dict[str, str] = {}
    for extra in ("", *EXTRAS):
        for name in _wanted(US, {extra}):
            asked.setdefault(name, f"{US}[{extra}]" if extra else US)
    return asked


def brought() -> dict[str, set[str]]:
    """All that comes with it, by name, and which packages ask for it."""
    askers: dict[str, set[str]] = {}
    todo = [(US, frozenset({"", *EXTRAS}))]
    done = set(todo)
    while todo:
        asker, extras = todo.pop()
        for name, more in _wanted(asker, extras).items():
            askers.setdefault(name, set()).add(asker)
            if (one := (name, frozenset({"", *more}))) not in done:
                done.add(one)
                todo.append(one)
    return askers


def _wanted(package: str, extras: set[str] | frozenset[str]) -> dict[str, set[str]]:
    """What a package requires here with these extras of its own ("" for none), and with which of theirs."""
    wanted: dict[str, set[str]] = {}
    for text in requires(package) or []:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            wanted.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    return wanted


@cache
def licences() -> dict[str, str]:
    """The licence of each package that is installed, as pip-licenses finds it in the metadata."""
    command = [sys.executable, "-m", "piplicenses", "--with-system", "--format=json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {canonicalize_name(package["Name"]): package["License"] for package in listed}


def explained(package: str) -> str | None:
    """The word on a package whose licence asks for more than a notice; ValueError if there is none."""
    licence = licences()[package]
    if all(PERMISSIVE.search(part) for part in re.split(r" (?:AND|and) |; ", licence)):
        return None
    if package not in EXPLAINED:
        raise ValueError(f"{package} is under {licence}; say in EXPLAINED what that means for whoever uses it.")
    return EXPLAINED[package]


def text() -> str:
    """The whole file."""
    asked, askers = direct(), brought()
    rows = ["| package | licence | needed by |", "|---|---|---|"]
    for package in sorted(askers):
        rows.append(
            f"| {package} | {licences()[package]} | {asked.get(package) or ', '.join(sorted(askers[package]))} |"
        )
    words = "\n".join(f"* {package}: {words}" for package in sorted(askers) if (words := explained(package)))
    return HEAD + "\n" + "\n".join(rows) + "\n" + FOOT.format(explained=words)


if __name__ == "__main__":
    try:
        FILE.write_text(text(), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"error: {error}")
