"""What studies of reasoning share: problems, a model's own reasoning as the block, and the models that are to solve them.

A block is the reasoning that the untouched model itself wrote for a problem, all of it before `####`. Problems for which it wrote
no reasoning, or no `####`, have no block; they are skipped and reported. Under each condition the model regenerates
one of two things (--regenerate):

    answer      the block is given again, up to and with the `####`, and what the model then writes is its answer. This asks what
                the answer is read from; the number in it may be copied from the last line of the block.
    reasoning   the block is given only as far as the intervention needs, and the model writes the rest and its answer: after
                noise at a token, all that follows this token; with attention forced, or with other heads, all of it. This asks
                what reasoning is written from. It is compared with the untouched run that wrote the block.

The block of a model of continuous thoughts is its latent steps (`models.latent_steps`), and every problem has one; after it such
a model writes its answer right away, which is all that is written again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import note
from pyvene_ext.io.errors import counted
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lag import rank_heads
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.block_scores import BlockScores, block_scores
from pyvene_ext.methods.reasoning.forcing import forced_while_writing
from pyvene_ext.methods.solving.evaluate import evaluate
from pyvene_ext.methods.solving.evaluation import Evaluation
from pyvene_ext.methods.solving.replacing import Scope, TokenEdits
from pyvene_ext.methods.solving.results import Results, facts_of
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.sizes import heads_of, n_heads, n_layers
from pyvene_ext.prompts.problems import (
    CHAT_TEMPLATE,
    STEP,
    TEMPLATE,
    Problem,
    Questions,
    load_problems,
    prompt_budget,
    solved_before,
    tiny_problems,
    tokenize_problems,
    with_latents,
    with_reasoning,
)
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs.flags import Deciding, Problems, Regeneration
from pyvene_ext.runs.plans import Writing, seconds_a_pass, time_writing
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.forced_attention import ForcedAttention
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head
from pyvene_ext.stats.thresholds import CAUSAL, REDUNDANT

TINY, PLAIN = "tiny", "plain"
N_TINY, N_PLAIN = 400, 32  # problems that a study has by default
Check = Callable[
    [int, str, PreTrainedModel], object
]  # of a model, its place in --models and its name, before it is run
P = TypeVar("P", bound=Problems)


class Forcing(NamedTuple):
    """Attention forced in the reasoning that a model regenerates.

    Attributes:
        spec: the patterns.
        which: the problems.
        hubs: the hub of each, a token of its reasoning by its number; for the shape hub.
    """

    spec: tuple[ForcedAttention, ...]
    which: Sequence[int]
    hubs: Sequence[int] | None = None


@dataclass(frozen=True)
class Setting:
    """One model on the problems it has reasoned about.

    Attributes:
        name: in tables.
        questions: with the model's reasoning up to the `####`, or with its latent steps; positions "block_first" and
            "block_last".
        first: the untouched run that wrote it, on all problems.
        clean: the untouched run that conditions are compared with, on the problems of `questions`: from the `####` on (or after
            the latent steps, which is then the first run too), or the one that wrote the block if reasoning is regenerated.
        results: what is kept of an interrupted study.
        anew: whether reasoning is regenerated under a condition, and not the answer alone.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    first: Evaluation
    clean: Evaluation
    results: Results
    flags: Problems
    anew: bool = False

    @property
    def new_tokens(self) -> int:
        """How many tokens are written under a condition."""
        return self.flags.new_tokens if self.anew else self.flags.answer_tokens

    @property
    def bare(self) -> Questions:
        """The questions without their reasoning."""
        some = self.questions
        rows = tuple(ids[:length] for ids, length in zip(some.prompts.input_ids, some.lengths, strict=True))
        ends = ({"end": -1, "last": -1},) * len(some)
        prompts = replace(some.prompts, input_ids=rows, positions=ends)
        return replace(some, prompts=prompts, blocks=(range(0),) * len(some))

    @property
    def facts(self) -> dict[str, Any]:
        """Counts for the summary."""
        return {
            "problems": len(self.first),
            "with_reasoning": len(self.questions),
            "first_run": self.first.summary(),
            "clean": self.clean.summary(),
            "regenerated": "reasoning" if self.anew else "answer",
        }

    def at(self, position: int) -> tuple[Questions, list[int]]:
        """The problems with a token at this place of their block (negative: from its end), there named "hub"; and which.

        Where reasoning is regenerated, this token is the last that is given.
        """
        blocks = self.questions.blocks
        which = [i for i, block in enumerate(blocks) if -len(block) <= position < len(block)]
        if not self.anew:
            return self.with_hubs(which, [position] * len(which)), which
        some = self.questions.take(which)
        hubs = [block[position] for block in some.blocks]
        rows = tuple(ids[: hub + 1] for ids, hub in zip(some.prompts.input_ids, hubs, strict=True))
        named: Any = ({"end": -1, "last": -1, "hub": -1},) * len(some)
        return replace(some, prompts=replace(some.prompts, input_ids=rows, positions=named)), which

    def with_hubs(self, which: Sequence[int], hubs: Sequence[int]) -> Questions:
        """Some problems with their reasoning, in which a token is named "hub".

        Args:
            which: the problems.
            hubs: the token of each block by its number, negative from its end.

        Returns:
            The questions.
        """
        some = self.questions.take(which)
        rows = zip(some.prompts.input_ids, some.prompts.positions, some.blocks, hubs, strict=True)
        named = tuple({**places, "hub": block[hub] - len(ids)} for ids, places, block, hub in rows)
        return replace(some, prompts=replace(some.prompts, positions=named))

    def tokens_at(self, position: str) -> list[int | None]:
        """The token of each problem, counted from its first, that a position names; None where a block is too short.

        Args:
            position: question_last, block_first, block_last, mark (the last token given), or a token of the block by its number.

        Returns:
            The problems that have such a token, where it is named "hub"; and which of all problems these are.
        """
        found: list[int | None] = []
        questions = self.questions
        for block, ids, length in zip(questions.blocks, questions.prompts.input_ids, questions.lengths, strict=True):
            named = {
                "question_last": length - 1,
                "block_first": block[0],
                "block_last": block[-1],
                "mark": len(ids) - 1,
            }
            if position in named:
                found.append(named[position])
            else:
                number = int(position)
                found.append(block[number] if -len(block) <= number < len(block) else None)
        return found

    def block_scores(self, flow: bool = True) -> BlockScores:
        """The scores of all heads within the blocks; kept between runs."""
        return block_scores(
            self.model,
            self.questions,
            flow=flow,
            batch_size=self.flags.batch_size,
            results=self.results,
            progress=is_main_process(),
        )

    def run(self, conditions: Sequence[tuple[Questions, Spec]], reference: Reference | None = None) -> list[Evaluation]:
        """What is written under each of several conditions, all at once; kept between runs.

        Args:
            conditions: questions, and the spec that is in place in their prompts.
            reference: statistics that replacements are computed from.

        Returns:
            What is written, in the order of the conditions.
        """
        facts = [
            {
                "spec": to_plain([spec]),
                "new": self.new_tokens,
                "prompts": questions.prompts.hash,
                "reference": None if reference is None else reference.prompts.hash,
            }
            for questions, spec in conditions
        ]
        return self._kept(facts, conditions, "prompt", reference)

    def force(self, conditions: Sequence[Forcing]) -> list[Evaluation]:
        """Some problems' reasoning and answers regenerated with attention forced in the reasoning; kept between runs.

        Args:
            conditions: the patterns, whose blocks are those that are written, and the problems.

        Returns:
            What is written, in the order of the conditions.
        """
        bare = self.bare
        asked = [bare.take(which) for _, which, _ in conditions]
        facts = [
            {
                "spec": to_plain([spec]),
                "new": self.new_tokens,
                "prompts": questions.prompts.hash,
                "hubs": None if hubs is None else [*hubs],
            }
            for questions, (spec, _, hubs) in zip(asked, conditions, strict=True)
        ]
        forced = [
            forced_while_writing(self.model, spec, questions, self.new_tokens, hubs)
            for questions, (spec, _, hubs) in zip(asked, conditions, strict=True)
        ]
        return self._kept(facts, list(zip(asked, forced, strict=True)), "reasoning")

    def _kept(
        self,
        facts: Sequence[dict[str, Any]],
        conditions: Sequence[tuple[Questions, Spec | TokenEdits]],
        scope: Scope,
        reference: Reference | None = None,
    ) -> list[Evaluation]:
        """Solve the problems under all conditions at once."""
        return self.results.get_all(
            facts,
            lambda missing: evaluate(
                self.model,
                self.tokenizer,
                [conditions[number][0] for number in missing],
                [conditions[number][1] for number in missing],
                scope,
                max_new_tokens=self.new_tokens,
                batch_size=self.flags.batch_size,
                reference=reference,
                rule=self.flags.rule,
                read_once=True,
                memory=self.flags.memory_bytes,
                store=self.results.folder / "texts",
                progress=is_main_process(),
            ),
        )


@dataclass(frozen=True)
class Asked:
    """One model and the problems as it is given them, before anything has been run.

    Attributes:
        name: in tables.
        questions: the problems without reasoning, or with latent steps.
        results: what is kept of an interrupted study.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    results: Results
    flags: Problems

    @property
    def latent(self) -> bool:
        """Whether the model thinks in latent steps."""
        return format_of(self.model) is not None

    @property
    def anew(self) -> bool:
        """Whether reasoning is regenerated under a condition."""
        return isinstance(self.flags, Regeneration) and self.flags.anew and not self.latent

    @cached_property
    def writing(self) -> Writing:
        """How fast the model writes, measured."""
        return time_writing(self.model, self.questions.prompts, self.flags.batch_size)

    @cached_property
    def a_pass(self) -> float:
        """How long a forward pass over one problem takes, measured."""
        return seconds_a_pass(self.model, self.questions.prompts) / len(self.questions)

    @cached_property
    def own_share(self) -> float:
        """The share of the prompts' tokens that do not belong to solved examples."""
        given = sum(solved_before(self.questions, self.tokenizer)) if self.flags.n_shots else 0
        return 1 - given / sum(map(len, self.questions.prompts.input_ids))

    def seconds(self, n: int) -> float:
        """How long `reason` takes at most with n problems: the texts, and the answers given again."""
        flags = self.flags
        tokens = flags.answer_tokens if self.latent else flags.new_tokens + flags.answer_tokens
        return self.writing.seconds(n, tokens)

    def seconds_of_conditions(self, n: int, conditions: int, reading: float = 1) -> float:
        """How long runs with interventions take at most, all at once.

        Args:
            n: problems of each.
            conditions: how many runs.
            reading: the share of a prompt that each reads by itself.

        Returns:
            Seconds.
        """
        tokens = self.flags.new_tokens if self.anew else self.flags.answer_tokens
        return self.writing.seconds(n, tokens, conditions) + reading * conditions * n * self.writing.reading

    def reason(self) -> Setting:
        """Let the model solve the problems, and give its reasoning again.

        Raises ValueError for problems that it does not reason about.
        """
        flags, questions = self.flags, self.questions
        note(f"{self.name}: {len(questions)} problems")
        first = self._wrote(questions, flags.answer_tokens if self.latent else flags.new_tokens)
        warn(flags, self.name, first)
        reasoned = questions if self.latent else with_reasoning(questions, first.ids, self.tokenizer)
        if len(reasoned) < 2:
            cut = int((~first.ended).sum())
            longer = f"{cut} texts were cut at --max_new_tokens {flags.new_tokens}; " if cut else ""
            raise ValueError(
                f"{self.name} reasons about {len(reasoned)} of {len(questions)} problems, and an interval needs two: {longer}"
                "give more problems, or easier ones."
            )
        with_blocks = first.take(reasoned.index)
        clean = with_blocks if self.anew or self.latent else self._wrote(reasoned, flags.answer_tokens)
        return Setting(self.name, self.model, self.tokenizer, reasoned, first, clean, self.results, flags, self.anew)

    def _wrote(self, questions: Questions, new: int) -> Evaluation:
        batch_size, rule = self.flags.batch_size, self.flags.rule

        def write() -> Evaluation:
            return evaluate(
                self.model,
                self.tokenizer,
                questions,
                max_new_tokens=new,
                batch_size=batch_size,
                rule=rule,
                read_once=True,
                progress=is_main_process(),
            )

        return self.results.get({"spec": None, "new": new, "prompts": questions.prompts.hash}, write)


def load(flags: Problems, problems: Sequence[Problem], unfinished: Path, check: Check | None, number: int) -> Asked:
    """Load one model and tokenise its problems; for `runs.each_model`.

    Args:
        flags: of the study.
        problems: the problems.
        unfinished: where finished work is kept.
        check: raises ValueError for a model that the study cannot be done with.
        number: which of the models.

    Returns:
        The model with the problems.

    Raises:
        ValueError: what `check` raises, and problems that the model cannot be given.
    """
    name = Path(flags.models[number]).name
    model, tokenizer = flags.load(flags.models[number])
    if check is not None:
        check(number, name, model)
    tokens = flags.answer_tokens + (0 if format_of(model) is not None else flags.new_tokens)
    questions = ask(flags, model, tokenizer, problems, tokens)
    results = Results(unfinished, facts_of(model, questions, tokens, flags.rule))
    return Asked(name, model, tokenizer, questions, results, flags)


def ask(
    flags: Problems,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    new_tokens: int,
) -> Questions:
    """The problems as this model is to be given them, with room for what it writes; with latent steps if it thinks in them."""
    context, form = prompt_budget(model, new_tokens), format_of(model)
    if form is None:
        examples = find_examples(flags)

        def with_shots(shots: int, room: int | None) -> Questions:
            template, few = CHAT_TEMPLATE if flags.chat else TEMPLATE, examples[: shots + 1]
            return tokenize_problems(problems, tokenizer, template, room, examples=few, shots=shots, chat=flags.chat)

        try:
            return with_shots(flags.n_shots, context)
        except ValueError:
            with_shots(flags.n_shots, None)  # raises the same if it is not for the length
            fits = _most(flags.n_shots, lambda shots: with_shots(shots, context))
            if fits is None:
                raise
            raise ValueError(
                f"--shots {flags.n_shots}: a problem after this many solved ones is longer than the {context} tokens for which "
                f"there is room before {new_tokens} new ones; give --shots {fits} or fewer."
            ) from None
    if flags.shots or flags.chat:
        raise ValueError(
            "a model of continuous thoughts is asked as it was trained to be; leave out --shots and --chat."
        )
    return with_latents(tokenize_problems(problems, tokenizer, form.template, context - len(form.tokens)), model)


def _most(number: int, action: Callable[[int], object]) -> int | None:
    """The largest number below this one for which an action raises no ValueError; None if it does for 0, too."""

    def fails(few: int) -> bool:
        try:
            action(few)
        except ValueError:
            return True
        return False

    return bisect.bisect_left(range(number), True, key=fails) - 1 if not fails(0) else None


def of_both_steps(flags: P, plain: int, tiny: int | None = None) -> P:
    """Flags with other problems where none are asked for: `tiny` tiny ones, or `plain` plain ones of one and two steps.

    Args:
        flags: of the study.
        plain: how many plain problems.
        tiny: how many tiny ones; None for the usual number.

    Returns:
        The flags with --limit and --problem_steps, unless these are given or the problems are from elsewhere.
    """
    if flags.limit is None and flags.source == TINY and tiny is not None:
        return replace(flags, limit=tiny)
    if flags.limit is None and flags.source == PLAIN:
        return replace(flags, limit=plain, problem_steps=flags.problem_steps or (1, 2))
    return flags


def find_problems(flags: Problems) -> tuple[Problem, ...]:
    """The problems that --problems names, with as many steps as --problem_steps asks for."""
    limit = flags.limit
    if flags.source == TINY:
        if flags.n_steps:
            raise ValueError("--problem_steps is for other problems: tiny ones have one or two.")
        return _tiny_problems(limit or N_TINY)
    if flags.source == PLAIN and limit is None:
        limit = N_PLAIN
    problems = with_steps(flags, load_problems(_file(flags.source, "test")), flags.source)
    return tuple(problems[: limit or None])


@cache
def _tiny_problems(count: int) -> tuple[Problem, ...]:
    """The same whenever they are drawn, which takes a while: several studies in one process draw them once."""
    return tiny_problems(count, rng(0, "word problems"), held_out=True)


def find_examples(flags: Problems) -> tuple[Problem, ...]:
    """Solved problems for --shots, one more than asked for; the problem that is asked must not be among those shown."""
    if not flags.n_shots:
        return ()
    draw_examples = rng(flags.seed, "solved examples")
    source = flags.shots_from or flags.source
    if source == TINY:
        few = tiny_problems(flags.n_shots + 1, draw_examples, held_out=False)
    else:
        every = with_steps(flags, load_problems(_file(source, "train"), split="train"), source)
        if flags.n_shots >= len(every):
            raise ValueError(
                f"--shots {flags.n_shots}: {source} has {counted(len(every), 'solved problem')}, and one may be the one that is "
                f"asked; give --shots 0 to {len(every) - 1}."
            )
        few = tuple(every[i] for i in draw_examples.permutation(len(every))[: flags.n_shots + 1])
    if flags.keeps_calculations:
        return few
    return tuple(problem.model_copy(update={"solution": STEP.sub("", problem.solution)}) for problem in few)


def with_steps(flags: Problems, problems: Sequence[Problem], source: str) -> tuple[Problem, ...]:
    """Those of the number of steps asked for; ValueError if there is none."""
    wanted = flags.n_steps
    some = tuple(problem for problem in problems if not wanted or problem.steps in wanted)
    if not some:
        have = ", ".join(map(str, sorted({problem.steps for problem in problems})))
        raise ValueError(f"--problem_steps: {source} has problems of {have} steps, and none of those asked for.")
    return some


def _file(source: str, split: str) -> str | Path:
    """The file of a shipped set of problems; what else --problems takes as it is."""
    return PROMPTS / f"{PLAIN}_{split}.jsonl" if source == PLAIN else source


def check_number(problems: Sequence[Problem], least: int = 2) -> None:
    """Raise ValueError for fewer problems than --min_problems asks for, or an interval."""
    n = len(problems)
    if n < 2:
        raise ValueError("there is one problem, and an interval needs two; give more.")
    if n < least:
        raise ValueError(
            f"--min_problems {least}: there are only {n} problems; give a larger --limit, or --min_problems {n} or less."
        )


def verdicts_title(above: float = CAUSAL, below: float = REDUNDANT) -> str:
    """The line above verdicts."""
    return f"verdicts (drop above {above:g} points: causal, below {below:g}: redundant)"


VERDICTS = verdicts_title()


def check_deciding(flags: Deciding, n: int) -> None:
    """Check that n problems can show what --decide asks; says on stderr if they can show the upper threshold alone.

    Args:
        flags: of the study.
        n: how many problems it has.

    Raises:
        ValueError: they can show neither.
    """
    rule = flags.stopping(0)
    if rule is None or rule.decide is None:
        return
    (above, below), (lost, same) = rule.decide, rule.least()
    needs = [f"{least:g}" if least < np.inf else "very many" for least in (lost, same)]
    if n < min(lost, same):
        raise ValueError(
            f"--decide {above:g} {below:g}: a drop above {above:g} points takes {needs[0]} problems at least, all of them lost, "
            f"and one below {below:g} {needs[1]} of which none changes, and there are {n}; give a larger --limit, or others."
        )
    if n < same:
        note(
            f"--decide {above:g} {below:g}: {n} problems can show a drop above {above:g} points, but not one below {below:g}, "
            f"which takes {needs[1]} of which none changes"
        )


def positions_of(setting: Setting, least: int, places: int | None = None) -> list[int]:
    """The places from the block's first token on that enough problems have, all or `places` of them, evenly spaced.

    Raises ValueError if there is none.
    """
    lengths = sorted(map(len, setting.questions.blocks), reverse=True)
    if len(lengths) < least:
        raise ValueError(
            f"{setting.name} has {len(lengths)} problems with reasoning, and --min_problems asks for {least} at a token; give "
            "more problems, or ask for fewer."
        )
    every = range(lengths[least - 1])
    if places is None or places >= len(every):
        return list(every)
    return sorted({round(place) for place in np.linspace(every[0], every[-1], places)})


def counts(model: str, facts: dict[str, Any]) -> str:
    """How many problems there are, and their outcomes, for the terminal."""
    first, clean = facts["first_run"], facts["clean"]
    return f"{outcome(model, first)}; {facts['with_reasoning']} have a block, of them {100 * clean['accuracy']:.1f}% correct"


def outcome(model: str, counted: Mapping[str, Any]) -> str:
    """The outcomes of the texts of one run, by `Evaluation.summary`, for the terminal."""
    classes = ", ".join(f"{counted[kind]} {kind}" for kind in ("correct", "wrong", "unparsed"))
    return (
        f"{model}: {counted['problems']} problems, {100 * counted['accuracy']:.1f}% correct untouched ({classes}; "
        f"{counted['cut']} cut), answers by {counted['rule']}"
    )


def warn(flags: Problems, model: str, untouched: Evaluation) -> None:
    """Say on stderr if most of an untouched model's texts are of no use, and which flag would help."""
    counted, n = untouched.summary(), len(untouched)
    if 2 * (~untouched.ended).sum() > n:
        remedy = f"give more than --max_new_tokens {flags.new_tokens}" + (", or leave out --chat" if flags.chat else "")
        what = f"{counted['cut']} of {n} texts are cut at the limit"
    elif 2 * (~untouched.parsed).sum() > n:
        what = f"{counted['unparsed']} of {n} texts have no answer by {flags.rule}"
        remedy = (
            "give --answer_rule flexible-extract"
            if flags.rule == "strict-match"
            else "show solved problems with --shots 3"
        )
    elif 2 * untouched.correct.sum() < n:
        what = f"{counted['wrong']} of {n} answers are wrong"
        easier = [] if flags.n_shots else ["--shots 3"]
        easier += [] if flags.source in (TINY, PLAIN) else ["--problems plain"]
        easier += ["--problem_steps 1"] if flags.source == PLAIN and flags.n_steps != (1,) else []
        remedy = f"give {' or '.join(easier)}" if easier else "take a model that solves such problems"
    else:
        return
    note(f"{model}, untouched: {what}, so that what is found is about few solved problems; {remedy}")


def given_heads(
    model: PreTrainedModel,
    name: str,
    wanted: int,
    named: Sequence[str] = (),
    ranking: str | None = None,
    flag: str = "heads",
) -> tuple[Head, ...]:
    """The first `wanted` heads that a flag names or a file ranks; none where they are still to be ranked.

    Args:
        model: whose heads they are.
        name: what errors call it.
        wanted: how many heads.
        named: heads as layer.head, from `flag`.
        ranking: a CSV scores,layer,head, such as rank_heads.py writes; counts where no heads are named.
        flag: what errors call it.

    Returns:
        The heads, highest-ranked first.

    Raises:
        ValueError: a head that the model has not, more heads than it has, or than the file ranks.
    """
    if named:
        return heads_of(named, name, model, flag)[:wanted]
    layers, heads = n_layers(model.config), n_heads(model.config)
    if wanted > layers * heads:
        raise ValueError(f"--n_heads asks for {wanted} heads and {name} has {layers * heads}; ask for fewer.")
    if ranking is None:
        return ()
    return rank_heads(read_head_scores(ranking, model.config), "full", layers, wanted)


def top_heads(scores: Float[np.ndarray, "layer head"], wanted: int) -> tuple[Head, ...]:
    """Those with the highest scores, highest first."""
    order = np.argsort(-scores, axis=None, kind="stable")[:wanted]
    return tuple((int(layer), int(head)) for layer, head in (divmod(at, scores.shape[1]) for at in order))
