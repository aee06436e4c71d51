"""Word problems whose answer is a number: loading them, numbers in text, and tokenising prompts.

Problems have GSM8K's form, `{"question", "answer"}`, where the answer is a worked solution with a calculation in `<<...>>` for
each step and the number after `####`.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import n_positions
from pyvene_ext.io.errors import with_article
from pyvene_ext.io.files import parse_json
from pyvene_ext.io.hashes import data_hash
from pyvene_ext.models.latent_steps import format_of
from pyvene_ext.prompts.encoding import encode, pad_id, render_chat
from pyvene_ext.prompts.tiny_tasks import draw
from pyvene_ext.prompts.tokenized import TokenizedPrompts

MARK = "####"
GSM8K = "openai/gsm8k"
TEMPLATE = "Question: {question}\nAnswer:"  # white space apart, what the shipped tiny models were trained on
STOPS = ("\nQuestion:",)  # with these a model goes on to a problem of its own
CHAT_TEMPLATE = "{question}\nSolve this step by step, and end with #### and the answer as a number."
NUMBER = re.compile(r"-?\d+(\.\d+)?")
STEP = re.compile(r"<<.*?>>")
_DIGITS = r"\d+(?:,\d+)*"
_WRITTEN = re.compile(
    rf"""
    (?:(?<![\w)\]}}%.])(?P<sign>[-\u2212\u2010\u2011\u2013\ufe63\uff0d])(?:\\?[$€£¥])?)?  # no sign between two numbers: 3-4
    (?:
        \\[dt]?frac\{{(?P<over>{_DIGITS})\}}\{{(?P<under>{_DIGITS})\}}
        | (?<![\d/.])(?:(?P<whole>{_DIGITS})[ ])?(?P<numerator>{_DIGITS})[ ]?/[ ]?(?P<denominator>{_DIGITS})(?!\.?\d|/)  # no date
        | (?P<before>\d+)?(?P<vulgar>[\u00bc-\u00be\u2150-\u215e])  # the single characters of 1/2 and its like
        | (?P<decimal>(?:{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+\u2212]?\d+(?!\w))?)
    )
    """,
    re.VERBOSE,
)


class Problem(BaseModel):
    """One problem.

    Attributes:
        question: the text of the question.
        solution: the worked solution, with its `####`.
        answer: the number after `####`.
        steps: the number of `<<...>>` in the solution.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str = Field(min_length=1)
    solution: str
    answer: float
    steps: int = Field(ge=0)


class FoundNumber(NamedTuple):
    """A number in a text, and `[start, end)` in characters of where it stands."""

    value: float
    start: int
    end: int


def numbers_in(text: str, start: int = 0, end: int | None = None) -> Iterator[FoundNumber]:
    r"""Read the numbers of a text.

    A number may have a minus sign (a hyphen, or the signs of typesetting), commas between its digits, decimals and an exponent:
    `1,209`, `.5`, `1e3`; or be a fraction: `1/2`, `3 1/2`, `\frac{1}{2}`. A minus that stands directly after a number or word is
    no sign: `3-4` has the numbers 3 and 4.

    Args:
        text: the text.
        start: the character at which to begin.
        end: the character before which to stop.

    Yields:
        FoundNumber: each number, from the left, with its place in the text.
    """
    for match in _WRITTEN.finditer(text, start, len(text) if end is None else end):
        value = _value(match)
        if math.isfinite(value):
            yield FoundNumber(value, *match.span())


def number_at(text: str, start: int) -> FoundNumber | None:
    """Read the number that begins at a character of a text.

    Args:
        text: the text.
        start: the character.

    Returns:
        The number and its place; None if something else stands there.
    """
    match = _WRITTEN.match(text, start)
    return FoundNumber(value, *match.span()) if match and math.isfinite(value := _value(match)) else None


def _value(match: re.Match[str]) -> float:
    """The value of what `_WRITTEN` found; infinite or NaN for a division by zero and for what no float can hold."""
    part = {name: (text or "").replace(",", "").replace("\u2212", "-") for name, text in match.groupdict().items()}
    if part["decimal"]:
        value = float(part["decimal"])
    elif part["vulgar"]:
        value = float(part["before"] or 0) + unicodedata.numeric(part["vulgar"])
    else:
        below = float(part["under"] or part["denominator"])
        value = float(part["whole"] or 0) + (float(part["over"] or part["numerator"]) / below if below else math.inf)
    return -value if part["sign"] else value


def load_problems(name_or_path: str | Path, limit: int | None = None, split: str = "test") -> tuple[Problem, ...]:
    """Load problems from a file, or GSM8K (Cobbe et al. 2021) from the hub.

    Args:
        name_or_path: a .jsonl file (one problem per line) or .json file (a list of them), or "gsm8k" or "openai/gsm8k".
        limit: the most problems to load, the first ones.
        split: split of GSM8K.

    Returns:
        The problems, in order.

    Raises:
        ValueError: an empty or broken file, a problem without question or answer, an answer without `####` or without a number
            after it, a limit below 1.
        FileNotFoundError: there is no such file.
        OSError: the hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}.")
    if str(name_or_path) in ("gsm8k", GSM8K):
        rows: list[tuple[str, Any]] = [(f"{GSM8K}, problem {i}", row) for i, row in enumerate(_from_hub(split))]
    else:
        rows = _from_file(Path(name_or_path))
    if not rows:
        raise ValueError(f"{name_or_path} holds no problems; give at least one.")
    return tuple(_problem(row, where) for where, row in rows[:limit])


def _from_hub(split: str) -> Iterable[Any]:
    import datasets  # takes seconds to import

    try:
        return datasets.load_dataset(GSM8K, "main", split=split)
    except Exception as error:  # the hub, the network and the readers of a dozen formats each raise their own kinds
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise OSError(
            f"loading {GSM8K} from the hub failed ({reason}); give a local .jsonl file of its form instead."
        ) from error


def _from_file(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of problems {path}; check the path, or give gsm8k for the hub's.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it in that encoding.") from None
    try:
        if path.suffix.lower() == ".jsonl":
            lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
            return [(f"{path}, line {i}", parse_json(line)) for i, line in lines]
        content = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        form = "one JSON object per line" if path.suffix.lower() == ".jsonl" else "JSON"
        raise ValueError(f"{path} is not {form} ({error.msg}).") from None
    if not isinstance(content, list):
        raise ValueError(f"{path} must hold a list of problems with question and answer.")
    return [(f"{path}, problem {i}", row) for i, row in enumerate(content)]


def _problem(row: Any, where: str) -> Problem:
    fields = [row.get(name) if isinstance(row, dict) else None for name in ("question", "answer")]
    question, solution = (field if isinstance(field, str) else "" for field in fields)
    if not question.strip() or not solution.strip():
        found = f", and this one has {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else ""
        raise ValueError(f"{where}: a problem needs the texts 'question' and 'answer'{found}.")
    if MARK not in solution:
        raise ValueError(f"{where}: the answer has no {MARK}; its number must follow one.")
    gold = next(numbers_in(solution.rpartition(MARK)[2]), None)
    if gold is None:
        raise ValueError(f"{where}: there is no number after {MARK}.")
    return Problem(
        question=question,
        solution=solution,
        answer=gold.value,
        steps=len(STEP.findall(solution)),
    )


# -- as tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Tokenised problems, optionally with the beginning of a solution.

    Attributes:
        problems: the problems, in the order of the prompts.
        prompts: the prompts. If they have a reasoning block, its first and last tokens are the positions "block_first" and
            "block_last".
        lengths: for each prompt, how many tokens are the question with its template.
        blocks: for each prompt, the tokens that are reasoning, counted from its first token; empty without a solution.
        index: for each prompt, the problem's index in the set that was loaded.
    """

    problems: tuple[Problem, ...]
    prompts: TokenizedPrompts
    lengths: tuple[int, ...]
    blocks: tuple[range, ...]
    index: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.problems)

    @cached_property
    def hash(self) -> str:
        """Hash of the tokens and the gold answers."""
        return data_hash([self.prompts.hash, self.lengths, [problem.answer for problem in self.problems]])

    def take(self, which: Iterable[int]) -> Questions:
        """Select some of the questions.

        Args:
            which: their indices, in the order wanted.

        Returns:
            The questions selected.
        """
        which = list(which)
        return Questions(
            prompts=self.prompts.take(which),
            **{
                name: tuple(getattr(self, name)[i] for i in which)
                for name in ("problems", "lengths", "blocks", "index")
            },
        )

    def given(self, which: int) -> tuple[int, ...]:
        """The part of a solution that is already in a prompt.

        Args:
            which: the prompt's index.

        Returns:
            The token ids after the question.
        """
        return self.prompts.input_ids[which][self.lengths[which] :]


def tokenize_problems(
    problems: Sequence[Problem | Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str = TEMPLATE,
    context: int | None = None,
    *,
    examples: Sequence[Problem | Mapping[str, str]] = (),
    shots: int = 0,
    chat: bool = False,
) -> Questions:
    """Tokenise every question in its template.

    Args:
        problems: the problems, or dicts with their `question` and `answer`, as `load_problems` reads them.
        tokenizer: the model's tokenizer.
        template: a text with `{question}` in it once.
        context: the most tokens that a prompt may have (`prompt_budget`).
        examples: solved problems to put before each question: the first ones that are not the problem itself, in the same
            template with their solutions, an empty line after each.
        shots: how many of them.
        chat: use the tokenizer's chat template, with questions as the user's turns and solutions as the assistant's, up to where
            the assistant goes on.

    Returns:
        One prompt per problem, without a reasoning block.

    Raises:
        ValueError: no problems, something else than problems, a template without `{question}`, words that the tokenizer does not
            know, a prompt longer than `context`, too few examples, or no chat template.
    """
    if not problems:
        raise ValueError("there are no problems; give at least one.")
    problems, examples = _as_problems(problems, "problem"), _as_problems(examples, "solved example")
    if template.count("{question}") != 1:
        raise ValueError("the template must hold {question} exactly once.")
    rows = []
    for number, problem in enumerate(problems):
        before = [example for example in examples if example.question.split() != problem.question.split()][:shots]
        if len(before) < shots:
            raise ValueError(
                f"problem {number} needs {shots} solved examples but there are only {len(before)} besides itself; give more, or "
                "ask for fewer."
            )
        turns = [(template.replace("{question}", example.question), example.solution.strip()) for example in before]
        asked = template.replace("{question}", problem.question)
        if chat:
            contents = (*itertools.chain(*turns), asked)
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
            ids = encode(tokenizer, render_chat(messages, tokenizer), f"problem {number}", chat=True).ids
        else:
            text = "".join(f"{question} {solution}\n\n" for question, solution in turns) + asked
            ids = encode(tokenizer, text, f"problem {number}").ids
        if context is not None and len(ids) > context:
            remedy = "ask for fewer solved examples" if shots else "leave it out"
            raise ValueError(
                f"problem {number} has {len(ids)} tokens and there is room for {context} before what is generated; {remedy}, "
                "generate fewer tokens, or use a model with a longer context."
            )
        rows.append(tuple(ids))
    # Without answers: they are read from what the model generates.
    prompts = TokenizedPrompts(tuple(rows), pad_id=pad_id(tokenizer))
    return Questions(
        tuple(problems), prompts, tuple(map(len, rows)), (range(0),) * len(rows), tuple(range(len(problems)))
    )


def _as_problems(given: Any, what: str) -> tuple[Problem, ...]:
    """Problems as they are, and dicts made into some; ValueError for anything else."""
    if isinstance(given, str | Mapping | Problem):
        raise ValueError(f"give a list of {what}s, not {with_article(type(given).__name__)}.")
    found = []
    for number, one in enumerate(given):
        if not isinstance(one, Problem | Mapping):
            raise ValueError(
                f"{what} {number} is {with_article(type(one).__name__)}; give problems of load_problems, or dicts with "
                f"'question' and 'answer', the solution with its number after {MARK}."
            )
        found.append(one if isinstance(one, Problem) else _problem(dict(one), f"{what} {number}"))
    return tuple(found)


def prompt_budget(model: PreTrainedModel, max_new_tokens: int) -> int:
    """How many tokens a prompt may have, if a model is to generate after it.

    Args:
        model: a model whose family has a card.
        max_new_tokens: the most tokens to generate.

    Returns:
        The model's context less the tokens to generate.

    Raises:
        ValueError: fewer than one new token, or no tokens left for a prompt.
    """
    longest = n_positions(model.config)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}.")
    if longest <= max_new_tokens:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and the model takes {longest} in all; generate fewer.")
    return longest - max_new_tokens


def with_reasoning(
    questions: Questions, written: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Questions:
    """Append generated reasoning to the questions, up to and including `####`, so that only the answer remains to be generated.

    The reasoning block ends before the first token that contains any of `####`. Problems whose text has no `####`, or nothing
    before it, are dropped; `Questions.index` lists those kept.

    Args:
        questions: questions without reasoning.
        written: for each, the tokens generated after the question, such as `Evaluation.ids` of a run without interventions.
        tokenizer: the model's tokenizer.

    Returns:
        The questions that have reasoning, with blocks and the positions "block_first" and "block_last".

    Raises:
        ValueError: no question has reasoning, or `written` does not have one text per question.
    """
    if len(written) != len(questions):
        raise ValueError(f"{len(written)} texts were given for {len(questions)} questions; give one each.")
    kept, rows, blocks = [], [], []
    for which, ids in enumerate(written):
        marked = tokens_until(MARK, ids, tokenizer)
        before = _before_mark(ids[:marked], tokenizer) if marked else 0
        if not before:
            continue
        start = questions.lengths[which]
        kept.append(which)
        rows.append((*questions.prompts.input_ids[which][:start], *ids[:marked]))
        blocks.append(range(start, start + before))
    if not kept:
        raise ValueError(
            f"none of the {len(questions)} texts has reasoning and then {MARK}; generate more tokens, or give other problems."
        )
    some = questions.take(kept)
    positions = tuple(
        {"end": -1, "last": -1, "block_first": block[0] - len(row), "block_last": block[-1] - len(row)}
        for row, block in zip(rows, blocks, strict=True)
    )
    return replace(
        some,
        prompts=replace(some.prompts, input_ids=tuple(rows), positions=positions),
        blocks=tuple(blocks),
    )


def with_latents(questions: Questions, model: PreTrainedModel) -> Questions:
    """Append the latent steps of a model with continuous thoughts, so that only the answer remains to be generated.

    Args:
        questions: questions without reasoning, in the template of `models.format_of(model)`.
        model: a model with latent steps.

    Returns:
        The questions with the latent steps as their block. Positions are "latent_0", "latent_1" ..., "bot", the token that begins
        the thought, "eot", the one that ends it, "block_first" and "block_last".

    Raises:
        ValueError: the model has no latent steps, or batches would be padded with its latent token.
    """
    form = format_of(model)
    if form is None:
        raise ValueError("the model has no latent steps; let it reason in words, and use with_reasoning.")
    if questions.prompts.pad_id == form.latent:
        raise ValueError(
            f"the tokenizer pads with token {form.latent}, which stands for latent steps; give it another pad_token."
        )
    first = -len(form.closing) - form.steps
    named = {"end": -1, "last": -1, "bot": first - 1, "eot": -len(form.closing), "block_first": first}
    named |= {"block_last": first + form.steps - 1, **{f"latent_{step}": first + step for step in range(form.steps)}}
    rows = tuple((*ids, *form.tokens) for ids in questions.prompts.input_ids)
    return replace(
        questions,
        prompts=replace(questions.prompts, input_ids=rows, positions=(named,) * len(rows)),
        blocks=tuple(range(len(row) + first, len(row) + first + form.steps) for row in rows),
    )


def tokens_until(part: str | int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Count the tokens up to a part of their text.

    Args:
        part: a substring, or a number of characters.
        ids: the tokens.
        tokenizer: decodes them.

    Returns:
        The fewest first tokens whose text contains `part`, or has that many characters; None if all of them do not.
    """

    def suffices(count: int) -> bool:
        text = as_text(ids[:count], tokenizer)
        return part in text if isinstance(part, str) else len(text) >= part

    if not suffices(len(ids)):
        return None
    return bisect.bisect_left(range(len(ids)), True, key=suffices)


def solved_before(questions: Questions, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Count the tokens of each prompt before the problem itself, such as those of solved examples.

    Args:
        questions: the problems.
        tokenizer: decodes their prompts.

    Returns:
        One number per prompt; 0 where the problem's text is not found.
    """
    counts = []
    for problem, ids in zip(questions.problems, questions.prompts.input_ids, strict=True):
        start = as_text(ids, tokenizer).rfind(problem.question)
        # A token that begins with the space before the problem is the problem's.
        counts.append((tokens_until(start + 1, ids, tokenizer) or 1) - 1 if start > 0 else 0)
    return counts


def as_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode tokens, without special ones.

    Args:
        ids: the tokens.
        tokenizer: the model's tokenizer.

    Returns:
        Their text.
    """
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _before_mark(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens come before the first one with any of the final `####`."""
    count = 1
    while MARK not in as_text(ids[len(ids) - count :], tokenizer):
        count += 1
    return len(ids) - count


def tiny_problems(count: int, generator: np.random.Generator, held_out: bool) -> tuple[Problem, ...]:
    """Draw word problems of the kind that the shipped tiny models were trained on.

    Args:
        count: the number of problems.
        generator: the random generator.
        held_out: draw from the problems that the models were not trained on, else from the others.

    Returns:
        The problems; the same one may come twice.
    """
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
