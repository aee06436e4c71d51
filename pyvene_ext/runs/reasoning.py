"""What studies of reasoning share: problems, a model's own reasoning as the block, and the models that are to solve them.

A block is the reasoning that the untouched model itself wrote for a problem, all of it before `####`. It is given again, up to
and with the `####`, under each condition, and what the model then writes is its answer. Problems for which it wrote no reasoning,
or no `####`, have no block; they are skipped and reported. The block of a model of continuous thoughts is its latent steps
(`models.latent_steps`), and every problem has one; after it such a model writes its answer right away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import note
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.lag import rank_heads
from pyvene_ext.methods.heads.scores import read_head_scores
from pyvene_ext.methods.reasoning.evaluate import Evaluation, Results, evaluate, facts_of
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
    tiny_problems,
    tokenize_problems,
    with_latents,
    with_reasoning,
)
from pyvene_ext.prompts.shipped import PROMPTS
from pyvene_ext.runs.flags import Problems
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head

TINY, PLAIN = "tiny", "plain"
N_TINY, N_PLAIN = 400, 40  # problems that a study has by default
VERDICTS = "verdicts (drop above 10 points: causal, below 2: redundant)"


@dataclass(frozen=True)
class Setting:
    """One model on the problems it has reasoned about.

    Attributes:
        name: in tables.
        questions: with the model's reasoning up to the `####`, or with its latent steps; positions "block_first" and
            "block_last".
        first: the untouched run that wrote it, on all problems.
        clean: the untouched run from the `####` on (or after the latent steps, which is then the first run too).
        results: what is kept of an interrupted study.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    first: Evaluation
    clean: Evaluation
    results: Results
    flags: Problems

    @property
    def facts(self) -> dict[str, Any]:
        """Counts for the summary."""
        return {
            "problems": len(self.first),
            "with_reasoning": len(self.questions),
            "first_run": self.first.summary(),
            "clean": self.clean.summary(),
        }

    def at(self, position: int) -> tuple[Questions, list[int]]:
        """The problems with a token at this place of their block (negative: from its end), there named "hub"; and which."""
        blocks = self.questions.blocks
        which = [i for i, block in enumerate(blocks) if -len(block) <= position < len(block)]
        some = self.questions.take(which)
        rows = zip(some.prompts.input_ids, some.prompts.positions, some.blocks, strict=True)
        positions = tuple({**named, "hub": block[position] - len(ids)} for ids, named, block in rows)
        return replace(some, prompts=replace(some.prompts, positions=positions)), which

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

    def run(self, questions: Questions, spec: Spec, reference: Reference | None = None) -> Evaluation:
        """The answers with a spec in place in the prompt; kept between runs."""
        condition = {
            "spec": to_plain([spec]),
            "new": self.flags.answer_tokens,
            "prompts": questions.prompts.hash,
            "reference": None if reference is None else reference.prompts.hash,
        }
        return self.results.get(
            condition,
            lambda: evaluate(
                self.model,
                self.tokenizer,
                questions,
                spec,
                "prompt",
                max_new_tokens=self.flags.answer_tokens,
                batch_size=self.flags.batch_size,
                reference=reference,
                rule=self.flags.rule,
            ),
        )


def prepare(
    flags: Problems,
    name: str,
    problems: Sequence[Problem],
    unfinished: Path,
    check: Callable[[str, PreTrainedModel], object] = lambda name, model: None,
) -> Setting:
    """Load one model and let it reason.

    Raises ValueError for problems that it cannot be given or does not reason about; and whatever `check` raises, which is called
    with the model before that is run.
    """
    model, tokenizer = flags.load(name)
    check(Path(name).name, model)
    latent = format_of(model) is not None
    tokens = flags.answer_tokens + (0 if latent else flags.new_tokens)
    questions = ask(flags, model, tokenizer, problems, tokens)
    results = Results(unfinished, facts_of(model, questions, tokens, flags.rule))

    def wrote(questions: Questions, new: int) -> Evaluation:
        return results.get(
            {"spec": None, "new": new, "prompts": questions.prompts.hash},
            lambda: evaluate(
                model, tokenizer, questions, max_new_tokens=new, batch_size=flags.batch_size, rule=flags.rule
            ),
        )

    note(f"{Path(name).name}: {len(questions)} problems")
    first = wrote(questions, flags.answer_tokens if latent else flags.new_tokens)
    warn(flags, Path(name).name, first)
    reasoned = questions if latent else with_reasoning(questions, first.ids, tokenizer)
    if len(reasoned) < 2:
        raise ValueError(f"{name} reasons about {len(reasoned)} of {len(questions)} problems; an interval needs two.")
    clean = first if latent else wrote(reasoned, flags.answer_tokens)
    return Setting(Path(name).name, model, tokenizer, reasoned, first, clean, results, flags)


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
        template = CHAT_TEMPLATE if flags.chat else TEMPLATE
        examples = find_examples(flags)
        return tokenize_problems(
            problems, tokenizer, template, context, examples=examples, shots=flags.n_shots, chat=flags.chat
        )
    if flags.shots or flags.chat:
        raise ValueError(
            "a model of continuous thoughts is asked as it was trained to be; leave out --shots and --chat."
        )
    return with_latents(tokenize_problems(problems, tokenizer, form.template, context - len(form.tokens)), model)


def find_problems(flags: Problems) -> tuple[Problem, ...]:
    """The problems that --problems names, with as many steps as --problem_steps asks for."""
    limit = flags.limit
    if flags.source == TINY:
        problems: Sequence[Problem] = tiny_problems(limit or N_TINY, rng(0, "word problems"), held_out=True)
        if flags.n_steps:
            raise ValueError("--problem_steps is for other problems: tiny ones have one or two.")
        return tuple(problems)
    if flags.source == PLAIN:
        limit = limit or N_PLAIN
    problems = with_steps(flags, load_problems(_file(flags.source, "test")), flags.source)
    return tuple(problems[:limit])


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


def positions_of(setting: Setting, least: int) -> range:
    """The places from the block's first token on that enough problems have; ValueError if there is none."""
    lengths = sorted(map(len, setting.questions.blocks), reverse=True)
    if len(lengths) < least:
        raise ValueError(
            f"{setting.name} has {len(lengths)} problems with reasoning, and --min_problems asks for {least} at a token; give "
            "more problems, or ask for fewer."
        )
    return range(lengths[least - 1])


def counts(model: str, facts: dict[str, Any]) -> str:
    """How many problems there are, and what became of them, for the terminal."""
    first, clean = facts["first_run"], facts["clean"]
    return f"{outcome(model, first)}; {facts['with_reasoning']} have a block, of them {100 * clean['accuracy']:.1f}% correct"


def outcome(model: str, counted: Mapping[str, Any]) -> str:
    """What became of the texts of one run, by `Evaluation.summary`, for the terminal."""
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
