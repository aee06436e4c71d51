"""Sphinx's configuration: `make docs` builds the pages and runs the tutorial; a warning is an error."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import pydoc
import re
import sys
from collections.abc import Collection
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import modelcards

sys.path.insert(0, str(Path(__file__).parent))
from reference import PACKAGES, list_of_pages, public_names, written_pages

HERE = Path(__file__).parent
FAMILIES = [card.family for card in modelcards.CARDS]
PUBLIC = {name.home: name.path for name in public_names()}
HOMES = {name.path: name.home for name in public_names()}
KNOWN = {path: path for path in HOMES} | PUBLIC  # any path of a public name, and its public one
MODULES = {name.module for name in public_names()}  # their docstrings stand in the reference

project = "pyvene-ext"
author = "pyvene-ext contributors"
release = version = importlib.metadata.version(project)

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "figures", "generated/api/pages.md"]
html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]

autosummary_generate = False  # reference.py writes the pages; autosummary draws their tables
autodoc_default_options = {"member-order": "bysource", "exclude-members": "model_config"}
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_param = False  # otherwise "base, source" would be read as a name and its type
napoleon_custom_sections = [("Attributes", "params_style")]  # their types stand in the signature
maximum_signature_line_length = 88
nitpicky = True
suppress_warnings = [
    "ref.python",  # attributes of one name in several classes
    "myst-nb.lexer",  # of notebooks that are not run, as `make docs NOTEBOOKS=off` has it
]
# What other projects define (no inventory is fetched).
nitpick_ignore_regex = [("py:.*", r"(?!pyvene_ext\.|modelcards\.).*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_show_tb = True  # and the warning is an error
nb_output_stderr = "remove"
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of the tutorial's process


# List bullets and *emphasis*, which are kept, and other stars, bars, at signs and trailing underscores,
# which are escaped.
MARKUP = re.compile(r"^ *\* |(?<!\w)\*\w[^*\n]*\w\*(?!\w)|[*|@]|(?<=\w)_(?!\w)", re.MULTILINE)


def write_pages() -> None:
    """One page per family, its README, and one a room of the reference."""
    pages = {f"api/{room}.rst": text for room, text in written_pages().items()} | {"api/pages.md": list_of_pages()}
    for family in FAMILIES:
        text = (HERE.parent / "modelcards" / family / "README.md").read_text(encoding="utf-8")
        # Links from card to card.
        pages[f"cards/{family}.md"] = re.sub(r"\(\.\./(\w+)/README\.md\)", r"(\1.md)", text)
    for name, text in pages.items():
        path = HERE / "generated" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # otherwise Sphinx reads it again
            path.write_text(text, encoding="utf-8")


def as_restructured_text(_app: Sphinx, what: str, name: str, described: Any, _options: Any, lines: list[str]) -> None:
    """Convert our docstrings, plain text with `code` and indented examples, to reStructuredText."""
    kinds: list[
        bool
    ] = []  # whether each line is part of an example: indented, after a blank line that follows unindented text
    above = ""
    for number, line in enumerate(lines):
        begins = line.startswith("    ") and number > 0 and not lines[number - 1].strip() and not above.startswith(" ")
        kinds.append(begins or (kinds[-1] if kinds and not line[:1].strip() else False))
        above = line if line.strip() else above
    own = inspect.signature(described).parameters if inspect.isfunction(described) else ()
    written: list[str] = []
    for example, group in groupby(zip(kinds, lines, strict=True), key=itemgetter(0)):
        some = [line for _, line in group]
        written += ["::", "", *some] if example else prose("\n".join(some), name, own).split("\n")
    # Otherwise napoleon takes the text before a colon in a property's first line for its type.
    lines[:] = ["..", "", *written] if what in ("attribute", "property") else written


def prose(text: str, name: str, own: Collection[str]) -> str:
    """Turn backticked names of ours into links and other words, such as arguments, into code; escape all other markup."""
    parts = re.split(r"`([^`]+)`", text)
    for number, part in enumerate(parts):
        if number % 2:
            target = None if part in own else full_name(part, name)
            marked = f":py:obj:`{part} <{target}>`" if target else f"``{' '.join(part.split())}``"
            parts[number] = marked + ("\\ " if parts[number + 1][:1].isalnum() else "")
        else:
            parts[number] = MARKUP.sub(lambda found: found[0] if len(found[0]) > 1 else f"\\{found[0]}", part)
    return "".join(parts)


def skip_aliases(_app: Sphinx, _what: str, _name: str, member: Any, _skip: bool, _options: Any) -> bool | None:
    """Skip fields of named tuples, which the class's docstring describes."""
    return True if str(getattr(member, "__doc__", "")).startswith("Alias for field number") else None


def plain_types(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, signature: str, returns: str) -> Any:
    """Show the fields of pydantic models without their validators."""
    return signature and (re.sub(r"Annotated\[(\w+), (?:[^\[\]]|\[[^\[\]]*\])*\]", r"\1", signature), returns)


def full_name(word: str, scope: str) -> str | None:
    """The public name of the function, class or module that a docstring calls `word`; None if the reference has none."""
    if not re.fullmatch(r"[A-Za-z][\w.]*", word):
        return None
    parts = (renamed(scope, HOMES) or scope).split(".")
    for start in (*reversed([f"{outer}." for outer in accumulate(parts, "{}.{}".format)]), ""):
        try:
            found = pydoc.locate(start + word)
        except pydoc.ErrorDuringImport:
            continue
        if inspect.ismodule(found) and found.__name__ in MODULES:
            return found.__name__
        if found is None or inspect.ismodule(found):
            continue
        for candidate in (start + word, f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"):
            if public := renamed(candidate, KNOWN):
                return public if found.__doc__ else None
        if getattr(found, "__module__", None) != "builtins":
            return None
    # A name of ours that does not exist becomes a broken link, and so a warning.
    return word if re.match(r"(pyvene_ext|modelcards)\.", word) and pydoc.locate(word) is None else None


def renamed(path: str, names: Mapping[str, str]) -> str | None:
    """A path with another name for its innermost owner among `names`, or for itself; None if there is none."""
    owner, member = path, ""
    while owner:
        if owner in names:
            return names[owner] + member
        owner, _, last = owner.rpartition(".")
        member = f".{last}{member}"
    return None


def check_reference(_app: Sphinx, env: Any) -> None:
    """Warn of public names that the reference lacks; `make docs` turns that into an error."""
    for name in HOMES:
        if name not in env.domains.python_domain.objects:
            logging.getLogger(__name__).warning("the reference lacks %s", name)


def resolve_ours(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Lead a link by any path of a name, as type annotations have it, to its entry; internal names stay plain text."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith(tuple(f"{package}." for package in PACKAGES)):
        return None
    public = full_name(target, "")
    if public is None or public == target:
        return contnode if public is None and pydoc.locate(target) is not None else None
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, contnode)


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    write_pages()
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", plain_types)
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("env-check-consistency", check_reference)
    app.connect("missing-reference", resolve_ours)
