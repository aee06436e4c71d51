"""What heads do inside a block of positions, from one forward pass: flow, hub, skip, and how they rank by all three.

The block is a range of tokens between a question and an answer: reasoning, or latent steps. Queries are the block's tokens but
the first, which has nothing of the block before it, and what stands after the block, where the answer is read. Of each query and
head

    flow    the share of what enters the residual stream there (importances of `flow`) that comes from earlier tokens
            of the block, all of it added up
    skip    the attention to the question, past what is between: to the tokens before the block but the very first one, on which
            heads rest that look at nothing

and the score is the mean over queries, then over prompts. hub is the attention that one token of the block gets from later
queries, as a share of all of theirs (the sum over those that come later, by the number of all queries), of the token for which
that is the most; so a head that always looks at the token before has a low one. composite is the mean of a head's three ranks,
scaled to 1 for a head that is first in all and 0 for one that is last.

Tokens are counted from each prompt's first real token, whatever the padding; rows of a pattern are queries and columns keys; a
query's own token counts as nothing earlier, and later ones are in no mean; a head is (layer, head) throughout. (Where index
errors creep in.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modelcards import n_heads, n_layers
from pyvene_ext.methods.heads.flow import check_model as check_routes
from pyvene_ext.methods.heads.flow import flow_routes
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.prompts.problems import Questions
from pyvene_ext.prompts.tokenized import Batch

Score = Literal["flow", "hub", "skip", "composite"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class BlockScores:
    """Scores of every head on every prompt.

    Attributes:
        flow, hub, skip: as the module says.
        hub_at: which token of the block `hub` is about, 0 being its first.
    """

    flow: Float32[np.ndarray, "prompt layer head"]
    hub: Float32[np.ndarray, "prompt layer head"]
    skip: Float32[np.ndarray, "prompt layer head"]
    hub_at: Int[np.ndarray, "prompt layer head"]

    def of(self, score: Score) -> Float[np.ndarray, "layer head"]:
        """One score of every head, the mean over prompts; of composite, from the means of the others."""
        if score != "composite":
            return getattr(self, score).mean(0, dtype=np.float64)
        ranks = np.mean([rankdata(-self.of(each)) for each in SCORES[:3]], 0)
        return 1 - (ranks.reshape(self.flow.shape[1:]) - 1) / max(ranks.size - 1, 1)

    def usual_hub(self) -> Int[np.ndarray, "layer head"]:
        """The token of the block that most often is a head's hub."""
        n_prompts, layers, heads = self.hub_at.shape
        columns = self.hub_at.reshape(n_prompts, -1).T
        return np.array([np.bincount(column).argmax() for column in columns]).reshape(layers, heads)


def check_scores(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose heads cannot be scored; runs nothing."""
    try:
        check_routes(model)
    except ValueError as error:
        why = str(error).partition(";")[0]
        raise ValueError(f"heads cannot be ranked here: {why}; give heads, or a ranking from elsewhere.") from None


def earlier_in_block(
    square: Float[np.ndarray, "*head query key"], block: range
) -> Float[np.ndarray, "*head query key"]:
    """Of a matrix over a prompt's tokens: queries after the block's first token by keys of the block, 0 where no earlier one."""
    # Query i of these is token block[0] + 1 + i and key j is token block[0] + j: the earlier ones are j <= i.
    return np.tril(square[..., block.start + 1 :, block.start : block.stop])


def pattern_scores(
    pattern: Float[np.ndarray, "head query key"], block: range
) -> tuple[Float[np.ndarray, " head"], Int[np.ndarray, " head"], Float[np.ndarray, " head"]]:
    """Hub, its place in the block, and skip, of one prompt's patterns without padding."""
    within = earlier_in_block(pattern, block)
    received = within.sum(-2) / within.shape[-2]
    skip = pattern[..., block.start + 1 :, 1 : block.start].sum(-1).mean(-1)
    return received.max(-1), received.argmax(-1), skip


def block_scores(
    model: PreTrainedModel, questions: Questions, *, batch_size: int = 8, progress: bool = False
) -> BlockScores:
    """The scores of all heads on prompts with a block (`problems.with_reasoning`).

    Raises:
        ValueError: before the model runs: a prompt without a block, or with nothing before or after it.
    """
    for number, (block, ids) in enumerate(zip(questions.blocks, questions.prompts.input_ids, strict=True)):
        if not block or not 0 < block.start < block.stop < len(ids):
            raise ValueError(f"prompt {number} has no block with tokens before and after it; give its reasoning.")
    shape = len(questions), n_layers(model.config), n_heads(model.config)
    flow, hub, skip, hub_at = (np.zeros(shape, dtype) for dtype in (np.float32, np.float32, np.float32, np.int64))

    def see(layer: int, batch: Batch, pattern: Tensor) -> None:
        for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            own = pattern[row, :, -length:, -length:].float().cpu().numpy()
            found = pattern_scores(own, questions.blocks[prompt])
            hub[prompt, layer], hub_at[prompt, layer], skip[prompt, layer] = found

    read_patterns(model, questions.prompts, see, batch_size=batch_size, progress=False)
    with tqdm(total=len(questions), desc="flow", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(questions), batch_size):  # all importances of all prompts would be large
            some = range(start, min(start + batch_size, len(questions)))
            routes = flow_routes(model, questions.prompts.take(some), batch_size=batch_size, progress=False)
            for prompt, importance in zip(some, routes.attention, strict=True):
                flow[prompt] = earlier_in_block(importance, questions.blocks[prompt]).sum(-1).mean(-1)
            bar.update(len(some))
    return BlockScores(flow, hub, skip, hub_at)
