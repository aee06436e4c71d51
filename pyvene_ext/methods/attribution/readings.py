"""What of a head is attributed to the tokens of word problems (`inputs`): which number of it, read where.

`attention` is what it pays to a hub, a token of the block. `projection` is what it adds to the residual stream, along its own
direction in that very problem, or along the unembedding of the token that the model writes after `####`, without the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyvene_ext.methods.attribution.by_tag import AttributedHead, tagged_prompts
from pyvene_ext.methods.attribution.inputs import Baseline, InputAttribution, Target, integrated_gradients
from pyvene_ext.methods.solving.results import Results
from pyvene_ext.models.devices import is_main_process
from pyvene_ext.prompts.problems import Questions, solved_before
from pyvene_ext.prompts.tokenized import TokenizedPrompts
from pyvene_ext.stats.controls import Head

Query = Literal["block_mean", "block_last", "end"]


@dataclass(frozen=True)
class Reading:
    """Where a head is read in each problem.

    Attributes:
        questions: the problems, with their blocks.
        queries: the tokens of each at which the head is read, counted from its first; their mean is taken.
        hubs: the token of each that is attended to; None for a projection.
        directions: one for each problem, for a projection; None for the head's own.
    """

    questions: Questions
    queries: tuple[tuple[int, ...], ...]
    hubs: tuple[int, ...] | None = None
    directions: Float[Tensor, "problem d_model"] | None = None

    @property
    def prompts(self) -> TokenizedPrompts:
        """The problems up to the last token at which the head is read: later ones contribute nothing."""
        prompts = self.questions.prompts
        rows = zip(prompts.input_ids, self.queries, strict=True)
        cut = tuple(ids[: queries[-1] + 1] for ids, queries in rows)
        return replace(prompts, input_ids=cut, positions=({"end": -1, "last": -1},) * len(cut))

    def target(self, head: Head) -> Target:
        """The number of this head, for `integrated_gradients`."""
        return Target(*head, self.queries, self.hubs, self.directions)


def read_at(
    questions: Questions,
    query: Query,
    *,
    hubs: Sequence[int] | None = None,
    answers: Sequence[int | None] | None = None,
    model: PreTrainedModel | None = None,
    most: int | None = None,
) -> Reading:
    """Choose the problems in which a head can be read, and where.

    Args:
        questions: problems with their blocks.
        query: at all tokens of the block (of those after the hub), at its last, or at the prompt's last.
        hubs: for each problem the token of its block that is attended to (negative: from its end).
        answers: for each problem the token along whose unembedding a projection goes; problems with None are left out.
        model: the model, for `answers`.
        most: at most this many problems, the first ones.

    Returns:
        The problems that have such a hub, a token after it that is read, and an answer.
    """
    kept: list[int] = []
    queries: list[tuple[int, ...]] = []
    tokens: list[int] = []
    for number, (block, ids) in enumerate(zip(questions.blocks, questions.prompts.input_ids, strict=True)):
        hub = None if hubs is None else hubs[number]
        if (hub is not None and not -len(block) <= hub < len(block)) or (answers and answers[number] is None):
            continue
        at = -1 if hub is None else block[hub]
        places = {"block_mean": block, "block_last": block[-1:], "end": range(len(ids))[-1:]}[query]
        if after := tuple(place for place in places if place > at):
            kept.append(number)
            queries.append(after)
            tokens.append(at)
    kept, queries, tokens = kept[:most], queries[:most], tokens[:most]
    directions = None
    if answers is not None:
        assert model is not None  # of which the answers are tokens
        unembedding: Any = model.get_output_embeddings()
        directions = unembedding.weight[[answers[number] for number in kept]].detach().float()
    return Reading(questions.take(kept), tuple(queries), None if hubs is None else tuple(tokens), directions)


def attribute_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    head: Head,
    controls: Sequence[Head],
    results: Results,
    *,
    name: str,
    hub: int | None,
    baseline: Baseline,
    steps: int,
    most_steps: int,
    shots: bool,
    batch_size: int,
) -> AttributedHead:
    """Attribute a head, and random ones asked the same, to the tokens of the problems in which it is read.

    Special tokens keep their embeddings at the baseline, and so do solved problems, which the model reads once.

    Args:
        model: the model.
        tokenizer: the model's.
        reading: what is attributed.
        head: the head.
        controls: random other heads. They get `steps` and no more: one that ignores the hub would take all that there are, for
            shares of next to nothing.
        results: keeps attributions between runs; its facts must name the model.
        name: the model's, in tables.
        hub: the token of the block that is the hub of all problems, if they have the same.
        baseline: as for `integrated_gradients`.
        steps: points on the line.
        most_steps: of problems that are incomplete with fewer.
        shots: whether solved problems stand before each one.
        batch_size: points a forward and backward pass.

    Returns:
        The attributions.
    """
    prompts, fixed = reading.prompts, sorted(tokenizer.all_special_ids)
    given = solved_before(reading.questions, tokenizer) if shots else [0] * len(prompts)
    along = None if reading.directions is None else reading.directions.tolist()
    where = {"queries": reading.queries, "hubs": reading.hubs, "directions": along, "prompts": prompts.hash}

    def attributed(head: Head, most_steps: int) -> InputAttribution:
        how: dict[str, Any] = {"baseline": baseline, "steps": steps, "most_steps": most_steps, "given": given}
        target, shown = reading.target(head), is_main_process()
        return results.get(
            {"input attribution": head, **where, **how},
            lambda: integrated_gradients(
                model, prompts, target, fixed=fixed, batch_size=batch_size, progress=shown, **how
            ),
            InputAttribution,
        )

    own = attributed(head, most_steps)
    others = {other: attributed(other, steps) for other in controls}
    tags, texts = tagged_prompts(prompts.input_ids, tokenizer)
    return AttributedHead(name, head, own, others, hub, reading.target(head), reading.questions.index, tags, texts)
