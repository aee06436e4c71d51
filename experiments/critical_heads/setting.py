"""What the studies of critical heads share: flags, problems, a model's own reasoning as the block, verdicts.

A block is the reasoning that the untouched model itself wrote for a problem, all of it before `####`. It is given again, up to
and with the `####`, under each condition, and what the model then writes is its answer. Problems for which it wrote no reasoning,
or no `####`, have no block; they are left out and counted. The block of a model of continuous thoughts is its latent steps
(`pyvene_ext.models.latent_steps`), and every problem has one; behind it such a model writes its answer right away.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num
from tiny_tasks import draw
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_heads, n_layers
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.cli import write_config
from pyvene_ext.io.files import output_path, remove_leftovers, write_json
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.reasoning.evaluate import (
    Evaluation,
    Results,
    evaluate,
    facts_of,
)
from pyvene_ext.models.devices import choose_device
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.models.loading import load_model
from pyvene_ext.prompts.problems import (
    CHAT_TEMPLATE,
    TEMPLATE,
    Problem,
    Questions,
    load_problems,
    room,
    tokenize_problems,
    with_latents,
    with_reasoning,
)
from pyvene_ext.runs.sweeps import discard
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head
from pyvene_ext.stats.intervals import Interval, frequency_interval, paired_bootstrap

TINY = "tiny"
N_TINY = 400  # problems that a study of the tiny models has by default
RESAMPLES = 10_000
FEW = 5  # changed problems, below which their spread is hardly known


@dataclass(frozen=True)
class Flags:
    models: tuple[str, ...] = ("tiny-qwen2.5",)
    """one or more of: a shipped tiny model, a folder, a name on the hub"""
    problems: str = TINY
    """tiny (held-out word problems of the tiny models), gsm8k, or a .jsonl or .json file in GSM8K's form"""
    out: Path | None = None
    """the folder of what is written; by default outputs/critical_heads/STUDY/PROBLEMS_MODELS"""
    shots: int = 0
    """so many solved problems are put before each question, for models that are no instruct models"""
    shots_from: str | None = None
    """where they are taken from, as in --problems; by default problems that tiny or gsm8k train on, or a file's other problems"""
    chat: bool = False
    """ask in the chat template of the model's tokenizer, for instruct models"""
    limit: int | None = None
    """only the first so many problems"""
    max_new_tokens: int = 32
    """where the reasoning is cut, with its answer"""
    answer_tokens: int = 8
    """where the answer is cut, once the reasoning is given"""
    batch_size: int = 64
    """problems a forward pass"""
    device: str | None = None
    """cpu, cuda ..., or auto to spread the model over what there is; by default a GPU if there is one"""
    dtype: str = "auto"
    """of the weights; auto keeps the checkpoint's"""
    seed: int = 0
    """of the bootstrap and of all noise"""


@dataclass(frozen=True)
class Setting:
    """One model on the problems it has reasoned about.

    Attributes:
        name: in tables.
        questions: with the model's reasoning up to the `####`, or with its latent steps; positions "block_first" and
            "block_last".
        first: the untouched run that wrote it, on all problems.
        clean: the untouched run from the `####` on (or behind the latent steps, which is then the first run too).
        results: what is kept of an interrupted study.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    first: Evaluation
    clean: Evaluation
    results: Results
    flags: Flags

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
            ),
        )


def check_flags(flags: Flags) -> None:
    """Raise ValueError for common flags that make no sense."""
    for flag in ("limit", "max_new_tokens", "answer_tokens", "batch_size"):
        value = getattr(flags, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag} must be 1 or more, not {value}.")
    if flags.shots < 0:
        raise ValueError(f"--shots must be 0 or more, not {flags.shots}.")
    if not flags.models or len({Path(name).name for name in flags.models}) < len(flags.models):
        raise ValueError("--models names one or more models, each once.")
    if flags.seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {flags.seed}.")


def check_rankings(rankings: Sequence[str], flags: Flags) -> None:
    """Raise ValueError unless there is a ranking for each model, or none at all."""
    if rankings and len(rankings) != len(flags.models):
        raise ValueError(f"--rankings names {len(rankings)} files for {len(flags.models)} models; give one each.")


def check_heads(named: Sequence[str], flag: str = "heads", once: bool = True) -> None:
    """Raise ValueError for what is no layer.head, and for a head named twice."""
    for head in named:
        if not re.fullmatch(r"\d+\.\d+", head):
            raise ValueError(f"--{flag} names heads as layer.head, such as 2.5, not {head!r}.")
    if once and len(set(named)) < len(named):
        raise ValueError(f"--{flag} names each head once.")


def heads_of(named: Sequence[str], name: str, model: PreTrainedModel, flag: str = "heads") -> tuple[Head, ...]:
    """The heads that a flag names; ValueError for one that the model has not."""
    layers, heads = n_layers(model.config), n_heads(model.config)
    chosen = tuple((int(layer), int(head)) for layer, head in (one.split(".") for one in named))
    for layer, head in chosen:
        if layer >= layers or head >= heads:
            raise ValueError(
                f"--{flag} {layer}.{head}: {name} has layers 0 to {layers - 1}, each with heads 0 to {heads - 1}."
            )
    return chosen


def top_heads(scores: Float[np.ndarray, "layer head"], wanted: int) -> tuple[Head, ...]:
    """Those with the highest scores, highest first."""
    order = np.argsort(-scores, axis=None, kind="stable")[:wanted]
    return tuple((int(layer), int(head)) for layer, head in (divmod(at, scores.shape[1]) for at in order))


def in_short(head: Head) -> str:
    """A head as flags and tables name it."""
    return f"{head[0]}.{head[1]}"


def folder_of(flags: Flags, study: str) -> Path:
    """Where everything is written; a ValueError if that cannot be."""
    name = "_".join([Path(flags.problems).stem, *(Path(name).name for name in flags.models)])
    return output_path(flags.out, Path("outputs/critical_heads") / study / name)


def find_problems(flags: Flags) -> tuple[Problem, ...]:
    """The problems that --problems names."""
    if flags.problems != TINY:
        return load_problems(flags.problems, flags.limit)
    return tiny_problems(flags.limit or N_TINY, rng(0, "word problems"), held_out=True)


def find_examples(flags: Flags) -> tuple[Problem, ...]:
    """Solved problems for --shots, one more than asked for; the problem that is asked must not be among those shown."""
    if not flags.shots:
        return ()
    draw_examples = rng(flags.seed, "solved examples")
    source = flags.shots_from or flags.problems
    if source == TINY:
        return tiny_problems(flags.shots + 1, draw_examples, held_out=False)
    every = load_problems(source, split="train")
    few = draw_examples.permutation(len(every))[: flags.shots + 1]
    return tuple(every[i] for i in few)


def tiny_problems(count: int, generator: np.random.Generator, held_out: bool) -> tuple[Problem, ...]:
    """Word problems of the tiny models."""
    found = []
    for _ in range(count):
        example = draw("arithmetic", generator, held_out=held_out)
        found.append(
            Problem(
                question=example.prompt.removeprefix("Question: ").removesuffix(" Answer:"),
                solution=example.answer.strip(),
                answer=float(example.answer.split()[-1]),
                steps=example.answer.count("<<"),
            )
        )
    return tuple(found)


def prepare(
    flags: Flags,
    name: str,
    problems: Sequence[Problem],
    folder: Path,
    check: Callable[[str, PreTrainedModel], object] = lambda name, model: None,
) -> Setting:
    """Load one model and let it reason.

    Raises ValueError for problems that it cannot be given or does not reason about; and whatever `check` raises, which is called
    with the model before that is run.
    """
    model, tokenizer = load_model(name, dtype=flags.dtype, device=choose_device(flags.device))
    check(Path(name).name, model)
    latent = format_of(model) is not None
    tokens = flags.answer_tokens + (0 if latent else flags.max_new_tokens)
    questions = ask(flags, model, tokenizer, problems, tokens)
    results = Results(folder / "unfinished", facts_of(model, questions, tokens))

    def wrote(questions: Questions, new: int) -> Evaluation:
        return results.get(
            {"spec": None, "new": new, "prompts": questions.prompts.hash},
            lambda: evaluate(model, tokenizer, questions, max_new_tokens=new, batch_size=flags.batch_size),
        )

    print(f"{Path(name).name}: {len(questions)} problems", file=sys.stderr)
    first = wrote(questions, flags.answer_tokens if latent else flags.max_new_tokens)
    reasoned = questions if latent else with_reasoning(questions, first.ids, tokenizer)
    if len(reasoned) < 2:
        raise ValueError(f"{name} reasons about {len(reasoned)} of {len(questions)} problems; an interval needs two.")
    clean = first if latent else wrote(reasoned, flags.answer_tokens)
    return Setting(Path(name).name, model, tokenizer, reasoned, first, clean, results, flags)


def ask(
    flags: Flags,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    new_tokens: int,
) -> Questions:
    """The problems as this model is to be given them, with room for what it writes; with latent steps if it thinks in them."""
    context, form = room(model, new_tokens), format_of(model)
    if form is None:
        template = CHAT_TEMPLATE if flags.chat else TEMPLATE
        examples = find_examples(flags)
        return tokenize_problems(
            problems, tokenizer, template, context, examples=examples, shots=flags.shots, chat=flags.chat
        )
    if flags.shots or flags.chat:
        raise ValueError(
            "a model of continuous thoughts is asked as it was trained to be; leave out --shots and --chat."
        )
    return with_latents(tokenize_problems(problems, tokenizer, form.template, context - len(form.tokens)), model)


@contextmanager
def written(folder: Path, config: Flags, summary: dict[str, Any], *earlier: str) -> Iterator[None]:
    """Around the writing of a study's own files: those of an earlier run go first (`earlier`: more than its tables), and the
    summary comes last, so that where it is, the rest is, and of this run.
    """
    (folder / "summary.json").unlink(missing_ok=True)
    for pattern in ("*.csv", *earlier):
        for path in folder.glob(pattern):
            path.unlink()
    yield
    write_config(folder / "config.yaml", config)
    write_json(folder / "summary.json", summary)
    remove_leftovers(*folder.rglob("*"))
    discard(folder / "unfinished")


def accuracy(correct: Bool[np.ndarray, " problem"]) -> Interval:
    """Percent correct with Wilson's 95% interval."""
    return Interval(*(100 * float(value) for value in frequency_interval(correct)))


def drop_of(
    clean: Num[np.ndarray, " problem"], after: Num[np.ndarray, " problem"], seed: int, *names: str | int
) -> Interval:
    """Points of accuracy lost: mean and paired bootstrap 95% interval.

    Where next to no problem changes, or all do alike, a bootstrap knows next to no spread, however few the problems are. The ends
    are then at least as far from the mean as Wilson's interval goes for a share of 0.
    """
    drop = Interval(*(100 * value for value in paired_bootstrap(clean, after, rng(seed, *names), RESAMPLES)))
    if np.count_nonzero(clean != after) >= FEW and drop.low < drop.high:
        return drop
    reach = 100 * float(frequency_interval(np.zeros(len(clean))).high)
    low, high = min(drop.low, drop.mean - reach), max(drop.high, drop.mean + reach)
    return Interval(drop.mean, max(low, -100.0), min(high, 100.0))


def of_interval(name: str, interval: Interval) -> dict[str, Any]:
    """The cells of a table that hold a mean with its interval."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def in_words(drop: Interval) -> str:
    """A drop for the terminal: "12.5 points [8.0, 17.0]"."""
    return f"{drop.mean:.1f} points [{drop.low:.1f}, {drop.high:.1f}]"


def counts(model: str, facts: dict[str, Any]) -> str:
    """How many problems there are, for the terminal."""
    first, clean = facts["first_run"], facts["clean"]
    return (
        f"{model}: {facts['problems']} problems, {100 * first['accuracy']:.1f}% correct untouched ({first['unparsed']} unparsed, "
        f"{first['cut']} cut); {facts['with_reasoning']} have a block, of them {100 * clean['accuracy']:.1f}% correct"
    )


def side_by_side(rows: Sequence[dict[str, Any]], key: str, suffix: str, value: str) -> list[dict[str, Any]]:
    """A table with one row a `key` and one column MODEL_suffix a model; a model without that key has an empty cell."""
    models = dict.fromkeys(row["model"] for row in rows)
    found = {(row[key], row["model"]): row[value] for row in rows}
    keys = dict.fromkeys(row[key] for row in rows)
    return [{key: k, **{f"{model}_{suffix}": found.get((k, model), math.nan) for model in models}} for k in keys]


def positions_of(setting: Setting, least: int) -> range:
    """The places from the block's first token on that enough problems have; ValueError if there is none."""
    lengths = sorted(map(len, setting.questions.blocks), reverse=True)
    if len(lengths) < least:
        raise ValueError(
            f"{setting.name} has {len(lengths)} problems with reasoning, and --min_problems asks for {least} at a token; give "
            "more problems, or ask for fewer."
        )
    return range(lengths[least - 1])
