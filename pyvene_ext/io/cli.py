"""The command line of every experiment: flags from one config class, and one sentence when something is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tyro

from pyvene_ext.io.errors import one_sentence
from pyvene_ext.io.files import (
    read_yaml,
    write_yaml,
)
from pyvene_ext.io.packages import MissingExtra

Config = TypeVar("Config")

CONFIG_HELP = (
    "--config FILE takes flags from a YAML file, such as the config.yaml of an earlier run; flags given beside it win."
)


def run(study: Callable[[Config], object], config: type[Config], args: Sequence[str] | None = None) -> int:
    """Read the flags into a `config`, call `study` with it, and return the exit code: `sys.exit(run(main, Config))`.

    The exit code is what `study` returns if that is a number, else 0. Flags may be written with underscores or dashes. `--help`
    opens with the docstring of the study's module. What users can mend (ValueError, OSError, MissingExtra) becomes one line on
    stderr and exit code 2, as for an unknown flag; any other exception is a defect of ours and keeps its traceback. Ctrl-C gives
    130, as in a shell.

    Args:
        study: called with the config.
        config: a dataclass; its fields are the flags.
        args: the command line without the program's name; `sys.argv[1:]` by default.
    """
    try:
        flags, default = _from_file(config, list(sys.argv[1:] if args is None else args))
        description = f"{inspect.getdoc(inspect.getmodule(study)) or ''}\n\n{CONFIG_HELP}"
        options: dict[str, Any] = {} if default is None else {"default": default}
        outcome = study(tyro.cli(config, args=flags, description=description, use_underscores=True, **options))
    except (ValueError, OSError, MissingExtra) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return outcome if isinstance(outcome, int) else 0


def _from_file(config: type[Config], args: list[str]) -> tuple[list[str], Config | None]:
    """The flags without `--config FILE`, and what the file says as a `config`; ValueError if it says something else."""
    place = next((i for i, arg in enumerate(args) if arg.split("=")[0] == "--config"), None)
    if place is None:
        return args, None
    _, equals, name = args[place].partition("=")
    rest = args[place + (1 if equals else 2) :]
    if not equals:
        name = next(iter(args[place + 1 :]), "")
    values = read_yaml(name)
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold one flag a line, as 'name: value'.")
    known = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{name} has an unknown flag {key!r}" + (f"; did you mean {close[0]!r}?" if close else ".")
            )
    try:
        return args[:place] + rest, pydantic.TypeAdapter(config).validate_python(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"{name}: {one_sentence(error)}") from None


def _one_line(error: ValueError | OSError | MissingExtra) -> str:
    if isinstance(error, pydantic.ValidationError):
        return one_sentence(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split()) or type(error).__name__


def write_config(path: str | Path, config: Any) -> None:
    """Write a dataclass of flags as the YAML that `--config` reads."""
    values = dataclasses.asdict(config)
    write_yaml(path, {name: str(value) if isinstance(value, Path) else value for name, value in values.items()})
