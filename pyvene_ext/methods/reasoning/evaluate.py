"""Solving word problems with interventions in place: greedy generation in batches, answers compared as numbers.

    questions = tokenize_problems(load_problems("test.jsonl"), tokenizer)
    clean = evaluate(model, tokenizer, questions, max_new_tokens=256)
    ablated = evaluate(
        model, tokenizer, questions, Ablation(kind="zero", site="z", layer=2, heads=(5,)), "new", max_new_tokens=256
    )
    print(clean.accuracy, ablated.accuracy, ablated.parsed.mean())

An intervention is tied to positions, so that the text is the same with and without a cache and in batches of any size (up to
rounding). Its `scope` says at which ones:

    prompt      the positions of the prompt that the spec names; for any spec
    new         every generated token, when it is the input from which the next one is computed
    reasoning   the same until `####`: the token that completes it in the text, and later ones, are not edited
    both        prompt and new

A text ends with an end token, with the line of the answer behind `####`, or where the model goes on to another question (`STOPS`,
which is cut off); otherwise it is cut at the most tokens. Answers are read by a rule of `answers`.

The first new token depends on edits of the prompt alone. At new tokens a spec's heads apply and its positions do not; there,
ablations by zero (also of attention scores), by the mean over tokens and by resampling are defined.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_layers, n_positions, window
from pyvene_ext.engine.compile import Compiled, compile_spec, extend_to_new_tokens, select_scope
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.files import parse_json, write_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.methods.reasoning.answers import Rule, find_answer
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.identity import model_facts
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.problems import MARK, STOPS, Questions, as_text, tokens_until
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized, common_beginning
from pyvene_ext.specs.ablation import donors
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
    members,
    needs,
)

Scope = Literal["prompt", "new", "reasoning", "both"]
FORMAT = 2  # of the files of results
NEW_LINES = ("\n", "\u010a", "<0x0A>")  # as tokens spell it: itself, in byte-level vocabularies, as a byte token


@dataclass(frozen=True)
class Evaluation:
    """A model's solution of each problem, and how it was judged.

    Attributes:
        ids: the generated tokens, without the end token.
        texts: the solution as text, including the part that the prompt contained.
        answers: the number found by `answers.find_answer`; None: unparsed.
        gold: the correct answers.
        ended: whether the text ended, with an end token, with a new line after the answer that follows `####`, or with another
            question; the others were cut at `max_new_tokens`.
        confidence: geometric mean probability of the generated tokens that contain the answer's number; NaN if there are none.
        rule: the rule by which answers were read.
    """

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    answers: tuple[float | None, ...]
    gold: tuple[float, ...]
    ended: Bool[np.ndarray, " problem"]
    confidence: Float[np.ndarray, " problem"]
    rule: Rule = "flexible-extract"

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def parsed(self) -> Bool[np.ndarray, " problem"]:
        """Whether an answer was found."""
        return np.array([answer is not None for answer in self.answers], bool)

    @cached_property
    def correct(self) -> Bool[np.ndarray, " problem"]:
        """Whether an answer was found and is the correct number."""
        return np.array([found == right for found, right in zip(self.answers, self.gold, strict=True)], bool)

    @property
    def accuracy(self) -> float:
        """The share of all problems that were solved correctly."""
        return float(self.correct.mean())

    def summary(self) -> dict[str, float | int | str]:
        """Counts for a table: problems, correct, wrong, unparsed (neither of the two), and of all of them those cut; the rule."""
        right, parsed = int(self.correct.sum()), int(self.parsed.sum())
        return {
            "problems": len(self),
            "accuracy": self.accuracy,
            "correct": right,
            "wrong": parsed - right,
            "unparsed": len(self) - parsed,
            "cut": int((~self.ended).sum()),
            "rule": self.rule,
        }

    def take(self, which: Iterable[int]) -> Evaluation:
        """Select some of the problems, in this order."""
        which = list(which)
        lists: dict[str, Any] = {
            name: tuple(getattr(self, name)[i] for i in which) for name in ("ids", "texts", "answers", "gold")
        }
        return replace(self, **lists, ended=self.ended[which], confidence=self.confidence[which])

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data for a JSON file, with None in place of NaN."""
        return {
            "ids": self.ids,
            "texts": self.texts,
            "answers": self.answers,
            "gold": self.gold,
            "ended": self.ended.tolist(),
            "confidence": [None if np.isnan(value) else value for value in self.confidence.tolist()],
            "rule": self.rule,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evaluation:
        """Convert back what `as_dict` returned."""
        return cls(
            ids=tuple(map(tuple, record["ids"])),
            texts=tuple(record["texts"]),
            answers=tuple(record["answers"]),
            gold=tuple(record["gold"]),
            ended=np.array(record["ended"], bool),
            confidence=np.array([np.nan if value is None else value for value in record["confidence"]]),
            rule=record["rule"],
        )


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


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    spec: Spec | Callable[[Batch], Compiled] | None = None,
    scope: Scope = "both",
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    reference: Reference | Transcripts | None = None,
    rule: Rule = "flexible-extract",
    read_once: bool = False,
    progress: bool | tqdm = False,
) -> Evaluation:
    """Let the model solve problems by greedy decoding, with an intervention in place.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        tokenizer: the model's.
        questions: from `problems.tokenize_problems` or `with_reasoning`.
        spec: an edit, or a tuple of them (made jointly); None: the untouched model. Or a function from a batch (padded on the
            left) to its `Compiled` intervention, with replacements as `IntervenableModel.generate` expects them.
        scope: at which positions, as the module's docstring defines.
        max_new_tokens: most tokens per text.
        batch_size: problems per batch.
        reference: what replacements are computed from: `Transcripts`, or for the scope prompt a `Reference`.
        rule: the rule of `answers` by which answers are read.
        read_once: let the model read once what all prompts of a batch begin with, such as solved examples, if nothing is edited
            there. Not for a model with hooks of one's own that depend on rows or columns.
        progress: show a bar; or a bar of a longer run, advanced by one per problem.

    Returns:
        The solutions and answers, in the order of the questions.

    Raises:
        ValueError: before anything is generated: no problems, a prompt too long for the new tokens, a spec that does not fit the
            model, the prompts or the scope, or a missing reference.
    """
    resolved = check(model, questions, spec, scope, max_new_tokens, reference)
    results: dict[int, tuple[list[int], list[float], bool]] = {}
    decoder = _Decoder(model, tokenizer)
    bar = progress if isinstance(progress, tqdm) else progress_bar(len(questions), "problem", shown=progress)
    try:
        with evaluating(model), no_gradients(model):
            for batch in questions.prompts.batches(batch_size):
                batch = batch.to(input_device(model))
                decoding = _BatchDecoding(decoder, [questions.given(i) for i in batch.index], max_new_tokens)
                base = batch.inputs()
                if read_once:
                    decoding.beginning = _beginning(model, batch, scope, spec, resolved, max_new_tokens)
                if spec is None:
                    decoding.run(**base)
                else:
                    compiled = _compiled(spec, scope, batch, questions, resolved, reference, max_new_tokens)
                    iv = IntervenableModel(compiled.config, model)
                    iv.generate(
                        base,
                        unit_locations=compiled.unit_locations,
                        source_representations=compiled.source_representations(iv.sorted_keys),
                        intervene_on_prompt=scope in ("prompt", "both"),
                        intervene_on_new_tokens=scope != "prompt",
                        new_token_rows=decoding.is_reasoning if scope == "reasoning" else None,
                        decode=decoding.run,
                    )
                results |= dict(zip(batch.index, decoding.rows(), strict=True))
                bar.update(len(batch.index))
    finally:
        if bar is not progress:
            bar.close()
    rows = [results[i] for i in range(len(questions))]
    return _collect(questions, tokenizer, rows, rule, latent=format_of(model) is not None)


def check(
    model: PreTrainedModel,
    questions: Questions,
    spec: Spec | Callable[[Batch], Compiled] | None,
    scope: Scope,
    max_new_tokens: int,
    reference: Reference | Transcripts | None = None,
) -> Resolved | None:
    """Check the arguments of `evaluate` and resolve its spec; nothing is run.

    Args:
        model: as for `evaluate`.
        questions: as for `evaluate`.
        spec: as for `evaluate`.
        scope: as for `evaluate`.
        max_new_tokens: as for `evaluate`.
        reference: as for `evaluate`.

    Returns:
        The spec on the prompts; None if there is none, or a function.

    Raises:
        ValueError: for whatever `evaluate` refuses.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}; choose among {', '.join(get_args(Scope))}.")
    if not len(questions):
        raise ValueError("there are no problems to solve; give at least one.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}.")
    if max_new_tokens == 1 and spec is not None and scope in ("new", "reasoning"):
        raise ValueError(
            "the only new token depends on edits of the prompt alone; generate more tokens, or choose the scope prompt."
        )
    context = n_positions(model.config)
    for number, ids in enumerate(questions.prompts.input_ids):
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"problem {number} has {len(ids)} tokens, which with {max_new_tokens} new ones are more than the {context} "
                "that the model takes; leave it out, or generate fewer."
            )
    check_tokenized(model, questions.prompts)
    if spec is None or callable(spec):
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


def _compiled(
    spec: Spec | Callable[[Batch], Compiled],
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


# -- decoding ----------------------------------------------------------------------------------------------------------


class _Decoder:
    """A model and its tokenizer, with the tokens that end a text, a line or the reasoning, so that few texts need decoding."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.never = list(getattr(model.generation_config, "suppress_tokens", None) or ())
        vocabulary = tokenizer.get_vocab()
        self.marks = {at for token, at in vocabulary.items() if "#" in token}  # may be part of ####
        self.new_lines = {at for token, at in vocabulary.items() if any(line in token for line in NEW_LINES)}
        self.stops = {
            at for token, at in vocabulary.items() if any(stop[-1] in token for stop in STOPS)
        }  # may complete one

    def text(self, *ids: Sequence[int]) -> str:
        """Decode the concatenation of several sequences of tokens."""
        return as_text([token for some in ids for token in some], self.tokenizer)


SHORTEST = 32  # a beginning of fewer tokens is not worth a pass of its own


class _Beginning(NamedTuple):
    """What all rows of a batch begin with: its number of tokens, its keys and values in every row, and the rest of the rows.

    In every row the beginning takes the first columns, and padding comes between it and the rest.
    """

    length: int
    past: Any
    rest: dict[str, Tensor]


def _beginning(
    model: PreTrainedModel,
    batch: Batch,
    scope: Scope,
    spec: Spec | Callable[[Batch], Compiled] | None,
    resolved: Resolved | None,
    new: int,
) -> _Beginning | None:
    """Let the model read what all rows begin with; None if that is short, or edited, or some window is narrower than a text."""
    width, batch_size = batch.input_ids.shape[1], len(batch.index)
    rows = [ids[-length:] for ids, length in zip(batch.input_ids.tolist(), batch.lengths, strict=True)]
    same = min(common_beginning(rows), min(batch.lengths) - 1)
    if spec is not None and scope in ("prompt", "both"):
        if resolved is None or scope == "both":
            return None
        edited = [resolved.tokens_of(edit, batch.index) for edit in members(resolved.specs[0])]
        same = min(same, *(min(tokens) for of_edit in edited for tokens in of_edit))
    reach = min(window(model.config, layer) or width + new for layer in range(n_layers(model.config)))
    if same < SHORTEST or batch_size == 1 or width + new > reach:
        return None
    past = model(batch.input_ids[-1:, -batch.lengths[-1] :][:, :same], use_cache=True, logits_to_keep=1).past_key_values
    past.batch_repeat_interleave(batch_size)
    mask = batch.attention_mask.clone()
    mask[:, :same] = 1
    for row, length in enumerate(batch.lengths):
        mask[row, same : same + width - length] = 0
    places = (mask.cumsum(1) - 1)[:, same:]
    return _Beginning(
        same, past, {"input_ids": batch.input_ids[:, same:], "attention_mask": mask, "position_ids": places}
    )


class _BatchDecoding:
    """Greedy decoding of one batch."""

    def __init__(self, decoder: _Decoder, given: Sequence[tuple[int, ...]], max_new_tokens: int) -> None:
        self.decoder, self.given, self.max_new_tokens = decoder, given, max_new_tokens
        self.ids: list[list[int]] = [[] for _ in given]
        self.log_probabilities: list[list[float]] = [[] for _ in given]
        self.ended = [False] * len(given)
        self.marked = [MARK in decoder.text(ids) for ids in given]
        self.reasoning: list[Tensor] = []  # for each new token: the rows whose text up to it has no ####
        self.beginning: _Beginning | None = None

    def run(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> None:
        """Append the most likely token until every text has ended or has `max_new_tokens`.

        Args:
            input_ids: the prompts, `batch pos`.
            attention_mask: of the prompts.
            position_ids: of the prompts.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        cache = None
        if self.beginning is not None:
            cache, rest = self.beginning.past, self.beginning.rest
            attention_mask, position_ids = rest["attention_mask"], rest["position_ids"]
            inputs = {"input_ids": rest["input_ids"], "position_ids": position_ids}
        for _ in range(self.max_new_tokens):
            out = self.decoder.model(
                **inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            # Checked after one more forward pass than needed, so that an intervention on new tokens runs at least once.
            if all(self.ended):
                return
            cache = out.past_key_values
            tokens = self.take(out.logits[:, -1])
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
            position_ids = position_ids[:, -1:] + 1
            inputs = {"input_ids": tokens[:, None], "position_ids": position_ids}

    def take(self, logits: Float[Tensor, "batch vocab"]) -> Tensor:
        """Choose the next token of every row, and add it to the texts that have not ended.

        Args:
            logits: at the last tokens.

        Returns:
            The tokens, " batch".
        """
        logits = logits.float()
        logits[:, self.decoder.never] = -torch.inf
        best, tokens = logits.log_softmax(-1).max(-1)
        for row, (token, log_probability) in enumerate(zip(tokens.tolist(), best.tolist(), strict=True)):
            if not self.ended[row]:
                self.add(row, token, log_probability)
        self.reasoning.append(torch.tensor([not marked for marked in self.marked]))
        return tokens

    def add(self, row: int, token: int, log_probability: float) -> None:
        """Add a token to a text, or end it.

        Args:
            row: the text's.
            token: the new token.
            log_probability: of the token.
        """
        decoder = self.decoder
        if token in decoder.ends:
            self.ended[row] = True
            return
        self.ids[row].append(token)
        self.log_probabilities[row].append(log_probability)
        if not self.marked[row] and token in decoder.marks:
            self.marked[row] = MARK in decoder.text(self.given[row], self.ids[row])
        if token in decoder.stops:
            text = decoder.text(self.given[row], self.ids[row])
            self.ended[row] = any(stop in text for stop in STOPS)
        if self.marked[row] and token in decoder.new_lines:
            text = decoder.text(self.given[row], self.ids[row])
            answer = find_answer(text, "strict-match")
            self.ended[row] = answer is not None and "\n" in text[answer.end :]

    def is_reasoning(self, new: int) -> Bool[Tensor, " batch"]:
        """The rows whose `new`-th token is part of the reasoning."""
        return self.reasoning[new]

    def rows(self) -> list[tuple[list[int], list[float], bool]]:
        """Tokens and log probabilities of each text, and whether it has ended."""
        return list(zip(self.ids, self.log_probabilities, self.ended, strict=True))


def _collect(
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[list[int], list[float], bool]],
    rule: Rule,
    latent: bool,
) -> Evaluation:
    """Extract the answers from the generated texts; after latent steps, all that is written is the answer, also if it is cut."""
    texts, answers, confidence = [], [], []
    for which, (ids, log_probabilities, ended) in enumerate(rows):
        given = questions.given(which)
        everything = [*given, *ids]
        text = as_text(everything, tokenizer)
        for stop in STOPS:
            text = text.partition(stop)[0]
        found = find_answer(text, rule, cut=not ended and not latent)
        texts.append(text)
        answers.append(None if found is None else found.value)
        held: list[float] = []
        if found is not None:
            first, last = (tokens_until(at, everything, tokenizer) or 0 for at in (found.start + 1, found.end))
            held = log_probabilities[max(first - 1 - len(given), 0) : max(last - len(given), 0)]
        confidence.append(float(np.exp(np.mean(held))) if held else np.nan)
    return Evaluation(
        ids=tuple(tuple(ids) for ids, _, _ in rows),
        texts=tuple(texts),
        answers=tuple(answers),
        gold=tuple(problem.answer for problem in questions.problems),
        ended=np.array([ended for _, _, ended in rows]),
        confidence=np.array(confidence),
        rule=rule,
    )


# -- kept between runs -------------------------------------------------------------------------------------------------


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
        facts = json.loads(json.dumps({"format": FORMAT, **self.facts, **condition}))
        path = self.folder / f"{data_hash(facts)}.json"
        try:
            record = parse_json(path.read_bytes())
            if record["facts"] == facts and record["hash"] == data_hash(record["results"]):
                return kind.from_dict(record["results"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        results = json.loads(json.dumps(measure().as_dict()))
        write_json(path, {"facts": facts, "hash": data_hash(results), "results": results})
        return kind.from_dict(results)


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
        "max_new_tokens": max_new_tokens,
        "rule": rule,
    }


def condition_of(spec: Spec | None, scope: Scope, reference: Transcripts | None = None) -> dict[str, Any]:
    """What a single evaluation depends on besides `facts_of`, as JSON-able data for `Results`.

    Args:
        spec: as for `evaluate`.
        scope: as for `evaluate`.
        reference: as for `evaluate`.

    Returns:
        The condition for `Results.get`.
    """
    if spec is None:
        return {"spec": None}
    used = reference is not None and bool(needs([spec]).places)
    return {
        "spec": to_plain([spec]),
        "scope": scope,
        "reference": reference.hash if reference is not None and used else None,
    }
