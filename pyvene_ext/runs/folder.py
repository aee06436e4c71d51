"""The folder of a run: where a study writes, what an earlier run left there, and the order in which its files appear.

    run = RunFolder(config, "logit_lens", config.model, config.dataset)   # first: may one write there?
    ...
    with run.writing(facts, replacing=("*.npy", "figures/*")):
        run.array("lens_rank", ranks)
        run.table("heads", rows)
        run.figure("lens_rank", figure)

The summary of an earlier run goes first and that of this run comes last: where it is, the rest is, and of one run. What an
interrupted run has finished is in `unfinished` until then. Only the main process writes; a study returns before in the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import output_path, remove_leftovers, write_csv, write_json, write_npy
from pyvene_ext.runs.attention import View, write_views
from pyvene_ext.runs.sweeps import discard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = (".json", ".jsonl", ".tsv", ".csv")


class RunFolder:
    """Where one run of a study writes.

    Attributes:
        path: the folder.
        of: what is run, for titles: "tiny-qwen2.5, ioi_en".
        unfinished: the store of what an interrupted run has finished, for `store=` of a sweep.
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
        beside: Sequence[Path] = (),
    ) -> None:
        """Choose the folder: what the flag says, else outputs/STUDY/SUBJECT_SUBJECT.

        Args:
            config: the flags; written with the files.
            study: its name.
            subjects: what the run is on: models, data sets. Paths are named by their last part.
            flag: which of the flags names the folder.
            summary: the file that comes last, where it is not summary.json.
            config_file: likewise, of a study that keeps several runs in one folder.
            path: the folder, where the flag names something else.
            beside: files of the run outside the folder, which the study writes itself; those of an earlier run go first.

        Raises:
            ValueError: one may not write there.
        """
        names = [_short(subject) for subject in subjects]
        self.path = output_path(path or getattr(config, flag), Path("outputs") / study / "_".join(names), f"--{flag}")
        self.of = ", ".join(names)
        self.unfinished = self.path / "unfinished"
        self._config, self._config_file, self._summary = config, self.path / config_file, self.path / summary
        self._beside = tuple(beside)
        self._kinds: set[str] = set()

    @contextmanager
    def writing(self, facts: Mapping[str, Any], *, replacing: Sequence[str] = ()) -> Iterator[None]:
        """Around the writing of a study's files; then writes config and summary, drops what was unfinished, and says so.

        Args:
            facts: the summary, mostly from `metadata`.
            replacing: patterns of files of an earlier run that this one might not overwrite.
        """
        for earlier in (self._summary, *self._beside):
            earlier.unlink(missing_ok=True)
        for pattern in replacing:
            for earlier in self.path.glob(pattern):
                earlier.unlink()
        yield
        write_config(self._config_file, self._config)
        write_json(self._summary, facts)
        remove_leftovers(self._summary, *self._beside, *self.path.rglob("*"))
        discard(self.unfinished)
        kinds = [kind for kind in ("arrays", "tables", "figures") if kind in self._kinds]
        print("\nwritten:", *self._beside, f"{self.path}/ ({', '.join(['summary', 'config', *kinds])})", sep="\n  ")

    def array(self, name: str, values: np.ndarray) -> None:
        """Write NAME.npy."""
        self._kinds.add("arrays")
        write_npy(self.path / f"{name}.npy", values)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write NAME.csv, its columns named as in the first row; NaN is an empty cell."""
        self._kinds.add("tables")
        write_csv(self.path / f"{name}.csv", rows)

    def figure(self, name: str, figure: Figure) -> None:
        """Write figures/NAME.png, and the same as .pdf."""
        from pyvene_ext.runs.figures import save

        self._kinds.add("figures")
        save(figure, self.path / f"figures/{name}.png")

    def json(self, name: str, value: Any) -> None:
        """Write NAME.json."""
        write_json(self.path / f"{name}.json", value)

    def views(self, views: Sequence[View]) -> None:
        """Write where heads look (`runs.attention.look`), for the report; if there are no views, none of an earlier run stay."""
        write_views(self.path, views)


def _short(subject: str) -> str:
    """A model or data set in file names: the last part of its path, without the ending of a data file."""
    path = Path(subject)
    name = path.name or path.resolve().name
    return name.removesuffix(path.suffix) if path.suffix in DATA else name
