"""The plain engine: run specs one by one through `IntervenableModel` and keep one number per intervention and prompt (or token).

It defines what a spec does. Every faster engine is tested for equality with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pyvene_ext.engine import metrics
from pyvene_ext.engine.compile import compile_spec
from pyvene_ext.engine.resolve import Resolved, resolve
from pyvene_ext.intervenable.model import IntervenableModel
from pyvene_ext.intervenable.statistics import Reference
from pyvene_ext.models.devices import input_device, no_gradients
from pyvene_ext.models.modes import evaluating
from pyvene_ext.prompts.tokenized import (
    Batch,
    PaddingSide,
    TokenizedPrompts,
    check_tokenized,
)
from pyvene_ext.specs.joint import (
    OneSpec,
    Spec,
    needs,
)

if TYPE_CHECKING:
    import pandas as pd

# Each takes the logits at the last token, [batch vocab], the batch and the clean logits.
METRICS: dict[str, Callable[[Tensor, Batch, Any], Tensor]] = {
    "logit_diff": lambda logits, batch, clean: metrics.logit_diff(logits, batch.answer_ids),
    "probability": lambda logits, batch, clean: metrics.probability(logits, batch.answer_ids),
    "rank": lambda logits, batch, clean: metrics.rank(logits, batch.answer_ids),
    "accuracy": lambda logits, batch, clean: metrics.accuracy(logits, batch.answer_ids),
    "kl": lambda logits, batch, clean: metrics.kl(clean, logits),
    "logit": lambda logits, batch, clean: metrics.logit(logits, batch.answer_ids),
}
# The same with one number per token of a prompt, [batch pos]; `run` and `sweep` read these too, on prompts of equal length.
TOKEN_METRICS: dict[str, Callable[[Tensor, Batch, Any], Tensor]] = {
    "token_probabilities": lambda logits, batch, clean: metrics.token_probabilities(logits, batch.input_ids),
}
ANSWERS_ONLY = ("logit_diff", "logit")  # metrics that read only the logits of the two answers


@dataclass(frozen=True)
class Result:
    """The effect of a list of interventions on every prompt.

    Attributes:
        names: the interventions' names (`spec_name`).
        metric: name of the metric; one of `TOKEN_METRICS` has a value per token of a prompt, as the last axis.
        baseline: the metric of the untouched run of these prompts, whatever they are.
        intervened: the metric under each intervention.
    """

    names: tuple[str, ...]
    metric: str
    baseline: Float32[np.ndarray, " n_prompts *pos"]
    intervened: Float32[np.ndarray, "n_interventions n_prompts *pos"]

    @property
    def delta(self) -> Float32[np.ndarray, "n_interventions n_prompts *pos"]:
        """Baseline minus intervened: positive where the intervention lowered the metric."""
        return self.baseline - self.intervened

    def to_frame(self) -> pd.DataFrame:
        """Convert to a table with one row per intervention and prompt (and token, for a metric with a value per token).

        Returns:
            A table with the columns intervention (its name), prompt (its number, from 0), pos (for a token metric), baseline,
            intervened and delta.
        """
        import pandas as pd  # takes a second to import, and most runs need no table

        names = ("intervention", "prompt", "pos")[: self.intervened.ndim]
        rows = pd.MultiIndex.from_product([self.names, *map(range, self.intervened.shape[1:])], names=names)
        baseline = np.broadcast_to(self.baseline, self.intervened.shape)
        columns = {"baseline": baseline, "intervened": self.intervened, "delta": self.delta}
        return pd.DataFrame({name: values.ravel() for name, values in columns.items()}, rows).reset_index()


def reference_for(
    specs: Iterable[Spec],
    model: PreTrainedModel,
    prompts: TokenizedPrompts,
    *,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Reference | None:
    """Compute the reference statistics that specs need, once for several runs.

    Args:
        specs: single and joint specs.
        model: a causal language model with a card.
        prompts: the reference set.
        batch_size: prompts per forward pass.
        cache_dir: a folder to read them from, or to save them to.
        progress: show a bar.

    Returns:
        The statistics, to be passed to `run` or `sweep` as `reference`; None if the specs need none.

    Raises:
        ValueError: the reference set lacks a position, or activations are not finite.
    """
    wanted = needs(specs)
    if not wanted.places:
        return None
    return Reference.compute(
        model, prompts, **wanted._asdict(), batch_size=batch_size, cache_dir=cache_dir, progress=progress
    )


def run(
    model: PreTrainedModel,
    specs: OneSpec | Iterable[Spec],
    prompts: TokenizedPrompts,
    metric: str = "logit_diff",
    reference: Reference | None = None,
    *,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool | tqdm = True,
    baseline: Float32[np.ndarray, " n_prompts *pos"] | None = None,
) -> Result:
    """Run every spec on every prompt and read one metric at each prompt's last token.

    Args:
        model: a causal language model with a card; used in eval mode and restored afterwards, also after an error.
        specs: one edit, or a list of edits and of tuples of them (made jointly).
        prompts: the prompts that are intervened on.
        metric: logit_diff, probability, rank, accuracy, kl (to the clean run) or logit (of the correct answer); or
            token_probabilities, the probability that each of the prompt's own tokens comes next, for prompts of equal length.
        reference: statistics that replacements are computed from; by default those of `prompts`, where they are needed.
        batch_size: prompts per forward pass.
        padding_side: left or right; numbers do not depend on it.
        progress: show a bar; or a bar of a longer run, advanced by one per prompt and intervention.
        baseline: `Result.baseline` of an earlier run with the same model, prompts and metric, to save the untouched run (kl needs
            its logits and runs it anyway).

    Returns:
        The metric by intervention and prompt, with and without the intervention.

    Raises:
        ValueError: before the model runs, for a spec that does not fit the model, the prompts or the reference set.
    """
    check_metric(model, prompts, metric, of_tokens=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    return run_resolved(
        resolved, metric, batch_size=batch_size, padding_side=padding_side, progress=progress, baseline=baseline
    )


def run_resolved(
    resolved: Resolved,
    metric: str,
    *,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool | tqdm = True,
    baseline: Float32[np.ndarray, " n_prompts *pos"] | None = None,
) -> Result:
    """Run specs that are already resolved, as `run` does; missing statistics are computed.

    Args:
        resolved: the specs on the prompts.
        metric: as for `run`.
        batch_size: prompts per forward pass.
        padding_side: left or right.
        progress: as for `run`.
        baseline: as for `run`.

    Returns:
        The metric by intervention and prompt, with and without the intervention.

    Raises:
        ValueError: `baseline` has another shape.
    """
    model, prompts, specs = resolved.model, resolved.prompts, resolved.specs
    shape = (len(prompts), len(prompts.input_ids[0])) if metric in TOKEN_METRICS else (len(prompts),)
    if baseline is not None and np.shape(baseline) != shape:
        each = "one per token" if metric in TOKEN_METRICS else "one each"
        raise ValueError(f"baseline holds {np.shape(baseline)} values for {len(prompts)} prompts; give {each}.")
    shown = progress is True
    resolved = resolved.with_statistics(batch_size=batch_size, progress=shown)

    runs_clean = baseline is None or metric == "kl"
    values = np.empty(shape, np.float32) if runs_clean else np.asarray(baseline, np.float32)
    intervened = np.empty((len(specs), *shape), np.float32)
    device = input_device(model)
    structures: dict[tuple, IntervenableModel] = {}  # shared by specs that differ in heads or positions only
    own_bar = tqdm(total=len(specs) * len(prompts), unit="prompt", smoothing=0.1, disable=not shown)
    bar = progress if isinstance(progress, tqdm) else own_bar
    with own_bar, evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size, padding_side):
            batch = batch.to(device)
            base = {**batch.inputs(), "use_cache": False, "logits_to_keep": batch.logits_to_keep}
            clean_logits = None
            if runs_clean:
                clean_logits = metrics.last_logits(model(**base).logits, batch)
                values[batch.index] = measure(metric, clean_logits, batch, clean_logits)
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
                logits = metrics.last_logits(output.logits, batch)
                intervened[number, batch.index] = measure(metric, logits, batch, clean_logits)
                bar.update(len(batch.index))
    return Result(resolved.names, metric, values, intervened)


def check_metric(model: PreTrainedModel, prompts: TokenizedPrompts, metric: str, *, of_tokens: bool = False) -> None:
    """Check that a metric can be read on these prompts.

    Args:
        model: the model that is run.
        prompts: the prompts that it is read on.
        metric: its name.
        of_tokens: allow `TOKEN_METRICS`.

    Raises:
        ValueError: the metric is unknown or not allowed, the prompts do not fit it or the model, or the model has no logits.
    """
    if metric in TOKEN_METRICS and not of_tokens:
        raise ValueError(f"{metric} is one number per token; here choose among {', '.join(METRICS)}.")
    if metric not in METRICS | TOKEN_METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose among {', '.join(METRICS | TOKEN_METRICS)}.")
    check_tokenized(model, prompts)
    lengths = sorted(map(len, prompts.input_ids))
    if metric in TOKEN_METRICS and lengths and lengths[0] < lengths[-1]:
        raise ValueError(
            f"{metric} has one number per token, so all prompts must have the same length, not {lengths[0]} to {lengths[-1]} "
            "tokens; run each length separately."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model."
        )


def measure(
    metric: str, logits: Float[Tensor, "batch vocab"], batch: Batch, clean: Float[Tensor, "batch vocab"] | None
) -> Float32[np.ndarray, " batch *pos"]:
    """Compute a metric for a batch of prompts.

    Args:
        metric: its name.
        logits: at the prompts' last tokens, with the intervention.
        batch: the prompts.
        clean: the same logits of the untouched run, for kl.

    Returns:
        One number per prompt, or per token for `TOKEN_METRICS`.
    """
    return (METRICS | TOKEN_METRICS)[metric](logits, batch, clean).float().cpu().numpy()
