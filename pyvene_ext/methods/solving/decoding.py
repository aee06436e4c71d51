"""Greedy decoding of one batch under one intervention, by the model's own forward and cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_layers, window
from pyvene_ext.engine.decode.rows import most_likely
from pyvene_ext.engine.resolve import Resolved
from pyvene_ext.methods.solving.replacing import Compile, Scope
from pyvene_ext.methods.solving.texts import Ends, Solution
from pyvene_ext.prompts.tokenized import Batch, common_beginning
from pyvene_ext.specs.joint import Spec, members

SHORTEST = 32  # a beginning of fewer tokens is not worth a pass of its own


class Beginning(NamedTuple):
    """What all rows of a batch begin with: its number of tokens, its keys and values in every row, and the rest of the rows.

    In every row the beginning takes the first columns, and padding comes between it and the rest.
    """

    length: int
    past: Any
    rest: dict[str, Tensor]


def read_beginning(
    model: PreTrainedModel,
    batch: Batch,
    scope: Scope,
    spec: Spec | Compile | None,
    resolved: Resolved | None,
    new: int,
) -> Beginning | None:
    """Let the model read what all rows begin with; None if that is short, or edited, or some window is narrower than a text."""
    width, batch_size = batch.input_ids.shape[1], len(batch.index)
    rows = [ids[-length:] for ids, length in zip(batch.input_ids.tolist(), batch.lengths, strict=True)]
    same = min(common_beginning(rows), min(batch.lengths) - 1)
    if spec is not None and scope in ("prompt", "both"):
        if resolved is None or scope == "both":
            return None
        edited = [resolved.tokens_of(edit, batch.index) for edit in members(resolved.specs[0])]
        same = min(same, *(min(tokens) for of_edit in edited for tokens in of_edit))
    reach = min(window(model.config, layer) or width + new for layer in range(n_layers(model.config)))
    if same < SHORTEST or batch_size == 1 or width + new > reach:
        return None
    past = model(batch.input_ids[-1:, -batch.lengths[-1] :][:, :same], use_cache=True, logits_to_keep=1).past_key_values
    past.batch_repeat_interleave(batch_size)
    mask = batch.attention_mask.clone()
    mask[:, :same] = 1
    for row, length in enumerate(batch.lengths):
        mask[row, same : same + width - length] = 0
    places = (mask.cumsum(1) - 1)[:, same:]
    return Beginning(
        same, past, {"input_ids": batch.input_ids[:, same:], "attention_mask": mask, "position_ids": places}
    )


class BatchDecoding:
    """Greedy decoding of one batch.

    Args:
        model: the model.
        ends: of the model.
        solutions: the texts to write.
        max_new_tokens: most tokens per text.
    """

    def __init__(self, model: PreTrainedModel, ends: Ends, solutions: Sequence[Solution], max_new_tokens: int) -> None:
        self.model, self.ends, self.solutions, self.max_new_tokens = model, ends, solutions, max_new_tokens
        self.reasoning: list[Tensor] = []  # for each new token: the rows whose text up to it has no ####
        self.beginning: Beginning | None = None

    def run(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> None:
        """Append the most likely token until every text has ended or has `max_new_tokens`.

        Args:
            input_ids: the prompts, `batch pos`.
            attention_mask: of the prompts.
            position_ids: of the prompts.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        cache = None
        if self.beginning is not None:
            cache, rest = self.beginning.past, self.beginning.rest
            attention_mask, position_ids = rest["attention_mask"], rest["position_ids"]
            inputs = {"input_ids": rest["input_ids"], "position_ids": position_ids}
        for _ in range(self.max_new_tokens):
            out = self.model(
                **inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            # Checked after one more forward pass than needed, so that an intervention on new tokens runs at least once.
            if all(solution.ended for solution in self.solutions):
                return
            cache = out.past_key_values
            tokens = self.take(out.logits[:, -1])
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
            position_ids = position_ids[:, -1:] + 1
            inputs = {"input_ids": tokens[:, None], "position_ids": position_ids}

    def take(self, logits: Float[Tensor, "batch vocab"]) -> Tensor:
        """Choose the next token of every row, and add it to the texts that have not ended.

        Args:
            logits: at the last tokens.

        Returns:
            The tokens, " batch".
        """
        tokens, log_probabilities = most_likely(logits, self.ends.never)
        for solution, token, log_probability in zip(self.solutions, tokens, log_probabilities, strict=True):
            if not solution.ended:
                solution.add(token, log_probability)
        self.reasoning.append(torch.tensor([solution.is_reasoning for solution in self.solutions]))
        return torch.tensor(tokens, device=logits.device)

    def is_reasoning(self, new: int) -> Bool[Tensor, " batch"]:
        """The rows whose `new`-th token is part of the reasoning."""
        return self.reasoning[new]
