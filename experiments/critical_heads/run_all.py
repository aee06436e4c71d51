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

Before anything runs, each study says how long it takes, and the sum is said. Each keeps within ten minutes unless --limit is
given. Models are loaded once, if both fit into memory. Heads are transplanted only between models that cut the problems into the
same tokens. A study that cannot be done with these models and problems says why, and the others go on.

Written to the folder OUT: a folder for each study, with its tables and figures; report.html, all of them on one page;
verdicts.csv (study, verdict); config.yaml (running it again gives the same); and summary.json, what was run. A run that was
interrupted goes on with the study in which it was.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyvene_ext as px

if TYPE_CHECKING:
    from types import ModuleType

    from pyvene_ext.prompts.problems import Problem

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
STUDIES: tuple[Study, ...] = get_args(Study)
RANKS_NOTHING = {"rank_heads", "patch_hub", "force_attention", "probe_layers"}


@dataclass(frozen=True)
class Config(px.flags.Problems):
    models: px.flags.OneOrMore[str] = ("tiny-qwen2.5", "tiny-llama3.1")
    """two of: a shipped or fetched model, a folder, a GGUF file, a name on the hub"""
    only: px.flags.OneOrMore[Study] = STUDIES
    """which studies; rank_heads runs whenever one needs its rankings"""
    by: px.flags.Score = "flow"
    """which score ranks the heads"""
    settings: Path | None = None
    """a YAML file with flags of single studies"""

    def check_flags(self) -> None:
        px.io.need("report")
        super().check_flags()
        if len(self.models) != 2:
            raise ValueError(f"--models names two models, which are compared, not {len(self.models)}.")


@dataclass(frozen=True)
class Part:
    """One study with its flags, and the folder it writes."""

    study: Study
    flags: Any

    @property
    def folder(self) -> Path:
        return Path(self.flags.out)

    def run(self) -> None:
        px.io.run_shortened(module_of(self.study).main, self.flags)

    def plan(self) -> None:
        """Say what the study would do and how long it takes."""
        dry = {"dry_run": True, **{name: () for name in ("rankings",) if hasattr(self.flags, name)}}
        dry |= {"donor_ranking": None} if hasattr(self.flags, "donor_ranking") else {}
        module_of(self.study).main(dataclasses.replace(self.flags, **dry))


def main(config: Config) -> None:
    # Which studies run, and with which flags; what is wrong with them is said before anything runs.
    run = px.RunFolder(config, "critical_heads/all", config.source, *config.models)
    problems = px.reasoning.find_problems(config)
    parts = planned(config, run.path)
    done_file = run.path / "unfinished.json"
    facts = px.io.data_hash(
        [[part.study, plain(part.flags)] for part in parts] + [one.model_dump() for one in problems]
    )
    done = done_before(done_file, facts)

    # What cannot be done with these models is left out, and the rest says how long it takes.
    with px.runs.kept() as shared:
        transplants = [part.folder.name for part in parts if part.study == "transplant_head"]
        why = why_not_transplanted(config, problems) if transplants else ""
        failed = dict.fromkeys(transplants, why) if why else {}
        parts = [part for part in parts if part.folder.name not in failed]
        out = [f"left out: {', '.join(failed)}: {why}"] if failed else []
        print(f"{len(parts)} studies of {' and '.join(config.models)}", *out, sep="\n", flush=True)
        announce([part for part in parts if part.folder.name not in done], shared, config.dry_run)
        if config.dry_run:
            return

        # One study after the other.
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
            if px.is_main_process():
                px.io.write_json(done_file, {"facts": facts, "done": sorted(done)})
    if not px.is_main_process():
        return
    if not done:
        raise ValueError("no study could be done; each said why above.")

    # All verdicts and all pages side by side.
    finished = [part.folder for part in parts if part.folder.name in done]
    verdicts = [
        {"study": part.name, "verdict": verdict}
        for part in finished
        for verdict in json.loads((part / "summary.json").read_text(encoding="utf-8")).get("verdicts", ())
    ]

    print(summary(verdicts, failed, run.path / "report.html"))
    strong = [evidence for part in finished for evidence in evidence_in(part)]
    with run.writing({"done": [part.name for part in finished], "failed": failed}, strong):
        names = " and ".join(Path(name).name for name in config.models)
        px.report.write_report(finished, run.path / "report.html", f"Critical heads in reasoning: {names}")
        run.table("verdicts", verdicts or [{"study": "", "verdict": ""}])
    done_file.unlink()


# -- before anything runs ----------------------------------------------------------------------------------------------


def why_not_transplanted(config: Config, problems: Sequence[Problem]) -> str:
    """Why heads of one model cannot be put into the other, as they see other tokens; empty if they can."""
    one, other = (config.load(name)[1] for name in config.models)
    if one.get_vocab() == other.get_vocab():
        return ""
    try:
        px.methods.pair_texts([f"{problem.question}\n{problem.solution}" for problem in problems], one, other)
    except ValueError as error:
        return str(error)
    return ""


def announce(parts: Sequence[Part], shared: px.runs.Kept, in_full: bool) -> None:
    """Say how long each study takes, and all of them; `in_full` also what each does."""
    for number, part in enumerate(parts):
        if in_full:
            print(f"\n=== {part.folder.name} ({number + 1} of {len(parts)})", flush=True)
        before, why = len(shared.seconds), ""
        with nullcontext() if in_full else redirect_stdout(io.StringIO()):
            try:
                part.plan()
            except (ValueError, OSError) as error:
                why = " ".join(str(error).split())
        taken = [seconds for seconds in shared.seconds[before:] if seconds is not None]
        if why and in_full:
            print(f"not done: {why}", file=sys.stderr)
        elif taken and not in_full:
            print(f"{part.folder.name}: {px.runs.duration(sum(taken)) if sum(taken) else 'too long, and not done'}")
    known = [seconds for seconds in shared.seconds if seconds is not None]
    if known:
        quick = ", without those that are quick" if len(known) < len(shared.seconds) else ""
        print(f"\nall together: at most {px.runs.duration(sum(known))}{quick}", flush=True)


def evidence_in(part: Path) -> list[px.runs.Evidence]:
    """How strong the evidence of one study is, as its summary has it."""
    found = []
    for kept in json.loads((part / "summary.json").read_text(encoding="utf-8")).get("evidence", ()):
        ends = kept["interval"] and [float("nan") if end is None else end for end in kept["interval"]]
        interval = px.Interval(*ends) if ends else None
        found.append(px.runs.Evidence(**kept | {"interval": interval, "effect": f"{part.name}: {kept['effect']}"}))
    return found


def done_before(path: Path, facts: str) -> set[str]:
    """The studies that an interrupted run has done; none if it was another one, or its file is damaged."""
    try:
        kept = px.io.parse_json(path.read_bytes())
        done = set(map(str, kept["done"])) if kept["facts"] == facts else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in done if (path.parent / name / "summary.json").exists()}


# -- studies and their flags -------------------------------------------------------------------------------------------


def module_of(study: Study) -> ModuleType:
    """A study of this folder: beside a script, or in the package when this is imported."""
    return import_module(f"{__package__}.{study}" if __package__ else study)


def planned(config: Config, folder: Path) -> list[Part]:
    """Every study with its flags; ValueError for flags that a study does not know or take."""
    settings = read_settings(config.settings)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(px.flags.Problems)}
    parts = []
    for study in STUDIES:
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
            flags = px.io.config_from(
                module_of(study).Config, shared | heads | {"out": out} | own, f"--settings: {study}"
            )
            px.io.check(flags)
            parts.append(Part(study, flags))
    return parts


def ranked(config: Config, study: str, folder: Path, host: str | None = None) -> dict[str, Any]:
    """The flags by which a study takes its models and heads."""
    score = "hub" if study == "attribute_inputs" else config.by
    rankings = {name: str(folder / "rank_heads" / "heads" / f"{Path(name).name}_{score}.csv") for name in config.models}
    if host is None:
        return {} if study in RANKS_NOTHING or config.dry_run else {"rankings": tuple(rankings.values())}
    donor = next(name for name in config.models if name != host)
    flags: dict[str, Any] = {"models": (host,), "donor": donor}
    # A dry run has made no rankings.
    return flags if config.dry_run else flags | {"rankings": (rankings[host],), "donor_ranking": rankings[donor]}


def read_settings(path: Path | None) -> dict[str, dict[str, Any]]:
    """Flags of single studies; ValueError for a file that holds something else."""
    if path is None:
        return {}
    values = px.io.read_yaml(path)
    if not isinstance(values, dict) or not all(name in STUDIES and isinstance(v, dict) for name, v in values.items()):
        raise ValueError(
            f"{path} must hold flags by study, as 'ablate_heads: {{n_heads: [1, 2]}}'; there are {', '.join(STUDIES)}."
        )
    return values


def plain(flags: Any) -> dict[str, Any]:
    """A study's flags as JSON has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(flags).items()}


def summary(verdicts: list[dict[str, str]], failed: dict[str, str], report: Path) -> str:
    """What the terminal shows."""
    lines = ["\n=== verdicts", *(f"{row['study']}: {row['verdict']}" for row in verdicts)]
    lines += [f"{study}: not done: {why}" for study, why in failed.items()]
    return "\n".join([*lines, f"\nall of it on one page: {report}"])


if __name__ == "__main__":
    sys.exit(px.io.run(main, Config))
