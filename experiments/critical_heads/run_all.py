"""Are the heads that look critical needed? Every study of this folder for two models, and one report with both side by side.

    python experiments/critical_heads/run_all.py
    python experiments/critical_heads/run_all.py --limit 100 --only rank_heads ablate_heads
    python experiments/critical_heads/run_all.py --models Qwen/Qwen2.5-1.5B-Instruct meta-llama/Llama-3.2-1B-Instruct \
        --problems gsm8k --max_new_tokens 320 --limit 300 --settings gsm8k.yaml

Method. Each study runs with the flags given here, on both models, and says in its own file what it does and how to read it. The
heads of all of them are those that rank_heads.py finds (--by; for attribute_inputs, which asks why a head looks at the hub, those
of the hub score). transplant_head.py takes each model as the host of the other's heads. --settings is a YAML file with flags of
single studies, such as

    ablate_heads: {n_heads: [1, 2, 5, 10, 20], kind: [zero, mean]}
    patch_hub: {sites: [kv], seeds: 10}

A study that cannot be done with these models and problems says why, and the others go on.

Written to the folder OUT: a folder for each study, with its tables and figures; report.html, all of them on one page;
verdicts.csv (study, verdict); config.yaml (running it again gives the same); and summary.json, what was run. A run that was
interrupted goes on with the study in which it was.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic

from pyvene_ext.io.cli import run as run_study
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.errors import one_sentence
from pyvene_ext.io.files import (
    parse_json,
    read_yaml,
    remove_leftovers,
    write_csv,
    write_json,
)
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.io.packages import need
from pyvene_ext.methods.reasoning.block_scores import Score
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.report import write_report

# Also as a script, this folder's files import one another as what they are: modules of the package critical_heads.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from critical_heads import setting as common

Study = Literal[
    "rank_heads",
    "ablate_heads",
    "patch_hub",
    "force_attention",
    "transplant_head",
    "probe_layers",
    "attribute_inputs",
    "stratify_difficulty",
]


@dataclass(frozen=True)
class Config(common.Flags):
    models: tuple[str, ...] = ("tiny-qwen2.5", "tiny-llama3.1")
    """two of: a shipped tiny model, a folder, a name on the hub"""
    only: tuple[Study, ...] = get_args(Study)
    """which studies; rank_heads runs whenever one needs its rankings"""
    by: Score = "flow"
    """which score ranks the heads"""
    settings: Path | None = None
    """a YAML file with flags of single studies"""


@dataclass(frozen=True)
class Part:
    """One study with its flags, and the folder it writes."""

    study: Study
    flags: Any

    @property
    def folder(self) -> Path:
        return Path(self.flags.out)

    def run(self) -> None:
        import_module(f"critical_heads.{self.study}").main(self.flags)


def main(config: Config) -> None:
    # What is run, and with which flags; what is wrong with them is said before anything runs.
    check_flags(config)
    folder = common.folder_of(config, "all")
    problems = common.find_problems(config)
    parts = planned(config, folder)
    done_file = folder / "unfinished.json"
    facts = data_hash([[part.study, _plain(part.flags)] for part in parts] + [one.model_dump() for one in problems])
    done = done_before(done_file, facts)

    # One study after the other.
    failed: dict[str, str] = {}
    for number, part in enumerate(parts):
        print(f"\n=== {part.folder.name} ({number + 1} of {len(parts)})", flush=True)
        if part.folder.name in done:
            print("done before the interruption")
            continue
        try:
            part.run()
        except (ValueError, OSError) as error:
            failed[part.folder.name] = " ".join(str(error).split())
            print(f"not done: {failed[part.folder.name]}", file=sys.stderr)
            continue
        done.add(part.folder.name)
        if is_main_process():
            write_json(done_file, {"facts": facts, "done": sorted(done)})
    if not is_main_process():
        return
    if not done:
        raise ValueError("no study could be done; each said why above.")

    # The files. The summary comes last: where it is, the rest is, and of this run.
    (folder / "summary.json").unlink(missing_ok=True)
    finished = [part.folder for part in parts if part.folder.name in done]
    verdicts = [
        {"study": part.name, "verdict": verdict}
        for part in finished
        for verdict in json.loads((part / "summary.json").read_text(encoding="utf-8")).get("verdicts", ())
    ]
    names = " and ".join(Path(name).name for name in config.models)
    write_report(finished, folder / "report.html", f"Critical heads in reasoning: {names}")
    write_csv(folder / "verdicts.csv", verdicts or [{"study": "", "verdict": ""}])
    write_config(folder / "config.yaml", config)
    write_json(folder / "summary.json", {"done": [part.name for part in finished], "failed": failed})
    remove_leftovers(*folder.glob("*"))
    done_file.unlink()

    print("\n=== verdicts")
    for row in verdicts:
        print(f"{row['study']}: {row['verdict']}")
    for study, why in failed.items():
        print(f"{study}: not done: {why}")
    print(f"\nwritten:\n  {folder / 'report.html'}\n  {folder}/ (a folder each study, verdicts, config, summary)")


def done_before(path: Path, facts: str) -> set[str]:
    """The studies that an interrupted run has done; none if it was another one, or its file is damaged."""
    try:
        kept = parse_json(path.read_bytes())
        done = set(map(str, kept["done"])) if kept["facts"] == facts else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in done if (path.parent / name / "summary.json").exists()}


def check_flags(config: Config) -> None:
    """Raise ValueError for flags that make no sense; MissingExtra without plotly."""
    need("report")
    common.check_flags(config)
    if len(config.models) != 2:
        raise ValueError(f"--models names two models, which are compared, not {len(config.models)}.")
    if not config.only or len(set(config.only)) < len(config.only):
        raise ValueError("--only names one or more studies, each once.")


def planned(config: Config, folder: Path) -> list[Part]:
    """Every study with its flags; ValueError for flags that a study does not know or take."""
    settings = read_settings(config.settings)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(common.Flags)}
    parts = []
    for study in get_args(Study):
        if study not in config.only and not (study == "rank_heads" and set(config.only) - RANKS_NOTHING):
            continue
        own = settings.get(study, {})
        # A study on each model as a host, or one on both.
        hosts = config.models if study == "transplant_head" else (None,)
        for host in hosts:
            out = folder / (study if host is None else f"{study}_{Path(host).name}")
            heads = ranked(config, study, folder, host)
            for named, ranking in (("heads", "rankings"), ("donor_heads", "donor_ranking")):
                if named in own:
                    heads.pop(ranking, None)
            parts.append(Part(study, made(study, shared | heads | {"out": out} | own)))
    return parts


RANKS_NOTHING = {"rank_heads", "patch_hub", "force_attention", "probe_layers"}


def ranked(config: Config, study: Study, folder: Path, host: str | None = None) -> dict[str, Any]:
    """The flags by which a study takes its models and heads."""
    score = "hub" if study == "attribute_inputs" else config.by
    rankings = {name: str(folder / "rank_heads" / "heads" / f"{Path(name).name}_{score}.csv") for name in config.models}
    if host is not None:
        donor = next(name for name in config.models if name != host)
        return {"models": (host,), "donor": donor, "rankings": (rankings[host],), "donor_ranking": rankings[donor]}
    return {} if study in RANKS_NOTHING else {"rankings": tuple(rankings.values())}


def read_settings(path: Path | None) -> dict[str, dict[str, Any]]:
    """Flags of single studies; ValueError for a file that holds something else."""
    if path is None:
        return {}
    values = read_yaml(path)
    known = get_args(Study)
    if not isinstance(values, dict) or not all(name in known and isinstance(v, dict) for name, v in values.items()):
        raise ValueError(
            f"{path} must hold flags by study, as 'ablate_heads: {{n_heads: [1, 2]}}'; there are {', '.join(known)}."
        )
    return values


def made(study: Study, values: dict[str, Any]) -> Any:
    """A study's flags; ValueError for one that it does not have or that is wrong."""
    flags = import_module(f"critical_heads.{study}").Config
    known = {field.name for field in dataclasses.fields(flags)}
    if unknown := values.keys() - known:
        raise ValueError(f"--settings: {study} has no flag {sorted(unknown)[0]!r}; its --help lists them.")
    try:
        made = pydantic.TypeAdapter(flags).validate_python(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"--settings: {study}: {one_sentence(error)}") from None
    getattr(import_module(f"critical_heads.{study}"), "check_flags", common.check_flags)(made)
    return made


def _plain(flags: Any) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(flags).items()}


if __name__ == "__main__":
    sys.exit(run_study(main, Config))
