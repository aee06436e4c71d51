"""Greedy decoding of many rows at once: every row is one problem under one intervention, decoded until its text ends.

Each forward pass adds one token to every row and reads the weights once. A prompt is read once for all the interventions that
leave it unchanged. Rows that have ended make room for waiting ones, so that the batch stays as large as the memory allows.

Three quarters of the memory are for the rows' caches, and a quarter is for what is temporary: prompts being read, and logits. At
least one row and one prompt are run at a time; apart from that, the limit is never exceeded.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import dimensions, n_heads, n_layers
from pyvene_ext.engine.decode.edits import RowEdits, TokenEdit
from pyvene_ext.engine.decode.past import KeysValues, RowPast, row_attention
from pyvene_ext.models.devices import empty_cache, input_device, weights_on_a_device
from pyvene_ext.models.replay import Replay

MIB = 2**20
LOGIT_COPIES = 3  # of the logits of a step: as computed, as float32, and as log-probabilities
SCORE_COPIES = 6  # of a layer's scores: as computed, joined, capped, masked, as a pattern and edited
TABLE_COPIES = (
    2  # of scores or patterns in a table, in which every prompt has room for as many rows as the one with most
)
FREE = 4  # rows enter, and those that have ended leave, once they are a quarter of the batch: both copy keys and values
HELD = 3 / 4  # of the memory, for rows
Job = tuple[int, int]  # the numbers of a spec and of one of its problems


class Text(Protocol):
    """What a row writes."""

    ended: bool

    @property
    def is_edited(self) -> bool:
        """Whether its last token is edited when the row takes it."""
        ...

    def add(self, token: int, log_probability: float) -> None:
        """Add a token, or end the text.

        Args:
            token: the most likely next token.
            log_probability: of the token.
        """
        ...


Advance = Callable[[int, int], object]


class Read(NamedTuple):
    """Prompts that the model has read under one intervention, or under none, and the rows that continue them.

    Attributes:
        jobs: the rows.
        prompt_of: for each row the prompt that it continues.
        lengths: tokens of each prompt.
        keys_values: by layer; the tokens of each prompt stand in its first columns.
        logits: at the prompts' last tokens.
    """

    jobs: Sequence[Job]
    prompt_of: Sequence[int]
    lengths: Sequence[int]
    keys_values: list[KeysValues]
    logits: Float[Tensor, "prompt vocab"]


class Program(Protocol):
    """What decoding asks about its rows: their prompts, edits and texts."""

    @property
    def edits_prompts(self) -> bool:
        """Whether specs edit the prompts, so that each row has keys and values of its own."""
        ...

    def prompt(self, job: Job) -> tuple[int, int]:
        """The number of a row's prompt, which is the same for the same tokens, and how many these are."""
        ...

    def reading(self, length: int) -> int:
        """Bytes that reading a prompt of `length` tokens takes besides the keys and values that its rows hold."""
        ...

    def read(self, jobs: Sequence[Job], most: int) -> Iterator[Read]:
        """Let the model read the prompts of rows, at most `most` at once."""
        ...

    def edits(self, spec: int, problems: Sequence[int]) -> list[tuple[TokenEdit, ...]]:
        """The edits of new tokens, for each problem."""
        ...

    def text(self, spec: int, problem: int) -> Text:
        """Begin the text of a row."""
        ...

    @property
    def finish(self) -> Callable[[int, int, Any], None]:
        """Receives the text of a spec and a problem that has ended, or has as many tokens as it may."""
        ...


@dataclass
class _Row:
    job: Job
    text: Text
    edits: tuple[TokenEdit, ...]
    token: int = 0
    count: int = 0


def write_rows(
    model: PreTrainedModel,
    jobs: Iterable[Job],
    program: Program,
    *,
    new: int,
    memory: int | None = None,
    suppressed: Sequence[int] = (),
    advance: Advance = lambda written, spared: None,
) -> None:
    """Write the texts of all rows.

    Args:
        model: a model whose `attention_can_be_seen`, in eval mode and without gradients.
        jobs: (spec, problem) of each row.
        program: what the rows do.
        new: most tokens of a text.
        memory: bytes for keys, values and logits; by default as much as the weights take, at least 1 GiB.
        suppressed: tokens that are never written.
        advance: called with the number of tokens that have been written, and of those that will not be because a text has ended.

    Raises:
        ValueError: the device has not enough memory for a single row. One row is tried whatever `memory` is.
    """
    memory = max(1024 * MIB, weights_on_a_device(model)) if memory is None else memory
    prompts = {job: program.prompt(job) for job in jobs}
    waiting = deque(sorted(prompts, key=lambda job: (-prompts[job][1], prompts[job][0], *job)))
    writer = _Writer(model, program, new, memory, suppressed, advance)
    while waiting or writer.rows:
        try:
            writer.admit(waiting)
            if writer.rows:
                writer.step()
            continue
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            started = writer.abandon()
            if len(started) == 1:
                raise ValueError(
                    f"one text of {prompts[started[0]][1]} and {new} new tokens does not fit in memory; use shorter "
                    "prompts, fewer new tokens, a smaller dtype or another device."
                ) from error
        waiting.extendleft(reversed(started))
        writer.memory //= 2
        empty_cache()  # here, because the error holds on to the tensors of the step


class _Writer:
    """The rows that are being written."""

    def __init__(
        self,
        model: PreTrainedModel,
        program: Program,
        new: int,
        memory: int,
        suppressed: Sequence[int],
        advance: Advance,
    ) -> None:
        self.model, self.program, self.new, self.memory = model, program, new, memory
        self.suppressed, self.advance = list(suppressed), advance
        self.replay, self.past, self.rows = Replay(model), RowPast(model, new), list[_Row]()
        self.entering: list[Job] = []
        self._edits: RowEdits | None = None  # made when it is used: rows that leave and those that enter change it
        sizes = dimensions(model.config)
        layers = n_layers(model.config)
        self.token_bytes = 2 * layers * sizes["n_kv_head"] * sizes["d_head"] * model.dtype.itemsize
        # One layer is held twice while rows enter or leave, and its keys in float32 while rows attend to them.
        self.token_bytes += self.token_bytes // layers
        # In one layer: the hidden state, projected and summed, and the MLP's activations.
        self.step_bytes = (8 * sizes["d_model"] + 4 * sizes["d_mlp"]) * 4

    # -- entering and leaving ----------------------------------------------------------------------------------------------

    def admit(self, waiting: deque[Job]) -> None:
        """Let waiting rows enter, once a quarter of the memory is free for them."""
        most = self.memory * HELD
        if not waiting or (self.rows and self._bytes() > most * (1 - 1 / FREE)):
            return
        copies: Counter[int] = Counter()  # rows of each prompt; of each row, if it reads its prompt by itself
        longest = 0
        while waiting:
            prompt, length = self.program.prompt(waiting[0])
            copies[len(copies) if self.program.edits_prompts else prompt] += 1
            longest, count = max(longest, length), len(self.entering) + 1
            held = self._bytes(len(copies), longest, count, max(copies.values()))
            if len(self.rows) + count > 1 and held > most:
                break
            self.entering.append(waiting.popleft())
        if self.entering:
            self._enter(self.entering, longest)
        self.entering = []

    def _bytes(self, prompts: int = 0, longest: int = 0, rows: int = 0, copies: int = 0) -> int:
        """What the rows hold, together with more: keys and values, and the activations of one layer.

        Args:
            prompts: how many more prompts.
            longest: the tokens of the longest.
            rows: how many more rows.
            copies: the most rows of one of these prompts.

        Returns:
            Bytes.
        """
        longest = max(longest, self.past.width)
        prompts, rows = prompts + len(self.past.lengths), rows + len(self.past)
        places = prompts * max(copies, self.past.copies)
        scores = 4 * n_heads(self.model.config) * (longest + self.new)
        held = prompts * longest * self.token_bytes + rows * (self.new * self.token_bytes + self.step_bytes)
        return held + scores * (rows * SCORE_COPIES + places * TABLE_COPIES)

    def _enter(self, jobs: Sequence[Job], longest: int) -> None:
        at_once = int(self.memory * (1 - HELD)) // self.program.reading(longest)
        reads: list[list[KeysValues]] = []
        lengths: list[int] = []
        prompt_of: list[int] = []
        for read in self.program.read(jobs, max(1, at_once)):
            rows = self._begin(read)
            going = [number for number, row in enumerate(rows) if not self._is_done(row)]
            used = sorted({read.prompt_of[number] for number in going})
            if not going:
                continue
            if len(used) < len(read.lengths):
                for layer, pair in enumerate(read.keys_values):
                    read.keys_values[layer] = pair[0][used], pair[1][used]
            prompt_of += [len(lengths) + used.index(read.prompt_of[number]) for number in going]
            lengths += [read.lengths[prompt] for prompt in used]
            reads.append(read.keys_values)
            self.rows += [rows[number] for number in going]
        if reads:
            self.past.enter(reads, lengths, prompt_of)
        self._edits = None

    def _begin(self, read: Read) -> list[_Row]:
        """The rows that continue what has been read, each with its first token."""
        problems: dict[int, list[int]] = defaultdict(list)
        for spec, problem in read.jobs:
            problems[spec].append(problem)
        edits = {spec: dict(zip(its, self.program.edits(spec, its), strict=True)) for spec, its in problems.items()}
        rows = [_Row(job, self.program.text(*job), edits[job[0]][job[1]]) for job in read.jobs]
        best = most_likely(read.logits, self.suppressed)
        for row, prompt in zip(rows, read.prompt_of, strict=True):
            self._take(row, *(some[prompt] for some in best))
        return rows

    def _keep(self, which: Sequence[int]) -> None:
        self.rows = [self.rows[number] for number in which]
        if self.rows:
            self.past.keep(which)
        else:
            self.past = RowPast(self.model, self.new)
        self._edits = None

    def abandon(self) -> list[Job]:
        """Give up all rows, which are to begin again; returns them."""
        started = [row.job for row in self.rows if not self._is_done(row)]
        started = list(dict.fromkeys([*started, *self.entering]))
        self.rows, self.entering, self.past = [], [], RowPast(self.model, self.new)
        return started

    # -- writing -----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Let every row take its last token and choose the next."""
        past, device = self.past, input_device(self.model)
        edited = [row.text.is_edited for row in self.rows]
        which = None if all(edited) else torch.tensor(edited, device=device)
        if self._edits is None:
            self._edits = RowEdits(self.model, [row.edits for row in self.rows])
        past.step()
        with row_attention(past), self._edits.hooked(past, which):
            hidden = self.replay.bare(
                input_ids=torch.tensor([[row.token] for row in self.rows], device=device),
                position_ids=past.positions[:, None].to(device),
                attention_mask=past.no_mask.to(device),
                past_key_values=past,
                use_cache=True,
            ).last_hidden_state[:, -1]
        past.stepped()
        at_once = max(1, int(self.memory * (1 - HELD)) // (LOGIT_COPIES * 4 * self.model.config.vocab_size))
        found = [most_likely(self.replay.unembed(some), self.suppressed) for some in hidden.split(at_once)]
        tokens, log_probabilities = ([x for some in found for x in some[which]] for which in (0, 1))
        for row, token, log_probability in zip(self.rows, tokens, log_probabilities, strict=True):
            if not self._is_done(row):
                self._take(row, token, log_probability)
        going = [number for number, row in enumerate(self.rows) if not self._is_done(row)]
        if (len(going) < len(self.rows) and (len(self.rows) - len(going)) * FREE >= len(self.rows)) or not going:
            self._keep(going)

    def _take(self, row: _Row, token: Any, log_probability: Any) -> None:
        row.token, row.count = int(token), row.count + 1
        row.text.add(row.token, float(log_probability))
        self.advance(1, self.new - row.count if self._is_done(row) else 0)
        if self._is_done(row):
            self.program.finish(*row.job, row.text)

    def _is_done(self, row: _Row) -> bool:
        return row.text.ended or row.count == self.new


def most_likely(logits: Float[Tensor, "row vocab"], suppressed: Sequence[int]) -> tuple[list[int], list[float]]:
    """Choose the next token of each row.

    Args:
        logits: at the rows' last tokens; changed.
        suppressed: tokens that are never chosen.

    Returns:
        The most likely tokens and their log-probabilities.
    """
    logits = logits.float()
    logits[:, suppressed] = -torch.inf
    best, tokens = logits.log_softmax(-1).max(-1)
    return tokens.tolist(), best.tolist()
