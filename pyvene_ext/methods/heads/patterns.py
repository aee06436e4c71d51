"""Attention patterns read while the model runs: one forward pass per batch, a callback per layer, nothing stored.

def on_pattern(layer, batch, pattern):
    for row, length in enumerate(batch.lengths):
        print(layer, batch.index[row], pattern[row, :, -length:, -length:].shape)

read_patterns(model, prompts, on_pattern)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import Taps, card_of, n_layers
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.hooks import hook_component, split_heads
from pyvene_ext.models.latent_steps import is_unrolling
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, TokenizedPrompts, check_tokenized

OnPattern = Callable[[int, Batch, Float[Tensor, "batch head query key"]], None]


def check_patterns(model: PreTrainedModel) -> None:
    """Check that a model's attention patterns can be read.

    Args:
        model: a model with a card.

    Raises:
        ValueError: the family's card does not expose them.
    """
    card_of(model).component(model, "attention_pattern")


def read_patterns(
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    on_pattern: OnPattern,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> None:
    """Call `on_pattern(layer, batch, pattern)` once for every layer and batch while the model runs.

    Batches are padded on the left: the pattern of row r's prompt is `pattern[r, :, -n:, -n:]` with n = `batch.lengths[r]`.
    Patterns are not stored, so memory does not grow with the number of layers. The unembedding is not run.

    Args:
        model: with a card, and attention patterns that can be read (eager or sdpa); used in eval mode and restored afterwards,
            also after an error.
        prompts: in any order of lengths; `batch.index` says which ones a batch holds.
        on_pattern: called with the layer, the batch (on the CPU) and the pattern (on the layer's device, in the model's dtype).
        batch_size: prompts per forward pass.
        progress: show a bar.

    Raises:
        ValueError: before the model runs, for prompts that are missing, empty, too long, not tokenised or of another tokenizer.
    """
    card = card_of(model)
    check_prompts(model, prompts)
    batches = prompts.batches(batch_size)
    layers = range(n_layers(model.config))
    bar = progress_bar(len(prompts), "prompt", "patterns", shown=progress)
    with bar, evaluating(model), no_gradients(model), ExitStack() as hooks:
        running: list[Batch] = []

        def at_pattern(layer: int, pattern: Tensor) -> None:
            if not is_unrolling(model):
                on_pattern(layer, running[0], split_heads(pattern, "attention_pattern", model))

        hooks.enter_context(Taps(model, card, [("attention_pattern", layer) for layer in layers]))
        for layer in layers:
            hook_component(model, ("attention_pattern", layer), partial(at_pattern, layer), hooks)
        for batch in batches:
            running[:] = [batch]
            model.base_model(**batch.inputs(input_device(model)), use_cache=False)
            bar.update(len(batch.index))


def check_prompts(model: PreTrainedModel, prompts: TokenizedPrompts) -> None:
    """Check that a model can run on prompts.

    Args:
        model: the model.
        prompts: the prompts.

    Raises:
        ValueError: they are missing, empty, too long, not tokenised or of another tokenizer.
    """
    check_tokenized(model, prompts)
    if not len(prompts):
        raise ValueError("there are no prompts to look at; give at least one.")
