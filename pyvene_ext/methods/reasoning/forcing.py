"""Attention forced among the tokens of reasoning while a model writes it.

A block that is given can be forced as a whole (`specs.ForcedAttention`). Here the block is what the model has written so far:
each token of its reasoning, when it is the input from which the next one is computed, has its pattern forced among the tokens
written. What is forced at a token depends on earlier tokens alone, so that it is the same whatever is written after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import window
from pyvene_ext.engine.decode.edits import TokenEdit
from pyvene_ext.methods.solving.replacing import TokenEdits
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.specs.files import to_plain
from pyvene_ext.specs.forced_attention import ForcedAttention, forced_rows


def forced_while_writing(
    model: PreTrainedModel,
    spec: Sequence[ForcedAttention],
    questions: Questions,
    new: int,
    hubs: Sequence[int] | None = None,
) -> TokenEdits:
    """Make patterns for the tokens that a model will write, for `evaluate` with the scope reasoning.

    Args:
        model: the model.
        spec: a pattern for each layer; blocks and hubs are replaced.
        questions: questions without reasoning.
        new: the most tokens that are written.
        hubs: for each question the token of its reasoning that is the hub, counted from 0; for the shape hub.

    Returns:
        The edits, for these questions.

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

    def of_problem(problem: int) -> tuple[TokenEdit, ...]:
        rows: dict[Any, Float[Tensor, "1 new 5"]] = {}  # the same in most layers
        found = []
        for edit in edits:
            reach = window(model.config, edit.layer or 0)
            key = edit.shape, edit.hard, reach
            if key not in rows:
                rows[key] = forced_rows(edit, written, problem, reach)[None, -new:]
            found.append(TokenEdit(edit, rows[key]))
        return tuple(found)

    return TokenEdits(of_problem, {"forced": to_plain([tuple(spec)]), "hubs": None if hubs is None else list(hubs)})
