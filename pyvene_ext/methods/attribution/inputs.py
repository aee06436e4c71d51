"""Input attribution: which tokens of a prompt drive a head, by integrated gradients over token embeddings, with Captum.

    target = Target(layer=3, head=1, queries=queries, hubs=hubs)
    found = integrated_gradients(model, prompts, target, fixed=tokenizer.all_special_ids)
    found.tokens[0], found.error[0]

A prompt's embeddings move on a straight line from a baseline to their actual values. The gradients of a scalar f along the line,
averaged and multiplied by the displacement (Sundararajan, Taly and Yan 2017), are what each token contributes to
f(prompt) - f(baseline); a token's attribution is the sum over its embedding. That attributions add up to the difference is called
completeness; how far they miss it is the error of the average over steps, which are the nodes of Gauss-Legendre quadrature.

Attributions are to the output of the embedding module, in Gemma with its scale. Positions are not attributed: they are the same
at both ends, so that what a head does by position alone is part of f(baseline). Sums are in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from modelcards import Taps, card_of, n_heads, n_layers
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.packages import need
from pyvene_ext.methods.attribution.gradients import check_gradient
from pyvene_ext.methods.heads.patterns import check_prompts
from pyvene_ext.models.devices import input_device
from pyvene_ext.models.hooks import (
    StopForward,
    Where,
    check_projections,
    hook_component,
    split_heads,
)
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts

Baseline = Literal["mean", "zero", "pad"]
ROWS = 8192  # rows of the embedding matrix that are averaged at once
COMPLETE = 0.05  # attributions with a completeness error of this or more should not be used


@dataclass(frozen=True)
class Target:
    """The scalar of a head that is attributed: a mean over some queries of each prompt.

    With `hubs` it is the query's attention to one token; else the head's contribution to the residual stream at the query,
    projected on `directions`, or on the (unit) direction that the contribution has in the actual prompt.

    Attributes:
        layer: the head's layer.
        head: the query head.
        queries: for each prompt its query tokens, counted from its first token.
        hubs: for each prompt the token that is attended to, counted from its first token.
        directions: one for each prompt.
    """

    layer: int
    head: int
    queries: Sequence[Sequence[int]]
    hubs: Sequence[int] | None = None
    directions: Float[Tensor, "prompt d_model"] | None = None

    def take(self, which: Sequence[int]) -> Target:
        """The same of some of the prompts, in this order."""
        hubs = None if self.hubs is None else [self.hubs[i] for i in which]
        directions = None if self.directions is None else self.directions[list(which)]
        return replace(self, queries=[self.queries[i] for i in which], hubs=hubs, directions=directions)


@dataclass(frozen=True)
class InputAttribution:
    """The contribution of each token to a target.

    Attributes:
        tokens: for every prompt one number per token; 0 for a token that is fixed.
        value: f of each prompt.
        at_baseline: f of its baseline.
        steps: points on the line.
    """

    tokens: tuple[Float64[np.ndarray, " token"], ...]
    value: Float64[np.ndarray, " prompt"]
    at_baseline: Float64[np.ndarray, " prompt"]
    steps: Int[np.ndarray, " prompt"]

    @property
    def error(self) -> Float64[np.ndarray, " prompt"]:
        """How far the sum over tokens is from f(prompt) - f(baseline), relative to it; NaN if both are 0."""
        change = self.value - self.at_baseline
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(np.array([some.sum() for some in self.tokens]) - change) / np.abs(change)

    @property
    def complete(self) -> np.ndarray:
        """Which prompts have an error below `COMPLETE`."""
        return self.error < COMPLETE

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data, which `from_dict` reads."""
        return {
            "tokens": [some.tolist() for some in self.tokens],
            "value": self.value.tolist(),
            "at_baseline": self.at_baseline.tolist(),
            "steps": self.steps.tolist(),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> InputAttribution:
        """Convert back what `as_dict` returned."""
        tokens = tuple(np.array(some, np.float64) for some in record["tokens"])
        return cls(tokens, np.array(record["value"]), np.array(record["at_baseline"]), np.array(record["steps"]))


def integrated_gradients(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    target: Target,
    *,
    baseline: Baseline = "mean",
    steps: int = 50,
    most_steps: int | None = None,
    fixed: Collection[int] = (),
    given: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> InputAttribution:
    """Attribute a target to the tokens of each prompt.

    Prompts that are not complete with `steps` points are attributed again with three times as many, up to `most_steps`.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa); used in eval mode and restored afterwards,
            also after an error.
        prompts: of any lengths. Tokens after the last query contribute nothing; leave them out.
        target: the head's scalar; its queries and hubs are tokens of these prompts.
        baseline: where the line begins, the same for every token: the mean of all embeddings, zero, or the embedding of
            `prompts.pad_id` (which can be zero, too). From zero, an RMSNorm concentrates almost all change near the beginning of
            the line, where there are few steps, so the error is large.
        steps: points on the line.
        most_steps: of prompts that are not complete with fewer; by default `steps`.
        fixed: ids that keep their embeddings at both ends, such as a BOS that serves as attention sink.
        given: for each prompt how many of its first tokens keep their embeddings, too, such as solved examples. The model reads
            them once and not at every point.
        batch_size: points per forward and backward pass.
        progress: show a bar.

    Returns:
        One number per token, and f at both ends of the line.

    Raises:
        ValueError: before the model runs, for fewer than 1 step, a head that the model lacks, tokens that a prompt lacks, a query
            before its hub or among the tokens given, and a model in float16 or with quantised weights, which have no usable
            gradients.
        MissingExtra: Captum is not installed.
    """
    need("input-attribution")
    from captum.attr import IntegratedGradients

    check(model, prompts, target, baseline, steps)
    given = list(given) if given is not None else [0] * len(prompts)
    for prompt, (some, queries) in enumerate(zip(given, target.queries, strict=True)):
        if not 0 <= some <= min(queries):
            raise ValueError(
                f"{some} tokens of prompt {prompt} cannot be given: its first query is token {min(queries)}."
            )
    batches = prompts.batches(batch_size, "right")  # so that every query sees a key
    tokens: list[np.ndarray] = [np.empty(0)] * len(prompts)
    value, at_baseline = np.empty(len(prompts)), np.empty(len(prompts))
    bar = progress_bar(len(prompts), "prompt", f"{target.layer}.{target.head}", shown=progress)
    with bar, evaluating(model), torch.inference_mode(False), _TargetOutput(model, target) as head:
        model.requires_grad_(False)  # no gradients of parameters
        start_point = baseline_embedding(model, baseline, prompts.pad_id)
        for batch in batches:
            end = _embed(model, batch.input_ids)
            free = batch.attention_mask.bool() & ~torch.isin(
                batch.input_ids, torch.tensor(list(fixed), dtype=torch.long)
            )
            of_batch = torch.tensor([given[prompt] for prompt in batch.index])
            free &= torch.arange(free.shape[1]) >= of_batch[:, None]
            start = torch.where(free[..., None].to(end.device), start_point.to(end), end)
            scalar = head.scalar(batch, end, int(of_batch.min()))
            rows = torch.arange(len(batch.index), device=end.device)
            found = IntegratedGradients(scalar).attribute(
                end,
                start,
                additional_forward_args=rows,
                n_steps=steps,
                internal_batch_size=max(batch_size, len(rows)),
            )
            by_token = found.double().sum(-1).cpu().numpy()
            with torch.no_grad():
                ends = [scalar(x, rows).double().cpu().numpy() for x in (end, start)]
            for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
                tokens[prompt] = by_token[row, :length]
                value[prompt], at_baseline[prompt] = ends[0][row], ends[1][row]
            bar.update(len(batch.index))
    found = InputAttribution(tuple(tokens), value, at_baseline, np.full(len(prompts), steps))
    short = np.flatnonzero(
        found.error >= COMPLETE
    ).tolist()  # none where there is nothing to attribute, and the error NaN
    more = min(3 * steps, most_steps or steps)
    if more > steps and short:
        again = integrated_gradients(
            model,
            prompts.take(short),
            target.take(short),
            baseline=baseline,
            steps=more,
            most_steps=most_steps,
            fixed=fixed,
            given=[given[prompt] for prompt in short],
            batch_size=batch_size,
            progress=progress,
        )
        for at, prompt in enumerate(short):
            tokens[prompt] = again.tokens[at]
            found.steps[prompt] = again.steps[at]
        found = replace(found, tokens=tuple(tokens))
    return found


def baseline_embedding(model: PreTrainedModel, baseline: Baseline, pad_id: int) -> Float[Tensor, " d_model"]:
    """The embedding that every token has at the beginning of the line.

    Args:
        model: the model.
        baseline: mean, zero or pad.
        pad_id: the token of the baseline pad.

    Returns:
        One embedding.
    """
    if baseline == "pad":
        return _embed(model, torch.tensor([pad_id]))[0]
    embeddings: Any = model.get_input_embeddings()
    n_vocab, d_model = embeddings.weight.shape
    total = torch.zeros(d_model, dtype=torch.float64, device=input_device(model))
    for ids in torch.arange(n_vocab).split(ROWS) if baseline == "mean" else ():
        total += _embed(model, ids).double().sum(0)
    return total / n_vocab


def _embed(model: PreTrainedModel, ids: Int[Tensor, "*some"]) -> Float[Tensor, "*some d_model"]:
    embeddings: Any = model.get_input_embeddings()
    with torch.no_grad():
        return _wide(embeddings(ids.to(input_device(model))))


def _wide(x: Tensor) -> Tensor:
    """Convert to float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _TargetOutput:
    """Reads a target's scalar while the model runs on embeddings; a context manager."""

    def __init__(self, model: PreTrainedModel, target: Target) -> None:
        self.model, self.target = model, target
        self.where: Where = "head_contribution" if target.hubs is None else "attention_pattern", target.layer
        self.hooks = ExitStack()

    def __enter__(self) -> _TargetOutput:
        with ExitStack() as hooks:
            hooks.enter_context(Taps(self.model, card_of(self.model), [self.where]))
            hook_component(self.model, self.where, self._keep, hooks)
            self.hooks = hooks.pop_all()
        return self

    def _keep(self, x: Tensor) -> None:
        self.seen = x
        raise StopForward

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def scalar(
        self, batch: Batch, end: Float[Tensor, "batch pos d_model"], given: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Make the function f for a batch.

        Args:
            batch: some of the prompts.
            end: their embeddings.
            given: how many first tokens are the same at all points.

        Returns:
            A function of points on the prompts' lines: their embeddings, and the row of the batch that each belongs to.
        """
        inputs = batch.inputs(end.device)
        del inputs["input_ids"]
        weight = torch.zeros(batch.input_ids.shape)  # of each query in the mean
        for row, prompt in enumerate(batch.index):
            weight[row, list(self.target.queries[prompt])] = 1 / len(self.target.queries[prompt])

        own_positions = inputs["position_ids"][:, given:]
        # No token sees the padding to its right, and a window full of padding must not leave a padded query without a key.
        mask = torch.ones_like(inputs["attention_mask"])
        before = self._read_once(end[:, :given], inputs) if given else ()

        def read(points: Tensor, rows: Tensor) -> Float[Tensor, "point query *key_or_d"]:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(before):
                cache.update(keys[rows], values[rows], layer)
            with suppress(StopForward):
                self.model.base_model(
                    inputs_embeds=points[:, given:].to(self.model.dtype),
                    attention_mask=mask[rows],
                    position_ids=own_positions[rows],
                    past_key_values=cache if given else None,
                    use_cache=given > 0,
                )
            return _wide(split_heads(self.seen, self.where[0], self.model)[:, self.target.head])

        if self.target.hubs is not None:
            along = torch.nn.functional.one_hot(
                torch.tensor([self.target.hubs[prompt] for prompt in batch.index]), batch.input_ids.shape[1]
            )[:, None]
        elif self.target.directions is not None:
            along = self.target.directions[batch.index][:, None]
        else:
            with torch.no_grad():
                along = torch.nn.functional.normalize(read(end, torch.arange(len(end), device=end.device)), dim=-1)

        def scalar(points: Tensor, rows: Tensor) -> Float[Tensor, " point"]:
            seen = read(points, rows)
            at, by_query = (x.to(seen)[rows.to(seen.device)] for x in (along, weight))
            return ((seen * at).sum(-1) * by_query[:, given:]).sum(-1)

        return scalar

    def _read_once(
        self, given: Float[Tensor, "batch pos d_model"], inputs: dict[str, Tensor]
    ) -> tuple[tuple[Any, Any], ...]:
        """Keys and values of first tokens, of every layer up to the target's."""
        cache, first = DynamicCache(), given.shape[1]
        with suppress(StopForward), torch.no_grad():
            self.model.base_model(
                inputs_embeds=given.to(self.model.dtype),
                attention_mask=torch.ones_like(inputs["attention_mask"][:, :first]),
                position_ids=inputs["position_ids"][:, :first],
                past_key_values=cache,
                use_cache=True,
            )
        layers: list[Any] = cache.layers
        return tuple((layer.keys, layer.values) for layer in layers)


def check(model: PreTrainedModel, prompts: TokenizedPrompts, target: Target, baseline: str, steps: int) -> None:
    """Check the arguments of `integrated_gradients`; nothing is run.

    Args:
        model: as for `integrated_gradients`.
        prompts: as for `integrated_gradients`.
        target: as for `integrated_gradients`.
        baseline: as for `integrated_gradients`.
        steps: as for `integrated_gradients`.

    Raises:
        ValueError: for whatever `integrated_gradients` refuses.
    """
    check_attributable(model)
    check_prompts(model, prompts)
    refuse_latent_steps(model, prompts.input_ids)
    if steps < 1:
        raise ValueError(f"integrated gradients take 1 step or more, not {steps}; 50 are usual.")
    if baseline not in ("mean", "zero", "pad"):
        raise ValueError(f"unknown baseline {baseline!r}; choose among mean, zero, pad.")
    layers, heads = n_layers(model.config), n_heads(model.config)
    if not (0 <= target.layer < layers and 0 <= target.head < heads):
        raise ValueError(
            f"there is no head {target.layer}.{target.head}; the model has layers 0 to {layers - 1}, each with heads 0 to "
            f"{heads - 1}."
        )
    if target.hubs is None:
        check_projections(model)
    for what, some in (("queries", target.queries), ("hubs", target.hubs), ("directions", target.directions)):
        if some is not None and len(some) != len(prompts):
            raise ValueError(
                f"the target has {what} for {len(some)} prompts but there are {len(prompts)}; give one each."
            )
    for prompt, (ids, queries) in enumerate(zip(prompts.input_ids, target.queries, strict=True)):
        if not queries or not 0 <= min(queries) <= max(queries) < len(ids):
            raise ValueError(f"the queries of prompt {prompt} must be one or more of its {len(ids)} tokens.")
        if target.hubs is not None and not 0 <= target.hubs[prompt] <= min(queries):
            raise ValueError(
                f"token {target.hubs[prompt]} of prompt {prompt} cannot be the hub of the query at token {min(queries)}: queries "
                "see only themselves and earlier tokens."
            )


def check_attributable(model: PreTrainedModel) -> None:
    """Check that gradients can be taken through a model.

    Args:
        model: any model.

    Raises:
        ValueError: it is in float16, or has quantised weights.
    """
    check_gradient("attention and of outputs of heads", model.dtype)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, and no gradient passes through quantised weights; "
                "load the model without quantisation."
            )
