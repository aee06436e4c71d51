"""The plain engine: run specs one by one through `IntervenableModel` and keep one number per intervention and prompt (or token).

It defines what a spec does. Every faster engine is tested for equality with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pyvene_ext.engine.compile import compile_spec
from pyvene_ext.engine.measure import Metric, MetricLike, as_array, check_metric, first_tokens_note
from pyvene_ext.engine.metrics import check_finite, last_logits
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.engine.results import Result
from pyvene_ext.engine.sequences import Sequences, answers_measured
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.io.bars import progress_bar
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import Batch, PaddingSide, TokenizedPrompts, check_tokenized
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    as_specs,
    needs,
)
from pyvene_ext.specs.sources import Sources


def reference_for(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    *,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Reference | None:
    """Compute the reference statistics that specs need, once for several runs.

    Args:
        model: a causal language model with a card.
        specs: single and joint specs.
        prompts: the reference set.
        batch_size: prompts per forward pass.
        cache_dir: a folder to read them from, or to save them to.
        progress: show a bar.

    Returns:
        The statistics, to be passed to `run` or `sweep` as `reference`; None if the specs need none.

    Raises:
        ValueError: the reference set lacks a position, or activations are not finite.
    """
    check_tokenized(model, prompts)
    wanted = needs(as_specs(specs))
    if not wanted.places:
        return None
    return Reference.compute(
        model, prompts, **wanted._asdict(), batch_size=batch_size, cache_dir=cache_dir, progress=progress
    )


def run(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: MetricLike = "logit_diff",
    reference: Reference | None = None,
    *,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool | tqdm = True,
    baseline: Float32[np.ndarray, " n_prompts *pos"] | None = None,
) -> Result:
    """Run every spec on every prompt and read one metric: at each prompt's last token, at every token, or of whole answers.

    An answer of several tokens is read teacher-forced: the prompt runs followed by the answer, and the log-probabilities of the
    answer's tokens are summed. Edits are made in the prompt only ("all" is every token of the prompt); the answer's tokens run
    untouched and read the edited prompt through attention, so that the sum is the log-probability with which
    `generate(scope="prompt")` would write the answer.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        prompts: the prompts that are intervened on.
        metric: a name; a function (logits `[batch vocab]` at the last tokens, prompts) that returns one number per prompt,
            `[batch]`; or a `Metric`, to say more about it. Names: logit_diff, logit, probability, rank and accuracy, of the first
            tokens of the prompts' answers; answer_logprob and answer_logprob_diff, of whole answers; kl (to the untouched run);
            at every token next_token_loss, entropy and token_kl; and token_probabilities, the probability that each of the
            prompt's own tokens comes next, for prompts of equal length.
        reference: statistics that replacements are computed from; by default those of `prompts`, where they are needed.
        batch_size: prompts per forward pass.
        padding_side: left or right; numbers do not depend on it.
        progress: show a bar; or a bar of a longer run, advanced by one per prompt and intervention.
        baseline: `Result.baseline` of an earlier run with the same model, prompts and metric, to save the untouched run (kl needs
            its logits and runs it anyway); the first and the last prompt are run to compare.

    Returns:
        The metric by intervention and prompt, with and without the intervention.

    Raises:
        ValueError: before the model runs, for a spec that does not fit the model, the prompts or the reference set; a baseline of
            another run.
    """
    metric = check_metric(model, prompts, metric, per_token=True, of_answers=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    return run_resolved(
        resolved, metric, batch_size=batch_size, padding_side=padding_side, progress=progress, baseline=baseline
    )


def run_resolved(
    resolved: Resolved,
    metric: Metric,
    *,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool | tqdm = True,
    baseline: Float32[np.ndarray, " n_prompts *pos"] | None = None,
) -> Result:
    """Run specs that are already resolved, as `run` does; missing statistics are computed.

    Args:
        resolved: the specs on the prompts.
        metric: the metric, checked (`check_metric`).
        batch_size: prompts per forward pass.
        padding_side: left or right.
        progress: as for `run`.
        baseline: as for `run`.

    Returns:
        The metric by intervention and prompt, with and without the intervention.

    Raises:
        ValueError: `baseline` is not an array of floats, has another shape, or is of another run.
    """
    model, prompts, specs = resolved.model, resolved.prompts, resolved.specs
    shape = (len(prompts), max(map(len, prompts.input_ids))) if metric.per_token else (len(prompts),)
    if baseline is not None and (not isinstance(baseline, np.ndarray) or baseline.dtype.kind != "f"):
        raise ValueError("baseline takes Result.baseline of an earlier run, an array of floats, and no other numbers.")
    if baseline is not None and np.shape(baseline) != shape:
        each = "one per token" if metric.per_token else "one each"
        raise ValueError(f"baseline holds {np.shape(baseline)} values for {len(prompts)} prompts; give {each}.")
    if baseline is not None:
        _check_baseline(baseline, model, prompts, metric)
    shown = progress is True
    resolved = resolved.for_metric(metric).with_statistics(batch_size=batch_size, progress=shown)
    sequences, values_of = resolved.sequences, metric.__call__
    if metric.of_answers:
        prompts, shape, values_of = sequences.prompts, (len(sequences.prompts), 2), sequences.log_probabilities

    runs_clean = baseline is None or "clean" in metric.needs
    values = np.full(shape, np.nan, np.float32) if baseline is None else np.array(baseline, np.float32)
    intervened = np.full((len(specs), *shape), np.nan, np.float32)
    device = input_device(model)
    structures: dict[tuple, IntervenableModel] = {}  # shared by specs that differ in heads or positions only
    own_bar = progress_bar(len(specs) * len(prompts), "prompt", shown=shown, smoothing=0.1)
    bar = progress if isinstance(progress, tqdm) else own_bar
    with own_bar, evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size, padding_side):
            batch = batch.to(device)
            base: dict[str, Any] = {**batch.inputs(), "use_cache": False}
            if not (metric.of_tokens or metric.of_answers):
                base["logits_to_keep"] = batch.logits_to_keep
            if runs_clean:
                logits = _read_logits(metric, model(**base).logits, batch, sequences)
                batch = metric.with_clean(batch, logits)
                _put(values, metric, values_of(logits, batch), batch)
            for number, spec in enumerate(specs):
                compiled = compile_spec(spec, batch, resolved)
                structure = tuple(compiled.config.representations)
                if structure not in structures:
                    structures[structure] = IntervenableModel(compiled.config, model)
                iv = structures[structure]
                _, output = iv(
                    base,
                    unit_locations=compiled.unit_locations,
                    source_representations=compiled.source_representations(iv.sorted_keys),
                )
                logits = _read_logits(metric, output.logits, batch, sequences)
                _put(intervened[number], metric, values_of(logits, batch), batch)
                bar.update(len(batch.index))
    if metric.of_answers:
        counts = list(map(len, sequences.of_prompt))
        values = answers_measured(metric, values, counts) if runs_clean else values
        intervened = answers_measured(metric, intervened, counts)
    note = first_tokens_note(metric, resolved.prompts)
    return Result(resolved.names, metric.label, values, intervened, specs=resolved.specs, note=note)


def _check_baseline(
    baseline: Float[np.ndarray, " n_prompts *pos"], model: PreTrainedModel, prompts: TokenizedPrompts, metric: Metric
) -> None:
    """Raise ValueError if the first or the last prompt has another value when it runs, beyond what rounding does."""
    few = sorted({0, len(prompts) - 1})
    own = measured(model, prompts.take(few), metric)
    slack = 0.02 if model.dtype == torch.float32 else 0.2
    for prompt, value in zip(few, own, strict=True):
        given = baseline[prompt][: len(value)] if metric.per_token else baseline[prompt]
        if not np.allclose(given, value, rtol=slack, atol=slack, equal_nan=True):
            at = int(np.argmax(np.abs(np.nan_to_num(given - value))))
            here, there = np.ravel(value)[at], np.ravel(given)[at]
            raise ValueError(
                f"baseline is of another run: prompt {prompt} has {metric.label} {here:.4g} and not {there:.4g}; give "
                "Result.baseline of the same model, prompts and metric."
            )


def measured(
    model: PreTrainedModel, prompts: TokenizedPrompts, metric: Metric, *, batch_size: int = 8
) -> Float32[np.ndarray, " n_prompts *pos"]:
    """Compute a metric of untouched prompts.

    Args:
        model: the model.
        prompts: the prompts.
        metric: the metric, checked (`check_metric`).
        batch_size: prompts per forward pass.

    Returns:
        The metric of every prompt.
    """
    nothing = Resolved((), Sources(model, prompts), {}, Sequences.of_prompts(prompts))
    return run_resolved(nothing, metric, batch_size=batch_size, progress=False).baseline


def answer_logits(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Run the untouched model on a batch.

    Args:
        model: a causal language model.
        batch: the prompts.

    Returns:
        The logits at each prompt's last token.

    Raises:
        ValueError: logits are not finite; the message names the prompts.
    """
    inputs = batch.inputs(input_device(model))
    return last_logits(model(**inputs, use_cache=False, logits_to_keep=batch.logits_to_keep).logits, batch)


def _read_logits(
    metric: Metric, logits: Float[Tensor, "batch pos vocab"], batch: Batch, sequences: Sequences
) -> Float[Tensor, "batch *pos vocab"]:
    """The logits that a metric is read from, at the last tokens or at every token."""
    named = replace(batch, index=[sequences.prompt_of[sequence] for sequence in batch.index])  # for messages
    if not (metric.of_tokens or metric.of_answers):
        return last_logits(logits, named)
    check_finite(logits, named)
    return logits


def _put(into: Float32[np.ndarray, " prompt *pos"], metric: Metric, values: Tensor, batch: Batch) -> None:
    """Put a batch's values where their prompts are, those of tokens from each prompt's first token on."""
    if not metric.per_token:
        into[batch.index] = as_array(values)
        return
    for row, start, length, prompt in zip(as_array(values), batch.starts, batch.lengths, batch.index, strict=True):
        into[prompt, :length] = row[start : start + length]
