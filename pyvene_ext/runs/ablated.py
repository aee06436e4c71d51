"""Models that write their own solutions of problems, with heads ablated during generation.

Unlike in `runs.reasoning`, no reasoning is given: the model writes reasoning and answer under the ablation. Scopes are the tokens
at which heads are ablated: "reasoning", each generated token before `####`; "new", those and the tokens of the answer; "both",
the tokens of the question too. For a model of continuous thoughts, the reasoning is its latent steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.io.bars import note
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lag import rank_heads
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.block_scores import Score, block_scores, check_scores, needs_flow
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.replacing import Scope, Transcripts, condition_of
from pyvene_ext.methods.solving.results import Results, facts_of
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.sizes import n_heads, n_layers
from pyvene_ext.prompts.positions import Positions
from pyvene_ext.prompts.problems import Problem, Questions, with_reasoning
from pyvene_ext.runs.flags import Problems
from pyvene_ext.runs.plans import Writing, time_writing
from pyvene_ext.runs.reasoning import ask, given_heads, warn
from pyvene_ext.specs.ablation import heads_together
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head, random_rankings
from pyvene_ext.stats.stopping import Stopping

AblationKind = Literal["zero", "mean", "resample"]
AblationScope = Literal["reasoning", "new", "both"]
SCOPES: dict[AblationScope, str] = {"reasoning": "reasoning", "new": "reasoning and answer", "both": "all tokens"}


@dataclass(frozen=True)
class Solver:
    """One model and the problems that it solves.

    Attributes:
        name: the model's name in tables.
        model: the model.
        tokenizer: its tokenizer.
        questions: the problems as prompts.
        results: finished evaluations, kept for resuming an interrupted study.
        flags: flags of the study.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    results: Results
    flags: Problems

    @cached_property
    def clean(self) -> Evaluation:
        """The solutions of the clean model; says on stderr if they are of little use."""
        (clean,) = self.run([None])
        warn(self.flags, self.name, clean)
        return clean

    def places(self, scope: AblationScope) -> tuple[Positions, Scope]:
        """Convert a scope to positions of the prompt and to the scope that `evaluate` takes."""
        form = format_of(self.model)
        if form is None or scope == "both":
            return "all", scope
        return tuple(f"latent_{step}" for step in range(form.steps)), "prompt" if scope == "reasoning" else "both"

    def ablate(
        self,
        sets: Sequence[Sequence[Head]],
        kind: AblationKind,
        scope: AblationScope,
        reference: Transcripts | None,
        stops: Sequence[Stopping] | None = None,
    ) -> list[Evaluation]:
        """Solve the problems with z of each of these sets of heads ablated, all at once; results are kept for resuming.

        Args:
            sets: (layer, head) pairs, those of a set ablated jointly.
            kind: what replaces their output.
            scope: the tokens at which they are ablated.
            reference: replacement activations, from `transcripts`; None for zero ablation.
            stops: when each set needs no more problems; None: all sets take all.

        Returns:
            The solutions, a set each.
        """
        positions, of_spec = self.places(scope)
        specs = [heads_together(heads, kind, positions=positions, seed=self.flags.seed) for heads in sets]
        return self.run(specs, of_spec, reference, stops)

    def run(
        self,
        specs: Sequence[Spec | None],
        scope: Scope = "both",
        reference: Transcripts | None = None,
        stops: Sequence[Stopping] | None = None,
    ) -> list[Evaluation]:
        """Solve the problems under each of several specs, all at once; texts and results are kept for resuming.

        Args:
            specs: the interventions; None for the clean model.
            scope: the tokens at which they apply, as `evaluate` takes them.
            reference: replacement activations, if the specs need them.
            stops: when each spec needs no more problems; None: all specs take all.

        Returns:
            The solutions, a spec each.
        """
        conditions = [condition_of(spec, scope, reference) for spec in specs]
        if stops is not None:
            conditions = [{**one, "stop": stop.as_dict()} for one, stop in zip(conditions, stops, strict=True)]
        return self.results.get_all(
            conditions,
            lambda missing: evaluate(
                self.model,
                self.tokenizer,
                self.questions,
                [specs[number] for number in missing],
                scope,
                max_new_tokens=self.flags.new_tokens,
                batch_size=self.flags.batch_size,
                reference=reference,
                rule=self.flags.rule,
                read_once=True,
                memory=self.flags.memory_bytes,
                store=self.results.folder / "texts",
                stop=None if stops is None else [stops[number] for number in missing],
                baseline=None if stops is None else self.clean,
                progress=True,
            ),
        )

    @cached_property
    def writing(self) -> Writing:
        """How fast the model writes, measured."""
        return time_writing(self.model, self.questions.prompts, self.flags.batch_size)

    def seconds(self, n: int, sets: int = 1, scope: AblationScope = "reasoning") -> float:
        """How long the model takes at most to solve n problems with each of some sets of heads ablated."""
        again = (
            (sets - 1) * n * self.writing.reading if scope == "both" else 0.0
        )  # each set reads the prompts by itself
        return self.writing.seconds(n, self.flags.new_tokens, sets) + again

    def transcripts(self, kind: AblationKind, rankings: Iterable[Sequence[Head]], donors: int) -> Transcripts | None:
        """Collect the activations that replace these heads' outputs, from the clean model on the first problems.

        Args:
            kind: kind of ablation.
            rankings: all heads that may be ablated.
            donors: number of problems.

        Returns:
            The activations; None if the kind needs none.
        """
        few = range(min(donors, len(self.questions)))
        specs = [heads_together(ranking, kind, seed=self.flags.seed) for ranking in rankings]
        questions, clean = self.questions.take(few), self.clean.take(few)
        return Transcripts.compute(self.model, questions, clean, specs, batch_size=self.flags.batch_size)

    def rank(self, by: Score) -> list[tuple[float, int, int]]:
        """Rank all heads by a score within the clean model's own reasoning: (score, layer, head), highest first."""
        latent = format_of(self.model) is not None
        reasoned = self.questions if latent else with_reasoning(self.questions, self.clean.ids, self.tokenizer)
        matrix = block_scores(
            self.model,
            reasoned,
            flow=needs_flow(by),
            batch_size=self.flags.batch_size,
            results=self.results,
            progress=True,
        ).of(by)
        return sorted(((float(x), *at) for at, x in np.ndenumerate(matrix)), key=lambda row: (-row[0], row[1:]))


class Loaded(NamedTuple):
    """One model before anything has been run.

    Attributes:
        solver: the model and its problems.
        scores: the ranking of a file, as (score, layer, head); empty if there is none.
        heads: the heads that are named or ranked by a file; empty if they are still to be ranked.
    """

    solver: Solver
    scores: list[tuple[float, int, int]]
    heads: tuple[Head, ...]


class Prepared(NamedTuple):
    """One model with the heads to ablate.

    Attributes:
        solver: the model and its problems.
        scores: the whole ranking, as (score, layer, head); empty if heads were named.
        heads: the heads to ablate, highest first.
        controls: random rankings of other heads, of the same layers where these have enough.
    """

    solver: Solver
    scores: list[tuple[float, int, int]]
    heads: tuple[Head, ...]
    controls: list[tuple[Head, ...]]


def load(
    flags: Problems,
    problems: Sequence[Problem],
    unfinished: Path,
    number: int,
    *,
    wanted: int,
    by: Score,
    named: Sequence[str] = (),
    rankings: Sequence[str] = (),
) -> Loaded:
    """Load one model, tokenise its problems, and read which heads are named or ranked by a file; for `runs.each_model`.

    Args:
        flags: flags of the study.
        problems: problems to solve.
        unfinished: folder of finished work.
        number: which of the models.
        wanted: number of heads to take from a ranking.
        by: score that will rank the heads, if no ranking is given.
        named: heads as layer.head.
        rankings: a CSV scores,layer,head for each model; none if there are none.

    Returns:
        The model, and what is known of its heads.

    Raises:
        ValueError: a problem does not fit the model, or a head does not exist.
    """
    name, ranking = flags.models[number], rankings[number] if rankings else None
    model, tokenizer = flags.load(name)
    heads = given_heads(model, name, len(named) or wanted, named, ranking)
    scores: list[tuple[float, int, int]] = []
    if ranking is not None:
        scores = read_head_scores(ranking, model.config)
    if not heads:
        check_scores(model, by)
    questions = ask(flags, model, tokenizer, problems, flags.new_tokens)
    results = Results(unfinished, facts_of(model, questions, flags.new_tokens, flags.rule))
    solver = Solver(Path(name).name, model, tokenizer, questions, results, flags)
    return Loaded(solver, scores, heads)


def choose(loaded: Loaded, *, wanted: int, by: Score, random_sets: int) -> Prepared:
    """Choose the heads of a model and their controls; if neither heads nor a ranking are given, by running the model.

    Args:
        loaded: from `load`.
        wanted: number of heads to take from a ranking.
        by: score that ranks the heads, if no ranking is given.
        random_sets: number of random control rankings.

    Returns:
        The model, its ranking, the heads and their controls.
    """
    solver, scores, heads = loaded
    model, flags = solver.model, solver.flags
    note(f"{solver.name}: {len(solver.questions)} problems")
    if not heads:
        scores = solver.rank(by)
        heads = rank_heads(scores, "full", n_layers(model.config), wanted)
    controls: list[tuple[Head, ...]] = []
    if random_sets:
        sizes, draw = (n_layers(model.config), n_heads(model.config)), rng(flags.seed, "random heads")
        controls = random_rankings(heads, len(heads), *sizes, random_sets, draw)
    return Prepared(solver, scores, heads, controls)
