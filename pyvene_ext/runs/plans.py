"""How long a study will take on this machine, measured before it starts; and what several studies in one process share.

    with kept() as here:
        ...   # each model is loaded once, each time measured once
    here.seconds   # of each study that announced itself

Outside of `kept` nothing is kept, so that a study of several models needs memory for one.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.models.devices import broadcast_from_main, input_device
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts, common_beginning

T = TypeVar("T")
LONGEST = 600.0  # seconds: a run that takes longer is shortened, unless its size was given
LEAST = 8  # prompts, below which a shortened run would say too little
MEASURED = 8  # prompts of one timed pass
REPEATS, ENOUGH = 5, 2.0  # times that a pass is timed at most, and seconds after which once more would be too much
PART = 4096  # of vocabulary and rows, whose logits are timed


def seconds_a_pass(model: PreTrainedModel, prompts: TokenizedPrompts) -> float:
    """Time one untouched forward pass over all prompts.

    Args:
        model: the model of the study.
        prompts: its prompts.

    Returns:
        Seconds, measured on the first few prompts and scaled by the number of tokens.
    """
    few = prompts.take(range(min(MEASURED, len(prompts))))
    (batch,) = few.batches(len(few))

    def measured() -> float:
        with evaluating(model), torch.no_grad():
            return _best_time(lambda: answer_logits(model, batch))

    taken = once(("a pass", weakref.ref(model), few.hash), lambda: broadcast_from_main(measured))
    return taken * sum(map(len, prompts.input_ids)) / sum(map(len, few.input_ids))


@dataclass(frozen=True)
class Writing:
    """The measured times of greedy decoding.

    Attributes:
        reading: seconds for each prompt; what all prompts begin with is read once and takes none.
        a_step: seconds for a new token in all rows of a batch, however few they are.
        a_row: seconds more for each row.
        batch_size: most rows of a batch.
    """

    reading: float
    a_step: float
    a_row: float
    batch_size: int

    def seconds(self, n: int, new_tokens: int, each: int = 1) -> float:
        """How long it takes to write texts that are as long as they may be.

        Args:
            n: how many prompts.
            new_tokens: most tokens of each text.
            each: how many texts are written for each prompt, which is read once.

        Returns:
            Seconds; texts that end earlier take less.
        """
        texts = n * each
        steps = (new_tokens - 1) * (math.ceil(texts / self.batch_size) * self.a_step + texts * self.a_row)
        return n * self.reading + steps


def time_writing(model: PreTrainedModel, prompts: TokenizedPrompts, batch_size: int = MEASURED) -> Writing:
    """Time greedy decoding, token by token, on the first few prompts.

    Args:
        model: the model of the study.
        prompts: its prompts.
        batch_size: prompts per forward pass.

    Returns:
        The times, of new tokens measured with as many rows as a batch has, and with one.
    """
    beginning = common_beginning(prompts.input_ids)
    few = prompts.take(range(min(MEASURED, len(prompts))))
    (batch,) = few.batches(len(few))
    rows = min(batch_size, len(prompts))

    def measured() -> Writing:
        here = batch.to(input_device(model))
        inputs, mask = here.inputs(), here.attention_mask
        cache: Any = None

        def quickest(passes: int) -> float:
            nonlocal inputs, mask, cache
            seconds = []
            for _ in range(passes):
                start = time.perf_counter()
                given = {**inputs, "attention_mask": mask}
                out = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                ids.sum().item()  # waits for a GPU
                seconds.append(time.perf_counter() - start)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                inputs = {"input_ids": ids, "position_ids": inputs["position_ids"][:, -1:] + 1}
            return min(seconds)

        def continue_with(which: torch.Tensor) -> None:
            nonlocal inputs, mask
            which = which.to(mask.device)
            cache.batch_select_indices(which)
            inputs, mask = {name: x[which] for name, x in inputs.items()}, mask[which]

        with evaluating(model), torch.no_grad():
            reading = quickest(1)
            continue_with(torch.arange(rows) % len(few))
            of_all = quickest(3)
            continue_with(torch.arange(1))
            of_one = quickest(2)
        a_row = max(of_all - of_one, 0.0) / (rows - 1) if rows > 1 else 0.0
        reading *= (1 - beginning / max(map(len, few.input_ids))) / len(few)
        return Writing(reading, of_all - rows * a_row, a_row, batch_size)

    return once(
        ("writing", weakref.ref(model), few.hash, beginning, rows, batch_size), lambda: broadcast_from_main(measured)
    )


def seconds_of_logits(model: PreTrainedModel, rows: int) -> float:
    """Time logits of the whole vocabulary, which are most of the work where single tokens are run.

    Args:
        model: the model of the study.
        rows: how many vectors are unembedded.

    Returns:
        Seconds, measured on a part of the vocabulary.
    """
    weight: torch.Tensor = model.get_output_embeddings().weight
    part = weight[:PART].detach()
    few = min(rows, PART)

    def measured() -> float:
        x = part[:1].expand(few, -1).contiguous()

        def compared() -> torch.Tensor:
            logits = x @ part.T
            return (logits >= logits[:, :1]).float()

        return _best_time(compared)

    return broadcast_from_main(measured) * (rows / max(1, few)) * (len(weight) / len(part))


def that_fit(n: int, seconds: float, fixed: float = 0.0) -> int:
    """How many of `n` prompts fit into ten minutes.

    Args:
        n: all of them, or whatever is counted.
        seconds: how long all take.
        fixed: how many of the seconds do not depend on how many there are.

    Returns:
        At most this many, rounded down to three binary digits (8, 10, 12, 14, 16, 20, ...), so that the same machine mostly gives
        the same number.
    """
    fits = max(0, int(n * (LONGEST - fixed) / max(seconds - fixed, 1.0)))
    return min(n, round_down(fits))


def round_down(number: int) -> int:
    """A number with only its first three binary digits: 8, 10, 12, 14, 16, 20, 24 ..."""
    return number - number % (1 << max(0, number.bit_length() - 3))


def _best_time(action: Callable[[], torch.Tensor]) -> float:
    """Seconds that an action takes at best, once the first time, which is slow whatever it does, is over.

    Of several times the least, as the others may be those of whatever else the machine does; of an action of seconds only one.
    """
    found: list[float] = []
    while len(found) < 2 or (len(found) <= REPEATS and sum(found[1:]) < ENOUGH):
        start = time.perf_counter()
        action().sum().item()  # waits for a GPU
        found.append(time.perf_counter() - start)
    return min(found[1:])


def duration(seconds: float) -> str:
    """A time as people say it: "under a minute", "about 7 minutes", "about 3 hours"."""
    if seconds < 60:
        return "under a minute"
    if seconds < 5400:
        minutes = round(seconds / 60)
        return "about a minute" if minutes == 1 else f"about {minutes} minutes"
    return f"about {round(seconds / 3600)} hours"


# -- several studies in one process ------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What is kept inside the context.

    Attributes:
        things: models and times, by what they were made from.
        seconds: how long each study takes, in the order in which they announced themselves; None where it is quick.
    """

    things: dict[Hashable, Any] = field(default_factory=dict)
    seconds: list[float | None] = field(default_factory=list)


_NOW: list[Kept] = []


@contextmanager
def kept() -> Iterator[Kept]:
    """Keep models and measured times for all studies that are run inside.

    Yields:
        Kept: what is kept.
    """
    _NOW.append(Kept())
    try:
        yield _NOW[-1]
    finally:
        _NOW.pop()


def once(key: Hashable, make: Callable[[], T], worth: Callable[[T], bool] = lambda _: True) -> T:
    """Make something, or take what was made before inside the same `kept`.

    Args:
        key: what it is made from; of a model a weak reference, as its address may be given to another.
        make: makes it.
        worth: whether it is kept.

    Returns:
        What `make` returns or has returned.
    """
    if not _NOW:
        return make()
    things = _NOW[-1].things
    if key in things:
        return things[key]
    made = make()
    if worth(made):
        things[key] = made
    return made


def note_seconds(seconds: float | None) -> None:
    """Note how long the study takes that is about to run."""
    if _NOW:
        _NOW[-1].seconds.append(seconds)
