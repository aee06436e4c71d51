"""Greedy decoding of many rows at once: every row is one prompt under one intervention and writes until its text ends.

All rows take one token in the same forward pass, which reads the weights once. A prompt is read once for all the interventions
that leave it alone. Rows that have ended leave, and waiting ones enter: the batch stays as large as the memory allows.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
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
FREE = 4  # rows enter, and those that have ended leave, once they are a quarter of the batch: both copy keys and values


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
    """Prompts that the model has read under one intervention, or under none.

    Attributes:
        keys_values: by layer; the tokens of each prompt stand in its first columns.
        logits: at the prompts' last tokens.
    """

    keys_values: list[KeysValues]
    logits: Float[Tensor, "prompt vocab"]


class Program(Protocol):
    """What rows do: specs and prompts are numbered."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each prompt."""
        ...

    @property
    def edits_prompts(self) -> bool:
        """Whether specs edit the prompts, so that each reads them by itself."""
        ...

    def read(self, spec: int, prompts: Sequence[int]) -> Read:
        """Let the model read prompts under a spec (any, if specs leave prompts alone)."""
        ...

    def edits(self, spec: int, prompts: Sequence[int]) -> list[tuple[TokenEdit, ...]]:
        """The edits of new tokens, for each prompt."""
        ...

    def text(self, spec: int, prompt: int) -> Text:
        """Begin the text of a row."""
        ...

    @property
    def finish(self) -> Callable[[int, int, Any], None]:
        """Receives the text of a spec and a prompt that has ended, or has as many tokens as it may."""
        ...


@dataclass
class _Row:
    spec: int
    prompt: int
    text: Text
    edits: tuple[TokenEdit, ...]
    token: int = 0
    count: int = 0


def write_rows(
    model: PreTrainedModel,
    jobs: Iterable[tuple[int, int]],
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
        jobs: (spec, prompt) of each row.
        program: what the rows do.
        new: most tokens of a text.
        memory: bytes for keys, values and logits; by default as much as the weights take, at least 1 GiB.
        suppressed: tokens that are never written.
        advance: called with the number of tokens that have been written, and of those that will not be because a text has ended.

    Raises:
        ValueError: a single row does not fit in memory.
    """
    memory = max(1024 * MIB, weights_on_a_device(model)) if memory is None else memory
    waiting = deque(sorted(jobs, key=lambda job: (-program.lengths[job[1]], job[1], job[0])))
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
                    f"one text of {program.lengths[started[0][1]]} and {new} new tokens does not fit in memory; use shorter "
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
        self.entering: list[tuple[int, int]] = []
        self._edits: RowEdits | None = None  # made when it is used: rows that leave and those that enter change it
        sizes = dimensions(model.config)
        layers = n_layers(model.config)
        self.token_bytes = 2 * layers * sizes["n_kv_head"] * sizes["d_head"] * model.dtype.itemsize
        # In one layer: the hidden state, projected and summed, and the MLP's activations.
        self.step_bytes = (8 * sizes["d_model"] + 4 * sizes["d_mlp"]) * 4

    # -- entering and leaving ----------------------------------------------------------------------------------------------

    def admit(self, waiting: deque[tuple[int, int]]) -> None:
        """Let waiting rows enter, once a quarter of the memory is free for them."""
        if not waiting or (self.rows and self._held() > self.memory * (1 - 1 / FREE)):
            return
        prompts, longest = self._prompts()
        count = len(self.rows)
        while waiting:
            _, prompt = waiting[0]
            prompts.add(prompt)
            longest, count = max(longest, self.program.lengths[prompt]), count + 1
            if count > 1 and self._bytes(len(prompts), longest, count) > self.memory:
                break
            self.entering.append(waiting.popleft())
        if self.entering:
            self._enter(self.entering)
        self.entering = []

    def _prompts(self) -> tuple[set[int], int]:
        """The prompts of the rows, and the length of the longest."""
        prompts = {row.prompt for row in self.rows}
        return prompts, max((self.program.lengths[prompt] for prompt in prompts), default=0)

    def _held(self) -> int:
        prompts, longest = self._prompts()
        return self._bytes(len(prompts), longest, len(self.rows))

    def _bytes(self, prompts: int, longest: int, rows: int) -> int:
        """What so many rows of so many prompts hold: keys and values, and the activations of one layer."""
        read_by_itself = rows if self.program.edits_prompts else prompts
        scores = 2 * 4 * n_heads(self.model.config) * (longest + self.new)
        return read_by_itself * longest * self.token_bytes + rows * (
            self.new * self.token_bytes + self.step_bytes + scores
        )

    def _enter(self, jobs: Sequence[tuple[int, int]]) -> None:
        program = self.program
        specs_of: dict[int, list[int]] = defaultdict(list)
        for spec, prompt in jobs:
            specs_of[spec].append(prompt)
        if program.edits_prompts:
            groups = [(prompts, {spec: prompts}) for spec, prompts in specs_of.items()]
        else:
            groups = [(list(dict.fromkeys(prompt for _, prompt in jobs)), dict(specs_of))]
        for prompts, of_spec in groups:
            (first, *_) = of_spec
            read = program.read(first, prompts)
            best = most_likely(read.logits, self.suppressed)
            at = {prompt: number for number, prompt in enumerate(prompts)}
            rows: list[_Row] = []
            for spec, its in of_spec.items():
                for prompt, edits in zip(its, program.edits(spec, its), strict=True):
                    row = _Row(spec, prompt, program.text(spec, prompt), edits)
                    self._take(row, *(some[at[prompt]] for some in best))
                    rows.append(row)
            going = sorted((row for row in rows if not self._is_done(row)), key=lambda row: at[row.prompt])
            if going:
                used = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.prompt for row in going))}
                kept = [tuple(x[[at[prompt] for prompt in used]] for x in pair) for pair in read.keys_values]
                of_row = [used[row.prompt] for row in going]
                self.past.enter(kept, [program.lengths[prompt] for prompt in used], of_row)  # type: ignore[arg-type]
                self.rows += going
        self._edits = None

    def _keep(self, which: Sequence[int]) -> None:
        self.rows = [self.rows[number] for number in which]
        if self.rows:
            self.past.keep(which)
        else:
            self.past = RowPast(self.model, self.new)
        self._edits = None

    def abandon(self) -> list[tuple[int, int]]:
        """Give up all rows, which are to begin again; returns them."""
        started = [(row.spec, row.prompt) for row in self.rows if not self._is_done(row)]
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
        at_once = max(1, self.memory // 4 // (LOGIT_COPIES * 4 * self.model.config.vocab_size))
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
            self.program.finish(row.spec, row.prompt, row.text)

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
