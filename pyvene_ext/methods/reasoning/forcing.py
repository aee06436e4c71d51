"""Attention forced among the tokens of reasoning while a model writes it.

A block that is given can be forced as a whole (`specs.ForcedAttention`). Here the block is what the model has written so far:
each token of its reasoning, when it is the input from which the next one is computed, has its pattern forced among the tokens
written. What is forced at a token depends on earlier tokens alone, so that it is the same whatever is written behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from pyvene import IntervenableConfig, RepresentationConfig
from transformers import PreTrainedModel

from modelcards import window
from pyvene_ext.engine.compile import Compiled
from pyvene_ext.models.devices import input_device
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.forced_attention import ForcedAttention, forced_rows


def forced_while_writing(
    model: PreTrainedModel,
    spec: Sequence[ForcedAttention],
    questions: Questions,
    new: int,
    hubs: Sequence[int] | None = None,
) -> Callable[[Batch], Compiled]:
    """Compile patterns for the tokens that a model will write, for `evaluate` with the scope reasoning.

    Args:
        model: the model.
        spec: a pattern for each layer; blocks and hubs are replaced.
        questions: questions without reasoning.
        new: the most tokens that are written.
        hubs: for each question the token of its reasoning that is the hub, counted from 0; for the shape hub.

    Returns:
        A function from a batch of the questions to its intervention.

    Raises:
        ValueError: a pattern that the model cannot be given, no hubs for the shape hub, or a hub that is not written.
    """
    if any(edit.shape == "hub" for edit in spec) and hubs is None:
        raise ValueError("hub attention needs the hub of each question.")
    for hub in hubs or ():
        if not 0 <= hub < new:
            raise ValueError(f"the hub is token {hub} of the reasoning, of which {new} tokens are written.")
    prompts = questions.prompts
    places = [{"block_first": -new, "block_last": -1} for _ in prompts.input_ids]
    for named, hub in zip(places, hubs or (), strict=False):
        named["hub"] = hub - new
    written = replace(
        prompts,
        input_ids=tuple((*ids, *(prompts.pad_id,) * new) for ids in prompts.input_ids),
        positions=tuple(places),
    )
    edits = []
    for edit in spec:
        edit.check(model)
        hub_name = "hub" if edit.shape == "hub" else None
        edits.append(edit.model_copy(update={"block": ("block_first", "block_last"), "hub": hub_name}))

    def compiled(batch: Batch) -> Compiled:
        representations, heads, replacements = [], [], []
        for edit in edits:
            mine, reach = list(edit.heads or ()), window(model.config, edit.layer or 0)
            rows = torch.stack(
                [
                    edit.to_columns(forced_rows(edit, written, prompt, reach)[-new:], start)
                    for prompt, start in zip(batch.index, batch.starts, strict=True)
                ]
            )
            if edit.hard:
                rows[..., 0] = 0  # mass is taken from all columns before, wherever a batch has its padding
            replacement = rows[:, None].expand(-1, len(mine), -1, -1)
            representations.append(
                RepresentationConfig(edit.layer or 0, edit.component.name, "h", intervention_type=edit.intervention)
            )
            heads.append([mine] * len(batch.index))
            replacements.append(replacement.to(input_device(model)))
        return Compiled(IntervenableConfig(representations), {"base": heads}, tuple(replacements))

    return compiled
