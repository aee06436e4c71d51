"""Problems under several specs at once: what `engine.decode` needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pyvene_ext.engine.compile import Compiled
from pyvene_ext.engine.decode.edits import TokenEdit
from pyvene_ext.engine.decode.rows import Read
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.methods.solving.decoding import read_beginning
from pyvene_ext.methods.solving.replacing import Compile, Scope, Transcripts, compile_for, condition_of
from pyvene_ext.methods.solving.texts import Ends, Solution
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import attention_can_be_seen
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, members


def runs_together(model: PreTrainedModel, specs: Sequence[Spec | Compile | None], scope: Scope) -> bool:
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
    """What is common to all specs of one evaluation.

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

    def hash_of(self, spec: Spec | Compile | None) -> str:
        """Hash of everything but the model that the texts of one spec depend on; of a function, nothing is known.

        Args:
            spec: the spec.

        Returns:
            The hash.
        """
        condition = "function" if callable(spec) else condition_of(spec, self.scope, self.reference)
        return data_hash([self.ends.hash, self.questions.hash, self.new, condition])

    def hash(self, specs: Sequence[Spec | Compile | None]) -> str:
        """Hash of an evaluation of several specs."""
        return data_hash([self.hash_of(spec) for spec in specs])


@dataclass(frozen=True)
class ProblemRows:
    """Rows that solve problems under specs, a `Program` of `engine.decode`.

    Attributes:
        job: what is common to all specs.
        specs: the specs; None leaves the model untouched.
        resolved: each spec on the prompts; None if there is none, or a function.
        finish: receives each finished text.
    """

    job: Job
    specs: Sequence[Spec | Compile | None]
    resolved: Sequence[Resolved | None]
    finish: Callable[[int, int, Solution], None]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in self.job.questions.prompts.input_ids]

    @property
    def edits_prompts(self) -> bool:
        """Whether specs edit the prompts."""
        return self.job.scope in ("prompt", "both")

    def text(self, spec: int, prompt: int) -> Solution:
        """Begin the text of a row."""
        only = self.job.scope == "reasoning" and self.specs[spec] is not None
        return Solution(self.job.ends, self.job.questions.given(prompt), reasoning_only=only)

    def edits(self, spec: int, prompts: Sequence[int]) -> list[tuple[TokenEdit, ...]]:
        """The edits of new tokens, for each prompt."""
        edited = self.specs[spec]
        if edited is None or callable(edited) or self.job.scope == "prompt":
            return [()] * len(prompts)
        (batch,) = self._batches(prompts, len(prompts))
        compiled = self._compiled(spec, batch, "new")
        found: list[tuple[TokenEdit, ...]] = []
        for row in range(len(prompts)):
            of_row = []
            for edit, values in zip(members(edited), compiled.replacements, strict=True):
                own = None if values is None else values[row]
                if own is not None and edit.kind != "resample":
                    own = own[..., :1, :]  # the same at every new token
                of_row.append(TokenEdit(edit, own))
            found.append(tuple(of_row))
        return found

    def read(self, spec: int, prompts: Sequence[int]) -> Read:
        """Let the model read prompts under a spec."""
        reads = [self._read(spec, batch) for batch in self._batches(prompts, self.job.batch_size)]
        longest = max(self.lengths[prompt] for prompt in prompts)
        layers = [
            tuple(torch.cat([_widened(read.keys_values[layer][part], longest) for read in reads]) for part in (0, 1))
            for layer in range(len(reads[0].keys_values))
        ]
        return Read(layers, torch.cat([read.logits for read in reads]))  # type: ignore[arg-type]

    def _read(self, spec: int, batch: Batch) -> Read:
        model, edited = self.job.model, self.specs[spec] if self.edits_prompts else None
        resolved = None if edited is None else self.resolved[spec]
        beginning = None
        if self.job.read_once:
            beginning = read_beginning(model, batch, self.job.scope, edited, resolved, self.job.new)
        # A cache without a config, so that no layer drops what has left a sliding window.
        inputs, past, shared = batch.inputs(), DynamicCache(), 0
        if beginning is not None:
            inputs, past, shared = beginning.rest, beginning.past, beginning.length
        outputs: list[Any] = []

        def run(**_: Tensor) -> None:
            outputs.append(model(**inputs, past_key_values=past, use_cache=True, logits_to_keep=1))

        if edited is None:
            run()
        else:
            compiled = self._compiled(spec, batch, "prompt")
            iv = IntervenableModel(compiled.config, model)
            iv.generate(
                batch.inputs(),
                unit_locations=compiled.unit_locations,
                source_representations=compiled.source_representations(iv.sorted_keys),
                intervene_on_prompt=True,
                intervene_on_new_tokens=False,
                decode=run,
            )
        width = batch.input_ids.shape[1]
        token, padding = torch.arange(width), width - torch.tensor(batch.lengths)[:, None]
        columns = torch.where(token < shared, token, (token + padding).clamp(max=width - 1))
        cache = outputs[0].past_key_values
        layers = [(_first_columns(x.keys, columns), _first_columns(x.values, columns)) for x in cache.layers]
        return Read(layers, outputs[0].logits[:, -1])

    def _compiled(self, spec: int, batch: Batch, scope: Scope) -> Compiled:
        edited = self.specs[spec]
        assert edited is not None
        return compile_for(
            edited, scope, batch, self.job.questions, self.resolved[spec], self.job.reference, self.job.new
        )

    def _batches(self, prompts: Sequence[int], size: int) -> Iterator[Batch]:
        for start in range(0, len(prompts), size):
            yield self.job.questions.prompts.batch(list(prompts[start : start + size])).to(input_device(self.job.model))


def _widened(x: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, columns - x.shape[2]))


def _first_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Bring each prompt's tokens, whose columns are given by prompt, to the first columns of `prompt n_kv_head pos d`."""
    index = columns.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
