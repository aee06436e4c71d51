"""Sphinx's configuration: `make docs` builds the pages and runs the tutorial; a warning is an error."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import pkgutil
import pydoc
import re
import shutil
from collections.abc import Iterator
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import modelcards
import pyvene_ext

HERE = Path(__file__).parent
FAMILIES = [card.family for card in modelcards.CARDS]

project = "pyvene-ext"
author = "pyvene-ext contributors"
release = version = importlib.metadata.version(project)

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "figures"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]

autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "ignore-module-all": True,
    "exclude-members": "model_config",
}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_param = False  # otherwise "base, source" would be read as a name and its type
napoleon_custom_sections = [("Attributes", "params_style")]  # their types stand in the signature
maximum_signature_line_length = 88
nitpicky = True
suppress_warnings = ["ref.python"]  # attributes of one name in several classes
# What other projects define (no inventory is fetched).
nitpick_ignore_regex = [("py:.*", r"(?!pyvene_ext\.|modelcards\.).*")]
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "pyvene_ext.io.cli.Config",
        "pyvene_ext.models.devices.T",
        "pyvene_ext.methods.solving.evaluate.K",
        "pyvene_ext.methods.solving.evaluate.S",
        "pyvene_ext.io.files.Model",
        "pyvene_ext.specs.base._token",
        "pyvene_ext.specs.base._tokens",
    )
]

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


def public_modules() -> Iterator[str]:
    """Every module that the reference must list; a family's modules hold its card, which has its own page."""
    for package in (pyvene_ext, modelcards):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            parts = module.name.split(".")
            if not any(part.startswith("_") for part in parts) and parts[1] not in FAMILIES:
                yield module.name


def write_card_pages() -> None:
    """One page a family: its README."""
    folder = HERE / "generated/cards"
    shutil.rmtree(HERE / "generated", ignore_errors=True)
    folder.mkdir(parents=True)
    for family in FAMILIES:
        text = (HERE.parent / "modelcards" / family / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\(\.\./(\w+)/README\.md\)", r"(\1.md)", text)  # links from card to card
        (folder / f"{family}.md").write_text(text, encoding="utf-8")


def as_restructured_text(_app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Convert our docstrings, plain text with `code` and indented examples, to reStructuredText."""
    kinds: list[
        bool
    ] = []  # whether each line is part of an example: indented, after a blank line that follows unindented text
    above = ""
    for number, line in enumerate(lines):
        begins = line.startswith("    ") and number > 0 and not lines[number - 1].strip() and not above.startswith(" ")
        kinds.append(begins or (kinds[-1] if kinds and not line[:1].strip() else False))
        above = line if line.strip() else above
    written: list[str] = []
    for example, group in groupby(zip(kinds, lines, strict=True), key=itemgetter(0)):
        some = [line for _, line in group]
        written += ["::", "", *some] if example else prose("\n".join(some), name).split("\n")
    # Otherwise napoleon takes the text before a colon in a property's first line for its type.
    lines[:] = ["..", "", *written] if what in ("attribute", "property") else written


def prose(text: str, name: str) -> str:
    """Turn backticked names of ours into links and other backticked words into code, and escape all other markup."""
    parts = re.split(r"`([^`]+)`", text)
    for number, part in enumerate(parts):
        if number % 2:
            target = full_name(part, name)
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
    """The full name of the function, class or module that a docstring calls `word`; None if it is not ours."""
    if not re.fullmatch(r"[A-Za-z][\w.]*", word):
        return None
    scopes = [f"{outer}." for outer in accumulate(scope.split("."), "{}.{}".format)]
    for start in (*reversed(scopes), ""):
        try:
            found = pydoc.locate(start + word)
        except pydoc.ErrorDuringImport:
            continue
        if inspect.ismodule(found):
            home = found.__name__
        else:
            home = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
        if home.startswith(("pyvene_ext", "modelcards")) and not re.search(r"\._|\.None$", home) and found.__doc__:
            return home
    # A name of ours that does not exist becomes a broken link, and so a warning.
    return word if re.match(r"(pyvene_ext|modelcards)\.", word) and pydoc.locate(word) is None else None


def check_reference(_app: Sphinx, env: Any) -> None:
    """Warn of public modules that the reference does not list; `make docs` turns that into an error."""
    there = env.domains.python_domain.modules
    for module in public_modules():
        if module not in there:
            logging.getLogger(__name__).warning("docs/api.md does not list the module %s", module)


def resolve_reexported(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Resolve a link to a re-exported name, such as `pyvene_ext.run`, to where it is defined."""
    target = full_name(node.get("reftarget", ""), "")
    if node.get("refdomain") != "py" or target in (None, node["reftarget"]):
        return None
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def setup(app: Sphinx) -> None:
    """Connect the functions above to Sphinx."""
    write_card_pages()
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", plain_types)
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("env-check-consistency", check_reference)
    app.connect("missing-reference", resolve_reexported)
