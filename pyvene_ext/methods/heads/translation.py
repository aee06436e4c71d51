"""Translation heads: heads that, while a translation is read or written, attend to the words of the source in order.

    scores = translation_scores(model, prompts)          # of tokenize_pairs: sentence layer head
    heads = found_heads(np.nanmean(scores, 0) - np.nanmean(control, 0), threshold=0.04)
    sets = control_sets(heads, 26, 8, n_sets=20, seed=0) # random heads to ablate as controls
    change, clean = path_changes(model, asked.plus, asked.minus["source"])   # of parallel.word_prompts

Every pattern is cropped to the part in which the translation, from its language's label on, attends to what precedes that label:
pattern[t:, first:t], with `first` being 1 after a start token. A sentence's score is the mean over three diagonals of this crop,
each the mean of its entries: the main diagonal, the one above it and the one below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import n_heads, n_layers
from pyvene_ext.engine.measure import as_metric
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
from pyvene_ext.stats.controls import Head, RandomHeads, random_heads

OFFSETS = (0, 1, -1)
AT_ONCE = 64  # prompts whose paths are run and saved together
Replacement = Literal["mean", "maximum", "minimum", "zero"]


# -- attention ---------------------------------------------------------------------------------------------------------


def diagonal_score(crop: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch"]:
    """Average the means of the diagonals at offsets 0, +1 and -1.

    Args:
        crop: attention from the translation to the source.

    Returns:
        The score; NaN for a crop that is too short to have all three diagonals.
    """
    return torch.stack([crop.diagonal(offset, -2, -1).float().mean(-1) for offset in OFFSETS]).mean(0)


def translation_scores(
    model: PreTrainedModel, prompts: TokenizedPrompts, *, batch_size: int = 8, progress: bool = True
) -> Float64[np.ndarray, "sentence layer head"]:
    """Score every head on every sentence by its diagonals.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa); used in eval mode and restored afterwards.
        prompts: with the positions "first" and "label" (`parallel.tokenize_pairs`).
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        The diagonal scores; NaN for all heads on a sentence that is too short.

    Raises:
        ValueError: before the model runs, for prompts without these positions, and what `read_patterns` refuses; and for scores
            that are not finite.
    """
    for prompt, places in enumerate(prompts.positions):
        if not {"first", "label"} <= places.keys():
            raise ValueError(
                f"prompt {prompt} lacks the position of its label; make prompts with pyvene_ext.prompts.parallel.tokenize_pairs."
            )
    found = np.zeros((len(prompts), n_layers(model.config), n_heads(model.config)))

    def on_pattern(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        for row, prompt in enumerate(batch.index):
            places = prompts.positions[prompt]  # negative, so they also index columns of a batch padded on the left
            crop = pattern[row, :, places["label"] :, places["first"] : places["label"]]
            found[prompt, layer] = diagonal_score(crop).double().cpu().numpy()
            if min(crop.shape[-2:]) >= 2 and not np.isfinite(found[prompt, layer]).all():
                raise ValueError(
                    f"the attention of layer {layer} in prompt {prompt} is not finite; check the model's weights, or load it in "
                    "float32."
                )

    read_patterns(model, prompts, on_pattern, batch_size=batch_size, progress=progress)
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
    """Find the token in each prompt's span that some heads jointly attend to most from the last token.

    With translation heads that is the word of the source that is translated next.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa).
        prompts: the prompts.
        heads: (layer, head) pairs whose attention is summed.
        spans: for each prompt, `[first, last)` of the tokens that count, from the prompt's first token.
        batch_size: prompts per forward pass.
        progress: show a bar.

    Returns:
        One token id per prompt.
    """
    total = [np.zeros(end - start) for start, end in spans]

    def on_pattern(layer: int, batch: Batch, pattern: Float[Tensor, "batch head query key"]) -> None:
        if own := [head for at, head in heads if at == layer]:
            looks = pattern[:, own, -1].float().sum(1).double().cpu().numpy()
            for row, (prompt, length) in enumerate(zip(batch.index, batch.lengths, strict=True)):
                start, end = spans[prompt]
                total[prompt] += looks[row, -length:][start:end]

    read_patterns(model, prompts, on_pattern, batch_size=batch_size, progress=progress)
    return [prompts.input_ids[prompt][start + int(total[prompt].argmax())] for prompt, (start, _) in enumerate(spans)]


def found_heads(scores: Float[np.ndarray, "layer head"], threshold: float) -> list[Head]:
    """Select the heads whose score is above a threshold.

    Args:
        scores: by head.
        threshold: of the score.

    Returns:
        (layer, head) pairs, the highest score first.
    """
    above = [(int(layer), int(head)) for layer, head in np.argwhere(scores > threshold)]
    return sorted(above, key=lambda at: -scores[at])


# -- causes ------------------------------------------------------------------------------------------------------------


def control_sets(heads: Sequence[Head], n_layers: int, n_heads: int, n_sets: int, seed: int) -> dict[str, RandomHeads]:
    """Draw random sets of as many heads, from the same layers and from any layer, because either control alone misleads.

    Heads of any layer differ in depth too, and heads of the same layers may have the same function.

    Args:
        heads: (layer, head) pairs that need controls.
        n_layers: of the model.
        n_heads: of each layer.
        n_sets: sets of each control.
        seed: of the draws.

    Returns:
        The controls "same layers", which `stats.random_heads` weakens where these have too few other heads, and "any layer".

    Raises:
        ValueError: `heads` is empty or outside the model.
    """
    same = random_heads(heads, n_layers, n_heads, n_sets, rng(seed, "random sets"))
    in_one_row = [(0, layer * n_heads + head) for layer, head in heads]
    drawn = random_heads(in_one_row, 1, n_layers * n_heads, n_sets, rng(seed, "any layer")).sets
    anywhere = [tuple(divmod(head, n_heads) for _, head in one) for one in drawn]
    return {"same layers": same, "any layer": RandomHeads(same.heads, anywhere)}


def of_swaps(values: Float[np.ndarray, "*set prompt"]) -> Float[np.ndarray, "*set swap"]:
    """Compute paired logit differences for `parallel.WordPrompts`, in which a swap's two prompts are adjacent.

    Args:
        values: logit differences.

    Returns:
        One number per swap.
    """
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
    """Measure how path patching from every head at END to the logits changes the correct word's logit (arXiv 2502.11806).

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        plus: X+, the prompts that are patched.
        minus: X-, the prompts that heads' outputs at the last token are taken from, paired by order.
        subspace: patch only along the direction in which X+ and X- differ.
        store: a folder in which finished results are saved, some prompts at a time.
        batch_size: prompts per forward pass.
        progress: show bars.

    Returns:
        The change of the logit, NaN for a head that has no such direction; and the logit of the untouched run.

    Raises:
        ValueError: for what `patching.patch` refuses, and for a store of another run.
    """
    shape = n_layers(model.config), n_heads(model.config)
    senders = all_paths(model.config, ("logits",), positions="last", subspace=subspace)
    paths = [path for path in senders if path.sender_node.site == "z"]
    sending: list[Spec] = [path.sender_patch for path in paths]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    directions = concept_directions(model, sending, plus, minus, missing="zeros", **options)
    clean, change = np.empty(len(plus), np.float32), np.empty((len(paths), len(plus)), np.float32)
    facts = store_facts(resolve(sending, model, plus, minus), as_metric("logit"), range(len(plus)))
    with ExitStack() as stack:
        kept = None if store is None else stack.enter_context(open_shared_store(store, facts, {"prompts": AT_ONCE}))
        done = on_all_ranks(lambda: {} if kept is None else kept.finished)
        for number, start in enumerate(range(0, len(plus), AT_ONCE)):
            some = range(start, min(start + AT_ONCE, len(plus)))
            if number not in done:
                of = patch(model, paths, plus.take(some), minus.take(some), "logit", directions=directions, **options)
                done[number] = {"clean": of.baseline, "change": of.intervened - of.baseline}
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
    """The study's first attempt: set each head separately to its mean, maximum or minimum over some texts, or to zero.

    Args:
        model: a causal language model with a card.
        sources: the texts.
        kinds: the replacements, in order.
        **options: passed to `Reference.compute`.

    Yields:
        tuple[Replacement, list[Spec], Reference]: a kind, one intervention per head, and the reference it takes values from.
    """
    places = [("z", layer) for layer in range(n_layers(model.config))]
    base = Reference.compute(model, sources, places, bank=("all",), **options)
    for kind in kinds:
        specs: list[Spec] = list(all_heads(model.config, "zero" if kind == "zero" else "mean"))
        yield kind, specs, extreme_of(base, kind) if kind == "maximum" or kind == "minimum" else base


def extreme_of(reference: Reference, which: Literal["maximum", "minimum"]) -> Reference:
    """Replace a reference's mean over tokens by the largest or smallest value of each dimension, for use in a mean ablation.

    Args:
        reference: computed with bank=("all",).
        which: maximum or minimum.

    Returns:
        A copy with these values in place of the mean.

    Raises:
        ValueError: the reference has another bank.
    """
    if reference.bank != ("all",):
        raise ValueError("extremes are of all tokens; compute the reference with bank=('all',).")
    found = {}
    for place in map(label, reference.places):
        rows = reference.tensors[f"bank/{place}"].float()
        found[f"mean/{place}"] = rows.amax(0) if which == "maximum" else rows.amin(0)
    return replace(reference, tensors=reference.tensors | found)
