"""Translation heads: heads that, while a translation is read or written, look at the words of the source in their order.

    scores = translation_scores(model, prompts)          # of tokenize_pairs: sentence layer head
    heads = found_heads(np.nanmean(scores, 0) - np.nanmean(control, 0), threshold=0.04)
    sets = control_sets(heads, 26, 8, n_sets=20, seed=0) # random heads to ablate beside them
    change, clean = path_changes(model, asked.plus, asked.minus["source"])   # of parallel.word_prompts

Of every pattern the part is cut out in which the translation, from its language's label on, looks at what is before that label:
pattern[t:, first:t], `first` being 1 behind a start token. A sentence's score is the mean of three diagonals of this crop, each
the mean of its entries: the one through the corner, the one above it and the one below.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_heads, n_layers
from pyvene_ext.engine.metrics import paired_logit_diff
from pyvene_ext.engine.resolve import resolve
from pyvene_ext.engine.sweep.run import open_shared_store, store_facts
from pyvene_ext.intervenable.statistics import Reference, label
from pyvene_ext.io.seeds import rng
from pyvene_ext.methods.heads.patterns import read_patterns
from pyvene_ext.methods.patching.patch import all_paths, patch
from pyvene_ext.methods.patching.subspace import concept_directions
from pyvene_ext.models.devices import is_main_process, on_all_ranks
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts
from pyvene_ext.specs.ablation import all_heads
from pyvene_ext.specs.joint import Spec
from pyvene_ext.stats.controls import Head, layer_matched_random_heads

OFFSETS = (0, 1, -1)
AT_ONCE = 64  # prompts whose paths are kept together
Replacement = Literal["mean", "maximum", "minimum", "zero"]


# -- attention ---------------------------------------------------------------------------------------------------------


def diagonal_score(crop: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch"]:
    """Mean of the means of the diagonals at offsets 0, +1 and -1; NaN for a crop that is too short to have all three."""
    return torch.stack([crop.diagonal(offset, -2, -1).float().mean(-1) for offset in OFFSETS]).mean(0)


def translation_scores(
    model: PreTrainedModel, prompts: TokenizedPrompts, *, batch_size: int = 8, progress: bool = True
) -> Float64[np.ndarray, "sentence layer head"]:
    """Every head's diagonal score on every sentence; NaN, for all heads, where the crop is too short to have one.

    Args:
        model: with a card, and attention that can be seen (eager or sdpa); used in eval mode and left as it was.
        prompts: with the positions "first" and "label" (`parallel.tokenize_pairs`).
        batch_size: prompts a forward pass.
        progress: show a bar.

    Raises ValueError, before the model runs, for prompts without these positions, and what `read_patterns` refuses; and for
    scores that are not finite.
    """
    for prompt, places in enumerate(prompts.positions):
        if not {"first", "label"} <= places.keys():
            raise ValueError(
                f"prompt {prompt} lacks the position of its label; make prompts with pyvene_ext.prompts.parallel.tokenize_pairs."
            )
    found = np.zeros((len(prompts), n_layers(model.config), n_heads(model.config)))

    def see(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        for row, prompt in enumerate(batch.index):
            places = prompts.positions[prompt]  # negative, and so columns of a batch that is padded on the left
            crop = pattern[row, :, places["label"] :, places["first"] : places["label"]]
            found[prompt, layer] = diagonal_score(crop).double().cpu().numpy()
            if min(crop.shape[-2:]) >= 2 and not np.isfinite(found[prompt, layer]).all():
                raise ValueError(
                    f"the attention of layer {layer} in prompt {prompt} is not finite; check the model's weights, or load it in "
                    "float32."
                )

    read_patterns(model, prompts, see, batch_size=batch_size, progress=progress)
    return found


def source_tokens(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    heads: Sequence[Head],
    spans: Sequence[tuple[int, int]],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> list[int]:
    """The token id that some heads together look at most from each prompt's last token, among those of its span.

    With translation heads that is the word of the source which is to be translated next.

    Args:
        spans: of each prompt, `[first, last)` of the tokens that count, from the prompt's first token.
    """
    total = [np.zeros(end - start) for start, end in spans]

    def see(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        if own := [head for at, head in heads if at == layer]:
            looks = pattern[:, own, -1].float().sum(1).double().cpu().numpy()
            for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
                start, end = spans[prompt]
                total[prompt] += looks[row, -length:][start:end]

    read_patterns(model, prompts, see, batch_size=batch_size, progress=progress)
    return [prompts.input_ids[prompt][start + int(total[prompt].argmax())] for prompt, (start, _) in enumerate(spans)]


def found_heads(scores: Float[np.ndarray, "layer head"], threshold: float) -> list[Head]:
    """The heads whose score is above the threshold, the highest first."""
    above = [(int(layer), int(head)) for layer, head in np.argwhere(scores > threshold)]
    return sorted(above, key=lambda at: -scores[at])


# -- causes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """Random sets of heads, all different.

    Attributes:
        name: where they are from: "same layers", as many heads of each, or "any layer".
        sets: the sets, (layer, head) sorted.
        apart: whether none of their heads is among those that they are for.
    """

    name: str
    sets: list[tuple[Head, ...]]
    apart: bool


def control_sets(heads: Sequence[Head], n_layers: int, n_heads: int, n_sets: int, seed: int) -> list[Control]:
    """Random sets of as many heads, of the same layers and of any layer: either control alone misleads.

    Heads of any layer differ in depth too, and heads of the same layers may do the same. None is among `heads`; but where the
    layers have too few other heads for `n_sets` such sets, those of the same layers are any of their heads, only not all of
    `heads` again, as in a permutation test. There may still be fewer than `n_sets`.

    Raises ValueError if `heads` are none, outside the model, or more than half of it.
    """
    if 2 * len(heads) > (size := n_layers * n_heads):
        raise ValueError(
            f"{len(heads)} of the {size} heads of the model are to be ablated, so that no random set of as many others is left; "
            "name fewer, or raise the threshold."
        )
    in_one_row = [(0, layer * n_heads + head) for layer, head in heads]
    drawn = layer_matched_random_heads(in_one_row, 1, size, n_sets, rng(seed, "any layer"))
    anywhere = [tuple(divmod(head, n_heads) for _, head in one) for one in drawn]
    wanted = Counter(layer for layer, _ in heads)
    if math.prod(math.comb(n_heads - k, k) for k in wanted.values()) >= n_sets:
        same = layer_matched_random_heads(heads, n_layers, n_heads, n_sets, rng(seed, "random sets"))
        return [Control("same layers", same, True), Control("any layer", anywhere, True)]
    own, shuffled, draw = tuple(sorted(heads)), dict[tuple[Head, ...], None](), rng(seed, "shuffled sets")
    possible = math.prod(math.comb(n_heads, k) for k in wanted.values()) - 1
    while len(shuffled) < min(n_sets, possible):
        one = [(layer, int(h)) for layer, k in wanted.items() for h in draw.choice(n_heads, k, replace=False)]
        if (found := tuple(sorted(one))) != own:
            shuffled[found] = None
    return [Control("same layers", list(shuffled), False), Control("any layer", anywhere, True)]


def of_swaps(values: Float[np.ndarray, "*set prompt"]) -> Float[np.ndarray, "*set swap"]:
    """Paired logit differences, of `parallel.WordPrompts`: a swap's two prompts lie side by side."""
    a, b = torch.from_numpy(values[..., 0::2]), torch.from_numpy(values[..., 1::2])
    return paired_logit_diff(a, b).numpy()


def path_changes(
    model: PreTrainedModel,
    plus: TokenizedPrompts,
    minus: TokenizedPrompts,
    *,
    subspace: bool = False,
    store: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[Float32[np.ndarray, "layer head prompt"], Float32[np.ndarray, " prompt"]]:
    """What path patching from every head at END to the logits does to the right word's logit, and that logit (arXiv 2502.11806).

    A head's output at the last token is taken from X- (`minus`); with `subspace` along the one direction alone in which X+ and X-
    differ. NaN for a head that has no such direction. `store` is a folder that keeps what is finished, some prompts at a time.

    Raises ValueError for what `patching.patch` refuses, and for a store of something else.
    """
    shape = n_layers(model.config), n_heads(model.config)
    senders = all_paths(model.config, ("logits",), positions="last", subspace=subspace)
    paths = [path for path in senders if path.sender_node.site == "z"]
    sending: list[Spec] = [path.sender_patch for path in paths]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    directions = concept_directions(model, sending, plus, minus, missing="zeros", **options)
    clean, change = np.empty(len(plus), np.float32), np.empty((len(paths), len(plus)), np.float32)
    facts = store_facts(resolve(sending, model, plus, minus), "logit", range(len(plus)))
    with ExitStack() as stack:
        kept = None if store is None else stack.enter_context(open_shared_store(store, facts, {"prompts": AT_ONCE}))
        done = on_all_ranks(lambda: {} if kept is None else kept.finished)
        for number, start in enumerate(range(0, len(plus), AT_ONCE)):
            some = range(start, min(start + AT_ONCE, len(plus)))
            if number not in done:
                of = patch(model, paths, plus.take(some), minus.take(some), "logit", directions=directions, **options)
                done[number] = {"clean": of.clean, "change": of.intervened - of.clean}
                if kept is not None and is_main_process():
                    kept.add(number, done[number])
            clean[some], change[:, some] = done[number]["clean"], done[number]["change"]
    for row, at in enumerate(path.sender_patch for path in paths):
        if directions and not directions[at.place, at.positions][at.heads].any():
            change[row] = np.nan
    return change.reshape(*shape, -1), clean


def replaced_heads(
    model: PreTrainedModel, sources: TokenizedPrompts, kinds: Sequence[Replacement], **options: Any
) -> Iterator[tuple[Replacement, list[Spec], Reference]]:
    """The study's first attempt: every head by itself put to the mean, maximum or minimum it has over some texts, or to zero.

    Gives, by kind, one intervention a head and the reference that it takes values from; `options` go to `Reference.compute`.
    """
    places = [("z", layer) for layer in range(n_layers(model.config))]
    base = Reference.compute(model, sources, places, bank=("all",), **options)
    for kind in kinds:
        specs: list[Spec] = list(all_heads(model.config, "zero" if kind == "zero" else "mean"))
        yield kind, specs, extreme_of(base, kind) if kind == "maximum" or kind == "minimum" else base


def extreme_of(reference: Reference, which: Literal["maximum", "minimum"]) -> Reference:
    """A reference whose mean over tokens is, dimension by dimension, the largest or smallest value instead.

    So that a mean ablation puts that in place. The reference must have been computed with bank=("all",).
    """
    if reference.bank != ("all",):
        raise ValueError("extremes are of all tokens; compute the reference with bank=('all',).")
    found = {}
    for place in map(label, reference.places):
        rows = reference.tensors[f"bank/{place}"].float()
        found[f"mean/{place}"] = rows.amax(0) if which == "maximum" else rows.amin(0)
    return replace(reference, tensors=reference.tensors | found)
