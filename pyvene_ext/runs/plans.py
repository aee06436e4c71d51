"""How long a study will take on this machine, measured before it starts."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from pyvene_ext.engine.plain import answer_logits
from pyvene_ext.models.devices import broadcast_from_main
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import TokenizedPrompts

LONGEST = 600.0  # seconds: a run that takes longer starts only if its size was given
MEASURED = 8  # prompts of one timed pass
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
            for _ in range(2):  # the first pass is slow, whatever the model
                start = time.perf_counter()
                answer_logits(model, batch).sum().item()  # waits for a GPU
                seconds = time.perf_counter() - start
        return seconds

    return broadcast_from_main(measured) * sum(map(len, prompts.input_ids)) / sum(map(len, few.input_ids))


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
        for _ in range(2):  # the first time is slow
            start = time.perf_counter()
            logits = x @ part.T
            (logits >= logits[:, :1]).float().sum().item()  # waits for a GPU
            seconds = time.perf_counter() - start
        return seconds

    return broadcast_from_main(measured) * (rows / max(1, few)) * (len(weight) / len(part))


def duration(seconds: float) -> str:
    """A time as people say it: "under a minute", "about 7 minutes", "about 3 hours"."""
    if seconds < 60:
        return "under a minute"
    if seconds < 5400:
        minutes = round(seconds / 60)
        return "about a minute" if minutes == 1 else f"about {minutes} minutes"
    return f"about {round(seconds / 3600)} hours"
