"""What attribution requires of a model and a metric: logits at the last token, and a usable gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from modelcards import card_of
from pyvene_ext.engine.plain import ANSWERS_ONLY, METRICS
from pyvene_ext.models.devices import input_device
from pyvene_ext.prompts.tokenized import Batch
from pyvene_ext.specs.joint import Spec, members

ADDS = ("attention_contribution", "mlp_contribution")  # what a block adds to the residual stream


def check_differentiable(metric: str, allowed: tuple[str, ...], dtype: torch.dtype) -> None:
    """Check that a metric has a usable gradient.

    Args:
        metric: its name.
        allowed: the metrics that have one here.
        dtype: the model's.

    Raises:
        ValueError: the metric is unknown, has no useful gradient, or one that float16 rounds to 0.
    """
    if metric in METRICS and metric not in allowed:
        why = f"the gradient of {metric!r} is 0 or undefined everywhere"
        if metric == "kl":
            why = "kl to the base run has no first-order term there; only integrated gradients of several steps measure it"
        raise ValueError(f"{why}: choose among {', '.join(allowed)}.")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose among {', '.join(allowed)}.")
    check_gradient(metric, dtype)


def check_gradient(metric: str, dtype: torch.dtype) -> None:
    """Check that gradients of a metric do not vanish in the model's dtype.

    Args:
        metric: its name, or a description for the message.
        dtype: the model's.

    Raises:
        ValueError: float16 rounds them to 0.
    """
    if dtype == torch.float16 and metric not in ANSWERS_ONLY:
        raise ValueError(f"gradients of {metric} are too small for float16; load the model in bfloat16 or float32.")


def check_places(model: PreTrainedModel, specs: Iterable[Spec]) -> None:
    """Check that gradients can be taken at the specs' places.

    Args:
        model: a causal language model with a card.
        specs: single and joint specs.

    Raises:
        ValueError: a spec edits the stream between attention and MLP, and no module of the model receives it whole (OPT).
    """
    card = card_of(model)
    for edit in (edit for spec in specs for edit in members(spec)):
        if edit.site == "resid_mid" and card.is_tap(model, "resid_mid"):
            raise ValueError(
                f"{edit.name}: in {card.family} the MLP and the residual stream beside it receive separate tensors, so that no "
                "gradient can be taken there; choose another site."
            )


def answer_logits(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Run the model on a batch.

    Args:
        model: a causal language model.
        batch: the prompts.

    Returns:
        The logits at each prompt's last token.
    """
    last = torch.tensor(batch.last_columns)
    # A number rather than the columns themselves, which accelerate would move to another device than the tensor they index.
    logits = model(**batch.inputs(input_device(model)), use_cache=False, logits_to_keep=batch.logits_to_keep).logits
    return logits[torch.arange(len(last)), last - last.min()]
