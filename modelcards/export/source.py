"""A file of a checkout, changed line by line at places that are found by what stands there, not by its text."""

from __future__ import annotations

import ast
import itertools

from modelcards.template import Mapping

WIDTHS = "type_to_dimension_mapping"


class Source:
    """A Python file and the edits to be made in it, so that what they do not touch stays as it is, to the letter.

    Args:
        path: for messages.
        text: the file's.

    Raises:
        ValueError: if it is no Python, here; if an edit finds another form than pyvene's, in the methods.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path, self.lines = path, text.splitlines(keepends=True)
        try:
            self.tree = ast.parse(text)
        except SyntaxError as error:
            raise self.unknown(f"line {error.lineno} is no Python") from None
        self._edits: list[tuple[int, int, str]] = []  # lines [start, end) and what replaces them

    def unknown(self, what: str) -> ValueError:
        """The error for a file that cannot be edited."""
        return ValueError(f"{self.path} of the checkout has another form than pyvene's: {what}.")

    @property
    def star_imports(self) -> dict[str, int]:
        """Modules that the file imports everything of, relative to its package, and the lines that do."""
        imports = (node for node in self.tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*")
        return {node.module or "": node.lineno for node in imports}

    @property
    def assigned(self) -> dict[str, ast.expr]:
        """Names bound at module level, and to what."""
        return {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    @property
    def first_function(self) -> int:
        """The line before the first function, or the last."""
        functions = (node.lineno - 1 for node in self.tree.body if isinstance(node, ast.FunctionDef))
        return next(functions, len(self.lines))

    def last_line_of(self, name: str) -> int:
        """The last line of the last statement that uses a name."""
        using = (
            node for node in self.tree.body if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
        )
        return [node.end_lineno or 0 for node in using][-1]

    def dictionary(self, name: str) -> ast.Dict | None:
        """The dictionary literal that a name is bound to."""
        value = self.assigned.get(name)
        return value if isinstance(value, ast.Dict) else None

    def entries(self, name: str) -> dict[str, tuple[int, int, str]]:
        """Entries of a dictionary literal: key -> first line, line after the last, normalised value."""
        found = self.dictionary(name)
        if found is None:
            raise self.unknown(f"{name} should be a dictionary")
        entries, end = {}, found.lineno
        for key, value in zip(found.keys, found.values, strict=True):
            if key is None or key.lineno <= end:
                raise self.unknown(f"line {value.lineno} should hold one entry")
            end = value.end_lineno or 0
            text = str(key.value) if isinstance(key, ast.Constant) else ast.unparse(key)
            entries[text] = (key.lineno - 1, end, ast.unparse(value))
        return entries

    @property
    def widths_name(self) -> str:
        """What the family's dimension mapping is called, that of its bare class."""
        return next(name for name in self.assigned if name.endswith(WIDTHS))

    @property
    def widths(self) -> Mapping:
        """That mapping."""
        return {key: ast.literal_eval(value) for key, (_, _, value) in self.entries(self.widths_name).items()}

    def function(self, name: str) -> ast.FunctionDef:
        """A function by its dotted name, within classes and other functions."""
        nodes: list[ast.stmt] = self.tree.body
        found: ast.stmt | None = None
        for part in name.split("."):
            inside = (node for top in nodes for node in ast.walk(top))
            kinds = ast.FunctionDef | ast.ClassDef
            found = next((node for node in inside if isinstance(node, kinds) and node.name == part), None)
            nodes = found.body if isinstance(found, kinds) else []
        if not isinstance(found, ast.FunctionDef):
            raise self.unknown(f"it has no function {name}")
        return found

    def change_default(self, function: str, argument: str, old: frozenset[str], new: str) -> str | None:
        """Give an argument of a function another default, if it has one of `old`; return that."""
        arguments = self.function(function).args
        defaults = dict(zip((one.arg for one in reversed(arguments.args)), reversed(arguments.defaults), strict=False))
        found = defaults.get(argument)
        if not isinstance(found, ast.Constant) or found.value not in old:
            return None
        line = self.lines[found.lineno - 1].encode("utf-8")
        changed = line[: found.col_offset] + f'"{new}"'.encode() + line[found.end_col_offset :]
        self.replace(found.lineno - 1, found.lineno, changed.decode("utf-8"))
        return str(found.value)

    def indent(self, node: ast.stmt) -> str:
        """The white space before a statement."""
        return self.lines[node.lineno - 1][: node.col_offset]

    def comments_above(self, node: ast.stmt) -> int:
        """How many lines of comments stand right above a statement."""
        above = reversed(self.lines[: node.lineno - 1])
        return sum(1 for _ in itertools.takewhile(lambda line: line.lstrip().startswith("#"), above))

    def fill(self, name: str, entries: dict[str, str], without: list[str] | None = None) -> None:
        """Make a dictionary literal hold entries, beside its others; new ones go after the last of their kind.

        Args:
            name: of the dictionary.
            entries: keys (strings, or dotted names of classes) and values, as text.
            without: keys to be removed.
        """
        there = self.entries(name)
        for key, (start, end, value) in there.items():
            if key in (without or ()):
                self._edits.append((start, end, ""))
            elif key in entries and value != ast.unparse(ast.parse(entries[key], mode="eval")):
                self._edits.append((start, end, _line(key, entries[key])))
        opening = self.dictionary(name)
        for key, text in entries.items():
            if key in there:
                continue
            same = [end for other, (_, end, _) in there.items() if other.rpartition(".")[0] == key.rpartition(".")[0]]
            last = (same or [end for _, end, _ in there.values()] or [opening.lineno if opening else 0])[-1]
            if there and not self.lines[last - 1].split("#")[0].rstrip().endswith(","):
                raise self.unknown(f"line {last} has no comma")
            self.insert(last, _line(key, text))

    def replace(self, start: int, end: int, text: str) -> None:
        """Put text in the place of the lines [start, end)."""
        self._edits.append((start, end, text))

    def insert(self, line: int, text: str) -> None:
        """Insert text after a line."""
        if line == len(self.lines) and line and not self.lines[-1].endswith("\n"):
            text = f"\n{text}"
        self._edits.append((line, line, text))

    def edited(self) -> str:
        """The file with all edits."""
        lines = list(self.lines)
        # From the end, so that the lines before keep their numbers; at one line what is inserted last is put there first.
        for start, end, text in sorted(reversed(self._edits), key=lambda edit: (-edit[0], edit[0] == edit[1])):
            lines[start:end] = [text]
        return "".join(lines)


def _line(key: str, text: str) -> str:
    return f"    {key}: {text},\n" if "." in key else f'    "{key}": {text},\n'
