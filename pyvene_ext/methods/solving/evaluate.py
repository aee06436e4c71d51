"""Solving word problems with interventions in place: greedy generation in batches, answers compared as numbers.

    questions = tokenize_problems(load_problems("test.jsonl"), tokenizer)
    clean = evaluate(model, tokenizer, questions, max_new_tokens=256)
    ablated = evaluate(
        model, tokenizer, questions, Ablation(kind="zero", site="z", layer=2, heads=(5,)), "new", max_new_tokens=256
    )
    print(clean.accuracy, ablated.accuracy, ablated.parsed.mean())

A list of specs is run as one: every problem is read once, all texts are written side by side, and there is an evaluation a spec:

    results = evaluate(model, tokenizer, questions, all_heads(model.config), "new", max_new_tokens=256)

Each spec may have questions of its own (a list of them). Of prompts that specs edit, only what may differ is read again: layers
from a spec's first one on, and tokens from the first that it edits.

An intervention is tied to positions, so that the text is the same with and without a cache and in batches of any size (up to
rounding). Its `scope` says at which ones:

    prompt      the positions of the prompt that the spec names; for any spec
    new         every generated token, when it is the input from which the next one is computed
    reasoning   the same until `####`: the token that completes it in the text, and later ones, are not edited
    both        prompt and new

A text ends with an end token, with the line of the answer after `####`, or where the model goes on to another question (`STOPS`,
which is cut off); otherwise it is cut at the most tokens. Answers are read by a rule of `answers`.

In float32 a list gives the texts of one spec at a time, token for token. In half precision two likely tokens can change places by
rounding, as they do between batches of different sizes.

The first new token depends on edits of the prompt alone. At new tokens a spec's heads apply and its positions do not; there,
ablations by zero (also of attention scores), by the mean over tokens and by resampling are defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, overload

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.engine.decode.rows import write_rows
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.engine.sweep.plan import check_memory
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.methods.solving.answers import Rule, check_rule
from pyvene_ext.methods.solving.decoding import BatchDecoding, read_beginning
from pyvene_ext.methods.solving.evaluation import Evaluation, collect
from pyvene_ext.methods.solving.many import Job, ProblemRows, runs_together
from pyvene_ext.methods.solving.replacing import (
    Compile,
    Scope,
    TokenEdits,
    Transcripts,
    check_questions,
    compile_for,
    resolve_spec,
)
from pyvene_ext.methods.solving.results import Texts
from pyvene_ext.methods.solving.rounds import Rounds, Rows, UntilDecided, checked_stops
from pyvene_ext.methods.solving.texts import Ends, Solution
from pyvene_ext.models.devices import all_gather, input_device, no_gradients, on_all_ranks, processes
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.stopping import Stopping


@overload
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    spec: Spec | Compile | TokenEdits | None = None,
    scope: Scope = "both",
    *,
    max_new_tokens: int,
    batch_size: int = ...,
    reference: Reference | Transcripts | None = ...,
    rule: Rule = ...,
    read_once: bool = ...,
    memory: int | None = ...,
    store: str | Path | None = ...,
    stop: Stopping | Sequence[Stopping | None] | None = ...,
    baseline: Evaluation | None = ...,
    progress: bool | tqdm = ...,
) -> Evaluation: ...


@overload
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions | list[Questions],
    spec: list[Any],
    scope: Scope = "both",
    *,
    max_new_tokens: int,
    batch_size: int = ...,
    reference: Reference | Transcripts | None = ...,
    rule: Rule = ...,
    read_once: bool = ...,
    memory: int | None = ...,
    store: str | Path | None = ...,
    stop: Stopping | Sequence[Stopping | None] | None = ...,
    baseline: Evaluation | None = ...,
    progress: bool | tqdm = ...,
) -> list[Evaluation]: ...


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions | list[Questions],
    spec: Spec | Compile | TokenEdits | list[Any] | None = None,
    scope: Scope = "both",
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    reference: Reference | Transcripts | None = None,
    rule: Rule = "flexible-extract",
    read_once: bool = False,
    memory: int | None = None,
    store: str | Path | None = None,
    stop: Stopping | Sequence[Stopping | None] | None = None,
    baseline: Evaluation | None = None,
    progress: bool | tqdm = False,
) -> Evaluation | list[Evaluation]:
    """Let the model solve problems by greedy decoding, with an intervention in place, or with each of several.

    Under `accelerate launch` the processes share the problems of a list of specs, and all of them return everything.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        tokenizer: the model's.
        questions: from `problems.tokenize_problems` or `with_reasoning`; for a list of specs also a list, with those of each.
        spec: an edit, or a tuple of them (made jointly); None: the untouched model. Or a function from a batch (padded on the
            left) to its `Compiled` intervention, with replacements as `IntervenableModel.generate` expects them. Or `TokenEdits`.
            Or a list of these, whose texts are written at once.
        scope: at which positions, as the module's docstring defines.
        max_new_tokens: most tokens per text.
        batch_size: problems per batch; for a list, prompts that are read at once.
        reference: what replacements are computed from: `Transcripts`, or for the scope prompt a `Reference`.
        rule: the rule of `answers` by which answers are read.
        read_once: let the model read once what all prompts of a batch begin with, such as solved examples, if nothing is
            edited there. Not for a model with hooks of one's own that depend on rows or columns.
        memory: for a list, bytes for keys, values and logits besides the weights; by default as much as the weights take, at
            least 1 GiB. As many texts are written at once as fit, but always one; what one takes can be more. Not with one
            spec, whose batches have `batch_size` problems.
        store: a folder in which each text is kept as soon as it has ended. The same call resumes there after an interruption;
            texts of another model, spec or question are never taken.
        stop: when a spec needs no more problems, because what it costs is decided: one rule for all specs, or one each (None:
            never). Problems are taken in the rule's random order, and how many a spec takes depends on their outcomes alone. The
            untouched model, spec None, solves all.
        baseline: only with `stop`, the untouched model's solutions of all problems; by default those of None, which must then be
            among the specs.
        progress: show a bar; or a bar of a longer run, advanced by one per problem (and spec).

    Returns:
        The solutions and answers, in the order of the questions; for a list of specs, a list of these. With `stop`, those of the
        problems that a spec took (`Evaluation.index`), and where it stopped (`Evaluation.stopped`).

    Raises:
        ValueError: before anything is generated: no problems, a prompt too long for the new tokens, a spec that does not fit the
            model, the prompts or the scope, a missing reference, an unknown rule; a store that is a file; a rule of stopping
            without an untouched run, a baseline without such a rule; `memory` for one spec; or processes of a launch that were
            given different arguments.
    """
    specs: list[Any] = list(spec) if isinstance(spec, list) else [spec]
    if not specs:
        raise ValueError("there are no specs; give at least one, or None for the untouched model.")
    each = isinstance(questions, list) and all(isinstance(some, Questions) for some in questions)
    asked: list[Any] = list(questions) if each else [questions] * len(specs)  # type: ignore[arg-type]
    if len(asked) != len(specs):
        raise ValueError(
            f"there are {len(asked)} sets of questions and {len(specs)} specs; give each spec its questions."
        )
    check_memory(memory)
    check_rule(rule)
    for some in {id(some): some for some in asked}.values():
        check_questions(model, some, scope, max_new_tokens)
    together = isinstance(spec, list | TokenEdits) or store is not None or stop is not None
    if memory is not None and not together:
        raise ValueError(
            "memory is for a list of specs, whose texts are written at once; for one spec give batch_size, or a list of it."
        )
    if baseline is not None and stop is None:
        raise ValueError("baseline is what stop compares with; give stop too, or leave baseline out.")
    resolved = [
        resolve_spec(model, some, one, scope, max_new_tokens, reference) for some, one in zip(asked, specs, strict=True)
    ]
    asked[0].prompts.batches(batch_size)  # refuses a size that is none
    ends = Ends(model, tokenizer)
    jobs = [Job(model, ends, some, scope, max_new_tokens, batch_size, reference, read_once) for some in asked]
    latent = format_of(model) is not None
    found: dict[tuple[int, int], Solution] = {}

    def judged(number: int, problems: Sequence[int]) -> Evaluation:
        rows = [found[number, problem] for problem in problems]
        return collect(asked[number].take(problems), tokenizer, rows, rule, latent)

    rounds = Rounds([len(some) for some in asked])
    if stop is not None:
        if each:
            raise ValueError("stop compares problem by problem: give one set of questions for all specs.")
        stops = checked_stops(stop, specs, asked[0], baseline)
        clean = next((number for number, one in enumerate(specs) if one is None), 0)
        untouched = (lambda: judged(clean, range(len(asked[0])))) if baseline is None else lambda: baseline
        rounds = UntilDecided(rounds.sizes, stops, untouched, judged)
    if together:
        _of_all(jobs, specs, resolved, found, rounds, memory=memory, store=store, progress=progress)
    else:
        assert not isinstance(spec, list | TokenEdits)
        n = len(asked[0])
        bar = progress if isinstance(progress, tqdm) else progress_bar(n, "problem", shown=progress)

        def finish(problem: int, text: Solution) -> None:
            found[0, problem] = text

        try:
            with evaluating(model), no_gradients(model):
                _one_by_one(jobs[0], spec, resolved[0], range(n), finish, bar.update)
        finally:
            if bar is not progress:
                bar.close()
    evaluations = [rounds.marked(number, judged(number, rounds.problems(number))) for number in range(len(specs))]
    return evaluations if isinstance(spec, list) else evaluations[0]


def _of_all(
    jobs: Sequence[Job],
    specs: Sequence[Spec | Compile | TokenEdits | None],
    resolved: Sequence[Resolved | None],
    found: dict[tuple[int, int], Solution],
    rounds: Rounds,
    *,
    memory: int | None,
    store: str | Path | None,
    progress: bool | tqdm,
) -> None:
    """Solve the problems under all specs, round by round, into `found`; the processes of a launch share the problems."""
    group, model, new = processes(), jobs[0].model, jobs[0].new
    texts = None if store is None else Texts(store, jobs, specs)
    own_hash = data_hash([job.hash_of(spec) for job, spec in zip(jobs, specs, strict=True)])
    if group.num_processes > 1 and len(set(all_gather(own_hash))) > 1:
        raise ValueError(
            "the processes of this launch were given different specs, questions or options; give all the same."
        )
    if texts is not None:
        found.update(texts.known())
    bar = progress if isinstance(progress, tqdm) else None
    left = sum(len(range(group.process_index, size, group.num_processes)) for size in rounds.sizes)

    def finish(spec: int, problem: int, text: Solution) -> None:
        found[spec, problem] = text
        if texts is not None:
            texts.add(spec, problem, text)
        if bar is not None:
            bar.update()

    shown = progress is True and group.is_main_process
    tokens = progress_bar(0, "token", shown=shown, unit_scale=True)

    def advance(written: int, spared: int) -> None:
        tokens.total = (tokens.total or 0) - spared
        tokens.update(written)

    def write(wanted: Rows) -> None:
        if runs_together(model, specs, jobs[0].scope):
            rows = ProblemRows(jobs, specs, resolved, finish)
            write_rows(model, wanted, rows, new=new, memory=memory, suppressed=jobs[0].ends.never, advance=advance)
            return
        for number, (job, spec, of_spec) in enumerate(zip(jobs, specs, resolved, strict=True)):
            assert not isinstance(spec, TokenEdits)  # `resolve_spec` has refused them
            problems = [problem for its, problem in wanted if its == number]
            _one_by_one(job, spec, of_spec, problems, partial(finish, number), lambda n: advance(n * new, 0))

    with tokens, texts or nullcontext(), evaluating(model), no_gradients(model):
        for given in rounds.rows():
            mine = [one for one in given if one[1] % group.num_processes == group.process_index]
            wanted = [one for one in mine if one not in found]
            tokens.total = (tokens.total or 0) + len(wanted) * new
            left -= len(mine)
            if bar is not None:
                bar.update(len(mine) - len(wanted))
            on_all_ranks(partial(write, wanted))
            for of_one in all_gather([(one, found[one]) for one in mine]):
                found.update(of_one)
    if bar is not None:
        bar.update(left)


def _one_by_one(
    job: Job,
    spec: Spec | Compile | None,
    resolved: Resolved | None,
    problems: Sequence[int],
    finish: Callable[[int, Solution], object],
    advance: Callable[[int], object],
) -> None:
    """Solve some of the problems under one spec, batch by batch, by the model's own forward and cache."""
    model, questions, scope = job.model, job.questions, job.scope
    for batch in questions.prompts.batches(job.batch_size, which=problems):
        batch = batch.to(input_device(model))
        solutions = [Solution(job.ends, questions.given(i)) for i in batch.index]
        decoding = BatchDecoding(model, job.ends, solutions, job.new)
        if job.read_once:
            decoding.beginning = read_beginning(model, batch, scope, spec, resolved, job.new)
        if spec is None:
            decoding.run(**batch.inputs())
        else:
            compiled = compile_for(spec, scope, batch, questions, resolved, job.reference, job.new)
            iv = IntervenableModel(compiled.config, model)
            iv.generate(
                batch.inputs(),
                unit_locations=compiled.unit_locations,
                source_representations=compiled.source_representations(iv.sorted_keys),
                intervene_on_prompt=scope in ("prompt", "both"),
                intervene_on_new_tokens=scope != "prompt",
                new_token_rows=decoding.is_reasoning if scope == "reasoning" else None,
                decode=decoding.run,
            )
        for problem, solution in zip(batch.index, solutions, strict=True):
            finish(problem, solution)
        advance(len(batch.index))
