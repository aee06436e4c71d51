"""What a model predicts at every depth, and which components contribute: the logit lens and direct logit attribution.

    lens = logit_lens(model, prompts)                     # lens.logit_diff[k]: of the residual stream after k blocks
    found = direct_logit_attribution(model, prompts)      # found.logit_diff.heads[layer, head]: what a head adds to it

The logit lens (nostalgebraist 2020) reads the residual stream with the model's own final norm and unembedding, as if the later
blocks did not exist. Direct logit attribution (Elhage et al. 2021; Wang et al. 2022, section 3.1) splits the actual logit: the
final residual stream is the sum of what the embedding, the heads and the MLPs add, and with the scale of the final norm frozen at
the clean run everything from there to the logit is linear, so that the parts sum to the logit.

Neither is causal: a component that later ones would compensate for, or that acts through them, shows only its direct effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import FIELD_NAMES, Taps, card_of, dimensions, n_heads, n_layers
from modelcards.attention_taps import output_weight
from pyvene_ext.engine import metrics
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.results import Shown, Summary, count, strongest_rows, table, three_digits
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import SIDE_BY_SIDE, Where, hook_component
from pyvene_ext.models.latent_steps import refuse_latent_steps
from pyvene_ext.models.modes import evaluating
from pyvene_ext.models.norms import TOLERANCE, FrozenNorm
from pyvene_ext.models.replay import Replay
from pyvene_ext.prompts.positions import token_indices
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized
from pyvene_ext.specs.addition import Addition
from pyvene_ext.specs.graph import Node
from pyvene_ext.specs.joint import OneSpec, Spec, members
from pyvene_ext.stats.intervals import student_interval

if TYPE_CHECKING:
    import pandas as pd

# -- the logit lens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Lens(Shown):
    """The logit lens at one position of every prompt.

    A depth is the number of blocks that the residual stream has passed: 0 is what enters the first block (resid_pre of layer 0),
    k is resid_post of layer k - 1, and the last depth is the model's own output.

    Attributes:
        logits: of the two answers, IO and S, after the model's own soft-cap and scale where it has them.
        probability: of IO, over the whole vocabulary.
        rank: of IO in the whole vocabulary, 1 being the top; ties share the better rank.
        position: where the stream was read.
    """

    logits: Float32[np.ndarray, "depth answer prompt"]
    probability: Float32[np.ndarray, "depth prompt"]
    rank: Int[np.ndarray, "depth prompt"]
    position: str | int = "last"

    @property
    def logit_diff(self) -> Float32[np.ndarray, "depth prompt"]:
        """logit(IO) - logit(S)."""
        return self.logits[:, 0] - self.logits[:, 1]

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per depth and prompt.

        Returns:
            A table with the columns depth, site and layer (of the stream that was read), position, prompt, logit and logit_wrong
            (of the two answers), logit_diff, probability and rank.
        """
        values = {"logit": self.logits[:, 0], "logit_wrong": self.logits[:, 1], "logit_diff": self.logit_diff}
        values |= {"probability": self.probability, "rank": self.rank}
        found = table({"depth": range(len(self.rank)), "prompt": range(self.rank.shape[1])}, values)
        found.insert(1, "site", np.where(found["depth"] == 0, "resid_pre", "resid_post"))
        found.insert(2, "layer", (found["depth"] - 1).clip(lower=0))
        found.insert(3, "position", str(self.position))
        return found

    def summarise(self) -> Summary:
        """The means over prompts at some depths."""
        depths = np.unique(np.linspace(0, len(self.rank) - 1, 8).round().astype(int)).tolist()
        rows = [
            (
                str(k),
                three_digits(self.logit_diff[k].mean()),
                three_digits(self.probability[k].mean()),
                three_digits(float(np.median(self.rank[k]))),
            )
            for k in depths
        ]
        title = f"Lens at {self.position}: depths 0 to {len(self.rank) - 1}, {count(self.rank.shape[1], 'prompt')}"
        return Summary(title, ("depth", "logit_diff", "probability", "median rank"), rows)


def logit_lens(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    positions: str | int = "last",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Lens:
    """Read the residual stream at every depth with the model's own final norm and unembedding (soft-cap and scale included).

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        prompts: the prompts.
        positions: where to read: "last", another name that every prompt has, or an integer (0 the first token, -1 the last).
        batch_size: prompts per forward pass. Logits of the vocabulary are computed for one depth at a time, `batch vocab`.
        progress: show a bar.

    Returns:
        Logits, probability and rank by depth and prompt (nostalgebraist 2020).

    Raises:
        ValueError: before the model runs, for prompts, answers or a position that do not fit; and for logits that are not finite.
    """
    _check(model, prompts, batch_size)
    if positions == "all" or not isinstance(positions, str | Integral):
        raise ValueError(
            f"the lens reads one position of every prompt, not {positions!r}; give a name or an integer, and call it again for "
            "another."
        )
    where = positions if isinstance(positions, str) else int(positions)
    at = [token_indices(prompts, prompt, where)[0] for prompt in range(len(prompts))]
    replay, depth = Replay(model), n_layers(model.config)
    places = [("block_input", 0), *(("block_output", layer) for layer in range(depth))]
    logits = np.empty((depth + 1, 2, len(prompts)), np.float32)
    probability, rank = np.empty((depth + 1, len(prompts)), np.float32), np.empty((depth + 1, len(prompts)), np.int64)
    bar = progress_bar(len(prompts), "prompt", "logit lens", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size):
            seen = _run(replay, batch, places, [at[prompt] for prompt in batch.index])
            for k, place in enumerate(places):
                all_logits = replay.logits(seen[place])
                ids = batch.answer_ids.to(all_logits.device)
                probability[k, batch.index] = metrics.probability(all_logits, batch).cpu().numpy()
                rank[k, batch.index] = metrics.rank(all_logits, batch).cpu().numpy()
                logits[k][:, batch.index] = all_logits.gather(1, ids).T.float().cpu().numpy()
            bar.update(len(batch.index))
    return Lens(logits, probability, rank, where)


# -- direct logit attribution ------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Parts(Shown):
    """A logit, or a difference of two, at every prompt's last token, split into what the model's components add.

    Attributes:
        heads: what every head adds: z_h W_O^h, through the post-norm with its scale frozen if there is one.
        mlps: what every MLP adds, including its output bias and post-norm.
        embed: what enters the first block: token embedding, and position embedding where the model adds one.
        bias: what belongs to no component: biases of attention's output projections, of the final norm and of the unembedding.
        total: their sum, which is the logit before any soft-cap or scale after the unembedding.
        capped: the model's own logit (or difference of two), after soft-cap and scale; `total` where it has none.
    """

    heads: Float32[np.ndarray, "layer head prompt"]
    mlps: Float32[np.ndarray, "layer prompt"]
    embed: Float32[np.ndarray, " prompt"]
    bias: Float32[np.ndarray, " prompt"]
    total: Float32[np.ndarray, " prompt"]
    capped: Float32[np.ndarray, " prompt"]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The components: the senders of `pyvene_ext.specs.graph`, and "bias"."""
        layers, heads, _ = self.heads.shape
        of_layers = [[*(Node("z", i, head) for head in range(heads)), Node("mlp_out", i)] for i in range(layers)]
        return (Node("embed"), *itertools.chain(*of_layers), Node("bias"))

    @property
    def by_node(self) -> Float32[np.ndarray, "node prompt"]:
        """What each component adds, in the order of `nodes`."""
        of_layers = np.concatenate([self.heads, self.mlps[:, None]], 1).reshape(-1, len(self.embed))
        return np.concatenate([self.embed[None], of_layers, self.bias[None]])

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per component and prompt.

        Returns:
            A table with the columns component (its name), site, layer, head, prompt and contribution.
        """
        nodes, n = self.nodes, len(self.embed)
        found = table({"component": list(map(str, nodes)), "prompt": range(n)}, {"contribution": self.by_node})
        for at, (name, of_nodes) in enumerate(zip(Node._fields, zip(*nodes, strict=True), strict=True), 1):
            found.insert(at, name, np.array(of_nodes, object).repeat(n))
        return found.astype({"layer": "Int64", "head": "Int64"})

    def summarise(self) -> Summary:
        """The components that add most, with 95% intervals (Student's t over prompts)."""
        nodes, parts = self.nodes, self.by_node
        rows = strongest_rows(parts.mean(1), lambda i: str(nodes[i]), lambda some: student_interval(parts[some]))
        size = f"{count(len(parts), 'component')} x {count(len(self.embed), 'prompt')}"
        title = f"Parts of a mean of {three_digits(self.total.mean())}: {size}"
        return Summary(title, ("strongest", "mean", "95% interval"), rows)


@dataclass(frozen=True, repr=False)
class Attribution(Shown):
    """Direct logit attribution.

    Attributes:
        logit_diff: the parts of logit(IO) - logit(S).
        logit: the parts of logit(IO).
        added: what steering vectors add directly to the logit difference and to the logit; included in `bias` of each.
    """

    logit_diff: Parts
    logit: Parts
    added: Float32[np.ndarray, "2 prompt"]

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per component and prompt.

        Returns:
            A table as of `Parts.to_frame`, with the columns logit_diff and logit: what the component adds to each.
        """
        found = self.logit_diff.to_frame().rename(columns={"contribution": "logit_diff"})
        return found.assign(logit=self.logit.by_node.ravel())

    def summarise(self) -> Summary:
        """The components that add most to the logit difference."""
        of_parts = self.logit_diff.summarise()
        return of_parts._replace(title=f"Attribution of the logit difference\n{of_parts.title}")


def direct_logit_attribution(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    steering: Spec | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Attribution:
    """Split the logits at every prompt's last token into what heads, MLPs, embedding and biases add to them, in float32.

    The final norm, and post-norms if there are any (Gemma 2), have their scale frozen at the clean run, so that every part passes
    through them linearly; a norm that subtracts the mean subtracts each part's own. A soft-cap is not linear: the logit before it
    is split, and `Parts.capped` is the result. Definitions: Elhage et al. 2021; Wang et al. 2022, section 3.1.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        prompts: the prompts.
        steering: an `Addition`, or a tuple of them, made while the model runs. Parts are then those of the steered run, and what
            a vector adds directly is in `added` (for one added to the embedding, in `embed`).
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        The parts of the logit difference and of the logit.

    Raises:
        ValueError: before the model runs, for prompts that do not fit, for steering by anything but additions, and for weights
            that are not accessible (quantised, adapted, offloaded); and if the parts do not sum to the logit within 1e-4 of the
            sum of their sizes, or four rounding errors of the model's dtype where that is coarser.
    """
    _check(model, prompts, batch_size)
    resolved = None if steering is None else resolve([steering], model, prompts)
    for edit in () if resolved is None else members(resolved.specs[0]):
        if not isinstance(edit, Addition):
            raise ValueError(
                f"{edit.name} is not an addition; attribution is of a clean or a steered run: give an Addition."
            )
    split = _LogitParts(model, resolved)
    n, depth = len(prompts), n_layers(model.config)
    heads = np.empty((2, depth, n_heads(model.config), n), np.float32)
    mlps = np.empty((2, depth, n), np.float32)
    embed, bias, total, capped, added = (np.empty((2, n), np.float32) for _ in range(5))
    bar = progress_bar(n, "prompt", "attribution", shown=progress)
    with bar, evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size):
            found = split(batch)
            for array, part in zip((heads, mlps, embed, bias, total, capped, added), found, strict=True):
                array[..., batch.index] = part.cpu().numpy()
            bar.update(len(batch.index))
    of_io, of_s = (Parts(*(array[answer] for array in (heads, mlps, embed, bias, total, capped))) for answer in (0, 1))
    difference = Parts(*(vars(of_io)[name] - vars(of_s)[name] for name in vars(of_io)))
    return Attribution(difference, of_io, np.stack([added[0] - added[1], added[0]]))


class _LogitParts:
    """Splits the logits of batches; raises ValueError if a weight that it needs is not accessible."""

    def __init__(self, model: PreTrainedModel, steering: Resolved | None) -> None:
        self.model, self.card, self.replay, self.steering = model, card_of(model), Replay(model), steering
        self.layers, self.n_heads = range(n_layers(model.config)), n_heads(model.config)
        self.residual_scale = self.card.residual_scale(model.config)
        self.head: Any = model.get_output_embeddings()
        projections = {
            f"layer {i}'s output projection": self.replay.module("attention_value_output", i) for i in self.layers
        }
        for name, module in {**projections, "the unembedding": self.head}.items():
            if output_weight(module) is None:
                raise ValueError(
                    f"{name} ({type(module).__name__}) has no accessible weights; load the model without quantisation and "
                    "offloading, and merge adapters."
                )
        final_norm = self.replay.module("final_norm")
        if any(parameter.is_meta for parameter in final_norm.parameters()):
            raise ValueError("the final norm is offloaded; load the model without offloading.")
        with no_gradients(model):
            self.norm = FrozenNorm(final_norm, dimensions(model.config)["d_model"], "the final norm")

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Split a batch's logits.

        Args:
            batch: some of the prompts.

        Returns:
            heads `answer layer head batch`, mlps `answer layer batch`; embed, bias, total, capped and added `answer batch`.
        """
        last = self.layers[-1]
        places = [("block_input", 0), ("block_output", last), ("final_norm", 0)]
        for name in ("attention_value_output", "attention_output", "mlp_contribution"):
            places += [(name, layer) for layer in self.layers]
        seen = _run(self.replay, batch, places, [length - 1 for length in batch.lengths], self.steering)
        device = self.head.weight.device
        for edit in self._edits:
            if edit.place == ("resid_post", last):  # read before it was steered
                seen["block_output", last] += self._vector(edit, batch).to(seen["block_output", last])
        at = {place: x.to(device).float() for place, x in seen.items()}

        ids = batch.answer_ids.to(device)
        unembedding = self.head.weight[ids].float()  # batch answer d_model
        unembedding_bias = self.head.bias[ids].float() if self.head.bias is not None else 0.0
        direction = self.norm.direction(at["block_output", last], unembedding)
        embed = _dot(direction, at["block_input", 0])
        mlps = torch.stack([_dot(direction, at["mlp_contribution", layer]) for layer in self.layers])
        bias = unembedding @ self.norm.offset.to(device) + unembedding_bias
        added = torch.zeros_like(embed)
        for edit in self._edits:
            if edit.site not in ("z", "embed"):
                added += _dot(direction, self._vector(edit, batch))
        heads = []
        for layer in self.layers:
            projection: Any = self.replay.module("attention_value_output", layer)
            scaled = direction * self._post_norm(layer, at["attention_output", layer])[:, None] * self.residual_scale
            of_input = scaled @ self._weight(layer).to(device).float().T  # batch answer d_z
            for edit in self._edits:
                if edit.place == ("z", layer):
                    added += _dot(of_input, self._vector(edit, batch))
            by_input = of_input * at["attention_value_output", layer][:, None]
            heads.append(by_input.unflatten(-1, (self.n_heads, -1)).sum(-1))
            if projection.bias is not None:
                bias = bias + scaled @ projection.bias.to(device).float()
        by_head = torch.stack(heads)  # layer batch answer head

        bias = bias + added
        total = embed + bias + mlps.sum(0) + by_head.sum((0, -1))
        sizes = embed.abs() + bias.abs() + mlps.abs().sum(0) + by_head.abs().sum((0, -1))
        self._check_sum(total, _dot(unembedding, at["final_norm", 0]) + unembedding_bias, sizes, batch)
        capped = self.replay.logits(seen["block_output", last], batch.answer_ids).float()
        return by_head.permute(2, 0, 3, 1), mlps.permute(2, 0, 1), embed.T, bias.T, total.T, capped.T, added.T

    @property
    def _edits(self) -> list[Addition]:
        return [] if self.steering is None else list(members(self.steering.specs[0]))  # type: ignore[arg-type]

    def _vector(self, edit: Addition, batch: Batch) -> Float[Tensor, "batch d"]:
        """What is added at the last token of each prompt, heads of z concatenated; zeros where nothing is."""
        assert self.steering is not None  # there is an edit
        last = [
            length - 1 in tokens
            for length, tokens in zip(batch.lengths, self.steering.tokens_of(edit, batch.index), strict=True)
        ]
        return (torch.tensor(last)[:, None] * _vector(edit, self.n_heads)).to(self.head.weight.device)

    def _weight(self, layer: int) -> Float[Tensor, "d_in d_model"]:
        weight = self.replay.projection(layer)
        assert weight is not None  # checked by `__init__`
        return weight

    def _post_norm(self, layer: int, attention: Float[Tensor, "batch d_model"]) -> Float[Tensor, "#batch #d_model"]:
        """The factor by which a post-norm scales attention's output; 1 if there is none."""
        if self.card.post_norm_scale is None:
            return attention.new_ones(1, 1)
        norm: Any = self.replay.module("attention_contribution", layer)
        return self.card.post_norm_scale(norm, attention.to(norm.weight.device)).to(attention.device)

    def _check_sum(self, total: Tensor, logit: Tensor, sizes: Tensor, batch: Batch) -> None:
        """Raise ValueError unless the parts sum to the logit, all `batch answer`."""
        tolerance = max(TOLERANCE, 4 * torch.finfo(self.model.dtype).eps)
        wrong = ~((total - logit).abs() <= tolerance * sizes)  # a NaN is wrong too
        if wrong.any():
            row, answer = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the parts of prompt {batch.index[row]}'s logit sum to {total[row, answer]:.6g}, but the logit is "
                f"{logit[row, answer]:.6g}: something else writes to the residual stream; remove hooks and adapters of your own."
            )


# -- shared by both ----------------------------------------------------------------------------------------------------


def _dot(directions: Float[Tensor, "batch answer d"], x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch answer"]:
    return (directions * x[:, None]).sum(-1)


def _run(
    replay: Replay, batch: Batch, places: Sequence[Where], tokens: list[int], steering: Resolved | None = None
) -> dict[Where, Float[Tensor, "batch d"]]:
    """Run a batch; return the activations at some places, before anything is added there, at one token of each prompt."""
    columns, seen = torch.tensor(batch.starts) + torch.tensor(tokens), dict[Where, Tensor]()

    def keep(place: Where, x: Tensor) -> None:
        seen[place] = x[torch.arange(len(x), device=x.device), columns.to(x.device)]

    with ExitStack() as hooks:
        steered = [] if steering is None else [_steering(edit, batch, steering) for edit in members(steering.specs[0])]
        hooks.enter_context(Taps(replay.model, replay.card, [*places, *(place for place, _ in steered)]))
        for place, add in steered:
            if place[0] == "embeddings":  # in some families the input of the first block
                hook_component(replay.model, place, add, hooks)
        for place in places:
            hook_component(replay.model, place, partial(keep, place), hooks)
        for place, add in steered:
            if place[0] != "embeddings":
                hook_component(replay.model, place, add, hooks)
        replay.bare(**batch.inputs(input_device(replay.model)), use_cache=False)
    return seen


def _steering(edit: OneSpec, batch: Batch, resolved: Resolved) -> tuple[Where, Callable[[Tensor], Tensor]]:
    """The component where an addition is made, heads concatenated, and the function that makes it."""
    rows, columns = [], []
    for row, (start, tokens) in enumerate(zip(batch.starts, resolved.tokens_of(edit, batch.index), strict=True)):
        rows += [row] * len(tokens)
        columns += [start + token for token in tokens]
    vector = _vector(edit, n_heads(resolved.model.config))

    def add(x: Tensor) -> Tensor:
        if edit.site != "resid_mid":  # the norm receives the stream itself, which also continues past it
            x = x.clone()
        x[rows, columns] += vector.to(x)
        return x

    return (SIDE_BY_SIDE.get(edit.site, FIELD_NAMES[edit.site]), edit.layer or 0), add


def _vector(edit: OneSpec, heads: int) -> Float[Tensor, " d"]:
    """The scaled vector, heads of z concatenated."""
    assert isinstance(edit, Addition)  # checked before
    vector = torch.tensor(edit.vector) * edit.scale
    if edit.heads is None:
        return vector
    return (torch.zeros(heads, 1).index_fill(0, torch.tensor(edit.heads), 1.0) * vector).flatten()


def _check(model: PreTrainedModel, prompts: TokenizedPrompts, batch_size: int) -> None:
    """Raise ValueError for anything that is wrong with the arguments."""
    check_tokenized(model, prompts)
    if not prompts.input_ids:
        raise ValueError("nothing to run: give at least one prompt.")
    refuse_latent_steps(model, prompts.input_ids)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model."
        )
    n_vocab = head.weight.shape[0]
    for prompt, ids in enumerate(prompts.answer_ids):
        if not 0 <= min(ids) <= max(ids) < n_vocab:
            raise ValueError(
                f"the answers of prompt {prompt} have the ids {ids[0]} and {ids[1]} but the vocabulary has {n_vocab} tokens; "
                "use the model's own tokenizer."
            )
