"""Scores of what heads do inside a block of positions, from one forward pass: flow, hub, skip, and a composite of the three.

The block is a range of tokens between a question and an answer: reasoning, or latent steps. Queries are the block's tokens except
the first, which has no earlier token of the block, and the tokens after the block, where the answer is read. For each query and
head

    flow    is the share of what enters the residual stream there (importances of `flow`) that comes from earlier tokens of the
            block, summed over these tokens
    skip    is the attention to the question, skipping what lies between: to the tokens before the block except the very first,
            which serves as attention sink

and the score is the mean over queries, then over prompts. hub is the attention that a single token of the block receives from
later queries, as a share of all their attention (the sum over later queries, divided by the number of all queries), for the token
that receives most; so a head that always attends to the previous token has a low one. composite is the mean of a head's three
ranks, scaled to 1 for a head that is first in all and 0 for one that is last.

Conventions, to avoid index errors: tokens are counted from each prompt's first real token, whatever the padding; rows of a
pattern are queries and columns are keys; a query's own token does not count as earlier, and later tokens are in no mean; heads
are (layer, head) throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_heads, n_layers
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.methods.heads.flow import LayerFlow, read_flow
from pyvene_ext.methods.heads.flow import check_model as check_routes
from pyvene_ext.methods.heads.patterns import check_patterns, read_patterns
from pyvene_ext.methods.solving.results import Results
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.tokenized import Batch

Score = Literal["flow", "hub", "skip", "composite"]
SCORES: tuple[Score, ...] = get_args(Score)
TOGETHER = 8  # prompts in one forward pass, which are kept together if a run is interrupted


@dataclass(frozen=True)
class BlockScores:
    """Scores of every head on every prompt.

    Attributes:
        flow: as the module defines it; None if it was not asked for.
        hub: as the module defines it.
        skip: as the module defines it.
        hub_at: the token of the block that receives `hub`, 0 being the first.
    """

    flow: Float32[np.ndarray, "prompt layer head"] | None
    hub: Float32[np.ndarray, "prompt layer head"]
    skip: Float32[np.ndarray, "prompt layer head"]
    hub_at: Int[np.ndarray, "prompt layer head"]

    def of(self, score: Score) -> Float[np.ndarray, "layer head"]:
        """Average a score over prompts.

        Args:
            score: flow, hub, skip or composite, which is computed from the means of the others.

        Returns:
            One number per head.

        Raises:
            ValueError: flow, or composite, without flow.
        """
        if self.flow is None and needs_flow(score):
            raise ValueError(f"there is no {score}, as flow was not computed; leave out flow=False.")
        if score != "composite":
            return getattr(self, score).mean(0, dtype=np.float64)
        ranks = np.mean([rankdata(-self.of(each)) for each in SCORES[:3]], 0)
        return 1 - (ranks.reshape(self.hub.shape[1:]) - 1) / max(ranks.size - 1, 1)

    def usual_hub(self) -> Int[np.ndarray, "layer head"]:
        """The token of the block that is a head's hub most often."""
        n_prompts, layers, heads = self.hub_at.shape
        columns = self.hub_at.reshape(n_prompts, -1).T
        return np.array([np.bincount(column).argmax() for column in columns]).reshape(layers, heads)

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data, which `from_dict` reads."""
        return {name: None if values is None else values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> BlockScores:
        """Convert back what `as_dict` returned."""
        flow, hub, skip = (None if record[name] is None else np.array(record[name], np.float32) for name in SCORES[:3])
        assert hub is not None and skip is not None  # only flow can be missing
        return cls(flow, hub, skip, np.array(record["hub_at"]))


def needs_flow(score: Score) -> bool:
    """Whether a score is computed from flow, which takes most of the time."""
    return score in ("flow", "composite")


def check_scores(model: PreTrainedModel, score: Score = "composite") -> None:
    """Check that a model's heads can be scored; nothing is run.

    Args:
        model: a model with a card.
        score: which score is wanted.

    Raises:
        ValueError: its routes cannot be computed, or for a score without flow, its attention patterns cannot be read.
    """
    try:
        if needs_flow(score):
            check_routes(model)
        else:
            check_patterns(model)
    except ValueError as error:
        why = str(error).partition(";")[0]
        raise ValueError(f"heads cannot be ranked here: {why}; give heads, or a ranking from elsewhere.") from None


def earlier_in_block(
    square: Float[np.ndarray, "*head query key"], block: range
) -> Float[np.ndarray, "*head query key"]:
    """Cut from a matrix over a prompt's tokens the part from queries to earlier tokens of the block.

    Args:
        square: a pattern, or importances; rows before the first query may be missing.
        block: the block's tokens.

    Returns:
        Queries after the block's first token by keys of the block; 0 where the key is not earlier.
    """
    # Query i of these is token block[0] + 1 + i and key j is token block[0] + j: the earlier ones are j <= i.
    return np.tril(square[..., block.start + 1 - square.shape[-1] :, block.start : block.stop])


def pattern_scores(
    pattern: Float[np.ndarray, "head query key"], block: range
) -> tuple[Float[np.ndarray, " head"], Int[np.ndarray, " head"], Float[np.ndarray, " head"]]:
    """Compute hub and skip from one prompt's patterns.

    Args:
        pattern: attention probabilities without padding; rows before the first query may be missing.
        block: the block's tokens.

    Returns:
        Hub, the token of the block that receives it, and skip.
    """
    within = earlier_in_block(pattern, block)
    received = within.sum(-2) / within.shape[-2]
    skip = pattern[..., -within.shape[-2] :, 1 : block.start].sum(-1).mean(-1)
    return received.max(-1), received.argmax(-1), skip


def block_scores(
    model: PreTrainedModel,
    questions: Questions,
    *,
    flow: bool = True,
    batch_size: int = 8,
    results: Results | None = None,
    progress: bool = False,
) -> BlockScores:
    """Score all heads on prompts with a block (`problems.with_reasoning`).

    Nothing but the scores is kept: patterns and importances are reduced layer by layer, prompt by prompt.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa); used in eval mode and restored afterwards.
        questions: the prompts and their blocks.
        flow: compute flow, which takes most of the time; without it there is no composite.
        batch_size: most prompts per forward pass; more than 8 are never taken together.
        results: keeps the scores of finished prompts between runs; its facts must name the model.
        progress: show a bar.

    Returns:
        The scores by prompt and head.

    Raises:
        ValueError: before the model runs: a prompt has no block, or no tokens before or after it.
    """
    for number, (block, ids) in enumerate(zip(questions.blocks, questions.prompts.input_ids, strict=True)):
        if not block or not 0 < block.start < block.stop < len(ids):
            raise ValueError(f"prompt {number} has no block with tokens before and after it; give its reasoning.")
    size = min(batch_size, TOGETHER)
    parts = []
    with progress_bar(len(questions), "prompt", "block scores", shown=progress) as bar:
        for start in range(0, len(questions), size):
            some = questions.take(range(start, min(start + size, len(questions))))
            measure = partial(_scores_of, model, some, flow)
            if results is None:
                parts.append(measure())
            else:
                blocks = [[block.start, block.stop] for block in some.blocks]
                condition = {"block scores": blocks, "flow": flow, "prompts": some.prompts.hash}
                parts.append(results.get(condition, measure, BlockScores))
            bar.update(len(some))
    hub, skip, hub_at = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hub", "skip", "hub_at"))
    return BlockScores(np.concatenate([part.flow for part in parts]) if flow else None, hub, skip, hub_at)


def _scores_of(model: PreTrainedModel, questions: Questions, with_flow: bool) -> BlockScores:
    """The scores on prompts that share a forward pass."""
    shape = len(questions), n_layers(model.config), n_heads(model.config)
    flow, hub, skip, hub_at = (np.zeros(shape, dtype) for dtype in (np.float32, np.float32, np.float32, np.int64))

    def keep(layer: int, prompt: int, pattern: Float[np.ndarray, "head query key"]) -> None:
        found = pattern_scores(pattern, questions.blocks[prompt])
        hub[prompt, layer], hub_at[prompt, layer], skip[prompt, layer] = found

    def on_pattern(layer: int, batch: Batch, pattern: Tensor) -> None:
        for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            keep(layer, prompt, pattern[row, :, -length:, -length:].float().cpu().numpy())

    def on_flow(layer: int, prompt: int, found: LayerFlow) -> None:
        flow[prompt, layer] = earlier_in_block(found.attention, questions.blocks[prompt]).sum(-1).mean(-1)
        keep(layer, prompt, found.pattern)

    if not with_flow:
        read_patterns(model, questions.prompts, on_pattern, batch_size=len(questions), progress=False)
        return BlockScores(None, hub, skip, hub_at)
    later = [block.start + 1 for block in questions.blocks]
    read_flow(model, questions.prompts, on_flow, first=later, batch_size=len(questions), progress=False)
    return BlockScores(flow, hub, skip, hub_at)
