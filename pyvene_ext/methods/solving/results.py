"""Results of studies that write texts, kept in a folder between runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, Self, TypeVar

from transformers import PreTrainedModel

from pyvene_ext.io.files import parse_json, write_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.methods.solving.answers import Rule
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.many import Job
from pyvene_ext.methods.solving.texts import Solution
from pyvene_ext.models.devices import processes
from pyvene_ext.models.identity import model_facts
from pyvene_ext.prompts.problems import Questions

FORMAT = 2  # of the files of results


class Serialisable(Protocol):
    """What converts to plain data and back."""

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data."""
        ...

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Convert back what `as_dict` returned."""
        ...


S = TypeVar("S", bound=Serialisable)


class Results:
    """Evaluations or similar results saved in a folder, so that a repeated run computes only what is missing.

    There is one file per condition, written whole or not at all.

    Args:
        folder: created when the first result is saved.
        facts: what all results depend on, as JSON-able data (`facts_of`).
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = Path(folder), dict(facts)

    def get(self, condition: Mapping[str, Any], measure: Callable[[], S], kind: type[S] = Evaluation) -> S:  # type: ignore[assignment]
        """Load the result of a condition, or compute and save it.

        Args:
            condition: what this result depends on besides the facts, as JSON-able data.
            measure: computes it; called if there is no file, or one that is damaged or has other facts.
            kind: the result's class.

        Returns:
            The result.
        """
        (result,) = self.get_all([condition], lambda _: [measure()], kind)
        return result

    def get_all(
        self,
        conditions: Sequence[Mapping[str, Any]],
        measure: Callable[[list[int]], Sequence[S]],
        kind: type[S] = Evaluation,  # type: ignore[assignment]
    ) -> list[S]:
        """Load the results of several conditions, or compute what is missing at once and save it.

        Args:
            conditions: as for `get`; of equal ones the first is computed.
            measure: computes the results of the conditions with these numbers; called if any is missing.
            kind: the results' class.

        Returns:
            The results, in the order of the conditions.
        """
        facts = [json.loads(json.dumps({"format": FORMAT, **self.facts, **condition})) for condition in conditions]
        paths = [self._path(of) for of in facts]
        first = {path: number for number, path in reversed(list(enumerate(paths)))}
        found = {path: result for path, number in first.items() if (result := self._kept(facts[number])) is not None}
        if missing := sorted(number for path, number in first.items() if path not in found):
            for number, made in zip(missing, measure(missing), strict=True):
                plain = json.loads(json.dumps(made.as_dict()))
                write_json(paths[number], {"facts": facts[number], "hash": data_hash(plain), "results": plain})
                found[paths[number]] = plain
        return [kind.from_dict(found[path]) for path in paths]

    def _path(self, facts: Mapping[str, Any]) -> Path:
        return self.folder / f"{data_hash(facts)}.json"

    def _kept(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            record = parse_json(self._path(facts).read_bytes())
            if record["facts"] == facts and record["hash"] == data_hash(record["results"]):
                return record["results"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None


def facts_of(
    model: PreTrainedModel, questions: Questions, max_new_tokens: int, rule: Rule = "flexible-extract"
) -> dict[str, Any]:
    """Everything that evaluations of these questions depend on, as JSON-able data for `Results`.

    Args:
        model: the model.
        questions: the questions.
        max_new_tokens: most tokens per text.
        rule: the rule by which answers are read.

    Returns:
        Hashes and settings by name.
    """
    return {
        **model_facts(model),
        "questions": questions.hash,
        "ends": [getattr(model.generation_config, name, None) for name in ("eos_token_id", "suppress_tokens")],
        "max_new_tokens": max_new_tokens,
        "rule": rule,
    }


class Texts:
    """Finished texts, one line each, kept in a folder so that an interrupted evaluation can be resumed.

    There is a folder for each model, and in it a file for each process of a launch. A line that a kill has cut is dropped, and
    texts of other models, specs or questions are never taken.

    Args:
        folder: created with the first text.
        jobs: what is evaluated under each spec.
        specs: the specs.

    Raises:
        ValueError: a spec is a function, which cannot be told from another; or the folder is a file.
    """

    def __init__(self, folder: str | Path, jobs: Sequence[Job], specs: Sequence[Any]) -> None:
        if any(callable(spec) for spec in specs):
            raise ValueError("texts under a function cannot be told from another function's: leave store out.")
        if Path(folder).is_file():
            raise ValueError(f"{folder} is a file; name a folder in which texts are kept.")
        self.folder = Path(folder) / data_hash(model_facts(jobs[0].model))[:16]
        self._ends = jobs[0].ends
        self._keys = [job.hash_of(spec) for job, spec in zip(jobs, specs, strict=True)]
        self._file: IO[str] | None = None

    def known(self) -> dict[tuple[int, int], Solution]:
        """Read the texts that are kept, by spec and problem."""
        found = {}
        for path in sorted(self.folder.glob("texts-*.jsonl")):
            for line in path.read_bytes().splitlines() if path.is_file() else ():
                try:
                    check, (key, problem, ids, log_probabilities, ended) = parse_json(line)
                    whole = check == data_hash([key, problem, ids, log_probabilities, ended])
                except (ValueError, TypeError):
                    continue
                for number, own in enumerate(self._keys):
                    if whole and key == own:
                        solution = found[number, problem] = Solution(self._ends)
                        solution.ids, solution.log_probabilities, solution.ended = ids, log_probabilities, ended
        return found

    def add(self, spec: int, problem: int, solution: Solution) -> None:
        """Keep a text.

        Args:
            spec: its number.
            problem: its number.
            solution: the text, which has ended or is as long as it may be.
        """
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"texts-{processes().process_index}.jsonl"
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n")  # after a line that a kill has cut
        row = [self._keys[spec], problem, solution.ids, solution.log_probabilities, solution.ended]
        self._file.write(json.dumps([data_hash(row), row]) + "\n")
        self._file.flush()

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
