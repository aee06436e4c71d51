"""Problems under several specs at once: what `engine.decode` needs to know of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from modelcards import dimensions, n_heads, n_layers
from pyvene_ext.engine.compile import Compiled
from pyvene_ext.engine.decode.edits import TokenEdit
from pyvene_ext.engine.decode.rows import LOGIT_COPIES, SCORE_COPIES, Read
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.methods.solving.decoding import Beginning, read_beginning
from pyvene_ext.methods.solving.reading import Unedited, read_edited, read_untouched
from pyvene_ext.methods.solving.replacing import Compile, Scope, TokenEdits, Transcripts, compile_for, condition_of
from pyvene_ext.methods.solving.texts import Ends, Solution
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import attention_can_be_seen
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.joint import OneSpec, Spec, members


def runs_together(model: PreTrainedModel, specs: Sequence[Spec | Compile | TokenEdits | None], scope: Scope) -> bool:
    """Whether these specs can run as rows of one batch; others run one after the other.

    Args:
        model: the model. One with ALiBi or with attention of its own, and one of latent steps, runs specs one after the other.
        specs: the specs. What a function compiles is not known at new tokens.
        scope: where they apply.
    """
    own = any(callable(spec) for spec in specs) and scope != "prompt"
    return attention_can_be_seen(model) and format_of(model) is None and not own


@dataclass(frozen=True)
class Job:
    """What specs are evaluated on, and how.

    Attributes:
        model: the model.
        ends: of the model.
        questions: the problems.
        scope: where specs apply.
        new: most tokens of a text.
        batch_size: prompts per forward pass that reads them.
        reference: what replacements are computed from.
        read_once: as for `evaluate`.
    """

    model: PreTrainedModel
    ends: Ends
    questions: Questions
    scope: Scope
    new: int
    batch_size: int
    reference: Reference | Transcripts | None
    read_once: bool

    def hash_of(self, spec: Spec | Compile | TokenEdits | None) -> str:
        """Hash of everything but the model that the texts of one spec depend on; of a function, nothing is known.

        Args:
            spec: the spec.

        Returns:
            The hash.
        """
        condition = "function" if callable(spec) else condition_of(spec, self.scope, self.reference)
        return data_hash([self.ends.hash, self.questions.hash, self.new, condition])


@dataclass(frozen=True)
class ProblemRows:
    """Rows that solve problems under specs, a `Program` of `engine.decode`.

    Attributes:
        jobs: of each spec, what is evaluated; all but the questions are the same.
        specs: the specs; None leaves the model untouched.
        resolved: each spec on its prompts; None if there is none, or a function.
        finish: receives each finished text.
    """

    jobs: Sequence[Job]
    specs: Sequence[Spec | Compile | TokenEdits | None]
    resolved: Sequence[Resolved | None]
    finish: Callable[[int, int, Solution], None]

    @property
    def _model(self) -> PreTrainedModel:
        return self.jobs[0].model

    @property
    def edits_prompts(self) -> bool:
        """Whether specs edit the prompts."""
        return self.jobs[0].scope in ("prompt", "both")

    @cached_property
    def _prompts(self) -> list[list[tuple[int, int]]]:
        """Number and length of every prompt, by spec; prompts of the same tokens have the same number."""
        numbers: dict[tuple[int, ...], int] = {}
        found: dict[int, list[tuple[int, int]]] = {}
        for job in self.jobs:
            if id(job.questions) not in found:
                ids = job.questions.prompts.input_ids
                found[id(job.questions)] = [(numbers.setdefault(some, len(numbers)), len(some)) for some in ids]
        return [found[id(job.questions)] for job in self.jobs]

    def prompt(self, job: tuple[int, int]) -> tuple[int, int]:
        """The number of a row's prompt, and its length."""
        spec, problem = job
        return self._prompts[spec][problem]

    def reading(self, length: int) -> int:
        """Bytes that reading a prompt takes: two caches and the inputs of blocks, activations of a layer, masks and logits."""
        sizes, layers = dimensions(self._model.config), n_layers(self._model.config)
        per_token = 2 * 2 * layers * sizes["n_kv_head"] * sizes["d_head"] * self._model.dtype.itemsize
        per_token += layers * sizes["d_model"] * self._model.dtype.itemsize if self.edits_prompts else 0
        per_token += (8 * sizes["d_model"] + 4 * sizes["d_mlp"]) * 4
        sees_scores = any(edit.site in ("scores", "pattern") for edit in self._edits_of_prompts)
        heads = SCORE_COPIES * n_heads(self._model.config) if sees_scores else 2
        return length * (per_token + length * 4 * heads) + LOGIT_COPIES * 4 * self._model.config.vocab_size

    @cached_property
    def _edits_of_prompts(self) -> list[OneSpec]:
        specs = [resolved.specs[0] for resolved in self.resolved if resolved is not None and self.edits_prompts]
        return [edit for spec in specs for edit in members(spec)]

    def text(self, spec: int, problem: int) -> Solution:
        """Begin the text of a row."""
        job = self.jobs[spec]
        only = job.scope == "reasoning" and self.specs[spec] is not None
        return Solution(job.ends, job.questions.given(problem), reasoning_only=only)

    def edits(self, spec: int, problems: Sequence[int]) -> list[tuple[TokenEdit, ...]]:
        """The edits of new tokens, for each problem."""
        edited = self.specs[spec]
        if isinstance(edited, TokenEdits):
            return [edited.of(problem) for problem in problems]
        if edited is None or callable(edited) or self.jobs[spec].scope == "prompt":
            return [()] * len(problems)
        compiled = self._compiled(spec, self._batch(spec, problems), "new")
        found: list[tuple[TokenEdit, ...]] = []
        for row in range(len(problems)):
            of_row = []
            for edit, values in zip(members(edited), compiled.replacements, strict=True):
                own = None if values is None else values[row]
                if own is not None and edit.kind != "resample":
                    own = own[..., :1, :]  # the same at every new token
                of_row.append(TokenEdit(edit, own))
            found.append(tuple(of_row))
        return found

    def read(self, jobs: Sequence[tuple[int, int]], most: int) -> Iterator[Read]:
        """Let the model read the prompts of rows; what specs leave as it is, once for all."""
        most = min(most, self.jobs[0].batch_size)
        rows_of: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for job in jobs:
            rows_of[self.prompt(job)[0]].append(job)
        for start in range(0, len(rows_of), most):
            of_prompts = [rows_of[number] for number in list(rows_of)[start : start + most]]
            yield from self._under_specs(of_prompts) if self.edits_prompts else [self._untouched(of_prompts)]

    def _untouched(self, of_prompts: Sequence[Sequence[tuple[int, int]]]) -> Read:
        batch = self._prompts_of(of_prompts)
        read = read_untouched(self._model, batch, (), self._beginning(batch))
        prompt_of = [prompt for prompt, rows in enumerate(of_prompts) for _ in rows]
        return Read(
            [job for rows in of_prompts for job in rows], prompt_of, batch.lengths, read.keys_values, read.logits
        )

    def _under_specs(self, of_prompts: Sequence[Sequence[tuple[int, int]]]) -> Iterator[Read]:
        """Read the same few prompts under each of the specs that they have."""
        prompt_of = {job: prompt for prompt, rows in enumerate(of_prompts) for job in rows}
        problems_of: dict[int, list[int]] = defaultdict(list)
        for spec, problem in sorted(prompt_of):
            problems_of[spec].append(problem)
        some = [
            (spec, problems[start : start + len(of_prompts)])
            for spec, problems in problems_of.items()
            for start in range(0, len(problems), len(of_prompts))
        ]
        batches = [self._batch(spec, problems) for spec, problems in some]
        unedited = [self._unedited(spec, batch) for (spec, _), batch in zip(some, batches, strict=True)]
        # The work in passes over these prompts, with another one by the untouched model and without.
        left = sum(part.left(self._model, batch) for part, batch in zip(unedited, batches, strict=True) if part)
        untouched = None
        if left + 1 < len(some) or None in unedited:
            layers = sorted({part.layer for part in unedited if part and part.layer})
            batch = self._prompts_of(of_prompts)
            untouched = read_untouched(self._model, batch, layers, None if layers else self._beginning(batch))
        for (spec, problems), batch, part in zip(some, batches, unedited, strict=True):
            jobs = [(spec, problem) for problem in problems]
            rows = [prompt_of[job] for job in jobs]
            if part is None:
                assert untouched is not None
                own = [(keys[rows], values[rows]) for keys, values in untouched.keys_values]
                yield Read(jobs, range(len(jobs)), batch.lengths, own, untouched.logits[rows])
                continue
            known = None if untouched is None or part == Unedited(0, 0) else (untouched, rows)
            beginning = self._beginning(batch, spec) if known is None else None
            compiled = self._compiled(spec, batch, "prompt")
            made, logits = read_edited(self._model, batch, compiled, part, known, beginning)
            yield Read(jobs, range(len(jobs)), batch.lengths, made, logits)

    def _unedited(self, spec: int, batch: Batch) -> Unedited | None:
        """What a spec leaves as it is; None if that is everything."""
        edited, resolved = self.specs[spec], self.resolved[spec]
        if edited is None:
            return None
        if resolved is None:  # a function's
            return Unedited(0, 0)
        return Unedited.of(resolved.specs[0], resolved, batch)

    def _beginning(self, batch: Batch, spec: int | None = None) -> Beginning | None:
        if not self.jobs[0].read_once:
            return None
        edited: Any = None if spec is None else self.specs[spec]
        resolved = None if spec is None else self.resolved[spec]
        return read_beginning(self._model, batch, self.jobs[0].scope, edited, resolved, self.jobs[0].new)

    def _prompts_of(self, of_prompts: Sequence[Sequence[tuple[int, int]]]) -> Batch:
        """The prompts, which any of their rows has."""
        asked = [(self.jobs[spec].questions.prompts, problem) for (spec, problem), *_ in of_prompts]
        ids = tuple(prompts.input_ids[problem] for prompts, problem in asked)
        return TokenizedPrompts(ids, pad_id=asked[0][0].pad_id).batch(range(len(ids))).to(input_device(self._model))

    def _compiled(self, spec: int, batch: Batch, scope: Scope) -> Compiled:
        edited, job = self.specs[spec], self.jobs[spec]
        assert edited is not None and not isinstance(edited, TokenEdits)
        return compile_for(edited, scope, batch, job.questions, self.resolved[spec], job.reference, job.new)

    def _batch(self, spec: int, problems: Sequence[int]) -> Batch:
        return self.jobs[spec].questions.prompts.batch(list(problems)).to(input_device(self._model))
