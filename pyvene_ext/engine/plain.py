"""The plain engine: run specs one by one through `IntervenableModel` and keep one number per intervention and prompt (or token).

It is the definition of what a spec does. Every faster engine is tested equal to it.
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

# Each takes the answer position's logits, [batch vocab], the batch and the clean logits.
METRICS: dict[str, Callable[[Tensor, Batch, Any], Tensor]] = {
    "logit_diff": lambda logits, batch, clean: metrics.logit_diff(logits, batch.answer_ids),
    "probability": lambda logits, batch, clean: metrics.probability(logits, batch.answer_ids),
    "rank": lambda logits, batch, clean: metrics.rank(logits, batch.answer_ids),
    "accuracy": lambda logits, batch, clean: metrics.accuracy(logits, batch.answer_ids),
    "kl": lambda logits, batch, clean: metrics.kl(clean, logits),
    "logit": lambda logits, batch, clean: metrics.logit(logits, batch.answer_ids),
}
# The same with one number for each token of a prompt, [batch pos]: what `run` and `sweep` read besides, on prompts of one length.
TOKEN_METRICS: dict[str, Callable[[Tensor, Batch, Any], Tensor]] = {
    "token_probabilities": lambda logits, batch, clean: metrics.token_probabilities(logits, batch.input_ids),
}
ANSWERS_ONLY = ("logit_diff", "logit")  # metrics that read no logits but those of the two answers


@dataclass(frozen=True)
class Result:
    """What a list of interventions did to every prompt.

    Attributes:
        names: of the interventions, as `spec_name` gives them.
        metric: which number was kept; one of `TOKEN_METRICS` has one for every token of a prompt, as a last axis.
        clean: it, of the untouched model.
        intervened: it, under each intervention.
    """

    names: tuple[str, ...]
    metric: str
    clean: Float32[np.ndarray, " n_prompts *pos"]
    intervened: Float32[np.ndarray, "n_interventions n_prompts *pos"]

    @property
    def delta(self) -> Float32[np.ndarray, "n_interventions n_prompts *pos"]:
        """Clean minus intervened: positive where the intervention lowered the metric."""
        return self.clean - self.intervened

    def to_frame(self) -> pd.DataFrame:
        """One row an intervention and prompt; of a token metric one for each of the prompt's tokens.

        Returns:
            A table with the columns intervention (its name), prompt (its number, from 0), pos (of a token metric), baseline,
            intervened and delta.
        """
        import pandas as pd  # takes a second to import, and most runs need no table

        names = ("intervention", "prompt", "pos")[: self.intervened.ndim]
        rows = pd.MultiIndex.from_product([self.names, *map(range, self.intervened.shape[1:])], names=names)
        baseline = np.broadcast_to(self.clean, self.intervened.shape)
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
    """The statistics over `prompts` that these specs need, None if they need none; for `run`, and to be used in several runs."""
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
    clean: Float32[np.ndarray, " n_prompts *pos"] | None = None,
) -> Result:
    """Run every spec on every prompt and read one metric at each prompt's last token.

    Args:
        model: a causal language model with a card; used in eval mode and left as it was, also after an error.
        specs: one ablation, or a list of ablations and of tuples of them (done together).
        metric: logit_diff, probability, rank, accuracy, kl (to the clean run) or logit (of the right answer alone); or
            token_probabilities, of each prompt's own tokens to come next, for prompts of one length.
        reference: statistics to replace by; if some are needed and none are given, those of `prompts` themselves.
        progress: show a bar, or advance this one of a longer run, by one a prompt and intervention.
        clean: `Result.clean` of an earlier run with the same model, prompts and metric, which then is not run again (kl needs
            the clean logits and runs them anyway).

    Raises ValueError, before the model runs, for a spec that does not fit the model, the prompts or the reference set.
    """
    check_metric(model, prompts, metric, of_tokens=True)
    resolved = resolve(specs, model, prompts, reference=reference, directions={})
    return run_resolved(
        resolved, metric, batch_size=batch_size, padding_side=padding_side, progress=progress, clean=clean
    )


def run_resolved(
    resolved: Resolved,
    metric: str,
    *,
    batch_size: int = 8,
    padding_side: PaddingSide = "left",
    progress: bool | tqdm = True,
    clean: Float32[np.ndarray, " n_prompts *pos"] | None = None,
) -> Result:
    """`run` of what is resolved already; statistics that are needed and not there yet are computed."""
    model, prompts, specs = resolved.model, resolved.prompts, resolved.specs
    shape = (len(prompts), len(prompts.input_ids[0])) if metric in TOKEN_METRICS else (len(prompts),)
    if clean is not None and np.shape(clean) != shape:
        each = "one for each of their tokens" if metric in TOKEN_METRICS else "one each"
        raise ValueError(f"clean holds {np.shape(clean)} values for {len(prompts)} prompts; give {each}.")
    shown = progress is True
    resolved = resolved.measured(batch_size=batch_size, progress=shown)

    runs_clean = clean is None or metric == "kl"
    before = np.empty(shape, np.float32) if runs_clean else np.asarray(clean, np.float32)
    intervened = np.empty((len(specs), *shape), np.float32)
    device = input_device(model)
    structures: dict[tuple, IntervenableModel] = {}  # specs that differ in heads or positions only share one
    own_bar = tqdm(total=len(specs) * len(prompts), unit="prompt", smoothing=0.1, disable=not shown)
    bar = progress if isinstance(progress, tqdm) else own_bar
    with own_bar, evaluating(model), no_gradients(model):
        for batch in prompts.batches(batch_size, padding_side):
            batch = batch.to(device)
            base = {**batch.inputs(), "use_cache": False}
            clean_logits = None
            if runs_clean:
                clean_logits = metrics.last_logits(model(**base).logits, batch)
                before[batch.index] = measure(metric, clean_logits, batch, clean_logits)
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
    return Result(resolved.names, metric, before, intervened)


def check_metric(model: PreTrainedModel, prompts: TokenizedPrompts, metric: str, *, of_tokens: bool = False) -> None:
    """Raise ValueError for a metric that cannot be read here; `of_tokens` allows `TOKEN_METRICS`."""
    if metric in TOKEN_METRICS and not of_tokens:
        raise ValueError(f"{metric} is a number for each token; here choose among {', '.join(METRICS)}.")
    if metric not in METRICS | TOKEN_METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose among {', '.join(METRICS | TOKEN_METRICS)}.")
    check_tokenized(model, prompts)
    lengths = sorted(map(len, prompts.input_ids))
    if metric in TOKEN_METRICS and lengths and lengths[0] < lengths[-1]:
        raise ValueError(
            f"{metric} has a number for each token, so that all prompts must be equally long, not {lengths[0]} to {lengths[-1]} "
            "tokens; run each length by itself."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no logits over a vocabulary; load the model as a causal language model."
        )


def measure(
    metric: str, logits: Float[Tensor, "batch vocab"], batch: Batch, clean: Float[Tensor, "batch vocab"] | None
) -> Float32[np.ndarray, " batch *pos"]:
    """A metric of some prompts, given the logits at their last tokens, with an intervention and (for kl) without."""
    return (METRICS | TOKEN_METRICS)[metric](logits, batch, clean).float().cpu().numpy()
