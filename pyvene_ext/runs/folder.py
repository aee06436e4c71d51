"""A run folder: where a study writes its files, in an order that makes a complete run recognisable; and its unfinished work.

    run = RunFolder(config, "logit_lens", config.model, config.dataset)   # first, since it checks that the folder can be written
    ...
    if not run.announce("96 interventions x 100 prompts", seconds, n=100):  # False with --dry_run
        return
    ...
    with run.writing(facts, [evidence], replacing=("*.npy", "figures/*")):
        run.array("lens_rank", ranks)
        run.table("heads", rows)
        run.figure("lens_rank", figure)

The summary begins with the study's question, the first line of its docstring. The summary of an earlier run is removed first, and
that of this run is written last, so that a folder with a summary is complete and holds the files of one run. Until then
`unfinished` keeps the work of an interrupted run. Only the main process writes; the study returns before this point in the other
processes.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from transformers import PreTrainedModel

from pyvene_ext.engine.measure import MetricLike, as_metric
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sweep.run import open_shared_store, store_facts, sweep
from pyvene_ext.io.cli import UNFINISHED, TooLong, plain_config, write_config
from pyvene_ext.io.files import output_path, parse_json, remove_leftovers, write_csv, write_json, write_npy
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.io.inputs import refuse_inputs
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.runs.attention import View, write_views
from pyvene_ext.runs.facts import Evidence
from pyvene_ext.runs.flags import Dataset
from pyvene_ext.runs.plans import LEAST, LONGEST, duration, note_seconds, round_down, that_fit
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.tables import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
DATA = (".json", ".jsonl", ".tsv", ".csv")


class RunFolder:
    """Where one run of a study writes.

    Attributes:
        path: the folder.
        of: model and data, for titles: "tiny-qwen2.5, ioi_en".
        unfinished: folder of the work of an interrupted run, for `store=` of a sweep.
    """

    def __init__(
        self,
        config: Any,
        study: str,
        *subjects: str,
        flag: str = "out",
        summary: str | Path = "summary.json",
        config_file: str = "config.yaml",
        path: Path | None = None,
        beside: Mapping[str, Path] = {},
    ) -> None:
        """Choose the folder: the flag's, or outputs/STUDY/SUBJECT_SUBJECT, and check that it can be written.

        Args:
            config: the flags of the run, which `writing` saves.
            study: name of the study.
            *subjects: models and data sets of the run; a path is named by its last part.
            flag: name of the flag that gives the folder.
            summary: file that is written last.
            config_file: file of the flags; a study that keeps several runs in one folder names each.
            path: the folder, if the flag names something else.
            beside: files of the run outside the folder, by the flags that name them, which the study writes itself; those of an
                earlier run are removed first.

        Raises:
            ValueError: the folder cannot be written, or a file that the flags name as an input would be overwritten.
        """
        names = [_short(subject) for subject in subjects]
        self.path = output_path(path or getattr(config, flag), Path("outputs") / study / "_".join(names), f"--{flag}")
        self.of = ", ".join(names)
        self.unfinished = self.path / "unfinished"
        self._kept_size = self.path / "shortened.json"
        UNFINISHED.append(self.unfinished)
        self._given = config
        self.fill_in(config, summary=summary, config_file=config_file)
        self._beside = tuple(beside.values())
        written = [*beside.items(), *((flag, place) for place in (self._summary,) if place not in self._beside)]
        refuse_inputs(config, written, folder=(flag, self.path), config_file=self._config_file)
        self._question = (inspect.getdoc(inspect.getmodule(type(config))) or "").partition("\n")[0]
        self._kinds: set[str] = set()

    def fill_in(self, config: Any, *, summary: str | Path = "summary.json", config_file: str = "config.yaml") -> None:
        """Take flags to which those have been added that the user left to the study, and what files are called by them.

        Args:
            config: the flags, which `writing` saves.
            summary: as of the folder.
            config_file: as of the folder.
        """
        self.config = config
        self._config_file, self._summary = self.path / config_file, self.path / summary

    def announce(
        self,
        work: str,
        seconds: float | None = None,
        *,
        n: int = 0,
        limit: str = "limit",
        fixed: float = 0.0,
        shorter: Mapping[str, Any] | None = None,
        also: Mapping[str, Any] = {},
    ) -> bool:
        """Say what the study will do and how long it takes, before it starts.

        A study that would take longer than ten minutes is shortened, unless the flag that sets how much is done was
        given: it starts again (`io.cli.run`) as if that flag had been given. An interrupted run that was shortened
        is resumed with the same number.

        Args:
            work: what will be done: "96 interventions x 100 prompts".
            seconds: how long it takes without what an interrupted run has finished, mostly a number of passes times
                `plans.seconds_a_pass`.
            n: the prompts, or whatever `limit` counts.
            limit: the flag that sets how much is done.
            fixed: how many of the seconds do not depend on it.
            shorter: flags with values of which each takes no more than ten minutes; by default `limit` with the number that
                follows from `seconds`, `n` and `fixed`.
            also: further flags with values with which the fewest prompts (`plans.LEAST`) take no more than ten minutes, taken if
                fewer prompts alone are not enough.

        Returns:
            Whether the study goes on: False with --dry_run.

        Raises:
            TooLong: it would take longer than ten minutes; `fewer` is None if even a few prompts would.
        """
        if is_main_process():
            print(work if seconds is None else f"{work}: {duration(seconds)}", flush=True)
        if seconds is not None and getattr(self._given, limit) is None:
            before = self._shortened()
            fewer, others = (before["value"], before["also"]) if before else (n, {})
            if not before and seconds > LONGEST:
                fewer = that_fit(n, seconds, fixed) if shorter is None else round_down(shorter.get(limit, 0))
                if fewer < LEAST and also:
                    fewer, others = min(n, LEAST), dict(also)
            if fewer < n or others:
                words = None if shorter is None else [_as_flag(*one) for one in shorter.items()]
                self._shorten(limit, fewer, n, seconds, fixed, words, others)
                # In a dry run; a study that would be refused takes no time.
                seconds = 0.0 if fewer < min(n, LEAST) else min(seconds, LONGEST)
        note_seconds(seconds)
        return not self._given.dry_run

    def _shorten(
        self,
        limit: str,
        fewer: int,
        n: int,
        seconds: float,
        fixed: float,
        shorter: Sequence[str] | None,
        also: Mapping[str, Any],
    ) -> None:
        """Say how many of `n` are taken, and keep that for a run that resumes this one; raises TooLong but in a dry run."""
        whole = 0 if limit == "limit" and isinstance(self._given, Dataset) else n
        everything = f"--{limit} {whole} takes all"
        if fewer < min(n, LEAST):
            few = fixed + (seconds - fixed) * LEAST / n
            least = f", and {LEAST} of them {duration(few)}" if n > LEAST else ""
            message = f"all {n} take {duration(seconds)} here{least}, and nothing has been run: --{limit} {min(n, LEAST)} runs "
            message += f"{LEAST} all the same, and {everything}." if n > LEAST else "them all the same."
            if shorter is not None:
                fits = " or ".join(shorter) or f"no smaller --{limit}"
                message = f"all {n} take {duration(seconds)} here and nothing has been run: {fits} takes "
                message += f"{duration(LONGEST)}, and {everything}."
            if not self._given.dry_run:
                raise TooLong(message, limit, None)
            said = f"without --dry_run this stops: {message}"
        else:
            given = [_as_flag(*one) for one in also.items()]
            together = " and ".join([_as_flag(limit, fewer), *given])
            less = " or ".join(shorter) if shorter and not given else together
            message = f"all {n} take {duration(seconds)} here: {less} takes less, and {everything}."
            taken = ", with ".join([f"{fewer} of {n} are taken", *given])
            said = f"to keep within ten minutes {taken}; {everything}"
        if is_main_process():
            print(said, flush=True)
        if self._given.dry_run:
            return
        if is_main_process():
            size = {"flag": limit, "value": fewer, "of": n, "also": also}
            write_json(self._kept_size, {"flags": self._flags(limit, *also), **size})
        raise TooLong(message, limit, fewer, also)

    def _flags(self, *sizes: str) -> dict[str, Any]:
        """The flags besides those that set how much is done, as JSON gives them back."""
        flags = plain_config(self._given)
        return json.loads(json.dumps(flags | dict.fromkeys(sizes)))

    def _shortened(self) -> dict[str, Any] | None:
        """How far a run with these flags was shortened that has not been finished; None if none was."""
        try:
            kept = parse_json(self._kept_size.read_bytes())
            sizes = {kept["flag"]: kept["value"], **kept["also"]}
            same = kept["flags"] == self._flags(*sizes)
            same &= all(getattr(self._given, flag) in (None, value) for flag, value in sizes.items())
            whole = all(isinstance(value, int) for value in (kept["of"], *sizes.values()))
            return kept if same and whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @contextmanager
    def writing(
        self, facts: Mapping[str, Any], evidence: Sequence[Evidence], *, replacing: Sequence[str] = ()
    ) -> Iterator[None]:
        """Write a study's files inside this context; on leaving, it adds config and summary and discards unfinished work.

        An exception inside leaves the folder without a summary, and keeps the unfinished work.

        Args:
            facts: contents of the summary, mostly from `metadata`; a number that is not finite becomes null.
            evidence: how strong the evidence is, a line each on the terminal, and in the summary.
            replacing: glob patterns of files of an earlier run to delete first, as this run might not overwrite them.

        Yields:
            None: the body of the context writes the files.
        """
        shortened = self._shortened()
        for earlier in (self._summary, *self._beside):
            earlier.unlink(missing_ok=True)
        for pattern in replacing:
            for earlier in self.path.glob(pattern):
                earlier.unlink()
        yield
        write_config(self._config_file, self.config)
        size = {}
        if shortened:
            size["shortened"] = {key: shortened[key] for key in ("flag", "value", "of")} | shortened["also"]
        asked = {"question": self._question} if self._question else {}
        facts = {**asked, **facts, **size, "evidence": [one.facts for one in evidence]}
        write_json(self._summary, _finite(facts))
        remove_leftovers(self._summary, *self._beside, *self.path.rglob("*"))
        discard(self.unfinished)
        self._kept_size.unlink(missing_ok=True)
        kinds = [kind for kind in ("arrays", "tables", "figures") if kind in self._kinds]
        if evidence:
            print("", *evidence, sep="\n")
        if shortened:
            less = [
                f"{shortened['value']} of {shortened['of']}",
                *(_as_flag(*one) for one in shortened["also"].items()),
            ]
            print(f"shortened: {', '.join(less)}, as --{shortened['flag']} was not given")
        print("\nwritten:", *self._beside, f"{self.path}/ ({', '.join(['summary', 'config', *kinds])})", sep="\n  ")

    def array(self, name: str, values: np.ndarray) -> None:
        """Write an array to NAME.npy.

        Args:
            name: file name without its ending.
            values: the array.
        """
        self._kinds.add("arrays")
        write_npy(self.path / f"{name}.npy", values)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table to NAME.csv; NaN becomes an empty cell.

        Args:
            name: file name without its ending.
            rows: cells by column; the first row names the columns.
        """
        self._kinds.add("tables")
        write_csv(self.path / f"{name}.csv", rows)

    def figure(self, name: str, figure: Figure) -> None:
        """Write a figure to figures/NAME.png and figures/NAME.pdf.

        Args:
            name: file name without its ending.
            figure: the figure.
        """
        from pyvene_ext.runs.figures import save

        self._kinds.add("figures")
        save(figure, self.path / f"figures/{name}.png")

    def json(self, name: str, value: Any) -> None:
        """Write plain data to NAME.json.

        Args:
            name: file name without its ending.
            value: the data.
        """
        write_json(self.path / f"{name}.json", value)

    def views(self, views: Sequence[View]) -> None:
        """Write attention patterns (`runs.attention.look`) for the report; without any, remove those of an earlier run."""
        write_views(self.path, views)


# -- unfinished work: each sweep has a store, and all are discarded once the study's files are written ------------------


@contextmanager
def unfinished_in(
    folder: str | Path,
    model: PreTrainedModel,
    specs: Sequence[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    *,
    memory: int | None = None,
    compile: bool = False,
) -> Iterator[Callable[..., Result]]:
    """Open a folder of stores and yield a `sweep` that keeps finished batches there, whichever of the specs and prompts it runs.

    A screen or a sequential run calls it several times, on specs and prompts that depend on earlier results. Each call has a
    store of its own, named by a hash of its specs and prompts. When the study is started again, the same calls resume where
    they stopped.

    Args:
        folder: where the stores lie, usually `RunFolder.unfinished`.
        model: the model of all calls.
        specs: all specs that calls may run.
        prompts: all prompts that calls may run on, chosen by `subset`.
        metric: metric of all calls.
        memory: bytes for a batch of interventions.
        compile: whether torch.compile fuses the MLPs.

    Yields:
        Callable[..., Result]: a function with the signature of `sweep`, without `memory`, `compile` and `store`.

    Raises:
        ValueError: the folder holds work on other specs, prompts, weights or another metric, or another process uses it.
    """
    folder = Path(folder)
    facts = store_facts(resolve(specs, model, prompts), as_metric(metric), range(len(prompts)))
    with open_shared_store(folder, facts, {}):

        def kept(
            model: PreTrainedModel,
            specs: Sequence[Spec],
            *args: Any,
            subset: Sequence[int] | None = None,
            **options: Any,
        ) -> Result:
            store = folder / data_hash([to_plain(specs), subset])
            return sweep(model, specs, *args, subset=subset, memory=memory, compile=compile, store=store, **options)

        yield kept


def discard(folder: str | Path) -> None:
    """Remove the unfinished work of a run whose files are written."""
    folder = Path(folder)
    # Renamed first, which is atomic: a process killed halfway through the removal must not leave half a store.
    doomed = folder.with_name(f".{folder.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _finite(value: Any) -> Any:
    """None for numbers that JSON does not have: one undefined number must not lose the summary of a long run."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return finite(value) if isinstance(value, float) else value


def _as_flag(flag: str, value: Any) -> str:
    """A flag with its value, or its values, as they are written on the command line."""
    return f"--{flag} {' '.join(map(str, value if isinstance(value, tuple) else (value,)))}"


def _short(subject: str) -> str:
    """The name of a model or data set in file names: the last part of its path, without the ending of a data file."""
    path = Path(subject)
    name = path.name or path.resolve().name
    return name.removesuffix(path.suffix) if path.suffix in DATA else name


# -- several models ----------------------------------------------------------------------------------------------------


def each_model(
    run: RunFolder,
    load: Callable[[int], T],
    work: str,
    seconds: Callable[[Any, T, int], float] | None,
    n: int,
    shorter: Mapping[str, Any] = {},
    *,
    limit: str = "limit",
    least: int = 2,
    spare: str | None = None,
) -> Iterator[T]:
    """Load and check every model of a study, announce the study (`RunFolder.announce`), and give it one model after the other.

    The first model is loaded last and stays; the others are loaded again when it is their turn, so that two need not fit in
    memory together, if the study lets go of one before it asks for the next.

    Args:
        run: the run, with the flags of the study; `models` are its models.
        load: loads the model at this index of `models`, and raises ValueError if the study cannot be done with it.
        work: what the study does, for the announcement.
        seconds: how long a model takes, from flags, the model, and the number of problems; None for models that are quick.
        n: the number of problems.
        shorter: flags with their values that make the study shorter if they are smaller (a number) or name less (a tuple). If it
            is too long, the largest value of each that is short enough is named.
        limit: the flag that sets the number of problems.
        least: fewest problems that the study takes.
        spare: the flag among `shorter`, a number, that is made smaller too if no number of problems is short enough.

    Yields:
        T: each model; none with --dry_run.

    Raises:
        ValueError: what `load` raises; or the study is too long, as `RunFolder.announce` has it.
    """
    flags = run.config
    first: T | None = None
    total, of_less = 0.0, dict.fromkeys(_less(shorter, limit, least, n), 0.0)
    spared = {} if spare is None else dict.fromkeys(range(shorter[spare], 0, -1), 0.0)
    for number in reversed(range(len(flags.models))):
        first = None
        first = load(number)
        if seconds is None:
            continue
        total += seconds(flags, first, n)
        for flag, value in of_less:
            few, n_few = (flags, value) if flag == limit else (replace(flags, **{flag: value}), n)
            of_less[flag, value] += seconds(few, first, n_few)
        for value in spared:
            assert spare is not None
            spared[value] += seconds(replace(flags, **{spare: value}), first, min(n, LEAST))
    fits: dict[str, Any] = {}
    for (flag, value), taken in of_less.items():
        if taken <= LONGEST:
            fits.setdefault(flag, value)
    enough = next((value for value, taken in spared.items() if taken <= LONGEST), None)
    also = {} if spare is None or enough is None else {spare: round_down(enough)}
    if not run.announce(work, None if seconds is None else total, n=n, limit=limit, shorter=fits, also=also):
        return
    for number in range(len(flags.models)):
        model = load(number) if first is None else first
        first = None
        yield model
        del model


def _less(shorter: Mapping[str, Any], limit: str, least: int, n: int) -> list[tuple[str, Any]]:
    """Flags with smaller values than they have, the largest first."""
    found = [
        (flag, value[:end] if isinstance(value, tuple) else end)
        for flag, value in shorter.items()
        for end in reversed(range(1, len(value) if isinstance(value, tuple) else value))
    ]
    return [*found, *((limit, few) for few in reversed(range(least, n)))]
