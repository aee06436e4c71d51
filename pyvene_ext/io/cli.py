"""The command line of every study: flags from one config class, and one sentence when something is wrong.

Nothing heavy is imported here, and a study imports nothing heavy before its flags are parsed, so that help and the answer to a
mistyped flag come within a second.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import gc
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import tyro
from typing_extensions import Doc

from pyvene_ext.io.bounds import check, complaints
from pyvene_ext.io.errors import one_sentence
from pyvene_ext.io.files import (
    read_yaml,
    write_yaml,
)
from pyvene_ext.io.packages import MissingExtra
from pyvene_ext.io.threads import spare_the_machine

Config = TypeVar("Config")
UNFINISHED: list[Path] = []
"""Folders from which the study that is running would resume, if they exist."""
CONFIG_FILES: list[Path] = []
"""The file of --config of the study that is running, if it was given."""


class TooLong(ValueError):
    """All of a study would take longer than a user who has not said how much of it to run is made to wait.

    Attributes:
        flag: the flag that says how much.
        fewer: a value with which it takes less; None if what that leaves would be of no use.
        also: further flags that must then be given, with their values.
    """

    def __init__(self, message: str, flag: str, fewer: int | None, also: Mapping[str, Any] = {}) -> None:
        super().__init__(message)
        self.flag, self.fewer, self.also = flag, fewer, dict(also)


CONFIG_HELP = (
    "--config FILE takes flags from a YAML file, such as the config.yaml of an earlier run; flags given beside it win."
)


def run(study: Callable[[Config], object], config: type[Config], args: Sequence[str] | None = None) -> int:
    """Parse flags into a `config` and call `study` with it: `sys.exit(run(main, Config))`.

    Flags may be written with underscores or dashes. `--help` shows the first line of the module's docstring, the flags by group
    (each base class of `config` is a group), and the rest of the docstring. Errors that users can fix (ValueError, OSError,
    MissingExtra) become one line on stderr and exit code 2, as for an unknown flag; any other exception is a bug and keeps its
    traceback. Before the study imports torch, `io.threads` chooses how many threads it takes.

    Args:
        study: called with the config, whose flags are within their bounds (`io.bounds.check`).
        config: a dataclass; its fields are the flags, described by their docstrings or by a `Doc` in their types.
        args: the command line without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code: what `study` returns if that is a number, else 0; 2 for an error; 130 for Ctrl-C, as in a shell.
    """
    UNFINISHED.clear()
    CONFIG_FILES.clear()
    title, _, manual = (inspect.getdoc(inspect.getmodule(study)) or "").partition("\n")
    try:
        flags, default = _from_file(config, list(sys.argv[1:] if args is None else args))
        try:
            given = _parsed(config, default, flags, f"{title}\n\n{CONFIG_HELP}")
        except SystemExit:
            if not {"-h", "--help"}.isdisjoint(flags):
                print(manual)
            raise
        check(given)
        spare_the_machine()
        outcome = run_shortened(study, given)
    except (ValueError, OSError, MissingExtra) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = next((folder for folder in UNFINISHED if _has_finished_work(folder)), None)
        resumes = "nothing was finished that could be kept, and the same command starts from the beginning"
        if kept is not None:
            resumes = f"what is finished is in {kept}, and the same command goes on from there"
        print(f"interrupted; {resumes}", file=sys.stderr)
        return 130
    return outcome if isinstance(outcome, int) else 0


def run_shortened(study: Callable[[Config], object], config: Config) -> object:
    """Call a study, and if it finds that it would take too long, once more with as little as it says (`RunFolder.announce`).

    Args:
        study: called with the config.
        config: the flags.

    Returns:
        What the study returns.

    Raises:
        TooLong: nothing useful can be done in the time.
    """
    try:
        return study(config)
    except TooLong as error:
        if error.fewer is None:
            raise
        fewer = {error.flag: error.fewer, **error.also}
    gc.collect()  # the model of the first call, which the error's traceback has held
    return study(dataclasses.replace(config, **fewer))  # type: ignore[type-var]


def _has_finished_work(folder: Path) -> bool:
    """Whether a folder of unfinished work has more in it than what its stores begin with."""
    names = (path.name for path in folder.rglob("*") if path.is_file())
    return any(name not in ("manifest.json", "lock", "owner") and not name.startswith(".") for name in names)


def config_from(config: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build a config from plain values, such as those of a YAML file.

    Args:
        config: a dataclass of flags.
        values: values by flag.
        source: what messages call the source of the values, such as the file's name.

    Returns:
        The config; bounds are checked for pydantic's own types of bounds only (`io.bounds.check` checks all).

    Raises:
        ValueError: an unknown flag, or a value of a wrong type.
    """
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{source} has an unknown flag {key!r}" + (f"; did you mean {close[0]!r}?" if close else ".")
            )
    try:
        return pydantic.TypeAdapter(config).validate_python(values)
    except pydantic.ValidationError as error:
        hints = typing.get_type_hints(config, include_extras=True)
        for name in (str(one["loc"][0]) for one in error.errors() if one["type"].startswith(BOUNDS) and one["loc"]):
            value = values[name]
            for complaint in complaints(name, tuple(value) if isinstance(value, list) else value, hints[name]):
                raise ValueError(f"{source}: {complaint}") from None
        raise ValueError(f"{source}: {one_sentence(error)}") from None


BOUNDS = (
    "greater_than",
    "less_than",
    "too_short",
    "finite_number",
)  # pydantic's errors for which `bounds` has a better message


def _from_file(config: type[Config], args: list[str]) -> tuple[list[str], Config | None]:
    """The flags without `--config FILE`, and the file's flags as a `config`; ValueError if it has others."""
    place = next((i for i, arg in enumerate(args) if arg.split("=")[0] == "--config"), None)
    if place is None:
        return args, None
    _, equals, name = args[place].partition("=")
    rest = args[place + (1 if equals else 2) :]
    if not equals:
        name = next(iter(args[place + 1 :]), "")
    values = read_yaml(name)
    CONFIG_FILES.append(Path(name))
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold one flag per line, as 'name: value'.")
    return args[:place] + rest, config_from(config, values, name)


def groups(config: type) -> dict[str, list[dataclasses.Field[Any]]]:
    """Group the flags of a config class by the base class that they come from.

    Args:
        config: a dataclass of flags.

    Returns:
        Fields by group, in the order of the bases, last its own as "study". Fields that a base declares itself come before those
        of its own bases (the model before how it is loaded).
    """
    bases = [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]
    found: dict[str, list[dataclasses.Field[Any]]] = {
        name: [] for name in (*(base.__name__.lower() for base in bases), "study")
    }
    for base in config.__mro__:  # a field belongs to the first base that has it, even if the study changes its default
        for field in dataclasses.fields(config):
            if field.name in vars(base).get("__annotations__", ()) and not any(
                field in some for some in found.values()
            ):
                owner = next((base for base in bases if field.name in base.__dataclass_fields__), None)
                found["study" if owner is None else owner.__name__.lower()].append(field)
    return {name: fields for name, fields in found.items() if fields}


def _parsed(config: type[Config], default: Config | None, args: list[str], description: str) -> Config:
    """Parse the command line."""
    kind: type = config
    _suggest_choices(_hints(kind), args)
    flags = _flags(kind) if default is None else _flags_with(kind, default)
    given = tyro.cli(flags, args=args, description=description, use_underscores=True)
    return config(**{name: value for part in vars(given).values() for name, value in vars(part).items()})


@cache
def _hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config, include_extras=True)


@cache
def _flags(config: type) -> Any:
    return _flags_with(config, None)


def _flags_with(config: type, default: Any) -> Any:
    """What tyro gets: since it shows nested dataclasses as groups, one for each group of fields."""
    hints = _hints(config)
    parts: list[tuple[str, Any, Any]] = []
    for group, fields in groups(config).items():
        entries: list[tuple[str, Any, Any]] = []
        for field in fields:
            hint, value = hints[field.name], field.default if default is None else getattr(default, field.name)
            # One model or two, published name or not: --model is what people type first.
            also: dict[str, Any] = (
                {"aliases": ("--model",)} if field.name in ("models", "model_name") and "model" not in hints else {}
            )
            shown = tyro.conf.arg(help=_help(config, field.name, hint), **also, **_without_none(hint, value))
            entries.append((field.name, Annotated[hint, shown], dataclasses.field(default=value)))
        part: Any = dataclasses.make_dataclass(group, entries, frozen=True)
        required = any(value.default is dataclasses.MISSING for *_, value in entries)
        whole = dataclasses.MISSING if required else part()
        # Without help, tyro would look for it in the source of a class that has none, which takes most of the time.
        one: Any = dataclasses.field(default=whole, metadata={"help": ""})
        parts.append((group, Annotated[part, tyro.conf.OmitArgPrefixes], one))
    parts.sort(key=lambda part: part[2].default is not dataclasses.MISSING)  # as dataclasses want it
    return dataclasses.make_dataclass("flags", parts, frozen=True)


def _suggest_choices(hints: Mapping[str, Any], args: Sequence[str]) -> None:
    """Raise ValueError for a value that is close to one of its flag's choices; tyro lists the choices for the others."""
    flag = ""
    for arg in args:
        name, equals, value = arg.partition("=") if arg.startswith("--") else ("", "=", arg)
        flag = name.removeprefix("--").replace("-", "_") or flag
        choices = _choices(hints.get(flag)) if equals else []
        if choices and value not in choices and (close := difflib.get_close_matches(value, choices, n=1)):
            raise ValueError(f"--{flag} cannot be {value!r}; did you mean {close[0]!r}?")


def _choices(hint: Any) -> list[str]:
    """The values that a type allows; none if it is not made of `Literal` alone."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return [str(value) for value in args]
    inner = [arg for arg in (args[:1] if origin is Annotated else args) if arg not in (Ellipsis, types.NoneType)]
    found = [_choices(arg) for arg in inner]
    return [value for values in found for value in values] if all(found) else []


def _without_none(hint: Any, value: Any) -> dict[str, Any]:
    """How help shows a flag that is None by default: its description says what happens then, so "default: None" is omitted."""
    if value is not None:
        return {}
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    inner = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    while typing.get_origin(inner[0]) is Annotated:
        inner = [typing.get_args(inner[0])[0]]
    simple = len(inner) == 1 and isinstance(inner[0], type)
    return {"help_behavior_hint": ""} | ({"metavar": inner[0].__name__.upper()} if simple else {})


def _help(config: type, name: str, hint: Any) -> str:
    """A flag's description: its docstring in the class that declares it or the next base, else the `Doc` in its type."""
    for base in config.__mro__:
        if words := _docstrings(base).get(name):
            return words
    return next((bound.documentation for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, Doc)), "")


@cache
def _docstrings(config: type) -> dict[str, str]:
    """The docstrings below a dataclass's fields."""
    if not dataclasses.is_dataclass(config):
        return {}
    try:
        (whole,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    except (OSError, TypeError):  # a class without a file
        return {}
    assert isinstance(whole, ast.ClassDef)
    return {name: inspect.cleandoc(words) for name, words in _fields_with_text(whole.body)}


def _fields_with_text(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(body):
        match field, text:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as words))):
                yield name, words


def _one_line(error: ValueError | OSError | MissingExtra) -> str:
    if isinstance(error, pydantic.ValidationError):
        return one_sentence(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split()) or type(error).__name__


def write_config(path: str | Path, config: Any) -> None:
    """Write a dataclass of flags as the YAML file that `--config` reads, group by group.

    Args:
        path: the file.
        config: an instance of a dataclass of flags.
    """
    write_yaml(path, plain_config(config))


def plain_config(config: Any) -> dict[str, Any]:
    """A dataclass of flags as values that YAML can write, by flag and group by group.

    Args:
        config: an instance of a dataclass of flags.

    Returns:
        The values.
    """
    fields = [field.name for fields in groups(type(config)).values() for field in fields]
    return {name: _plain(getattr(config, name)) for name in fields}


def _plain(value: Any) -> Any:
    """Convert a flag's value to one that YAML can write."""
    return str(value) if isinstance(value, Path) else value
