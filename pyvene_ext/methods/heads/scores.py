"""Head scores on repeated random tokens: previous token, duplicate token, induction, and copying.

    bos, tokens = leading_bos(tokenizer), usable_tokens(model, tokenizer)
    ids = random_tokens(tokens, 25, 4, examples=10, rng=rng(0, "tokens"), bos=bos)
    scores = attention_scores(model, ids, period=25, first=len(bos), copying=True)
    write_head_scores("induction_scores.csv", scores.induction.mean(0))

With A the attention pattern of a head, on a block of s random tokens that is repeated (Olsson et al. 2022, appendix "Head
activation evaluators"):

    previous token     mean of A[i, i-1]      over all random tokens i but the first
    duplicate token    mean of A[i, i-s]      over the i after the first block
    induction          mean of A[i, i-s+1]    over the i after the first block

With `occurrences="all"` the entries one, two ... blocks back are summed, so that a head that attends to any earlier occurrence,
or to several, gets the full score.

The copying score is a property of the OV circuit: what would the head write if it attended to token j alone? Its value there
times its output matrix, through final norm and unembedding, gives its direct logits. After subtracting their mean over the
vocabulary and setting negative ones to 0, the share r of token j itself among the tokens of the block is scaled to 2r - 1: 1 for
a head that raises nothing but the token that it attends to, -1 for one that does not raise it. (Ours; the appendix scales a ratio
that ends at 0.5.) The mean is over all random tokens j. Attention to the token is set to 1, so the score says nothing about
whether the head attends there. Norms and post-norms only rescale a head's direct logits, once its own mean is subtracted where
the norm subtracts one, and the share does not depend on scale. Biases belong to no head; a soft-cap after the unembedding is not
applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelcards import Card, Taps, card_of, n_heads, n_layers, n_positions
from modelcards.attention_taps import output_weight
from pyvene_ext.engine.results import Shown, Summary, count, table
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.io.files import read_csv, write_csv
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import hook_component, split_heads
from pyvene_ext.models.modes import evaluating

if TYPE_CHECKING:
    import pandas as pd

Occurrences = Literal["last", "all"]
Bos = Literal["auto", "yes", "no"]
COLUMNS = ("scores", "layer", "head")
TRIM = 0.1  # share of the vocabulary left out at each end


# -- files -------------------------------------------------------------------------------------------------------------


def write_head_scores(path: str | Path, scores: Float[np.ndarray, "layer head"]) -> None:
    """Write the CSV `scores,layer,head`, the highest score first.

    Args:
        path: the file.
        scores: one per head.

    Raises:
        ValueError: the scores are not [layer head], are empty, or are not finite.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"scores must be one finite number per head, [layer head], not of shape {scores.shape}.")
    rows = [dict(zip(COLUMNS, (float(scores[at]), *at), strict=True)) for at in np.ndindex(scores.shape)]
    write_csv(path, sorted(rows, key=lambda row: -row["scores"]))


def read_head_scores(path: str | Path, config: Any) -> list[tuple[float, int, int]]:
    """Read a CSV `scores,layer,head`; it need not list every head.

    Args:
        path: the file; further columns are ignored.
        config: of the model that the heads are in.

    Returns:
        (score, layer, head), the highest score first.

    Raises:
        ValueError: a column is missing, there is no row, a score is not a finite number, or a head is not in the model or listed
            twice.
    """
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path} has no heads; give at least one row below scores,layer,head.")
    if missing := [column for column in COLUMNS if column not in rows[0]]:
        raise ValueError(f"{path} lacks the column {missing[0]}; its first line must be scores,layer,head.")
    layers, heads = n_layers(config), n_heads(config)
    found: dict[tuple[int, int], float] = {}
    for number, row in enumerate(rows, start=1):
        try:
            score, layer, head = float(row["scores"]), int(row["layer"]), int(row["head"])
        except ValueError:
            found_row = ",".join(row[column] for column in COLUMNS)
            raise ValueError(
                f"{path}, row {number}: {found_row!r} is not a number and two whole numbers; give scores,layer,head."
            ) from None
        if not math.isfinite(score):
            raise ValueError(
                f"{path}, row {number}: the score of head {layer}.{head} is {score}; give a finite number."
            )
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ValueError(
                f"{path}, row {number}: head {layer}.{head} is outside a model of {layers} layers with {heads} heads; give the "
                "scores of this model."
            )
        if (layer, head) in found:
            raise ValueError(f"{path}, row {number}: head {layer}.{head} is listed twice; give each head once.")
        found[layer, head] = score
    return sorted(((score, *at) for at, score in found.items()), key=lambda row: (-row[0], row[1:]))


# -- random tokens -----------------------------------------------------------------------------------------------------


def usable_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trim: float | None = None,
    among: Int[np.ndarray, " token"] | None = None,
) -> Int[np.ndarray, " token"]:
    """The ids to draw random tokens from: neither special nor added, and not among the most or the least frequent.

    A tokenizer has no token frequencies. In BPE and Unigram vocabularies ids roughly follow them, because the most frequent
    merges come first, so the lowest and the highest ids are left out. Other vocabularies (by word) have no such order.

    Args:
        model: ids without an embedding in it are left out.
        tokenizer: the model's.
        trim: the share of the ids left out at each end; by default 0.1 for BPE and Unigram vocabularies, else 0.
        among: only these ids, which are not trimmed by default.

    Returns:
        The ids, ascending.

    Raises:
        ValueError: `trim` is not in [0, 0.5), or `among` has an id beyond the vocabulary.
    """
    if trim is None and among is not None:
        trim = 0.0
    if trim is None:
        kind = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
        trim = TRIM if kind in ("BPE", "Unigram") else 0.0
    check_trim(trim)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    embeddings: Any = model.get_input_embeddings()
    n_embedded = embeddings.weight.shape[0]
    ids = np.array(sorted({i for i in tokenizer.get_vocab().values() if i < n_embedded} - special), np.int64)
    cut = int(trim * len(ids))
    ids = ids[cut : len(ids) - cut]
    if among is None:
        return ids
    if among.max() >= n_embedded:
        raise ValueError(
            f"the tokens contain the id {among.max()} but the vocabulary has {n_embedded} tokens; give ids of this tokenizer."
        )
    return np.intersect1d(among, ids)


def check_trim(trim: float) -> None:
    """Check a share to leave out at both ends.

    Args:
        trim: the share.

    Raises:
        ValueError: it is not in [0, 0.5).
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be at least 0 and below 0.5, because it is left out at both ends, not {trim}.")


def leading_bos(tokenizer: PreTrainedTokenizerBase, choice: Bos = "auto") -> tuple[int, ...]:
    """Find the start token that sequences of token ids should begin with.

    Args:
        tokenizer: the model's.
        choice: auto: the BOS token if the tokenizer prepends one to a text, which suggests that the model was trained with it;
            yes: the BOS token; no: nothing.

    Returns:
        The BOS token, or nothing.

    Raises:
        ValueError: `choice` is yes and the tokenizer has no BOS token.
    """
    if choice == "no":
        return ()
    if choice == "yes":
        if tokenizer.bos_token_id is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no start token; leave out --bos yes."
            )
        return (tokenizer.bos_token_id,)
    ids = tokenizer("")["input_ids"]
    return (ids[0],) if ids and ids[0] == tokenizer.bos_token_id else ()


def random_tokens(
    tokens: Int[np.ndarray, " token"],
    length: int,
    repeats: int,
    *,
    examples: int,
    rng: np.random.Generator,
    bos: Sequence[int] = (),
) -> Int[Tensor, "sequence pos"]:
    """Draw sequences that repeat a block of distinct random tokens.

    Args:
        tokens: ids to draw from.
        length: tokens of a block.
        repeats: how many times each sequence has its block.
        examples: how many sequences.
        rng: source of randomness.
        bos: tokens before the first block.

    Returns:
        The sequences.

    Raises:
        ValueError: a number is below 1, or there are fewer tokens than one sequence needs.
    """
    for name, number in (("length", length), ("repeats", repeats), ("examples", examples)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}.")
    if len(tokens) < length:
        raise ValueError(
            f"{length} distinct random tokens are needed but only {len(tokens)} are usable; use fewer, or trim less."
        )
    blocks = np.stack([rng.choice(tokens, length, replace=False) for _ in range(examples)])
    front = np.tile(np.array(bos, np.int64), (examples, 1))
    return torch.from_numpy(np.concatenate([front, np.tile(blocks, (1, repeats))], axis=1))


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class HeadScores(Shown):
    """The scores of every head on every sequence.

    Attributes:
        previous: previous-token score, in [0, 1].
        duplicate: duplicate-token score, in [0, 1].
        induction: induction score, in [0, 1].
        copying: copying score, in [-1, 1]; None if it was not asked for.
    """

    previous: Float64[np.ndarray, "sequence layer head"]
    duplicate: Float64[np.ndarray, "sequence layer head"]
    induction: Float64[np.ndarray, "sequence layer head"]
    copying: Float64[np.ndarray, "sequence layer head"] | None = None

    @property
    def by_name(self) -> dict[str, Float64[np.ndarray, "sequence layer head"]]:
        """The scores that were measured, by name."""
        return {name: values for name, values in vars(self).items() if values is not None}

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per sequence and head.

        Returns:
            A table with the columns sequence, layer, head, previous, duplicate, induction, and copying if it was scored.
        """
        axes = dict(zip(("sequence", "layer", "head"), map(range, self.induction.shape), strict=True))
        return table(axes, self.by_name)

    def summarise(self) -> Summary:
        """The heads with the highest scores, means over sequences."""
        sequences, layers, heads = self.induction.shape
        rows = []
        for name, values in self.by_name.items():
            mean = values.mean(0)
            best = np.argsort(-mean, axis=None, kind="stable")[:3].tolist()
            rows.append((name, ", ".join(f"{i // heads}.{i % heads} {mean.flat[i]:.2f}" for i in best)))
        title = f"HeadScores: {layers} layers x {heads} heads, {count(sequences, 'sequence')}"
        return Summary(title, ("score", "highest heads"), rows)


def attention_scores(
    model: PreTrainedModel,
    ids: Int[Tensor, "sequence pos"],
    period: int,
    *,
    first: int = 0,
    occurrences: Occurrences = "last",
    copying: bool = False,
    batch_size: int = 10,
    progress: bool = True,
) -> HeadScores:
    """Score all heads, from one forward pass per batch (definitions: the module's docstring).

    Each layer's pattern is reduced to scores while the model runs; only three or four numbers per head and sequence are kept.
    Sums are in float32 whatever the model's dtype; direct logits are computed for the block's tokens only.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa); used in eval mode and restored afterwards,
            also after an error.
        ids: the sequences, all of one length. Without `copying` they need not repeat: attention scores on text without
            repetition are a control.
        period: tokens of a block.
        first: tokens before the first block (a start token), which are not scored.
        occurrences: "last", or "all" for the sum over all earlier ones.
        copying: score copying too; requires a causal language model whose weights are neither quantised nor offloaded.
        batch_size: sequences per forward pass.
        progress: show a bar.

    Returns:
        The scores by sequence and head.

    Raises:
        ValueError: before the model runs, for arguments that do not fit; and for scores that are not finite.
    """
    card = card_of(model)
    check_sequences(model, ids, period, first, occurrences, batch_size)
    writes = _DirectLogits(model, card, ids, period, first) if copying else None
    layers = range(n_layers(model.config))
    found = np.zeros((4 if copying else 3, len(ids), len(layers), n_heads(model.config)))
    bar = progress_bar(len(ids), "sequence", "head scores", shown=progress)
    with bar, evaluating(model), no_gradients(model), ExitStack() as hooks:
        rows = slice(0)  # of the batch that is running

        def at_pattern(layer: int, pattern: Tensor) -> None:
            by_head = split_heads(pattern, "attention_pattern", model)
            scores = pattern_scores(by_head, period, first, occurrences)
            found[:3, rows, layer] = torch.stack(scores).double().cpu().numpy()

        def at_values(layer: int, values: Tensor) -> None:
            assert writes is not None
            by_head = split_heads(values, "head_value_output", model)
            found[3, rows, layer] = writes.share(layer, by_head[:, :, first:], rows).cpu().numpy()

        hooks.enter_context(
            Taps(
                model, card, [(name, layer) for name in ("attention_pattern", "head_value_output") for layer in layers]
            )
        )
        for layer in layers:
            hook_component(model, ("attention_pattern", layer), partial(at_pattern, layer), hooks)
            if copying:
                hook_component(model, ("head_value_output", layer), partial(at_values, layer), hooks)
        for start in range(0, len(ids), batch_size):
            rows = slice(start, min(start + batch_size, len(ids)))
            model.base_model(input_ids=ids[rows].to(input_device(model)), use_cache=False)
            bar.update(rows.stop - rows.start)
    if not np.isfinite(found).all():
        _, sequence, layer, head = np.argwhere(~np.isfinite(found))[0].tolist()
        raise ValueError(
            f"a score of head {layer}.{head} on sequence {sequence} is not finite; check the model's weights, or load it in "
            "float32."
        )
    return HeadScores(*found)


def pattern_scores(
    pattern: Float[Tensor, "batch head query key"], period: int, first: int = 0, occurrences: Occurrences = "last"
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
    """Compute the attention scores of patterns (Olsson et al. 2022, appendix "Head activation evaluators").

    Args:
        pattern: attention probabilities.
        period: tokens of a block.
        first: tokens before the first block.
        occurrences: "last", or "all" for the sum over all earlier ones.

    Returns:
        Previous-token, duplicate-token and induction score.
    """
    length = pattern.shape[-1] - first
    last_block = (length - 1) // period if occurrences == "all" else 1

    def at(back: int, start: int) -> Float[Tensor, "batch head"]:
        """The sum of A[i, i - back] over the random tokens i from `start`."""
        return pattern.diagonal(-back, 2, 3)[..., first + start - back :].float().sum(-1)

    blocks = [block * period for block in range(1, last_block + 1)]
    duplicate = torch.stack([at(back, back) for back in blocks]).sum(0)
    induction = torch.stack([at(back - 1, back) for back in blocks]).sum(0)
    return at(1, 1) / (length - 1), duplicate / (length - period), induction / (length - period)


class _DirectLogits:
    """Direct logits of heads' values for the tokens of each sequence's block."""

    def __init__(
        self, model: PreTrainedModel, card: Card, ids: Int[Tensor, "sequence pos"], period: int, first: int
    ) -> None:
        block = ids[:, first : first + period]
        self._own = ids[:, first:, None] == block[:, None]  # sequence pos token
        if not (self._own.sum(-1) == 1).all():
            raise ValueError(
                f"copying is scored on a repeated block of {period} distinct tokens after {first} others, unlike one of the "
                "sequences; use random_tokens."
            )
        head: Any = model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model, or leave "
                "out copying."
            )
        self._norm: Any = card.module(model, "final_norm")
        self._post_norms: list[nn.Module] = []
        self._projections = [card.module(model, "attention_value_output", i) for i in range(n_layers(model.config))]
        if any(output_weight(module) is None for module in (head, *self._projections)) or any(
            parameter.is_meta for parameter in self._norm.parameters()
        ):
            raise ValueError(
                "copying needs accessible weights; load the model without quantisation and offloading, merge adapters, or leave "
                "out copying."
            )
        if card.post_norm_scale is not None:
            self._post_norms = [card.module(model, "attention_contribution", i) for i in range(len(self._projections))]
        self._post_norm_scale = card.post_norm_scale
        self._norm_weights = {name: weight.detach().float() for name, weight in self._norm.named_parameters()}
        self._n_heads = n_heads(model.config)
        with no_gradients(model):
            # The logits' mean over the vocabulary is the logit of the mean direction.
            mean = head.weight.mean(0, dtype=torch.float32)
            self._directions = head.weight[block.to(head.weight.device)].float() - mean  # sequence token d_model

    def share(
        self, layer: int, values: Float[Tensor, "batch kv_head pos d_head"], rows: slice
    ) -> Float[Tensor, "batch head"]:
        """Compute the copying score of a layer's heads.

        Args:
            layer: their layer.
            values: at the tokens of the blocks.
            rows: the sequences of the batch.

        Returns:
            2r - 1, the mean over positions.
        """
        weight = output_weight(self._projections[layer])
        assert weight is not None  # checked by `__init__`
        by_head = weight.unflatten(0, (self._n_heads, -1))
        group = self._n_heads // values.shape[1]
        own = self._own[rows]
        found = []
        for head in range(self._n_heads):
            part = values[:, head // group].float() @ by_head[head].float()
            if self._post_norm_scale is not None:
                part = part * self._post_norm_scale(self._post_norms[layer], part)
            raised = (self._final_norm(part) @ self._directions[rows].to(part.device).mT).clamp(min=0)
            total = raised.sum(-1)
            total = torch.where(total == 0, 1, total)  # a share of 0 if nothing is raised
            share = (raised * own.to(part.device)).sum(-1) / total
            found.append(2 * share.mean(-1) - 1)
        return torch.stack(found, -1)

    def _final_norm(self, part: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Apply the final norm to a part, up to its scale and without the norm's bias."""

        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(self._norm, self._norm_weights, x.to(device))

        device = next(iter(self._norm_weights.values())).device
        return (call(part) - call(torch.zeros_like(part[:1, :1]))).to(part.device)


def check_sequences(
    model: PreTrainedModel, ids: Tensor, period: int, first: int, occurrences: str, batch_size: int
) -> None:
    """Raise ValueError for anything that is wrong with the arguments of `attention_scores`."""
    if occurrences not in get_args(Occurrences):
        raise ValueError(f"occurrences must be 'last' or 'all', not {occurrences!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    if period < 2 or first < 0:
        raise ValueError(f"period must be at least 2 and first at least 0, not {period} and {first}.")
    if ids.ndim != 2 or not len(ids) or ids.shape[1] <= first + period:
        raise ValueError(
            f"ids must be [sequence pos], longer than the first {first} tokens and one period of {period}, not of shape "
            f"{tuple(ids.shape)}; repeat the block at least once."
        )
    embeddings: Any = model.get_input_embeddings()
    context, n_vocab = n_positions(model.config), embeddings.weight.shape[0]
    if ids.shape[1] > context:
        raise ValueError(
            f"the sequences are {ids.shape[1]} tokens long but the model has {context} positions; use a shorter block or fewer "
            "repeats."
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
        raise ValueError(
            f"the ids range from {int(ids.min())} to {int(ids.max())} but the model embeds {n_vocab} tokens; use its own "
            "tokenizer."
        )
