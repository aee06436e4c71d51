"""Specs on problems: checked, and compiled with the replacements at tokens of the prompt and at new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_positions
from pyvene_ext.engine.compile import Compiled, compile_spec, extend_to_new_tokens, select_scope
from pyvene_ext.engine.decode.edits import TokenEdit
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.models.hooks import attention_can_be_seen
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized
from pyvene_ext.specs.ablation import donors
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import OneSpec, Spec, as_specs, members, needs

Scope = Literal["prompt", "new", "reasoning", "both"]
Compile = Callable[[Batch], Compiled]  # from a batch, padded on the left, to its compiled intervention


@dataclass(frozen=True)
class TokenEdits:
    """Edits of the tokens that a model writes, which may differ from problem to problem; the prompts are left alone.

    Attributes:
        of: makes those of a problem, given its index.
        facts: everything they depend on besides model and questions, as JSON-able data.
    """

    of: Callable[[int], tuple[TokenEdit, ...]]
    facts: Any


@dataclass(frozen=True)
class Transcripts:
    """Questions with the untouched model's solutions, from which ablations by the mean and by resampling take their values.

    Attributes:
        questions: of the transcripts.
        reference: statistics of the transcripts' tokens.
    """

    questions: Questions
    reference: Reference

    @classmethod
    def compute(
        cls,
        model: PreTrainedModel,
        questions: Questions,
        clean: Evaluation,
        specs: Iterable[Spec],
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Transcripts | None:
        """Compute the statistics that specs need.

        Args:
            model: a causal language model with a card.
            questions: the questions.
            clean: the untouched model's solutions of these questions.
            specs: single and joint specs.
            batch_size: prompts per forward pass.
            progress: show a bar.

        Returns:
            The transcripts; None if the specs need no statistics.
        """
        wanted = needs(specs)
        if not wanted.places:
            return None
        asked = questions.prompts
        rows = [(*ids, *new) for ids, new in zip(asked.input_ids, clean.ids, strict=True)]
        positions = tuple(
            {**{name: at - len(new) for name, at in named.items()}, "end": -1, "last": -1}
            for named, new in zip(asked.positions, clean.ids, strict=True)
        )
        prompts = TokenizedPrompts(tuple(rows), positions=positions, pad_id=asked.pad_id)
        bank = ("all",) if wanted.bank else ()
        reference = Reference.compute(
            model, prompts, wanted.places, bank=bank, batch_size=batch_size, progress=progress
        )
        return cls(questions, reference)

    @property
    def hash(self) -> str:
        """Hash of the transcripts' tokens."""
        return self.reference.prompts.hash


def condition_of(
    spec: Spec | TokenEdits | None, scope: Scope, reference: Reference | Transcripts | None = None
) -> dict[str, Any]:
    """What a single evaluation depends on besides the model, the questions and the new tokens, as JSON-able data.

    Args:
        spec: as for `evaluate`.
        scope: as for `evaluate`.
        reference: as for `evaluate`.

    Returns:
        The condition for `Results.get`.
    """
    if spec is None:
        return {"spec": None}
    if isinstance(spec, TokenEdits):
        return {"tokens": spec.facts, "scope": scope}
    used = reference if needs([spec]).places else None
    held = used.reference if isinstance(used, Transcripts) else used
    return {"spec": to_plain([spec]), "scope": scope, "reference": None if held is None else held.prompts.hash}


def check_questions(model: PreTrainedModel, questions: Questions, scope: Scope, max_new_tokens: int) -> None:
    """Check everything that `evaluate` is given but the specs; nothing is run.

    Args:
        model: as for `evaluate`.
        questions: as for `evaluate`.
        scope: as for `evaluate`.
        max_new_tokens: as for `evaluate`.

    Raises:
        ValueError: for whatever `evaluate` refuses.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}; choose among {', '.join(get_args(Scope))}.")
    if not isinstance(questions, Questions):
        raise ValueError(
            f"questions must be Questions, not {type(questions).__name__}; make them with tokenize_problems(problems, tokenizer)."
        )
    if not len(questions):
        raise ValueError("there are no problems to solve; give at least one.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}.")
    context = n_positions(model.config)
    for number, ids in enumerate(questions.prompts.input_ids):
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"problem {number} has {len(ids)} tokens, which with {max_new_tokens} new ones are more than the {context} "
                "that the model takes; leave it out, or generate fewer."
            )
    check_tokenized(model, questions.prompts)


def resolve_spec(
    model: PreTrainedModel,
    questions: Questions,
    spec: Spec | Compile | TokenEdits | None,
    scope: Scope,
    max_new_tokens: int,
    reference: Reference | Transcripts | None = None,
) -> Resolved | None:
    """Check a spec of `evaluate` and resolve it on questions that have been checked; nothing is run.

    Args:
        model: as for `evaluate`.
        questions: as for `evaluate`.
        spec: as for `evaluate`.
        scope: as for `evaluate`.
        max_new_tokens: as for `evaluate`.
        reference: as for `evaluate`.

    Returns:
        The spec on the prompts; None if there is none, a function, or edits of new tokens.

    Raises:
        ValueError: for whatever `evaluate` refuses.
    """
    if max_new_tokens == 1 and spec is not None and scope in ("new", "reasoning"):
        raise ValueError(
            "the only new token depends on edits of the prompt alone; generate more tokens, or choose the scope prompt."
        )
    if isinstance(spec, TokenEdits) and scope not in ("new", "reasoning"):
        raise ValueError(f"edits of new tokens leave prompts alone: choose the scope new or reasoning, not {scope}.")
    if isinstance(spec, TokenEdits) and not attention_can_be_seen(model):
        raise ValueError(
            f"edits of new tokens need attention that can be seen, which that of {type(model).__name__} cannot, as it is loaded; "
            "use another family, or attn_implementation='sdpa'."
        )
    if spec is None or callable(spec) or isinstance(spec, TokenEdits):
        return None
    (spec,) = as_specs([spec])
    held = reference.reference if isinstance(reference, Transcripts) else reference
    for edit in members(spec):
        edit.check(model)
        if scope != "prompt" and not edit.on_new_tokens:
            raise ValueError(
                f"{edit.name}: this intervention is not defined at generated tokens; ablate by zero, by the mean over tokens or "
                "by resampling, or choose the scope prompt."
            )
        if edit.needs.places and (held is None or (scope != "prompt" and held is reference)):
            raise ValueError(f"{edit.name} needs the texts of an untouched run; give Transcripts as reference.")
        if isinstance(reference, Transcripts) and edit.kind == "resample":
            _donors(edit, questions, reference)
    if isinstance(reference, Transcripts):
        reference.reference.require(**needs([spec])._asdict())
        spec = _with_means(spec)
    return resolve([spec], model, questions.prompts, reference=held, directions={})


def _with_means(spec: Spec) -> Spec:
    """Replace resampling by the mean, whose compiled replacements have the right shape and are overwritten later."""
    return tuple(
        edit.model_copy(update={"kind": "mean"}) if edit.kind == "resample" else edit for edit in members(spec)
    )


def _donors(edit: OneSpec, questions: Questions, transcripts: Transcripts) -> list[int]:
    """For each problem the transcript that it is resampled from."""
    return donors(questions.prompts, transcripts.questions.prompts, "last", getattr(edit, "seed", 0))


# -- replacements ------------------------------------------------------------------------------------------------------


def compile_for(
    spec: Spec | Compile,
    scope: Scope,
    batch: Batch,
    questions: Questions,
    resolved: Resolved | None,
    reference: Reference | Transcripts | None,
    new: int,
) -> Compiled:
    """One spec on one batch, with replacements for the tokens in scope: those of the prompt, then new ones."""
    if callable(spec):
        return spec(batch)
    assert resolved is not None  # there is a spec
    compiled = compile_spec(resolved.specs[0], batch, resolved)
    if scope == "prompt" and not isinstance(reference, Transcripts):
        return compiled
    replacements = []
    for edit, values in zip(members(spec), compiled.replacements, strict=True):
        if values is not None:
            values = extend_to_new_tokens(values, new)
            if edit.kind == "resample":
                assert isinstance(reference, Transcripts)  # `check` has checked it
                values = _resampled(edit, batch, questions, resolved, reference, new).to(values)
            values = select_scope(values, scope, new)
        replacements.append(values)
    return Compiled(compiled.config, compiled.unit_locations, tuple(replacements))


def _resampled(
    edit: OneSpec, batch: Batch, questions: Questions, resolved: Resolved, transcripts: Transcripts, new: int
) -> Float[Tensor, "batch *head pos d"]:
    """For every row the activations of another problem's transcript, at the same distance from the end of its question.

    Positions before the first token of a shorter transcript, or after its last, get that token's activations.
    """
    reference, width = transcripts.reference, batch.input_ids.shape[1]
    donor_of = _donors(edit, questions, transcripts)
    rows = []
    for prompt, length in zip(batch.index, batch.lengths, strict=True):
        donor = donor_of[prompt]
        own_length, donor_length = questions.lengths[prompt], transcripts.questions.lengths[donor]
        if edit.positions == "all":
            tokens = list(range(length - width, length + new))
        else:
            tokens = [*resolved.tokens[edit.positions][prompt], *range(length, length + new)]
        last, shift = len(reference.prompts.input_ids[donor]) - 1, donor_length - own_length
        activations = reference.rows(edit.place, donor, tuple(min(max(t + shift, 0), last) for t in tokens))
        rows.append(activations if edit.heads is None else activations[:, list(edit.heads)].transpose(0, 1))
    return torch.stack(rows)
