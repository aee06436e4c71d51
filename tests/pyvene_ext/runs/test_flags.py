"""Flags: bounds in types, checked in one sentence wherever they come from; groups in help; the groups that studies share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt

from pyvene_ext.io.bounds import Ascending, check
from pyvene_ext.io.cli import config_from, groups, run, write_config
from pyvene_ext.prompts.sets import PromptSet
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs import flags
from pyvene_ext.runs.reasoning import find_problems


@dataclass(frozen=True)
class Config(flags.Model, flags.Prompts, flags.Sweep):
    model: flags.ModelName = "tiny-gemma2"
    top: flags.Count = 5
    """how many heads are shown"""
    tau: Annotated[float, Ge(0)] = 0.1
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    width: Annotated[float, Gt(0), Le(1)] | None = None
    trim: Annotated[float, Ge(0), Lt(0.5)] | None = None
    sites: flags.OneOrMore[Literal["z", "q"]] = ("z",)
    heads: flags.EachOnce[flags.HeadLabel] = ()
    seeds: flags.OneOrMore[flags.Seed] = (0, 1)
    levels: Annotated[tuple[int, ...], Ascending()] = (1, 3)
    out: flags.Out = None

    def check_flags(self) -> None:
        if self.width is not None and self.trim is not None:
            raise ValueError("--width and --trim were both given; give one of the two.")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"top": 0}, "--top must be 1 or more, not 0."),
    ({"limit": -1}, "--limit must be 0 or more, not -1."),
    ({"seed": -1}, "--seed must be 0 or more, not -1."),
    ({"tau": -0.5}, "--tau must be 0 or more, not -0.5."),
    ({"tau": float("nan")}, "--tau must be 0 or more, not nan."),
    ({"tau": float("inf")}, "--tau must be 0 or more, not inf."),
    ({"share": 1.5}, "--share must be from 0 to 1, not 1.5."),
    ({"width": 0.0}, "--width must be above 0 and at most 1, not 0.0."),
    ({"trim": 0.5}, "--trim must be at least 0 and below 0.5, not 0.5."),
    ({"memory": 0.0}, "--memory must be above 0, in GiB, not 0.0."),
    ({"sites": ("z", "z")}, "--sites names one or more, each once, not z z."),
    ({"levels": (2, 1)}, "--levels takes ascending numbers, not 2 1."),
    ({"levels": (1, 1)}, "--levels takes ascending numbers, not 1 1."),
    ({"sites": ()}, "--sites names one or more, each once, not nothing."),
    ({"heads": ("0.1", "0.1")}, "--heads names each once, not 0.1 0.1."),
    ({"heads": ("1",)}, "--heads names heads as layer.head, such as 2.5, not '1'."),
    ({"seeds": (3, -1)}, "--seeds must be 0 or more, not -1."),
    ({"width": 0.5, "trim": 0.1}, "--width and --trim were both given; give one of the two."),
]


@pytest.mark.parametrize(
    ("values", "told"), WRONG, ids=[told.split()[0][2:] + str(n) for n, (_, told) in enumerate(WRONG)]
)
def test_a_flag_out_of_bounds_is_one_sentence_from_program_command_line_and_file(
    values: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as error:
        check(Config(**values))
    assert str(error.value) == told

    def study(config: Config) -> None:
        pytest.fail("it ran")

    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    assert run(study, Config, words) == 2
    assert capsys.readouterr().err == f"error: {told}\n"

    path = tmp_path / "flags.yaml"
    write_config(path, Config(**values))
    assert run(study, Config, ["--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_what_is_within_bounds_arrives_as_it_was_given() -> None:
    seen: list[Config] = []
    assert (
        run(seen.append, Config, ["--limit", "3", "--seeds", "4", "--heads", "0.1", "--no_compile", "--width", "1"])
        == 0
    )
    assert seen == [Config(limit=3, seeds=(4,), heads=("0.1",), width=1.0)] and seen[0].model == "tiny-gemma2"
    assert run(seen.append, Config, []) == 0 and seen[1] == Config()


def test_a_config_is_written_group_by_group_and_read_again(tmp_path: Path) -> None:
    config = Config(limit=3, memory=0.5, sites=("q", "z"), out=tmp_path)
    write_config(tmp_path / "config.yaml", config)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(values)[:6] == ["model", "seed", "device", "dtype", "revision", "dry_run"] and list(values)[-1] == "out"
    assert config_from(Config, values, "config.yaml") == config
    with pytest.raises(ValueError, match=r"config.yaml has an unknown flag 'limt'; did you mean 'limit'\?"):
        config_from(Config, {"limt": 3}, "config.yaml")


def test_help_is_one_line_the_flags_by_group_and_then_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(the_study, Config, ["--help"])
    assert not stopped.value.code
    shown = capsys.readouterr().out
    order = [shown.index(f"{group} options") for group in ("model", "prompts", "sweep", "study")]
    assert shown.index("bounds in types") < order[0] and order == sorted(order)
    assert "a shipped or fetched model, folder, GGUF file, or hub name" in shown and "tiny-gemma2" in shown
    assert "how many heads are shown" in shown and "default: None" not in shown and "{None}" not in shown


def the_study(config: Config) -> None:
    raise AssertionError(config)


def test_a_flag_belongs_to_the_first_base_that_has_it() -> None:
    found = {group: [field.name for field in fields] for group, fields in groups(Config).items()}
    assert list(found) == ["model", "prompts", "sweep", "study"]
    assert found["model"] == ["model", "seed", "device", "dtype", "revision", "dry_run"]
    assert found["prompts"] == ["answers", "dataset", "limit", "batch_size"]
    assert found["sweep"] == ["compile", "memory"] and found["study"][0] == "top"


def test_groups_load_what_they_name() -> None:
    config = Config(limit=4)
    prompts = config.load_prompts()
    assert prompts.prompts == PromptSet.load(PROMPTS / "ioi_en.json").prompts[:4]
    model, tokenizer = config.load_model()
    assert model.config.model_type == "gemma2"
    clean, corrupt = config.tokenize_pairs(prompts, model, tokenizer)
    assert clean.input_ids == config.tokenize(prompts, model, tokenizer).input_ids and len(corrupt) == 4
    assert Config(memory=0.5).memory_bytes == 2**29 and config.memory_bytes is None


def test_flags_import_nothing_heavy() -> None:
    heavy = {"torch", "pyvene", "transformers"}
    code = f"import sys, pyvene_ext as px; px.flags.Sweep; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_limit_of_0_takes_all_and_none_takes_the_usual_number() -> None:
    prompts = {limit: len(flags.Prompts(limit=limit).load_prompts()) for limit in (None, 0, 3)}
    assert prompts == {None: 100, 0: 100, 3: 3}
    problems = {limit: len(find_problems(flags.Problems(problems="plain", limit=limit))) for limit in (None, 0, 3)}
    assert problems[None] == 32 and problems[3] == 3 and problems[0] > 32
